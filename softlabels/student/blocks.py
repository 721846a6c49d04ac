"""Logits to their own gradient in place, a few rows at a time where that takes copies of them.

C rows, V classes. Copies are needed by hard labels at a temperature other than 1, which have a
softmax of their own, and by several targets of tail "bucket", which have one each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from softlabels.student.kernel import Factors, evaluate_
from softlabels.student.several import Weighed

SCRATCH_BYTES = 4 * 2**20
"""Of each copy of a block's logits; there are at most three."""


class Scratch:
    """Room for what a block of rows needs beside its logits.

    Attributes:
        step: rows of a block.

    Args:
        like: for dtype and device.
        rows: C at most.
        num_classes: V.
        targets: how many each row has.
        apart: whether hard labels need a softmax of their own.
    """

    def __init__(
        self, like: Tensor, rows: int, num_classes: int, targets: int, apart: bool
    ) -> None:
        sums = min(max(targets - 1, 0), 2)
        rows = max(rows, 1)
        fitting = max(SCRATCH_BYTES // (like.itemsize * max(num_classes, 1)), 1)
        self.step = min(fitting, rows) if sums or apart else rows
        self._own = like.new_empty((self.step, num_classes)) if apart else None
        self._sums = like.new_empty((sums, self.step, num_classes))

    def own(self, block: Tensor) -> Tensor | None:
        """A copy of the block for the hard labels; None where they need none."""
        return None if self._own is None else self._own[: len(block)].copy_(block)

    def sums(self, rows: int) -> Tensor:
        """Float [0 to 2, rows, V]: where gradients of further targets are made and added up."""
        return self._sums[:, :rows]


def evaluate_blocks_(
    z: Tensor,
    targets: Sequence[Weighed],
    labels: Tensor,
    factors: Factors | None,
    temperature: float,
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """Each row's divergence, weighted and summed over its targets, and its label's log q, [C].

    Leaves in `z` the gradient of the logits, as `evaluate_` says; without factors, nothing of use.

    Args:
        z: float [C, V], the logits; overwritten.
        targets: one or more a row.
        labels: int64 [C], in [0, V).
        factors: None: no gradient.
        temperature: T.
        scratch: for these rows.
    """
    value, log_label = z.new_empty(len(z)), z.new_empty(len(z))
    for start in range(0, len(z), scratch.step):
        here = slice(start, min(start + scratch.step, len(z)))
        block = z[here]
        own = scratch.own(block)
        if temperature != 1:
            block.div_(temperature)
        value[here], log_label[here] = _evaluate_all_(
            block,
            [one.block(here) for one in targets],
            labels[here],
            None if factors is None else Factors(*(x[here] for x in factors)),
            own,
            scratch.sums(len(block)),
        )
    return value, log_label


def _evaluate_all_(
    z: Tensor,
    targets: Sequence[Weighed],
    labels: Tensor,
    factors: Factors | None,
    apart: Tensor | None,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    *others, last = targets
    total = None
    for number, one in enumerate(others):
        copy = sums[min(number, 1)].copy_(z)
        value, _ = evaluate_(copy, one.rows, labels, _factors(one, factors, hard=False))
        total = one.weigh(value) if total is None else total + one.weigh(value)
        if factors is not None and number:
            sums[0].add_(copy)
    value, log_label = evaluate_(z, last.rows, labels, _factors(last, factors, hard=True), apart)
    if total is None:
        return last.weigh(value), log_label
    if factors is not None:
        z.add_(sums[0])
    return total + last.weigh(value), log_label


def _factors(one: Weighed, factors: Factors | None, hard: bool) -> Factors | None:
    """What the gradient of one target counts; the hard label's part comes with one of them."""
    if factors is None:
        return None
    return Factors(
        factors.soft if one.weight is None else factors.soft * one.weight,
        factors.hard if hard else torch.zeros_like(factors.hard),
    )

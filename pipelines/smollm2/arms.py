"""What the students of the benchmark learn from, and the gradient that each of them gets.

N positions, V tokens, k stored ids, m draws. Every arm sees the same batches from the same start;
only the target differs. Stored targets are rounded as a table of profile compact stores them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from softlabels.store.shards import round_to_profile
from softlabels.student.losses import Targets, distillation_loss
from softlabels.targets import SoftTargets
from softlabels.teacher.extract import extract

Kind = Literal["hard", "live", "renormalize", "bucket", "sampled"]
WIDEST = 64
"""One stored top k serves every smaller one: a smaller k is a prefix."""


@dataclass(frozen=True)
class Arm:
    """Students that differ in their seed only.

    Attributes:
        kind: hard labels, the whole live distribution, or what stands for the stored one's tail.
        k: ids stored a position.
        draws: m, ids drawn from outside the top k.
    """

    kind: Kind
    k: int = 0
    draws: int = 0

    @property
    def name(self) -> str:
        """In files and pictures."""
        if self.kind in ("hard", "live"):
            return self.kind
        return f"{self.kind}-{self.k}" + (f"+{self.draws}" if self.draws else "")


MAIN = (
    Arm("hard"),
    Arm("live"),
    Arm("sampled", 16, 16),
    Arm("bucket", 32),
    Arm("renormalize", 32),
)
"""At equal stored bytes a position: 32 ids, or 16 and 16 draws."""
CURVE = (
    Arm("sampled", 8, 8),
    Arm("bucket", 16),
    Arm("sampled", 4, 4),
    Arm("bucket", 8),
    Arm("sampled", 32, 32),
    Arm("bucket", 64),
)

Stored = Mapping[str, Tensor]
"""One block of rows, [rows, positions, ...]: `hidden`, `top_ids`, `top_logprobs`, `top_tail`, and
`ids-K`, `logprobs-K`, `tail-K`, `draws-K`, `entropy` of a K + K sample."""


def store_top(logits: Tensor) -> dict[str, Tensor]:
    """The widest top k of N positions, unrounded, and the exact entropy."""
    found = extract(logits, k=min(WIDEST, logits.shape[1]))
    return {
        "top_ids": torch.from_numpy(found.ids),
        "top_logprobs": torch.from_numpy(found.logprobs),
        "top_tail": _tensor(found.tail),
        "entropy": _tensor(found.entropy),
    }


def store_draws(logits: Tensor, k: int, draws: int, keys: np.ndarray) -> dict[str, Tensor]:
    """The top k and m draws from its tail, of N positions, unrounded. keys: uint64 [N]."""
    found = extract(logits, k=k, draws=draws, draw_keys=keys)
    return {
        f"ids-{k}": torch.from_numpy(found.ids),
        f"logprobs-{k}": torch.from_numpy(found.logprobs),
        f"tail-{k}": _tensor(found.tail),
        f"draws-{k}": _tensor(found.draws),
    }


def rounded(arm: Arm, stored: Stored) -> SoftTargets:
    """What a table of this arm's k and m holds; `stored` by position."""
    if arm.kind == "sampled":
        ids, logprobs = stored[f"ids-{arm.k}"], stored[f"logprobs-{arm.k}"]
        tail, draws = stored[f"tail-{arm.k}"], stored[f"draws-{arm.k}"].numpy()
    else:
        ids, logprobs = stored["top_ids"][:, : arm.k], stored["top_logprobs"]
        rest = torch.cat([logprobs[:, arm.k :], stored["top_tail"][:, None]], dim=1)
        tail, logprobs, draws = torch.logsumexp(rest, 1), logprobs[:, : arm.k], None
    return round_to_profile(
        SoftTargets(
            num_positions=np.ones(len(ids), np.int32),
            ids=ids.numpy(),
            logprobs=logprobs.numpy(),
            tail=tail.numpy(),
            draws=draws,
            entropy=stored["entropy"].numpy(),
        ),
        "compact",
    )


def targets(arm: Arm, stored: Stored) -> Targets:
    """What such a table gives a student."""
    found = rounded(arm, stored)
    return Targets(
        torch.from_numpy(found.ids),
        torch.from_numpy(found.logprobs),
        _tensor(found.tail),
        None if found.draws is None else torch.from_numpy(found.draws),
        _tensor(found.entropy),
    )


Gradient = Callable[[Tensor, slice], tuple[float, Tensor]]
"""Of logits [C, V] at the positions of a slice of the batch: the loss and its gradient."""


def gradient_of(
    arm: Arm, labels: Tensor, stored: Stored | None, teacher_head: Tensor | None
) -> Gradient:
    """The arm's gradient over a batch of N positions; the loss is their mean.

    Args:
        labels: int64 [N], the next tokens.
        stored: by position; hard labels need none.
        teacher_head: float [V, D]; the live distribution is softmax of hidden times it.
    """
    total = len(labels)
    if arm.kind == "hard":
        return lambda logits, at: hard_gradient(logits, labels[at], total)
    assert stored is not None
    if arm.kind == "live":
        assert teacher_head is not None
        hidden, weight = stored["hidden"], teacher_head
        return lambda logits, at: live_gradient(logits, hidden[at] @ weight.T, total)
    found = targets(arm, stored)

    def of_stored(logits: Tensor, at: slice) -> tuple[float, Tensor]:
        part = Targets(*(None if value is None else value[at] for value in found))  # type: ignore[arg-type]
        leaf = logits.detach().requires_grad_()
        out = distillation_loss(
            leaf,
            part,
            tail=arm.kind,  # type: ignore[arg-type]
            normalizer=float(total),
            validate=False,
        )
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        return float(out.loss.detach()), gradient

    return of_stored


def hard_gradient(logits: Tensor, labels: Tensor, total: int) -> tuple[float, Tensor]:
    """Cross-entropy with the labels, summed over `total`: (softmax - onehot) / total."""
    logprobs = logits.log_softmax(1)
    loss = -float(logprobs.gather(1, labels[:, None]).sum()) / total
    gradient = logprobs.exp_()
    gradient.scatter_add_(1, labels[:, None], -torch.ones_like(gradient[:, :1]))
    return loss, gradient.div_(total)


def live_gradient(logits: Tensor, teacher: Tensor, total: int) -> tuple[float, Tensor]:
    """KL(teacher‖student) of whole distributions over `total`: (q - p) / total."""
    log_p, log_q = teacher.log_softmax(1), logits.log_softmax(1)
    p = log_p.exp()
    loss = float((p * (log_p - log_q)).sum()) / total
    return loss, log_q.exp_().sub_(p).div_(total)


def _tensor(values: np.ndarray | None) -> Tensor:
    assert values is not None
    return torch.from_numpy(values)

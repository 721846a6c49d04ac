"""Several teachers a position: their targets and weights, as what the kernel takes.

N positions, k stored ids a position, V classes, w_t the weight of teacher t at a position, W the
sum of w_t, r_t the mass of its tail.

Cross-entropy is linear in the target, so sum_t w_t KL(p_t‖q) has the gradient W q - sum_t w_t p_t:
that of one target, the mixture. Where a tail mode gives every id a probability of its own, all
teachers become one set of entries, and the softmax is taken once. A bucket's tail is spread as
the student spreads its own mass outside that teacher's ids, so it needs a softmax a teacher.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softlabels.errors import BadInputError, MismatchError
from softlabels.student.temper import Divergence, Rows, TailMode, Targets, resolve_tail

Several = Targets | Sequence[tuple[Targets, Tensor]]
"""What losses take: targets of N positions, or those of each teacher with its weights.

Weights are float [N] or [], finite and at least 0; a row's usually add up to 1, and otherwise its
KL counts their sum. Where one is 0 that teacher's row is not looked at, not even checked. k, m and
dtype may differ between teachers.

KL_i = sum_t w_it KL(p_it‖q_i), each as the tail mode defines it. Its gradient is that of the KL to
the mixture, KL(sum_t w_it p_it‖q_i): exactly where every class is stored, on average over draws
with tail "sampled". Its value exceeds that by the teachers' own disagreement, which no student
changes, so it does not fall to 0. Tails "sampled", "uniform", "label" and "renormalize" cost one
softmax, "bucket" one a teacher: there the loss is a sum of valid bounds, one of each teacher's KL.
The reverse KL is not linear in the target and takes one teacher.
"""


class Teacher(NamedTuple):
    """One teacher's targets.

    Attributes:
        targets: N positions.
        weight: float [N], what its KL counts; None: 1 everywhere.
    """

    targets: Targets
    weight: Float[Tensor, " N"] | None

    def rows(self, here: slice | Tensor) -> "Teacher":
        """The positions `here`, a slice (without a copy) or a mask."""
        own = Targets(*(None if x is None else x[here] for x in self.targets))  # type: ignore[arg-type]
        return Teacher(own, None if self.weight is None else self.weight[here])


class Weighed(NamedTuple):
    """A target whose tail is resolved, and what its divergence counts.

    Attributes:
        rows: of N positions.
        weight: float [N]; None: 1 everywhere.
    """

    rows: Rows
    weight: Tensor | None

    def block(self, here: slice) -> "Weighed":
        """The positions `here`, without a copy."""
        rows = Rows(*(None if x is None else x[here] for x in self.rows))  # type: ignore[arg-type]
        return Weighed(rows, None if self.weight is None else self.weight[here])

    def weigh(self, values: Tensor) -> Tensor:
        """`values` [N] times the weight; 0 where the weight is 0, whatever they are."""
        if self.weight is None:
            return values
        return (values * self.weight).masked_fill(self.weight == 0, 0)


def teachers_of(targets: Several | None, n: int) -> tuple[Teacher, ...]:
    """The teachers of `n` positions; none for None.

    Raises:
        BadInputError: it is neither targets nor pairs of targets and weights, or has no pair.
        MismatchError: weights are not one for each position.
    """
    if targets is None:
        return ()
    if isinstance(targets, Targets):
        return (Teacher(targets, None),)
    teachers = []
    for number, pair in enumerate(targets):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], Targets)):
            raise BadInputError(
                f"targets[{number}]: expected a pair of Targets and weights [N], "
                f"found {type(pair).__name__!r}"
            )
        own, weight = pair
        if not (isinstance(weight, Tensor) and weight.is_floating_point()):
            found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise BadInputError(f"targets[{number}]: expected weights of floats, found {found!r}")
        if tuple(weight.shape) not in ((), (1,), (n,)):
            raise MismatchError(
                f"targets[{number}]: expected weights of shape () or ({n},), "
                f"found {tuple(weight.shape)!r}"
            )
        teachers.append(Teacher(own, weight.expand(n)))
    if not teachers:
        raise BadInputError("targets: expected at least one teacher, found an empty sequence")
    return tuple(teachers)


def neutral(teacher: Teacher) -> Targets:
    """The targets, with nothing said where the weight is 0: what is there is never looked at.

    Such a row holds no id, all mass in its tail and draws of class 0, which every check lets pass.
    """
    targets, weight = teacher
    if weight is None:
        return targets
    unused = weight == 0
    rows, draws, entropy = unused.unsqueeze(1), targets.draws, targets.entropy
    return Targets(
        targets.ids.masked_fill(rows, -1),
        targets.logprobs.masked_fill(rows, -torch.inf),
        targets.tail_logprob.masked_fill(unused, 0),
        None if draws is None else draws.masked_fill(rows, 0),
        None if entropy is None else entropy.masked_fill(unused, 0),
    )


def resolve(
    teachers: Sequence[Teacher],
    tail: TailMode,
    labels: Int[Tensor, " N"] | None,
    num_classes: int,
    dtype: torch.dtype,
    divergence: Divergence = "forward",
) -> list[Weighed]:
    """What the kernel is called with: one target, or with tail "bucket" one a teacher.

    A single teacher's rows are those of `resolve_tail`. Arguments are as there.
    """
    weighed = [
        Weighed(
            resolve_tail(neutral(teacher), tail, labels, num_classes, dtype, divergence),
            None if teacher.weight is None else teacher.weight.to(dtype),
        )
        for teacher in teachers
    ]
    if len(weighed) == 1 or tail == "bucket":
        return weighed
    return [_merged(weighed, num_classes)]


def _merged(weighed: Sequence[Weighed], num_classes: int) -> Weighed:
    """All teachers as the entries of one target, of the mass 1; its weight is W.

    A density u_t outside S_t is one over all classes, taken off again on S_t.
    """
    weights = torch.stack([one.weigh(torch.ones_like(one.rows.entropy)) for one in weighed])
    total = weights.sum(0)
    shares = weights / total.where(total > 0, 1)
    ids, probs, uniform = [], [], None
    entropy = torch.zeros_like(total)
    for (rows, _), share in zip(weighed, shares, strict=True):
        at_head = rows.probs
        if rows.uniform is not None:
            outside = (num_classes - rows.stored.sum(1)).clamp(min=1)
            density = rows.uniform / outside
            at_head = at_head - density.unsqueeze(1) * rows.stored
            mass = share * density * num_classes
            uniform = mass if uniform is None else uniform + mass
        ids += [rows.ids, rows.extra_ids]
        probs += [share.unsqueeze(1) * at_head, share.unsqueeze(1) * rows.extra_probs]
        entropy += share * rows.entropy
    none = weighed[0].rows.ids[:, :0]
    merged = Rows(
        ids=none,
        stored=none.bool(),
        probs=probs[0][:, :0],
        extra_ids=torch.cat(ids, dim=1),
        extra_probs=torch.cat(probs, dim=1),
        spread=None,
        uniform=uniform,
        entropy=entropy,
    )
    return Weighed(merged, total)

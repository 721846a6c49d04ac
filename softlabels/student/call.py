"""What a loss is asked for, whether that can be, and what each position then counts.

N positions, V classes; T targets a position, 1 unless there are several teachers.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softlabels.errors import BadInputError, MismatchError, SoftLabelsError
from softlabels.student.kernel import Factors
from softlabels.student.several import Teacher, neutral
from softlabels.student.temper import (
    Divergence,
    Problem,
    TailMode,
    Targets,
    check_shapes,
    check_targets,
    range_problem,
    refuse,
    require_temperature,
    reverse_problem,
)

_INTS = (torch.int32, torch.int64)


class Call(NamedTuple):
    """What a loss is asked for; see `distillation_loss`."""

    tail: TailMode
    divergence: Divergence
    temperature: float
    kd_weight: float
    labels: Tensor | None
    weights: Tensor | None
    normalizer: float | Tensor | None


class Parts(NamedTuple):
    """What each row's two parts count, weights over the normalizer included.

    Attributes:
        at: int64 [N], the hard label, 0 where there is none.
        has_label: bool [N].
        factors: of the gradient of the logits: share kd_weight T, share (1 - kd_weight).
        kl_factor: float [N], share kd_weight T².
    """

    at: Int[Tensor, " N"]
    has_label: Bool[Tensor, " N"]
    factors: Factors
    kl_factor: Float[Tensor, " N"]

    def total(self, kl: Tensor, log_label: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [] and the cross-entropy of each label [N], 0 where there is none."""
        hard = (-log_label).masked_fill(~self.has_label, 0)
        value = (self.kl_factor * kl).masked_fill(self.kl_factor == 0, 0).sum()
        factor = self.factors.hard
        return value + (factor * hard).masked_fill(factor == 0, 0).sum(), hard


def share(call: Call, like: Float[Tensor, " N"]) -> Parts:
    """How much each row's soft target and hard label count; `like`: for dtype, N and device."""
    part, labels = torch.ones_like(like), call.labels
    if call.weights is not None:
        part = call.weights.to(part).expand_as(part)
    total = part.sum()
    if call.normalizer is not None:
        total = torch.as_tensor(call.normalizer, dtype=part.dtype, device=part.device)
    # A batch in which nothing counts has loss 0, not 0 / 0.
    part = part / total.where(total != 0, 1)
    has_label = torch.zeros_like(like, dtype=torch.bool) if labels is None else labels >= 0
    at = torch.zeros_like(has_label, dtype=torch.long)
    if labels is not None:
        at = labels.clamp(min=0).long()
    soft, hard = part * call.kd_weight * call.temperature, part * (1 - call.kd_weight) * has_label
    return Parts(at, has_label, Factors(soft, hard), soft * call.temperature)


def check(
    call: Call, teachers: Sequence[Teacher], n: int, num_classes: int, validate: bool = True
) -> None:
    """Raises for what is wrong with a call on `n` positions; warns where it will be regretted.

    Args:
        call: what is asked.
        teachers: the teachers; none is for hard labels alone.
        n: positions.
        num_classes: V.
        validate: whether to look at values, too.
    """
    _check_options(call)
    labels, weights = call.labels, call.weights
    if labels is not None and (labels.shape != (n,) or labels.dtype not in _INTS):
        raise MismatchError(
            f"labels: expected int32 or int64 of shape ({n},), "
            f"found {tuple(labels.shape)!r} of {labels.dtype}"
        )
    if weights is not None and tuple(weights.shape) not in ((), (1,), (n,)):
        raise MismatchError(f"weights: expected shape () or ({n},), found {tuple(weights.shape)!r}")
    if not teachers and call.kd_weight > 0:
        raise BadInputError(f"targets: expected some with kd_weight {call.kd_weight!r}, found None")
    if call.divergence == "reverse" and len(teachers) > 1:
        raise BadInputError(
            f"divergence 'reverse' with {len(teachers)} teachers: expected one, since the reverse "
            "KL is not linear in the target; use 'forward', or materialise the mixture first"
        )
    if validate and labels is not None:
        refuse([range_problem(labels, "labels", num_classes)])
    for number, teacher in enumerate(teachers):
        try:
            _check_teacher(call, teacher, n, num_classes, validate)
        except SoftLabelsError as error:
            if len(teachers) == 1:
                raise
            raise type(error)(f"targets[{number}] of {len(teachers)}: {error}") from error
    if teachers and call.tail == "renormalize":
        _warn_renormalize()


def _check_teacher(call: Call, teacher: Teacher, n: int, num_classes: int, validate: bool) -> None:
    """Raises for what is wrong with one teacher's targets where it has a weight."""
    check_shapes(teacher.targets)
    if teacher.targets.ids.shape[0] != n:
        raise MismatchError(
            f"targets: expected {n} rows as logits, found {teacher.targets.ids.shape[0]}"
        )
    targets, weight = teacher
    counts = torch.ones_like(targets.tail_logprob, dtype=torch.bool)
    if weight is not None:
        counts = weight != 0
    drawn = targets.draws is not None and targets.draws.shape[1] > 0
    has_tail = (targets.tail_logprob > -torch.inf) & counts
    if call.tail == "sampled" and not drawn and bool(has_tail.any()):
        raise BadInputError(
            "tail 'sampled': expected draws, found none, and there is tail mass; use 'bucket'"
        )
    if not validate:
        return
    if weight is not None:
        wrong = ~(torch.isfinite(weight) & (weight >= 0))
        refuse([Problem(wrong, weight, "weights of targets", "finite numbers >= 0")])
    said = neutral(teacher)
    check_targets(said, num_classes)
    if problems := _target_problems(call, said, counts, num_classes):
        refuse(problems)


def _check_options(call: Call) -> None:
    """Raises for options that cannot be meant."""
    require_temperature(call.temperature)
    if call.tail not in get_args(TailMode):
        raise BadInputError(f"tail: expected one of {get_args(TailMode)!r}, found {call.tail!r}")
    if call.divergence not in get_args(Divergence):
        raise BadInputError(
            f"divergence: expected one of {get_args(Divergence)!r}, found {call.divergence!r}"
        )
    if call.divergence == "reverse" and call.tail != "bucket":
        raise BadInputError(
            f"divergence 'reverse' with tail {call.tail!r}: expected tail 'bucket', since only "
            "there are both sides distributions over the same k + 1 classes"
        )
    if not 0 <= call.kd_weight <= 1:
        raise BadInputError(f"kd_weight: expected a number in [0, 1], found {call.kd_weight!r}")
    if call.labels is None and (call.kd_weight < 1 or call.tail == "label"):
        raise BadInputError(
            "labels: expected hard labels, found None, "
            f"with kd_weight {call.kd_weight!r}, tail {call.tail!r}"
        )


def _target_problems(
    call: Call, targets: Targets, counts: Tensor, num_classes: int
) -> list[Problem]:
    """What only the values show to be wrong with targets that are good in themselves.

    `counts`, bool [N], says where the teacher has a weight.
    """
    problems = []
    if call.labels is not None and call.tail == "label":
        wrong = (call.labels < 0) & (targets.tail_logprob > -torch.inf) & counts
        problems.append(
            Problem(wrong, call.labels, "labels", "a label wherever there is tail mass")
        )
    if call.divergence == "reverse":
        found = reverse_problem(targets, num_classes)
        problems.append(found._replace(wrong=found.wrong & counts.unsqueeze(1)))
    if call.tail == "renormalize":
        empty, lost = (targets.ids < 0).all(1) & counts, targets.tail_logprob
        problems.append(Problem(empty, lost, "targets", "an id to renormalize, beside the tail"))
    return problems


@functools.cache
def _warn_renormalize() -> None:
    warnings.warn(
        "tail 'renormalize' drops the teacher's tail mass: students come out overconfident; "
        "'sampled' is unbiased where draws are stored, 'bucket' a bound where they are not",
        UserWarning,
        stacklevel=4,  # the caller of the loss
    )

"""The distillation loss on given logits: KL to sparse targets, mixed with hard labels.

N positions, V classes, k stored ids a position. `softlabels.student.kernel` holds the arithmetic
and `softlabels.student.fused` the same loss for a linear head, without the [N, V] logits.
"""

import functools
import warnings
from typing import Any, NamedTuple, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from softlabels.errors import BadInputError, MismatchError
from softlabels.student.kernel import Factors, evaluate_, gradient_, normalize_outside_
from softlabels.student.temper import (
    Divergence,
    Problem,
    Rows,
    TailMode,
    Targets,
    check_shapes,
    check_targets,
    range_problem,
    refuse,
    require_temperature,
    rescale_head,
    resolve_tail,
    reverse_problem,
    temper,
)

__all__ = [
    "DistillationLoss",
    "Divergence",
    "Rows",
    "TailMode",
    "Targets",
    "check_targets",
    "distillation_loss",
    "gradient_",
    "normalize_outside_",
    "rescale_head",
    "resolve_tail",
    "temper",
]

_INTS = (torch.int32, torch.int64)


class DistillationLoss(NamedTuple):
    """What `distillation_loss` returns.

    Attributes:
        loss: float [], differentiable: sum of w (kd_weight T² KL + (1 - kd_weight) CE) over the
            normalizer.
        kl: float [N], detached; the divergence in nats, as the tail mode defines it; NaN where
            there were no targets.
        hard: float [N], detached; cross-entropy of the hard label at T = 1 in nats, 0 where the
            label is -1; None without labels.
    """

    loss: Float[Tensor, ""]
    kl: Float[Tensor, " N"]
    hard: Float[Tensor, " N"] | None


def distillation_loss(
    logits: Float[Tensor, "N V"],
    targets: Targets,
    *,
    tail: TailMode = "bucket",
    divergence: Divergence = "forward",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    labels: Int[Tensor, " N"] | None = None,
    weights: Float[Tensor, "#N"] | Float[Tensor, ""] | None = None,
    normalizer: float | Float[Tensor, ""] | None = None,
    validate: bool = True,
) -> DistillationLoss:
    """The distillation loss of N positions, with its KL and hard-label parts for reports.

    loss = sum_i w_i (kd_weight T² KL_i + (1 - kd_weight) CE_i) / normalizer, KL at T and CE at 1.
    d loss / d logits = w (kd_weight T (q - target) + (1 - kd_weight) (softmax(logits) - onehot))
    / normalizer, taken in the forward pass; backward multiplies. `TailMode` says what KL and
    target are in each mode.

    Several teachers: call once for each, with its weight times w and one normalizer, and add.

    Args:
        logits: any float dtype; computed in float32 (float64 stays). Gradients have this dtype.
        targets: values at `temperature`; the head is rescaled to the mass 1 - exp(tail) here.
        tail: what stands for the mass outside the stored ids.
        divergence: KL is KL(teacher‖student), or "reverse": KL(student‖teacher), for tail "bucket".
        temperature: T > 0, divides the logits.
        kd_weight: in [0, 1].
        labels: -1: no hard label, so no CE for that row (the normalizer stays the same).
        weights: loss weight of each position, or one for all; default 1.
        normalizer: default: the sum of weights. Give the global one across ranks or micro-batches.
        validate: look at values too (`check_targets`, label range, draws and labels that the mode
            needs). Shapes, dtypes and options are always checked. Switch it off only for targets
            that went through `check_targets` already, say once for each shard.

    Raises:
        BadInputError: an option or dtype is wrong, or the mode lacks the labels or draws it needs.
        MismatchError: shapes disagree, or ids or labels are not below V.
        DataError: targets contradict themselves; see `check_targets`. A reverse KL would be
            infinite.

    Source: T² and the mix with hard labels: Hinton, Vinyals, Dean, "Distilling the Knowledge in
        a Neural Network", 2015.
    """
    if logits.ndim != 2 or not logits.is_floating_point():
        raise BadInputError(
            f"logits: expected floats [N, V], found {tuple(logits.shape)!r} of {logits.dtype}"
        )
    call = Call(tail, divergence, temperature, kd_weight, labels, weights, normalizer)
    check(call, targets, len(logits), logits.shape[1], validate)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        z, value, kl, hard = _evaluate(logits, targets, call, with_gradient)
    loss = value
    if with_gradient:
        loss = cast(Tensor, _GradientInForward.apply(logits, value, z))  # type: ignore[no-untyped-call]
    return DistillationLoss(loss, kl, hard)


class Call(NamedTuple):
    """What a loss is asked for; see `distillation_loss`."""

    tail: TailMode
    divergence: Divergence
    temperature: float
    kd_weight: float
    labels: Tensor | None
    weights: Tensor | None
    normalizer: float | Tensor | None


def _evaluate(
    logits: Tensor, targets: Targets, call: Call, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient of the logits (where asked for), the loss, and each row's KL and CE."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = resolve_tail(
        targets, call.tail, call.labels, logits.shape[1], dtype, divergence=call.divergence
    )
    parts = share(call, rows.entropy)
    z = logits.to(dtype, copy=True)
    apart = z.clone() if call.temperature != 1 and call.labels is not None else None
    if call.temperature != 1:
        z.div_(call.temperature)
    kl, log_label = evaluate_(z, rows, parts.at, parts.factors if with_gradient else None, apart)
    value, hard = parts.total(kl, log_label)
    return z, value, kl, None if call.labels is None else hard


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


class _GradientInForward(torch.autograd.Function):
    """Returns a value whose gradient is already known."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        # float16 has too little range for a gradient that loss scaling has not reached yet.
        kept = gradient if logits.dtype == torch.float16 else gradient.to(logits.dtype)
        ctx.save_for_backward(kept)
        ctx.dtype = logits.dtype
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * factor).to(ctx.dtype), None, None


def check(
    call: Call, targets: Targets | None, n: int, num_classes: int, validate: bool = True
) -> None:
    """Raises for what is wrong with a call on `n` positions; warns where it will be regretted.

    Args:
        targets: None is for hard labels alone.
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
    problems = []
    if validate and labels is not None:
        problems.append(range_problem(labels, "labels", num_classes))
    if targets is not None:
        _check_targets_of(call, targets, n)
        if validate:
            check_targets(targets, num_classes)
            problems += _target_problems(call, targets, num_classes)
    elif call.kd_weight > 0:
        raise BadInputError(f"targets: expected some with kd_weight {call.kd_weight!r}, found None")
    if problems:
        refuse(problems)
    if targets is not None and call.tail == "renormalize":
        _warn_renormalize()


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


def _check_targets_of(call: Call, targets: Targets, n: int) -> None:
    """Raises where shapes and dtypes of targets do not fit the call."""
    check_shapes(targets)
    if targets.ids.shape[0] != n:
        raise MismatchError(f"targets: expected {n} rows as logits, found {targets.ids.shape[0]}")
    drawn = targets.draws is not None and targets.draws.shape[1] > 0
    has_tail = targets.tail_logprob > -torch.inf
    if call.tail == "sampled" and not drawn and bool(has_tail.any()):
        raise BadInputError(
            "tail 'sampled': expected draws, found none, and there is tail mass; use 'bucket'"
        )


def _target_problems(call: Call, targets: Targets, num_classes: int) -> list[Problem]:
    """What only the values show to be wrong with targets that are good in themselves."""
    problems = []
    if call.labels is not None and call.tail == "label":
        wrong = (call.labels < 0) & (targets.tail_logprob > -torch.inf)
        problems.append(
            Problem(wrong, call.labels, "labels", "a label wherever there is tail mass")
        )
    if call.divergence == "reverse":
        problems.append(reverse_problem(targets, num_classes))
    if call.tail == "renormalize":
        empty, lost = (targets.ids < 0).all(1), targets.tail_logprob
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

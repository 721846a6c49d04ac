"""The distillation loss on given logits: KL to sparse targets, mixed with hard labels.

N positions, V classes, k stored ids a position. `softlabels.student.kernel` holds the arithmetic
and `softlabels.student.fused` the same loss for a linear head, without the [N, V] logits.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from softlabels.errors import BadInputError
from softlabels.student.blocks import Scratch, evaluate_blocks_
from softlabels.student.call import Call, check, share
from softlabels.student.kernel import gradient_, normalize_outside_
from softlabels.student.several import Several, Teacher, resolve, teachers_of
from softlabels.student.temper import (
    Divergence,
    Rows,
    TailMode,
    Targets,
    check_targets,
    rescale_head,
    resolve_tail,
    temper,
)

__all__ = [
    "DistillationLoss",
    "Divergence",
    "Rows",
    "Several",
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


class DistillationLoss(NamedTuple):
    """What `distillation_loss` returns.

    Attributes:
        loss: float [], differentiable: sum of w (kd_weight T² KL + (1 - kd_weight) CE) over the
            normalizer.
        kl: float [N], detached; the divergence in nats, as the tail mode defines it; of several
            teachers the weighted sum; NaN where there were no targets.
        hard: float [N], detached; cross-entropy of the hard label at T = 1 in nats, 0 where the
            label is -1; None without labels.
    """

    loss: Float[Tensor, ""]
    kl: Float[Tensor, " N"]
    hard: Float[Tensor, " N"] | None


def distillation_loss(
    logits: Float[Tensor, "N V"],
    targets: Several,
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

    Args:
        logits: any float dtype; computed in float32 (float64 stays). Gradients have this dtype.
        targets: values at `temperature`; the head is rescaled to the mass 1 - exp(tail) here. Of
            several teachers pairs of them and weights; `Several` says what KL then is.
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
    teachers = teachers_of(targets, len(logits))
    check(call, teachers, len(logits), logits.shape[1], validate)
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        z, value, kl, hard = _evaluate(logits, teachers, call, with_gradient)
    loss = value
    if with_gradient:
        loss = cast(Tensor, _GradientInForward.apply(logits, value, z))  # type: ignore[no-untyped-call]
    return DistillationLoss(loss, kl, hard)


def _evaluate(
    logits: Tensor, teachers: tuple[Teacher, ...], call: Call, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradient of the logits (where asked for), the loss, and each row's KL and CE."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    n, v = logits.shape
    targets = resolve(teachers, call.tail, call.labels, v, dtype, call.divergence)
    z = logits.to(dtype, copy=True)
    parts = share(call, z.new_empty(n))
    apart = call.temperature != 1 and call.labels is not None
    scratch = Scratch(z, n, v, len(targets), apart)
    factors = parts.factors if with_gradient else None
    kl, log_label = evaluate_blocks_(z, targets, parts.at, factors, call.temperature, scratch)
    value, hard = parts.total(kl, log_label)
    return z, value, kl, None if call.labels is None else hard


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

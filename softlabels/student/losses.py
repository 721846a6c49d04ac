"""Distillation losses on given logits: forward KL to sparse targets, mixed with hard labels.

N positions, V classes, k stored ids a position, e further entries (draws, or the hard label).
z = logits / T; q = softmax(z); S: the stored ids; p_j: teacher probability; r: the tail mass.

Every tail mode is one target a row in four parts (`Rows`): probabilities on S, entries added
anywhere, a mass c spread outside S as the student spreads its own, and a density u for each id
outside S. With q_tail the student's mass outside S, and t = softmax of z outside S,

    cross-entropy  = - sum_S p log q - sum_extra w log q - c log q_tail - u sum_{v not in S} log q
    d/dz off S     = q - c t - u = t (q_tail - c) - u
    d/dz on S      = q - p
    extra entries  : - w, added

so the gradient is the softmax outside S times a row scale, plus a row constant, plus k + e
scattered entries. t and log q_tail come from logits by a softmax in which S is masked: q_tail is
never 1 - sum, and neither r / q_tail nor log q_tail is formed from a q_tail that underflowed.
`normalize_outside_` and `gradient_` are that arithmetic on any [C, V] block of rows.
"""

import functools
import warnings
from typing import Any, NamedTuple, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from softlabels.errors import BadInputError, MismatchError
from softlabels.student.temper import (
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
    temper,
)

__all__ = [
    "DistillationLoss",
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
        kl: float [N], detached; KL(teacher‖student) in nats, as the tail mode defines it.
        hard: float [N], detached; cross-entropy of the hard label at T = 1 in nats, 0 where the
            label is -1; None without labels.
    """

    loss: Float[Tensor, ""]
    kl: Float[Tensor, " N"]
    hard: Float[Tensor, " N"] | None


class LogProbs(NamedTuple):
    """The student's log-probabilities, nats, where the target asks for them.

    Attributes:
        head: float [N, k], log q on S; -inf at pads.
        extra: float [N, e], log q of the extra entries.
        label: float [N], log q of the hard label.
        tail: float [N], log q_tail.
        tail_mean: float [N], mean of log q over the ids outside S; None unless asked for.
    """

    head: Tensor
    extra: Tensor
    label: Tensor
    tail: Tensor
    tail_mean: Tensor | None


def distillation_loss(
    logits: Float[Tensor, "N V"],
    targets: Targets,
    *,
    tail: TailMode = "bucket",
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
        DataError: targets contradict themselves; see `check_targets`.

    Source: T² and the mix with hard labels: Hinton, Vinyals, Dean, "Distilling the Knowledge in
        a Neural Network", 2015.
    """
    _check_call(logits, targets, tail, temperature, kd_weight, labels, weights)
    if validate:
        _check_values(targets, tail, labels, logits.shape[1])
    if tail == "renormalize":
        _warn_renormalize()
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rows = resolve_tail(targets, tail, labels, logits.shape[1], dtype)
        share = _shares(rows, weights, normalizer)
        value, kl, hard, gradient = _evaluate(
            logits, rows, temperature, kd_weight, labels, share, with_gradient
        )
    loss = value
    if gradient is not None:
        loss = cast(Tensor, _GradientInForward.apply(logits, value, gradient))  # type: ignore[no-untyped-call]
    return DistillationLoss(loss, kl, hard)


def _shares(rows: Rows, weights: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    """Float [N]: weight over normalizer."""
    share = torch.ones_like(rows.entropy)
    if weights is not None:
        share = weights.to(share).expand_as(share)
    total = share.sum() if normalizer is None else torch.as_tensor(normalizer).to(share)
    # A batch in which nothing counts has loss 0, not 0 / 0.
    return share / total.where(total != 0, 1)


def normalize_outside_(z: Tensor, rows: Rows, labels: Tensor) -> LogProbs:
    """The log-probabilities that a target asks for; leaves in `z` the softmax outside S, t.

    Args:
        z: float [C, V], logits / T; overwritten. t is of no use on S.
        rows: the targets of these C rows.
        labels: int64 [C], in [0, V).
    """
    at = torch.cat([rows.ids, rows.extra_ids, labels.unsqueeze(1)], dim=1)
    widths = [rows.ids.shape[1], rows.extra_ids.shape[1], 1]
    head, extra, label = torch.split(z.gather(1, at), widths, dim=1)
    sums = None if rows.uniform is None else z.sum(1) - (head * rows.stored).sum(1)
    head = head.masked_fill(~rows.stored, -torch.inf)
    # Not -inf: a row with nothing outside S must not become NaN. Adding leaves pads alone.
    lowest = torch.finfo(z.dtype).min / 2
    z.scatter_add_(1, rows.ids, rows.stored.to(z.dtype) * lowest)
    top = z.amax(1, keepdim=True)
    top = top.masked_fill(top <= lowest, -torch.inf)
    torch.softmax(z, 1, out=z)
    # t at the largest logit is 1 / sum exp(z - top).
    log_sum = -z.amax(1, keepdim=True).log()
    peak = torch.cat([head, top], dim=1).amax(1, keepdim=True)
    tail = top - peak + log_sum
    log_z = torch.cat([head - peak, tail], dim=1).exp().sum(1, keepdim=True).log()
    mean = None
    if sums is not None:
        mean = sums / _outside(z, rows) - (peak + log_z).squeeze(1)
    return LogProbs(
        head - peak - log_z,
        extra - peak - log_z,
        (label - peak - log_z).squeeze(1),
        (tail - log_z).squeeze(1),
        mean,
    )


def _outside(z: Tensor, rows: Rows) -> Tensor:
    """V - k, the number of ids outside S; at least 1."""
    return (z.shape[1] - rows.stored.sum(1)).clamp(min=1)


def cross_entropy(rows: Rows, log_q: LogProbs) -> Tensor:
    """Float [C], nats: the cross-entropy of each target with the student."""
    total = _dot(rows.probs, log_q.head) + _dot(rows.extra_probs, log_q.extra)
    if rows.spread is not None:
        total += _dot(rows.spread.unsqueeze(1), log_q.tail.unsqueeze(1))
    if rows.uniform is not None and log_q.tail_mean is not None:
        total += _dot(rows.uniform.unsqueeze(1), log_q.tail_mean.unsqueeze(1))
    return -total


def _dot(p: Tensor, x: Tensor) -> Tensor:
    """Sum of p x over the last axis, where p = 0 counts 0 even if x is infinite."""
    return (p * x).masked_fill(p == 0, 0).sum(-1)


def gradient_(
    z: Tensor, rows: Rows, log_q: LogProbs, labels: Tensor, soft: Tensor, hard: Tensor
) -> None:
    """Turns `z`, as `normalize_outside_` left it, into soft (q - target) + hard (q - onehot).

    That is d/dz of soft CE(target, q) + hard CE(label, q). Off S it is
    t ((soft + hard) q_tail - soft c) - soft u, and on S (soft + hard) q - soft p.

    Args:
        z: float [C, V], t; overwritten.
        rows: the targets.
        log_q: what `normalize_outside_` returned.
        labels: int64 [C], in [0, V).
        soft: float [C], factor of the soft target's part.
        hard: float [C], factor of the hard label's part.
    """
    both = soft + hard
    scale = both * log_q.tail.exp()
    at_head = both.unsqueeze(1) * log_q.head.exp() - soft.unsqueeze(1) * rows.probs
    if rows.spread is not None:
        scale -= soft * rows.spread
    z.mul_(scale.unsqueeze(1))
    if rows.uniform is not None:
        density = (soft * rows.uniform / _outside(z, rows)).unsqueeze(1)
        z.sub_(density)
        at_head += density * rows.stored
    at = torch.cat([rows.ids, rows.extra_ids, labels.unsqueeze(1)], dim=1)
    entries = [at_head, -soft.unsqueeze(1) * rows.extra_probs, -hard.unsqueeze(1)]
    z.scatter_add_(1, at, torch.cat(entries, dim=1))


def _evaluate(
    logits: Tensor,
    rows: Rows,
    temperature: float,
    kd_weight: float,
    labels: Tensor | None,
    share: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The loss, KL and CE a row, and d loss / d logits where asked for; `share`: w / normalizer.

    At T = 1 one softmax serves both parts. Otherwise the hard labels take another one, which is
    the same arithmetic with nothing stored.
    """
    z = logits.to(share.dtype, copy=True)
    if temperature != 1:
        z.div_(temperature)
    has_label = torch.zeros_like(rows.entropy, dtype=torch.bool) if labels is None else labels >= 0
    at = torch.zeros_like(has_label, dtype=torch.long)
    if labels is not None:
        at = labels.clamp(min=0).long()
    soft, hard = share * kd_weight * temperature, share * (1 - kd_weight) * has_label
    log_q = normalize_outside_(z, rows, at)
    kl = cross_entropy(rows, log_q) - rows.entropy
    log_label, with_soft, apart = log_q.label, hard, None
    if temperature != 1 and labels is not None:
        log_label, apart = _hard_alone(logits, rows, at, hard)
        with_soft = torch.zeros_like(hard)
    ce = (-log_label).masked_fill(~has_label, 0)
    if with_gradient:
        gradient_(z, rows, log_q, at, soft, with_soft)
        if apart is not None:
            z += apart
    value = _dot(soft * temperature, kl) + _dot(hard, ce)
    return value, kl, None if labels is None else ce, z if with_gradient else None


def _hard_alone(logits: Tensor, rows: Rows, labels: Tensor, hard: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each label at T = 1, and `hard` times the gradient of its negative."""
    z = logits.to(hard.dtype, copy=True)
    ids, probs = rows.ids[:, :0], rows.probs[:, :0]
    nothing = Rows(ids, rows.stored[:, :0], probs, ids, probs, None, None, rows.entropy)
    log_q = normalize_outside_(z, nothing, labels)
    gradient_(z, nothing, log_q, labels, torch.zeros_like(hard), hard)
    return log_q.label, z


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


def _check_call(
    logits: Tensor,
    targets: Targets,
    tail: TailMode,
    temperature: float,
    kd_weight: float,
    labels: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Raises for what options, dtypes and shapes alone show to be wrong."""
    if logits.ndim != 2 or not logits.is_floating_point():
        raise BadInputError(
            f"logits: expected floats [N, V], found {tuple(logits.shape)!r} of {logits.dtype}"
        )
    check_shapes(targets)
    n = logits.shape[0]
    if targets.ids.shape[0] != n:
        raise MismatchError(f"targets: expected {n} rows as logits, found {targets.ids.shape[0]}")
    require_temperature(temperature)
    if tail not in get_args(TailMode):
        raise BadInputError(f"tail: expected one of {get_args(TailMode)!r}, found {tail!r}")
    if not 0 <= kd_weight <= 1:
        raise BadInputError(f"kd_weight: expected a number in [0, 1], found {kd_weight!r}")
    if labels is None and (kd_weight < 1 or tail == "label"):
        raise BadInputError(
            f"labels: expected hard labels, found None, with kd_weight {kd_weight!r}, tail {tail!r}"
        )
    if labels is not None and (labels.shape != (n,) or labels.dtype not in _INTS):
        raise MismatchError(
            f"labels: expected int32 or int64 of shape ({n},), "
            f"found {tuple(labels.shape)!r} of {labels.dtype}"
        )
    if weights is not None and tuple(weights.shape) not in ((), (1,), (n,)):
        raise MismatchError(f"weights: expected shape () or ({n},), found {tuple(weights.shape)!r}")
    drawn = targets.draws is not None and targets.draws.shape[1] > 0
    if tail == "sampled" and not drawn and bool((targets.tail_logprob > -torch.inf).any()):
        raise BadInputError(
            "tail 'sampled': expected draws, found none, and there is tail mass; use 'bucket'"
        )


def _check_values(
    targets: Targets, tail: TailMode, labels: Tensor | None, num_classes: int
) -> None:
    """Raises for what only the values show to be wrong."""
    check_targets(targets, num_classes)
    problems = []
    if labels is not None:
        problems.append(range_problem(labels, "labels", num_classes))
    if labels is not None and tail == "label":
        wrong = (labels < 0) & (targets.tail_logprob > -torch.inf)
        problems.append(Problem(wrong, labels, "labels", "a label wherever there is tail mass"))
    if tail == "renormalize":
        empty = (targets.ids < 0).all(1)
        lost = targets.tail_logprob
        problems.append(Problem(empty, lost, "targets", "an id to renormalize, beside the tail"))
    if problems:
        refuse(problems)


@functools.cache
def _warn_renormalize() -> None:
    warnings.warn(
        "tail 'renormalize' drops the teacher's tail mass: students come out overconfident; "
        "'sampled' is unbiased where draws are stored, 'bucket' a bound where they are not",
        UserWarning,
        stacklevel=3,
    )

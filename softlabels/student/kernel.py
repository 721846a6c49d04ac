"""The arithmetic of sparse distillation on a block of rows, in place; every loss here shares it.

C rows, V classes, k stored ids a row, e further entries (draws, or the hard label).
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

The reverse divergence over the k + 1 classes of bucket has the same form:

    R              = sum_S q log(q / p) + q_tail log(q_tail / r)
    d/dz off S     = t q_tail (log(q_tail / r) - R)
    d/dz on S      = q (log(q / p) - R)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from softlabels.student.temper import Rows


class LogProbs(NamedTuple):
    """The student's log-probabilities, nats, where the target asks for them.

    Attributes:
        head: float [C, k], log q on S; -inf at pads.
        extra: float [C, e], log q of the extra entries.
        label: float [C], log q of the hard label.
        tail: float [C], log q_tail.
        tail_mean: float [C], mean of log q over the ids outside S; None unless asked for.
    """

    head: Tensor
    extra: Tensor
    label: Tensor
    tail: Tensor
    tail_mean: Tensor | None


class Factors(NamedTuple):
    """What the gradient of each row's two parts is multiplied by.

    Attributes:
        soft: float [C], of the soft target's part.
        hard: float [C], of the hard label's part.
    """

    soft: Tensor
    hard: Tensor


def evaluate_(
    z: Tensor,
    rows: Rows,
    labels: Tensor,
    factors: Factors | None,
    apart: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each row's divergence at T and its label's log q at T = 1, both [C], in nats.

    Leaves in `z` soft d divergence / dz + hard d (-log q) / d logits, which is the gradient of
    the logits where `soft` holds 1/T; without factors, nothing of use.

    Args:
        z: float [C, V], logits / T; overwritten.
        rows: the targets of these rows.
        labels: int64 [C], in [0, V).
        factors: None: no gradient.
        apart: float [C, V], the logits, when T is not 1 and there are hard labels; overwritten.
            None: one softmax serves both parts.
    """
    log_q = normalize_outside_(z, rows, labels)
    value = divergence(rows, log_q)
    if apart is None:
        if factors is not None:
            gradient_(z, rows, log_q, labels, *factors)
        return value, log_q.label
    alone = no_targets(rows.entropy)
    log_q_apart = normalize_outside_(apart, alone, labels)
    if factors is not None:
        nothing = torch.zeros_like(factors.soft)
        gradient_(z, rows, log_q, labels, factors.soft, nothing)
        gradient_(apart, alone, log_q_apart, labels, nothing, factors.hard)
        z.add_(apart)
    return value, log_q_apart.label


def no_targets(like: Tensor) -> Rows:
    """Targets that hold nothing, for hard labels alone; one row for each element of `like` [C]."""
    probs = like.new_empty((len(like), 0))
    ids = probs.long()
    return Rows(ids, ids.bool(), probs, ids, probs, None, None, torch.zeros_like(like))


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


def divergence(rows: Rows, log_q: LogProbs) -> Tensor:
    """Float [C], nats: KL(teacher‖student), or KL(student‖teacher) where the rows say so."""
    if rows.reverse is not None:
        return _dot(*_reverse(rows.reverse, log_q))
    total = _dot(rows.probs, log_q.head) + _dot(rows.extra_probs, log_q.extra)
    if rows.spread is not None:
        total += _dot(rows.spread.unsqueeze(1), log_q.tail.unsqueeze(1))
    if rows.uniform is not None and log_q.tail_mean is not None:
        total += _dot(rows.uniform.unsqueeze(1), log_q.tail_mean.unsqueeze(1))
    return -total - rows.entropy


def _reverse(log_p: Tensor, log_q: LogProbs) -> tuple[Tensor, Tensor]:
    """q and log(q / p) of the k + 1 classes, both [C, k + 1]; 0 where q = 0."""
    logs = torch.cat([log_q.head, log_q.tail.unsqueeze(1)], dim=1)
    return logs.exp(), (logs - log_p).masked_fill(logs == -torch.inf, 0)


def _dot(p: Tensor, x: Tensor) -> Tensor:
    """Sum of p x over the last axis, where p = 0 counts 0 even if x is infinite."""
    return (p * x).masked_fill(p == 0, 0).sum(-1)


def gradient_(
    z: Tensor, rows: Rows, log_q: LogProbs, labels: Tensor, soft: Tensor, hard: Tensor
) -> None:
    """Turns `z`, as `normalize_outside_` left it, into the gradient of both parts.

    That is d/dz of soft divergence(target, q) + hard CE(label, q). Forward, it is off S
    t ((soft + hard) q_tail - soft c) - soft u, and on S (soft + hard) q - soft p.

    Args:
        z: float [C, V], t; overwritten.
        rows: the targets.
        log_q: what `normalize_outside_` returned.
        labels: int64 [C], in [0, V).
        soft: float [C], factor of the soft target's part.
        hard: float [C], factor of the hard label's part.
    """
    if rows.reverse is not None:
        q, log_ratio = _reverse(rows.reverse, log_q)
        slope = log_ratio - _dot(q, log_ratio).unsqueeze(1)
        both = q * (hard.unsqueeze(1) + (soft.unsqueeze(1) * slope))
        at_head, scale = both[:, :-1], both[:, -1]
    else:
        total = soft + hard
        scale = total * log_q.tail.exp()
        at_head = total.unsqueeze(1) * log_q.head.exp() - soft.unsqueeze(1) * rows.probs
    if rows.spread is not None:
        scale = scale - soft * rows.spread
    z.mul_(scale.unsqueeze(1))
    if rows.uniform is not None:
        density = (soft * rows.uniform / _outside(z, rows)).unsqueeze(1)
        z.sub_(density)
        at_head = at_head + density * rows.stored
    at = torch.cat([rows.ids, rows.extra_ids, labels.unsqueeze(1)], dim=1)
    entries = [at_head, -soft.unsqueeze(1) * rows.extra_probs, -hard.unsqueeze(1)]
    z.scatter_add_(1, at, torch.cat(entries, dim=1))

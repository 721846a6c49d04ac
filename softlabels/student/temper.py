"""Targets at the training temperature: the value losses take, re-tempering, and checks.

N positions, k stored ids a position, m draws a position, V classes, T temperature.
S: the stored ids; the head is their probabilities, the tail the mass outside S.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softlabels.errors import BadInputError, DataError, MismatchError, SoftLabelsError

TailMode = Literal["bucket", "sampled", "uniform", "label", "renormalize"]
"""What stands for the mass outside the stored ids: the loss, then its gradient off S.

q: the student, q_tail: its mass outside S, p: the teacher on S, r: its tail. On S the gradient is
q - p unless said.

- bucket: sum_S p log(p / q) + r log(r / q_tail); q (1 - r / q_tail). The KL over k + 1
  classes: at least 0, at most the full KL, exact when nothing is outside S.
- sampled: weight r / m on each of m draws, repeats added; q - weight. Unbiased. `kl` is the
  cross-entropy minus `targets.entropy`, so single rows may be below 0. Without the stored
  entropy, -sum_S p log p - r log r is subtracted: too large on average by r times the
  entropy inside the tail, which no student changes, so differences and gradients are exact.
- uniform: u = r / (V - k) on each id outside S; q - u.
- label: r on the hard label, added to p where it is in S; q - target. Biased.
- renormalize: p / (1 - r) on S, nothing outside; q, and q - p / (1 - r) on S. Biased towards
  overconfident students; warns once a process.

Source: sampled: Anshumann et al., "Sparse Logit Sampling", ACL 2025.
"""

Divergence = Literal["forward", "reverse"]
"""Which way the KL goes.

- forward: KL(teacher‖student), as `TailMode` says.
- reverse: KL(student‖teacher) over the k + 1 classes of bucket, R = sum_S q log(q / p) +
  q_tail log(q_tail / r); q (log(q_tail / r) - R) off S, q (log(q / p) - R) on S. At most the full
  reverse KL. It holds the student to what the teacher finds probable instead of making it cover
  everything; needs tail "bucket", and mass wherever the student may put some: no stored
  probability of 0, and a tail unless every class is stored.

Source: reverse: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024.
"""

HEAD_TOLERANCE = 0.15
"""How far, relatively, a head's mass may be from 1 - exp(tail).

The table's value profiles round a log-probability by at most 1/8 nat, which is e^(1/8) - 1 = .133
of a mass; more is the tail of another temperature, a head cut without its tail, or damage.
"""
TAIL_TOLERANCE = 2e-3
"""The same absolutely, and how far rounding may put a tail above 0 nats."""


class Targets(NamedTuple):
    """Soft targets of N positions; every value is already at the training temperature.

    Attributes:
        ids: int32 or int64 [N, k], the top k, distinct in a row; -1 pads last.
        logprobs: float32 or float64 [N, k], nats, of the full softmax; -inf where padded.
        tail_logprob: like logprobs [N], nats, log of the mass outside the top k; -inf: none.
        draws: int32 or int64 [N, m], drawn from the tail, may repeat; -1 when the tail is empty.
        entropy: like logprobs [N], nats, of the full distribution; NaN or None: unknown.
    """

    ids: Int[Tensor, "N k"]
    logprobs: Float[Tensor, "N k"]
    tail_logprob: Float[Tensor, " N"]
    draws: Int[Tensor, "N m"] | None = None
    entropy: Float[Tensor, " N"] | None = None


class Rows(NamedTuple):
    """One target a row, its tail resolved: everything a loss needs beside the logits.

    Attributes:
        ids: int64 [N, k], S; 0 where not stored.
        stored: bool [N, k], False at pads.
        probs: float [N, k], p; 0 at pads.
        extra_ids: int64 [N, e]; may repeat, may be in S.
        extra_probs: float [N, e], w.
        spread: float [N], c, mass outside S in the student's own proportions; None: 0.
        uniform: float [N], mass outside S in equal parts, so u times V - k; None: 0.
        entropy: float [N], nats, what the cross-entropy exceeds the mode's KL by.
        reverse: float [N, k + 1], nats, log p on S (-inf at pads) and log r, for the reverse KL;
            None: the forward one.
    """

    ids: Tensor
    stored: Tensor
    probs: Tensor
    extra_ids: Tensor
    extra_probs: Tensor
    spread: Tensor | None
    uniform: Tensor | None
    entropy: Tensor
    reverse: Tensor | None = None


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 - e^x) for x <= 0, accurate near both ends: -inf at x = 0, 0 at x = -inf.

    Source: Mächler, "Accurately computing log(1 - exp(-|a|))", 2012: two forms, meeting at -ln 2.
    """
    x = x.clamp(max=0)
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def rescale_head(
    logprobs: Float[Tensor, "N k"], tail_logprob: Float[Tensor, " N"]
) -> Float[Tensor, "N k"]:
    """Log-probabilities moved by one constant a row, so that their mass is 1 - exp(tail_logprob).

    logprob_j - log(sum over S of exp(logprob)) + log(1 - exp(tail_logprob)): stored values are
    rounded, while the tail comes from full logits. A row that holds nothing stays -inf.

    Args:
        logprobs: nats; -inf where padded.
        tail_logprob: nats, at most 0; -inf: no tail.
    """
    mass = torch.logsumexp(logprobs, dim=1)
    shift = log1mexp(tail_logprob) - mass
    return logprobs + shift.masked_fill(mass == -torch.inf, 0).unsqueeze(1)


def temper(
    targets: Targets,
    temperature: float,
    *,
    shift: Float[Tensor, " N"],
    tail_logprob: Float[Tensor, " N"],
    draws: Int[Tensor, "N m"] | None = None,
) -> Targets:
    """The targets at temperature T, from those stored at T = 1 and what was stored for T.

    logprob_T = logprob / T + shift_T with shift_T = lse(z) / T - lse(z / T) for the teacher's
    logits z, then rescaled to the mass 1 - exp(tail_logprob_T). The tail cannot be derived from
    T = 1. Rescaling absorbs the shift, so its use is to notice a head and a tail of different
    temperatures. Draws and entropy at T = 1 describe another distribution and are left out.

    Args:
        targets: at temperature 1.
        temperature: T > 0.
        shift: nats, the table's `temper_shift_<T>`.
        tail_logprob: nats, the table's `tail_logprob_<T>`.
        draws: ids drawn at T.

    Raises:
        BadInputError: T is not a finite number above 0.
        MismatchError: shift or tail_logprob has not one value a row.
        DataError: shift and tail contradict each other, so one of them belongs to another T.
    """
    require_temperature(temperature)
    rows = tuple(targets.tail_logprob.shape)
    if tuple(shift.shape) != rows or tuple(tail_logprob.shape) != rows:
        raise MismatchError(
            f"temper: expected shift and tail_logprob of shape {rows!r}, "
            f"found {tuple(shift.shape)!r} and {tuple(tail_logprob.shape)!r}"
        )
    logprobs = targets.logprobs / temperature + shift.unsqueeze(1)
    refuse([_head_problem(logprobs, tail_logprob, f"temper to T = {temperature!r}")])
    return Targets(targets.ids, rescale_head(logprobs, tail_logprob), tail_logprob, draws)


def resolve_tail(
    targets: Targets,
    tail: TailMode,
    labels: Int[Tensor, " N"] | None,
    num_classes: int,
    dtype: torch.dtype,
    divergence: Divergence = "forward",
) -> Rows:
    """The target of each row in the form that every mode shares; touches [N, k] only.

    Args:
        targets: values at the training temperature.
        tail: see `distillation_loss`.
        labels: needed by "label".
        num_classes: V.
        dtype: of the result's floats.
        divergence: "reverse" with "bucket" alone.
    """
    stored = targets.ids >= 0
    log_r = targets.tail_logprob.to(dtype).clamp(max=0)
    left = torch.full_like(log_r, -torch.inf) if tail == "renormalize" else log_r
    head = rescale_head(targets.logprobs.to(dtype).masked_fill(~stored, -torch.inf), left)
    ids, probs, r = targets.ids.clamp(min=0).long(), head.exp(), log_r.exp()
    # The part of the entropy that is known: exact for the k + 1 classes of bucket.
    known = _entropy(probs) + _entropy(r.unsqueeze(1))
    rows = Rows(ids, stored, probs, ids[:, :0], probs[:, :0], None, None, known)
    if divergence == "reverse":
        return rows._replace(reverse=torch.cat([head, log_r.unsqueeze(1)], dim=1))
    if tail == "bucket":
        return rows._replace(spread=r)
    if tail == "uniform":
        outside = (num_classes - stored.sum(1)).clamp(min=1).to(dtype)
        return rows._replace(uniform=r, entropy=known + r * outside.log())
    if tail == "label" and labels is not None:
        return _on_label(rows, r, labels)
    if tail == "sampled":
        if targets.entropy is not None:
            stated = targets.entropy.to(dtype)
            rows = rows._replace(entropy=known.where(stated.isnan(), stated))
        return rows if targets.draws is None else _on_draws(rows, r, targets.draws)
    return rows._replace(entropy=_entropy(probs))


def _entropy(probs: Tensor) -> Tensor:
    return -torch.xlogy(probs, probs).sum(1)


def _on_label(rows: Rows, r: Tensor, labels: Tensor) -> Rows:
    at = labels.clamp(min=0).long().unsqueeze(1)
    in_head = (rows.ids == at) & rows.stored
    mass = (r * (labels >= 0)).unsqueeze(1)
    alone = mass.masked_fill(in_head.any(1, keepdim=True), 0)
    entropy = _entropy(rows.probs + in_head * mass) + _entropy(alone)
    return rows._replace(extra_ids=at, extra_probs=mass, entropy=entropy)


def _on_draws(rows: Rows, r: Tensor, draws: Tensor) -> Rows:
    weight = (r / max(draws.shape[1], 1)).unsqueeze(1) * (draws >= 0)
    return rows._replace(extra_ids=draws.clamp(min=0).long(), extra_probs=weight)


def require_temperature(temperature: float) -> None:
    """Raises BadInputError unless `temperature` is a finite number above 0."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise BadInputError(f"temperature: expected a finite number > 0, found {temperature!r}")


def check_shapes(targets: Targets) -> None:
    """Raises unless dtypes and shapes are those of `Targets`; looks at no value, so costs nothing.

    Raises:
        BadInputError: a tensor has the wrong dtype or number of axes.
        MismatchError: two tensors disagree in size.
    """
    n = targets.ids.shape[0] if targets.ids.ndim else 0
    top = tuple(targets.ids.shape)
    for name, value in targets._asdict().items():
        if value is None:
            continue
        whole, axes = name in ("ids", "draws"), 1 if name in ("tail_logprob", "entropy") else 2
        allowed = (torch.int32, torch.int64) if whole else (torch.float32, torch.float64)
        if value.dtype not in allowed or value.ndim != axes:
            raise BadInputError(
                f"targets.{name}: expected {axes} axes of {' or '.join(map(str, allowed))}, "
                f"found shape {tuple(value.shape)!r} of {value.dtype}"
            )
        if value.shape[0] != n or (name == "logprobs" and tuple(value.shape) != top):
            raise MismatchError(
                f"targets.{name}: expected the rows (and k) of targets.ids, {top!r}, "
                f"found shape {tuple(value.shape)!r}"
            )


def check_targets(targets: Targets, num_classes: int) -> None:
    """Raises unless the targets are distributions over `num_classes` classes.

    Costs a sort of [N, k], and on a GPU one synchronisation.

    Raises:
        BadInputError: a tensor has the wrong dtype or number of axes.
        MismatchError: shapes disagree, or an id is not below V.
        DataError: an id twice in one row (it would count twice in the softmax), a padded id with
            a probability, a tail above 0 nats, a head whose mass is not 1 - exp(tail), tail mass
            although every class is stored, a draw from the top k, or a missing draw where there
            is tail mass. Names the first such row.
    """
    check_shapes(targets)
    ids, logprobs, tail = targets.ids, targets.logprobs, targets.tail_logprob
    stored = ids >= 0
    by_id = ids.sort(1).values
    repeated = (by_id[:, 1:] == by_id[:, :-1]) & (by_id[:, 1:] >= 0)
    full = (stored.sum(1) >= num_classes) & (tail > -torch.inf)
    padded = ~stored & (logprobs > -torch.inf)
    refuse(
        [
            range_problem(ids, "targets.ids", num_classes),
            Problem(repeated, by_id[:, 1:], "targets.ids", "each id once in a row"),
            Problem(padded, logprobs, "targets.logprobs", "-inf where ids are -1"),
            Problem(~(tail <= TAIL_TOLERANCE), tail, "targets.tail_logprob", "nats, at most 0"),
            _head_problem(logprobs, tail, "targets"),
            Problem(full, tail, "targets.tail_logprob", "-inf, since every class is stored"),
            *_draw_problems(targets, by_id, num_classes),
        ]
    )


class Problem(NamedTuple):
    """What to look for: `wrong` marks the offending elements of `found`, both [N] or [N, any]."""

    wrong: Bool[Tensor, "N *any"]
    found: Tensor
    where: str
    expected: str
    error: type[SoftLabelsError] = DataError


def refuse(problems: Sequence[Problem]) -> None:
    """Raises the first problem that any row has, with the row; looks at all in one transfer."""
    present = torch.stack([problem.wrong.any() for problem in problems]).tolist()
    for problem, is_present in zip(problems, present, strict=True):
        if not is_present:
            continue
        row = int(problem.wrong.nonzero()[0, 0])
        values = problem.found[row][problem.wrong[row]].reshape(-1)[:8].tolist()
        raise problem.error(
            f"{problem.where}, row {row}: expected {problem.expected}, found {values!r}"
        )


def range_problem(ids: Int[Tensor, "N *any"], where: str, num_classes: int) -> Problem:
    """Ids that are neither classes nor the pad -1."""
    expected = f"ids from 0 to {num_classes - 1}, or -1 for none"
    return Problem((ids < -1) | (ids >= num_classes), ids, where, expected, MismatchError)


def reverse_problem(targets: Targets, num_classes: int) -> Problem:
    """Rows in which a class that the student gives mass to has none from the teacher."""
    stored = targets.ids >= 0
    nothing = stored & (targets.logprobs == -torch.inf)
    no_tail = (targets.tail_logprob == -torch.inf) & (stored.sum(1) < num_classes)
    found = torch.cat([targets.logprobs, targets.tail_logprob.unsqueeze(1)], dim=1)
    return Problem(
        torch.cat([nothing, no_tail.unsqueeze(1)], dim=1),
        found,
        "divergence 'reverse'",
        "a probability above 0 for each stored id, and a tail above 0 where classes are not stored",
    )


def _head_problem(logprobs: Tensor, tail_logprob: Tensor, where: str) -> Problem:
    """Heads whose mass is not what the tail leaves; also finds NaN and +inf."""
    mass, left = logprobs.exp().sum(1), -tail_logprob.expm1()
    fits = (mass - left).abs() <= HEAD_TOLERANCE * left + TAIL_TOLERANCE
    wrong = (~fits).unsqueeze(1).expand(-1, 2)
    both = torch.stack([mass, left], dim=1)
    return Problem(wrong, both, where, "a head of mass 1 - exp(tail), both shown")


def _draw_problems(targets: Targets, by_id: Tensor, num_classes: int) -> list[Problem]:
    """Draws that are no class, belong to the head, or are missing; `by_id`: the ids, sorted."""
    draws = targets.draws
    if draws is None or not draws.shape[1]:
        return []
    inside = torch.zeros_like(draws, dtype=torch.bool)
    if by_id.shape[1]:
        sought = draws.to(by_id.dtype).contiguous()
        place = torch.searchsorted(by_id, sought).clamp(max=by_id.shape[1] - 1)
        inside = (by_id.gather(1, place) == draws) & (draws >= 0)
    missing = (draws < 0) & (targets.tail_logprob > -torch.inf).unsqueeze(1)
    return [
        range_problem(draws, "targets.draws", num_classes),
        Problem(inside, draws, "targets.draws", "ids outside the row's top k"),
        Problem(missing, draws, "targets.draws", "a draw wherever there is tail mass"),
    ]

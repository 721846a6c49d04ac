"""Several teachers' stored targets of the same positions as one, where that is exact.

The mixture of T teachers has the probability sum_t w_t p_t(v) at an id v. It is known where every
teacher stored v, and where those that did not have nothing outside their stored ids; then so is the
mass outside all stored ids. Elsewhere a share of some tail would be invented.

N positions, T teachers of k_t stored ids each, K ids of the mixture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabels.store.codec import head_and_tail
from softlabels.targets import Floats, Ints, SoftTargets

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """What one teacher stored of N positions, at one temperature.

    Attributes:
        ids: int32 [N, k], -1 where padded.
        head: float64 [N, k], their probabilities.
        tail: float64 [N], the mass outside them; head and tail together are 1.
        label_ids: int32 [N], its hard labels; None: none are stored.
        label_probs: float64 [N], their probabilities, NaN where unknown; None: none are stored.
    """

    ids: Ints
    head: Doubles
    tail: Doubles
    label_ids: Ints | None
    label_probs: Doubles | None


@dataclass(frozen=True)
class Unknown:
    """Why a mixture is not exact: the first position at which it is not.

    Attributes:
        position: 0 to N - 1.
        token: the id that some teacher stored.
        teacher: the number of one that did not.
        mass: what it has outside its stored ids.
    """

    position: int
    token: int
    teacher: int
    mass: float


@dataclass(frozen=True)
class _Union:
    """The ids that any teacher with a weight stored, position by position and by rising id.

    Attributes:
        position, ids: int64 [U], one for each of them.
        probs: float64 [U], of the mixture, as far as it was stored.
        stored: int64 [U], by how many of the teachers that have a tail.
    """

    position: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    probs: Doubles
    stored: npt.NDArray[np.int64]


def at_temperature(targets: SoftTargets, temperature: float) -> Known:
    """What `targets` say at a temperature that they store."""
    labels = targets.label_logprobs
    if temperature == 1:
        head, tail = head_and_tail(targets)
        probs = None if labels is None else np.exp(labels.astype(np.float64))
        return Known(targets.ids, head, tail, targets.label_ids, probs)
    temper = targets.temper[temperature]
    shift = temper.shift.astype(np.float64)
    head = np.exp(targets.logprobs / temperature + shift[:, None])
    tail = np.exp(temper.tail.astype(np.float64))
    mass = head.sum(1)
    # Readers rescale what rounding left off.
    head *= np.where(mass > 0, (1 - tail) / np.where(mass > 0, mass, 1), 1)[:, None]
    probs = None if labels is None else np.exp(labels / temperature + shift)
    return Known(targets.ids, head, tail, targets.label_ids, probs)


def first_unknown(teachers: Sequence[Known], weights: Doubles) -> Unknown | None:
    """Where the mixture is not exact first; None where it is everywhere.

    Args:
        teachers: T of them.
        weights: float64 [T, N], at least 0.
    """
    return _first_unknown(teachers, weights, _union(teachers, weights))


def width(teachers: Sequence[Known], weights: Doubles) -> int:
    """K: the most ids that the mixture has at a position."""
    found = _union(teachers, weights)
    counts = np.bincount(found.position[found.probs > 0], minlength=1)
    return int(counts.max())


def mix_targets(
    teachers: Sequence[Known],
    weights: Doubles,
    num_positions: Ints,
    labels: Ints | None,
    k: int,
) -> SoftTargets | Unknown:
    """The mixture as soft targets, not yet rounded to a profile; or why it is not exact.

    Entropy is exact where nothing is outside the stored ids, else NaN, for unknown. A label's
    probability is exact where it is among the ids, or where every teacher stored it for the same
    label; else NaN. Its rank is -1 where it cannot be known.

    Args:
        teachers: T of them.
        weights: float64 [T, N], at least 0; the sum over T is 1.
        num_positions: int32 [B].
        labels: int32 [N], hard labels, -1 where none; None: none.
        k: ids a position, at least `width`.
    """
    union = _union(teachers, weights)
    if (unknown := _first_unknown(teachers, weights, union)) is not None:
        return unknown
    n = len(teachers[0].tail)
    order = np.lexsort((union.ids, -union.probs, union.position))
    order = order[union.probs[order] > 0]
    position, probs = union.position[order], union.probs[order]
    counts = np.bincount(position, minlength=n)
    place = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.full((n, k), -1, np.int32)
    ids[position, place] = union.ids[order]
    logs = np.log(probs)
    logprobs = np.full((n, k), -np.inf, np.float32)
    logprobs[position, place] = np.minimum(logs, 0)
    tail = np.zeros(n)
    for teacher, weight in zip(teachers, weights, strict=True):
        tail += weight * teacher.tail
    entropy = -np.bincount(position, probs * logs, minlength=n)
    entropy[tail > 0] = np.nan
    label_logprobs = label_ranks = None
    if labels is not None:
        label_logprobs, label_ranks = _labels(teachers, weights, labels, ids, logprobs, tail)
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail).astype(np.float32)
    return SoftTargets(
        num_positions=num_positions,
        ids=ids,
        logprobs=logprobs,
        tail=np.minimum(log_tail, 0),
        entropy=np.where(entropy < 0, 0, entropy).astype(np.float32),
        label_ids=labels,
        label_logprobs=label_logprobs,
        label_ranks=label_ranks,
    )


def _union(teachers: Sequence[Known], weights: Doubles) -> _Union:
    parts = [
        np.where((weight > 0)[:, None], teacher.ids, -1)
        for teacher, weight in zip(teachers, weights, strict=True)
    ]
    # Of each teacher by the same order: ids of one position side by side, equal ones together.
    ids = np.concatenate(parts, 1)
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, 1)
    shares = [w[:, None] * t.head for t, w in zip(teachers, weights, strict=True)]
    probs = np.take_along_axis(np.concatenate(shares, 1), order, 1)
    tails = [
        np.broadcast_to(((w > 0) & (t.tail > 0))[:, None], t.ids.shape)
        for t, w in zip(teachers, weights, strict=True)
    ]
    with_tail = np.take_along_axis(np.concatenate(tails, 1), order, 1)
    starts = np.ones(ids.shape, bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    at = np.flatnonzero(starts)
    if not len(at):
        none = np.zeros(0, np.int64)
        return _Union(none, none, np.zeros(0), none)
    found = ids.reshape(-1)[at]
    probs = np.add.reduceat(probs.reshape(-1), at)
    stored = np.add.reduceat(with_tail.reshape(-1).astype(np.int64), at)
    real = found >= 0
    position = at[real] // ids.shape[1]
    return _Union(position, found[real].astype(np.int64), probs[real], stored[real])


def _first_unknown(teachers: Sequence[Known], weights: Doubles, union: _Union) -> Unknown | None:
    tails = np.stack([(w > 0) & (t.tail > 0) for t, w in zip(teachers, weights, strict=True)])
    lacking = union.stored < tails.sum(0)[union.position]
    if not lacking.any():
        return None
    first = int(np.argmax(lacking))
    position, token = int(union.position[first]), int(union.ids[first])
    for number, teacher in enumerate(teachers):
        has = teacher.ids[position] == token
        if tails[number, position] and not has.any():
            return Unknown(position, token, number, float(teacher.tail[position]))
    raise AssertionError("an id that is lacking is not stored by some teacher")


def _labels(
    teachers: Sequence[Known],
    weights: Doubles,
    labels: Ints,
    ids: Ints,
    logprobs: Floats,
    tail: Doubles,
) -> tuple[Floats, Ints]:
    """The labels' log-probabilities and ranks in the mixture, float32 and int32 [N]."""
    n = len(labels)
    at = (ids == labels[:, None]) & (labels >= 0)[:, None]
    inside, place = at.any(1), at.argmax(1)
    found = np.where(inside, logprobs[np.arange(n), place], np.nan).astype(np.float32)
    ranks = np.where(inside, place, -1).astype(np.int32)
    outside = (labels >= 0) & ~inside
    if not outside.any():
        return found, ranks
    # Below all stored ids: every teacher that has a tail stored the same ones.
    probs = np.zeros(n)
    for teacher, weight in zip(teachers, weights, strict=True):
        share = np.full(n, np.nan)
        if teacher.label_probs is not None and teacher.label_ids is not None:
            share = np.where(teacher.label_ids == labels, teacher.label_probs, np.nan)
        share = np.where(teacher.tail > 0, share, 0)
        probs += np.where(weight > 0, weight * share, 0)
    with np.errstate(divide="ignore"):
        logs = np.minimum(np.log(probs), 0).astype(np.float32)
    found[outside] = logs[outside]
    # Nothing outside has any mass: all of it stands below in the order of ids.
    none = outside & (tail == 0)
    smaller = ((ids >= 0) & (ids < labels[:, None])).sum(1)
    ranks[none] = ((ids >= 0).sum(1) + labels - smaller)[none]
    return found, ranks

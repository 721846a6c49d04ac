"""What a codec loses and what others cost: the KL of rounding, byte formulas of other formats.

N positions, k stored ids and m draws a position, V classes.
"""

import math

import numpy as np
import numpy.typing as npt

from softlabels.store import shards
from softlabels.targets import Ints, SoftTargets

Doubles = npt.NDArray[np.float64]


def head_and_tail(targets: SoftTargets) -> tuple[Doubles, Doubles]:
    """Probabilities as every reader takes them, the head rescaled to 1 - exp(tail).

    Returns:
        Head, float64 [N, k], 0 where padded, and tail, float64 [N]; together 1. Where the tail is
        unknown it is what the head leaves.
    """
    head = np.exp(targets.logprobs.astype(np.float64))
    mass = head.sum(1)
    left = np.maximum(0.0, 1 - mass)
    tail = left if targets.tail is None else np.exp(targets.tail.astype(np.float64))
    tail = np.where(np.isnan(tail), left, tail)
    scale = np.where(mass > 0, (1 - tail) / np.where(mass > 0, mass, 1), 1)
    return head * scale[:, None], tail


def rounding_error(head: Doubles, tail: Doubles, profile: shards.Profile) -> Doubles:
    """KL(p‖rounded p) of each position over its k ids and one class for the rest, nats, [N].

    Args:
        head: float64 [N, k], falling probabilities, 0 where padded.
        tail: float64 [N], 1 minus the head.
        profile: what rounds them; readers rescale the rounded head.
    """
    with np.errstate(divide="ignore"):
        logs, log_tail = np.log(head), np.log(tail)
    rounded = shards.round_to_profile(
        SoftTargets(
            num_positions=np.ones(len(head), np.int32),
            ids=np.zeros(head.shape, np.int32),
            logprobs=np.minimum(logs, 0).astype(np.float32),
            tail=log_tail.astype(np.float32),
        ),
        profile,
    )
    read, _ = head_and_tail(rounded)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.where(head > 0, head * (logs - np.log(read)), 0.0).sum(1)
        # By logarithms: a rounded tail of mass 1e-40 is still one.
        assert rounded.tail is not None
        outside = np.where(tail > 0, tail * (log_tail - rounded.tail), 0.0)
    return np.asarray(inside + outside)


def unrounded(targets: SoftTargets, profile: shards.Profile, seed: int = 0) -> SoftTargets:
    """Targets that `profile` may have rounded to `targets`: each value anywhere in its step.

    Rounded values round to themselves, so that measured on them a profile would lose nothing.
    Log-probabilities still fall. Only head and tail are kept.
    """
    rng = np.random.default_rng(seed)
    half = (np.finfo(np.float16).eps / 2) * rng.uniform(-1, 1, targets.logprobs.shape)

    def within_float16(values: npt.NDArray[np.float32], noise: Doubles) -> Doubles:
        size = np.where(np.isfinite(values), np.maximum(-values, 2.0**-14), 1)
        return np.asarray(values + np.exp2(np.floor(np.log2(size))) * noise)

    if profile == "precise":
        depths = -within_float16(targets.logprobs, half)
    else:
        levels = shards.compact_levels().astype(np.float64)
        edges = np.concatenate([levels[:1], (levels[1:] + levels[:-1]) / 2, levels[-1:]])
        at = np.searchsorted(levels.astype(np.float32), -targets.logprobs).clip(0, len(levels) - 1)
        depths = rng.uniform(edges[at], edges[at + 1])
    depths = np.where(np.isfinite(targets.logprobs), np.maximum(depths, 0), np.inf)
    tail = targets.tail
    if tail is not None:
        moved = within_float16(tail, half[:, 0])
        tail = np.where(np.isfinite(tail), np.minimum(moved, -(2.0**-25)), tail).astype(np.float32)
    return SoftTargets(
        num_positions=targets.num_positions,
        ids=targets.ids,
        logprobs=-np.sort(depths, axis=1).astype(np.float32),
        tail=tail,
    )


def redraw(
    probs: Doubles, ids: Ints, tail: Doubles, stored: Ints | None, pool: Ints, draws: int
) -> Ints:
    """Draws from the tail of a shorter head, as far as they can be had: int32 [N, draws].

    Systematic, over the ids that the shorter head leaves out and the unknown rest, for which
    stand the stored draws and, where these do not suffice, any of the `pool`. Their bytes are those
    of real draws; nothing should be trained on them. -1 where there is no tail.

    Args:
        probs: float64 [N, j], of the ids that are known beyond the shorter head.
        ids: int32 [N, j].
        tail: float64 [N], mass outside all known ids.
        stored: int32 [N, m], drawn from it.
        pool: int32 [any], ids such as tails have.
        draws: how many.
    """
    rng = np.random.default_rng(0)
    cumulative = np.concatenate([probs, tail[:, None]], 1).cumsum(1)
    total = cumulative[:, -1]
    points = (rng.random((len(tail), 1)) + np.arange(draws)) / max(1, draws) * total[:, None]
    at = np.zeros(points.shape, np.int64)
    for column in cumulative[:, :-1].T:
        at += points >= column[:, None]
    unknown = at == ids.shape[1]
    known = np.concatenate([ids, np.full((len(ids), 1), -1, np.int32)], 1)
    found = np.take_along_axis(known, at, 1)
    if len(pool):
        found = np.where(unknown, rng.choice(pool, found.shape), found)
    if stored is not None and stored.shape[1]:
        nth = unknown.cumsum(1) - 1
        own = np.take_along_axis(stored, nth.clip(0, stored.shape[1] - 1), 1)
        found = np.where(unknown & (nth < stored.shape[1]), own, found)
    found = rng.permuted(found, axis=1)
    return np.where(total[:, None] > 0, found, -1).astype(np.int32)


def dense_bytes(num_classes: int) -> int:
    """Bytes a position of all V probabilities in bfloat16."""
    return 2 * num_classes


def distillkit_bytes(num_classes: int, k: int, exact: int, terms: int) -> int:
    """Bytes a position of a DistillKit preset without residual bins.

    Args:
        num_classes: V; an id takes ceil(log2 V) bits, bit-packed.
        k: stored ids.
        exact: the first of them, whose log-probabilities are bfloat16.
        terms: float32 coefficients of the curve that stands for the others.

    Source: arcee-ai/DistillKit, README "Logit Compression" and
    `DistributionQuantizationConfig.total_bits`.
    """
    ids = math.ceil(k * math.ceil(math.log2(num_classes)) / 8)
    return ids + 2 * exact + 4 * terms


def references(num_classes: int) -> list[dict[str, object]]:
    """Bytes a position of other ways to store V classes: what, bytes, formula."""
    found: list[dict[str, object]] = [
        {"what": "dense bf16", "bytes": dense_bytes(num_classes), "formula": "2 V bytes"}
    ]
    presets = (("recommended", 128, 16, 6), ("budget", 50, 1, 3))
    for name, k, exact, terms in presets:
        if num_classes >= k:
            found.append(
                {
                    "what": f"DistillKit {name}, k = {k}",
                    "bytes": distillkit_bytes(num_classes, k, exact, terms),
                    "formula": f"ceil({k} ceil(log2 V) / 8) + {exact} x 2 + {terms} x 4 bytes",
                }
            )
    if num_classes <= 2**17:
        found.append(
            {
                "what": "random sampling, 12 ids",
                "bytes": 36,
                "formula": "12 x (17 bits of id + 7 of probability), for V <= 2^17",
            }
        )
    return found

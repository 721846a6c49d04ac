"""How much the targets say and how much of it is kept: entropy, head and tail, codec loss."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabels.report.rows import Sample
from softlabels.store import codec

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
CODEC_POSITIONS = 20_000
"""Rounded again to see what rounding costs."""


def entropy(sample: Sample) -> dict[str, Any] | None:
    """Quantiles and mean of the entropy (nats), its largest possible value, a histogram.

    None where the table does not know it.
    """
    values = sample.targets.entropy
    if values is None or not len(values) or np.isnan(values).all():
        return None
    known = values[~np.isnan(values)].astype(np.float64)
    most = math.log(sample.part.contents.num_classes)
    counts, edges = np.histogram(known, bins=24, range=(0, max(float(known.max()), 0.1)))
    return {
        **_quantiles(known),
        "most": most,
        "histogram": [
            {"lower": float(low), "upper": float(high), "positions": int(count)}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ],
        "tempered": _tempered(sample),
    }


def kept(sample: Sample) -> dict[str, Any] | None:
    """Head mass by k (prefixes 1, 2, 4, … and the stored k), tail and draws; None without ids."""
    targets, contents = sample.targets, sample.part.contents
    if not targets.k or not len(targets.ids):
        return None
    head, tail = codec.head_and_tail(targets)
    sums = head.cumsum(1)
    sizes = [2**n for n in range(20) if 2**n < contents.k] + [contents.k]
    return {
        "k": contents.k,
        "draws": contents.draws,
        "classes": contents.num_classes,
        "tail_known": targets.tail is not None and not bool(np.isnan(targets.tail).all()),
        "by_k": [{"k": k, **_quantiles(sums[:, k - 1])} for k in sizes],
        "tail": _quantiles(tail),
    }


def codec_loss(sample: Sample) -> dict[str, Any] | None:
    """KL(p‖rounded p) in nats that the table's profile has cost, mean and 99 % quantile."""
    targets, contents = sample.targets, sample.part.contents
    if not targets.k or not len(targets.ids):
        return None
    count = min(len(targets.ids), CODEC_POSITIONS, 4_000_000 // targets.k)
    chosen = np.linspace(0, len(targets.ids) - 1, count).astype(np.int64)
    some = targets.map_positions(chosen, np.ones(count, np.int32))
    head, tail = codec.head_and_tail(codec.unrounded(some, contents.profile))
    loss = codec.rounding_error(head, tail, contents.profile)
    recorded = contents.recorded
    return {
        "profile": contents.profile,
        "kl_mean": float(loss.mean()),
        "kl_p99": float(np.quantile(loss, 0.99)),
        "tail_error": None if recorded is None else recorded.tail_error,
    }


def _tempered(sample: Sample) -> list[dict[str, float]]:
    """Mean entropy in nats at each stored temperature, the tail spread evenly: an upper bound."""
    targets = sample.targets
    found = []
    for temperature, temper in sorted(targets.temper.items()):
        logs = targets.logprobs.astype(np.float64) / temperature + temper.shift[:, None]
        head = np.exp(logs)
        tail = np.exp(temper.tail.astype(np.float64))
        rest = np.maximum(1, sample.part.contents.num_classes - (targets.ids >= 0).sum(1))
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = np.where(head > 0, -head * logs, 0).sum(1)
            outside = np.where(tail > 0, -tail * (temper.tail - np.log(rest)), 0)
        found.append({"temperature": temperature, "mean": float((inside + outside).mean())})
    return found


def _quantiles(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    return {
        "mean": float(values.mean()),
        "quantiles": {
            f"{100 * q:g} %": float(v)
            for q, v in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
        },
    }

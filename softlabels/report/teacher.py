"""How good and how sure the teacher is, against the hard labels: accuracy, NLL, calibration.

N labelled positions, V classes.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabels.report.fits import fit
from softlabels.report.rows import Sample
from softlabels.store import codec

BINS = 15
"""Of equal width. Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017."""

SHIFTS = (-2, -1, 1, 2)
"""Rows away in which the label is looked for: off by one is the slip that happens."""

SURE = 0.95
"""The probability at which a teacher that contradicts the label is called sure."""

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]


def quality(sample: Sample) -> dict[str, Any] | None:
    """What the labelled positions say of the teacher; None without labels or stored ids.

    Returns:
        positions and labelled; accuracy with accuracy_se (its standard error); majority, the share
        of the commonest label; chance, the accuracy of the teacher's choices on shuffled labels;
        prior, the entropy of the labels' shares, nats: the loss of always saying those;
        nll, entropy, surprise = nll - entropy, nats, surprise_se (over rows) and
        surprise_temperature; confidence, the mean top probability; ece and bins (lower, upper,
        rows, confidence, accuracy); sure_wrong, the share whose label is another than a choice of
        probability >= SURE, and sure_wrong_expected, what the teacher's own probabilities make of
        it; fit (`fits.Fit`). Of classification only: shifted, the accuracy against the labels of
        rows nearby; mapped, the accuracy if classes stood in another order.
    """
    targets = sample.targets
    labels = sample.labels
    here = labels >= 0
    if not targets.k or not here.any():
        return None
    choice, top = targets.ids[:, 0], np.exp(targets.logprobs[:, 0].astype(np.float64))
    right = choice == labels
    labelled = int(here.sum())
    accuracy = float(right[here].mean())
    share = np.bincount(labels[here], minlength=1) / labelled
    chosen = np.bincount(choice[here].clip(0), minlength=len(share))[: len(share)] / labelled
    sure = here & (top >= SURE)
    found = {
        "positions": len(labels),
        "labelled": labelled,
        "accuracy": accuracy,
        "accuracy_se": math.sqrt(max(accuracy * (1 - accuracy), 1e-9) / labelled),
        "majority": float(share.max()),
        "chance": float((share * chosen).sum()),
        "prior": float(-(share[share > 0] * np.log(share[share > 0])).sum()),
        **_surprise(sample, here),
        "confidence": float(top[here].mean()),
        **calibration(top[here], right[here]),
        "sure_wrong": float((sure & ~right).sum() / labelled),
        "sure_wrong_expected": float((1 - top[sure]).sum() / labelled),
    }
    single = sample.part.contents.alignment is None
    if single:
        found["shifted"] = _shifted(sample, right)
        found["mapped"] = _mapped(choice[here], labels[here])
    fitted = fit(targets, sample.part.contents.num_classes) if single else None
    found["fit"] = None if fitted is None else dataclasses.asdict(fitted)
    return found


def calibration(confidence: Doubles, right: Bools) -> dict[str, Any]:
    """ece, 0 to 1, and the bins of a reliability picture, from confidences [N] and hits [N]."""
    at = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    rows = np.bincount(at, minlength=BINS)
    sure = np.bincount(at, weights=confidence, minlength=BINS)
    hits = np.bincount(at, weights=right, minlength=BINS)
    bins = [
        {
            "lower": n / BINS,
            "upper": (n + 1) / BINS,
            "rows": int(rows[n]),
            "confidence": float(sure[n] / rows[n]) if rows[n] else None,
            "accuracy": float(hits[n] / rows[n]) if rows[n] else None,
        }
        for n in range(BINS)
    ]
    return {"ece": float(np.abs(sure - hits).sum() / max(1, len(confidence))), "bins": bins}


def label_logprobs(sample: Sample) -> Doubles:
    """log p(label), nats, float64 [N]; NaN without a label, or when it is not known."""
    targets, labels = sample.targets, sample.labels
    if targets.label_logprobs is not None:
        return np.where(labels >= 0, targets.label_logprobs.astype(np.float64), np.nan)
    probs, _ = codec.head_and_tail(targets)
    here = (targets.ids == labels[:, None]) & (labels >= 0)[:, None]
    with np.errstate(divide="ignore"):
        found = np.log((probs * here).sum(1))
    return np.where(here.any(1), found, np.nan)


def _surprise(sample: Sample, here: Bools) -> dict[str, Any]:
    """nll, entropy and their difference, which is 0 on average for a calibrated teacher.

    It is the slope of the mean -log p(y) in 1/T at T = 1, and needs no other temperature.
    """
    entropy = sample.targets.entropy
    own = label_logprobs(sample)
    known = here & np.isfinite(own)
    found: dict[str, Any] = dict.fromkeys(
        ("nll", "entropy", "surprise", "surprise_se", "surprise_temperature")
    )
    if not known.any():
        return found
    found["nll"] = float(-own[known].mean())
    if entropy is None or np.isnan(entropy[known]).any():
        return found
    over = -own[known] - entropy[known]
    # Positions of one row are not independent: rows are.
    rows = sample.row_of[known]
    _, at = np.unique(rows, return_inverse=True)
    sums, counts = np.bincount(at, weights=over), np.bincount(at)
    mean = float(over.mean())
    spread = sums - counts * mean
    return found | {
        "entropy": float(entropy[known].mean()),
        "surprise": mean,
        "surprise_se": float(math.sqrt(float((spread**2).sum())) / counts.sum()),
        "surprise_temperature": _temperature(sample, known, mean),
    }


def _temperature(sample: Sample, here: Bools, surprise: float) -> float:
    """About the temperature at which surprise would be 0: one Newton step in 1/T, 1/4 to 4.

    The slope's slope is the variance of log p under p; the tail is taken as spread evenly.
    """
    targets = sample.targets.map_positions(here, np.ones(int(here.sum()), np.int32))
    head, tail = codec.head_and_tail(targets)
    rest = np.maximum(1, sample.part.contents.num_classes - (targets.ids >= 0).sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(head > 0, np.log(head), 0)
        outside = np.where(tail > 0, np.log(tail / rest), 0)
    mean = (head * logs).sum(1) + tail * outside
    squares = (head * logs**2).sum(1) + tail * outside**2
    variance = max(float((squares - mean**2).mean()), 1e-6)
    return float(1 / np.clip(1 - surprise / variance, 0.25, 4))


def _shifted(sample: Sample, right: Bools) -> dict[str, dict[str, float]]:
    """Accuracy against the label of the row `shift` further on in the same row group.

    Both are over the rows that have such a neighbour with another label than their own: where
    neighbours are alike, as in sorted sources, nothing can be told.
    """
    labels, choice = sample.labels, sample.targets.ids[:, 0]
    group: npt.NDArray[np.int64] = np.cumsum(sample.ends_group) - sample.ends_group
    found = {}
    for shift in SHIFTS:
        place = np.arange(len(labels)) + shift
        inside = (place >= 0) & (place < len(labels))
        place = np.clip(place, 0, len(labels) - 1)
        other = labels[place]
        usable = inside & (group == group[place]) & (labels >= 0) & (other >= 0) & (other != labels)
        if rows := int(usable.sum()):
            found[f"{shift:+d}"] = {
                "rows": rows,
                "accuracy": float(right[usable].mean()),
                "neighbour": float((choice == other)[usable].mean()),
            }
    return found


def _mapped(choice: npt.NDArray[np.int32], labels: npt.NDArray[np.int32]) -> dict[str, float]:
    """Accuracy if each choice meant the label it most often goes with: classes in another order.

    The map is learnt on one half of the rows and judged on the other, and counts a class once.
    """
    size = int(max(choice.max(initial=0), labels.max(initial=0))) + 1
    pairs = choice.clip(0).astype(np.int64) * size + labels
    keys, counts = np.unique(pairs[::2], return_counts=True)
    meant: dict[int, int] = {}
    used: set[int] = set()
    for at in np.argsort(-counts, kind="stable"):
        taken, given = divmod(int(keys[at]), size)
        if taken not in meant and given not in used:
            meant[taken] = given
            used.add(given)
    table = np.full(size, -1, np.int64)
    table[list(meant)] = list(meant.values())
    judged = slice(1, None, 2)
    return {
        "accuracy": float((table[choice[judged].clip(0)] == labels[judged]).mean())
        if len(labels) > 1
        else math.nan,
        "moved": sum(taken != given for taken, given in meant.items()),
    }

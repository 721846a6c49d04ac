"""Stored targets at another temperature, where that is exact.

Softmax(log p / T) is known where all of p is stored, and where shift and tail of T are: then
logprob at T = logprob / T + shift. From the top k alone the tail's share at T cannot be told.

N positions, k stored ids a position, V classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from softlabels.errors import MismatchError
from softlabels.lineage import Contents
from softlabels.targets import SoftTargets, Temper

Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Tempered:
    """What is known of N positions at one temperature, nats.

    Attributes:
        logprobs: float64 [N, k], as readers take them: head and tail have mass 1; -inf if padded.
        tail: float64 [N], log of the mass outside.
        label: float64 [N], log-probability of the hard label; NaN where there is none or it is
            not known.
        offset: float64 [N], what was added to logprob / T.
    """

    logprobs: Doubles
    tail: Doubles
    label: Doubles
    offset: Doubles


@dataclass(frozen=True)
class Exact:
    """At which temperatures a table's targets are exact.

    Attributes:
        whole: all V classes are stored: at any; else at `stored`.
        stored: 1 and the extra ones that the table stores.
    """

    whole: bool
    stored: tuple[float, ...]

    @classmethod
    def of(cls, contents: Contents) -> "Exact":
        """By what the table says of itself; `incomplete` looks at its rows."""
        return cls(contents.k >= contents.num_classes, (1.0, *contents.temperatures))

    def require(self, temperature: float, contents: Contents, where: str) -> None:
        """Raises MismatchError where `temperature` is not one of them."""
        if self.whole or temperature in self.stored:
            return
        raise MismatchError(
            f"temperature {temperature!r} is asked, {where} stores {list(self.stored)!r} and "
            f"{contents.k} of {contents.num_classes} classes: how its mass outside them spreads at "
            f"another temperature cannot be told; capture it with `temperatures: "
            f"[{temperature:g}]`, or with k = {contents.num_classes}"
        )

    def rebased(self, temperature: float) -> dict[float, float]:
        """The extra temperatures of targets that are tempered: each with the stored one it is.

        Of whole targets they stay as they are. Else those whose name a column cannot carry exactly
        are left out: at T = 1.5, 1 would be 0.6666….
        """
        if self.whole:
            return {t: t for t in self.stored if t != 1}
        found = {t / temperature: t for t in self.stored if t != temperature}
        return {new: old for new, old in found.items() if float(f"{new:g}") == new}


def incomplete(targets: SoftTargets, num_classes: int) -> Bools:
    """Positions of which not all is stored, bool [N]."""
    all_ids = (targets.ids >= 0).sum(1) >= num_classes
    nothing_left = False if targets.tail is None else np.isneginf(targets.tail)
    return np.asarray(~(all_ids | nothing_left), bool)


def temper(targets: SoftTargets, temperature: float, whole: bool) -> Tempered:
    """`targets` at a temperature; of targets that are not `whole` one that they store, or 1."""
    logprobs = targets.logprobs.astype(np.float64) / temperature
    if whole:
        offset = shift = -log_sum(logprobs)
        tail = np.full(len(logprobs), -np.inf)
    else:
        stored = None if temperature == 1 else targets.temper[temperature]
        shift = np.zeros(len(logprobs)) if stored is None else stored.shift.astype(np.float64)
        known = targets.tail if stored is None else stored.tail
        assert known is not None
        tail = known.astype(np.float64)
        # The head has the mass that the tail leaves, whatever rounding did to both.
        with np.errstate(divide="ignore"):
            offset = np.log(-np.expm1(tail)) - log_sum(logprobs)
        offset = np.where(np.isfinite(offset), offset, shift)
    logprobs += offset[:, None]
    inside = _at_label(targets).any(1)
    label = raw_label(targets) / temperature + np.where(inside, offset, shift)
    return Tempered(np.minimum(logprobs, 0), tail, np.minimum(label, 0), offset)


def calibrated(
    targets: SoftTargets, temperature: float, whole: bool, extra: Mapping[float, float]
) -> SoftTargets:
    """`targets` at a temperature as targets of their own, at temperature 1, not yet rounded.

    Entropy is exact where all is stored, else unknown. Ids, labels and ranks stay: a temperature
    changes no order.

    Args:
        targets: whose draws, if any, were made at `temperature`.
        temperature: as of `temper`.
        whole: whether all classes are stored.
        extra: as of `Exact.rebased`.
    """
    found = temper(targets, temperature, whole)
    kept = {}
    for new, old in extra.items():
        if whole:
            shift, tail = -log_sum(found.logprobs / new), found.tail
        else:
            one = targets.temper.get(old)
            shift = (0 if one is None else one.shift.astype(np.float64)) - found.offset / new
            tail = targets.tail if one is None else one.tail  # type: ignore[assignment]
        kept[new] = Temper(np.asarray(shift, np.float32), np.asarray(tail, np.float32))
    entropy = None
    if whole:
        probs = np.exp(found.logprobs)
        entropy = -np.where(probs > 0, probs * found.logprobs, 0).sum(1).clip(max=0)
    has_labels = targets.label_logprobs is not None or (whole and targets.label_ids is not None)
    return replace(
        targets,
        logprobs=found.logprobs.astype(np.float32),
        tail=found.tail.astype(np.float32),
        entropy=None if entropy is None else entropy.astype(np.float32),
        label_logprobs=found.label.astype(np.float32) if has_labels else None,
        temper=kept,
    )


def serve_draws(contents: Contents, temperature: float) -> bool:
    """Whether a table's draws are of the tail at `temperature`."""
    return bool(contents.draws) and math.isclose(contents.draws_temperature, temperature)


def log_sum(values: Doubles) -> Doubles:
    """log Σ exp over the last axis, float64 [N]; -inf where all are."""
    top = values.max(1, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return np.asarray(top + np.log(np.exp(values - top[:, None]).sum(1)))


def raw_label(targets: SoftTargets) -> Doubles:
    """log p(label) at temperature 1 as stored, float64 [N]; NaN where none, or not known."""
    labels = targets.label_ids
    if labels is None:
        return np.full(len(targets.ids), np.nan)
    here = _at_label(targets)
    found = np.where(here.any(1), np.where(here, targets.logprobs, 0).sum(1), np.nan)
    if targets.label_logprobs is not None:
        own = targets.label_logprobs.astype(np.float64)
        found = np.where(np.isnan(own), found, own)
    return np.asarray(np.where(labels >= 0, found, np.nan), np.float64)


def _at_label(targets: SoftTargets) -> Bools:
    """Where the hard label stands in the head, bool [N, k]."""
    labels = targets.label_ids
    if labels is None:
        return np.zeros(targets.ids.shape, bool)
    return np.asarray((targets.ids == labels[:, None]) & (labels >= 0)[:, None], bool)

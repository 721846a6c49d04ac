"""How well stored probabilities fit the hard labels, and at which temperature they fit best.

Rows are read again for each look at them, unless they fit into memory: a look is one pass, a fit
of whole targets about eight.

N labelled positions, k stored ids a position.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabels.query.reading import HEADS, read_targets
from softlabels.query.selection import Numbers
from softlabels.query.tempering import Doubles, raw_label, temper
from softlabels.store.table import Table
from softlabels.targets import SoftTargets

BINS = 15
"""Of equal width. Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017."""

RANGE = (0.02, 50.0)
"""Temperatures that are tried of whole targets."""

HELD_NUMBERS = 25_000_000
"""Stored ids of labelled positions that are held in memory between passes: 200 MB."""

_STEPS = 40
_CLOSE = 1e-7


class LabelledRows:
    """The labelled positions of some rows, as often as they are asked for.

    Args:
        table: the version.
        rows: which of its rows, rising.
        temperatures: the extra ones that are needed.
    """

    def __init__(self, table: Table, rows: Numbers, temperatures: Sequence[float] = ()) -> None:
        self._table, self._rows, self._temperatures = table, rows, tuple(temperatures)
        self._held: list[SoftTargets] | None = []
        self._read = False
        self.positions = 0
        self.unlabelled = 0
        self.unknown = 0

    def __iter__(self) -> Iterator[SoftTargets]:
        """Their targets, a position a row.

        The first pass counts `positions`; `unlabelled` ones, which have no label; and `unknown`
        ones, whose label has an unknown probability or none at all. Both are left out.
        """
        if self._held is not None and self._read:
            yield from self._held
            return
        columns = (*HEADS, "label_ids", "label_logprobs")
        held: list[SoftTargets] = []
        numbers = 0
        self.positions = self.unlabelled = self.unknown = 0
        for _, targets in read_targets(self._table, self._rows, columns, self._temperatures):
            known = np.isfinite(raw_label(targets))
            self.positions += int(known.sum())
            labels = targets.label_ids
            labelled = 0 if labels is None else int((labels >= 0).sum())
            self.unlabelled += len(targets.ids) - labelled
            self.unknown += labelled - int(known.sum())
            chosen = np.flatnonzero(known)
            if not len(chosen):
                continue
            part = targets.map_positions(chosen, np.ones(len(chosen), np.int32))
            numbers += part.ids.size
            if numbers <= HELD_NUMBERS:
                held.append(part)
            yield part
        self._read, self._held = True, held if numbers <= HELD_NUMBERS else None


@dataclass(frozen=True)
class Fit:
    """How well probabilities fit hard labels.

    Attributes:
        positions: N.
        nll: mean -log p(label), nats.
        ece: expected calibration error of the likeliest class, 0 to 1.
    """

    positions: int
    nll: float
    ece: float


def measure(rows: LabelledRows, temperatures: Sequence[float], whole: bool) -> list[Fit]:
    """The fit at each temperature, in one pass.

    Args:
        rows: at least one position.
        temperatures: of targets that are not whole, stored ones.
        whole: whether all classes are stored.
    """
    found = [_Fitted() for _ in temperatures]
    for targets in rows:
        assert targets.label_ids is not None
        for fitted, temperature in zip(found, temperatures, strict=True):
            known = temper(targets, temperature, whole)
            right = targets.ids[:, 0] == targets.label_ids
            fitted.add(known.label, np.exp(known.logprobs[:, 0]), right)
    return [fitted.result() for fitted in found]


def best_temperature(rows: LabelledRows) -> tuple[float, float]:
    """The temperature of `RANGE` at which whole targets fit their labels best; its standard error.

    The mean of -log p_T(label) is convex in 1 / T: Newton's steps, kept within what its slope has
    shown, find its least value, and its curvature there says how sure that is.
    """

    def slope(inverse: float) -> tuple[float, float]:
        first = second = count = 0.0
        for targets in rows:
            one, two = _slopes(targets, inverse)
            first, second, count = first + one, second + two, count + len(targets.ids)
        return first / count, second / count

    best = 1 / _least(slope, 1 / RANGE[1], 1 / RANGE[0])
    curvature = slope(1 / best)[1] * rows.positions
    return best, best**2 / np.sqrt(curvature) if curvature > 0 else float("nan")


def _slopes(targets: SoftTargets, inverse: float) -> tuple[float, float]:
    """First and second derivative by 1 / T of the sum of -log p_T(label)."""
    stored = np.isfinite(targets.logprobs)
    logs = np.where(stored, targets.logprobs.astype(np.float64), 0)
    scaled = np.where(stored, logs * inverse, -np.inf)
    weights = np.exp(scaled - scaled.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    mean = (weights * logs).sum(1)
    spread = (weights * (logs - mean[:, None]) ** 2).sum(1)
    return float((mean - raw_label(targets)).sum()), float(spread.sum())


def _least(slope: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    at = 1.0
    for _ in range(_STEPS):
        first, second = slope(at)
        low, high = (low, at) if first > 0 else (at, high)
        step = at - first / second if second > 0 else low
        if not low < step < high:
            step = float(np.sqrt(low * high))
        if abs(step - at) <= _CLOSE * at:
            return step
        at = step
    return at


class _Fitted:
    """Sums over chunks."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0
        self._bins = np.zeros((2, BINS))  # of confidence and of hits

    def add(self, label: Doubles, top: Doubles, right: npt.NDArray[np.bool_]) -> None:
        self._sum -= float(label.sum())
        self._count += len(label)
        at = np.clip(np.ceil(top * BINS).astype(np.int64) - 1, 0, BINS - 1)
        self._bins[0] += np.bincount(at, top, BINS)
        self._bins[1] += np.bincount(at, right, BINS)

    def result(self) -> Fit:
        error = float(np.abs(self._bins[0] - self._bins[1]).sum())
        return Fit(self._count, self._sum / self._count, error / self._count)

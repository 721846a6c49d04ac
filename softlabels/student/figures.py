"""Figures of distributions against hard labels and a teacher, summed over positions as they come.

N positions, V classes, p the teacher's and q the student's distribution at temperature 1, S the
ids that are stored for a position.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 15
"""Of the calibration error; Guo et al. use 15."""

Values = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Bin:
    """One bar of a reliability picture.

    Attributes:
        lower: confidences above it (the first bin takes 0 too),
        upper: up to it.
        rows: labelled positions in the bin, one a row in classification.
        confidence: their mean confidence, 0 to 1; None when there are none.
        accuracy: the share that is right; None when there are none.
    """

    lower: float
    upper: float
    rows: int
    confidence: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one pass found; None where the plan or the subject cannot say.

    Attributes:
        rows: rows seen.
        labelled: positions with a hard label; accuracy, nll and ece are over these.
        accuracy: share whose likeliest class is the hard label, 0 to 1.
        nll: mean -log q of the hard label, nats.
        ece: expected calibration error of the likeliest class, 0 to 1.
        agreement: share whose likeliest class is the teacher's, 0 to 1. Of several teachers, their
            weighted mixture's, over the ids that any of them stores; one that does not store an
            id counts 0 there.
        kl_to_teacher: mean KL(teacher‖student), nats, over S and the tail as one class: a lower
            bound of the full KL, equal to it when all classes are stored. Of several teachers, the
            weighted sum of theirs, which is at least the KL to the mixture.
        acceptance: mean of sum min(p, q), 0 to 1, tail as one class (an upper bound): how often a
            draw of q passes for one of p. Of several teachers p is the mixture, as for agreement.
        perplexity: language models: e^nll.
        positions: language models: N, positions seen; means are over these.
        examples_per_s: of the student's forward pass alone, without reading and decoding.
        tokens_per_s: language models: the same in tokens, without padding.
        threads: of torch at that time.
        parameters: numbers in the student.
        bins: for a reliability picture; `BINS` of equal width.
    """

    rows: int
    labelled: int
    accuracy: float | None
    nll: float | None
    ece: float | None
    agreement: float | None = None
    kl_to_teacher: float | None = None
    acceptance: float | None = None
    perplexity: float | None = None
    positions: int | None = None
    examples_per_s: float | None = None
    tokens_per_s: float | None = None
    threads: int | None = None
    parameters: int | None = None
    bins: tuple[Bin, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return dataclasses.asdict(self)


def reliability(confidence: Values, right: npt.NDArray[np.bool_]) -> tuple[float, tuple[Bin, ...]]:
    """The expected calibration error of labelled positions, and the bins that it sums over.

    ece = sum over bins of rows in it / rows * |accuracy - confidence|, bins (lower, upper] of
    equal width.

    Args:
        confidence: float64 [N], probability of the likeliest class, 0 to 1.
        right: bool [N], whether that class is the hard label.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", 2017.
    """
    return _calibration(_binned(confidence, right))


def _binned(confidence: Values, right: npt.NDArray[np.bool_]) -> Values:
    """Float64 [3, BINS]: of each bin, how many, and the sums of confidence and of right."""
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    weights = (None, confidence, right)
    return np.stack([np.bincount(place, one, BINS).astype(np.float64) for one in weights])


def _calibration(binned: Values) -> tuple[float, tuple[Bin, ...]]:
    counts, confidences, rights = binned
    error = float(np.abs(rights - confidences).sum() / max(counts.sum(), 1))
    bins = []
    for i, rows in enumerate(counts.astype(int).tolist()):
        confident, accurate = (float(s[i] / rows) if rows else None for s in (confidences, rights))
        bins.append(Bin(i / BINS, (i + 1) / BINS, rows, confident, accurate))
    return error, tuple(bins)


class Collected:
    """Sums of the figures of every position seen so far, by name.

    Attributes:
        rows: seen; whoever adds positions counts them.
    """

    def __init__(self) -> None:
        self.rows = self._positions = self._labelled = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._bins = np.zeros((3, BINS))
        self._binned = False

    def add(self, labelled: npt.NDArray[np.bool_], **values: npt.NDArray[Any]) -> None:
        """Adds N positions; nll and right count at labelled ones only, NaN nowhere."""
        self._positions += len(labelled)
        self._labelled += int(labelled.sum())
        for name, value in values.items():
            counted = value[labelled] if name in ("nll", "right", "confidence") else value
            counted = counted[~np.isnan(counted)] if counted.dtype.kind == "f" else counted
            self._sums[name] = self._sums.get(name, 0.0) + float(counted.sum(dtype=np.float64))
            self._counts[name] = self._counts.get(name, 0) + len(counted)
        if "right" in values:
            judged = labelled & ~np.isnan(values["confidence"])
            self._bins += _binned(values["confidence"][judged], values["right"][judged])
            self._binned = True

    def evaluation(self, sequences: bool) -> Evaluation:
        """The means of all figures added so far."""

        def mean(name: str) -> float | None:
            # What some tables do not say, such as tails, does not count for them.
            count = self._counts.get(name, 0)
            return self._sums[name] / count if count else None

        ece, bins = _calibration(self._bins)
        nll = mean("nll")
        judged = self._binned and self._bins[0].sum() > 0
        return Evaluation(
            rows=self.rows,
            labelled=self._labelled,
            accuracy=mean("right"),
            nll=nll,
            ece=ece if judged else None,
            agreement=mean("agreement"),
            kl_to_teacher=mean("kl"),
            acceptance=mean("acceptance"),
            perplexity=_exp(nll) if sequences and nll is not None else None,
            positions=self._positions if sequences else None,
            bins=bins if judged else (),
        )


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf

"""How many hard labels are wrong, by what fits the teacher best: a temperature and label noise.

    p(label) = (1 - ε) p_T(label) + ε / V

T and ε are fitted together, so that neither is taken for the other: a teacher that is too sure
errs most where it is unsure, wrong labels are wrong however sure it is. Of a share ε of labels
drawn at random, one in V is right by chance. What else is wrong with the teacher goes into ε too.

N labelled positions, V classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from softlabels.noise_model import best_noise, least_temperature, noisy_nll
from softlabels.query.fitting import LabelledRows
from softlabels.query.recipe import Source
from softlabels.query.selection import select
from softlabels.query.tempering import Doubles, Exact, temper
from softlabels.store.table import Table

MOST_NUMBERS = 5_000_000
"""Stored ids that a fit goes over each time; of more a random part is taken."""

LEAST = 50
"""Labelled positions below which nothing is fitted."""

SMALLEST = 1e-30

_STEP = 0.01
"""Of log T, for the curvature of the likelihood."""


@dataclass(frozen=True)
class Noise:
    """The likeliest temperature and label noise.

    Attributes:
        positions: labelled ones that were fitted.
        temperature: T; where not all classes are stored, the best of the stored ones.
        noise: ε, 0 to 1.
        noise_se: its standard error, by the curvature of the likelihood; with T free, where any T
            could be taken.
        wrong: the share of wrong labels, ε (V - 1) / V; `wrong_se` its standard error.
        nll: mean -log p(label), nats, at T and ε; `nll_clean` the least one with ε = 0.
    """

    positions: int
    temperature: float
    noise: float
    noise_se: float
    wrong: float
    wrong_se: float
    nll: float
    nll_clean: float


def estimate_noise(table: str | Table, where: str | None = None) -> Noise | None:
    """Fits temperature and noise on the labelled rows of a table; None with fewer than `LEAST`.

    Raises:
        BadInputError: `where` cannot be meant.
    """
    opened = Table.open(table) if isinstance(table, str) else table
    exact = Exact.of(opened.contents)
    extra = () if exact.whole else tuple(t for t in exact.stored if t != 1)
    rows = _some(opened, where)
    held = LabelledRows(opened, rows, extra)
    kept = list(held)
    if held.positions < LEAST:
        return None

    def label_probs(temperature: float) -> Doubles:
        logs = [temper(part, temperature, exact.whole).label for part in kept]
        return np.exp(np.concatenate(logs))

    return fit_noise(
        label_probs, opened.contents.num_classes, None if exact.whole else exact.stored
    )


def fit_noise(
    label_probs: Callable[[float], Doubles],
    classes: int,
    temperatures: tuple[float, ...] | None = None,
) -> Noise:
    """The fit of temperature and noise.

    Args:
        label_probs: p_T(label), float64 [N], at a temperature T.
        classes: V.
        temperatures: the only ones that can be taken; None: any of 0.1 to 10.
    """

    @cache
    def probs_at(temperature: float) -> Doubles:
        return np.maximum(label_probs(temperature), SMALLEST)

    def noisy(temperature: float) -> float:
        probs = probs_at(temperature)
        return noisy_nll(probs, best_noise(probs, classes), classes)

    def clean(temperature: float) -> float:
        return noisy_nll(probs_at(temperature), 0.0, classes)

    best = least_temperature if temperatures is None else _best_of(temperatures)
    temperature, alone = best(noisy), best(clean)
    probs = probs_at(temperature)
    noise = best_noise(probs, classes)
    near = {}
    if temperatures is None:
        near = {s: probs_at(temperature * float(np.exp(s))) for s in (-_STEP, _STEP)}
    error = _standard_error(probs, near, noise, classes)
    share = (classes - 1) / classes
    return Noise(
        positions=len(probs),
        temperature=temperature,
        noise=noise,
        noise_se=error,
        wrong=noise * share,
        wrong_se=error * share,
        nll=noisy_nll(probs, noise, classes),
        nll_clean=clean(alone),
    )


def _some(table: Table, where: str | None) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The rows to fit on: all that fulfil `where`, or a random part of them."""
    source = {"table": table.root.uri, "where": where}
    rows = select(table, Source.model_validate(source), 0, with_keys=False).rows
    width = max(1, table.contents.k) * (1 if table.contents.alignment is None else 256)
    most = max(LEAST, MOST_NUMBERS // width)
    if len(rows) <= most:
        return rows
    part = source | {"fraction": most / len(rows)}
    return select(table, Source.model_validate(part), 0, with_keys=False).rows


def _standard_error(
    probs: Doubles, near: Mapping[float, Doubles], noise: float, classes: int
) -> float:
    """Of ε, from the inverse of the observed information in (log T, ε).

    Args:
        probs: p_T(label), float64 [N].
        near: the same at T e^s, by s, for a step down and a step up; empty: T is not free.
        noise: ε.
        classes: V.
    """
    mixed = (1 - noise) * probs + noise / classes
    information = float((((1 / classes - probs) / mixed) ** 2).sum())
    if near:
        (down, below), (up, above) = sorted(near.items())
        sums = [noisy_nll(p, noise, classes) * len(p) for p in (below, probs, above)]
        slopes = [
            -float(((1 / classes - p) / ((1 - noise) * p + noise / classes)).sum())
            for p in (below, above)
        ]
        curvature = (sums[0] - 2 * sums[1] + sums[2]) / up**2
        cross = (slopes[1] - slopes[0]) / (up - down)
        if curvature > 0:
            information = max(information - cross**2 / curvature, 0.0)
    return float(1 / np.sqrt(information)) if information > 0 else float("nan")


def _best_of(stored: tuple[float, ...]) -> Callable[[Callable[[float], float]], float]:
    return lambda loss: min(stored, key=loss)

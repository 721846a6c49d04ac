"""What would make a teacher's probabilities fit the labels best: a temperature, label noise.

Both are fitted together, so that neither is taken for the other: p(y) = (1-ε) p_T(y) + ε/V, where
p_T is the stored distribution at temperature T. Wrong labels are wrong however sure the teacher is;
an over-confident teacher errs most where it is unsure.

N labelled positions, k stored ids, V classes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabels.noise_model import Doubles, best_noise, least_temperature, noisy_nll
from softlabels.store import codec
from softlabels.targets import SoftTargets

MOST_NUMBERS = 2_000_000
"""Probabilities that a fit goes over each time: a fraction of a second."""

LARGEST_TAIL = 0.1
"""Mean mass outside the top k above which nothing is fitted: at another temperature it depends on
how that mass is spread, which the table does not say."""

SMALLEST = 1e-12
"""Probability that a label has at least: a head of float32 may say that there is no other class."""


@dataclass(frozen=True)
class Fit:
    """The likeliest temperature and label noise, and what each is worth.

    Attributes:
        positions: labelled positions that were fitted.
        temperature: T.
        noise: ε, 0 to 1.
        nll: mean -log p(y) as stored, nats.
        temperature_gain: nats a position that T wins over T = 1, noise fitted in both.
        noise_gain: nats a position that ε wins over ε = 0, T fitted in both.
    """

    positions: int
    temperature: float
    noise: float
    nll: float
    temperature_gain: float
    noise_gain: float


def fit(targets: SoftTargets, num_classes: int) -> Fit | None:
    """The fit over the labelled positions; None without any, or when heads hold too little.

    Mass outside the top k is taken to be spread evenly over the other classes, which is exact when
    none is left out, and of little weight when it is little.
    """
    found = _parts(targets)
    if found is None:
        return None
    head, rest, label, outside = found
    if rest is not None and float(rest.mean()) > LARGEST_TAIL:
        return None
    others = np.maximum(1, num_classes - (np.isfinite(head)).sum(1))

    def likelihood(temperature: float) -> Doubles:
        """p_T(y) of each position."""
        total = np.exp(head / temperature).sum(1)
        if rest is not None:
            # With the label's own share where it is known and outside the head.
            left = np.maximum(rest - np.where(outside, np.exp(label), 0), 0)
            classes = np.maximum(1, others - outside)
            with np.errstate(divide="ignore"):
                each = np.log(left) - np.log(classes)
            total = total + classes * np.exp(each / temperature)
            total = total + np.where(outside, np.exp(label / temperature), 0)
        return np.asarray(np.exp(label / temperature) / total)

    def best(noisy: bool) -> tuple[float, float, float]:
        def loss(temperature: float) -> float:
            return _noise(likelihood(temperature), num_classes)[1 if noisy else 2]

        temperature = least_temperature(loss)
        noise, with_noise, without = _noise(likelihood(temperature), num_classes)
        return temperature, noise if noisy else 0.0, with_noise if noisy else without

    stored = likelihood(1.0)
    _, noise_alone, nll = _noise(stored, num_classes)
    temperature, noise, both = best(noisy=True)
    _, _, temperature_alone = best(noisy=False)
    return Fit(
        positions=len(label),
        temperature=temperature,
        noise=noise,
        nll=nll,
        temperature_gain=max(0.0, noise_alone - both),
        noise_gain=max(0.0, temperature_alone - both),
    )


def _parts(
    targets: SoftTargets,
) -> tuple[Doubles, Doubles | None, Doubles, npt.NDArray[np.bool_]] | None:
    """Of labelled positions: log head [N, k], tail [N] (None: no mass), log p(y) [N], y outside."""
    labels = targets.label_ids
    if labels is None or not targets.k:
        return None
    chosen = np.flatnonzero(labels >= 0)
    most = max(500, MOST_NUMBERS // targets.k)
    if len(chosen) > most:
        chosen = chosen[np.linspace(0, len(chosen) - 1, most).astype(np.int64)]
    if not len(chosen):
        return None
    ones = np.ones(len(chosen), np.int32)
    some = targets.map_positions(chosen, ones)
    probs, rest = codec.head_and_tail(some)
    here = some.ids == labels[chosen][:, None]
    inside = here.any(1)
    with np.errstate(divide="ignore"):
        head = np.log(probs)
        label = np.where(inside, np.log((probs * here).sum(1)), -np.inf)
    if some.label_logprobs is not None:
        own = some.label_logprobs.astype(np.float64)
        label = np.where(inside | np.isnan(own), label, own)
    # What no one has stored: as if the tail were spread evenly over a thousand classes.
    unknown = ~np.isfinite(label)
    label = np.where(unknown, np.log(np.maximum(rest, SMALLEST) / 1_000), label)
    return head, rest if bool((rest > 0).any()) else None, label, ~inside


def _noise(probs: Doubles, num_classes: int) -> tuple[float, float, float]:
    """(ε, mean -log p(y) with it, the same without)."""
    probs = np.maximum(probs, SMALLEST)
    noise = best_noise(probs, num_classes)
    return noise, noisy_nll(probs, noise, num_classes), noisy_nll(probs, 0.0, num_classes)

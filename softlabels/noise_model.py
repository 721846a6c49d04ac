"""The likeliest label noise and temperature of p(y) = (1 - ε) p_T(y) + ε / V: two searches.

N labelled positions, V classes.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

_TEMPERATURES = np.exp(np.linspace(np.log(0.1), np.log(10), 17))
_GOLDEN = (np.sqrt(5) - 1) / 2


def best_noise(probs: Doubles, classes: int) -> float:
    """ε of the greatest likelihood, 0 to 1, from p_T(y) > 0, float64 [N]; it is concave in ε."""
    away = 1 / classes - probs
    low, high = 0.0, 1.0
    if float((away / probs).sum()) <= 0:  # any noise makes it worse
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        rising = float((away / (probs + middle * away)).sum()) > 0
        low, high = (middle, high) if rising else (low, middle)
    return (low + high) / 2


def noisy_nll(probs: Doubles, noise: float, classes: int) -> float:
    """Mean -log p(y), nats, from p_T(y), float64 [N]."""
    return -float(np.log((1 - noise) * probs + noise / classes).mean())


def least_temperature(loss: Callable[[float], float]) -> float:
    """The temperature of 0.1 to 10 with the least loss: the best of a grid, then golden section."""
    at = int(np.argmin([loss(float(t)) for t in _TEMPERATURES]))
    logs = np.log(_TEMPERATURES)
    low, high = float(logs[max(0, at - 1)]), float(logs[min(len(logs) - 1, at + 1)])
    a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_a, at_b = loss(float(np.exp(a))), loss(float(np.exp(b)))
    for _ in range(16):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - _GOLDEN * (high - low)
            at_a = loss(float(np.exp(a)))
        else:
            low, a, at_a = a, b, at_b
            b = low + _GOLDEN * (high - low)
            at_b = loss(float(np.exp(b)))
    return float(np.exp((low + high) / 2))

"""How exactly log-probabilities were recorded, seen from their digits, and what that costs."""

import math

import numpy as np
import numpy.typing as npt

SOFTMAX_ERROR = 1e-6
"""Of a log-probability that an engine computed in float32, beside its own rounding: sums over a
vocabulary are off by some units in the last place."""

MOST_DECIMALS = 5
"""More cannot be told from float32."""

_UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}

Values = npt.NDArray[np.float64]


class Precision:
    """The coarsest way to write all values that were seen: decimals, bfloat16, float16, float32."""

    def __init__(self) -> None:
        self._decimals = 0
        self._halves = {"bfloat16", "float16"}
        self.count = 0

    def add(self, values: Values) -> None:
        """Looks at more log-probabilities, float64 [n], finite."""
        self.count += len(values)
        single = values.astype(np.float32)
        while self._decimals <= MOST_DECIMALS:
            # As float32, for such files widen 0.1234 to 0.12340000271797180.
            rounded = np.round(values, self._decimals).astype(np.float32)
            if np.array_equal(rounded, single):
                break
            self._decimals += 1
        if "bfloat16" in self._halves and (single.view(np.uint32) & 0xFFFF).any():
            self._halves.discard("bfloat16")
        if "float16" in self._halves:
            with np.errstate(over="ignore"):
                held = values.astype(np.float16).astype(np.float32)
            if not np.array_equal(held, single):
                self._halves.discard("float16")

    @property
    def kind(self) -> str:
        """Such as "4 decimals" or "float32"."""
        if self._decimals <= MOST_DECIMALS:
            return f"{self._decimals} decimals"
        return min(self._halves, default="float32")  # bfloat16 first, the coarser

    def mass_error(self, k: int) -> float:
        """How far the mass of k recorded probabilities may be off.

        A log-probability off by e moves its probability p by p·(exp(e) - 1). With e the same for
        all, as for decimals, that adds up to at most exp(e) - 1. With e = u·|log p|, as for
        floats, it adds up to u·Σ p·|log p| at first order, and that sum is at most
        max(1, log k), for the mass is at most 1.
        """
        if self._decimals <= MOST_DECIMALS:
            return math.expm1(0.5 * 10.0**-self._decimals) + SOFTMAX_ERROR
        unit = _UNITS[self.kind]
        return math.expm1(unit * max(1.0, math.log(k))) + SOFTMAX_ERROR

"""Where the time of a step goes, and what holds it up: in a table, and in words."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

DATA, INPUTS, FORWARD, BACKWARD, OPTIMIZER, RANKS, OTHER = (
    "data wait",
    "decode and transfer",
    "forward and loss",
    "backward",
    "optimizer",
    "other ranks",
    "other",
)
PARTS = (DATA, INPUTS, FORWARD, BACKWARD, OPTIMIZER, RANKS, OTHER)

HELD_UP = 0.05
"""Of a step's time: what waiting may take before it is the bottleneck, however long the rest is."""

_ADVICE = {
    DATA: (
        "waits for data",
        "reading, decode and transform are slower than the student: raise inputs.threads, keep the "
        "local cache on fast disk (SOFTLABELS_CACHE), give the process more processors, or read "
        "from nearer storage",
    ),
    INPUTS: (
        "makes and moves inputs",
        "the training thread does this itself: make inputs smaller, such as uint8 in place of "
        "float32, and let the student scale them",
    ),
    RANKS: (
        "waits for other ranks",
        "one rank is slower than the rest: see that all have the same hardware and none shares it",
    ),
    FORWARD: ("computes (forward and loss)", ""),
    BACKWARD: ("computes (backward)", ""),
    OPTIMIZER: ("computes (optimizer)", ""),
    OTHER: ("saves, evaluates and reports", "raise checkpoint.every, evaluate.every or log_every"),
}
_COMPUTE = (
    "the student's arithmetic is the limit, as it should be: other hardware, autocast, compile or "
    "more ranks make it faster, better reading does not"
)


class Clock:
    """Seconds of each part of a run's steps; a part within another counts once, as itself.

    Args:
        device: a GPU is waited for at the borders of parts, so that its work counts where it was
            asked for.
        exact: whether to wait; without it parts cost nothing, and a GPU's time shows wherever the
            processor waits for it.
    """

    def __init__(self, device: torch.device | str = "cpu", exact: bool = False) -> None:
        self._wait = exact and torch.device(device).type == "cuda"
        self._names = [OTHER]
        self.clear()

    def clear(self) -> None:
        """Forgets what was measured: from now on counts."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside for a part."""
        self._turn()
        self._names.append(name)
        try:
            yield
        finally:
            self._turn()
            self._names.pop()

    def stop(self) -> dict[str, float]:
        """Seconds of each part up to now."""
        self._turn()
        return dict(self.seconds)

    def _turn(self) -> None:
        if self._wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._names[-1]] += now - self._since
        self._since = now


def profile(seconds: Mapping[str, float], steps: int) -> dict[str, Any]:
    """Seconds a step and share of each part, and the bottleneck in words, plain JSON.

    Args:
        seconds: of each part.
        steps: in which they were spent.
    """
    total = max(sum(seconds.values()), 1e-9)
    shares = {name: spent / total for name, spent in seconds.items()}
    return {
        "steps": steps,
        "seconds": total,
        "parts": {
            name: {"seconds_per_step": spent / max(steps, 1), "share": shares[name]}
            for name, spent in seconds.items()
        },
        "bottleneck": bottleneck(shares),
    }


def bottleneck(shares: Mapping[str, float]) -> str:
    """What holds a run up, in words, from the share of each part.

    Waiting comes first from HELD_UP on, since it is what can be had for nothing.
    """
    idle = max((DATA, INPUTS, RANKS, OTHER), key=lambda name: shares[name])
    compute = max((FORWARD, BACKWARD, OPTIMIZER), key=lambda name: shares[name])
    name = idle if shares[idle] >= HELD_UP else compute
    does, advice = _ADVICE[name]
    return f"{does} {shares[name]:.0%} of the time: {advice or _COMPUTE}"

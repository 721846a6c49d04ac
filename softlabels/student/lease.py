"""Memory of batches, used again: what the system gives anew it clears first, page by page.

That takes longer than filling it. Threads that allocate where others free make it the rule, for
the C library then gives memory back to the system.
"""

import math
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

STEP_BYTES = 1 << 20
"""Blocks are multiples of this, so that the next piece fits where the last one was."""

MOST_FREE = 8
"""Blocks kept while nobody uses them."""

_ALIGNMENT = 64
_free: "deque[npt.NDArray[np.uint8]]" = deque(maxlen=MOST_FREE)


class Lease:
    """Room for some arrays, which is free again when the last view of any of them is gone.

    Args:
        nbytes: of all arrays together; more are given memory of their own.
    """

    def __init__(self, nbytes: int) -> None:
        self._block: npt.NDArray[np.uint8] | None = None
        self._at = 0
        if nbytes < STEP_BYTES:  # what the C library keeps for itself
            return
        block = _found(nbytes)
        # Views of an array refer to the array that owns the memory, not to one another; of this
        # one, which owns none, they refer to itself.
        self._block = np.frombuffer(block.data, np.uint8)
        weakref.finalize(self._block, _free.append, block).atexit = False

    def empty(self, shape: tuple[int, ...], kind: Any) -> npt.NDArray[Any]:
        """An array with anything in it."""
        size = math.prod(shape) * np.dtype(kind).itemsize
        start, stop = self._at, self._at + size
        if self._block is None or stop > len(self._block) or not size:
            return np.empty(shape, kind)
        self._at = stop + -stop % _ALIGNMENT
        found: npt.NDArray[Any] = self._block[start:stop].view(kind).reshape(shape)
        return found


def _found(nbytes: int) -> npt.NDArray[np.uint8]:
    """A free block that is large enough and not twice too large; else a new one."""
    for _ in range(len(_free)):
        try:
            block = _free.pop()  # the one used last: it may still be in the processor's caches
        except IndexError:  # another thread was quicker
            break
        if nbytes <= len(block) <= 2 * nbytes + STEP_BYTES:
            return block
        _free.appendleft(block)
    return np.empty(nbytes + -nbytes % STEP_BYTES, np.uint8)

"""Memory of batches, used again: what the system gives anew it clears first, page by page.

That takes longer than filling it. Threads that allocate where others free make it the rule, for
the C library then gives memory back to the system.
"""

import contextlib
import math
import weakref
from collections import defaultdict, deque
from typing import Any

import numpy as np
import numpy.typing as npt

STEP_BYTES = 1 << 20
"""The smallest block. There are eight sizes to each power of two, so that most fit again."""

FREE_BYTES = 64 << 20
"""Of blocks of one size that are kept while nobody uses them."""

ALIGNMENT = 64
"""Bytes, of which the places of arrays are multiples."""

_free: "defaultdict[int, deque[npt.NDArray[np.uint8]]]" = defaultdict(deque)


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
        weakref.finalize(self._block, _give_back, block).atexit = False

    def empty(self, shape: tuple[int, ...], kind: Any) -> npt.NDArray[Any]:
        """An array with anything in it."""
        size = math.prod(shape) * np.dtype(kind).itemsize
        start, stop = self._at, self._at + size
        if self._block is None or stop > len(self._block) or not size:
            return np.empty(shape, kind)
        self._at = stop + -stop % ALIGNMENT
        found: npt.NDArray[Any] = self._block[start:stop].view(kind).reshape(shape)
        return found

    def copy(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The values in an array of their own."""
        found = self.empty(values.shape, values.dtype)
        found[...] = values
        return found


def _found(nbytes: int) -> npt.NDArray[np.uint8]:
    """A free block that is large enough and not twice too large; else a new one."""
    size = least = _rounded(nbytes)
    while size < 2 * least:
        try:
            return _free[size].pop()  # the one used last: it may still be in the caches
        except IndexError:
            size = _rounded(size + 1)
    return np.empty(least, np.uint8)


def _rounded(nbytes: int) -> int:
    step = 1 << (nbytes - 1).bit_length() - 4
    return nbytes + -nbytes % step


def _give_back(block: npt.NDArray[np.uint8]) -> None:
    # Without a lock: the collector may call this in the midst of anything, and processes fork.
    free = _free[len(block)]
    free.append(block)
    if len(block) * len(free) > max(FREE_BYTES, 2 * len(block)):
        with contextlib.suppress(IndexError):  # another thread was quicker
            free.popleft()

"""Memory used again: what the system gives anew it clears first, page by page.

That takes longer than filling it, and happens all the time where one thread allocates and another
frees: the C library then gives memory back to the system, and Arrow's keeps more than is used.
"""

import math
import threading
import weakref
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import numpy.typing as npt

STEP_BYTES = 256 << 10
"""Blocks are multiples of this, so that the next piece fits where the last one was."""

MOST_FREE = 64 << 20
"""Bytes kept while nobody uses them."""

_ALIGNMENT = 64

Block = npt.NDArray[np.uint8]


class _Pool:
    """Blocks that nobody uses, by size; the sizes asked for last stay longest."""

    def __init__(self) -> None:
        # The collector may give back a block in any thread, one that holds the lock too.
        self.returned: deque[Block] = deque()
        self._free: OrderedDict[int, list[Block]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of all blocks that nobody uses."""
        with self._lock:
            self._take_back()
            return self._held

    def block(self, nbytes: int) -> Block:
        """A block that is large enough, with anything in it."""
        size = nbytes + -nbytes % STEP_BYTES
        with self._lock:
            self._take_back()
            found = self._free.setdefault(size, [])
            self._free.move_to_end(size)
            if found:
                self._held -= size
                return found.pop()  # the one used last: it may still be in the processor's caches
            return np.empty(size, np.uint8)

    def _take_back(self) -> None:
        while self.returned:
            block = self.returned.popleft()
            self._free.setdefault(len(block), []).append(block)
            self._held += len(block)
        while self._held > MOST_FREE:
            size, blocks = next(iter(self._free.items()))
            if blocks:
                blocks.pop(0)
                self._held -= size
            else:
                del self._free[size]


_POOL = _Pool()


class Lease:
    """Room for some arrays, which is free again when the last view of any of them is gone.

    Args:
        nbytes: of all arrays together; more are given memory of their own.
    """

    def __init__(self, nbytes: int) -> None:
        self._block: Block | None = None
        self._at = 0
        if nbytes < STEP_BYTES:  # what the C library keeps for itself
            return
        block = _POOL.block(nbytes)
        # Views of an array refer to the array that owns the memory, not to one another; of this
        # one, which owns none, they refer to itself.
        self._block = np.frombuffer(block.data, np.uint8)
        weakref.finalize(self._block, _POOL.returned.append, block).atexit = False

    def empty(self, shape: tuple[int, ...], kind: Any) -> npt.NDArray[Any]:
        """An array with anything in it."""
        size = math.prod(shape) * np.dtype(kind).itemsize
        start, stop = self._at, self._at + size
        if self._block is None or stop > len(self._block) or not size:
            return np.empty(shape, kind)
        self._at = stop + -stop % _ALIGNMENT
        found: npt.NDArray[Any] = self._block[start:stop].view(kind).reshape(shape)
        return found

    def copy(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A copy of an array."""
        found = self.empty(values.shape, values.dtype)
        found[...] = values
        return found

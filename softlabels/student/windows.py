"""Windows of an epoch's order, read: consecutive rows that are shuffled among each other.

Runs in a stream's reading thread; a window is decoded, gathered and joined here.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from softlabels.student.held import Held
from softlabels.student.members import HeldMembers, Members
from softlabels.student.order import EpochOrder, Int64s, Order, owned_positions
from softlabels.student.readahead import ReadAhead
from softlabels.student.reader import Reader
from softlabels.student.rows import Rows
from softlabels.targets import Floats

PIECE_BYTES = 8 << 20
"""A window is copied in parts of this size: larger ones are new memory each time, and out of the
processor's caches when they are used."""


@dataclass(frozen=True)
class Window:
    """Consecutive positions [start, stop) of an epoch, with the rows of one rank.

    `weights` are of all positions; `owned` are the rank's positions, `rows` what is there.
    """

    epoch: int
    start: int
    stop: int
    weights: Floats
    owned: Int64s
    rows: Rows

    def cut(self, start: int, stop: int) -> tuple[Rows, Floats, float]:
        """Of the positions [start, stop): the rank's rows, their weights, the weight of all."""
        first, last = (int(i) for i in np.searchsorted(self.owned, (start, stop)))
        weights = self.weights[self.owned[first:last] - self.start]
        everyone = self.weights[start - self.start : stop - self.start]
        return self.rows.slice(first, last), weights, float(everyone.sum(dtype=np.float64))


class Windows:
    """The windows of a plan's order, each with the rows of one rank.

    Args:
        order: of every epoch.
        weights: float32, the loss weight of each entry.
        reader: of the plan's entries.
        members: of the further teachers; None: there are none.
        rank: which rank this is.
        world_size: ranks.
        epochs: how many; None: without end.
    """

    def __init__(
        self,
        order: Order,
        weights: Floats,
        reader: Reader,
        members: Members | None,
        rank: int,
        world_size: int,
        epochs: int | None,
    ) -> None:
        self._order, self._weights = order, weights
        self._reader, self._members = reader, members
        self._rank, self._world_size = rank, world_size
        self._epochs = epochs

    def read(
        self, epoch: int, position: int, batch_size: int, closed: threading.Event
    ) -> Iterator[Window]:
        """Windows from a position on, in parts of about PIECE_BYTES, until `closed`.

        Parts end where batches do: only a batch of two windows has to be joined. While a window is
        handed out in parts, a thread loads the row groups of the next.
        """
        ahead = ReadAhead(lambda stop: self._loaded(epoch, position, stop), 1, "softlabels-window")
        try:
            while not closed.is_set():
                try:
                    loaded = next(ahead)
                except StopIteration:
                    return
                yield from self._pieces(loaded, batch_size)
                del loaded  # or its row groups would be held until those of the next come
        finally:
            ahead.close()

    def _loaded(self, epoch: int, position: int, closed: threading.Event) -> Iterator["_Loaded"]:
        while self._epochs is None or epoch < self._epochs:
            order = self._order.epoch(epoch)
            for number in range(order.window_at(position), order.num_windows):
                loaded = self._load(order, epoch, number, position, closed)
                if loaded is None:
                    return
                yield loaded
                del loaded
            epoch, position = epoch + 1, 0

    def _load(
        self, order: EpochOrder, epoch: int, number: int, position: int, closed: threading.Event
    ) -> "_Loaded | None":
        first = int(order.starts[number])
        start = max(first, position)
        entries, rows = (values[start - first :] for values in order.window(number))
        mine = owned_positions(start, start + len(entries), self._rank, self._world_size) - start
        # A rank without a row here still needs arrays of the right width and type.
        mine = mine if len(mine) else np.zeros(1, np.int64)
        held = self._reader.hold(entries[mine], closed)
        if held is None:
            return None
        others = None
        if self._members is not None:
            others = self._members.hold(entries[mine], closed)
            if others is None:
                return None
        return _Loaded(epoch, start, position, entries, rows, mine[:1], held, others)

    def _pieces(self, loaded: "_Loaded", batch_size: int) -> Iterator[Window]:
        entries, rows, start = loaded.entries, loaded.rows, loaded.start
        most = max(1, int(PIECE_BYTES / max(1.0, loaded.held.row_bytes))) * self._world_size
        step = max(1, most // batch_size) * batch_size
        first = -(start - loaded.begun) % batch_size  # rows that end the batch of the last window
        edges = sorted({0, *range(min(first, len(entries)), len(entries), step), len(entries)})
        for low, high in pairwise(edges):
            owned = owned_positions(start + low, start + high, self._rank, self._world_size)
            chosen = owned - start if len(owned) else loaded.any_row
            found = loaded.held.gather(entries[chosen], rows[chosen])
            found = found if len(owned) else found.slice(0, 0)
            if loaded.others is not None:
                places = chosen[: len(owned)]
                found = loaded.others.join(found, entries[places], rows[places])
            weights = self._weights[entries[low:high]]
            yield Window(loaded.epoch, start + low, start + high, weights, owned, found)
            del found


@dataclass(frozen=True)
class _Loaded:
    """A window from `start` on, its rows' row groups at hand.

    `begun` is where the epoch's first batch begins, `any_row` the place of one of the rows.
    """

    epoch: int
    start: int
    begun: int
    entries: Int64s
    rows: Int64s
    any_row: Int64s
    held: Held
    others: HeldMembers | None

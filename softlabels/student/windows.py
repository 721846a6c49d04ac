"""Windows of an epoch's order, read: consecutive rows that are shuffled among each other.

Runs in a stream's reading thread; a window is decoded, gathered and joined here.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from softlabels.student.members import Members
from softlabels.student.order import EpochOrder, Int64s, Order, owned_positions
from softlabels.student.reader import Reader
from softlabels.student.rows import Rows
from softlabels.targets import Floats


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

    def read(self, epoch: int, position: int, closed: threading.Event) -> Iterator[Window]:
        """Windows from a position on, until `closed`."""
        while self._epochs is None or epoch < self._epochs:
            order = self._order.epoch(epoch)
            for number in range(order.window_at(position), order.num_windows):
                window = self._window(order, epoch, number, position, closed)
                if window is None:
                    return
                yield window
            epoch, position = epoch + 1, 0

    def _window(
        self, order: EpochOrder, epoch: int, number: int, position: int, closed: threading.Event
    ) -> Window | None:
        first, stop = int(order.starts[number]), int(order.starts[number + 1])
        start = max(first, position)
        entries, rows = (values[start - first :] for values in order.window(number))
        owned = owned_positions(start, stop, self._rank, self._world_size)
        # A rank without a row here still needs arrays of the right width and type.
        chosen = owned - start if len(owned) else np.zeros(1, np.int64)
        mine = self._reader.gather(entries[chosen], rows[chosen], closed)
        if mine is None:
            return None
        if not len(owned):
            mine = mine.slice(0, 0)
        if self._members is not None:
            places = chosen[: len(owned)]
            mine = self._members.join(mine, entries[places], rows[places], closed)
            if mine is None:
                return None
        return Window(epoch, start, stop, self._weights[entries], owned, mine)

"""An epoch's order, read: blocks of each source decoded, gathered and put in their places.

Runs in a stream's reading thread; segments are decoded, gathered and joined here.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from softlabels.student.gather import Parts
from softlabels.student.held import Held
from softlabels.student.members import HeldMembers, Members
from softlabels.student.order import (
    STREAMS,
    Block,
    EpochOrder,
    Int64s,
    Order,
    Place,
    Segment,
)
from softlabels.student.readahead import ReadAhead
from softlabels.student.reader import Reader
from softlabels.student.rows import Rows
from softlabels.targets import Floats

PIECE_BYTES = 8 << 20
"""A segment is copied in parts of this size: larger ones are new memory each time, and out of the
processor's caches when they are used."""


@dataclass(frozen=True)
class Window:
    """Consecutive positions [start, stop) of an epoch, with the rows of one reader.

    `weights` are of all positions; `owned` are the reader's positions, `rows` what is there.
    """

    epoch: int
    start: int
    stop: int
    weights: Floats
    owned: Int64s
    rows: Rows

    def cut(self, start: int, stop: int) -> tuple[Rows, Floats, float]:
        """Of the positions [start, stop): the reader's rows, their weights, the weight of all."""
        first, last = (int(i) for i in np.searchsorted(self.owned, (start, stop)))
        weights = self.weights[self.owned[first:last] - self.start]
        everyone = self.weights[start - self.start : stop - self.start]
        return self.rows.slice(first, last), weights, float(everyone.sum(dtype=np.float64))


@dataclass(frozen=True)
class Share:
    """What one reader reads: a rank's rows of every `workers`-th global batch of `batch_size`."""

    batch_size: int
    rank: int = 0
    world_size: int = 1
    workers: int = 1

    def of(self, positions: Int64s, leg: "Leg") -> npt.NDArray[np.bool_]:
        """Which of some positions."""
        mine = positions % STREAMS % self.world_size == self.rank
        if self.workers == 1:
            return np.asarray(mine)
        batches = leg.batches + (positions - leg.begun) // self.batch_size
        return np.asarray(mine & (batches % self.workers == 0))


@dataclass(frozen=True)
class Leg:
    """An epoch as one iteration reads it: from `begun` on, after `batches` of epochs before it."""

    epoch: int
    begun: int
    batches: int


class Windows:
    """A plan's order, with the rows of one reader.

    Args:
        order: of every epoch.
        weights: float32, the loss weight of each entry.
        reader: of the plan's entries.
        members: of the further teachers; None: there are none.
        share: what is read.
        epochs: how many; None: without end.
    """

    def __init__(
        self,
        order: Order,
        weights: Floats,
        reader: Reader,
        members: Members | None,
        share: Share,
        epochs: int | None,
    ) -> None:
        self._order, self._weights = order, weights
        self._reader, self._members = reader, members
        self._share, self._epochs = share, epochs

    def read(self, epoch: int, position: int, closed: threading.Event) -> Iterator[Window]:
        """Windows from a position on, of about PIECE_BYTES, until `closed`.

        They end where batches or segments do: only a batch of two segments has to be joined. While
        a segment is handed out, a thread loads those that follow, as many as there are sources:
        with each a block begins.
        """
        ahead = ReadAhead(
            lambda stop: self._loaded(epoch, position, stop),
            self._order.most_sources,
            "softlabels-window",
        )
        try:
            while not closed.is_set():
                try:
                    loaded = next(ahead)
                except StopIteration:
                    return
                yield from self._pieces(loaded)
                del loaded  # or its row groups would be held until those of the next come
        finally:
            ahead.close()

    def _loaded(self, epoch: int, position: int, closed: threading.Event) -> Iterator["_Loaded"]:
        batches = 0
        while self._epochs is None or epoch < self._epochs:
            order, leg = self._order.epoch(epoch), Leg(epoch, position, batches)
            blocks: dict[Place, _LoadedBlock] = {}
            for segment in order.segments(position):
                # First what ended goes, then what begins is loaded: of each source one is held.
                blocks = {place: blocks[place] for place in segment.blocks if place in blocks}
                for place in segment.blocks:
                    if place not in blocks:
                        block = self._load(order, place, segment, leg, closed)
                        if block is None:
                            return
                        blocks[place] = block
                yield _Loaded(leg, segment, tuple(blocks.values()))
            batches += -(-(order.rows - position) // self._share.batch_size)
            epoch, position = epoch + 1, 0

    def _load(
        self, order: EpochOrder, place: Place, segment: Segment, leg: Leg, closed: threading.Event
    ) -> "_LoadedBlock | None":
        block = order.block(place)
        after = int(np.searchsorted(block.positions, segment.start))
        block = Block(block.positions[after:], block.entries[after:], block.rows[after:])
        mine = self._share.of(block.positions, leg)
        # A reader without a row here still needs arrays of the right width and type.
        needed = block.entries[mine] if mine.any() else block.entries[:1]
        held = self._reader.hold(needed, closed)
        if held is None:
            return None
        others = None
        if self._members is not None:
            others = self._members.hold(needed, closed)
            if others is None:
                return None
        some = np.array([int(np.argmax(mine))])
        return _LoadedBlock(block, mine, some, held, others)

    def _pieces(self, loaded: "_Loaded") -> Iterator[Window]:
        start, stop = loaded.segment.start, loaded.segment.stop
        size, share = self._share.batch_size, self._share
        row_bytes = max(block.held.row_bytes for block in loaded.blocks)
        most = max(1, int(PIECE_BYTES / max(1.0, row_bytes))) * share.world_size * share.workers
        step = max(1, most // size) * size
        first = start + -(start - loaded.leg.begun) % size  # ends the batch of the last segment
        for low, high in pairwise(sorted({start, *range(min(first, stop), stop, step), stop})):
            yield self._piece(loaded, low, high)

    def _piece(self, loaded: "_Loaded", start: int, stop: int) -> Window:
        weights = np.empty(stop - start, np.float32)
        parts, owned = [], []
        for block in loaded.blocks:
            first, last = np.searchsorted(block.positions, (start, stop))
            weights[block.positions[first:last] - start] = self._weights[block.entries[first:last]]
            mine = first + np.flatnonzero(block.mine[first:last])
            if len(mine):
                parts.append(block.gather(mine))
                owned.append(block.positions[mine])
        if not parts:
            none = loaded.blocks[0].gather(loaded.blocks[0].some).slice(0, 0)
            return Window(loaded.leg.epoch, start, stop, weights, np.zeros(0, np.int64), none)
        positions = np.concatenate(owned)
        if len(parts) == 1:
            return Window(loaded.leg.epoch, start, stop, weights, positions, parts[0])
        order = np.argsort(positions)
        rows = _merged(parts, order)
        return Window(loaded.leg.epoch, start, stop, weights, positions[order], rows)


@dataclass(frozen=True)
class _LoadedBlock:
    """A block from where it is read on, its rows' row groups at hand.

    `mine` says which of its rows are the reader's, `some` is the place of one at hand.
    """

    block: Block
    mine: npt.NDArray[np.bool_]
    some: Int64s
    held: Held
    others: HeldMembers | None

    @property
    def positions(self) -> Int64s:
        """Of the block's rows."""
        return self.block.positions

    @property
    def entries(self) -> Int64s:
        """Of the block's rows."""
        return self.block.entries

    def gather(self, index: Int64s) -> Rows:
        """Those rows of the block."""
        entries, rows = self.block.entries[index], self.block.rows[index]
        found = self.held.gather(entries, rows)
        return found if self.others is None else self.others.join(found, entries, rows)


@dataclass(frozen=True)
class _Loaded:
    """A segment with its blocks."""

    leg: Leg
    segment: Segment
    blocks: tuple[_LoadedBlock, ...]


def _merged(parts: Sequence[Rows], order: Int64s) -> Rows:
    """The rows `order` of all parts, one part after the other, in memory of their own."""
    short = all(len(part) == len(part.targets.ids) for part in parts)
    if short or parts[0].others:
        return Rows.concat(parts).take(order)
    # Long rows: one copy less.
    lengths = [len(part) for part in parts]
    which = np.repeat(np.arange(len(parts)), lengths)
    index = np.concatenate([np.arange(length) for length in lengths])
    return Parts(parts).gather(which[order], index[order])

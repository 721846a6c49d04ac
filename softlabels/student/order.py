"""The order of an epoch: a pure function of plan, seed and epoch, never of who reads it.

Entries, repeats expanded, are permuted within their stage and cut into windows of about
`shuffle_rows` rows; the rows of a window are permuted. So a reader needs one window in memory,
and finds any position of any epoch from the entries' sizes alone.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabels.errors import BadInputError

STREAMS = 64
"""Canonical streams: position p belongs to stream p mod 64, and ranks own whole streams."""

VERSION = 1
"""Of the order. Another version reads another order from the same plan and seed."""

Int64s = npt.NDArray[np.int64]


def permutation(n: int, **key: object) -> Int64s:
    """A permutation of 0 … n - 1 that depends on `key` alone, int64 [n].

    The same on every machine and with every numpy: raw bits of a bit generator are promised never
    to change, what `Generator` makes of them is not.
    """
    text = "\n".join(f"{name}={value}" for name, value in sorted(key.items()))
    words = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u8").astype(np.uint64)
    draws: Any = np.random.Philox(key=words).random_raw(n)
    return np.argsort(draws, kind="stable").astype(np.int64)


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """Where each position of one epoch is.

    An item is one reading of an entry: an entry with repeats is several items.

    Attributes:
        items: int64 [M], the entry of each item, in reading order.
        sizes: int64 [M], rows of each item.
        first_items: int64 [W + 1], items before each window.
        starts: int64 [W + 1], positions before each window; the last is the epoch's rows.
        key: what permutes the rows of a window; None leaves them in order.
    """

    items: Int64s
    sizes: Int64s
    first_items: Int64s
    starts: Int64s
    key: dict[str, object] | None

    @property
    def num_windows(self) -> int:
        """W."""
        return len(self.starts) - 1

    def window_at(self, position: int) -> int:
        """The number of the window that holds a position."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def window(self, number: int) -> tuple[Int64s, Int64s]:
        """The entry, and the row among those it takes, at each position of a window.

        Returns:
            two int64 [n] arrays, n the window's rows.
        """
        items = slice(int(self.first_items[number]), int(self.first_items[number + 1]))
        sizes = self.sizes[items]
        total = int(sizes.sum())
        entries = np.repeat(self.items[items], sizes)
        rows = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        if self.key is None:
            return entries, rows
        order = permutation(total, window=number, **self.key)
        return entries[order], rows[order]


@dataclass(frozen=True, eq=False)
class Order:
    """The order of every epoch of a plan.

    Attributes:
        fingerprint: of the plan.
        stages: int [E], of each entry; a lower stage is read first.
        num_rows: int [E], rows of each entry, read once.
        repeats: int [E], times an epoch.
        seed: of the permutations.
        shuffle: False: entries in plan order within a stage, repeats one after the other.
        shuffle_rows: a window ends with the item that brings it to this many rows.
    """

    fingerprint: str
    stages: npt.NDArray[Any]
    num_rows: npt.NDArray[Any]
    repeats: npt.NDArray[Any]
    seed: int
    shuffle: bool
    shuffle_rows: int

    @property
    def rows_per_epoch(self) -> int:
        """Rows an epoch, repeats counted."""
        return int((self.num_rows.astype(np.int64) * self.repeats).sum())

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of one epoch."""
        key: dict[str, object] = {
            "order": VERSION,
            "plan": self.fingerprint,
            "seed": self.seed,
            "epoch": epoch,
        }
        items, stage_ends = self._items(key)
        sizes = self.num_rows.astype(np.int64)[items]
        first_items = _cut_windows(sizes, stage_ends, self.shuffle_rows)
        starts = np.concatenate([[0], np.cumsum(sizes)])[first_items]
        return EpochOrder(items, sizes, first_items, starts, key if self.shuffle else None)

    def _items(self, key: dict[str, object]) -> tuple[Int64s, list[int]]:
        # An entry without rows is no item, so that every window holds a row.
        repeats = np.where(self.num_rows > 0, self.repeats, 0)
        parts, ends = [np.zeros(0, np.int64)], [0]
        for stage in np.unique(self.stages):
            entries = np.flatnonzero(self.stages == stage)
            items = np.repeat(entries, repeats[entries])
            if self.shuffle:
                items = items[permutation(len(items), stage=int(stage), **key)]
            parts.append(items)
            ends.append(ends[-1] + len(items))
        return np.concatenate(parts), ends[1:]


def _cut_windows(sizes: Int64s, stage_ends: list[int], shuffle_rows: int) -> Int64s:
    ends = np.cumsum(sizes)
    firsts = [0]
    for stage_end in stage_ends:
        while firsts[-1] < stage_end:
            before = int(ends[firsts[-1] - 1]) if firsts[-1] else 0
            full = int(np.searchsorted(ends, before + shuffle_rows)) + 1
            firsts.append(min(full, stage_end))
    return np.array(firsts, np.int64)


def owned_positions(start: int, stop: int, rank: int, world_size: int) -> Int64s:
    """The positions in [start, stop) that a rank reads, int64, rising.

    Stream s = p mod 64 belongs to rank s mod `world_size`: whatever the number of ranks, together
    they read the same positions, and each position is read once.
    """
    positions = np.arange(start, stop)
    mine: Int64s = positions[positions % STREAMS % world_size == rank]
    return mine


def check_ranks(rank: int, world_size: int) -> None:
    """Raises BadInputError unless 0 <= rank < world_size <= 64."""
    if not 1 <= world_size <= STREAMS:
        raise BadInputError(
            f"world_size: expected 1 to {STREAMS} ranks, found {world_size!r}; a plan has "
            f"{STREAMS} canonical streams"
        )
    if not 0 <= rank < world_size:
        raise BadInputError(f"rank: expected 0 to {world_size - 1}, found {rank!r}")

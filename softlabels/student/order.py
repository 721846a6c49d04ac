"""The order of an epoch: a pure function of plan, seed and epoch, never of who reads it.

Stages come one after the other. Within a stage each source has its items (readings of entries,
repeats expanded) permuted and cut into blocks, whose rows are permuted; sources take turns as
`interleave` says, so that any prefix of a stage holds each within one row of its share. A block
ends with the item that brings it to the source's share of `shuffle_rows`: a reader needs one block
of each source in memory, and decodes no item twice. The first blocks are shorter, so that those of
different sources end in turn. Any position of any epoch is found from the entries' sizes alone.

How far from a shuffle of all rows that is, `pipelines.streaming.shuffle` measures.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabels.errors import BadInputError
from softlabels.fingerprint import sha256_json
from softlabels.student.interleave import Interleave, interleave

STREAMS = 64
"""Canonical streams: position p belongs to stream p mod 64, and ranks own whole streams."""

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


@dataclass(frozen=True)
class Place:
    """Which block: stage and source, as numbers from 0, and its own among the source's."""

    stage: int
    source: int
    number: int


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one source that are shuffled among each other; n of them.

    Attributes:
        positions: int64 [n], rising: where they are in the epoch.
        entries: int64 [n].
        rows: int64 [n], which of those that the entry takes.
    """

    positions: Int64s
    entries: Int64s
    rows: Int64s


@dataclass(frozen=True)
class Segment:
    """The positions [start, stop) of an epoch, all of which are in `blocks`, one of each source."""

    start: int
    stop: int
    blocks: tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class Items:
    """The items of one source of a stage in reading order, cut into B blocks.

    Attributes:
        items: int64 [M], the entry of each item.
        sizes: int64 [M], rows of each item.
        first_items: int64 [B + 1], items before each block.
        starts: int64 [B + 1], rows before each block; the last is the source's rows.
        first_block: blocks of the epoch before its own.
    """

    items: Int64s
    sizes: Int64s
    first_items: Int64s
    starts: Int64s
    first_block: int

    @property
    def num_blocks(self) -> int:
        """B."""
        return len(self.starts) - 1


@dataclass(frozen=True, eq=False)
class Stage:
    """Positions from `start` on, and the sources that share them."""

    start: int
    sources: tuple[Items, ...]
    turns: Interleave


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """Where each position of one epoch is.

    Attributes:
        stages: those with rows.
        rows: of the epoch.
        key: what permutes the rows of a block; None leaves them in order.
    """

    stages: tuple[Stage, ...]
    rows: int
    key: dict[str, object] | None

    def segment(self, position: int) -> Segment:
        """The positions from `position` to where the first block of those there ends."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        stage = self.stages[number]
        counts = stage.turns.counts(position - stage.start)
        places, stop = [], self.rows
        for source, (own, count) in enumerate(zip(stage.sources, counts, strict=True)):
            if count == own.starts[-1]:
                continue
            block = int(np.searchsorted(own.starts, count, side="right")) - 1
            places.append(Place(number, source, block))
            end = int(own.starts[block + 1])
            last = stage.start + int(stage.turns.positions(source, end - 1, end)[0])
            stop = min(stop, last + 1)
        return Segment(position, stop, tuple(places))

    def segments(self, position: int = 0) -> Iterator[Segment]:
        """All segments from a position on."""
        while position < self.rows:
            segment = self.segment(position)
            yield segment
            position = segment.stop

    def block(self, place: Place) -> Block:
        """The rows of a block."""
        stage = self.stages[place.stage]
        own = stage.sources[place.source]
        items = slice(*(int(n) for n in own.first_items[place.number : place.number + 2]))
        start, stop = (int(n) for n in own.starts[place.number : place.number + 2])
        sizes = own.sizes[items]
        entries = np.repeat(own.items[items], sizes)
        rows = np.arange(stop - start) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        positions = stage.turns.positions(place.source, start, stop) + stage.start
        if self.key is None:
            return Block(positions, entries, rows)
        order = permutation(stop - start, window=own.first_block + place.number, **self.key)
        return Block(positions, entries[order], rows[order])

    def read(self, start: int, stop: int) -> tuple[Int64s, Int64s]:
        """The entry, and the row among those it takes, at each of the positions [start, stop)."""
        found = np.empty((2, stop - start), np.int64)
        done: set[Place] = set()
        for segment in self.segments(start):
            if segment.start >= stop:
                break
            for place in set(segment.blocks) - done:
                block = self.block(place)
                first, last = np.searchsorted(block.positions, (start, stop))
                at = block.positions[first:last] - start
                found[:, at] = block.entries[first:last], block.rows[first:last]
            done.update(segment.blocks)
        return found[0], found[1]

    @cached_property
    def _starts(self) -> Int64s:
        return np.array([stage.start for stage in self.stages], np.int64)


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
        shuffle_rows: of a stage, that are shuffled among each other at a time.
        sources: int [E], rising within a stage, of each entry; None: a stage is one source.
    """

    fingerprint: str
    stages: npt.NDArray[Any]
    num_rows: npt.NDArray[Any]
    repeats: npt.NDArray[Any]
    seed: int
    shuffle: bool
    shuffle_rows: int
    sources: npt.NDArray[Any] | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Rows an epoch, repeats counted."""
        return int(self._reads.sum())

    @property
    def most_sources(self) -> int:
        """Sources that take turns in a stage, where they are most."""
        return max(map(len, self._sources), default=0)

    @property
    def identity(self) -> dict[str, int | str]:
        """What another order must have in common with this one to be the same; under 300 bytes.

        Order 1 knew no sources: where each stage has one, it is this order still.
        """
        several = self.most_sources > 1
        found: dict[str, int | str] = {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "shuffle_rows": self.shuffle_rows,
            "version": 2 if several else 1,
        }
        if several:
            shares = [[int(self._reads[entries].sum()) for entries in own] for own in self._sources]
            found["sources"] = sha256_json(shares)[:16]
        return found

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of one epoch."""
        key: dict[str, object] = {
            "order": self.identity["version"],
            "plan": self.fingerprint,
            "seed": self.seed,
            "epoch": epoch,
        }
        found: list[Stage] = []
        start = blocks = 0
        for own, turns in zip(self._sources, self._turns, strict=True):
            rows = [int(self._reads[entries].sum()) for entries in own]
            sequences = []
            for number, entries in enumerate(own):
                items = self._items(entries, number, key)
                limit = -(-self.shuffle_rows * rows[number] // sum(rows))
                first = -(-limit * (number + 1) // len(own))
                sequences.append(_cut(items, self._sizes[items], first, limit, blocks))
                blocks += sequences[-1].num_blocks
            found.append(Stage(start, tuple(sequences), turns))
            start += sum(rows)
        return EpochOrder(tuple(found), start, key if self.shuffle else None)

    def _items(self, entries: Int64s, source: int, key: Mapping[str, object]) -> Int64s:
        items: Int64s = np.repeat(entries, self.repeats[entries])
        if not self.shuffle:
            return items
        more = {"source": source} if source else {}
        stage = int(self.stages[entries[0]])
        return np.asarray(items[permutation(len(items), stage=stage, **more, **key)])

    @cached_property
    def _sizes(self) -> Int64s:
        return self.num_rows.astype(np.int64)

    @cached_property
    def _reads(self) -> Int64s:
        return np.asarray(self._sizes * self.repeats)

    @cached_property
    def _sources(self) -> list[list[Int64s]]:
        """Of each stage, of each of its sources, the entries; those without rows are of none."""
        used = np.flatnonzero(self._reads > 0)
        mixed = self.shuffle and self.sources is not None
        sources = np.asarray(self.sources)[used] if mixed else np.zeros(len(used), np.int64)
        stages = self.stages[used]
        return [
            [used[here & (sources == source)] for source in np.unique(sources[here])]
            for here in (stages == stage for stage in np.unique(stages))
        ]

    @cached_property
    def _turns(self) -> list[Interleave]:
        return [interleave([int(self._reads[e].sum()) for e in own]) for own in self._sources]


def _cut(items: Int64s, sizes: Int64s, first: int, limit: int, first_block: int) -> Items:
    """Blocks that end with the item that brings them to `limit` rows, the first one to `first`."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    full = np.minimum(np.searchsorted(ends, ends[:-1] + limit), len(items))
    full[0] = min(int(np.searchsorted(ends, first)), len(items))
    firsts = [0]
    while firsts[-1] < len(items):
        firsts.append(int(full[firsts[-1]]))
    first_items = np.array(firsts, np.int64)
    return Items(items, sizes, first_items, ends[first_items], first_block)


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

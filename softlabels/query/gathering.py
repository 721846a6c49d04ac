"""The rows of an ensemble in chunks that fit into memory: each teacher's targets, side by side.

Chunks follow the first table's row groups. Rows of the others may lie anywhere: their row groups
are decoded when they are needed, and the last ones are kept within a bound.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from softlabels.errors import IntegrityError
from softlabels.query.ensemble import Aligned
from softlabels.query.mixture import Doubles, Known, at_temperature
from softlabels.query.selection import Numbers, row_groups
from softlabels.schema import ROW_GROUP_POSITIONS, temper_columns
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.targets import Ints, SoftTargets, position_name, to_numpy

CHUNK_VALUES = 2_000_000
"""Stored ids of all teachers that a chunk holds, more or less: about 200 MB while it is mixed."""

CACHE_BYTES = 512 << 20
"""Decoded row groups that are kept, of all tables together."""

_OPEN_FILES = 4

_TARGETS = ("num_positions", "topk_ids", "topk_logprobs", "tail_logprob")
_LABELS = ("label_ids", "label_logprobs")
_KEPT = ("view", "view_params", "input_ids", "position_index", "segment_ids")
"""Columns of the first table that its rows keep, besides the ids and the carried ones."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of an ensemble; B rows, N positions, T teachers.

    Attributes:
        rows: the first table's columns, B rows.
        num_positions: int32 [B].
        teachers: what each of T says of the N positions.
        weights: float64 [T, N]; the sum over T is 1.
        labels: int32 [N], the first table's hard labels; None: none.
    """

    rows: pa.RecordBatch
    num_positions: Ints
    teachers: Sequence[Known]
    weights: Doubles
    labels: Ints | None

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    @property
    def names(self) -> list[str]:
        """The example ids, B of them."""
        return [str(name) for name in self.rows["example_id"].to_pylist()]

    def place(self, position: int) -> str:
        """How a message calls one of the N positions."""
        return position_name(self.names, self.num_positions, position)


class Chunks:
    """Reads an ensemble's rows.

    Args:
        tables: of the teachers, by name, the first one first.
        aligned: which of their rows.
        temperatures: at which each teacher's targets are taken, by name.
    """

    def __init__(
        self, tables: Mapping[str, Table], aligned: Aligned, temperatures: Mapping[str, float]
    ) -> None:
        self._tables = tables
        self._aligned = aligned
        self._temperatures = temperatures
        self._width = sum(max(1, table.contents.k) for table in tables.values())
        self._readers: dict[bool, dict[str, TableRows]] = {}

    def range(self, start: int, stop: int, targets_only: bool = False) -> Iterator[Chunk]:
        """The rows [start, stop) of the ensemble, a chunk at a time.

        Args:
            start, stop: places among the aligned rows.
            targets_only: only ids, heads and tails.

        Raises:
            IntegrityError: a file is not as its table's log says, or a tail is unknown.
        """
        readers = self._readers_of(targets_only)
        first, *others = readers
        place = start
        for rows in _joined(self._pieces(readers[first], start, stop)):
            batches = {first: rows}
            for name in others:
                numbers = self._aligned.rows[name][place : place + rows.num_rows]
                batches[name] = readers[name].take(numbers)
            yield self._chunk(batches, place)
            place += rows.num_rows

    def _readers_of(self, targets_only: bool) -> dict[str, "TableRows"]:
        """By table; kept from range to range, with the row groups that they hold."""
        if targets_only not in self._readers:
            bound = CACHE_BYTES // len(self._tables)
            made = {
                name: TableRows(table, self._columns(name, targets_only), bound)
                for name, table in self._tables.items()
            }
            self._readers = {targets_only: made}  # those of the other kind are done with
        return self._readers[targets_only]

    def _pieces(
        self, reader: "TableRows", start: int, stop: int
    ) -> Iterator[tuple[pa.RecordBatch, bool]]:
        """The first table's rows, a row group at a time, and whether a chunk ends there."""
        rows = self._aligned.first[start:stop]
        groups = reader.group_of(rows)
        edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(rows)]
        held = 0
        for begin, end in itertools.pairwise(edges):
            step = end - begin
            while begin < end:
                piece = reader.take(rows[begin : min(begin + step, end)])
                values = self._width * int(to_numpy(piece["num_positions"], np.int32).sum())
                if values > 2 * CHUNK_VALUES and step > 1:
                    step = max(1, step * CHUNK_VALUES // values)  # of a large row group, a part
                    continue
                held += values
                yield piece, held >= CHUNK_VALUES
                held = 0 if held >= CHUNK_VALUES else held
                begin += step

    def _columns(self, name: str, targets_only: bool) -> list[str]:
        table, temperature = self._tables[name], self._temperatures[name]
        wanted = list(_TARGETS)
        wanted += [] if temperature == 1 else temper_columns(temperature)
        wanted += [] if targets_only else _LABELS
        if name == next(iter(self._tables)):
            wanted += ["example_id"]
            wanted += [] if targets_only else [*_KEPT, *table.contents.carried]
        return wanted

    def _chunk(self, batches: Mapping[str, pa.RecordBatch], place: int) -> Chunk:
        teachers, labels = [], None
        for number, (name, batch) in enumerate(batches.items()):
            targets = self._targets(name, batch)
            teachers.append(at_temperature(targets, self._temperatures[name]))
            if number == 0:
                counts, labels = targets.num_positions, targets.label_ids
        count = next(iter(batches.values())).num_rows
        weights = self._aligned.weights[:, place : place + count].astype(np.float64)
        weights /= weights.sum(0)  # float32 has rounded them
        return Chunk(
            rows=next(iter(batches.values())),
            num_positions=counts,
            teachers=teachers,
            weights=np.repeat(weights, counts, axis=1),
            labels=labels,
        )

    def _targets(self, name: str, batch: pa.RecordBatch) -> SoftTargets:
        table, temperature = self._tables[name], self._temperatures[name]
        extra = () if temperature == 1 else (temperature,)
        columns = {column: batch[column] for column in batch.schema.names}
        try:
            targets = SoftTargets.from_columns(columns, table.contents.k, 0, extra)
        except IntegrityError as error:
            raise IntegrityError(f"table {table.root.uri!r}: {error}") from error
        if targets.tail is None or np.isnan(targets.tail).any():
            raise IntegrityError(f"table {table.root.uri!r} has rows whose tail is unknown")
        return targets


class UnitWriter:
    """The rows of a unit into one shard, with row groups of a size that reads well."""

    def __init__(
        self,
        schema: pa.Schema,
        profile: shards.Profile,
        sequences: bool,
        metadata: Mapping[str, str],
    ) -> None:
        self._schema, self._profile, self._sequences = schema, profile, sequences
        self._writer = shards.ShardWriter(schema, profile, metadata)

    def write(self, chunk: Chunk, mixture: SoftTargets) -> None:
        """Adds the rows of a chunk with their mixture, which is rounded to the profile."""
        stored = shards.round_to_profile(mixture, self._profile).columns(self._sequences)
        columns = {name: chunk.rows[name] for name in chunk.rows.schema.names} | stored
        rows = len(chunk)
        arrays = [
            columns[field.name] if field.name in columns else pa.nulls(rows, field.type)
            for field in self._schema
        ]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)
        ends = np.cumsum(chunk.num_positions)
        start = 0
        while start < rows:
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + ROW_GROUP_POSITIONS)) + 1
            self._writer.write(batch.slice(start, min(stop, rows) - start))
            start = stop

    def close(self) -> shards.Shard:
        """Ends the shard."""
        return self._writer.close()


class TableRows:
    """Rows of one table by number, in any order."""

    def __init__(self, table: Table, columns: Sequence[str], cache_bytes: int) -> None:
        self._table, self._columns = table, list(columns)
        self._groups = row_groups(table, table.files)
        self._cache: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._bound, self._held = cache_bytes, 0

    def group_of(self, rows: Numbers) -> Numbers:
        """The row group that holds each row."""
        return np.asarray(np.searchsorted(self._groups.starts, rows, side="right") - 1, np.int64)

    def take(self, rows: Numbers) -> pa.RecordBatch:
        """The rows of these numbers, in that order."""
        groups = self.group_of(rows)
        order = np.argsort(groups, kind="stable")
        within = (rows - self._groups.starts[groups])[order]
        edges = np.flatnonzero(np.diff(groups[order])) + 1
        parts = [
            self._group(int(groups[order[begin]])).take(pa.array(within[begin:end]))
            for begin, end in _ranges(edges, len(rows))
        ]
        found = pa.concat_batches(parts)
        if np.array_equal(order, np.arange(len(order))):
            return found
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return found.take(pa.array(back))

    def _group(self, number: int) -> pa.RecordBatch:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        path = self._groups.files[number].path
        batch = shards.read_row_groups(
            self._file(path), path, [self._groups.indexes[number]], self._columns
        )
        self._cache[number] = batch
        self._held += batch.nbytes
        while self._held > self._bound and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1].nbytes
        return batch

    def _file(self, path: str) -> pq.ParquetFile:
        if path not in self._files:
            self._files[path] = shards.open_shard(self._table.root.buffer(path), path)
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(path)
        return self._files[path]


def _joined(pieces: Iterator[tuple[pa.RecordBatch, bool]]) -> Iterator[pa.RecordBatch]:
    waiting: list[pa.RecordBatch] = []
    for piece, ends in pieces:
        waiting.append(piece)
        if ends:
            yield pa.concat_batches(waiting)
            waiting = []
    if waiting:
        yield pa.concat_batches(waiting)


def _ranges(edges: npt.NDArray[np.int64], stop: int) -> Iterator[tuple[int, int]]:
    places = [0, *edges.tolist(), stop]
    return itertools.pairwise(places)

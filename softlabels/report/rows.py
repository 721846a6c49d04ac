"""The rows that a report looks at: some row groups of a table version or of a plan's table.

N positions, k stored ids, m draws a position, V classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabels.arrays import nested
from softlabels.lineage import Contents
from softlabels.plan import Plan
from softlabels.report.opened import Group, Shards
from softlabels.rules import PositionRules
from softlabels.schema import FLOATS, temper_columns
from softlabels.store.table import Table
from softlabels.student.ruled import keep_positions
from softlabels.targets import SoftTargets, flat_lists

SAMPLE_POSITIONS = 50_000
SAMPLE_NUMBERS = 8_000_000
"""What is looked at: so many positions, or ids and draws, whichever is less. Standard errors are
then below a quarter of a per cent, and a laptop needs seconds."""

SAMPLE_FILES = 16
"""Files that are opened at most, evenly among all: from object storage each is read whole."""

BALANCE_ROWS = 2_000_000
"""Rows whose label and choice are counted: two plain columns, so many more are affordable."""

Item = TypeVar("Item")

_FIXED = (
    "example_id",
    "view",
    "num_positions",
    "topk_ids",
    "topk_logprobs",
    "tail_logprob",
    "sampled_ids",
    "position_entropy",
    "label_ids",
    "label_logprobs",
    "label_ranks",
    "input_ids",
    "position_index",
    "segment_ids",
)


@dataclass
class Part:
    """The rows of one table version that a report is about.

    Attributes:
        name: what the page calls them.
        shards: the version's files.
        contents: what the table version holds.
        groups: row groups, in order, of at most SAMPLE_FILES files.
        num_rows: rows that there are in all, also in files that were not opened.
        num_files: files in all.
        footers: of those that were opened.
        rules: of a plan, which positions of these rows are read; None: all.
        temperature: at which a plan takes the targets.
        further: whether a plan reads them as another teacher of other tables' rows alone.
    """

    name: str
    shards: Shards
    contents: Contents
    groups: Sequence[Group]
    num_rows: int
    num_files: int
    footers: Mapping[str, pq.FileMetaData]
    rules: PositionRules | None = None
    temperature: float = 1.0
    further: bool = False

    def read(self, groups: Sequence[Group], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows of each of `groups`, with those of `columns` that the table has."""
        for group in groups:
            yield self.shards.read(group, columns)


@dataclass
class Sample:
    """Whole row groups, spread evenly over a part.

    Attributes:
        part: of which they are.
        groups: their row groups.
        batches: their label columns, a batch each.
    """

    part: Part
    groups: Sequence[Group]
    batches: Sequence[pa.RecordBatch]

    @cached_property
    def targets(self) -> SoftTargets:
        """All their targets, with temperatures that are stored."""
        contents = self.part.contents
        return SoftTargets.concat(
            [
                SoftTargets.from_columns(
                    {name: batch[name] for name in batch.schema.names},
                    contents.k,
                    contents.draws,
                    contents.temperatures,
                )
                for batch in self.batches
            ]
        )

    @property
    def num_rows(self) -> int:
        """Rows in it."""
        return sum(batch.num_rows for batch in self.batches)

    @property
    def whole(self) -> bool:
        """Whether it is all there is."""
        return self.num_rows == self.part.num_rows

    @cached_property
    def names(self) -> list[str]:
        """The example id of each row."""
        return [name for batch in self.batches for name in batch["example_id"].to_pylist()]

    @cached_property
    def views(self) -> npt.NDArray[np.int32]:
        """The view of each row, int32 [B]."""
        return np.concatenate(
            [np.asarray(b["view"].to_numpy(zero_copy_only=False), np.int32) for b in self.batches]
        )

    @cached_property
    def row_of(self) -> npt.NDArray[np.int64]:
        """The row of each position, int64 [N]."""
        counts = self.targets.num_positions
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    @cached_property
    def ends_group(self) -> npt.NDArray[np.bool_]:
        """Whether a row is the last of its row group, bool [B]: its next one is not adjacent."""
        sizes = np.array([batch.num_rows for batch in self.batches])
        ends = np.zeros(int(sizes.sum()), bool)
        ends[np.cumsum(sizes)[sizes > 0] - 1] = True
        return ends

    @cached_property
    def labels(self) -> npt.NDArray[np.int32]:
        """The hard label of each position, int32 [N], -1 where none."""
        found = self.targets.label_ids
        return np.full(len(self.targets.ids), -1, np.int32) if found is None else found

    def place(self, row: int) -> tuple[Group, int]:
        """The row group of a row of the sample, and the row's number in what `read` gives."""
        ends = np.cumsum([batch.num_rows for batch in self.batches])
        at = int(np.searchsorted(ends, row, side="right"))
        return self.groups[at], row - int(ends[at]) + self.batches[at].num_rows

    def tokens(self, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None:
        """input_ids int32 [L] and position_index int32 [P] of a row; None where it has none."""
        ends = np.cumsum([batch.num_rows for batch in self.batches])
        at = int(np.searchsorted(ends, row, side="right"))
        batch = self.batches[at].slice(row - int(ends[at]) + self.batches[at].num_rows, 1)
        if "input_ids" not in batch.schema.names or batch["input_ids"].null_count:
            return None
        ids, _ = flat_lists("input_ids", batch["input_ids"], np.int32)
        index, _ = flat_lists("position_index", batch["position_index"], np.int32)
        return ids, index


def of_table(table: Table) -> Part:
    """All rows of a table version.

    Raises:
        IntegrityError: a file is not the one that the log names.
    """
    files = [file for file in table.files if file.num_rows]
    held = Shards(table.root, files, "the log")
    footers = _footers(held, [file.path for file in files])
    groups = [
        Group(path, number, int(footer.row_group(number).num_rows))
        for path, footer in footers.items()
        for number in range(footer.num_row_groups)
    ]
    name = f"{table.root.uri}@{table.version}"
    return Part(name, held, table.contents, groups, table.num_rows, len(files), footers)


def of_plan(plan: Plan, roots: Mapping[str, str]) -> list[Part]:
    """The rows that a plan takes of each of its tables, once each and whichever of a row's
    teachers the table is, in plan order.

    Raises:
        BadInputError: a table is not where the plan says; `roots` may say where it is.
        IntegrityError: a file is not the one that the plan names.
    """
    places: dict[str, dict[tuple[str, int], list[tuple[int, int]]]] = {n: {} for n in plan.tables}
    slots = [found for n in range(plan.num_members) if (found := plan.member(n)) is not None]
    for slot, entries in enumerate(slots):
        columns = [entries[name].to_pylist() for name in ("table", "file", "row_group", "num_rows")]
        for place, (name, file, number, count) in enumerate(zip(*columns, strict=True)):
            if count:
                places[name].setdefault((file, number), []).append((slot, place))
    parts = []
    for name, table in plan.tables.items():
        groups = [_group(slots, *key, found) for key, found in places[name].items()]
        held = Shards(plan.root(name, roots), table.files, "the plan")
        files = list(dict.fromkeys(group.path for group in groups))
        footers = _footers(held, files)
        part = Part(
            name,
            held,
            table.contents,
            [group for group in groups if group.path in footers],
            sum(group.num_rows for group in groups),
            len(files),
            footers,
            table.positions,
            table.temperature,
            bool(groups) and all(slot for found in places[name].values() for slot, _ in found),
        )
        parts.append(part)
    return parts


def sample(part: Part, positions: int | None = None) -> Sample:
    """Row groups of a part, evenly spread, of about `positions` positions; None: as many as are
    looked at by default.
    """
    contents = part.contents
    wanted = positions or max(
        2_000, min(SAMPLE_POSITIONS, SAMPLE_NUMBERS // max(1, contents.k + contents.draws))
    )
    columns = [*_FIXED, *(c for t in contents.temperatures for c in temper_columns(t))]
    groups: list[Group] = []
    batches: list[pa.RecordBatch] = []
    chosen = _chosen(part, wanted)
    for number, group in enumerate(chosen, 1):
        (batch,) = part.read([group], columns)
        # Each gives its share, so that the last ones have one too.
        room = wanted * number // len(chosen) - sum(map(_positions, batches))
        batch = _ruled(part, _shortened(batch, room))
        if batch.num_rows:
            groups.append(group)
            batches.append(batch)
    return Sample(part, groups, batches)


def scalars(part: Part, columns: Sequence[str]) -> tuple[list[pa.RecordBatch], int]:
    """`columns` of up to BALANCE_ROWS rows of a part, and how many rows that are."""
    found = list(part.read(_first_scattered(part.groups, BALANCE_ROWS), columns))
    return found, sum(batch.num_rows for batch in found)


def _chosen(part: Part, positions: int) -> list[Group]:
    """Row groups, spread and in order, that together hold about so many positions."""
    if not part.groups:
        return []
    # Rows of a language model have many: one row group tells how many, about.
    first = part.groups[0]
    (batch,) = part.read([first], ["num_positions"])
    each = max(1.0, _positions(batch) / max(1, batch.num_rows))
    return _first_scattered(part.groups, int(positions / each) + 1)


def _first_scattered(groups: Sequence[Group], rows: int) -> list[Group]:
    """Some of `groups`, spread and in order, of at least so many rows if there are."""
    taken: list[int] = []
    held = 0
    for number in _scattered(len(groups)):
        if held >= rows:
            break
        taken.append(number)
        held += groups[number].num_rows
    return [groups[number] for number in sorted(taken)]


def _group(
    slots: Sequence[pa.Table], path: str, number: int, places: Sequence[tuple[int, int]]
) -> Group:
    """The rows that some entries of a plan take of one row group, each once.

    Args:
        slots: `Plan.member` of each slot.
        path: of the file.
        number: of the row group.
        places: slot and entry.
    """
    lists = [slots[slot]["rows"][place] for slot, place in places]
    for (slot, place), rows in zip(places, lists, strict=True):
        if not rows.is_valid:
            return Group(path, number, int(slots[slot]["num_rows"][place].as_py()))
    every = np.unique(np.concatenate([np.asarray(r.values.to_numpy(), np.int32) for r in lists]))
    return Group(path, number, len(every), every)


def _footers(held: Shards, paths: Sequence[str]) -> dict[str, pq.FileMetaData]:
    return {path: held.open(path).metadata for path in _spread(paths, SAMPLE_FILES)}


def _ruled(part: Part, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows with the positions that the part's rules keep."""
    if part.rules is None or not batch.num_rows:
        return batch
    columns = {name: batch[name] for name in batch.schema.names}
    contents = part.contents
    targets = SoftTargets.from_columns(columns, contents.k, contents.draws, contents.temperatures)
    kept, columns = keep_positions(targets, columns, part.rules.keep(targets))
    for temperature, temper in kept.temper.items():
        for name, values in zip(
            temper_columns(temperature), (temper.shift, temper.tail), strict=True
        ):
            columns[name] = nested(values, kept.num_positions, FLOATS)
    return pa.RecordBatch.from_pydict(columns)


def _positions(batch: pa.RecordBatch) -> int:
    return int(pc.sum(batch["num_positions"]).as_py() or 0)


def _shortened(batch: pa.RecordBatch, positions: int) -> pa.RecordBatch:
    """The first rows of `batch`, those that `positions` more begin in; none where that is 0."""
    if positions <= 0:
        return batch.slice(0, 0)
    counts = batch["num_positions"].to_numpy(zero_copy_only=False)
    return batch.slice(0, int(np.searchsorted(np.cumsum(counts), positions)) + 1)


def _scattered(count: int) -> list[int]:
    """0 … count - 1, each next one far from those before it (steps of the golden ratio)."""
    if count < 3:
        return list(range(count))
    step = max(1, round(count * 0.381966))
    while np.gcd(step, count) != 1:
        step += 1
    return [int(n * step % count) for n in range(count)]


def _spread(items: Sequence[Item], most: int) -> list[Item]:
    if len(items) <= most:
        return list(items)
    return [items[int(n)] for n in np.linspace(0, len(items) - 1, most)]

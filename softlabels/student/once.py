"""The rows of a plan once each, in its order, whatever repeats and overlaps it has."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import MismatchError
from softlabels.plan import ENTRIES, Plan, join_entries
from softlabels.plan_entries import MEMBER, MEMBERS, num_members, one_array, to_ints
from softlabels.student.members import slot_plan
from softlabels.student.stream import Batch, Stream
from softlabels.student.zipped import SourceFiles
from softlabels.targets import to_numpy

Mask = npt.NDArray[np.bool_]


def each_row_once(
    plan: Plan,
    batch_size: int,
    columns: Sequence[str],
    roots: Mapping[str, str] | None,
    source: SourceFiles | None = None,
) -> Iterator[Batch]:
    """Batches of the plan in its order; a row that several entries take comes once.

    In a plan with ensembles it comes with the teachers and weights of the first that takes it.

    Raises:
        MismatchError: one table version is there under several position rules, so that its rows
            would be counted by how many of them keep a position, or at several temperatures.
    """
    digests: dict[str, str] = {}
    tables = slot_plan(plan, 0).tables
    for name, table in tables.items():
        other = digests.setdefault(table.snapshot_digest, name)
        if other == name:
            continue
        differ, mine, theirs = "position rules", tables[other].positions, table.positions
        if tables[other].temperature != table.temperature:
            differ = "temperatures"
            mine, theirs = tables[other].temperature, table.temperature  # type: ignore[assignment]
        raise MismatchError(
            f"{other!r} and {name!r} are one table version under different {differ} "
            f"({mine} and {theirs}): evaluate on a plan of one"
        )
    once = dataclasses.replace(plan, entries=rows_once(plan.entries))
    stream = Stream(
        once,
        batch_size=batch_size,
        epochs=1,
        shuffle=False,
        columns=tuple(columns),
        roots=roots,
        source=source,
    )
    return iter(stream)


def rows_once(entries: pa.Table) -> pa.Table:
    """Entries in which each row of a row group comes in one place.

    Without ensembles, a row group is read once, where it first comes. In a plan with ensembles each
    row is left in the first entry that takes it, with the teachers it has there.

    Args:
        entries: of ENTRIES or ENSEMBLE_ENTRIES; the result is of the same.
    """
    entries = entries.combine_chunks()
    groups, counts = _row_groups(entries), to_ints(entries["num_rows"])
    rows = _Lists.of(entries["rows"], counts)
    keys = np.repeat(groups << 32, counts)
    keys += rows.values
    # A stable sort: of equal rows the one of the first entry comes first.
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.ones(len(keys), np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    if num_members(entries) == 1:
        whole = np.zeros(groups.max(initial=-1) + 1, np.bool_)
        whole[groups[rows.null]] = True
        # In the order of row groups, whose numbers rise as they first come.
        sizes = np.bincount(keys[first] >> 32, minlength=len(whole))
        kept = _Lists(rows.values[order[first]], sizes, whole)
        used = np.sort(np.unique(groups, return_index=True)[1])[sizes > 0]
        members = None
    else:
        del keys
        keep = np.zeros(len(order), np.bool_)
        keep[order[first]] = True
        del order, first
        kept = rows.filtered(keep)
        used = np.flatnonzero(kept.counts)
        members = _members_once(entries, keep, counts)
    taken = entries.take(pa.array(used))
    columns = {name: taken[name] for name in taken.schema.names} | {
        "num_rows": pa.array(kept.counts[kept.counts > 0].astype(np.int32)),
        "rows": kept.array().filter(pa.array(kept.counts > 0)),
        "repeats": pa.array(np.ones(len(used), np.int32)),
    }
    if members is not None:
        columns[MEMBERS.name] = members.take(pa.array(used))
    shaped = [columns[name] for name in entries.schema.names]
    return join_entries([pa.table(shaped, schema=entries.schema)])


@dataclasses.dataclass(frozen=True)
class _Lists:
    """Row numbers of entries or members: `values` [R] of `counts` [E] each; null: all, in order."""

    values: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    null: Mask

    @classmethod
    def of(cls, column: pa.ChunkedArray | pa.Array, counts: npt.NDArray[np.int64]) -> "_Lists":
        """Those of a column of lists; of a null one the numbers from 0 stand for it."""
        array = one_array(column)
        null = to_ints(array.is_null()) != 0
        ends = np.cumsum(counts)
        values = (np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)).astype(np.int32)
        values[~np.repeat(null, counts)] = to_numpy(array.flatten(), np.int32)
        return cls(values, counts, null)

    def filtered(self, keep: Mask) -> "_Lists":
        """Of the values those of `keep` [R]; what is left whole stays null."""
        left = _counts(keep, self.counts)
        return _Lists(self.values[keep], left, self.null & (left == self.counts))

    def array(self) -> pa.ListArray:
        """As a column of lists."""
        listed = self.values[~np.repeat(self.null, self.counts)]
        kind = ENTRIES.field("rows").type
        offsets = _offsets(np.where(self.null, 0, self.counts))
        return pa.ListArray.from_arrays(
            offsets, pa.array(listed), type=kind, mask=pa.array(self.null)
        )


def _members_once(entries: pa.Table, keep: Mask, counts: npt.NDArray[np.int64]) -> pa.Array:
    """The members of all entries, of whose rows `keep` [R] says which are left."""
    column = one_array(entries[MEMBERS.name])
    several = to_ints(pc.fill_null(pc.list_value_length(column), 0))
    each, of = column.flatten(), np.repeat(np.arange(len(several)), several)
    sizes = counts[of]  # a member has its entry's rows
    starts = (np.cumsum(counts) - counts)[of]
    places = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes - starts, sizes)
    left = keep[places]
    del places
    rows = _Lists.of(each.field("rows"), sizes).filtered(left)
    weights = to_numpy(each.field("weights").flatten(), np.float32)[left]
    columns = {name: each.field(name) for name in ("table", "file", "row_group")} | {
        "rows": rows.array(),
        "weights": pa.ListArray.from_arrays(
            _offsets(rows.counts), pa.array(weights), type=MEMBER.field("weights").type
        ),
    }
    structs = pa.StructArray.from_arrays([columns[f.name] for f in MEMBER], fields=list(MEMBER))
    null = pa.array(to_ints(column.is_null()) != 0)
    return pa.ListArray.from_arrays(_offsets(several), structs, type=MEMBERS.type, mask=null)


def _row_groups(entries: pa.Table) -> npt.NDArray[np.int64]:
    """The row group that each entry reads, numbered from 0 as they first come."""
    columns = (
        to_ints(one_array(entries[n]).dictionary_encode().indices) for n in ("table", "file")
    )
    table, file = columns
    files = np.unique((table << 32) + file, return_inverse=True)[1]
    keys = (files.astype(np.int64) << 32) + to_ints(entries["row_group"])
    _, first, codes = np.unique(keys, return_index=True, return_inverse=True)
    ranks = np.empty(len(first), np.int64)
    ranks[np.argsort(first)] = np.arange(len(first))
    return np.asarray(ranks[codes])


def _counts(keep: Mask, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many are kept of each list."""
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep)])
    ends = np.cumsum(counts)
    return np.asarray(sums[ends] - sums[ends - counts])


def _offsets(counts: npt.NDArray[np.int64]) -> pa.Array:
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return pa.array(offsets)

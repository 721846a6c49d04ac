"""The rows of a plan: their Arrow schema, how they are joined, digested and checked.

E entries, R rows of an entry, T teachers (members) of an ensemble.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import IntegrityError
from softlabels.fingerprint import sha256_bytes, sha256_json
from softlabels.targets import to_numpy

Counts = npt.NDArray[np.int64]

_INDEXES = pa.list_(pa.field("element", pa.int32(), nullable=False))
_WEIGHTS = pa.list_(pa.field("element", pa.float32(), nullable=False))

ENTRIES = pa.schema(
    [
        pa.field("stage", pa.int32(), nullable=False),  # curriculum stage, read in order
        pa.field("table", pa.string(), nullable=False),  # name of one of the plan's tables
        pa.field("file", pa.string(), nullable=False),  # path below the table's root
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),  # rows an epoch before this entry
        pa.field("num_rows", pa.int32(), nullable=False),  # rows taken from the row group, once
        pa.field("rows", _INDEXES),  # null: all
        pa.field("repeats", pa.int32(), nullable=False),  # times an epoch
        pa.field("loss_weight", pa.float32(), nullable=False),
    ]
)

MEMBER = pa.struct(
    [
        pa.field("table", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("rows", _INDEXES),  # R row numbers in the entry's row order; null: all, in order
        pa.field("weights", _WEIGHTS, nullable=False),  # R, of this teacher's target in each row
    ]
)
MEMBERS = pa.field("members", pa.list_(pa.field("element", MEMBER, nullable=False)))
"""The teachers of each of an entry's rows; null: one, with the weight 1.

The first member is what the entry itself says. The others hold the same examples: the row j of each
is the entry's row j. Weights of a row are at least 0 and their sum over the members is 1.
"""

ENSEMBLE_ENTRIES = ENTRIES.append(MEMBERS)
"""ENTRIES of a plan with ensembles."""

WEIGHT_TOLERANCE = 1e-5
"""How far a row's weights may be from a sum of 1: they are rounded to float32."""

BLOCK_ROWS = 2_000_000
"""Rows checked at a time: about 100 MB for three members."""


def entries_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """ENTRIES from rows without `offset`, which is added in the order given.

    Args:
        rows: mappings with the fields of ENTRIES; `rows` None or row indexes, rising. Where one has
            `members`, the table is of ENSEMBLE_ENTRIES.
    """
    ensemble = any(row.get(MEMBERS.name) is not None for row in rows)
    schema = ENSEMBLE_ENTRIES if ensemble else ENTRIES
    complete = [{**row, "offset": 0} for row in rows]
    return join_entries([pa.Table.from_pylist(complete, schema=schema)])


def join_entries(parts: Sequence[pa.Table]) -> pa.Table:
    """The entries of all parts, one part after the other, in one chunk, with `offset` counted anew.

    Args:
        parts: of ENTRIES or ENSEMBLE_ENTRIES; `offset` may be missing. The result is of
            ENSEMBLE_ENTRIES where one of them is.
    """
    ensemble = any(MEMBERS.name in part.schema.names for part in parts)
    schema = ENSEMBLE_ENTRIES if ensemble else ENTRIES
    shaped = []
    for part in parts:
        zeros = pa.array(np.zeros(part.num_rows, np.int64))
        columns = {name: part[name] for name in part.schema.names} | {"offset": zeros}
        if ensemble and MEMBERS.name not in columns:
            columns[MEMBERS.name] = pa.nulls(part.num_rows, MEMBERS.type)
        shaped.append(pa.table([columns[name] for name in schema.names], schema=schema))
    joined = pa.concat_tables([schema.empty_table(), *shaped]).combine_chunks()
    reads = to_ints(joined["num_rows"]) * to_ints(joined["repeats"])
    offsets = pa.array(np.cumsum(reads) - reads, pa.int64())
    place = schema.get_field_index("offset")
    return joined.set_column(place, schema.field(place), offsets)


def num_members(entries: pa.Table) -> int:
    """The largest number of teachers that a row has; 1 without ensembles."""
    if MEMBERS.name not in entries.schema.names or not entries.num_rows:
        return 1
    return int(pc.max(pc.fill_null(pc.list_value_length(entries[MEMBERS.name]), 1)).as_py() or 1)


def member_entries(entries: pa.Table, slot: int) -> pa.Table:
    """What the member `slot` of each entry reads: ENTRIES, as many rows as `entries`.

    `rows` rise in the slot 0 alone. Where an entry has no such member, `num_rows` is 0, `rows`
    empty and the rest the entry's own.
    """
    plain = entries.select(ENTRIES.names).replace_schema_metadata(None).combine_chunks()
    if slot == 0:
        return plain
    has, members = _at(entries, slot)
    place = np.cumsum(has) - 1  # among `members`, where there is one
    columns = {name: plain[name] for name in ENTRIES.names}
    for name in ("table", "file", "row_group"):
        found = members.field(name).take(pa.array(np.maximum(place, 0), mask=~has))
        columns[name] = pc.coalesce(found, columns[name])
    rows = members.field("rows")
    lengths = np.zeros(len(has), np.int64)
    lengths[has] = to_ints(pc.fill_null(pc.list_value_length(rows), 0))
    null = np.zeros(len(has), bool)
    null[has] = _bools(rows.is_null())
    columns["rows"] = _lists(rows.flatten(), lengths, _INDEXES, null)
    columns["num_rows"] = pa.array(np.where(has, to_ints(plain["num_rows"]), 0), pa.int32())
    return pa.table([columns[name] for name in ENTRIES.names], schema=ENTRIES)


def member_weights(entries: pa.Table, slot: int) -> pa.ListArray:
    """The weights of the member `slot`: an entry's list holds one for each of its rows.

    It is empty where the entry has no such member; the only member of a plain row has the weight 1.
    """
    has, members = _at(entries, slot)
    lengths = np.zeros(len(has), np.int64)
    lengths[has] = to_ints(pc.list_value_length(members.field("weights")))
    given = to_numpy(members.field("weights").flatten(), np.float32)
    plain = _plain(entries) if slot == 0 else np.zeros(len(has), bool)
    if plain.any():
        sizes = np.where(plain, to_ints(entries["num_rows"]), lengths)
        values = np.ones(int(sizes.sum()), np.float32)
        values[np.repeat(has, sizes)] = given
        return _lists(pa.array(values), sizes, _WEIGHTS)
    return _lists(pa.array(given), lengths, _WEIGHTS)


def entries_digest(entries: pa.Table, sha256s: Mapping[tuple[str, str], str]) -> str:
    """The sha256 of the values of entries, each file by its content.

    Values, not Parquet bytes: those change with the pyarrow that wrote them.

    Args:
        entries: of ENTRIES or ENSEMBLE_ENTRIES.
        sha256s: of files, by table and path; another file counts by its path.
    """
    ensemble = MEMBERS.name in entries.schema.names
    schema = ENSEMBLE_ENTRIES if ensemble else ENTRIES
    plain = entries.replace_schema_metadata(None).cast(schema).combine_chunks()
    sink = pa.BufferOutputStream()
    files = _by_content(one_array(plain["table"]), one_array(plain["file"]), sha256s)
    for name in ENTRIES.names:
        column = files if name == "file" else one_array(plain[name])
        if name == "rows":
            sink.write(_digest_of_lists(column))
        elif pa.types.is_string(column.type):
            sink.write(sha256_json(column.to_pylist()).encode())
        else:
            sink.write(_digest_of_values(column))
    if ensemble:
        members = one_array(plain[MEMBERS.name])
        sink.write(_digest_of_values(_lengths_or_none(members)))
        each = members.flatten()
        files = _by_content(each.field("table"), each.field("file"), sha256s)
        for names in (each.field("table"), files):
            # Millions of members name few files: each name is written once, then its number.
            known = pa.array(sorted(pc.unique(names).to_pylist()), pa.string())
            sink.write(sha256_json(known.to_pylist()).encode())
            sink.write(_digest_of_values(pc.index_in(names, value_set=known)))
        sink.write(_digest_of_values(each.field("row_group")))
        sink.write(_digest_of_lists(each.field("rows")))
        sink.write(_digest_of_lists(each.field("weights")))
    return sha256_bytes(memoryview(sink.getvalue()))


def check_members(entries: pa.Table, listed: Mapping[tuple[str, str], int]) -> None:
    """Raises IntegrityError unless the members of each entry can be read as MEMBERS says.

    Args:
        entries: of ENSEMBLE_ENTRIES, from a stranger's file.
        listed: rows of each file that the plan lists, by table and path.
    """
    ends = np.cumsum(np.maximum(to_ints(entries["num_rows"]), 0))
    start = 0
    while start < entries.num_rows:
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK_ROWS, side="right")))
        _check_block(entries.slice(start, stop - start).combine_chunks(), start, listed)
        start = stop


def _check_block(entries: pa.Table, first: int, listed: Mapping[tuple[str, str], int]) -> None:
    column = one_array(entries[MEMBERS.name])
    each = column.flatten()
    lengths = to_ints(pc.fill_null(pc.list_value_length(column), 0))
    plain = _plain(entries)
    entry_of = np.repeat(np.arange(len(lengths)), lengths)

    def refuse(bad: npt.NDArray[np.bool_], of: npt.NDArray[Any], what: str) -> None:
        if bad.any():
            entry = first + int(of[int(np.argmax(bad))])
            raise IntegrityError(
                f"entry {entry} of the plan has {what}: it was not made by softlabels"
            )

    refuse((lengths == 0) & ~plain, np.arange(len(lengths)), "a list of no members")
    if each.null_count or any(
        each.field(name).null_count for name in ("table", "file", "row_group", "weights")
    ):
        raise IntegrityError("members of the plan's entries hold nulls: expected values")
    pairs = list(zip(each.field("table").to_pylist(), each.field("file").to_pylist(), strict=True))
    for pair in dict.fromkeys(pairs):
        if pair not in listed:
            raise IntegrityError(
                f"the plan reads file {pair[1]!r} of table {pair[0]!r}, not listed"
            )
    tables = _codes(each.field("table"))
    keys = (entry_of.astype(np.int64) << 32) + tables
    refuse(_repeated(keys), entry_of, "two members of one table")
    num_rows = to_ints(entries["num_rows"])[entry_of]
    rows, weights = each.field("rows"), each.field("weights")
    sizes = to_ints(pc.list_value_length(weights))
    refuse(sizes != num_rows, entry_of, "a member whose weights are not one for each row")
    given = ~_bools(rows.is_null())
    counts = to_ints(pc.fill_null(pc.list_value_length(rows), 0))
    refuse(given & (counts != num_rows), entry_of, "a member whose rows are not as many as its own")
    numbers, row_of = leaves(rows, np.int32), np.repeat(entry_of, counts)
    limits = np.repeat(np.array([listed[pair] for pair in pairs], np.int64), counts)
    refuse((numbers < 0) | (numbers >= limits), row_of, "a member's row that its file has not")
    _check_first(entries, each, lengths, refuse)
    values = leaves(weights, np.float32)
    weighed = np.repeat(entry_of, sizes)
    refuse(~np.isfinite(values) | (values < 0), weighed, "a member's weight below 0 or not finite")
    # Slot of each weight: the first row of its entry, then its place in the list.
    firsts = np.cumsum(np.where(plain, 0, to_ints(entries["num_rows"])))
    firsts -= np.where(plain, 0, to_ints(entries["num_rows"]))
    slots = np.arange(len(values)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + firsts[weighed]
    wrong = np.abs(np.bincount(slots, values) - 1) > WEIGHT_TOLERANCE
    refuse(wrong[slots], weighed, "a row whose members' weights do not sum to 1")


def _check_first(entries: pa.Table, each: pa.StructArray, lengths: Counts, refuse: Any) -> None:
    """Refuses entries whose first member reads something else than they do."""
    has = np.flatnonzero(lengths > 0)
    mine = entries.take(pa.array(has)).combine_chunks()
    firsts = each.take(pa.array((np.cumsum(lengths) - lengths)[has]))
    differs = np.zeros(len(has), bool)
    for name in ("table", "file", "row_group"):
        same = pc.equal(one_array(mine[name]), firsts.field(name))
        differs |= ~_bools(same)
    own, first = one_array(mine["rows"]), firsts.field("rows")
    sizes = to_ints(_lengths_or_none(own))
    other = sizes != to_ints(_lengths_or_none(first))
    refuse(differs | other, has, "a first member that is not itself")
    rows_of = np.repeat(has, np.maximum(sizes, 0))
    refuse(
        leaves(own, np.int32) != leaves(first, np.int32),
        rows_of,
        "other rows than its first member",
    )


def _at(entries: pa.Table, slot: int) -> tuple[npt.NDArray[np.bool_], pa.StructArray]:
    """Which entries have a member `slot`, bool [E], and those members, in order."""
    if MEMBERS.name not in entries.schema.names:
        return np.zeros(entries.num_rows, bool), pa.array([], MEMBER)
    column = one_array(entries[MEMBERS.name])
    lengths = to_ints(pc.fill_null(pc.list_value_length(column), 0))
    has = lengths > slot
    return has, column.flatten().take(pa.array((np.cumsum(lengths) - lengths)[has] + slot))


def _plain(entries: pa.Table) -> npt.NDArray[np.bool_]:
    if MEMBERS.name not in entries.schema.names:
        return np.ones(entries.num_rows, bool)
    return _bools(one_array(entries[MEMBERS.name]).is_null())


def _lists(
    values: pa.Array, lengths: Counts, kind: pa.DataType, null: npt.NDArray[np.bool_] | None = None
) -> pa.ListArray:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    mask = None if null is None else pa.array(null)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind, mask=mask)


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column in one piece."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def to_ints(column: pa.ChunkedArray | pa.Array) -> Counts:
    """A column of whole numbers or truth values as int64."""
    array = pc.cast(one_array(column), pa.int64())
    return np.asarray(to_numpy(array, np.int64))


def _bools(array: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(to_ints(array) != 0)


def leaves(lists: pa.ListArray, kind: type[np.generic]) -> Any:
    """All values of the lists, nulls' left out. A null among them is refused."""
    flat = lists.flatten()
    if flat.null_count:
        raise IntegrityError("lists of the plan's entries hold nulls: expected values")
    return to_numpy(flat, kind)


def _codes(names: pa.Array) -> npt.NDArray[np.int64]:
    return to_ints(names.dictionary_encode().indices)


def _repeated(keys: Counts) -> npt.NDArray[np.bool_]:
    """Which keys have come before."""
    found = np.ones(len(keys), bool)
    found[np.unique(keys, return_index=True)[1]] = False
    return found


def _by_content(
    tables: pa.Array, files: pa.Array, sha256s: Mapping[tuple[str, str], str]
) -> pa.Array:
    """Each file's sha256 in the place of its path."""
    pairs = zip(tables.to_pylist(), files.to_pylist(), strict=True)
    return pa.array([sha256s.get(pair, pair[1]) for pair in pairs], pa.string())


def _lengths_or_none(lists: pa.ListArray) -> pa.Array:
    return pc.fill_null(pc.list_value_length(lists), -1)


def _digest_of_lists(lists: pa.ListArray) -> bytes:
    return _digest_of_values(_lengths_or_none(lists)) + _digest_of_values(lists.flatten())


def _digest_of_values(array: pa.Array) -> bytes:
    width = array.type.bit_width // 8
    buffer = array.buffers()[1]
    start = array.offset * width
    data = memoryview(buffer)[start : start + len(array) * width] if buffer is not None else b""
    return sha256_bytes(data).encode()

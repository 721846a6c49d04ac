"""Which rows of a table version a source takes, and where they lie in its files.

A row is known by its number: files in path order, rows in file order, from 0. Which rows are
taken depends on their content and the seed alone, never on how files hold them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabels.errors import BadInputError, IntegrityError
from softlabels.query import sql as text
from softlabels.query.excluding import Excluded
from softlabels.query.expressions import check_source
from softlabels.query.prune import may_match
from softlabels.query.recipe import Each, Source
from softlabels.query.sampling import (
    Keys,
    Numbers,
    Taken,
    flat_numbers,
    lowest,
    rank_in_value,
)
from softlabels.query.view import FILE_COLUMN, NUMBERED, ROW_COLUMN, Session, read_footer
from softlabels.store import shards
from softlabels.store.table import Table, TableFile
from softlabels.targets import to_numpy

__all__ = [
    "Keys",
    "Numbers",
    "RowGroups",
    "Selection",
    "candidates",
    "files_of",
    "lowest",
    "row_groups",
    "select",
]

_EXCLUDE = ("exclude_high", "exclude_low")

MOST_VALUES = 100_000
"""Values that `balance` tells apart."""


@dataclass(frozen=True)
class Selection:
    """The rows that are left of a table version.

    Attributes:
        rows: their numbers, int64 [n], rising.
        keys: uint64 [n], the first 16 hex digits of md5("seed/example_id/view"), by which subsets
            are taken, lowest first; None where no subset was asked for.
        dropped: rows left out, by reason, in the order in which they were.
        columns: more about each row, [n]: "low" (the last 16 digits, for `once`), "balance" (code
            of its value, from 0, or -1), "sample_by" (float64).
        values: what the codes of "balance" stand for, as text.
    """

    rows: Numbers
    keys: Keys | None
    dropped: Mapping[str, int] = field(default_factory=dict)
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    values: Sequence[str] = ()

    def keep(self, which: npt.NDArray[Any], reason: str | None = None) -> "Selection":
        """The rows `which`, a mask or rising places; the others are dropped for `reason`."""
        rows = self.rows[which]
        dropped = dict(self.dropped)
        if reason is not None:
            dropped[reason] = dropped.get(reason, 0) + len(self.rows) - len(rows)
        if len(rows) == len(self.rows):
            return Selection(self.rows, self.keys, dropped, self.columns, self.values)
        keys = None if self.keys is None else self.keys[which]
        columns = {name: column[which] for name, column in self.columns.items()}
        return Selection(rows, keys, dropped, columns, self.values)


@dataclass(frozen=True)
class RowGroups:
    """The row groups of some files.

    Attributes:
        files: the file of each.
        indexes: its place in that file.
        starts: int64, the number of its first row; `sizes`: its rows.
    """

    files: Sequence[TableFile]
    indexes: Sequence[int]
    starts: Numbers
    sizes: Numbers


def select(
    table: Table,
    source: Source,
    seed: int,
    with_keys: bool,
    taken: Taken | None = None,
    excluded: Excluded | None = None,
) -> Selection:
    """The rows that pass `where`, `exclude`, `split`, `fraction`, `limit`, and are not taken.

    Args:
        table: the version that it reads; of several teachers' the first one's.
        source: of a recipe.
        seed: of the recipe.
        with_keys: whether keys are wanted even if the source itself takes no subset.
        taken: examples that no other source may take; None: any may.
        excluded: what the source's `exclude` holds; None: nothing.

    Raises:
        BadInputError: an expression names an unknown column, is of a wrong type or cannot be
            computed; a value of `sample_by` is not finite or below 0.
        IntegrityError: a file is not as the log says.
    """
    check_source(source, table)
    by_hash = (source.fraction, source.limit, source.balance, source.sample_by, taken)
    with_keys = with_keys or any(part is not None for part in by_hash)
    if source.where is None and source.split is None and excluded is None and not with_keys:
        return Selection(np.arange(table.num_rows, dtype=np.int64), None)
    wanted = _wanted(source, seed, with_keys, taken is not None)
    if excluded is not None:
        wanted |= dict(zip(_EXCLUDE, excluded.halves, strict=True))
    rows, found = _read(table, source.where, wanted)
    keys = flat_numbers(found.pop("key"), np.uint64) if with_keys else None
    dropped = {} if source.where is None else {"where": table.num_rows - len(rows)}
    selection = Selection(rows, keys, dropped, *_columns(found))
    kept = None
    if excluded is not None:
        high, low = (flat_numbers(found.pop(name), np.uint64) for name in _EXCLUDE)
        kept = ~excluded.holds(high, low)
        selection = selection.keep(kept, "exclude")
    if source.split is not None:
        side = flat_numbers(found.pop("split"), np.uint64)
        side = side if kept is None else side[kept]
        # The decimal that was written, not its nearest binary float.
        held = side < np.uint64(int(Fraction(str(source.split.holdout)) * 2**64))
        selection = selection.keep(held == (source.split.take == "holdout"), "split")
    if taken is not None and selection.keys is not None:
        unseen = taken.unseen(selection.keys, selection.columns["low"])
        selection = selection.keep(unseen, "once")
    return _sampled(_limited(selection, source), source)


def _columns(
    found: Mapping[str, pa.ChunkedArray],
) -> tuple[dict[str, npt.NDArray[Any]], list[str]]:
    """`Selection.columns` and `Selection.values` of what was read."""
    columns: dict[str, npt.NDArray[Any]] = {}
    values: list[str] = []
    if "low" in found:
        columns["low"] = flat_numbers(found["low"], np.uint64)
    if "limit" in found:
        columns["limit"], _ = _codes("limit.by", found["limit"], False)
    if "balance" in found:
        columns["balance"], values = _codes("balance.by", found["balance"], True)
    if "sample_by" in found:
        columns["sample_by"] = flat_numbers(pc.fill_null(found["sample_by"], np.nan), np.float64)
    return columns, values


def _limited(selection: Selection, source: Source) -> Selection:
    """What `fraction` and `limit` leave, and of `balance` the rows that have a value."""
    if source.fraction is not None and selection.keys is not None and source.fraction < 1:
        kept = selection.keys < np.uint64(int(source.fraction * 2**64))
        selection = selection.keep(kept, "fraction")
    if isinstance(source.limit, Each):
        selection = selection.keep(selection.columns["limit"] >= 0, "limit: null")
    keys = selection.keys
    if isinstance(source.limit, Each) and keys is not None:
        ranks = rank_in_value(selection.columns["limit"], keys)
        selection = selection.keep(ranks < source.limit.each, "limit")
    elif isinstance(source.limit, int) and keys is not None:
        selection = selection.keep(lowest(keys, source.limit), "limit")
    if source.balance is not None:
        selection = selection.keep(selection.columns["balance"] >= 0, "balance: null")
    return selection


def _sampled(selection: Selection, source: Source) -> Selection:
    """Without the rows that `sample_by` gives 0."""
    if source.sample_by is None:
        return selection
    values = selection.columns["sample_by"]
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        found = values[int(np.argmax(wrong))]
        shown = "NULL or NaN" if np.isnan(found) else repr(float(found))
        raise BadInputError(
            f"sample_by {source.sample_by!r} is {shown} for a row (and wrong for "
            f"{int(wrong.sum())} of {len(values)}): expected a finite number of at least 0; leave "
            "such rows out with where"
        )
    return selection.keep(values > 0, "sample_by: 0")


def row_groups(table: Table, files: Sequence[TableFile]) -> RowGroups:
    """The row groups of `files`, which are in the table's order, by their footers.

    Raises:
        IntegrityError: a footer is not the one that was written, or counts other rows than the
            log.
    """
    starts = dict(zip((f.path for f in table.files), _file_starts(table.files), strict=True))
    owners: list[TableFile] = []
    indexes: list[int] = []
    firsts: list[int] = []
    sizes: list[int] = []
    for file in files:
        metadata = _metadata(table, file)
        first = int(starts[file.path])
        for index in range(metadata.num_row_groups):
            owners.append(file)
            indexes.append(index)
            firsts.append(first)
            sizes.append(metadata.row_group(index).num_rows)
            first += sizes[-1]
    return RowGroups(owners, indexes, np.array(firsts, np.int64), np.array(sizes, np.int64))


def candidates(table: Table, where: str | None) -> list[TableFile]:
    """The files that may hold a row for which `where` is true, by the log's bounds.

    Raises:
        BadInputError: it is not one expression.
    """
    if where is None:
        return list(table.files)
    tree = text.check_expression(where)
    return [file for file in table.files if may_match(tree, file.bounds)]


def files_of(table: Table, rows: Numbers) -> list[TableFile]:
    """The files that hold at least one of `rows`."""
    ends = _file_starts(table.files) + np.array([f.num_rows for f in table.files], np.int64)
    used = np.unique(np.searchsorted(ends, rows, side="right"))
    return [table.files[int(index)] for index in used]


def _wanted(source: Source, seed: int, with_keys: bool, with_low: bool) -> dict[str, str]:
    """SQL of what is wanted of each row, by name."""
    # md5 is what it is in any release of DuckDB; its own hash() is not.
    digest = f"md5('{int(seed)}/' || example_id || '/' || \"view\")"
    wanted = {}
    if with_keys:
        wanted["key"] = f"('0x' || left({digest}, 16))::UBIGINT"
    if with_low:
        wanted["low"] = f"('0x' || right({digest}, 16))::UBIGINT"
    if source.split is not None:
        side = f"md5('split/{int(source.split.seed)}/' || example_id)"
        wanted["split"] = f"('0x' || left({side}, 16))::UBIGINT"
    if isinstance(source.limit, Each):
        wanted["limit"] = f"({source.limit.by}\n)"
    if source.balance is not None:
        wanted["balance"] = f"({source.balance.by}\n)"
    if source.sample_by is not None:
        wanted["sample_by"] = f"({source.sample_by}\n)::DOUBLE"
    return wanted


def _read(
    table: Table, where: str | None, wanted: Mapping[str, str]
) -> tuple[Numbers, dict[str, pa.ChunkedArray]]:
    """Numbers of the rows that pass `where`, rising, and what is wanted of each."""
    files = candidates(table, where)
    columns: set[str] = set()
    if where is not None:
        columns |= text.column_names(text.check_expression(where))
    for expression in wanted.values():
        columns |= text.column_names(text.check_expression(expression))
    condition = "" if where is None else f"WHERE ({where}\n)"
    names = {name: f"softlabels_{name}" for name in wanted}
    listed = "".join(f", {wanted[name]} AS {alias}" for name, alias in names.items())
    with Session({"": table}, columns, files) as session:
        found = session.run(
            f"SELECT {FILE_COLUMN}, {ROW_COLUMN}{listed} FROM {NUMBERED} AS labels {condition}"
        )
    values = {name: found[alias] for name, alias in names.items()}
    if not found.num_rows:
        return np.zeros(0, np.int64), values
    starts = dict(zip((f.path for f in table.files), _file_starts(table.files), strict=True))
    firsts = np.array([starts[file.path] for file in files], np.int64)
    numbers = firsts[flat_numbers(found[FILE_COLUMN], np.int64)] + flat_numbers(
        found[ROW_COLUMN], np.int64
    )
    if len(numbers) > 1 and not (numbers[1:] > numbers[:-1]).all():
        order = np.argsort(numbers, kind="stable")
        numbers, taken = numbers[order], pa.array(order)
        values = {name: column.take(taken) for name, column in values.items()}
    return numbers, values


def _codes(key: str, column: pa.ChunkedArray, few: bool) -> tuple[Numbers, list[str]]:
    """A number from 0 for each row's value, -1 for NULL and NaN; where `few`, the values as text.

    Numbers then go by the order of the values, whatever the order of the rows.
    """
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, pc.add(column, 0.0))  # -0 is 0
    encoded = column.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = pa.concat_arrays(encoded.chunks)
    codes = to_numpy(pc.fill_null(encoded.indices.cast(pa.int64()), -1), np.int64)
    count = len(encoded.dictionary)
    if not few:
        return codes, []
    if count > MOST_VALUES:
        raise BadInputError(
            f"{key}: it has {count} values, at most {MOST_VALUES} can be told apart; of numbers, "
            "take coarser ones, like round(entropy, 1)"
        )
    try:
        values = encoded.dictionary.to_pylist()
    except (OverflowError, ValueError) as error:
        raise BadInputError(
            f"{key}: it has a date that is infinite or not of the years 1 to 9999, which cannot be "
            "shown; leave such rows out with where, or take its year"
        ) from error
    order = sorted(range(count), key=values.__getitem__)
    places = np.empty(count + 1, np.int64)
    places[order], places[-1] = np.arange(count), -1  # the code -1 is the last place
    return places[codes], [_shown(values[place]) for place in order]


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _file_starts(files: Sequence[TableFile]) -> Numbers:
    counts = np.array([file.num_rows for file in files], np.int64)
    return np.cumsum(counts) - counts


def _metadata(table: Table, file: TableFile) -> pq.FileMetaData:
    metadata = pq.read_metadata(pa.BufferReader(read_footer(table, file)))
    where = f"file {file.path!r} of {table.root.uri!r}"
    if metadata.num_rows != file.num_rows:
        raise IntegrityError(
            f"{where}: {metadata.num_rows} rows by its footer, {file.num_rows} by the log"
        )
    version = (metadata.metadata or {}).get(shards.FORMAT_KEY, b"0").decode()
    shards.check_format_version(version, where)
    return metadata

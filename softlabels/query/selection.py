"""Which rows of a table version a source takes, and where they lie in its files.

A row is known by its number: files in path order, rows in file order, from 0. Which rows are
taken depends on their content and the seed alone, never on how files hold them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from softlabels.errors import BadInputError, IntegrityError
from softlabels.query import sql as text
from softlabels.query.prune import may_match
from softlabels.query.recipe import Source
from softlabels.query.view import FILE_COLUMN, NUMBERED, ROW_COLUMN, Session, read_footer
from softlabels.store import shards
from softlabels.store.table import Table, TableFile
from softlabels.targets import to_numpy

Numbers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Selection:
    """The rows that are left of a table version.

    Attributes:
        rows: their numbers, int64 [n], rising.
        keys: uint64 [n], the first 16 hex digits of md5("seed/example_id/view"), by which subsets
            are taken, lowest first; None where no subset was asked for.
        dropped: rows left out, by reason.
    """

    rows: Numbers
    keys: Keys | None
    dropped: Mapping[str, int] = field(default_factory=dict)


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


def select(table: Table, source: Source, seed: int, with_keys: bool) -> Selection:
    """The rows that pass the source's `where`, `fraction` and `limit`.

    Args:
        table: the version that it reads.
        source: of a recipe.
        seed: of the recipe.
        with_keys: whether keys are wanted even if the source itself takes no subset.

    Raises:
        BadInputError: `where` names an unknown column or cannot be computed.
        IntegrityError: a file is not as the log says.
    """
    with_keys = with_keys or source.fraction is not None or source.limit is not None
    if source.where is None and not with_keys:
        return Selection(np.arange(table.num_rows, dtype=np.int64), None)
    rows, keys = _judge(table, source.where, seed, with_keys)
    dropped = {} if source.where is None else {"where": table.num_rows - len(rows)}
    if source.fraction is not None and keys is not None and source.fraction < 1:
        kept = keys < np.uint64(int(source.fraction * 2**64))
        dropped["fraction"] = len(rows) - int(kept.sum())
        rows, keys = rows[kept], keys[kept]
    if source.limit is not None and keys is not None:
        first = lowest(keys, source.limit)
        dropped["limit"] = len(rows) - len(first)
        rows, keys = rows[first], keys[first]
    return Selection(rows, keys, dropped)


def lowest(keys: Keys, count: int) -> Numbers:
    """Rising indexes of the `count` lowest keys, or of all when there are fewer."""
    if count >= len(keys):
        return np.arange(len(keys), dtype=np.int64)
    border = np.partition(keys, count - 1)[count - 1]
    below = np.flatnonzero(keys < border)
    at = np.flatnonzero(keys == border)[: count - len(below)]
    return np.sort(np.concatenate([below, at])).astype(np.int64)


def check_columns(where: str, table: Table) -> None:
    """Raises BadInputError unless `where`, a checked expression, fits the table's columns."""
    with duckdb.connect(":memory:") as con:
        con.register("labels", table.schema.empty_table())
        try:
            con.sql(f"SELECT 1 FROM labels WHERE ({where}\n)").to_arrow_table()
        except duckdb.Error as error:
            raise BadInputError(f"where {where!r}: {text.one_line(error)}") from error


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


def files_of(table: Table, rows: Numbers) -> list[TableFile]:
    """The files that hold at least one of `rows`."""
    ends = _file_starts(table.files) + np.array([f.num_rows for f in table.files], np.int64)
    used = np.unique(np.searchsorted(ends, rows, side="right"))
    return [table.files[int(index)] for index in used]


def _judge(
    table: Table, where: str | None, seed: int, with_keys: bool
) -> tuple[Numbers, Keys | None]:
    files = list(table.files)
    columns = {"example_id", "view"} if with_keys else set()
    if where is not None:
        tree = text.check_expression(where)
        check_columns(where, table)
        files = [file for file in files if may_match(tree, file.bounds)]
        columns |= text.column_names(tree)
    # md5 is what it is in any release of DuckDB; its own hash() is not.
    digest = f"md5('{int(seed)}/' || example_id || '/' || \"view\")"
    key = f"('0x' || left({digest}, 16))::UBIGINT" if with_keys else "0::UBIGINT"
    condition = "" if where is None else f"WHERE ({where}\n)"
    with Session({"": table}, columns, files) as session:
        found = session.run(
            f"SELECT {FILE_COLUMN}, {ROW_COLUMN}, {key} AS key "
            f"FROM {NUMBERED} AS labels {condition}"
        )
    file_index, row, keys = (_flat(column) for column in found.columns)
    if not len(row):
        return np.zeros(0, np.int64), np.zeros(0, np.uint64) if with_keys else None
    starts = dict(zip((f.path for f in table.files), _file_starts(table.files), strict=True))
    numbers = np.array([starts[file.path] for file in files], np.int64)[file_index] + row
    order = np.argsort(numbers, kind="stable")
    return numbers[order], keys[order] if with_keys else None


def _flat(column: pa.ChunkedArray) -> Any:
    kind = np.uint64 if pa.types.is_unsigned_integer(column.type) else np.int64
    parts = [to_numpy(chunk, kind) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, kind)


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

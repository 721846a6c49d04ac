"""Tables as SQL relations: one DuckDB session, closed to everything but the version's files.

    labels      a row an example: all columns of the table
    positions   a row a position: example_id, view, position, entropy, tail_logprob, tail_prob,
                label_id, label_logprob, label_rank, top1_id, top1_prob, token_id, segment
    entries     a row a stored id: example_id, view, position, rank, id, logprob, prob
    classes     id, name; where the label space has names

position and rank count from 0. logprob is as stored; prob and top1_prob are of the head rescaled
to 1 - exp(tail_logprob), as every reader does. Padding is not shown. token_id is, of a sequence,
input_ids at the position's index: the token that the distribution follows, or whose place it is at
(alignment "same"); segment is that token's document number. Both are NULL for classification.
"""

import glob
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import duckdb
import numpy as np
import pyarrow as pa

from softlabels.errors import BadInputError, IntegrityError, SoftLabelsError, StorageError
from softlabels.fingerprint import sha256_bytes
from softlabels.query import sql as text
from softlabels.store.table import Table, TableFile

Tables = str | Table | Mapping[str, "str | Table"]

_MISTAKES = (
    duckdb.ProgrammingError,
    duckdb.DataError,
    duckdb.NotSupportedError,
    duckdb.PermissionException,
)
"""What DuckDB raises for a query that cannot be meant; all else is about files and memory."""

NUMBERED = "softlabels_numbered"
FILE_COLUMN = "softlabels_file"
ROW_COLUMN = "softlabels_row"
"""NUMBERED is `labels` with two more columns, which users' SQL cannot name: the file's place in
the list of files, and the row's in its file."""

POSITION_COLUMNS = (
    "example_id",
    "view",
    "num_positions",
    "topk_ids",
    "topk_logprobs",
    "tail_logprob",
    "position_entropy",
    "label_ids",
    "label_logprobs",
    "label_ranks",
    "input_ids",
    "position_index",
    "segment_ids",
)
"""Table columns that `positions` and `entries` are made of."""

_DERIVED_COLUMNS = {
    *("position", "tail_prob", "label_id", "label_logprob", "label_rank", "top1_prob"),
    *("token_id", "segment", "rank", "id", "logprob", "prob", "name"),
}
"""Columns of relations that the table has not."""

_SCHEMAS = {"main", "temp", "system", "pg_catalog", "information_schema"}

_CONFIG: dict[str, Any] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_persistent_secrets": False,
    # Names in SQL must never reach Python variables of the process.
    "python_enable_replacements": False,
    "python_scan_all_frames": False,
}


def query(tables: Tables, sql: str) -> pa.Table:
    """The result of one SELECT as an Arrow table.

    Args:
        tables: a reference or table, whose relations are `labels`, `positions`, …; or several by
            name, whose relations are `name.labels`, ….
        sql: exactly one SELECT; it sees nothing else, be it files, settings or Python.

    Raises:
        BadInputError: the query is not one SELECT, or DuckDB refuses it.
        IntegrityError: a file is damaged.
        StorageError: a file is missing, or memory and disk do not suffice.
    """
    opened = open_tables(tables)
    tree = text.check_query(sql, _relation_names(opened))
    with Session(opened, _needed_columns(tree, opened)) as session:
        return session.run(sql)


def open_tables(tables: Tables) -> dict[str, Table]:
    """Tables by name; a single one has the name ""."""
    if not isinstance(tables, Mapping):
        tables = {"": tables}
    return {name: Table.open(t) if isinstance(t, str) else t for name, t in tables.items()}


def read_footer(table: Table, file: TableFile) -> bytes:
    """The Parquet footer of a data file, which is the one that was written.

    Pages are not looked at: DuckDB and Polars do not check their checksums, `verify` does.

    Raises:
        IntegrityError: the file has another length or footer than the log says.
        StorageError: it is missing.
    """
    where = f"file {file.path!r} of {table.root.uri!r}"
    size = table.root.size(file.path)
    if size != file.size:
        raise IntegrityError(
            f"{where} has {size} bytes, the log says {file.size}: it was changed after it was "
            "committed"
        )
    with table.root.open(file.path) as stream:
        stream.seek(max(0, size - 8))
        length = int.from_bytes(stream.read(8)[:4], "little")
        stream.seek(max(0, size - 8 - length))
        footer = stream.read()
    if sha256_bytes(footer) != file.footer_sha256:
        raise IntegrityError(f"{where}: its footer is not the one that was written")
    return footer


def read_remote(
    table: Table, files: Sequence[TableFile], columns: Collection[str] | None = None
) -> pa.Table:
    """Rows of a table that is not on this machine, in memory, with FILE_COLUMN and ROW_COLUMN.

    Engines are given neither Python file objects nor credentials, so files are fetched whole;
    what saves memory is that only the columns wanted are decoded and kept.

    Args:
        table: the version.
        files: those of its files that are read.
        columns: lower-case names; None: all.
    """
    names = [n for n in table.schema.names if columns is None or n.lower() in columns]
    names = names or ["view"]
    parts = []
    for number, file in enumerate(files):
        rows = pa.Table.from_batches(list(table.batches(names, [file])))
        which = pa.array(np.full(rows.num_rows, number, np.int64))
        rows = rows.append_column(FILE_COLUMN, which)
        parts.append(rows.append_column(ROW_COLUMN, pa.array(np.arange(rows.num_rows))))
    if parts:
        return pa.concat_tables(parts)
    fields = [table.schema.field(name) for name in names]
    numbers = [pa.field(FILE_COLUMN, pa.int64()), pa.field(ROW_COLUMN, pa.int64())]
    return pa.schema([*fields, *numbers]).empty_table()


class Session:
    """A locked DuckDB connection over table versions. Use it in a `with` statement.

    Args:
        tables: by name; the name "" puts relations in no schema.
        columns: lower-case names of the columns that will be read, None for all. Matters only for
            tables that are not on this machine.
        files: of a single table, those to show; None: all.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        columns: Collection[str] | None = None,
        files: Sequence[TableFile] | None = None,
    ) -> None:
        self._files = files
        self._temporary = tempfile.TemporaryDirectory(prefix="softlabels-query-")
        self._con = duckdb.connect(
            ":memory:", config=_CONFIG | {"temp_directory": self._temporary.name}
        )
        try:
            paths: list[str] = []
            for name, table in tables.items():
                paths += self._attach(name, table, columns)
            self._lock(paths)
        except duckdb.Error as error:
            self.close()
            raise _failure(error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and removes what it spilled."""
        self._con.close()
        self._temporary.cleanup()

    def run(self, sql: str) -> pa.Table:
        """The result of `sql`, which must have been checked, as an Arrow table.

        Raises:
            BadInputError: DuckDB refuses it: an unknown column, a type, a division.
        """
        try:
            return self._con.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            raise _failure(error) from error

    def _attach(self, name: str, table: Table, columns: Collection[str] | None) -> list[str]:
        schema = f"{text.quote_name(name)}." if name else ""
        if name:
            if name.lower() in _SCHEMAS:
                raise BadInputError(f"table name {name!r} is DuckDB's own: choose another")
            self._con.execute(f"CREATE SCHEMA {text.quote_name(name)}")
        files = table.files if self._files is None else self._files
        for file in files:
            read_footer(table, file)
        plain: list[str] = []
        paths: list[str] = []
        if table.root.is_local and files:
            plain = [os.path.abspath(table.root.full(file.path)) for file in files]
            # DuckDB takes "*", "?" and "[" in a path as a pattern: an escaped path has one match.
            paths = [glob.escape(path) for path in plain]
            source = (
                f"SELECT *, file_index::BIGINT AS {FILE_COLUMN}, file_row_number AS {ROW_COLUMN} "
                f"FROM read_parquet({_list(paths)}, hive_partitioning = false)"
            )
        else:
            source = self._held(f"{name}.labels", read_remote(table, files, columns))
        self._con.execute(f"CREATE VIEW {schema}{NUMBERED} AS {source}")
        self._con.execute(
            f"CREATE VIEW {schema}labels AS "
            f"SELECT * EXCLUDE ({FILE_COLUMN}, {ROW_COLUMN}) FROM {schema}{NUMBERED}"
        )
        if columns is None or set(POSITION_COLUMNS) <= set(columns):
            heads = _heads(schema, table.contents.k)
            for view in (_POSITIONS, _ENTRIES):
                self._con.execute(view.format(schema=schema, heads=heads))
        if table.contents.classes is not None:
            names = pa.array(table.contents.classes, pa.string())
            ids = pa.array(np.arange(len(names), dtype=np.int32))
            source = self._held(f"{name}.classes", pa.table({"id": ids, "name": names}))
            self._con.execute(f"CREATE VIEW {schema}classes AS {source}")
        return list(dict.fromkeys(plain + paths))

    def _held(self, name: str, rows: pa.Table) -> str:
        self._con.register(name, rows)
        return f"SELECT * FROM {text.quote_name(name)}"

    def _lock(self, paths: list[str]) -> None:
        # Timestamps must compare alike on every machine.
        self._con.execute("SET TimeZone = 'UTC'")
        self._con.execute(f"SET allowed_paths = {_list(paths)}")
        self._con.execute("SET enable_external_access = false")
        self._con.execute("SET lock_configuration = true")


def _failure(error: duckdb.Error) -> SoftLabelsError:
    reason = text.one_line(error)
    if isinstance(error, duckdb.OutOfMemoryException):
        return StorageError(f"the query needs more memory or disk than there is: {reason}")
    if isinstance(error, _MISTAKES) and "Failed to read file" not in reason:
        return BadInputError(f"the query fails: {reason}")
    return IntegrityError(f"a data file cannot be read, `softlabels verify` says which: {reason}")


def _list(paths: Sequence[str]) -> str:
    return "[" + ", ".join(text.quote_text(path) for path in paths) + "]"


def _relation_names(tables: Mapping[str, Table]) -> list[str]:
    names = []
    for name, table in tables.items():
        kinds = ["labels", "positions", "entries"]
        kinds += ["classes"] if table.contents.classes is not None else []
        names += [f"{name}.{kind}" if name else kind for kind in kinds]
    return names


def _needed_columns(tree: Any, tables: Mapping[str, Table]) -> set[str] | None:
    if text.takes_all_columns(tree):
        return None
    columns = text.column_names(tree)
    known = {name.lower() for table in tables.values() for name in table.schema.names}
    if columns - known - _DERIVED_COLUMNS:
        # An alias, or a whole row under its relation's name: which columns, only DuckDB knows.
        return None
    if text.relation_names(tree) & {"positions", "entries"}:
        columns |= set(POSITION_COLUMNS)
    return columns


def _heads(schema: str, k: int) -> str:
    """SQL that gives a row a position, with its k ids and logprobs as lists."""

    def ranks(column: str) -> str:
        # Unnesting every k-th element, rank by rank: slices by position would cost P squared.
        return ", ".join(f"unnest({column}[{r + 1}:-:{k}]) AS {column}_{r}" for r in range(k))

    def lists(column: str, kind: str) -> str:
        return f"[{', '.join(f'{column}_{r}' for r in range(k))}]::{kind}[] AS {column}"

    unnested = "".join(f", {ranks(column)}" for column in ("topk_ids", "topk_logprobs") if k)
    return f"""
        SELECT example_id, "view", position, token_id, segment, entropy, tail_logprob, label_id,
            label_logprob, label_rank,
            {lists("topk_ids", "INTEGER")}, {lists("topk_logprobs", "FLOAT")}
        FROM (
            SELECT example_id, "view",
                unnest(range(num_positions))::INTEGER AS position,
                unnest(list_select(input_ids, places)) AS token_id,
                unnest(list_select(segment_ids, places)) AS segment,
                unnest(position_entropy) AS entropy,
                unnest(tail_logprob) AS tail_logprob,
                unnest(label_ids) AS label_id,
                unnest(label_logprobs) AS label_logprob,
                unnest(label_ranks) AS label_rank{unnested}
            FROM (
                SELECT *, list_transform(position_index, lambda i: i + 1) AS places
                FROM {schema}labels
            )
        )
    """


# The factor that brings the head's probabilities to 1 - exp(tail); 1 where the tail is unknown.
_SCALED = """
    SELECT *, coalesce((1 - exp(tail_logprob::DOUBLE))
        / list_sum(list_transform(topk_logprobs, lambda x: exp(x::DOUBLE))), 1) AS scale
    FROM ({heads})
"""
_POSITIONS = f"""CREATE VIEW {{schema}}positions AS
    SELECT example_id, "view", position, entropy, tail_logprob,
        exp(tail_logprob::DOUBLE)::FLOAT AS tail_prob,
        CASE WHEN label_id >= 0 THEN label_id END AS label_id,
        CASE WHEN label_id >= 0 THEN label_logprob END AS label_logprob,
        CASE WHEN label_id >= 0 THEN label_rank END AS label_rank,
        CASE WHEN topk_ids[1] >= 0 THEN topk_ids[1] END AS top1_id,
        CASE WHEN topk_ids[1] >= 0
            THEN (exp(topk_logprobs[1]::DOUBLE) * scale)::FLOAT END AS top1_prob,
        token_id, segment
    FROM ({_SCALED})
"""
_ENTRIES = f"""CREATE VIEW {{schema}}entries AS
    SELECT example_id, "view", position, rank, id, logprob,
        (exp(logprob::DOUBLE) * scale)::FLOAT AS prob
    FROM (
        SELECT example_id, "view", position, scale,
            unnest(range(len(topk_ids)))::INTEGER AS rank,
            unnest(topk_ids) AS id,
            unnest(topk_logprobs) AS logprob
        FROM ({_SCALED})
    ) WHERE id >= 0
"""

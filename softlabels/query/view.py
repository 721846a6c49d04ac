"""Tables as SQL relations: one DuckDB session, closed to everything but the version's files.

    labels      a row an example: all columns of the table
    positions   a row a position: example_id, view, position, entropy, tail_logprob, tail_prob,
                label_id, label_logprob, label_rank, top1_id, top1_prob, token_id, segment,
                topk_ids, topk_logprobs
    entries     a row a stored id: example_id, view, position, rank, id, logprob, prob
    classes     id, name; where the label space has names

Of several tables, relations have the table's name before them: `a.labels`. Files that the call
names are relations too (`attached`), and there are macros over rows (`macros`).

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
from softlabels.query import macros
from softlabels.query import sql as text
from softlabels.query.attached import AttachedFile, open_files
from softlabels.query.pushdown import KINDS, needed_files
from softlabels.query.relations import (
    CLASSES,
    ENTRIES,
    POSITION_COLUMNS,
    POSITIONS,
    entries_sql,
    positions_sql,
)
from softlabels.store.table import Table, TableFile

Tables = str | Table | Mapping[str, "str | Table"]
Files = Mapping[str, str | os.PathLike[str]]

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

CONFIG: dict[str, Any] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_persistent_secrets": False,
    # Names in SQL must never reach Python variables of the process.
    "python_enable_replacements": False,
    "python_scan_all_frames": False,
}
"""Of every connection that sees what users wrote."""


def query(tables: Tables, sql: str, files: Files | None = None) -> pa.Table:
    """The result of one SELECT as an Arrow table.

    A table's files in which, by the log, no row can fulfil the query's WHERE are not touched.

    Args:
        tables: a reference or table, whose relations are `labels`, `positions`, …; or several by
            name, whose relations are `name.labels`, …; the name "" puts them in no schema.
        sql: exactly one SELECT; it sees nothing else, be it files, settings or Python.
        files: the user's own files by the name of their relation: CSV, JSON, Parquet.

    Raises:
        BadInputError: the query is not one SELECT, or DuckDB refuses it; a name is taken; one of
            `files` is not there or cannot be read.
        IntegrityError: a file of a table is damaged.
        StorageError: a file of a table is missing, or memory and disk do not suffice.
    """
    opened = open_tables(tables)
    attached = open_files(files or {}, CONFIG, [*opened, *KINDS, "classes", *text.own_names()])
    tree = text.check_query(sql, [*_relation_names(opened), *(file.name for file in attached)])
    shown = _shown_columns(tree, opened, attached)
    columns = None if shown is None else _table_columns(tree, shown)
    needed = needed_files(tree, opened)
    with Session(opened, columns, needed, shown, attached) as session:
        return session.run(sql)


def open_tables(tables: Tables) -> dict[str, Table]:
    """Tables by name; a single one has the name "".

    Raises:
        BadInputError: there is no such table, or a name is not free.
    """
    if not isinstance(tables, Mapping):
        tables = {"": tables}
    seen: set[str] = set()
    for name in tables:
        if name.lower() in text.own_names():
            raise BadInputError(f"table name {name!r} is DuckDB's own: choose another")
        if name.lower() in seen:
            raise BadInputError(f"two tables have the name {name!r}; case does not count in SQL")
        seen.add(name.lower())
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
        files: those to show, of a single table, or of each by name; None: all.
        shown: lower-case names of the columns that will be read of `positions` and `entries`;
            others may be missing there. None: all.
        attached: the user's own files.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        columns: Collection[str] | None = None,
        files: Sequence[TableFile] | Mapping[str, Sequence[TableFile]] | None = None,
        shown: Collection[str] | None = None,
        attached: Sequence[AttachedFile] = (),
    ) -> None:
        if files is None:
            files = {name: table.files for name, table in tables.items()}
        elif not isinstance(files, Mapping):
            files = dict.fromkeys(tables, files)
        self._temporary = tempfile.TemporaryDirectory(prefix="softlabels-query-")
        self._con = duckdb.connect(
            ":memory:", config=CONFIG | {"temp_directory": self._temporary.name}
        )
        try:
            macros.define(self._con)
            paths: list[str] = []
            for name, table in tables.items():
                paths += self._attach(name, table, columns, files[name], shown)
            for file in attached:
                self._con.execute(f"CREATE VIEW {text.quote_name(file.name)} AS {file.sql}")
                paths += file.allowed
            self._lock(list(dict.fromkeys(paths)))
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

    def _attach(
        self,
        name: str,
        table: Table,
        columns: Collection[str] | None,
        files: Sequence[TableFile],
        shown: Collection[str] | None,
    ) -> list[str]:
        schema = f"{text.quote_name(name)}." if name else ""
        if name:
            self._con.execute(f"CREATE SCHEMA {text.quote_name(name)}")
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
            for kind, select in (("positions", positions_sql), ("entries", entries_sql)):
                rows = select(schema, table.contents.k, shown)
                self._con.execute(f"CREATE VIEW {schema}{kind} AS {rows}")
        if table.contents.classes is not None:
            names = pa.array(table.contents.classes, pa.string())
            ids = pa.array(np.arange(len(names), dtype=np.int32))
            source = self._held(f"{name}.classes", pa.table({"id": ids, "name": names}))
            self._con.execute(f"CREATE VIEW {schema}classes AS {source}")
        return plain + paths

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
    reason = macros.explain(text.one_line(error))
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
        kinds = [*KINDS]
        kinds += ["classes"] if table.contents.classes is not None else []
        names += [f"{name}.{kind}" if name else kind for kind in kinds]
    return names


def _shown_columns(
    tree: text.Tree, tables: Mapping[str, Table], attached: Sequence[AttachedFile]
) -> set[str] | None:
    """Lower-case names of all columns that a query reads of its relations; None: it may be any."""
    names = text.column_names(tree)
    if text.takes_all_columns(tree) or names & text.relation_aliases(tree):
        return None  # the name of a relation, as a column, is its whole row
    kinds = {"positions": POSITIONS, "entries": ENTRIES, "classes": CLASSES}
    known = {column for kind in text.relation_names(tree) for column in kinds.get(kind, ())}
    if "labels" in text.relation_names(tree):
        known |= {name.lower() for table in tables.values() for name in table.schema.names}
    known |= {name.lower() for file in attached for name in file.columns}
    # What is no column and no alias is a mistake: DuckDB says so, and what comes near.
    mistaken = names - known - text.select_aliases(tree)
    return None if mistaken else names


def _table_columns(tree: text.Tree, shown: set[str]) -> set[str]:
    unfolded = text.relation_names(tree) & {"positions", "entries"}
    return shown | set(POSITION_COLUMNS) if unfolded else shown

"""The user's own files in a query: each, named in the call, is a relation of that name.

CSV, TSV, JSON, JSON lines and Parquet, by the file's ending; text may be gzipped. A path is one
file of this machine and never a pattern. A column `example_id` is read as text, so that "00012"
stays what it is and joins with the tables'.

Of CSV, line 1 names the columns, values are separated by "," (.tsv: a tab) and quoted by '"', and
each row has as many as line 1: nothing of this is guessed, since a wrong guess loses rows.
"""

import csv
import glob
import gzip
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from softlabels.errors import BadInputError
from softlabels.query import sql as text

_READERS = {
    ".parquet": "read_parquet",
    ".csv": "read_csv",
    ".tsv": "read_csv",
    ".json": "read_json",
    ".jsonl": "read_json",
    ".ndjson": "read_json",
}
_KEY = "example_id"
_CSV = (
    ", delim = {}, quote = '\"', escape = '\"', comment = '', header = true, skip = 0, "
    "strict_mode = true, ignore_errors = false, null_padding = false"
)


@dataclass(frozen=True)
class AttachedFile:
    """A file that a query may read.

    Attributes:
        name: of its relation.
        path: absolute.
        sql: the SELECT that the relation is.
        columns: its columns' names.
    """

    name: str
    path: str
    sql: str
    columns: tuple[str, ...]

    @property
    def allowed(self) -> tuple[str, str]:
        """The paths that DuckDB must be allowed: the file's, and as its pattern is written."""
        return self.path, glob.escape(self.path)


def open_files(
    files: Mapping[str, str | os.PathLike[str]], config: Mapping[str, Any], taken: Collection[str]
) -> list[AttachedFile]:
    """Files by name, each looked into for its columns.

    Args:
        files: paths by relation name.
        config: of the connection that looks into them.
        taken: names that are not free: those of relations, tables and DuckDB's own.

    Raises:
        BadInputError: a name is taken, a file is not there, is of no known format or unreadable.
    """
    if not files:
        return []  # a connection takes longer than many a query
    used = {name.lower() for name in taken}
    opened = []
    with duckdb.connect(":memory:", config=dict(config)) as con:
        for name, path in files.items():
            unfit = not name or "." in name
            if unfit or name.lower() in used:
                why = "must be a word without dots" if unfit else "is taken"
                raise BadInputError(f"file name {name!r} {why}: give the file another name")
            used.add(name.lower())
            opened.append(_open(con, name, os.fspath(path)))
    return opened


def _open(con: duckdb.DuckDBPyConnection, name: str, path: str) -> AttachedFile:
    stem, ending = os.path.splitext(path.lower())
    if (
        ending == ".gz"
        and _READERS.get(os.path.splitext(stem)[1], "read_parquet") != "read_parquet"
    ):
        ending = os.path.splitext(stem)[1]
    if ending not in _READERS:
        raise BadInputError(
            f"file {name!r}: {path!r} ends with none of {', '.join(_READERS)} (text also with .gz)"
        )
    if not os.path.isfile(path):
        raise BadInputError(f"file {name!r}: there is no file {path!r} on this machine")
    reader, whole = _READERS[ending], os.path.abspath(path)
    # An escaped path has one match, whatever wildcards are in it; folders "a=1" are no columns.
    source = f"{text.quote_text(glob.escape(whole))}, hive_partitioning = false"
    mark = "\t" if whole.lower().removesuffix(".gz").endswith(".tsv") else ","
    if reader == "read_csv":
        source += _CSV.format(text.quote_text(mark))
    try:
        described = con.execute(f"DESCRIBE SELECT * FROM {reader}({source})").fetchall()
        types = {str(column): str(kind) for column, kind, *_ in described}
        select = f"SELECT * FROM {reader}({source}{_as_text(reader, types)})"
        if reader == "read_parquet":
            select = _cast(types, select)
        con.execute(f"DESCRIBE {select}")
    except duckdb.Error as error:
        reason = text.one_line(error)
        if "sniffing" in reason:  # what follows is a list of all that was tried
            reason = f"expected values separated by {mark!r} and, in each row, as many as in line 1"
        raise BadInputError(f"file {name!r}: {path!r} cannot be read: {reason}") from error
    if reader == "read_csv":
        _check_header(name, whole, mark, list(types))
    return AttachedFile(name, whole, select, tuple(types))


def _check_header(name: str, path: str, mark: str, columns: Sequence[str]) -> None:
    """Refuses a file whose columns are not those that its line 1 names."""
    opened = gzip.open if path.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", errors="replace", newline="") as stream:
        header = next(csv.reader(stream, delimiter=mark), [])
    # DuckDB gives names to columns without one, and to a second one of the same name.
    lower = [title.strip().lower() for title in header]
    kept = [
        not title or title in lower[:place] or title == column.strip().lower()
        for place, (title, column) in enumerate(zip(lower, columns, strict=False))
    ]
    if not any(lower) or len(lower) != len(columns) or not all(kept):
        raise BadInputError(
            f"file {name!r}: {path!r}: line 1 must name the columns, found {header!r}, "
            f"read as {list(columns)!r}"
        )
    other = ";" if mark == "\t" else "\t;"
    if len(header) == 1 and any(sign in header[0] for sign in (*other, ",")):
        raise BadInputError(
            f"file {name!r}: {path!r}: line 1 is one column, {header[0]!r}: expected values "
            f"separated by {mark!r}, as the file's ending says"
        )


def _as_text(reader: str, types: Mapping[str, str]) -> str:
    keys = [name for name in types if name.lower() == _KEY]
    if not keys or reader == "read_parquet":
        return ""
    if reader == "read_csv":
        return f", types = {{{', '.join(f'{text.quote_text(key)}: {_TEXT}' for key in keys)}}}"
    kinds = {**types} | dict.fromkeys(keys, "VARCHAR")
    columns = (f"{text.quote_text(n)}: {text.quote_text(kind)}" for n, kind in kinds.items())
    return f", columns = {{{', '.join(columns)}}}"


def _cast(types: Mapping[str, str], select: str) -> str:
    keys = [text.quote_name(n) for n, kind in types.items() if n.lower() == _KEY != kind]
    replaced = ", ".join(f"{key}::VARCHAR AS {key}" for key in keys)
    return select.replace("*", f"* REPLACE ({replaced})", 1) if keys else select


_TEXT = "'VARCHAR'"

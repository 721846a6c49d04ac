"""The same examples in several table versions: rows matched by (example_id, view) in DuckDB.

Each further table is joined with the first by itself, and what does not fit into memory DuckDB
spills to disk; what comes back is 8 bytes a row and table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import DataError, MismatchError
from softlabels.query import sql as text
from softlabels.query.expressions import check_type
from softlabels.query.sampling import Numbers, flat_numbers
from softlabels.query.selection import files_of
from softlabels.query.view import FILE_COLUMN, NUMBERED, ROW_COLUMN, Session
from softlabels.store.table import Table

Values = npt.NDArray[np.float64]

AGREEING = {
    "label": "CASE WHEN label >= 0 THEN label END",
    "label_ids": "CASE WHEN list_max(label_ids) >= 0 THEN hash(label_ids, position_index) END",
    "view_params": "view_params",
    "segment_ids": "CASE WHEN segment_ids IS NOT NULL THEN hash(segment_ids) END",
}
"""SQL of what two tables may not say differently of one example; NULL where one says nothing."""

ONE_LABEL = ("view_params", "label")
"""Of AGREEING those of classification."""

_LISTED = "label_ids"
# Of hard labels by position only two that are there can differ, and only at one position.
_OPPOSED = (
    "a.position_index IS NOT DISTINCT FROM b.position_index AND list_bool_or(list_transform("
    "list_zip(a.label_ids, b.label_ids), lambda x: x[1] >= 0 AND x[2] >= 0 AND x[1] <> x[2]))"
)

_SHOWN = 60
"""Characters of a value that a message shows."""


@dataclass(frozen=True)
class Matched:
    """Rows of several tables that hold the same examples, aligned to the first table's.

    Attributes:
        rows: int64 [n] of each table, by name: row numbers (files in path order, rows in file
            order, from 0), -1 where the table has not the example. The first table's rise.
        values: float64 [expressions, n] of each table that has expressions: NaN where a value is
            NULL or the table has not the example.
    """

    rows: Mapping[str, Numbers]
    values: Mapping[str, Values] = field(default_factory=dict)

    def take(self, index: npt.NDArray[Any]) -> "Matched":
        """The examples `index`, an array of places or a mask."""
        return Matched(
            {name: rows[index] for name, rows in self.rows.items()},
            {name: values[:, index] for name, values in self.values.items()},
        )


def match(
    tables: Mapping[str, Table],
    rows: Numbers | None = None,
    expressions: Mapping[str, Sequence[str]] | None = None,
    same: Sequence[str] = (),
    agreeing: Sequence[str] = (),
) -> Matched:
    """Where each table holds the examples of the first one.

    Args:
        tables: by name, the first one first; one version may come under several names.
        rows: of the first table, rising; None: all.
        expressions: SQL over the columns of `labels` of a table, by its name; numbers.
        same: columns that must be equal wherever a table has an example of the first one.
        agreeing: of AGREEING, columns that must be equal where both tables have a value; such as
            are in one table alone say nothing.

    Raises:
        BadInputError: an expression names an unknown column, is no number or cannot be computed.
        DataError: a table holds an example (of `rows`) twice.
        MismatchError: a column of `same` or `agreeing` differs.
        IntegrityError: a file is not as its table's log says.
    """
    asked = {name: list((expressions or {}).get(name, ())) for name in tables}
    for name, table in tables.items():
        for expression in asked[name]:
            check_type(f"{name!r}:", expression, table, "number")
    (first, table), *others = tables.items()
    rows = np.arange(table.num_rows, dtype=np.int64) if rows is None else rows
    found = {first: rows}
    values: dict[str, Values] = {}
    if asked[first]:
        values[first] = _computed(table, rows, asked[first])
    for name, other in others:
        found[name], values[name] = _matched(
            (first, table), (name, other), rows, asked[name], same, agreeing
        )
    return Matched(found, {name: v for name, v in values.items() if asked[name]})


def example_of(table: Table, row: int) -> str:
    """The example_id of a row, by its number."""
    first = 0
    for file in table.files:
        if row < first + file.num_rows:
            for batch in table.batches(["example_id"], [file]):
                if row < first + batch.num_rows:
                    return str(batch["example_id"][row - first])
                first += batch.num_rows
        first += file.num_rows
    raise IndexError(row)


def _computed(table: Table, rows: Numbers, expressions: Sequence[str]) -> Values:
    files = files_of(table, rows)
    columns = set().union(*(text.column_names(text.check_expression(e)) for e in expressions))
    with Session({"": table}, columns, files) as session:
        found = session.run(
            f"SELECT {_number(table, files)} AS number, {_listed(expressions)} "
            f"FROM {NUMBERED} AS labels"
        )
    values = np.full((len(expressions), len(rows)), np.nan)
    numbers = flat_numbers(found["number"], np.int64)
    at = np.searchsorted(rows, numbers)
    mine = at < len(rows)
    mine[mine] = rows[at[mine]] == numbers[mine]
    for place in range(len(expressions)):
        values[place, at[mine]] = _floats(found[f"softlabels_{place}"])[mine]
    return values


def _matched(
    first: tuple[str, Table],
    other: tuple[str, Table],
    rows: Numbers,
    expressions: Sequence[str],
    same: Sequence[str],
    agreeing: Sequence[str],
) -> tuple[Numbers, Values]:
    """Row numbers and values in another table of `rows` of the first one."""
    table, theirs = first[1], other[1]
    files = files_of(table, rows)
    agreeing = [n for n in agreeing if n in table.schema.names and n in theirs.schema.names]
    columns = {"example_id", "view", *same, *agreeing}
    columns |= {"position_index"} if _LISTED in agreeing else set()
    for expression in expressions:
        columns |= text.column_names(text.check_expression(expression))
    # DuckDB's own hash of long lists: they are compared in 8 bytes a row.
    content = f"hash({', '.join(text.quote_name(name) for name in same)})" if same else "0"
    keys, unlike = _agreement(content, agreeing)
    ours, number = _number(table, files), _number(theirs, theirs.files)
    on = 'a.example_id = b.example_id AND a."view" = b."view"'
    # Schemas have names of ours: users' names are free to be DuckDB's own.
    with Session({"a": table, "b": theirs}, columns, {"a": files, "b": theirs.files}) as session:
        found = session.run(
            "SELECT a.number AS mine, b.number AS theirs, "
            f"CASE WHEN a.content <> b.content THEN 0{unlike} ELSE -1 END AS differs"
            f"{''.join(f', b.softlabels_{place}' for place in range(len(expressions)))} "
            f"FROM (SELECT {keys}, {ours} AS number FROM a.{NUMBERED}) AS a "
            f"JOIN (SELECT {keys}, {number} AS number"
            f"{', ' if expressions else ''}{_listed(expressions)} FROM b.{NUMBERED} AS labels) "
            f"AS b ON {on}"
        )
        differs = flat_numbers(pc.cast(found["differs"], pa.int64()), np.int64)
        mine = flat_numbers(found["mine"], np.int64)
        if _LISTED in agreeing and (listed := differs == agreeing.index(_LISTED) + 1).any():
            lists = f'example_id, "view", {_LISTED}, position_index'
            opposed = session.run(
                f"SELECT a.number FROM (SELECT {lists}, {ours} AS number FROM a.{NUMBERED}) AS a "
                f"JOIN (SELECT {lists} FROM b.{NUMBERED}) AS b ON {on} WHERE {_OPPOSED}"
            )
            really = np.isin(mine, flat_numbers(opposed["number"], np.int64))
            differs = np.where(listed & ~really, -1, differs)
    numbers = flat_numbers(found["theirs"], np.int64)
    at = np.minimum(np.searchsorted(rows, mine), max(len(rows) - 1, 0))
    taken = rows[at] == mine if len(rows) else np.zeros(len(mine), bool)
    at, mine, numbers, differs = at[taken], mine[taken], numbers[taken], differs[taken]
    _refuse_double(other, numbers, theirs.num_rows, mine, first)
    _refuse_double(first, mine, table.num_rows, numbers, other)
    if (differs >= 0).any():
        place = int(np.argmin(np.where(differs >= 0, mine, np.iinfo(np.int64).max)))
        which = int(differs[place])
        suspected = [agreeing[which - 1]] if which else same
        _refuse_other(first, int(mine[place]), other, int(numbers[place]), suspected)
    aligned = np.full(len(rows), -1, np.int64)
    aligned[at] = numbers
    values = np.full((len(expressions), len(rows)), np.nan)
    for place in range(len(expressions)):
        values[place, at] = _floats(found[f"softlabels_{place}"])[taken]
    return aligned, values


def _agreement(content: str, agreeing: Sequence[str]) -> tuple[str, str]:
    """SQL: what both sides of the join give of themselves, and the places where they differ."""
    keys = f'example_id, "view", {content} AS content' + "".join(
        f", {AGREEING[name]} AS agreeing_{name}" for name in agreeing
    )
    unlike = "".join(
        f" WHEN a.agreeing_{name} <> b.agreeing_{name} THEN {place}"
        for place, name in enumerate(agreeing, 1)
    )
    return keys, unlike


def _refuse_double(
    named: tuple[str, Table], numbers: Numbers, size: int, partners: Numbers, by: tuple[str, Table]
) -> None:
    """Refuses a row that was matched with two: the other table holds its example twice."""
    name, _ = by
    if len(numbers) and np.bincount(numbers, minlength=size).max() > 1:
        order = np.lexsort((partners, numbers))
        again = np.flatnonzero(np.diff(numbers[order]) == 0)[0]
        row = int(numbers[order][again])
        raise DataError(
            f"table {name!r} ({by[1].root.uri!r}) holds example {example_of(named[1], row)!r} "
            "twice in one view: which one is meant is not known; delete one of them"
        )


def _refuse_other(
    first: tuple[str, Table],
    mine: int,
    other: tuple[str, Table],
    theirs: int,
    same: Sequence[str],
) -> None:
    here, there = (_row(table, row, same) for table, row in ((first[1], mine), (other[1], theirs)))
    column = next((name for name in same if here[name] != there[name]), same[0])
    why = "targets of one row are of the same positions"
    if column in AGREEING:
        why = "tables of one example must agree: is one of them of other data?"
    raise MismatchError(
        f"example {example_of(first[1], mine)!r}: {column} differs: {first[0]!r} has "
        f"{_short(here[column], there[column])}, {other[0]!r} has "
        f"{_short(there[column], here[column])}; {why}"
    )


def _row(table: Table, row: int, columns: Sequence[str]) -> dict[str, Any]:
    first = 0
    for batch in table.batches(columns):
        if row < first + batch.num_rows:
            found: dict[str, Any] = batch.slice(row - first, 1).to_pylist()[0]
            return found
        first += batch.num_rows
    raise IndexError(row)


def _short(value: Any, other: Any) -> str:
    """A value for a message: of long lists what is about the first difference."""
    if not isinstance(value, list) or not isinstance(other, list):
        return f"{value!r:.{_SHOWN}}"
    pairs = enumerate(zip(value, other, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(value), len(other)))
    shown = f"{value[place : place + 8]!r}"
    return f"{shown} from place {place} on ({len(value)} values)"


def _number(table: Table, files: Sequence[Any]) -> str:
    """SQL of a row's number in its table."""
    starts, first = {}, 0
    for file in table.files:
        starts[file.path] = first
        first += file.num_rows
    if len(files) == len(table.files) == 1:
        return f"{ROW_COLUMN}"
    listed = ", ".join(str(starts[file.path]) for file in files)
    return f"(([{listed}]::BIGINT[])[{FILE_COLUMN} + 1] + {ROW_COLUMN})"


def _listed(expressions: Sequence[str]) -> str:
    return ", ".join(f"({e}\n)::DOUBLE AS softlabels_{n}" for n, e in enumerate(expressions))


def _floats(column: pa.ChunkedArray) -> Values:
    return np.asarray(flat_numbers(pc.fill_null(column, float("nan")), np.float64))

"""What the SQL of a recipe must give: true or false, a number, or a value that rows share."""

from typing import Literal

import duckdb

from softlabels.errors import BadInputError
from softlabels.query import sql as text
from softlabels.query.recipe import Source
from softlabels.store.table import Table

Kind = Literal["boolean", "number", "value"]

_NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL")
_VALUES = ("VARCHAR", "DATE", "TIMESTAMP", "TIME")
_TYPES: dict[Kind, tuple[str, ...]] = {
    "boolean": ("BOOLEAN",),
    "number": ("BOOLEAN", *_NUMBERS),
    "value": ("BOOLEAN", *_NUMBERS, *_VALUES),
}
_EXPECTED: dict[Kind, str] = {
    "boolean": "expected what is true or false of a row, like 'entropy > 0.5'",
    "number": "expected a number",
    "value": "expected a number, a text, a date or what is true or false",
}
_KINDS: dict[str, Kind] = {"where": "boolean", "limit.by": "value", "balance.by": "value"}


def check_source(source: Source, table: Table) -> None:
    """Raises BadInputError unless all SQL of a source fits its first table's columns."""
    for key, expression in source.expressions():
        check_type(key, expression, table, _KINDS.get(key, "number"))


def check_type(key: str, expression: str, table: Table, kind: Kind) -> None:
    """Raises BadInputError unless an expression gives a `kind` for each row of `labels`.

    Args:
        key: of the recipe, for the message.
        expression: SQL that the user wrote.
        table: whose columns it is over; data are not looked at.
        kind: what is expected.
    """
    _refuse_rows(key, expression, table, text.check_expression(expression, key))
    with duckdb.connect(":memory:") as con:
        con.register("labels", table.schema.empty_table())
        try:
            # As a WHERE, which may not hold what would see other rows.
            con.sql(f"SELECT 1 FROM labels WHERE ({expression}\n) IS NULL").to_arrow_table()
            found = str(con.sql(f"SELECT ({expression}\n) FROM labels").types[0])
        except duckdb.Error as error:
            raise BadInputError(f"{key} {expression!r}: {text.one_line(error)}") from error
    # U for unsigned; what follows is a DECIMAL's width, a TIMESTAMP's zone, or a list's brackets.
    if "[" in found or not found.removeprefix("U").startswith(_TYPES[kind]):
        raise BadInputError(f"{key} {expression!r} is {found}: {_EXPECTED[kind]}")


def _refuse_rows(key: str, expression: str, table: Table, tree: text.Tree) -> None:
    """Refuses what is not a column: a whole row, which where it is stored may decide, or a user."""
    columns = {name.lower() for name in table.schema.names}
    for node in text.dicts(tree):
        # DuckDB takes "labels.md5()" for md5(labels).
        whole = str(node.get("schema") or "").lower() == "labels"
        names = [name.lower() for name in node.get("column_names", ())]
        known = columns.intersection(names)  # of what follows a column, it is a field
        if whole or (names and names[-1] == "labels" and not known):
            raise BadInputError(
                f"{key} {expression!r}: a whole row of labels is no value: name its columns"
            )
        if names and names[-1] in text.SESSION_WORDS and not known:
            raise BadInputError(
                f"{key} {expression!r}: {names[-1]!r} is not decided by the row alone"
            )

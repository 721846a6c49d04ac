"""What user SQL may say: one SELECT over known relations, or one expression over `labels`.

DuckDB's own parser turns the text into a tree (JSON), and the tree is judged: a WITH clause of
DuckDB may hold COPY or DELETE, and a table function may read files or memory, so that looking at
the statement's type is not enough. Nothing is run here.
"""

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any

import duckdb

from softlabels.errors import BadInputError

_QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_TABLE_FUNCTIONS = {"unnest", "range", "generate_series"}
# Words that are no function calls to the parser and yet are answered by one.
_CLOCKS = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}
# DuckDB calls these consistent; yet they depend on its release, on who runs it and where.
_ELSEWHERE = {
    *("version", "hash", "list_approx_count_distinct", "create_sort_key", "icu_sort_key"),
    *("user", "current_user", "session_user", "current_role", "current_catalog"),
    *("inet_client_addr", "inet_client_port", "inet_server_addr", "inet_server_port"),
    *("current_localtime", "current_localtimestamp", "pg_my_temp_schema", "get_block_size"),
    *("pg_conf_load_time", "pg_postmaster_start_time", "json_serialize_plan"),
}
SESSION_WORDS = frozenset({*_ELSEWHERE, "current_database", "current_schema", "current_query"})
"""Words that, without brackets, are a column's name where there is one, else a function's."""
_UNREADABLE = "the query cannot be read: "
_SCHEMAS = frozenset({"main", "temp", "system", "pg_catalog", "information_schema"})
_CSV_SETTINGS = re.compile(r"\.? Possible (?:solutions|fixes): .*?file = (.*?) delimiter = .*")
_REFUSED_FUNCTIONS = {
    "current_setting",
    "getenv",
    "getvariable",
    "pg_sleep",
    "sleep_ms",
    "write_log",
}

Tree = Mapping[str, Any]


def quote_name(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_text(text: str) -> str:
    """`text` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def one_line(error: BaseException) -> str:
    """What DuckDB says is wrong, on one line, with its suggestions and without the excerpt."""
    text = str(error).split("\n\nLINE ")[0].removeprefix("INTERNAL Error: ")
    # Of a CSV file it lists all its settings: which file it is, is enough.
    return _CSV_SETTINGS.sub(r", file \1", " ".join(text.split()))


def suggestion(name: str, known: Collection[str]) -> str:
    """ "; did you mean 'x'?" for the nearest of `known`, or nothing when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_query(sql: str, relations: Collection[str]) -> Tree:
    """The parse tree of `sql`, which is one SELECT that reads only `relations`.

    Args:
        sql: what the user wrote.
        relations: names it may read: "labels", or "name.labels" where tables have names.

    Raises:
        BadInputError: it does not parse, is another statement or several, writes in a WITH
            clause, or reads anything else: a file, a setting, a catalogue.
    """
    tree = _parse_select(sql)
    given = {entry["key"].lower() for node in _find(tree, "map") for entry in node["map"]}
    if taken := given & _catalogue_views():
        raise BadInputError(f"WITH {sorted(taken)[0]!r}: that name is DuckDB's own, choose another")
    allowed = given | {name.lower() for name in relations}
    for node in dicts(tree):
        _check_node(node, allowed, relations)
    return tree


def check_expression(where: str, key: str = "where") -> Tree:
    """The parse tree of `where`, which is one expression whose value rows alone decide.

    It must parse both bare and in parentheses, to the same tree: bare text alone could add
    clauses (`x LIMIT 3`), text in parentheses alone could close them (`x) UNION (SELECT y`).

    Args:
        where: what the user wrote.
        key: what messages call it.

    Raises:
        BadInputError: it is no single expression, holds a subquery, a parameter or a function
            that does not give the same value each time.
    """
    bare, wrapped = (_parse_where(where, text, key) for text in (f"{where}\n", f"({where}\n)"))
    if bare is None or _without_locations(bare) != _without_locations(wrapped):
        raise BadInputError(f"{key} {where!r}: expected one expression, like 'entropy > 0.5'")
    unstable = _unstable_functions()
    for node in dicts(bare):
        kind = node.get("class")
        if kind == "SUBQUERY":
            raise BadInputError(f"{key} {where!r}: a subquery is refused: it sees other rows")
        if kind == "PARAMETER":
            raise BadInputError(f"{key} {where!r}: a parameter has no value here")
        if kind in ("STAR", "POSITIONAL_REFERENCE"):
            raise BadInputError(f"{key} {where!r}: *, COLUMNS and #1 are refused: name the columns")
        names = node.get("column_names") or [node.get("function_name", "")]
        given = len(node.get("arguments", ())) + bool(node.get("schema"))  # x.age(): age(x)
        if kind == "FUNCTION" and names[-1].lower() == "age" and given == 1:
            raise BadInputError(f"{key} {where!r}: age of one argument counts from today")
        unsure = _CLOCKS if kind == "COLUMN_REF" else unstable
        if names[-1].lower() in unsure:
            raise BadInputError(f"{key} {where!r}: {names[-1]!r} is not decided by the row alone")
    return bare


def own_names() -> frozenset[str]:
    """Lower-case names of schemas and relations that DuckDB has from the start."""
    return _SCHEMAS | _catalogue_views()


def column_names(tree: Any) -> set[str]:
    """Lower-case names of all columns that a parse tree refers to, without qualifiers."""
    names = {node["column_names"][-1] for node in _find(tree, "column_names")}
    names |= {name for node in _find(tree, "using_columns") for name in node["using_columns"]}
    return {name.lower() for name in names}


def relation_names(tree: Any) -> set[str]:
    """Lower-case last names of all relations that a parse tree reads."""
    return {n["table_name"].lower() for n in dicts(tree) if n.get("type") == "BASE_TABLE"}


def relation_aliases(tree: Any) -> set[str]:
    """Lower-case names under which a query may mean a relation's whole rows."""
    named = {n[part] for n in dicts(tree) for part in ("table_name", "key") if n.get(part)}
    return {name.lower() for name in named | _aliases(tree, "from_table", "left", "right")}


def select_aliases(tree: Any) -> set[str]:
    """Lower-case names that a query gives to what it selects."""
    return {name.lower() for name in _aliases(tree, "select_list")}


def takes_all_columns(tree: Any) -> bool:
    """Whether a parse tree takes columns that it does not name: by *, NATURAL JOIN, PIVOT, #1."""
    return any(
        node.get("class") in ("STAR", "POSITIONAL_REFERENCE")
        or node.get("ref_type") == "NATURAL"
        or node.get("type") == "PIVOT"
        for node in dicts(tree)
    )


def dicts(value: Any) -> Iterator[Tree]:
    """All nodes of a parse tree, outer ones first."""
    if isinstance(value, dict):
        yield value
        for child in value.values():
            yield from dicts(child)
    elif isinstance(value, list):
        for child in value:
            yield from dicts(child)


def _aliases(tree: Any, *parts: str) -> set[str]:
    found = [node[part] for node in dicts(tree) for part in parts if node.get(part)]
    nodes = [node for part in found for node in (part if isinstance(part, list) else [part])]
    return {node["alias"] for node in nodes if node.get("alias")}


def _parse_select(sql: str) -> Tree:
    with _parser().cursor() as con:
        try:
            statements = con.extract_statements(sql)
        except duckdb.Error as error:
            raise BadInputError(f"{_UNREADABLE}{one_line(error)}") from error
        kinds = [_kind(statement) for statement in statements]
        if kinds != ["SELECT"]:
            found = ", ".join(kinds) or "nothing"
            raise BadInputError(f"a query is exactly one SELECT, found {found}")
        parsed = json.loads(con.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()[0][0])
    if parsed["error"] or len(parsed["statements"]) != 1:
        reason = parsed.get("error_message", "several statements")
        raise BadInputError(f"a query is exactly one SELECT: {' '.join(reason.split())}")
    tree: Tree = parsed["statements"][0]["node"]
    return tree


def _kind(statement: duckdb.Statement) -> str:
    try:
        return str(statement.type.name)
    except ValueError:  # of some kinds, such as UPDATE EXTENSIONS, it knows no name
        return "another statement"


def _parse_where(where: str, clause: str, key: str) -> Tree | None:
    try:
        tree = _parse_select(f"SELECT 1 FROM labels WHERE {clause}")
    except BadInputError as error:
        reason = str(error).removeprefix(_UNREADABLE)
        raise BadInputError(f"{key} {where!r}: expected one expression: {reason}") from error
    return tree.get("where_clause")


def _check_node(node: Tree, allowed: Collection[str], relations: Collection[str]) -> None:
    kind = node.get("type")
    if "cte_map" in node and kind not in _QUERY_NODES:
        raise BadInputError(f"a query only reads: {str(kind).split('_')[0]} is refused")
    if kind == "TABLE_FUNCTION":
        name = node["function"].get("function_name", "")
        if name.lower() not in _TABLE_FUNCTIONS:
            raise BadInputError(
                f"table function {name!r} is refused: a query reads {_listed(relations)}"
            )
    if kind == "BASE_TABLE":
        path = [node.get("catalog_name"), node.get("schema_name"), node["table_name"]]
        name = ".".join(part for part in path if part)
        if name.lower() not in allowed:
            raise BadInputError(
                f"there is no relation {name!r}: a query reads {_listed(relations)}"
                f"{suggestion(name, relations)}"
            )
    if kind == "SHOW_REF" and not node.get("query"):
        raise BadInputError(f"SHOW is refused; DESCRIBE works on {_listed(relations)}")
    if node.get("class") == "FUNCTION" and node["function_name"].lower() in _REFUSED_FUNCTIONS:
        raise BadInputError(f"function {node['function_name']!r} is refused in a query")


@cache
def _parser() -> duckdb.DuckDBPyConnection:
    # Opening a database takes longer than parsing; this one never holds or runs anything of users.
    return duckdb.connect(":memory:")


@cache
def _catalogue_views() -> frozenset[str]:
    # A WITH name is allowed wherever it stands, so outside its WITH it must mean nothing.
    with _parser().cursor() as con:
        rows = con.execute("SELECT view_name FROM duckdb_views() WHERE internal").fetchall()
    return frozenset(name.lower() for (name,) in rows)


@cache
def _unstable_functions() -> frozenset[str]:
    """Names of functions, and of macros over them, that may give another value next time."""
    with _parser().cursor() as con:
        rows = con.execute(
            "SELECT function_name, stability, macro_definition FROM duckdb_functions() "
            "WHERE function_type IN ('scalar', 'macro')"
        ).fetchall()
    found = {name for name, stability, _ in rows if stability not in (None, "CONSISTENT")}
    found |= _CLOCKS | _ELSEWHERE | _REFUSED_FUNCTIONS
    macros = [(name, set(re.findall(r"\w+", body))) for name, _, body in rows if body]
    return frozenset(found | {name for name, words in macros if words & found})


def _listed(relations: Collection[str]) -> str:
    return ", ".join(sorted(relations))


def _find(value: Any, key: str) -> Iterator[Tree]:
    return (node for node in dicts(value) if key in node)


def _without_locations(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_locations(child)
            for key, child in value.items()
            if not key.startswith("query_location")
        }
    if isinstance(value, list):
        return [_without_locations(child) for child in value]
    return value

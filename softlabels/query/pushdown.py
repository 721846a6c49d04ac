"""Which files of which tables a whole query needs, by the bounds that the log records.

A file can be left out when none of its rows comes through a WHERE, wherever its table is read.
Comparisons with a column that is NULL are not fulfilled, so that this holds for outer joins too:
a row that finds no partner because the partner's file is left out is refused by the WHERE. Where
rows are counted before WHERE (samples, positional and ASOF joins), or it is not certain what a
name means (aliases, CTEs of a relation's name), all files are kept.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from softlabels.query.prune import Bounds, may_match
from softlabels.query.relations import CLASSES, ENTRIES, POSITIONS
from softlabels.query.sql import Tree, dicts
from softlabels.store.table import Table, TableFile

KINDS = ("labels", "positions", "entries")

_ROUNDING = 2.0**-10
"""Relative: a row's `entropy` is rounded to float16's precision, a position's need not be."""

_KEEPING_LEFT = {"INNER", "LEFT", "RIGHT", "OUTER", "FULL", "SEMI", "ANTI"}
_KEEPING_RIGHT = _KEEPING_LEFT - {"SEMI", "ANTI"}
_JOINS = {"REGULAR", "CROSS", "NATURAL"}


@dataclass(frozen=True)
class _Leaf:
    """A relation in a FROM: its node, and whether WHERE judges each of its rows by itself."""

    node: Tree
    judged: bool

    @property
    def name(self) -> str:
        """The lower-case name under which columns of it are qualified."""
        function = self.node.get("function") or {}
        name = self.node.get("alias") or self.node.get("table_name")
        return str(name or function.get("function_name") or "").lower()

    @property
    def path(self) -> tuple[str, str]:
        """Its lower-case schema and name; empty where it has none."""
        schema, name = self.node.get("schema_name") or "", self.node.get("table_name") or ""
        return str(schema).lower(), str(name).lower()


def needed_files(tree: Tree, tables: Mapping[str, Table]) -> dict[str, list[TableFile]]:
    """The files of each table, by its name, that may hold a row which the query shows.

    Args:
        tree: of a query, as `check_query` gives it.
        tables: by name; the name "" stands for relations in no schema.
    """
    judges_of = {id(node): judge for node, judge in _judges(tree, tables)}
    found = {}
    for name, table in tables.items():
        readers = [node for node in dicts(tree) if _reads(node, name)]
        judges = [judges_of.get(id(node)) for node in readers]
        kinds = [str(node["table_name"]).lower() for node in readers]
        found[name] = [
            file
            for file in table.files
            if any(
                judge is None or judge(_bounds(file, kind))
                for judge, kind in zip(judges, kinds, strict=True)
            )
        ]
    return found


def _reads(node: Tree, table: str) -> bool:
    if node.get("type") != "BASE_TABLE" or node["table_name"].lower() not in KINDS:
        return False
    return bool((node.get("schema_name") or "").lower() == table.lower())


def _judges(
    tree: Tree, tables: Mapping[str, Table]
) -> Iterator[tuple[Tree, Callable[[Bounds], bool]]]:
    """Relations that a WHERE judges, with whether a row within bounds may come through."""
    hidden = {entry["key"].lower() for node in dicts(tree) for entry in node.get("map") or ()}
    columns = {path: of for path, of in _columns(tables).items() if path[1] not in hidden}
    for node in dicts(tree):
        where, source = node.get("where_clause"), node.get("from_table")
        if node.get("type") != "SELECT_NODE" or not where or not source or node.get("sample"):
            continue
        leaves = list(_leaves(source, True))
        aliases = {e.get("alias", "").lower() for e in node["select_list"]} - {""}
        for leaf in leaves:
            if leaf.judged and leaf.path in columns:
                names = _names(leaf, leaves, aliases, columns)
                yield leaf.node, _judge(where, names)


def _judge(where: Tree, names: Callable[[Sequence[str]], str]) -> Callable[[Bounds], bool]:
    return lambda bounds: may_match(where, bounds, names)


def _leaves(source: Tree, judged: bool) -> Iterator[_Leaf]:
    if source.get("type") != "JOIN":
        plain = not source.get("sample") and not source.get("column_name_alias")
        yield _Leaf(source, judged and source.get("type") == "BASE_TABLE" and plain)
        return
    kind = source.get("join_type")
    known = source.get("ref_type") in _JOINS and not source.get("alias")
    judged = judged and known and not source.get("sample")
    yield from _leaves(source["left"], judged and kind in _KEEPING_LEFT)
    yield from _leaves(source["right"], judged and kind in _KEEPING_RIGHT)


def _names(
    leaf: _Leaf,
    leaves: Sequence[_Leaf],
    aliases: set[str],
    columns: Mapping[tuple[str, str], frozenset[str]],
) -> Callable[[Sequence[str]], str]:
    """Gives for a name in WHERE the column of `leaf` that it certainly means, else ""."""
    own = columns[leaf.path]
    visible = [other.name for other in leaves]
    others = [columns.get(other.path) for other in leaves if other is not leaf]

    def column(names: Sequence[str]) -> str:
        *before, last = (name.lower() for name in names)
        if last not in own:
            return ""
        if not before:
            alone = all(other is not None and last not in other for other in others)
            return last if alone and last not in aliases else ""
        if len(before) == 1:
            return last if before[0] == leaf.name and visible.count(leaf.name) == 1 else ""
        whole = not leaf.node.get("alias") and tuple(before) == leaf.path
        return last if whole and before[0] not in visible else ""

    return column


def _columns(tables: Mapping[str, Table]) -> dict[tuple[str, str], frozenset[str]]:
    found: dict[tuple[str, str], frozenset[str]] = {}
    for name, table in tables.items():
        schema = name.lower()
        found[schema, "labels"] = frozenset(column.lower() for column in table.schema.names)
        found[schema, "positions"] = frozenset(POSITIONS)
        found[schema, "entries"] = frozenset(ENTRIES)
        found[schema, "classes"] = frozenset(CLASSES)
    return found


def _bounds(file: TableFile, kind: str) -> Bounds:
    """What is known of a relation's rows that a file makes."""
    known = {name.lower(): bounds for name, bounds in file.bounds.items()}
    if kind == "labels":
        return known
    found = {"view": known["view"]} if "view" in known else {}
    # Summaries of a row are its position's where it has one. NULL in a row is not always NULL in
    # its position: an unknown entropy is NaN, which SQL takes for the greatest number.
    if kind == "positions" and known.get("num_positions") == (1, 1):
        names = {"label": "label_id", "top1_id": "top1_id"}
        found |= {to: known[of] for of, to in names.items() if of in known}
        if "entropy" in known:
            least = known["entropy"][0]
            found["entropy"] = (least - abs(least) * _ROUNDING - 1e-7, math.inf)
    return found

"""One source of a recipe on its way into a plan: the rows that are left, and of which tables.

The rows that a source's `weight`, `balance` and the like then read are `mix`'s to say.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from softlabels.errors import BadInputError, MismatchError, RecipeMismatchError
from softlabels.query.choosing import check_choose, choose_teachers
from softlabels.query.ensemble import Aligned, align, check_members
from softlabels.query.excluding import Excluded
from softlabels.query.expressions import check_source
from softlabels.query.judging import Judged, judge
from softlabels.query.recipe import Recipe, Source
from softlabels.query.sampling import Numbers, Taken
from softlabels.query.selection import Selection, select
from softlabels.rules import PositionRules
from softlabels.store.table import Table


@dataclass(frozen=True)
class Piece:
    """Rows of a source that lie in one table version.

    Attributes:
        teacher: its name in the source; "" of a plain one.
        table: the version.
        rows: int64 [m], rising; of an ensemble's further members in the order of the first's.
        places: int64 [m], of each of them the row of the selection.
        rules: of its positions.
        temperature: at which its targets are taken.
    """

    teacher: str
    table: Table
    rows: Numbers
    places: Numbers
    rules: PositionRules | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Gathered:
    """What a source selects.

    Attributes:
        name, source: in the recipe.
        selection: rows of its first table.
        pieces: the same rows in the tables that are read; of an ensemble each has all of them.
        aligned: of an ensemble, with the weights.
        judged: what position rules said, by piece.
    """

    name: str
    source: Source
    selection: Selection
    pieces: Sequence[Piece]
    aligned: Aligned | None = None
    judged: Sequence[Judged] = ()

    @property
    def kept(self) -> int:
        """Rows that are left."""
        return len(self.selection.rows)

    @property
    def table(self) -> Table:
        """The table that says which rows there are."""
        return self.pieces[0].table


def check(name: str, source: Source, tables: Mapping[str, Table]) -> None:
    """Raises BadInputError or RecipeMismatchError where a source cannot be meant of its tables.

    Data are not looked at.
    """
    try:
        check_source(source, next(iter(tables.values())))
        if source.choose is not None:
            check_choose(source.choose, tables)
        if source.ensemble is not None:
            check_members(tables, source.ensemble)
    except BadInputError as error:
        raise BadInputError(f"source {name!r}: {error}") from error
    except MismatchError as error:
        raise RecipeMismatchError(f"source {name!r}: {error}") from error


def gather(
    recipe: Recipe,
    name: str,
    tables: Mapping[str, Table],
    with_keys: bool,
    taken: Taken | None,
    excluded: Excluded | None = None,
) -> Gathered:
    """The rows of one source; adds them to `taken`.

    Args:
        recipe: the whole one.
        name: of the source.
        tables: of its teachers, by name, opened.
        with_keys: whether rows need keys for the sake of the recipe.
        taken: examples of earlier sources, where an example comes once.
        excluded: what its `exclude` holds.

    Raises:
        BadInputError: it is left without rows, or its SQL cannot be computed.
        RecipeMismatchError: its tables do not fit each other.
        DataError: a table holds an example twice.
        IntegrityError: a file is not as its table's log says.
    """
    source = recipe.sources[name]
    try:
        table = next(iter(tables.values()))
        selection = select(table, source, recipe.seed, with_keys, taken, excluded)
        found = _gathered(name, source, tables, selection)
    except BadInputError as error:
        raise BadInputError(f"source {name!r}: {error}") from error
    except MismatchError as error:
        raise RecipeMismatchError(f"source {name!r}: {error}") from error
    _require_rows(found)
    if taken is not None and found.selection.keys is not None:
        taken.add(found.selection.keys, found.selection.columns["low"])
    return found


def _gathered(
    name: str, source: Source, tables: Mapping[str, Table], selection: Selection
) -> Gathered:
    if not len(selection.rows):
        (teacher, table), *_ = tables.items()
        empty = Piece(teacher, table, selection.rows, selection.rows)
        return Gathered(name, source, selection, [empty])
    if source.choose is not None:
        chosen = choose_teachers(source.choose, tables, selection.rows)
        columns = {**selection.columns, "teacher": chosen.teacher, "row": chosen.row}
        dropped, values = selection.dropped, selection.values
        selection = Selection(selection.rows, selection.keys, dropped, columns, values)
        return _judged(name, source, _pieces(tables, selection), selection)
    (teacher, table), *_ = tables.items()
    places = np.arange(len(selection.rows), dtype=np.int64)
    found = _judged(name, source, [Piece(teacher, table, selection.rows, places)], selection)
    if source.ensemble is None or not found.kept:
        return found
    aligned = align(tables, source.ensemble, found.selection.rows)
    here = np.isin(found.selection.rows, aligned.first, assume_unique=True)
    left = found.selection.keep(here)
    left = Selection(
        left.rows, left.keys, {**left.dropped, **aligned.dropped}, left.columns, left.values
    )
    places = np.arange(len(left.rows), dtype=np.int64)
    members = [
        Piece(
            member,
            tables[member],
            rows,
            places,
            found.pieces[0].rules if number == 0 else None,
            source.ensemble[member].temperature,
        )
        for number, (member, rows) in enumerate(aligned.rows.items())
    ]
    return Gathered(name, source, left, members, aligned, found.judged)


def _pieces(tables: Mapping[str, Table], selection: Selection) -> list[Piece]:
    """Of chosen teachers."""
    pieces = []
    for number, (teacher, table) in enumerate(tables.items()):
        places = np.flatnonzero(selection.columns["teacher"] == number)
        rows = selection.columns["row"][places]
        order = np.argsort(rows, kind="stable")
        pieces.append(Piece(teacher, table, rows[order], places[order]))
    return pieces


def _judged(name: str, source: Source, pieces: Sequence[Piece], selection: Selection) -> Gathered:
    """The rows with a position that passes the source's rules."""
    if source.positions is None:
        return Gathered(name, source, selection, pieces)
    left = np.zeros(len(selection.rows), np.bool_)
    judged: list[Judged] = []
    rules: list[PositionRules | None] = []
    for piece in pieces:
        rules.append(None)
        if len(piece.rows):
            judged.append(judge(piece.table, source.positions, piece.rows))
            rules[-1] = judged[-1].rules
            left[piece.places[judged[-1].left]] = True
    selection = selection.keep(left, "positions")
    moved = np.cumsum(left) - 1
    kept = []
    for piece, rule in zip(pieces, rules, strict=True):
        mine = left[piece.places]
        places = moved[piece.places[mine]].astype(np.int64)
        kept.append(Piece(piece.teacher, piece.table, piece.rows[mine], places, rule))
    return Gathered(name, source, selection, kept, None, judged)


def _require_rows(found: Gathered) -> None:
    if found.kept:
        return
    reasons = ", ".join(f"{why} drops {n}" for why, n in found.selection.dropped.items())
    positions, unknown = (
        sum(getattr(judged, part) for judged in found.judged) for part in ("positions", "unknown")
    )
    if unknown:
        reasons += (
            f"; {unknown} of {positions} positions lack a value that the rule compares, and so "
            "fail it"
        )
    reference = next(iter(found.source.references.values()))
    raise BadInputError(
        f"source {found.name!r} is left without rows: {reference!r} has {found.table.num_rows}"
        + (f", {reasons}" if reasons else "")
    )

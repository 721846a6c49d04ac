"""The best of several teachers for each example: which table it is read from."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabels.errors import BadInputError
from softlabels.query.expressions import check_type
from softlabels.query.matching import match
from softlabels.query.recipe import Choose
from softlabels.query.selection import Numbers
from softlabels.store.table import Table


@dataclass(frozen=True)
class Chosen:
    """Of each example, [n], the teacher's place in the list and the row number in its table."""

    teacher: Numbers
    row: Numbers


def check_choose(choose: Choose, tables: Mapping[str, Table]) -> None:
    """Raises BadInputError unless each table has the columns of `by` and `agreeing`.

    Args:
        choose: of a recipe.
        tables: of its teachers, by name, in its order.
    """
    first, *_ = tables
    for name, table in tables.items():
        try:
            check_type("choose.by", choose.by, table, "number")
        except BadInputError as error:
            raise BadInputError(f"teacher {name!r}: {error}") from error
        if choose.agreeing is not None and table.contents.alignment is not None:
            raise BadInputError(
                f"choose.agreeing {choose.agreeing!r}: teacher {name!r} labels sequences, which "
                "have a first class at each position, not one a row: choose by a value alone"
            )
    if choose.agreeing is not None:
        check_type("choose.agreeing", choose.agreeing, tables[first], "number")


def choose_teachers(choose: Choose, tables: Mapping[str, Table], rows: Numbers) -> Chosen:
    """The teacher of each of the first table's `rows`; it is one whose table has the example.

    Raises:
        DataError: a table holds an example twice.
        IntegrityError: a file is not as its table's log says.
    """
    asked = {name: [choose.by] for name in tables}
    first, *_ = tables
    if choose.agreeing is not None:
        for expressions in asked.values():
            expressions.append("top1_id")
        asked[first].append(choose.agreeing)
    matched = match(tables, rows, asked)
    agreed = np.zeros(len(rows), np.bool_)
    wanted = matched.values[first][2] if choose.agreeing is not None else None
    best = np.full(len(rows), -np.inf)
    teacher = np.full(len(rows), -1, np.int64)
    row = np.full(len(rows), -1, np.int64)
    for place, name in enumerate(tables):
        values = matched.values[name]
        score = np.where(np.isnan(values[0]), -np.inf, values[0])
        agrees = np.zeros(len(rows), np.bool_) if wanted is None else values[1] == wanted
        # The first has every example; another one that lacks it has no value, and so is no better.
        better = _better(score, agrees, best, agreed) | (teacher < 0)
        best[better], agreed[better] = score[better], agrees[better]
        teacher[better], row[better] = place, matched.rows[name][better]
    return Chosen(teacher, row)


def _better(
    score: npt.NDArray[np.float64],
    agrees: npt.NDArray[np.bool_],
    best: npt.NDArray[np.float64],
    agreed: npt.NDArray[np.bool_],
) -> npt.NDArray[np.bool_]:
    return np.asarray((agrees & ~agreed) | ((agrees == agreed) & (score > best)))

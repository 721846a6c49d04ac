"""The best of several teachers for each example: which table it is read from."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import BadInputError
from softlabels.query.expressions import check_type
from softlabels.query.matching import ONE_LABEL, match
from softlabels.query.recipe import Choose
from softlabels.query.selection import Numbers
from softlabels.query.sql import suggestion
from softlabels.store.table import Table

_SEQUENCE = ("view_params", "label_ids")
"""Teachers may have labelled other positions of a sequence, but not otherwise the same ones."""


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
        schema = tables[first].schema
        integers = [f.name for f in schema if pa.types.is_integer(f.type)]
        if choose.agreeing not in integers:
            raise BadInputError(
                f"choose.agreeing {choose.agreeing!r}: expected a column of class ids, of "
                f"{', '.join(integers)}{suggestion(choose.agreeing, integers)}"
            )


def choose_teachers(choose: Choose, tables: Mapping[str, Table], rows: Numbers) -> Chosen:
    """The teacher of each of the first table's `rows`; it is one whose table has the example.

    Raises:
        DataError: a table holds an example twice.
        BadInputError: a teacher has none of the examples, or none has a value.
        MismatchError: two tables have different hard labels or views of an example.
        IntegrityError: a file is not as its table's log says.
    """
    asked = {name: [choose.by] for name in tables}
    first, *_ = tables
    if choose.agreeing is not None:
        for expressions in asked.values():
            expressions.append("top1_id")
        asked[first].append(choose.agreeing)
    sequences = tables[first].contents.alignment is not None
    matched = match(tables, rows, asked, (), _SEQUENCE if sequences else ONE_LABEL)
    _require_choice(choose, matched.rows, matched.values)
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


def _require_choice(
    choose: Choose,
    rows: Mapping[str, Numbers],
    values: Mapping[str, npt.NDArray[np.float64]],
) -> None:
    """Raises BadInputError where one teacher would be read for all examples, whatever they are."""
    first, *others = rows
    for name in others:
        if len(rows[name]) and not (rows[name] >= 0).any():
            raise BadInputError(
                f"choose: teacher {name!r} has none of the {len(rows[name])} examples of {first!r}"
            )
    if len(rows[first]) and all(np.isnan(value[0]).all() for value in values.values()):
        raise BadInputError(
            f"choose.by {choose.by!r} has no value for any example of any teacher: there is "
            "nothing to choose by"
        )


def _better(
    score: npt.NDArray[np.float64],
    agrees: npt.NDArray[np.bool_],
    best: npt.NDArray[np.float64],
    agreed: npt.NDArray[np.bool_],
) -> npt.NDArray[np.bool_]:
    return np.asarray((agrees & ~agreed) | ((agrees == agreed) & (score > best)))

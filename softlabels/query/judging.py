"""Position rules at work on the rows that a source takes: thresholds, rows left, counts.

The values are judged by the very code that a student's reader runs, so that no row of a plan is
left without a position there.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabels.errors import BadInputError
from softlabels.query.positions import Positions
from softlabels.query.reading import read_targets
from softlabels.query.selection import Numbers
from softlabels.rules import Column, PositionRules, known, per_row, stored_columns, values_of
from softlabels.store.table import Table

_PENDING = 1 << 20
"""Values that are collected before equal ones are joined."""


@dataclass(frozen=True)
class Judged:
    """What rules leave of some rows.

    Attributes:
        left: bool [n], rows with at least one position.
        rules: with thresholds in the place of shares.
        positions: of the rows that were judged.
        kept: of them, how many pass.
        unknown: of them, how many fail because a value is not known.
    """

    left: npt.NDArray[np.bool_]
    rules: PositionRules
    positions: int
    kept: int
    unknown: int


def judge(table: Table, positions: Positions, rows: Numbers) -> Judged:
    """What is left of `rows`, rising, of a table.

    Raises:
        BadInputError: a share is asked by a column that no position knows.
        IntegrityError: a file is not as the log says.
    """
    threshold = None
    if positions.ranked is not None:
        values, counts, total = _distribution(table, positions.ranked, rows)
        if not len(values):
            raise BadInputError(
                f"positions: top {positions.top!r} by {positions.by!r}: none of {total} positions "
                "of the selected rows has a value of that column"
            )
        threshold = positions.threshold(values, counts, total)
    rules = positions.rules(threshold)
    left, total, kept, unknown = [np.zeros(0, np.bool_)], 0, 0, 0
    for _, targets in read_targets(table, rows, rules.columns):
        passed = rules.keep(targets)
        left.append(per_row(passed, targets.num_positions) > 0)
        total += len(passed)
        kept += int(passed.sum())
        unknown += int(rules.unknown(targets).sum())
    return Judged(np.concatenate(left), rules, total, kept, unknown)


def _distribution(
    table: Table, column: Column, rows: Numbers
) -> tuple[npt.NDArray[np.float64], Numbers, int]:
    """Known values of a column, each once and rising; their counts; all positions."""
    values, counts = np.zeros(0, np.float64), np.zeros(0, np.int64)
    pending: list[npt.NDArray[np.float64]] = []
    total = waiting = 0
    for _, targets in read_targets(table, rows, stored_columns([column])):
        total += len(targets.ids)
        found = values_of(column, targets)
        if found is None:
            continue
        pending.append(found[known(column, found)].astype(np.float64))
        waiting += len(pending[-1])
        if waiting > _PENDING:
            values, counts = _counted(values, counts, pending)
            pending, waiting = [], 0
    return *_counted(values, counts, pending), total


def _counted(
    values: npt.NDArray[np.float64], counts: Numbers, pending: list[npt.NDArray[np.float64]]
) -> tuple[npt.NDArray[np.float64], Numbers]:
    new, of_new = np.unique(np.concatenate([np.zeros(0), *pending]), return_counts=True)
    joined, place = np.unique(np.concatenate([values, new]), return_inverse=True)
    sums = np.zeros(len(joined), np.int64)
    np.add.at(sums, place, np.concatenate([counts, of_new]))
    return joined, sums

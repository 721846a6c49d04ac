"""Rules of positions: which positions of a row are learnt from, and with what weight.

A plan carries them as comparisons with constants, so that whoever made it and whoever reads it
decide alike on any machine: float32 is compared with float32, and nothing is computed whose last
bit could differ. A position whose value is unknown fails every comparison.
"""

import operator
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from softlabels.targets import Floats, Ints, SoftTargets

Column = Literal["entropy", "tail_logprob", "label_logprob", "label_rank", "top1_logprob"]
Operator = Literal["<", "<=", ">", ">=", "=", "<>"]

COLUMNS: tuple[Column, ...] = get_args(Column)
"""What rules compare: values a position, in nats; `top1_logprob` is the first stored logprob."""

LARGEST = float(np.finfo(np.float32).max)
"""Of constants: infinity is no JSON."""

_STORED: dict[Column, tuple[str, ...]] = {
    "entropy": ("position_entropy",),
    "tail_logprob": ("tail_logprob",),
    "label_logprob": ("label_logprobs",),
    "label_rank": ("label_ranks",),
    "top1_logprob": ("topk_ids", "topk_logprobs"),
}

_OPERATORS: dict[Operator, Any] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "<>": operator.ne,
}

Mask = npt.NDArray[np.bool_]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Condition(_Frozen):
    """One comparison of a position's value with a constant, which is rounded as the value is."""

    column: Column
    operator: Operator
    constant: Annotated[FiniteFloat, Field(ge=-LARGEST, le=LARGEST)]

    def __str__(self) -> str:
        return f"{self.column} {self.operator} {self._compared!s}".removesuffix(".0")

    def holds(self, targets: SoftTargets) -> Mask:
        """Where it is so, bool [N]."""
        values = values_of(self.column, targets)
        if values is None:
            return np.zeros(len(targets.ids), np.bool_)
        compared = _OPERATORS[self.operator](values, self._compared)
        return np.asarray(compared & known(self.column, values))

    @property
    def _compared(self) -> float | np.float32:
        # Ranks may need more than the 24 bits of a float32.
        return self.constant if self.column == "label_rank" else np.float32(self.constant)


class PositionWeight(_Frozen):
    """The weight of positions that pass all of `where`."""

    where: tuple[Condition, ...] = Field(min_length=1)
    weight: Annotated[FiniteFloat, Field(gt=0, le=LARGEST)]

    def __str__(self) -> str:
        return f"weight {self.weight:g} where {_joined(self.where)}"


class PositionRules(_Frozen):
    """What becomes of a table's positions.

    Attributes:
        where: a position is kept when it passes all of these.
        weights: of a kept position, the first whose conditions it passes gives its weight; 1
            where there is none.
    """

    where: tuple[Condition, ...] = ()
    weights: tuple[PositionWeight, ...] = ()

    def __str__(self) -> str:
        kept = f"keeps {_joined(self.where)}" if self.where else "keeps all"
        return "; ".join([kept, *map(str, self.weights)])

    @property
    def columns(self) -> tuple[str, ...]:
        """The table's columns that these rules need."""
        conditions = [*self.where, *(c for rule in self.weights for c in rule.where)]
        return stored_columns([condition.column for condition in conditions])

    def keep(self, targets: SoftTargets) -> Mask:
        """Which positions stay, bool [N]."""
        return _all(self.where, targets)

    def unknown(self, targets: SoftTargets) -> Mask:
        """Which positions lack a value that `where` asks for, bool [N]."""
        missing = np.zeros(len(targets.ids), np.bool_)
        for column in {condition.column for condition in self.where}:
            values = values_of(column, targets)
            missing |= True if values is None else ~known(column, values)
        return missing

    def weigh(self, targets: SoftTargets) -> Floats:
        """The weight of each position, float32 [N]."""
        weights = np.ones(len(targets.ids), np.float32)
        for rule in reversed(self.weights):  # the first that holds is written last
            weights[_all(rule.where, targets)] = rule.weight
        return weights


def values_of(column: Column, targets: SoftTargets) -> npt.NDArray[Any] | None:
    """A column's values, float32 [N] (ranks int32); None where no row knows it."""
    if column == "top1_logprob":
        return targets.logprobs[:, 0] if targets.k else None
    found: dict[str, npt.NDArray[Any] | None] = {
        "entropy": targets.entropy,
        "tail_logprob": targets.tail,
        "label_logprob": targets.label_logprobs,
        "label_rank": targets.label_ranks,
    }
    return found[column]


def known(column: Column, values: npt.NDArray[Any]) -> Mask:
    """Where a column's value is known, bool [N]: no NaN, no rank -1, no padding at the top."""
    if column == "label_rank":
        return np.asarray(values >= 0)
    if column == "top1_logprob":
        return np.asarray(values > -np.inf)
    return np.asarray(~np.isnan(values))


def per_row(keep: Mask, num_positions: Ints) -> Ints:
    """How many positions of each row `keep` holds, int32 [B]."""
    ends = np.cumsum(num_positions)
    before = np.zeros(len(keep) + 1, np.int32)
    np.cumsum(keep, out=before[1:])
    return np.asarray(before[ends] - before[ends - num_positions], np.int32)


def stored_columns(columns: Sequence[Column]) -> tuple[str, ...]:
    """The table's columns that hold the values of `columns`."""
    return tuple(dict.fromkeys(name for column in columns for name in _STORED[column]))


def _all(conditions: Sequence[Condition], targets: SoftTargets) -> Mask:
    passed = np.ones(len(targets.ids), np.bool_)
    for condition in conditions:
        passed &= condition.holds(targets)
    return passed


def _joined(conditions: Sequence[Condition]) -> str:
    return " and ".join(map(str, conditions))

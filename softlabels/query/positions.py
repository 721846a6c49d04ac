"""A recipe's words about positions, and what a plan holds in their place.

    positions: "entropy > 0.5 and label_rank > 0"     # comparisons joined by and

    positions:
      where: "label_logprob < -0.1"
      top: 0.2                                        # the fifth with the greatest value of
      by: entropy                                     # this; "-top1_prob": the lowest first
      weights:                                        # the first that holds; 1 where none does
        - {where: "entropy < 0.1", weight: 0.25}

Columns are entropy, tail_logprob, label_logprob, label_rank and top1_prob, which is exp of the
first stored log-probability. A position whose value is unknown fails every comparison of it.
"""

import math
import re
from fractions import Fraction
from typing import Annotated, Any, Self, cast

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from softlabels.query.sql import suggestion
from softlabels.rules import (
    LARGEST,
    Column,
    Condition,
    Operator,
    PositionRules,
    PositionWeight,
)
from softlabels.specs import RealNumber

COLUMNS = ("entropy", "tail_logprob", "label_logprob", "label_rank", "top1_prob")

SMALLEST = float(np.finfo(np.float32).tiny)
"""Of weights: smaller ones lose digits in a float32, then are 0."""


def _in_float32(value: float) -> float:
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(f"expected {SMALLEST:.3g} to {LARGEST:.3g}, what a float32 holds")
    return value


LossWeight = Annotated[RealNumber, Field(gt=0), AfterValidator(_in_float32)]

_COMPARISON = re.compile(
    r"\s*([A-Za-z_]\w*)\s*(<=|>=|<>|<|>|=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
)
_AND = re.compile(r"\band\b", re.IGNORECASE)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)


class Weight(_Settings):
    """What some positions weigh in the loss; all others weigh 1.

    Attributes:
        where: comparisons joined by "and", such as "entropy < 0.1".
        weight: of positions that pass them.
    """

    where: str
    weight: LossWeight

    @field_validator("where")
    @classmethod
    def _is_comparisons(cls, where: str) -> str:
        parse(where)
        return where


class Positions(_Settings):
    """Which positions of a source's rows are learnt from, and with what weight.

    Attributes:
        where: comparisons that a position must pass; None: all do.
        top: share, above 0 to 1, of all positions of the selected rows: those with the greatest
            value of `by`, whether they pass `where` or not. Ties at the border are all kept.
        by: a column, or "-" and a column for those with the lowest value.
        weights: of positions that are kept; the first whose `where` holds counts.
    """

    where: str | None = None
    top: Annotated[RealNumber, Field(gt=0, le=1)] | None = None
    by: str | None = None
    weights: Annotated[tuple[Weight, ...], Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_is_where(cls, value: Any) -> Any:
        return {"where": value} if isinstance(value, str) else value

    @field_validator("where")
    @classmethod
    def _is_comparisons(cls, where: str | None) -> str | None:
        if where is not None:
            parse(where)
        return where

    @field_validator("by")
    @classmethod
    def _is_a_column(cls, by: str | None) -> str | None:
        if by is not None:
            _column(by.removeprefix("-").strip())
        return by

    @model_validator(mode="after")
    def _top_and_by(self) -> Self:
        if (self.top is None) != (self.by is None):
            raise ValueError("top says how many positions, by says of which column: give both")
        if self.where is None and self.top is None and self.weights is None:
            raise ValueError("positions says nothing: give where, top and by, or weights")
        return self

    @property
    def ranked(self) -> Column | None:
        """The column that `top` goes by."""
        return None if self.by is None else _column(self.by.removeprefix("-").strip())

    def rules(self, threshold: Condition | None = None) -> PositionRules:
        """What a plan holds; `threshold` stands for `top`."""
        where = parse(self.where) if self.where is not None else ()
        return PositionRules(
            where=where if threshold is None else (*where, threshold),
            weights=tuple(
                # As it is stored, so that reading a plan gives the plan.
                PositionWeight(where=parse(w.where), weight=float(np.float32(w.weight)))
                for w in self.weights or ()
            ),
        )

    def threshold(
        self, values: npt.NDArray[Any], counts: npt.NDArray[np.int64], total: int
    ) -> Condition:
        """The comparison that keeps `top` of all positions.

        Args:
            values: known values of the column of `by`, each once, rising.
            counts: positions of each.
            total: all positions, those of unknown value too.
        """
        if self.top is None or self.by is None or self.ranked is None:
            raise ValueError("these positions ask for no share")
        # The decimal that was written, not its nearest binary float: 0.2 is one fifth.
        wanted = math.ceil(Fraction(str(self.top)) * total)
        lowest = self.by.startswith("-")
        if not lowest:
            values, counts = values[::-1], counts[::-1]
        place = min(int(np.searchsorted(np.cumsum(counts), wanted)), len(values) - 1)
        return _border(self.ranked, "<=" if lowest else ">=", float(values[place]))


def parse(text: str) -> tuple[Condition, ...]:
    """The comparisons that `text` joins by "and".

    Raises:
        ValueError: it is anything else, or a column or number is none that positions have.
    """
    return tuple(_comparison(part, text) for part in _AND.split(text))


def _comparison(part: str, text: str) -> Condition:
    found = _COMPARISON.fullmatch(part)
    if found is None:
        raise ValueError(
            f"expected comparisons of a column with a number, joined by 'and', like "
            f"'entropy > 0.5 and label_rank > 0'; {part.strip()!r} is none"
        )
    name, sign, number = found.groups()
    column, value = _column(name), float(number)
    if name.lower() == "top1_prob":
        if not 0 <= value <= 1:
            raise ValueError(f"top1_prob is a probability, {number!r} is not in 0 to 1")
        # Logarithms are compared: exp would differ in its last bit from machine to machine.
        value = math.log(value) if value else -LARGEST
    if abs(value) > LARGEST:
        raise ValueError(f"{number!r} is larger than a float32 holds")
    if column != "label_rank":
        value = float(np.float32(value))
    return Condition(column=column, operator=cast(Operator, sign), constant=value)


def _column(name: str) -> Column:
    if name.lower() not in COLUMNS:
        raise ValueError(
            f"positions have no column {name!r}, they have {', '.join(COLUMNS)}"
            f"{suggestion(name.lower(), COLUMNS)}"
        )
    return cast(Column, "top1_logprob" if name.lower() == "top1_prob" else name.lower())


def _border(column: Column, sign: Operator, value: float) -> Condition:
    if np.isfinite(value):
        return Condition(column=column, operator=sign, constant=value)
    # Only a tail is -inf: without mass. As the lowest it is below all numbers, and no value is
    # below it, so that whatever is known passes.
    constant = -LARGEST if sign == "<=" else LARGEST
    return Condition(column=column, operator="<=", constant=constant)

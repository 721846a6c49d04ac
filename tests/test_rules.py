"""Rules of positions: what passes, what an unknown value does, what is said of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from softlabels.rules import (
    COLUMNS,
    LARGEST,
    Column,
    Condition,
    Operator,
    PositionRules,
    PositionWeight,
    per_row,
    stored_columns,
    values_of,
)
from softlabels.schema import COLUMNS as STORED
from softlabels.targets import SoftTargets

TARGETS = SoftTargets(
    num_positions=np.array([2, 0, 3], np.int32),
    ids=np.array([[0, 1], [1, -1], [2, 0], [-1, -1], [3, 1]], np.int32),
    logprobs=np.array(
        [[-0.5, -1.5], [0, -np.inf], [-0.25, -2], [-np.inf, -np.inf], [-1, -1]], np.float32
    ),
    tail=np.array([-3, -np.inf, -4, np.nan, -0.5], np.float32),
    entropy=np.array([0.1, 0, 0.75, np.nan, 2], np.float32),
    label_ids=np.array([0, 1, -1, 3, 2], np.int32),
    label_logprobs=np.array([-0.5, 0, np.nan, -9, -2], np.float32),
    label_ranks=np.array([0, 0, -1, 16_777_217, 2], np.int32),
)


def condition(column: Column, sign: Operator, constant: float) -> Condition:
    return Condition(column=column, operator=sign, constant=constant)


@pytest.mark.parametrize(
    ("column", "sign", "constant", "expected"),
    [
        ("entropy", ">", 0.0, [0, 2, 4]),
        # The float32 nearest to 0.1 is above the decimal; both sides are that float32.
        ("entropy", ">", 0.1, [2, 4]),
        ("entropy", "<=", 0.1, [0, 1]),
        ("entropy", "=", 0.1, [0]),
        ("entropy", "<>", 0.1, [1, 2, 4]),
        ("tail_logprob", "<", -3.5, [1, 2]),
        ("tail_logprob", "<=", -LARGEST, [1]),
        ("tail_logprob", "<=", LARGEST, [0, 1, 2, 4]),
        ("label_logprob", ">=", -2.0, [0, 1, 4]),
        ("label_logprob", "<>", 0.0, [0, 3, 4]),
        ("label_rank", "<", 1.0, [0, 1]),
        ("label_rank", "<>", 0.0, [3, 4]),
        ("label_rank", "=", 16_777_217.0, [3]),
        ("label_rank", "=", 16_777_216.0, []),
        ("label_rank", ">", 1.5, [3, 4]),
        ("top1_logprob", "<", -0.25, [0, 4]),
        ("top1_logprob", ">=", -LARGEST, [0, 1, 2, 4]),
    ],
)
def test_a_comparison_holds_where_the_value_is_known_and_fits(
    column: Column, sign: Operator, constant: float, expected: list[int]
) -> None:
    found = condition(column, sign, constant).holds(TARGETS)
    assert found.dtype == np.bool_
    assert np.flatnonzero(found).tolist() == expected


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_that_no_row_knows_fails_every_comparison(column: Column) -> None:
    nothing = SoftTargets(
        TARGETS.num_positions, np.zeros((5, 0), np.int32), np.zeros((5, 0), np.float32)
    )
    assert values_of(column, nothing) is None
    rules = PositionRules(where=(condition(column, "<>", 5.0),))
    assert not rules.keep(nothing).any()
    assert rules.unknown(nothing).all()


@pytest.mark.parametrize("column", COLUMNS)
def test_rules_name_the_columns_that_they_need(column: Column) -> None:
    needed = stored_columns([column])
    assert set(needed) <= set(STORED)
    weight = PositionWeight(where=(condition(column, ">", 0.0),), weight=2.0)
    assert PositionRules(weights=(weight,)).columns == needed
    assert PositionRules(where=weight.where, weights=(weight,)).columns == needed


def test_all_conditions_must_hold_and_the_first_weight_counts() -> None:
    rules = PositionRules(
        where=(condition("entropy", ">=", 0.0), condition("label_rank", "<", 2.0)),
        weights=(
            PositionWeight(where=(condition("entropy", ">", 0.05),), weight=0.25),
            PositionWeight(where=(condition("entropy", ">=", 0.0),), weight=3.0),
        ),
    )
    assert rules.keep(TARGETS).tolist() == [True, True, False, False, False]
    assert rules.unknown(TARGETS).tolist() == [False, False, True, True, False]
    assert rules.weigh(TARGETS).tolist() == [0.25, 3.0, 0.25, 1.0, 0.25]
    assert rules.weigh(TARGETS).dtype == np.float32
    assert PositionRules().keep(TARGETS).all()


def test_rules_are_said_in_words() -> None:
    rules = PositionRules(
        where=(condition("entropy", ">", 0.1), condition("label_rank", "<>", 16_777_217.0)),
        weights=(PositionWeight(where=(condition("tail_logprob", "<", -1.0),), weight=0.5),),
    )
    assert str(rules) == (
        "keeps entropy > 0.1 and label_rank <> 16777217; weight 0.5 where tail_logprob < -1"
    )
    assert str(PositionRules(weights=rules.weights)).startswith("keeps all; weight 0.5")


@pytest.mark.parametrize(
    "wrong",
    [
        {"column": "input_ids"},
        {"operator": "!="},
        {"operator": "LIKE"},
        {"constant": float("nan")},
        {"constant": float("inf")},
        {"constant": 1e39},
        {"constant": "x"},
        {"more": 1},
    ],
)
def test_conditions_of_a_stranger_are_checked(wrong: dict[str, Any]) -> None:
    good = {"column": "entropy", "operator": ">", "constant": 1.0}
    assert Condition.model_validate(good).constant == 1
    with pytest.raises(ValidationError):
        Condition.model_validate(good | wrong)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 1e39])
def test_weights_are_positive_numbers(weight: float) -> None:
    with pytest.raises(ValidationError):
        PositionWeight(where=(condition("entropy", ">", 0.0),), weight=weight)
    with pytest.raises(ValidationError):
        PositionWeight(where=(), weight=1.0)


@given(st.lists(st.lists(st.booleans(), max_size=5), max_size=6))
def test_positions_are_counted_by_row(rows: list[list[bool]]) -> None:
    keep = np.array([one for row in rows for one in row], np.bool_)
    counts = np.array([len(row) for row in rows], np.int32)
    assert per_row(keep, counts).tolist() == [sum(row) for row in rows]


def test_a_slice_is_judged_like_its_place_in_the_whole() -> None:
    rules = PositionRules(where=(condition("top1_logprob", "<", -0.1),))
    whole = rules.keep(TARGETS)
    assert rules.keep(TARGETS.slice(2, 3)).tolist() == whole[2:].tolist()
    rounded = replace(TARGETS, entropy=None)
    assert rules.keep(rounded).tolist() == whole.tolist()

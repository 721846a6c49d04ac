import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabels.student import interleave as module
from softlabels.student.interleave import Interleave, Scheduled, Split, interleave
from softlabels.student.splitting import best_splits

STEEP = [1942, 1317, 605, 128, 5]
"""Falling so fast that no tree is found."""


def sources_of(turns: Interleave, rows: list[int]) -> list[int]:
    """The source of each position."""
    found = np.full(sum(rows), -1)
    for source, own in enumerate(rows):
        positions = turns.positions(source, 0, own)
        assert np.all(np.diff(positions) > 0)
        found[positions] = source
    return found.tolist()


def error_of(turns: Interleave, rows: list[int]) -> Fraction:
    """The most rows that a source is from its share of a prefix, exactly."""
    sources, total = np.array(sources_of(turns, rows)), sum(rows)
    prefixes = np.arange(1, total + 1)
    each = [
        int(np.abs(np.cumsum(sources == source) * total - prefixes * own).max())
        for source, own in enumerate(rows)
    ]
    return Fraction(max(each), total)


def check(rows: list[int]) -> Interleave:
    turns = interleave(rows)
    sources = sources_of(turns, rows)
    assert sorted(sources) == sorted(s for s, own in enumerate(rows) for _ in range(own))
    assert error_of(turns, rows) <= min(1.0, turns.error + 1e-9)
    for position in {0, 1, sum(rows) // 3, sum(rows) - 1, sum(rows)}:
        counts = [sources[:position].count(source) for source in range(len(rows))]
        assert turns.counts(position) == counts
    return turns


def test_the_turns_of_few_rows_never_change() -> None:
    assert sources_of(interleave([5]), [5]) == [0] * 5
    assert sources_of(interleave([3, 2]), [3, 2]) == [0, 1, 0, 1, 0]
    assert sources_of(interleave([4, 2, 1]), [4, 2, 1]) == [0, 1, 0, 2, 0, 1, 0]
    assert sources_of(interleave([1, 1, 1, 1]), [1, 1, 1, 1]) == [0, 2, 1, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_all_small_shares_of_up_to_four_sources_stay_within_one_row(count: int) -> None:
    for rows in itertools.product(range(1, {1: 30, 2: 20, 3: 8, 4: 5}[count]), repeat=count):
        assert isinstance(check(list(rows)), Split)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=2, max_size=7))
def test_random_shares_stay_within_one_row(rows: list[int]) -> None:
    check(rows)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 4), min_size=2, max_size=6))
def test_shares_of_any_magnitude_stay_within_one_row(decades: list[float]) -> None:
    check([max(1, int(10**decade)) for decade in decades])


def test_what_no_tree_serves_is_worked_out_row_by_row() -> None:
    assert best_splits(STEEP)[1] > 1
    turns = check(STEEP)
    assert isinstance(turns, Scheduled)
    whole = turns.positions(3, 0, 128)
    assert turns.positions(3, 50, 70).tolist() == whole[50:70].tolist()


def test_a_long_stage_of_such_sources_says_how_far_off_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_SCHEDULED", 3_996)
    turns = interleave(STEEP)
    assert isinstance(turns, Split)
    assert 1 < turns.error < 1.1
    assert error_of(turns, STEEP) <= turns.error


def test_the_error_of_a_tree_is_what_its_nodes_add_up_to() -> None:
    # Halves of halves of halves: 1/2 (1 + 1/2 + 1/4).
    assert best_splits([10] * 8)[1] == pytest.approx(0.875)
    assert best_splits([7])[1] == 0.5
    assert best_splits([7, 3])[1] == 0.5


def test_positions_of_billions_of_rows_are_exact() -> None:
    rows = [3 * 10**12 + 7, 10**12 + 1, 5]
    turns, total = interleave(rows), sum(rows)
    for source, own in enumerate(rows):
        for row in (0, 1, own // 2, own - 1):
            (position,) = turns.positions(source, row, row + 1).tolist()
            assert turns.counts(position)[source] == row
            assert turns.counts(position + 1)[source] == row + 1
            assert abs(Fraction(position * own, total) - row) <= 2
    # All rows of a source that is spread over the whole stage, in one call.
    positions = turns.positions(2, 0, 5).tolist()
    assert [turns.counts(p + 1)[2] for p in positions] == [1, 2, 3, 4, 5]


def test_the_choice_of_a_tree_is_the_same_every_time() -> None:
    rows = [1 + (17 * i * i) % 101 for i in range(12)]
    assert best_splits(rows) == best_splits(list(rows))

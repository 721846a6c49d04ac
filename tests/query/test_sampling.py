"""How often rows come: exact whole numbers against rational arithmetic done the slow way."""

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabels.errors import BadInputError
from softlabels.query.sampling import (
    MOST_READS,
    Taken,
    balanced_reads,
    even_parts,
    largest_remainder,
    parts_of,
    rank_in_value,
    reads_until,
    require_readable,
    systematic_reads,
    value_shares,
)

Keys = np.ndarray


def keys_of(count: int, seed: int = 0) -> Keys:
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


def slow_systematic(values: np.ndarray, keys: Keys, total: int, seed: int) -> list[int]:
    """The documented formula, in rational numbers."""
    bits = min(52, 61 - len(values).bit_length())
    steps = [round(Fraction(float(v)) / Fraction(float(values.max())) * 2**bits) for v in values]
    whole = sum(steps)
    u = Fraction(int(hashlib.md5(f"{seed}/sample_by".encode()).hexdigest()[:16], 16), 2**64)
    u = Fraction(math.floor(u * whole), whole)
    found, before = [0] * len(values), Fraction(0)
    for row in np.argsort(keys, kind="stable").tolist():
        after = before + Fraction(steps[row] * total, whole)
        found[row] = math.floor(after + u) - math.floor(before + u)
        before = after
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, 1e-9, 0.25, 0.5, 1.0, 3.0, 1e6]), min_size=1, max_size=30
    ).filter(any),
    st.integers(1, 500),
    st.integers(0, 5),
)
def test_systematic_sampling_is_the_documented_formula(
    values: list[float], total: int, seed: int
) -> None:
    given_values, keys = np.array(values), keys_of(len(values), seed)
    assert systematic_reads(given_values, keys, total, seed).tolist() == slow_systematic(
        given_values, keys, total, seed
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_reads_are_exact_at_their_very_borders(data: st.DataObject) -> None:
    whole = data.draw(st.integers(1, 40) | st.integers(2**60, 2**62 - 1))
    total = data.draw(st.integers(1, 40) | st.integers(2**30, MOST_READS))
    start = data.draw(st.integers(0, whole - 1))
    read = data.draw(st.integers(1, total))
    at = -(-(read * whole - start) // total)  # the least sum with that many reads
    sums = [n for n in (at - 1, at, at + 1, 0, whole) if 0 <= n <= whole]
    wanted = [(n * total + start) // whole for n in sums]
    assert reads_until(np.array(sums), total, whole, start).tolist() == wanted


def test_reads_are_within_one_of_what_is_expected_and_sum_to_the_total() -> None:
    rng = np.random.default_rng(0)
    values = rng.exponential(size=5000) ** 3
    for total in (1, 700, 5000, 123_457):
        reads = systematic_reads(values, keys_of(5000), total, 7)
        expected = values / values.sum() * total
        assert reads.sum() == total
        assert np.abs(reads - expected).max() < 1 + 1e-6


def test_reads_go_with_rows_wherever_they_lie() -> None:
    values, keys = np.random.default_rng(1).random(200), keys_of(200)
    order = np.random.default_rng(2).permutation(200)
    here = systematic_reads(values, keys, 333, 0)
    assert (systematic_reads(values[order], keys[order], 333, 0) == here[order]).all()
    assert (systematic_reads(values * 8, keys, 333, 0) == here).all()
    assert (systematic_reads(values, keys, 333, 1) != here).any()


def test_over_seeds_the_mean_of_reads_is_their_share() -> None:
    values = np.array([0.05, 0.2, 0.35, 0.4])
    mean = np.mean([systematic_reads(values, keys_of(4), 2, seed) for seed in range(2000)], axis=0)
    assert np.abs(mean - 2 * values).max() < 0.03


def test_systematic_sums_of_many_rows_do_not_overflow() -> None:
    values = np.ones(300_000)
    values[7] = 1e12  # steps of the others round to 0 beside it
    reads = systematic_reads(values, keys_of(300_000), MOST_READS, 0)
    assert reads.sum() == MOST_READS
    assert reads[7] == pytest.approx(MOST_READS, rel=1e-5)
    even = systematic_reads(np.ones(300_000), keys_of(300_000), MOST_READS, 0)
    assert (even.min(), even.max()) == (MOST_READS // 300_000, MOST_READS // 300_000 + 1)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 1000))
def test_largest_remainder_is_within_one_and_exact_in_sum(sizes: list[int], total: int) -> None:
    shares = {n: Fraction(size, sum(sizes)) for n, size in enumerate(sizes)}
    quotas = largest_remainder(shares, total)
    assert sum(quotas.values()) == total
    assert all(abs(quotas[n] - total * share) < 1 for n, share in shares.items())


def test_shares_of_values_go_with_the_root_of_their_rows() -> None:
    assert value_shares([1, 9, 90], None) == [Fraction(1, 3)] * 3
    assert value_shares([1, 9, 90], 1) == [Fraction(1, 100), Fraction(9, 100), Fraction(9, 10)]
    assert value_shares([1, 4, 25], 2) == [Fraction(1, 8), Fraction(2, 8), Fraction(5, 8)]
    third = [float(share) for share in value_shares([1, 2, 10**9], 3.0)]
    assert third == pytest.approx(np.array([1, 2 ** (1 / 3), 1e3]) / (1 + 2 ** (1 / 3) + 1e3))
    # The very digits, on any machine.
    two, three = 1414213562373095048801688724209, 1732050807568877293527446341505
    assert value_shares([2, 3], 2) == [Fraction(n, two + three) for n in (two, three)]


def test_a_value_with_too_few_rows_repeats_them_evenly() -> None:
    codes = np.array([0] * 100 + [1] * 7)
    keys = keys_of(107)
    reads = balanced_reads(codes, keys, 100, None)
    assert reads[:100].sum() == reads[100:].sum() == 50
    assert set(reads[100:].tolist()) == {7, 8}
    # The row that comes once more has the lowest key of its value.
    assert reads[100 + int(np.argmin(keys[100:]))] == 8
    assert set(np.flatnonzero(reads[:100]).tolist()) == set(np.argsort(keys[:100])[:50].tolist())


def test_ranks_count_lower_keys_of_the_same_value() -> None:
    codes, keys = np.array([1, 0, 1, 1, 0]), np.array([5, 9, 2, 5, 1], np.uint64)
    assert rank_in_value(codes, keys).tolist() == [1, 1, 0, 2, 0]


def test_parts_hold_each_row_once() -> None:
    reads = np.array([2, 0, 1, 2, 1 << 21])
    parts = [(places.tolist(), times) for places, times in parts_of(reads)]
    assert parts == [([2], 1), ([0, 3], 2), ([4], 1 << 21)]
    assert parts_of(np.zeros(0, np.int64)) == []
    keys = np.array([3, 1, 2], np.uint64)
    assert [(p.tolist(), n) for p, n in even_parts(keys, 3, 7)] == [([0, 1, 2], 2), ([1], 1)]
    assert [(p.tolist(), n) for p, n in even_parts(keys, 3, 2)] == [([1, 2], 1)]


def test_taken_examples_are_told_apart_by_all_128_bits() -> None:
    def u64(*values: int) -> Keys:
        return np.array(values, np.uint64)

    taken = Taken()
    assert taken.unseen(u64(5, 5, 6, 5), u64(1, 2, 1, 1)).tolist() == [True, True, True, False]
    taken.add(u64(5, 6), u64(1, 1))
    assert taken.unseen(u64(5, 5, 6, 7), u64(1, 2, 1, 1)).tolist() == [False, True, False, True]
    taken.add(u64(5), u64(2))
    assert taken.unseen(u64(5, 5), u64(2, 3)).tolist() == [False, True]


def test_what_a_plan_cannot_count_is_refused() -> None:
    require_readable("a", MOST_READS * 2, 2, False)
    with pytest.raises(BadInputError, match=r"source 'a': .* of 1: at most 2147483647 .*one row"):
        require_readable("a", MOST_READS + 1, 1, False)
    with pytest.raises(BadInputError, match="source 'a'"):
        require_readable("a", MOST_READS + 1, 2, True)

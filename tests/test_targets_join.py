from dataclasses import replace

import numpy as np
import pytest

from softlabels.errors import DataError
from softlabels.targets import SoftTargets, Temper
from tests.tables import dense_logprobs, make_targets


def targets(rows: int = 6, seed: int = 0, k: int = 4) -> SoftTargets:
    dense = dense_logprobs(rows, 9, seed)
    return make_targets(dense, k, np.arange(rows) % 9, draws=2, temperatures=[2.0], seed=seed)


def language_model(counts: list[int]) -> SoftTargets:
    """Rows of several positions; ids tell position i of all as 10 i and 10 i + 1."""
    first = 10 * np.arange(sum(counts), dtype=np.int32)[:, None]
    ids = np.concatenate([first, first + 1], 1)
    return SoftTargets(np.array(counts, np.int32), ids, -ids.astype(np.float32))


def assert_same(left: SoftTargets, right: SoftTargets) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        if name == "temper":
            assert sorted(value) == sorted(other)
            for t, found in value.items():
                np.testing.assert_array_equal(found.shift, other[t].shift)
                np.testing.assert_array_equal(found.tail, other[t].tail)
        elif value is None:
            assert other is None, name
        else:
            assert value.dtype == other.dtype, name
            np.testing.assert_array_equal(value, other)


def test_joined_targets_come_apart_into_their_parts() -> None:
    parts = [targets(6, 0), targets(3, 1), targets(5, 2)]
    whole = SoftTargets.concat(parts)
    assert_same(whole.slice(0, 6), parts[0])
    assert_same(whole.slice(6, 9), parts[1])
    assert_same(whole.slice(9, 14), parts[2])
    assert SoftTargets.concat(parts[:1]) is parts[0]


def test_slice_and_take_agree_where_rows_have_many_positions() -> None:
    rows = language_model([2, 0, 3, 1])
    for start in range(5):
        for stop in range(start, 5):
            assert_same(rows.slice(start, stop), rows.take(np.arange(start, stop)))
    assert rows.slice(2, 4).ids[:, 0].tolist() == [20, 30, 40, 50]
    assert np.shares_memory(rows.slice(2, 4).ids, rows.ids)


def test_rows_of_many_positions_are_joined() -> None:
    whole = SoftTargets.concat([language_model([2, 0]), language_model([1, 3])])
    assert whole.num_positions.tolist() == [2, 0, 1, 3]
    assert whole.take(np.array([3, 0])).ids[:, 0].tolist() == [10, 20, 30, 0, 10]


def test_what_a_part_does_not_know_is_filled_in() -> None:
    bare = replace(
        targets(2), tail=None, entropy=None, label_ids=None, label_logprobs=None, label_ranks=None
    )
    whole = SoftTargets.concat([bare, targets(3)])
    assert whole.label_ids is not None
    assert whole.label_ranks is not None
    assert whole.label_ids.tolist() == [-1, -1, 0, 1, 2]
    assert whole.label_ids.dtype == np.int32
    assert whole.label_ranks[:2].tolist() == [-1, -1]
    for name in ("tail", "entropy", "label_logprobs"):
        assert np.isnan(getattr(whole, name)).tolist() == [True, True, False, False, False]
    assert SoftTargets.concat([bare, bare]).tail is None


def test_targets_of_another_shape_are_not_joined() -> None:
    one = targets()
    others = [targets(k=3), replace(one, draws=None), replace(one, temper={})]
    others.append(replace(one, temper={3.0: Temper(one.temper[2.0].shift, one.temper[2.0].tail)}))
    for other in others:
        with pytest.raises(DataError, match="expected one"):
            SoftTargets.concat([one, other])
    with pytest.raises(DataError, match="no part"):
        SoftTargets.concat([])

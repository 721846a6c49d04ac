import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels.errors import BadInputError
from softlabels.student.order import STREAMS, Order, check_ranks, owned_positions, permutation

Pair = tuple[int, int]


def make_order(
    num_rows: list[int],
    stages: list[int] | None = None,
    repeats: list[int] | None = None,
    fingerprint: str = "0" * 64,
    seed: int = 7,
    shuffle: bool = True,
    shuffle_rows: int = 8,
) -> Order:
    entries = len(num_rows)
    return Order(
        fingerprint,
        np.array(stages or [0] * entries),
        np.array(num_rows),
        np.array(repeats or [1] * entries),
        seed,
        shuffle,
        shuffle_rows,
    )


def read(order: Order, epoch: int = 0) -> list[Pair]:
    """(entry, row) at each position."""
    found = order.epoch(epoch)
    windows = [found.window(number) for number in range(found.num_windows)]
    pairs = [zip(entries, rows, strict=True) for entries, rows in windows]
    return [(int(entry), int(row)) for pair in pairs for entry, row in pair]


def test_the_order_of_a_tiny_plan_never_changes() -> None:
    order = make_order([6, 5, 0, 4], stages=[1, 0, 0, 0], repeats=[1, 1, 3, 2])

    def text(epoch: int) -> str:
        return " ".join(f"{entry}{row}" for entry, row in read(order, epoch))

    assert text(0) == "31 14 12 30 33 11 10 13 32 32 33 30 31 05 00 04 03 02 01"
    assert text(1) == "31 31 30 32 30 33 32 33 13 11 12 10 14 00 05 04 03 01 02"


def test_a_keyed_permutation_never_changes() -> None:
    assert permutation(10, a=1, b="x").tolist() == [1, 8, 9, 0, 5, 2, 6, 3, 7, 4]
    assert permutation(10, b="x", a=1).tolist() == permutation(10, a=1, b="x").tolist()
    assert permutation(0, a=1).tolist() == []


def test_a_permutation_is_spread_evenly() -> None:
    first = np.bincount([permutation(8, case=case)[0] for case in range(4000)], minlength=8)
    assert np.all(np.abs(first - 500) < 120), first


@given(
    entries=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=12
    ),
    shuffle=st.booleans(),
    shuffle_rows=st.integers(1, 60),
    epoch=st.integers(0, 5),
)
def test_an_epoch_reads_each_row_as_often_as_asked(
    entries: list[tuple[int, int, int]], shuffle: bool, shuffle_rows: int, epoch: int
) -> None:
    num_rows, repeats, stages = (list(values) for values in zip(*entries, strict=True))
    order = make_order(num_rows, stages, repeats, shuffle=shuffle, shuffle_rows=shuffle_rows)
    found = read(order, epoch)
    expected = [
        (entry, row)
        for entry, (size, times, _) in enumerate(entries)
        for _ in range(times)
        for row in range(size)
    ]
    assert sorted(found) == sorted(expected)
    assert len(found) == order.rows_per_epoch
    read_stages = [stages[entry] for entry, _ in found]
    assert read_stages == sorted(read_stages)


def test_windows_end_with_the_item_that_fills_them_and_with_their_stage() -> None:
    order = make_order([3] * 10, stages=[0] * 7 + [1] * 3, shuffle_rows=5)
    assert np.diff(order.epoch(0).starts).tolist() == [6, 6, 6, 3, 6, 3]


def test_every_position_is_found_in_its_window() -> None:
    order = make_order([3, 1, 4, 1, 5, 9, 2, 6], shuffle_rows=6).epoch(0)
    for position in range(31):
        number = order.window_at(position)
        assert order.starts[number] <= position < order.starts[number + 1]


def test_without_shuffling_rows_come_in_plan_order() -> None:
    order = make_order([2, 1, 2], stages=[0, 1, 0], repeats=[2, 1, 1], shuffle=False)
    expected = [(0, 0), (0, 1), (0, 0), (0, 1), (2, 0), (2, 1), (1, 0)]
    assert read(order) == expected
    assert read(order, 3) == expected


@pytest.mark.parametrize(
    "other",
    [
        make_order([50, 50], seed=8),
        make_order([50, 50], fingerprint="1" * 64),
        make_order([50, 50], shuffle_rows=200),
    ],
)
def test_another_seed_plan_or_window_gives_another_order(other: Order) -> None:
    order = make_order([50, 50])
    assert read(order) == read(make_order([50, 50]))
    assert read(order) != read(other)
    assert read(order, 0) != read(order, 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 63, 64])
def test_ranks_share_positions_by_canonical_streams(world_size: int) -> None:
    ranks = [owned_positions(100, 500, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(ranks).tolist()) == list(range(100, 500))
    for rank, owned in enumerate(ranks):
        assert np.all(np.diff(owned) > 0)
        assert set(owned % STREAMS % world_size) <= {rank}


@pytest.mark.parametrize(("rank", "world_size"), [(0, 0), (0, 65), (2, 2), (-1, 2)])
def test_ranks_out_of_range_are_refused(rank: int, world_size: int) -> None:
    with pytest.raises(BadInputError, match="rank"):
        check_ranks(rank, world_size)

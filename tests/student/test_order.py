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
    sources: list[int] | None = None,
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
        None if sources is None else np.array(sources),
    )


def read(order: Order, epoch: int = 0) -> list[Pair]:
    """(entry, row) at each position."""
    found = order.epoch(epoch)
    entries, rows = found.read(0, found.rows)
    return list(zip(entries.tolist(), rows.tolist(), strict=True))


def test_the_order_of_a_tiny_plan_never_changes() -> None:
    order = make_order([6, 5, 0, 4], stages=[1, 0, 0, 0], repeats=[1, 1, 3, 2])

    def text(epoch: int) -> str:
        return " ".join(f"{entry}{row}" for entry, row in read(order, epoch))

    assert text(0) == "31 14 12 30 33 11 10 13 32 32 33 30 31 05 00 04 03 02 01"
    assert text(1) == "31 31 30 32 30 33 32 33 13 11 12 10 14 00 05 04 03 01 02"


def test_the_order_of_a_tiny_mixture_never_changes() -> None:
    order = make_order(
        [6, 5, 0, 4], stages=[1, 0, 0, 0], repeats=[1, 1, 3, 2], sources=[0, 0, 1, 1]
    )

    def text(epoch: int) -> str:
        return " ".join(f"{entry}{row}" for entry, row in read(order, epoch))

    assert text(0) == "31 11 30 13 33 32 10 31 30 12 32 14 33 02 05 00 01 03 04"
    assert text(1) == "33 11 31 14 32 30 12 30 31 10 32 13 33 01 02 05 03 00 04"


def test_a_keyed_permutation_never_changes() -> None:
    assert permutation(10, a=1, b="x").tolist() == [1, 8, 9, 0, 5, 2, 6, 3, 7, 4]
    assert permutation(10, b="x", a=1).tolist() == permutation(10, a=1, b="x").tolist()
    assert permutation(0, a=1).tolist() == []


def test_a_permutation_is_spread_evenly() -> None:
    first = np.bincount([permutation(8, case=case)[0] for case in range(4000)], minlength=8)
    assert np.all(np.abs(first - 500) < 120), first


@given(
    entries=st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)),
        min_size=1,
        max_size=12,
    ),
    shuffle=st.booleans(),
    shuffle_rows=st.integers(1, 60),
    epoch=st.integers(0, 5),
)
def test_an_epoch_reads_each_row_as_often_as_asked(
    entries: list[tuple[int, int, int, int]], shuffle: bool, shuffle_rows: int, epoch: int
) -> None:
    num_rows, repeats, stages, sources = (list(values) for values in zip(*entries, strict=True))
    order = make_order(
        num_rows, stages, repeats, shuffle=shuffle, shuffle_rows=shuffle_rows, sources=sources
    )
    found = read(order, epoch)
    expected = [
        (entry, row)
        for entry, (size, times, *_) in enumerate(entries)
        for _ in range(times)
        for row in range(size)
    ]
    assert sorted(found) == sorted(expected)
    assert len(found) == order.rows_per_epoch
    read_stages = [stages[entry] for entry, _ in found]
    assert read_stages == sorted(read_stages)


def ends(order: Order) -> list[int]:
    return [segment.stop for segment in order.epoch(0).segments()]


def test_blocks_end_with_the_item_that_fills_them_and_with_their_stage() -> None:
    order = make_order([3] * 10, stages=[0] * 7 + [1] * 3, shuffle_rows=5)
    assert np.diff([0, *ends(order)]).tolist() == [6, 6, 6, 3, 6, 3]


def test_a_block_of_a_source_holds_its_share_of_the_rows_that_are_shuffled() -> None:
    order = make_order([4] * 30, sources=[0] * 20 + [1] * 10, shuffle_rows=12)
    epoch = order.epoch(0)
    (stage,) = epoch.stages
    assert [np.diff(own.starts).tolist() for own in stage.sources] == [
        [4] + [8] * 9 + [4],
        [4] * 10,
    ]
    for segment in epoch.segments():
        held = [epoch.block(place) for place in segment.blocks]
        assert sum(len(block.rows) for block in held) <= 12


def test_blocks_of_different_sources_end_in_turn() -> None:
    sizes = [5] * 200 + [5] * 60 + [5] * 140
    order = make_order(sizes, sources=[0] * 200 + [1] * 60 + [2] * 140, shuffle_rows=200)
    whole = np.diff([0, *ends(order)])[:-3]  # three blocks at a time end within 200 rows
    assert whole.mean() > 60
    assert whole.min() >= 30


def test_each_item_is_in_one_block() -> None:
    order = make_order([3, 7, 1, 9, 5, 2, 8] * 6, repeats=[2] * 42, sources=[0, 1, 2] * 14)
    epoch = order.epoch(0)
    items = []
    for segment in epoch.segments():
        assert segment.start < segment.stop
        for place in segment.blocks:
            block = epoch.block(place)
            assert np.all(np.diff(block.positions) > 0)
            if segment.start <= block.positions[0] < segment.stop:
                numbers, counts = np.unique(block.entries, return_counts=True)
                items += [
                    n
                    for n, c in zip(numbers, counts // order.num_rows[numbers], strict=True)
                    for _ in range(c)
                ]
                assert np.all(counts % order.num_rows[numbers] == 0)
    assert sorted(items) == sorted([*range(42)] * 2)


@pytest.mark.parametrize("shuffle_rows", [1, 20, 10_000])
def test_every_prefix_holds_each_source_within_one_row_of_its_share(shuffle_rows: int) -> None:
    sizes = [40] * 30 + [7] * 10 + [3] + [90] * 5 + [11] * 4
    sources = [0] * 30 + [1] * 10 + [2] + [3] * 5 + [4] * 4
    order = make_order(sizes, repeats=[1, 2] * 25, sources=sources, shuffle_rows=shuffle_rows)
    for epoch in range(3):
        entries, _ = order.epoch(epoch).read(0, order.rows_per_epoch)
        of = np.array(sources)[entries]
        prefixes = np.arange(1, len(of) + 1)
        for source in range(5):
            counts = np.cumsum(of == source)
            assert np.abs(counts - prefixes * counts[-1] / len(of)).max() <= 1


def test_any_stretch_is_read_as_in_the_whole() -> None:
    order = make_order([5, 9, 2, 8, 4, 4], stages=[0, 0, 0, 0, 1, 1], sources=[0, 1, 0, 2, 0, 1])
    epoch = order.epoch(2)
    whole = np.array(epoch.read(0, 32))
    for start in range(32):
        for stop in range(start, 33):
            assert np.array_equal(np.array(epoch.read(start, stop)), whole[:, start:stop])


def test_only_a_stage_of_several_sources_makes_another_order() -> None:
    plain = make_order([5, 6, 7], stages=[0, 0, 1])
    alone = make_order([5, 6, 7], stages=[0, 0, 1], sources=[0, 0, 1])
    mixed = make_order([5, 6, 7], stages=[0, 0, 1], sources=[0, 1, 1])
    assert read(plain) == read(alone)
    assert plain.identity == alone.identity
    assert (plain.identity["version"], mixed.identity["version"]) == (1, 2)
    other = make_order([5, 6, 7], stages=[0, 0, 1], repeats=[2, 1, 1], sources=[0, 1, 1])
    assert mixed.identity["sources"] != other.identity["sources"]
    in_order = make_order([5, 6, 7], sources=[2, 1, 0], shuffle=False)
    assert [entry for entry, _ in read(in_order)] == [0] * 5 + [1] * 6 + [2] * 7
    assert in_order.identity["version"] == 1


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

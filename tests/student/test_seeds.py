import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabels.student.seeds import SEED_BITS, seeds_of


def seeds(names: list[str], views: int = 0, epoch: int = 0, seed: int = 0) -> np.ndarray:
    return seeds_of(seed, pa.array(names, pa.string()), np.full(len(names), views, np.int32), epoch)


@settings(max_examples=40)
@given(st.lists(st.text(max_size=40), max_size=6), st.integers(0, 2**63 - 1))
def test_a_seed_hangs_on_its_row_alone(names: list[str], seed: int) -> None:
    every = seeds(names, seed=seed)
    assert every.dtype == np.int64
    assert every.shape == (len(names),)
    assert ((every >= 0) & (every < 1 << SEED_BITS)).all()
    alone = [seeds([name], seed=seed)[0] for name in names]
    assert every.tolist() == alone
    array = pa.array(["before", *names, "after"], pa.string()).slice(1, len(names))
    assert seeds_of(seed, array, np.zeros(len(names), np.int32), 0).tolist() == alone


def test_seeds_are_the_same_in_every_release() -> None:
    # Students that were trained by them go on by them.
    assert seeds(["a", "bb", "", "x" * 64]).tolist() == [
        3369088166939896,
        3661823817884831,
        7956156453446585,
        5067639193760488,
    ]


def test_seeds_differ_by_seed_example_view_and_epoch() -> None:
    names = [f"{i:064x}" for i in range(300)] + ["\0" * i for i in range(20)]
    every = [
        seeds(names, view, epoch, seed)
        for seed in (0, 1, 2**62)
        for view in (0, 1, 2)
        for epoch in (0, 1, 2)
    ]
    assert len(np.unique(np.concatenate(every))) == len(every) * len(names)


def test_every_bit_of_a_seed_is_as_often_one_as_not() -> None:
    found = seeds([f"row{i}" for i in range(20_000)])
    ones = (found[:, None] >> np.arange(SEED_BITS) & 1).mean(0)
    assert np.abs(ones - 0.5).max() < 0.02

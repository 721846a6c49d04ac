import json
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from softlabels.errors import BadInputError, MismatchError
from softlabels.plan import Plan
from softlabels.student.loader import StreamDataset, stream_state
from softlabels.student.stream import Batch, Stream
from tests.plans import make_plan
from tests.tables import make_table

pytestmark = [
    # Three workers are more than the cores of a small machine.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # What torchdata 0.11 calls in torch.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]

OPTIONS: dict[str, Any] = {"batch_size": 7, "epochs": 2, "shuffle_rows": 30}
CONTEXT = "fork"
"""Starts a worker in milliseconds; "spawn" imports torch for seconds, and is tested once."""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """60 rows of x, 24 of y three times: 132 rows, 19 batches an epoch."""
    folder = tmp_path_factory.mktemp("tables")
    x = make_table(folder / "x", rows=60, shard_rows=30, row_group_rows=10)
    y = make_table(folder / "y", rows=24, shard_rows=24, row_group_rows=8, prefix="y")
    return make_plan((x, y), repeats=[1, 3])


def loaded(dataset: StreamDataset, workers: int, context: str = CONTEXT) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context if workers else None,
    )


def stateful(dataset: StreamDataset, workers: int) -> Any:
    return StatefulDataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=CONTEXT if workers else None,
    )


def taken(batches: Iterator[Batch]) -> list[tuple[int, int, list[str]]]:
    return [(b.epoch, b.position, b.example_ids.to_pylist()) for b in batches]


@pytest.fixture(scope="module")
def alone(plan: Plan) -> list[tuple[int, int, list[str]]]:
    return taken(iter(Stream(plan, **OPTIONS)))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_together_hand_out_the_batches_of_one_stream(
    plan: Plan, alone: list[Any], workers: int
) -> None:
    dataset = StreamDataset(plan, **OPTIONS)
    assert taken(iter(loaded(dataset, workers))) == alone


@pytest.mark.slow  # each worker imports torch anew
def test_spawned_workers_do_as_well(plan: Plan, alone: list[Any]) -> None:
    assert taken(iter(loaded(StreamDataset(plan, **OPTIONS), 2, "spawn"))) == alone


def test_batches_of_workers_hold_what_a_stream_s_hold(plan: Plan) -> None:
    for mine, theirs in zip(
        loaded(StreamDataset(plan, **OPTIONS), 2), Stream(plan, **OPTIONS), strict=True
    ):
        assert mine.targets.logprobs.tolist() == theirs.targets.logprobs.tolist()
        assert mine.loss_weights.tolist() == theirs.loss_weights.tolist()
        assert mine.global_weight == theirs.global_weight


@pytest.mark.parametrize(
    ("workers", "later", "stop"), [(0, 2, 18), (2, 3, 19), (3, 2, 27), (2, 0, 1)]
)
def test_a_state_goes_on_with_other_workers(
    plan: Plan, alone: list[Any], workers: int, later: int, stop: int
) -> None:
    first = StreamDataset(plan, **OPTIONS)
    batches = list(islice(iter(loaded(first, workers)), stop))
    state = first.state_after(batches[-1])
    other = StreamDataset(plan, **OPTIONS)
    other.load_state_dict(state)
    assert taken(iter(batches)) + taken(iter(loaded(other, later))) == alone


@pytest.mark.parametrize(("workers", "stop"), [(0, 5), (1, 19), (3, 1), (3, 20)])
def test_a_stateful_loader_goes_on_where_it_stopped(
    plan: Plan, alone: list[Any], workers: int, stop: int
) -> None:
    loader = stateful(StreamDataset(plan, **OPTIONS), workers)
    found = taken(islice(iter(loader), stop))
    state = json.loads(json.dumps(loader.state_dict()))
    again = stateful(StreamDataset(plan, **OPTIONS), workers)
    again.load_state_dict(state)
    assert found + taken(iter(again)) == alone


@pytest.mark.parametrize(
    ("workers", "later", "stop"), [(0, 2, 20), (3, 2, 1), (2, 3, 37), (2, 0, 4)]
)
def test_a_stateful_loader_s_state_becomes_that_of_a_stream(
    plan: Plan, alone: list[Any], workers: int, later: int, stop: int
) -> None:
    loader = stateful(StreamDataset(plan, **OPTIONS), workers)
    found = taken(islice(iter(loader), stop))
    state = stream_state(loader.state_dict())
    assert state == StreamDataset(plan, **OPTIONS).state_dict() | {
        "epoch": state["epoch"],
        "position": state["position"],
    }
    stream = Stream(plan, **OPTIONS)
    stream.load_state_dict(state)
    assert found + taken(iter(stream)) == alone
    again = StreamDataset(plan, **OPTIONS)
    again.load_state_dict(state)
    assert found + taken(iter(loaded(again, later))) == alone


def test_ranks_have_workers_of_their_own(plan: Plan) -> None:
    ranks: list[dict[str, Any]] = [{"rank": rank, "world_size": 3} for rank in (0, 2)]
    for rank in ranks:
        expected = taken(iter(Stream(plan, **OPTIONS, **rank)))
        assert taken(iter(loaded(StreamDataset(plan, **OPTIONS, **rank), 2))) == expected


def test_a_batch_is_sent_without_the_rest_of_its_block(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=3000, k=2, shard_rows=3000)
    dataset = StreamDataset(make_plan(table), batch_size=4, epochs=1, columns=["example_id"])
    batch = next(iter(loaded(dataset, 1)))
    assert len(pickle.dumps(batch)) < 5000


def test_a_worker_s_state_is_for_that_worker_alone(plan: Plan) -> None:
    state = Stream(plan, **OPTIONS, worker=1, workers=2).state_dict()
    assert (state["position"], state["worker"], state["workers"]) == (7, 1, 2)
    with pytest.raises(MismatchError, match=r"of worker 1 of 2, this one is 0 of 1"):
        Stream(plan, **OPTIONS).load_state_dict(state)


def test_what_is_no_state_is_refused(plan: Plan) -> None:
    with pytest.raises(BadInputError, match="no stream's state"):
        stream_state({"_snapshot": {}})
    with pytest.raises(BadInputError, match=r"workers: expected none"):
        StreamDataset(plan, **OPTIONS, workers=2)
    with pytest.raises(BadInputError, match=r"worker: expected 0 to 1, found 2"):
        Stream(plan, **OPTIONS, worker=2, workers=2)
    with pytest.raises(BadInputError, match="batch_size"):
        StreamDataset(plan, batch_size=0)

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from softlabels.errors import BadInputError, DataError, MismatchError, StorageError
from softlabels.plan import Plan
from softlabels.student.inputs import Maker, input_columns
from softlabels.student.making import InputStream
from softlabels.student.seeds import Seeds
from softlabels.student.stream import Batch, Stream
from tests.student.problem import decode, make_problem

THREADS = pytest.mark.parametrize("threads", [0, 1, 3])
COLUMNS = input_columns(["features"], transform=True)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan.read(make_problem(tmp_path_factory.mktemp("making"), rows=100))


def noise(inputs: torch.Tensor, seeds: Seeds) -> torch.Tensor:
    """Adds to each row what its seed says."""
    return inputs + torch.from_numpy(seeds % 1000)[:, None].float()


def make_stream(plan: Plan, threads: int, make: Callable[[Batch], Any], **options: Any) -> Any:
    values: dict[str, Any] = {"batch_size": 8, "epochs": 2, "columns": COLUMNS} | options
    return InputStream(Stream(plan, **values), make, threads)


def seen(batches: Any) -> list[tuple[int, str, list[float]]]:
    """(epoch, example, input) of each row."""
    return [
        (batch.epoch, name, values)
        for batch in batches
        for name, values in zip(batch.example_ids.to_pylist(), batch.inputs.tolist(), strict=True)
    ]


@THREADS
def test_batches_come_in_the_streams_order_however_long_each_takes(
    plan: Plan, threads: int
) -> None:
    def make(batch: Batch) -> torch.Tensor:
        time.sleep(batch.position % 3 * 0.002)
        return decode(batch.columns)

    plain = list(Stream(plan, batch_size=8, epochs=2, columns=COLUMNS))
    found = list(make_stream(plan, threads, make))
    assert [b.example_ids for b in found] == [b.example_ids for b in plain]
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.inputs, decode(other.columns))


def test_threads_make_inputs_while_the_consumer_works(plan: Plan) -> None:
    made = [threading.Event() for _ in range(13)]

    def make(batch: Batch) -> torch.Tensor:
        made[batch.position // 8].set()
        return decode(batch.columns)

    for batch in make_stream(plan, 1, make, epochs=1):
        following = made[batch.position // 8 + 1 :]
        assert not following or following[0].wait(30)


@THREADS
def test_a_row_is_transformed_alike_by_any_ranks_batch_size_and_resume(
    plan: Plan, threads: int
) -> None:
    maker = Maker(decode, noise, seed=5)
    whole = sorted(seen(make_stream(plan, threads, maker)))
    assert len(whole) == 200
    other = sorted(seen(make_stream(plan, threads, maker, batch_size=13)))
    assert other == whole
    ranks = [make_stream(plan, threads, maker, rank=r, world_size=3) for r in range(3)]
    assert sorted(row for rank in ranks for row in seen(b for b in rank if len(b))) == whole
    first = make_stream(plan, threads, maker)
    batches = iter(first)
    begun = seen(next(batches) for _ in range(7))
    second = make_stream(plan, threads, maker, batch_size=11)
    second.load_state_dict(first.state_dict())
    assert sorted(begun + seen(second)) == whole
    by_epoch = {epoch: {n: v for e, n, v in whole if e == epoch} for epoch in (0, 1)}
    assert all(by_epoch[0][name] != by_epoch[1][name] for name in by_epoch[0])
    assert sorted(seen(make_stream(plan, threads, Maker(decode, noise, seed=6)))) != whole


@THREADS
def test_the_state_is_that_of_the_batch_in_hand_not_of_those_ahead(
    plan: Plan, threads: int
) -> None:
    maker = Maker(decode)
    plain, made = Stream(plan, batch_size=8, epochs=2), make_stream(plan, threads, maker)
    assert made.state_dict() == plain.state_dict()
    for _, batch in zip(plain, made, strict=True):
        assert made.state_dict() == plain.state_dict()
        time.sleep(0.001)
        assert len(batch)
    assert len(seen(made)) == 0  # both epochs are over


@THREADS
def test_iterating_anew_goes_on_after_the_last_batch_and_ends_the_former(
    plan: Plan, threads: int
) -> None:
    made = make_stream(plan, threads, Maker(decode), epochs=1)
    former = iter(made)
    first = seen([next(former)])
    later = iter(made)
    rest = seen([next(later)])
    with pytest.raises(BadInputError, match="this iteration ended"):
        next(former)
    rest += seen(later)
    assert sorted(first + rest) == sorted(seen(make_stream(plan, 0, Maker(decode), epochs=1)))


@THREADS
def test_what_the_users_code_raises_names_the_rows_when_its_batch_is_due(
    plan: Plan, threads: int
) -> None:
    def broken(columns: Any) -> Any:
        if next(calls) == 2:
            raise KeyError("no\nsuch thing")
        return decode(columns)

    calls = itertools.count()
    batches = iter(make_stream(plan, threads, Maker(broken)))
    good: list[Batch] = []
    with pytest.raises(DataError, match=r"decode failed on 8 rows, 'x\d+' to 'x\d+': KeyError"):
        good.extend(batches)
    assert len(good) <= 2
    with pytest.raises(StopIteration):
        next(batches)


@THREADS
def test_what_the_stream_raises_comes_after_the_batches_before(plan: Plan, threads: int) -> None:
    class Failing(Stream):
        def __iter__(self) -> Any:
            batches = super().__iter__()
            for _ in range(4):
                yield next(batches)
            raise StorageError("gone")

    failing = Failing(plan, batch_size=8, columns=COLUMNS)
    batches = iter(InputStream(failing, Maker(decode), threads))
    assert [len(next(batches)) for _ in range(4)] == [8] * 4
    with pytest.raises(StorageError, match="gone"):
        next(batches)


def test_threads_end_with_the_iteration(plan: Plan) -> None:
    def running() -> int:
        return sum(thread.name == "softlabels-inputs" for thread in threading.enumerate())

    batches = iter(make_stream(plan, 3, Maker(decode), batch_size=2))
    next(batches)
    assert running() == 3
    batches.close()
    assert running() == 0


def test_at_most_so_many_batches_are_made_ahead(plan: Plan) -> None:
    made: list[int] = []

    def make(batch: Batch) -> torch.Tensor:
        made.append(batch.position)
        return decode(batch.columns)

    batches = iter(make_stream(plan, 2, make, epochs=1))
    next(batches)
    time.sleep(0.1)
    assert len(made) <= 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda columns: decode(columns)[1:], "expected one entry a row"),
        (lambda columns: (decode(columns), torch.tensor(1)), "expected one entry a row"),
    ],
)
def test_inputs_of_other_rows_are_refused(plan: Plan, wrong: Any, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        next(iter(make_stream(plan, 1, Maker(wrong))))


def test_inputs_that_no_student_takes_are_refused(plan: Plan) -> None:
    with pytest.raises(BadInputError, match="expected a tensor, or a tuple or mapping"):
        next(iter(make_stream(plan, 1, Maker(lambda columns: [decode(columns)]))))
    with pytest.raises(BadInputError, match="threads: expected at least 0, found -1"):
        make_stream(plan, -1, Maker(decode))

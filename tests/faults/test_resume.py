"""Random plans, read by any ranks and workers, stopped and resumed anywhere by others."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest

from softlabels.plan import Plan
from softlabels.store.table import Table
from softlabels.student.order import owned_positions
from softlabels.student.stream import Batch, Stream
from tests.faults.record import record, scaled
from tests.plans import make_plan, row_groups
from tests.tables import make_table

EPOCHS = 2

Row = tuple[str, float]
"""An example id and its loss weight."""

State = dict[str, int | str]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Table]:
    """35, 20 and 9 rows in row groups of 5, 7 and 3."""
    folder = tmp_path_factory.mktemp("tables")
    return [
        make_table(folder / name, rows=rows, shard_rows=2 * size, row_group_rows=size, prefix=name)
        for name, rows, size in (("x", 35, 5), ("y", 20, 7), ("z", 9, 3))
    ]


@pytest.fixture(scope="module")
def ids(tables: Sequence[Table]) -> dict[tuple[str, int], list[str]]:
    """The example ids of each row group, by its file and number."""
    return {
        (file, group): batch["example_id"].to_pylist()
        for table in tables
        for (file, group, _), batch in zip(
            row_groups(table), table.batches(["example_id"]), strict=True
        )
    }


def random_plan(tables: Sequence[Table], rng: np.random.Generator) -> Plan:
    """Some of the tables and of their rows, in up to three stages, mixed within each."""
    used = rng.permutation(3)[: rng.integers(1, 4)].tolist()
    part = rng.choice([0.2, 0.7, 1.0])

    def keep(entry: int, rows: int) -> list[int] | None:
        chosen = np.flatnonzero(rng.random(rows) < part).tolist()
        if not chosen and entry == 0:  # one entry always stays, so that the plan is not empty
            chosen = [0]
        return None if len(chosen) == rows else chosen

    return make_plan(
        [tables[number] for number in used],
        stages=rng.integers(0, 3, len(used)).tolist(),
        repeats=rng.integers(1, 4, len(used)).tolist(),
        loss_weights=rng.choice([0.25, 1.0, 2.0], len(used)).tolist(),
        keep=keep,
    )


def rows_of(plan: Plan, ids: dict[tuple[str, int], list[str]]) -> Counter[Row]:
    """How often each row comes in an epoch, by the plan's entries alone."""
    found: Counter[Row] = Counter()
    for entry in plan.entries.to_pylist():
        there = ids[entry["file"], entry["row_group"]]
        rows = range(len(there)) if entry["rows"] is None else entry["rows"]
        for row in rows:
            found[there[row], entry["loss_weight"]] += entry["repeats"]
    return found


def rows_in(batch: Batch) -> list[Row]:
    return list(zip(batch.example_ids.to_pylist(), batch.loss_weights.tolist(), strict=True))


def in_turn(workers: Sequence[Stream]) -> Iterator[Batch]:
    """The batches of a rank, as a DataLoader takes them of its workers."""
    waiting = [iter(stream) for stream in workers]
    while waiting:
        for one in list(waiting):
            batch = next(one, None)
            if batch is None:
                waiting.remove(one)
            else:
                yield batch


def whole_batch(parts: Sequence[Batch]) -> list[Row]:
    """The rows of a global batch, from what each rank has of it."""
    start, total = parts[0].position, sum(len(part) for part in parts)
    found: list[Row] = [("", 0.0)] * total
    for rank, part in enumerate(parts):
        assert (part.epoch, part.position) == (parts[0].epoch, start)
        owned = owned_positions(start, start + total, rank, len(parts)) - start
        for at, row in zip(owned.tolist(), rows_in(part), strict=True):
            found[at] = row
    assert {part.global_weight for part in parts} == {sum(weight for _, weight in found)}
    return found


def read(
    plan: Plan, options: dict[str, Any], state: State | None, rng: np.random.Generator, last: bool
) -> tuple[list[Row], State]:
    """What random ranks and workers read from a state on, to a random batch or to the end."""
    world_size, workers, batch_size = rng.integers([1, 0, 1], [9, 5, 30]).tolist()
    ranks = [
        [
            Stream(
                plan,
                batch_size=batch_size,
                epochs=EPOCHS,
                rank=rank,
                world_size=world_size,
                worker=worker,
                workers=max(1, workers),
                **options,
            )
            for worker in range(max(1, workers))
        ]
        for rank in range(world_size)
    ]
    first = ranks[0][0]
    for stream in (stream for rank in ranks for stream in rank):
        if state is not None:
            stream.load_state_dict(state)
    steps = EPOCHS * first.batches_per_epoch
    stop = None if last else int(rng.integers(1, max(2, steps)))
    rows: list[Row] = []
    found = state or Stream(plan, batch_size=1, **options).state_dict()
    batches = [in_turn(rank) for rank in ranks]
    for parts in islice(zip(*batches, strict=True), stop):
        rows += whole_batch(parts)
        found = first.state_after(parts[0])
    return rows, found


def test_whoever_reads_and_wherever_they_stop_the_rows_are_those_of_one_reader(
    tables: Sequence[Table], ids: dict[tuple[str, int], list[str]]
) -> None:
    cases, mixed, stops = scaled(40, 600), 0, 0
    for case in range(cases):
        rng = np.random.default_rng([6, case])
        plan = random_plan(tables, rng)
        options: dict[str, Any] = {
            "seed": int(rng.integers(9)),
            "shuffle_rows": int(rng.integers(1, 60)),
        }
        alone = Stream(plan, batch_size=7, epochs=EPOCHS, **options)
        expected = [row for batch in alone for row in rows_in(batch)]
        once = rows_of(plan, ids)
        assert Counter(expected) == Counter({row: EPOCHS * n for row, n in once.items()}), case
        half = len(expected) // EPOCHS
        assert Counter(expected[:half]) == once, case
        found: list[Row] = []
        state: State | None = None
        legs = int(rng.integers(1, 4))
        for leg in range(legs):
            rows, state = read(plan, options, state, rng, last=leg == legs - 1)
            found += rows
        assert found == expected, case
        mixed += alone.state_dict()["version"] == 2
        stops += legs - 1
    assert 0 < mixed < cases
    record("streams read by random ranks and workers", {"plans": cases, "stops": stops})

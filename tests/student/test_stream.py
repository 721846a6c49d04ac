import gc
import json
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softlabels.errors import BadInputError, IntegrityError, MismatchError, StorageError
from softlabels.plan import POSITIONS, Plan, entries_table
from softlabels.rules import Condition, PositionRules, PositionWeight
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.student import lease
from softlabels.student.order import Order, owned_positions
from softlabels.student.reader import Reader
from softlabels.student.stream import Batch, Stream, window_rows
from tests.plans import make_plan
from tests.sequences import make_long, make_uneven
from tests.tables import dense_logprobs, make_table, make_targets

Tables = tuple[Table, Table]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """x: 90 rows, k = 5; y: 40 rows, k = 3; carried column `number`; temperature 2."""
    folder = tmp_path_factory.mktemp("tables")

    def make(name: str, rows: int, k: int, seed: int) -> Table:
        number = pa.array(np.arange(rows) + 1000 * seed, pa.int64())
        return make_table(
            folder / name,
            rows=rows,
            k=k,
            seed=seed,
            temperatures=[2.0],
            shard_rows=30,
            row_group_rows=10,
            carried={"number": number},
            prefix=name,
        )

    return make("x", 90, 5, 0), make("y", 40, 3, 1)


@pytest.fixture(scope="module")
def plan(tables: Tables) -> Plan:
    """90 rows of x once, weight 1; every third of y's 40 twice, weight .5: 118 rows an epoch."""

    def keep(entry: int, rows: int) -> list[int] | None:
        return None if entry < 9 else list(range(entry % 3, rows, 3))

    return make_plan(tables, repeats=[1, 2], loss_weights=[1.0, 0.5], keep=keep)


def make_stream(plan: Plan, batch_size: int = 16, **options: Any) -> Stream:
    return Stream(plan, batch_size=batch_size, **({"shuffle_rows": 40} | options))


def names(batches: Iterator[Batch]) -> list[str]:
    return [name for batch in batches for name in batch.example_ids.to_pylist()]


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "softlabels-read-ahead"]


def test_each_row_comes_as_often_as_the_plan_says_in_every_epoch(plan: Plan) -> None:
    stream = make_stream(plan, epochs=3)
    assert (stream.rows_per_epoch, len(stream), stream.batches_per_epoch) == (118, 8, 8)
    batches = list(stream)
    assert [b.position for b in batches if b.epoch == 1] == list(range(0, 118, 16))
    assert [len(b) for b in batches] == [16, 16, 16, 16, 16, 16, 16, 6] * 3
    for epoch in range(3):
        counts = Counter(names(b for b in batches if b.epoch == epoch))
        assert sum(counts.values()) == 118
        assert {n for n, c in counts.items() if c == 1} == {f"x{i:05d}" for i in range(90)}
        assert {c for n, c in counts.items() if n.startswith("y")} == {2}
    assert list(stream) == []


def test_rows_hold_what_the_table_holds(plan: Plan) -> None:
    exact = {
        name: shards.round_to_profile(
            make_targets(
                dense_logprobs(rows, 10, seed), k, np.arange(rows) % 10, temperatures=[2.0]
            ),
            "precise",
        )
        for name, rows, k, seed in (("x", 90, 5, 0), ("y", 40, 3, 1))
    }
    stream = make_stream(plan, epochs=1, columns=["number"], temperatures=[2.0])
    assert (stream.k, stream.draws) == (5, 0)
    for batch in stream:
        for at, name in enumerate(batch.example_ids.to_pylist()):
            expected, row = exact[name[0]], int(name[1:])
            k = expected.k
            assert batch.targets.label_ids is not None
            assert batch.targets.tail is not None
            assert expected.tail is not None
            assert batch.targets.ids[at].tolist() == expected.ids[row].tolist() + [-1] * (5 - k)
            assert batch.targets.logprobs[at, :k].tolist() == expected.logprobs[row].tolist()
            assert np.all(batch.targets.logprobs[at, k:] == -np.inf)
            assert batch.targets.tail[at] == expected.tail[row]
            assert batch.targets.temper[2.0].tail[at] == expected.temper[2.0].tail[row]
            assert batch.targets.label_ids[at] == row % 10
            assert batch.columns["number"][at].as_py() == row + (1000 if name[0] == "y" else 0)
            assert batch.loss_weights[at] == (1.0 if name[0] == "x" else 0.5)
        assert batch.loss_weights.dtype == np.float32
        assert batch.global_weight == batch.loss_weights.sum()


def test_batches_are_their_own_to_write_to(plan: Plan) -> None:
    untouched = [batch.targets.logprobs.copy() for batch in make_stream(plan, epochs=2)]
    for batch, expected in zip(make_stream(plan, epochs=2), untouched, strict=True):
        assert np.array_equal(batch.targets.logprobs, expected)
        batch.targets.logprobs[:] = 0
        batch.loss_weights[:] = 0


def test_the_order_is_that_of_the_pure_function(plan: Plan) -> None:
    def values(name: str) -> np.ndarray[Any, Any]:
        return np.array(plan.entries[name].to_pylist())

    order = Order(
        plan.fingerprint,
        values("stage"),
        values("num_rows"),
        values("repeats"),
        0,
        True,
        40,
        np.array([entry["table"] == "b" for entry in plan.entries.to_pylist()]),
    )
    expected = []
    for epoch in range(2):
        entries, rows = order.epoch(epoch).read(0, 118)
        expected += list(zip(entries.tolist(), rows.tolist(), strict=True))
    numbers = [
        n for b in make_stream(plan, epochs=2, columns=["number"]) for n in b.columns["number"]
    ]
    kept = [entry["rows"] or range(10) for entry in plan.entries.to_pylist()]
    first = [10 * e if e < 9 else 1000 + 10 * (e - 9) for e in range(13)]
    assert [n.as_py() for n in numbers] == [first[e] + kept[e][row] for e, row in expected]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 1000},
        {"read_ahead": 7},
        {"cache_bytes": 0},
        {"cache_bytes": 3000},
        {"columns": ["number"]},
    ],
)
def test_the_order_depends_on_nothing_else(plan: Plan, options: dict[str, Any]) -> None:
    expected = names(iter(make_stream(plan, epochs=2)))
    assert names(iter(make_stream(plan, **({"epochs": 2} | options)))) == expected


@pytest.mark.parametrize("options", [{"seed": 1}, {"shuffle": False}, {"shuffle_rows": 1000}])
def test_another_order_on_request(plan: Plan, options: dict[str, Any]) -> None:
    other = names(iter(make_stream(plan, epochs=1, **options)))
    usual = names(iter(make_stream(plan, epochs=1)))
    assert other != usual
    assert sorted(other) == sorted(usual)


def test_another_plan_and_another_epoch_are_in_another_order(plan: Plan) -> None:
    stream = make_stream(plan, epochs=2)
    first, second = (names(islice(iter(stream), len(stream))) for _ in range(2))
    assert first != second
    renamed = replace(plan, recipe={"other": 1})
    assert names(iter(make_stream(renamed, epochs=1))) != first


def test_unshuffled_rows_come_in_plan_order(plan: Plan) -> None:
    found = names(iter(make_stream(plan, epochs=1, shuffle=False)))
    assert found[:90] == [f"x{i:05d}" for i in range(90)]
    first_y = [f"y{i:05d}" for i in (0, 3, 6, 9)]
    assert found[90:98] == first_y * 2


def test_stages_come_in_order(tables: Tables) -> None:
    plan = make_plan(tables, stages=[1, 0])
    assert "".join(n[0] for n in names(iter(make_stream(plan, epochs=2)))) == (
        ("y" * 40 + "x" * 90) * 2
    )


@pytest.mark.parametrize("world_size", [2, 3, 8, 64])
def test_ranks_together_read_what_one_reads(plan: Plan, world_size: int) -> None:
    alone = list(make_stream(plan, batch_size=20, epochs=2))
    ranks = [
        make_stream(plan, batch_size=20, epochs=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert {(b.epoch, b.position, b.global_weight) for b in parts} == {
            (whole.epoch, whole.position, whole.global_weight)
        }
        found = [""] * len(whole)
        for rank, part in enumerate(parts):
            owned = owned_positions(whole.position, whole.position + len(whole), rank, world_size)
            for at, name in zip(owned, part.example_ids.to_pylist(), strict=True):
                found[at - whole.position] = name
        assert found == whole.example_ids.to_pylist()
    assert len({json.dumps(stream.state_dict()) for stream in ranks}) == 1


def test_a_rank_without_rows_gets_empty_batches(plan: Plan) -> None:
    batches = list(
        make_stream(
            plan, batch_size=1, epochs=1, rank=63, world_size=64, columns=["number"], shuffle_rows=1
        )
    )
    assert [b.position for b in batches if len(b)] == [63]
    empty = batches[0]
    assert len(batches) == 118
    assert empty.targets.ids.shape == (0, 5)
    assert empty.targets.num_positions.shape == (0,)
    assert empty.columns["number"].type == pa.int64()
    assert empty.loss_weights.shape == (0,)
    assert empty.global_weight in (0.5, 1.0)


def test_resuming_anywhere_goes_on_as_if_never_stopped(plan: Plan) -> None:
    whole = make_stream(plan, epochs=3)
    states = [whole.state_dict()]
    found = []
    for batch in whole:
        states.append(whole.state_dict())
        found.append(batch)
    for done, state in enumerate(states):
        resumed = make_stream(plan, epochs=3)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        assert names(islice(iter(resumed), 9)) == names(iter(found[done : done + 9]))
        other = make_stream(plan, epochs=3, batch_size=50, rank=1, world_size=3)
        other.load_state_dict(state)
        first = next(iter(other), None)
        assert first is None or (first.epoch, first.position) == (state["epoch"], state["position"])


def test_the_state_is_that_of_the_last_batch_handed_out(plan: Plan) -> None:
    stream = make_stream(plan, read_ahead=8)
    state = stream.state_dict()
    assert (state["epoch"], state["position"]) == (0, 0)
    batches = iter(stream)
    next(batches)
    state = stream.state_dict()
    assert (state["epoch"], state["position"], state["fingerprint"]) == (0, 16, plan.fingerprint)
    assert len(json.dumps(state)) < 1024
    for _ in range(7):
        next(batches)
    assert (stream.state_dict()["epoch"], stream.state_dict()["position"]) == (1, 0)


def test_iterating_again_goes_on_where_the_last_iteration_stopped(plan: Plan) -> None:
    stream = make_stream(plan, epochs=2)
    pieces = []
    for count in (3, 1, 9, 100):
        pieces += names(islice(iter(stream), count))
    assert pieces == names(iter(make_stream(plan, epochs=2)))


def test_an_iteration_that_was_replaced_says_so(plan: Plan) -> None:
    stream = make_stream(plan)
    for move in (lambda: next(iter(stream)), lambda: stream.load_state_dict(stream.state_dict())):
        old = iter(stream)
        next(old)
        move()
        with pytest.raises(BadInputError, match="moved or iterated anew"):
            next(old)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed is 0, this stream has 1"),
        ({"shuffle": False}, "shuffle is 1, this stream has 0"),
        ({"shuffle_rows": 41}, "shuffle_rows is 40, this stream has 41"),
    ],
)
def test_a_state_of_another_order_is_refused(
    plan: Plan, options: dict[str, Any], named: str
) -> None:
    state = make_stream(plan).state_dict()
    with pytest.raises(MismatchError, match=named):
        make_stream(plan, **options).load_state_dict(state)


def test_a_state_of_another_plan_or_of_no_place_is_refused(plan: Plan) -> None:
    stream = make_stream(plan)
    state = stream.state_dict()
    other = make_stream(replace(plan, recipe={"other": 1}))
    with pytest.raises(MismatchError) as refused:
        other.load_state_dict(state)
    assert plan.fingerprint in str(refused.value)
    assert str(other.state_dict()["fingerprint"]) in str(refused.value)
    with pytest.raises(BadInputError, match="position 118 is not a place"):
        stream.load_state_dict(state | {"position": 118})
    with pytest.raises(BadInputError, match="epoch 'one'"):
        stream.load_state_dict(state | {"epoch": "one"})
    with pytest.raises(BadInputError, match="'position' is missing"):
        stream.load_state_dict({k: v for k, v in state.items() if k != "position"})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"shuffle_rows": 0}, "shuffle_rows"),
        ({"read_ahead": 0}, "read_ahead"),
        ({"epochs": -1}, "epochs"),
        ({"world_size": 65}, "world_size"),
        ({"rank": 1}, "rank"),
        ({"columns": ["nothing"]}, "'nothing'"),
        ({"roots": {"other": "."}}, "'other'"),
    ],
)
def test_arguments_out_of_range_are_refused(
    plan: Plan, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadInputError, match=named):
        make_stream(plan, **options)


def test_plans_that_cannot_be_read_are_refused(plan: Plan) -> None:
    with pytest.raises(BadInputError, match="no rows"):
        make_stream(replace(plan, entries=entries_table([])))
    entries = plan.entries.to_pylist()
    entries[3]["repeats"] = -1
    with pytest.raises(IntegrityError, match="entry 3 of the plan has repeats -1"):
        make_stream(replace(plan, entries=entries_table(entries)))
    with pytest.raises(MismatchError, match=r"temperature 3\.0"):
        make_stream(plan, temperatures=[3.0])


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_no_row_of_a_damaged_file_is_handed_out(tmp_path: Path, damage: str) -> None:
    table = make_table(tmp_path / "t", rows=60, shard_rows=20, row_group_rows=10)
    stream = make_stream(make_plan(table), batch_size=5, shuffle_rows=10, cache_bytes=0, epochs=9)
    path = Path(table.root.uri) / table.files[1].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4 if damage == "flip" else 0
    path.write_bytes(data[:-100] if damage == "cut" else data)
    if damage == "remove":
        path.unlink()
    found: list[str] = []

    def read() -> None:
        for batch in stream:
            found.extend(batch.example_ids.to_pylist())

    with pytest.raises(StorageError if damage == "remove" else IntegrityError) as refused:
        read()
    assert path.name in str(refused.value)
    assert not {f"x{i:05d}" for i in range(20, 40)} & set(found)
    assert not readers()


def test_stopping_early_leaves_no_thread(plan: Plan) -> None:
    stream = make_stream(plan)
    for _ in stream:
        assert len(readers()) == 1
        break
    assert not readers()
    batches = iter(stream)
    next(batches)
    del batches, stream
    gc.collect()
    assert not readers()


def test_waiting_is_counted_over_iterations(plan: Plan) -> None:
    stream = make_stream(plan, cache_bytes=0)
    assert stream.waited_seconds == 0
    next(iter(stream))
    first = stream.waited_seconds
    next(iter(stream))
    assert 0 < first < stream.waited_seconds < 30


def test_tables_are_found_where_roots_say(plan: Plan, tables: Tables, tmp_path: Path) -> None:
    moved = make_plan({"x": tables[0]})
    elsewhere = tmp_path / "elsewhere"
    Path(tables[0].root.uri).rename(elsewhere)
    try:
        found = names(iter(make_stream(moved, epochs=1, roots={"x": str(elsewhere)})))
        assert sorted(found) == [f"x{i:05d}" for i in range(90)]
    finally:
        elsewhere.rename(tables[0].root.uri)


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """80 uneven sequences whose positions all stay; those below 2.3 nats weigh .25."""
    table = make_uneven(tmp_path_factory.mktemp("weighed") / "t", rows=80)
    easy = Condition(column="entropy", operator="<", constant=2.3)
    rules = PositionRules(weights=(PositionWeight(where=(easy,), weight=0.25),))
    plan = make_plan(table)
    tables = {"a": plan.tables["a"].model_copy(update={"positions": rules})}
    return replace(plan, tables=tables, features=(POSITIONS,))


@pytest.mark.parametrize("world_size", [1, 3])
def test_position_weights_are_those_of_their_positions(weighed: Plan, world_size: int) -> None:
    for rank in range(world_size):
        stream = make_stream(weighed, 7, epochs=2, rank=rank, world_size=world_size)
        sizes = []
        for batch in stream:
            assert batch.position_weights is not None
            assert batch.targets.entropy is not None
            expected = np.where(batch.targets.entropy < np.float32(2.3), 0.25, 1.0)
            assert batch.position_weights.tolist() == expected.tolist()
            assert len(batch.position_weights) == batch.targets.num_positions.sum()
            sizes.append(len(expected))
        assert len(set(sizes)) > 3


def test_plans_without_weights_have_none_in_batches(plan: Plan) -> None:
    assert next(iter(make_stream(plan))).position_weights is None


def test_position_weights_are_part_of_what_decides_the_order(weighed: Plan) -> None:
    plain = replace(
        weighed,
        tables={"a": weighed.tables["a"].model_copy(update={"positions": None})},
        features=(),
    )
    with pytest.raises(MismatchError, match="fingerprint is"):
        make_stream(plain).load_state_dict(make_stream(weighed).state_dict())


def test_windows_hold_32_mib_of_files_and_a_bounded_number_of_rows(plan: Plan) -> None:
    def rows(*files: tuple[int, int]) -> int:
        made = plan.tables["a"].files[0]
        sized = [made.model_copy(update={"size": s, "num_rows": n}) for s, n in files]
        table = plan.tables["a"].model_copy(update={"files": tuple(sized)})
        return window_rows(replace(plan, tables={"a": table}))

    assert rows((36_000 * 1000, 1000)) == (32 << 20) // 36_000 == 932
    assert rows((36_000 * 1000, 1000), (12_000 * 1000, 1000)) == (32 << 20) // 24_000
    assert rows((50 * 1000, 1000)) == 65_536
    assert rows((10_000_000, 10)) == 256
    assert rows((0, 0)) == 256


def test_the_window_of_the_plan_is_part_of_the_state(plan: Plan) -> None:
    stream = Stream(plan, batch_size=16)
    assert stream.state_dict()["shuffle_rows"] == window_rows(plan)
    given = Stream(plan, batch_size=16, shuffle_rows=window_rows(plan))
    given.load_state_dict(stream.state_dict())


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """64 sequences of 512 positions with 16 ids and 16 draws, in row groups of 10."""
    return make_plan(make_long(tmp_path_factory.mktemp("long") / "t"))


def test_a_position_takes_what_the_documentation_says(long: Plan) -> None:
    entry = Reader(long).entry(0)
    assert round(entry.nbytes / len(entry.targets.ids)) == 212
    size = sum(file.size for file in long.tables["a"].files)
    assert 60 < size / (64 * 512) < 90  # random ids are no smaller than real ones
    window = window_rows(long) * 512 * 212
    assert 75e6 < window < 125e6


@pytest.mark.parametrize(
    ("read_ahead", "cache_rows", "keep"), [(1, 0, None), (2, 0, None), (1, 40, None), (1, 0, 0.04)]
)
def test_memory_stays_within_what_the_documentation_says(
    long: Plan,
    read_ahead: int,
    cache_rows: int,
    keep: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")  # mapped rows would not be counted
    plan, row = long, Reader(long).entry(0).nbytes / 10
    if keep is not None:  # 99 %: what is decoded is copied, from Arrow's memory into numpy's
        rules = PositionRules(where=(Condition(column="entropy", operator=">", constant=keep),))
        tables = {"a": long.tables["a"].model_copy(update={"positions": rules})}
        plan = replace(long, tables=tables, features=(POSITIONS,))
    options = {"shuffle_rows": 20, "read_ahead": read_ahead, "cache_bytes": int(cache_rows * row)}
    stream = make_stream(plan, 4, epochs=2, **options)
    gc.collect()
    lease._free.clear()  # what others left would be used, and not be counted
    before, peak = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for _ in stream:
            time.sleep(0.02)  # a slow student: the reader gets as far ahead as it may
            held, _ = tracemalloc.get_traced_memory()
            peak = max(peak, held + pa.total_allocated_bytes() - before)
    finally:
        tracemalloc.stop()
    # Row groups are of 10 rows, the last of 4: a window of about 20 has 24 at most.
    # Two are held, and parts are whole windows here: one in hand, one that is gathered. Two row
    # groups more while one is decoded and copied. Blocks are up to an eighth larger than what is
    # in them.
    rows = (read_ahead + 4) * 24 + cache_rows + 20
    assert 40 * row < peak < 1.125 * rows * row + 1e6


def test_streaming_needs_no_teacher_and_no_database_and_ends(plan: Plan, tmp_path: Path) -> None:
    plan.write(tmp_path / "plan.parquet")
    code = f"""
import sys
from softlabels.plan import Plan
from softlabels.student.stream import Stream
kept = iter(Stream(Plan.read({str(tmp_path / "plan.parquet")!r}), batch_size=4))
assert len(next(kept)) == 4
heavy = {{"deltalake", "duckdb", "polars", "transformers", "torch", "pandas"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """x: 30 rows, k = 4; y: 12 rows, k = 2; row groups of 5."""
    folder = tmp_path_factory.mktemp("small")
    return (
        make_table(folder / "x", rows=30, k=4, shard_rows=15, row_group_rows=5),
        make_table(folder / "y", rows=12, k=2, shard_rows=12, row_group_rows=5, prefix="y"),
    )


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    seed = draw(st.integers(0, 2**32 - 1))
    full = draw(st.booleans())

    def keep(entry: int, rows: int) -> list[int] | None:
        if full:
            return None
        chosen = np.random.default_rng((seed, entry)).random(rows) < 0.4
        # One entry always stays, so that the plan is not empty.
        return np.flatnonzero(chosen).tolist() or ([0] if entry == 0 else [])

    pair = st.tuples(st.integers(0, 2), st.integers(0, 2))
    return {
        "repeats": draw(st.tuples(st.integers(1, 3), st.integers(0, 3))),
        "stages": draw(pair),
        "loss_weights": draw(st.sampled_from([(1.0, 1.0), (1.0, 0.25)])),
        "keep": keep,
    }


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    made=plans(),
    options=st.fixed_dictionaries(
        {"seed": st.integers(0, 3), "shuffle": st.booleans(), "shuffle_rows": st.integers(1, 60)}
    ),
    legs=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4)), min_size=1, max_size=2
    ),
)
def test_whoever_reads_and_wherever_they_stop_the_rows_are_the_same(
    small: Tables,
    made: dict[str, Any],
    options: dict[str, Any],
    legs: list[tuple[int, int, int]],
) -> None:
    plan = make_plan(small, **made)
    expected = names(iter(Stream(plan, batch_size=1000, epochs=2, **options)))
    found: list[str] = []
    state = Stream(plan, batch_size=1, **options).state_dict()
    for number, (batch_size, world_size, stop) in enumerate(legs):
        last = number == len(legs) - 1
        ranks = [
            Stream(plan, batch_size=batch_size, epochs=2, rank=r, world_size=world_size, **options)
            for r in range(world_size)
        ]
        for stream in ranks:
            stream.load_state_dict(state)
        steps = zip(*ranks, strict=True)
        for parts in steps if last else islice(steps, stop):
            found += interleaved(list(parts), world_size)
        state = ranks[0].state_dict()
        assert all(stream.state_dict() == state for stream in ranks)
    assert found == expected


def interleaved(parts: list[Batch], world_size: int) -> list[str]:
    """The global batch's example ids, from what each rank got of it."""
    start, total = parts[0].position, sum(len(part) for part in parts)
    weight = sum(float(part.loss_weights.sum()) for part in parts)
    assert all((p.position, p.global_weight) == (start, weight) for p in parts)
    found = [""] * total
    for rank, part in enumerate(parts):
        owned = owned_positions(start, start + total, rank, world_size)
        for at, name in zip(owned, part.example_ids.to_pylist(), strict=True):
            found[at - start] = name
    return found

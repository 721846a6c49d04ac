"""Streams of several sources: blocks of each, read once, and put together in the plan's order."""

import gc
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.plan import Plan, SourceReport
from softlabels.student import windows
from softlabels.student.decode import Decoder
from softlabels.student.rows import Rows
from softlabels.student.stream import Batch, Stream
from tests.plans import make_ensemble_plan, make_plan
from tests.sequences import make_uneven
from tests.student.parts import same_targets
from tests.tables import make_table


def in_sources(plan: Plan, count: int) -> Plan:
    """The plan as if its recipe had `count` sources of about as many entries each."""
    entries = plan.entries.to_pylist()
    table = next(iter(plan.tables))
    report = [
        SourceReport(
            source=f"s{number}",
            table=table,
            rows=0,
            dropped={},
            kept=0,
            reads=sum(e["num_rows"] * e["repeats"] for e in entries[start:stop]),
            share_asked=None,
            share=0,
            loss_weight=1,
        )
        for number in range(count)
        for start, stop in [(len(entries) * n // count for n in (number, number + 1))]
    ]
    recipe = {"sources": [{"name": source.source, "stage": 0} for source in report]}
    return replace(plan, recipe=recipe, report=tuple(report))


def by_example(plan: Plan, **options: Any) -> dict[str, tuple[Batch, int]]:
    """Each example's batch, and its row there."""
    settings = {"batch_size": 9, "epochs": 1, "shuffle_rows": 30} | options
    return {
        name: (batch, row)
        for batch in Stream(plan, **settings)
        for row, name in enumerate(batch.example_ids.to_pylist())
    }


def assert_rows_are_the_same(mixed: Plan, alone: Plan, **options: Any) -> None:
    assert Stream(mixed, batch_size=9).state_dict()["version"] == 2
    found, expected = by_example(mixed, **options), by_example(alone, **options)
    assert found.keys() == expected.keys()
    for name, (batch, row) in found.items():
        other, at = expected[name]
        same_targets(batch.targets.slice(row, row + 1), other.targets.slice(at, at + 1))
        assert len(batch.others) == len(other.others)
        for one, two in zip(batch.others, other.others, strict=True):
            same_targets(one.targets.slice(row, row + 1), two.targets.slice(at, at + 1))
        if batch.member_weights is not None and other.member_weights is not None:
            assert np.array_equal(batch.member_weights[row], other.member_weights[at])
        for column, values in batch.columns.items():
            assert values[row] == other.columns[column][at]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """100 rows in row groups of 10."""
    folder = tmp_path_factory.mktemp("short") / "t"
    return make_plan(make_table(folder, rows=100, shard_rows=50, row_group_rows=10))


def test_short_rows_of_several_sources_are_themselves(short: Plan) -> None:
    assert_rows_are_the_same(in_sources(short, 3), short, columns=["top1_id"])


def test_long_rows_of_several_sources_are_themselves(tmp_path: Path) -> None:
    plan = make_plan(make_uneven(tmp_path / "t", rows=60, files=6))
    assert_rows_are_the_same(in_sources(plan, 3), plan, columns=["input_ids"])


@pytest.mark.parametrize("rank", [0, 2])
def test_rows_of_several_teachers_and_sources_are_themselves(tmp_path: Path, rank: int) -> None:
    tables = {
        "a": make_table(tmp_path / "a", rows=60, k=4, seed=1, row_group_rows=10),
        "b": make_table(tmp_path / "b", rows=60, k=3, seed=2, row_group_rows=15),
    }
    plan = make_ensemble_plan(tables, weights={"a": 1, "b": lambda name: int(name[1:]) % 5 + 1})
    mixed = in_sources(plan, 2)
    assert_rows_are_the_same(mixed, plan)
    # Of one rank too, whose rows are others in another order.
    whole = by_example(plan)
    for name, (batch, row) in by_example(mixed, rank=rank, world_size=3).items():
        other, at = whole[name]
        same_targets(
            batch.others[0].targets.slice(row, row + 1), other.others[0].targets.slice(at, at + 1)
        )


@pytest.mark.parametrize("sources", [1, 4])
def test_no_row_group_is_decoded_twice_an_epoch(
    short: Plan, sources: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: Counter[tuple[Any, ...]] = Counter()
    decode = Decoder.decode

    def counted(self: Decoder, table: str, path: str, group: int, *more: Any) -> Rows:
        decoded[table, path, group] += 1
        return decode(self, table, path, group, *more)

    monkeypatch.setattr(Decoder, "decode", counted)
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
    plan = in_sources(short, sources)
    stream = Stream(plan, batch_size=7, epochs=1, shuffle_rows=40, cache_bytes=0)
    assert sum(len(batch) for batch in stream) == 100
    assert len(decoded) == 10
    assert set(decoded.values()) == {1}


@pytest.mark.parametrize("sources", [1, 2, 5])
def test_of_each_source_two_blocks_are_held_at_most(
    short: Plan, sources: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    lock, most = threading.Lock(), 0
    make = windows._LoadedBlock

    def counted(*parts: Any) -> Any:
        nonlocal most
        block = make(*parts)
        with lock:
            alive.add(block.held)
            most = max(most, len(alive))
        return block

    monkeypatch.setattr(windows, "_LoadedBlock", counted)
    gc.collect()
    stream = Stream(in_sources(short, sources), batch_size=4, epochs=2, shuffle_rows=20 * sources)
    for _ in stream:
        time.sleep(0.005)  # a slow student: the reader gets as far ahead as it may
    assert sources < most <= 2 * sources


def test_the_next_blocks_are_loaded_while_others_are_handed_out(
    short: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of five sources, of one row group each, end together; the next are there by then.
    stream = Stream(in_sources(short, 5), batch_size=5, epochs=2, shuffle_rows=50, read_ahead=1)
    load = windows.Windows._load

    def slow(self: windows.Windows, *parts: Any) -> Any:
        time.sleep(0.1)
        return load(self, *parts)

    monkeypatch.setattr(windows.Windows, "_load", slow)
    waits = []
    for _ in stream:
        waits.append(stream.waited_seconds)
        time.sleep(0.12)  # ten batches of 50 rows: longer than five loads
    # The first batch waits for its five blocks, no other for more than one.
    assert waits[0] > 0.5
    assert max(np.diff(waits)) < 0.3

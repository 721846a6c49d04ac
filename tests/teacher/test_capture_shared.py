"""Several workers at one run: shards, claims, waiting, and rows that were taken out again."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from softlabels.errors import BadInputError, MismatchError, TryAgainError
from softlabels.store.claims import Claims, claim_path, claimed_units
from softlabels.store.compact import compact
from softlabels.store.deleted import example_keys, record_deleted
from softlabels.store.inspect import verify
from softlabels.store.publish import publish
from softlabels.store.rollback import rollback
from softlabels.store.table import Table, TableFile
from softlabels.teacher.capture import Progress, Report, Sharing, capture
from tests.teacher.jobs import TOYS, make_run, make_spec, stored, write_source
from tests.teacher.test_capture import ids, stop_after

ROW_BY_ROW = {"module": f"{TOYS}:RowByRow"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a source of 100 rows in two files."""
    write_source(tmp_path / "src" / "a.parquet", 0, 60)
    write_source(tmp_path / "src" / "b.parquet", 60, 100)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("3/3", False, True, 60.0), "from 0 to n - 1"),
        (("0/0", False, True, 60.0), "from 0 to n - 1"),
        (("-1/3", False, True, 60.0), "expected i/n"),
        (("1", False, True, 60.0), "'1'"),
        (("1/2/3", False, True, 60.0), "'1/2/3'"),
        (("1/2", True, True, 60.0), "not both"),
        ((None, True, True, 0.5), "lease 0.5"),
        ((None, True, True, float("nan")), "lease nan"),
        ((None, False, False, 60.0), "goes with claims"),
    ],
)
def test_what_cannot_be_meant(arguments: tuple[str | None, bool, bool, float], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        Sharing.parse(*arguments)


def test_shards_take_every_nth_unit_and_together_all(folder: Path) -> None:
    spec = make_spec(folder, shard_rows=10)
    done: list[list[str]] = []
    reports = []
    for number in range(3):
        told: list[str] = []
        done.append(told)

        def committed(unit: str, version: int, told: list[str] = told) -> None:
            told.append(unit)

        progress = Progress(committed=committed)
        reports.append(capture(spec, progress, Sharing(shard=(number, 3))))
    assert [[int(unit[-6:]) for unit in units] for units in done] == [
        [0, 3, 6, 9],
        [1, 4, 7],
        [2, 5, 8],
    ]
    assert [report.left for report in reports] == [6, 3, 0]
    assert [report.committed for report in reports] == [4, 3, 3]
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 100)
    again = capture(spec, sharing=Sharing(shard=(2, 3)))
    assert (again.committed, again.left, again.repeated) == (0, 0, None)


def test_more_shards_than_units(folder: Path) -> None:
    spec = make_spec(folder)
    assert capture(spec, sharing=Sharing(shard=(7, 8))).left == 3
    assert Table.open(spec.table).num_rows == 0


def test_shards_and_one_alone_make_the_same_rows(folder: Path) -> None:
    spec = make_spec(folder, shard_rows=10)
    for number in (1, 0):
        capture(spec, sharing=Sharing(shard=(number, 2)))
    whole = make_spec(folder, shard_rows=10, table=str(folder / "whole"))
    capture(whole)
    # Also in the same order: a table's files lie by unit, whoever was first.
    assert list(Table.open(spec.table).batches()) == list(Table.open(whole.table).batches())


def together(works: list[Callable[[], Report]]) -> list[Report]:
    """What several calls at once report."""
    found: list[Report] = []
    threads = [threading.Thread(target=lambda w=work: found.append(w())) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(works)
    return found


def test_claims_share_the_units_and_label_none_twice(folder: Path) -> None:
    slow = {"module": f"{TOYS}:Slow", "arguments": {"seconds": 0.005}}
    spec = make_spec(folder, shard_rows=5, teacher=slow)
    counts = []

    def work() -> Report:
        seen = {"planned": 0, "done": 0}
        counts.append(seen)

        def add(name: str, rows: int) -> None:
            seen[name] += rows

        progress = Progress(
            planned=lambda rows: add("planned", rows), done=lambda rows, _: add("done", rows)
        )
        return capture(spec, progress, Sharing(claim=True))

    reports = together([work] * 3)
    assert sum(report.rows for report in reports) == 100
    assert sum(report.committed for report in reports) == 20
    assert [report.left for report in reports] == [0, 0, 0]
    assert all(seen["done"] == seen["planned"] for seen in counts)
    table = Table.open(spec.table)
    assert len(table.root.names("data")) == len(table.files) == 20
    assert claimed_units(table.root, reports[0].run_id[:16]) == []
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 100)
    assert verify(table)["problems"] == []


def claimed_by_another(folder: Path, lease: float = 1.0) -> tuple[Claims, str]:
    """Another worker that has claimed the unit 1 of a run without table yet."""
    run, root = make_run(folder), Table.open(make_spec(folder).table).root
    other = Claims(root, run.id[:16], lease)
    unit = other.take([run.units[1].name])
    assert unit is not None
    return other, unit


@pytest.fixture
def begun(folder: Path) -> Path:
    """A table of which unit 0 of three is done."""
    with pytest.raises(TryAgainError):
        capture(make_spec(folder), stop_after(50))
    return folder


def test_the_unit_of_a_dead_worker_is_taken_over(begun: Path) -> None:
    claimed_by_another(begun)
    waited: list[int] = []
    began = time.monotonic()
    report = capture(
        make_spec(begun), Progress(waiting=waited.append), Sharing(claim=True, lease=1.0)
    )
    assert time.monotonic() - began >= 1.0
    assert waited
    assert set(waited) == {1}
    assert (report.rows, report.left) == (60, 0)
    assert stored(begun / "table", ["example_id"])["example_id"] == ids(0, 100)
    assert claimed_units(Table.open(str(begun / "table")).root, report.run_id[:16]) == []


def test_the_unit_of_a_living_worker_is_left_to_it(begun: Path) -> None:
    other, unit = claimed_by_another(begun)
    spec = make_spec(begun)
    done: list[str] = []

    def finish() -> None:
        with other.holding(unit):
            time.sleep(2.5)
            assert done == [f"{unit[:16]}-000002"]  # far longer than the lease, and still waiting
            capture(spec)

    thread = threading.Thread(target=finish)
    thread.start()
    told = Progress(committed=lambda name, version: done.append(name))
    report = capture(spec, told, Sharing(claim=True, lease=1.0))
    thread.join()
    assert (report.rows, report.committed, report.left) == (20, 1, 0)
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 100)


def test_without_waiting_it_ends_and_says_what_is_left(begun: Path) -> None:
    _, unit = claimed_by_another(begun)
    report = capture(make_spec(begun), sharing=Sharing(claim=True, wait=False))
    assert (report.rows, report.committed, report.left) == (20, 1, 1)
    table = Table.open(str(begun / "table"))
    assert claimed_units(table.root, report.run_id[:16]) == [unit]


def test_a_signal_ends_the_waiting(begun: Path) -> None:
    claimed_by_another(begun)
    progress = Progress(waiting=lambda units: os.kill(os.getpid(), signal.SIGTERM))
    reports: list[Report] = []
    progress.reported = lambda report: reports.append(report)
    with pytest.raises(TryAgainError, match="1 units were committed"):
        capture(make_spec(begun), progress, Sharing(claim=True))
    assert (reports[-1].committed, reports[-1].rows) == (1, 20)


def test_a_signal_gives_the_claim_up(begun: Path) -> None:
    with pytest.raises(TryAgainError):
        capture(make_spec(begun), stop_after(10), Sharing(claim=True))
    table = Table.open(str(begun / "table"))
    assert claimed_units(table.root, make_run(begun).id[:16]) == []


def test_a_claim_of_a_committed_unit_goes(folder: Path) -> None:
    spec = make_spec(folder)
    run_id = capture(spec).run_id
    table = Table.open(spec.table)
    table.root.write(claim_path(f"{run_id[:16]}-000001"), b"{}")
    assert capture(spec).committed == 0
    assert claimed_units(table.root, run_id[:16]) == []


def test_another_batch_size_goes_on_with_the_same_rows(folder: Path) -> None:
    with pytest.raises(TryAgainError):
        capture(make_spec(folder, teacher=ROW_BY_ROW, draws=2, batch_size=16), stop_after(50))
    capture(make_spec(folder, teacher=ROW_BY_ROW, draws=2, batch_size=7))
    whole = make_spec(folder, teacher=ROW_BY_ROW, draws=2, table=str(folder / "whole"))
    capture(whole)
    rows = pa.Table.from_batches(Table.open(f"{folder}/table").batches())
    assert rows.equals(pa.Table.from_batches(Table.open(whole.table).batches()))


def test_another_spec_cannot_go_on_with_a_run(begun: Path) -> None:
    for sharing in (Sharing(), Sharing(claim=True), Sharing(shard=(0, 2))):
        with pytest.raises(MismatchError, match=r"k differs: the run has 2, table .* has 3"):
            capture(make_spec(begun, k=2), sharing=sharing)
    assert Table.open(f"{begun}/table").num_rows == 40


def test_rows_that_a_rollback_took_out_are_missed(folder: Path) -> None:
    spec = make_spec(folder)
    assert capture(spec).version == 3
    rollback(Table.open(f"{spec.table}@1"))
    reports: list[Report] = []
    for _ in range(2):
        with pytest.raises(MismatchError, match=r"60 rows .* version 4 .*rollback at version 4"):
            capture(spec, Progress(reported=reports.append))
        assert (reports[-1].missing, reports[-1].left, reports[-1].version) == (60, 0, 4)
    # The two ways out that the message names.
    anew = make_spec(folder, shard_rows=50)
    found = capture(anew)
    assert found.rows == 60
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 100)
    assert capture(spec).missing == 0
    rollback(Table.open(f"{spec.table}@4"))
    rollback(Table.open(f"{spec.table}@3"))
    assert (capture(spec).missing, capture(spec).rows) == (0, 0)


def test_a_rollback_before_its_end_is_seen_at_its_end(folder: Path) -> None:
    spec = make_spec(folder)
    with pytest.raises(TryAgainError):
        capture(spec, stop_after(50))
    rollback(Table.open(f"{spec.table}@0"))
    with pytest.raises(MismatchError, match="40 rows"):
        capture(spec)
    assert stored(spec.table, ["example_id"])["example_id"] == ids(40, 100)


def test_examples_that_were_deleted_do_not_come_back(folder: Path) -> None:
    spec = make_spec(folder)
    with pytest.raises(TryAgainError):
        capture(spec, stop_after(50))
    table = Table.open(spec.table)
    record_deleted(table.root, "c" * 64, example_keys([*ids(45, 50), *ids(200, 300)]))
    report = capture(spec)
    assert (report.rows, report.deleted, report.missing) == (55, 5, 0)
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 45) + ids(50, 100)
    # Nor by another run.
    assert capture(make_spec(folder, shard_rows=50)).rows == 0


def test_an_example_deleted_while_it_is_labelled_does_not_come_in(folder: Path) -> None:
    spec = make_spec(folder)
    capture(spec, sharing=Sharing(shard=(7, 8)))
    root = Table.open(spec.table).root
    left = [True]

    def delete(rows: int, _: float) -> None:
        if rows and left:
            left.pop()
            record_deleted(root, "c" * 64, example_keys(ids(3, 6)))

    report = capture(spec, Progress(done=delete))
    assert (report.rows, report.deleted) == (97, 3)
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 3) + ids(6, 100)
    table = Table.open(spec.table)
    assert len(table.root.names("data")) == len(table.files)  # the first attempt's file is gone


def test_a_compacted_table_is_known_to_hold_the_run(folder: Path) -> None:
    spec = make_spec(folder, shard_rows=10)
    capture(spec)
    before = Table.open(spec.table)
    compact(before)
    after = Table.open(spec.table)
    assert any(file.compacted for file in after.files)
    report = capture(spec)
    assert (report.rows, report.already, report.missing) == (0, 100, 0)
    write_source(folder / "src" / "c.parquet", 90, 130)
    more = capture(make_spec(folder, shard_rows=10))
    assert (more.rows, more.already) == (30, 100)
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 130)


def test_a_published_copy_is_known_to_hold_the_run(folder: Path) -> None:
    spec = make_spec(folder, shard_rows=10)
    with pytest.raises(TryAgainError):
        capture(spec, stop_after(50))
    copy = str(folder / "copy")
    publish(Table.open(spec.table), copy)
    before = Table.open(copy).num_rows
    assert 0 < before < 100
    report = capture(make_spec(folder, shard_rows=10, table=copy))
    assert (report.rows, report.missing) == (100 - before, 0)
    assert sorted(stored(copy, ["example_id"])["example_id"]) == ids(0, 100)
    assert verify(Table.open(copy))["problems"] == []
    assert capture(make_spec(folder, shard_rows=10, table=copy)).rows == 0


def test_each_file_of_another_run_is_looked_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(folder / "other" / "a.parquet", 30, 50)
    other = {"files": str(folder / "other" / "*.parquet")}
    capture(make_spec(folder, source=other, shard_rows=4))
    looked_at: list[str] = []
    batches = Table.batches

    def counting(
        self: Table, columns: list[str] | None = None, files: list[TableFile] | None = None
    ) -> object:
        looked_at.extend(file.path for file in files or ())
        return batches(self, columns, files)

    monkeypatch.setattr(Table, "batches", counting)
    report = capture(make_spec(folder, shard_rows=5))
    assert (report.rows, report.committed) == (80, 20)
    assert len(looked_at) == len(set(looked_at)) == 5

"""Records of runs: written once, kept whole, and which of them are not finished."""

import os
from pathlib import Path

import pytest

from softlabels.errors import IntegrityError, TryAgainError
from softlabels.storage import Root, open_root
from softlabels.store.runs import FOLDER, RunRecord, open_runs, record_run, run_records
from softlabels.store.table import Table
from softlabels.teacher.capture import capture
from tests.teacher.jobs import make_spec, write_source
from tests.teacher.test_capture import stop_after


def make_record(run_id: str = "a" * 64, **changes: object) -> RunRecord:
    values: dict[str, object] = {
        "run_id": run_id,
        "units": 2,
        "rows": 20,
        "spec": {"k": 3},
        "source": {"uri": "/data"},
        "started_at": "2026-11-24T00:00:00+00:00",
    }
    return RunRecord.model_validate(values | changes)


def test_the_first_start_is_what_is_kept(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    record_run(root, make_record())
    record_run(root, make_record(started_at="2027-01-01T00:00:00+00:00", spec={"k": 3, "x": 1}))
    assert run_records(root) == [make_record()]


def test_in_the_order_of_their_starts(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    for day, run in (("03", "a"), ("01", "b"), ("02", "c")):
        record_run(root, make_record(run * 64, started_at=f"2026-11-{day}T00:00:00+00:00"))
    assert [record.run_id[0] for record in run_records(root)] == ["b", "c", "a"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\x00", b'{"run_id": "a"}'])
def test_a_damaged_record_is_said(tmp_path: Path, damage: bytes) -> None:
    root = open_root(tmp_path)
    record_run(root, make_record())
    root.write(f"{FOLDER}/{'a' * 64}.json", damage)
    with pytest.raises(IntegrityError, match=r"run record 'aaa.*\.json' of '.*' is damaged"):
        run_records(root)


def test_a_record_under_the_name_of_another_run_is_damaged(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    root.write(f"{FOLDER}/{'b' * 64}.json", make_record().model_dump_json().encode())
    with pytest.raises(IntegrityError, match="damaged"):
        run_records(root)


def test_a_run_is_open_until_its_last_unit_is_in(tmp_path: Path) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 100)
    spec = make_spec(tmp_path)
    with pytest.raises(TryAgainError):
        capture(spec, stop_after(50))
    (record,) = open_runs(Table.open(spec.table))
    assert (record.units, record.rows) == (3, 100)
    assert record.spec == spec.model_dump(mode="json")
    assert record.source["files"] == 1
    report = capture(make_spec(tmp_path, batch_size=7))
    assert report.run_id == record.run_id
    table = Table.open(spec.table)
    assert open_runs(table) == []
    assert [record.run_id] == [open_run.run_id for open_run in open_runs(table.at(1))]
    assert run_records(table.root) == [record]  # as it was begun


def test_a_capture_that_has_nothing_to_do_writes_nothing(tmp_path: Path) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 100)
    spec = make_spec(tmp_path)
    capture(spec)
    before = {path: path.stat().st_mtime_ns for path in Path(spec.table).rglob("*")}
    capture(spec)
    assert {path: path.stat().st_mtime_ns for path in Path(spec.table).rglob("*")} == before


def test_each_record_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = open_root(tmp_path)
    for number in range(20):
        record_run(root, make_record(f"{number:064x}"))
    read: list[str] = []
    real = Root.read

    def counting(self: Root, path: str) -> bytes:
        read.append(path)
        return real(self, path)

    monkeypatch.setattr(Root, "read", counting)
    assert len(run_records(root)) == 20
    assert len(read) == 20
    record_run(root, make_record("a" * 64))
    assert len(run_records(root)) == 21
    assert len(read) == 21
    root.delete(f"{FOLDER}/{'a' * 64}.json")
    assert len(run_records(root)) == 20
    assert len(read) == 21


def test_a_record_that_changes_is_read_again(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    record_run(root, make_record())
    assert run_records(root) == [make_record()]
    path = tmp_path / FOLDER / f"{'a' * 64}.json"
    path.write_bytes(path.read_bytes().replace(b'"units":2', b'"units":3'))
    os.utime(path, (1, 1))
    with pytest.raises(IntegrityError, match="damaged"):
        run_records(root)

"""rollback: what comes back is what was, as a new version, once; nothing that is there is lost."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from softlabels.errors import (
    BadInputError,
    IntegrityError,
    MismatchError,
    StorageError,
    TryAgainError,
)
from softlabels.lineage import Calibration
from softlabels.query.takedown import Request, take_down
from softlabels.store import closed, tags
from softlabels.store.compact import compact
from softlabels.store.inspect import verify
from softlabels.store.log import log_lines
from softlabels.store.rollback import plan_rollback, rollback
from softlabels.store.table import Table
from softlabels.store.vacuum import Keep, vacuum
from tests.store.test_vacuum import (
    RUN,
    Killed,
    between,
    killed_at,
    opened,
    replaced,
    rows_of,
    stored,
)
from tests.tables import make_lineage, make_table


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Version 1 has 60 rows in 3 files, 2 has 5 more in one, 3 has 20 rows in another one."""
    table = make_table(tmp_path / "t", rows=60, shard_rows=20)
    unit = stored(table, slice(0, 5))
    table.commit([unit], make_lineage(RUN, [unit.key], 5))
    replaced(table, "c2" * 32, 20)
    return tmp_path / "t"


def test_a_version_comes_back_as_a_new_one_and_nothing_is_erased(home: Path) -> None:
    before = {version: rows_of(opened(home, version)) for version in (1, 2, 3)}
    found = rollback(opened(home, 1), "t@1")
    assert (found.from_version, found.version, found.to, found.same) == (3, 4, 1, False)
    assert (found.rows_before, found.rows_after) == (20, 60)
    assert (len(found.added), len(found.removed)) == (3, 1)
    newest = opened(home)
    assert newest.version == 4
    assert rows_of(newest) == before[1]
    assert [f.path for f in newest.files] == [f.path for f in opened(home, 1).files]
    assert [f.bounds for f in newest.files] == [f.bounds for f in opened(home, 1).files]
    assert newest.snapshot_digest == opened(home, 1).snapshot_digest
    assert verify(newest)["problems"] == []
    for version, rows in before.items():
        assert rows_of(opened(home, version)) == rows
    assert tags.tag_names(newest.root) == [], "the pin is gone"


def test_the_same_again_does_nothing(home: Path) -> None:
    rollback(opened(home, 1))
    again = rollback(opened(home, 1))
    assert (again.same, again.version) == (True, 4)
    assert opened(home).version == 4
    assert rollback(opened(home)).same


def test_back_and_forth(home: Path) -> None:
    rows = {version: rows_of(opened(home, version)) for version in (1, 2, 3)}
    for step, version in enumerate((1, 2, 3, 1, 3, 2), start=4):
        assert rollback(opened(home, version)).version == step
        assert rows_of(opened(home)) == rows[version]
    assert rollback(opened(home, 0)).rows_after == 0
    assert opened(home).num_rows == 0


def test_a_plan_changes_nothing_and_says_what_would_be(home: Path) -> None:
    found = plan_rollback(opened(home, 1))
    assert (found.version, found.same, len(found.added), len(found.removed)) == (3, False, 3, 1)
    assert opened(home).version == 3
    assert plan_rollback(opened(home, 3)).same


def test_units_that_go_stay_committed_and_are_counted(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60, shard_rows=20)
    units = [stored(table, slice(n, n + 2), RUN, n) for n in range(3)]
    table.commit(units, make_lineage(RUN, [unit.key for unit in units], 6))
    found = rollback(opened(tmp_path / "t", 1))
    assert (found.units, found.runs) == (3, (RUN,))
    newest = opened(tmp_path / "t")
    assert newest.num_rows == 60
    assert all(newest.committed(unit.key) for unit in units)
    # The same capture's commit adds nothing; another run's does.
    assert newest.commit(units, make_lineage(RUN, [u.key for u in units], 6)).num_rows == 60
    other = stored(table, slice(0, 3), "f1" * 32)
    assert newest.commit([other], make_lineage("f1" * 32, [other.key], 3)).num_rows == 63


def test_contents_and_columns_come_back(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60, shard_rows=20, temperatures=(2.0,))
    unit = stored(table, slice(0, 60))
    calibration = Calibration(temperature=2.0, snapshot_digest="0" * 64, fitted=False)
    contents = table.contents.model_copy(update={"calibration": calibration, "temperatures": ()})
    fields = [f for f in table.schema if not f.name.endswith("_2")]
    assert len(fields) < len(table.schema)
    lineage = make_lineage(RUN, [unit.key], 60)
    changed = table.replace([unit], lineage, pa.schema(fields), contents)
    assert changed.contents.calibration is not None
    found = rollback(opened(tmp_path / "t", 1))
    assert found.schema_changes
    newest = opened(tmp_path / "t")
    assert newest.contents == table.contents
    assert newest.schema == table.schema
    assert newest.snapshot_digest == table.snapshot_digest
    assert rows_of(newest) == rows_of(opened(tmp_path / "t", 1))
    assert rollback(opened(tmp_path / "t", 2)).schema_changes
    assert opened(tmp_path / "t").contents == contents
    assert opened(tmp_path / "t").schema == pa.schema(fields)
    more = stored(newest, slice(0, 1), "f1" * 32)
    with pytest.raises(MismatchError, match=r"calibration differs|temperatures differs"):
        table.commit([more], make_lineage("f1" * 32, [more.key], 1))


def test_a_version_that_was_vacuumed_is_refused(home: Path) -> None:
    target = opened(home, 1)
    vacuum(opened(home), Keep(retention=0))
    with pytest.raises(BadInputError, match="was vacuumed at"):
        opened(home, 1)
    # It was opened before the vacuum came.
    with pytest.raises(StorageError, match="is not there; nothing was done"):
        rollback(target)
    assert opened(home).version == 3
    assert tags.tag_names(target.root) == []


def test_a_vacuum_that_is_about_to_begin_spares_what_comes_back(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(opened(home, 1))
    target = opened(home, 1)
    between(monkeypatch, lambda: rollback(target), "before")
    vacuum(opened(home), Keep(retention=0))
    assert opened(home).version == 4
    assert rows_of(opened(home)) == rows
    assert verify(opened(home))["problems"] == []


def test_a_vacuum_that_has_begun_is_not_overtaken(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = opened(home, 1)
    refused: list[Exception] = []

    def act() -> None:
        with pytest.raises(TryAgainError, match="is being vacuumed") as caught:
            rollback(target)
        refused.append(caught.value)

    between(monkeypatch, act, "after")
    vacuum(opened(home), Keep(retention=0))
    assert len(refused) == 1
    assert opened(home).version == 3
    assert tags.tag_names(target.root) == []


def test_killed_anywhere_it_was_done_or_not_and_again_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(opened(home, 1))
    for write in range(10):
        with monkeypatch.context() as patch:
            killed_at(patch, write)
            try:
                rollback(opened(home, 1))
                break
            except Killed:
                pass
        assert rows_of(opened(home)) in (rows, rows_of(opened(home, 3)))
        vacuum(opened(home), Keep())
    assert rows_of(opened(home)) == rows
    assert opened(home).version == 4, "once"


def add_before_change(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Another run commits some rows after the rollback has looked at the newest version."""
    real = Table.change
    calls: list[int] = []

    def change(self: Table, *arguments: Any, **more: Any) -> Table:
        calls.append(1)
        if len(calls) == 1:
            unit = stored(self, slice(0, rows), "f1" * 32)
            self.latest().commit([unit], make_lineage("f1" * 32, [unit.key], rows))
        return real(self, *arguments, **more)

    monkeypatch.setattr(Table, "change", change)


def test_rows_that_are_added_meanwhile_stay_as_if_added_after_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_before_change(monkeypatch, 4)
    found = rollback(opened(home, 1))
    assert (found.version, found.rows_after, opened(home).num_rows) == (5, 64, 64)
    assert len(rows_of(opened(home))) == 64
    assert log_lines(opened(home))[0]["rows"] == log_lines(opened(home))[1]["rows"] + 40


def test_where_columns_change_rows_that_are_added_meanwhile_go(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = opened(home)
    unit = stored(table, slice(0, 20), "e1" * 32)
    contents = table.contents.model_copy(update={"seed": 7})
    table.replace([unit], make_lineage("e1" * 32, [unit.key], 20), table.schema, contents)
    add_before_change(monkeypatch, 4)
    found = rollback(opened(home, 1))
    assert (found.from_version, found.version, found.rows_after) == (5, 6, 60)
    assert opened(home).snapshot_digest == opened(home, 1).snapshot_digest


@pytest.fixture
def deleted_from(tmp_path: Path) -> Path:
    """Version 1 has 60 rows in 3 files; 2 is without 3 of the first file and all of the second."""
    table = make_table(tmp_path / "d", rows=60, shard_rows=20)
    gone = [f"x{n:05d}" for n in (3, 4, 5, *range(20, 40))]
    take_down(table, Request(ids=frozenset(gone)))
    return tmp_path / "d"


def test_deleted_rows_do_not_come_back_unless_told(deleted_from: Path) -> None:
    for attempt in (rollback, plan_rollback):
        with pytest.raises(BadInputError, match=r"would bring back 23 deleted rows: add --keep-"):
            attempt(opened(deleted_from, 1))
    assert opened(deleted_from).version == 2
    assert tags.tag_names(opened(deleted_from).root) == []
    assert rollback(opened(deleted_from, 0)).rows_after == 0, "it holds none"
    found = rollback(opened(deleted_from, 1), deletions="bring back")
    assert (found.deleted_rows, found.rows_after) == (23, 60)
    assert rows_of(opened(deleted_from)) == rows_of(opened(deleted_from, 1))
    # They are there again: nothing more comes back with another version that has them.
    compact(opened(deleted_from))
    assert rollback(opened(deleted_from, 1)).deleted_rows == 0
    assert rollback(opened(deleted_from, 2)).rows_after == 37


def test_a_version_comes_back_without_what_was_deleted(deleted_from: Path) -> None:
    whole, less = opened(deleted_from, 1), opened(deleted_from, 2)
    rollback(opened(deleted_from, 0))
    planned = plan_rollback(whole, "keep")
    assert opened(deleted_from).version == 3
    found = rollback(whole, deletions="keep")
    assert (planned.rows_after, planned.rewritten, planned.added) == (37, 1, found.added)
    assert (found.version, found.rows_after, found.deleted_rows) == (4, 37, 23)
    assert [file.path for file in found.added] == [whole.files[2].path]
    newest = opened(deleted_from)
    assert rows_of(newest) == rows_of(less)
    assert newest.snapshot_digest == less.snapshot_digest
    assert verify(newest)["problems"] == []
    said = newest.history()[0]["change"].arguments
    assert said == {"to_version": 1, "deletions": "keep", "deleted_rows": 23}
    again = rollback(opened(deleted_from, 1), deletions="keep")
    assert (again.same, again.version, opened(deleted_from).version) == (True, 4, 4)
    assert plan_rollback(opened(deleted_from, 1), "keep").same
    assert tags.tag_names(newest.root) == []


def test_what_a_delete_left_is_not_written_again(deleted_from: Path) -> None:
    table = opened(deleted_from)
    unit = stored(table, slice(0, 5))
    table.commit([unit], make_lineage(RUN, [unit.key], 5))
    before = {file.path for file in opened(deleted_from, 2).files}
    found = rollback(opened(deleted_from, 1), deletions="keep")
    assert (len(found.added), found.rewritten, len(found.removed)) == (0, 0, 1)
    assert {file.path for file in opened(deleted_from).files} == before


def test_rows_that_may_be_labelled_again_are_not_held_for_deleted(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60)
    take_down(table, Request(where="label = 5", allow_again=True))
    assert rollback(opened(tmp_path / "t", 1)).rows_after == 60


def test_a_damaged_file_does_not_come_back_under_a_new_checksum(deleted_from: Path) -> None:
    file = deleted_from / opened(deleted_from, 1).files[0].path
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError):
        rollback(opened(deleted_from, 1), deletions="keep")
    assert opened(deleted_from).version == 2


def test_the_log_tells_what_was_done(home: Path) -> None:
    target = opened(home, 1)
    tags.make_tag(target.root, "v1", 1, target.snapshot_digest)
    rollback(Table.open(f"{home}@v1"), "t@v1")
    lines = log_lines(opened(home))
    made = [(x["version"], x["made_by"], x["added"], x["rows"], x["tags"]) for x in lines]
    assert made == [
        (4, "rollback", 40, 60, []),
        (3, "capture", -45, 20, []),
        (2, "capture", 5, 65, []),
        (1, "capture", 60, 60, ["v1"]),
        (0, "create", 0, 0, []),
    ]
    assert [line["files"] for line in lines] == [3, 1, 4, 3, 0]
    change = lines[0]["change"]
    assert (change.operation, change.from_version) == ("rollback", 3)
    assert change.arguments == {"to_version": 1, "to": "t@v1"}
    assert log_lines(opened(home), 2) == lines[:2]
    assert [x["version"] for x in log_lines(opened(home, 1))] == [1, 0]
    assert not any(line["vacuumed"] for line in lines)
    vacuum(opened(home), Keep(retention=0))
    assert [x["version"] for x in log_lines(opened(home)) if x["vacuumed"]] == [3, 2]
    assert closed.vacuum_records(opened(home).root)[0].closed == ((2, 3),)

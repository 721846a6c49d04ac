"""A version copied elsewhere: whole, checked, the same digest, with its lineage; or not at all."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from softlabels.errors import (
    BadInputError,
    IntegrityError,
    MismatchError,
    SoftLabelsError,
    StorageError,
    TryAgainError,
)
from softlabels.query.calibrate import calibrate
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.query.takedown import Request, take_down
from softlabels.query.view import query
from softlabels.storage import Root, open_root, polars_options
from softlabels.store import deleted, tags
from softlabels.store import table as table_module
from softlabels.store.compact import compact
from softlabels.store.inspect import verify
from softlabels.store.origin import MOST_CHARACTERS, MOST_RUNS, origin_of
from softlabels.store.publish import Published, Watching, plan_publish, publish
from softlabels.store.rollback import rollback
from softlabels.store.table import Table
from softlabels.student.files import Files
from tests.faults.proxy import running
from tests.query.planted import make_planted
from tests.servers import S3, set_environment
from tests.store.test_compact import add_run, empty, rows_of
from tests.tables import make_lineage, make_table


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_copy_is_a_table_of_the_same_digest_with_its_lineage(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300, draws=2, temperatures=[2.0])
    add_run(make_table(tmp_path / "u", rows=10), "e", [3])
    seen: list[int] = []
    report = publish(table, str(tmp_path / "copy"), "v1", Watching(seen.append, seen.append))
    assert sum(seen) == 2 * report.bytes == 2 * sum(file.size for file in table.files)
    copy = Table.open(str(tmp_path / "copy"))
    assert (report.version, report.copied, report.new) == (1, 3, True)
    assert copy.snapshot_digest == table.snapshot_digest == report.snapshot_digest
    assert copy.files == table.files
    assert copy.contents == table.contents
    assert rows_of(copy).equals(rows_of(table))
    assert verify(copy) == {"files": 3, "rows": 300, "problems": []}
    assert Table.open(f"{tmp_path / 'copy'}@v1").version == 1
    assert pl.scan_delta(str(tmp_path / "copy")).collect().height == 300
    count = query(str(tmp_path / "copy"), "SELECT count(*) AS n FROM labels").to_pylist()
    assert count == [{"n": 300}]
    change = copy.history()[0]["change"]
    assert change.operation == "publish"
    assert change.arguments["source"]["uri"] == table.root.uri
    assert change.arguments["source"]["version"] == table.version
    assert change.arguments["source"]["snapshot_digest"] == table.snapshot_digest
    (run,) = change.arguments["runs"]
    assert (run["run_id"], run["rows"], run["units"]) == (f"{0:064x}", 300, 3)


def test_the_same_plan_reads_the_copy(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300)
    plan = mix(Recipe.model_validate({"sources": {"a": {"table": table.root.uri}}}))
    publish(table, str(tmp_path / "copy"))
    (tmp_path / "t").rename(tmp_path / "gone")
    opened = Files(plan, {"a": str(tmp_path / "copy")})
    for file in plan.tables["a"].files:
        assert opened.read("a", file.path, 0, ["example_id"]).num_rows == 25
    again = Recipe.model_validate({"sources": {"a": {"table": str(tmp_path / "copy")}}})
    assert mix(again).fingerprint == plan.fingerprint


def test_the_same_rows_in_other_files_are_a_version_of_the_copy_too(tmp_path: Path) -> None:
    uri, copy = make_table(tmp_path / "t", rows=60).root.uri, str(tmp_path / "copy")
    gone = Request(where="example_id = 'x00007'")
    take_down(Table.open(uri), gone)
    publish(Table.open(uri), copy)
    rollback(Table.open(f"{uri}@1"), deletions="bring back")
    take_down(Table.open(uri), gone)
    again = publish(Table.open(uri), copy)
    source, there = Table.open(uri), Table.open(copy)
    assert (again.new, again.version) == (True, 2)
    assert there.snapshot_digest == Table.open(f"{copy}@1").snapshot_digest
    assert there.files == source.files  # what is not in the log, vacuum would remove
    assert publish(source, copy).new is False
    assert verify(there)["problems"] == []


def test_a_version_without_rows_is_published(tmp_path: Path) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [5])
    take_down(table, Request(where="true"))
    for source in (Table.open(f"{table.root.uri}@0"), Table.open(table.root.uri)):
        place = str(tmp_path / f"copy{source.version}")
        assert publish(source, place).new
        assert Table.open(place).snapshot_digest == source.snapshot_digest
        assert publish(source, place).new is False


def test_an_old_version_and_a_tag_are_published_as_they_were(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300)
    tags.make_tag(table.root, "v1", 1, table.snapshot_digest)
    take_down(table, Request(where="label = 1"))
    report = publish(Table.open(f"{table.root.uri}@v1"), str(tmp_path / "copy"))
    assert report.source_version == 1
    copy = Table.open(str(tmp_path / "copy"))
    assert (copy.num_rows, copy.snapshot_digest) == (300, table.snapshot_digest)
    assert copy.history()[0]["change"].arguments["changes"] == []


def test_again_copies_and_makes_nothing(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300)
    publish(table, str(tmp_path / "copy"))
    before = names(tmp_path / "copy")
    again = publish(table, str(tmp_path / "copy"))
    assert (again.copied, again.version, again.new) == (0, 1, False)
    assert names(tmp_path / "copy") == before
    plan = plan_publish(table, str(tmp_path / "copy"))
    assert (plan.copied, plan.version) == (0, 1)
    # What has gone missing there comes back.
    (tmp_path / "copy" / table.files[1].path).unlink()
    healed = publish(table, str(tmp_path / "copy"))
    assert (healed.copied, healed.version, healed.new) == (1, 1, False)
    assert verify(Table.open(str(tmp_path / "copy")))["problems"] == []


def test_later_versions_become_versions_of_the_copy(tmp_path: Path) -> None:
    place = str(tmp_path / "copy")
    table = add_run(empty(tmp_path / "t"), "a", [5, 5, 5])
    publish(table, place)
    table = add_run(table, "b", [4])
    second = publish(table, place, "two")
    assert (second.version, second.copied, second.new) == (2, 1, True)
    compact(table)
    take_down(table, Request(where="label = 1"))
    third = publish(Table.open(table.root.uri), place)
    assert third.version == 3
    copy = Table.open(place)
    newest = Table.open(table.root.uri)
    assert copy.snapshot_digest == newest.snapshot_digest
    assert rows_of(copy).equals(rows_of(newest))
    assert rows_of(Table.open(f"{place}@two")).equals(rows_of(table))
    said = copy.history()[0]["change"].arguments
    assert [run["run_id"][0] for run in said["runs"]] == ["a", "b"]
    assert [change["operation"] for change in said["changes"]] == ["compact", "delete"]
    assert [commit["version"] for commit in copy.history()] == [3, 2, 1, 0]
    # Captures into the copy pass over what was deleted from the table.
    assert (deleted.deleted_keys(copy.root) == deleted.deleted_keys(newest.root)).all()
    assert len(deleted.deleted_keys(copy.root))


def test_a_version_that_came_back_is_published_again(tmp_path: Path) -> None:
    place = str(tmp_path / "copy")
    table = add_run(empty(tmp_path / "t"), "a", [5, 5])
    publish(table, place)
    compact(table)
    publish(Table.open(table.root.uri), place)
    rollback(Table.open(f"{table.root.uri}@1"))
    report = publish(Table.open(table.root.uri), place)
    assert (report.version, report.copied) == (3, 0)
    assert rows_of(Table.open(place)).equals(rows_of(table))


def test_contents_that_changed_are_those_of_the_copy(tmp_path: Path) -> None:
    table = make_planted(tmp_path / "t", rows=2000, heat=1.5, temperatures=(2.0,)).table
    place = str(tmp_path / "copy")
    publish(table, place)
    calibrate(table.root.uri, temperature=1.5)
    publish(Table.open(table.root.uri), place)
    copy, newest = Table.open(place), Table.open(table.root.uri)
    assert copy.contents == newest.contents != table.contents
    assert copy.schema == newest.schema
    assert copy.snapshot_digest == newest.snapshot_digest
    assert verify(copy)["problems"] == []


def test_many_versions_pass_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table_module._PROPERTIES, "delta.checkpointInterval", "5")
    place = str(tmp_path / "copy")
    table = empty(tmp_path / "t")
    for number in range(8):
        table = add_run(table, "a", [1], first=number)
        publish(table, place)
    log = tmp_path / "copy" / "_delta_log"
    marks = sorted(path.name[:20] for path in log.glob("*.checkpoint.parquet"))
    assert len(marks) >= 1
    assert json.loads((log / "_last_checkpoint").read_text())["version"] == int(marks[-1])
    copy = Table.open(place)
    assert (copy.version, copy.num_rows) == (8, 8)
    assert copy.snapshot_digest == table.snapshot_digest
    assert Table.open(f"{place}@2").num_rows == 2


def test_what_is_no_older_version_of_the_table_is_refused(tmp_path: Path) -> None:
    place = str(tmp_path / "copy")
    table = add_run(empty(tmp_path / "t"), "a", [5, 5])
    old = table
    table = add_run(table, "b", [5])
    publish(table, place)
    before = names(tmp_path / "copy")
    with pytest.raises(BadInputError, match=r"version 2 is published at .* newer than 1"):
        publish(old, place)
    other = add_run(empty(tmp_path / "other"), "c", [5])
    with pytest.raises(MismatchError, match=r"is a copy of .*/t', another table"):
        publish(other, place)
    with pytest.raises(MismatchError, match="another table"):
        plan_publish(other, place)
    assert names(tmp_path / "copy") == before
    # A table that was made there, and a copy that somebody went on with.
    with pytest.raises(MismatchError, match="not by a publish"):
        publish(table, other.root.uri)
    add_run(Table.open(place), "d", [5])
    with pytest.raises(MismatchError, match="was made by others, not by a publish"):
        publish(add_run(table, "e", [1]), place)


def test_a_foreign_table_is_refused(tmp_path: Path) -> None:
    from deltalake import write_deltalake

    table = make_table(tmp_path / "t", rows=30)
    write_deltalake(str(tmp_path / "copy"), pa.table({"x": [1]}))
    before = names(tmp_path / "copy")
    with pytest.raises(MismatchError, match=r"/copy' holds a table that was not published there"):
        publish(table, str(tmp_path / "copy"))
    assert names(tmp_path / "copy") == before


@pytest.mark.parametrize("place", ["t", "t/inside", "t/../t", "."])
def test_the_tables_own_place_is_refused(tmp_path: Path, place: str) -> None:
    table = make_table(tmp_path / "t", rows=30)
    with pytest.raises(BadInputError, match="own place"):
        publish(table, str(tmp_path / place))


def test_a_place_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=30)
    with pytest.raises(BadInputError, match="not one version"):
        publish(table, str(tmp_path / "copy@v1"))
    with pytest.raises(BadInputError) as caught:
        publish(table, "s3://KEY:SECRET@bucket/copy")
    assert "SECRET" not in str(caught.value)
    with pytest.raises(BadInputError, match="tag name"):
        publish(table, str(tmp_path / "copy"), "a b")
    assert not (tmp_path / "copy").exists()


def test_a_tag_that_is_taken_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    place = str(tmp_path / "copy")
    table = add_run(empty(tmp_path / "t"), "a", [5, 5])
    publish(table, place, "v1")
    assert publish(table, place, "v1").tag == "v1"
    before = names(tmp_path / "copy")
    with pytest.raises(BadInputError, match="tags never move"):
        publish(add_run(table, "b", [5]), place, "v1")
    assert names(tmp_path / "copy") == before


def test_a_damaged_file_is_never_published(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300)
    path = tmp_path / "t" / table.files[1].path
    data = bytearray(path.read_bytes())
    data[99] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="has sha256"):
        publish(table, str(tmp_path / "copy"))
    with pytest.raises(BadInputError, match="no table"):
        Table.open(str(tmp_path / "copy"))


def test_a_file_that_arrives_damaged_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(tmp_path / "t", rows=300)
    honest = Root.write

    def damaging(self: Root, relative: str, data: bytes | memoryview) -> None:
        wrong = bytearray(data)
        if relative == table.files[2].path:
            wrong[50] ^= 8
        honest(self, relative, bytes(wrong))

    with monkeypatch.context() as patch:
        patch.setattr(Root, "write", damaging)
        with pytest.raises(IntegrityError, match="has sha256"):
            publish(table, str(tmp_path / "copy"))
    with pytest.raises(BadInputError, match="no table"):
        Table.open(str(tmp_path / "copy"))
    report = publish(table, str(tmp_path / "copy"))
    assert report.copied == 1
    assert verify(Table.open(str(tmp_path / "copy")))["problems"] == []


def test_stopped_anywhere_readers_see_nothing_or_the_version_before_and_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write and create of the target fails in turn, as a full disk would have it."""
    table = add_run(empty(tmp_path / "t"), "a", [5, 5])
    later = add_run(table, "b", [5])
    honest = {name: getattr(Root, name) for name in ("write", "create")}
    stops: list[int | None] = []

    def fail_after(place: str, writes: int, patch: pytest.MonkeyPatch) -> None:
        left = [writes]

        def counting(name: str) -> Callable[..., Any]:
            def act(self: Root, relative: str, data: bytes) -> Any:
                left[0] -= self.uri == place
                if left[0] < 0:
                    raise StorageError("no space left")
                return honest[name](self, relative, data)

            return act

        for name in honest:
            patch.setattr(Root, name, counting(name))

    publish(table, str(tmp_path / "before"))
    for version, before in ((table, None), (later, tmp_path / "before")):
        for writes in range(20):
            place = tmp_path / f"copy-{version.version}-{writes}"
            if before:
                shutil.copytree(before, place)
            with monkeypatch.context() as patch:
                fail_after(str(place), writes, patch)
                with contextlib.suppress(StorageError):
                    publish(version, str(place))
                    break
            try:
                stops.append(Table.open(str(place)).num_rows)
                assert verify(Table.open(str(place)))["problems"] == []
            except (BadInputError, StorageError) as error:
                said = re.search("there is no (whole )?table", str(error))
                stops.append(None if said else -1)
            assert publish(version, str(place)).new
            assert Table.open(str(place)).snapshot_digest == version.snapshot_digest
        assert Table.open(str(place)).snapshot_digest == version.snapshot_digest
    # Two files and entry 1 before entry 0; then a file before entry 2.
    assert stops == [None, None, None, None, 10, 10]


@pytest.mark.parametrize("first", [True, False])
def test_two_at_once_make_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [5, 5])
    place = str(tmp_path / "copy")
    if not first:
        publish(table, place)
        table = add_run(table, "b", [5])
    raced: list[Published] = []
    started: list[bool] = []
    honest = Root.create

    def racing(self: Root, relative: str, data: bytes) -> bool:
        if self.uri == place and not started:
            started.append(True)
            raced.append(publish(table, place))
        return honest(self, relative, data)

    monkeypatch.setattr(Root, "create", racing)
    report = publish(table, place)
    assert (raced[0].new, report.new) == (True, False)
    assert report.version == raced[0].version == Table.open(place).version
    assert Table.open(place).snapshot_digest == table.snapshot_digest


def test_another_version_that_comes_first_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [5, 5])
    later = add_run(table, "b", [5])
    place = str(tmp_path / "copy")
    raced: list[bool] = []
    honest = Root.create

    def racing(self: Root, relative: str, data: bytes) -> bool:
        if self.uri == place and not raced:
            raced.append(True)
            publish(later, place)
        return honest(self, relative, data)

    monkeypatch.setattr(Root, "create", racing)
    with pytest.raises(SoftLabelsError, match=r"newer than|another publish"):
        publish(table, place)
    assert Table.open(place).snapshot_digest == later.snapshot_digest


def test_what_is_said_of_runs_is_bounded(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    for number in range(MOST_RUNS + 5):
        run_id = f"{number:064x}"
        lineage = make_lineage(run_id, [], 0)
        spec = {"files": ["x" * 100] * MOST_CHARACTERS} if number % 2 else {"k": 1}
        lineage = lineage.model_copy(update={"spec": spec})
        unit = table.store_shard(f"{run_id}/a", "0" * 16 + "-000000", _no_rows(table))
        table = table.commit([unit], lineage)
    said = origin_of(table)
    assert (len(said["runs"]), said["runs_left_out"]) == (MOST_RUNS, 5)
    assert said["runs"][-1]["run_id"] == f"{MOST_RUNS + 4:064x}"
    assert said["runs"][0]["spec"] is None
    assert said["runs"][0]["spec_sha256"] == "0" * 64
    assert said["runs"][1]["spec"] == {"k": 1}
    assert len(json.dumps(said)) < 100_000


def _no_rows(table: Table) -> Any:
    from softlabels.store.shards import ShardWriter

    return ShardWriter(table.schema, "precise").close()


def test_a_copy_of_a_copy_still_says_which_runs_made_it(tmp_path: Path) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [5, 5])
    publish(table, str(tmp_path / "one"))
    table = add_run(table, "b", [2])
    publish(table, str(tmp_path / "one"))
    report = publish(Table.open(str(tmp_path / "one")), str(tmp_path / "two"))
    assert report.snapshot_digest == table.snapshot_digest
    said = Table.open(str(tmp_path / "two")).history()[0]["change"].arguments
    assert [(r["run_id"][0], r["rows"], r["units"]) for r in said["runs"]] == [
        ("a", 10, 2),
        ("b", 2, 1),
    ]
    assert said["changes"][-1]["source"]["uri"] == table.root.uri


@pytest.mark.parametrize("way", ["up", "down", "across"])
def test_object_stores(tmp_path: Path, s3: S3, way: str) -> None:
    here = str(tmp_path / "t") if way == "up" else s3.url("t")
    there = str(tmp_path / "copy") if way == "down" else s3.url("copy")
    table = make_table(here, rows=120, shard_rows=40)
    report = publish(table, there, "v1")
    copy = Table.open(f"{there}@v1")
    assert (report.copied, copy.version) == (3, 1)
    assert copy.snapshot_digest == table.snapshot_digest
    assert verify(copy)["problems"] == []
    assert query(there, "SELECT count(*) AS n FROM labels").to_pylist() == [{"n": 120}]
    assert pl.scan_delta(there, storage_options=polars_options(copy.root)).collect().height == 120
    take_down(table, Request(where="label = 1"))
    assert publish(Table.open(here), there).version == 2
    assert Table.open(there).num_rows == 108


def test_a_store_without_conditional_put_takes_copies(
    tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [5, 5])
    with running(s3.endpoint) as proxy:
        proxy.set(strip=("if-none-match",))
        set_environment(monkeypatch, {"AWS_ENDPOINT_URL": proxy.url})
        place = s3.url("copy")
        with pytest.raises(StorageError, match="softlabels publish"):
            Table.open_or_create(place, table.schema, table.contents)
        publish(table, place, "v1")
        later = add_run(table, "b", [5])
        publish(later, place)
        assert Table.open(place).snapshot_digest == later.snapshot_digest
        assert Table.open(f"{place}@v1").snapshot_digest == table.snapshot_digest
        assert verify(Table.open(place))["problems"] == []
        with pytest.raises(MismatchError, match="another table"):
            publish(add_run(empty(tmp_path / "other"), "c", [5]), place)


def test_a_place_that_delta_cannot_reach_takes_copies(tmp_path: Path) -> None:
    """fsspec's memory: delta-rs knows no such store, as it knows no hf://."""
    table = add_run(empty(tmp_path / "t"), "a", [5, 5])
    place = f"memory://{tmp_path.name}/copy"
    publish(table, place)
    later = add_run(table, "b", [5])
    assert publish(later, place, "v2").version == 2
    assert publish(later, place).new is False
    root = open_root(place)
    assert sorted(root.names("_delta_log")) == [f"{n:020d}.json" for n in range(3)]
    assert {f"data/{name}" for name in root.names("data")} == {file.path for file in later.files}
    assert tags.read_tag(root, "v2").version == 2


def test_a_signal_ends_it_between_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    table = add_run(empty(tmp_path / "t"), "a", [5, 5, 5])
    watching = Watching(done=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TryAgainError, match="stopped by a signal"):
        publish(table, str(tmp_path / "copy"), None, watching)
    with pytest.raises(BadInputError, match="no table"):
        Table.open(str(tmp_path / "copy"))
    report = publish(table, str(tmp_path / "copy"))
    assert report.new
    assert report.copied < 3

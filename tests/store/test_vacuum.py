"""vacuum: what it removes and keeps, that it never takes what is needed, whatever races or dies."""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import (
    BadInputError,
    IntegrityError,
    SoftLabelsError,
    StorageError,
    TryAgainError,
)
from softlabels.storage import Root
from softlabels.store import closed, shards, tags, unneeded
from softlabels.store.inspect import verify
from softlabels.store.lifetimes import Span, read_lifetimes
from softlabels.store.rollback import rollback
from softlabels.store.runs import RunRecord, record_run
from softlabels.store.table import Table, UnitShard
from softlabels.store.vacuum import DAY, Keep, plan_vacuum, vacuum
from tests.servers import S3
from tests.tables import make_lineage, make_table

NOTHING = Keep(retention=0)
RUN = "ab" * 32


def stored(table: Table, rows: slice, run_id: str = RUN, number: int = 0) -> UnitShard:
    """Some rows of the table's newest version in a file of their own, not committed."""
    every = pa.Table.from_batches(table.latest().batches())
    writer = shards.ShardWriter(table.schema, "precise")
    for batch in every.slice(rows.start, rows.stop - rows.start).to_batches():
        writer.write(batch)
    unit = f"{run_id[:16]}-{number:06d}"
    return table.store_shard(f"{run_id}/{unit}", unit, writer.close())


def replaced(table: Table, run_id: str, rows: int = 20) -> Table:
    """A next version in which one new file is in the place of all."""
    unit = stored(table, slice(0, rows), run_id)
    newest = table.latest()
    lineage = make_lineage(run_id, [unit.key], rows)
    return newest.replace([unit], lineage, newest.schema, newest.contents)


def age(folder: Path, days: float, pattern: str = "**/*") -> None:
    """Makes all files that match look as if written so many days earlier."""
    for path in folder.glob(pattern):
        if path.is_file() and not path.is_symlink():
            then = path.stat().st_mtime - days * DAY
            os.utime(path, (then, then))


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "data").iterdir()}


def rows_of(table: Table) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pa.Table.from_batches(table.batches()).to_pylist()
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A table of three versions: 1 has three files, 2 and 3 one each, all of them other ones."""
    table = make_table(tmp_path / "t", rows=60, shard_rows=20)
    replaced(table, "c1" * 32, 30)
    replaced(table, "c2" * 32, 20)
    return tmp_path / "t"


def opened(home: Path, version: int | str = "") -> Table:
    return Table.open(f"{home}@{version}" if version != "" else str(home))


def test_a_plan_removes_nothing_and_says_what_and_why(home: Path) -> None:
    before = names(home)
    found = plan_vacuum(opened(home), NOTHING)
    assert (len(found.doomed), found.closes, found.version) == (4, ((1, 2),), 3)
    assert found.bytes == sum(f.size for v in (1, 2) for f in opened(home, v).files)
    assert {one.why for one in found.doomed} == {
        "only in version 1",
        "only in version 2",
    }
    assert names(home) == before
    assert closed.vacuum_records(opened(home).root) == []
    assert opened(home, 1).num_rows == 60


def test_vacuum_closes_the_versions_it_takes_files_of(home: Path) -> None:
    newest = rows_of(opened(home))
    done: list[int] = []
    asked: list[int] = []
    found = vacuum(opened(home), NOTHING, asked.append, lambda: done.append(1))
    assert (asked, len(done)) == ([4], 4)
    assert names(home) == {file.path.rpartition("/")[2] for file in opened(home).files}
    assert rows_of(opened(home)) == newest
    for version in (1, 2):
        with pytest.raises(BadInputError, match=rf"version {version} of .* was vacuumed at 20"):
            opened(home, version)
        with pytest.raises(BadInputError, match="was vacuumed at"):
            tags.make_tag(opened(home).root, "late", version, "0" * 64)
    assert tags.tag_names(opened(home).root) == []
    assert opened(home, 0).num_rows == 0
    assert opened(home, 3).num_rows == 20
    (record,) = closed.vacuum_records(opened(home).root)
    assert (record.closed, record.files, record.bytes) == (((1, 2),), 4, found.bytes)
    assert record.ended_at is not None
    assert verify(opened(home))["problems"] == []
    assert vacuum(opened(home), NOTHING).doomed == ()
    assert len(closed.vacuum_records(opened(home).root)) == 1, "nothing done, nothing recorded"
    assert len(opened(home).history()) == 4, "the log still says what was"


def test_tags_keep_their_versions(home: Path) -> None:
    tagged = opened(home, 1)
    tags.make_tag(tagged.root, "v1", 1, tagged.snapshot_digest)
    tags.make_tag(tagged.root, "plan-0123456789abcdef", 1, tagged.snapshot_digest)
    found = vacuum(opened(home), NOTHING)
    assert (len(found.doomed), found.closes) == (1, ((2, 2),))
    (kept,) = found.kept
    assert kept.by == "version 1, tags plan-0123456789abcdef, v1"
    assert (kept.files, kept.bytes) == (3, sum(f.size for f in tagged.files))
    assert verify(opened(home, "v1"))["problems"] == []
    tags.delete_tags(tagged.root, ["v1"])
    assert vacuum(opened(home), NOTHING).doomed == ()
    tags.delete_tags(tagged.root, ["plan-0123456789abcdef"])
    assert vacuum(opened(home), NOTHING).closes == ((1, 1),)


def test_retention_counts_from_when_a_version_was_replaced(home: Path) -> None:
    log = home / "_delta_log"
    age(home, 40, "_delta_log/*0.json")  # version 0
    age(home, 40, "_delta_log/*1.json")
    age(home, 10, "_delta_log/*2.json")
    age(home, 1, "_delta_log/*3.json")
    assert len(list(log.glob("*.json"))) == 4

    def closes(days: float, **more: Any) -> tuple[tuple[int, int], ...]:
        return plan_vacuum(opened(home), Keep(days * DAY, **more)).closes

    assert closes(30) == ()
    # Version 1 is 40 days old, but was the newest until 10 days ago.
    assert closes(10.5) == ()
    assert closes(9) == ((1, 1),)
    assert closes(0.5) == ((1, 2),)
    assert closes(0.5, versions=2) == ((1, 1),)
    assert closes(0.5, versions=9) == ()
    assert plan_vacuum(opened(home), Keep(30 * DAY)).kept[0].by == "versions within the retention"


def test_a_log_entry_whose_clock_was_behind_is_no_older_than_those_before_it(home: Path) -> None:
    age(home, 400, "_delta_log/*2.json")
    assert plan_vacuum(opened(home), Keep(30 * DAY)).closes == ()


def test_a_machine_whose_clock_is_ahead_of_the_store_takes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = time.time() + 365 * DAY
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert plan_vacuum(opened(home), Keep()).doomed == ()


def test_uncommitted_files_go_when_they_are_old_and_no_run_waits_for_them(home: Path) -> None:
    table = opened(home)
    young, old = stored(table, slice(0, 5), "d1" * 32), stored(table, slice(0, 5), "d2" * 32)
    assert young.path
    assert old.path
    age(home, 2, old.path)
    (doomed,) = plan_vacuum(table, Keep()).doomed
    assert (doomed.path, doomed.why) == (old.path, "stored 2.0 days ago, never committed")
    (kept,) = [k for k in plan_vacuum(table, Keep()).kept if "yet to commit" in k.by]
    assert kept.files == 1
    assert len(plan_vacuum(table, Keep(grace=3 * DAY)).doomed) == 0
    assert len(plan_vacuum(table, Keep(grace=0)).doomed) == 2


def test_a_writer_with_one_young_file_is_alive(home: Path) -> None:
    table = opened(home)
    first = stored(table, slice(0, 5), "d1" * 32, 0)
    stored(table, slice(5, 9), "d1" * 32, 1)
    assert first.path
    age(home, 2, first.path)
    assert plan_vacuum(table, Keep()).doomed == ()


def test_an_open_run_keeps_what_it_has_stored_however_old(home: Path) -> None:
    table = opened(home)
    record = RunRecord(run_id=RUN, units=3, rows=9, spec={}, source={}, started_at="2026-01-01")
    record_run(table.root, record)
    units = [stored(table, slice(n, n + 1), RUN, n) for n in range(3)]
    again = stored(table, slice(0, 2), RUN, 0)
    table.latest().commit(units[:1], make_lineage(RUN, [units[0].key], 1))
    age(home, 9, "data/*")
    doomed = {one.path for one in plan_vacuum(opened(home), Keep()).doomed}
    assert doomed == {again.path}, "only the second attempt at a unit that is committed"
    table.latest().commit(units[1:2], make_lineage(RUN, [units[1].key], 1))
    extra = stored(table, slice(0, 2), RUN, 7)
    age(home, 9, str(extra.path))
    doomed = {one.path for one in plan_vacuum(opened(home), Keep()).doomed}
    assert units[2].path not in doomed
    table.latest().commit(units[2:], make_lineage(RUN, [units[2].key], 1))
    assert {o.path for o in plan_vacuum(opened(home), Keep()).doomed} == {again.path, extra.path}


def silent_run(home: Path) -> list[UnitShard]:
    """Two units of a run that has committed the first, and was killed 40 days ago."""
    table = opened(home)
    record = RunRecord(run_id=RUN, units=3, rows=9, spec={}, source={}, started_at="2026-01-01")
    record_run(table.root, record)
    units = [stored(table, slice(n, n + 1), RUN, n) for n in range(2)]
    table.latest().commit(units[:1], make_lineage(RUN, [units[0].key], 1))
    claim = f"_softlabels/claims/{RUN[:16]}/{RUN[:16]}-000001.json"
    table.root.write(claim, b"{}")
    age(home, 40, "data/*")
    age(home, 40, "_softlabels/*/**/*")
    return units


def test_a_run_that_is_silent_for_long_is_taken_for_dead_where_that_is_asked_for(
    home: Path,
) -> None:
    units = silent_run(home)
    found = plan_vacuum(opened(home), Keep())
    assert found.doomed == ()
    assert found.notes == (
        f"the unfinished run {RUN[:16]} has no sign of life for 40.0 days; uncommitted, kept "
        "for it: 1 file",
    )
    assert plan_vacuum(opened(home), Keep(abandoned=41 * DAY)).doomed == ()
    keep = Keep(abandoned=39 * DAY)
    said = plan_vacuum(opened(home), keep)
    claim = f"_softlabels/claims/{RUN[:16]}/{RUN[:16]}-000001.json"
    assert [one.path for one in said.doomed] == [claim, units[1].path]
    assert f"run {RUN[:16]} has no sign of life for 40.0 days and is taken" in said.notes[0]
    before = opened(home)
    assert vacuum(before, keep).doomed == said.doomed
    assert opened(home).snapshot_digest == before.snapshot_digest
    assert opened(home).committed(units[0].key)
    assert all((home / file.path).exists() for file in before.files)
    (record,) = closed.vacuum_records(before.root)
    assert record.settings["abandoned"] == 39 * DAY


@pytest.mark.parametrize("sign", ["claim", "file", "start"])
def test_any_sign_of_life_keeps_what_a_run_has_stored(home: Path, sign: str) -> None:
    silent_run(home)
    table = opened(home)
    if sign == "claim":
        table.root.write(f"_softlabels/claims/{RUN[:16]}/{RUN[:16]}-000002.json", b"{}")
    elif sign == "file":
        stored(table, slice(0, 2), RUN, 2)
    else:
        os.utime(home / "_softlabels" / "runs" / f"{RUN}.json")
    assert plan_vacuum(table, Keep(abandoned=DAY)).doomed == ()


def test_a_run_that_comes_back_while_vacuum_works_keeps_what_it_stores(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = silent_run(home)
    made: list[UnitShard] = []
    table = opened(home)
    between(monkeypatch, lambda: made.append(stored(table, slice(0, 2), RUN, 2)), "after")
    assert vacuum(table, Keep(abandoned=39 * DAY)).doomed == ()
    assert (home / str(units[1].path)).exists()
    assert (home / str(made[0].path)).exists()


def test_a_record_without_a_checksum_closes_only_what_has_lost_files(home: Path) -> None:
    table = opened(home)
    tags.make_tag(table.root, "v2", 2, opened(home, 2).snapshot_digest)
    for ended in (None, "2026-01-01T00:00:00+00:00"):
        record = closed.VacuumRecord(
            vacuum_id="a" * 32, began_at="2026-01-01", ended_at=ended, version=3, closed=((1, 2),)
        )
        table.root.write(f"{closed.FOLDER}/{'a' * 32}.json", record.model_dump_json().encode())
        assert plan_vacuum(table, Keep()).doomed == (), "versions 1 and 2 are young and whole"
    with pytest.raises(BadInputError, match="was vacuumed"):
        opened(home, 1)


def test_every_flipped_bit_of_a_record_is_seen(home: Path) -> None:
    root = opened(home).root
    vacuum(opened(home), NOTHING)
    (record,) = closed.vacuum_records(root)
    assert record.sealed
    path = f"{closed.FOLDER}/{record.vacuum_id}.json"
    whole = root.read(path)
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        root.write(path, bytes(flipped))
        with pytest.raises(IntegrityError, match=r"vacuum record .* is damaged: restore it"):
            closed.read_record(root, record.vacuum_id)


def test_leftovers_of_its_own_go_and_nothing_else_does(home: Path, tmp_path: Path) -> None:
    table = opened(home)
    mine = [
        "data/x.parquet.0123abcd.tmp",
        "_softlabels/tags/v.json.0123abcd.tmp",
        f"_softlabels/claims/{RUN[:16]}/{RUN[:16]}-000000.json",
    ]
    foreign = [
        "data/notes.parquet",
        "data/part-0.parquet",
        "data/deeper/x.parquet.0123abcd.tmp",
        "README.md",
        "_delta_log/x.0123abcd.tmp",
        "_softlabels/other.json",
        "_softlabels/claims/stray.json",
    ]
    for name in mine + foreign:
        table.root.write(name, b"x")
    outside = tmp_path / "outside.parquet"
    outside.write_bytes(b"x")
    real = table.files[0].path
    link = real.replace(real.split("-")[2], "00000000")
    (home / link).symlink_to(outside)
    age(home, 9)
    os.utime(outside, (1, 1))
    found = vacuum(opened(home), Keep())
    assert {one.path for one in found.doomed} == set(mine)
    assert all((home / name).exists() for name in [*foreign, link])
    assert outside.exists()
    assert found.closes == ()


def test_a_claim_of_an_open_run_stays(home: Path) -> None:
    table = opened(home)
    record_run(
        table.root,
        RunRecord(run_id=RUN, units=1, rows=9, spec={}, source={}, started_at="2026-01-01"),
    )
    table.root.write(f"_softlabels/claims/{RUN[:16]}/{RUN[:16]}-000000.json", b"{}")
    age(home, 9)
    assert plan_vacuum(opened(home), Keep()).doomed == ()


def test_a_file_that_came_back_is_kept(home: Path) -> None:
    """Version 1's files are in the newest again, as after a rollback."""
    old = opened(home, 1)
    table = opened(home)
    again = [
        UnitShard(f"back/{n}", f.path, f.size, f.num_rows, {"numRecords": f.num_rows})
        for n, f in enumerate(old.files)
    ]
    lineage = make_lineage("e1" * 32, [unit.key for unit in again], 60)
    table.replace(again, lineage, table.schema, table.contents)
    life = read_lifetimes(table.root, 4)
    assert life.spans[old.files[0].path] == [Span(1, 1), Span(4, None)]
    found = vacuum(opened(home), NOTHING)
    assert found.closes == ((2, 3),)
    assert verify(opened(home))["problems"] == []
    assert opened(home, 1).num_rows == 60, "its files are all there"


def damage_log(home: Path) -> None:
    (home / "_delta_log" / f"{1:020d}.json").write_text("{")


def lose_log(home: Path) -> None:
    (home / "_delta_log" / f"{1:020d}.json").unlink()


def damage_tag(home: Path) -> None:
    (home / tags.FOLDER).mkdir(parents=True, exist_ok=True)
    (home / tags.FOLDER / "v1.json").write_text('{"name": "v1"}')


def move_tag(home: Path) -> None:
    """One digit of a tag's version flips."""
    table = opened(home, 1)
    tags.make_tag(table.root, "v1", 1, table.snapshot_digest)
    path = home / tags.FOLDER / "v1.json"
    path.write_text(path.read_text().replace('"version":1', '"version":2'))


def damage_run(home: Path) -> None:
    (home / "_softlabels" / "runs").mkdir(parents=True)
    (home / "_softlabels" / "runs" / f"{RUN}.json").write_text("[]")


def damage_record(home: Path) -> None:
    (home / closed.FOLDER).mkdir(parents=True)
    (home / closed.FOLDER / "a.json").write_text("[]")


@pytest.mark.parametrize(
    "damage", [damage_log, lose_log, damage_tag, move_tag, damage_run, damage_record]
)
def test_nothing_is_removed_on_the_word_of_what_is_damaged(
    home: Path, damage: Callable[[Path], None]
) -> None:
    table = opened(home)
    damage(home)
    before = names(home)
    with pytest.raises(SoftLabelsError):
        vacuum(table, NOTHING)
    assert names(home) == before


@pytest.mark.parametrize("keep", [Keep(-1), Keep(versions=0), Keep(grace=-1)])
def test_settings_that_cannot_be_meant_are_refused(home: Path, keep: Keep) -> None:
    with pytest.raises(BadInputError, match="expected times of at least 0 s"):
        plan_vacuum(opened(home), keep)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it and nothing runs after it."""


def killed_at(monkeypatch: pytest.MonkeyPatch, write: int) -> list[str]:
    """Lets a process die at its nth write, deletion or creation; which ones it did."""
    did: list[str] = []

    def dying(name: str) -> None:
        real = getattr(Root, name)

        def call(self: Root, relative: str, *more: Any) -> Any:
            if len(did) == write:
                raise Killed
            did.append(f"{name} {relative}")
            return real(self, relative, *more)

        monkeypatch.setattr(Root, name, call)

    for name in ("write", "create", "delete"):
        dying(name)
    return did


def whole_or_closed(home: Path, version: int) -> list[dict[str, Any]] | None:
    """All rows of a version; None where it is said to be vacuumed."""
    try:
        table = opened(home, version)
    except (BadInputError, TryAgainError):
        return None
    return rows_of(table)


def test_killed_anywhere_it_leaves_whole_versions_and_closed_ones(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tagged = opened(home, 1)
    tags.make_tag(tagged.root, "v1", 1, tagged.snapshot_digest)
    replaced(tagged, "c3" * 32)
    everything = {v: rows_of(opened(home, v)) for v in range(1, 5)}
    for write in range(40):
        with monkeypatch.context() as patch:
            killed_at(patch, write)
            try:
                vacuum(opened(home), NOTHING)
            except Killed:
                ended = False
            else:
                ended = True
        for version, rows in everything.items():
            found = whole_or_closed(home, version)
            assert found == rows if found is not None else version in (2, 3)
        if ended:
            break
    assert ended
    assert write > 3
    assert len(names(home)) == 4
    for version in (2, 3):
        with pytest.raises((BadInputError, TryAgainError), match="vacuumed"):
            opened(home, version)


def test_a_killed_vacuum_is_ended_by_a_later_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        did = killed_at(patch, 7)
        with pytest.raises(Killed):
            vacuum(opened(home), NOTHING)
    assert [d for d in did if d.startswith("delete data/")], "it died with files gone"
    (record,) = closed.vacuum_records(opened(home).root)
    assert (record.ended_at, record.closed) == (None, ((1, 2),))
    with pytest.raises(TryAgainError, match="is being vacuumed since"):
        opened(home, 2)
    assert "has not ended" in plan_vacuum(opened(home), NOTHING).notes[0]
    vacuum(opened(home), NOTHING)
    unended = [r for r in closed.vacuum_records(opened(home).root) if r.ended_at is None]
    assert len(unended) == 1, "it might live yet"
    age(home, 0.1, f"{closed.FOLDER}/{record.vacuum_id}.json")
    vacuum(opened(home), NOTHING)
    assert all(r.ended_at for r in closed.vacuum_records(opened(home).root))
    for version in (1, 2):
        with pytest.raises(BadInputError, match="was vacuumed at"):
            opened(home, version)


def test_a_vacuum_that_was_held_for_dead_stops(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = closed.read_record

    def ended(root: Root, vacuum_id: str) -> closed.VacuumRecord:
        return real(root, vacuum_id).model_copy(update={"ended_at": "2026-01-01"})

    monkeypatch.setattr(closed, "read_record", ended)
    before = names(home)
    with pytest.raises(TryAgainError, match=r"another vacuum of .* ended this one"):
        vacuum(opened(home), NOTHING)
    assert names(home) == before


def between(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], after: str) -> None:
    """Does something as another process would, once, right after `after` wrote its record."""
    real = closed.write_record
    calls: list[int] = []

    def write(root: Root, record: closed.VacuumRecord) -> None:
        if after == "before":
            calls.append(1)
            if len(calls) == 1:
                act()
        real(root, record)
        if after == "after":
            calls.append(1)
            if len(calls) == 1:
                act()

    monkeypatch.setattr(closed, "write_record", write)


def test_a_tag_that_is_made_just_before_the_record_spares_its_version(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = opened(home, 1)

    def act() -> None:
        tags.make_tag(table.root, "v1", 1, table.snapshot_digest)

    between(monkeypatch, act, "before")
    found = vacuum(opened(home), NOTHING)
    assert found.closes == ((2, 2),)
    assert verify(opened(home, "v1"))["rows"] == 60
    assert verify(opened(home, "v1"))["problems"] == []


def test_a_version_that_was_to_be_spared_is_by_the_next_vacuum_too(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag comes just before the record that closes its version, and then the machine dies."""
    table = opened(home, 1)

    def die(self: unneeded.Look, intended: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        make = lambda: tags.make_tag(table.root, "v1", 1, table.snapshot_digest)  # noqa: E731
        between(patch, make, "before")
        patch.setattr(unneeded.Look, "narrowed", die)
        with pytest.raises(Killed):
            vacuum(opened(home), NOTHING)
    # The record still closes it, but whoever knows the tag may read it.
    assert verify(opened(home, "v1"))["rows"] == 60
    with pytest.raises(TryAgainError, match="is being vacuumed"):
        opened(home, 1)
    assert vacuum(opened(home), NOTHING).closes == ((2, 2),)
    assert verify(opened(home, "v1"))["rows"] == 60
    age(home, 0.1, f"{closed.FOLDER}/*.json")
    vacuum(opened(home), NOTHING)
    assert verify(opened(home, 1))["rows"] == 60
    assert verify(opened(home, "v1"))["problems"] == []


def test_a_tag_is_not_enough_where_a_file_is_gone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag whose maker died before it had looked for vacuums, which took the version."""
    table = opened(home, 1)
    tags.make_tag(table.root, "v1", 1, table.snapshot_digest)
    text = (home / tags.FOLDER / "v1.json").read_bytes()
    tags.delete_tags(table.root, ["v1"])
    with monkeypatch.context() as patch:
        killed_at(patch, 7)
        with pytest.raises(Killed):
            vacuum(opened(home), NOTHING)
    table.root.write(f"{tags.FOLDER}/v1.json", text)
    with pytest.raises(TryAgainError, match="is being vacuumed"):
        opened(home, "v1")
    age(home, 0.1, f"{closed.FOLDER}/*.json")
    vacuum(opened(home), NOTHING)
    with pytest.raises(BadInputError, match="was vacuumed at"):
        opened(home, "v1")
    assert "was vacuumed before" in plan_vacuum(opened(home), NOTHING).notes[0]


def test_a_tag_that_is_made_just_after_the_record_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = opened(home, 1)
    refused: list[str] = []

    def act() -> None:
        with pytest.raises(TryAgainError, match=r"version 1 of .* is being vacuumed") as caught:
            tags.make_tag(table.root, "v1", 1, table.snapshot_digest)
        refused.append(str(caught.value))

    between(monkeypatch, act, "after")
    assert vacuum(opened(home), NOTHING).closes == ((1, 2),)
    assert len(refused) == 1
    assert tags.tag_names(table.root) == []


def test_a_unit_that_is_committed_meanwhile_keeps_its_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = opened(home)
    waiting = stored(table, slice(0, 5))
    age(home, 9, str(waiting.path))
    assert waiting.path in {one.path for one in plan_vacuum(table, NOTHING).doomed}
    between(
        monkeypatch,
        lambda: table.latest().commit([waiting], make_lineage(RUN, [waiting.key], 5)),
        "after",
    )
    vacuum(opened(home), NOTHING)
    assert opened(home).num_rows == 25
    assert len(rows_of(opened(home))) == 25


@pytest.mark.parametrize("act", ["commit", "start"])
def test_what_begins_after_the_last_look_keeps_its_files(
    home: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    """A capture of an earlier release, without a record, comes back to what it stored."""
    table = opened(home)
    waiting = stored(table, slice(0, 5))
    age(home, 9, str(waiting.path))
    real = unneeded.Look.narrowed

    def narrowed(self: unneeded.Look, intended: unneeded.Vacuum) -> unneeded.Vacuum:
        found = real(self, intended)
        assert waiting.path in {one.path for one in found.doomed}
        if act == "commit":
            table.latest().commit([waiting], make_lineage(RUN, [waiting.key], 5))
        else:
            record = RunRecord(run_id=RUN, units=1, rows=5, spec={}, source={}, started_at="2026")
            record_run(table.root, record)
        return found

    monkeypatch.setattr(unneeded.Look, "narrowed", narrowed)
    found = vacuum(opened(home), NOTHING)
    assert waiting.path not in {one.path for one in found.doomed}
    assert (home / str(waiting.path)).exists()
    assert len(found.doomed) == 4


def test_a_store_whose_clock_is_ahead_takes_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(opened(home), slice(0, 5))
    real = Root.entries

    def ahead(self: Root, relative: str) -> list[Any]:
        return [
            dataclasses.replace(e, modified=(e.modified or 0) + 99 * DAY * ("probe" in e.name))
            for e in real(self, relative)
        ]

    monkeypatch.setattr(Root, "entries", ahead)
    assert plan_vacuum(opened(home), Keep()).doomed == ()


def test_a_file_that_cannot_be_deleted_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Root, relative: str) -> None:
        if relative.startswith("data/"):
            raise StorageError(f"cannot delete {relative!r}: read-only")

    monkeypatch.setattr(Root, "delete", refuse)
    with pytest.raises(StorageError, match="read-only"):
        vacuum(opened(home), NOTHING)


def test_where_nothing_can_be_written_a_plan_is_still_made(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Root, relative: str, data: bytes) -> None:
        raise StorageError("read-only")

    monkeypatch.setattr(Root, "write", refuse)
    assert len(plan_vacuum(opened(home), NOTHING).doomed) == 4


def test_on_an_object_store(s3: S3) -> None:
    table = make_table(s3.url("t"), rows=60, shard_rows=20)
    tags.make_tag(table.root, "v1", 1, table.snapshot_digest)
    replaced(table, "c1" * 32, 30)
    replaced(table, "c2" * 32, 20)
    stored(table, slice(0, 5))
    assert plan_vacuum(table, Keep()).doomed == ()
    assert all(entry.modified for entry in table.root.entries("data"))
    found = vacuum(table, NOTHING)
    assert (len(found.doomed), found.closes) == (1, ((2, 2),))
    with pytest.raises(BadInputError, match="was vacuumed at"):
        Table.open(s3.url("t@2"))
    assert rollback(Table.open(s3.url("t@v1"))).rows_after == 60
    assert verify(table.latest())["problems"] == []
    tags.delete_tags(table.root, ["v1"])
    assert vacuum(table, NOTHING).closes == ((3, 3),)
    assert len(plan_vacuum(table, Keep(0, grace=0)).doomed) == 1, "what nobody committed"
    assert table.latest().num_rows == 60


def test_names_of_real_files_are_those_that_it_knows(home: Path) -> None:
    for file in opened(home, 1).files:
        name = file.path.removeprefix("data/")
        match = unneeded._DATA.fullmatch(name)
        assert match is not None
        assert (match["unit"], match["compacted"]) == (file.unit, "")
        joined = name.replace(file.unit, f"{file.unit}c")
        found = unneeded._DATA.fullmatch(joined)
        assert found is not None
        assert found["unit"] == f"{file.unit}c"
    assert unneeded._DATA.fullmatch(name + ".0123abcd.tmp") is None


def test_ranges_join_neighbours() -> None:
    assert closed.ranges([3, 1, 2, 7, 7]) == ((1, 3), (7, 7))
    assert closed.ranges([]) == ()


def test_lifetimes_are_read_of_many_versions_in_time(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=20, shard_rows=20)
    folder = tmp_path / "t" / "_delta_log"
    add = {"path": "", "partitionValues": {}, "size": 1, "modificationTime": 0, "dataChange": True}
    for version in range(2, 2002):
        lines = [{"commitInfo": {}}, {"add": add | {"path": f"data/{version}.parquet"}}]
        if version % 2:
            lines.append({"remove": {"path": f"data/{version - 1}.parquet"}})
        text = "\n".join(json.dumps(line) for line in lines)
        (folder / f"{version:020d}.json").write_text(text)
    began = time.monotonic()
    life = read_lifetimes(table.root, 2001)
    assert time.monotonic() - began < 5
    assert life.spans["data/100.parquet"] == [Span(100, 100)]
    assert life.spans["data/101.parquet"] == [Span(101, None)]
    assert life.files[[1, 2, 3, 2001]].tolist() == [1, 2, 2, 1001]
    assert life.rows[[0, 1, 2]].tolist() == [0, 20, -1], "those have no count"
    assert life.within("data/100.parquet", np.array([99, 101])) is None
    assert life.within("data/100.parquet", np.array([99, 100])) == 100
    assert life.holding(["data/100.parquet", "data/101.parquet"]) == ((100, 2001),)
    (folder / f"{2002:020d}.json").write_text('{"remove": {"path": "data/none.parquet"}}')
    with pytest.raises(IntegrityError, match="which was not there"):
        read_lifetimes(table.root, 2002)

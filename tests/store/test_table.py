"""A real Delta log: creation and commits under races, retries and lost replies; versions."""

import contextlib
import json
import multiprocessing
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from softlabels.errors import (
    BadInputError,
    IntegrityError,
    MismatchError,
    SoftLabelsError,
    StorageError,
    TryAgainError,
)
from softlabels.fingerprint import sha256_bytes
from softlabels.schema import FORMAT_VERSION, table_schema
from softlabels.store import racing, shards, tags
from softlabels.store.table import FORMAT_PROPERTY, Table, UnitShard, parse_reference
from tests.tables import dense_logprobs, make_contents, make_lineage, make_table, make_targets

RUN = "ab" * 32


def empty(folder: Path) -> Table:
    return Table.open_or_create(str(folder), table_schema(), make_contents(k=2, classes=5))


def unit_name(number: int) -> str:
    return f"{RUN[:16]}-{number:06d}"


def store_unit(table: Table, number: int, rows: int = 3) -> UnitShard:
    """Unit `number` of RUN: rows with ids that no other unit has, under a file name of its own."""
    targets = shards.round_to_profile(
        make_targets(dense_logprobs(rows, 5, number), 2, np.zeros(rows, int)), "precise"
    )
    schema = table_schema()
    columns = targets.columns() | {
        "example_id": pa.array([f"u{number}r{i}" for i in range(rows)]),
        "view": pa.array(np.zeros(rows, np.int32)),
    }
    arrays = [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    writer = shards.ShardWriter(schema, "precise")
    writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return table.store_shard(f"{RUN}/{unit_name(number)}", unit_name(number), writer.close())


def commit(table: Table, *units: UnitShard, guard: Callable[[Table], None] | None = None) -> Table:
    names = [unit.key.rpartition("/")[2] for unit in units]
    lineage = make_lineage(RUN, names, sum(unit.num_rows for unit in units))
    return table.commit(units, lineage, guard) if guard else table.commit(units, lineage)


def ids(table: Table) -> list[str]:
    return [str(i) for batch in table.batches(["example_id"]) for i in batch[0].to_pylist()]


def logged_rows(table: Table) -> int:
    return sum(entry["run"].num_rows for entry in table.history() if entry["run"])


CREATORS, COMMITTERS, UNITS = 8, 4, 10


def _create_then_commit(folder: str, number: int, create: Any, commit_all: Any) -> None:
    create.wait(100)
    table = empty(Path(folder))
    if number >= COMMITTERS:
        return
    stored = [store_unit(table, unit) for unit in range(UNITS)]
    commit_all.wait(100)
    for unit in np.random.default_rng(number).permutation(UNITS):
        assert commit(table, stored[unit]).committed(stored[unit].key)


def test_racing_processes_make_one_table_and_commit_each_unit_exactly_once(tmp_path: Path) -> None:
    folder = str(tmp_path / "t")
    context = multiprocessing.get_context("spawn")  # delta-rs cannot live through a fork
    barriers = context.Barrier(CREATORS), context.Barrier(COMMITTERS)
    running = [
        context.Process(target=_create_then_commit, args=(folder, number, *barriers))
        for number in range(CREATORS)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0] * CREATORS
    table = Table.open(folder)
    assert [entry["operation"] for entry in table.history()].count("CREATE TABLE") == 1
    assert [file.unit for file in table.files] == [unit_name(n) for n in range(UNITS)]
    assert sorted(ids(table)) == sorted(f"u{n}r{i}" for n in range(UNITS) for i in range(3))
    assert table.num_rows == logged_rows(table) == 3 * UNITS
    assert table.version == UNITS, "a commit that lost its race leaves no version"


def _create_with_own_seed(folders: list[str], number: int, barrier: Any) -> None:
    for folder in folders:
        barrier.wait(100)
        contents = make_contents(k=2, classes=5, seed=number)
        with contextlib.suppress(MismatchError):
            assert Table.open_or_create(folder, table_schema(), contents).contents == contents


def test_of_racing_creators_with_different_contents_one_wins_for_good(tmp_path: Path) -> None:
    folders = [str(tmp_path / str(i)) for i in range(30)]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    running = [
        context.Process(target=_create_with_own_seed, args=(folders, number, barrier))
        for number in range(3)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0] * 3
    assert [Table.open(folder).version for folder in folders] == [0] * 30


def test_a_unit_is_added_once_however_often_it_is_given(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    first = store_unit(table, 0)
    one = commit(table, first)
    again = commit(table, first)
    other = commit(table, store_unit(table, 0))
    assert one.version == again.version == other.version == 1
    twice = commit(one, store_unit(one, 1), store_unit(one, 1))
    assert (twice.num_rows, logged_rows(twice)) == (6, 6)
    assert sorted(ids(twice)) == sorted(f"u{n}r{i}" for n in range(2) for i in range(3))


def test_the_log_counts_only_what_a_commit_adds(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    commit(table, store_unit(table, 0))
    table = commit(table, store_unit(table, 0), store_unit(table, 1))
    assert table.num_rows == logged_rows(table) == 6
    newest = table.history()[0]["run"]
    assert (newest.units, newest.num_rows) == ((unit_name(1),), 3)


def test_a_unit_without_rows_is_committed_without_a_file(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    nothing = store_unit(table, 0, rows=0)
    assert nothing.path is None
    made = commit(table, nothing)
    assert (made.version, made.files, made.committed(nothing.key)) == (1, (), True)
    assert commit(made, nothing).version == 1


def test_a_lost_reply_is_seen_as_the_success_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = empty(tmp_path / "t")
    real = Table._commit_once
    calls = []

    def commits_then_fails(self: Table, units: Any, lineage: Any) -> None:
        real(self, units, lineage)
        calls.append(len(units))
        raise OSError("connection reset by peer")

    monkeypatch.setattr(Table, "_commit_once", commits_then_fails)
    made = commit(table, store_unit(table, 0), store_unit(table, 1))
    assert (made.version, made.num_rows, calls) == (1, 6, [2])


def test_a_commit_that_never_goes_through_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(racing, "COMMIT_ATTEMPTS", 3)
    table = empty(tmp_path / "t")
    stored = store_unit(table, 0)
    # A folder in the place of the next log entry: every attempt to write that entry fails.
    blocked = tmp_path / "t" / "_delta_log" / f"{1:020d}.json"
    blocked.mkdir()
    (blocked / "x").write_bytes(b"")
    with pytest.raises(TryAgainError, match=r"could not commit 1 units .* run the command again"):
        commit(table, stored)
    shutil.rmtree(blocked)
    assert commit(table, stored).num_rows == 3


def test_a_log_that_cannot_be_read_for_a_while_is_waited_for_and_then_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(racing, "COMMIT_ATTEMPTS", 3)
    table = empty(tmp_path / "t")
    stored = [store_unit(table, number) for number in range(2)]
    real = Table.latest
    refusals = iter(range(2))

    def fails(self: Table) -> Table:
        if next(refusals, None) is not None:
            raise StorageError("cannot open table: 503")
        return real(self)

    monkeypatch.setattr(Table, "latest", fails)
    assert commit(table, stored[0]).num_rows == 3
    refusals = iter(range(99))
    with pytest.raises(TryAgainError, match="nothing is lost, run the command again: cannot open"):
        commit(table, stored[1])
    refusals = iter(())
    assert commit(table, stored[1]).num_rows == 6


def test_nothing_is_added_to_a_log_that_is_damaged(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    stored = store_unit(table, 0)
    entry = tmp_path / "t" / "_delta_log" / f"{0:020d}.json"
    whole = entry.read_bytes()
    entry.write_bytes(b"{half an entry")
    with pytest.raises(IntegrityError, match=r"log entry .* is damaged"):
        commit(table, stored)
    entry.write_bytes(whole)
    assert commit(table, stored).num_rows == 3


def test_the_guard_sees_the_newest_version_and_can_give_up(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    commit(table, store_unit(table, 0))
    seen = []

    def guard(newest: Table) -> None:
        seen.append(newest.version)
        raise MismatchError("given up")

    with pytest.raises(MismatchError, match="given up"):
        commit(table, store_unit(table, 1), guard=guard)
    assert seen == [1]
    assert table.latest().version == 1
    assert commit(table, store_unit(table, 0), guard=guard).version == 1, "nothing to guard"


def test_a_guard_is_asked_again_after_a_lost_race(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    seen = []

    def guard(newest: Table) -> None:
        seen.append(newest.version)
        if len(seen) == 1:
            commit(newest, store_unit(newest, 7))  # another writer, between look and commit

    made = commit(table, store_unit(table, 0), guard=guard)
    assert seen == [0, 1]
    assert sorted(file.unit for file in made.files) == [unit_name(0), unit_name(7)]


def test_an_old_version_stays_as_it_was(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    one = commit(table, store_unit(table, 0))
    digest = one.snapshot_digest
    commit(one, store_unit(one, 1))
    for old in (one, Table.open(f"{tmp_path / 't'}@1")):
        assert (old.version, old.num_rows, old.snapshot_digest) == (1, 3, digest)
        assert ids(old) == ["u0r0", "u0r1", "u0r2"]
        assert not old.committed(f"{RUN}/{unit_name(1)}")
        made, created = old.history()
        assert (made["version"], created["version"]) == (1, 0)
        assert (made["run"].units, created["run"]) == ((unit_name(0),), None)
    assert Table.open(str(tmp_path / "t")).snapshot_digest != digest
    assert one.latest().version == 2


def test_more_than_two_checkpoints_lose_nothing(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    for number in range(112):
        table = commit(table, store_unit(table, number, rows=1))
    log = tmp_path / "t" / "_delta_log"
    assert len(list(log.glob("*.checkpoint*.parquet"))) == 2
    assert len(list(log.glob("*.json"))) == 113, "no log entry may ever be cleaned up"
    newest = Table.open(str(tmp_path / "t"))
    assert newest.version == 112
    assert [file.unit for file in newest.files] == [unit_name(n) for n in range(112)]
    assert all(newest.committed(f"{RUN}/{unit_name(n)}") for n in range(112))
    assert not newest.committed(f"{RUN}/{unit_name(112)}")
    history = newest.history()
    assert [entry["version"] for entry in history] == list(range(112, -1, -1))
    assert history[0]["run"].units == (unit_name(111),)
    assert newest.files[60].bounds["top1_prob"][0] == newest.files[60].bounds["top1_prob"][1]
    assert Table.open(f"{tmp_path / 't'}@37").num_rows == 37
    assert commit(newest, store_unit(newest, 5)).version == 112, "a key before a checkpoint"


def test_other_contents_or_another_schema_are_refused_with_both_values(tmp_path: Path) -> None:
    empty(tmp_path / "t")
    uri = str(tmp_path / "t")
    with pytest.raises(MismatchError, match=r"k differs: the run has 3, table .* has 2"):
        Table.open_or_create(uri, table_schema(), make_contents(k=3, classes=5))
    with pytest.raises(MismatchError, match="schema"):
        Table.open_or_create(uri, table_schema((2.0,)), make_contents(k=2, classes=5))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    DeltaTable.create(
        str(tmp_path / "t"),
        schema=table_schema(),
        configuration={FORMAT_PROPERTY: str(FORMAT_VERSION + 1)},
        raise_if_key_not_exists=False,
    )
    for act in (Table.open, lambda uri: Table.open_or_create(uri, table_schema(), make_contents())):
        with pytest.raises(IntegrityError, match=r"has format version 2, .* upgrade softlabels"):
            act(str(tmp_path / "t"))


def test_a_foreign_delta_table_is_refused(tmp_path: Path) -> None:
    write_deltalake(str(tmp_path / "t"), pa.table({"x": [1]}))
    for act in (Table.open, lambda uri: Table.open_or_create(uri, table_schema(), make_contents())):
        with pytest.raises(IntegrityError, match="it was not made by softlabels"):
            act(str(tmp_path / "t"))


def test_a_file_that_another_writer_added_is_refused_by_its_name(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=20, shard_rows=20)
    rows = pa.Table.from_batches(list(table.batches())).slice(0, 1)
    write_deltalake(str(tmp_path / "t"), rows, mode="append")
    foreign = next(f for f in table.latest().files if not f.path.startswith("data/"))
    with pytest.raises(IntegrityError, match="was not written by softlabels"):
        _ = foreign.sha256


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ("2", "no version 2, only 0 to 1"),
        ("99999999999999999999", "has no version"),
        ("1099511627776", "has no version"),
        ("none", r"has no tag 'none' \(tags: v1\)"),
        ("-1", "tag name '-1'"),
        ("²", "tag name"),
        ("a b", "tag name"),
    ],
)
def test_a_version_or_tag_that_is_not_there_is_refused_at_once(
    tmp_path: Path, mark: str, expected: str
) -> None:
    table = make_table(tmp_path / "t", rows=20)
    tags.make_tag(table.root, "v1", 1, table.snapshot_digest)
    with pytest.raises(BadInputError, match=expected):
        Table.open(f"{tmp_path / 't'}@{mark}")


def test_opening_makes_nothing(tmp_path: Path) -> None:
    for reference in ("none", "none@3", "none@v1"):
        with pytest.raises(BadInputError):
            Table.open(str(tmp_path / reference))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("t", ("t", None)),
        ("t@v1", ("t", "v1")),
        ("/a/b@12", ("/a/b", "12")),
        ("s3://bucket/t@v1.2", ("s3://bucket/t", "v1.2")),
        ("exp@2/t", ("exp@2/t", None)),
        ("exp@2/t@v1", ("exp@2/t", "v1")),
        ("s3://KEY:SECRET@bucket/t", ("s3://KEY:SECRET@bucket/t", None)),
        ("s3://KEY:SECRET@bucket", ("s3://KEY:SECRET@bucket", None)),
        ("s3://KEY:SECRET@bucket/t@v1", ("s3://KEY:SECRET@bucket/t", "v1")),
    ],
)
def test_references_are_split_at_the_last_at(
    reference: str, expected: tuple[str, str | None]
) -> None:
    assert parse_reference(reference) == expected
    if "SECRET" in reference:
        with pytest.raises(BadInputError) as caught:
            Table.open(reference)
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("reference", ["t@", "@v1", "@"])
def test_half_a_reference_is_refused(reference: str) -> None:
    with pytest.raises(BadInputError, match="expected TABLE, TABLE@tag or TABLE@version"):
        parse_reference(reference)


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "é", "a+b", "a:b", "a[b]", "a*b"])
def test_folders_of_any_name_hold_a_table(tmp_path: Path, name: str) -> None:
    table = make_table(tmp_path / name, rows=30)
    assert [p.name for p in tmp_path.iterdir()] == [name], "delta-rs wrote into another folder"
    assert len(ids(Table.open(str(tmp_path / name)))) == 30 == table.num_rows


def test_a_percent_sign_is_refused_because_delta_would_write_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    with pytest.raises(BadInputError, match="'%' cannot be in a table's place"):
        make_table(tmp_path / "a%20b", rows=30)
    assert list((tmp_path / "a b").iterdir()) == []


def test_a_relative_place_is_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make_table("x/../t", rows=20)
    for place in ("t", "./t", "t/", str(tmp_path / "t"), f"file://{tmp_path}/t"):
        assert Table.open(place).snapshot_digest == made.snapshot_digest, place


def test_history_never_depends_on_cleaning_up(tmp_path: Path) -> None:
    empty(tmp_path / "t")
    properties = DeltaTable(str(tmp_path / "t")).metadata().configuration
    assert properties["delta.enableExpiredLogCleanup"] == "false"
    assert properties["delta.checkpointInterval"] == "50"
    assert json.loads(properties["softlabels.contents"])["k"] == 2


def test_errors_of_an_unreadable_log_are_ours(tmp_path: Path) -> None:
    empty(tmp_path / "t")
    (tmp_path / "t" / "_delta_log" / f"{0:020d}.json").write_bytes(b"{half an entry")
    with pytest.raises(SoftLabelsError) as caught:
        Table.open(str(tmp_path / "t"))
    assert "\n" not in str(caught.value)


def test_a_unit_shard_says_what_was_stored(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    one, two = store_unit(table, 0), store_unit(table, 0)
    assert one.path is not None
    assert one.path != two.path, "an attempt never writes over another's file"
    assert replace(one, path=None) == replace(two, path=None)
    assert (tmp_path / "t" / one.path).stat().st_size == one.size
    made = commit(table, one)
    (file,) = made.files
    data = (tmp_path / "t" / file.path).read_bytes()
    assert file.sha256 == sha256_bytes(data)
    assert file.footer_sha256 == sha256_bytes(shards.footer(data))

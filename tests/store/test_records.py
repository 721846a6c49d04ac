"""What commits record of the version they make, and what is noticed by it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from hypothesis import given
from hypothesis import strategies as st

from softlabels.errors import IntegrityError, SoftLabelsError
from softlabels.store import entries, records, shards, tags
from softlabels.store.files import known_of, logged_file, readded
from softlabels.store.records import RECORD_KEY, Tally
from softlabels.store.table import Table, UnitShard
from tests.store.test_table import RUN, commit, empty, ids, store_unit, unit_name
from tests.tables import forget_records, make_table

GOLDEN = Path(__file__).parents[1] / "golden" / "before_records"
GOLDEN_DIGEST = "dead89158cf9a3c09fbd1d8bd49dbe32835ad00ecb87c272a02dbe6d68f7ec3a"


def grown(folder: Path, count: int, first: int = 0) -> Table:
    table = empty(folder)
    for number in range(first, first + count):
        table = commit(table, store_unit(table, number))
    return table


def entry_of(folder: Path, version: int) -> Path:
    return folder / "_delta_log" / f"{version:020d}.json"


def edit(folder: Path, version: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes actions of a log entry in place."""
    path = entry_of(folder, version)
    actions = [json.loads(line) for line in path.read_text().splitlines() if line]
    for action in actions:
        change(action)
    path.write_text("".join(json.dumps(action) + "\n" for action in actions))


digests = st.lists(st.integers(0, 2**256 - 1), unique=True, max_size=20)


@given(digests, digests)
def test_a_tally_of_a_set_is_the_same_however_it_came_about(one: list[int], two: list[int]) -> None:
    whole = Tally().with_([*one, *two])
    assert Tally().with_(reversed(two)).with_(one) == whole
    assert whole.with_((), two) == Tally().with_(one)
    assert Tally().with_([*one, 2**256 - 1]) != Tally().with_(one)


def test_versions_are_as_recorded_by_entries_and_by_a_checkpoint_alike(tmp_path: Path) -> None:
    table = grown(tmp_path / "t", 3)
    assert table._record is not None
    DeltaTable(table.root.uri).create_checkpoint()
    for version in range(3):
        entry_of(tmp_path / "t", version).rename(tmp_path / f"{version}")  # only it is read
    found = Table.open(table.root.uri)
    assert (found.files, found._tally) == (table.files, table._tally)
    assert (found._keys, found._record) == (table._keys, table._record)
    assert found._keys.tally == table._record.keys
    assert [f.statistics for f in found.files] == [f.statistics for f in table.files]


def test_statistics_of_a_file_are_those_it_was_written_with(tmp_path: Path) -> None:
    table = empty(tmp_path / "t")
    stored = store_unit(table, 0)
    (file,) = commit(table, stored).files
    assert file.statistics == stored.statistics
    assert readded(file) == UnitShard("", stored.path, stored.size, 3, stored.statistics)
    assert file.bounds["view"] == (0, 0)
    assert not file.compacted


@pytest.mark.parametrize(
    "said",
    [
        {"minValues": {"margin": -0.0}, "maxValues": {"margin": 0.0}, "nullCount": {"margin": 0}},
        {"minValues": {"entropy": 0.1, "view": -(2**31)}, "maxValues": {"entropy": 3.4e38}},
        {"minValues": {"entropy": 1e-45}, "maxValues": {"entropy": 7, "view": 2**31 - 1}},
        {"minValues": {}, "maxValues": {}, "nullCount": {"label": 3}},
        {},
    ],
)
def test_statistics_of_all_kinds_are_recorded_as_delta_reads_them(
    tmp_path: Path, said: dict[str, Any]
) -> None:
    table = empty(tmp_path / "t")
    stored = store_unit(table, 0)
    odd = UnitShard(stored.key, stored.path, stored.size, 3, {"numRecords": 3, **said})
    made = commit(table, odd)  # a commit is looked at again when it is through
    DeltaTable(made.root.uri).create_checkpoint()
    assert Table.open(made.root.uri).files == made.files
    assert made.files[0].known == known_of(said)


def _other_rows(action: dict[str, Any]) -> None:
    if "add" in action:
        stats = json.loads(action["add"]["stats"])
        stats["numRecords"] += 1
        action["add"]["stats"] = json.dumps(stats)


def _narrower(action: dict[str, Any]) -> None:
    if "add" in action:
        stats = json.loads(action["add"]["stats"])
        stats["maxValues"]["entropy"] /= 2
        action["add"]["stats"] = json.dumps(stats)


def _other_size(action: dict[str, Any]) -> None:
    if "add" in action:
        action["add"]["size"] += 1


def _other_path(action: dict[str, Any]) -> None:
    if "add" in action:
        action["add"]["path"] = action["add"]["path"].replace("0", "1", 1)


def _other_property(action: dict[str, Any]) -> None:
    if "metaData" in action:
        action["metaData"]["configuration"]["delta.checkpointInterval"] = "51"


def _other_contents(action: dict[str, Any]) -> None:
    if "metaData" in action:
        held = action["metaData"]["configuration"]
        held["softlabels.contents"] = held["softlabels.contents"].replace("class0", "class9")


def _other_key(action: dict[str, Any]) -> None:
    if "txn" in action:
        action["txn"]["appId"] = action["txn"]["appId"].replace("ab", "aa", 1)


def _other_lineage(action: dict[str, Any]) -> None:
    if "softlabels" in action.get("commitInfo", {}):
        info = action["commitInfo"]
        info["softlabels"] = info["softlabels"].replace("cpu", "cpv")


def _no_lineage(action: dict[str, Any]) -> None:
    action.get("commitInfo", {}).pop("softlabels", None)


def _lost_name(action: dict[str, Any]) -> None:
    info = action.get("commitInfo", {})
    if RECORD_KEY in info:
        info["softlabels_recorc"] = info.pop(RECORD_KEY)


def _other_action(action: dict[str, Any]) -> None:
    if "commitInfo" in action:
        action["commitInfp"] = action.pop("commitInfo")


def _other_time(action: dict[str, Any]) -> None:
    info = action.get("commitInfo", {})
    if RECORD_KEY in info:
        record = json.loads(info[RECORD_KEY])
        info[RECORD_KEY] = json.dumps({**record, "made_at": record["made_at"] + 1})


@pytest.mark.parametrize("through_a_checkpoint", [False, True])
@pytest.mark.parametrize(
    ("change", "version", "expected"),
    [
        (_other_rows, 1, "has other files than its commit recorded"),
        (_narrower, 2, "has other files than its commit recorded"),
        (_other_size, 2, "has other files than its commit recorded"),
        (_other_path, 1, "has other files than its commit recorded"),
        (_other_property, 0, "has other properties than its commit recorded"),
        (_other_contents, 0, "has other properties than its commit recorded"),
    ],
)
def test_a_changed_log_is_noticed_when_a_version_is_opened(
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    version: int,
    expected: str,
    through_a_checkpoint: bool,
) -> None:
    table = grown(tmp_path / "t", 3)
    stored = store_unit(table, 3)
    edit(tmp_path / "t", version, change)
    if through_a_checkpoint:
        DeltaTable(table.root.uri).create_checkpoint()
    with pytest.raises(IntegrityError, match=expected):
        Table.open(table.root.uri)
    if version > 1:  # from a version that is whole
        with pytest.raises(IntegrityError, match=expected):
            commit(Table.open(f"{tmp_path / 't'}@{version - 1}"), stored)
    assert not entry_of(tmp_path / "t", 4).exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_other_lineage, "log entry 3 is damaged: its record is of another"),
        (_no_lineage, "log entry 3 is damaged: its record is of another"),
        (_other_time, "log entry 3 is damaged: its record is of another"),
        (_lost_name, "log entry 3 is damaged: its record has lost its name"),
        (_other_action, "no action of Delta is called 'commitInfp'"),
    ],
)
def test_what_a_commit_said_cannot_change_unnoticed(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    table = grown(tmp_path / "t", 4)
    edit(tmp_path / "t", 3, change)
    assert Table.open(table.root.uri).num_rows == 12, "the newest version is whole"
    with pytest.raises(IntegrityError, match=expected):
        table.history()
    with pytest.raises(IntegrityError, match=expected):
        Table.open(f"{table.root.uri}@3")


@pytest.mark.parametrize("through_a_checkpoint", [False, True])
def test_a_lost_key_does_not_double_its_unit(tmp_path: Path, through_a_checkpoint: bool) -> None:
    table = grown(tmp_path / "t", 3)
    again = store_unit(table, 1)
    edit(tmp_path / "t", 2, _other_key)
    if through_a_checkpoint:
        DeltaTable(table.root.uri).create_checkpoint()
    opened = Table.open(table.root.uri)
    with pytest.raises(IntegrityError, match="has other units than its commit recorded"):
        opened.committed(again.key)
    with pytest.raises(IntegrityError, match="has other units than its commit recorded"):
        commit(opened, again)
    assert Table.open(table.root.uri).num_rows == 9


def test_a_file_is_never_added_twice(tmp_path: Path) -> None:
    table = grown(tmp_path / "t", 1)
    (file,) = table.files
    key = f"{RUN}/{unit_name(5)}"
    unit = UnitShard(key, file.path, file.size, file.num_rows, file.statistics)
    with pytest.raises(IntegrityError, match=r"would be twice in table .* in version 1 already"):
        commit(table, unit)
    fresh = store_unit(table, 7)
    other = UnitShard(key, fresh.path, fresh.size, fresh.num_rows, fresh.statistics)
    with pytest.raises(IntegrityError, match="or was given twice"):
        commit(table, fresh, other)
    assert table.latest().version == 1


def test_keys_are_read_with_and_without_the_hint_of_a_checkpoint(tmp_path: Path) -> None:
    table = grown(tmp_path / "t", 4)
    DeltaTable(table.root.uri).create_checkpoint()
    table = commit(table, store_unit(table, 4))
    hint = tmp_path / "t" / "_delta_log" / "_last_checkpoint"
    expected = {f"{RUN}/{unit_name(n)}" for n in range(5)}
    for text in (hint.read_bytes(), b"{}", b'{"version":77}', b'{"version":"4"}', b"\xff", b"[1]"):
        hint.write_bytes(text)
        assert entries.keys_of(table.root, 5) == expected, text
        assert entries.keys_of(table.root, 2) == {f"{RUN}/{unit_name(n)}" for n in range(2)}
    hint.unlink()
    assert entries.keys_of(table.root, 5) == expected
    checkpoint = tmp_path / "t" / entries.checkpoint_name(4)
    entry_of(tmp_path / "t", 2).unlink()  # it is in the checkpoint
    assert entries.keys_of(table.root, 5) == expected
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9] + b"123456789")
    with pytest.raises(IntegrityError, match=r"checkpoint .* is damaged: .*; delete the"):
        entries.keys_of(table.root, 5)
    checkpoint.unlink()
    with pytest.raises(IntegrityError, match="lacks version 2"):
        entries.keys_of(table.root, 5)


def test_the_advice_for_a_damaged_checkpoint_mends_the_table(tmp_path: Path) -> None:
    table = grown(tmp_path / "t", 3)
    DeltaTable(table.root.uri).create_checkpoint()
    checkpoint = tmp_path / "t" / entries.checkpoint_name(3)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:100] + bytes(200) + whole[300:])
    with pytest.raises(IntegrityError, match=r"delete the \*.checkpoint.parquet files and _last_"):
        Table.open(table.root.uri)
    for path in (tmp_path / "t" / "_delta_log").glob("*checkpoint*"):
        path.unlink()
    assert Table.open(table.root.uri).snapshot_digest == table.snapshot_digest


def test_a_gap_in_the_log_is_an_error_and_a_log_cut_short_is_told_from_there(
    tmp_path: Path,
) -> None:
    table = grown(tmp_path / "t", 4)
    DeltaTable(table.root.uri).create_checkpoint()
    entry_of(tmp_path / "t", 0).unlink()
    assert [c["version"] for c in table.history()] == [4, 3, 2, 1]
    entry_of(tmp_path / "t", 2).unlink()
    with pytest.raises(IntegrityError, match="lacks the entry of version 2"):
        table.history()


def test_an_older_object_goes_on_showing_its_version(tmp_path: Path) -> None:
    old = grown(tmp_path / "t", 1)
    assert old.latest() is old
    new = commit(old, store_unit(old, 1))
    assert (old.version, new.version) == (1, 2)
    assert ids(old) == ["u0r0", "u0r1", "u0r2"]
    assert not old.committed(f"{RUN}/{unit_name(1)}")
    assert [file.unit for file in new.files_since(old)] == [unit_name(1)]
    assert old.files_since(new) == ()
    assert new.files[0] is old.files[0], "what is known already is not read again"
    # From the old object, whose handle has moved on.
    third = commit(old, store_unit(old, 2))
    assert (third.version, third.num_rows, old.num_rows) == (3, 9, 3)
    assert new.latest().snapshot_digest == third.snapshot_digest


def test_a_table_of_an_earlier_release_opens_and_grows(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "t")
    table = Table.open(str(tmp_path / "t"))
    assert (table.version, table.num_rows, table.snapshot_digest) == (3, 16, GOLDEN_DIGEST)
    assert Table.open(f"{tmp_path / 't'}@v1").snapshot_digest == GOLDEN_DIGEST
    assert [c["run"].num_rows if c["run"] else None for c in table.history()] == [2, 2, 12, None]
    assert all(c["change"] is None for c in table.history())
    assert table.committed(f"{RUN}/{unit_name(0)}")
    assert table.committed(f"{RUN}/{unit_name(1)}")
    assert not table.committed(f"{RUN}/{unit_name(2)}")
    made = commit(table, store_again(table, next(table.batches())))
    assert (made.version, made.num_rows) == (4, 22)
    assert made._record is not None
    assert made._record.files.count == 5
    assert made._record.keys.count == 5
    edit(tmp_path / "t", 3, _other_size)
    with pytest.raises(IntegrityError, match="has other files than its commit recorded"):
        Table.open(str(tmp_path / "t"))


def store_again(table: Table, batch: pa.RecordBatch) -> UnitShard:
    writer = shards.ShardWriter(table.schema, "precise")
    writer.write(batch)
    return table.store_shard(f"{RUN}/{unit_name(9)}", unit_name(9), writer.close())


def test_versions_without_a_record_are_checked_by_the_one_before(tmp_path: Path) -> None:
    table = grown(tmp_path / "t", 2)
    # Another engine sets a property, an earlier release adds a unit.
    delta = DeltaTable(table.root.uri)
    delta.alter.set_table_properties({"delta.checkpointInterval": "40"})
    stored = store_unit(table, 2)
    table = commit(table, stored)
    edit(tmp_path / "t", 4, lambda action: action.get("commitInfo", {}).pop(RECORD_KEY, None))
    opened = Table.open(table.root.uri)
    assert (opened.version, opened.num_rows, opened._record) == (4, 9, None)
    assert opened.committed(stored.key)
    DeltaTable(table.root.uri).create_checkpoint()
    for version in (1, 2):
        edit(tmp_path / "t", version, _narrower)
        with pytest.raises(IntegrityError, match="other files than its commit recorded"):
            Table.open(f"{table.root.uri}@{version}")
    # The newest comes from the checkpoint, its base from entries that were changed.
    with pytest.raises(IntegrityError):
        Table.open(table.root.uri)


def test_what_another_engine_did_is_taken_as_it_stands_and_recorded_from_then_on(
    tmp_path: Path,
) -> None:
    table = make_table(tmp_path / "t", rows=20, shard_rows=20)
    rows = pa.Table.from_batches(list(table.batches())).slice(0, 1)
    write_deltalake(table.root.uri, rows, mode="append")
    foreign = Table.open(table.root.uri)
    assert (foreign.version, foreign.num_rows, foreign._record) == (2, 21, None)
    delta = DeltaTable(table.root.uri)
    streamed = CommitProperties(app_transactions=[Transaction("another/stream", 5)])
    write_deltalake(delta, rows, mode="append", commit_properties=streamed)
    more = make_table(tmp_path / "u", rows=2, seed=1, prefix="y")
    stored = store_again(foreign, next(more.batches()))
    made = commit(foreign, stored)
    assert (made.version, made.num_rows) == (4, 24)
    assert made._record is not None
    assert made.committed("another/stream")
    assert pl.scan_delta(table.root.uri).collect().height == 24


def test_a_log_without_any_record_is_checked_by_tags_alone(tmp_path: Path) -> None:
    table = grown(tmp_path / "t", 3)
    tags.make_tag(table.root, "v1", 3, table.snapshot_digest)
    forget_records(tmp_path / "t")
    edit(tmp_path / "t", 2, _other_size)
    assert Table.open(table.root.uri).num_rows == 9
    with pytest.raises(IntegrityError, match="was made for snapshot"):
        Table.open(f"{table.root.uri}@v1")


def test_the_record_costs_what_a_commit_changes(tmp_path: Path) -> None:
    table = grown(tmp_path / "t", 30)
    sizes = [entry_of(tmp_path / "t", version).stat().st_size for version in (2, 30)]
    assert abs(sizes[1] - sizes[0]) < 20
    assert table._record is not None
    assert len(table._record.model_dump_json()) < 700


def test_entries_read_as_delta_reads_them(tmp_path: Path) -> None:
    table = grown(tmp_path / "t", 1)
    entry = entries.read_entry(table.root, 1)
    assert entry is not None
    (file,) = table.files
    assert logged_file(entry.added[0]) == file
    assert records.file_digest(store := readded(file)) == records.file_digest(file)
    assert store.path == file.path
    assert entry.keys == (f"{RUN}/{unit_name(0)}",)
    assert entries.read_entry(table.root, 2) is None
    for text in (b"{", b"[]", b"1", b'{"add":{}}', b'{"txn":1}', b"[" * 9999, b'{"add":1,"txn":2}'):
        entry_of(tmp_path / "t", 2).write_bytes(text)
        with pytest.raises(SoftLabelsError, match=r"log entry .* is damaged"):
            entries.read_entry(table.root, 2)

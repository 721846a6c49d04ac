"""A version whose files, schema and contents are all new, in one Delta commit."""

from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from softlabels.errors import IntegrityError, MismatchError
from softlabels.lineage import Calibration, ChangeLineage, Contents
from softlabels.schema import table_schema
from softlabels.store import commits, shards
from softlabels.store.files import TableFile, UnitShard, file_path, readded, staged
from softlabels.store.table import Table
from tests.tables import make_lineage, make_table

RUN = "cd" * 32


def shard_of(table: Table, rows: int) -> shards.Shard:
    """The first rows of a table, without its extra temperature."""
    schema = table_schema()
    batch = next(table.batches(schema.names)).slice(0, rows).cast(schema)
    writer = shards.ShardWriter(schema, "precise")
    writer.write(batch)
    return writer.close()


def other(table: Table) -> Contents:
    said = Calibration(temperature=2.0, snapshot_digest=table.snapshot_digest, fitted=False)
    return table.contents.model_copy(update={"temperatures": (), "calibration": said})


def stored(table: Table, number: int = 0, rows: int = 20) -> UnitShard:
    unit = f"{RUN[:16]}-{number:06d}"
    return table.store_shard(f"{RUN}/{unit}", unit, shard_of(table, rows))


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return make_table(tmp_path / "t", rows=60, shard_rows=25, temperatures=[2.0])


def replaced(table: Table, unit: UnitShard) -> Table:
    return table.replace([unit], make_lineage(RUN, [unit.key], 20), table_schema(), other(table))


def test_all_of_it_is_new_and_all_readers_see_it(table: Table) -> None:
    made = replaced(table, stored(table))
    assert (made.version, made.num_rows, len(made.files)) == (2, 20, 1)
    assert made.contents == other(table)
    assert made.schema == table_schema()
    assert Table.open(table.root.uri).snapshot_digest == made.snapshot_digest
    old = Table.open(f"{table.root.uri}@1")
    assert (old.contents, old.schema, old.num_rows) == (table.contents, table.schema, 60)
    assert pl.scan_delta(table.root.uri).collect().height == 20
    paths = [made.root.full(file.path) for file in made.files]
    with duckdb.connect() as con:
        count = con.execute(f"SELECT count(*) FROM read_parquet({paths!r})").fetchall()
    assert count == [(20,)]
    assert made.history()[0]["run"].run_id == RUN


def test_more_can_be_added_to_it_and_a_checkpoint_keeps_its_contents(table: Table) -> None:
    made = replaced(table, stored(table))
    more = make_table(Path(table.root.path).parent / "u", rows=30, prefix="y", temperatures=[2.0])
    unit = f"{RUN[:16]}-000001"
    added = made.store_shard(f"{RUN}/{unit}", unit, shard_of(more, 10))
    made = made.commit([added], make_lineage(RUN, [added.key], 10))
    DeltaTable(table.root.uri).create_checkpoint()
    found = Table.open(table.root.uri)
    assert (found.version, found.num_rows) == (3, 30)
    assert found.contents == other(table)
    assert found.snapshot_digest == made.snapshot_digest


def test_a_lost_reply_is_seen_as_the_success_it_was(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = commits.replace
    calls = []

    def commits_then_fails(*arguments: Any) -> None:
        calls.append(1)
        real(*arguments)
        raise DeltaError("connection reset")

    monkeypatch.setattr(commits, "replace", commits_then_fails)
    unit = stored(table)
    assert replaced(table, unit).version == 2
    assert len(calls) == 1
    # And once more it is there already.
    assert replaced(table, unit).version == 2
    assert len(calls) == 1


def test_a_version_that_was_added_meanwhile_is_not_replaced(table: Table) -> None:
    running = Table.open(table.root.uri)
    unit = stored(table)
    late = stored(table, 7)
    schema = pa.schema(table.schema)
    writer = shards.ShardWriter(schema, "precise")
    writer.write(next(table.batches()))
    shard = writer.close()
    late = table.store_shard(late.key, late.key.rpartition("/")[2], shard)
    table.commit([late], make_lineage(RUN, [late.key], shard.num_rows))
    with pytest.raises(MismatchError, match="was at version 1 with 60 rows and is at 2 with 85"):
        replaced(running, unit)
    assert Table.open(table.root.uri).version == 2


def test_staged_units_are_found_by_their_names_and_checked(table: Table) -> None:
    whole, torn = stored(table, 0), stored(table, 1)
    assert torn.path is not None
    data = table.root.read(torn.path)
    (Path(table.root.path) / torn.path).write_bytes(data[:-1] + b"x")
    keys = {unit.key.rpartition("/")[2]: unit.key for unit in (whole, torn)}
    assert staged(table.root, keys) == {f"{RUN[:16]}-000000": whole}
    assert staged(table.root, {}) == {}


def changing(table: Table, number: int = 0, **values: Any) -> ChangeLineage:
    said: dict[str, Any] = {
        "operation": "delete",
        "change_id": f"{number:064x}",
        "from_version": table.version,
        "arguments": {"where": "true"},
        "rows_before": table.num_rows,
        "rows_after": 0,
        "packages": {},
        "started_at": "2026-01-01T00:00:00+00:00",
        "seconds": 0.0,
    }
    return ChangeLineage.model_validate(said | values)


def rewritten(table: Table, file: TableFile, rows: int) -> UnitShard:
    """The first rows of a file, stored under its unit's name again."""
    writer = shards.ShardWriter(table.schema, "precise")
    writer.write(next(table.batches(files=[file])).slice(0, rows))
    return table.store_shard("", file.unit, writer.close())


def test_a_change_takes_files_out_and_puts_others_in_once(table: Table) -> None:
    first = table.files[0]
    added = rewritten(table, first, 7)
    lineage = changing(table)
    made = table.change([added], [first], lineage)
    assert (made.version, made.num_rows) == (2, table.num_rows - first.num_rows + 7)
    assert [f.unit for f in made.files] == [f.unit for f in table.files], "the order stays"
    assert made.files[0].path == added.path
    newest, before, created = made.history()
    assert (newest["change"], newest["run"]) == (lineage, None)
    assert before["change"] is None
    assert created["change"] is None
    assert made.committed(lineage.key)
    assert made.committed(before["run"].units[0]), "what a run has done stays done"
    # Again, by the same id, from either version: nothing is done.
    assert made.change([added], [first], lineage).version == 2
    assert table.change([added], [first], lineage).version == 2
    paths = [made.root.full(file.path) for file in made.files]
    with duckdb.connect() as con:
        count = con.execute(f"SELECT count(*) FROM read_parquet({paths!r})").fetchall()
    assert count == [(made.num_rows,)]
    assert pl.scan_delta(table.root.uri).collect().height == made.num_rows
    assert Table.open(f"{table.root.uri}@1").num_rows == 60


def test_files_that_others_add_meanwhile_stay_and_files_they_take_are_missed(table: Table) -> None:
    running = Table.open(table.root.uri)
    late = rewritten(table, table.files[0], 5)
    late = UnitShard(f"{RUN}/{RUN[:16]}-000007", late.path, late.size, 5, late.statistics)
    table.commit([late], make_lineage(RUN, [late.key], 5))
    first = running.files[0]
    made = running.change([], [first], changing(running))
    assert (made.version, made.num_rows) == (3, 60 - first.num_rows + 5)
    with pytest.raises(MismatchError, match=r"was at version 1 and is at 3 now, without 'data/"):
        running.change([], [first], changing(running, 1))
    assert table.latest().version == 3


def test_a_file_cannot_come_back_beside_itself(table: Table) -> None:
    with pytest.raises(IntegrityError, match="would be twice"):
        table.change([readded(table.files[0])], [], changing(table))
    assert table.latest().version == 1


def test_rolled_back_files_are_as_they_were(table: Table) -> None:
    gone = table.change([], table.files[:1], changing(table))
    said = changing(gone, 1, operation="rollback", rows_after=60)
    back = gone.change([readded(table.files[0])], [], said, like=table)
    assert back.files == table.files
    assert back.snapshot_digest == table.snapshot_digest
    assert (back.version, back.contents, back.schema) == (3, table.contents, table.schema)
    DeltaTable(table.root.uri).create_checkpoint()
    assert Table.open(table.root.uri).files == table.files


def test_schema_and_contents_come_back_with_all_files(table: Table) -> None:
    unit = stored(table)
    made = replaced(table, unit)
    late = stored(made, 1, rows=3)
    units = [readded(file) for file in table.files]
    said = changing(made, 1, operation="rollback", rows_after=60)
    running = Table.open(table.root.uri)
    grown = made.commit([late], make_lineage(RUN, [late.key], 3))
    with pytest.raises(MismatchError, match="is at 3 now, with other contents or files"):
        running.change(units, running.files, said, like=table)
    with pytest.raises(MismatchError, match="with other contents or files"):
        table.change([], [], changing(table, 2))
    said = changing(grown, 3, operation="rollback", rows_after=60)
    back = grown.change(units, grown.files, said, like=table)
    assert (back.version, back.num_rows, back.contents) == (4, 60, table.contents)
    assert back.schema == table.schema
    assert back.snapshot_digest == table.snapshot_digest
    assert Table.open(table.root.uri).files == table.files
    assert pl.scan_delta(table.root.uri).collect().height == 60
    # And it can be added to.
    again = rewritten(back, back.files[0], 4)
    again = UnitShard(f"{RUN}/{RUN[:16]}-000009", again.path, again.size, 4, again.statistics)
    assert back.commit([again], make_lineage(RUN, [again.key], 4)).num_rows == 64


def test_a_lost_reply_to_a_change_is_seen_as_the_success_it_was(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = commits.change, []

    def commits_then_fails(*arguments: Any) -> None:
        calls.append(1)
        real(*arguments)
        raise DeltaError("connection reset")

    monkeypatch.setattr(commits, "change", commits_then_fails)
    made = table.change([], table.files[:1], changing(table))
    assert (made.version, len(calls)) == (2, 1)


def test_a_guard_can_refuse_a_change(table: Table) -> None:
    def refuse(newest: Table) -> None:
        raise MismatchError(f"not at {newest.version}")

    with pytest.raises(MismatchError, match="not at 1"):
        table.change([], table.files[:1], changing(table), guard=refuse)
    assert table.latest().version == 1


def test_the_name_of_a_compacted_file_says_so(table: Table) -> None:
    first = table.files[0]
    shard = shards.Shard(memoryview(b""), first.sha256, first.footer_sha256, 1, {})
    path = file_path(f"{first.unit}c", "0123abcd", shard)
    file = TableFile(path, 1, 1, first.known)
    assert (file.unit, file.compacted) == (f"{first.unit}c", True)
    assert (file.sha256, file.footer_sha256) == (first.sha256, first.footer_sha256)
    assert sorted([table.files[1].path, path]) == [path, table.files[1].path]

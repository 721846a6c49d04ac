"""A version whose files, schema and contents are all new, in one Delta commit."""

from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from softlabels.errors import MismatchError
from softlabels.lineage import Calibration, Contents
from softlabels.schema import table_schema
from softlabels.store import commits, shards
from softlabels.store.files import UnitShard, staged
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
    return make_table(tmp_path / "t", rows=60, temperatures=[2.0])


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

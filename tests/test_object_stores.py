"""Tables on real object stores: captured, read by every reader, raced for, refused."""

from pathlib import Path

import polars as pl
import pytest

from softlabels.query.view import query
from softlabels.storage import polars_options
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from softlabels.student.stream import Stream
from softlabels.teacher.capture import capture
from tests.plans import make_plan
from tests.servers import S3, Azure
from tests.teacher.jobs import make_spec, write_source

ROWS = 100


Store = S3 | Azure


@pytest.fixture(params=["s3", "azure"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each kind of object store in turn."""
    found: Store = request.getfixturevalue(request.param)
    return found


def test_a_capture_is_read_by_stream_polars_and_sql(store: Store, tmp_path: Path) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, ROWS)
    spec = make_spec(tmp_path, table=store.url("table"), draws=2)
    capture(spec)
    capture(make_spec(tmp_path, table=str(tmp_path / "local"), draws=2))
    table, local = Table.open(store.url("table")), Table.open(str(tmp_path / "local"))
    assert verify(table)["problems"] == []
    assert table.snapshot_digest == local.snapshot_digest
    names = [f"row{i:05d}" for i in range(ROWS)]

    found = pl.scan_delta(store.url("table"), storage_options=polars_options(table.root)).collect()
    assert sorted(found["example_id"]) == names
    sql = "SELECT example_id, topk_ids FROM t.labels ORDER BY example_id"
    assert query({"t": table}, sql).equals(query({"t": local}, sql))

    def epoch(of: Table) -> dict[str, list[int]]:
        rows = {}
        for batch in Stream(make_plan(of), batch_size=16, seed=3, epochs=1):
            names = batch.example_ids.to_pylist()
            rows |= dict(zip(names, batch.targets.ids.tolist(), strict=True))
        return rows

    assert len(epoch(table)) == ROWS
    assert epoch(table) == epoch(local)

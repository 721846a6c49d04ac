"""A table of 10,000 files opens and grows as fast as a small one; a query touches what matches."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import SoftLabelsError
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.query.view import query
from softlabels.schema import table_schema
from softlabels.store import shards
from softlabels.store.files import file_path
from softlabels.store.table import Table, UnitShard
from tests.faults.record import record, scaled
from tests.tables import dense_logprobs, make_contents, make_lineage, make_targets

FILES = 10_000
ROWS = 3
WANTED = (4242, 7777)
RUN = "ef" * 32
SECONDS = 0.5


def batch_of(number: int) -> pa.RecordBatch:
    """Rows of file `number`, which is their view too, so that the log tells files apart."""
    schema = table_schema()
    targets = make_targets(dense_logprobs(ROWS, 5, number), 2, np.zeros(ROWS, int))
    columns = shards.round_to_profile(targets, "precise").columns() | {
        "example_id": pa.array([f"u{number}r{i}" for i in range(ROWS)]),
        "view": pa.array(np.full(ROWS, number, np.int32)),
    }
    arrays = [columns[f.name] if f.name in columns else pa.nulls(ROWS, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def shard_of(number: int) -> shards.Shard:
    writer = shards.ShardWriter(table_schema(), "precise")
    writer.write(batch_of(number))
    return writer.close()


def unit_of(table: Table, number: int, template: shards.Shard | None = None) -> UnitShard:
    """A stored unit; with a template one whose file is in the log alone, and was never written."""
    name = f"{RUN[:16]}-{number:06d}"
    key = f"{RUN}/{name}"
    if template is None:
        return table.store_shard(key, name, shard_of(number))
    said = {
        **template.statistics,
        "minValues": {**template.statistics["minValues"], "view": number},
        "maxValues": {**template.statistics["maxValues"], "view": number},
    }
    path = file_path(name, f"{number:08x}", template)
    return UnitShard(key, path, len(template.data), ROWS, said)


def commit(table: Table, units: list[UnitShard]) -> Table:
    lineage = make_lineage(RUN, [unit.key for unit in units], ROWS * len(units))
    return table.commit(units, lineage)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of 10,000 files of which two are there: the others are deleted, or never were."""
    uri = str(tmp_path_factory.mktemp("large") / "t")
    table = Table.open_or_create(uri, table_schema(), make_contents(k=2, classes=5))
    template = shard_of(0) if scaled(0, 1) == 0 else None
    for start in range(0, FILES, 500):
        numbers = range(start, start + 500)
        units = [unit_of(table, n, None if n in WANTED else template) for n in numbers]
        table = commit(table, units)
    kept = {f"{RUN[:16]}-{number:06d}" for number in WANTED}
    for name in os.listdir(Path(uri) / "data"):
        if name[:23] not in kept:
            os.unlink(Path(uri) / "data" / name)
    assert len(os.listdir(Path(uri) / "data")) == len(WANTED)
    return uri


def timed(call: Callable[[], Any], times: int) -> list[float]:
    """Seconds of each call: by the clock under `make faults`, else what it kept processors busy.

    Tests run beside others, which the clock would count.
    """
    clock = time.perf_counter if scaled(0, 1) else time.process_time
    taken = []
    for _ in range(times):
        began = clock()
        call()
        taken.append(clock() - began)
    return taken


def test_opening_and_committing_take_less_than_half_a_second(large: str) -> None:
    table = Table.open(large)
    assert (len(table.files), table.num_rows) == (FILES, FILES * ROWS)
    opening = timed(lambda: Table.open(large), 5)
    digest = table.snapshot_digest
    table.committed("none")  # reads the keys of 10,000 units, once
    held = table
    more = scaled(8, 60)
    new = iter([unit_of(table, FILES + number, shard_of(0)) for number in range(more)])

    def grow() -> None:
        nonlocal held
        held = commit(held, [next(new)])

    committing = timed(grow, more)  # of 60 one makes a checkpoint
    assert len(held.files) == FILES + more
    assert [f.unit for f in held.files_since(table)] == [
        f"{RUN[:16]}-{FILES + number:06d}" for number in range(more)
    ]
    assert Table.open(f"{large}@{table.version}").snapshot_digest == digest
    looking = timed(lambda: [held.latest(), held.files_since(table)], 5)
    record(
        "10,000 files in one table",
        {
            "open ms": round(1000 * statistics.median(opening)),
            "commit ms": round(1000 * statistics.median(committing)),
            "slowest commit ms": round(1000 * max(committing)),
        },
    )
    print(f"open {opening}, commit {statistics.median(committing)}, max {max(committing)}")
    assert min(opening) < SECONDS
    assert statistics.median(committing) < SECONDS
    assert min(looking) < SECONDS / 5


def test_a_selective_query_touches_only_files_that_match(large: str) -> None:
    table = Table.open(large)
    for number in WANTED:
        sql = f"SELECT example_id FROM t.labels WHERE view = {number} ORDER BY example_id"
        found = query({"t": table}, sql).to_pylist()
        assert [row["example_id"] for row in found] == [f"u{number}r{i}" for i in range(ROWS)]
    positions = f"SELECT count(*) AS n FROM t.positions WHERE view IN {WANTED}"
    assert query({"t": table}, positions).to_pylist() == [{"n": len(WANTED) * ROWS}]
    with pytest.raises(SoftLabelsError):
        query({"t": table}, "SELECT count(*) FROM t.labels WHERE label >= 0")


def test_a_plan_of_a_selection_reads_only_files_that_match(large: str) -> None:
    source = {"table": large, "where": f"view = {WANTED[0]}"}
    plan = mix(Recipe.model_validate({"sources": {"a": source}}))
    assert [file.num_rows for file in plan.tables["a"].files] == [ROWS]

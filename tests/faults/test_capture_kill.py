"""A capture that is killed again and again makes the table that an undisturbed one makes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import yaml

from softlabels.store.inspect import verify
from softlabels.store.table import Table
from softlabels.teacher.capture import capture
from tests.teacher.jobs import TOYS, make_spec, settings, write_source

KILLS = 10
ROWS = 400
UNIT = 10


def rows_of(uri: str) -> pa.Table:
    """All columns of a table, sorted by example_id."""
    return pa.Table.from_batches(list(Table.open(uri).batches())).sort_by("example_id")


def test_ten_kills(tmp_path: Path) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 250)
    write_source(tmp_path / "src" / "b.parquet", 240, ROWS)
    changes = {
        "teacher": {"module": f"{TOYS}:Slow", "arguments": {"seconds": 0.01}},
        "shard_rows": UNIT,
        "batch_size": UNIT // 2,
        "draws": 2,
        "temperatures": [2.0],
        "carry": ["note"],
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(settings(tmp_path, **changes)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed_capture", str(job), str(KILLS), "5"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    *killed, last = found["ends"]
    assert [end["signal"] for end in killed] == [signal.SIGKILL] * KILLS
    assert found["code"] == 0
    assert last["rows"] == ROWS
    grown = [end["rows"] for end in killed]
    assert grown == sorted(grown)
    assert len(set(grown)) > 3  # kills came between commits, not all before the first

    table = Table.open(str(tmp_path / "table"))
    assert verify(table) == {"files": len(table.files), "rows": ROWS, "problems": []}
    undisturbed = make_spec(tmp_path, **changes, table=str(tmp_path / "undisturbed"))
    capture(undisturbed)
    assert rows_of(str(tmp_path / "table")).equals(rows_of(undisturbed.table))

    before = 0
    for version in range(table.version + 1):
        ids = pl.scan_delta(str(tmp_path / "table"), version=version).collect()["example_id"]
        assert ids.n_unique() == len(ids)
        assert before <= len(ids) <= before + UNIT  # a unit of repeats alone adds none
        before = len(ids)
    assert before == ROWS
    runs = [commit["run"] for commit in table.history() if commit["run"]]
    assert sum(run.num_rows for run in runs) == ROWS
    units = [unit for run in runs for unit in run.units]
    assert len(units) == len(set(units)) == (ROWS + 10) // UNIT

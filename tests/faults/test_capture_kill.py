"""Captures by four workers, killed again and again, make what an undisturbed one makes."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
import yaml

from softlabels.storage import open_root, polars_options
from softlabels.store.claims import claimed_units
from softlabels.store.inspect import verify
from softlabels.store.runs import open_runs
from softlabels.store.table import Table
from softlabels.teacher.capture import capture
from tests.faults.record import record, scaled
from tests.servers import S3
from tests.teacher.jobs import TOYS, make_spec, settings, write_source

SEED = 5
UNIT = 10
CHANGES: dict[str, Any] = {
    # Its bits depend on the batch that a row stands in, as those of real models do.
    "teacher": {"module": f"{TOYS}:SlowLinear", "arguments": {"seconds": 0.01}},
    "shard_rows": UNIT,
    "batch_size": UNIT // 2,
    "threads": 1,
    "draws": 2,
    "temperatures": [2.0],
    "carry": ["note"],
}


@dataclass(frozen=True)
class Problem:
    """A source of `rows` examples, and the table that an undisturbed capture makes of it."""

    folder: Path
    rows: int

    @property
    def units(self) -> int:
        """Of the run; the rows of one of them were all there before."""
        return (self.rows + UNIT) // UNIT


def make_problem(folder: Path, rows: int) -> Problem:
    """The source in two files, the second of which begins with a unit of repeats."""
    half = rows // 2 // UNIT * UNIT
    write_source(folder / "src" / "a.parquet", 0, half)
    write_source(folder / "src" / "b.parquet", half - UNIT, rows)
    quick = CHANGES | {"teacher": CHANGES["teacher"] | {"arguments": {"seconds": 0.0}}}
    capture(make_spec(folder, **quick, table=str(folder / "undisturbed")))
    return Problem(folder, rows)


def rows_of(uri: str) -> pa.Table:
    """All columns of a table, sorted by example_id."""
    return pa.Table.from_batches(list(Table.open(uri).batches())).sort_by("example_id")


def run_and_kill(folder: Path, base: str, kills: int) -> dict[str, Any]:
    """What killed_capture did with tables below `base`."""
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(settings(folder, **CHANGES, table=base)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed_capture", str(job), str(kills), str(SEED)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert sum(told["kills"]) >= kills
    return told


def acknowledged(folder: Path, uri: str) -> list[tuple[str, int]]:
    """Units that a worker was told are in, and at which version."""
    file = folder / f"{uri.rpartition('/')[2]}.acks"
    pairs = (line.split() for line in file.read_text().splitlines())
    return [(unit, int(version)) for unit, version in pairs]


def units_of(table: Table) -> Iterator[set[str]]:
    """The units that are in at each version, by the log."""
    found: set[str] = set()
    for commit in reversed(table.history()):
        if commit["run"] is not None:
            new = set(commit["run"].units)
            assert not new & found  # none was committed before
            found |= new
        yield set(found)


def check(problem: Problem, uri: str, undisturbed: pa.Table) -> dict[str, int]:
    """Asserts that a table lost and doubled nothing; what was counted."""
    table = Table.open(uri)
    found = verify(table)
    assert (found["rows"], found["problems"]) == (problem.rows, [])
    assert rows_of(uri).equals(undisturbed)
    assert open_runs(table) == []
    (run,) = {file.unit[:16] for file in table.files}
    assert claimed_units(table.root, run) == []

    options = polars_options(open_root(uri))
    before = 0
    for version in range(table.version + 1):
        frame = pl.scan_delta(uri, version=version, storage_options=options)
        ids = frame.select("example_id", "topk_ids").collect()["example_id"]
        assert ids.n_unique() == len(ids)
        assert before <= len(ids) <= before + UNIT  # the unit of repeats adds none
        before = len(ids)
    assert before == problem.rows

    inside = list(units_of(table))
    acks = acknowledged(problem.folder, uri)
    assert acks
    for unit, version in acks:
        assert all(unit in units for units in inside[version:])
    assert len(inside[-1]) == problem.units
    stored = len(table.root.names("data"))
    return {"versions": table.version + 1, "acks": len(acks), "spare": stored - len(table.files)}


def show(problem: Problem, base: str, kills: int, what: str) -> None:
    """Kills, checks, and records."""
    began = time.monotonic()
    told = run_and_kill(problem.folder, base, kills)
    undisturbed = rows_of(str(problem.folder / "undisturbed"))
    counts = [check(problem, uri, undisturbed) for uri in told["tables"]]
    record(
        what,
        {
            "kills": sum(told["kills"]),
            "rows lost": 0,
            "rows doubled": 0,
            "rows that differ": 0,
            "acknowledged units lost": 0,
            "acknowledged units": sum(one["acks"] for one in counts),
            "versions read": sum(one["versions"] for one in counts),
            "files labelled in vain": sum(one["spare"] for one in counts),
            "workers that claimed": told["modes"].get("claim", 0),
            "by shard": told["modes"].get("shard", 0),
            "alone": told["modes"].get("alone", 0),
            "seconds": round(time.monotonic() - began),
            "seed": SEED,
        },
    )


@pytest.mark.timeout(scaled(300, 3600))
def test_four_workers_killed_on_a_local_disk(tmp_path: Path) -> None:
    problem = make_problem(tmp_path, scaled(240, 480))
    what = "kill -9 of 4 capture workers, local"
    show(problem, str(tmp_path / "local"), scaled(8, 140), what)


@pytest.mark.timeout(scaled(300, 3600))
def test_four_workers_killed_on_s3(tmp_path: Path, s3: S3) -> None:
    problem = make_problem(tmp_path, scaled(60, 120))
    what = "kill -9 of 4 capture workers, S3"
    show(problem, s3.url("killed"), scaled(4, 60), what)

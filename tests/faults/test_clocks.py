"""Clocks that jump or disagree by hours: nothing that decides anything asks them."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from softlabels.storage import Root
from softlabels.store.claims import claimed_units, read_claim
from softlabels.store.inspect import verify
from softlabels.store.runs import run_records
from softlabels.store.status import status
from softlabels.store.table import Table
from tests.faults.record import record, scaled
from tests.teacher.jobs import TOYS, settings, stored, write_source

ROOT = Path(__file__).parents[2]
HOUR, DAY = 3_600, 86_400
Shifts = list[tuple[float | str, float]]
AHEAD: Shifts = [(0, 5 * HOUR)]
BEHIND: Shifts = [(0, -7 * HOUR)]


def make_job(folder: Path, seconds: float, rows: int, unit: int) -> Path:
    """A job whose teacher takes so long for each batch of five rows."""
    write_source(folder / "src" / "a.parquet", 0, rows)
    slow = {"module": f"{TOYS}:Slow", "arguments": {"seconds": seconds}}
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(settings(folder, teacher=slow, shard_rows=unit, batch_size=5)))
    return job


class Commands:
    """Starts commands under wrong clocks."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        self._server, self._folder = server, folder
        self._out: dict[int, Path] = {}

    def start(self, shifts: Shifts, *arguments: str | Path) -> int:
        """Starts one; its process id."""
        out = self._folder / f"out{len(self._out)}"
        asked = {"shifts": shifts, "arguments": list(map(str, arguments)), "out": str(out)}
        assert self._server.stdin
        assert self._server.stdout
        print(json.dumps(asked), file=self._server.stdin, flush=True)
        pid = int(self._server.stdout.readline())
        self._out[pid] = out
        return pid

    def reported(self, pid: int) -> dict[str, Any]:
        """What one says at its end, which must be a good one."""
        out, deadline = self._out[pid], time.monotonic() + 120
        while not Path(f"{out}.code").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert Path(f"{out}.code").read_text() == "0", Path(f"{out}.err").read_text()
        found: dict[str, Any] = json.loads(out.read_text().splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def server() -> Iterator["subprocess.Popen[str]"]:
    """A process that forks others."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.shifted_clock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


@pytest.fixture
def commands(server: "subprocess.Popen[str]", tmp_path: Path) -> Commands:
    """Commands whose words are kept in this test's folder."""
    return Commands(server, tmp_path)


def begun_at(folder: Path) -> list[datetime]:
    """When each commit says its work began, oldest first."""
    history = Table.open(str(folder / "table")).history()
    return [datetime.fromisoformat(c["run"].started_at) for c in history[::-1] if c["run"]]


def check(folder: Path, rows: int) -> Table:
    """Asserts that all is labelled, once; the table."""
    table = Table.open(str(folder / "table"))
    assert verify(table) == {"files": len(table.files), "rows": rows, "problems": []}
    names = stored(folder / "table", ["example_id"])["example_id"]
    assert names == [f"row{number:05d}" for number in range(rows)]
    return table


def test_a_clock_that_jumps_back_by_a_day(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, 0.1, 100, 5)
    fifth = tmp_path / "table/_delta_log" / f"{5:020d}.json"
    jump: Shifts = [(0, 0), (str(fifth), -DAY)]
    report = commands.reported(commands.start(jump, "capture", job, "--claim"))
    assert (report["rows"], report["committed"]) == (100, 20)
    table = check(tmp_path, 100)
    # It did jump, in the middle of the work.
    times = begun_at(tmp_path)
    back = [(a - b).total_seconds() for a, b in itertools.pairwise(times)]
    assert max(back) > DAY - 60
    assert [commit["version"] for commit in table.history()] == list(range(20, -1, -1))
    again = commands.reported(commands.start([(0, -DAY)], "capture", job))
    assert (again["rows"], again["version"]) == (0, 20)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - DAY)
    (run,) = status(table)
    assert (run.finished, run.seconds_ago) == (True, 0.0)
    record("clock that jumps back by a day in a capture", {"rows lost": 0, "rows doubled": 0})


def test_workers_whose_clocks_are_twelve_hours_apart_share_the_units(
    tmp_path: Path, commands: Commands
) -> None:
    # A unit takes longer than the lease: only beats tell that its worker lives.
    job = make_job(tmp_path, 0.75, 60, 10)
    claim = ("capture", job, "--claim", "--lease", "1")
    workers = [commands.start(shifts, *claim) for shifts in (AHEAD, BEHIND)]
    reports = [commands.reported(worker) for worker in workers]
    assert sum(report["committed"] for report in reports) == 6
    assert all(report["committed"] for report in reports)
    table = check(tmp_path, 60)
    assert len(table.root.names("data")) == 6  # none was labelled twice
    times = sorted(begun_at(tmp_path))
    assert (times[-1] - times[0]).total_seconds() > 11 * HOUR
    record(
        "2 workers with clocks 12 hours apart, units longer than the lease",
        {"units": 6, "units labelled twice": 0, "rows lost": 0, "rows doubled": 0},
    )


def test_a_dead_worker_s_unit_is_taken_over_whatever_its_clock_said(
    tmp_path: Path, commands: Commands
) -> None:
    clocks = [(AHEAD, BEHIND), (BEHIND, AHEAD)][: scaled(1, 2)]
    for number, (dead, living) in enumerate(clocks):
        folder = tmp_path / str(number)
        job = make_job(folder, 0.3, 20, 10)
        claim = ("capture", job, "--claim", "--lease", "1")
        first = commands.start(dead, *claim)
        root = wait_for_claim(folder / "table")
        os.kill(first, signal.SIGKILL)
        run = run_records(root)[0].run_id[:16]
        (unit,) = claimed_units(root, run)
        assert read_claim(root, unit) is not None
        began = time.monotonic()
        assert commands.reported(commands.start(living, *claim))["left"] == 0
        assert time.monotonic() - began > 1
        check(folder, 20)
        assert claimed_units(root, run) == []
    record(
        "lease taken over from a killed worker, clocks 12 hours apart",
        {"take-overs": len(clocks), "rows lost": 0, "rows doubled": 0},
    )


def wait_for_claim(place: Path) -> Root:
    """The table's root, once a worker has claimed a unit."""
    deadline = time.monotonic() + 60
    while not list(place.glob("_softlabels/claims/*/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return Table.open(str(place)).root


FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


@pytest.mark.skipif(scaled(0, 1) == 0, reason="make faults runs it")
@pytest.mark.skipif(FAKETIME is None, reason="NOT TESTED UNDER LIBFAKETIME: it is not installed")
def test_the_whole_process_a_day_behind(tmp_path: Path) -> None:
    # The clock of delta-rs too, which Python cannot shift.
    job = make_job(tmp_path, 0.0, 40, 10)
    module = f"teacher.module={TOYS}:Linear"  # it does not sleep, which fails under faketime
    shifts = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    for shard, fake in (("0/2", "-1d"), ("1/2", "+5h")):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "softlabels",
                "capture",
                str(job),
                "--shard",
                shard,
                "--set",
                module,
                "--set",
                "teacher.arguments={}",
            ],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env=os.environ | shifts | {"FAKETIME": fake},
        )
        assert done.returncode == 0, done.stderr
    table = check(tmp_path, 40)
    stamps = [commit["timestamp"] for commit in table.history()]
    assert max(stamps) - min(stamps) > 28 * HOUR * 1000

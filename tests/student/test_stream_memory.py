"""What a stream takes of the system, measured from outside: its processes' peak, and waiting."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softlabels.plan import Plan
from softlabels.student.stream import Stream
from tests.plans import make_plan
from tests.sequences import make_long
from tests.tables import make_table

MOST_BYTES = 300 << 20

PROGRAM = """
import re, sys
import numpy.random, pyarrow.compute, torch
from softlabels.plan import Plan
from softlabels.student.stream import Stream
def peak():
    return int(re.search("VmHWM:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1]) << 10
plan = Plan.read(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak of imports is not that of the stream
before = peak()
stream = Stream(plan, batch_size=int(sys.argv[2]), epochs=int(sys.argv[3]))
rows = sum(len(batch) for batch in stream)
print(rows, peak() - before)
"""


def run(plan: Plan, folder: Path, batch_size: int, epochs: int, cached: bool) -> tuple[int, int]:
    """Rows, and bytes of the peak above the interpreter with its imports."""
    plan.write(folder / "plan.parquet")
    environment = os.environ | {"SOFTLABELS_CACHE": str(folder / "cache")}
    environment |= {} if cached else {"SOFTLABELS_CACHE_BYTES": "0"}
    arguments = [str(folder / "plan.parquet"), str(batch_size), str(epochs)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=True,
    )
    rows, peak = map(int, done.stdout.split())
    return rows, peak


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_sequences_of_several_windows_stay_within_300_mb(tmp_path: Path, cached: bool) -> None:
    plan = make_plan(make_long(tmp_path / "t", rows=2400))
    rows, peak = run(plan, tmp_path, 16, 2, cached)
    assert rows == 4800
    assert 10 << 20 < peak < MOST_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_short_rows_stay_within_300_mb(tmp_path: Path, cached: bool) -> None:
    table = make_table(tmp_path / "t", 300_000, k=10, shard_rows=100_000, row_group_rows=10_000)
    rows, peak = run(make_plan(table, repeats=[3]), tmp_path, 1024, 2, cached)
    assert rows == 1_800_000
    assert 10 << 20 < peak < MOST_BYTES


def test_a_student_that_takes_its_time_hardly_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "cache"))
    plan = make_plan(make_long(tmp_path / "t", rows=96))
    stream = Stream(plan, batch_size=4, epochs=6, shuffle_rows=40, cache_bytes=0)
    begun, waited = 0.0, 0.0
    for batch in stream:
        if batch.epoch == 1 and not batch.position:  # from here on all is in the cache
            begun, waited = time.perf_counter(), stream.waited_seconds
        time.sleep(0.01)
    share = (stream.waited_seconds - waited) / (time.perf_counter() - begun)
    assert share < 0.01

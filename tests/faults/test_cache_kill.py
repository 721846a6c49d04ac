"""A stream killed with -9 while it fills the local cache: no half file is ever read."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softlabels.student import localcache
from softlabels.student.decode import Decoder
from tests.faults.record import record, scaled
from tests.plans import make_plan
from tests.sequences import make_long
from tests.student.test_cached_stream import assert_equal, read

LIMIT = 500_000

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from softlabels.plan import Plan
from softlabels.student.stream import Stream
stream = Stream(Plan.read(sys.argv[2]), batch_size=7, seed=int(sys.argv[3]), shuffle_rows=30,
    cache_bytes=0)
print("ready", flush=True)
for batch in stream:
    pass
"""


def test_kills_while_the_cache_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is below what the plan takes, so that files come and go all the time."""
    kills, rng = scaled(6, 200), random.Random(7)
    sizes = {"x": 48, "y": 44}
    plans = [make_plan(make_long(tmp_path / n, rows=r, positions=64)) for n, r in sizes.items()]
    for name, plan in zip("xy", plans, strict=True):
        plan.write(tmp_path / f"{name}.parquet")
    expected = [read(plan) for plan in plans]
    folder = tmp_path / "cache"
    monkeypatch.setenv("SOFTLABELS_CACHE", str(folder))
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", str(LIMIT))
    most = 0
    for number in range(kills):
        name = "xy"[number % 2]
        arguments = [str(Path.cwd()), str(tmp_path / f"{name}.parquet"), str(number)]
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.random() * 0.15)
            process.send_signal(signal.SIGKILL)
        found = [p for p in (folder / "shards").rglob("*") if p.is_file()]
        most = max(most, sum(p.stat().st_size for p in found))
        if number % 3 == 0:
            (folder / "lock").unlink(missing_ok=True)  # what it counted is lost as well
    assert most <= LIMIT
    damaged: list[Path] = []
    monkeypatch.setattr(
        localcache.LocalCache, "_drop", lambda own, path, error: damaged.append(path)
    )
    decoded = 0
    decode = Decoder.decode

    def counted(own: Decoder, *place: object) -> object:
        nonlocal decoded
        decoded += 1
        return decode(own, *place)  # type: ignore[arg-type]

    monkeypatch.setattr(Decoder, "decode", counted)
    for plan, batches in zip(plans, expected, strict=True):
        assert_equal(read(plan, cache_bytes=0), batches)
    assert not damaged
    assert not list((folder / "shards").rglob("*.tmp"))
    gc.collect()
    assert not list((folder / "streams").iterdir())
    used = sum(p.stat().st_size for p in (folder / "shards").rglob("*") if p.is_file())
    assert used <= LIMIT
    record(
        "A stream is killed while it fills the local cache",
        {"kills": kills, "half files read": len(damaged), "rows lost": 0, "rows doubled": 0},
    )
    assert os.path.exists(folder / "lock")

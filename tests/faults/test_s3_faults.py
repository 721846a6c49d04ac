"""Faults between a table and its object store: nothing lost, nothing doubled, every read right."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
import yaml

from softlabels.errors import TryAgainError
from softlabels.query.view import query
from softlabels.storage import open_root, options, polars_options
from softlabels.store import claims
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from softlabels.student.stream import Stream
from softlabels.teacher.capture import Progress, Sharing, capture
from tests.faults import proxy as p
from tests.faults.record import record, scaled
from tests.plans import make_plan
from tests.servers import S3
from tests.teacher.jobs import make_spec, settings, write_source

UNIT = 5
ROWS = UNIT * scaled(5, 20)
RATE = scaled(20, 10) / 100
SEED = 20_261
TIMEOUT = 1.0
HANG = 1.3
ROOT = Path(__file__).parents[2]
MIX = dict.fromkeys(p.KINDS, 1.0) | {p.TIME_OUT: 0.2, p.CUT: 4.0}
"""Time-outs cost a test's time; few requests are uploads."""


@pytest.fixture
def front(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[p.Proxy]:
    """A proxy before the store; clients of this process and its children go through it."""
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")  # what a student reads comes from the store
    monkeypatch.setenv("SOFTLABELS_TIMEOUT", str(TIMEOUT))
    monkeypatch.setenv("SOFTLABELS_PATIENCE", "30")
    with p.running(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def rows_of(table: Table) -> pa.Table:
    """All columns of a table, sorted by example_id."""
    return pa.Table.from_batches(list(table.batches())).sort_by("example_id")


def epoch(table: Table, seed: int) -> list[tuple[list[str], list[Any]]]:
    """What a student reads in one epoch."""
    stream = Stream(make_plan(table), batch_size=16, seed=seed, epochs=1)
    return [(b.example_ids.to_pylist(), b.targets.ids.tolist()) for b in stream]


def capture_through(
    spec: Any, acknowledged: set[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """Captures to the end, again after each giving up: (calls, rows they say they labelled)."""
    commit = Table.commit

    def noted(self: Table, units: Any, *arguments: Any) -> Table:
        made = commit(self, units, *arguments)
        acknowledged.update(unit.key for unit in units)
        return made

    monkeypatch.setattr(Table, "commit", noted)
    try:
        for call in range(1, 20):
            try:
                return call, capture(spec).rows
            except TryAgainError as error:
                print(f"gave up: {error}")
                held = Table.open(spec.table)
                assert all(held.committed(key) for key in acknowledged)
        raise AssertionError("the capture never ended")
    finally:
        monkeypatch.setattr(Table, "commit", commit)


def test_captures_and_reads_through_faults(
    s3: S3, front: p.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = scaled(40, 300)
    write_source(tmp_path / "src" / "a.parquet", 0, ROWS)
    changes: dict[str, Any] = {"shard_rows": UNIT, "batch_size": UNIT, "draws": 2}
    capture(make_spec(tmp_path, **changes))
    undisturbed = Table.open(str(tmp_path / "table"))
    expected, names = rows_of(undisturbed), [f"row{i:05d}" for i in range(ROWS)]
    sql = "SELECT example_id, topk_ids, tail_logprob FROM t.labels ORDER BY example_id"
    counts: Counter[str] = Counter()
    captures = calls = reads = commits = lost = doubled = 0
    began = time.monotonic()
    while sum(counts.values()) < wanted or set(counts) != set(p.KINDS):
        plan = p.Plan(SEED + captures, RATE, MIX)
        uri = s3.url(f"table{captures}")
        acknowledged: set[str] = set()
        front.set(plan, hang=HANG)
        calls += capture_through(
            make_spec(tmp_path, **changes, table=uri), acknowledged, monkeypatch
        )[0]
        captures += 1
        table = Table.open(uri)
        through = [rows_of(table), query({"t": table}, sql), epoch(table, captures)]
        counts += front.set()

        assert len(acknowledged) == ROWS // UNIT
        assert through == [expected, query({"t": undisturbed}, sql), epoch(undisturbed, captures)]
        reads += 3
        table = Table.open(uri)
        assert all(table.committed(key) for key in acknowledged)
        assert table.snapshot_digest == undisturbed.snapshot_digest
        assert verify(table)["problems"] == []
        options = polars_options(table.root)
        before: set[str] = set()
        for version in range(table.version + 1):
            found = pl.scan_delta(uri, version=version, storage_options=options)
            ids = found.select("example_id").collect()["example_id"].to_list()
            assert len(ids) == len(set(ids))
            assert before <= set(ids)
            before = set(ids)
        lost += len(set(names) - before)
        doubled += table.num_rows - len(before)
        assert (lost, doubled, sorted(before)) == (0, 0, names)
        runs = [entry["run"] for entry in table.history() if entry["run"]]
        units = [unit for run in runs for unit in run.units]
        assert len(units) == len(set(units)) == ROWS // UNIT
        commits += len(units)
        assert open_root(uri).names("_softlabels") == []
    assert calls == captures, "no fault came through to the user"
    record(
        "S3 through a proxy: lost replies, 500s, slow-downs, time-outs, cut reads and uploads",
        {
            "faults": sum(counts.values()),
            **{kind: counts[kind] for kind in p.KINDS},
            "captures": captures,
            "commits": commits,
            "rows lost": lost,
            "rows doubled": doubled,
            "reads compared": reads,
            "seconds": round(time.monotonic() - began),
        },
    )
    print(dict(counts), f"{captures} captures, {calls} calls")


def start(job: Path, **environment: str) -> "subprocess.Popen[str]":
    """The real command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from softlabels.cli import run; run()", "capture", str(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def errors(stderr: str) -> list[str]:
    """Lines of stderr apart from progress."""
    assert "Traceback" not in stderr
    lines = [line.strip() for line in stderr.replace("\r", "\n").splitlines()]
    return [line for line in lines if line and not line.startswith(("plan ", "label "))]


def test_a_store_that_goes_down_ends_the_command_with_75_and_nothing_is_lost(
    s3: S3, front: p.Proxy, tmp_path: Path
) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 60)
    slow = {"module": "tests.teacher.toys:Slow", "arguments": {"seconds": 0.1}}
    changes: dict[str, Any] = {"shard_rows": 5, "batch_size": 5}
    job = tmp_path / "job.yaml"
    uri = s3.url("table")
    job.write_text(yaml.safe_dump(settings(tmp_path, **changes, teacher=slow, table=uri)))
    process = start(job, SOFTLABELS_PATIENCE="2")
    root = open_root(f"{uri}/_delta_log")
    deadline = time.monotonic() + 60
    while not root.exists("00000000000000000002.json"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    front.set(down=600)
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    seconds = time.monotonic() - began
    assert process.returncode == 75, err
    assert json.loads(out.splitlines()[-1])["exit"] == 75
    assert "\\u001b" not in out
    (line,) = errors(err)
    assert line.startswith("error: ")
    assert "storage does not answer" in line or "could not commit" in line
    assert "run the command again" in line
    assert s3.bucket in line
    assert "\x1b" not in line
    assert seconds < 12
    front.set()
    held = Table.open(uri)
    assert 0 < held.num_rows < 60
    report = capture(make_spec(tmp_path, **changes, teacher=slow, table=uri))
    assert report.rows == 60 - held.num_rows
    assert sorted(rows_of(Table.open(uri))["example_id"].to_pylist()) == [
        f"row{i:05d}" for i in range(60)
    ]
    print(line, f"after {seconds:.1f} s")


def test_a_worker_with_a_claim_gives_up_as_soon(
    s3: S3, front: p.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 20)
    spec = make_spec(tmp_path, table=s3.url("table"), shard_rows=5)
    monkeypatch.setenv("SOFTLABELS_PATIENCE", "6")
    monkeypatch.setattr(claims, "GIVE_UP_SECONDS", 0.5)
    down: list[float] = []

    def committed(unit: str, version: int) -> None:
        front.set(down=600)
        down.append(time.monotonic())

    with pytest.raises(TryAgainError, match=r"SOFTLABELS_PATIENCE.* 6"):
        capture(spec, Progress(committed=committed), Sharing(claim=True))
    seconds = time.monotonic() - down[0]
    assert seconds < 10, "it is not patient once more to give up its claim"
    front.set()
    assert Table.open(spec.table).num_rows == 5


def test_less_than_a_minute_after_the_last_answer_a_command_has_given_up() -> None:
    longest = options.PATIENCE_SECONDS + options.TIMEOUT_SECONDS + claims.GIVE_UP_SECONDS
    assert longest <= 60


def test_storage_that_is_away_for_a_while_is_waited_for(
    s3: S3, front: p.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = scaled(2, 30)
    monkeypatch.delenv("SOFTLABELS_PATIENCE")
    write_source(tmp_path / "src" / "a.parquet", 0, 60)
    uri = s3.url("table")
    began = time.monotonic()
    front.set(down=away)
    capture(make_spec(tmp_path, table=uri))
    captured = time.monotonic() - began
    table = Table.open(uri)
    expected = epoch(table, 0)
    plan = make_plan(table)
    began = time.monotonic()
    front.set(down=away)
    stream = Stream(plan, batch_size=16, seed=0, epochs=1)
    found = [(b.example_ids.to_pylist(), b.targets.ids.tolist()) for b in stream]
    read = time.monotonic() - began
    assert found == expected
    assert min(captured, read) > away
    assert max(captured, read) < away + 25
    record(
        "storage away while a capture and a student run",
        {"seconds away": away, "captured after": round(captured), "read after": round(read)},
    )

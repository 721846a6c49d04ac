"""Two processes of torchrun, killed with -9 again and again: the same rows, the same curve."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from softlabels.student.metrics import read_metrics
from softlabels.student.spec import RunSpec
from tests.faults.record import record, scaled
from tests.faults.seen import SEEN
from tests.plans import make_plan
from tests.student.problem import CLASSES, run_spec
from tests.tables import dense_logprobs, make_table

ROOT = Path(__file__).parents[2]
ROWS, BATCH = 150, 16
EPOCH = -(-ROWS // BATCH)
PAUSE = 0.02
WALL_CLOCK = ("rows_per_s", "data_wait_share")


def make_spec(folder: Path, steps: int) -> RunSpec:
    features = dense_logprobs(ROWS, CLASSES, 0)[:, :CLASSES].astype(np.float32)
    carried = {
        "features": pa.array(features.tolist(), pa.list_(pa.float32())),
        "number": pa.array(range(ROWS)),
    }
    table = make_table(folder / "table", ROWS, CLASSES, CLASSES, carried=carried)
    make_plan({"table": table}).write(folder / "plan.parquet")
    return run_spec(
        folder,
        folder / "plan.parquet",
        student={"module": "tests.faults.seen:Seeing", "arguments": {"pause": PAUSE}},
        inputs={"decode": "tests.faults.seen:decode", "columns": ["features", "number"]},
        steps=steps,
        batch_size=BATCH,
        log_every=1,
        checkpoint={"every": 3, "keep": 2},
    )


def start(spec: RunSpec, folder: Path) -> "subprocess.Popen[bytes]":
    """torchrun with two processes of the command line; they write what they say to `folder`/log."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=2"]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [*torchrun, "--nproc-per-node=2", "-m", "softlabels", "train", str(path)],
            cwd=ROOT,
            env=os.environ | {SEEN: str(folder)},
            stdout=log,
            stderr=log,
        )


def descendants(pid: int) -> Iterator[int]:
    """The processes that one has started, and theirs."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        if parent == pid:
            child = int(path.parent.name)
            yield child
            yield from descendants(child)


def newest_step(spec: RunSpec) -> int:
    return max((line["step"] for line in read_metrics(Path(spec.out))), default=0)


def seen(folder: Path) -> dict[tuple[int, int], list[int]]:
    """The rows of each (step, rank); raises when a step was repeated with others."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank in (0, 1):
        for line in (folder / f"{rank}.jsonl").read_text().splitlines():
            step, rows = json.loads(line)
            assert found.setdefault((step, rank), rows) == rows
    return found


def stable(spec: RunSpec) -> list[dict[str, Any]]:
    lines = read_metrics(Path(spec.out))
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]


def kill_in_mid_epoch(process: "subprocess.Popen[bytes]", spec: RunSpec, everyone: bool) -> None:
    """Kills with -9 some steps from now: a worker, which torchrun starts again, or all of them."""
    at = newest_step(spec) + random.randint(1, 4)
    deadline = time.monotonic() + 120
    while newest_step(spec) < at:
        assert process.poll() is None, "torchrun has ended"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.uniform(0, PAUSE))
    workers = sorted(descendants(process.pid))
    if not everyone:
        os.kill(random.choice(workers[-2:]), signal.SIGKILL)
        return
    for pid in (process.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def finish(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    assert process.wait(timeout=240) == 0, (folder / "log").read_text()[-4000:]


@pytest.mark.timeout(1800)
def test_killed_and_restarted_sees_the_same_rows(tmp_path: Path) -> None:
    kills = scaled(2, 20)
    spec = make_spec(tmp_path, steps=scaled(20, 120))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = spec.model_copy(update={"out": str(whole / "run")})
    spec = spec.model_copy(update={"out": str(killed / "run")})
    finish(start(undisturbed, whole), whole)
    process = start(spec, killed)
    for number in range(kills):
        everyone = number % 2 == 1
        kill_in_mid_epoch(process, spec, everyone)
        if everyone:
            process = start(spec, killed)
    finish(process, killed)
    expected, found = seen(whole), seen(killed)
    assert found == expected
    assert stable(spec) == stable(undisturbed)
    weights = [Path(one.out, "student.safetensors").read_bytes() for one in (undisturbed, spec)]
    assert weights[0] == weights[1]
    for epoch in range(spec.steps // EPOCH if spec.steps else 0):
        steps = range(epoch * EPOCH + 1, (epoch + 1) * EPOCH + 1)
        rows = Counter(row for step in steps for rank in (0, 1) for row in found[step, rank])
        assert rows == Counter(range(ROWS))
    record(
        "A torchrun training of two processes is killed with -9 in mid-epoch",
        {"kills": kills, "rows lost": 0, "rows doubled": 0, "steps of another curve": 0},
    )

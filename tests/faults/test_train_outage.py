"""Storage stops in mid-epoch: training goes on when it is back, or keeps all it has."""

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import TryAgainError
from softlabels.student import run as run_module
from softlabels.student.checkpoint import load, read_weights, steps
from softlabels.student.spec import RunSpec
from softlabels.student.stream import Stream
from softlabels.student.trainer import Progress, train
from tests.faults.record import record, scaled
from tests.plans import make_plan
from tests.servers import make_bucket, s3_environment, set_environment
from tests.student.problem import CLASSES, run_spec
from tests.tables import dense_logprobs, make_table

ROOT = Path(__file__).parents[2]
ROWS, BATCH, STOP = 400, 10, 8
STEPS = ROWS // BATCH
SECONDS = scaled(3, 30)


@contextlib.contextmanager
def server() -> Iterator["subprocess.Popen[str]"]:
    """A moto server that a test may stop; the first line of its output is its port."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.servers", "s3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The server's process and a bucket; streams read a few rows ahead and keep none."""
    with server() as process:
        assert process.stdout is not None
        endpoint = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        set_environment(monkeypatch, s3_environment(endpoint))
        monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
        monkeypatch.setenv("SOFTLABELS_TIMEOUT", "1")
        small = partial(Stream, shuffle_rows=2 * BATCH, cache_bytes=0, read_ahead=1)
        monkeypatch.setattr(run_module, "Stream", small)
        yield process, f"s3://{make_bucket(endpoint)}"


def make_spec(folder: Path, root: str) -> RunSpec:
    features = dense_logprobs(ROWS, CLASSES, 0)[:, :CLASSES].astype(np.float32)
    carried = {"features": pa.array(features.tolist(), pa.list_(pa.float32()))}
    table = make_table(
        f"{root}/table", ROWS, CLASSES, CLASSES, carried=carried, row_group_rows=BATCH
    )
    make_plan({"table": table}).write(folder / "plan.parquet")
    return run_spec(
        folder, folder / "plan.parquet", steps=STEPS, batch_size=BATCH, checkpoint={"every": 1000}
    )


def test_storage_stops_for_a_while_and_for_good(
    tmp_path: Path,
    store: tuple["subprocess.Popen[str]", str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, root = store
    spec = make_spec(tmp_path, root)
    back: list[int] = []

    def stop_for_a_while(at: Progress) -> None:
        if at.step == STOP:
            process.send_signal(signal.SIGSTOP)
            threading.Timer(SECONDS, lambda: process.send_signal(signal.SIGCONT)).start()
        back.append(at.step)

    monkeypatch.setenv("SOFTLABELS_PATIENCE", str(4 * SECONDS + 30))
    trained = train(spec, report=stop_for_a_while)
    assert back == list(range(1, STEPS + 1))
    waited = trained.record["time"]["parts"]["data wait"]["seconds_per_step"] * STEPS
    assert waited > 0.5 * SECONDS  # the outage was in its way
    monkeypatch.setenv("SOFTLABELS_PATIENCE", "1.5")
    other = spec.model_copy(update={"out": str(tmp_path / "other")})

    def stop_for_good(at: Progress) -> None:
        if at.step == STOP:
            process.send_signal(signal.SIGSTOP)

    with pytest.raises(TryAgainError, match=r"^[^\n]*run the command again[^\n]*$") as caught:
        train(other, report=stop_for_good)
    assert caught.value.exit_code == 75
    (newest,) = steps(tmp_path / "other" / "checkpoints")
    kept = load(newest).state["step"]
    assert STOP <= kept < STEPS
    process.send_signal(signal.SIGCONT)
    monkeypatch.setenv("SOFTLABELS_PATIENCE", "60")
    again: list[int] = []
    train(other, report=lambda at: again.append(at.step))
    assert again == list(range(kept + 1, STEPS + 1))
    mine, undisturbed = (
        read_weights(Path(one.out, "student.safetensors")) for one in (other, spec)
    )
    for name, value in undisturbed.items():
        assert bool((mine[name] == value).all())
    record(
        "Storage stops in the middle of a training epoch",
        {"seconds away": SECONDS, "steps lost": 0, "steps repeated": 0},
    )

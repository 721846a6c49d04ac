"""Two processes train as one would."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from softlabels.student.checkpoint import load, read_weights, steps
from softlabels.student.metrics import read_metrics
from softlabels.student.spec import RunSpec
from softlabels.student.trainer import train
from tests.student.language import language_spec, make_language_plan
from tests.student.problem import make_problem, run_spec

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """What all runs left.

    Attributes:
        folder: each run's `out` is here, by its name.
        specs: by name.
        ranks: what each rank says, by name.
    """

    folder: Path
    specs: dict[str, RunSpec]
    ranks: list[dict[str, Any]]

    def same(self, name: str, **changes: Any) -> None:
        """Raises unless one process gives the same loss curve and weights."""
        assert [rank[name].get("error") for rank in self.ranks] == [None, None], self.ranks
        alone = self.specs[name].model_copy(update={"out": str(self.folder / f"{name}-alone")})
        train(alone.model_copy(update=changes))
        self.compare(name)

    def compare(self, name: str) -> None:
        """Raises unless loss curve and weights are those of the run `name`-alone."""
        curves = [read_metrics(self.folder / one) for one in (name, f"{name}-alone")]
        assert len(curves[0]) == len(curves[1]) > 1
        for mine, other in zip(*curves, strict=True):
            assert mine.keys() == other.keys()
            for key in ("step", "epoch", "loss", "kl", "hard_ce"):
                expected = other.get(key)
                if expected is not None:
                    expected = pytest.approx(expected, rel=2e-6, abs=1e-6)
                assert mine.get(key) == expected, key
        mine, other = (
            read_weights(self.folder / one / "student.safetensors")
            for one in (name, f"{name}-alone")
        )
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("ranks")
    plan = make_problem(folder, rows=100)
    texts = make_language_plan(folder, "texts", rows=23, documents=2, isolated=True)
    sgd = {"name": "sgd", "lr": 0.5}
    every = {"every": 1000}
    classes: dict[str, Any] = {"steps": 6, "log_every": 1, "checkpoint": every, "optimizer": sgd}
    language = {**classes, "steps": 5, "optimizer": {"name": "sgd", "lr": 0.1}}
    hard = {"loss": {"kd_weight": 0.5}}

    def one(name: str, **changes: Any) -> RunSpec:
        return run_spec(folder, plan, out=str(folder / name), **classes | changes)

    def text(name: str, **changes: Any) -> RunSpec:
        return language_spec(folder, texts, out=str(folder / name), **language | changes)

    module = "tests.student.on_ranks"
    specs = {
        # 100 rows are 3 batches of 31 and one of 7, which 2 ranks share as 4 and 3.
        "uneven": one("uneven", batch_size=31, **hard, evaluate={"plan": str(plan), "every": 3}),
        "empty": one("empty", batch_size=1),
        "pieces": text("pieces", batch_size=9, micro_batch_size=2),
        "sequences": text("sequences", batch_size=9, loss={"normalization": "sequence"}),
        "fsdp": text("fsdp", batch_size=9, micro_batch_size=2, distributed="fsdp"),
        "fsdp-empty": one("fsdp-empty", batch_size=1, distributed="fsdp"),
        "stopped": text("stopped", distributed="fsdp", optimizer={"lr": 0.01}, steps=8),
        "dropped": one("dropped", student={"module": "tests.student.problem:Dropped"}),
        "dropped-again": one("dropped-again", student={"module": "tests.student.problem:Dropped"}),
        "poisoned": one("poisoned", student={"module": f"{module}:PoisonedOnRank1"}),
        "nowhere": one("nowhere").model_copy(update={"plan": "nowhere.parquet"}),
    }
    stops = {"stopped": 3, "dropped-again": 2}
    cases = {
        name: {"spec": spec.model_dump(mode="json"), "stop": stops.get(name)}
        for name, spec in specs.items()
    }
    cases["dropped-again2"] = {"spec": cases["dropped-again"]["spec"]}
    path = folder / "runs.json"
    path.write_text(json.dumps(cases))
    done = subprocess.run(
        [*TORCHRUN, "-m", "tests.student.on_ranks", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        # As the command line has it; and torchrun speaks of threads where nobody says how many.
        env=os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr
    ranks = [json.loads(path.with_suffix(f".{rank}.json").read_text()) for rank in (0, 1)]
    return Ended(folder, specs, ranks)


@pytest.mark.parametrize("name", ["uneven", "empty", "pieces", "sequences", "fsdp", "fsdp-empty"])
def test_two_ranks_are_one_process(ended: Ended, name: str) -> None:
    ended.same(name)


def test_one_process_goes_on_where_two_shared_a_sharded_student(ended: Ended) -> None:
    for rank in ended.ranks:
        assert rank["stopped"]["error"] == "TryAgainError"
        assert "after step 4 of 8" in rank["stopped"]["message"]
    assert [rank["stopped"]["told_elsewhere"] for rank in ended.ranks] == [False, True]
    (newest,) = steps(ended.folder / "stopped" / "checkpoints")
    assert load(newest).state["step"] == 4
    assert not train(ended.specs["stopped"]).already
    train(ended.specs["stopped"].model_copy(update={"out": str(ended.folder / "stopped-alone")}))
    ended.compare("stopped")


def test_stopped_on_two_ranks_and_resumed_is_the_undisturbed_run(ended: Ended) -> None:
    names = ("dropped", "dropped-again")
    weights = [(ended.folder / name / "student.safetensors").read_bytes() for name in names]
    assert ended.ranks[0]["dropped-again"]["error"] == "TryAgainError"
    assert weights[0] == weights[1]
    lines = [[line["loss"] for line in read_metrics(ended.folder / name)] for name in names]
    assert lines[0] == lines[1]


def test_what_one_rank_finds_ends_all_with_one_message(ended: Ended) -> None:
    first, second = (rank["poisoned"] for rank in ended.ranks)
    assert first["error"] == second["error"] == "DataError"
    assert first["message"] == second["message"]
    assert "step 2: loss is nan" in first["message"]
    assert [first["told_elsewhere"], second["told_elsewhere"]] == [True, False]
    first, second = (rank["nowhere"] for rank in ended.ranks)
    assert first["error"] == second["error"] == "BadInputError"
    assert [first["told_elsewhere"], second["told_elsewhere"]] == [False, True]

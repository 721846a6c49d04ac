import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from torch import nn

from softlabels.errors import (
    BadInputError,
    DataError,
    IntegrityError,
    MismatchError,
    SoftLabelsError,
    StorageError,
    TryAgainError,
)
from softlabels.plan import Plan
from softlabels.student import step
from softlabels.student.build import autocast_dtype
from softlabels.student.checkpoint import read_weights
from softlabels.student.metrics import read_metrics
from softlabels.student.spec import EvaluateSpec, OptimizerSpec, RunSpec
from softlabels.student.trainer import Progress, learning_rate, train
from tests.plans import make_plan
from tests.student.problem import CLASSES, Linear, decode, make_problem, run_spec
from tests.tables import make_table

DROPPED = {"module": "tests.student.problem:Dropped"}
SLOW = {"decode": "tests.student.problem:slow_decode", "columns": ("features",)}
WALL_CLOCK = ("rows_per_s", "data_wait_share")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_problem(tmp_path_factory.mktemp("problem"))


def student_bytes(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def stable_metrics(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what the clock decides."""
    lines = read_metrics(folder)
    for line in lines:
        for name in WALL_CLOCK:
            line.pop(name, None)
        line.get("evaluation", {}).pop("examples_per_s", None)
    return lines


def start(spec: RunSpec, folder: Path) -> "subprocess.Popen[str]":
    """The command line in its own process."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    code = "from softlabels.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )


def wait_for_step(process: "subprocess.Popen[str]", out: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not any(line["step"] >= step for line in read_metrics(out)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def stop_at(spec: RunSpec, step: int) -> None:
    """Trains until SIGTERM comes in the middle of step `step`."""

    def report(at: Progress) -> None:
        if at.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TryAgainError, match=f"after step {step} of"):
        train(spec, report=report)


def test_learns_the_teacher(tmp_path: Path, plan: Path) -> None:
    test = make_problem(tmp_path, "test", rows=100, seed=1)
    trained = train(run_spec(tmp_path, plan, steps=300, evaluate={"plan": str(test), "every": 100}))
    first, *_, last = (line for line in read_metrics(tmp_path / "run") if "loss" in line)
    assert first["kl"] > 0.3
    assert last["kl"] < 1e-3
    assert last["loss"] == pytest.approx(last["kl"], rel=1e-4)
    evaluation = trained.record["evaluation"]
    assert evaluation["kl_to_teacher"] < 1e-3
    assert evaluation["agreement"] > 0.97
    at = [line["step"] for line in read_metrics(tmp_path / "run") if "evaluation" in line]
    assert at == [100, 200, 300]


def test_live_objects(tmp_path: Path, plan: Path) -> None:
    spec = run_spec(tmp_path, plan, student=None, inputs={"columns": ["features"]})
    student = Linear()
    trained = train(spec, model=student, decode=decode)
    saved = read_weights(trained.student)
    for name, value in student.state_dict().items():
        assert torch.equal(saved[name], value)
    again = Linear()
    assert train(spec, model=again, decode=decode).already
    assert torch.equal(again.layer.weight, student.layer.weight)


def test_same_spec_same_bytes_other_seed_other_bytes(tmp_path: Path, plan: Path) -> None:
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(run_spec(tmp_path, plan, out=str(tmp_path / name), student=DROPPED, seed=seed))
        made.append(student_bytes(tmp_path / name))
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_watching_does_not_change_the_student(tmp_path: Path, plan: Path) -> None:
    train(run_spec(tmp_path, plan, out=str(tmp_path / "a"), student=DROPPED))
    watched = run_spec(
        tmp_path,
        plan,
        out=str(tmp_path / "b"),
        student=DROPPED,
        evaluate={"plan": str(plan), "every": 3},
        checkpoint={"every": 5, "keep": 1},
        log_every=1,
    )
    train(watched)
    assert student_bytes(tmp_path / "a") == student_bytes(tmp_path / "b")


@pytest.mark.parametrize(("step", "name"), [(3, "sgd"), (10, "adamw"), (13, "adamw"), (39, "sgd")])
def test_stopped_and_resumed_is_the_undisturbed_run(
    tmp_path: Path, plan: Path, step: int, name: str
) -> None:
    # An epoch is 10 steps: 10 is its border; 13 is within a metrics line.
    shared: dict[str, Any] = {
        "student": DROPPED,
        "optimizer": {"name": name, "lr": 0.05, "warmup_steps": 5},
        "evaluate": {"plan": str(plan), "every": 13},
    }
    train(run_spec(tmp_path, plan, out=str(tmp_path / "whole"), **shared))
    spec = run_spec(tmp_path, plan, **shared)
    stop_at(spec, step)
    torch.manual_seed(999)
    assert not train(spec).already
    assert student_bytes(tmp_path / "run") == student_bytes(tmp_path / "whole")
    assert stable_metrics(tmp_path / "run") == stable_metrics(tmp_path / "whole")


def test_handlers_come_back(tmp_path: Path, plan: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop_at(run_spec(tmp_path, plan), 2)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_kill_9_then_sigterm_then_resumed(tmp_path: Path, plan: Path) -> None:
    train(run_spec(tmp_path, plan, out=str(tmp_path / "whole"), student=DROPPED, steps=60))
    # A checkpoint a step, one kept: a kill is likely to hit one that is written or removed.
    watched: dict[str, Any] = {"log_every": 1, "checkpoint": {"every": 1, "keep": 1}}
    spec = run_spec(tmp_path, plan, student=DROPPED, steps=60, inputs=SLOW, **watched)
    out = tmp_path / "run"
    process = start(spec, tmp_path)
    wait_for_step(process, out, random.randint(3, 12))
    time.sleep(random.uniform(0, 0.03))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    killed_after = read_metrics(out)[-1]["step"]
    process = start(spec, tmp_path)
    wait_for_step(process, out, killed_after + 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "nothing is lost" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not (out / "student.json").exists()
    assert not train(spec).already
    assert student_bytes(out) == student_bytes(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(out)] == list(range(1, 61))
    assert not [path for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]


def test_finished_run_is_a_no_op(tmp_path: Path, plan: Path) -> None:
    spec = run_spec(tmp_path, plan, steps=3)
    train(spec)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.name != ".lock"}
    calls: list[Progress] = []
    assert train(spec, report=calls.append).already
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.name != ".lock"}
    assert before == after
    assert calls == []


@pytest.mark.parametrize("finished", [True, False])
def test_changed_spec_and_plan_are_refused(tmp_path: Path, plan: Path, finished: bool) -> None:
    spec = run_spec(tmp_path, plan, steps=4)
    if finished:
        train(spec)
    else:
        stop_at(spec, 2)
    changed = spec.model_copy(update={"optimizer": OptimizerSpec(lr=0.2, weight_decay=0.0)})
    with pytest.raises(MismatchError, match=r"optimizer.lr 0.1, the spec says 0.2"):
        train(changed)
    other = make_problem(tmp_path, "other", seed=5)
    with pytest.raises(MismatchError) as caught:
        train(spec.model_copy(update={"plan": str(other)}))
    for path in (plan, other):
        assert Plan.read(path).fingerprint in str(caught.value)


def test_two_processes_do_not_share_a_folder(tmp_path: Path, plan: Path) -> None:
    spec = run_spec(tmp_path, plan, steps=2)

    def report(at: Progress) -> None:
        with pytest.raises(TryAgainError, match="another process trains into"):
            train(spec)

    train(spec, report=report)


class Untouched(nn.Module):
    """Gives logits of a chosen width and fails when it was trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(CLASSES, width)
        self.before = self.layer.weight.detach().clone()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(features)
        return logits


def test_width_mismatch_before_any_step(tmp_path: Path, plan: Path) -> None:
    student = Untouched(CLASSES + 1)
    with pytest.raises(MismatchError, match=r"\(32, 7\).*\(32, 6\)"):
        train(run_spec(tmp_path, plan), model=student)
    assert torch.equal(student.layer.weight, student.before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"classes": ["class0", "class1", "class2", "class3", "klass4", "class5"]},
            "class 4 is 'klass4' in the spec .classes., 'class4' in the plan",
        ),
        ({"classes": ["a", "b"]}, "the spec .classes. has 2 classes, the plan has 6"),
        ({"loss": {"temperature": 2.0}}, r"temperature 2.0 is not stored.*\[1.0\]"),
        ({"loss": {"tail": "sampled"}}, "needs stored draws.*draws 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_student_is_built(
    tmp_path: Path, plan: Path, changes: dict[str, Any], message: str
) -> None:
    spec = run_spec(tmp_path, plan, student={"module": "nowhere:Nothing"}, **changes)
    with pytest.raises(MismatchError, match=message):
        train(spec)


def test_evaluation_plan_of_another_label_space(tmp_path: Path, plan: Path) -> None:
    other = make_problem(tmp_path, "other", classes=7, rows=50)
    with pytest.raises(MismatchError, match="the plan has 6 classes, the evaluation plan has 7"):
        train(run_spec(tmp_path, plan, evaluate={"plan": str(other)}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"plan": "nowhere.parquet"}, BadInputError, "no plan at 'nowhere.parquet'"),
        ({"student": None}, BadInputError, "student: the spec names none"),
        ({"inputs": {"columns": ["features"]}}, BadInputError, "inputs.decode: the spec names"),
        (
            {"inputs": {"columns": ["image"], "decode": SLOW["decode"]}},
            BadInputError,
            "no column 'image', it carries .'features'.",
        ),
        ({"student": {"module": "tests.student.problem:decode"}}, BadInputError, "do not fit"),
        ({"student": {"module": "builtins:list"}}, BadInputError, "expected a torch.nn.Module"),
        (
            {"student": {"module": DROPPED["module"], "weights": "nowhere"}},
            BadInputError,
            "cannot read weights 'nowhere'",
        ),
        ({"device": "tpu9"}, BadInputError, "device 'tpu9' is not here"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    plan: Path,
    changes: dict[str, Any],
    error: type[SoftLabelsError],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        train(run_spec(tmp_path, **{"plan": plan, **changes}))
    assert "\n" not in str(caught.value)


def test_unwritable_out_is_one_line(tmp_path: Path, plan: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot make .*file/run") as caught:
        train(run_spec(tmp_path, plan, out=str(tmp_path / "file" / "run")))
    assert "\n" not in str(caught.value)


def test_nan_names_step_and_examples_and_keeps_the_checkpoint(tmp_path: Path, plan: Path) -> None:
    poisoned = {"module": "tests.student.problem:Poisoned"}
    spec = run_spec(tmp_path, plan, student=poisoned, checkpoint={"every": 2})
    with pytest.raises(DataError, match=r"step 3: loss is nan.*'x\d{5}'"):
        train(spec)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]


class Overflowing(Linear):
    """Has a finite loss and gradient, and a parameter that weight decay makes infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.huge = nn.Parameter(torch.tensor(3e38))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) + 0 * self.huge


@pytest.mark.parametrize("steps", [1, 2])
def test_overflowing_step_is_never_saved(tmp_path: Path, plan: Path, steps: int) -> None:
    decaying = {"name": "sgd", "weight_decay": 10.0}
    spec = run_spec(tmp_path, plan, optimizer=decaying, steps=steps, checkpoint={"every": 1})
    with pytest.raises(DataError, match=r"step 1: parameter 'huge' is not finite"):
        train(spec, model=Overflowing())
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert not (tmp_path / "run/student.json").exists()


def test_hard_labels_alone_is_cross_entropy(tmp_path: Path, plan: Path) -> None:
    trained = train(run_spec(tmp_path, plan, steps=1, loss={"kd_weight": 0.0}, log_every=1))
    (line,) = (line for line in read_metrics(tmp_path / "run") if "loss" in line)
    assert line["loss"] == pytest.approx(line["hard_ce"], rel=1e-6)
    assert line["loss"] != pytest.approx(line["kl"], rel=1e-2)
    assert trained.record["steps"] == 1


def test_stored_temperature_and_draws_train(tmp_path: Path) -> None:
    path = make_problem(tmp_path, k=3, draws=2, temperatures=[2.0])
    for name, loss in (("t2", {"temperature": 2.0}), ("s", {"tail": "sampled"})):
        train(run_spec(tmp_path, path, out=str(tmp_path / name), loss=loss, steps=200))
        lines = [line for line in read_metrics(tmp_path / name) if "loss" in line]
        assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    with pytest.raises(MismatchError, match=r"temperature 2.0 needs draws made there.* at 1.0"):
        train(run_spec(tmp_path, path, loss={"tail": "sampled", "temperature": 2.0}))


def test_rows_of_weight_0_teach_nothing(tmp_path: Path) -> None:
    features = np.ones((100, CLASSES), np.float32).tolist()
    carried = {"features": pa.array(features, pa.list_(pa.float32()))}
    a, b = (
        make_table(tmp_path / name, 100, 3, CLASSES, seed, carried=carried, prefix=name)
        for name, seed in (("a", 1), ("b", 2))
    )
    plans = {
        "alone": make_plan({"a": a}),
        "weighed": make_plan({"a": a, "b": b}, loss_weights=[1.0, 0.0]),
        "doubled": make_plan({"a": a, "b": b}, loss_weights=[2.0, 0.0]),
        "equal": make_plan({"a": a, "b": b}),
    }
    made = {}
    for name, one in plans.items():
        one.write(tmp_path / f"{name}.plan.parquet")
        # A batch is a whole epoch, so that the reading order does not matter.
        spec = run_spec(
            tmp_path,
            tmp_path / f"{name}.plan.parquet",
            out=str(tmp_path / f"run-{name}"),
            optimizer={"name": "sgd", "lr": 0.1, "clip_norm": None},
            steps=4,
            batch_size=200,
        )
        made[name] = read_weights(train(spec).student)["layer.bias"]
    torch.testing.assert_close(made["weighed"], made["alone"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made["doubled"], made["alone"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(made["equal"], made["alone"], rtol=1e-2)


def test_damaged_checkpoint_is_refused_and_names_the_older_one(tmp_path: Path, plan: Path) -> None:
    spec = run_spec(tmp_path, plan, student=DROPPED, checkpoint={"every": 5, "keep": 2})
    stop_at(spec, 17)
    newest = tmp_path / "run/checkpoints/step-00000017"
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"optimizer.safetensors has sha256.*step-00000015'"):
        train(spec)
    shutil.rmtree(newest)
    train(spec)
    train(run_spec(tmp_path, plan, student=DROPPED, out=str(tmp_path / "whole")))
    assert student_bytes(tmp_path / "run") == student_bytes(tmp_path / "whole")
    assert stable_metrics(tmp_path / "run") == stable_metrics(tmp_path / "whole")


def test_changed_student_file_is_noticed(tmp_path: Path, plan: Path) -> None:
    spec = run_spec(tmp_path, plan, steps=2)
    trained = train(spec)
    trained.student.write_bytes(trained.student.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="was changed"):
        train(spec)


def test_record_names_where_the_student_comes_from(tmp_path: Path, plan: Path) -> None:
    train(run_spec(tmp_path, plan, steps=2))
    record = json.loads((tmp_path / "run/student.json").read_text())
    opened = Plan.read(plan)
    (table,) = opened.tables.values()
    assert record["plan_fingerprint"] == opened.fingerprint
    assert record["tables"][0]["snapshot_digest"] == table.snapshot_digest
    assert record["tables"][0]["teacher_fingerprint"] == table.contents.teacher.fingerprint()
    assert record["code"]["student"] == "tests.student.problem:Linear"
    assert record["packages"]["torch"] == torch.__version__


def test_learning_rate_schedules() -> None:
    def rates(**changes: Any) -> list[float]:
        spec = OptimizerSpec(lr=1.0, **changes)
        return [learning_rate(spec, step, 10) for step in range(10)]

    assert rates(schedule="constant") == [1.0] * 10
    assert rates(schedule="linear") == pytest.approx([1 - step / 10 for step in range(10)])
    cosine = rates(schedule="cosine", warmup_steps=4)
    assert cosine[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert cosine[7] == pytest.approx(0.5)
    assert all(late < early for early, late in itertools.pairwise(cosine[4:]))


def test_a_students_own_failure_is_one_line_that_names_the_rows(tmp_path: Path) -> None:
    def broken(columns: Any) -> Any:
        raise KeyError("no such thing")

    spec = run_spec(tmp_path, make_problem(tmp_path))
    with pytest.raises(DataError, match=r"the student's decode failed on \d+ rows"):
        train(spec, decode=broken)


def test_roots_may_name_tables_of_either_plan(tmp_path: Path) -> None:
    train_plan, test_plan = (make_problem(tmp_path, name) for name in ("train", "test"))
    moved = {}
    for name in ("train", "test"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
        moved[name] = str(tmp_path / f"moved-{name}")
    evaluation = EvaluateSpec(plan=str(test_plan), every=20)
    spec = run_spec(tmp_path, train_plan, evaluate=evaluation, roots=moved)
    assert train(spec).record["evaluation"]["rows"] == 300
    wrong = spec.model_copy(update={"roots": moved | {"tset": "x"}, "out": str(tmp_path / "o")})
    with pytest.raises(BadInputError, match="no plan of the run reads a table 'tset'"):
        train(wrong)


def test_autocast_is_another_run_and_learns(tmp_path: Path, plan: Path) -> None:
    spec = run_spec(tmp_path, plan, steps=2)
    assert "autocast" not in spec.identity()  # as before there was one
    half = spec.model_copy(update={"autocast": "bfloat16", "steps": 100})
    assert half.identity()["autocast"] == "bfloat16"
    for name in ("compile", "distributed"):
        assert name not in half.identity()
    train(spec)
    with pytest.raises(MismatchError, match="autocast"):
        train(spec.model_copy(update={"autocast": "bfloat16"}))
    dtypes = set()

    class Watched(Linear):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            logits = super().forward(features)
            dtypes.add(logits.dtype)
            return logits

    model = Watched()
    train(half.model_copy(update={"out": str(tmp_path / "half")}), model=model)
    assert dtypes == {torch.bfloat16}
    assert model.layer.weight.dtype == torch.float32
    lines = read_metrics(tmp_path / "half")
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]


def test_autocast_auto_leaves_a_processor_alone() -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) is None
    assert autocast_dtype("none", cpu) is None
    assert autocast_dtype("bfloat16", cpu) == torch.bfloat16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
def test_a_compiled_student_is_the_same(tmp_path: Path, plan: Path) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("compile IS NOT TESTED: torch.compile needs a C++ compiler, none is here")
    weights = []
    for name, compiled in (("plain", False), ("compiled", True)):
        spec = run_spec(tmp_path, plan, out=str(tmp_path / name), steps=12, compile=compiled)
        weights.append(read_weights(train(spec).student))
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-6)


def test_data_that_cannot_be_read_costs_no_step(
    tmp_path: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)

    def gone_for_a_while(run: Any, batches: Any) -> Any:
        if next(calls) == 6:
            raise TryAgainError("storage does not answer")
        return step.take(run, batches)

    monkeypatch.setattr("softlabels.student.trainer.take", gone_for_a_while)
    spec = run_spec(tmp_path, plan, checkpoint={"every": 1000})
    with pytest.raises(TryAgainError, match="does not answer"):
        train(spec)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    train(spec)
    train(run_spec(tmp_path, plan, out=str(tmp_path / "whole")))
    assert student_bytes(tmp_path / "run") == student_bytes(tmp_path / "whole")

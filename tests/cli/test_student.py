import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from softlabels.cli import main
from softlabels.student.checkpoint import read_weights
from tests.plans import make_ensemble_plan
from tests.student.language import language_spec, make_language_plan
from tests.student.problem import make_problem, run_spec
from tests.student.test_ensemble_runs import make_teachers


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def softlabels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["softlabels", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("problem")
    return make_problem(folder), make_problem(folder, "test", rows=60, seed=1)


@pytest.fixture
def spec(tmp_path: Path, plans: tuple[Path, Path]) -> Path:
    made = run_spec(tmp_path, plans[0], evaluate={"plan": str(plans[1])}, steps=5)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")))
    return path


def test_train_then_nothing_left_then_evaluate(
    tmp_path: Path, spec: Path, plans: tuple[Path, Path], softlabels: Run
) -> None:
    student = str(tmp_path / "run/student.safetensors")
    ended = softlabels("train", spec)
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == f"{student}: 42 parameters, 5 steps"
    assert "5/5" in ended.err
    again = softlabels("train", spec)
    assert again.code == 0
    assert "nothing left to train: 5 steps were done" in again.out
    assert again.err == ""
    record = json.loads(softlabels("train", spec, "--json").out)
    assert record["student"] == student
    assert record["already"] is True
    found = json.loads(softlabels("evaluate", tmp_path / "run", "--json").out)
    assert found["student"]["nll"] == pytest.approx(record["evaluation"]["nll"], rel=1e-6)
    assert found["teacher"]["rows"] == 60
    assert len(found["student"]["bins"]) == 15
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    table = softlabels("evaluate", moved, "--plan", plans[0]).out.splitlines()
    assert table[0].split() == ["student", "teacher"]
    assert {"accuracy", "nll", "kl_to_teacher"} < {line.split()[0] for line in table[1:]}
    assert "perplexity" not in " ".join(table)  # nobody has one here
    named = softlabels("evaluate", spec, "--student", moved / "student.safetensors", "--json")
    assert json.loads(named.out)["student"]["nll"] == found["student"]["nll"]


def test_set_and_root_win_over_the_file(
    tmp_path: Path, spec: Path, plans: tuple[Path, Path], softlabels: Run
) -> None:
    hard = tmp_path / "hard"
    ended = softlabels(
        "train", spec, "--set", "loss.kd_weight=0", "--set", f"out={hard}", "--set", "evaluate=null"
    )
    assert ended.code == 0
    assert json.loads((hard / "student.json").read_text())["spec"]["loss"]["kd_weight"] == 0
    assert softlabels("train", spec).code == 0
    weights = [read_weights(out / "student.safetensors") for out in (hard, tmp_path / "run")]
    assert (weights[0]["layer.weight"] != weights[1]["layer.weight"]).any()
    away = softlabels("train", spec, "--root", "train=/nowhere", "--set", f"out={tmp_path / 'x'}")
    assert away.code != 0
    assert "/nowhere" in away.err.splitlines()[-1]


def test_tables_moved_elsewhere_are_found_by_root(tmp_path: Path, softlabels: Run) -> None:
    plan = make_problem(tmp_path, rows=40)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "train").rename(elsewhere / "labels")
    spec = tmp_path / "run.yaml"
    spec.write_text(yaml.safe_dump(run_spec(tmp_path, plan, steps=2).model_dump(mode="json")))
    lost = softlabels("train", spec)
    assert (lost.code, "--root train=URI" in lost.err) == (2, True)
    root = f"train={elsewhere / 'labels'}"
    assert softlabels("train", spec, "--root", root).code == 0
    found = softlabels("evaluate", spec, "--root", root, "--plan", plan)
    assert found.code == 0


def test_language_models_too(
    tmp_path: Path, softlabels: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plan = make_language_plan(tmp_path, rows=20, documents=2, isolated=True)
    made = language_spec(tmp_path, plan, steps=3, evaluate={"plan": str(plan)}, log_every=1)
    spec = tmp_path / "run.yaml"
    spec.write_text(yaml.safe_dump(made.model_dump(mode="json")))
    assert json.loads(softlabels("train", spec, "--dry-run").out)["rows_per_epoch"] == 20
    ended = softlabels("train", spec)
    assert ended.code == 0
    assert ended.out.splitlines()[-1].endswith("parameters, 3 steps")
    assert "tokens/s" in ended.err
    # Nothing but the figures and our progress: transformers keeps quiet.
    assert "[transformers]" not in ended.err
    assert "Loading" not in ended.err
    record = json.loads((tmp_path / "run/student.json").read_text())
    table = softlabels("evaluate", tmp_path / "run").out.splitlines()
    assert table[0].split() == ["student", "teacher"]
    rows = {line.split()[0]: line.split()[1:] for line in table[1:]}
    assert float(rows["perplexity"][0]) == pytest.approx(
        record["evaluation"]["perplexity"], rel=1e-3
    )
    assert len(rows["perplexity"]) == 2
    assert rows["positions"][0] == rows["positions"][1]
    assert "…" not in "".join(table)
    refused = softlabels(
        "train", spec, "--set", "loss.divergence=reverse", "--set", "loss.tail=sampled"
    )
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "divergence 'reverse' with tail 'sampled'" in refused.err


def test_dry_run_trains_nothing(tmp_path: Path, spec: Path, softlabels: Run) -> None:
    ended = softlabels("train", spec, "--dry-run", "--set", "steps=null", "--set", "epochs=2")
    work = json.loads(ended.out)
    assert (work["steps"], work["epochs"], work["rows_per_epoch"]) == (20, 2, 300)
    assert work["evaluation_rows"] == 60
    assert work["bytes"] > 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "optimizer.lrr=1"], 2, "unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        (["--set", "steps"], 2, "expected key=value"),
        (["--root", "labels"], 2, "--root 'labels': expected NAME=URI"),
        (["--set", "loss.temperature=2"], 1, "temperature 2.0 is not stored"),
        (["--set", "student.module=nowhere:X"], 2, "cannot import 'nowhere'"),
        (["--set", "plan=nowhere"], 2, "there is no plan at 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(
    spec: Path, softlabels: Run, arguments: list[str], code: int, message: str
) -> None:
    ended = softlabels("train", spec, *arguments)
    assert ended.code == code
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert ended.out == ""


def test_evaluate_mistakes_are_one_line(
    tmp_path: Path, spec: Path, plans: tuple[Path, Path], softlabels: Run
) -> None:
    (tmp_path / "empty").mkdir()
    ended = softlabels("evaluate", tmp_path / "empty", "--plan", plans[0])
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "holds no finished run" in ended.err
    assert softlabels("evaluate", spec, "--student", "nowhere").code == 2
    assert softlabels("train", spec, "--set", "evaluate=null").code == 0
    ended = softlabels("evaluate", tmp_path / "run")
    assert (ended.code, "--plan: expected a plan" in ended.err) == (2, True)
    other = make_problem(tmp_path, "other", rows=30, classes=7)
    ended = softlabels("evaluate", tmp_path / "run", "--plan", other)
    assert ended.code == 1
    assert "the student has 6 classes, the evaluation plan has 7" in ended.err


def test_a_student_of_an_ensemble_is_evaluated_without_a_mixture_that_is_not_stored(
    tmp_path: Path, softlabels: Run
) -> None:
    plan = tmp_path / "few.plan.parquet"
    make_ensemble_plan(make_teachers(tmp_path, 4)).write(plan)
    made = run_spec(tmp_path, plan, evaluate={"plan": str(plan)}, steps=2)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")))
    assert softlabels("train", path).code == 0
    ended = softlabels("evaluate", tmp_path / "run", "--json")
    assert ended.code == 0
    assert ended.err.startswith("warning: the teacher's figures of an ensemble need every class")
    assert ended.err.count("\n") == 1
    found = json.loads(ended.out)
    assert found["student"]["kl_to_teacher"] > 0
    assert "teacher" not in found


def test_profile_times_some_steps_and_writes_nothing(
    tmp_path: Path, spec: Path, softlabels: Run
) -> None:
    ended = softlabels("train", spec, "--profile", 4)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].split() == ["s/step", "share"]
    assert {"backward", "optimizer"} < {line.split()[0] for line in lines[1:]}
    assert lines[-1].startswith("4 steps in ")
    assert " of the time: " in lines[-1]
    found = json.loads(softlabels("train", spec, "--profile", 4, "--json").out)
    assert sum(part["share"] for part in found["parts"].values()) == pytest.approx(1)
    assert not (tmp_path / "run").exists()


def test_the_summary_says_how_long_it_waited_for_data(spec: Path, softlabels: Run) -> None:
    ended = softlabels("train", spec)
    assert ended.out.splitlines()[-2].startswith("data wait ")
    assert " of the time: " in ended.out.splitlines()[-2]

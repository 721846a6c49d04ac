"""A run beside its baseline: what soft labels gained, or why they did not help."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError, IntegrityError
from softlabels.report.gather import Options, gather
from softlabels.report.runs import compare, run_facts
from softlabels.report.verdict import run_findings, verdict
from softlabels.student.trainer import train
from tests.plans import make_plan
from tests.report.planted import findings, ids
from tests.student.language import language_spec, make_language_plan
from tests.student.problem import make_problem, run_spec
from tests.tables import dense_logprobs, make_table

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A problem, its test split, and the runs soft and hard on them."""
    made = tmp_path_factory.mktemp("runs")
    plan, judge = make_problem(made, temperatures=(2.0,)), make_problem(made, "test", seed=1)
    common: Any = partial(run_spec, made, plan, evaluate={"plan": str(judge), "every": 10})
    train(common(out=str(made / "soft"), log_every=2))
    train(common(out=str(made / "hard"), log_every=2, loss={"kd_weight": 0.0}))
    return made


@pytest.fixture
def facts(folder: Path) -> Facts:
    return copy.deepcopy(gather(str(folder / "soft"), Options(baseline=str(folder / "hard"))))


def told(facts: Facts) -> Facts:
    found = verdict(facts, run_findings(facts))
    assert found is not None
    return found


def test_facts_of_a_run(folder: Path, facts: Facts) -> None:
    record = json.loads((folder / "soft/student.json").read_text())
    run = facts["run"]
    assert run["finished"] is True
    assert run["evaluation"]["nll"] == record["evaluation"]["nll"]
    assert [point["step"] for point in run["curve"]] == list(range(2, 41, 2))
    assert [point["step"] for point in run["evaluations"]] == [10, 20, 30, 40]
    assert facts["plan"]["fingerprint"] == record["plan_fingerprint"]
    assert facts["parts"][0]["looked_at"] == {
        "rows": 300,
        "positions": 300,
        "labelled": 300,
        "whole": True,
    }
    assert facts["judges"][0]["teacher"]["labelled"] == 300
    assert facts["notes"] == []
    json.dumps(facts["run"], allow_nan=False)


def test_like_for_like(folder: Path, facts: Facts) -> None:
    found = facts["baseline"]
    assert found["like_for_like"] is True
    soft, hard = (
        json.loads((folder / name / "student.json").read_text())["evaluation"]
        for name in ("soft", "hard")
    )
    assert found["accuracy_gain"] == soft["accuracy"] - hard["accuracy"]
    assert found["nll_gain"] == hard["nll"] - soft["nll"]
    error = [a * (1 - a) / 300 for a in (soft["accuracy"], hard["accuracy"])]
    assert found["accuracy_gain_se"] == pytest.approx(sum(error) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1, "loss": {"kd_weight": 0.0}}, "seed is 0 here, 1 in the baseline"),
        ({"steps": 20, "loss": {"kd_weight": 0.0}}, "steps is 40 here, 20 in the baseline"),
        ({"loss": {"kd_weight": 0.5}}, "the baseline has kd_weight 0.5"),
    ],
)
def test_what_is_not_like_for_like_is_said(
    tmp_path: Path, folder: Path, changes: Facts, said: str
) -> None:
    judge = {"plan": str(folder / "test.plan.parquet")}
    spec = run_spec(folder, folder / "train.plan.parquet", evaluate=judge, out=str(tmp_path / "b"))
    train(type(spec).model_validate(spec.model_dump() | changes))
    found = compare(folder / "soft", tmp_path / "b")
    assert found["like_for_like"] is False
    assert any(said in line for line in found["differences"])
    facts = gather(str(folder / "soft"), Options(baseline=str(tmp_path / "b")))
    assert "not-like-for-like" in ids(run_findings(facts))
    words = told(facts)
    assert said in words["sentences"][0]
    assert words["helped"] is None
    assert words["title"] == "Whether soft labels helped cannot be told"
    assert "soft labels gave" not in " ".join(words["sentences"])


def test_another_plan_is_not_like_for_like(tmp_path: Path, folder: Path) -> None:
    spec = run_spec(tmp_path, make_problem(tmp_path, rows=200), loss={"kd_weight": 0.0}, steps=2)
    train(spec)
    found = compare(folder / "soft", tmp_path / "run")
    assert "they learnt from different plans" in found["differences"]
    assert "they were evaluated on different rows" in found["differences"]


def test_gained(facts: Facts) -> None:
    facts["baseline"] |= {"accuracy_gain": 0.1, "accuracy_gain_se": 0.02, "nll_gain": 0.3}
    found = told(facts)
    assert (found["helped"], found["title"]) == (True, "What soft labels gained")
    assert "accuracy 10.0 % higher (± 2.0 %, one standard error)" in found["sentences"][0]


@pytest.mark.parametrize(("gain", "nll"), [(0.01, -0.1), (-0.2, 0.5), (0.0, 0.001)])
def test_did_not_help(facts: Facts, gain: float, nll: float) -> None:
    facts["baseline"] |= {"accuracy_gain": gain, "accuracy_gain_se": 0.02, "nll_gain": nll}
    found = told(facts)
    assert (found["helped"], found["title"]) == (False, "Why soft labels did not help")
    assert len(found["sentences"]) > 1


def sound(facts: Facts) -> Facts:
    """A run as it should be: a good teacher, a student half way to it."""
    for teacher in (facts["parts"][0]["teacher"], facts["judges"][0]["teacher"]):
        teacher |= {"accuracy": 0.9, "accuracy_se": 0.003, "labelled": 10_000, "majority": 0.2}
        teacher |= {"fit": None, "mapped": None, "shifted": {}}
    for evaluation in (facts["run"]["evaluation"], facts["baseline"]["evaluation"]):
        evaluation |= {"accuracy": 0.8, "accuracy_se": 0.004, "labelled": 10_000}
    facts["baseline"] |= {"accuracy_gain": 0.0, "accuracy_gain_se": 0.0057, "nll_gain": 0.0}
    facts["run"]["curve"] = []
    return facts


def test_no_cause_found_is_said(facts: Facts) -> None:
    assert run_findings(sound(facts)) == []
    assert "repeat both with three or more seeds" in told(facts)["sentences"][-1]


def test_teacher_no_better_than_the_baseline(facts: Facts) -> None:
    sound(facts)["judges"][0]["teacher"]["accuracy"] = 0.805
    assert ids(run_findings(facts)) == ["teacher-no-better"]
    assert "80.5 %" in told(facts)["sentences"][1]


def test_too_much_data(facts: Facts) -> None:
    sound(facts)["judges"][0]["teacher"]["accuracy"] = 0.815
    assert ids(run_findings(facts)) == ["too-much-data"]
    assert "1.5 % below its teacher" in told(facts)["sentences"][1]


def test_a_teacher_that_knew_the_rows(facts: Facts) -> None:
    fit = {"positions": 10_000, "temperature": 1.0, "noise": 0.0, "temperature_gain": 0.0}
    fit |= {"noise_gain": 0.0}
    sound(facts)["judges"][0]["teacher"]["fit"] = fit
    facts["parts"][0]["teacher"] |= {"fit": fit, "accuracy": 0.995}
    assert ids(run_findings(facts)) == ["teacher-memorised"]


def test_rows_in_which_a_teacher_is_right_are_not_memorised(facts: Facts) -> None:
    fit = {"positions": 10_000, "temperature": 1.0, "noise": 0.0, "temperature_gain": 0.0}
    fit |= {"noise_gain": 0.0}
    sound(facts)["judges"][0]["teacher"]["fit"] = fit
    (part,) = facts["parts"]
    part["version"] = {"rows": 10_000, "looked_at": part["looked_at"]}
    part["version"]["teacher"] = part["teacher"] | {"fit": fit}
    part["teacher"] |= {"fit": fit, "accuracy": 0.995}
    assert run_findings(facts) == []
    part["version"]["teacher"]["accuracy"] = 0.995
    assert ids(run_findings(facts)) == ["teacher-memorised"]
    facts["judges"][0]["chosen"] = True
    assert run_findings(facts) == []


@pytest.mark.parametrize("what", ["chosen", "further"])
def test_teachers_are_not_compared_on_rows_chosen_for_them(facts: Facts, what: str) -> None:
    sound(facts)["judges"][0]["teacher"]["accuracy"] = 0.805
    facts["judges"][0][what] = True
    assert run_findings(facts) == []


@pytest.mark.parametrize(
    ("source", "chosen"),
    [
        ({"where": "top1_id = label"}, True),
        ({"where": "split = 'test' AND entropy < 1"}, True),
        ({"limit": {"each": 5, "by": "top1_id"}}, True),
        ({"choose": {"from": ["a", "b"], "by": "margin"}}, True),
        ({"where": "split = 'test'", "limit": {"each": 5, "by": "label"}}, False),
        ({"ensemble": [{"name": "a", "weight": "top1_prob"}]}, False),
    ],
    ids=str,
)
def test_rows_chosen_for_their_teacher_are_known(
    tmp_path: Path, source: dict[str, Any], chosen: bool
) -> None:
    judge = make_plan(make_table(tmp_path / "t", rows=50), recipe={"sources": [source]})
    judge.write(tmp_path / "judge.parquet")
    spec = {"evaluate": {"plan": str(tmp_path / "judge.parquet")}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/student.json").write_text(json.dumps({"identity": {}, "spec": spec}))
    assert [j["chosen"] for j in gather(str(tmp_path / "run"))["judges"]] == [chosen]


def test_a_plan_without_rows_is_said(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=50)
    make_plan(table, keep=lambda entry, rows: []).write(tmp_path / "p.parquet")
    assert ids(findings(tmp_path / "p.parquet")) == ["no-rows"]


def test_a_plans_own_temperature_counts(facts: Facts) -> None:
    entropy = {"most": 2.0, "mean": 1.0, "tempered": [{"temperature": 6.0, "mean": 1.9}]}
    (part,) = sound(facts)["parts"]
    part |= {"entropy": part["entropy"] | entropy, "temperature": 3.0}
    facts["run"]["settings"]["temperature"] = 2.0
    assert ids(run_findings(facts)) == ["wrong-temperature"]
    part["temperature"] = 1.0
    assert run_findings(facts) == []


def test_a_student_that_only_guesses(facts: Facts) -> None:
    sound(facts)["run"]["evaluation"]["accuracy"] = 0.2
    assert ids(run_findings(facts)) == ["mismatch"]
    facts["run"]["curve"] = [{"step": n, "loss": 2.0 - n / 10} for n in (0, 1)]
    assert ids(run_findings(facts)) == ["not-learnt"]
    assert "from 2 to 1.9 in 40 steps" in run_findings(facts)[0].sentence


def test_still_learning(facts: Facts) -> None:
    sound(facts)["run"]["curve"] = [{"step": n, "loss": 3 / n} for n in range(1, 21)]
    assert ids(run_findings(facts)) == ["still-learning"]
    facts["run"]["curve"] = [{"step": n, "loss": 1 + 1 / n} for n in range(1, 21)]
    assert run_findings(facts) == []


def test_wrong_temperature(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=400, k=20, classes=20, temperatures=(8.0,))
    plan = tmp_path / "plan.parquet"
    make_plan({"train": table}).write(plan)
    out = tmp_path / "run"
    out.mkdir()
    loss = {"kd_weight": 1.0, "tail": "bucket", "temperature": 8.0}
    (out / "student.json").write_text(
        json.dumps({"identity": {"loss": loss}, "spec": {"plan": str(plan), "loss": loss}})
    )
    found = next(f for f in findings(out) if f.id == "wrong-temperature")
    logits = dense_logprobs(400, 20) / 8
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    entropy = -(np.exp(logs) * logs).sum(1).mean()
    assert f"entropy is {entropy:.2f} nats of at most {np.log(20):.2f}" in found.sentence


@pytest.mark.parametrize(
    ("tail", "draws", "severity"),
    [("renormalize", 0, "warning"), ("bucket", 3, "note"), ("sampled", 3, None)],
)
def test_tail_mode(
    tmp_path: Path, facts: Facts, tail: str, draws: int, severity: str | None
) -> None:
    sound(facts)["run"]["settings"]["tail"] = tail
    kept = {"k": 3, "draws": draws, "classes": 6, "by_k": [{"k": 3, "mean": 0.9}]}
    facts["parts"][0]["kept"] = kept
    found = [f.severity for f in run_findings(facts) if f.id == "tail-mode"]
    assert found == ([] if severity is None else [severity])


def test_without_a_baseline_it_cannot_be_told(folder: Path) -> None:
    found = told(gather(str(folder / "soft")))
    assert found["helped"] is None
    assert "--baseline RUN" in found["sentences"][0]
    assert told(gather(str(folder / "hard")))["title"] == "Hard labels alone"


def test_language_runs_too(tmp_path: Path) -> None:
    plan = make_language_plan(tmp_path, rows=20)
    for name, weight in (("soft", 1.0), ("hard", 0.0)):
        loss = {"kd_weight": weight}
        spec = language_spec(
            tmp_path,
            plan,
            steps=3,
            evaluate={"plan": str(plan)},
            out=str(tmp_path / name),
            loss=loss,
        )
        train(spec)
    facts = gather(str(tmp_path / "soft"), Options(baseline=str(tmp_path / "hard")))
    assert facts["baseline"]["like_for_like"] is True
    assert facts["run"]["evaluation"]["perplexity"] > 1
    assert facts["parts"][0]["alignment"]["verdict"] in ("right", "unclear", "too few")
    assert told(facts)["helped"] in (True, False)


def test_plans_and_tables_that_are_gone_are_said(tmp_path: Path) -> None:
    plan = make_problem(tmp_path, rows=40)
    train(run_spec(tmp_path, plan, steps=2))
    (tmp_path / "train").rename(tmp_path / "away")
    found = gather(str(tmp_path / "run"))
    assert found["parts"] == []
    assert "--root train=URI" in found["notes"][0]
    moved = gather(str(tmp_path / "run"), Options(roots={"train": str(tmp_path / "away")}))
    assert moved["parts"][0]["rows"] == 40
    make_problem(tmp_path / "other", rows=50)
    (tmp_path / "other/train.plan.parquet").rename(plan)
    assert "is another by now" in gather(str(tmp_path / "run"))["notes"][0]
    plan.unlink()
    assert "could not be read" in gather(str(tmp_path / "run"))["notes"][0]


def test_runs_that_are_none(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadInputError, match="there is no run"):
        run_facts(tmp_path)
    with pytest.raises(BadInputError, match="is the run itself"):
        compare(folder / "soft", folder / "soft")
    (tmp_path / "student.json").write_text("[1]")
    with pytest.raises(IntegrityError, match="damaged"):
        run_facts(tmp_path)


def test_an_unfinished_run_has_its_curve(tmp_path: Path, folder: Path) -> None:
    lines = (folder / "soft/metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 4')
    found = gather(str(tmp_path))
    assert (found["run"]["finished"], found["run"]["steps"]) == (False, 40)
    assert found["run"]["evaluation"]["accuracy"] is not None


def test_a_plan_of_some_rows_is_about_those(tmp_path: Path) -> None:
    table = make_table(
        tmp_path / "t", rows=100, carried={"note": pa.array([f"n{i}" for i in range(100)])}
    )
    plan = make_plan({"a": table}, keep=lambda entry, rows: [1, 3] if entry else None)
    plan.write(tmp_path / "p.parquet")
    found = gather(str(tmp_path / "p.parquet"))
    part = found["parts"][0]
    assert (part["rows"], part["looked_at"]["rows"]) == (25 + 3 * 2, 31)
    shown = {e["id"]: e["texts"][0]["text"] for e in part["examples"]["hardest"]}
    assert all(text == f"n{int(name[1:])}" for name, text in shown.items())
    taken = {f"x{i:05d}" for i in [*range(25), 26, 28, 51, 53, 76, 78]}
    assert set(shown) <= taken

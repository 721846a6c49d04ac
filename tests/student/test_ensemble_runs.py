"""Training on and evaluating with ensemble plans, against what their teachers' mixture says."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from softlabels.errors import BadInputError, MismatchError
from softlabels.plan import Plan, entries_table
from softlabels.store.table import Table
from softlabels.student.evaluate import evaluate, evaluate_teacher
from softlabels.student.spec import EvaluateSpec, LossSpec, OptimizerSpec
from softlabels.student.trainer import Progress, train
from tests.plans import make_ensemble_plan, make_plan
from tests.student.language import bigrams, draw, language_spec, make_language_table
from tests.student.problem import CLASSES, decode, run_spec
from tests.student.test_evaluate import Fixed, reference, softmax
from tests.tables import dense_logprobs, make_table

ROWS = 120
SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}


def make_teachers(folder: Path, k: int = CLASSES, **options: Any) -> dict[str, Table]:
    """Three teachers of the same rows; the first alone carries the features."""
    features = dense_logprobs(ROWS, CLASSES, 0)[:, :CLASSES].astype(np.float32)
    carried = {"features": pa.array(features.tolist(), pa.list_(pa.float32()))}
    found = {}
    for seed, name in enumerate(SHARES):
        found[name] = make_table(
            folder / name,
            ROWS,
            k,
            CLASSES,
            seed=seed,
            carried=carried if name == "a" else None,
            order=list(range(ROWS)) if name == "a" else list(reversed(range(ROWS))),
            **options,
        )
    return found


def mixed() -> np.ndarray:
    """The mixture of all three, float64 [ROWS, CLASSES]."""
    return np.asarray(
        sum(
            share * np.exp(dense_logprobs(ROWS, CLASSES, seed))
            for seed, share in enumerate(SHARES.values())
        )
    )


def written(folder: Path, plan: Plan, name: str = "plan") -> Path:
    path = folder / f"{name}.plan.parquet"
    plan.write(path)
    return path


def kl_of_teachers(q: np.ndarray, k: int) -> float:
    """Mean over rows of sum of w KL(p‖q) over the k + 1 classes of each teacher."""
    total = 0.0
    for seed, share in enumerate(SHARES.values()):
        p = np.exp(dense_logprobs(ROWS, CLASSES, seed))
        total += share * reference(p, q, np.arange(ROWS) % CLASSES, k)["kl_to_teacher"]
    return total


@pytest.mark.parametrize("k", [CLASSES, 2])
def test_figures_are_against_the_mixture(tmp_path: Path, k: int) -> None:
    plan = make_ensemble_plan(make_teachers(tmp_path, k), weights=SHARES)
    logits = dense_logprobs(ROWS, CLASSES, 0).astype(np.float32)[:, ::-1] * 0.5
    q, labels = softmax(logits), np.arange(ROWS) % CLASSES
    found = evaluate(Fixed(), plan, decode, ["features"], batch_size=50)
    # What a teacher does not store counts 0 for it.
    known, stored = np.zeros((ROWS, CLASSES)), np.zeros((ROWS, CLASSES), bool)
    for seed, share in enumerate(SHARES.values()):
        p = np.exp(dense_logprobs(ROWS, CLASSES, seed))
        top = np.argsort(-p, axis=1, kind="stable")[:, :k]
        part = np.zeros_like(p)
        np.put_along_axis(part, top, np.take_along_axis(p, top, 1), 1)
        known += share * part
        np.put_along_axis(stored, top, True, 1)
    outside = np.where(stored, 0, q).sum(1)
    acceptance = np.minimum(known, q).sum(1) + np.minimum(1 - known.sum(1), outside)
    assert found.acceptance == pytest.approx(float(acceptance.mean()), abs=1e-4)
    assert found.agreement == pytest.approx(float((known.argmax(1) == q.argmax(1)).mean()))
    assert found.kl_to_teacher == pytest.approx(kl_of_teachers(q, k), abs=2e-4)
    plain = reference(mixed(), q, labels, CLASSES)
    for name in ("accuracy", "nll", "ece"):
        assert getattr(found, name) == pytest.approx(plain[name], abs=1e-5)
    if k == CLASSES:
        assert found.acceptance == pytest.approx(plain["acceptance"], abs=1e-4)
        assert found.agreement == plain["agreement"]
        assert found.kl_to_teacher is not None
        assert found.kl_to_teacher > plain["kl_to_teacher"] + 0.1


def test_the_mixture_is_judged_where_every_class_is_stored(tmp_path: Path) -> None:
    plan = make_ensemble_plan(make_teachers(tmp_path), weights=SHARES)
    found, p, labels = evaluate_teacher(plan), mixed(), np.arange(ROWS) % CLASSES
    plain = reference(p, p, labels, CLASSES)
    assert found.rows == ROWS
    for name in ("accuracy", "nll", "ece"):
        assert getattr(found, name) == pytest.approx(plain[name], abs=2e-3)
    few = make_ensemble_plan(make_teachers(tmp_path / "few", 4), weights=SHARES)
    with pytest.raises(MismatchError, match=r"need every class stored, table 'a' has 4 of 6: eval"):
        evaluate_teacher(few)


def test_a_row_that_entries_share_counts_once_with_its_first_teachers(tmp_path: Path) -> None:
    tables = make_teachers(tmp_path)

    def share_of_a(example: str) -> float:
        return int(example[1:]) % 5 + 0.1

    plan = make_ensemble_plan(tables, weights={"a": share_of_a, "b": 1.0, "c": 0.5})
    other = make_ensemble_plan(tables, weights={"a": 0.1, "b": 0.1, "c": 0.8})
    once = evaluate(Fixed(), plan, decode, ["features"])
    entries = plan.entries.to_pylist()
    half = entries[0] | {"rows": entries[0]["rows"][::2]}
    half["num_rows"] = len(half["rows"])
    half["members"] = [
        m | {name: m[name][::2] for name in ("rows", "weights")} for m in half["members"]
    ]
    twice = [half, *entries, *other.entries.to_pylist()]
    found = evaluate(Fixed(), replace(plan, entries=entries_table(twice)), decode, ["features"])
    assert found.rows == ROWS
    assert found.kl_to_teacher == pytest.approx(once.kl_to_teacher)
    assert found.agreement == pytest.approx(once.agreement)
    apart = evaluate(Fixed(), other, decode, ["features"])
    assert abs(apart.kl_to_teacher - once.kl_to_teacher) > 0.01  # type: ignore[operator]


def test_a_student_of_an_ensemble_learns_the_mixture(tmp_path: Path) -> None:
    tables = make_teachers(tmp_path)
    plan = written(tmp_path, make_ensemble_plan(tables, weights=SHARES))
    spec = run_spec(
        tmp_path,
        plan,
        steps=100,
        batch_size=ROWS,
        optimizer=OptimizerSpec(lr=0.15, weight_decay=0.0),
        evaluate=EvaluateSpec(plan=str(plan), every=1000),
    )
    trained = train(spec)
    tables_named = [table["name"] for table in trained.record["tables"]]
    assert tables_named == ["a", "b", "c"]
    assert "temperature" not in trained.record["tables"][0]
    found = trained.record["evaluation"]
    # No student of these features gets nearer: their log-linear fit to the mixture.
    x = torch.from_numpy(dense_logprobs(ROWS, CLASSES, 0))
    p = torch.from_numpy(mixed())
    layer = nn.Linear(CLASSES, CLASSES).double()
    fit = torch.optim.LBFGS(layer.parameters(), max_iter=60)

    def closure() -> torch.Tensor:
        fit.zero_grad()
        loss: torch.Tensor = -(p * layer(x).log_softmax(1)).sum(1).mean()
        torch.autograd.backward(loss)
        return loss

    fit.step(closure)  # type: ignore[no-untyped-call]
    best = layer(x).softmax(1).detach().numpy()
    assert found["kl_to_teacher"] == pytest.approx(kl_of_teachers(best, CLASSES), abs=0.01)
    again = train(spec)
    assert again.already


@pytest.mark.parametrize("tail", ["bucket", "sampled"])
def test_micro_batches_change_nothing(tmp_path: Path, tail: str) -> None:
    tables = make_teachers(tmp_path, 3, draws=2)
    plan = written(tmp_path, make_ensemble_plan(tables, weights=SHARES))
    losses: list[list[float]] = []
    for size in (None, 7):
        found: list[float] = []
        spec = run_spec(
            tmp_path,
            plan,
            out=str(tmp_path / f"run-{size}"),
            steps=6,
            micro_batch_size=size,
            loss=LossSpec(tail=tail, kd_weight=0.7),  # type: ignore[arg-type]
        )
        train(spec, report=lambda now, to=found: to.append(now.loss))  # type: ignore[misc]
        losses.append(found)
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_reverse_and_missing_temperatures_are_refused_before_anything(tmp_path: Path) -> None:
    tables = make_teachers(tmp_path, temperatures=(2.0,))
    plan = written(tmp_path, make_ensemble_plan(tables))
    with pytest.raises(BadInputError, match="'reverse': expected one teacher a row"):
        train(run_spec(tmp_path, plan, loss=LossSpec(divergence="reverse")))
    warm = written(tmp_path, make_ensemble_plan(tables, temperatures={"b": 2.0}), "warm")
    message = (
        r"temperature 4\.0 \(the loss's 2\.0 times the table's own 2\.0\) is not stored: .*'b'"
    )
    with pytest.raises(MismatchError, match=message):
        train(run_spec(tmp_path, warm, loss=LossSpec(temperature=2.0)))
    assert not list((tmp_path / "run").glob("*.json*"))
    record = train(run_spec(tmp_path, warm, steps=2)).record
    heat = {table["name"]: table.get("temperature") for table in record["tables"]}
    assert heat == {"a": None, "b": 2.0, "c": None}


def test_hard_labels_alone_need_no_teacher_at_all(tmp_path: Path) -> None:
    """The like-for-like baseline of an ensemble: the same rows, the first teacher's labels."""
    tables = make_teachers(tmp_path)
    both = written(tmp_path, make_ensemble_plan(tables, weights=SHARES))
    losses: dict[str, list[float]] = {"both": [], "alone": []}
    alone = written(tmp_path, make_plan({"a": tables["a"]}), "alone")
    for name, plan in (("both", both), ("alone", alone)):
        spec = run_spec(
            tmp_path,
            plan,
            out=str(tmp_path / name),
            steps=4,
            batch_size=ROWS,
            loss=LossSpec(kd_weight=0.0),
        )
        train(spec, report=lambda now, to=losses[name]: to.append(now.loss))  # type: ignore[misc]
    assert losses["both"] == pytest.approx(losses["alone"], rel=1e-5)


# Language models.


def language_teachers(folder: Path, **options: Any) -> dict[str, Table]:
    """Two teachers of the same sequences: bigrams, and the same with classes moved by one."""
    drawn = draw(rows=24)
    other = replace(drawn, dense=np.roll(drawn.dense, 1, axis=1))
    return {
        "one": make_language_table(folder / "one", drawn, **options),
        "two": make_language_table(folder / "two", other, group_rows=7, **options),
    }


@pytest.mark.parametrize(
    "loss", [{"tail": "sampled"}, {"tail": "bucket", "normalization": "sequence", "kd_weight": 0.5}]
)
def test_language_models_are_trained_alike_fused_or_not_in_parts_or_whole(
    tmp_path: Path, loss: Mapping[str, Any]
) -> None:
    tables = language_teachers(tmp_path, draws=4)
    plan = written(tmp_path, make_ensemble_plan(tables, weights={"one": 3, "two": 1}))
    losses = []
    for number, (fused, size) in enumerate((("auto", None), ("never", None), ("auto", 3))):
        found: list[float] = []

        def note(now: Progress, to: list[float] = found) -> None:
            to.append(now.loss)

        spec = language_spec(
            tmp_path,
            plan,
            out=str(tmp_path / f"run{number}"),
            steps=3,
            micro_batch_size=size,
            loss={**loss, "fused": fused},
        )
        train(spec, report=note)
        losses.append(found)
    assert len(losses[0]) == 3
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_a_teacher_of_unknown_tails_leaves_only_the_labels_to_judge_by(tmp_path: Path) -> None:
    drawn = draw(rows=12)
    tables = {
        "one": make_language_table(tmp_path / "one", drawn),
        "two": make_language_table(tmp_path / "two", drawn, known_tail=False),
    }
    plan = make_ensemble_plan(tables)
    found = evaluate(Bigrams(), plan)
    assert found.nll is not None
    assert found.kl_to_teacher is None
    assert found.agreement is None
    assert evaluate(Bigrams(), make_plan({"one": tables["one"]})).kl_to_teacher is not None


class Bigrams(nn.Module):
    """A table of logits of what follows each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 30)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.table(input_ids)
        return logits


def test_a_language_model_learns_the_mixture_of_its_teachers(tmp_path: Path) -> None:
    tables = language_teachers(tmp_path, k=30)
    plan = written(tmp_path, make_ensemble_plan(tables, weights={"one": 3, "two": 1}))
    spec = language_spec(
        tmp_path, plan, steps=60, evaluate={"plan": str(plan), "every": 1000, "batch_size": 5}
    )
    found = train(spec).record["evaluation"]
    teacher = np.exp(bigrams())
    mixture = 0.75 * teacher + 0.25 * np.roll(teacher, 1, axis=1)
    drawn = draw(rows=24)
    tokens = [drawn.input_ids[row][i] for row, at in enumerate(drawn.positions) for i in at]
    apart = 0.0
    for share, one in ((0.75, teacher), (0.25, np.roll(teacher, 1, axis=1))):
        apart += share * (one * np.log(one / mixture)).sum(1)[tokens].mean()
    # What no student can go below, and how near this one comes.
    assert apart < found["kl_to_teacher"] < apart + 0.35
    assert found["agreement"] > 0.5
    assert found["positions"] == len(tokens)
    figures = evaluate_teacher(Plan.read(plan))
    labels = [label for row in drawn.labels for label in row]
    expected = -np.log(mixture[tokens, labels]).mean()
    assert figures.nll == pytest.approx(float(expected), abs=1e-3)

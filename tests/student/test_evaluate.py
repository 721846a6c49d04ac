import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from softlabels.errors import BadInputError, MismatchError
from softlabels.plan import Plan, entries_table
from softlabels.student.evaluate import BINS, evaluate, evaluate_teacher, reliability
from softlabels.student.spec import RunSpec
from softlabels.student.trainer import train
from tests.plans import make_plan
from tests.student.problem import CLASSES, Linear, decode, make_problem, run_spec
from tests.tables import dense_logprobs, make_table

ROWS = 150


class Fixed(nn.Module):
    """Gives its input as logits, with dropout that evaluation must leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.drop = nn.Dropout(0.5)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.drop(features.flip(1) * self.scale)
        return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def reference(p: np.ndarray, q: np.ndarray, labels: np.ndarray, k: int) -> dict[str, float]:
    """Every figure by plain loops over rows, from full distributions."""
    kl, acceptance, right, agree, nll, confidence = [], [], [], [], [], []
    for row in range(len(p)):
        top = np.argsort(-p[row], kind="stable")[:k]
        rest = [v for v in range(p.shape[1]) if v not in top]
        pairs = [(p[row, v], q[row, v]) for v in top]
        if rest:
            pairs.append((p[row, rest].sum(), q[row, rest].sum()))
        kl.append(sum(a * np.log(a / b) for a, b in pairs))
        acceptance.append(sum(min(a, b) for a, b in pairs))
        choice = int(q[row].argmax())
        agree.append(choice == p[row].argmax())
        right.append(choice == labels[row])
        confidence.append(q[row].max())
        nll.append(-np.log(q[row, labels[row]]))
    ece = 0.0
    for i in range(15):
        inside = [r for r, c in enumerate(confidence) if i / 15 < c <= (i + 1) / 15]
        if inside:
            gap = np.mean([right[r] for r in inside]) - np.mean([confidence[r] for r in inside])
            ece += len(inside) / len(p) * abs(gap)
    return {
        "accuracy": float(np.mean(right)),
        "nll": float(np.mean(nll)),
        "ece": float(ece),
        "agreement": float(np.mean(agree)),
        "kl_to_teacher": float(np.mean(kl)),
        "acceptance": float(np.mean(acceptance)),
    }


@pytest.mark.parametrize("k", [CLASSES, 3, 1])
def test_every_figure_against_a_plain_reference(tmp_path: Path, k: int) -> None:
    plan = Plan.read(make_problem(tmp_path, rows=ROWS, k=k))
    dense = dense_logprobs(ROWS, CLASSES, 0)
    logits = dense.astype(np.float32)[:, ::-1] * 0.5
    expected = reference(np.exp(dense), softmax(logits), np.arange(ROWS) % CLASSES, k)
    found = evaluate(Fixed(), plan, decode, ["features"], batch_size=64)
    assert (found.rows, found.labelled, found.parameters) == (ROWS, ROWS, 1)
    assert found.threads == torch.get_num_threads()
    assert found.examples_per_s is not None
    assert found.examples_per_s > 0
    for name, value in expected.items():
        # Stored log-probabilities have float16's precision.
        assert getattr(found, name) == pytest.approx(value, rel=2e-3, abs=1e-4), name
    assert sum(one.rows for one in found.bins) == ROWS


def test_teacher_from_stored_labels_alone(tmp_path: Path) -> None:
    plan = Plan.read(make_problem(tmp_path, rows=ROWS, k=3))
    p = np.exp(dense_logprobs(ROWS, CLASSES, 0))
    expected = reference(p, p, np.arange(ROWS) % CLASSES, 3)
    found = evaluate_teacher(plan)
    assert found.rows == ROWS
    for name in ("accuracy", "nll", "ece"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=2e-3, abs=1e-4), name
    assert found.agreement is None
    assert found.examples_per_s is None


def test_the_teacher_itself_is_perfect(tmp_path: Path) -> None:
    plan = Plan.read(make_problem(tmp_path, rows=ROWS))
    student = Linear()
    student.layer.weight.data = torch.eye(CLASSES)
    student.layer.bias.data.zero_()
    found, teacher = evaluate(student, plan, decode, ["features"]), evaluate_teacher(plan)
    assert found.agreement == 1
    assert found.kl_to_teacher == pytest.approx(0, abs=1e-6)
    assert found.acceptance == pytest.approx(1, abs=1e-3)
    assert found.accuracy == teacher.accuracy
    assert found.ece == pytest.approx(teacher.ece, abs=2e-3)


def test_kl_of_fewer_ids_is_a_lower_bound(tmp_path: Path) -> None:
    values = []
    for k in (1, 3, CLASSES):
        plan = Plan.read(make_problem(tmp_path, f"k{k}", rows=ROWS, k=k))
        found = evaluate(Fixed(), plan, decode, ["features"]).kl_to_teacher
        assert found is not None
        values.append(found)
    assert 0 <= values[0] < values[1] < values[2]


def test_repeats_weights_and_batch_size_do_not_count(tmp_path: Path) -> None:
    features = dense_logprobs(ROWS, CLASSES, 0).astype(np.float32).tolist()
    carried = {"features": pa.array(features, pa.list_(pa.float32()))}
    table = make_table(tmp_path / "t", ROWS, CLASSES, CLASSES, carried=carried)
    plain = evaluate(Fixed(), make_plan(table), decode, ["features"], batch_size=7)
    plan = make_plan(table, repeats=[3], loss_weights=[0.1])
    other = evaluate(Fixed(), plan, decode, ["features"], batch_size=1000)
    assert plain.rows == other.rows == ROWS
    assert plain.nll == pytest.approx(other.nll, rel=1e-6)


def test_mode_and_random_numbers_are_given_back(tmp_path: Path) -> None:
    plan = Plan.read(make_problem(tmp_path, rows=50))
    student = Fixed()
    student.drop.eval()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)

    def drawing(columns: Mapping[str, pa.Array]) -> Tensor:
        torch.rand(1)
        return decode(columns)

    evaluate(student, plan, drawing, ["features"])
    assert torch.equal(torch.rand(3), expected)
    assert student.training
    assert not student.drop.training


def test_reliability_bins() -> None:
    error, bins = reliability(np.array([0.05, 0.95, 0.96, 1.0]), np.array([1, 1, 0, 1], bool))
    assert len(bins) == BINS
    assert (bins[0].rows, bins[0].accuracy, bins[0].confidence) == (1, 1.0, 0.05)
    assert bins[-1].rows == 3
    assert (bins[7].rows, bins[7].accuracy, bins[7].confidence) == (0, None, None)
    assert error == pytest.approx((0.95 + abs(2 - 2.91)) / 4)
    # A confidence on a border belongs to the bin below it; 0 to the first.
    assert reliability(np.array([0.0, 1 / 15]), np.array([1, 1], bool))[1][0].rows == 2


@pytest.mark.parametrize("wrap", [tuple, dict])
def test_inputs_may_be_tuples_and_mappings(tmp_path: Path, wrap: Any) -> None:
    plan = Plan.read(make_problem(tmp_path, rows=50))

    def wrapped(columns: Mapping[str, pa.Array]) -> Any:
        features = decode(columns)
        return (features,) if wrap is tuple else {"features": features}

    plain = evaluate(Fixed(), plan, decode, ["features"])
    assert evaluate(Fixed(), plan, wrapped, ["features"]).nll == plain.nll
    with pytest.raises(BadInputError, match="expected a tensor, or a tuple or mapping"):
        evaluate(Fixed(), plan, lambda columns: 3, ["features"])


def test_width_mismatch(tmp_path: Path) -> None:
    plan = Plan.read(make_problem(tmp_path, rows=50))
    with pytest.raises(MismatchError, match=r"\(50, 7\).*\(50, 6\)"):
        evaluate(Linear(CLASSES + 1), plan, decode, ["features"])


def test_figures_on_the_training_plan_match_the_trainer(tmp_path: Path) -> None:
    path = make_problem(tmp_path, rows=64)
    spec: RunSpec = run_spec(tmp_path, path, evaluate={"plan": str(path)}, steps=5)
    student = Linear()
    trained = train(spec, model=student)
    found = evaluate(student, Plan.read(path), decode, ["features"])
    assert trained.record["evaluation"]["kl_to_teacher"] == found.kl_to_teacher


def test_a_row_that_two_entries_take_counts_once(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=100)
    plan = make_plan(table)
    rows = plan.entries.to_pylist()
    first = rows[0] | {"rows": [0, 3], "num_rows": 2}
    doubled = dataclasses.replace(plan, entries=entries_table([first, *rows, *rows[:2]]))
    assert evaluate_teacher(doubled).rows == 100
    half = [
        row | {"rows": part, "num_rows": len(part)} for row in rows for part in ([1, 3], [3, 4])
    ]
    some = dataclasses.replace(plan, entries=entries_table(half))
    assert evaluate_teacher(some).rows == 3 * len(rows)

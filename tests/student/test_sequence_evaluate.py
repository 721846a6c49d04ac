from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from softlabels.errors import MismatchError
from softlabels.plan import Plan
from softlabels.student import causal
from softlabels.student.evaluate import evaluate, evaluate_teacher
from softlabels.student.trainer import train
from tests.plans import make_plan
from tests.student.language import (
    CLASSES,
    bigrams,
    draw,
    language_spec,
    make_language_plan,
    make_language_table,
)
from tests.student.test_evaluate import reference, softmax

ROWS = 25


class Table(nn.Module):
    """Logits of a token alone, through hidden states and a head whose product they are."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.hidden = nn.Embedding(*logits.shape)
        self.hidden.weight.data = torch.tensor(logits, dtype=torch.float32)
        self.head = nn.Linear(CLASSES, CLASSES)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def hidden_and_head(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden(input_ids), self.head.weight, self.head.bias

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(input_ids))
        return logits


def student(scale: float = 0.5) -> Table:
    return Table(bigrams()[:, ::-1] * scale)


@pytest.mark.parametrize("k", [CLASSES, 4])
@pytest.mark.parametrize("documents", [1, 3])
def test_every_figure_against_a_plain_reference(tmp_path: Path, k: int, documents: int) -> None:
    options: dict[str, Any] = {"documents": documents, "isolated": documents > 1}
    plan = Plan.read(make_language_plan(tmp_path, rows=ROWS, k=k, **options))
    drawn = draw(rows=ROWS, documents=documents)
    pairs = zip(drawn.input_ids, drawn.positions, strict=True)
    after = [ids[place] for ids, places in pairs for place in places]
    labels = np.array([label for row in drawn.labels for label in row])
    q = softmax(bigrams()[after][:, ::-1] * 0.5)
    expected = reference(np.exp(drawn.dense), q, labels, k)
    found = evaluate(student(), plan)
    assert (found.rows, found.positions, found.labelled) == (ROWS, len(labels), len(labels))
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-3, abs=2e-4), name
    assert found.perplexity == pytest.approx(np.exp(expected["nll"]), rel=2e-3)
    assert sum(one.rows for one in found.bins) == len(labels)
    assert found.tokens_per_s is not None
    assert found.examples_per_s is not None
    tokens = sum(len(ids) for ids in drawn.input_ids)
    assert found.tokens_per_s / found.examples_per_s == pytest.approx(tokens / ROWS)


def test_batches_and_heads_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.read(make_language_plan(tmp_path, rows=ROWS))
    whole = evaluate(student(), plan, batch_size=100)
    monkeypatch.setattr(causal, "CHUNK_BYTES", 4 * CLASSES * 7)
    for batch_size, fused in ((1, "auto"), (4, "never"), (None, "always"), (100, "auto")):
        found = evaluate(student(), plan, batch_size=batch_size, fused=fused)  # type: ignore[arg-type]
        for name in ("nll", "accuracy", "ece", "kl_to_teacher", "acceptance", "agreement"):
            assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-5), name


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def test_logits_of_a_whole_batch_never_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow(Table):
        def __init__(self) -> None:
            super().__init__(np.zeros((CLASSES, 4)))
            self.head = nn.Linear(4, CLASSES)

    plan = Plan.read(make_language_plan(tmp_path, rows=ROWS))
    monkeypatch.setattr(causal, "CHUNK_BYTES", 4 * CLASSES * 10)
    with Largest() as seen:
        found = evaluate(Narrow(), plan, batch_size=ROWS)
    assert found.positions is not None
    # Ten positions of logits, or all hidden states of the padded batch.
    assert seen.elements == max(10 * CLASSES, ROWS * 12 * 4)
    assert seen.elements < found.positions * CLASSES / 3
    assert found.perplexity == pytest.approx(CLASSES, rel=0.5)


def test_teacher_from_stored_labels_alone(tmp_path: Path) -> None:
    plan = Plan.read(make_language_plan(tmp_path, rows=ROWS, k=4))
    drawn = draw(rows=ROWS)
    labels = np.array([label for row in drawn.labels for label in row])
    p = np.exp(drawn.dense)
    expected = reference(p, p, labels, 4)
    found = evaluate_teacher(plan)
    assert (found.rows, found.positions) == (ROWS, len(labels))
    for name in ("accuracy", "nll", "ece"):
        assert getattr(found, name) == pytest.approx(expected[name], rel=2e-3, abs=1e-4), name
    assert found.perplexity == pytest.approx(np.exp(expected["nll"]), rel=2e-3)


def test_the_teacher_itself_is_perfect(tmp_path: Path) -> None:
    plan = Plan.read(make_language_plan(tmp_path, rows=ROWS, k=CLASSES))
    found, teacher = evaluate(Table(bigrams()), plan), evaluate_teacher(plan)
    assert found.agreement == 1
    assert found.kl_to_teacher == pytest.approx(0, abs=1e-5)
    assert found.acceptance == pytest.approx(1, abs=1e-3)
    assert found.perplexity == pytest.approx(teacher.perplexity, rel=1e-3)
    assert found.accuracy == teacher.accuracy


def test_a_teacher_of_draws_alone_still_has_a_perplexity(tmp_path: Path) -> None:
    table = make_language_table(tmp_path / "t", draw(rows=ROWS), 0, draws=4)
    found = evaluate_teacher(make_plan(table))
    assert found.perplexity is not None
    assert found.perplexity > 1
    assert (found.accuracy, found.ece, found.bins) == (None, None, ())


def test_repeats_and_weights_do_not_count(tmp_path: Path) -> None:
    table = make_language_table(tmp_path / "t", draw(rows=ROWS))
    plain = evaluate(student(), make_plan(table))
    other = evaluate(student(), make_plan(table, repeats=[3], loss_weights=[0.1]))
    assert (plain.rows, plain.nll) == (other.rows, other.nll)


def test_a_masked_student(tmp_path: Path) -> None:
    path = make_language_plan(tmp_path, rows=ROWS, alignment="same")
    found = evaluate(student(), Plan.read(path))
    assert found.positions == sum(len(row) for row in draw(rows=ROWS, alignment="same").positions)
    assert found.perplexity is not None


def test_another_width_is_refused(tmp_path: Path) -> None:
    plan = Plan.read(make_language_plan(tmp_path, rows=ROWS))
    narrow = student()
    narrow.head = nn.Linear(CLASSES, CLASSES - 1)
    with pytest.raises(MismatchError, match=r"head has 29 rows, the plan's vocabulary has 30"):
        evaluate(narrow, plan)


def test_unknown_tails_of_one_table_do_not_thin_the_figures_of_another(tmp_path: Path) -> None:
    known = make_language_table(tmp_path / "a", draw(rows=8))
    unknown = make_language_table(tmp_path / "b", draw(rows=8, seed=1), known_tail=False)
    both, alone = make_plan({"a": known, "b": unknown}), make_plan({"a": known})
    for found, expected in (
        (evaluate_teacher(both), evaluate_teacher(alone)),
        (evaluate(student(), both), evaluate(student(), alone)),
    ):
        for name in ("kl_to_teacher", "acceptance", "agreement"):
            value = getattr(expected, name)
            assert getattr(found, name) == (value and pytest.approx(value))
    # What the teacher's top class is, only the table with tails says.
    assert evaluate_teacher(both).accuracy == evaluate_teacher(alone).accuracy
    assert evaluate_teacher(both).ece == evaluate_teacher(alone).ece


def test_hard_labels_train_on_known_and_unknown_tails(tmp_path: Path) -> None:
    known = make_language_table(tmp_path / "a", draw(rows=8))
    unknown = make_language_table(tmp_path / "b", draw(rows=8, seed=1), known_tail=False)
    make_plan({"a": known, "b": unknown}).write(tmp_path / "plan.parquet")
    spec = language_spec(tmp_path, tmp_path / "plan.parquet", loss={"kd_weight": 0}, steps=3)
    assert train(spec).record["steps"] == 3


def test_one_version_under_two_rules_is_no_plan_to_measure_on(tmp_path: Path) -> None:
    table = make_language_table(tmp_path / "a", draw(rows=8))
    plan = make_plan({"a": table, "b": table})
    assert len(plan.tables) == 2
    with pytest.raises(MismatchError, match="one table version under different position rules"):
        evaluate(student(), plan)

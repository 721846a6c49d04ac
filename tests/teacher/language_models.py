"""Tiny language models of transformers on disk: what tests of such teachers start from."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from softlabels.teacher.spec import SequenceCaptureSpec
from tests.teacher.texts import CHATML, tiny_tokenizer

CONTEXT = 64
VOCABULARY = 320


def tiny_model(folder: Path, kind: str = "llama", seed: int = 0, **config: Any) -> Path:
    """Writes a random model of a real class, peaked enough to tell tokens apart; its folder.

    Args:
        folder: made where it is not there; a tokenizer of 320 ids is put there too.
        kind: llama, gpt2, opt, gemma2, granite, bert, distilbert, roberta.
        seed: of its weights.
        config: changes of its configuration, such as vocab_size.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    small: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    own: dict[str, dict[str, Any]] = {
        "llama": {"num_key_value_heads": 2},
        "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0},
        "granite": {"num_key_value_heads": 2, "logits_scaling": 0.25},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
        "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        "gpt2": {"n_inner": 48},
    }
    masked = kind in ("bert", "distilbert", "roberta")
    auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(AutoConfig.for_model(kind, **(small | own.get(kind, {}) | config)))
    model.save_pretrained(folder)
    return tiny_tokenizer(folder, CHATML)


def language_spec(folder: Path, model: Path, **changes: Any) -> SequenceCaptureSpec:
    """A spec: table folder/table, text folder/src/*.txt, `model`; teacher and source are merged."""
    values: dict[str, Any] = {
        "table": str(folder / "table"),
        "teacher": {"name": "tiny", "model": str(model)},
        "source": {"files": str(folder / "src" / "*.txt"), "length": 24},
        "k": 5,
        "draws": 4,
        "profile": "precise",
        "batch_tokens": 64,
        "head_rows": 16,
        "device": "cpu",
    }
    for key in ("teacher", "source"):
        values[key] |= changes.pop(key, {})
    return SequenceCaptureSpec.model_validate(values | changes)


def dense(model: Path, tokens: Any, vocabulary: int | None = None) -> np.ndarray:
    """The model's own log-probabilities of one sequence alone, float64 [L, vocabulary]."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    masked = AutoConfig.from_pretrained(model).model_type in ("bert", "distilbert", "roberta")
    auto: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    loaded = auto.from_pretrained(model).eval()
    ids = torch.tensor(np.asarray(tokens)[None].astype(np.int64))
    with torch.inference_mode():
        logits = loaded(ids).logits[0, :, :vocabulary].double()
    return np.asarray(torch.log_softmax(logits, 1).numpy())

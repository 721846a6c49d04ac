"""The students: Llama's architecture, far smaller than the teacher, over its vocabulary."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softlabels.errors import BadInputError
from softlabels.student.pretrained import build_language_model
from softlabels.student.spec import LanguageModelSpec, RunSpec

TRAIN = Path("pipelines/smollm2/train.yaml")


def settings() -> dict[str, Any]:
    """The config of the demo's students, which the benchmark's share."""
    asked = RunSpec.read(TRAIN).student
    config = asked.causal_lm.config if asked and asked.causal_lm else None
    if not isinstance(config, Mapping):
        raise BadInputError(f"{TRAIN}: expected the student's config in it, found {config!r}")
    return dict(config)


def build(config: dict[str, Any], vocabulary: int, seed: int) -> nn.Module:
    """A new causal student; equal seeds give equal weights."""
    torch.manual_seed(seed)
    return build_language_model(LanguageModelSpec(config=config), "causal_lm", vocabulary).train()


def hidden_states(model: Any, input_ids: Tensor) -> Tensor:
    """float [B, L - 1, D], after each token that has a next one: what the head reads."""
    hidden: Tensor = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden[:, :-1]


def head(model: Any) -> Tensor:
    """float [V, D]: logits are hidden times its transpose."""
    weight: Tensor = model.get_output_embeddings().weight
    return weight


def learning_rate(highest: float, step: int, steps: int) -> float:
    """The rate of a step from 0: up in a line, level, down to 0 over the last quarter.

    It is level on most of the way, so that measurements on the way compare amounts of text and
    not stages of a schedule.
    """
    warm = max(1, math.ceil(steps / 20))
    return highest * min(1.0, (step + 1) / warm, (steps - step) / max(1, math.ceil(steps / 4)))

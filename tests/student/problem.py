"""A small distillation problem with a known answer, and students for it.

The features of a row are the teacher's own log-probabilities, so a linear student with the
identity as its weights is the teacher.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from softlabels.student.spec import InputSpec, OptimizerSpec, RunSpec, StudentSpec
from tests.plans import make_plan
from tests.tables import dense_logprobs, make_table

CLASSES = 6


class Linear(nn.Module):
    """One linear layer from features to logits."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.layer = nn.Linear(CLASSES, classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layer(features)
        return logits


class Dropped(nn.Module):
    """Batch norm and dropout: a student with buffers that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(CLASSES)
        self.hidden = nn.Linear(CLASSES, 16)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.out(self.drop(torch.relu(self.hidden(self.norm(features)))))
        return logits


class Poisoned(Linear):
    """Gives NaN from its third training step on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, features: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(features) * (float("nan") if self.calls >= 3 else 1)


def decode(columns: Mapping[str, pa.Array]) -> Tensor:
    """Features float32 [B, CLASSES]."""
    return torch.tensor(columns["features"].to_pylist(), dtype=torch.float32)


def slow_decode(columns: Mapping[str, pa.Array]) -> Tensor:
    """The same, slow enough for a test to come between two steps."""
    time.sleep(0.02)
    return decode(columns)


def make_problem(
    folder: Path, name: str = "train", rows: int = 300, classes: int = CLASSES, **options: Any
) -> Path:
    """The path of a plan over a new table of `rows` rows with their features carried."""
    seed = options.get("seed", 0)
    features = dense_logprobs(rows, classes, seed)[:, :CLASSES].astype(np.float32)
    carried = {"features": pa.array(features.tolist(), pa.list_(pa.float32()))}
    settings = {"k": classes, **options}
    table = make_table(folder / name, rows=rows, classes=classes, carried=carried, **settings)
    path = folder / f"{name}.plan.parquet"
    make_plan({name: table}).write(path)
    return path


def run_spec(folder: Path, plan: Path, **changes: Any) -> RunSpec:
    """A run of 40 steps into `folder`/run."""
    values: dict[str, Any] = {
        "plan": str(plan),
        "out": str(folder / "run"),
        "student": StudentSpec(module="tests.student.problem:Linear"),
        "inputs": InputSpec(decode="tests.student.problem:decode", columns=("features",)),
        "optimizer": OptimizerSpec(lr=0.1, weight_decay=0.0),
        "steps": 40,
        "batch_size": 32,
        "threads": 1,
    }
    return RunSpec.model_validate(values | changes)

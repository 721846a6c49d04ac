"""A student that writes down which rows it was trained on, and in which step."""

import json
import os
import time
from collections.abc import Mapping

import pyarrow as pa
import torch
from torch import Tensor, nn

from tests.student.problem import CLASSES

SEEN = "SOFTLABELS_TEST_SEEN"


class Seeing(nn.Module):
    """Batch norm, dropout, and a line of `SEEN`/<rank>.jsonl a step: [step, rows]."""

    steps: Tensor

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(CLASSES)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(CLASSES, CLASSES)
        self.pause = pause
        # Checkpoints hold it: after a restart it counts on from where the run does.
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor, numbers: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.pause)
            self.steps += 1
            self._write(numbers)
        logits: Tensor = self.out(self.drop(self.norm(features)))
        return logits

    def _write(self, numbers: Tensor) -> None:
        line = json.dumps([int(self.steps), numbers.tolist()]) + "\n"
        path = os.path.join(os.environ[SEEN], f"{os.environ['RANK']}.jsonl")
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def decode(columns: Mapping[str, pa.Array]) -> tuple[Tensor, Tensor]:
    """Features float32 [B, CLASSES], and the number of each row, int64 [B]."""
    features = torch.tensor(columns["features"].to_pylist(), dtype=torch.float32)
    return features, torch.tensor(columns["number"].to_pylist())

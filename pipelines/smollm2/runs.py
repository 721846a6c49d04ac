"""One student of the benchmark: trained step by step, saved on the way, continued by itself."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipelines.smollm2.arms import Arm, gradient_of
from pipelines.smollm2.labels import CHUNK, Labels, save_atomically
from pipelines.smollm2.students import build, head, hidden_states, learning_rate

WINDOW = 32
"""Rows within which the first pass is shuffled: labels are made as they are needed."""
SAVE_SECONDS = 180.0
CLIP_NORM = 1.0


class Run:
    """A student of one arm and seed.

    Attributes:
        arm: what it learns from.
        seed: of its start and of its order; arms of equal seed share both.
        step: steps done.
        seconds: of training so far, its own only.
    """

    def __init__(
        self,
        arm: Arm,
        seed: int,
        labels: Labels,
        *,
        student: dict[str, Any],
        rate: float,
        rows: int,
        epochs: int,
        batch_rows: int,
        folder: Path | None,
    ) -> None:
        self.arm, self.seed, self.step, self.seconds = arm, seed, 0, 0.0
        self._labels, self._rate, self._rows, self._batch_rows = labels, rate, rows, batch_rows
        self.steps = epochs * rows // batch_rows
        self._student = student
        self._path = folder / f"{arm.name}-seed{seed}.safetensors" if folder else None
        self.model: Any = None
        self._optimizer: Any = None
        if self._path and self._path.exists():
            with safe_open(self._path, "pt") as file:
                self.step = json.loads(file.metadata()["state"])["step"]

    def open(self) -> None:
        """Builds the student, or reads it back."""
        if self.model is not None:
            return
        self.model = build(self._student, len(self._labels.head), self.seed)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=self._rate)
        if self._path and self._path.exists():
            self._read(self._path)

    def close(self) -> None:
        """Forgets the student, which is saved."""
        self.model = self._optimizer = None

    def train_to(self, step: int, tell: Callable[[int, float], None]) -> None:
        """Trains up to a step and saves; `tell(positions, loss)` hears of every step."""
        if self.step >= step:
            return
        self.open()
        saved = time.monotonic()
        while self.step < step:
            began = time.monotonic()
            loss, positions = self._one()
            self.step += 1
            self.seconds += time.monotonic() - began
            tell(positions, loss)
            if time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """The student, its optimiser and where it is, in one file at once."""
        if self._path is None:
            return
        tensors = {}
        for name, value in self.model.named_parameters():
            tensors[name] = value.detach()
            for key, moment in self._optimizer.state[value].items():
                tensors[f"{name}|{key}"] = moment
        state = json.dumps({"step": self.step, "seconds": self.seconds})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(tensors, self._path, {"state": state})

    def _read(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            state = json.loads(file.metadata()["state"])
            self.step, self.seconds = state["step"], state["seconds"]
            for name, value in self.model.named_parameters():
                value.data.copy_(file.get_tensor(name))
                self._optimizer.state[value] = {
                    key: file.get_tensor(f"{name}|{key}")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def _one(self) -> tuple[float, int]:
        rows = self._batch(self.step)
        ids = self._labels.rows[rows]
        draws = (self.arm.draws,) if self.arm.draws else ()
        stored = None if self.arm.kind == "hard" else self._labels.take(rows, draws)
        gradient = gradient_of(self.arm, ids[:, 1:].flatten(), stored, self._labels.head)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._rate, self.step, self.steps)
        self._optimizer.zero_grad(set_to_none=True)
        loss = backward(self.model, ids, gradient)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self._optimizer.step()
        return loss, ids[:, 1:].numel()

    def _batch(self, step: int) -> list[int]:
        """The rows of a step: a pure function of the seed, the same for every arm."""
        per_epoch = self._rows // self._batch_rows
        epoch, within = divmod(step, per_epoch)
        size = WINDOW if epoch == 0 else self._rows
        place = within * self._batch_rows
        first = place - place % size
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch * 1_009 + first)
        order = first + torch.randperm(min(size, self._rows - first), generator=generator)
        chosen: list[int] = order[place - first : place - first + self._batch_rows].tolist()
        return chosen


def backward(
    model: Any, ids: Tensor, gradient: Callable[[Tensor, slice], tuple[float, Tensor]]
) -> float:
    """Adds one batch's gradient to the model's parameters; the loss.

    The head is applied to a few positions at a time, so [N, V] never exists.
    """
    states = hidden_states(model, ids).flatten(0, 1)
    weight = head(model)
    with torch.no_grad():
        of_weight, of_states = torch.zeros_like(weight), torch.empty_like(states)
    loss, plain, table = 0.0, states.detach(), weight.detach()
    for start in range(0, len(states), CHUNK):
        at = slice(start, start + CHUNK)
        part, of_logits = gradient(plain[at] @ table.T, at)
        loss += part
        torch.mm(of_logits, table, out=of_states[at])
        of_weight.addmm_(of_logits.T, plain[at])
    torch.autograd.backward(states, of_states)
    # Tied to the embedding, which has its own gradient by now.
    weight.grad = of_weight if weight.grad is None else weight.grad.add_(of_weight)
    return loss

"""The teacher's side of the benchmark: one forward pass a row, kept in files of a few rows.

The last hidden states are kept in float32, so the teacher's whole distribution at any position is
one product with its head away, a fifth of a forward pass. Soft targets of every k and m are taken
from those logits by `softlabels.teacher.extract`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.smollm2.arms import store_draws, store_top
from softlabels.fingerprint import key64

BLOCK = 16
"""Rows of a file."""
CHUNK = 256
"""Positions whose logits over the vocabulary are in memory at once."""


class Labels:
    """What a teacher says on rows of tokens, labelled when first asked for.

    Attributes:
        rows: int64 [R, L].
        head: float32 [V, D].
    """

    def __init__(self, folder: Path, split: str, rows: Tensor, model: Any) -> None:
        self.rows = rows
        self.head: Tensor = model.get_output_embeddings().weight.detach()
        self._model = model.eval()
        self._folder, self._split = folder, split
        self._kept: dict[tuple[str, int], dict[str, Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, rows: Sequence[int], draws: Sequence[int] = ()) -> dict[str, Tensor]:
        """The stored values of some rows, by position: [rows times (L - 1), ...].

        Args:
            rows: their numbers.
            draws: the k + k samples that are wanted beside the top k.
        """
        found: list[dict[str, Tensor]] = []
        for row in rows:
            number, within = divmod(row, BLOCK)
            block = dict(self._block("states", number))
            for k in draws:
                block |= self._block(f"draws{k}", number)
            found.append({name: values[within] for name, values in block.items()})
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _block(self, what: str, number: int) -> dict[str, Tensor]:
        key = (what, number)
        if key not in self._kept:
            path = self._folder / f"{self._split}-{what}-{number:04d}.safetensors"
            if not path.exists():
                made = self._label(number) if what == "states" else self._draw(what, number)
                save_atomically(made, path)
            self._kept[key] = load_file(path)
        return self._kept[key]

    def _label(self, number: int) -> dict[str, Tensor]:
        rows = self.rows[BLOCK * number : BLOCK * (number + 1)]
        with torch.inference_mode():
            states = [
                self._model.model(input_ids=part, use_cache=False).last_hidden_state[:, :-1]
                for part in torch.split(rows, 2)
            ]
            hidden = torch.cat(states).contiguous()
            parts = [store_top(z) for z in self._logits(hidden)]
        return {"hidden": hidden} | _by_row(parts, len(rows))

    def _draw(self, what: str, number: int) -> dict[str, Tensor]:
        k = int(what.removeprefix("draws"))
        hidden = self._block("states", number)["hidden"]
        rows, positions = hidden.shape[:2]
        first = BLOCK * number
        keys = np.array(
            [key64(self._split, first + r, p, k) for r in range(rows) for p in range(positions)],
            np.uint64,
        )
        parts = []
        with torch.inference_mode():
            for i, z in enumerate(self._logits(hidden)):
                parts.append(store_draws(z, k, k, keys[CHUNK * i : CHUNK * i + len(z)]))
        return _by_row(parts, rows)

    def _logits(self, hidden: Tensor) -> Any:
        for part in torch.split(hidden.flatten(0, 1), CHUNK):
            yield part @ self.head.T


def save_atomically(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file under its name only when it is whole."""
    waiting = path.with_name(f".{path.name}-{os.getpid()}")
    save_file({name: value.contiguous() for name, value in tensors.items()}, waiting, metadata)
    os.replace(waiting, path)


def _by_row(parts: Sequence[dict[str, Tensor]], rows: int) -> dict[str, Tensor]:
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: values.reshape(rows, -1, *values.shape[1:]) for name, values in whole.items()}

"""What is measured: the rows of each case, and the batch that every contender must return.

Every contender's process imports this module, those of other libraries too: numpy and torch only.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Batch = Mapping[str, Any]
"""Tensors [B, ...] of the case's fields, by name, and `example_id`: B strings, in the form that the
library has them in."""

EXAMPLE_ID = "example_id"
SEED = 7


class Case(NamedTuple):
    """One kind of rows.

    Attributes:
        name: of its folder.
        rows: of the data set.
        batch: rows of a batch.
        k: stored ids a position.
        positions: P; 0: classification, whose rows have one and no axis for it.
        payload: bytes of carried input a row.
        vocabulary: V.
    """

    name: str
    rows: int
    batch: int
    k: int
    positions: int = 0
    payload: int = 0
    vocabulary: int = 1_000

    @property
    def fields(self) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        """The dtype and shape of a row of each field, `example_id` apart."""
        each: tuple[int, ...] = (self.positions,) if self.positions else ()
        found: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
            "ids": (np.int32, (*each, self.k)),
            "logprobs": (np.float32, (*each, self.k)),
            "tail": (np.float32, each),
            "entropy": (np.float32, each),
            "label_ids": (np.int32, each),
            "label_logprobs": (np.float32, each),
            "label_ranks": (np.int32, each),
        }
        if self.positions:
            found["input_ids"] = (np.int32, (self.positions + 1,))
        if self.payload:
            found["payload"] = (np.uint8, (self.payload,))
        return found


CASES = {
    "lm": Case("lm", rows=1_536, batch=16, k=32, positions=512, vocabulary=49_152),
    "labels": Case("labels", rows=1_000_000, batch=256, k=10),
    "payload": Case("payload", rows=100_000, batch=256, k=10, payload=1_024),
}
SMALL = {"lm": 192, "labels": 60_000, "payload": 10_000}
"""Rows of each case while one tries things out."""


class Loader(Protocol):
    """A contender's data set, open."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch, from 0; they are asked for in order."""


class Resumable(Loader, Protocol):
    """A data set that can go on where another process stopped."""

    def state(self) -> Any:
        """Where it stands after the last batch handed out."""

    def resume(self, state: Any) -> Iterator[Batch]:
        """The batches of epoch 0 that are left after `state`."""


def load_source(folder: Path, case: Case, rows: int | None = None) -> dict[str, Array]:
    """The first `rows` rows of every field, mapped: what contenders write in their own format."""
    names = (EXAMPLE_ID, *case.fields)
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r")[:rows] for name in names}


def samples(source: Mapping[str, Array]) -> Iterator[dict[str, Any]]:
    """The rows one by one: arrays, numpy's scalars, and the id as a string."""
    fields = {name: values for name, values in source.items() if name != EXAMPLE_ID}
    for row, key in enumerate(source[EXAMPLE_ID].tolist()):
        yield {EXAMPLE_ID: key.decode(), **{name: v[row] for name, v in fields.items()}}


def tensors(arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Tensors over the memory of arrays."""
    return {name: torch.from_numpy(values) for name, values in arrays.items()}

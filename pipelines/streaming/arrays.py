"""The limit: plain arrays mapped from disk, whose rows are gathered. No format, no checks."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines.streaming.cases import EXAMPLE_ID, SEED, Array, Batch, Case, load_source, tensors


def write(source: dict[str, Array], folder: Path, case: Case, data: Path) -> None:
    """One file a field."""
    for name, values in source.items():
        np.save(folder / f"{name}.npy", values)


class Loader:
    """Rows in a global permutation."""

    def __init__(self, folder: Path, case: Case, scratch: Path) -> None:
        self._fields = load_source(folder, case)
        self._keys = self._fields.pop(EXAMPLE_ID)
        self._batch = case.batch

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        order = np.random.default_rng((SEED, number)).permutation(len(self._keys))
        for start in range(0, len(order), self._batch):
            rows = order[start : start + self._batch]
            arrays = {name: np.take(values, rows, 0) for name, values in self._fields.items()}
            yield {EXAMPLE_ID: np.take(self._keys, rows), **tensors(arrays)}

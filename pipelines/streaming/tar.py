"""WebDataset: tar files, read from front to back through a shuffle buffer."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipelines.streaming.cases import EXAMPLE_ID, SEED, Array, Batch, Case, samples

webdataset: Any = importlib.import_module("webdataset")

BUFFER = {"lm": 256}
"""Rows of the shuffle buffer; elsewhere 1,000, as in the library's examples."""
ROW = "row.pyd"
"""One pickle a row: faster here than a member for each array."""


def write(source: dict[str, Array], folder: Path, case: Case, data: Path) -> None:
    """Uncompressed tar files, at least 8, so that their order can be shuffled."""
    size = -(-len(source[EXAMPLE_ID]) // 8)
    with webdataset.ShardWriter(str(folder / "%06d.tar"), maxcount=size, verbose=0) as out:
        for sample in samples(source):
            key = sample.pop(EXAMPLE_ID)
            out.write({"__key__": key, ROW: sample})


class Loader:
    """The library's own pipeline."""

    def __init__(self, folder: Path, case: Case, scratch: Path) -> None:
        files = sorted(map(str, folder.glob("*.tar")))
        self._names = list(case.fields)
        self._set = (
            webdataset.WebDataset(files, shardshuffle=100, seed=SEED, detshuffle=True)
            .shuffle(BUFFER.get(case.name, 1_000))
            .decode()
            .map(lambda sample: (sample["__key__"], *sample[ROW].values()))
            .batched(case.batch, partial=True)
        )

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of the next epoch."""
        for keys, *values in self._set:
            found = zip(self._names, map(torch.as_tensor, values), strict=True)
            yield {EXAMPLE_ID: keys, **dict(found)}

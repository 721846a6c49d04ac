"""Hugging Face datasets: Arrow files, by row or as a stream."""

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.streaming.cases import EXAMPLE_ID, SEED, Array, Batch, Case

hf: Any = importlib.import_module("datasets")

STREAM_BUFFER = {"lm": 256}
"""Rows of the shuffle buffer where the library's 1,000 rows would be 150 MB; elsewhere 1,000."""


def _features(case: Case) -> Any:
    found: dict[str, Any] = {EXAMPLE_ID: hf.Value("string")}
    for name, (kind, shape) in case.fields.items():
        text = kind.__name__
        if len(shape) == 2:
            found[name] = hf.Array2D(shape, text)
        else:
            found[name] = hf.List(hf.Value(text), length=shape[0]) if shape else hf.Value(text)
    return hf.Features(found)


def write(source: dict[str, Array], folder: Path, case: Case, data: Path) -> None:
    """Arrow files, as `save_to_disk` writes them."""

    def parts() -> Iterator[dict[str, Any]]:
        for row, key in enumerate(source[EXAMPLE_ID].tolist()):
            yield {EXAMPLE_ID: key.decode(), **{n: source[n][row] for n in case.fields}}

    found = hf.Dataset.from_generator(
        parts, features=_features(case), cache_dir=str(folder / "making")
    )
    found.save_to_disk(str(folder / "set"))
    shutil.rmtree(folder / "making")


class Loader:
    """By row: a `DataLoader` of shuffled batches, which the set gives whole (`__getitems__`)."""

    def __init__(self, folder: Path, case: Case, scratch: Path) -> None:
        data = hf.load_from_disk(str(folder / "set")).with_format("torch")
        self._loader: Any = torch.utils.data.DataLoader(
            data,
            batch_size=case.batch,
            shuffle=True,
            generator=torch.Generator().manual_seed(SEED),
        )

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of the next epoch."""
        return iter(self._loader)


class ArrowLoader:
    """By row, taken as Arrow tables whose buffers are handed to torch by hand: its quickest way."""

    def __init__(self, folder: Path, case: Case, scratch: Path) -> None:
        self._data = hf.load_from_disk(str(folder / "set")).with_format("arrow")
        self._case = case

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        generator = torch.Generator().manual_seed(SEED + number)
        order = torch.randperm(len(self._data), generator=generator).tolist()
        for start in range(0, len(order), self._case.batch):
            yield _by_hand(self._data[order[start : start + self._case.batch]], self._case)


def _by_hand(table: pa.Table, case: Case) -> Batch:
    found: dict[str, Any] = {EXAMPLE_ID: table[EXAMPLE_ID]}
    for name, (kind, shape) in case.fields.items():
        column = table[name].combine_chunks()
        column = column.storage if isinstance(column, pa.ExtensionArray) else column
        while pa.types.is_nested(column.type):
            column = column.flatten()
        data = np.frombuffer(column.buffers()[1], kind)[column.offset :][: len(column)]
        found[name] = torch.from_numpy(data.reshape(len(table), *shape).copy())
    return found


class StreamLoader:
    """As a stream with a shuffle buffer."""

    def __init__(self, folder: Path, case: Case, scratch: Path) -> None:
        data = hf.load_from_disk(str(folder / "set"))
        stream = data.to_iterable_dataset(num_shards=8).with_format("torch")
        self._data = stream.shuffle(seed=SEED, buffer_size=STREAM_BUFFER.get(case.name, 1_000))
        self._loader: Any = torch.utils.data.DataLoader(self._data, batch_size=case.batch)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch."""
        self._data.set_epoch(number)
        return iter(self._loader)

    def state(self) -> Any:
        """Where the data set stands; the rows that lie in its buffer are lost."""
        return self._data.state_dict()

    def resume(self, state: Any) -> Iterator[Batch]:
        """The batches that are left of an epoch."""
        self._data.load_state_dict(state)
        return iter(self._loader)

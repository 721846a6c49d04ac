"""MosaicML Streaming: MDS shards, each compressed, decompressed into a local folder when read."""

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.streaming.cases import EXAMPLE_ID, SEED, Array, Batch, Case, samples

_PLACES = ("", ".datasets", ".transforms", ".transforms.functional")
_TORCHVISION = [f"torchvision{place}" for place in _PLACES]


def _streaming() -> Any:
    """The library; its part for images, which needs torchvision, finds an empty one."""
    # What it takes of transformers is loaded first: that would look into the empty torchvision.
    importlib.import_module("transformers.models.auto.tokenization_auto")
    importlib.import_module("transformers.feature_extraction_utils")
    empty = {name: types.ModuleType(name) for name in _TORCHVISION}
    empty["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    empty["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    for name, module in empty.items():
        sys.modules.setdefault(name, module)
    return importlib.import_module("streaming")


streaming = _streaming()


def write(
    source: dict[str, Array], folder: Path, case: Case, data: Path, compression: str | None = None
) -> None:
    """Shards of the default size; arrays of a fixed type and shape, as the library advises."""
    columns = {EXAMPLE_ID: "str"}
    for name, (kind, shape) in case.fields.items():
        text = np.dtype(kind).name
        columns[name] = f"ndarray:{text}:{','.join(map(str, shape))}" if shape else text
    with streaming.MDSWriter(out=str(folder), columns=columns, compression=compression) as out:
        for sample in samples(source):
            out.write(sample)


class Loader:
    """The library's data set and data loader, without worker processes."""

    def __init__(self, folder: Path, case: Case, scratch: Path) -> None:
        self._set = streaming.StreamingDataset(
            remote=str(folder),
            local=str(scratch / "local"),
            batch_size=case.batch,
            shuffle=True,
            shuffle_seed=SEED,
        )
        self._loader = streaming.StreamingDataLoader(
            self._set, batch_size=case.batch, num_workers=0
        )

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of the next epoch."""
        return iter(self._loader)

    def state(self) -> Any:
        """Where the data loader stands."""
        return self._loader.state_dict()

    def resume(self, state: Any) -> Iterator[Batch]:
        """The batches that are left of an epoch."""
        self._loader.load_state_dict(state)
        return iter(self._loader)

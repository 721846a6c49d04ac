"""litdata: chunks of serialized samples."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipelines.streaming.cases import EXAMPLE_ID, SEED, Array, Batch, Case

litdata: Any = importlib.import_module("litdata")


class _Sample:
    """One row of the source, for the library's own process: it is sent there as a number."""

    def __init__(self, source: dict[str, Array]) -> None:
        self._source = source

    def __call__(self, row: int) -> dict[str, Any]:
        fields = {
            n: torch.from_numpy(v[row : row + 1].copy())[0]
            for n, v in self._source.items()
            if n != EXAMPLE_ID
        }
        return {EXAMPLE_ID: self._source[EXAMPLE_ID][row].decode(), **fields}


def write(
    source: dict[str, Array],
    folder: Path,
    case: Case,
    data: Path,
    compression: str | None = None,
    level: str | None = None,
) -> None:
    """Chunks of 64 MB, the size of the library's own examples."""
    litdata.optimize(
        fn=_Sample(source),
        inputs=list(range(len(source[EXAMPLE_ID]))),
        output_dir=str(folder),
        chunk_bytes="64MB",
        compression=compression,
        compression_level=level,
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


class Loader:
    """The library's data set and data loader, without worker processes."""

    def __init__(self, folder: Path, case: Case, scratch: Path, **options: Any) -> None:
        data = litdata.StreamingDataset(
            str(folder), cache_dir=str(scratch / "cache"), shuffle=True, drop_last=False,
            seed=SEED, **options,
        )  # fmt: skip
        self._loader = litdata.StreamingDataLoader(data, batch_size=case.batch, num_workers=0)

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

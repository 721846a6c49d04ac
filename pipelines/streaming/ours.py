"""softlabels: the stream as a student reads it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipelines.streaming.cases import EXAMPLE_ID, SEED, Array, Batch, Case
from softlabels.plan import Plan
from softlabels.student import stream
from softlabels.student.localcache import BYTES, FOLDER
from softlabels.student.reader import CACHE_BYTES


def write(source: dict[str, Array], folder: Path, case: Case, data: Path) -> None:
    """Takes over the table that `make_data` wrote, and its plan."""
    shutil.copytree(data / "table", folder / "table", copy_function=os.link, dirs_exist_ok=True)
    shutil.copy(data / "plan.parquet", folder)


class Loader:
    """A stream from a plan; its local cache, where it fills one, is in `scratch`."""

    def __init__(self, folder: Path, case: Case, scratch: Path, cached: bool = True) -> None:
        os.environ[FOLDER] = str(scratch / "cache")
        os.environ[BYTES] = str(8 << 30) if cached else "0"
        carried = ["input_ids"] * bool(case.positions) + ["payload"] * bool(case.payload)
        self._case = case
        self._stream = stream.Stream(
            Plan.read(str(folder / "plan.parquet")),
            batch_size=case.batch,
            seed=SEED,
            columns=carried,
            cache_bytes=CACHE_BYTES if cached else 0,
            epochs=None if cached else 1,
        )
        self._batches = iter(self._stream)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of the next epoch."""
        for batch in self._batches:
            yield as_tensors(batch, self._case)
            if batch.position + len(batch) == self._stream.rows_per_epoch:
                return

    def state(self) -> dict[str, int | str]:
        """Where the stream stands."""
        return self._stream.state_dict()

    def resume(self, state: dict[str, int | str]) -> Iterator[Batch]:
        """The batches that are left of an epoch."""
        self._stream.load_state_dict(state)
        self._batches = iter(self._stream)
        return self.epoch(0)


def as_tensors(batch: stream.Batch, case: Case) -> Batch:
    """A batch's arrays as tensors, shaped by rows; none is copied."""
    soft, shape = batch.targets, (len(batch), *case.fields["tail"][1])
    found = {
        "ids": soft.ids.reshape(*shape, case.k),
        "logprobs": soft.logprobs.reshape(*shape, case.k),
        "tail": soft.tail,
        "entropy": soft.entropy,
        "label_ids": soft.label_ids,
        "label_logprobs": soft.label_logprobs,
        "label_ranks": soft.label_ranks,
    }
    made = {
        name: torch.from_numpy(values.reshape(shape + values.shape[len(shape) :]))
        for name, values in found.items()
        if values is not None
    }
    for name in batch.columns:
        made[name] = _carried(batch.columns[name], *case.fields[name])
    return {EXAMPLE_ID: batch.example_ids, **made}


def _carried(column: pa.Array, kind: type[np.generic], shape: tuple[int, ...]) -> torch.Tensor:
    """A carried list or binary column whose rows are equally long."""
    values = column.flatten() if pa.types.is_list(column.type) else column
    data = values.buffers()[-1]
    if values is column:
        start = np.frombuffer(column.buffers()[1], np.int32)[column.offset]
    else:
        start = values.offset * np.dtype(kind).itemsize
    flat = np.frombuffer(data, kind, len(column) * shape[0], start)
    # Arrow's memory is not to be written to, which torch cannot say of a tensor.
    return torch.from_numpy(flat.reshape(len(column), *shape).copy())

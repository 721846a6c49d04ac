"""pyarrow alone: row groups in a shuffled order, rows shuffled among those of a few groups."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.streaming.cases import EXAMPLE_ID, SEED, Array, Batch, Case
from softlabels.student.stream import WINDOW_BYTES

FILES = 4
COLUMNS = {
    "topk_ids": "ids",
    "topk_logprobs": "logprobs",
    "tail_logprob": "tail",
    "position_entropy": "entropy",
    "label_ids": "label_ids",
    "label_logprobs": "label_logprobs",
    "label_ranks": "label_ranks",
    "input_ids": "input_ids",
    "payload": "payload",
}
"""The table's names of the fields."""


def write(
    source: dict[str, Array], folder: Path, case: Case, data: Path, defaults: bool = True
) -> None:
    """The table's columns: its own files, or those files written anew with pyarrow's defaults."""
    names = [EXAMPLE_ID, *(n for n, field in COLUMNS.items() if field in case.fields)]
    for number, path in enumerate(sorted((data / "table").rglob("*.parquet"))):
        file, out = pq.ParquetFile(path), folder / f"{number}.parquet"
        if not defaults:
            out.hardlink_to(path)
            continue
        with pq.ParquetWriter(out, file.schema_arrow.empty_table().select(names).schema) as writer:
            for group in range(file.num_row_groups):
                writer.write_table(file.read_row_group(group, columns=names))


class Loader:
    """Windows as large as the stream's."""

    def __init__(self, folder: Path, case: Case, scratch: Path) -> None:
        self._case = case
        self._files = [pq.ParquetFile(path) for path in sorted(folder.glob("*.parquet"))]
        self._names = {n: field for n, field in COLUMNS.items() if field in case.fields}
        self._groups = [
            (file, number) for file in self._files for number in range(file.num_row_groups)
        ]
        size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
        self._window = max(1, len(self._groups) * WINDOW_BYTES // size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch; a window's last one is joined with the next window's first."""
        rng = np.random.default_rng((SEED, number))
        order = rng.permutation(len(self._groups))
        left: dict[str, Any] | None = None
        for start in range(0, len(order), self._window):
            window = [self._read(*self._groups[g]) for g in order[start : start + self._window]]
            window = [left, *window] if left else window
            rows = {name: np.concatenate([part[name] for part in window]) for name in window[0]}
            mixed = rng.permutation(len(rows["tail"]))
            last = start + self._window >= len(order)
            stop = len(mixed) if last else len(mixed) // self._case.batch * self._case.batch
            for first in range(0, stop, self._case.batch):
                yield self._batch(rows, mixed[first : min(first + self._case.batch, stop)])
            left = {name: values[mixed[stop:]] for name, values in rows.items()}

    def _read(self, file: pq.ParquetFile, group: int) -> dict[str, Any]:
        table = file.read_row_group(group, columns=[EXAMPLE_ID, *self._names])
        found = {EXAMPLE_ID: table[EXAMPLE_ID].combine_chunks().to_numpy(zero_copy_only=False)}
        for name, field in self._names.items():
            found[field] = self._flat(table[name].combine_chunks(), field)
        return found

    def _flat(self, column: pa.Array, field: str) -> Array:
        kind, shape = self._case.fields[field]
        rows = len(column)
        if pa.types.is_binary(column.type):
            return np.frombuffer(column.buffers()[2], kind)[: rows * shape[0]].reshape(rows, -1)
        values = column.flatten()
        data = np.frombuffer(values.buffers()[1], kind)[values.offset :][: len(values)]
        return data.reshape(rows, *shape)

    def _batch(self, rows: dict[str, Any], chosen: Array) -> Batch:
        return {
            name: values[chosen] if name == EXAMPLE_ID else torch.from_numpy(values[chosen])
            for name, values in rows.items()
        }

"""Lance: rows taken by number, in a global permutation."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.streaming.cases import EXAMPLE_ID, SEED, Array, Batch, Case

lance: Any = importlib.import_module("lance")

PART = 65_536


def _schema(case: Case) -> pa.Schema:
    fields = [pa.field(EXAMPLE_ID, pa.string())]
    for name, (kind, shape) in case.fields.items():
        value = pa.from_numpy_dtype(np.dtype(kind))
        fields.append(pa.field(name, pa.list_(value, int(np.prod(shape))) if shape else value))
    return pa.schema(fields)


def write(source: dict[str, Array], folder: Path, case: Case, data: Path) -> None:
    """One data set in the library's default format, arrays as fixed-size lists."""
    schema = _schema(case)
    step = 64 if case.positions else PART

    def parts() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(source[EXAMPLE_ID]), step):
            part = {name: values[start : start + step] for name, values in source.items()}
            arrays = [pa.array([key.decode() for key in part.pop(EXAMPLE_ID).tolist()])]
            for name, values in part.items():
                flat = pa.array(np.ascontiguousarray(values).reshape(-1))
                kind = schema.field(name).type
                if pa.types.is_fixed_size_list(kind):
                    flat = pa.FixedSizeListArray.from_arrays(flat, type=kind)
                arrays.append(flat)
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    lance.write_dataset(parts(), str(folder / "set.lance"), schema=schema)


class _Rows(torch.utils.data.Dataset[Any]):
    """What a `DataLoader` shuffles; a batch is one `take`."""

    def __init__(self, path: str) -> None:
        self._set = lance.dataset(path)
        self._rows = self._set.count_rows()

    def __len__(self) -> int:
        return int(self._rows)

    def __getitems__(self, rows: list[int]) -> pa.Table:
        return self._set.take(rows)


class Loader:
    """A `DataLoader` over `take`."""

    def __init__(self, folder: Path, case: Case, scratch: Path) -> None:
        self._case = case
        self._loader: Any = torch.utils.data.DataLoader(
            _Rows(str(folder / "set.lance")),
            batch_size=case.batch,
            shuffle=True,
            generator=torch.Generator().manual_seed(SEED),
            collate_fn=self._tensors,
        )

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of the next epoch."""
        return iter(self._loader)

    def _tensors(self, table: pa.Table) -> Batch:
        found: dict[str, Any] = {EXAMPLE_ID: table[EXAMPLE_ID]}
        for name, (kind, shape) in self._case.fields.items():
            column = table[name].combine_chunks()
            values = column.flatten() if shape else column
            data = np.frombuffer(values.buffers()[1], kind)[values.offset :][: len(values)]
            found[name] = torch.from_numpy(data.reshape(len(table), *shape).copy())
        return found

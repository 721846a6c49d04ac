"""Flat arrays, a value a position, into table columns, an entry a row.

B rows, N positions.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


def nested(
    values: npt.NDArray[Any] | None, counts: npt.NDArray[np.int32], kind: pa.DataType
) -> pa.Array:
    """Lists of type `kind`, `counts` [B] of the `values` [N] or [N, width] a row; None: nulls."""
    if values is None:
        return pa.nulls(len(counts), kind)
    width = values.shape[1] if values.ndim == 2 else 1
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts * width, out=offsets[1:])
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)


def means(values: npt.NDArray[Any] | None, counts: npt.NDArray[np.int32]) -> pa.Array:
    """The mean of each row's values, float32 [B]; null where there is none or it is not finite."""
    if values is None or not len(counts):
        return pa.nulls(len(counts), pa.float32())
    sums = np.zeros(len(counts), np.float64)
    rows = np.repeat(np.arange(len(counts)), counts)
    np.add.at(sums, rows, values)
    # float16's precision is enough for choosing rows and halves the bytes.
    found = (sums / np.maximum(counts, 1)).astype(np.float16).astype(np.float32)
    return pa.array(found, mask=(counts == 0) | ~np.isfinite(found))


def ids_of_rows(values: npt.NDArray[Any] | None, single: bool, rows: int) -> pa.Array:
    """The one id of each row, int32 [B], null where it is below 0; all null if not `single`."""
    if values is None or not single:
        return pa.nulls(rows, pa.int32())
    return pa.array(np.ascontiguousarray(values), pa.int32(), mask=values < 0)


def to_numpy(array: pa.Array, kind: type[np.generic]) -> Any:
    """The values of a primitive Arrow array without nulls, without a copy.

    `Array.to_numpy` would import pandas where it is installed. The array's type must be that of
    `kind`: its bytes are taken for it.
    """
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.zeros(0, kind)
    return np.frombuffer(
        buffer, kind, count=len(array), offset=array.offset * np.dtype(kind).itemsize
    )

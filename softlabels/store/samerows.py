"""A digest of rows that does not depend on how files hold them: proof that rows are the same."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class RowsDigest:
    """The sha256 of rows that are added batch by batch: values bit for bit, nulls, order.

    How rows are cut into batches and what lies under a null do not count; the sign of a zero and
    the bits of a NaN do.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._columns: dict[str, dict[str, Any]] = {}
        self.num_rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds rows, which must have the schema's columns; their order does not matter."""
        self.num_rows += batch.num_rows
        for field in self._schema:
            self._add(field.name, "", batch[field.name])

    def result(self) -> str:
        """64 hex digits."""
        lines = [f"rows {self.num_rows}"]
        for field in self._schema:
            parts = self._columns.get(field.name, {})
            lines += [f"{field.name!r} {field.type}"]
            lines += [f"{part} {digest.hexdigest()}" for part, digest in sorted(parts.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def _add(self, name: str, part: str, values: pa.Array) -> None:
        """Adds one column, or the values inside a column of lists."""
        if pa.types.is_list(values.type):
            self._update(name, f"{part}lengths", pc.fill_null(pc.list_value_length(values), -1))
            self._add(name, f"{part}values ", values.flatten())  # without those under a null
        elif pa.types.is_string(values.type) or pa.types.is_binary(values.type):
            self._update(name, f"{part}lengths", pc.fill_null(pc.binary_length(values), -1))
            self._update_bytes(name, f"{part}bytes", _joined(values.drop_null()))
        else:
            self._update(name, f"{part}valid", pc.is_valid(values))
            self._update(name, f"{part}bits", values.drop_null())

    def _update(self, name: str, part: str, values: pa.Array) -> None:
        if pa.types.is_boolean(values.type):
            values = values.cast(pa.int8())
        width = values.type.bit_width // 8
        buffer = values.buffers()[1] if len(values) else None
        data = memoryview(b"" if buffer is None else buffer)
        self._update_bytes(name, part, data[values.offset * width :][: len(values) * width])

    def _update_bytes(self, name: str, part: str, data: memoryview) -> None:
        self._columns.setdefault(name, {}).setdefault(part, hashlib.sha256()).update(data)


def _joined(values: pa.Array) -> memoryview:
    """The bytes of strings without nulls, one after the other."""
    _, offsets, data = values.buffers()
    if not len(values) or data is None:
        return memoryview(b"")
    bounds = np.frombuffer(offsets, np.int32)[values.offset :][: len(values) + 1]
    return memoryview(data)[int(bounds[0]) : int(bounds[-1])]

"""Rows that lie on disk one by one, all arrays of a row together: one is read into its place.

A read from the page cache costs one copy and no memory but that of the result. Mapping would cost
a page fault for every 64 KiB as well, or keep all that was ever read in the process.

B rows, N positions of theirs.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.student.lease import Lease
from softlabels.targets import Ints

Array = tuple[str, "np.dtype[Any]", int | None]
"""Of a record: name, type, values a position where there is a second axis."""

Int64s = npt.NDArray[np.int64]


MOST_OPEN = 128
"""Files that a reader keeps open."""


class GoneError(Exception):
    """The file is not there any more."""


class Descriptor:
    """An open file, closed when the last thread that reads it is done."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


@dataclass(frozen=True, eq=False)
class Records:
    """The rows of one flat file, of which only example ids, columns and counts are in memory.

    Attributes:
        counts: int32 [B], positions.
        example_ids: string [B].
        columns: those asked, by name, [B].
        arrays: of a record, one after the other, each of as many positions as its row has.
        start: of the first record in the file.
        opened: gives the open file; raises GoneError.
    """

    counts: Ints
    example_ids: pa.Array
    columns: Mapping[str, pa.Array]
    arrays: tuple[Array, ...]
    start: int
    opened: Callable[[], Descriptor] | None = None

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        held = [self.counts, self.example_ids, *self.columns.values()]
        return 2000 + sum(int(values.nbytes) for values in held)

    @property
    def row_bytes(self) -> int:
        """Bytes of all records on disk."""
        return int(self.counts.sum()) * sum(widths(self.arrays))

    @property
    def places(self) -> Int64s:
        """Where each record is in its file, int64 [B]."""
        sizes = self.counts.astype(np.int64) * sum(widths(self.arrays))
        return np.asarray(self.start + np.cumsum(sizes) - sizes)


def widths(arrays: Sequence[Array]) -> list[int]:
    """Bytes a position of each."""
    return [kind.itemsize * (1 if width is None else width) for _, kind, width in arrays]


def interleaved(values: Sequence[npt.NDArray[Any]], counts: Ints) -> npt.NDArray[np.uint8]:
    """The bytes of all records: row after row, of each row array after array.

    Args:
        values: arrays [N, …].
        counts: int32 [B], positions of each row.
    """
    flat = [np.ascontiguousarray(one).reshape(len(one), -1).view(np.uint8) for one in values]
    size = sum(one.nbytes for one in flat)
    out: npt.NDArray[np.uint8] = Lease(size).empty((size,), np.uint8)
    if not size:
        return out
    if counts.min() == counts.max():
        rows, at = out.reshape(len(counts), -1), 0
        for one in flat:
            width = one.size // len(counts)
            rows[:, at : at + width] = one.reshape(len(counts), width)
            at += width
        return out
    edges = np.concatenate([[0], np.cumsum(counts)]).tolist()
    parts = [one[a:b].reshape(-1) for a, b in itertools.pairwise(edges) for one in flat]
    return np.concatenate(parts, out=out)


class RecordReader:
    """Reads records of several files into arrays.

    Args:
        parts: at least one, of the same arrays.
    """

    def __init__(self, parts: Sequence[Records]) -> None:
        self._parts, self._arrays = parts, parts[0].arrays
        self._sizes = widths(self._arrays)
        lengths = np.array([len(part) for part in parts], np.int64)
        self._bases = np.cumsum(lengths) - lengths
        self._counts = np.concatenate([part.counts for part in parts])
        self._places = np.concatenate([part.places for part in parts])
        self._open: dict[int, Descriptor] = {}

    def read(self, which: Int64s, index: Int64s) -> tuple[Ints, dict[str, npt.NDArray[Any]]]:
        """The records `index[i]` of part `which[i]`: counts and arrays, as `flat` names them.

        Args:
            which: int64 [B].
            index: int64 [B].

        Raises:
            GoneError: a file is not there any more.
        """
        rows = self._bases[which] + index
        counts, row = self._counts[rows], sum(self._sizes)
        edges = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        total = int(edges[-1])
        lease = Lease(total * row + 64 * len(self._sizes))
        out = {
            name: lease.empty((total,) if width is None else (total, width), kind)
            for name, kind, width in self._arrays
        }
        into = [
            (values.reshape(-1).view(np.uint8).data, size)
            for values, size in zip(out.values(), self._sizes, strict=True)
            if size
        ]
        places, ends = self._places[rows].tolist(), edges.tolist()
        for number, place, start, stop in zip(
            which.tolist(), places, ends[:-1], ends[1:], strict=True
        ):
            file = self._open.get(number) or self._opened(number)
            buffers = [view[start * size : stop * size] for view, size in into]
            if os.preadv(file.number, buffers, place) != (stop - start) * row:
                raise GoneError("cut short")
        return counts, out

    def _opened(self, number: int) -> Descriptor:
        opened = self._parts[number].opened
        assert opened is not None
        if len(self._open) >= MOST_OPEN:
            self._open.clear()
        self._open[number] = opened()
        return self._open[number]

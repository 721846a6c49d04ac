"""Which entries of a plan read the same row group, and which of its rows they take together."""

import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import IntegrityError
from softlabels.plan import Plan
from softlabels.targets import to_numpy

Ints = npt.NDArray[np.int32]

MOST_HELD = 16_000_000
"""Rows of row groups, 4 bytes each, of which it is held which ones are taken."""


class Groups:
    """The row groups of a plan, numbered from 0, as its entries read them.

    Entries that read one row group of one of the plan's tables share it. What they take together
    is the union of their rows, rising: only that needs to be kept.
    """

    def __init__(self, plan: Plan) -> None:
        self._entries = _one_batch(plan.entries)
        columns = (_codes(self._entries[name]) for name in ("table", "file"))
        self._files = _paired(*columns)
        self._groups = _paired(self._files, to_numpy(self._entries["row_group"], np.int32))
        self._order = np.argsort(self._groups, kind="stable")
        numbers = np.arange(len(self._groups) + 1)
        self._starts = np.searchsorted(self._groups[self._order], numbers)
        self._unions: OrderedDict[int, Ints | None] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def of(self, entry: int) -> int:
        """The row group that an entry reads."""
        return int(self._groups[entry])

    def of_all(self, entries: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The row group that each of `entries` reads."""
        return np.asarray(self._groups[entries])

    def in_file(self, group: int) -> list[int]:
        """The numbers, in the file of a row group, of all row groups that are read of it."""
        there = self._files == self._files[self._entries_of(group)[0]]
        numbers = to_numpy(self._entries["row_group"], np.int32)
        return [int(number) for number in np.unique(numbers[there])]

    def location(self, group: int) -> tuple[str, str, int]:
        """The table, the file and the number in that file of a row group."""
        entry = int(self._entries_of(group)[0])
        table, file, index = (self._entries[n][entry] for n in ("table", "file", "row_group"))
        return table.as_py(), file.as_py(), index.as_py()

    def taken(self, group: int, size: int) -> Ints | None:
        """The rows, rising, that entries take of a row group; None: all.

        Args:
            group: its number here.
            size: its rows.

        Raises:
            IntegrityError: an entry takes rows that are not there, or other than it says.
        """
        whole, parts = False, []
        for entry in self._entries_of(group):
            rows = self._rows(entry)
            if rows is not None and len(rows) and not 0 <= rows.min() <= rows.max() < size:
                wrong = rows.min() if rows.min() < 0 else rows.max()
                raise IntegrityError(
                    f"entry {entry} of the plan takes row {int(wrong)} of a row group of "
                    f"{size} rows"
                )
            found = size if rows is None else len(rows)
            expected = self._entries["num_rows"][int(entry)].as_py()
            if found != expected:
                raise IntegrityError(
                    f"entry {entry} of the plan says {expected} rows, it takes {found}"
                )
            if rows is None:
                whole = True
            else:
                parts.append(rows)
        return None if whole else _union(parts)

    def rows(self, entry: int) -> Ints | None:
        """The rows of its row group that an entry takes, in its order; None: all."""
        return self._rows(entry)

    def places(self, entry: int) -> npt.NDArray[np.int64] | None:
        """Where an entry's rows are among those that `taken` gives; None: they are all of them."""
        rows = self._rows(entry)
        if rows is None:
            return None
        union = self._union_of(self.of(entry))
        if union is None:
            return rows.astype(np.int64)
        return None if np.array_equal(rows, union) else np.searchsorted(union, rows)

    def _union_of(self, group: int) -> Ints | None:
        """What `taken` gives, unchecked: the last ones are held, for it costs all entries' rows."""
        with self._lock:
            if group in self._unions:
                self._unions.move_to_end(group)
                return self._unions[group]
        parts = [self._rows(entry) for entry in self._entries_of(group)]
        listed = [rows for rows in parts if rows is not None]
        union = _union(listed) if len(listed) == len(parts) else None
        with self._lock:
            if group not in self._unions:
                self._unions[group] = union
                self._held += 0 if union is None else len(union)
            while self._held > MOST_HELD:
                gone = self._unions.popitem(last=False)[1]
                self._held -= 0 if gone is None else len(gone)
        return union

    def _entries_of(self, group: int) -> npt.NDArray[np.int64]:
        return self._order[self._starts[group] : self._starts[group + 1]]

    def _rows(self, entry: int | np.int64) -> Ints | None:
        rows = self._entries["rows"][int(entry)]
        return to_numpy(rows.values, np.int32) if rows.is_valid else None


def _union(parts: list[Ints]) -> Ints:
    return parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))


def _paired(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """A number from 0 for each pair of int32 values, the same for the same pair."""
    return np.unique((left.astype(np.int64) << 32) + right, return_inverse=True)[1]


def _codes(names: pa.Array) -> Any:
    return to_numpy(names.dictionary_encode().indices, np.int32)


def _one_batch(entries: pa.Table) -> pa.RecordBatch:
    batches = entries.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=entries.schema)

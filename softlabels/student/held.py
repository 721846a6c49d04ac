"""Row groups at hand, in memory, mapped or as records, and rows picked from them by entries."""

from collections.abc import Callable, Mapping

import numpy as np

from softlabels.student.gather import Parts
from softlabels.student.groups import Groups
from softlabels.student.order import Int64s
from softlabels.student.records import GoneError, Records
from softlabels.student.rows import Rows


class Held:
    """Row groups that stay in memory, mapped or at hand as long as this lives.

    Args:
        entries: each of those that are read of, once, rising.
        loaded: their row groups, by number.
        groups: of the plan.
        fresh: gives the rows of a row group whose records are gone.
    """

    def __init__(
        self,
        entries: Int64s,
        loaded: Mapping[int, Rows | Records],
        groups: Groups,
        fresh: Callable[[int], Rows],
    ) -> None:
        self._entries = entries
        self._loaded, self._groups, self._fresh = dict(loaded), groups, fresh
        self._join()

    @property
    def row_bytes(self) -> float:
        """Bytes of a row, in the mean."""
        return self._parts.row_bytes

    def gather(self, entries: Int64s, rows: Int64s) -> Rows:
        """One row for each pair of an entry and a row that it takes, in memory of their own.

        Args:
            entries: int64 [B], of those held; at least one.
            rows: int64 [B], which of the entry's.
        """
        try:
            return self._parts.gather(*self._places(entries, rows))
        except GoneError:  # somebody emptied the cache
            for group, found in self._loaded.items():
                if isinstance(found, Records):
                    self._loaded[group] = self._fresh(group)
            self._join()
            return self._parts.gather(*self._places(entries, rows))

    def _join(self) -> None:
        groups, parts = list(self._loaded), list(self._loaded.values())
        numbers = {group: number for number, group in enumerate(groups)}
        of_entries = self._groups.of_all(self._entries).tolist()
        self._numbers = np.array([numbers[group] for group in of_entries], np.int64)
        places = [
            self._place(entry, parts[number])
            for entry, number in zip(self._entries.tolist(), self._numbers.tolist(), strict=True)
        ]
        self._table: Int64s | None = None
        if any(place is not None for place in places):
            sizes = [len(parts[n]) for n in self._numbers.tolist()]
            full = [
                np.arange(size) if place is None else place
                for place, size in zip(places, sizes, strict=True)
            ]
            lengths = np.array([len(place) for place in full], np.int64)
            self._table, self._firsts = np.concatenate(full), np.cumsum(lengths) - lengths
        self._parts = Parts(parts)
        if not self._parts.on_disk:
            self._loaded = {}  # joined: what is not kept elsewhere is free from here on

    def _places(self, entries: Int64s, rows: Int64s) -> tuple[Int64s, Int64s]:
        """Which part each row is in, and where."""
        found = np.searchsorted(self._entries, entries)
        index = rows if self._table is None else self._table[self._firsts[found] + rows]
        return self._numbers[found], index

    def _place(self, entry: int, part: Rows | Records) -> Int64s | None:
        """Where the entry's rows are in its part; None: they are all of it."""
        whole = isinstance(part, Records)
        found = self._groups.rows(entry) if whole else self._groups.places(entry)
        return None if found is None else found.astype(np.int64)

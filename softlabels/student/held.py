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
        entries: each of those that are read of, once.
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
        groups_in_order = np.array(list(loaded), np.int64)
        self._numbers = np.argsort(groups_in_order)
        self._sorted = groups_in_order[self._numbers]
        self._known: dict[int, Int64s] | None = None
        self._parts = Parts(list(loaded.values()))

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
            self._parts = Parts(list(self._loaded.values()))
            self._known = None
            return self._parts.gather(*self._places(entries, rows))

    def _places(self, entries: Int64s, rows: Int64s) -> tuple[Int64s, Int64s]:
        """Which part each row is in, and where."""
        index = np.array(rows, np.int64)
        if self._known is None:
            found = {entry: self._place(entry) for entry in self._entries.tolist()}
            self._known = {entry: place for entry, place in found.items() if place is not None}
        if self._known:
            order = np.argsort(entries, kind="stable")
            needed, starts = np.unique(entries[order], return_index=True)
            for entry, start, stop in zip(needed, starts, [*starts[1:], len(order)], strict=True):
                if (place := self._known.get(int(entry))) is not None:
                    at = order[start:stop]
                    index[at] = place[index[at]]
        groups = self._groups.of_all(entries)
        return self._numbers[np.searchsorted(self._sorted, groups)], index

    def _place(self, entry: int) -> Int64s | None:
        """Where the entry's rows are in its part; None: they are all of it."""
        whole = isinstance(self._loaded[self._groups.of(entry)], Records)
        found = self._groups.rows(entry) if whole else self._groups.places(entry)
        return None if found is None else found.astype(np.int64)

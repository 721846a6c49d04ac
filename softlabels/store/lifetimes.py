"""From when to when each data file belonged to a table, read from the log itself.

The log is never cleaned up, so every version has its entry. An entry's own modification time, which
the store sets, says when the version was made; what a writer's clock said does not count.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from softlabels.errors import IntegrityError
from softlabels.storage import Root
from softlabels.store.closed import ranges
from softlabels.store.entries import FOLDER, LogEntry, read_entries

_ENTRY = re.compile(r"(\d{20})\.json")


@dataclass(frozen=True)
class Span:
    """Versions `first` to `last`, in each of which a file was; last None: it still is."""

    first: int
    last: int | None


@dataclass(frozen=True)
class Lifetimes:
    """What the log says of every file that was ever in the table.

    Attributes:
        version: the newest.
        spans: of each path, in order; a rollback gives a file a second one.
        replaced_at: float64 [versions], when each was replaced by the next at the latest, seconds
            since 1970; infinite for the newest.
        files: int64 [versions], how many each held.
        rows: int64 [versions], how many each held; -1 where a file has no count of its rows.
    """

    version: int
    spans: dict[str, list[Span]]
    replaced_at: npt.NDArray[np.float64]
    files: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    def within(self, path: str, versions: npt.NDArray[np.int64]) -> int | None:
        """One of `versions`, which rise, that held the file; None where none did."""
        for span in self.spans.get(path, ()):
            at = int(np.searchsorted(versions, span.first))
            last = self.version if span.last is None else span.last
            if at < len(versions) and versions[at] <= last:
                return int(versions[at])
        return None

    def holding(self, paths: Iterable[str]) -> tuple[tuple[int, int], ...]:
        """The versions that held one of these files, as ranges."""
        held = np.zeros(self.version + 1, bool)
        for path in paths:
            for span in self.spans.get(path, ()):
                held[span.first : None if span.last is None else span.last + 1] = True
        return ranges(np.flatnonzero(held).tolist())

    def files_at(self, version: int) -> set[str]:
        """The files of a version."""
        one = np.array([version], np.int64)
        return {path for path in self.spans if self.within(path, one) is not None}


def read_lifetimes(root: Root, version: int) -> Lifetimes:
    """Reads the log of the table at `root` up to `version`.

    Raises:
        IntegrityError: an entry is missing or damaged: nothing must be removed on its word.
    """
    return lifetimes_in(root, read_entries(root, range(version + 1)))


def lifetimes_in(root: Root, read: Sequence[LogEntry | None]) -> Lifetimes:
    """As `read_lifetimes`, of the log's entries from version 0 on."""
    version = len(read) - 1
    modified: dict[int, float | None] = {}
    for file in root.entries(FOLDER):
        match = _ENTRY.fullmatch(file.name)
        if match is not None and int(match[1]) <= version:
            modified[int(match[1])] = file.modified
    entries: list[LogEntry] = []
    for number, entry in enumerate(read):
        if entry is None or number not in modified:
            raise IntegrityError(
                f"table {root.uri!r}: the log entry of version {number} is missing, so that nobody "
                "can say which files older versions hold"
            )
        entries.append(entry)
    spans, files, rows = _followed(root, entries)
    times = [modified[number] for number in range(version + 1)]
    return Lifetimes(version, spans, _replaced_at(times), files, rows)


def _replaced_at(times: Sequence[float | None]) -> npt.NDArray[np.float64]:
    # A clock that went backwards makes an entry look old: it is no older than those before it.
    known = np.array([math.inf if at is None else at for at in times], np.float64)
    rising = np.maximum.accumulate(known)
    return np.append(rising[1:], math.inf)


def _rows_added(root: Root, entry: LogEntry) -> dict[str, int]:
    """Rows of each file that a commit put in, -1 where the log does not say."""
    try:
        return {
            str(add["path"]): int(json.loads(add.get("stats") or "{}").get("numRecords", -1))
            for add in entry.added
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"log entry of version {entry.version} of {root.uri!r} is damaged"
        ) from error


def _followed(
    root: Root, entries: Iterable[LogEntry]
) -> tuple[dict[str, list[Span]], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Spans of each path, and how many files and rows each version held."""
    spans: dict[str, list[Span]] = {}
    counts: dict[str, int] = {}
    sums: list[tuple[int, int]] = []
    files = rows = unknown = 0
    for entry in entries:
        version = entry.version
        for path in entry.removed:
            known = spans.get(path)
            if not known or known[-1].last is not None:
                raise IntegrityError(
                    f"version {version} of {root.uri!r} removes {path!r}, which was not there"
                )
            known[-1] = Span(known[-1].first, version - 1)
            files, rows, unknown = _moved((files, rows, unknown), -1, counts[path])
        for path, count in _rows_added(root, entry).items():
            known = spans.setdefault(path, [])
            if not known or known[-1].last is not None:
                known.append(Span(version, None))
                counts[path] = count
                files, rows, unknown = _moved((files, rows, unknown), 1, count)
        sums.append((files, -1 if unknown else rows))
    table = np.array(sums, np.int64).reshape(-1, 2)
    return spans, table[:, 0], table[:, 1]


def _moved(sums: tuple[int, int, int], sign: int, count: int) -> tuple[int, int, int]:
    files, rows, unknown = sums
    return files + sign, rows + sign * max(count, 0), unknown + sign * (count < 0)

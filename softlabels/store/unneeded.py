"""Which files of a table nobody needs: what vacuum removes, and what it keeps for whom."""

import re
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from softlabels.errors import IntegrityError, StorageError, counted
from softlabels.storage import Entry, Root
from softlabels.store import closed, files, runs, tags
from softlabels.store.closed import VacuumRecord
from softlabels.store.lifetimes import read_lifetimes
from softlabels.store.table import Table

DAY = 86_400.0

_DATA = re.compile(
    r"(?P<unit>(?P<run>[0-9a-f]{16})-(?P<number>\d{6})(?P<compacted>c?))"
    r"-[0-9a-f]{8}-[0-9a-f]{64}-[0-9a-f]{64}\.parquet"
)
_RUN = slice(len(files.FOLDER) + 1, len(files.FOLDER) + 17)
"""Where a data file's path names the run."""
_TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")
_CLAIMS = "_softlabels/claims"
_OWN = (files.FOLDER, tags.FOLDER, closed.FOLDER, "_softlabels/runs")
"""Folders in which a killed write may have left a temporary file."""


@dataclass(frozen=True)
class Keep:
    """What vacuum keeps besides the newest version, tags and open runs.

    Attributes:
        retention: seconds; versions that were the newest at some time since then.
        versions: so many of the newest.
        grace: seconds that a file may be uncommitted.
        abandoned: seconds without a sign of life (its start, a file, a claim) after which an
            unfinished run is taken for dead, at least `grace`; None: never. What is committed of
            it stays. Should it come back after all, it labels the units again whose files are gone:
            a capture commits what it has just stored, never what it finds.
    """

    retention: float = 30 * DAY
    versions: int = 1
    grace: float = DAY
    abandoned: float | None = None


@dataclass(frozen=True)
class Doomed:
    """A file to remove: path below the root, bytes, and why nobody needs it."""

    path: str
    size: int
    why: str


@dataclass(frozen=True)
class Kept:
    """Files that are kept though the newest version does not hold them: for whom, how many."""

    by: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Vacuum:
    """What a vacuum removes, or has removed.

    Attributes:
        table: its URI.
        version: the newest.
        doomed: files, by path.
        closes: first and last of each range of versions that cannot be opened afterwards.
        kept: beyond the newest version; a file of several is counted for one of them.
        notes: what the user should know, a line each.
    """

    table: str
    version: int
    doomed: tuple[Doomed, ...]
    closes: tuple[tuple[int, int], ...]
    kept: tuple[Kept, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all that is doomed."""
        return sum(one.size for one in self.doomed)


class OpenRuns:
    """Captures that are not finished: they may come back to what they stored.

    Args:
        table: at its newest version.
        without: first 16 digits of the ids of those that are taken for dead.
    """

    def __init__(self, table: Table, without: Collection[str] = ()) -> None:
        self._table = table
        found = {record.run_id[:16]: record for record in runs.open_runs(table)}
        self._runs = {run: record for run, record in found.items() if run not in without}

    def __contains__(self, run: object) -> bool:
        return run in self._runs

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def needs(self, path: str) -> bool:
        """Whether a run may still commit the file at `path`, or holds the claim there."""
        if path.startswith(f"{_CLAIMS}/"):
            return path.split("/")[-2] in self
        match = _DATA.fullmatch(path.removeprefix(f"{files.FOLDER}/"))
        record = self._runs.get(match["run"]) if match is not None else None
        if match is None or record is None or match["compacted"]:
            return False
        return not self._table.committed(f"{record.run_id}/{match['unit']}")


class Look:
    """A table looked at once: files first, then runs, tags and the newest version.

    In that order what is committed or tagged meanwhile is seen as such, or its files not at all.

    Raises:
        IntegrityError: the log, a tag or a record is damaged, or they contradict each other: then
            nobody can say what is needed.
    """

    def __init__(self, table: Table, keep: Keep, own: VacuumRecord | None = None) -> None:
        root = table.root
        self._root, self._keep = root, keep
        self._now = _store_time(root)
        found = [(f"{files.FOLDER}/{entry.name}", entry) for entry in root.entries(files.FOLDER)]
        self._data = {p: e for p, e in found if e.is_file and _DATA.fullmatch(e.name)}
        self._temporary = _temporary(root)
        self._claims = _claims(root)
        self._starts = {e.name[:16]: e for e in root.entries(runs.FOLDER) if e.is_file}
        self._tags = tags.tags_by_version(root)
        records = closed.vacuum_records(root)
        self._newest = table.latest()
        self._life = read_lifetimes(root, self._newest.version)
        others = [r for r in records if own is None or r.vacuum_id != own.vacuum_id]
        self.records = [r if r.sealed else self._seen_closed(r) for r in others]
        self._notes: list[str] = []
        self.abandoned = self._look_at_runs()
        self._check()

    def found(self) -> Vacuum:
        """What is to be removed, and what that closes."""
        doomed = [*self._replaced, *self._abandoned, *self._leftovers()]
        doomed.sort(key=lambda one: one.path)
        return Vacuum(
            table=self._root.uri,
            version=self._newest.version,
            doomed=tuple(doomed),
            closes=self.closes(doomed),
            kept=tuple(self._kept()),
            notes=tuple(self._notes),
        )

    def narrowed(self, intended: Vacuum) -> Vacuum:
        """What of `intended` is still to be removed."""
        still = {one.path for one in self.found().doomed}
        doomed = [one for one in intended.doomed if one.path in still]
        return replace(intended, doomed=tuple(doomed), closes=self.closes(doomed))

    def closes(self, doomed: Sequence[Doomed]) -> tuple[tuple[int, int], ...]:
        """The versions that held one of these files."""
        return self._life.holding(one.path for one in doomed)

    def lost(self, record: VacuumRecord) -> tuple[tuple[int, int], ...]:
        """The versions that a record closes of which a file is gone indeed."""
        gone = self._life.holding(path for path in self._life.spans if path not in self._data)
        every = (v for first, last in gone for v in range(first, last + 1))
        return closed.ranges(v for v in every if record.closes(v))

    def _seen_closed(self, record: VacuumRecord) -> VacuumRecord:
        """A record without a checksum: it may be damaged, and closes what lost files indeed."""
        return record.model_copy(update={"closed": self.lost(record)})

    def _look_at_runs(self) -> frozenset[str]:
        """Notes which unfinished runs are silent; those that are taken for dead."""
        every = OpenRuns(self._newest)
        waiting = [path[_RUN] for path in self._waiting if every.needs(path)]
        claimed = [path.split("/")[-2] for path in self._claims]
        silent = {run: self._silence(run) for run in every if run in {*waiting, *claimed}}
        limit = self._keep.abandoned
        dead = frozenset(run for run, s in silent.items() if limit is not None and s > limit)
        for run, seconds in sorted(silent.items()):
            since = f"no sign of life for {seconds / DAY:.1f} days"
            what = f"the unfinished run {run} has {since}"
            if run in dead:
                self._notes.append(f"{what} and is taken for dead: what it committed stays")
            elif run in waiting and seconds > max(self._keep.retention, self._keep.grace):
                count = counted(waiting.count(run), "file")
                self._notes.append(f"{what}; uncommitted, kept for it: {count}")
        self._open = OpenRuns(self._newest, dead)
        return dead

    def _silence(self, run: str) -> float:
        """Seconds since the youngest of a run's start, files and claims."""
        files = [entry for path, entry in self._data.items() if path[_RUN] == run]
        claims = [e for path, e in self._claims.items() if path.split("/")[-2] == run]
        start = [self._starts[run]] if run in self._starts else []
        return min((self.age(entry) for entry in (*files, *claims, *start)), default=0.0)

    def age(self, entry: Entry) -> float:
        """Seconds since it was written; 0 where the store does not say."""
        return 0.0 if entry.modified is None else self._now - entry.modified

    @cached_property
    def _by(self) -> dict[int, str]:
        """What keeps each version that is kept."""
        newest, recent = self._life.version, self._now - self._keep.retention
        young = np.flatnonzero(self._life.replaced_at > recent)
        # None at all, also where the store's clock is ahead of this machine's.
        young = young if self._keep.retention else young[:0]
        found = dict.fromkeys(young.tolist(), "versions within the retention")
        for version in range(max(0, newest + 1 - self._keep.versions), newest):
            found.setdefault(version, f"the newest {self._keep.versions} versions")
        # What an earlier vacuum closed, also one that was killed, needs its files no more.
        found = {v: by for v, by in found.items() if not any(r.closes(v) for r in self.records)}
        for version, named in self._tags.items():
            names = ", ".join(tag.name for tag in named)
            # One that was killed may have been about to spare a version that was tagged meanwhile.
            if not self._was_closed(version):
                found[version] = f"version {version}, tag{'s' if len(named) > 1 else ''} {names}"
        return found | {newest: "the newest version"}

    @cached_property
    def _versions(self) -> npt.NDArray[np.int64]:
        return np.array(sorted(self._by), np.int64)

    def _check(self) -> None:
        newest = {file.path for file in self._newest.files}
        if self._life.files_at(self._life.version) != newest:
            raise IntegrityError(
                f"table {self._root.uri!r}: the log's entries give other files for version "
                f"{self._newest.version} than its checkpoint"
            )
        for version, named in self._tags.items():
            names = ", ".join(repr(tag.name) for tag in named)
            if self._was_closed(version):
                self._notes.append(f"version {version} of tag {names} was vacuumed before")
                continue
            digest = self._newest.at(version).snapshot_digest
            if any(tag.snapshot_digest != digest for tag in named):
                raise IntegrityError(
                    f"tag {names} of {self._root.uri!r} was made for another snapshot than "
                    f"version {version} is"
                )
        for record in self.records:
            if record.ended_at is None:
                self._notes.append(f"the vacuum that began at {record.began_at} has not ended")

    def _was_closed(self, version: int) -> bool:
        return any(r.closes(version) for r in self.records if r.ended_at is not None)

    @cached_property
    def _replaced(self) -> list[Doomed]:
        """Committed files that only versions hold which are not kept."""
        doomed = []
        for path, entry in self._data.items():
            spans = self._life.spans.get(path)
            if spans is None or self._life.within(path, self._versions) is not None:
                continue
            held = self._life.holding([path])
            why = f"only in {', '.join(closed.span_name(*span) for span in held)}"
            doomed.append(Doomed(path, entry.size, why))
        return doomed

    @cached_property
    def _waiting(self) -> dict[str, Entry]:
        return {path: e for path, e in self._data.items() if path not in self._life.spans}

    @cached_property
    def _abandoned(self) -> list[Doomed]:
        """Files that were stored and never committed, and will not be."""
        youngest: dict[str, float] = {}
        for path, entry in self._waiting.items():
            run = path[_RUN]
            youngest[run] = min(youngest.get(run, np.inf), self.age(entry))
        doomed = []
        for path, entry in self._waiting.items():
            # Whoever stores many files and commits them at last is alive while one is young.
            if youngest[path[_RUN]] <= self._keep.grace or self._open.needs(path):
                continue
            days = self.age(entry) / DAY
            doomed.append(Doomed(path, entry.size, f"stored {days:.1f} days ago, never committed"))
        return doomed

    def _leftovers(self) -> Iterator[Doomed]:
        for path, entry in self._temporary.items():
            if self.age(entry) > self._keep.grace:
                yield Doomed(path, entry.size, "temporary, of a write that was stopped")
        for path, entry in self._claims.items():
            if self.age(entry) > self._keep.grace and not self._open.needs(path):
                yield Doomed(path, entry.size, "a claim of a run that is finished")

    def _kept(self) -> Iterator[Kept]:
        newest = {file.path for file in self._newest.files}
        tagged = np.array(sorted(self._tags.keys() & self._by.keys()), np.int64)
        sums: dict[str, list[int]] = {}
        for path, entry in self._data.items():
            if path in newest or path in self._waiting:
                continue
            version = self._life.within(path, tagged)
            version = self._life.within(path, self._versions) if version is None else version
            if version is not None:
                sums.setdefault(self._by[version], []).append(entry.size)
        doomed = {one.path for one in self._abandoned}
        waiting = [entry.size for path, entry in self._waiting.items() if path not in doomed]
        if waiting:
            sums["captures and other writers that have yet to commit them"] = waiting
        for by, sizes in sorted(sums.items()):
            yield Kept(by, len(sizes), sum(sizes))


def _temporary(root: Root) -> dict[str, Entry]:
    every = [(f"{folder}/{entry.name}", entry) for folder in _OWN for entry in root.entries(folder)]
    return {p: e for p, e in every if e.is_file and _TEMPORARY.fullmatch(e.name)}


def _claims(root: Root) -> dict[str, Entry]:
    return {
        f"{_CLAIMS}/{run.name}/{entry.name}": entry
        for run in root.entries(_CLAIMS)
        if not run.is_file
        for entry in root.entries(f"{_CLAIMS}/{run.name}")
        if entry.is_file
    }


def _store_time(root: Root) -> float:
    """What time the store says it is, seconds since 1970; this machine's where that is earlier.

    Too early an answer only keeps a file longer.
    """
    probe = f"probe.{uuid.uuid4().hex[:8]}.tmp"
    found = None
    try:
        root.write(f"{closed.FOLDER}/{probe}", b"what time is it?")
        found = next((e.modified for e in root.entries(closed.FOLDER) if e.name == probe), None)
        root.delete(f"{closed.FOLDER}/{probe}")
    except StorageError:
        pass  # a dry run where nothing may be written; deleting will say so itself
    return time.time() if found is None else min(found, time.time())

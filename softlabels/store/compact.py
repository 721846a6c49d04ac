"""Compact: neighbouring small files become large ones; the same rows in the same order.

A table's order is that of its files' paths. So a new file takes in files that stand side by side
and has the name of the first, which keeps it between the same neighbours. Files of a capture that
is not finished are left alone: units that are still to come belong between them.

One file is in memory at a time. All of them make one version; where more than `COMMIT_BYTES` are
written, several, so that a stop or a lost race costs no more than that.
"""

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from softlabels.errors import BadInputError, MismatchError, TryAgainError
from softlabels.fingerprint import sha256_json
from softlabels.lineage import ChangeLineage
from softlabels.signals import stop_on_signal
from softlabels.store.ahead import work_ahead
from softlabels.store.files import UnitShard
from softlabels.store.rewriting import (
    Rewritten,
    Staging,
    open_checked,
    read_checked,
    row_groups,
)
from softlabels.store.runs import open_runs
from softlabels.store.shards import Shard, bytes_by_column
from softlabels.store.table import Table, TableFile

TARGET_BYTES = 128 * 10**6
MOST_TARGET_BYTES = 2 * 10**9
"""A new file is held in memory."""

COMMIT_BYTES = 8 * 10**9
READ_AHEAD_BYTES = 32 * 2**20
ATTEMPTS = 5
"""Times that it is planned again because the table was changed meanwhile."""


@dataclass
class Compaction:
    """What a compaction does, or did.

    Attributes:
        table: its URI.
        from_version: the newest version before.
        version: the newest now.
        rows: of it.
        files: of `from_version`.
        taken: small files that go; `taken_bytes` of them.
        made: files in their place, `made_bytes` of them; before it is done, about.
        found: of these, how many an earlier attempt had stored.
        open_files: small files that are left alone, for their capture is not finished.
        seconds: time it took.
    """

    table: str
    from_version: int
    version: int
    rows: int
    files: int
    taken: int = 0
    taken_bytes: int = 0
    made: int = 0
    made_bytes: int = 0
    found: int = 0
    open_files: int = 0
    seconds: float = 0.0


@dataclass
class Watching:
    """Callbacks that show how far it is: bytes there are to read, more were read."""

    planned: Callable[[int], None] = lambda size: None
    done: Callable[[int], None] = lambda size: None


def plan_compaction(table: Table, target: int = TARGET_BYTES) -> Compaction:
    """What `compact` would do now; nothing is.

    Raises:
        BadInputError: `target` cannot be meant.
    """
    newest, sequences, report = _planned(table, target)
    report.version = newest.version
    for sequence in sequences:
        size = sum(file.size for file in sequence)
        report.taken += len(sequence)
        report.taken_bytes += size
        report.made += -(-size // target)
        report.made_bytes += size
    return report


def compact(
    table: Table, target: int = TARGET_BYTES, watching: Watching | None = None
) -> Compaction:
    """Makes large files of neighbouring small ones, as a new version.

    Called again it does nothing; after a stop it goes on.

    Args:
        table: any version; the newest is compacted.
        target: bytes that a new file comes near and files of half of which are let be.
        watching: told how far it is.

    Raises:
        BadInputError: `target` cannot be meant.
        IntegrityError: a file is not as it was committed.
        MismatchError: others change the same files all the time.
        TryAgainError: it was told to stop, or storage does not answer.
    """
    began = time.monotonic()
    watching = watching or Watching()
    report: Compaction | None = None
    with stop_on_signal() as stopped:
        for attempt in range(ATTEMPTS):
            newest, sequences, planned = _planned(table, target)
            report = report or planned
            report.version, report.rows = newest.version, newest.num_rows
            report.open_files = planned.open_files
            if not sequences:
                break
            watching.planned(sum(file.size for sequence in sequences for file in sequence))
            try:
                _Job(newest, target, watching, stopped, report).run(sequences)
                break
            except MismatchError:
                if attempt == ATTEMPTS - 1:
                    raise
    assert report is not None
    report.seconds = round(time.monotonic() - began, 3)
    return report


def _planned(table: Table, target: int) -> tuple[Table, list[list[TableFile]], Compaction]:
    """The newest version and its sequences of neighbours that may become one file or several."""
    if not 1 <= target <= MOST_TARGET_BYTES:
        raise BadInputError(f"target size {target!r}: expected 1 to {MOST_TARGET_BYTES} bytes")
    newest = table.latest()
    unfinished = {record.run_id[:16] for record in open_runs(newest)}
    report = Compaction(
        newest.root.uri, newest.version, newest.version, newest.num_rows, len(newest.files)
    )
    sequences: list[list[TableFile]] = [[]]
    for file in newest.files:
        small = 2 * file.size < target
        is_open = file.unit[:16] in unfinished
        report.open_files += small and is_open
        if small and not is_open:
            sequences[-1].append(file)
        elif sequences[-1]:
            sequences.append([])
    return newest, [sequence for sequence in sequences if len(sequence) > 1], report


@dataclass
class _Made:
    """A new file, stored, and those whose rows it holds."""

    files: Sequence[TableFile]
    unit: UnitShard
    sha256: str


@dataclass
class _Job:
    """A compaction of one version on its way."""

    table: Table
    target: int
    watching: Watching
    stopped: Callable[[], bool]
    report: Compaction
    _ready: list[_Made] = field(default_factory=list)

    def run(self, sequences: Sequence[Sequence[TableFile]]) -> None:
        """Writes and commits."""
        began, clock = datetime.now(UTC), time.monotonic()
        staging = Staging(self.table, "")
        for sequence in sequences:
            for files, unit, shard in self._outputs(sequence):
                before = staging.found
                self._ready.append(_Made(files, staging.store(unit, shard), shard.sha256))
                self.report.found += staging.found - before
                if sum(made.unit.size for made in self._ready) >= COMMIT_BYTES:
                    self._commit(began, clock)
                    began, clock = datetime.now(UTC), time.monotonic()
        self._commit(began, clock)

    def _outputs(
        self, sequence: Sequence[TableFile]
    ) -> Iterator[tuple[list[TableFile], str, Shard]]:
        """The files that come in the place of a sequence; one that would stay alone does not."""
        taken: list[TableFile] = []
        rewritten: Rewritten | None = None
        stored = 0
        reading = partial(read_checked, self.table.root)
        ahead = work_ahead(sequence, reading, lambda file: file.size, READ_AHEAD_BYTES)
        for file, data in ahead:
            if self.stopped():
                raise TryAgainError(
                    f"stopped by a signal: {self.report.made} files were made, the rest of the "
                    "table is as it was; run the same command to go on"
                )
            # Of tiny files most is footer: what their columns take is nearer the truth. Two always
            # fit, both are smaller than half. Otherwise nothing might ever be done.
            size = min(rewritten.size, stored) + file.size if rewritten else 0
            if rewritten and len(taken) > 1 and size > self.target:
                yield taken, _unit(taken), rewritten.close()
                taken, rewritten, stored = [], None, 0
            opened = open_checked(self.table, file, data)
            taken.append(file)
            stored += sum(bytes_by_column(opened).values())
            if rewritten is None:
                rewritten = Rewritten(self.table, _unit(taken), {"softlabels.rows": "compacted"})
            for batch in row_groups(opened, file):
                rewritten.add(batch)
            self.watching.done(file.size)
        if rewritten and len(taken) > 1:
            yield taken, _unit(taken), rewritten.close()

    def _commit(self, began: datetime, clock: float) -> None:
        """Puts what is ready in the place of what it was made of."""
        if not self._ready:
            return
        removed = [file for made in self._ready for file in made.files]
        added = [made.unit for made in self._ready]
        newest = self.table.latest()
        says: dict[str, Any] = {
            "target_size": self.target,
            "files_before": len(removed),
            "files_after": len(added),
            "bytes_before": sum(file.size for file in removed),
            "bytes_after": sum(unit.size for unit in added),
        }
        lineage = ChangeLineage(
            operation="compact",
            change_id=sha256_json(
                {
                    "operation": "compact",
                    "from_version": self.table.version,
                    "taken": [file.path for file in removed],
                    "made": [made.sha256 for made in self._ready],
                }
            ),
            from_version=newest.version,
            arguments=says,
            rows_before=newest.num_rows,
            rows_after=newest.num_rows,
            packages={n: importlib.metadata.version(n) for n in ("softlabels", "pyarrow")},
            started_at=began.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 3),
        )
        made = newest.change(added, removed, lineage, guard=self._require_order)
        report = self.report
        report.version, report.rows = made.version, made.num_rows
        report.taken += len(removed)
        report.taken_bytes += says["bytes_before"]
        report.made += len(added)
        report.made_bytes += says["bytes_after"]
        self._ready = []

    def _require_order(self, newest: Table) -> None:
        """Raises MismatchError where a file was added between those that become one."""
        place = {file.path: number for number, file in enumerate(newest.files)}
        for made in self._ready:
            places = [place.get(file.path, -1) for file in made.files]
            if places != list(range(places[0], places[0] + len(places))) or places[0] < 0:
                raise MismatchError(
                    f"table {newest.root.uri!r} was changed while it was compacted: run it again"
                )


def _unit(taken: Sequence[TableFile]) -> str:
    """The name of a file that begins with the rows of the first: it keeps its place by it."""
    return f"{taken[0].unit.removesuffix('c')}c"

"""A worker: labels units of a run one after the other, each committed before the next."""

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from softlabels.errors import TryAgainError
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.teacher.elsewhere import Elsewhere
from softlabels.teacher.labeller import Labeller
from softlabels.teacher.run import Scan, Unit


@dataclass
class Progress:
    """Callbacks that show how far a capture is; each does nothing by default.

    Attributes:
        scanned: more source rows were looked at while planning.
        planned: rows that are left to look at in this call.
        done: more rows were labelled or passed over; bytes a row of the last shard, 0 before one.
        committed: a unit of this call is in the table: its name, and a version that has it.
        waiting: so many units are left and others are at all of them; called again and again.
        reported: what is known so far; called when it begins, after each unit and while waiting.
    """

    scanned: Callable[[int], None] = lambda rows: None
    planned: Callable[[int], None] = lambda rows: None
    done: Callable[[int, float], None] = lambda rows, bytes_per_row: None
    committed: Callable[[str, int], None] = lambda unit, version: None
    waiting: Callable[[int], None] = lambda units: None
    reported: Callable[["Report"], None] = lambda report: None


@dataclass
class Report:
    """What a call of `capture` did.

    Attributes:
        table: URI of the table.
        version: of the table now.
        run_id: of the run.
        rows: rows that this call labelled.
        already: rows of this source that the table held before.
        repeated: source rows whose example came before in the source; None when not looked at.
        relabelled: how many of these carry another hard label than the first.
        deleted: rows that were left out because they were deleted from the table before.
        missing: rows that this run committed and the newest version does not have.
        units: units of the run.
        committed: units that this call committed.
        left: units that nobody has committed yet: other workers are at them, or will be.
        bytes: of the files that this call committed.
        seconds: time it took.
        skipped: what of the source is no row of it, by reason: empty texts, broken records.
    """

    table: str
    version: int
    run_id: str
    rows: int = 0
    already: int = 0
    repeated: int | None = None
    relabelled: int | None = None
    deleted: int = 0
    missing: int = 0
    units: int = 0
    committed: int = 0
    left: int = 0
    bytes: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)


class _Overtaken(Exception):
    """Another run labelled some of a unit's examples while the teacher was at them."""


class Worker:
    """A teacher at one run and its table.

    Attributes:
        table: at the newest version that it has seen.
    """

    def __init__(
        self,
        labeller: Labeller,
        table: Table,
        found: Scan,
        progress: Progress,
        report: Report,
        stopped: Callable[[], bool],
    ) -> None:
        self.table = table
        self._labeller = labeller
        self._found = found
        self._progress = progress
        self._report = report
        self._stopped = stopped
        self._bytes_per_row = 0.0
        self._open = frozenset(unit.key for unit in labeller.run.units)
        self._elsewhere = Elsewhere(labeller.run.id, found.keys, found.examples)
        self._elsewhere.learn(table)

    def left(self, units: Iterable[Unit]) -> list[Unit]:
        """Those of `units` that are not in the newest version's log."""
        self.table = self.table.latest()
        self._report.version = self.table.version
        return [unit for unit in units if not self.table.committed(unit.key)]

    def label(self, unit: Unit) -> None:
        """Labels and commits one unit, again where another run was quicker with some of it.

        Raises:
            TryAgainError: it was told to stop, or storage does not answer.
        """
        while self.left([unit]):
            if self._attempt(unit):
                return
        # Another process at the same run has done it since this one looked.
        self.pass_over([unit])

    def pass_over(self, units: Iterable[Unit]) -> None:
        """Counts units that others have done."""
        rows = sum(unit.stop - unit.start for unit in units)
        self._progress.done(rows, self._bytes_per_row)

    def wait(self, seconds: float, units: int) -> None:
        """Waits about so long for others, who are at the `units` that are left.

        Raises:
            TryAgainError: it was told to stop.
        """
        self._progress.waiting(units)
        self._progress.reported(self._report)
        until = time.monotonic() + random.uniform(seconds / 2, seconds)
        while (rest := until - time.monotonic()) > 0:
            self._stop_if_told()
            time.sleep(min(rest, 0.2))

    def _attempt(self, unit: Unit) -> bool:
        self._elsewhere.learn_files(self.table)  # what was deleted meanwhile, the guard sees
        keep, already, deleted = self._wanted(unit)
        started_at, began = _now(), time.monotonic()
        shard = self._shard(unit, keep)
        stored = self.table.store_shard(unit.key, unit.name, shard)
        seconds = time.monotonic() - began
        lineage = self._labeller.lineage([unit], shard.num_rows, started_at, seconds)

        tries = 0

        def guard(newest: Table) -> None:
            nonlocal tries
            self._elsewhere.learn(newest)
            if self._elsewhere.of(unit)[keep].any():
                raise _Overtaken
            tries += 1

        before = self.table
        try:
            self.table = before.commit([stored], lineage, guard)
        except _Overtaken:
            # A commit whose reply never came may yet arrive at the store: then vacuum decides.
            if stored.path is not None and not tries:
                self.table.root.delete(stored.path)
            return False
        report = self._report
        report.version = self.table.version
        self._open = self.table.uncommitted(self._open)
        report.left = len(self._open)
        new = self.table.files_since(before)
        if stored.path is None or any(file.path == stored.path for file in new):
            report.committed += 1
            report.rows += shard.num_rows
            report.bytes += stored.size
            report.already += already
            report.deleted += deleted
            self._progress.committed(unit.name, self.table.version)
        self._progress.reported(report)
        return True

    def _shard(self, unit: Unit, keep: npt.NDArray[np.bool_]) -> shards.Shard:
        writer = self._labeller.writer(unit)
        self._progress.done(int((~keep).sum()), self._bytes_per_row)

        def advance(rows: int) -> None:
            self._progress.done(rows, self._bytes_per_row)
            self._stop_if_told()

        for batch in self._labeller.label(unit, keep, advance):
            writer.write(batch)
        shard = writer.close()
        self._bytes_per_row = len(shard.data) / max(shard.num_rows, 1)
        return shard

    def _wanted(self, unit: Unit) -> tuple[npt.NDArray[np.bool_], int, int]:
        """Rows to label; how many others the table has; how many were deleted from it."""
        part = slice(unit.start, unit.stop)
        first = np.ones(unit.stop - unit.start, bool)
        repeated = self._found.repeated
        inside = repeated[(repeated >= unit.start) & (repeated < unit.stop)]
        first[inside - unit.start] = False
        deleted = first & self._elsewhere.deleted[part]
        here = first & self._elsewhere.here[part] & ~deleted
        return first & ~here & ~deleted, int(here.sum()), int(deleted.sum())

    def _stop_if_told(self) -> None:
        if self._stopped():
            raise TryAgainError(
                f"stopped by a signal: {self._report.committed} units were committed, "
                "run the same command to go on"
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Capture: a teacher labels a source once, unit by unit, into a table."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from softlabels.errors import TryAgainError
from softlabels.signals import stop_on_signal
from softlabels.store import shards
from softlabels.store.inspect import row_keys
from softlabels.store.table import Table
from softlabels.teacher.labeller import Labeller
from softlabels.teacher.models import torch_threads
from softlabels.teacher.recorded.spec import ImportSpec
from softlabels.teacher.run import Keys, Scan, Spec, Unit, prepare, scan
from softlabels.teacher.spec import CaptureSpec, SequenceCaptureSpec

__all__ = ["CaptureSpec", "Progress", "Report", "SequenceCaptureSpec", "capture"]


@dataclass
class Progress:
    """Callbacks that show how far a capture is; each does nothing by default.

    Attributes:
        scanned: more source rows were looked at while planning.
        planned: rows that are left to look at in this call.
        done: more rows were labelled or passed over; bytes a row of the last shard, 0 before one.
    """

    scanned: Callable[[int], None] = lambda rows: None
    planned: Callable[[int], None] = lambda rows: None
    done: Callable[[int, float], None] = lambda rows, bytes_per_row: None


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
        units: units of the run.
        committed: units that this call committed.
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
    units: int = 0
    committed: int = 0
    seconds: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)


def capture(spec: Spec, progress: Progress | None = None) -> Report:
    """Labels what is not labelled yet and commits it unit by unit.

    The same call again goes on where the last one stopped, however it stopped; when nothing is
    left it does nothing. SIGTERM and SIGINT end it after the forward pass in hand.

    Raises:
        SoftLabelsError: whatever is wrong, before the teacher runs where that can be known.
        TryAgainError: it was told to stop; the same call goes on.
    """
    began = time.monotonic()
    progress = progress or Progress()
    threads = None if isinstance(spec, ImportSpec) else spec.threads
    with torch_threads(threads), stop_on_signal() as stopped:
        planning = _planning(progress, stopped)
        run, annotator = prepare(spec, planning)
        labeller = Labeller(run, annotator)
        table = labeller.table()
        todo = [unit for unit in run.units if table is None or not table.committed(unit.key)]
        found = scan(run, planning) if todo else None
        if table is None:
            # A spec that fails at once must not leave a table that its correction does not fit.
            labeller.rehearse(annotator.rehearsal)
            table = Table.open_or_create(spec.table, labeller.schema, run.contents)
        report = Report(table.root.uri, table.version, run.id, units=len(run.units))
        report.skipped = dict(run.source.skipped)
        report.already = sum(f.num_rows for f in table.files if f.unit.startswith(run.id[:16]))
        if found is not None:
            report.repeated, report.relabelled = len(found.repeated), found.relabelled
            progress.planned(sum(unit.stop - unit.start for unit in todo))
            worker = _Worker(labeller, table, found, progress, report)
            for unit in todo:
                worker.label(unit, stopped)
            report.version = worker.table.version
    report.seconds = round(time.monotonic() - began, 3)
    return report


def _planning(progress: Progress, stopped: Callable[[], bool]) -> Callable[[int], None]:
    def scanned(rows: int) -> None:
        progress.scanned(rows)
        if stopped():
            raise TryAgainError("stopped by a signal while planning: run the same command to go on")

    return scanned


class _Overtaken(Exception):
    """Another run labelled some of a unit's examples while the teacher was at them."""


class _Worker:
    def __init__(
        self, labeller: Labeller, table: Table, found: Scan, progress: Progress, report: Report
    ) -> None:
        self.table = table
        self._labeller = labeller
        self._found = found
        self._progress = progress
        self._report = report
        self._elsewhere: Keys = np.zeros(0, np.uint64)
        self._looked_at: set[str] = set()
        self._bytes_per_row = 0.0
        self._learn(table)

    def label(self, unit: Unit, stopped: Callable[[], bool]) -> None:
        """Labels and commits one unit, again where another run was quicker with some of it."""
        # Another process at the same run may have done it since this one began.
        while not self.table.committed(unit.key) and not self._attempt(unit, stopped):
            pass

    def _attempt(self, unit: Unit, stopped: Callable[[], bool]) -> bool:
        keep, already = self._wanted(unit)
        started_at, began = _now(), time.monotonic()
        shard = self._shard(unit, keep, stopped)
        stored = self.table.store_shard(unit.key, unit.name, shard)
        seconds = time.monotonic() - began
        lineage = self._labeller.lineage([unit], shard.num_rows, started_at, seconds)
        keys = self._found.keys[unit.start : unit.stop][keep]
        try:
            self.table = self.table.commit([stored], lineage, lambda now: self._guard(now, keys))
        except _Overtaken:
            if stored.path is not None:
                self.table.root.delete(stored.path)
            return False
        if stored.path is None or any(file.path == stored.path for file in self.table.files):
            self._report.committed += 1
            self._report.rows += shard.num_rows
            self._report.already += already
        return True

    def _shard(
        self, unit: Unit, keep: npt.NDArray[np.bool_], stopped: Callable[[], bool]
    ) -> shards.Shard:
        writer = self._labeller.writer(unit)
        self._progress.done(int((~keep).sum()), self._bytes_per_row)

        def advance(rows: int) -> None:
            self._progress.done(rows, self._bytes_per_row)
            if stopped():
                raise TryAgainError(
                    f"stopped by a signal: {self._report.committed} units were committed, "
                    "run the same command to go on"
                )

        for batch in self._labeller.label(unit, keep, advance):
            writer.write(batch)
        shard = writer.close()
        self._bytes_per_row = len(shard.data) / max(shard.num_rows, 1)
        return shard

    def _wanted(self, unit: Unit) -> tuple[npt.NDArray[np.bool_], int]:
        keep = np.ones(unit.stop - unit.start, bool)
        repeated = self._found.repeated
        inside = repeated[(repeated >= unit.start) & (repeated < unit.stop)]
        keep[inside - unit.start] = False
        here = np.isin(self._found.keys[unit.start : unit.stop], self._elsewhere)
        return keep & ~here, int((keep & here).sum())

    def _guard(self, newest: Table, keys: Keys) -> None:
        self._learn(newest)
        if np.isin(keys, self._elsewhere).any():
            raise _Overtaken

    def _learn(self, table: Table) -> None:
        # Rows of other runs: this run's own are told apart by their units' keys.
        new = [
            file
            for file in table.files
            if file.path not in self._looked_at
            and not file.unit.startswith(self._labeller.run.id[:16])
        ]
        keys = [row_keys(batch) for batch in table.batches(["example_id", "view"], new)]
        self._elsewhere = np.concatenate([self._elsewhere, *keys])
        self._looked_at |= {file.path for file in new}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

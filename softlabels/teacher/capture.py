"""Capture: a teacher labels a source once, unit by unit, into a table."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np

from softlabels.errors import MismatchError, TryAgainError
from softlabels.signals import stop_on_signal
from softlabels.store import claims
from softlabels.store.deleted import deleted_keys
from softlabels.store.inspect import row_keys
from softlabels.store.runs import RunRecord, record_run
from softlabels.store.table import Table
from softlabels.teacher.labeller import Labeller
from softlabels.teacher.models import torch_threads
from softlabels.teacher.recorded.spec import ImportSpec
from softlabels.teacher.run import Run, Scan, Spec, Unit, prepare, scan
from softlabels.teacher.sharing import Sharing
from softlabels.teacher.spec import CaptureSpec, SequenceCaptureSpec
from softlabels.teacher.worker import Progress, Report, Worker

__all__ = ["CaptureSpec", "Progress", "Report", "SequenceCaptureSpec", "Sharing", "capture"]


def capture(spec: Spec, progress: Progress | None = None, sharing: Sharing | None = None) -> Report:
    """Labels what is not labelled yet and commits it unit by unit.

    The same call again goes on where the last one stopped, however it stopped; when nothing is
    left it does nothing. SIGTERM and SIGINT end it after the forward pass in hand. Any number of
    calls may run at once, on any machines.

    Args:
        spec: of any kind.
        progress: told how far it is.
        sharing: which units are this call's; by default all, in order.

    Raises:
        SoftLabelsError: whatever is wrong, before the teacher runs where that can be known.
        MismatchError: a rollback took out rows that the run has committed; they do not come back.
        TryAgainError: it was told to stop; the same call goes on.
    """
    began = time.monotonic()
    progress, sharing = progress or Progress(), sharing or Sharing()
    threads = None if isinstance(spec, ImportSpec) else spec.threads
    with torch_threads(threads), stop_on_signal() as stopped:
        planning = _planning(progress, stopped)
        run, annotator = prepare(spec, planning)
        labeller = Labeller(run, annotator)
        table = labeller.table()
        left = [unit for unit in run.units if table is None or not table.committed(unit.key)]
        mine = set(sharing.mine(run.units))
        todo = [unit for unit in left if unit in mine]
        found = scan(run, planning) if todo else None
        if table is None:
            # A spec that fails at once must not leave a table that its correction does not fit.
            labeller.rehearse(annotator.rehearsal)
            table = Table.open_or_create(spec.table, labeller.schema, run.contents)
        report = Report(table.root.uri, table.version, run.id, units=len(run.units))
        report.left = len(left)
        report.skipped = dict(run.source.skipped)
        report.already = _already(run, table)
        if found is not None:
            report.repeated, report.relabelled = len(found.repeated), found.relabelled
        try:
            progress.reported(report)
            if left:
                _record(labeller, table)
            if found is not None:
                progress.planned(sum(unit.stop - unit.start for unit in todo))
                worker = Worker(labeller, table, found, progress, report, stopped)
                sharing.work(worker, todo, run.id)
                table = worker.table
            report.left = sum(not table.committed(unit.key) for unit in left)
            claims.sweep(table.root, run.id[:16], lambda unit: table.committed(f"{run.id}/{unit}"))
            _look_for_missing(run, table, left, found, report, planning)
        finally:
            report.seconds = round(time.monotonic() - began, 3)
            progress.reported(report)
    return report


def _planning(progress: Progress, stopped: Callable[[], bool]) -> Callable[[int], None]:
    def scanned(rows: int) -> None:
        progress.scanned(rows)
        if stopped():
            raise TryAgainError("stopped by a signal while planning: run the same command to go on")

    return scanned


def _record(labeller: Labeller, table: Table) -> None:
    """Says what the run sets out to do, so that others know whether it is finished."""
    run = labeller.run
    said = labeller.lineage([], 0, "", 0.0)
    record_run(
        table.root,
        RunRecord(
            run_id=run.id,
            units=len(run.units),
            rows=run.source.num_rows,
            spec=said.spec,
            source=said.source,
            started_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        ),
    )


def _already(run: Run, table: Table) -> int:
    """Rows that this run has put into the table and that are there."""
    rows = sum(int(f.num_rows) for f in table.files if table.committed(f"{run.id}/{f.unit}"))
    if not any(file.compacted for file in table.files):
        return rows
    # Which rows of a compacted file are of which unit nobody knows; what was deleted of them,
    # `_look_for_missing` takes off.
    gone = {unit.name for unit in _without_file(run, table)}
    done = (commit["run"] for commit in table.history() if gone)
    mine = (one for one in done if one is not None and one.run_id == run.id)
    rows += sum(
        int(one.num_rows)
        for one in mine
        if gone.issuperset(u.rpartition("/")[2] for u in one.units)
    )
    return rows


def _without_file(run: Run, table: Table) -> list[Unit]:
    """Committed units that had no rows, are in a compacted file, or went from the table."""
    files = {file.unit for file in table.files}
    return [u for u in run.units if u.name not in files and table.committed(u.key)]


def _look_for_missing(
    run: Run,
    table: Table,
    left: Sequence[Unit],
    found: Scan | None,
    report: Report,
    advance: Callable[[int], None],
) -> None:
    """Compares what the run has committed with what the newest version has.

    Units are committed once and for all. Where a rollback has taken their rows out, the table does
    not have what the run was asked for, and this command will never mend it. Rows that were deleted
    for good are meant to be gone.

    Args:
        run: the run.
        table: at the newest version.
        left: units that were not committed before this call.
        found: in the source, where it was looked at.
        report: gets the number of missing rows.
        advance: told how many more rows of the source were looked at.
    """
    gone = _without_file(run, table)
    changes = _changes(run, table) if gone else []
    if not changes:
        return
    found = scan(run, advance) if found is None else found
    lacking = np.zeros(len(found.keys), bool)
    for unit in gone:
        lacking[unit.start : unit.stop] = True
    lacking[found.repeated] = False
    for batch in table.batches(["example_id", "view"]):
        lacking &= ~np.isin(found.keys, row_keys(batch))
    deleted = lacking & np.isin(found.examples, deleted_keys(table.root))
    report.missing = int((lacking & ~deleted).sum())
    if any(file.compacted for file in table.files):
        for unit in left:
            deleted[unit.start : unit.stop] = False
        report.already -= int(deleted.sum())
    if report.missing:
        raise MismatchError(
            f"{report.missing} rows of this run's committed units are not in version "
            f"{table.version} of {report.table!r} (newest first: {', '.join(changes[:3])}); "
            "committed units are not labelled again: roll back to a version that has these rows, "
            "or give another shard_rows, which makes a new run of what is absent"
        )


def _changes(run: Run, table: Table) -> list[str]:
    """What has taken rows out since the run began, newest first."""
    found, first = [], table.version
    for commit in table.history():
        change, done = commit["change"], commit["run"]
        if change is not None and change.operation in ("delete", "rollback"):
            found.append((commit["version"], change.operation))
        if done is not None and done.run_id == run.id:
            first = commit["version"]
    return [f"{what} at version {version}" for version, what in found if version > first]

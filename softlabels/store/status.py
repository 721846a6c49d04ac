"""How far the runs of a table are, and who is at them: read from storage alone, without a teacher.

Times are those that the store gave its objects, all by one clock, whatever the workers' clocks say.
How long ago something was is this machine's clock against the store's.
"""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from softlabels.lineage import RunLineage
from softlabels.store import claims, entries, files
from softlabels.store.log import kind_of
from softlabels.store.runs import RunRecord, run_records
from softlabels.store.table import Table

CLOCK = "this machine's, against the times that the store gave its objects"

_WINDOW = 20
"""Commits that the rate is taken from."""
_PAUSE = 10
"""A gap so many times the median one is a pause: what was before it says nothing of the rate."""


@dataclass(frozen=True)
class Beat:
    """A worker that holds a claim.

    Attributes:
        unit: that it is at.
        worker: its random id.
        name: host and process.
        beats: how often it has written the claim.
        seconds_ago: when it did so last; None where the store gives no times.
        dead: whether it has missed so many beats that others may take the unit over.
    """

    unit: str
    worker: str | None
    name: str | None
    beats: int | None
    seconds_ago: float | None
    dead: bool


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
        run_id: of it.
        kind: "capture" or "import".
        teacher: what people call it.
        started_at: UTC, ISO 8601, by the clock of whoever began it; None where nobody wrote it.
        units: how many it has; None where nobody wrote it.
        done: how many are committed.
        finished: whether all are; None where `units` is.
        rows: that it has put into the table.
        source_rows: that it looks at.
        version: that its last commit made; None before the first.
        committed_at: when that was, UTC, ISO 8601.
        seconds_ago: the same.
        rows_per_s: of its last commits, all workers together; None where too few tell.
        seconds_left: for what is left at the speed of its last commits.
        workers: that hold claims. Those that work by shard, or alone, hold none.
        staged_files: files stored of units that are not committed: work in hand, or left behind.
        staged_bytes: of these.
    """

    run_id: str
    kind: str
    teacher: str
    started_at: str | None
    units: int | None
    done: int
    finished: bool | None
    rows: int
    source_rows: int | None
    version: int | None
    committed_at: str | None
    seconds_ago: float | None
    rows_per_s: float | None
    seconds_left: float | None
    workers: tuple[Beat, ...]
    staged_files: int
    staged_bytes: int


def status(table: Table, spec: Mapping[str, Any] | None = None) -> list[RunStatus]:
    """All captures and imports that have begun at a table, the oldest first.

    Args:
        table: at its newest version.
        spec: a capture's; where runs of it are known, only those.

    Raises:
        IntegrityError: a run's record is damaged.
    """
    looked = _Look(table)
    records = {record.run_id: record for record in run_records(table.root)}
    wanted = {run_id for run_id, record in records.items() if spec and same_job(record.spec, spec)}
    found = [looked.run(run_id, records.get(run_id)) for run_id in looked.ids(records)]
    chosen = [one for one in found if one.run_id in wanted] or found
    return sorted(chosen, key=lambda one: (one.started_at or "", one.run_id))


def same_job(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two specs ask for the same, however many rows at once on whichever machine."""
    free = {"table", "batch_size", "batch_tokens", "head_rows", "device", "threads"}
    return {k: v for k, v in one.items() if k not in free} == {
        k: v for k, v in other.items() if k not in free
    }


class _Look:
    """Log, staged files and claims of a table, looked at once."""

    def __init__(self, table: Table) -> None:
        self._root = table.root
        self._now = time.time()
        self._commits: dict[str, list[tuple[int, RunLineage]]] = {}
        for commit in reversed(table.history()):
            run = commit["run"]
            if run is not None and kind_of(run) in ("capture", "import"):
                self._commits.setdefault(run.run_id, []).append((commit["version"], run))
        self._made_at = {
            int(entry.name.removesuffix(".json")): entry.modified
            for entry in table.root.entries(entries.FOLDER)
            if entry.name.removesuffix(".json").isdecimal() and entry.modified is not None
        }
        self._data = [entry for entry in table.root.entries(files.FOLDER) if entry.is_file]

    def ids(self, records: Mapping[str, RunRecord]) -> list[str]:
        """Of all runs that anything is known of."""
        return list(dict.fromkeys([*records, *self._commits]))

    def run(self, run_id: str, record: RunRecord | None) -> RunStatus:
        """One run."""
        commits = self._commits.get(run_id, [])
        done = {unit for _, run in commits for unit in run.units}
        spec = record.spec if record else commits[-1][1].spec
        units = record.units if record else None
        version = commits[-1][0] if commits else None
        at = self._made_at.get(version) if version is not None else None
        rows_per_s, units_per_s = self._speeds(commits)
        left = None if units is None else units - len(done)
        staged = [
            entry
            for entry in self._data
            if entry.name[:16] == run_id[:16] and entry.name[:23] not in done
        ]
        return RunStatus(
            run_id=run_id,
            kind="import" if "layout" in spec else "capture",
            teacher=str(spec.get("teacher", {}).get("name", "")),
            started_at=record.started_at if record else None,
            units=units,
            done=len(done),
            finished=None if left is None else left == 0,
            rows=sum(run.num_rows for _, run in commits),
            source_rows=record.rows if record else commits[-1][1].source.get("rows"),
            version=version,
            committed_at=None if at is None else datetime.fromtimestamp(at, UTC).isoformat(),
            seconds_ago=self._ago(at),
            rows_per_s=rows_per_s,
            seconds_left=None if left is None or units_per_s is None else left / units_per_s,
            workers=self._workers(run_id[:16], done),
            staged_files=len(staged),
            staged_bytes=sum(entry.size for entry in staged),
        )

    def _speeds(
        self, commits: Sequence[tuple[int, RunLineage]]
    ) -> tuple[float | None, float | None]:
        """Rows and units a second between the last commits."""
        timed = [(self._made_at[v], run) for v, run in commits[-_WINDOW:] if v in self._made_at]
        gaps = [max(0.0, b[0] - a[0]) for a, b in itertools.pairwise(timed)]
        usual = statistics.median(gaps) if gaps else 0.0
        for place in reversed(range(len(gaps))):
            if usual and gaps[place] > _PAUSE * usual:
                timed = timed[place + 1 :]
                break
        spent = timed[-1][0] - timed[0][0] if timed else 0.0
        if spent <= 0:
            return None, None
        runs = [run for _, run in timed[1:]]
        return (
            sum(run.num_rows for run in runs) / spent,
            sum(len(run.units) for run in runs) / spent,
        )

    def _workers(self, run: str, done: set[str]) -> tuple[Beat, ...]:
        folder = f"{claims.FOLDER}/{run}"
        return tuple(
            self._beat(entry.name.removesuffix(".json"), entry.modified)
            for entry in self._root.entries(folder)
            if entry.name.endswith(".json") and entry.name.removesuffix(".json") not in done
        )

    def _beat(self, unit: str, at: float | None) -> Beat:
        claim, ago = claims.read_claim(self._root, unit), self._ago(at)
        every = claims.LEASE / claims.BEATS_A_LEASE if claim is None else claim.every
        return Beat(
            unit=unit,
            worker=claim.worker if claim else None,
            name=claim.name if claim else None,
            beats=claim.beat if claim else None,
            seconds_ago=ago,
            dead=ago is not None and ago >= every * claims.BEATS_A_LEASE,
        )

    def _ago(self, at: float | None) -> float | None:
        return None if at is None else round(max(0.0, self._now - at), 1)

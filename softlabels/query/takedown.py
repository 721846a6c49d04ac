"""Takedown: examples are deleted from a table, as a data subject or a licence asks.

Files that hold them are written again without them, under the same units, and one commit puts these
in their place: all views of an example go, other rows keep their bits and their order. Older
versions still hold them until vacuum removes their files; `Takedown.holders` says what keeps those.

What was asked for may itself be personal: the log gets its sha256, and never an id.
"""

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from softlabels.errors import IntegrityError, MismatchError, TryAgainError
from softlabels.fingerprint import sha256_json
from softlabels.lineage import ChangeLineage
from softlabels.query.doomed import Doomed, Request, find_doomed, rows_of
from softlabels.signals import stop_on_signal
from softlabels.store import deleted
from softlabels.store.ahead import work_ahead
from softlabels.store.files import UnitShard
from softlabels.store.holders import Holders, by_ids, by_keys, find_holders
from softlabels.store.rewriting import (
    Rewritten,
    Staging,
    open_checked,
    read_checked,
    row_groups,
    said_of,
)
from softlabels.store.table import Table

__all__ = ["Request", "Takedown", "Watching", "plan_takedown", "take_down"]

READ_AHEAD_BYTES = 256 * 2**20
ROUNDS = 20
"""Times that it looks again because others changed the table meanwhile."""

SHOWN_IDS = 10


@dataclass
class Takedown:
    """What a delete does, or did.

    Attributes:
        table: its URI.
        from_version: the newest version before.
        version: the newest now.
        rows: that go, of so many `examples`.
        rewritten: files that are written again without them.
        dropped: files of which no row is left.
        rows_left: of the table.
        some_ids: of examples that go.
        unknown: of the ids that were asked for, how many no row has.
        lifted: how many examples captures may label again which they could not before.
        earlier: versions that the same request has made before.
        holders: what keeps the rows, in older versions; None where it was not looked for.
        seconds: time it took.
    """

    table: str
    from_version: int
    version: int
    rows: int = 0
    examples: int = 0
    rewritten: int = 0
    dropped: int = 0
    rows_left: int = 0
    some_ids: tuple[str, ...] = ()
    unknown: int = 0
    lifted: int = 0
    earlier: tuple[int, ...] = ()
    holders: Holders | None = None
    seconds: float = 0.0


@dataclass
class Watching:
    """Callbacks that show how far it is: work of a kind begins, bytes or files of it are done."""

    begun: Callable[[str, int], None] = lambda kind, total: None
    done: Callable[[int], None] = lambda number: None


def plan_takedown(table: Table, request: Request, watching: Watching | None = None) -> Takedown:
    """What `take_down` would do now; nothing is.

    Raises:
        BadInputError: the SQL cannot be meant.
    """
    newest = table.latest()
    return _Job(newest, request, watching or Watching(), lambda: False).planned()


def take_down(table: Table, request: Request, watching: Watching | None = None) -> Takedown:
    """Deletes examples, as a new version; where no row matches, nothing is made.

    Called again after a stop it goes on. Rows that match and are added while it runs go too.

    Args:
        table: any version; the newest is changed.
        request: what is to go.
        watching: told how far it is.

    Raises:
        BadInputError: the SQL cannot be meant.
        IntegrityError: a file is not as it was committed.
        MismatchError: others change the same files all the time.
        TryAgainError: it was told to stop, or storage does not answer.
    """
    began = time.monotonic()
    with stop_on_signal() as stopped:
        job = _Job(table.latest(), request, watching or Watching(), stopped)
        report = job.run()
    report.seconds = round(time.monotonic() - began, 3)
    return report


@dataclass
class _Job:
    """A takedown on its way through versions."""

    table: Table
    request: Request
    watching: Watching
    stopped: Callable[[], bool]
    _gone: set[str] = field(default_factory=set)
    _paths: set[str] = field(default_factory=set)

    def planned(self) -> Takedown:
        """What would be done to this version."""
        found = self._find()
        report = self._report()
        self._count(report, found)
        report.version, report.rows_left = self.table.version, self.table.num_rows - report.rows
        if self.request.ids is not None:
            report.unknown = len(self.request.ids - found.ids)
        return report

    def run(self) -> Takedown:
        """Deletes until nothing matches any more."""
        report = self._report()
        self._forbid_asked()
        for number in range(ROUNDS):
            found = self._find()
            if not found.num_rows:
                break
            try:
                made = self._commit(found)
            except MismatchError:
                if number == ROUNDS - 1:
                    raise
                self.table = self.table.latest()
                continue
            self._count(report, found)
            alone = made.version == self.table.version + 1
            self.table = made
            if alone:
                break  # nobody has added anything since it was looked for
        else:
            raise TryAgainError(
                f"table {self.table.root.uri!r} is changed all the time: {report.rows} rows were "
                "deleted, run the command again"
            )
        self._finish(report)
        return report

    def _forbid_asked(self) -> None:
        """Puts all ids that were asked for on the list, those too that no row has yet.

        A capture may have such an example in hand, or come to it another night.
        """
        ids = self.request.ids
        if ids is not None and not self.request.allow_again:
            name = sha256_json({"operation": "delete", "asked": self.request.said})
            deleted.record_deleted(self.table.root, name, deleted.example_keys(ids))

    def _report(self) -> Takedown:
        version = self.table.version
        return Takedown(self.table.root.uri, version, version)

    def _count(self, report: Takedown, found: Doomed) -> None:
        dropped = len(found.dropped)
        self._gone |= found.ids
        report.rows += found.num_rows
        report.examples = len(self._gone)
        report.rewritten += len(found.files) - dropped
        report.dropped += dropped
        report.some_ids = tuple(sorted(self._gone)[:SHOWN_IDS])

    def _finish(self, report: Takedown) -> None:
        """What there is to say besides; and what may be labelled again."""
        asked = self.request.ids or frozenset()
        root = self.table.root
        if self.request.allow_again:
            keys = deleted.example_keys(self._gone | asked)
            report.lifted = deleted.lift(root, keys) if len(keys) else 0
        report.version, report.rows_left = self.table.version, self.table.num_rows
        report.unknown = len(asked - self._gone)
        made = {
            commit["version"]: commit["change"]
            for commit in self.table.history()
            if commit["change"] is not None and self.request.is_of(commit["change"])
        }
        report.earlier = tuple(sorted(v for v in made if v <= report.from_version))
        holds = by_ids(self._gone | asked)
        if not report.rows and not asked:
            lists = [deleted.keys_of_change(root, change.change_id) for change in made.values()]
            keys = np.concatenate([*lists, np.zeros(0, np.uint64)])
            if not len(keys):
                return
            holds = by_keys(keys)
        report.holders = find_holders(
            self.table,
            holds,
            self._paths,
            lambda files: self.watching.begun("look into older versions", files),
            lambda: self.watching.done(1),
        )

    def _find(self) -> Doomed:
        def done(size: int) -> None:
            self.watching.done(size)
            self._heed_signals("nothing was changed by this attempt")

        def planned(size: int) -> None:
            self.watching.begun("look for rows", size)

        return find_doomed(self.table, self.request, planned, done)

    def _commit(self, found: Doomed) -> Table:
        """The version without what was found."""
        began, clock = datetime.now(UTC), time.monotonic()
        table = self.table
        change_id = sha256_json(
            {
                "operation": "delete",
                "from_version": table.version,
                "asked": self.request.said,
                "files": [file.path for file in found.files],
            }
        )
        added = self._rewritten(found)
        if not self.request.allow_again:
            # Before the commit: never are the rows gone and the list is not there.
            deleted.record_deleted(table.root, change_id, deleted.example_keys(found.ids))
        rows = found.num_rows
        lineage = ChangeLineage(
            operation="delete",
            change_id=change_id,
            from_version=table.version,
            arguments=self._arguments(found),
            rows_before=table.num_rows,
            rows_after=table.num_rows - rows,
            packages={
                n: importlib.metadata.version(n) for n in ("softlabels", "duckdb", "pyarrow")
            },
            started_at=began.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 3),
        )
        made = table.change(added, found.files, lineage)
        self._paths |= {file.path for file in found.files}
        return made

    def _arguments(self, found: Doomed) -> dict[str, Any]:
        return self.request.said | {
            "rows": found.num_rows,
            "examples": len(found.ids),
            "files_rewritten": len(found.files) - len(found.dropped),
            "files_dropped": len(found.dropped),
            "allow_again": self.request.allow_again,
        }

    def _rewritten(self, found: Doomed) -> list[UnitShard]:
        """The files that have rows left, written without the others and stored."""
        kept = [file for file in found.files if found.rows_left(file)]
        staging = Staging(self.table, "")
        units = []
        self.watching.begun("write", sum(file.size for file in kept))
        reading = partial(read_checked, self.table.root)
        for file, data in work_ahead(kept, reading, lambda file: file.size, READ_AHEAD_BYTES):
            self._heed_signals("the table is as it was; run the same command to go on")
            opened = open_checked(self.table, file, data)
            rewritten = Rewritten(self.table, file.unit, said_of(opened))
            for batch in row_groups(opened, file):
                rewritten.add(batch.filter(pa.array(~rows_of(found.ids, batch))))
            shard = rewritten.close()
            if shard.num_rows != found.rows_left(file):
                raise IntegrityError(
                    f"file {file.path!r} of {self.table.root.uri!r} has other rows than the log "
                    "says; nothing was changed"
                )
            units.append(staging.store(file.unit, shard))
            self.watching.done(file.size)
        return units

    def _heed_signals(self, state: str) -> None:
        if self.stopped():
            raise TryAgainError(f"stopped by a signal: {state}")

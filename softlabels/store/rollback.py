"""Rollback: a new version that holds what an older one held. Nothing is erased."""

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from softlabels.errors import MismatchError, StorageError
from softlabels.fingerprint import sha256_json
from softlabels.lineage import ChangeLineage
from softlabels.store import files, tags
from softlabels.store.table import Table, TableFile

ATTEMPTS = 5
"""Times that a rollback is planned again because the table was changed meanwhile."""


@dataclass(frozen=True)
class Rollback:
    """What a rollback does, or did.

    Attributes:
        table: its URI.
        to: the version whose rows come back.
        from_version: the newest one before.
        version: the one that was made; `from_version` where nothing was.
        rows_before: of `from_version`.
        rows_after: of the version that is made.
        added: files that come back.
        removed: files that go.
        same: the newest version holds what `to` held already: there is nothing to do.
        schema_changes: whether columns, or what is the same in every row, come back as they were.
        units: of runs, which were committed since and whose rows go; these runs' ids.
        runs: ids of these runs.
    """

    table: str
    to: int
    from_version: int
    version: int
    rows_before: int
    rows_after: int
    added: tuple[TableFile, ...]
    removed: tuple[TableFile, ...]
    same: bool
    schema_changes: bool
    units: int
    runs: tuple[str, ...]


def plan_rollback(target: Table) -> Rollback:
    """What rolling its table back to `target` would do now; nothing is.

    Raises:
        StorageError: a file that would come back is not there.
    """
    return _plan(target, target.latest())


def rollback(target: Table, reference: str = "") -> Rollback:
    """Makes a new version that holds what `target` holds: its files, schema and contents.

    Where the newest version holds that already, nothing is done: the same call twice is once.

    Args:
        target: a version, such as one that a tag names.
        reference: what the user called it, for the log.

    Raises:
        StorageError: a file that would come back is not there.
        MismatchError: others change the table all the time.
        TryAgainError: the version is being vacuumed, or storage does not answer.
    """
    for attempt in range(ATTEMPTS):
        newest = target.latest()
        plan = _plan(target, newest)
        if plan.same:
            return plan
        try:
            return _commit(target, newest, plan, reference)
        except MismatchError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _plan(target: Table, newest: Table) -> Rollback:
    wanted = {file.path for file in target.files}
    there = {file.path for file in newest.files}
    added = tuple(file for file in target.files if file.path not in there)
    removed = tuple(file for file in newest.files if file.path not in wanted)
    # The same bytes under another attempt's name are the same.
    same = target.snapshot_digest == newest.snapshot_digest and target.schema == newest.schema
    if not same:
        _require_there(target, added)
    alike = target.contents == newest.contents and target.schema == newest.schema
    since = [
        commit["run"]
        for commit in newest.history()
        if commit["version"] > target.version and commit["run"] is not None
    ]
    gone = {file.unit for file in removed}
    undone = [run for run in since if any(u.rpartition("/")[2] in gone for u in run.units)]
    return Rollback(
        table=target.root.uri,
        to=target.version,
        from_version=newest.version,
        version=newest.version,
        rows_before=newest.num_rows,
        rows_after=target.num_rows,
        added=added,
        removed=removed,
        same=same,
        schema_changes=not alike,
        units=sum(u.rpartition("/")[2] in gone for run in undone for u in run.units),
        runs=tuple(dict.fromkeys(run.run_id for run in undone)),
    )


def _require_there(target: Table, added: Sequence[TableFile]) -> None:
    names = set(target.root.names(files.FOLDER))
    for file in added:
        if file.path.rpartition("/")[2] not in names:
            raise StorageError(
                f"version {target.version} of {target.root.uri!r} cannot come back: its file "
                f"{file.path!r} is not there; nothing was done"
            )


def _commit(target: Table, newest: Table, plan: Rollback, reference: str) -> Rollback:
    began, clock = datetime.now(UTC), time.monotonic()
    change_id = sha256_json(
        {
            "operation": "rollback",
            "to": target.snapshot_digest,
            "to_version": target.version,
            "from": newest.snapshot_digest,
            "from_version": newest.version,
        }
    )
    # The pin makes a vacuum that is at it spare the files, or refuses: see `closed`.
    pin = f"rollback-{change_id[:16]}"
    tags.make_tag(target.root, pin, target.version, target.snapshot_digest)
    try:
        _require_there(target, plan.added)
        arguments: dict[str, Any] = {"to_version": target.version}
        if reference:
            arguments["to"] = reference
        lineage = ChangeLineage(
            operation="rollback",
            change_id=change_id,
            from_version=newest.version,
            arguments=arguments,
            rows_before=plan.rows_before,
            rows_after=plan.rows_after,
            packages={n: importlib.metadata.version(n) for n in ("softlabels", "deltalake")},
            started_at=began.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 3),
        )
        units = [files.readded(file) for file in plan.added]
        made = newest.change(units, plan.removed, lineage, like=target)
    finally:
        tags.release(target.root, pin)
    return Rollback(**{**vars(plan), "version": made.version, "rows_after": made.num_rows})

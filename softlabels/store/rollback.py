"""Rollback: a new version that holds what an older one held. Nothing is erased."""

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from softlabels.errors import BadInputError, MismatchError, StorageError
from softlabels.fingerprint import sha256_json
from softlabels.lineage import ChangeLineage
from softlabels.store import files, tags
from softlabels.store.files import UnitShard
from softlabels.store.returning import Returning, find_returning, without
from softlabels.store.rewriting import Staging
from softlabels.store.shards import Shard
from softlabels.store.table import Table, TableFile

Deletions = Literal["refuse", "keep", "bring back"]
"""What becomes of rows that were deleted and that the old version holds: nothing is done, or it
comes back without them, or with them."""

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
        added: files that come back as they were.
        removed: files that go.
        rewritten: files that come back without rows that were deleted.
        deleted_rows: rows that were deleted and that `to` holds: left out, or brought back.
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
    rewritten: int
    deleted_rows: int
    same: bool
    schema_changes: bool
    units: int
    runs: tuple[str, ...]


def plan_rollback(target: Table, deletions: Deletions = "refuse") -> Rollback:
    """What rolling its table back to `target` would do now; nothing is.

    Raises:
        BadInputError: deleted rows would come back, and it is to refuse that.
        StorageError: a file that would come back is not there.
    """
    newest = target.latest()
    plan, returning = _plan(target, newest, deletions)
    if plan.same or deletions != "keep" or not returning.num_rows:
        return plan

    def not_stored(unit: str, shard: Shard) -> UnitShard:
        return UnitShard("", None, len(shard.data), shard.num_rows, shard.statistics)

    plan, _ = _left_out(target, plan, returning, not_stored)
    return plan


def rollback(target: Table, reference: str = "", deletions: Deletions = "refuse") -> Rollback:
    """Makes a new version that holds what `target` holds: its files, schema and contents.

    Where the newest version holds that already, nothing is done: the same call twice is once.

    Args:
        target: a version, such as one that a tag names.
        reference: what the user called it, for the log.
        deletions: what becomes of rows that were deleted since.

    Raises:
        BadInputError: deleted rows would come back, and it is to refuse that.
        StorageError: a file that would come back is not there.
        MismatchError: others change the table all the time.
        TryAgainError: the version is being vacuumed, or storage does not answer.
    """
    for attempt in range(ATTEMPTS):
        newest = target.latest()
        plan, returning = _plan(target, newest, deletions)
        if plan.same:
            return plan
        try:
            return _commit(target, newest, plan, returning, (reference, deletions))
        except MismatchError:
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _plan(target: Table, newest: Table, deletions: Deletions) -> tuple[Rollback, Returning]:
    added, removed = target.files_since(newest), newest.files_since(target)
    # The same bytes under another attempt's name are the same.
    same = target.snapshot_digest == newest.snapshot_digest and target.schema == newest.schema
    returning = Returning()
    if not same:
        _require_there(target, added)
        returning = find_returning(target, newest)
        _require_wanted(target, returning, deletions)
    left_out = returning.num_rows if deletions == "keep" else 0
    if left_out:
        added = tuple(file for file in added if file.path not in returning.rows)
    alike = target.contents == newest.contents and target.schema == newest.schema
    since = [
        commit["run"]
        for commit in newest.history()
        if commit["version"] > target.version and commit["run"] is not None
    ]
    gone = {file.unit for file in removed}
    undone = [run for run in since if any(u.rpartition("/")[2] in gone for u in run.units)]
    plan = Rollback(
        table=target.root.uri,
        to=target.version,
        from_version=newest.version,
        version=newest.version,
        rows_before=newest.num_rows,
        rows_after=target.num_rows - left_out,
        added=added,
        removed=removed,
        rewritten=0,
        deleted_rows=returning.num_rows,
        same=same,
        schema_changes=not alike,
        units=sum(u.rpartition("/")[2] in gone for run in undone for u in run.units),
        runs=tuple(dict.fromkeys(run.run_id for run in undone)),
    )
    return plan, returning


def _require_wanted(target: Table, returning: Returning, deletions: Deletions) -> None:
    if deletions == "refuse" and returning.num_rows:
        rows = "1 deleted row" if returning.num_rows == 1 else f"{returning.num_rows} deleted rows"
        raise BadInputError(
            f"version {target.version} of {target.root.uri!r} would bring back {rows}: add "
            "--keep-deletions to leave them out, or --bring-back-deleted to have them again"
        )


def _left_out(
    target: Table,
    plan: Rollback,
    returning: Returning,
    store: Callable[[str, Shard], UnitShard],
) -> tuple[Rollback, list[UnitShard]]:
    """The plan and the new files of a rollback that leaves out what was deleted."""
    # With other contents every file goes, and the new ones are new.
    standing = () if plan.schema_changes else plan.removed
    units, there = without(target, returning, standing, store)
    removed = tuple(file for file in plan.removed if file.path not in there)
    same = not (units or plan.added or removed or plan.schema_changes)
    return replace(plan, removed=removed, rewritten=len(units), same=same), units


def _require_there(target: Table, added: Sequence[TableFile]) -> None:
    names = set(target.root.names(files.FOLDER))
    for file in added:
        if file.path.rpartition("/")[2] not in names:
            raise StorageError(
                f"version {target.version} of {target.root.uri!r} cannot come back: its file "
                f"{file.path!r} is not there; nothing was done"
            )


def _commit(
    target: Table,
    newest: Table,
    plan: Rollback,
    returning: Returning,
    said: tuple[str, Deletions],
) -> Rollback:
    began, clock = datetime.now(UTC), time.monotonic()
    reference, deletions = said
    asked: dict[str, Any] = {
        "operation": "rollback",
        "to": target.snapshot_digest,
        "to_version": target.version,
        "from": newest.snapshot_digest,
        "from_version": newest.version,
    }
    arguments: dict[str, Any] = {"to_version": target.version}
    if reference:
        arguments["to"] = reference
    if returning.num_rows:
        arguments |= {"deletions": deletions, "deleted_rows": returning.num_rows}
        asked["deletions"] = deletions
    change_id = sha256_json(asked)
    # The pin makes a vacuum that is at it spare the files, or refuses: see `closed`.
    pin = f"rollback-{change_id[:16]}"
    tags.make_tag(target.root, pin, target.version, target.snapshot_digest)
    try:
        _require_there(target, target.files_since(newest))
        units = [files.readded(file) for file in plan.added]
        if deletions == "keep" and returning.num_rows:
            plan, rewritten = _left_out(target, plan, returning, Staging(newest, "").store)
            if plan.same:
                return plan
            units += rewritten
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
        made = newest.change(units, plan.removed, lineage, like=target)
    finally:
        tags.release(target.root, pin)
    return replace(plan, version=made.version, rows_after=made.num_rows)

"""Vacuum: files that no kept version holds are deleted, and the versions that held them closed.

The order makes it safe beside captures, tags, mixes and rollbacks, and under kill -9:

1. look at the files, then at open runs, tags and the newest version (`unneeded.Look`);
2. write the record that closes versions (`closed`), and look again: who made a tag before is seen
   now, who makes one from here on sees the record and is refused;
3. delete; before each handful look once more for files that are committed or waited for.

What remains: a file that was stored, then left for longer than `Keep.grace` by something that is no
capture, and is committed in the moment of its deletion. And whoever reads an untagged version that
is older than the retention loses its files: tag what is read.
"""

import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from softlabels.errors import BadInputError, TryAgainError
from softlabels.storage import Root
from softlabels.store import closed
from softlabels.store.closed import VacuumRecord
from softlabels.store.table import Table
from softlabels.store.unneeded import DAY, Doomed, Keep, Kept, Look, OpenRuns, Vacuum

__all__ = ["DAY", "Doomed", "Keep", "Kept", "Vacuum", "plan_vacuum", "vacuum"]

_HANDFUL = 100
"""Files that are deleted between two looks at the newest version."""

_STOPPED = 3_600.0
"""Seconds after which a vacuum that has not ended is held to have been killed. One that lives looks
at its record before each handful, which takes no hour to delete."""


def plan_vacuum(table: Table, keep: Keep) -> Vacuum:
    """What `vacuum` would remove now; nothing is.

    Raises:
        BadInputError: a setting cannot be meant.
        IntegrityError: nobody can say what is needed: the log, a tag or a record is damaged.
    """
    if keep.retention < 0 or keep.versions < 1 or keep.grace < 0:
        raise BadInputError(f"{keep!r}: expected times of at least 0 s and at least 1 version")
    if keep.abandoned is not None and keep.abandoned < keep.grace:
        raise BadInputError(
            f"a run may be silent for {keep.abandoned:g} s and a file wait for {keep.grace:g} s: "
            "expected at least as long for the run"
        )
    return Look(table, keep).found()


def vacuum(
    table: Table,
    keep: Keep,
    planned: Callable[[int], None] = lambda files: None,
    done: Callable[[], None] = lambda: None,
) -> Vacuum:
    """Removes what no kept version holds; returns what was removed.

    Stopped at any point it leaves whole versions and closed ones; the same call again ends it.

    Args:
        table: any version.
        keep: what is kept besides the newest version, tags and open runs.
        planned: told how many files there are to remove.
        done: called after each of them.

    Raises:
        IntegrityError: as `plan_vacuum`; nothing was removed.
        StorageError: a file could not be deleted.
        TryAgainError: another vacuum held this one to be dead and ended it.
    """
    intended = plan_vacuum(table, keep)
    settings = {"retention": keep.retention, "versions": keep.versions, "grace": keep.grace}
    if keep.abandoned is not None:
        settings["abandoned"] = keep.abandoned
    record = VacuumRecord(
        vacuum_id=closed.new_id(),
        began_at=_now(),
        version=intended.version,
        closed=intended.closes,
        files=len(intended.doomed),
        bytes=intended.bytes,
        settings=settings,
        packages={"softlabels": importlib.metadata.version("softlabels")},
    )
    if intended.doomed:
        closed.write_record(table.root, record)
    # Files that nobody can miss by now; what was tagged or committed meanwhile is not among them.
    look = Look(table, keep, record)
    agreed = look.narrowed(intended)
    planned(len(agreed.doomed))
    removed = list(_delete(table, record, agreed.doomed, look.abandoned, done))
    made = replace(agreed, doomed=tuple(removed), closes=look.closes(removed))
    if intended.doomed:
        _end(table.root, record, made.closes, len(removed), made.bytes)
    _end_stopped(table, keep, look)
    return made


def _delete(
    table: Table,
    record: VacuumRecord,
    doomed: Sequence[Doomed],
    abandoned: Collection[str],
    done: Callable[[], None],
) -> Iterator[Doomed]:
    for start in range(0, len(doomed), _HANDFUL):
        handful = doomed[start : start + _HANDFUL]
        if closed.read_record(table.root, record.vacuum_id).ended_at is not None:
            raise TryAgainError(
                f"another vacuum of {table.root.uri!r} ended this one, which had stood still: "
                "run the command again"
            )
        newest = table.latest()
        needed = {file.path for file in newest.files}
        runs = OpenRuns(newest, abandoned)
        for one in handful:
            if one.path not in needed and not runs.needs(one.path):
                table.root.delete(one.path)
                yield one
            done()


def _end(
    root: Root,
    record: VacuumRecord,
    closes: tuple[tuple[int, int], ...],
    files: int,
    size: int,
) -> None:
    update = {"ended_at": _now(), "closed": closes, "files": files, "bytes": size}
    closed.write_record(root, record.model_copy(update=update))


def _end_stopped(table: Table, keep: Keep, look: Look) -> None:
    """Says of vacuums that were killed what they did: which versions have lost files."""
    stopped = [record for record in look.records if record.ended_at is None]
    if not stopped:
        return
    written = {entry.name: look.age(entry) for entry in table.root.entries(closed.FOLDER)}
    after = Look(table, keep)
    for record in stopped:
        if written.get(f"{record.vacuum_id}.json", 0.0) > _STOPPED:
            _end(table.root, record, after.lost(record), record.files, record.bytes)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""The commits of a table, read from the log's own entries."""

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from softlabels.errors import IntegrityError
from softlabels.lineage import ChangeLineage, RunLineage
from softlabels.storage import Root
from softlabels.store.entries import LogEntry, read_entries
from softlabels.store.records import CHANGE_KEY, COMMIT_KEY, LINEAGE_KEYS, record_in


def commits_of(root: Root, version: int) -> list[dict[str, Any]]:
    """What `Table.history` gives, up to a version."""
    return commits_in(root, read_entries(root, range(version + 1)))


def commits_in(root: Root, entries: Iterable[LogEntry | None]) -> list[dict[str, Any]]:
    """What `Table.history` gives, of the log's entries from version 0 on.

    delta-rs's own history leaves out entries that say nothing of themselves and then calls the
    others by wrong versions. The oldest entries may be gone (another engine's clean-up); those
    that are left are told.

    Raises:
        IntegrityError: an entry is damaged, or is missing between others.
    """
    found: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        if entry is not None:
            found.append(_commit(root, entry))
        elif found:
            raise IntegrityError(f"log of {root.uri!r} lacks the entry of version {number}")
    return found[::-1]


def _commit(root: Root, entry: LogEntry) -> dict[str, Any]:
    record = record_in(entry, LINEAGE_KEYS)
    run, change = entry.info.get(COMMIT_KEY), entry.info.get(CHANGE_KEY)
    try:
        return {
            "version": entry.version,
            "timestamp": record.made_at if record else int(entry.info.get("timestamp", 0)),
            "operation": record.operation if record else str(entry.info.get("operation", "")),
            "run": None if run is None else RunLineage.model_validate_json(run),
            "change": None if change is None else ChangeLineage.model_validate_json(change),
        }
    except (ValidationError, ValueError, TypeError) as error:
        raise IntegrityError(
            f"log entry {entry.version} of {root.uri!r} says nothing that can be read of who "
            "made it: it is damaged"
        ) from error

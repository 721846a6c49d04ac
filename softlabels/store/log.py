"""The history of a table, a line a version: what made it, how many rows it has, its tags."""

from collections.abc import Mapping, Sequence
from typing import Any

from softlabels.errors import IntegrityError
from softlabels.lineage import RunLineage
from softlabels.storage import Root
from softlabels.store import closed, tags
from softlabels.store.entries import LogEntry, read_entries
from softlabels.store.history import commits_in
from softlabels.store.lifetimes import lifetimes_in
from softlabels.store.table import Table


def log_lines(table: Table, limit: int | None = None) -> list[dict[str, Any]]:
    """The versions up to the table's, newest first.

    Args:
        table: the version.
        limit: most lines.

    Returns:
        version; timestamp, ms since 1970, by the clock of whoever made it; made_by: create,
        capture, import, ensemble, calibrate, delete, compact, rollback, publish, or what another
        engine called it; run, RunLineage, or change, ChangeLineage, where one made it; rows and
        files of the version, and added, rows more than before, None where the log does not say;
        tags; vacuumed: whether it cannot be opened any more.
    """
    names = tags.tags_by_version(table.root)
    records = closed.vacuum_records(table.root)
    entries = read_entries(table.root, range(table.version + 1))
    rows, files = _counts(table.root, entries)
    lines: list[dict[str, Any]] = []
    for commit in commits_in(table.root, entries)[:limit]:
        version = commit["version"]
        now, before = rows.get(version), rows.get(version - 1) if version else 0
        lines.append(
            {
                **commit,
                "made_by": _made_by(commit),
                "rows": now,
                "added": None if now is None or before is None else now - before,
                "files": files.get(version),
                "vacuumed": any(record.closes(version) for record in records),
                "tags": [tag.name for tag in names.get(version, [])],
            }
        )
    return lines


def _counts(
    root: Root, entries: Sequence[LogEntry | None]
) -> tuple[dict[int, int], dict[int, int]]:
    """Rows and files by version, of those whose log entries can be followed."""
    try:
        life = lifetimes_in(root, entries)
    except IntegrityError:
        return {}, {}
    rows = {version: rows for version, rows in enumerate(life.rows.tolist()) if rows >= 0}
    return rows, dict(enumerate(life.files.tolist()))


def _made_by(commit: Mapping[str, Any]) -> str:
    if commit["change"] is not None:
        return str(commit["change"].operation)
    if commit["run"] is None:
        return "create" if commit["operation"] == "CREATE TABLE" else str(commit["operation"])
    return kind_of(commit["run"])


def kind_of(run: RunLineage) -> str:
    """Which command a run is of."""
    for name in ("calibrate", "ensemble"):
        if name in run.spec:
            return name
    return "import" if "layout" in run.spec else "capture"

"""Where a version came from, in a few kilobytes: what a published copy says of its source."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from softlabels.fingerprint import canonical_json
from softlabels.lineage import ChangeLineage, RunLineage
from softlabels.store.handle import open_delta
from softlabels.store.table import Table

MOST_RUNS = 50
"""The latest that are told, and as many changes; of others only how many there were."""

MOST_CHARACTERS = 4_000
"""Of a run's spec and of its source as JSON; larger ones are left out, their sha256 is not."""


def table_id(table: Table) -> str:
    """Delta's own id of a table: it stays when the folder is moved, and a copy gets another."""
    return str(open_delta(table.root, table.version).metadata().id)


def origin_of(source: Table) -> dict[str, Any]:
    """What a copy says: the source's place, version and digest, its runs and changes.

    URIs of roots never carry credentials: `open_root` refuses those that do.

    Returns:
        source: uri, table_id, version, snapshot_digest; files, bytes; runs and changes, oldest
        first; runs_left_out and changes_left_out, how many older ones there were.
    """
    history = source.history()[::-1]
    runs = _merged(
        told
        for commit in history
        for told in _told(commit["run"], commit["change"], commit["version"])
    )
    changes = [
        _change(commit["change"], commit["version"])
        for commit in history
        if commit["change"] is not None
    ]
    return {
        "source": {
            "uri": source.root.uri,
            "table_id": table_id(source),
            "version": source.version,
            "snapshot_digest": source.snapshot_digest,
        },
        "files": len(source.files),
        "bytes": sum(file.size for file in source.files),
        "runs": runs[-MOST_RUNS:],
        "runs_left_out": len(runs[:-MOST_RUNS]),
        "changes": changes[-MOST_RUNS:],
        "changes_left_out": len(changes[:-MOST_RUNS]),
    }


def _told(
    run: RunLineage | None, change: ChangeLineage | None, version: int
) -> Sequence[Mapping[str, Any]]:
    """The runs that a commit tells of: its own, or those of what was published there."""
    if run is not None:
        return [_run(run, version)]
    if change is not None and change.operation == "publish":
        return list(change.arguments.get("runs", ()))
    return []


def _run(run: RunLineage, version: int) -> dict[str, Any]:
    said = run.model_dump(mode="json", exclude={"units", "num_rows"})
    for name in ("spec", "source"):
        if len(canonical_json(said[name])) > MOST_CHARACTERS:
            said[name] = None
    return {**said, "units": len(run.units), "rows": run.num_rows, "last_version": version}


def _merged(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record a run of what its commits say, in the order of their last commits."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        before = found.pop(run["run_id"], None)
        found[run["run_id"]] = dict(run)
        if before is not None and before["last_version"] != run["last_version"]:
            merged = found[run["run_id"]]
            merged["started_at"] = before["started_at"]
            for name in ("units", "rows", "seconds"):
                merged[name] = round(merged[name] + before[name], 3)
    return list(found.values())


def _change(change: ChangeLineage, version: int) -> dict[str, Any]:
    said: dict[str, Any] = {
        "operation": change.operation,
        "version": version,
        "rows_before": change.rows_before,
        "rows_after": change.rows_after,
        "started_at": change.started_at,
    }
    if change.operation == "publish":
        said["source"] = change.arguments.get("source")
    return said

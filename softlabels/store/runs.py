"""Runs of a table: what each capture set out to do, and which are not finished."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from softlabels.errors import IntegrityError
from softlabels.storage import Entry, Root
from softlabels.store.sealed import seal, unseal
from softlabels.store.table import Table

FOLDER = "_softlabels/runs"
_READERS = 16
_MOST_KNOWN = 10_000


class RunRecord(BaseModel):
    """One run, written once when it is first started.

    Attributes:
        run_id: sha256 of the identity fields of its spec.
        units: how many it has.
        rows: source rows that it looks at.
        spec: as the user wrote it.
        source: uri, fingerprint, number of files and rows of the source.
        started_at: UTC, ISO 8601, by the clock of the machine that started it first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    units: Annotated[int, Field(ge=0, lt=10**9)]
    rows: Annotated[int, Field(ge=0)]
    spec: Mapping[str, Any]
    source: Mapping[str, Any]
    started_at: str


_known: dict[tuple[str, Entry], RunRecord] = {}
"""Records by root and what the listing says of them: none ever changes, and vacuum asks often."""


def record_run(root: Root, record: RunRecord) -> None:
    """Writes a run's record unless it is there."""
    root.create(f"{FOLDER}/{record.run_id}.json", seal(record))


def run_records(root: Root) -> list[RunRecord]:
    """All runs that were started, by when; one listing, and each record is read once.

    Raises:
        IntegrityError: a record is damaged.
    """
    entries = [e for e in root.entries(FOLDER) if e.is_file and e.name.endswith(".json")]
    found = {entry: _known[root.uri, entry] for entry in entries if (root.uri, entry) in _known}
    new = [entry for entry in entries if entry not in found]
    with ThreadPoolExecutor(_READERS) as pool:
        found.update(zip(new, pool.map(lambda e: _record(root, e.name), new), strict=True))
    if len(_known) + len(new) > _MOST_KNOWN:
        _known.clear()
    _known.update({(root.uri, entry): record for entry, record in found.items()})
    return sorted(found.values(), key=lambda record: (record.started_at, record.run_id))


def _record(root: Root, name: str) -> RunRecord:
    try:
        record = unseal(RunRecord, root.read(f"{FOLDER}/{name}"))
    except ValueError as error:
        raise IntegrityError(f"run record {name!r} of {root.uri!r} is damaged") from error
    if name != f"{record.run_id}.json":
        raise IntegrityError(
            f"run record {name!r} of {root.uri!r} is damaged: it is of run {record.run_id!r}"
        )
    return record


def open_runs(table: Table) -> list[RunRecord]:
    """Runs with units that are not committed at this version."""
    return [record for record in run_records(table.root) if _is_open(table, record)]


def _is_open(table: Table, record: RunRecord) -> bool:
    prefix = f"{record.run_id}/{record.run_id[:16]}"
    return any(not table.committed(f"{prefix}-{number:06d}") for number in range(record.units))

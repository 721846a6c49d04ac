"""What a version holds, by delta-rs, checked against what its commit recorded of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
from deltalake import DeltaTable

from softlabels.errors import IntegrityError
from softlabels.storage import Root
from softlabels.store import records
from softlabels.store.entries import (
    LogEntry,
    keys_of,
    read_entries,
    read_entry,
    without_checkpoints,
)
from softlabels.store.files import TableFile, logged_file, table_files
from softlabels.store.handle import add_actions, open_delta
from softlabels.store.records import LINEAGE_KEYS, State, Tally, VersionRecord, record_in

_LOOK_BACK = 16
"""Versions before one without a record among which a recorded one is looked for."""


def files_of(
    root: Root, delta: DeltaTable, known: Mapping[str, TableFile] | None = None
) -> dict[str, TableFile]:
    """Data files of a handle's version by path, in the order of their paths.

    Args:
        root: of the table.
        delta: the handle.
        known: files that were read before; they are not read again. A path never changes its file.
    """
    known = known or {}
    actions = add_actions(root, delta)
    paths = actions["path"].to_pylist()
    new = pa.array([i for i, path in enumerate(paths) if path not in known], pa.int64())
    read = {file.path: file for file in table_files(actions.take(new))}
    return {path: read.get(path) or known[path] for path in sorted(paths)}


def tally_of(
    files: Mapping[str, TableFile],
    before: Mapping[str, TableFile] | None = None,
    tally: Tally | None = None,
) -> Tally:
    """The tally of files, from that of the files before where there is one."""
    if before is None or tally is None:
        return Tally().with_(map(records.file_digest, files.values()))
    new = [file for path, file in files.items() if path not in before]
    gone = [file for path, file in before.items() if path not in files]
    return tally.with_(map(records.file_digest, new), map(records.file_digest, gone))


def state_of(delta: DeltaTable, files: Tally, keys: Tally) -> State:
    """What a handle's version holds, with the tallies of its files and keys."""
    metadata = delta.metadata()
    return State(
        version=int(delta.version()),
        files=files,
        keys=keys,
        schema_sha256=records.schema_digest(delta.schema()),
        properties_sha256=records.properties_digest(
            metadata.configuration, metadata.partition_columns
        ),
    )


def check(
    root: Root, delta: DeltaTable, files: Mapping[str, TableFile], tally: Tally
) -> tuple[VersionRecord | None, LogEntry | None]:
    """The record and log entry of a handle's version, once all that it holds is as recorded.

    A version that was written by an earlier release or another engine has no record. What it holds
    is then worked out from the nearest of the versions before it that has one, and the entries in
    between; what those say is taken as it stands. Where there is none, nothing is checked here.

    Raises:
        IntegrityError: the log, or a checkpoint of it, is damaged.
    """
    version = int(delta.version())
    entry = read_entry(root, version)
    record = record_in(entry, LINEAGE_KEYS)
    if record is None:
        _check_by_entries(root, delta, files)
        return None, entry
    found = state_of(delta, tally, record.keys)  # keys are looked at where they are asked for
    if wrong := records.differing(record, found):
        raise damaged(root, version, wrong)
    return record, entry


@dataclass(frozen=True)
class Keys:
    """App ids of all transactions up to a version, and their tally."""

    version: int
    held: frozenset[str]
    tally: Tally

    @classmethod
    def read(cls, root: Root, version: int, record: VersionRecord | None) -> "Keys":
        """Those of a version, by the log.

        Raises:
            IntegrityError: they are not as recorded.
        """
        held = keys_of(root, version)
        keys = cls(version, held, Tally().with_(map(records.key_digest, held)))
        return keys._checked(root, record)

    def later(self, root: Root, entry: LogEntry | None, record: VersionRecord | None) -> "Keys":
        """Those of a later version, which `entry` made; reads only what lies between.

        Raises:
            IntegrityError: they are not as recorded, or an entry is missing.
        """
        if entry is None:
            raise IntegrityError(f"log of {root.uri!r} lacks the entry of its newest version")
        between = read_entries(root, range(self.version + 1, entry.version))
        if None in between:
            return type(self).read(root, entry.version, record)
        new = {key for each in (*between, entry) if each for key in each.keys} - self.held
        tally = self.tally.with_(map(records.key_digest, new))
        return Keys(entry.version, self.held | new, tally)._checked(root, record)

    def _checked(self, root: Root, record: VersionRecord | None) -> "Keys":
        if record is not None and record.keys != self.tally:
            raise damaged(root, self.version, ["units"])
        return self


def damaged(root: Root, version: int, wrong: list[str]) -> IntegrityError:
    """The error for a version that is not as recorded."""
    return IntegrityError(
        f"version {version} of table {root.uri!r} has other {' and '.join(wrong)} than its commit "
        "recorded: its log is damaged; restore the log's files, or, should only a checkpoint be "
        f"damaged, {without_checkpoints(root)}"
    )


def _check_by_entries(root: Root, delta: DeltaTable, files: Mapping[str, TableFile]) -> None:
    version = int(delta.version())
    first = max(0, version - _LOOK_BACK)
    entries = read_entries(root, range(first, version + 1))
    base = None
    for number in range(version - 1, first - 1, -1):
        if record_in(entries[number - first], LINEAGE_KEYS) is not None:
            base = number
            break
    since = [] if base is None else entries[base - first + 1 :]
    if base is None or any(entry is None for entry in since):
        return
    handle = open_delta(root, base)
    held = files_of(root, handle)
    check(root, handle, held, tally_of(held))
    for entry in since:
        assert entry is not None
        for path in entry.removed:
            held.pop(path, None)
        held |= {action["path"]: logged_file(action) for action in entry.added}
    if tally_of(held) != tally_of(files):
        raise damaged(root, version, ["files"])
    if not any(entry.new_schema for entry in since if entry) and handle.schema() != delta.schema():
        raise damaged(root, version, ["schema or contents"])

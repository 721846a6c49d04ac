"""Entries of the Delta log as they lie there: what delta-rs does not hand out.

delta-rs tells files, schema and properties of a version. Keys (which unit is in) and what a commit
said of itself are read here: keys from the newest checkpoint and the entries after it.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from softlabels.errors import IntegrityError, StorageError, one_line
from softlabels.storage import Root

FOLDER = "_delta_log"
_READERS = 16
_KINDS = {
    "add",
    "cdc",
    "checkpointMetadata",
    "commitInfo",
    "domainMetadata",
    "metaData",
    "protocol",
    "remove",
    "sidecar",
    "txn",
}


@dataclass(frozen=True)
class LogEntry:
    """One commit.

    Attributes:
        version: that it made.
        info: what it said of itself, Delta's commitInfo.
        added: files put in, as Delta's add actions.
        removed: paths of files taken out.
        keys: app ids of its transactions.
        new_schema: whether it set schema or properties.
    """

    version: int
    info: Mapping[str, Any]
    added: tuple[Mapping[str, Any], ...]
    removed: tuple[str, ...]
    keys: tuple[str, ...]
    new_schema: bool


def read_entry(root: Root, version: int) -> LogEntry | None:
    """The commit that made a version; None where its file is not there.

    Raises:
        IntegrityError: it is damaged.
        StorageError: it cannot be read.
    """
    name = f"{FOLDER}/{version:020d}.json"
    try:
        text = root.read(name)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    try:
        return _entry(version, [json.loads(line) for line in text.splitlines() if line.strip()])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"log entry {name!r} of {root.uri!r} is damaged: {one_line(error) or 'no JSON'}"
        ) from error


def _entry(version: int, actions: list[dict[str, Any]]) -> LogEntry:
    kinds: dict[str, list[Any]] = {}
    for action in actions:
        ((kind, value),) = action.items()
        if kind not in _KINDS:
            raise ValueError(f"no action of Delta is called {kind!r}")
        kinds.setdefault(kind, []).append(value)
    infos = kinds.get("commitInfo", [])
    return LogEntry(
        version=version,
        info=dict(infos[0]) if infos else {},
        added=tuple({**add, "path": unquote(add["path"])} for add in kinds.get("add", [])),
        removed=tuple(unquote(remove["path"]) for remove in kinds.get("remove", [])),
        keys=tuple(str(txn["appId"]) for txn in kinds.get("txn", [])),
        new_schema="metaData" in kinds,
    )


def read_entries(root: Root, versions: Iterable[int]) -> list[LogEntry | None]:
    """As `read_entry` for many, several at a time where storage is far."""
    if root.is_local:
        return [read_entry(root, version) for version in versions]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda version: read_entry(root, version), versions))


def keys_of(root: Root, version: int) -> frozenset[str]:
    """App ids of all transactions up to a version.

    Raises:
        IntegrityError: the checkpoint or an entry is damaged, or one is missing.
    """
    start = _checkpoint(root, version)
    keys = set() if start is None else _checkpoint_keys(root, start)
    first = 0 if start is None else start + 1
    for number, entry in enumerate(read_entries(root, range(first, version + 1)), first):
        if entry is None:
            raise IntegrityError(
                f"log of {root.uri!r} lacks version {number}: which units are in cannot be known"
            )
        keys.update(entry.keys)
    return frozenset(keys)


def checkpoint_name(version: int) -> str:
    """Where delta-rs keeps a version's checkpoint."""
    return f"{FOLDER}/{version:020d}.checkpoint.parquet"


def _checkpoint(root: Root, version: int) -> int | None:
    """The newest version up to `version` that has a checkpoint in one file."""
    try:
        hint = json.loads(root.read(f"{FOLDER}/_last_checkpoint"))
        found = hint["version"] if isinstance(hint, dict) and "parts" not in hint else None
        if isinstance(found, int) and 0 <= found <= version and root.exists(checkpoint_name(found)):
            return found
    except (StorageError, ValueError, KeyError, RecursionError):
        pass  # it is only a hint: other engines, and a damaged one, leave the listing
    names = root.names(FOLDER)
    marks = (name.removesuffix(".checkpoint.parquet") for name in names if _whole(name))
    return max((int(mark) for mark in marks if int(mark) <= version), default=None)


def _whole(name: str) -> bool:
    mark, _, kind = name.partition(".")
    return kind == "checkpoint.parquet" and len(mark) == 20 and mark.isdecimal()


def _checkpoint_keys(root: Root, version: int) -> set[str]:
    name = checkpoint_name(version)
    try:
        file = pq.ParquetFile(pa.BufferReader(root.buffer(name)))
        column = file.read(["txn.appId"])["txn"]
        return {txn["appId"] for txn in column.to_pylist() if txn is not None}
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"checkpoint {name!r} of {root.uri!r} is damaged: {one_line(error)}; "
            + without_checkpoints(root)
        ) from error


def has_beginning(root: Root) -> bool:
    """Whether a table can be read from the log: its first entry is there, or a checkpoint."""
    names = root.names(FOLDER)
    return f"{0:020d}.json" in names or any(".checkpoint" in name for name in names)


def without_checkpoints(root: Root) -> str:
    """What to do about a damaged checkpoint: nothing is only in there."""
    return (
        f"delete the *.checkpoint.parquet files and _last_checkpoint in {root.where(FOLDER)!r}: "
        "the .json files beside them hold all that they hold"
    )

"""Examples that were deleted: what captures must not label again, kept as keys beside the log.

A delete writes its list before its commit, so that no moment exists at which the rows are gone and
may come back. Lists hold keys and never ids; still, whoever guesses an id can see whether its key
is there. Vacuum leaves them alone.
"""

import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import IntegrityError
from softlabels.fingerprint import key64, sha256_bytes
from softlabels.storage import Root

FOLDER = "_softlabels/deleted"
Keys = npt.NDArray[np.uint64]

_NAME = re.compile(r"(?P<change>[0-9a-f]{64})-(?P<sha256>[0-9a-f]{64})\.keys")
_read: dict[tuple[str, str], Keys] = {}
"""Lists by root and name: a name says what is in it, and every commit of a capture asks for all."""


def deleted_key(example_id: str) -> int:
    """The key of an example: `inspect.row_keys` of its view 0, which a capture's scan has too."""
    return key64(example_id, 0)


def example_keys(ids: Iterable[str]) -> Keys:
    """The sorted keys of some examples, uint64."""
    return np.unique(np.fromiter((deleted_key(name) for name in ids), np.uint64))


def keys_of_rows(batch: pa.RecordBatch) -> Keys:
    """The key of each row's example, uint64 [B], in the rows' order."""
    names = batch["example_id"].to_pylist()
    return np.fromiter((deleted_key(name) for name in names), np.uint64, len(names))


def deleted_keys(root: Root) -> Keys:
    """The sorted keys of all examples that must not be labelled again, uint64.

    Raises:
        IntegrityError: a list is damaged.
    """
    lists = [_list(root, name) for name in _names(root)]
    return np.unique(np.concatenate(lists)) if lists else np.zeros(0, np.uint64)


def record_deleted(root: Root, change_id: str, keys: Keys) -> None:
    """Writes the list of a delete; again is no harm."""
    data = np.unique(keys).astype("<u8").tobytes()
    root.write(f"{FOLDER}/{change_id}-{sha256_bytes(data)}.keys", data)


def keys_of_change(root: Root, change_id: str) -> Keys:
    """The keys that one delete has put on the list and that are still there."""
    lists = [_list(root, name) for name in _names(root) if name.startswith(f"{change_id}-")]
    return np.unique(np.concatenate(lists)) if lists else np.zeros(0, np.uint64)


def lift(root: Root, keys: Keys) -> int:
    """Takes keys off all lists; returns how many were there.

    A list is written anew before the old one goes: stopped between the two, nothing is lifted.
    """
    lifted = np.zeros(0, np.uint64)
    for name in _names(root):
        standing = _list(root, name)
        here = np.isin(standing, keys)
        if not here.any():
            continue
        lifted = np.union1d(lifted, standing[here])
        if not here.all():
            record_deleted(root, name.partition("-")[0], standing[~here])
        root.delete(f"{FOLDER}/{name}")
    return len(lifted)


def copy_lists(source: Root, target: Root) -> None:
    """Copies the lists of one table to another, which may have more."""
    there = set(_names(target))
    for name in _names(source):
        if name not in there:
            target.write(f"{FOLDER}/{name}", _list(source, name).astype("<u8").tobytes())


def _names(root: Root) -> list[str]:
    return [name for name in root.names(FOLDER) if name.endswith(".keys")]


def _list(root: Root, name: str) -> Keys:
    known = _read.get((root.uri, name))
    if known is not None:
        return known
    match = _NAME.fullmatch(name)
    data = root.read(f"{FOLDER}/{name}")
    if match is None or len(data) % 8 or sha256_bytes(data) != match["sha256"]:
        raise IntegrityError(
            f"list of deleted examples {name!r} of {root.uri!r} is damaged: restore it, or delete "
            "it to let its examples be labelled again"
        )
    keys = np.frombuffer(data, "<u8").astype(np.uint64)
    if len(_read) >= 1000:
        _read.clear()
    _read[root.uri, name] = keys
    return keys

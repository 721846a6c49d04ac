"""Which older versions still hold examples that were deleted, and which tags keep them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from softlabels.errors import SoftLabelsError
from softlabels.store import shards
from softlabels.store.deleted import Keys, deleted_key
from softlabels.store.files import FOLDER
from softlabels.store.lifetimes import read_lifetimes
from softlabels.store.table import Table
from softlabels.store.tags import Tag, all_tags

Holds = Callable[[pa.RecordBatch], bool]
"""Whether one of some rows, of which `example_id` is known, is of a wanted example."""


@dataclass(frozen=True)
class Holders:
    """What keeps examples that were deleted.

    Attributes:
        versions: first and last of each range of versions that hold one.
        tags: of these versions.
        files: that hold one.
    """

    versions: tuple[tuple[int, int], ...] = ()
    tags: tuple[Tag, ...] = ()
    files: int = 0


def by_ids(ids: set[str]) -> Holds:
    """Rows of these examples."""
    return lambda batch: not ids.isdisjoint(batch["example_id"].to_pylist())


def by_keys(keys: Keys) -> Holds:
    """Rows of the examples with these keys, as `deleted` has them."""

    def holds(batch: pa.RecordBatch) -> bool:
        names = batch["example_id"].to_pylist()
        found = np.fromiter((deleted_key(name) for name in names), np.uint64, len(names))
        return bool(np.isin(found, keys).any())

    return holds


def find_holders(
    newest: Table,
    holds: Holds,
    known: Iterable[str] = (),
    planned: Callable[[int], None] = lambda files: None,
    done: Callable[[], None] = lambda: None,
) -> Holders:
    """Looks into every file that is still there and that the newest version does not hold.

    A file that cannot be read is taken to hold one.

    Args:
        newest: the newest version.
        holds: which rows are looked for.
        known: paths of files that hold one for certain.
        planned: told how many files there are to look into.
        done: called after each.
    """
    root = newest.root
    life = read_lifetimes(root, newest.version)
    there = {f"{FOLDER}/{name}" for name in root.names(FOLDER)}
    old = (life.spans.keys() & there) - {file.path for file in newest.files}
    holding = set(known) & old
    unsure = sorted(old - holding)
    planned(len(unsure))
    for path in unsure:
        if _file_holds(newest, path, holds):
            holding.add(path)
        done()
    versions = life.holding(holding)
    held = [
        tag
        for tag in all_tags(root)
        if any(first <= tag.version <= last for first, last in versions)
    ]
    return Holders(versions, tuple(held), len(holding))


def _file_holds(table: Table, path: str, holds: Holds) -> bool:
    try:
        opened = shards.open_shard(table.root.buffer(path), path)
        return any(
            holds(shards.read_row_groups(opened, path, [group], ["example_id"]))
            for group in range(opened.num_row_groups)
        )
    except SoftLabelsError:
        return True

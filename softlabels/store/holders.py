"""Which older versions still hold examples that were deleted, and which tags keep them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from softlabels.errors import SoftLabelsError
from softlabels.store import shards
from softlabels.store.deleted import Keys, keys_of_rows
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
        files: of these versions that hold one.
        uncommitted: files of no version that hold one: in a capture's hands, or left behind.
    """

    versions: tuple[tuple[int, int], ...] = ()
    tags: tuple[Tag, ...] = ()
    files: int = 0
    uncommitted: int = 0


def by_ids(ids: set[str]) -> Holds:
    """Rows of these examples."""
    return lambda batch: not ids.isdisjoint(batch["example_id"].to_pylist())


def by_keys(keys: Keys) -> Holds:
    """Rows of the examples with these keys, as `deleted` has them."""
    return lambda batch: bool(np.isin(keys_of_rows(batch), keys).any())


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
    there = {f"{FOLDER}/{name}" for name in root.names(FOLDER) if name.endswith(".parquet")}
    there -= {file.path for file in newest.files}
    old = life.spans.keys() & there
    holding = set(known) & old
    unsure = sorted(there - holding)
    planned(len(unsure))
    for path in unsure:
        if _file_holds(newest, path, holds):
            holding.add(path)
        done()
    versions = life.holding(holding & old)
    held = [
        tag
        for tag in all_tags(root)
        if any(first <= tag.version <= last for first, last in versions)
    ]
    return Holders(versions, tuple(held), len(holding & old), len(holding - old))


def _file_holds(table: Table, path: str, holds: Holds) -> bool:
    try:
        opened = shards.open_shard(table.root.buffer(path), path)
        return any(
            holds(shards.read_row_groups(opened, path, [group], ["example_id"]))
            for group in range(opened.num_row_groups)
        )
    except SoftLabelsError:
        return True

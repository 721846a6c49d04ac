"""Rows that were deleted and that an older version still holds: what comes back with it.

Which examples were deleted say the lists of `deleted`. Rows that the newest version has again, as
after a rollback that was to bring them back, count as deleted no more.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from softlabels.errors import IntegrityError
from softlabels.store.deleted import Keys, deleted_keys, keys_of_rows
from softlabels.store.files import TableFile, UnitShard
from softlabels.store.rewriting import Rewritten, open_checked, read_checked, row_groups, said_of
from softlabels.store.shards import Shard
from softlabels.store.table import Table


@dataclass(frozen=True)
class Returning:
    """Deleted rows of an older version that the newest one is without.

    Attributes:
        rows: how many in each file that has some, by path.
        keys: of their examples, sorted.
    """

    rows: Mapping[str, int] = field(default_factory=dict)
    keys: Keys = field(default_factory=lambda: np.zeros(0, np.uint64))

    @property
    def num_rows(self) -> int:
        """In all files."""
        return sum(self.rows.values())


def find_returning(older: Table, newest: Table) -> Returning:
    """Looks into the files of `older` that `newest` does not hold, if anything was ever deleted.

    Raises:
        IntegrityError: a list of deleted examples, or a file, is damaged.
        StorageError: a file is not there.
    """
    listed = deleted_keys(older.root)
    found = {file.path: _listed(older, file, listed) for file in older.files_since(newest)}
    gone = _union(found.values())
    if len(gone):
        standing = [_listed(newest, file, gone) for file in newest.files_since(older)]
        gone = np.setdiff1d(gone, _union(standing))
    rows = {path: int(np.isin(keys, gone).sum()) for path, keys in found.items()}
    return Returning({path: count for path, count in rows.items() if count}, gone)


def rows_lacking(older: Table, newest: Table) -> int:
    """Examples of an older version that the newest is without, though nobody deleted them.

    Raises:
        IntegrityError: a list of deleted examples, or a file, is damaged.
        StorageError: a file is not there.
    """
    gone = _union(_keys(older, file) for file in older.files_since(newest))
    if not len(gone):
        return 0
    standing = _union(_keys(newest, file) for file in newest.files_since(older))
    known = np.union1d(standing, deleted_keys(older.root))
    return len(np.setdiff1d(gone, known))


def without(
    table: Table,
    returning: Returning,
    standing: Sequence[TableFile],
    store: Callable[[str, Shard], UnitShard],
) -> tuple[list[UnitShard], set[str]]:
    """Files of a version written again without the rows that would return.

    Args:
        table: the version.
        returning: what is left out of it.
        standing: files that may be these already; they are not written again.
        store: keeps a file of a unit.

    Returns:
        The new files, and paths of those of `standing` that need not be written.

    Raises:
        IntegrityError: a file is not as it was committed.
    """
    there = {(file.unit, file.sha256): file.path for file in standing}
    units, found = [], set()
    for file in table.files:
        if returning.rows.get(file.path, file.num_rows) in (0, file.num_rows):
            continue  # none goes, or all do
        shard = _rewritten(table, file, returning)
        if (path := there.get((file.unit, shard.sha256))) is not None:
            found.add(path)
        else:
            units.append(store(file.unit, shard))
    return units, found


def _rewritten(table: Table, file: TableFile, returning: Returning) -> Shard:
    opened = open_checked(table, file, read_checked(table.root, file))
    rewritten = Rewritten(table, file.unit, said_of(opened))
    for batch in row_groups(opened, file):
        gone = np.isin(keys_of_rows(batch), returning.keys)
        rewritten.add(batch.filter(pa.array(~gone)))
    shard = rewritten.close()
    if shard.num_rows != file.num_rows - returning.rows[file.path]:
        raise IntegrityError(
            f"file {file.path!r} of {table.root.uri!r} has other rows than a moment before; "
            "nothing was changed"
        )
    return shard


def _listed(table: Table, file: TableFile, listed: Keys) -> Keys:
    """Keys of the rows of a file that are among these, a key a row."""
    if not len(listed):
        return listed
    keys = _keys(table, file)
    return keys[np.isin(keys, listed)]


def _keys(table: Table, file: TableFile) -> Keys:
    """Keys of the rows of a file, a key a row."""
    every = [keys_of_rows(batch) for batch in table.batches(["example_id"], [file])]
    return np.concatenate([*every, np.zeros(0, np.uint64)])


def _union(several: Iterable[Keys]) -> Keys:
    return np.unique(np.concatenate([*several, np.zeros(0, np.uint64)]))

"""Rows of a table as entries of a plan, without ensembles: whole columns, never a row in Python."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from softlabels.plan import ENTRIES
from softlabels.query.selection import Numbers, RowGroups


def plain_entries(
    parts: Sequence[tuple[Numbers, int]],
    groups: RowGroups,
    table: str,
    stage: int,
    loss_weight: float,
) -> pa.Table:
    """Entries that read rows of one table, ordered by row group, then part; `offset` is 0.

    Args:
        parts: row numbers, rising, and how often each comes.
        groups: row groups of the table, by rising number, which hold all of these rows.
        table: what the plan calls it.
        stage, loss_weight: of all entries.
    """
    group, part, first, size = _runs(parts, groups)
    order = np.lexsort((part, group))
    group, part, first, size = group[order], part[order], first[order], size[order]
    whole = size == groups.sizes[group]
    listed = [
        (parts[p][0][start : start + count] - groups.starts[g]).astype(np.int32)
        for g, p, start, count, all_rows in zip(
            *(column.tolist() for column in (group, part, first, size, whole)), strict=True
        )
        if not all_rows
    ]
    offsets = np.zeros(len(size) + 1, np.int64)
    np.cumsum(np.where(whole, 0, size), out=offsets[1:])
    rows = pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)),
        pa.array(np.concatenate([np.zeros(0, np.int32), *listed])),
        type=ENTRIES.field("rows").type,
        mask=pa.array(whole),
    )
    count = len(size)
    paths = pa.array([groups.files[g].path for g in group.tolist()], pa.string())
    repeats = np.array([times for _, times in parts], np.int32)
    columns = {
        "stage": pa.array(np.full(count, stage, np.int32)),
        "table": pa.array([table] * count, pa.string()),
        "file": paths,
        "row_group": pa.array(np.array(groups.indexes, np.int32)[group]),
        "offset": pa.array(np.zeros(count, np.int64)),
        "num_rows": pa.array(size.astype(np.int32)),
        "rows": rows,
        "repeats": pa.array(repeats[part]),
        "loss_weight": pa.array(np.full(count, loss_weight, np.float32)),
    }
    return pa.table([columns[name] for name in ENTRIES.names], schema=ENTRIES)


def _runs(
    parts: Sequence[tuple[Numbers, int]], groups: RowGroups
) -> tuple[Numbers, Numbers, Numbers, Numbers]:
    """Of each entry the row group, the part, the place of its first row in that part, its rows."""
    found = []
    for number, (rows, _) in enumerate(parts):
        firsts = np.searchsorted(rows, groups.starts)
        lasts = np.searchsorted(rows, groups.starts + groups.sizes)
        used = np.flatnonzero(lasts > firsts)
        found.append((used, np.full(len(used), number), firsts[used], lasts[used] - firsts[used]))
    empty = np.zeros(0, np.int64)
    group, part, first, size = (
        np.concatenate([empty, *column])
        for column in (zip(*found, strict=True) if found else [()] * 4)
    )
    return group, part, first, size

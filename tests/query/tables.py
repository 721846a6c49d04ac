"""Tables made of another's rows: some of them, in another order, changed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabels.store import shards
from softlabels.store.table import Table
from tests.tables import make_lineage


def reordered(
    table: Table,
    folder: Path,
    rows: np.ndarray,
    shard_rows: int = 1000,
    views: np.ndarray | None = None,
    change: Callable[[pa.RecordBatch], pa.RecordBatch] = lambda batch: batch,
) -> Table:
    """A table of the rows `rows` of another, by number, in that order.

    Args:
        table: the other.
        folder: where.
        rows: numbers; one may come twice.
        shard_rows: of each file, whose row groups are a third as large.
        views: of the new rows; as they were when not given.
        change: of the rows in their new order.
    """
    whole = pa.Table.from_batches(list(table.batches())).combine_chunks()
    batch = whole.take(pa.array(rows)).combine_chunks().to_batches()[0]
    if views is not None:
        place = batch.schema.get_field_index("view")
        batch = batch.set_column(place, "view", pa.array(views.astype(np.int32)))
    batch = change(batch).cast(table.schema)
    made = Table.open_or_create(str(folder), table.schema, table.contents)
    run_id = f"{12345:064x}"
    units = []
    for number, start in enumerate(range(0, len(rows), shard_rows)):
        writer = shards.ShardWriter(table.schema, table.contents.profile, row_group_positions=1)
        part = batch.slice(start, shard_rows)
        step = max(1, -(-part.num_rows // 3))
        for row in range(0, part.num_rows, step):
            writer.write(part.slice(row, step))
        unit = f"{run_id[-16:]}-{number:06d}"
        units.append(made.store_shard(f"{run_id}/{unit}", unit, writer.close()))
    return made.commit(units, make_lineage(run_id, [unit.key for unit in units], len(rows)))

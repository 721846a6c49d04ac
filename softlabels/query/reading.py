"""Soft targets of chosen rows of a table version, a row group at a time.

Read with Arrow: SQL engines unfold lists several times slower.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from softlabels.errors import IntegrityError
from softlabels.query.selection import Numbers, files_of, row_groups
from softlabels.schema import temper_columns
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.targets import SoftTargets

HEADS = ("topk_ids", "topk_logprobs", "tail_logprob")
LABELS = ("label_ids", "label_logprobs", "label_ranks")


def read_rows(
    table: Table, rows: Numbers, columns: Sequence[str]
) -> Iterator[tuple[Numbers, pa.RecordBatch]]:
    """Row numbers, int64 [B] and rising, and these columns of the rows `rows`, which rise.

    Raises:
        IntegrityError: a file is not as the log says.
    """
    for _, numbers, batch in _read(table, rows, columns):
        yield numbers, batch


def _read(
    table: Table, rows: Numbers, columns: Sequence[str]
) -> Iterator[tuple[str, Numbers, pa.RecordBatch]]:
    """The same, each with the path of its file."""
    groups = row_groups(table, files_of(table, rows))
    path, opened = "", None
    for file, index, start, size in zip(
        groups.files, groups.indexes, groups.starts, groups.sizes, strict=True
    ):
        first, last = np.searchsorted(rows, (start, start + size))
        if first == last:
            continue
        if opened is None or path != file.path:
            path, opened = file.path, shards.open_shard(table.root.buffer(file.path), file.path)
        batch = shards.read_row_groups(opened, path, [index], list(columns))
        if last - first < size:
            batch = batch.take(pa.array(rows[first:last] - start))
        yield path, rows[first:last], batch


def read_targets(
    table: Table, rows: Numbers, columns: Sequence[str], temperatures: Sequence[float] = ()
) -> Iterator[tuple[Numbers, SoftTargets]]:
    """As `read_rows`, as soft targets; columns that are not asked for are unknown in them."""
    extra = [name for temperature in temperatures for name in temper_columns(temperature)]
    stored = table.contents.k if "topk_ids" in columns else 0
    for path, numbers, batch in _read(table, rows, ["num_positions", *columns, *extra]):
        try:
            targets = _targets(batch, stored, temperatures)
        except IntegrityError as error:
            raise IntegrityError(f"file {path!r} of {table.root.uri!r}: {error}") from error
        yield numbers, targets


def targets_of(
    table: Table,
    batch: pa.RecordBatch,
    k: int,
    temperatures: Sequence[float] = (),
    draws: int = 0,
) -> SoftTargets:
    """The soft targets of some rows of `table`."""
    try:
        return _targets(batch, k, temperatures, draws)
    except IntegrityError as error:
        raise IntegrityError(f"table {table.root.uri!r}: {error}") from error


def _targets(
    batch: pa.RecordBatch, k: int, temperatures: Sequence[float], draws: int = 0
) -> SoftTargets:
    columns = {name: batch[name] for name in batch.schema.names}
    return SoftTargets.from_columns(columns, k, draws, temperatures)

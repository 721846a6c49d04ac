"""A table's files written again at another temperature, one in memory at a time."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from softlabels.errors import MismatchError
from softlabels.query.reading import read_rows, read_targets, targets_of
from softlabels.query.tempering import Exact, calibrated, incomplete, serve_draws
from softlabels.schema import table_schema
from softlabels.store import shards
from softlabels.store.table import Table, TableFile
from softlabels.targets import position_name


def require_exact(table: Table, exact: Exact) -> None:
    """Raises MismatchError where a row does not store what its table's k says.

    Of tables of all V classes, each position must have them or no tail; of others the tail must be
    known.
    """
    rows = np.arange(table.num_rows, dtype=np.int64)
    recorded = table.contents.recorded
    if not exact.whole:
        if recorded is not None and recorded.tail == "unknown":
            raise MismatchError(
                f"the tails of {table.root.uri!r} are unknown, as they were recorded: its labels "
                "cannot be taken at another temperature; capture them from the teacher"
            )
        return
    for numbers, targets in read_targets(table, rows, ["tail_logprob"]):
        if targets.tail is not None and np.isneginf(targets.tail).all():
            continue
        columns = ["num_positions", "topk_ids", "topk_logprobs", "tail_logprob", "example_id"]
        _, batch = next(read_rows(table, numbers, columns))
        found = targets_of(table, batch, table.contents.k)
        lacking = incomplete(found, table.contents.num_classes)
        if lacking.any():
            names = batch["example_id"].to_pylist()
            place = position_name(names, found.num_positions, int(np.argmax(lacking)))
            raise MismatchError(
                f"table {table.root.uri!r}: {place} has fewer than {table.contents.num_classes} "
                "classes and mass outside them: it cannot be taken at another temperature"
            )


class Rewriting:
    """Shards of a table's files at another temperature.

    Args:
        table: the version.
        temperature: at which its targets are taken.
        whole: whether it stores all classes.
        extra: the extra temperatures of the new targets, each with the table's own that it is.
    """

    def __init__(
        self, table: Table, temperature: float, whole: bool, extra: Mapping[float, float]
    ) -> None:
        self._table, self._temperature = table, temperature
        self.whole, self._extra = whole, dict(sorted(extra.items()))
        contents = table.contents
        self._draws = 0
        if not whole and serve_draws(contents, temperature):
            self._draws = contents.draws
        carried = [table.schema.field(name) for name in contents.carried]
        self.schema = table_schema(self._extra, carried)

    def shard(self, file: TableFile, unit: str) -> shards.Shard:
        """The rows of a file, in their order."""
        contents = self._table.contents
        metadata = {"softlabels.unit": unit, "softlabels.rows": f"all of {file.unit}"}
        writer = shards.ShardWriter(self.schema, contents.profile, metadata)
        for batch in self._table.batches(files=[file]):
            writer.write(self._rewritten(batch))
        return writer.close()

    def _rewritten(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        contents = self._table.contents
        temperatures = () if self.whole else contents.temperatures
        targets = targets_of(self._table, batch, contents.k, temperatures, self._draws)
        made = calibrated(targets, self._temperature, self.whole, self._extra)
        made.check(batch["example_id"].to_pylist(), contents.num_classes)
        stored_as = shards.round_to_profile(made, contents.profile)
        columns = {name: batch[name] for name in batch.schema.names}
        columns |= stored_as.columns(sequences=contents.alignment is not None)
        arrays = [columns[field.name] for field in self.schema]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

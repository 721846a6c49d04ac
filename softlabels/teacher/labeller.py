"""A run's rows: source batches through the teacher into record batches of the table."""

import importlib.metadata
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import BadInputError, DataError, one_line
from softlabels.fingerprint import sha256_json
from softlabels.lineage import RunLineage
from softlabels.schema import POSITION, table_schema
from softlabels.storage import open_root
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.teacher.annotator import Annotator
from softlabels.teacher.run import Run, Unit, example_ids

_PACKAGES = ("softlabels", "numpy", "pyarrow", "deltalake")


class Rehearsal(NamedTuple):
    """Rows labelled to see that it works: how many, their weight, their stored bytes, the time."""

    rows: int
    weight: int
    positions: int
    num_bytes: int
    seconds: float


class Labeller:
    """A teacher at work on one run."""

    def __init__(self, run: Run, annotator: Annotator) -> None:
        self.run = run
        self._annotator = annotator
        source = run.source.schema
        made = {field.name: field for field in POSITION if field.name in run.made_columns}
        carried = [made.get(name) or source.field(name) for name in run.contents.carried]
        self.schema = table_schema(run.spec.temperatures, carried)

    def table(self) -> Table | None:
        """The table that the spec names; None when it is still to be made.

        Raises:
            BadInputError: there can be no table at such a place.
            MismatchError: it is there and holds another kind of label.
        """
        uri = self.run.spec.table
        open_root(uri)
        try:
            Table.open(uri)
        except BadInputError:
            return None
        return Table.open_or_create(uri, self.schema, self.run.contents)

    def rehearse(self, budget: int) -> Rehearsal:
        """Labels the first rows, of weight `budget` or one at least, and throws them away."""
        source = self.run.source
        ahead = source.batches(0, source.num_rows, self.run.read_columns)
        weights = np.concatenate([[0], *(self._annotator.weigh(b) for b in islice(ahead, 1))])
        rows = max(1, int(np.searchsorted(weights.cumsum(), budget, side="right")) - 1)
        first = Unit("rehearsal", "", 0, min(rows, source.num_rows))
        writer = self.writer(first)
        began = time.monotonic()
        positions = 0
        for batch in self.label(first, np.ones(first.stop, bool)):
            positions += int(pc.sum(batch["num_positions"]).as_py() or 0)
            writer.write(batch)
        seconds = time.monotonic() - began
        weight = int(weights[: first.stop + 1].sum())
        return Rehearsal(first.stop, weight, positions, len(writer.close().data), seconds)

    def writer(self, unit: Unit) -> shards.ShardWriter:
        """A writer for a unit's shard, which says where its rows came from."""
        metadata = {
            "softlabels.unit": unit.name,
            "softlabels.source_rows": f"{unit.start}:{unit.stop}",
        }
        return shards.ShardWriter(self.schema, self.run.spec.profile, metadata)

    def label(
        self,
        unit: Unit,
        keep: npt.NDArray[np.bool_],
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Iterator[pa.RecordBatch]:
        """Labelled rows of a unit, what the annotator takes at once, in source order.

        Args:
            unit: which source rows.
            keep: bool [unit rows], those to label.
            advance: told after each forward pass how many more rows are done; may raise.
        """
        batches = self.run.source.batches(
            unit.start, unit.stop, self.run.read_columns, self.run.made_columns
        )
        for batch in _rebatch(_filter(batches, keep), self._annotator):
            yield self._label(batch, unit.start, advance)

    def lineage(
        self, units: Sequence[Unit], num_rows: int, started_at: str, seconds: float
    ) -> RunLineage:
        """What a commit of `units` says of itself."""
        spec = self.run.spec.model_dump(mode="json")
        source = self.run.source
        return RunLineage(
            run_id=self.run.id,
            units=tuple(unit.name for unit in units),
            num_rows=num_rows,
            spec=spec,
            spec_sha256=sha256_json(spec),
            source={
                "uri": source.root.uri,
                "fingerprint": source.fingerprint,
                "files": len(source.files),
                "rows": source.num_rows,
                **({"skipped": dict(source.skipped)} if source.skipped else {}),
            },
            packages={
                name: importlib.metadata.version(name)
                for name in (*_PACKAGES, *self._annotator.packages)
            },
            code_revision=_code_revision(),
            device=self._annotator.device,
            started_at=started_at,
            seconds=round(seconds, 3),
        )

    def _label(
        self, batch: pa.RecordBatch, first_row: int, advance: Callable[[int], None]
    ) -> pa.RecordBatch:
        spec = self.run.spec
        names = example_ids(self.run, batch, first_row)
        found = self._annotator.annotate(batch, names, advance)
        found.targets.check(names, self.run.contents.num_classes)
        stored = shards.round_to_profile(found.targets, spec.profile).columns()
        if self.run.contents.alignment is not None:
            del stored["label"], stored["top1_id"]  # of classification, not of a short sequence
        columns = {
            "example_id": pa.array(names, pa.string()),
            "view": pa.array(np.zeros(len(names), np.int32)),
            **stored,
            **found.columns,
            **{
                name: _carried(batch, self.schema.field(name)) for name in self.run.contents.carried
            },
        }
        return pa.RecordBatch.from_arrays(
            [
                columns[field.name] if field.name in columns else pa.nulls(len(names), field.type)
                for field in self.schema
            ],
            schema=self.schema,
        )


def _carried(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
    try:
        values = batch[field.name].cast(field.type)
        values.validate(full=True)  # that text is UTF-8
    except pa.ArrowInvalid as error:
        reason = one_line(error)
        raise DataError(
            f"carry: column {field.name!r} cannot be kept as {field.type}: {reason}"
        ) from error
    if pa.types.is_list(field.type) and values.flatten().null_count:
        raise DataError(
            f"carry: column {field.name!r} has a null inside a list, which the table cannot hold"
        )
    return values


def _filter(
    batches: Iterable[pa.RecordBatch], keep: npt.NDArray[np.bool_]
) -> Iterator[pa.RecordBatch]:
    row = 0
    for batch in batches:
        mask = keep[row : row + batch.num_rows]
        row += batch.num_rows
        if mask.all():
            yield batch
        elif mask.any():
            yield batch.filter(pa.array(mask))


def _rebatch(batches: Iterable[pa.RecordBatch], annotator: Annotator) -> Iterator[pa.RecordBatch]:
    # As many rows as the budget holds, one at least.
    waiting: list[pa.RecordBatch] = []
    left = annotator.budget
    for batch in batches:
        weights = annotator.weigh(batch)
        while batch.num_rows:
            rows = int(np.searchsorted(np.cumsum(weights), left, side="right"))
            rows = rows or (0 if waiting else 1)
            left -= int(weights[:rows].sum())
            waiting += [batch.slice(0, rows)] if rows else []
            batch, weights = batch.slice(rows), weights[rows:]
            if batch.num_rows or left <= 0:
                yield pa.concat_batches(waiting)
                waiting, left = [], annotator.budget
    if waiting:
        yield pa.concat_batches(waiting)


def _code_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

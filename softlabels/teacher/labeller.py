"""A run's rows: source batches through the teacher into record batches of the table."""

import importlib.metadata
import subprocess
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import BadInputError, DataError, one_line
from softlabels.fingerprint import key64, sha256_json
from softlabels.lineage import RunLineage
from softlabels.schema import table_schema
from softlabels.storage import open_root
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.targets import Ints, to_numpy
from softlabels.teacher.extract import extract
from softlabels.teacher.models import TorchTeacher
from softlabels.teacher.run import Run, Unit, example_ids

_PACKAGES = ("softlabels", "torch", "numpy", "pyarrow", "deltalake")


class Labeller:
    """A teacher at work on one run."""

    def __init__(self, run: Run, teacher: TorchTeacher) -> None:
        self.run = run
        self._teacher = teacher
        source = run.source.schema
        self.schema = table_schema(
            run.spec.temperatures, [source.field(name) for name in run.spec.carry]
        )

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

    def rehearse(self) -> tuple[int, int]:
        """Labels the first batch and throws it away; returns its rows and their bytes stored."""
        first = Unit("rehearsal", "", 0, min(self.run.spec.batch_size, self.run.source.num_rows))
        writer = self.writer(first)
        for batch in self.label(first, np.ones(first.stop, bool)):
            writer.write(batch)
        return first.stop, len(writer.close().data)

    def writer(self, unit: Unit) -> shards.ShardWriter:
        """A writer for a unit's shard, which says where its rows came from."""
        metadata = {
            "softlabels.unit": unit.name,
            "softlabels.source_rows": f"{unit.start}:{unit.stop}",
        }
        return shards.ShardWriter(self.schema, self.run.spec.profile, metadata)

    def label(self, unit: Unit, keep: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
        """Labelled rows of a unit, batch_size at a time, in source order.

        Args:
            unit: which source rows.
            keep: bool [unit rows], those to label.
        """
        batches = self.run.source.batches(unit.start, unit.stop, self.run.read_columns)
        kept = _filter(batches, keep)
        for batch in _rebatch(kept, self.run.spec.batch_size):
            yield self._label(batch, unit.start)

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
            },
            packages={name: importlib.metadata.version(name) for name in _PACKAGES},
            code_revision=_code_revision(),
            device=str(self._teacher.device),
            started_at=started_at,
            seconds=round(seconds, 3),
        )

    def _label(self, batch: pa.RecordBatch, first_row: int) -> pa.RecordBatch:
        spec = self.run.spec
        names = example_ids(self.run, batch, first_row)
        inputs = {name: batch[name] for name in spec.source.columns}
        logits = self._teacher.logits(inputs, names)
        keys = np.array([key64(spec.seed, name, 0) for name in names], np.uint64)
        targets = extract(
            logits,
            k=spec.k,
            labels=self._labels(batch, names),
            temperatures=spec.temperatures,
            draws=spec.draws,
            draws_temperature=spec.draws_temperature,
            draw_keys=keys,
        )
        targets.check(names, self._teacher.num_classes)
        columns = {
            "example_id": pa.array(names, pa.string()),
            "view": pa.array(np.zeros(len(names), np.int32)),
            **shards.round_to_profile(targets, spec.profile).columns(),
            **{name: _carried(batch, self.schema.field(name)) for name in spec.carry},
        }
        return pa.RecordBatch.from_arrays(
            [
                columns[field.name] if field.name in columns else pa.nulls(len(names), field.type)
                for field in self.schema
            ],
            schema=self.schema,
        )

    def _labels(self, batch: pa.RecordBatch, names: Sequence[str]) -> Ints | None:
        column = self.run.spec.source.label
        if column is None:
            return None
        values, classes = batch[column], self.run.contents.classes
        if pa.types.is_integer(values.type):
            # Unchecked: what int64 cannot hold turns negative and is refused below.
            found = to_numpy(values.cast(pa.int64(), safe=False).fill_null(-1), np.int64)
        elif classes is not None:
            index = {name: number for number, name in enumerate(classes)} | {None: -1}
            found = np.array([index.get(value, -2) for value in values.to_pylist()], np.int64)
        else:
            raise DataError(f"label {column!r} is {values.type}: class names need teacher.classes")
        wrong = (found < -1) | (found >= self._teacher.num_classes)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"example {names[row]!r} has label {values[row].as_py()!r}, expected one of "
                f"{list(classes) if classes else self._teacher.num_classes} or null"
            )
        return np.asarray(found, np.int32)


def _carried(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
    try:
        values = batch[field.name].cast(field.type)
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


def _rebatch(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        while batch.num_rows:
            part = batch.slice(0, size - rows)
            waiting.append(part)
            rows += part.num_rows
            batch = batch.slice(part.num_rows)
            if rows == size:
                yield pa.concat_batches(waiting)
                waiting, rows = [], 0
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

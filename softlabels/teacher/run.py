"""A run: what a spec and a source decide together, before any teacher speaks.

Its id is the sha256 of the identity fields, its units a pure function of it: the same command
again is the same run, on any machine, at any batch size.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import DataError
from softlabels.fingerprint import key64, sha256_json
from softlabels.lineage import Contents
from softlabels.schema import FORMAT_VERSION
from softlabels.teacher.models import TorchTeacher, load_teacher
from softlabels.teacher.source import Source, open_source
from softlabels.teacher.spec import CaptureSpec

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Unit:
    """A range of source rows that becomes one shard.

    Attributes:
        name: "<first 16 digits of the run id>-<number>".
        key: the Delta app id it is committed under.
        start: first source row.
        stop: row after the last.
    """

    name: str
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class Run:
    """One capture, pinned.

    Attributes:
        spec: as the user wrote it.
        source: its files by content.
        contents: what its rows have in common.
    """

    spec: CaptureSpec
    source: Source
    contents: Contents

    @cached_property
    def id(self) -> str:
        """The sha256 of the identity fields. Batch size, device and places are none of them."""
        spec = self.spec.source
        return sha256_json(
            {
                "format_version": FORMAT_VERSION,
                "contents": self.contents.model_dump(mode="json", exclude={"teacher"}),
                "teacher": self.contents.teacher.fingerprint(),
                "source": self.source.fingerprint,
                "columns": list(spec.columns),
                "example_id": spec.example_id,
                "label": spec.label,
                "shard_rows": self.spec.shard_rows,
            }
        )

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The source cut into ranges of shard_rows."""
        rows, step = self.source.num_rows, self.spec.shard_rows
        names = (f"{self.id[:16]}-{number:06d}" for number in range(-(-rows // step)))
        return tuple(
            Unit(name, f"{self.id}/{name}", number * step, min((number + 1) * step, rows))
            for number, name in enumerate(names)
        )

    @property
    def read_columns(self) -> list[str]:
        """Every source column that the run needs, each once."""
        spec = self.spec.source
        wanted = [spec.example_id, *spec.columns, spec.label, *self.spec.carry]
        return list(dict.fromkeys(name for name in wanted if name is not None))


def prepare(spec: CaptureSpec) -> tuple[Run, TorchTeacher]:
    """The run of a spec and the teacher that will do it, both checked.

    Raises:
        BadInputError: a path, a column, an argument is wrong.
        MismatchError: the weights do not fit the module.
    """
    source = spec.source
    wanted = [source.example_id, *source.columns, source.label, *spec.carry]
    opened = open_source(source.files, [name for name in wanted if name is not None])
    teacher = load_teacher(spec)
    classes = spec.teacher.classes
    contents = Contents(
        teacher=teacher.lineage,
        num_classes=spec.teacher.num_classes,
        classes=classes if isinstance(classes, tuple) else None,
        k=spec.k,
        draws=spec.draws,
        draws_temperature=spec.draws_temperature,
        temperatures=spec.temperatures,
        profile=spec.profile,
        carried=spec.carry,
        example_ids="content" if source.example_id is None else "column",
        seed=spec.seed,
    )
    return Run(spec, opened, contents), teacher


@dataclass(frozen=True)
class Scan:
    """What one pass over the source's ids and contents found.

    Attributes:
        keys: uint64 [rows], key64 of (example_id, view) of every source row.
        repeated: int64, rows whose example came before, rising; they are not labelled again.
        relabelled: how many of these have another hard label than the first.
    """

    keys: Keys
    repeated: npt.NDArray[np.int64]
    relabelled: int


def scan(run: Run, advance: Callable[[int], None] = lambda rows: None) -> Scan:
    """Reads ids, inputs and labels of the whole source once, 32 bytes of memory a row.

    Raises:
        DataError: one id has two contents, or an id or an input is null.
    """
    rows = run.source.num_rows
    keys, contents, labels = (np.zeros(rows, np.uint64) for _ in range(3))
    spec = run.spec.source
    columns = [n for n in run.read_columns if n in {spec.example_id, *spec.columns, spec.label}]
    row = 0
    for batch in run.source.batches(0, rows, columns):
        part = slice(row, row + batch.num_rows)
        names = example_ids(run, batch, row)
        keys[part] = [key64(name, 0) for name in names]
        if spec.example_id is not None:
            contents[part] = [key64(digest) for digest in content_digests(run, batch, row)]
        if spec.label is not None:
            labels[part] = [key64(label) for label in batch[spec.label].to_pylist()]
        row += batch.num_rows
        advance(batch.num_rows)
    return _find_repeated(run, keys, contents, labels)


def example_ids(run: Run, batch: pa.RecordBatch, first_row: int) -> list[str]:
    """The ids of source rows: the column that the spec names, or the content's sha256."""
    column = run.spec.source.example_id
    if column is None:
        return content_digests(run, batch, first_row)
    values = batch[column]
    if values.null_count:
        row = first_row + values.is_null().to_pylist().index(True)
        raise DataError(f"{run.source.locate(row)}: example id {column!r} is null")
    names = [str(value) for value in values.to_pylist()]
    if "" in names:
        row = first_row + names.index("")
        raise DataError(f"{run.source.locate(row)}: example id {column!r} is empty")
    return names


def content_digests(run: Run, batch: pa.RecordBatch, first_row: int) -> list[str]:
    """The sha256 of what the teacher reads of each row, as 64 hex digits."""
    for name in run.spec.source.columns:
        if batch[name].null_count:
            row = first_row + batch[name].is_null().to_pylist().index(True)
            raise DataError(f"{run.source.locate(row)}: column {name!r} is null")
    columns = [batch[name].to_pylist() for name in run.spec.source.columns]
    return [_digest(values) for values in zip(*columns, strict=True)]


def _digest(values: tuple[Any, ...]) -> str:
    digest = hashlib.sha256()
    for value in values:
        # JSON is the same in any release of Python and of time zone libraries; repr is not.
        plain = isinstance(value, bytes)
        data = b"b" + value if plain else b"j" + json.dumps(value, default=str).encode()
        # The length first, so that ("ab", "c") and ("a", "bc") differ.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _find_repeated(run: Run, keys: Keys, contents: Keys, labels: Keys) -> Scan:
    order = np.argsort(keys, kind="stable")
    again = np.zeros(len(keys), bool)
    again[1:] = keys[order][1:] == keys[order][:-1]
    starts = np.flatnonzero(~again)
    first = order[np.repeat(starts, np.diff(np.append(starts, len(keys))))]
    different = again & (contents[order] != contents[first])
    if different.any():
        at = int(np.argmax(different))
        here, there = run.source.locate(int(order[at])), run.source.locate(int(first[at]))
        raise DataError(
            f"one example id stands for two contents: {here} and {there}; "
            "make ids unique, or leave out example_id to use the content's sha256"
        )
    relabelled = int((again & (labels[order] != labels[first])).sum())
    return Scan(keys, np.sort(order[again]).astype(np.int64), relabelled)

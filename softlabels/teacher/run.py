"""A run: what a spec and a source decide together, before any teacher speaks.

Its id is the sha256 of the identity fields, its units a pure function of it: the same command
again is the same run, on any machine, at any batch size.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import DataError, one_line
from softlabels.fingerprint import key64, sha256_json
from softlabels.lineage import Contents
from softlabels.schema import FORMAT_VERSION, POSITION
from softlabels.teacher.annotator import Annotator, Classifier
from softlabels.teacher.recorded.spec import ImportSpec
from softlabels.teacher.source import VIEW, Source, open_source
from softlabels.teacher.spec import CaptureSpec, SequenceCaptureSpec

Keys = npt.NDArray[np.uint64]
Spec = CaptureSpec | SequenceCaptureSpec | ImportSpec


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
class Columns:
    """Which columns of a source mean what.

    Attributes:
        content: what the teacher reads: equal values are equal examples.
        example_id: the stable key; none: the sha256 of the content.
        label: the hard label.
        carried: those that are copied into the table.
        optional: those of the content that may be null.
    """

    content: tuple[str, ...]
    example_id: str | None = None
    label: str | None = None
    carried: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        """Every one of them, each once."""
        wanted = [self.example_id, *self.content, self.label, *self.carried]
        return list(dict.fromkeys(name for name in wanted if name is not None))


SEQUENCE_COLUMNS = ("input_ids", "position_index", "label_ids", "segment_ids")
RECORDED_COLUMNS = (
    *("input_ids", "position_index", "label_ids", "label_logprobs", "label_ranks"),
    *("topk_ids", "topk_logprobs", "tail_logprob"),
)


@dataclass(frozen=True)
class Run:
    """One capture, pinned.

    Attributes:
        spec: as the user wrote it.
        source: its files by content.
        contents: what its rows have in common.
    """

    spec: Spec
    source: Source
    contents: Contents

    @cached_property
    def columns(self) -> Columns:
        """Which source columns mean what."""
        return columns_of(self.spec)

    @cached_property
    def id(self) -> str:
        """The sha256 of the identity fields. Batch size, device and places are none of them."""
        contents = self.contents.model_dump(mode="json", exclude={"teacher"})
        for later in ("logits_width", "recorded"):
            if contents[later] is None:  # a field added later changes no run that lacks it
                del contents[later]
        identity = {
            "format_version": FORMAT_VERSION,
            "contents": contents,
            "teacher": self.contents.teacher.fingerprint(),
            "source": self.source.fingerprint,
            "shard_rows": self.spec.shard_rows,
        }
        if isinstance(self.spec, CaptureSpec):
            # The columns of a tokenised source are always the same, and its fingerprint says how
            # they came about.
            source = self.spec.source
            identity["columns"] = list(source.columns)
            identity["example_id"] = source.example_id
            identity["label"] = source.label
            if source.views:
                identity["views"] = source.views
        return sha256_json(identity)

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
        return self.columns.all

    @property
    def made_columns(self) -> list[str]:
        """What `source` has to say of where rows come from."""
        if not isinstance(self.spec, CaptureSpec):
            return []
        positions = [field.name for field in POSITION] if self.spec.carry_position else []
        return [VIEW] * (self.spec.source.views > 0) + positions


def columns_of(spec: Spec) -> Columns:
    """Which columns of the spec's source mean what; a tokenised source always has the same."""
    if isinstance(spec, SequenceCaptureSpec):
        return Columns(
            content=SEQUENCE_COLUMNS,
            example_id="example_id",
            carried=spec.carry,
            optional=("segment_ids",),
        )
    if isinstance(spec, ImportSpec):
        # The labels come with the rows: they are carried there, and are no part of the example.
        return Columns(RECORDED_COLUMNS[:2], "example_id", carried=RECORDED_COLUMNS[2:])
    source = spec.source
    return Columns(source.columns, source.example_id, source.label, spec.carry)


def prepare(
    spec: Spec,
    advance: Callable[[int], None] = lambda rows: None,
) -> tuple[Run, Annotator]:
    """The run of a spec and the teacher that will do it, both checked.

    Args:
        spec: of any kind.
        advance: told how many more rows of text were looked at while they are tokenised, or how
            many more records were read.

    Raises:
        BadInputError: a path, a column, an argument is wrong.
        MismatchError: the weights do not fit the module, or the tokenizer does not fit the model.
    """
    if isinstance(spec, ImportSpec):
        from softlabels.teacher.recorded.run import prepare_import

        found, said, recital = prepare_import(spec, advance)
        return Run(spec, found, said), recital
    if isinstance(spec, SequenceCaptureSpec):
        from softlabels.teacher.language import prepare_sequences

        source, contents, annotator = prepare_sequences(spec, advance)
        return Run(spec, source, contents), annotator
    opened = open_source(spec.source.files, columns_of(spec).all)
    if spec.source.views:
        opened = dataclasses.replace(opened, views=tuple(range(1, spec.source.views + 1)))
    classifier = Classifier(spec)
    return Run(spec, opened, classifier.contents()), classifier


@dataclass(frozen=True)
class Scan:
    """What one pass over the source's ids and contents found.

    Attributes:
        keys: uint64 [rows], key64 of (example_id, view) of every source row.
        repeated: int64, rows whose example came before, rising; they are not labelled again.
        relabelled: how many of these have another hard label than the first.
        examples: uint64 [rows], key64 of (example_id, 0): by which examples are deleted.
    """

    keys: Keys
    repeated: npt.NDArray[np.int64]
    relabelled: int
    examples: Keys


def scan(run: Run, advance: Callable[[int], None] = lambda rows: None) -> Scan:
    """Reads ids, inputs and labels of the whole source once, 40 bytes of memory a row and view.

    Raises:
        DataError: one id has two contents, or an id or an input is null.
    """
    views, rows = run.source.views, run.source.rows_of_view
    keys = np.zeros((len(views), rows), np.uint64)
    examples, contents, labels = (np.zeros(rows, np.uint64) for _ in range(3))
    spec = run.columns
    columns = dataclasses.replace(spec, carried=()).all
    row = 0
    for batch in run.source.batches(0, rows, columns):
        part = slice(row, row + batch.num_rows)
        _require_text(run, batch, row)
        names = example_ids(run, batch, row)
        examples[part] = [key64(name, 0) for name in names]
        for number, view in enumerate(views):
            keys[number, part] = [key64(name, view) for name in names] if view else examples[part]
        if spec.example_id is not None:
            contents[part] = [key64(digest) for digest in content_digests(run, batch, row)]
        if spec.label is not None:
            labels[part] = [key64(label) for label in batch[spec.label].to_pylist()]
        row += batch.num_rows
        advance(batch.num_rows)
    every = (np.tile(values, len(views)) for values in (examples, contents, labels))
    return _find_repeated(run, keys.reshape(-1), *every)


def example_ids(run: Run, batch: pa.RecordBatch, first_row: int) -> list[str]:
    """The ids of source rows: the column that the spec names, or the content's sha256."""
    column = run.columns.example_id
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
    content = run.columns.content
    for name in content:
        if batch[name].null_count and name not in run.columns.optional:
            row = first_row + batch[name].is_null().to_pylist().index(True)
            raise DataError(f"{run.source.locate(row)}: column {name!r} is null")
    columns = [batch[name].to_pylist() for name in content]
    return [_digest(values) for values in zip(*columns, strict=True)]


def _require_text(run: Run, batch: pa.RecordBatch, first_row: int) -> None:
    for name in batch.schema.names:
        try:
            batch[name].validate(full=True)  # Arrow itself does not look at a file's text
        except pa.ArrowException as error:
            raise DataError(
                f"column {name!r} at or after {run.source.locate(first_row)}: {one_line(error)}"
            ) from error


def _digest(values: tuple[Any, ...]) -> str:
    digest = hashlib.sha256()
    for value in values:
        # JSON is the same in any release of Python and of time zone libraries; repr is not.
        plain = isinstance(value, bytes)
        data = b"b" + value if plain else b"j" + json.dumps(value, default=str).encode()
        # The length first, so that ("ab", "c") and ("a", "bc") differ.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _two_contents(run: Run, row: int, other: int) -> DataError:
    """What to say of two rows of one id."""
    name = example_ids(run, next(run.source.batches(row, row + 1, run.columns.all)), row)[0]
    where, parts = f": {run.source.locate(row)} and {run.source.locate(other)}", ""
    if isinstance(run.spec, SequenceCaptureSpec):
        where = ""  # rows of the tokenised file, which users do not know
        if "#" in name:
            parts = " (ids that end in #1, #2 and so on are parts of a split document)"
    return DataError(
        f"example id {name!r} stands for two contents{where}; make ids unique, or leave out "
        f"example_id to use the content's sha256{parts}"
    )


def _find_repeated(run: Run, keys: Keys, examples: Keys, contents: Keys, labels: Keys) -> Scan:
    order = np.argsort(keys, kind="stable")
    again = np.zeros(len(keys), bool)
    again[1:] = keys[order][1:] == keys[order][:-1]
    starts = np.flatnonzero(~again)
    first = order[np.repeat(starts, np.diff(np.append(starts, len(keys))))]
    different = again & (contents[order] != contents[first])
    if different.any():
        at = int(np.argmax(different))
        raise _two_contents(run, int(order[at]), int(first[at]))
    relabelled = int((again & (labels[order] != labels[first])).sum())
    return Scan(keys, np.sort(order[again]).astype(np.int64), relabelled, examples)

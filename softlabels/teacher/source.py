"""The source: Parquet files pinned by content, read as one long row order."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np
import pyarrow as pa

from softlabels.errors import BadInputError, DataError, IntegrityError, one_line
from softlabels.fingerprint import sha256_bytes, sha256_json, sha256_stream
from softlabels.parquet import UNREADABLE, Parquet
from softlabels.schema import SOURCE_FILE, SOURCE_ROW
from softlabels.storage import Root, find_files

READ_ROWS = 4_096
READ_BYTES = 8 << 20
"""Rows of a source decoded at once, and their bytes when rows are large, such as images: what
bounds memory beside the teacher's own batch, and beside two pages of the file, which Arrow decodes
whole."""


VIEW = "view"
MADE = (VIEW, SOURCE_FILE, SOURCE_ROW)
"""Columns that `Source.batches` adds to those of the files where it is asked for them."""


@dataclass(frozen=True)
class SourceFile:
    """One Parquet file: path below the source's root, sha256 of it and of its footer, rows."""

    path: str
    sha256: str
    footer_sha256: str
    num_rows: int


@dataclass(frozen=True)
class Source:
    """All files that a pattern matched, in order of path. Rows are numbered through them.

    Attributes:
        root: the folder above the pattern's first wildcard.
        files: in order.
        schema: Arrow schema, the same in every file.
        origin: where the files were made from others: what stands for their content, so that the
            same text is the same source whatever wrote the files.
        skipped: what was left out of them when they were made, by reason.
        views: of each row. All rows are numbered for the first view, then for the next.
    """

    root: Root
    files: tuple[SourceFile, ...]
    schema: pa.Schema
    origin: str | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    views: tuple[int, ...] = (0,)

    @property
    def num_rows(self) -> int:
        """Rows of all files, once for each view."""
        return self.rows_of_view * len(self.views)

    @property
    def rows_of_view(self) -> int:
        """Rows of all files."""
        return sum(file.num_rows for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the files' contents in order; where they are does not matter."""
        if self.origin is not None:
            return self.origin
        return sha256_json([file.sha256 for file in self.files])

    def batches(
        self, start: int, stop: int, columns: Sequence[str], made: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """The rows `start` to `stop`, in order, at most READ_ROWS or some READ_BYTES at a time.

        Args:
            start: first row.
            stop: row after the last.
            columns: of the files.
            made: further ones that say where a row comes from: of MADE.
        """
        first = 0
        for view, file in product(self.views, self.files):
            low, high = max(start - first, 0), min(stop - first, file.num_rows)
            if low < high:
                for batch in _read(self.root, file, low, high, columns):
                    yield _placed(batch, made, view, file, low)
                    low += batch.num_rows
            first += file.num_rows

    def locate(self, row: int) -> str:
        """A row's file and number in it, for messages."""
        if row >= self.num_rows:
            raise IndexError(row)
        row %= self.rows_of_view
        for file in self.files:
            if row < file.num_rows:
                return f"row {row} of {file.path!r}"
            row -= file.num_rows
        raise AssertionError("unreachable")


def _placed(
    batch: pa.RecordBatch, made: Sequence[str], view: int, file: SourceFile, first: int
) -> pa.RecordBatch:
    """`batch`, whose first row is `first` of the file, with the columns `made`."""
    rows = batch.num_rows
    found = {
        VIEW: pa.array(np.full(rows, view, np.int32)),
        SOURCE_FILE: pa.repeat(file.sha256, rows),
        SOURCE_ROW: pa.array(np.arange(first, first + rows, dtype=np.int64)),
    }
    for name in made:
        batch = batch.append_column(name, found[name])
    return batch


def open_source(pattern: str, columns: Sequence[str]) -> Source:
    """The files that `pattern` matches, hashed.

    Args:
        pattern: path or fsspec URL, wildcards allowed.
        columns: those that must be there.

    Raises:
        BadInputError: nothing matches, a column is missing, or two files differ in schema.
        DataError: a file is not Parquet.
    """
    return open_files(*find_files(pattern), columns)


def open_files(root: Root, paths: Sequence[str], columns: Sequence[str]) -> Source:
    """The files at `paths` below `root`, hashed; raises as `open_source` does."""
    files, schema = [], None
    for path in paths:
        with root.open(path) as stream:
            digest = sha256_stream(stream)
        parquet, footer_sha256 = _open(root, path)
        found = parquet.schema_arrow.remove_metadata()
        schema = schema or found
        _require_columns(found, schema, columns, path, paths[0])
        files.append(SourceFile(path, digest, footer_sha256, parquet.metadata.num_rows))
    assert schema is not None  # there is at least one path
    return Source(root, tuple(files), schema)


def _require_columns(
    found: pa.Schema, schema: pa.Schema, columns: Sequence[str], path: str, first: str
) -> None:
    for name in columns:
        if found.get_field_index(name) < 0:
            raise BadInputError(
                f"source file {path!r} has no column {name!r} (columns: {', '.join(found.names)})"
            )
        if found.field(name).type != schema.field(name).type:
            raise BadInputError(
                f"column {name!r} is {found.field(name).type} in {path!r}, "
                f"{schema.field(name).type} in {first!r}"
            )


def open_parquet(root: Root, path: str) -> Parquet:
    """A Parquet file of somebody's; raises DataError where it is none, or not a whole one."""
    try:
        parquet = Parquet(root.buffer(path))
        parquet.schema_arrow  # noqa: B018 - what it says of types may be damaged too
        return parquet
    except (*UNREADABLE, IntegrityError) as error:
        reason = one_line(error)
        raise DataError(f"source file {path!r} is not a whole Parquet file: {reason}") from error


def _open(root: Root, path: str) -> tuple[Parquet, str]:
    parquet = open_parquet(root, path)
    return parquet, sha256_bytes(parquet.footer)


def _read(
    root: Root, file: SourceFile, low: int, high: int, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    parquet, footer_sha256 = _open(root, file.path)
    if footer_sha256 != file.footer_sha256:
        raise DataError(
            f"source file {file.path!r} was replaced while it was read: run the command again"
        )
    counts = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
    ends = np.cumsum(counts)
    groups = [g for g, end in enumerate(ends) if end > low and end - counts[g] < high]
    row = int(ends[groups[0]] - counts[groups[0]])
    try:
        size = parquet.rows_at_once(groups, columns, READ_ROWS, READ_BYTES)
        for batch in parquet.iter_batches(size, row_groups=groups, columns=list(columns)):
            begin, end = max(low - row, 0), min(high - row, batch.num_rows)
            row += batch.num_rows
            if begin < end:
                part = batch.slice(begin, end - begin)
                # Only names and types: files may differ in metadata and in what may be null.
                yield pa.RecordBatch.from_arrays([part[n] for n in columns], names=list(columns))
    except (*UNREADABLE, IntegrityError) as error:
        reason = one_line(error)
        raise DataError(f"source file {file.path!r} is damaged: {reason}") from error

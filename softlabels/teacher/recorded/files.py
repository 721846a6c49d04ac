"""Records of JSON lines and Parquet files, one after the other; broken ones say where."""

import hashlib
import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from softlabels.errors import BadInputError, DataError, IntegrityError, StorageError, one_line
from softlabels.fingerprint import sha256_bytes, sha256_json, sha256_stream
from softlabels.parquet import UNREADABLE, Parquet
from softlabels.storage import Root, find_files
from softlabels.teacher.lines import TOO_LONG, read_lines
from softlabels.teacher.records import require_same

SUFFIXES = (".jsonl", ".ndjson", ".parquet")
READ_ROWS = 64
READ_BYTES = 64 << 20
"""Rows of a Parquet file at once, and their bytes: a recorded sequence may be of megabytes."""


@dataclass(frozen=True)
class Record:
    """One record, or why there is none.

    Attributes:
        place: "line 3 of 'a.jsonl'", for messages.
        fields: values by name; lists of Parquet stay Arrow scalars.
        broken: reason and detail, where it cannot be read at all.
    """

    place: str
    fields: Mapping[str, Any]
    broken: tuple[str, str] | None = None


@dataclass(frozen=True)
class Files:
    """Recorded files, pinned by content.

    Attributes:
        root: the folder above the pattern's first wildcard.
        paths: in order.
        sha256s: of the files.
    """

    root: Root
    paths: tuple[str, ...]
    sha256s: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """The sha256 of the files' contents in order."""
        return sha256_json(list(self.sha256s))

    def records(self) -> Iterator[Record]:
        """All records, in order; empty lines are none.

        Raises:
            DataError: a file is not what it was when it was opened, or is no whole Parquet file.
        """
        for path, sha256 in zip(self.paths, self.sha256s, strict=True):
            read = _rows if _is_parquet(path) else _lines
            yield from read(self.root, path, sha256)


def open_files(pattern: str, layout: str) -> Files:
    """The files that `pattern` matches, hashed.

    Raises:
        BadInputError: nothing matches, or a file cannot hold the layout.
    """
    root, paths = find_files(pattern)
    wanted = {"openai": SUFFIXES[:2], "vllm": SUFFIXES[:2], "distillkit": SUFFIXES[2:]}
    suffixes = wanted.get(layout, SUFFIXES)
    for path in paths:
        if posixpath.splitext(path)[1].lower() not in suffixes:
            raise BadInputError(
                f"file {path!r} of {pattern!r}: layout {layout} is read from {', '.join(suffixes)}"
            )
    digests = []
    for path in paths:
        with root.open(path) as stream:
            digests.append(sha256_stream(stream))
    return Files(root, tuple(paths), tuple(digests))


def _is_parquet(path: str) -> bool:
    return posixpath.splitext(path)[1].lower() == ".parquet"


def _lines(root: Root, path: str, sha256: str) -> Iterator[Record]:
    digest = hashlib.sha256()
    with root.open(path) as stream:
        for count, line in enumerate(read_lines(stream, digest.update), 1):
            place = f"line {count} of {path!r}"
            if line is None:
                yield Record(place, {}, (TOO_LONG, "split the record"))
                continue
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                # ValueError: also of bytes that are not UTF-8.
                reason = "line that is not JSON, such as one cut short"
                yield Record(place, {}, (reason, one_line(error)))
                continue
            if isinstance(value, dict):
                yield Record(place, value)
            else:
                yield Record(place, {}, ("line that is no JSON object", f"found {value!r:.80}"))
    require_same(path, digest.hexdigest(), sha256)


def _rows(root: Root, path: str, sha256: str) -> Iterator[Record]:
    try:
        data = root.buffer(path)
        require_same(path, sha256_bytes(memoryview(data)), sha256)
        parquet = Parquet(data)
        row, groups = 0, range(parquet.num_row_groups)
        at_once = parquet.rows_at_once(groups, parquet.schema_arrow.names, READ_ROWS, READ_BYTES)
        for batch in parquet.iter_batches(at_once):
            for place in range(batch.num_rows):
                fields = {name: _value(batch[name][place]) for name in batch.schema.names}
                yield Record(f"row {row} of {path!r}", fields)
                row += 1
    except (*UNREADABLE, IntegrityError, StorageError) as error:
        raise DataError(f"file {path!r} is no whole Parquet file: {one_line(error)}") from error


def _value(scalar: pa.Scalar) -> Any:
    nested = pa.types.is_list(scalar.type) or pa.types.is_large_list(scalar.type)
    return scalar if nested and scalar.is_valid else scalar.as_py()


def plain(value: Any) -> Any:
    """A field's value in Python's own types."""
    return value.as_py() if isinstance(value, pa.Scalar) else value

"""Sequences kept as Parquet in a folder of this machine, each file written once."""

import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from softlabels.errors import BadInputError, DataError, SoftLabelsError, one_line
from softlabels.fingerprint import sha256_stream
from softlabels.schema import INTS
from softlabels.storage import Root, open_root, storage_errors
from softlabels.teacher.documents import Skipped
from softlabels.teacher.source import Source, open_files
from softlabels.teacher.tokenizer import Ids

GROUP_TOKENS = 1 << 19
GROUP_BYTES = 64 << 20
"""Tokens, and bytes of carried text, at which a row group of the file ends."""

ABANDONED = 24 * 3600.0
"""Seconds without a write after which a half-written file is nobody's."""

LISTS = ("input_ids", "position_index", "label_ids", "segment_ids")
_FOLDER = "sequences"
_SKIPPED = "softlabels.skipped"


@dataclass(frozen=True, eq=False)
class Row:
    """A sequence as it is stored; P positions."""

    example_id: str
    input_ids: Ids
    position_index: Ids
    label_ids: Ids
    segment_ids: Ids | None
    carried: tuple[Any, ...]


def kept(
    origin: str, rows: Iterator[Row], skipped: Skipped, carry: Sequence[pa.Field], what: str
) -> Source:
    """The source of `origin`: found in the cache, or made of `rows` and put there.

    Args:
        origin: what stands for the content; the file's name begins with it.
        rows: not touched where the file is there, whole.
        skipped: what was left out once `rows` are at their end.
        carry: fields of `Row.carried`.
        what: the files that they are made of, for messages.

    Raises:
        BadInputError: there is no row, or the cache is not a folder of this machine.
        StorageError: the cache cannot be written.
    """
    root = _cache()
    found = _made_before(root, origin)
    if found is None:
        folder = Path(root.full(_FOLDER))
        with storage_errors("write", str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            _clear(folder)
        name = _make(folder, origin, rows, skipped, carry, what)
        found = open_files(root, [f"{_FOLDER}/{name}"], [])
    counts = {reason: int(count) for reason, (count, _) in _notes(found).items()}
    return replace(found, origin=origin, skipped=counts)


def skipped_places(source: Source) -> dict[str, list[str]]:
    """Where the first few of each reason of `source.skipped` are: file and line or row."""
    return {reason: list(places) for reason, (_, places) in _notes(source).items()}


def _notes(source: Source) -> dict[str, Any]:
    data = source.root.buffer(source.files[0].path)
    metadata = pq.read_metadata(pa.BufferReader(data)).metadata
    return dict(json.loads(metadata[_SKIPPED.encode()]))


def _cache() -> Root:
    folder = os.environ.get("SOFTLABELS_CACHE") or "~/.cache/softlabels"
    root = open_root(os.path.expanduser(folder))
    if not root.is_local:
        raise BadInputError(f"SOFTLABELS_CACHE is {folder!r}: expected a folder of this machine")
    return root


def _made_before(root: Root, origin: str) -> Source | None:
    for name in root.names("sequences"):
        if not (name.startswith(f"{origin}-") and name.endswith(".parquet")):
            continue
        path = f"sequences/{name}"
        with suppress(SoftLabelsError):
            found = open_files(root, [path], [])
            if name == f"{origin}-{found.files[0].sha256}.parquet":
                return found
        root.delete(path)  # damaged: made anew
    return None


def _clear(folder: Path) -> None:
    """Removes what killed runs left half written; a live one has written within ABANDONED."""
    for file in folder.glob("*.tmp"):
        with suppress(OSError):  # another run was first
            if time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()


def _make(
    folder: Path,
    origin: str,
    rows: Iterator[Row],
    skipped: Skipped,
    carry: Sequence[pa.Field],
    what: str,
) -> str:
    """Writes the file, whole or not at all; its name."""
    temporary = folder / f"{origin}-{uuid.uuid4().hex[:8]}.tmp"
    try:
        if not _write(temporary, rows, skipped, carry):
            reasons = str(skipped) if skipped.counts else "there is no document"
            raise BadInputError(f"nothing is left of source.files {what!r}: {reasons}")
        with storage_errors("write", str(temporary)), open(temporary, "rb") as stream:
            name = f"{origin}-{sha256_stream(stream)}.parquet"
            os.fsync(stream.fileno())
            os.replace(temporary, folder / name)
        return name
    finally:
        with suppress(OSError):  # it is gone when it was renamed
            temporary.unlink()


def _write(path: Path, rows: Iterator[Row], skipped: Skipped, carry: Sequence[pa.Field]) -> int:
    fields = [pa.field("example_id", pa.string(), nullable=False)]
    fields += [pa.field(name, INTS, nullable=name == "segment_ids") for name in LISTS]
    # Tokens have no order to gain from; the other three rise.
    encodings = {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in LISTS}
    for name in ("input_ids", "label_ids"):
        encodings[f"{name}.list.element"] = "BYTE_STREAM_SPLIT"
    schema = pa.schema([*fields, *carry])
    count = 0
    with storage_errors("write", str(path)):
        writer = pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=False, column_encoding=encodings
        )
    try:
        for group in _groups(rows):
            table = _table(group, schema)
            with storage_errors("write", str(path)):
                writer.write_table(table)
            count += len(group)
        notes = {why: [n, skipped.places[why]] for why, n in sorted(skipped.counts.items())}
        writer.add_key_value_metadata({_SKIPPED: json.dumps(notes)})
    finally:
        with storage_errors("write", str(path)):
            writer.close()
    return count


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    tokens = carried = 0
    for row in rows:
        group.append(row)
        tokens += len(row.input_ids)
        carried += sum(len(value) for value in row.carried if isinstance(value, str | bytes | list))
        if tokens >= GROUP_TOKENS or carried >= GROUP_BYTES:
            yield group
            group, tokens, carried = [], 0, 0
    if group:
        yield group


def _table(group: Sequence[Row], schema: pa.Schema) -> pa.Table:
    columns = [pa.array([row.example_id for row in group], pa.string())]
    columns += [_lists([getattr(row, name) for row in group]) for name in LISTS]
    for number, field in enumerate(schema):
        if number >= len(columns):
            values = [row.carried[number - len(LISTS) - 1] for row in group]
            columns.append(_carried(values, field, group))
    return pa.Table.from_arrays(columns, schema=schema)


def _carried(values: Sequence[Any], field: pa.Field, group: Sequence[Row]) -> pa.Array:
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, OverflowError, ValueError) as error:
        ids = f"{group[0].example_id!r} to {group[-1].example_id!r}"
        raise DataError(
            f"carry: field {field.name!r} has a value in examples {ids} that {field.type} cannot "
            f"hold: {one_line(error)[:120]}"
        ) from error


def _lists(values: Sequence[Ids | None]) -> pa.Array:
    found = [value for value in values if value is not None]
    if not found:
        return pa.nulls(len(values), INTS)
    offsets = np.cumsum([0, *map(len, found)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(found), type=INTS)

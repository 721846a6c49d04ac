"""Decoded row groups as flat files, made to be read in part: a header, then aligned arrays.

Rows of many bytes are laid out row by row, so that one of them is one read from the page cache
into its place, and nothing is mapped; others array by array, and are views of a mapping.

Layout, little-endian: MAGIC, the header's length as uint64, 32 bytes of checksum, padding to 64;
the header as JSON; then every part at a multiple of 64: `num_positions`; the example ids and
asked columns as one Arrow stream; then the targets.

The checksum is the sha256 of the header and of the sums, modulo 2^64, of every 4 KiB of each part:
any changed byte changes it, at the speed of memory, ten times that of hashing all bytes.
"""

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.student.lease import Lease
from softlabels.student.records import Records, interleaved
from softlabels.student.rows import Rows
from softlabels.targets import Ints, SoftTargets, Temper

MAGIC = b"SLFLAT01"
ALIGNMENT = 64

RECORD_BYTES = 4096
"""Mean bytes of a row's targets from which rows are laid out one by one."""

FIRST_BYTES = 16 << 10
"""Of a file, that are read at first: most headers, example ids and counts are within."""

_WORDS = 512  # of 8 bytes, that one sum covers
_PREFIX = struct.Struct("<8sQ32s16x")
_KINDS = {"int32": np.int32, "float32": np.float32}

Bytes = npt.NDArray[np.uint8]


class DamagedError(Exception):
    """The bytes are not those that were written."""


def dump(rows: Rows) -> list[Any]:
    """Buffers whose bytes, one after the other, are the file."""
    named = list(arrays_of(rows.targets))
    total = sum(values.nbytes for _, values in named)
    parts: list[Bytes] = [_bytes(rows.targets.num_positions), _stream(rows)]
    shapes = [[name, values.dtype.name, *values.shape[1:]] for name, values in named]
    if by_row := total >= RECORD_BYTES * max(1, len(rows)):
        parts.append(interleaved([values for _, values in named], rows.targets.num_positions))
    else:
        parts += [_bytes(values) for _, values in named]
    fields = {"by_row": by_row, "arrays": shapes, "parts": [len(part) for part in parts]}
    header = json.dumps(fields).encode()
    prefix = _PREFIX.pack(MAGIC, len(header), _checksum(header, parts))
    out: list[Any] = [prefix, header, bytes(-len(header) % ALIGNMENT)]
    for part in parts:
        out += [part.data, bytes(-len(part) % ALIGNMENT)]
    return [part for part in out if len(part)]


def load(descriptor: int, size: int, verify: bool = True) -> Rows | Records:
    """The rows of an open file, as views of a mapping, or as records still to be read.

    Args:
        descriptor: of the file.
        size: its bytes.
        verify: compare the checksum first, for which all of it is read.

    Raises:
        DamagedError: it is cut short or was changed.
        OSError: it cannot be read.
    """
    begin = _begin(descriptor, size if verify else min(size, FIRST_BYTES))
    if len(begin) < _PREFIX.size:
        raise DamagedError(f"{len(begin)} bytes")
    magic, length, checksum = _PREFIX.unpack(begin[: _PREFIX.size].tobytes())
    if magic != MAGIC or _PREFIX.size + length > size:
        raise DamagedError("no header")
    begin = _longer(begin, descriptor, _PREFIX.size + length)
    header = begin[_PREFIX.size : _PREFIX.size + length].tobytes()
    try:
        fields = json.loads(header)
        sizes = [int(part) for part in fields["parts"]]
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedError("a header that cannot be read") from error
    starts, at = [], _PREFIX.size + _padded(length)
    for part in sizes:
        starts.append(at)
        at += _padded(part)
    if at != size:
        raise DamagedError(f"{size} bytes, expected {at}")
    if verify:
        parts = [begin[s : s + n] for s, n in zip(starts, sizes, strict=True)]
        if _checksum(header, parts) != checksum:
            raise DamagedError("another checksum")
    mapped = not fields["by_row"] or sizes[1] > FIRST_BYTES
    if mapped:
        begin = np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), np.uint8)
    else:  # copied, or it would hold on to all that was read
        begin = _longer(begin, descriptor, starts[1] + sizes[1])[: starts[1] + sizes[1]].copy()
    return _loaded(begin, fields, starts, sizes)


def _loaded(
    data: Bytes, fields: dict[str, Any], starts: list[int], sizes: list[int]
) -> Rows | Records:
    parts = [data[at : at + size] for at, size in zip(starts, sizes, strict=True)]
    counts: Ints = parts[0].view(np.int32)
    batch = pa.ipc.open_stream(pa.py_buffer(parts[1])).read_next_batch()
    ids = batch.column(0)
    columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names) if i}
    arrays = [
        (name, np.dtype(_KINDS[kind]), width[0] if width else None)
        for name, kind, *width in fields["arrays"]
    ]
    if fields["by_row"]:
        return Records(counts, ids, columns, tuple(arrays), starts[2])
    total = int(counts.sum())
    found = {
        name: part.view(kind).reshape((total,) if width is None else (total, width))
        for (name, kind, width), part in zip(arrays, parts[2:], strict=True)
    }
    return Rows(targets_of(counts, found), ids, columns)


def arrays_of(targets: SoftTargets) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The arrays of soft targets as a flat file names them; without the counts."""
    for name, values in vars(targets).items():
        if isinstance(values, np.ndarray) and name != "num_positions":
            yield name, values
    for temperature, own in targets.temper.items():
        yield f"shift:{temperature!r}", own.shift
        yield f"tail:{temperature!r}", own.tail


def targets_of(counts: Ints, arrays: dict[str, npt.NDArray[Any]]) -> SoftTargets:
    """Soft targets from their arrays as a flat file names them."""
    values: dict[str, Any] = {}
    temper: dict[float, dict[str, Any]] = {}
    for name, array in arrays.items():
        field, _, temperature = name.partition(":")
        if temperature:
            temper.setdefault(float(temperature), {})[field] = array
        else:
            values[name] = array
    both = {t: Temper(**found) for t, found in temper.items()}
    return SoftTargets(num_positions=counts, **values, temper=both)


def _longer(begin: Bytes, descriptor: int, size: int) -> Bytes:
    """The beginning of a file, read further where it is not that long yet."""
    if len(begin) < size and len(begin := _begin(descriptor, size)) < size:
        raise DamagedError(f"{len(begin)} bytes")
    return begin


def _begin(descriptor: int, size: int) -> Bytes:
    found = Lease(size).empty((size,), np.uint8)
    return found[: os.preadv(descriptor, [found.data], 0)] if size else found


def _bytes(values: npt.NDArray[Any]) -> Bytes:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _stream(rows: Rows) -> Bytes:
    names = ["", *rows.columns]
    batch = pa.RecordBatch.from_arrays([rows.example_ids, *rows.columns.values()], names)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return np.frombuffer(sink.getvalue(), np.uint8)


def _checksum(header: bytes, parts: Iterable[Bytes]) -> bytes:
    digest = hashlib.sha256(header)
    for data in parts:
        words = data[: len(data) // 8 * 8].view(np.uint64)
        whole = len(words) // _WORDS * _WORDS
        sums = np.add.reduce(words[:whole].reshape(-1, _WORDS), axis=1)
        digest.update(sums.tobytes())
        digest.update(np.add.reduce(words[whole:]).tobytes())
        digest.update(data[len(words) * 8 :].tobytes())
    return digest.digest()


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT

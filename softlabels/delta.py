"""Data pages of Parquet whose texts cost more than the page says: refused before they are decoded.

Where lengths are stored as differences, a few bytes stand for a billion of them, which pyarrow
unpacks whatever the page holds; where texts share the beginnings of one another, a kilobyte stands
for gigabytes.

Source: apache/parquet-format, Encodings.md.
"""

import struct
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from softlabels.errors import IntegrityError

WANTED: Mapping[int, Any] = {
    5: {1: None, 2: None},
    8: {1: None, 4: None, 5: None, 6: None, 7: None},
}
"""Of a page's header, as `thrift.Compact.struct` has it: what `check_page` looks at."""

_LENGTHS, _BEGINNINGS = 6, 7  # DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY
HIDING = (_LENGTHS, _BEGINNINGS)
"""Encodings that `check_page` looks at."""

_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


def encoding(header: Mapping[int, Any]) -> int | None:
    """The encoding of a data page's values, by Parquet's number; None: it is no data page."""
    found: int | None = None
    if 5 in header:
        found = header[5].get(2)
    elif 8 in header:
        found = header[8].get(4)
    return found


def check_page(
    header: Mapping[int, Any], packed: memoryview, size: int, codec: int, levels: int
) -> None:
    """Raises IntegrityError where decoding a data page takes more than its size and count say.

    Args:
        header: of the page, the fields of WANTED.
        packed: the page's bytes in the file.
        size: bytes of the page, unpacked; the caller has seen that they are not too many.
        codec: by Parquet's number.
        levels: how many kinds of levels stand before the values: 0, 1 or 2.
    """
    kind = encoding(header)
    if kind == _BEGINNINGS:
        raise IntegrityError(
            "texts that share their beginnings (DELTA_BYTE_ARRAY) may become any size: if you "
            "trust the file, write it again with another encoding"
        )
    if kind != _LENGTHS:
        return
    values = header[5 if 5 in header else 8][1]
    try:
        count = _count(_values(header, packed, size, codec, levels))
    except (pa.ArrowException, IndexError, OSError, ValueError, struct.error) as error:
        raise IntegrityError("a page of texts is damaged") from error
    if count > values:
        raise IntegrityError(f"a page of {values} values has the lengths of {count}")


def _values(
    header: Mapping[int, Any], packed: memoryview, size: int, codec: int, levels: int
) -> memoryview:
    """The bytes of a page after its levels, unpacked."""
    plain = 0
    if 8 in header:  # here levels are not packed
        said = header[8]
        plain = said.get(5, 0) + said.get(6, 0)
        levels = 0
        codec = codec if said.get(7, True) else 0
    if not 0 <= plain <= min(size, len(packed)):
        raise ValueError(plain)
    data = packed[plain:].cast("B")  # those of Arrow are signed
    if size == plain:
        return data[:0]
    if codec:
        unpacked = pa.Codec(_CODECS.get(codec, "")).decompress(pa.py_buffer(data), size - plain)
        data = memoryview(unpacked).cast("B")
    for _ in range(levels):
        (length,) = struct.unpack_from("<I", data)
        data = data[4 + length :]
    return data


def _count(data: memoryview) -> int:
    """How many whole numbers a block of differences (DELTA_BINARY_PACKED) says that it holds."""
    at, found = 0, 0
    for _ in range(3):  # size of a block, its parts, the count
        found = shift = 0
        while True:
            byte = data[at]
            at += 1
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 63:
                raise ValueError(shift)
    return found

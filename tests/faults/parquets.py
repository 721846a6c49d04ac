"""Parquet files that lie, made byte by byte: what pyarrow would never write."""

import struct
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

INT32, INT64, BYTE_ARRAY = 1, 2, 6
ZSTD, PLAIN, RLE, RLE_DICTIONARY = 6, 0, 3, 8
DELTA, DELTA_LENGTH, DELTA_BYTES = 5, 6, 7

Field = tuple[int, Any]
"""Number and value: int (i32 or i64), str, bytes, list, or a Struct."""


class Struct(tuple[Field, ...]):
    """Fields of a Thrift struct, by rising number."""


class I64(int):
    """A whole number of 64 bits."""


def _varint(number: int) -> bytes:
    out = bytearray()
    while True:
        number, low = number >> 7, number & 127
        out.append(low | (128 if number else 0))
        if not number:
            return bytes(out)


def _kind(value: Any) -> int:
    for kind, of in ((6, I64), (5, int), (8, str), (8, bytes), (12, Struct), (9, list)):
        if isinstance(value, of):
            return kind
    raise TypeError(value)


def encode(value: Any) -> bytes:
    """`value` in Thrift's compact protocol."""
    if isinstance(value, int):
        return _varint((value << 1) ^ (value >> 63))
    if isinstance(value, str | bytes):
        data = value.encode() if isinstance(value, str) else value
        return _varint(len(data)) + data
    if isinstance(value, list):
        kind = _kind(value[0]) if value else 12
        short = len(value) < 15
        head = bytes([len(value) << 4 | kind]) if short else bytes([0xF0 | kind])
        return head + (b"" if short else _varint(len(value))) + b"".join(map(encode, value))
    out, last = bytearray(), 0
    for number, inner in value:
        out += bytes([(number - last) << 4 | _kind(inner)]) + encode(inner)
        last = number
    return bytes(out) + b"\0"


def data_page(packed: bytes, size: int, values: int, encoding: int = PLAIN) -> bytes:
    """A data page: header and bytes; `size` and `values` are what it says."""
    inner = Struct([(1, values), (2, encoding), (3, RLE), (4, RLE)])
    return encode(Struct([(1, 0), (2, size), (3, len(packed)), (5, inner)])) + packed


def dictionary_page(packed: bytes, size: int, values: int) -> bytes:
    """A dictionary page, as `data_page`."""
    inner = Struct([(1, values), (2, PLAIN)])
    return encode(Struct([(1, 2), (2, size), (3, len(packed)), (7, inner)])) + packed


def zstd(data: bytes) -> bytes:
    """Compressed; 256 MB of zeros are 12 KB."""
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def chunk(
    start: int,
    stored: int,
    values: int,
    kind: int = INT32,
    name: str = "a",
    dictionary: int | None = None,
    size: int = 100,
) -> Struct:
    """The footer's description of a column chunk."""
    fields: list[Field] = [
        (1, kind),
        (2, [PLAIN, RLE, RLE_DICTIONARY]),
        (3, [name]),
        (4, ZSTD),
        (5, I64(values)),
        (6, I64(size)),
        (7, I64(stored)),
        (9, I64(start)),
    ]
    if dictionary is not None:
        fields.append((11, I64(dictionary)))
    return Struct([(2, I64(start)), (3, Struct(fields))])


def group(chunks: Sequence[Struct], rows: int) -> Struct:
    """A row group."""
    return Struct([(1, list(chunks)), (2, I64(100)), (3, I64(rows))])


def leaf(name: str = "a", kind: int = INT32) -> Struct:
    """A required column of the schema."""
    return Struct([(1, kind), (3, 0), (4, name)])


def schema(leaves: Sequence[Struct]) -> list[Struct]:
    """The schema of flat columns."""
    return [Struct([(4, "root"), (5, len(leaves))]), *leaves]


def file(body: bytes, elements: list[Struct], rows: int, groups: Sequence[Struct]) -> bytes:
    """A whole file that says it is a shard and a plan; `body` begins at byte 4."""
    said = (("softlabels.format_version", "1"), ("softlabels.plan", "{}"))
    meta = [Struct([(1, key), (2, value)]) for key, value in said]
    footer = [(1, 2), (2, elements), (3, I64(rows)), (4, list(groups)), (5, meta)]
    return whole(body, encode(Struct(footer)))


def whole(body: bytes, end: bytes) -> bytes:
    """A file around a footer that is written already."""
    return b"PAR1" + body + end + struct.pack("<I", len(end)) + b"PAR1"


def one_column(page: bytes, values: int, rows: int, kind: int = INT32, **said: Any) -> bytes:
    """A file of one row group and column, "a"."""
    part = chunk(4, len(page), values, kind, **said)
    return file(page, schema([leaf(kind=kind)]), rows, [group([part], rows)])


def differences(count: int, first: int, second: int | None = None) -> bytes:
    """`count` whole numbers as DELTA_BINARY_PACKED: `first`, then `second` again and again.

    Differences of 0 take no bits: without `second` a billion numbers are 15 bytes.
    """
    if second is None:
        head = b"".join(map(_varint, (1 << 30, 4, count)))
        return head + encode(first) + encode(0) + bytes(4)
    step, block = second - first, 128
    width, least = abs(step).bit_length(), min(step, 0)
    parts = [step - least] + [-least] * (block - 1)
    bits = sum(part << place * width for place, part in enumerate(parts))
    out = b"".join(map(_varint, (block, 4, count))) + encode(first) + encode(least)
    out += bytes([width]) * 4 + bits.to_bytes(block * width // 8, "little")
    return out + (encode(0) + bytes(4)) * ((count - 2) // block)


def text_page(data: bytes, values: int, encoding: int) -> bytes:
    """A file of one column of texts, and one page."""
    page = data_page(zstd(data), len(data), values, encoding)
    return one_column(page, values, values, BYTE_ARRAY)


def run(count: int, value: int) -> bytes:
    """Levels, or indexes of a dictionary: `value` again and again."""
    return _varint(count << 1) + bytes([value])


def listed(
    repetition: bytes, definition: bytes, values: int, rows: int, data: bytes, depth: int = 1
) -> bytes:
    """A file of one column, lists of numbers in `depth` levels, whose levels are as given."""
    elements, path = [Struct([(4, "root"), (5, 1)])], []
    for level in range(depth):
        path += ["element" if level else "a", "list"]
        outer = Struct([(3, 0), (4, path[-2]), (5, 1), (6, 3)])
        elements += [outer, Struct([(3, 2), (4, "list"), (5, 1)])]
    elements.append(Struct([(1, INT32), (3, 0), (4, "element")]))
    body = b"".join(struct.pack("<I", len(part)) + part for part in (repetition, definition)) + data
    page = data_page(zstd(body), len(body), values)
    (_, (_, fields)) = chunk(4, len(page), values)
    inner = Struct([(n, [*path, "element"] if n == 3 else value) for n, value in fields])
    return file(page, elements, rows, [group([Struct([(2, I64(4)), (3, inner)])], rows)])


def pages_that_lie() -> dict[str, bytes]:
    """Pages that hide what they become, or point outside of what there is; by what is wrong."""
    length = 1 << 20
    lengths = differences(1_000_000_000, 0)
    shared = differences(100_000, 0, length) + differences(100_000, length, 0) + b"x" * length
    word = struct.pack("<I", 1) + b"x"
    words = dictionary_page(zstd(word), len(word), 1)
    endless = dictionary_page(zstd(word), len(word), 2**31 - 1)
    far = data_page(zstd(b"\x08" + run(10, 127)), 3, 10, RLE_DICTIONARY)

    def pointing(to: bytes) -> bytes:
        body = to + far
        part = chunk(4 + len(to), len(body), 10, BYTE_ARRAY, dictionary=4)
        return file(body, schema([leaf(kind=BYTE_ARRAY)]), 10, [group([part], 10)])

    ten, one, zero = bytes(40), run(10, 1), run(10, 0)
    millions = 15_000_000
    deep = (run(millions, 0), run(millions, 40), millions, millions, bytes(4 * millions))
    header = encode(Struct([(1, 0), (2, 20), (3, 20)]))[:-1]
    packed = data_page(zstd(lengths), len(lengths), 10, DELTA)
    return {
        "a billion lengths": text_page(lengths, 10, DELTA_LENGTH),
        "a billion beginnings": text_page(lengths * 2, 10, DELTA_BYTES),
        "texts that share a megabyte": text_page(shared, 100_000, DELTA_BYTES),
        "lengths without an end": text_page(b"\xff" * 40, 10, DELTA_LENGTH),
        "no lengths": text_page(b"", 10, DELTA_LENGTH),
        "a billion differences": one_column(packed, 10, 10),
        "a text longer than its page": text_page(b"\xff" * 5, 1, PLAIN),
        "lists forty deep": listed(*deep, depth=40),
        "an index outside of the dictionary": pointing(words),
        "a dictionary of two billion words": pointing(endless),
        "lists that begin inside of one": listed(one, one, 10, 10, ten),
        "lists in more lists than there are": listed(run(10, 200), one, 10, 10, ten),
        "values deeper than the schema": listed(zero, run(10, 200), 10, 10, ten),
        "more lists than rows": listed(zero, one, 10, 3, ten),
        "fewer lists than rows": listed(zero, one, 10, 30, ten),
        "levels that go on": listed(run(2**31 - 1, 0), one, 10, 10, ten),
        "lists without values": listed(zero, one, 10, 10, b""),
        "levels longer than the page": one_column(data_page(zstd(b"\xff" * 4), 4, 10), 10, 10),
        "a page header that is deep": one_column(header + b"\x1c" * 60_000, 10, 10),
        "a page header of a long list": one_column(
            header + b"\x79\xf3" + _varint(8 << 20) + bytes(9 << 20), 10, 10
        ),
        "a footer that is deep": whole(b"", b"\x15\x02" + b"\x1c" * 60_000),
        "a footer of deep lists": whole(b"", b"\x15\x02\x19" + b"\x19" * 60_000),
        "a footer of a long list": whole(
            b"", b"\x15\x02\x29\xf3" + _varint(15 << 20) + bytes(15 << 20) + b"\0"
        ),
    }


def lies() -> dict[str, bytes]:
    """By what is wrong with it."""
    zeros = zstd(bytes(300 << 20))
    huge = data_page(zeros, 300 << 20, 75 << 20)
    few = data_page(zstd(bytes(40)), 40, 10)
    runs = zstd(b"\x01" + _varint(1_000_000_000 << 1) + b"\0")
    text = struct.pack("<I", 1 << 20) + bytes(1 << 20)
    words = dictionary_page(zstd(text), len(text), 1)
    repeated = words + data_page(runs, 7, 1_000_000_000, RLE_DICTIONARY)
    ok = chunk(4, len(few), 10)
    empty = Struct([(2, I64(4))])
    tiny = encode(empty)
    many = 2_000_000
    element = encode(leaf())

    def listed(number: int, before: bytes, count: int, one: bytes, after: bytes) -> bytes:
        mark = bytes([number << 4 | 9, 0xF0 | 12]) + _varint(count)
        return before + mark + one * count + after

    version, root = b"\x15\x02", encode(schema([leaf()])[0])
    elements = b"\x19\x2c" + root + element
    row_groups = listed(1, b"", many, tiny, b"\x16\x02\x16\x02\0")
    return {
        "a page of zeros": one_column(huge, 75 << 20, 75 << 20),
        "pages that the footer does not own up to": one_column(huge, 75 << 20, 75 << 20, size=10),
        "a page larger than memory": one_column(data_page(zeros, 2**31 - 1, 10), 10, 10),
        "a page of a negative size": one_column(data_page(zeros, -5, 10), 10, 10),
        "one text a billion times": file(
            repeated,
            schema([leaf(kind=BYTE_ARRAY)]),
            1_000_000_000,
            [
                group(
                    [
                        chunk(
                            4 + len(words),
                            len(repeated),
                            1_000_000_000,
                            BYTE_ARRAY,
                            dictionary=4,
                        )
                    ],
                    1_000_000_000,
                )
            ],
        ),
        "more rows than values": one_column(few, 10, 2**40),
        "more values than rows": one_column(data_page(zeros, 300 << 20, 75 << 20), 75 << 20, 10),
        "fewer values than the page": one_column(data_page(zstd(bytes(40)), 40, 2**31 - 1), 10, 10),
        "no rows and a negative count": one_column(few, 10, -10),
        "rows that groups do not have": file(few, schema([leaf()]), 99, [group([ok], 10)]),
        "a chunk outside of the file": file(
            few, schema([leaf()]), 10, [group([chunk(10**9, 10**9, 10)], 10)]
        ),
        "a chunk at a negative place": file(
            few, schema([leaf()]), 10, [group([chunk(-8, 100, 10)], 10)]
        ),
        "a chunk without a description": file(few, schema([leaf()]), 10, [group([empty], 10)]),
        "fewer chunks than columns": file(few, schema([leaf(), leaf("b")]), 10, [group([ok], 10)]),
        "more chunks than columns": file(few, schema([leaf()]), 10, [group([ok, ok], 10)]),
        "a schema without columns": file(few, schema([]), 10, [group([], 10)]),
        "a schema that is deep": file(
            few, [Struct([(3, 0), (4, "r"), (5, 1)])] * 20_000 + [leaf()], 10, [group([ok], 10)]
        ),
        "a schema that counts wrongly": file(
            few, [Struct([(4, "root"), (5, 9)]), leaf()], 10, [group([ok], 10)]
        ),
        "two million columns": whole(few, listed(1, version, many, element, b"\x16\x14\x19\x0c\0")),
        "two million empty chunks": whole(
            few, version + elements + b"\x16\x02\x19\x1c" + row_groups + b"\0"
        ),
        "a footer of nothing": whole(few, b""),
        "a footer of noise": whole(few, bytes(range(256)) * 40),
        "a footer longer than the file": b"PAR1" + struct.pack("<I", 2**31) + b"PAR1",
    }

"""Parquet files that a stranger may have made: what they would cost, known before it is paid.

A few kilobytes of Parquet can stand for gigabytes: pages of zeros, one value a billion times, a
footer of empty structs. So footers are counted before they are parsed, and the headers of pages,
whose sizes bind the decoder, are added up before a page is unpacked.

Source: apache/parquet-format, src/main/thrift/parquet.thrift.
"""

import struct
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabels.errors import IntegrityError
from softlabels.pages import MOST_BYTES, MOST_RATIO, Chunk, Pages, read_pages, require_bounded
from softlabels.thrift import Compact, Wanted

MOST_FOOTER_BYTES = 16 << 20
"""Of a footer: some 100,000 column chunks."""

MOST_FOOTER_STRUCTS = 500_000
"""Each may take 700 bytes of memory and 3 of the file."""

_COUNTED_FOOTER_BYTES = 1 << 20
"""A smaller footer is not counted: its structs take 250 MB at the most."""

MOST_COLUMNS = 10_000

MOST_TEXT = 4 << 30
"""Bytes of one column's text in a row group, however few are stored; MOST_RATIO counts too."""

MOST_ROWS = 16_000_000
"""Of a file, however few bytes it has; MOST_RATIO counts too."""

UNREADABLE = (
    pa.ArrowException,
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What damaged bytes make pyarrow raise."""

_WIDTHS = {0: 1, 1: 4, 2: 8, 3: 12, 4: 4, 5: 8}  # of physical types: BOOLEAN, INT32, … DOUBLE
_TEXT = 6

_CHUNK: Wanted = dict.fromkeys((1, 3, 4, 5, 7, 9, 11))
_FOOTER: Wanted = {4: {1: {3: _CHUNK}}}


Layout = list[tuple[tuple[str, ...], npt.NDArray[np.int64] | None]]
"""Of each row group the paths of its columns and, int64 [columns, 5], what `Chunk` says of them."""


class Parquet(pq.ParquetFile):  # type: ignore[misc]
    """A Parquet file over bytes in memory that says what reading it would cost.

    Args:
        data: the whole file; what is not read may hold anything.
        footer_bytes: the largest footer that is parsed.
        layout: that of a file with the same footer; else it is found when it is needed.
        options: of `pq.ParquetFile`.

    Raises:
        IntegrityError: its footer is not whole, too large, or contradicts itself.
    """

    def __init__(
        self,
        data: pa.Buffer,
        footer_bytes: int = MOST_FOOTER_BYTES,
        layout: "Layout | None" = None,
        **options: Any,
    ) -> None:
        if layout is not None:
            self.layout = layout
        self._data = data
        self._view = memoryview(data)
        self._options = options
        self._sizes: dict[tuple[int, int], int] = {}
        _check_footer(footer(data), footer_bytes)
        super().__init__(
            pa.BufferReader(data),
            thrift_string_size_limit=footer_bytes,
            thrift_container_size_limit=MOST_FOOTER_STRUCTS,
            **options,
        )
        _check_counts(self.metadata, len(self._view))

    @property
    def footer(self) -> memoryview:
        """The bytes of the footer, to the end of the file."""
        return footer(self._view)

    def chunks(self, group: int, columns: Sequence[str] | None = None) -> list[Chunk]:
        """The columns of a row group: those of top-level `columns`; None: all.

        pyarrow's own `metadata.row_group(group).column(index)` ends the process where a damaged
        footer lacks one.

        Raises:
            IntegrityError: the footer does not describe them.
        """
        paths, numbers = self.layout[group] if group < len(self.layout) else ((), None)
        if numbers is None:
            raise IntegrityError(f"row group {group} is not described in the footer")
        starts, stored = numbers[:, 3], numbers[:, 4]
        if ((starts < 0) | (stored < 0) | (starts > len(self._view) - stored)).any():
            raise IntegrityError(f"row group {group} has columns outside of the file")
        if len(paths) != self.metadata.num_columns:
            raise IntegrityError(
                f"row group {group} has {len(paths)} columns, the schema "
                f"{self.metadata.num_columns}"
            )
        found = (Chunk(i, path, *numbers[i].tolist()) for i, path in enumerate(paths))
        return [chunk for chunk in found if columns is None or chunk.column in columns]

    def check(self, groups: Sequence[int], columns: Sequence[str] | None = None) -> None:
        """Raises IntegrityError when row groups would decode to more than is decoded at once.

        Args:
            groups: to be read whole and together.
            columns: top-level ones to be read; None: all.
        """
        size = stored = 0
        for group in groups:
            for chunk in self.chunks(group, columns):
                key = (group, chunk.index)
                if key not in self._sizes:
                    self._sizes[key] = self._decoded(group, chunk)
                size += self._sizes[key]
                stored += chunk.stored
            require_bounded(size, stored, f"row group {group}")

    def rows_at_once(
        self, groups: Sequence[int], columns: Sequence[str], rows: int, size: int
    ) -> int:
        """How many rows to decode at a time: at most `rows`, and some `size` bytes.

        Raises:
            IntegrityError: a page, or the lists of a row group, would take more than they may.
        """
        most = rows
        for group in groups:
            row = longest = 0
            for chunk in self.chunks(group, columns):
                pages = self._pages(group, chunk)
                where = f"column {chunk.path!r} of row group {group}"
                if self.schema.column(chunk.index).max_repetition_level:
                    require_bounded(self._decoded(group, chunk), chunk.stored, where)
                    row += pages.size // max(1, self.metadata.row_group(group).num_rows)
                else:
                    require_bounded(pages.largest, chunk.stored, where)
                    row += max(pages.heaviest, self._width(chunk))
                if pages.dictionary > size // rows and chunk.kind == _TEXT:
                    longest += self._longest(group, chunk, pages)
            most = min(most, size // max(row, 1), MOST_BYTES // 4 // max(longest, 1))
        return max(1, most)

    @cached_property
    def layout(self) -> "Layout":
        """Where the columns of each row group are; costs 300 µs a row group."""
        known: dict[tuple[str, ...], tuple[str, ...]] = {}
        return [_described(one, known) for one in _parse_footer(self.footer, _FOOTER).get(4, ())]

    def _pages(self, group: int, chunk: Chunk) -> Pages:
        try:
            leaf = self.schema.column(chunk.index)
            levels = (leaf.max_definition_level > 0) + (leaf.max_repetition_level > 0)
            return read_pages(self._view, chunk, levels)
        except (LookupError, RecursionError) as error:
            raise IntegrityError(
                f"the pages of column {chunk.path!r} in row group {group} are damaged"
            ) from error

    def _width(self, chunk: Chunk) -> int:
        found = _WIDTHS.get(chunk.kind)
        return max(0, self.schema.column(chunk.index).length) if found is None else found

    def _decoded(self, group: int, chunk: Chunk) -> int:
        """Bytes in memory of a whole column chunk."""
        pages = self._pages(group, chunk)
        # Two levels of 2 bytes each, or 4 of an offset for each list around it, come with a value.
        values = max(pages.values, chunk.values, 0)
        lists: int = max(1, self.schema.column(chunk.index).max_repetition_level)
        size = max(pages.size, values * (self._width(chunk) + 4 * lists))
        if chunk.kind == _TEXT and pages.dictionary:
            # As if every value were as long as the dictionary; where that is too much, as it is.
            if size + values * pages.dictionary <= MOST_BYTES:
                return size + values * pages.dictionary
            require_bounded(size, chunk.stored, f"row group {group}")
            return size + self._text_bytes(group, chunk.path)
        return size

    def _as_dictionary(self, path: str) -> pq.ParquetFile:
        return pq.ParquetFile(
            pa.BufferReader(self._data),
            metadata=self.metadata,
            read_dictionary=[path],
            **self._options,
        )

    def _text_bytes(self, group: int, path: str) -> int:
        """Bytes of all texts of a column chunk, which is read without repeating any."""
        table = self._as_dictionary(path).read_row_group(group, columns=[path])
        found = 0
        for texts in _leaves(table.column(0).chunks):
            if not pa.types.is_dictionary(texts.type):
                found += int(texts.nbytes)
                continue
            lengths = pc.cast(_lengths(texts), pa.int64()).take(texts.indices)
            found += int(pc.sum(lengths).as_py() or 0)
        return found

    def _longest(self, group: int, chunk: Chunk, pages: Pages) -> int:
        """Bytes of the longest text of a column chunk's dictionary, which any row may hold."""
        path = chunk.path
        batches = self._as_dictionary(path).iter_batches(1, row_groups=[group], columns=[path])
        texts = _leaves([next(batches).column(0)])[0]
        if not pa.types.is_dictionary(texts.type):
            return 0
        longest = int(pc.max(_lengths(texts)).as_py() or 0)
        if longest * pages.values > MOST_TEXT:
            found = self._text_bytes(group, path)
            require_bounded(found, chunk.stored, f"column {path!r} of row group {group}", MOST_TEXT)
        return longest


def footer(data: bytes | memoryview | pa.Buffer) -> memoryview:
    """The bytes from the start of a Parquet file's footer to its end.

    Raises:
        IntegrityError: the file is cut short or is no Parquet file.
    """
    view = memoryview(data)
    if len(view) < 12 or bytes(view[-4:]) != b"PAR1":
        raise IntegrityError(f"not a whole Parquet file: {len(view)} bytes without its end mark")
    (length,) = struct.unpack("<I", view[-8:-4])
    if length + 12 > len(view):
        raise IntegrityError(f"not a whole Parquet file: footer of {length} bytes in {len(view)}")
    return view[-8 - length :]


def _check_footer(end: memoryview, most: int) -> None:
    size = len(end) - 8
    if size > most:
        raise IntegrityError(f"a footer of {size} bytes: expected {most} at most")
    if size > _COUNTED_FOOTER_BYTES:
        _parse_footer(end, {})


def _parse_footer(end: memoryview, wanted: Wanted) -> dict[int, Any]:
    try:
        return Compact(bytes(end[:-8]), 0, MOST_FOOTER_STRUCTS).struct(wanted)
    except (LookupError, RecursionError) as error:
        raise IntegrityError("its footer is damaged") from error


def _check_counts(metadata: pq.FileMetaData, size: int) -> None:
    if metadata.num_columns > MOST_COLUMNS:
        raise IntegrityError(f"{metadata.num_columns} columns: expected {MOST_COLUMNS} at most")
    if metadata.num_rows > max(MOST_ROWS, MOST_RATIO * size):
        raise IntegrityError(f"{metadata.num_rows} rows in {size} bytes: no such file is read")
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise IntegrityError(
            f"its row groups have {sum(counts)} rows, it says {metadata.num_rows} of the file"
        )


def _described(
    group: dict[int, Any], known: dict[tuple[str, ...], tuple[str, ...]]
) -> tuple[tuple[str, ...], npt.NDArray[np.int64] | None]:
    """The paths and numbers of a row group's columns, paths as in `known`; no numbers: damaged."""
    try:
        columns = [one[3] for one in group[1]]
        paths = tuple(b".".join(data[3]).decode() for data in columns)
        numbers = [
            [
                data[1],
                data[4],
                data[5],
                min(data[place] for place in (9, 11) if place in data),
                data[7],
            ]
            for data in columns
        ]
        return known.setdefault(paths, paths), np.array(numbers, np.int64).reshape(-1, 5)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return (), None


def _leaves(arrays: Sequence[pa.Array]) -> list[pa.Array]:
    """The arrays inside lists and structs, where these hold one leaf."""
    found = []
    for array in arrays:
        while pa.types.is_nested(array.type):
            array = array.field(0) if pa.types.is_struct(array.type) else array.flatten()
        found.append(array)
    return found


def _lengths(texts: pa.DictionaryArray) -> pa.Array:
    return pc.binary_length(texts.dictionary.cast(pa.large_binary()))

"""Pages of a Parquet column chunk: what their headers, and pages that hide it, say they become.

Source: apache/parquet-format, src/main/thrift/parquet.thrift.
"""

from dataclasses import dataclass

from softlabels import delta
from softlabels.errors import IntegrityError
from softlabels.thrift import Compact, Wanted

MOST_BYTES = 256 << 20
MOST_RATIO = 32
"""What is decoded at once takes at most MOST_BYTES, or MOST_RATIO times its stored bytes."""

MOST_PAGES = 100_000
"""Of a column chunk."""

_PAGE: Wanted = {2: None, 3: None, 7: {1: None}, **delta.WANTED}
_DICTIONARY_PAGE, _DATA_PAGES = 7, (5, 8)
_PAGE_STRUCTS = 100


@dataclass(frozen=True)
class Chunk:
    """One column of a row group, as the footer has it.

    Attributes:
        index: of the leaf among all.
        path: of the leaf, with dots.
        kind: physical type, by Parquet's number.
        codec: by Parquet's number.
        values: nulls and empty lists included.
        start: where its first page is.
        stored: bytes in the file.
    """

    index: int
    path: str
    kind: int
    codec: int
    values: int
    start: int
    stored: int

    @property
    def column(self) -> str:
        """The top-level column."""
        return self.path.partition(".")[0]


@dataclass(frozen=True)
class Pages:
    """What the page headers of a column chunk say.

    Attributes:
        size: bytes of all pages, unpacked.
        values: of all data pages, nulls and empty lists included.
        largest: bytes of the largest page, unpacked.
        heaviest: bytes a value of the page where that is most.
        dictionary: bytes of the dictionary, unpacked; 0: none.
    """

    size: int
    values: int
    largest: int
    heaviest: int
    dictionary: int


def read_pages(data: memoryview, chunk: Chunk, levels: int) -> Pages:
    """Reads headers, and pages where these hide what a page becomes.

    Raises LookupError where the bytes end or mean nothing, IntegrityError where they mean too much.
    """
    at, values = chunk.start, 0
    end = at + chunk.stored
    size = largest = heaviest = dictionary = count = 0
    while at < end and values < chunk.values:
        reader = Compact(data, at, _PAGE_STRUCTS)
        header = reader.struct(_PAGE)
        unpacked, packed = header[2], header[3]
        held = sum(header[part][1] for part in _DATA_PAGES if part in header)
        count += 1
        if min(unpacked, packed, held) < 0 or count > MOST_PAGES:
            raise IndexError(at)
        if _DICTIONARY_PAGE in header:
            if header[_DICTIONARY_PAGE][1] > unpacked:  # pyarrow makes room for so many first
                raise IndexError(at)
            dictionary = max(dictionary, unpacked)
        values += held
        heaviest = max(heaviest, unpacked // max(held, 1) if held else 0)
        size, largest = size + unpacked, max(largest, unpacked)
        if delta.encoding(header) in delta.HIDING:
            require_bounded(unpacked, chunk.stored, f"a page of column {chunk.path!r}")
            page = data[reader.at : reader.at + packed]
            delta.check_page(header, page, unpacked, chunk.codec, levels)
        at = reader.at + packed
    return Pages(size, values, largest, heaviest, dictionary)


def require_bounded(size: int, stored: int, what: str, least: int = MOST_BYTES) -> None:
    """Raises IntegrityError where `stored` bytes become `size`, more than are read at once."""
    most = max(least, MOST_RATIO * stored)
    if size > most:
        raise IntegrityError(
            f"{what}: {stored} bytes would become {size} or more, at most {most} are read: if you "
            "trust the file, write it again with smaller row groups"
        )

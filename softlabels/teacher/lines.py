"""The lines of files of JSON, none longer than memory allows."""

from collections.abc import Callable, Iterator
from typing import IO

MOST_LINE_BYTES = 32 << 20
MOST_LINE_VALUES = 1_000_000
"""Lists and objects of a line of JSON: each takes up to 230 bytes of memory."""

TOO_LONG = "line of more than 32 MiB, or of a million lists and objects"


def read_lines(stream: IO[bytes], seen: Callable[[bytes], None]) -> Iterator[bytes | None]:
    """The lines of a file of JSON; None for one that would take too much memory.

    Args:
        stream: the file.
        seen: given all bytes, in order.
    """
    while line := stream.readline(MOST_LINE_BYTES + 1):
        seen(line)
        rest = line
        while len(rest) > MOST_LINE_BYTES and not rest.endswith(b"\n"):
            rest = stream.readline(MOST_LINE_BYTES + 1)
            seen(rest)
        held = line.count(b"[") + line.count(b"{")
        yield line if len(line) <= MOST_LINE_BYTES and held <= MOST_LINE_VALUES else None

"""Pictures of a table as data: URIs, only where the bytes are a PNG or JPEG of a bounded size."""

import base64
import struct
import zlib
from dataclasses import dataclass

MOST_BYTES = 200_000
"""Of one picture: a page of two dozen stays small enough to send by mail."""

MOST_PIXELS = 16_000_000
"""Of one picture: a file of a few kilobytes may otherwise unpack to gigabytes in the browser."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Picture:
    """A picture that a page can hold: its data: URI and size in pixels."""

    uri: str
    width: int
    height: int


def picture(data: bytes) -> Picture | None:
    """The picture in `data`; None when it is no PNG or JPEG, or too large."""
    if len(data) > MOST_BYTES:
        return None
    kind, size = ("png", _png_size(data)) if data.startswith(_PNG) else ("jpeg", _jpeg_size(data))
    if size is None or not 0 < size[0] * size[1] <= MOST_PIXELS:
        return None
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", *size)


def png(pixels: bytes, height: int, width: int, channels: int) -> bytes | None:
    """A PNG of raw 8-bit pixels, row by row, grey (1 channel) or RGB (3).

    None when there are not just so many bytes.
    """
    if len(pixels) != height * width * channels or not pixels:
        return None
    row = width * channels
    lines = b"".join(b"\0" + pixels[n * row : (n + 1) * row] for n in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return _PNG + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def _png_size(data: bytes) -> tuple[int, int] | None:
    if len(data) < 33 or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the frame header (SOFn). Source: ITU T.81, B.2.2."""
    if not data.startswith(_JPEG):
        return None
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            return None
        kind = data[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        at += 1 if kind == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None

"""sha256 of bytes, files and specs: what lineage, runs and plans are known by."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import IO, Any

CHUNK_BYTES = 1 << 22


def sha256_bytes(data: bytes | memoryview) -> str:
    """The sha256 of `data`, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_stream(stream: IO[bytes]) -> str:
    """The sha256 of all that is left in `stream`, read 4 MiB at a time."""
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: Mapping[str, Any] | list[Any]) -> str:
    """`value` as JSON with sorted keys, no spaces and no NaN: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_json(value: Mapping[str, Any] | list[Any]) -> str:
    """The sha256 of `canonical_json(value)`."""
    return sha256_bytes(canonical_json(value).encode())


def sha256_vocabulary(ids: Mapping[str, int]) -> str:
    """The sha256 of a tokenizer's exact map of tokens to ids, added tokens included."""
    return sha256_json({token: int(index) for token, index in ids.items()})


def sha256_lines(lines: Iterable[str]) -> str:
    """The sha256 of `lines` in sorted order: the digest of a set of strings."""
    return sha256_bytes("\n".join(sorted(lines)).encode())


def key64(*parts: object) -> int:
    """A 64-bit key of `parts`: a million keys hold a collision with odds of 3 in 10^8."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

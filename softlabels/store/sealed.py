"""Small JSON files beside the log, with their own checksum as their last member."""

import re
from typing import TypeVar

from pydantic import BaseModel

from softlabels.fingerprint import sha256_bytes

M = TypeVar("M", bound=BaseModel)

_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\Z')


def seal(value: BaseModel) -> bytes:
    """A value as JSON, with the sha256 of that JSON added."""
    text = value.model_dump_json().encode()
    return text[:-1] + f',"sha256":"{sha256_bytes(text)}"}}'.encode()


def is_sealed(data: bytes) -> bool:
    """Whether a file has its checksum; those of earlier releases have none."""
    return _SEAL.search(data) is not None


def unseal(kind: type[M], data: bytes) -> M:
    """What `seal` wrote. Files of earlier releases have no checksum.

    Raises:
        ValueError: the file is damaged.
    """
    found = _SEAL.search(data)
    text = data[: found.start()] + b"}" if found else data
    if found and sha256_bytes(text) != found[1].decode():
        raise ValueError("its checksum is wrong")
    return kind.model_validate_json(text)

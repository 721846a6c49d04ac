import hashlib
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softlabels import fingerprint


def test_digests_are_sha256() -> None:
    assert fingerprint.sha256_bytes(b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert fingerprint.sha256_bytes(memoryview(b"xabc")[1:]) == fingerprint.sha256_bytes(b"abc")


def test_a_stream_longer_than_a_chunk_is_read_to_its_end() -> None:
    data = bytes(range(256)) * (fingerprint.CHUNK_BYTES // 256) + b"tail"
    stream = io.BytesIO(data)
    assert fingerprint.sha256_stream(stream) == hashlib.sha256(data).hexdigest()
    assert stream.read() == b""


def test_canonical_json_ignores_key_order_and_refuses_nan() -> None:
    left = {"b": [1, 2.5, None], "a": {"y": "é", "x": True}}
    right = {"a": {"x": True, "y": "é"}, "b": [1, 2.5, None]}
    assert fingerprint.canonical_json(left) == fingerprint.canonical_json(right)
    assert fingerprint.sha256_json(left) == fingerprint.sha256_json(right)
    assert fingerprint.sha256_json(left) != fingerprint.sha256_json({**left, "b": [2.5, 1, None]})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint.canonical_json({"x": math.nan})


@given(st.lists(st.text("abc", max_size=3), max_size=6), st.randoms(use_true_random=False))
def test_a_set_of_lines_has_one_digest(lines: list[str], random: object) -> None:
    shuffled = list(lines)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert fingerprint.sha256_lines(lines) == fingerprint.sha256_lines(shuffled)
    assert fingerprint.sha256_lines(lines) != fingerprint.sha256_lines([*lines, "new"])


def test_a_vocabulary_is_its_map_whatever_its_order() -> None:
    ids = {"a": 0, "Ġb": 1, "<|end|>": 2}
    found = fingerprint.sha256_vocabulary(ids)
    assert found == fingerprint.sha256_vocabulary(dict(reversed(ids.items())))
    assert found == fingerprint.sha256_json({"<|end|>": 2, "a": 0, "Ġb": 1})
    assert found != fingerprint.sha256_vocabulary({"a": 1, "Ġb": 0, "<|end|>": 2})


def test_key64_separates_its_parts_and_is_pinned() -> None:
    keys = {fingerprint.key64(*parts) for parts in [("a", 0), ("a", 1), ("a0",), ("", "a", 0)]}
    assert len(keys) == 4
    # Membership filters of old tables depend on it.
    assert fingerprint.key64("example", 0) == int.from_bytes(
        hashlib.blake2b(b"example\x000", digest_size=8).digest(), "little"
    )

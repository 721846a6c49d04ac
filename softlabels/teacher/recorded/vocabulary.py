"""Token strings back to ids, exactly or not at all."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from softlabels.teacher.recorded.entries import BadRecordError
from softlabels.teacher.tokenizer import Tokenizer

_BY_ID = re.compile(r"token_id:(\d{1,9})")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_AMBIGUOUS = -1
_REPLACEMENT = "\ufffd".encode()


class UnknownTokenError(Exception):
    """A string that stands for no token, or for more than one."""


class TokenMap:
    """Which id a string stands for in responses that name tokens by their text.

    Decoding is not one to one: two tokens may have one text, a part of a character has none, and
    decoders of the SentencePiece kind take a leading space away from a token that stands alone.
    A string that could be two tokens is none.
    """

    def __init__(self, tokenizer: Tokenizer, kind: Literal["text", "vocabulary"]) -> None:
        self._num_ids = tokenizer.num_ids
        backend = tokenizer.model.backend_tokenizer
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._ids: dict[bytes, int] = {}
        if kind == "vocabulary":
            self._ids = {token.encode(): index for token, index in vocabulary.items()}
            return
        added = {
            index: token.content for index, token in backend.get_added_tokens_decoder().items()
        }
        decoders = list(_decoders(json.loads(backend.to_str()).get("decoder")))
        names = {decoder["type"] for decoder in decoders}
        strips = bool(names & {"Metaspace", "Strip", "WordPiece"})
        for token, index in vocabulary.items():
            if index in added:
                self._add(added[index].encode(), index)
                continue
            data = _bytes_of(token, names)
            self._add(data, index)
            if strips and data[:1] == b" ":
                self._add(data[1:], index)

    def find(self, text: Any, data: Any = None) -> int:
        """The id of a token string.

        Args:
            text: the string, or "token_id:<id>".
            data: list of its bytes, which win, for the text of half a character is a mark.

        Raises:
            BadRecordError: it is no string, or its bytes are none.
            UnknownTokenError: it is no token, or may be several.
        """
        if not isinstance(text, str):
            raise BadRecordError("record whose token is no string", f"found {text!r:.80}")
        if (match := _BY_ID.fullmatch(text)) is not None:
            return self._known(int(match[1]), text)
        key = text.encode(errors="surrogatepass")
        if data is not None:
            try:
                key = bytes(data)
            except (TypeError, ValueError) as error:
                raise BadRecordError("record whose token has bad bytes", repr(data)[:80]) from error
        if _REPLACEMENT in key:
            raise UnknownTokenError("that is half a character")
        found = self._ids.get(key)
        if found == _AMBIGUOUS:
            raise UnknownTokenError("that may be several")
        if found is None:
            raise UnknownTokenError("that the tokenizer does not have")
        return found

    def _known(self, index: int, text: str) -> int:
        if index >= self._num_ids:
            raise BadRecordError(
                "record with a token id above the tokenizer's", f"{text!r} of {self._num_ids!r} ids"
            )
        return index

    def _add(self, data: bytes, index: int) -> None:
        if self._ids.setdefault(data, index) != index:
            self._ids[data] = _AMBIGUOUS


def _decoders(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "type" in node:
            yield node
        for inner in node.get("decoders", ()):
            yield from _decoders(inner)


def _bytes_of(token: str, decoders: set[str]) -> bytes:
    if "ByteLevel" in decoders:
        try:
            return bytes(_BYTES[letter] for letter in token)
        except KeyError:  # not spelt in its alphabet: it stands for itself
            return token.encode()
    if "ByteFallback" in decoders and (match := _BYTE.fullmatch(token)) is not None:
        return bytes.fromhex(match[1])
    if decoders & {"Metaspace", "Replace"}:
        return token.replace("\u2581", " ").encode()
    return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's letters: printable bytes are themselves, the others count up from 256."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()

"""Documents to sequences of tokens: packed or cut, masked, and kept so that it is done once."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabels.errors import BadInputError, DataError
from softlabels.fingerprint import key64, sha256_json
from softlabels.schema import table_schema
from softlabels.teacher import sequence_file
from softlabels.teacher.documents import RawFiles, Skipped, open_documents
from softlabels.teacher.sequence_file import Row, skipped_places
from softlabels.teacher.source import Source
from softlabels.teacher.spec import SequenceCaptureSpec, TextSpec
from softlabels.teacher.tokenised import CUT, NOTHING, Tokens, is_masked, renumbered, tokenised
from softlabels.teacher.tokenizer import Ids, Tokenizer

__all__ = ["VERSION", "open_sequences", "rows", "skipped_places"]

VERSION = 1
"""Of all that turns text into rows: raise it when the same text becomes other rows."""

TOO_LONG = "too long"


def open_sequences(
    spec: SequenceCaptureSpec,
    tokenizer: Tokenizer,
    context: int | None = None,
    advance: Callable[[int], None] = lambda documents: None,
) -> Source:
    """The sequences of a spec's text, as a source of Parquet rows.

    They are written once below `$SOFTLABELS_CACHE` (else ~/.cache/softlabels) and found there
    again: the same text, tokenizer and settings give the same rows. Columns: example_id string;
    input_ids [L], position_index [P], label_ids [P], segment_ids [L] or null, lists of int32;
    then the carried ones. `Source.origin` stands for the content, `Source.skipped` counts what
    was left out.

    Args:
        spec: of the capture.
        tokenizer: `tokenizer_of(spec)`.
        context: most tokens that the teacher takes, where it has a limit.
        advance: told how many more documents were read; may raise to stop. Not called when the
            sequences are there already.

    Raises:
        BadInputError: a setting, a file or a column cannot be meant, or nothing is left.
        DataError: token ids that the tokenizer does not know, positions or segments that
            contradict the ids, or a document too long where the spec refuses it.
        StorageError: the cache cannot be written.
    """
    _check(spec, tokenizer, context)
    raw = open_documents(spec.source, spec.carry)
    table_schema(spec.temperatures, raw.wanted.carry)  # for its errors, before any work
    origin = sha256_json(_identity(spec, tokenizer, raw))
    skipped = Skipped()
    made = rows(spec, tokenizer, raw, skipped, advance)  # nothing runs before it is iterated
    return sequence_file.kept(origin, made, skipped, raw.wanted.carry, spec.source.files)


def rows(
    spec: SequenceCaptureSpec,
    tokenizer: Tokenizer,
    raw: RawFiles,
    skipped: Skipped,
    advance: Callable[[int], None] = lambda documents: None,
) -> Iterator[Row]:
    """The sequences of raw files in order; what is left out is counted in `skipped`."""
    documents = tokenised(spec, tokenizer, raw, skipped, advance)
    source = spec.source
    if source.packing == "packed":
        sequences = _packed(documents, source.length, source.isolate)
    else:
        sequences = _parts(documents, source, skipped, causal=not is_masked(spec))
    isolated = None
    for tokens in sequences:
        if isolated is None:
            isolated = tokens.segments is not None
        if isolated != (tokens.segments is not None):
            found, others = ("no", "some") if isolated else ("some", "none")
            raise DataError(
                f"{tokens.place} has {found} segment_ids, the rows before it {others}: "
                "give them to all or to none"
            )
        row = _masked(tokens, spec, tokenizer) if is_masked(spec) else _causal(tokens)
        if row is None:
            skipped.add(NOTHING, tokens.place)
        else:
            yield row


def _check(spec: SequenceCaptureSpec, tokenizer: Tokenizer, context: int | None) -> None:
    source = spec.source
    if context is not None and source.length > context:
        raise BadInputError(
            f"source.length is {source.length!r} tokens, the context of {spec.teacher.name!r} "
            f"{context!r}: say length: {context} or less"
        )
    if is_masked(spec) and tokenizer.mask_id is None:
        raise BadInputError(
            f"kind: masked needs a mask token, and tokenizer {tokenizer.name!r} names none"
        )
    is_text = source.messages is None and source.input_ids is None
    if is_text and source.end and tokenizer.end_id is None and not tokenizer.ends:
        raise BadInputError(
            f"source.end: tokenizer {tokenizer.name!r} names no end-of-text token: say end: false"
        )
    if source.messages is not None and tokenizer.chat_template is None:
        raise BadInputError(
            f"tokenizer {tokenizer.name!r} was loaded without a chat template, which messages need"
        )
    if source.example_id is not None and source.packing == "packed":
        raise BadInputError(
            f"source.example_id {source.example_id!r}: a packed sequence is of many documents; "
            "leave it out, or say packing: documents"
        )


def _identity(spec: SequenceCaptureSpec, tokenizer: Tokenizer, raw: RawFiles) -> dict[str, Any]:
    # Where files are, how they are read and settings at their defaults are no part of it.
    apart = {"files", "text", "messages", "input_ids", "chat_template", "mask_rate"}
    return {
        "version": VERSION,
        "kind": raw.kind,
        "files": list(raw.sha256s),
        "column": [raw.wanted.holds, raw.wanted.column],
        "tokenizer": [tokenizer.sha256, tokenizer.digest],
        "chat_template": tokenizer.chat_template_sha256 if spec.source.messages else None,
        "masks": [spec.source.mask_rate, spec.seed] if is_masked(spec) else None,
        "source": spec.source.model_dump(mode="json", exclude=apart, exclude_defaults=True),
        "carry": list(spec.carry),
    }


def _packed(documents: Iterator[Tokens], length: int, isolate: bool) -> Iterator[Tokens]:
    parts: list[Tokens] = []
    room = length
    for tokens in documents:
        start = 0
        while start < len(tokens.ids):
            part = tokens.cut(start, start + room)
            parts.append(part)
            start += len(part.ids)
            room -= len(part.ids)
            if not room:
                yield _joined(parts, isolate)
                parts, room = [], length
    if parts:
        yield _joined(parts, isolate)


def _joined(parts: Sequence[Tokens], isolate: bool) -> Tokens:
    segments = None
    if isolate:
        lengths = [len(part.ids) for part in parts]
        segments = np.repeat(np.arange(len(parts), dtype=np.int32), lengths)
    ids = np.concatenate([part.ids for part in parts])
    return Tokens(parts[0].place, ids, np.concatenate([p.chosen for p in parts]), segments)


def _parts(
    documents: Iterator[Tokens], source: TextSpec, skipped: Skipped, causal: bool
) -> Iterator[Tokens]:
    for tokens in documents:
        found, length = len(tokens.ids), source.length
        if found > length and source.too_long == "drop":
            skipped.add(TOO_LONG, tokens.place, f"{found} tokens")
            continue
        if found > length and source.too_long == "refuse":
            raise DataError(
                f"{tokens.place} has {found!r} tokens, source.length is {length!r}: say too_long: "
                "split or drop, or a larger length"
            )
        for number, start in enumerate(range(0, found, length)):
            part = tokens.cut(start, start + length)
            if number and causal and source.input_ids is not None and _goes_on(tokens, start):
                # It would be predicted from the part before.
                skipped.add(CUT, tokens.place, f"token {start}")
            if part.segments is not None:
                part = replace(part, segments=renumbered(part.segments))
            if number and part.example_id is not None:
                part = replace(part, example_id=f"{part.example_id}#{number}")
            yield part


def _goes_on(tokens: Tokens, at: int) -> bool:
    same = tokens.segments is None or tokens.segments[at] == tokens.segments[at - 1]
    return bool(tokens.chosen[at] and same)


def _causal(tokens: Tokens) -> Row | None:
    predicted = tokens.chosen.copy()
    predicted[0] = False
    if tokens.segments is not None:
        predicted[1:] &= tokens.segments[1:] == tokens.segments[:-1]
    at = np.flatnonzero(predicted).astype(np.int32)
    if not at.size:
        return None
    positions = at - np.int32(1)
    key = tokens.example_id or _digest(tokens.ids, positions, tokens.segments)
    return Row(key, tokens.ids, positions, tokens.ids[at], tokens.segments, tokens.carried)


def _masked(tokens: Tokens, spec: SequenceCaptureSpec, tokenizer: Tokenizer) -> Row | None:
    at = np.flatnonzero(tokens.chosen).astype(np.int32)
    if not at.size:
        return None
    if not tokens.exact:
        base = tokens.example_id or _digest(tokens.ids, at, tokens.segments)
        draws = _mix(np.uint64(key64(spec.seed, base, "mask")), at)
        wanted = draws < np.uint64(int(spec.source.mask_rate * 2**64))
        wanted[np.argmin(draws)] = True  # a sequence without a position would be no row
        at = at[wanted]
    assert tokenizer.mask_id is not None  # _check
    ids = tokens.ids.copy()
    ids[at] = tokenizer.mask_id
    labels = tokens.ids[at]
    key = tokens.example_id or _digest(ids, at, labels, tokens.segments)
    return Row(key, ids, at, labels, tokens.segments, tokens.carried)


def _mix(key: np.uint64, index: Ids) -> npt.NDArray[np.uint64]:
    """A uniform 64-bit number of (key, index): splitmix64 at step `index`.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    z = key + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _digest(*parts: Ids | None) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = b"" if part is None else part.astype("<i4").tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()

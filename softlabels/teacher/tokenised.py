"""Documents to tokens: which of them may be predicted, and what is wrong with given ones."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from softlabels.errors import DataError
from softlabels.teacher.documents import Document, RawFiles, Skipped
from softlabels.teacher.spec import SequenceCaptureSpec
from softlabels.teacher.tokenizer import ChatError, Flags, Ids, Tokenizer

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1 << 20
"""Text tokenised at once."""

NOTHING = "nothing to predict"
CUT = "position before a cut"
TOO_SHORT = "too short"


@dataclass(frozen=True, eq=False)
class Tokens:
    """A document, or a part of one, or several in one sequence. L tokens.

    Attributes:
        place: of the document, for messages.
        ids: int32 [L].
        chosen: bool [L], tokens that may be predicted.
        segments: int32 [L] from 0, where documents are isolated from each other.
        exact: chosen tokens are the masked ones, none is drawn: masked models only.
        example_id: its key, where the spec names a column.
        carried: values of the carried columns.
    """

    place: str
    ids: Ids
    chosen: Flags
    segments: Ids | None = None
    exact: bool = False
    example_id: str | None = None
    carried: tuple[Any, ...] = ()

    def cut(self, start: int, stop: int) -> "Tokens":
        """The tokens `start` to `stop`."""
        segments = None if self.segments is None else self.segments[start:stop]
        part = slice(start, stop)
        return replace(self, ids=self.ids[part], chosen=self.chosen[part], segments=segments)


def is_masked(spec: SequenceCaptureSpec) -> bool:
    """Whether the teacher predicts masked tokens, and not the next ones."""
    return spec.teacher.kind == "masked"


def tokenised(
    spec: SequenceCaptureSpec,
    tokenizer: Tokenizer,
    raw: RawFiles,
    skipped: Skipped,
    advance: Callable[[int], None],
) -> Iterator[Tokens]:
    """The documents of raw files as tokens, in order; what is left out is counted in `skipped`.

    Raises:
        BadInputError: a chat template does not say which tokens are the assistant's.
        DataError: token ids that the tokenizer does not know, or positions or segments that
            contradict them.
    """
    source = spec.source
    chosen: bool | None = None
    for documents, read in _batches(raw.documents(skipped)):
        for document in documents:
            here = document.position_index is not None
            chosen = here if chosen is None else chosen
            if here != chosen:
                raise DataError(
                    f"{document.place} has {'a' if here else 'no'} position_index, the rows before "
                    f"it {'none' if here else 'one'}: give it to all or to none"
                )
        for tokens in _encoded(spec, tokenizer, documents, skipped):
            if len(tokens.ids) < source.shortest:
                skipped.add(TOO_SHORT, tokens.place, f"{len(tokens.ids)} tokens")
            elif not tokens.chosen.any():
                skipped.add(NOTHING, tokens.place)
            else:
                yield tokens
        advance(read)


def _batches(documents: Iterator[Document | None]) -> Iterator[tuple[list[Document], int]]:
    batch: list[Document] = []
    read = characters = 0
    for document in documents:
        read += 1
        if document is not None:
            batch.append(document)
            characters += len(document.value)
        if read >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch, read
            batch, read, characters = [], 0, 0
    yield batch, read


def _encoded(
    spec: SequenceCaptureSpec,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    skipped: Skipped,
) -> Iterator[Tokens]:
    source = spec.source
    is_text = source.messages is None and source.input_ids is None
    encoded = tokenizer.encode([d.value for d in documents], source.end) if is_text else []
    for number, document in enumerate(documents):
        if is_text:
            tokens = _tokens(document, encoded[number])
        elif source.input_ids is not None:
            tokens = _given(document, tokenizer, is_masked(spec))
        else:
            try:
                ids, chosen = tokenizer.encode_chat(
                    document.value, source.loss_on == "assistant", document.place
                )
            except ChatError as error:
                skipped.add(error.reason, document.place, error.detail)
                continue
            tokens = replace(_tokens(document, ids), chosen=chosen)
        if is_masked(spec) and not tokens.exact:
            plain = ~np.isin(tokens.ids, tokenizer.special_ids)
            tokens = replace(tokens, chosen=tokens.chosen & plain)
        yield tokens


def _tokens(document: Document, ids: Ids) -> Tokens:
    return Tokens(
        document.place,
        ids,
        np.ones(len(ids), bool),
        example_id=document.example_id,
        carried=document.carried,
    )


def _given(document: Document, tokenizer: Tokenizer, masked: bool) -> Tokens:
    ids = np.asarray(document.value, np.int64)
    unknown = (ids < 0) | (ids >= tokenizer.num_ids)
    if unknown.any():
        at = int(np.argmax(unknown))
        raise DataError(
            f"{document.place} has token id {int(ids[at])!r} at {at}, the tokenizer "
            f"{tokenizer.name!r} knows {tokenizer.num_ids!r}: it is not the one they were made with"
        )
    tokens = _tokens(document, ids.astype(np.int32))
    if document.segment_ids is not None:
        tokens = replace(tokens, segments=_segments(document, len(ids)))
    if document.position_index is None:
        return tokens
    chosen = np.zeros(len(ids), bool)
    positions = _positions(document, tokens.segments, len(ids), masked)
    chosen[positions + (0 if masked else 1)] = True
    return replace(tokens, chosen=chosen, exact=masked)


def _segments(document: Document, length: int) -> Ids:
    found = np.asarray(document.segment_ids, np.int64)
    if len(found) != length or (np.diff(found) < 0).any():
        raise DataError(
            f"segment_ids of {document.place}: expected {length} numbers that never fall, one a "
            f"token, found {len(found)}: {found[:8].tolist()!r}…"
        )
    return renumbered(found)


def renumbered(segments: npt.NDArray[Any]) -> Ids:
    """Segments that never fall, as int32 from 0 without gaps."""
    return np.cumsum(np.diff(segments, prepend=segments[:1]) != 0).astype(np.int32)


def _positions(
    document: Document, segments: Ids | None, length: int, masked: bool
) -> npt.NDArray[np.int64]:
    found = np.asarray(document.position_index, np.int64)
    top = length if masked else length - 1
    good = (found >= 0) & (found < top)
    good[1:] &= np.diff(found) > 0
    if segments is not None and not masked and good.all():
        good &= segments[found] == segments[found + 1]
    if not good.all():
        at = int(np.argmin(good))
        raise DataError(
            f"position_index of {document.place} is {int(found[at])!r} at {at}: expected rising "
            f"numbers below {top}" + ("" if masked else ", each with a next token in its segment")
        )
    return found

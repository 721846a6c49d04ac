"""A language model as an annotator: sequences of tokens into soft targets of their positions."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from softlabels.errors import BadInputError, DataError, MismatchError
from softlabels.fingerprint import key64
from softlabels.lineage import Contents
from softlabels.schema import INTS
from softlabels.targets import Ints, SoftTargets
from softlabels.teacher.annotator import Annotated
from softlabels.teacher.buckets import Piece, cut_pieces, fill_buckets, flat, pad_right
from softlabels.teacher.causal import (
    LanguageModel,
    context_of,
    forward_failures,
    load_language_model,
    read_config,
)
from softlabels.teacher.extract import extract, position_keys
from softlabels.teacher.models import pick_device
from softlabels.teacher.sequences import open_sequences
from softlabels.teacher.source import Source
from softlabels.teacher.spec import SequenceCaptureSpec
from softlabels.teacher.tokenizer import tokenizer_of

WINDOW_TOKENS = 32_768
"""Tokens that are sorted by length together; what they give is in memory at once, some 10 MB."""

ESTIMATE_TOKENS = 2_048
"""Tokens that a dry run times: ten seconds of a small model on two cores."""


def prepare_sequences(
    spec: SequenceCaptureSpec, advance: Callable[[int], None]
) -> tuple[Source, Contents, "SequenceAnnotator"]:
    """The tokenised source of a spec, what its rows have in common, and the teacher.

    Args:
        spec: of a language model over text.
        advance: told how many more documents were looked at; may raise.

    Raises:
        BadInputError: there is no such model, tokenizer, text or device, or the spec does not fit
            the model.
        MismatchError: tokenizer and model are not of one vocabulary.
        TryAgainError: the hub cannot be reached.
    """
    device = pick_device(spec.device)
    config = read_config(spec.teacher)
    context = context_of(config)
    if context is not None and spec.source.length > context:
        raise BadInputError(
            f"source.length is {spec.source.length}, but model {spec.teacher.model!r} takes at "
            f"most {context} tokens"
        )
    tokenizer = tokenizer_of(spec)
    if spec.k > tokenizer.num_ids:
        raise BadInputError(f"k is {spec.k}, the tokenizer knows {tokenizer.num_ids} ids")
    # Text first: what is wrong with it is told before a large model is loaded.
    source = open_sequences(spec, tokenizer, context, advance)
    model = load_language_model(spec.teacher, device, config)
    if model.width < tokenizer.num_ids:
        raise MismatchError(
            f"tokenizer {tokenizer.name!r} knows {tokenizer.num_ids} ids, but the head of model "
            f"{spec.teacher.model!r} has {model.width} rows: expected the tokenizer that the "
            "model was trained with"
        )
    contents = Contents(
        teacher=model.lineage,
        num_classes=tokenizer.num_ids,
        tokenizer_sha256=tokenizer.sha256,
        chat_template_sha256=tokenizer.chat_template_sha256,
        alignment="next" if model.causal else "same",
        k=spec.k,
        draws=spec.draws,
        draws_temperature=spec.draws_temperature,
        temperatures=spec.temperatures,
        profile=spec.profile,
        carried=spec.carry,
        example_ids="content" if spec.source.example_id is None else "column",
        seed=spec.seed,
        logits_width=model.width if model.width > tokenizer.num_ids else None,
    )
    return source, contents, SequenceAnnotator(spec, model, tokenizer.num_ids)


class SequenceAnnotator:
    """A language model that labels many positions a row."""

    packages: Sequence[str] = ("torch", "transformers", "tokenizers")

    def __init__(self, spec: SequenceCaptureSpec, model: LanguageModel, num_ids: int) -> None:
        self._spec = spec
        self._model = model
        self._num_ids = num_ids
        self.lineage = model.lineage
        self.device = str(model.device)
        self.one_pass = min(spec.batch_tokens, ESTIMATE_TOKENS)
        self.budget = max(WINDOW_TOKENS, spec.batch_tokens)
        self.rehearsal = 1
        # Where the model gives logits of whole sequences only, fewer tokens go in at once.
        self._pass_tokens = spec.head_rows if model.whole else spec.batch_tokens

    def weigh(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(flat(batch["input_ids"])[1]).astype(np.int64)

    def annotate(
        self, batch: pa.RecordBatch, names: Sequence[str], advance: Callable[[int], None]
    ) -> Annotated:
        """Targets of every position of some rows, in order of row and position."""
        pieces = cut_pieces(batch, looks_ahead=not self._model.causal)
        labels, labels_at = flat(batch["label_ids"])
        counts = np.diff(labels_at).astype(np.int32)
        labels = labels[labels_at[0] : labels_at[-1]]
        rows = np.array([key64(self._spec.seed, name, 0) for name in names], np.uint64)
        keys = position_keys(rows, counts)
        left = np.bincount([piece.row for piece in pieces], minlength=len(names))
        if not left.all():
            advance(int((left == 0).sum()))
        parts = [self._extract(torch.zeros(0, self._num_ids), labels[:0], keys[:0])]
        order = []
        for bucket in fill_buckets(pieces, self._pass_tokens):
            for found, where in self._logits(bucket, names):
                parts.append(self._extract(found, labels[where], keys[where]))
                order.append(where)
            before = (left == 0).sum()
            np.subtract.at(left, [piece.row for piece in bucket], 1)
            advance(int((left == 0).sum() - before))
        back = np.argsort(np.concatenate(order)) if order else np.zeros(0, np.int64)
        targets = SoftTargets.concat(parts).map_positions(back, counts)
        passed = ("input_ids", "position_index", "segment_ids")
        return Annotated(targets, {name: _as_stored(batch[name]) for name in passed})

    def _logits(
        self, bucket: Sequence[Piece], names: Sequence[str]
    ) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
        tokens, real = pad_right(bucket, self._model.padding)
        at = np.concatenate([piece.at + i * tokens.shape[1] for i, piece in enumerate(bucket)])
        where = np.concatenate([piece.positions for piece in bucket])
        device = self._model.device
        chunks = self._model.logits(
            torch.from_numpy(tokens).long().to(device),
            torch.from_numpy(real).to(device),
            torch.from_numpy(at.astype(np.int64)).to(device),
            self._spec.head_rows,
        )
        shown = sorted({names[piece.row] for piece in bucket})
        start = 0
        while True:
            with forward_failures(f"in examples {shown[0]!r} to {shown[-1]!r}"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            part = where[start : start + len(chunk)]
            chunk = chunk[:, : self._num_ids]
            self._refuse_broken(chunk, start, bucket, names)
            yield chunk, part
            start += len(chunk)

    def _refuse_broken(
        self, logits: Tensor, start: int, bucket: Sequence[Piece], names: Sequence[str]
    ) -> None:
        # The largest is NaN where any is, and infinite where any is or where all are -inf.
        bad = ~logits.amax(1).isfinite()
        if not bad.any():
            return
        number = start + int(bad.nonzero()[0])
        ends = np.cumsum([len(piece.at) for piece in bucket])
        piece = bucket[int(np.searchsorted(ends, number, side="right"))]
        position = number - int(ends[ends <= number].max(initial=0))
        raise DataError(
            f"the teacher's logits for example {names[piece.row]!r} are NaN or infinite at "
            f"token {piece.start + int(piece.at[position])}"
        )

    def _extract(self, logits: Tensor, labels: Ints, keys: npt.NDArray[np.uint64]) -> SoftTargets:
        spec = self._spec
        return extract(
            logits,
            k=spec.k,
            labels=labels,
            temperatures=spec.temperatures,
            draws=spec.draws,
            draws_temperature=spec.draws_temperature,
            draw_keys=keys,
        )


def _as_stored(lists: pa.Array) -> pa.Array:
    return lists.cast(INTS)

"""Batches of sequences as padded tensors, and what each position counts; never a row in Python.

B rows of at most L tokens, N positions of all rows, V vocabulary entries.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from softlabels.errors import DataError
from softlabels.student.batch import each_tensor
from softlabels.student.spec import Normalization
from softlabels.student.stream import Batch, Member
from softlabels.targets import Floats, to_numpy

COLUMNS = ("input_ids", "position_index", "segment_ids")
"""What a stream of sequences is asked for."""


class SequenceInputs(NamedTuple):
    """What a language model is called with, and where its positions are.

    Attributes:
        input_ids: int64 [B, L], padded on the right with 0.
        position_ids: int64 [B, L], from 0 in each document, 0 at pads; None where every row is one
            document, so that they are 0, 1, 2… in each.
        attention_mask: int64 [B, L], 1 at tokens, where rows differ in length. With documents
            None for causal models, which take documents and pads apart by `position_ids`; bool
            [B, 1, L, L] for masked ones: True where one token sees the other.
        at: int64 [N], where each position is in [B * L].
        lengths: int64 [B], tokens of each row.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    at: Tensor
    lengths: Tensor


def padded(
    batch: Batch, num_classes: int, alignment: str, device: torch.device | str = "cpu"
) -> SequenceInputs:
    """The tensors of a batch with the columns `COLUMNS`.

    Args:
        batch: its rows may be documents of their own (segment_ids null) or hold several.
        num_classes: V.
        alignment: "next" or "same"; decides how documents are kept apart.
        device: where the student is.

    Raises:
        DataError: a row has no tokens or one that is not below V, segments that do not match its
            tokens, a position outside of them or at the end of a document, or, of alignment
            "next", a hard label that is not the token after its position; names the example.
    """
    _check_types(batch)
    tokens, lengths = _flat(batch, "input_ids")
    index, counts = _flat(batch, "position_index")
    rows = np.repeat(np.arange(len(batch)), counts)
    _check(batch, tokens, lengths, index, counts, rows, num_classes, alignment)
    width = int(lengths.max(initial=1))
    place = np.arange(width) < lengths[:, None]
    ids = np.zeros(place.shape, np.int64)
    ids[place] = tokens
    segments = _segments(batch, place, lengths)
    if alignment == "next":
        _check_next(batch, ids.reshape(-1), segments, rows, index)
    positions = mask = None
    if segments is not None:
        positions = _restarted(segments)
        if alignment == "same":
            mask = torch.from_numpy(segments[:, None, :, None] == segments[:, None, None, :])
    elif not place.all():
        mask = torch.from_numpy(place.astype(np.int64))
    return SequenceInputs(
        torch.from_numpy(ids).to(device),
        None if positions is None else torch.from_numpy(positions).to(device),
        None if mask is None else mask.to(device),
        torch.from_numpy(rows * width + index).to(device),
        torch.from_numpy(lengths).to(device),
    )


def loss_weights(batch: Batch, normalization: Normalization) -> Floats:
    """What each position counts, float32 [N].

    "token": the row's loss weight times the position's. "sequence": the row's loss weight, shared
    out among its positions by their weights; a row of which none counts gives 0.
    """
    counts = batch.targets.num_positions
    rows = np.repeat(np.arange(len(counts)), counts)
    own = np.ones(len(rows), np.float64)
    if batch.position_weights is not None:
        own = batch.position_weights.astype(np.float64)
    if normalization == "sequence":
        total = np.bincount(rows, own, len(counts))[rows]
        own = np.divide(own, total, out=np.zeros(len(rows)), where=total > 0)
    return np.asarray(batch.loss_weights[rows] * own, np.float32)


def num_tokens(batch: Batch) -> int:
    """Tokens of all rows, without padding."""
    return len(batch.columns["input_ids"].flatten())


def row_slices(batch: Batch, rows: int | None) -> Iterator[tuple[Batch, slice]]:
    """Parts of at most `rows` rows, and which of the batch's positions each holds.

    None gives the batch itself. What a batch says of all ranks stays the whole batch's.
    """
    if rows is None or rows >= len(batch):
        yield batch, slice(0, len(batch.targets.ids))
        return
    ends = np.concatenate([[0], np.cumsum(batch.targets.num_positions, dtype=np.int64)])
    for start in range(0, len(batch), rows):
        stop = min(start + rows, len(batch))
        places = slice(int(ends[start]), int(ends[stop]))
        own, shares = batch.position_weights, batch.member_weights
        part = replace(
            batch,
            targets=batch.targets.slice(start, stop),
            example_ids=batch.example_ids.slice(start, stop - start),
            columns={n: c.slice(start, stop - start) for n, c in batch.columns.items()},
            loss_weights=batch.loss_weights[start:stop],
            position_weights=None if own is None else own[places],
            others=tuple(Member(one.targets.slice(start, stop)) for one in batch.others),
            member_weights=None if shares is None else shares[start:stop],
            inputs=_cut(batch.inputs, slice(start, stop)),
        )
        yield part, places


def _cut(inputs: Any, rows: slice) -> Any:
    return None if inputs is None else each_tensor(inputs, lambda values: values[rows])


def _flat(batch: Batch, name: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All values of a list column, and how many each row has."""
    column = batch.columns[name]
    if column.null_count:
        row = int(np.argmin(column.is_valid().to_pylist()))
        raise DataError(
            f"example {batch.example_ids[row].as_py()!r} has no {name}: a student of sequences "
            "needs the tokens that its teacher saw"
        )
    values = to_numpy(column.flatten(), np.int32).astype(np.int64)
    return values, np.diff(to_numpy(column.offsets, np.int32)).astype(np.int64)


def _segments(
    batch: Batch, place: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64] | None:
    """Int64 [B, L], the document of each token, each pad one of its own; None: one a row."""
    column = batch.columns["segment_ids"]
    if column.null_count == len(column):
        return None
    found = np.array(pc.fill_null(pc.list_value_length(column), -1))
    wrong = (found != lengths) & (found >= 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"example {batch.example_ids[row].as_py()!r} has {int(found[row])} segment_ids for "
            f"{int(lengths[row])} input_ids"
        )
    segments = np.broadcast_to(-1 - np.arange(place.shape[1]), place.shape).copy()
    several = place & (found >= 0)[:, None]
    segments[several] = to_numpy(column.flatten(), np.int32)
    segments[place & ~several] = 0  # a row that is one whole, among rows that are not
    return segments


def _restarted(segments: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Int64 [B, L]: how many tokens of the same document come before each."""
    columns = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    first = np.ones(segments.shape, bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return np.asarray(columns - np.maximum.accumulate(np.where(first, columns, 0), axis=1))


def _check_next(
    batch: Batch,
    ids: npt.NDArray[np.int64],
    segments: npt.NDArray[np.int64] | None,
    rows: npt.NDArray[np.int64],
    index: npt.NDArray[np.int64],
) -> None:
    """Raises for a position whose next token is not its label, or of another document."""
    after = rows * (len(ids) // len(batch)) + index + 1
    labels = batch.targets.label_ids
    if labels is not None and ((labels >= 0) & (labels != ids[after])).any():
        at = int(np.argmax((labels >= 0) & (labels != ids[after])))
        raise DataError(
            f"example {batch.example_ids[int(rows[at])].as_py()!r}: the hard label at "
            f"position_index {int(index[at])} is {int(labels[at])}, the token after it "
            f"{int(ids[after[at]])}: targets and tokens are shifted against each other"
        )
    if segments is not None:
        flat = segments.reshape(-1)
        across = flat[after] != flat[after - 1]
        if across.any():
            at = int(np.argmax(across))
            raise DataError(
                f"example {batch.example_ids[int(rows[at])].as_py()!r}: position_index "
                f"{int(index[at])} is the last of its document, so nothing follows it"
            )


def _check_types(batch: Batch) -> None:
    for name in COLUMNS:
        column = batch.columns[name]
        if not pa.types.is_list(column.type) or column.type.value_type != pa.int32():
            raise DataError(f"column {name!r} is {column.type}: expected lists of int32")
        if column.flatten().null_count:
            raise DataError(f"column {name!r} holds nulls inside its lists")


def _check(
    batch: Batch,
    tokens: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    index: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    num_classes: int,
    alignment: str,
) -> None:
    """Raises for what would train on the wrong places without a word."""

    def refuse(wrong: npt.NDArray[np.bool_], of: npt.NDArray[Any], what: str, found: Any) -> None:
        if wrong.any():
            at = int(np.argmax(wrong))
            name = batch.example_ids[int(of[at])].as_py()
            raise DataError(f"example {name!r}: {what}, found {found[at].item()!r}")

    every = np.arange(len(batch))
    refuse(lengths == 0, every, "expected tokens", lengths)
    expected = batch.targets.num_positions
    refuse(counts != expected, every, "expected a position_index for each position", counts)
    owner = np.repeat(every, lengths)
    outside = (tokens < 0) | (tokens >= num_classes)
    refuse(outside, owner, f"expected input_ids from 0 to {num_classes - 1}", tokens)
    # The token after a position is its label, so the last one of a row has none.
    last = lengths[rows] - (2 if alignment == "next" else 1)
    wrong = (index < 0) | (index > last)
    refuse(wrong, rows, f"expected a position_index that fits alignment {alignment!r}", index)

"""Buckets: sequences of one window cut into pieces and batched by length, in source order again.

A piece is a document of a sequence, so that a packed sequence whose documents are isolated gives
each of them what it would be given alone, whatever the model thinks of masks and position ids.
Legend: B rows, L tokens of a row, P positions of a row, N = sum of P.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.targets import Ints, to_numpy


@dataclass(frozen=True)
class Piece:
    """Tokens that see each other, and the positions among them that are labelled.

    Attributes:
        row: of the window.
        start: its first token's number in the row.
        tokens: int32 [L].
        at: int32 [P], rising, which tokens are labelled.
        first: number of its first position among the window's N.
    """

    row: int
    start: int
    tokens: Ints
    at: Ints
    first: int

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Which of the window's N positions they are."""
        return np.arange(self.first, self.first + len(self.at))


def cut_pieces(batch: pa.RecordBatch, looks_ahead: bool) -> list[Piece]:
    """The pieces of some rows that have a labelled position, in source order.

    Args:
        batch: columns input_ids, position_index, segment_ids of B rows.
        looks_ahead: whether tokens after a position matter to it; where not, they are cut off.
    """
    ids, ids_at = flat(batch["input_ids"])
    positions, positions_at = flat(batch["position_index"])
    segments = None
    if not batch["segment_ids"].null_count:
        segments, _ = flat(batch["segment_ids"])
    found = []
    for row in range(batch.num_rows):
        begin, end = ids_at[row], ids_at[row + 1]
        at = positions[positions_at[row] : positions_at[row + 1]]
        borders = [0, int(end - begin)]
        if segments is not None:
            borders[1:1] = (np.flatnonzero(np.diff(segments[begin:end])) + 1).tolist()
        inside = np.searchsorted(at, borders)
        for piece, (start, stop) in enumerate(pairwise(borders)):
            low, high = inside[piece], inside[piece + 1]
            if low < high:
                last = stop if looks_ahead else int(at[high - 1]) + 1
                tokens = ids[begin + start : begin + last]
                first = int(positions_at[row] - positions_at[0] + low)
                found.append(Piece(row, start, tokens, at[low:high] - np.int32(start), first))
    return found


def fill_buckets(pieces: Sequence[Piece], batch_tokens: int) -> Iterator[list[Piece]]:
    """The pieces in batches of at most `batch_tokens` tokens, padding counted, longest first.

    A longer piece makes a batch of its own. Equal lengths keep their order.
    """
    ordered = sorted(pieces, key=lambda piece: -len(piece.tokens))
    start = 0
    while start < len(ordered):
        size = max(1, batch_tokens // len(ordered[start].tokens))
        yield ordered[start : start + size]
        start += size


def pad_right(pieces: Sequence[Piece], padding: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Their tokens, int32 [pieces, longest], and which of them are no padding, bool of that shape.

    Args:
        pieces: one at least.
        padding: the id that pads.
    """
    lengths = np.array([len(piece.tokens) for piece in pieces])
    real = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.full(real.shape, padding, np.int32)
    tokens[real] = np.concatenate([piece.tokens for piece in pieces])
    return tokens, real


def flat(lists: pa.Array) -> tuple[Ints, Ints]:
    """The values of a list<int32> column without nulls, and where each row's begin and the end.

    Returns:
        int32 values and int32 [B + 1]; the first row need not begin at 0.
    """
    offsets = to_numpy(lists.offsets, np.int32)
    return to_numpy(lists.values, np.int32), offsets

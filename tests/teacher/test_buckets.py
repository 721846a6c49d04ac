"""Pieces and buckets: every position once, alone with its document, in its place again."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabels.teacher.buckets import cut_pieces, fill_buckets, pad_right

LISTS = pa.list_(pa.int32())


def rows_of(rows: list[tuple[list[int], list[int], list[int] | None]]) -> pa.RecordBatch:
    """A batch of (input_ids, position_index, segment_ids)."""
    names = ["input_ids", "position_index", "segment_ids"]
    columns = list(zip(*rows, strict=True))
    return pa.record_batch([pa.array(list(c), LISTS) for c in columns], names=names)


def test_a_piece_is_a_document_up_to_its_last_position() -> None:
    batch = rows_of(
        [
            ([10, 11, 12, 20, 21, 30], [0, 1, 3], [0, 0, 0, 1, 1, 2]),
            ([40, 41, 42, 43], [2], [0, 0, 1, 1]),
        ]
    )
    found = [
        (p.row, p.start, p.tokens.tolist(), p.at.tolist(), p.positions.tolist())
        for p in cut_pieces(batch, looks_ahead=False)
    ]
    assert found == [
        (0, 0, [10, 11], [0, 1], [0, 1]),
        (0, 3, [20], [0], [2]),
        (1, 2, [42], [0], [3]),
    ]
    # Where later tokens are seen as well, all of the document is there; without positions none.
    found = [
        (p.row, p.start, p.tokens.tolist(), p.at.tolist(), p.positions.tolist())
        for p in cut_pieces(batch, looks_ahead=True)
    ]
    assert found == [
        (0, 0, [10, 11, 12], [0, 1], [0, 1]),
        (0, 3, [20, 21], [0], [2]),
        (1, 2, [42, 43], [0], [3]),
    ]


def test_rows_without_segments_are_one_whole() -> None:
    batch = rows_of([([1, 2, 3], [0, 1], None), ([4, 5, 6, 7], [1, 2], None)])
    pieces = cut_pieces(batch, looks_ahead=True)
    assert [p.tokens.tolist() for p in pieces] == [[1, 2, 3], [4, 5, 6, 7]]
    assert [p.at.tolist() for p in pieces] == [[0, 1], [1, 2]]


@st.composite
def windows(draw: st.DrawFn) -> list[tuple[list[int], list[int], list[int] | None]]:
    rows = []
    isolated = draw(st.booleans())
    for number in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 12))
        at = sorted(draw(st.sets(st.integers(0, length - 1))))
        steps = draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))
        segments = np.cumsum([0, *steps]).tolist() if isolated else None
        rows.append(([100 * number + i for i in range(length)], at, segments))
    return rows


@settings(max_examples=200, deadline=None)
@given(windows(), st.integers(1, 30), st.booleans(), st.integers(0, 3))
def test_every_position_stands_in_one_bucket(
    rows: list[Any], batch_tokens: int, looks_ahead: bool, skipped: int
) -> None:
    skipped = min(skipped, len(rows) - 1)
    batch = rows_of(rows).slice(skipped)  # Arrow's offsets need not begin at 0
    expected = [row[0][i] for row in rows[skipped:] for i in row[1]]
    found: dict[int, int] = {}
    longest = None
    for bucket in fill_buckets(cut_pieces(batch, looks_ahead), batch_tokens):
        tokens, real = pad_right(bucket, -1)
        assert (tokens == -1).sum() == (~real).sum()
        assert len(bucket) == 1 or tokens.size <= batch_tokens
        assert longest is None or tokens.shape[1] <= longest
        longest = tokens.shape[1]
        for piece, line in zip(bucket, tokens, strict=True):
            segments = rows[skipped + piece.row][2]
            if segments is not None:  # only tokens of its own document
                inside = {segments[token % 100] for token in line if token >= 0}
                assert len(inside) == 1
            for number, at in zip(piece.positions, piece.at, strict=True):
                assert number not in found
                found[int(number)] = int(line[at])
    assert [found[number] for number in sorted(found)] == expected
    assert sorted(found) == list(range(len(expected)))


@pytest.mark.parametrize(("tokens", "batches"), [(1, 8), (12, 8), (24, 4), (36, 3), (1000, 1)])
def test_equal_lengths_need_no_padding(tokens: int, batches: int) -> None:
    batch = rows_of([(list(range(12)), list(range(12)), None)] * 8)
    found = list(fill_buckets(cut_pieces(batch, looks_ahead=False), tokens))
    assert len(found) == batches
    assert all(pad_right(bucket, -1)[1].all() for bucket in found)
    assert [p.row for bucket in found for p in bucket] == list(range(8))

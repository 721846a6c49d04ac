from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from softlabels.errors import DataError
from softlabels.plan import Plan
from softlabels.schema import INTS
from softlabels.student.sequences import COLUMNS, loss_weights, num_tokens, padded, row_slices
from softlabels.student.stream import Batch, Stream
from softlabels.targets import SoftTargets
from tests.student.language import CLASSES, draw, make_language_plan

TOKENS = [[5, 6, 7, 8], [9], [10, 11, 12]]
PLACES: list[list[int]] = [[0, 2], [], [0]]
SEGMENTS: list[list[int] | None] = [[0, 0, 3, 3], None, [1, 1, 2]]


def make_batch(
    tokens: Any = TOKENS,
    places: Any = PLACES,
    segments: Any = (None, None, None),
    weights: Any = (1.0, 1.0, 1.0),
    position_weights: Any = None,
    labels: Any = None,
) -> Batch:
    counts = np.array([len(row) for row in PLACES], np.int32)
    n = int(counts.sum())
    targets = SoftTargets(
        counts,
        np.zeros((n, 1), np.int32),
        np.zeros((n, 1), np.float32),
        label_ids=None if labels is None else np.array(labels, np.int32),
    )
    values = (tokens, places, segments)
    return Batch(
        targets=targets,
        example_ids=pa.array(["a", "b", "c"]),
        columns={n: pa.array(v, INTS) for n, v in zip(COLUMNS, values, strict=True)},
        loss_weights=np.array(weights, np.float32),
        epoch=0,
        position=0,
        global_weight=float(sum(weights)),
        position_weights=position_weights,
    )


def test_rows_of_one_document() -> None:
    found = padded(make_batch(), 13, "next")
    assert found.input_ids.tolist() == [[5, 6, 7, 8], [9, 0, 0, 0], [10, 11, 12, 0]]
    assert found.position_ids is None
    assert found.attention_mask is not None
    assert found.attention_mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert found.at.tolist() == [0, 2, 8]
    assert found.lengths.tolist() == [4, 1, 3]
    same = padded(make_batch(), 13, "same")
    assert same.attention_mask is not None
    assert torch.equal(same.attention_mask, found.attention_mask)


def test_rows_of_equal_length_need_no_mask() -> None:
    found = padded(make_batch([[1, 2, 3]] * 3, [[0, 1], [], [1]]), 13, "next")
    assert (found.attention_mask, found.position_ids) == (None, None)


def test_positions_begin_again_with_each_document_and_pads_stand_apart() -> None:
    found = padded(make_batch(segments=SEGMENTS), 13, "next")
    assert found.attention_mask is None
    assert found.position_ids is not None
    assert found.position_ids.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
    same = padded(make_batch(segments=SEGMENTS), 13, "same")
    assert same.position_ids is not None
    assert torch.equal(same.position_ids, found.position_ids)
    assert same.attention_mask is not None
    seen = same.attention_mask[:, 0].int().tolist()
    assert seen[0] == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert seen[1] == torch.eye(4).tolist()
    assert seen[2] == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("documents", [1, 4])
def test_a_streams_batch_against_a_loop(tmp_path: Path, documents: int) -> None:
    options: dict[str, Any] = {"rows": 30, "documents": documents, "isolated": documents > 1}
    plan = Plan.read(make_language_plan(tmp_path, **options))
    drawn = draw(rows=30, documents=documents)
    for batch in Stream(plan, batch_size=7, epochs=1, columns=COLUMNS):
        found = padded(batch, CLASSES, "next")
        width = found.input_ids.shape[1]
        at, tokens = [], 0
        for row, name in enumerate(batch.example_ids.to_pylist()):
            number = int(name[1:])
            ids = drawn.input_ids[number]
            tokens += len(ids)
            assert found.input_ids[row].tolist() == ids + [0] * (width - len(ids))
            at += [row * width + place for place in drawn.positions[number]]
            if found.position_ids is not None:
                segments = drawn.segments[number]
                before = [segments[:i].count(segments[i]) for i in range(len(ids))]
                assert found.position_ids[row].tolist() == before + [0] * (width - len(ids))
        assert found.at.tolist() == at
        assert num_tokens(batch) == tokens
        labels = found.input_ids.flatten()[found.at + 1]
        assert labels.tolist() == batch.targets.label_ids.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("own", "token", "sequence"),
    [
        (None, [2, 2, 3], [1, 1, 3]),
        ([1.0, 3.0, 0.5], [2, 6, 1.5], [0.5, 1.5, 3]),
        ([0.0, 0.0, 1.0], [0, 0, 3], [0, 0, 3]),
    ],
)
def test_what_positions_count(own: Any, token: list[float], sequence: list[float]) -> None:
    weights = None if own is None else np.array(own, np.float32)
    batch = make_batch(weights=(2.0, 5.0, 3.0), position_weights=weights)
    assert loss_weights(batch, "token").tolist() == token
    assert loss_weights(batch, "sequence").tolist() == sequence
    assert loss_weights(batch, "sequence").dtype == np.float32


@pytest.mark.parametrize("rows", [1, 2, 3, 9, None])
def test_parts_are_the_batch(rows: int | None) -> None:
    own = np.array([1.0, 2.0, 3.0], np.float32)
    batch = make_batch(segments=SEGMENTS, weights=(2.0, 5.0, 3.0), position_weights=own)
    whole = loss_weights(batch, "token")
    names: list[str] = []
    weights: list[float] = []
    for part, places in row_slices(batch, rows):
        assert len(part) <= (rows or 3)
        assert part.global_weight == batch.global_weight
        assert loss_weights(part, "token").tolist() == whole[places].tolist()
        inputs = padded(part, 13, "next")
        assert len(inputs.at) == len(part.targets.ids)
        for row, name in enumerate(part.example_ids.to_pylist()):
            number = "abc".index(name)
            length = int(inputs.lengths[row])
            assert inputs.input_ids[row, :length].tolist() == TOKENS[number]
        names += part.example_ids.to_pylist()
        weights += whole[places].tolist()
    assert names == ["a", "b", "c"]
    assert weights == whole.tolist()


@pytest.mark.parametrize(
    ("changes", "alignment", "message"),
    [
        ({"tokens": [[1, 2, 3, 4], None, [1, 2]]}, "next", "example 'b' has no input_ids"),
        ({"tokens": [[1, 2, 3], [], [1, 2]]}, "next", "example 'b': expected tokens, found 0"),
        ({"tokens": [[1, 2, 3, 13], [1], [1, 2]]}, "next", "'a': .* from 0 to 12, found 13"),
        ({"tokens": [[1, 2, 3, 4], [-1], [1, 2]]}, "next", "'b': .* from 0 to 12, found -1"),
        ({"places": [[0], [], [0]]}, "next", "'a': expected a position_index for each"),
        ({"places": [[0, 3], [], [0]]}, "next", "'a': .* fits alignment 'next', found 3"),
        ({"places": [[0, 3], [], [3]]}, "same", "'c': .* fits alignment 'same', found 3"),
        ({"places": [[-1, 2], [], [0]]}, "next", "'a': .*found -1"),
        ({"segments": [None, [0, 0], None]}, "next", "'b' has 2 segment_ids for 1 input_ids"),
        ({"segments": [None, None, [0, 1, 1]]}, "next", "'c': position_index 0 is the last of its"),
        ({"labels": [6, 9, 11]}, "next", "'a': .* at position_index 2 is 9, the token after it 8"),
    ],
)
def test_what_contradicts_itself_is_refused(
    changes: dict[str, Any], alignment: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        padded(make_batch(**changes), 13, alignment)


def test_labels_may_be_missing_and_masked_ones_are_elsewhere() -> None:
    padded(make_batch(labels=[6, -1, 11]), 13, "next")
    padded(make_batch(labels=[1, 2, 3], segments=SEGMENTS), 13, "same")


def test_a_slice_of_a_batch_is_read_from_its_own_beginning() -> None:
    batch = make_batch(segments=SEGMENTS)
    columns = {name: column.slice(2, 1) for name, column in batch.columns.items()}
    last = replace(
        batch,
        targets=batch.targets.slice(2, 3),
        example_ids=batch.example_ids.slice(2, 1),
        columns=columns,
        loss_weights=batch.loss_weights[2:],
    )
    found = padded(last, 13, "next")
    assert found.input_ids.tolist() == [[10, 11, 12]]
    assert found.position_ids is not None
    assert found.position_ids.tolist() == [[0, 1, 0]]
    assert found.at.tolist() == [0]

"""The ±1 self-test finds targets that stand one token off, and rows that contradict themselves."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import DataError
from softlabels.lineage import Recorded
from softlabels.schema import FLOATS, INTS
from softlabels.store import inspect, shards
from softlabels.store.alignment import self_test
from softlabels.store.table import Table
from tests.store.markov import causal, chain, make_language, masked, walk, write
from tests.tables import dense_logprobs, make_table, make_targets


def by_hand(table: Table, shift: int) -> float:
    """The mean -log p of the token 1 + shift places on, one position at a time."""
    k, draws, vocabulary = table.contents.k, table.contents.draws, table.contents.num_classes
    losses = []
    for row in pa.Table.from_batches(table.batches()).to_pylist():
        tokens, segments = row["input_ids"], row["segment_ids"] or [0] * len(row["input_ids"])
        for j, at in enumerate(row["position_index"]):
            if at + 2 >= len(tokens) or segments[at + 2] != segments[at]:
                continue
            token = tokens[at + 1 + shift]
            ids = row["topk_ids"][j * k : (j + 1) * k]
            head = [math.exp(x) for x in row["topk_logprobs"][j * k : (j + 1) * k]]
            tail = math.exp(row["tail_logprob"][j])
            drawn = row["sampled_ids"][j * draws : (j + 1) * draws].count(token)
            if token in ids:
                p = head[ids.index(token)] * (1 - tail) / sum(head)
            else:
                p = tail * (drawn + 1 / (vocabulary - k)) / (draws + 1)
            losses.append(-math.log(p))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("profile", ["compact", "precise"])
@pytest.mark.parametrize("documents", [0, 3])
def test_targets_at_their_tokens_are_right(
    tmp_path: Path, profile: shards.Profile, documents: int
) -> None:
    table = make_language(tmp_path / "t", profile=profile, documents=documents)
    found = self_test(table)
    assert found is not None
    assert (found["verdict"], found["problem"]) == ("right", None)
    # Each document's last position has no second token after it.
    assert found["positions"] == 40 * (30 - 2 * max(1, documents))
    wanted = {name: by_hand(table, int(name)) for name in ("-1", "0", "+1")}
    assert found["losses"] == pytest.approx(wanted, abs=2e-4)
    assert found["losses"]["-1"] > found["losses"]["0"] + 1 < found["losses"]["+1"]
    report = inspect.verify(table)
    assert report["problems"] == []
    assert report["alignment"] == found


@pytest.mark.parametrize("draws", [0, 4])
@pytest.mark.parametrize("shift", [-1, 1])
def test_targets_one_token_off_are_found(tmp_path: Path, shift: int, draws: int) -> None:
    table = make_language(tmp_path / "t", shift=shift, draws=draws)
    found = self_test(table)
    assert found is not None
    assert found["verdict"] == "wrong"
    (problem,) = inspect.verify(table)["problems"]
    assert problem == found["problem"]
    assert problem.startswith(f"targets are shifted by {shift:+d}: ")
    for loss in found["losses"].values():
        assert f"{loss:.4f}" in problem
    assert f"{found['positions']} positions" in problem
    fits = "position_index[j]]" if shift < 0 else "position_index[j] + 2]"
    assert f"distribution j fits input_ids[{fits};" in problem


def test_draws_alone_are_enough_to_tell(tmp_path: Path) -> None:
    probs = chain(40)
    tokens = walk(probs, 40, 30)
    for shift, verdict in ((0, "right"), (1, "wrong")):
        made = causal(tokens, probs, 0, 16, shift)
        table = write(tmp_path / str(shift), made, 40, 0, 16)
        assert self_test(table)["verdict"] == verdict  # type: ignore[index]


def test_masked_targets_are_tested_against_places_and_positions(tmp_path: Path) -> None:
    probs = chain(40, sharpness=3.0)
    tokens = walk(probs, 60, 40)
    right = self_test(write(tmp_path / "r", masked(tokens, probs, 8), 40, 8, alignment="same"))
    assert right is not None
    assert right["verdict"] == "right"
    assert list(right["losses"]) == ["-1", "0", "+1", "label -1", "label +1"]
    assert right["positions"] == 60 * (6 - 2), "the first and last have but one neighbour"
    made = masked(tokens[:1], probs, 8)
    single = self_test(write(tmp_path / "s", made, 40, 8, alignment="same", files=1))
    assert single is not None
    assert single["positions"] == 6 - 2, "the last of a row is no neighbour of its first"
    cases: list[tuple[dict[str, int], str]] = [
        ({"shift": -1}, "distribution j fits the token at position_index[j] - 1"),
        ({"shift": 1}, "fits the token at position_index[j] + 1"),
        ({"slip": 1}, "fits label_ids[j + 1]"),
        ({"slip": -1}, "fits label_ids[j - 1]"),
    ]
    for number, (change, expected) in enumerate(cases):
        made = masked(tokens, probs, 8, **change)
        # What is said of the label is of the place, too: only the distributions are off.
        made["label_logprobs"] = made["label_ranks"] = None
        made = {name: values for name, values in made.items() if values is not None}
        table = write(tmp_path / str(number), made, 40, 8, alignment="same")
        (problem,) = inspect.verify(table)["problems"]
        assert expected in problem


def test_few_positions_are_reported_and_not_judged(tmp_path: Path) -> None:
    table = make_language(tmp_path / "t", rows=3, shift=1)
    report = inspect.verify(table)
    assert report["problems"] == []
    assert report["alignment"]["verdict"] == "too few"
    assert report["alignment"]["losses"]["+1"] < report["alignment"]["losses"]["0"]


def test_a_teacher_that_knows_nothing_proves_nothing(tmp_path: Path) -> None:
    probs = chain(40)
    tokens = walk(probs, 40, 30)
    flat = np.full_like(probs, 1 / 40)
    found = self_test(write(tmp_path / "t", causal(tokens, flat, 8, 4), 40, 8, 4))
    assert found is not None
    assert (found["verdict"], found["problem"]) == ("unclear", None)
    for seed, sharpness in enumerate((0.05, 0.3, 0.5, 1.0, 2.0, 4.0)):
        wild = causal(tokens, chain(40, sharpness, seed + 1), 8, 0)
        found = self_test(write(tmp_path / str(seed), wild, 40, 8))
        assert found is not None
        assert (found["verdict"], found["problem"]) == ("unclear", None), "an untrained teacher"


def test_rows_without_tokens_are_not_tested(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=30)
    assert self_test(table) is None
    assert "alignment" not in inspect.verify(table)


def test_a_sample_of_rows_stops_early(tmp_path: Path) -> None:
    table = make_language(tmp_path / "t", rows=200, length=60)
    found = self_test(table, max_rows=10)
    assert found is not None
    assert 10 <= found["rows"] < 200


def one_row(**changes: Any) -> dict[str, pa.Array]:
    """Three positions over tokens 5 1 2 3 of two documents, in head or not; k = 2 of V = 6."""
    dense = dense_logprobs(3, 6, 1)
    labels = np.array([1, 3, 4])
    lists: dict[str, list[list[int]]] = {
        "input_ids": [[5, 1, 2, 3, 4]],
        "position_index": [[0, 2, 3]],
        "segment_ids": [[0, 0, 1, 1, 1]],
    }
    targets = make_targets(dense, 2, labels)
    targets = type(targets)(**(vars(targets) | {"num_positions": np.array([3], np.int32)}))
    made = targets.columns(sequences=True) | {
        "example_id": pa.array(["a"]),
        "view": pa.array([0], pa.int32()),
    }
    made |= {name: pa.array(value, INTS) for name, value in lists.items()}
    for name, value in changes.items():
        made[name] = pa.array(value, FLOATS if name == "label_logprobs" else INTS)
    return made


def stored(folder: Path, made: dict[str, pa.Array], **changes: object) -> Table:
    return write(folder, made, 6, 2, files=1, **changes)  # type: ignore[arg-type]


def test_the_one_row_is_right(tmp_path: Path) -> None:
    for profile in ("compact", "precise"):
        table = stored(tmp_path / profile, one_row(), profile=profile)
        assert inspect.verify(table)["problems"] == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"position_index": [[0, 3, 2]]}, "position 2 has a position_index that does not rise"),
        ({"position_index": [[0, 2, 2]]}, "position 2 has a position_index that does not rise"),
        ({"position_index": [[0, 2, 5]]}, "position 2 has a position_index outside its row"),
        ({"position_index": [[-1, 2, 3]]}, "position 0 has a position_index outside its row"),
        ({"position_index": [[0, 1, 3]]}, "position 1 is at the last token of its row or segment"),
        ({"position_index": [[0, 2, 4]]}, "position 2 is at the last token of its row or segment"),
        ({"position_index": [[0, 2]]}, "column 'position_index': a row does not hold"),
        ({"segment_ids": [[0, 0, 1, 1]]}, "column 'segment_ids': a row does not hold"),
        ({"segment_ids": [[0, 0, 1, 1, 0]]}, "example 'a' has segment_ids that fall"),
        ({"segment_ids": [[-1, 0, 1, 1, 1]]}, "example 'a' has segment_ids that fall"),
        ({"input_ids": [[5, 1, 2, 3, 6]]}, "input_ids hold 6, expected ids from 0 to 5"),
        ({"input_ids": [[-1, 1, 2, 3, 4]]}, "input_ids hold -1, expected ids from 0 to 5"),
        ({"label_ids": [[1, 3, 5]]}, "position 2 has another label than the token after it"),
    ],
)
def test_a_row_that_contradicts_its_tokens_is_named(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    (problem,) = inspect.verify(stored(tmp_path / "t", one_row(**change)))["problems"]
    assert expected in problem


@pytest.mark.parametrize("profile", ["compact", "precise"])
@pytest.mark.parametrize(
    ("column", "at", "value", "expected"),
    [
        ("label_ranks", 0, 0, "position 0 has a label_rank"),
        ("label_ranks", 1, 1, "position 1 has a label_rank"),
        ("label_ranks", 1, -1, "position 1 has a label_rank"),
        ("label_ranks", 2, 2, "position 2 has a label_rank"),
        ("label_ranks", 2, -1, "position 2 has a label_rank"),
        ("label_logprobs", 0, -1.4, "position 0 has a label_logprob"),
        ("label_logprobs", 2, -0.5, "position 2 has a label_logprob"),
    ],
)
def test_a_label_that_contradicts_the_head_is_named(
    tmp_path: Path, profile: shards.Profile, column: str, at: int, value: float, expected: str
) -> None:
    made = one_row()
    (values,) = made[column].to_pylist()
    values[at] = value
    table = stored(tmp_path / "t", one_row(**{column: [values]}), profile=profile)
    (problem,) = inspect.verify(table)["problems"]
    assert expected in problem


def test_a_recorded_label_may_have_no_known_rank(tmp_path: Path) -> None:
    recorded = Recorded(layout="jsonl")
    made = one_row(label_ranks=[[1, -1, 1]])
    table = stored(tmp_path / "t", made, recorded=recorded.model_dump())
    assert inspect.verify(table)["problems"] == []
    made = one_row(label_ranks=[[1, 0, 1]])
    table = stored(tmp_path / "u", made, recorded=recorded.model_dump())
    assert "has a label_rank" in inspect.verify(table)["problems"][0]


def test_labels_outside_the_head_and_missing_ones_are_fine(tmp_path: Path) -> None:
    made = one_row(
        label_ids=[[1, -1, -1]],
        label_ranks=[[1, -1, -1]],
        label_logprobs=[[one_row()["label_logprobs"].to_pylist()[0][0], np.nan, np.nan]],
    )
    assert inspect.verify(stored(tmp_path / "t", made))["problems"] == []


def test_a_table_without_an_alignment_cannot_hold_tokens(tmp_path: Path) -> None:
    table = stored(tmp_path / "t", one_row(), alignment=None)
    assert "no alignment" in inspect.verify(table)["problems"][0]
    with pytest.raises(DataError, match="no alignment"):
        self_test(table)


def test_rows_with_and_without_tokens_are_not_stored_together(tmp_path: Path) -> None:
    probs = chain(10)
    made = causal(walk(probs, 4, 9), probs, 3, 0)
    values = made["input_ids"].to_pylist()
    for name, rest in (("input_ids", values[1:]), ("segment_ids", [[0] * 9] * 3)):
        mixed = made | {name: pa.array([None, *rest], INTS)}
        table = write(tmp_path / name, mixed, 10, 3, files=1)
        (problem,) = inspect.verify(table)["problems"]
        assert f"column '{name}' is null in 1 of 4 rows" in problem


def test_a_real_size_takes_seconds(tmp_path: Path) -> None:
    table = make_language(tmp_path / "t", rows=240, length=500, vocabulary=50, k=16, draws=0)
    began = time.process_time()
    found = self_test(table)
    assert found is not None
    assert found["positions"] == 240 * 498
    assert time.process_time() - began < 5

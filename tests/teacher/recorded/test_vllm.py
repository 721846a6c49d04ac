"""vLLM's prompt_logprobs: K or K + 1 entries, dicts or flat lists, and tokens that must fit."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import DataError
from softlabels.store.inspect import verify
from softlabels.teacher.recorded.report import import_recorded
from tests.teacher.recorded.recordings import (
    Teacher,
    imported,
    prompt_logprobs,
    require_true,
    spec_of,
    write_lines,
)

K = 6


def record(teacher: Teacher, seed: int, length: int = 40) -> dict[str, Any]:
    """One record as vLLM's RequestOutput or completion choice has it."""
    tokens = teacher.write(length, seed)
    return {
        "id": f"r{seed}",
        "prompt_token_ids": tokens,
        "prompt_logprobs": prompt_logprobs(teacher, tokens, K),
    }


def test_all_positions_are_the_teachers(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [record(teacher, seed) for seed in range(8)])
    report, table, rows, targets = imported(
        spec_of(teacher, tmp_path, layout="vllm", example_id="id")
    )
    require_true(teacher, rows, K)
    assert [row["example_id"] for row in rows] == [f"r{seed}" for seed in range(8)]
    assert [row["position_index"] for row in rows] == [list(range(39))] * 8
    assert report["positions"] == 8 * 39
    assert report["skipped"] == {}
    assert report["k"] == K
    recorded = table.contents.recorded
    assert recorded is not None
    assert recorded.entries == "k+1"
    assert not recorded.first_position
    assert recorded.tail_error == pytest.approx(1.2e-6, rel=1)
    assert table.contents.alignment == "next"
    assert table.contents.num_classes == teacher.size
    for row in rows:
        for j, index in enumerate(row["position_index"]):
            rank = teacher.rank(row["input_ids"][index + 1], row["input_ids"][index])
            assert row["label_ranks"][j] == rank
        assert row["label"] is None
        assert row["segment_ids"] is None
    assert (targets.ids >= 0).all()
    found = verify(table)
    assert found["problems"] == []
    assert found["alignment"]["verdict"] == "right"


def test_targets_that_fit_other_tokens_are_refused(teacher: Teacher, tmp_path: Path) -> None:
    records = [record(teacher, seed) for seed in range(8)]
    for one in records:
        # Each position gets what was said one token later; the chosen tokens are put beside it.
        said = one["prompt_logprobs"]
        tokens = one["prompt_token_ids"]
        moved: list[Any] = [None]
        for place in range(1, len(tokens)):
            entries = dict(said[min(place + 1, len(tokens) - 1)])
            entries = dict(sorted(entries.items(), key=lambda e: e[1]["rank"])[:K])
            own = str(tokens[place])
            if own not in entries:
                entries[own] = {"logprob": -20.0, "rank": 200}
            moved.append(entries)
        one["prompt_logprobs"] = moved
    write_lines(tmp_path / "records.jsonl", records)
    with pytest.raises(DataError, match=r"shifted by \+1: .*nothing was imported"):
        import_recorded(spec_of(teacher, tmp_path, layout="vllm"))
    assert not (tmp_path / "table").exists()


def test_a_chosen_token_likelier_than_the_top_leaves_room_for(
    teacher: Teacher, tmp_path: Path
) -> None:
    good, bad = record(teacher, 1), record(teacher, 2)
    for place, entries in enumerate(bad["prompt_logprobs"]):
        if entries is not None and len(entries) > K:
            entries[str(bad["prompt_token_ids"][place])]["logprob"] = -1e-4
            break
    write_lines(tmp_path / "records.jsonl", [good, bad])
    with pytest.raises(DataError, match=r"line 2 .*likelier than its top leaves room for"):
        import_recorded(spec_of(teacher, tmp_path, layout="vllm"))
    report = import_recorded(spec_of(teacher, tmp_path, layout="vllm", on_bad="skip"))
    reason = "record with a chosen token likelier than its top leaves room for"
    assert (report["rows"], report["skipped"]) == (1, {reason: 1})


def test_a_shift_by_one_is_not_read(teacher: Teacher, tmp_path: Path) -> None:
    shifted = record(teacher, 1)
    shifted["prompt_logprobs"] = [None, *shifted["prompt_logprobs"][2:], None]
    write_lines(tmp_path / "records.jsonl", [record(teacher, 2), shifted])
    with pytest.raises(DataError, match=r"line 2 of 'records.jsonl'.*is not among"):
        import_recorded(spec_of(teacher, tmp_path, layout="vllm"))
    assert not (tmp_path / "table").exists()


def flat(teacher: Teacher, tokens: list[int]) -> dict[str, Any]:
    """vLLM's FlatLogprobs: the chosen token, then the top k, which may hold it again."""
    found: dict[str, Any] = {"start_indices": [0], "end_indices": [0]}
    entries: list[tuple[int, float, int]] = []
    for before, chosen in pairwise(tokens):
        found["start_indices"].append(len(entries))
        rank = teacher.rank(chosen, before) + 1
        entries.append((chosen, float(teacher.logprobs[before, chosen]), rank))
        entries += [(t, v, r) for r, (t, v) in enumerate(teacher.top(before, K), 1)]
        found["end_indices"].append(len(entries))
    names = ("token_ids", "logprobs", "ranks")
    return found | dict(zip(names, map(list, zip(*entries, strict=True)), strict=True))


def test_flat_lists_give_the_same_rows(teacher: Teacher, tmp_path: Path) -> None:
    dicts = [record(teacher, seed) for seed in range(3)]
    write_lines(tmp_path / "a" / "records.jsonl", dicts)
    lists = [d | {"prompt_logprobs": flat(teacher, d["prompt_token_ids"])} for d in dicts]
    write_lines(tmp_path / "b" / "records.jsonl", lists)
    rows = [imported(spec_of(teacher, tmp_path / part, layout="vllm"))[2] for part in ("a", "b")]
    assert rows[0] == rows[1]


def test_generated_tokens_follow_the_prompt(teacher: Teacher, tmp_path: Path) -> None:
    whole = record(teacher, 4)
    entries, tokens = whole["prompt_logprobs"], whole["prompt_token_ids"]
    split = {
        "prompt_token_ids": tokens[:15],
        "prompt_logprobs": entries[:15],
        "outputs": [{"token_ids": tokens[15:], "logprobs": entries[15:]}],
    }
    write_lines(tmp_path / "records.jsonl", [split])
    rows = imported(spec_of(teacher, tmp_path, layout="vllm"))[2]
    assert rows[0]["input_ids"] == tokens
    assert rows[0]["position_index"] == list(range(39))
    require_true(teacher, rows, K)


def test_a_server_response_is_read_too(teacher: Teacher, tmp_path: Path) -> None:
    whole = record(teacher, 4)
    completion = {"choices": [{"text": "", "logprobs": None, **whole}]}
    chat = {"prompt_token_ids": whole["prompt_token_ids"][:-1], "choices": [{"message": {}}]}
    chat["prompt_logprobs"] = whole["prompt_logprobs"][:-1]
    write_lines(tmp_path / "records.jsonl", [completion, {"response": chat}])
    rows = imported(spec_of(teacher, tmp_path, layout="vllm"))[2]
    assert sorted(len(row["input_ids"]) for row in rows) == [39, 40]
    require_true(teacher, rows, K)


def test_a_smaller_k_is_a_prefix_and_keeps_the_tail(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [record(teacher, seed) for seed in range(3)])
    rows = imported(spec_of(teacher, tmp_path, layout="vllm", k=2))[2]
    require_true(teacher, rows, 2)


def test_the_chosen_token_beyond_the_top_is_not_of_it(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [record(teacher, seed) for seed in range(4)])
    _, _, rows, targets = imported(spec_of(teacher, tmp_path, layout="vllm", k=K + 1))
    require_true(teacher, rows, K + 1)
    ranks = np.concatenate([row["label_ranks"] for row in rows])
    # An entry beside the top is the next likeliest only where its rank says so.
    assert ((targets.ids[:, K] >= 0) == (ranks == K)).all()
    assert (ranks > K).any()


def test_without_ranks_the_chosen_token_is_kept_only_where_it_must_be_in_the_top(
    teacher: Teacher, tmp_path: Path
) -> None:
    bare = record(teacher, 7, length=200)
    for entries in bare["prompt_logprobs"][1:]:
        for entry in entries.values():
            entry["rank"] = None
    write_lines(tmp_path / "records.jsonl", [bare])
    _, _, rows, targets = imported(spec_of(teacher, tmp_path, layout="vllm", k=K))
    require_true(teacher, rows, K)
    ranks = np.array(rows[0]["label_ranks"])
    truth = np.array(
        [teacher.rank(chosen, before) for before, chosen in pairwise(rows[0]["input_ids"])]
    )
    assert (ranks[ranks >= 0] == truth[ranks >= 0]).all()
    # Only what may be least of k entries, or one beside them, is not known.
    assert (ranks[truth < K - 1] >= 0).all()
    assert (ranks[truth >= K] == -1).all()
    assert ((targets.ids < 0).any(1) <= (truth == K - 1)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_token_ids": None}, "record without prompt_token_ids"),
        ({"prompt_logprobs": []}, "record without prompt_logprobs"),
        ({"prompt_token_ids": [1, 2, 3]}, "3 prompt_token_ids, 40 prompt_logprobs"),
        ({"prompt_token_ids": [None] * 40}, "prompt_token_ids holds no token id: found None"),
        ({"prompt_logprobs": "x"}, "logprobs is no list"),
    ],
)
def test_records_that_do_not_fit(
    teacher: Teacher, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    write_lines(tmp_path / "records.jsonl", [record(teacher, 2), record(teacher, 1) | change])
    with pytest.raises(DataError, match=words):
        import_recorded(spec_of(teacher, tmp_path, layout="vllm"))
    report = import_recorded(spec_of(teacher, tmp_path, layout="vllm", on_bad="skip"))
    assert report["rows"] == 1
    assert sum(report["skipped"].values()) == 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"logprob": float("nan"), "rank": 1}, "NaN"),
        ({"logprob": 0.25, "rank": 1}, "above 0: found 0.25"),
        ({"logprob": "x", "rank": 1}, "is no number: found 'x'"),
        ({"logprob": -0.1, "rank": 0}, "found 0"),
        ({"logprob": -0.1, "rank": 9}, "ranks are not 1 to n"),
        ({"logprob": -1e-9, "rank": 1}, "sum above 1"),
        ({"logprob": -9.5, "rank": 1}, "rise with the rank"),
    ],
)
def test_entries_that_cannot_be_meant(
    teacher: Teacher, tmp_path: Path, entry: dict[str, Any], words: str
) -> None:
    bad = record(teacher, 3)
    chosen = str(bad["prompt_token_ids"][5])
    best = next(t for t, e in bad["prompt_logprobs"][5].items() if e["rank"] == 1)
    # Not the chosen token: of that a rank beyond the top is right.
    bad["prompt_logprobs"][5][best] = entry
    assert chosen in bad["prompt_logprobs"][5]
    write_lines(tmp_path / "records.jsonl", [bad])
    with pytest.raises(DataError, match=words):
        import_recorded(spec_of(teacher, tmp_path, layout="vllm"))


def test_minus_9999_is_no_probability(teacher: Teacher, tmp_path: Path) -> None:
    clamped = record(teacher, 3)
    worst = next(t for t, e in clamped["prompt_logprobs"][5].items() if e["rank"] == K)
    clamped["prompt_logprobs"][5][worst]["logprob"] = -9999.0
    write_lines(tmp_path / "records.jsonl", [clamped])
    _, _, rows, targets = imported(spec_of(teacher, tmp_path, layout="vllm", k=K))
    assert (targets.ids[4] >= 0).sum() == K - 1
    assert json.dumps(rows[0]["topk_logprobs"]).count("9999") == 0

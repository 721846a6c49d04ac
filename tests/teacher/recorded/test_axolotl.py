"""axolotl's rows: targets whose place must be said, chats whose tokens must fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import BadInputError, DataError
from softlabels.store.inspect import verify
from softlabels.teacher.recorded.report import import_recorded
from softlabels.teacher.tokenizer import load_tokenizer
from tests.teacher.recorded.recordings import (
    TEMPLATE,
    Teacher,
    imported,
    require_true,
    spec_of,
    write_lines,
)

K = 5


def prepared(teacher: Teacher, seed: int, at: bool, length: int = 60) -> dict[str, Any]:
    """A row as its collator takes it; the first ten tokens are masked."""
    tokens = teacher.write(length, seed)
    tops = [teacher.top(token, K) for token in tokens]
    empty = ([0] * K, [-1e9] * K)
    rows = [([t for t, _ in top], [v for _, v in top]) for top in tops]
    rows = [empty, *rows[:-1]] if at else [*rows[:-1], empty]
    labels = [-100] * 10 + tokens[10:]
    masks = [[int(label != -100)] * K for label in labels]
    if not at:
        masks = [*masks[1:], [0] * K]
    return {
        "input_ids": tokens,
        "labels": labels,
        "target_token_ids": [ids for ids, _ in rows],
        "target_logprobs": [values for _, values in rows],
        "target_mask": masks,
    }


def spec(teacher: Teacher, folder: Path, **changes: Any) -> Any:
    """An import of folder/records.jsonl."""
    return spec_of(teacher, folder, **{"layout": "axolotl"} | changes)


@pytest.mark.parametrize("at", [False, True])
def test_targets_after_or_at_their_token(teacher: Teacher, tmp_path: Path, at: bool) -> None:
    records = [prepared(teacher, seed, at) for seed in range(4)]
    write_lines(tmp_path / "records.jsonl", records)
    _, table, rows, _ = imported(spec(teacher, tmp_path, targets="at" if at else "after"))
    assert all(row["position_index"] == list(range(9, 59)) for row in rows)
    for row in rows:
        assert row["topk_ids"][:K] == [t for t, _ in teacher.top(row["input_ids"][9], K)]
    assert verify(table)["alignment"]["verdict"] == "right"
    # The other answer gives itself away.
    other = spec(
        teacher, tmp_path, targets="after" if at else "at", table=str(tmp_path / "b"), on_bad="skip"
    )
    with pytest.raises(DataError, match=r"shifted by [+-]1: .*nothing was imported.*targets"):
        imported(other)


def test_parquet_gives_the_same_rows(teacher: Teacher, tmp_path: Path) -> None:
    records = [prepared(teacher, seed, False) for seed in range(3)]
    write_lines(tmp_path / "records.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "records.parquet")
    lines = imported(spec(teacher, tmp_path, targets="after"))[2]
    files = str(tmp_path / "*.parquet")
    other = spec(teacher, tmp_path, targets="after", files=files, table=str(tmp_path / "b"))
    assert repr(imported(other)[2]) == repr(lines)  # NaN differs from itself


def test_the_place_of_targets_must_be_said(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [prepared(teacher, 1, True)])
    with pytest.raises(BadInputError, match="say targets: after or targets: at"):
        import_recorded(spec(teacher, tmp_path))


def test_a_renormalised_top_has_no_tail(teacher: Teacher, tmp_path: Path) -> None:
    record = prepared(teacher, 1, False)
    for values in record["target_logprobs"][:-1]:
        values[:] = np.array(values) - np.log(np.exp(values).sum())
    write_lines(tmp_path / "records.jsonl", [record])
    with pytest.raises(DataError, match="expected tail: unknown, found tail: derived"):
        import_recorded(spec(teacher, tmp_path, targets="after"))
    _, _, _, targets = imported(spec(teacher, tmp_path, targets="after", tail="unknown"))
    assert targets.tail is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_mask": [[1] * K] * 59}, "59 masks"),
        ({"labels": [1]}, "1 labels"),
        ({"target_logprobs": [[0.0]] * 60}, "5 ids, 1 logprobs, 5 mask"),
        ({"target_token_ids": [[-5] * K] * 60}, "no token id: found -5"),
        ({"target_token_ids": [[7] * K] * 60}, "token twice in one position"),
        ({"input_ids": [999] * 60}, "found 999, the tokenizer has ids 0 to 289"),
    ],
)
def test_rows_that_do_not_fit(
    teacher: Teacher, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    records = [prepared(teacher, 1, False), prepared(teacher, 2, False) | change]
    write_lines(tmp_path / "records.jsonl", records)
    with pytest.raises(DataError, match=words):
        import_recorded(spec(teacher, tmp_path, targets="after"))
    assert import_recorded(spec(teacher, tmp_path, targets="after", on_bad="skip"))["rows"] == 1


def chat(teacher: Teacher, beside: bool) -> dict[str, Any]:
    """A chat row with the log-probabilities of its last message's tokens, as vLLM listed them."""
    backend = load_tokenizer(str(teacher.folder)).model.backend_tokenizer
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "the dog sat on the mat"},
    ]
    before = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    prompt = backend.encode(before, add_special_tokens=False).ids
    whole = backend.encode(
        before + "the dog sat on the mat<|im_end|>\n", add_special_tokens=False
    ).ids
    listed = []
    for place in range(len(prompt), len(whole) - 1):
        last, chosen = whole[place - 1], whole[place]
        listed.append({chosen: float(teacher.logprobs[last, chosen])} | dict(teacher.top(last, K)))
    if beside:
        return {
            "messages_combined": messages,
            "target_token_ids": [list(entries) for entries in listed],
            "lp": [list(entries.values()) for entries in listed],
        }
    named = [
        [{"token": f"token_id:{t}", "logprob": v} for t, v in entries.items()] for entries in listed
    ]
    return {"messages_combined": messages, "lp": named}


@pytest.mark.parametrize("beside", [False, True])
def test_a_chat_is_aligned_by_its_tokens(teacher: Teacher, tmp_path: Path, beside: bool) -> None:
    write_lines(tmp_path / "records.jsonl", [chat(teacher, beside)])
    fields = {"messages": "messages_combined", "logprobs": "lp", "k": K}
    _, table, rows, _ = imported(spec(teacher, tmp_path, **fields))
    require_true(teacher, rows, K)
    backend = load_tokenizer(str(teacher.folder)).model.backend_tokenizer
    answer = [rows[0]["input_ids"][i + 1] for i in rows[0]["position_index"]]
    assert backend.decode(answer, skip_special_tokens=False) == "the dog sat on the mat<|im_end|>"
    assert table.contents.chat_template_sha256 is not None
    slipped = json.loads(json.dumps(chat(teacher, beside)))
    for name in ("lp", "target_token_ids"):
        if name in slipped:
            del slipped[name][0]
    write_lines(tmp_path / "records.jsonl", [slipped])
    with pytest.raises(DataError, match="is not among"):
        import_recorded(spec(teacher, tmp_path, **fields))


def test_a_template_that_opens_a_turn_otherwise_than_it_writes_one(
    teacher: Teacher, tmp_path: Path
) -> None:
    write_lines(tmp_path / "records.jsonl", [chat(teacher, False)])
    opened = TEMPLATE.replace("assistant\n", "assistant\n<think>")
    (tmp_path / "template.jinja").write_text(opened)
    fields = {"messages": "messages_combined", "logprobs": "lp", "k": K}
    fields["chat_template"] = str(tmp_path / "template.jinja")
    with pytest.raises(DataError, match="does not begin where its prompt ends"):
        import_recorded(spec(teacher, tmp_path, **fields))

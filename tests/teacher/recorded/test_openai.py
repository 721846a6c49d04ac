"""OpenAI-compatible responses: chats and completions, of engines that differ in what they list."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import BadInputError, DataError
from softlabels.store.inspect import verify
from softlabels.teacher.recorded.report import import_recorded
from softlabels.teacher.tokenizer import load_tokenizer
from tests.teacher.recorded.recordings import (
    TEMPLATE,
    Teacher,
    chat_response,
    imported,
    require_true,
    spec_of,
    write_lines,
)

K = 5
MESSAGES = [{"role": "user", "content": "the cat"}]


def prompt_of(teacher: Teacher) -> list[int]:
    """MESSAGES as the template writes them, up to where the assistant begins."""
    text = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    backend = load_tokenizer(str(teacher.folder)).model.backend_tokenizer
    return list(backend.encode(text, add_special_tokens=False).ids)


def answered(teacher: Teacher, seed: int, engine: str = "openai") -> dict[str, Any]:
    """A record with its messages and a response to them."""
    prompt = prompt_of(teacher)
    tokens = teacher.write(len(prompt) + 30, seed, prompt)
    response = chat_response(teacher, tokens, len(prompt), K, engine)
    return {"id": f"r{seed}", "messages": MESSAGES, **response}


def test_a_chat_begins_with_its_rendered_prompt(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [answered(teacher, seed) for seed in range(6)])
    report, table, rows, targets = imported(spec_of(teacher, tmp_path, example_id="id"))
    require_true(teacher, rows, K)
    prompt = prompt_of(teacher)
    for row in rows:
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["position_index"] == list(range(len(prompt) - 1, len(prompt) + 29))
        for j, index in enumerate(row["position_index"]):
            rank = teacher.rank(row["input_ids"][index + 1], row["input_ids"][index])
            # Of a token that is not listed, a chat tells the probability and no rank.
            assert row["label_ranks"][j] == (rank if rank < K else -1)
    assert (targets.ids >= 0).all()
    assert report["k"] == K
    recorded = table.contents.recorded
    assert recorded is not None
    assert (recorded.entries, recorded.first_position) == ("k", True)
    assert table.contents.chat_template_sha256 is not None
    assert table.contents.tokenizer_sha256 == load_tokenizer(str(teacher.folder)).sha256
    found = verify(table)
    assert found["problems"] == []
    assert found["alignment"]["verdict"] == "right"


def test_without_a_prompt_the_first_token_has_no_position(teacher: Teacher, tmp_path: Path) -> None:
    record = answered(teacher, 1)
    write_lines(tmp_path / "records.jsonl", [record])
    _, table, rows, _ = imported(spec_of(teacher, tmp_path, prompts=False))
    assert len(rows[0]["input_ids"]) == 30
    assert rows[0]["position_index"] == list(range(29))
    assert table.contents.recorded is not None
    assert not table.contents.recorded.first_position
    assert table.contents.chat_template_sha256 is None
    require_true(teacher, rows, K)


def test_what_vllm_lists_beside_the_top_is_not_in_it(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [answered(teacher, s, "vllm") for s in range(6)])
    _, table, rows, targets = imported(spec_of(teacher, tmp_path, k=K))
    require_true(teacher, rows, K)
    assert table.contents.recorded is not None
    assert table.contents.recorded.entries == "k+1"
    ranks = np.concatenate([row["label_ranks"] for row in rows])
    assert ranks.max() < K
    short = (targets.ids < 0).any(1)
    assert short.any()
    assert (ranks[short] == -1).all()
    assert verify(table)["problems"] == []


def completion(teacher: Teacher, tokens: list[int], start: int, by_id: bool) -> dict[str, Any]:
    """A completion response for tokens[start:]: K or K + 1 entries, the chosen token first."""

    def name(token: int) -> str:
        return f"token_id:{token}" if by_id else teacher.spelling[token].decode()

    tops: list[Any] = [None] if start == 0 else []
    values: list[Any] = [None] if start == 0 else []
    for place in range(max(start, 1), len(tokens)):
        before, chosen = tokens[place - 1], tokens[place]
        values.append(float(teacher.logprobs[before, chosen]))
        tops.append({name(chosen): values[-1]} | {name(t): v for t, v in teacher.top(before, K)})
    logprobs = {
        "tokens": [name(token) for token in tokens[start:]],
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": list(range(len(values))),
    }
    return {"choices": [{"index": 0, "text": "", "logprobs": logprobs}]}


def test_echo_gives_the_prompt_with_its_first_position_missing(
    teacher: Teacher, tmp_path: Path
) -> None:
    tokens = teacher.write(40, 3)
    record = {"prompt": "not needed", **completion(teacher, tokens, 0, by_id=True)}
    write_lines(tmp_path / "records.jsonl", [record])
    _, table, rows, _ = imported(spec_of(teacher, tmp_path, k=K))
    assert rows[0]["input_ids"] == tokens
    assert rows[0]["position_index"] == list(range(39))
    assert table.contents.recorded is not None
    assert not table.contents.recorded.first_position
    require_true(teacher, rows, K)


@pytest.mark.parametrize("given", ["prompt_token_ids", "ids", "text"])
def test_a_completion_follows_its_prompt(teacher: Teacher, tmp_path: Path, given: str) -> None:
    text = "the cat sat"
    backend = load_tokenizer(str(teacher.folder)).model.backend_tokenizer
    prompt = list(backend.encode(text).ids)
    record = completion(teacher, teacher.write(len(prompt) + 25, 9, prompt), len(prompt), True)
    if given == "prompt_token_ids":
        record["choices"][0]["prompt_token_ids"] = prompt
    else:
        record["prompt"] = text if given == "text" else prompt
    write_lines(tmp_path / "records.jsonl", [record])
    rows = imported(spec_of(teacher, tmp_path, k=K))[2]
    assert rows[0]["input_ids"][: len(prompt)] == prompt
    assert rows[0]["position_index"][0] == len(prompt) - 1
    require_true(teacher, rows, K)


def test_a_position_whose_token_has_no_text_of_its_own_is_left_out_and_counted(
    teacher: Teacher, tmp_path: Path
) -> None:
    record = answered(teacher, 2)
    items = record["choices"][0]["logprobs"]["content"]
    places = [3, 8]
    for place in places:
        entry = items[place]["top_logprobs"][1]
        entry.update(token="�", bytes=list("�".encode()))
    items[11]["top_logprobs"][2].update(token="no such token", bytes=None)
    write_lines(tmp_path / "records.jsonl", [record])
    with pytest.raises(DataError, match=r"2 x position with a token that is half a character"):
        import_recorded(spec_of(teacher, tmp_path))
    report, _, rows, _ = imported(spec_of(teacher, tmp_path, on_bad="skip"))
    assert report["skipped"] == {
        "position with a token that is half a character": 2,
        "position with a token that the tokenizer does not have": 1,
    }
    first = len(prompt_of(teacher)) - 1
    kept = [first + place for place in range(30) if place not in (*places, 11)]
    assert rows[0]["position_index"] == kept
    require_true(teacher, rows, K)


def test_batch_results_and_several_choices(teacher: Teacher, tmp_path: Path) -> None:
    one, two = answered(teacher, 1), answered(teacher, 2)
    body = {"choices": [one["choices"][0], two["choices"][0] | {"index": 1}]}
    record = {
        "custom_id": "x",
        "request": {"body": {"messages": MESSAGES}},
        "response": {"status_code": 200, "body": body},
    }
    write_lines(tmp_path / "records.jsonl", [record])
    rows = imported(spec_of(teacher, tmp_path, example_id="custom_id"))[2]
    assert [row["example_id"] for row in rows] == ["x#0", "x#1"]
    require_true(teacher, rows, K)


def test_the_template_of_the_spec_is_the_one_in_lineage(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [answered(teacher, 1)])
    (tmp_path / "template.jinja").write_text(TEMPLATE.replace("user", "user") + "{# other #}")
    template = str(tmp_path / "template.jinja")
    _, own, _, _ = imported(spec_of(teacher, tmp_path))
    _, other, _, _ = imported(
        spec_of(teacher, tmp_path, table=str(tmp_path / "other"), chat_template=template)
    )
    assert own.contents.chat_template_sha256 != other.contents.chat_template_sha256


def broken(record: dict[str, Any], change: Callable[[Any], None]) -> dict[str, Any]:
    """A copy of a record with its logprobs changed."""
    copy: dict[str, Any] = json.loads(json.dumps(record))
    change(copy)
    return copy


def content(record: dict[str, Any]) -> list[Any]:
    """The items of a chat response."""
    items: list[Any] = record["choices"][0]["logprobs"]["content"]
    return items


BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "twice": (
        lambda r: content(r)[4]["top_logprobs"].append(content(r)[4]["top_logprobs"][0]),
        "token twice in one position",
    ),
    "no chosen": (
        lambda r: content(r)[4].update(token="no such token", bytes=None),
        "chosen token that the tokenizer does not have",
    ),
    "empty": (lambda r: content(r).clear(), "record without logprobs"),
    "no choices": (lambda r: r.update(choices=[]), "record without choices"),
    "null": (lambda r: r["choices"][0].update(logprobs=None), "record without logprobs"),
    "no top": (lambda r: content(r)[4].pop("top_logprobs"), "record without top_logprobs"),
    "mass": (lambda r: content(r)[4]["top_logprobs"][0].update(logprob=-1e-4), "sum above 1"),
    "nan": (lambda r: content(r)[4]["top_logprobs"][0].update(logprob=float("nan")), "NaN"),
    "positive": (lambda r: content(r)[4]["top_logprobs"][0].update(logprob=0.5), "above 0"),
    "usage": (lambda r: r.update(usage={"prompt_tokens": 7}), "usage.prompt_tokens is 7"),
    "role": (lambda r: r.update(messages="hello"), "messages is no list"),
    "bytes": (lambda r: content(r)[4].update(bytes=[300]), "bad bytes"),
    "ids": (lambda r: r["choices"][0].update(token_ids=[5]), "1 token_ids, 30 logprobs"),
    "high id": (
        lambda r: content(r)[4]["top_logprobs"][0].update(token="token_id:999", bytes=None),
        "above the tokenizer's",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records_are_refused_or_counted(teacher: Teacher, tmp_path: Path, name: str) -> None:
    change, words = BROKEN[name]
    records = [answered(teacher, 1), broken(answered(teacher, 2), change)]
    write_lines(tmp_path / "records.jsonl", records)
    with pytest.raises(DataError, match=words) as caught:
        import_recorded(spec_of(teacher, tmp_path))
    assert "line 2 of 'records.jsonl'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "table").exists()
    report = import_recorded(spec_of(teacher, tmp_path, on_bad="skip"))
    assert (report["rows"], list(report["skipped"].values())) == (1, [1])


def test_lines_that_are_no_records(teacher: Teacher, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    write_lines(file, [answered(teacher, 1), "[1, 2]", "", json.dumps(answered(teacher, 2))[:-90]])
    file.write_bytes(file.read_bytes() + b'{"a": "\xff"}\n' + b"[" * 100_000 + b"\n")
    report = import_recorded(spec_of(teacher, tmp_path, on_bad="skip"))
    assert report["rows"] == 1
    assert report["skipped"] == {
        "line that is no JSON object": 1,
        "line that is not JSON, such as one cut short": 3,
    }
    with pytest.raises(DataError, match=r"line 2 of 'records.jsonl': line that is no JSON object"):
        import_recorded(spec_of(teacher, tmp_path))


def test_nothing_left_is_an_error(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", ["{}", "{"])
    with pytest.raises(DataError, match=r"none of 2 records can be kept: 1 x line.*1 x record"):
        import_recorded(spec_of(teacher, tmp_path, on_bad="skip"))
    write_lines(tmp_path / "records.jsonl", [])
    with pytest.raises(DataError, match="none of 0 records can be kept: there are none"):
        import_recorded(spec_of(teacher, tmp_path))


def test_processed_values_are_of_temperature_1(teacher: Teacher, tmp_path: Path) -> None:
    record = answered(teacher, 1) | {"temperature": 0.7}
    write_lines(tmp_path / "records.jsonl", [record])
    with pytest.raises(DataError, match=r"expected temperature 1.0, found 0.7"):
        import_recorded(spec_of(teacher, tmp_path, scale="processed"))
    # Of raw values it only chose the tokens.
    assert import_recorded(spec_of(teacher, tmp_path))["rows"] == 1
    for changes, words in (
        ({"temperature": 0.7}, "temperature 0.7: expected temperature 1.0"),
        ({"top_p": 0.9}, "top_p 0.9: expected top_p 1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            spec_of(teacher, tmp_path, scale="processed", **changes)


def test_four_decimals_bound_the_tail(teacher: Teacher, tmp_path: Path) -> None:
    record = answered(teacher, 1)
    for item in content(record):
        for entry in (item, *item["top_logprobs"]):
            entry["logprob"] = round(entry["logprob"], 4)
    certain = content(record)[6]["top_logprobs"]
    for entry, value in zip(certain, (0.0, -10.9, -11.5, -12.0, -13.0), strict=True):
        entry["logprob"] = value
    write_lines(tmp_path / "records.jsonl", [record])
    report, table, rows, targets = imported(spec_of(teacher, tmp_path))
    assert report["recorded"]["tail_error"] == pytest.approx(6e-5)
    # 0.0000 may have been 0.99995: what the others say is within that.
    assert rows[0]["tail_logprob"][6] == -np.inf
    assert np.exp(targets.logprobs[6]).sum() == pytest.approx(1, abs=1e-4)
    assert np.isfinite(np.delete(np.array(rows[0]["tail_logprob"]), 6)).all()
    assert verify(table)["problems"] == []


def test_two_decimals_may_sum_above_1(teacher: Teacher, tmp_path: Path) -> None:
    record = answered(teacher, 1)
    for item in content(record):
        for entry in (item, *item["top_logprobs"]):
            entry["logprob"] = round(entry["logprob"], 2)
    for entry, value in zip(
        content(record)[6]["top_logprobs"], (0.0, -5.8, -9, -9, -9), strict=True
    ):
        entry["logprob"] = value
    content(record)[6]["logprob"] = 0.0
    content(record)[6].update(
        {key: content(record)[6]["top_logprobs"][0][key] for key in ("token", "bytes")}
    )
    write_lines(tmp_path / "records.jsonl", [record])
    report, table, rows, targets = imported(spec_of(teacher, tmp_path))
    assert report["recorded"]["tail_error"] == pytest.approx(6e-3)
    # Their mass was 1.0034: within what two decimals can tell, the head is all there is.
    assert rows[0]["tail_logprob"][6] == -np.inf
    assert targets.logprobs[6, 0] == pytest.approx(
        -np.log(np.exp([0, -5.8, -9, -9, -9]).sum()), rel=1e-3
    )
    assert rows[0]["label_logprobs"][6] == targets.logprobs[6, 0]
    assert verify(table)["problems"] == []


def test_an_unknown_tail_is_not_stored(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [answered(teacher, 1)])
    _, table, rows, targets = imported(spec_of(teacher, tmp_path, tail="unknown"))
    assert targets.tail is None
    assert rows[0]["tail_logprob"] is None
    assert rows[0]["position_entropy"] is None
    assert table.contents.recorded is not None
    assert table.contents.recorded.tail_error is None
    assert verify(table)["problems"] == []


def test_k_above_what_is_there(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [answered(teacher, 1)])
    with pytest.raises(BadInputError, match="k is 20, the records have at most 5 entries"):
        import_recorded(spec_of(teacher, tmp_path, k=20))


def test_equal_sequences_are_kept_once(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "records.jsonl", [answered(teacher, 1)] * 3)
    report = import_recorded(spec_of(teacher, tmp_path))
    assert (report["rows"], report["repeated"]) == (1, 2)
    same = [answered(teacher, 1), answered(teacher, 2) | {"id": "r1"}]
    files = str(tmp_path / "records.jsonl")
    write_lines(tmp_path / "records.jsonl", same)
    with pytest.raises(DataError, match=r"two contents: line 2 of 'records.jsonl' and line 1"):
        import_recorded(spec_of(teacher, tmp_path / "b", files=files, example_id="id"))


def test_more_files_make_more_rows_of_the_same_table(teacher: Teacher, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [answered(teacher, 1)])
    spec = spec_of(teacher, tmp_path, files=str(tmp_path / "*.jsonl"))
    assert import_recorded(spec)["rows"] == 1
    again = import_recorded(spec)
    assert (again["rows"], again["already"], again["committed"]) == (0, 1, 0)
    write_lines(tmp_path / "b.jsonl", [answered(teacher, 2)])
    more = import_recorded(spec)
    assert (more["rows"], more["version"]) == (1, 2)

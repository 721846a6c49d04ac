"""Tokenizers: where they load from, what they are known by, whose tokens a chat's are."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from softlabels.errors import BadInputError
from softlabels.fingerprint import sha256_json, sha256_vocabulary
from softlabels.teacher.spec import SequenceCaptureSpec
from softlabels.teacher.tokenizer import (
    ChatError,
    Tokenizer,
    load_tokenizer,
    tokenizer_of,
    with_chat_template,
)
from tests.teacher.texts import (
    CHAT,
    CHATML,
    CLS,
    END,
    MASK,
    SENTENCES,
    SEP,
    STOP,
    text_spec,
    tiny_tokenizer,
)

MARKED = CHATML.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHATML)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def chatting(tokenizer: Tokenizer) -> Tokenizer:
    return with_chat_template(tokenizer)


def with_template(tokenizer: Tokenizer, folder: Path, template: str) -> Tokenizer:
    path = folder / "template.jinja"
    path.write_text(template)
    return with_chat_template(tokenizer, str(path))


def words(tokenizer: Tokenizer, ids: Any) -> str:
    return str(tokenizer.model.decode(list(map(int, ids)), skip_special_tokens=False))


def runs(tokenizer: Tokenizer, ids: Any, flags: Any) -> list[str]:
    """The text of each unbroken run of flagged tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [words(tokenizer, ids[start:stop]) for start, stop in pairs]


def test_the_fingerprint_is_that_of_the_json_alone(folder: Path, tokenizer: Tokenizer) -> None:
    whole = json.loads((folder / "tokenizer.json").read_text())
    ids = {**whole["model"]["vocab"], **{t["content"]: t["id"] for t in whole["added_tokens"]}}
    assert tokenizer.sha256 == sha256_json(ids) == sha256_vocabulary(ids)
    assert tokenizer.num_ids == max(ids.values()) + 1 == len(ids)


def test_an_added_token_counts_and_an_exchanged_one_is_seen(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "one")
    before = load_tokenizer(str(folder))
    whole = json.loads((folder / "tokenizer.json").read_text())
    top = before.num_ids
    whole["added_tokens"].append({**whole["added_tokens"][-1], "id": top, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    added = load_tokenizer(str(folder))
    assert added.num_ids == top + 1
    assert added.sha256 != before.sha256
    ids = whole["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    exchanged = load_tokenizer(str(folder))
    assert exchanged.num_ids == added.num_ids
    assert exchanged.sha256 != added.sha256


def test_one_map_with_other_merges_has_another_digest(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["model"]["merges"] = whole["model"]["merges"][:-5]
    path.write_text(json.dumps(whole))
    one, other = load_tokenizer(str(folder)), load_tokenizer(str(tmp_path / "other"))
    assert one.sha256 == other.sha256
    assert one.digest != other.digest
    assert load_tokenizer(str(folder)).digest == one.digest


def test_another_end_token_has_another_digest(tmp_path: Path) -> None:
    one = load_tokenizer(str(tiny_tokenizer(tmp_path / "one")))
    other = load_tokenizer(str(tiny_tokenizer(tmp_path / "two", eos_token=STOP)))
    assert (one.sha256, one.end_id) != (other.sha256, other.end_id)
    assert one.sha256 == other.sha256
    assert one.digest != other.digest


def test_it_encodes_as_transformers_does_and_ends_a_document(tokenizer: Tokenizer) -> None:
    texts = [*SENTENCES, "naïve — 日本語 \U0001f600", f"a {END} in the text"]
    expected = tokenizer.model(texts)["input_ids"]
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == expected
    ended = tokenizer.encode(texts, end=True)
    assert [ids.tolist() for ids in ended] == [[*ids, tokenizer.end_id] for ids in expected]
    assert {ids.dtype for ids in ended} == {np.dtype(np.int32)}
    assert tokenizer.encode([]) == []


def test_a_tokenizer_that_closes_texts_itself_gets_no_end(tmp_path: Path) -> None:
    closing = load_tokenizer(str(tiny_tokenizer(tmp_path / "closing", closes=True)))
    assert closing.ends
    (ids,) = closing.encode(["the cat"], end=True)
    assert words(closing, ids[[0, -1]]) == f"{CLS}{SEP}"
    assert closing.end_id not in ids.tolist()


def test_a_truncation_in_the_file_cuts_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    path = tmp_path / "cut" / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    whole["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END,
    }
    path.write_text(json.dumps(whole))
    found = load_tokenizer(str(tmp_path / "cut")).encode(SENTENCES)
    plain = load_tokenizer(str(folder)).encode(SENTENCES)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in plain]


def test_long_texts_make_no_noise(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The tokenizer's model_max_length is 16; its library says so to its own logger.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    plain = load_tokenizer(str(folder))
    long = [{"role": "user", "content": "the cat " * 500}, CHAT[1]]
    for found in (with_chat_template(plain), with_template(plain, tmp_path, MARKED)):
        (ids,) = found.encode(["the cat " * 500])
        assert len(ids) > 500
        found.encode_chat(long, assistant_only=True)
        found.encode_chat(long, assistant_only=False)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_it_loads_from_a_folder_a_file_and_a_bare_file(folder: Path, tmp_path: Path) -> None:
    one = load_tokenizer(str(folder))
    beside = load_tokenizer(str(folder / "tokenizer.json"))
    assert (one.digest, one.end_id) == (beside.digest, beside.end_id)
    shutil.copy(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    bare = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert bare.sha256 == one.sha256
    assert (bare.end_id, bare.mask_id) == (None, None)


def test_it_loads_from_a_gguf_file(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, json.loads((folder / "tokenizer.json").read_text()))
    found = with_chat_template(load_tokenizer(str(path)))
    assert found.sha256 == tokenizer.sha256
    assert found.end_id == tokenizer.end_id
    assert found.chat_template == CHATML
    expected = [ids.tolist() for ids in tokenizer.encode(SENTENCES)]
    assert [ids.tolist() for ids in found.encode(SENTENCES)] == expected


def write_gguf(path: Path, whole: dict[str, Any]) -> None:
    """A llama of no layers worth mentioning, with the tokens of a tokenizer.json."""
    vocabulary = whole["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["id"] for token in whole["added_tokens"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_types([3 if i in special else 1 for i in range(len(names))])
    writer.add_token_merges([" ".join(pair) for pair in whole["model"]["merges"]])
    writer.add_eos_token_id(vocabulary[END])
    writer.add_chat_template(CHATML)
    writer.add_tensor("token_embd.weight", np.zeros((len(names), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_it_loads_from_a_hub_repository_at_its_revision(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--toy"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("a" * 40)
    assert load_tokenizer("org/toy", "v1").digest == tokenizer.digest
    with pytest.raises(BadInputError, match="'org/toy'"):
        load_tokenizer("org/toy")  # main is not there
    # A revision is the model's: it says nothing of a tokenizer that has its own place.
    settings = text_spec(tmp_path, folder, files="x.txt").model_dump()
    settings["teacher"] |= {"revision": "v1", "tokenizer": None, "model": "org/toy"}
    assert tokenizer_of(SequenceCaptureSpec.model_validate(settings)).name == "org/toy"
    settings["teacher"] |= {"revision": "v1", "tokenizer": "org/toy"}
    with pytest.raises(BadInputError, match="'org/toy'"):
        tokenizer_of(SequenceCaptureSpec.model_validate(settings))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf", "nowhere.json", "some/where"])
def test_what_is_not_there_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match="cannot load the tokenizer") as caught:
        load_tokenizer(str(tmp_path / name) if "/" not in name else name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_damaged_file_is_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(BadInputError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_in_python_is_refused(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "CanineTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "canine"}))
    with pytest.raises(BadInputError, match="CanineTokenizer, which the tokenizers library does"):
        load_tokenizer(str(tmp_path))


def test_special_ids_hold_the_mask(tokenizer: Tokenizer) -> None:
    assert words(tokenizer, [tokenizer.mask_id]) == MASK
    assert tokenizer.mask_id in tokenizer.special_ids.tolist()


# Chats


def test_all_of_a_chat_is_to_be_predicted(chatting: Tokenizer) -> None:
    ids, flags = chatting.encode_chat(CHAT, assistant_only=False)
    assert flags.all()
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)
    assert words(chatting, ids) == expected


def test_the_assistants_tokens_end_with_its_end_of_turn(chatting: Tokenizer) -> None:
    ids, flags = chatting.encode_chat(CHAT, assistant_only=True)
    assert runs(chatting, ids, flags) == ["On the mat.<|im_end|>", "Over the hill.<|im_end|>"]


def test_only_the_template_writes_special_tokens_into_a_chat(tmp_path: Path) -> None:
    closing = load_tokenizer(str(tiny_tokenizer(tmp_path / "closing", CHATML, closes=True)))
    for template in (CHATML, MARKED):
        found = with_template(closing, tmp_path, template)
        for assistant_only in (False, True):
            ids, _ = found.encode_chat(CHAT, assistant_only)
            assert words(found, ids).startswith("<|im_start|>user\n")
            assert words(found, ids).endswith("<|im_end|>\n")


def test_marks_and_prefixes_agree(chatting: Tokenizer, tmp_path: Path) -> None:
    marked = with_template(chatting, tmp_path, MARKED)
    for chat in (CHAT, CHAT[:2], [{"role": "system", "content": "Be brief."}, *CHAT]):
        one, other = (t.encode_chat(chat, assistant_only=True) for t in (chatting, marked))
        assert one[0].tolist() == other[0].tolist()
        assert one[1].tolist() == other[1].tolist()


def test_marks_without_the_end_of_turn_are_given_it(chatting: Tokenizer, tmp_path: Path) -> None:
    short = MARKED.replace(
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert short != MARKED
    ids, flags = with_template(chatting, tmp_path, short).encode_chat(CHAT, True)
    assert runs(chatting, ids, flags) == ["On the mat.<|im_end|>", "Over the hill.<|im_end|>"]


def test_a_special_token_that_begins_the_next_turn_is_not_the_assistants(
    chatting: Tokenizer, tmp_path: Path
) -> None:
    tight = MARKED.replace("{{ '\n' }}", "").replace("<|im_end|>\n", "<|im_end|>")
    ids, flags = with_template(chatting, tmp_path, tight).encode_chat(CHAT, True)
    assert runs(chatting, ids, flags) == ["On the mat.<|im_end|>", "Over the hill.<|im_end|>"]


def test_a_chat_whose_assistant_says_nothing_has_no_tokens(chatting: Tokenizer) -> None:
    ids, flags = chatting.encode_chat(CHAT[:1], assistant_only=True)
    assert len(ids) == len(flags)
    assert not flags.any()


def test_text_that_looks_like_an_answer_is_not_one(chatting: Tokenizer) -> None:
    chat = [{"role": "user", "content": "On the mat. assistant\nOn the mat."}, CHAT[1]]
    ids, flags = chatting.encode_chat(chat, assistant_only=True)
    assert runs(chatting, ids, flags) == ["On the mat.<|im_end|>"]


@pytest.mark.parametrize("kept", ["loop.last", "loop.last or m['role'] == 'user'"])
def test_a_template_that_rewrites_earlier_turns_is_refused(
    chatting: Tokenizer, tmp_path: Path, kept: str
) -> None:
    # As reasoning models do: what was thought is left out once the next question is there.
    forgetful = CHATML.replace("m['content'] +", f"(m['content'] if {kept} else 'Wh') +")
    found = with_template(chatting, tmp_path, forgetful)
    with pytest.raises(BadInputError, match=r"message 2 of line 7 otherwise .*generation"):
        found.encode_chat(CHAT, assistant_only=True, place="line 7")
    ids, _ = found.encode_chat(CHAT, assistant_only=False)  # nobody asks whose tokens they are
    assert "<|im_start|>assistant\nWh<|im_end|>" in words(found, ids)


@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ([], "chat without messages", ""),
        ([{"role": "gpt", "content": "x"}], "unknown role", "'gpt' in message 1"),
        ([CHAT[0], {"content": "x"}], "malformed chat", "message 2 has no role"),
        ([CHAT[0], "x"], "malformed chat", "message 2 has no role"),
        ([{"role": "user"}], "malformed chat", "message 1 has no content"),
        ([{"role": "user", "content": None}], "malformed chat", "message 1 has no content"),
        ([{"role": "user", "content": "\ud800"}], "invalid UTF-8", ""),
        ([CHAT[1]], "chat that begins with the assistant", ""),
    ],
)
def test_chats_that_are_left_out(
    chatting: Tokenizer, messages: Any, reason: str, detail: str
) -> None:
    with pytest.raises(ChatError) as caught:
        chatting.encode_chat(messages, assistant_only=True)
    assert (caught.value.reason, caught.value.detail) == (reason, detail)


@pytest.mark.parametrize("template", [MARKED, CHATML])
def test_what_a_template_refuses_is_left_out_with_its_words(
    chatting: Tokenizer, tmp_path: Path, template: str
) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    found = with_template(chatting, tmp_path, strict + template)
    with pytest.raises(ChatError, match="no system") as caught:
        found.encode_chat([{"role": "system", "content": "x"}, *CHAT], assistant_only=True)
    assert caught.value.reason == "chat template failed"


def test_templates_have_fingerprints(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.chat_template_sha256 is None
    own = with_chat_template(tokenizer)
    given = with_template(tokenizer, tmp_path, MARKED)
    assert own.chat_template == CHATML
    assert given.chat_template == MARKED
    assert own.chat_template_sha256 != given.chat_template_sha256
    assert own.sha256 == given.sha256


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    plain = load_tokenizer(str(tiny_tokenizer(tmp_path / "plain")))
    with pytest.raises(BadInputError, match=r"has no chat template .* give source.chat_template"):
        with_chat_template(plain)
    with pytest.raises(BadInputError, match=r"nowhere.jinja' cannot be read"):
        with_chat_template(plain, str(tmp_path / "nowhere.jinja"))


def test_a_template_that_writes_the_date_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="strftime_now"):
        with_template(tokenizer, tmp_path, "{{ strftime_now('%d %b %Y') }}" + CHATML)


def test_a_spec_says_which_tokenizer_and_template(folder: Path, tmp_path: Path) -> None:
    text = tokenizer_of(text_spec(tmp_path, folder, files="x.txt"))
    assert text.chat_template is None
    own = tokenizer_of(text_spec(tmp_path, folder, files="x.jsonl", messages="m"))
    assert own.chat_template == CHATML
    mine = tmp_path / "mine.jinja"
    mine.write_text(MARKED)
    spec = text_spec(tmp_path, folder, files="x.jsonl", messages="m", chat_template=str(mine))
    assert tokenizer_of(spec).chat_template == MARKED


def test_the_file_that_is_named_is_read(tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "one")
    other = tiny_tokenizer(tmp_path / "two", vocabulary=290)
    (folder / "other.json").write_bytes((other / "tokenizer.json").read_bytes())
    assert load_tokenizer(str(folder / "other.json")).num_ids == 290
    assert load_tokenizer(str(folder / "tokenizer.json")).num_ids > 290


def test_a_template_that_opens_no_turn_cannot_tell_the_heading_from_the_answer(
    tmp_path: Path,
) -> None:
    template = CHATML[: CHATML.index("{% if add_generation_prompt %}")]
    tokenizer = with_chat_template(load_tokenizer(str(tiny_tokenizer(tmp_path, template))))
    with pytest.raises(BadInputError, match=r"does not heed add_generation_prompt.*generation"):
        tokenizer.encode_chat(CHAT, True, "line 1")

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from softlabels.errors import BadInputError
from softlabels.fingerprint import sha256_bytes, sha256_json
from softlabels.student.tokens import template_sha256, tokenizer_sha256, vocabulary

TEXT = ["hello world this is a text", "another line of text, with wörds"]
SPECIAL = ["<u>", "<s>"]
KINDS = {
    "bpe": (
        models.BPE(unk_token="<u>"),
        trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False),
    ),
    "wordpiece": (
        models.WordPiece(unk_token="<u>"),
        trainers.WordPieceTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False),
    ),
    "wordlevel": (
        models.WordLevel(unk_token="<u>"),
        trainers.WordLevelTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False),
    ),
    "unigram": (
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=60, special_tokens=SPECIAL, unk_token="<u>", show_progress=False
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_the_tokenizer(tmp_path: Path, kind: str) -> None:
    model, trainer = KINDS[kind]
    tokenizer: Any = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens(["zz", AddedToken("hello")])  # new, and perhaps known already
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = tokenizer.get_vocab(with_added_tokens=True)
    assert "<|end|>" in expected
    assert vocabulary(tmp_path) == vocabulary(tmp_path / "tokenizer.json") == expected
    assert tokenizer_sha256(tmp_path) == sha256_json(expected)


def test_one_id_that_differs_is_another_tokenizer(tmp_path: Path) -> None:
    shas = []
    for name, tokens in (("a", {"x": 0, "y": 1}), ("b", {"x": 1, "y": 0})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
        shas.append(tokenizer_sha256(path))
    assert shas[0] != shas[1]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"model": {}}', '{"model": {"vocab": 3}}', '{"model": {"vocab": ["a"]}}']
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BadInputError, match=r"is no tokenizer\.json") as caught:
        tokenizer_sha256(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="there is no"):
        tokenizer_sha256(tmp_path)
    with pytest.raises(BadInputError, match="chat_template: cannot read"):
        template_sha256(str(tmp_path / "nowhere"))


def test_a_template_counts_by_its_text(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages }}ü", encoding="utf-8")
    assert template_sha256(str(path)) == sha256_bytes("{{ messages }}ü".encode())

"""Token strings back to ids: exactly, or not at all."""

from pathlib import Path

import pytest

from softlabels.teacher.recorded.entries import BadRecordError
from softlabels.teacher.recorded.vocabulary import TokenMap, UnknownTokenError
from softlabels.teacher.tokenizer import load_tokenizer
from tests.teacher.recorded.recordings import Teacher, write_tokenizer


def test_every_token_is_found_by_its_bytes(teacher: Teacher) -> None:
    tokens = TokenMap(load_tokenizer(str(teacher.folder)), "text")
    assert len(set(teacher.spelling)) == teacher.size
    for index, data in enumerate(teacher.spelling):
        assert tokens.find("anything", list(data)) == index
        assert tokens.find(f"token_id:{index}") == index


def test_text_is_enough_where_it_is_whole(teacher: Teacher) -> None:
    tokenizer = load_tokenizer(str(teacher.folder))
    tokens = TokenMap(tokenizer, "text")
    backend = tokenizer.model.backend_tokenizer
    halves = 0
    for index in range(teacher.size):
        text = backend.decode([index], skip_special_tokens=False)
        if "�" in text:
            halves += 1
            with pytest.raises(UnknownTokenError, match="half a character"):
                tokens.find(text)
            with pytest.raises(UnknownTokenError, match="half a character"):
                tokens.find(text, list(text.encode()))
        else:
            assert tokens.find(text) == index
    assert halves > 100


def test_a_space_that_a_decoder_takes_away_leaves_two_readings(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer(tmp_path, sentencepiece=True)))
    tokens = TokenMap(tokenizer, "text")
    ids = tokenizer.model.backend_tokenizer.get_vocab()
    assert {"▁t", "t", "▁the"} <= set(ids)
    assert tokens.find(" t") == ids["▁t"]
    with pytest.raises(UnknownTokenError, match="may be several"):
        tokens.find("t")
    assert "the" not in ids
    assert tokens.find("the") == ids["▁the"]
    assert tokens.find("<|im_end|>") == ids["<|im_end|>"]
    spelt = TokenMap(tokenizer, "vocabulary")
    assert all(spelt.find(token) == index for token, index in ids.items())


def test_what_is_no_token(teacher: Teacher) -> None:
    tokens = TokenMap(load_tokenizer(str(teacher.folder)), "text")
    with pytest.raises(UnknownTokenError, match="does not have"):
        tokens.find("no such token")
    with pytest.raises(UnknownTokenError, match="does not have"):
        tokens.find("")
    with pytest.raises(BadRecordError, match="'token_id:290' of 290 ids"):
        tokens.find("token_id:290")
    with pytest.raises(BadRecordError, match="no string"):
        tokens.find(7)
    with pytest.raises(BadRecordError, match="bad bytes"):
        tokens.find("a", ["x"])
    with pytest.raises(UnknownTokenError):
        tokens.find("\ud800")

"""Sequences: packing, positions, masks, what is left out, and the file they are kept in."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import BadInputError, DataError, StorageError, TryAgainError
from softlabels.schema import INTS
from softlabels.teacher.sequence_file import LISTS
from softlabels.teacher.sequences import open_sequences, skipped_places
from softlabels.teacher.source import Source
from softlabels.teacher.tokenizer import Tokenizer, load_tokenizer, tokenizer_of
from tests.teacher.texts import CHAT, CHATML, SENTENCES, text_spec, tiny_tokenizer, write_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHATML)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sequences"


class Maker:
    """Writes records as JSONL and opens them as sequences."""

    def __init__(self, tmp_path: Path, folder: Path) -> None:
        self.tmp_path = tmp_path
        self.folder = folder

    def __call__(
        self, records: Sequence[Any], context: int | None = None, **settings: Any
    ) -> Source:
        path = write_lines(self.tmp_path / "in.jsonl", records)
        spec = text_spec(self.tmp_path, self.folder, **{"files": str(path), **settings})
        return open_sequences(spec, tokenizer_of(spec), context)


@pytest.fixture
def make(tmp_path: Path, folder: Path) -> Maker:
    return Maker(tmp_path, folder)


def read(source: Source) -> list[dict[str, Any]]:
    batches = source.batches(0, source.num_rows, source.schema.names)
    return [row for batch in batches for row in batch.to_pylist()]


def texts(records: Sequence[str]) -> list[dict[str, str]]:
    return [{"text": text} for text in records]


def check(row: dict[str, Any]) -> None:
    """What the contract says of every causal row."""
    ids, segments = row["input_ids"], row["segment_ids"]
    where = row["position_index"]
    assert where == sorted(set(where))
    assert where
    assert where[-1] < len(ids) - 1
    assert [ids[p + 1] for p in where] == row["label_ids"]
    if segments is not None:
        assert len(segments) == len(ids)
        assert segments[0] == 0
        assert set(np.diff(segments)) <= {0, 1}
        assert all(segments[p] == segments[p + 1] for p in where)


# Packing


def test_packed_documents_follow_each_other_and_nothing_is_lost(
    make: Maker, tokenizer: Tokenizer
) -> None:
    rows = read(make(texts(SENTENCES), length=13))
    expected = np.concatenate(tokenizer.encode(SENTENCES, end=True)).tolist()
    assert [i for row in rows for i in row["input_ids"]] == expected
    assert {len(row["input_ids"]) for row in rows[:-1]} == {13}
    assert 0 < len(rows[-1]["input_ids"]) <= 13


def test_isolated_documents_are_segments_from_zero_in_each_sequence(
    make: Maker, tokenizer: Tokenizer
) -> None:
    rows = read(make(texts(SENTENCES), length=13))
    lengths = [len(ids) for ids in tokenizer.encode(SENTENCES, end=True)]
    document = np.repeat(np.arange(len(lengths)), lengths)
    start = 0
    for row in rows:
        check(row)
        here = document[start : start + len(row["input_ids"])]
        assert row["segment_ids"] == (here - here[0]).tolist()
        # Every token but a segment's last has a position.
        assert row["position_index"] == np.flatnonzero(np.diff(here) == 0).tolist()
        start += len(here)
    assert max(max(row["segment_ids"]) for row in rows) >= 1


def test_joined_documents_see_each_other_and_labels_cross_borders(make: Maker) -> None:
    rows = read(make(texts(SENTENCES), length=13, isolate=False))
    for row in rows:
        check(row)
        assert row["segment_ids"] is None
        assert row["position_index"] == list(range(len(row["input_ids"]) - 1))


def test_a_token_that_is_left_over_is_counted(make: Maker, tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode(SENTENCES[:1], end=True)
    source = make(texts(SENTENCES[:1]), length=len(ids) - 1)
    assert source.num_rows == 1
    assert source.skipped == {"nothing to predict": 1}
    assert skipped_places(source) == {"nothing to predict": ["line 1 of 'in.jsonl'"]}


def test_a_segment_of_one_token_has_no_position(make: Maker) -> None:
    (row,) = read(make([{"ids": [7, 8, 9]}], input_ids="ids", packing="documents"))
    assert row["position_index"] == [0, 1]
    record = {"ids": [7, 8, 9, 10], "segment_ids": [3, 5, 5, 9]}
    (row,) = read(make([record], input_ids="ids", packing="documents"))
    assert row["segment_ids"] == [0, 1, 1, 2]
    assert row["position_index"] == [1]
    assert row["label_ids"] == [9]


def test_documents_end_with_the_end_token_unless_told_not_to(
    make: Maker, tokenizer: Tokenizer
) -> None:
    (row,) = read(make(texts(SENTENCES[:1]), packing="documents"))
    assert row["input_ids"][-1] == tokenizer.end_id
    assert row["label_ids"][-1] == tokenizer.end_id
    (row,) = read(make(texts(SENTENCES[:1]), packing="documents", end=False))
    assert tokenizer.end_id not in row["input_ids"]


# Documents


def test_a_long_document_is_split_with_numbered_ids(make: Maker, tokenizer: Tokenizer) -> None:
    records = [{"text": text, "id": f"d{i}"} for i, text in enumerate(SENTENCES[:2])]
    rows = read(make(records, packing="documents", length=9, example_id="id", carry=["id"]))
    encoded = tokenizer.encode(SENTENCES[:2], end=True)
    parts = [len(range(0, len(ids), 9)) for ids in encoded]
    names = [f"d{i}#{n}" if n else f"d{i}" for i in range(2) for n in range(parts[i])]
    assert [row["example_id"] for row in rows] == names
    assert [row["id"] for row in rows] == [name[:2] for name in names]
    for row in rows:
        check(row)
        assert row["segment_ids"] is None
    first = [i for row in rows[: parts[0]] for i in row["input_ids"]]
    assert first == encoded[0].tolist()


def test_a_long_document_is_dropped_or_refused(make: Maker, tokenizer: Tokenizer) -> None:
    records = texts(["the cat", SENTENCES[0]])
    length = len(tokenizer.encode([SENTENCES[0]], end=True)[0])
    short = make(records, packing="documents", length=length - 1, too_long="drop")
    assert short.num_rows == 1
    assert short.skipped == {"too long": 1}
    assert skipped_places(short) == {"too long": [f"line 2 of 'in.jsonl': {length} tokens"]}
    message = rf"line 2 of 'in.jsonl' has {length} tokens, source.length is {length - 1}"
    with pytest.raises(DataError, match=message):
        make(records, packing="documents", length=length - 1, too_long="refuse")
    for rule in ("drop", "refuse"):
        assert make(records, packing="documents", length=length, too_long=rule).num_rows == 2


def test_ids_are_of_the_content_where_no_column_gives_them(make: Maker) -> None:
    documents = [SENTENCES[0], SENTENCES[1], SENTENCES[0]]
    rows = read(make(texts(documents), packing="documents"))
    names = [row["example_id"] for row in rows]
    assert names[0] == names[2] != names[1]
    assert all(len(name) == 64 for name in names)
    # Another cut is another example, though it begins with the same words.
    again = read(make(texts(documents), packing="documents", length=9))
    assert not {row["example_id"] for row in again} & set(names)


def test_short_documents_are_counted(make: Maker) -> None:
    source = make(texts(["a", SENTENCES[0]]), shortest=5)
    assert source.skipped == {"too short": 1}
    assert skipped_places(source) == {"too short": ["line 1 of 'in.jsonl': 2 tokens"]}


# Token ids


def test_given_positions_are_the_rows(make: Maker) -> None:
    records = [
        {"ids": [5, 6, 7, 8], "position_index": [0, 2]},
        {"ids": [5, 6, 7, 8], "position_index": []},
        {"ids": [5, 6, 7, 8], "position_index": [0, 1, 2]},
    ]
    source = make(records, input_ids="ids", packing="documents")
    rows = read(source)
    assert [row["position_index"] for row in rows] == [[0, 2], [0, 1, 2]]
    assert [row["label_ids"] for row in rows] == [[6, 8], [6, 7, 8]]
    assert source.skipped == {"nothing to predict": 1}
    # The same tokens with other positions are another example.
    assert rows[0]["example_id"] != rows[1]["example_id"]


@pytest.mark.parametrize("missing", [{}, {"position_index": None}])
def test_positions_are_given_to_all_rows_or_to_none(make: Maker, missing: Any) -> None:
    # A missing mask must not become "learn everything".
    records = [{"ids": [5, 6, 7, 8], "position_index": [0]}, {"ids": [5, 6, 7, 8]} | missing]
    with pytest.raises(DataError, match=r"line 2 .* has no position_index.*to all or to none"):
        make(records, input_ids="ids", packing="documents")


def test_given_positions_and_segments_survive_a_split(make: Maker) -> None:
    record = {
        "ids": [10, 11, 12, 13, 14, 15, 16],
        "segment_ids": [0, 0, 1, 1, 1, 2, 2],
        "position_index": [0, 2, 3, 5],
    }
    source = make([record], input_ids="ids", packing="documents", length=3)
    assert source.skipped == {"position before a cut": 2, "nothing to predict": 1}
    rows = read(source)
    # Token 13 begins a sequence: nothing before it is there to predict it. The last one is alone.
    assert [row["position_index"] for row in rows] == [[0], [0]]
    assert [row["segment_ids"] for row in rows] == [[0, 0, 1], [0, 0, 1]]
    assert [row["label_ids"] for row in rows] == [[11], [14]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"ids": [1, 999]}, r"line 1 of 'in.jsonl' has token id 999 at 1, .* knows 320"),
        ({"ids": [1, -1]}, r"has token id -1 at 1"),
        ({"ids": [1, 2, 3], "position_index": [1, 0]}, r"is 0 at 1: expected rising"),
        ({"ids": [1, 2, 3], "position_index": [1, 1]}, r"is 1 at 1: expected rising"),
        ({"ids": [1, 2, 3], "position_index": [2]}, r"is 2 at 0: .* below 2, each with a next"),
        ({"ids": [1, 2, 3], "position_index": [-1]}, r"is -1 at 0"),
        (
            {"ids": [1, 2, 3], "position_index": [0, 1], "segment_ids": [0, 0, 1]},
            r"is 1 at 1: .* next token in its segment",
        ),
        ({"ids": [1, 2, 3], "segment_ids": [0, 1, 0]}, r"expected 3 numbers that never fall"),
        ({"ids": [1, 2, 3], "segment_ids": [0, 1]}, r"expected 3 numbers .* found 2"),
    ],
)
def test_token_ids_that_contradict_themselves_are_refused(
    make: Maker, record: dict[str, Any], message: str, cache: Path
) -> None:
    with pytest.raises(DataError, match=message):
        make([record], input_ids="ids", packing="documents")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("first", [True, False])
def test_segments_are_in_all_rows_or_in_none(make: Maker, first: bool) -> None:
    records = [{"ids": [1, 2], "segment_ids": [0, 0]}, {"ids": [3, 4]}]
    with pytest.raises(DataError, match=r"line \d of .* segment_ids, the rows before it"):
        make(records if first else records[::-1], input_ids="ids", packing="documents")


# Chats


@pytest.mark.parametrize("packing", ["packed", "documents"])
def test_only_the_assistants_tokens_are_predicted(
    make: Maker, tokenizer: Tokenizer, packing: str
) -> None:
    records = [{"m": CHAT}, {"m": CHAT[:1]}, {"m": CHAT[:2]}]
    source = make(records, messages="m", loss_on="assistant", packing=packing)
    rows = read(source)
    for row in rows:
        check(row)
    labels = [i for row in rows for i in row["label_ids"]]
    expected = "On the mat.<|im_end|>Over the hill.<|im_end|>On the mat.<|im_end|>"
    assert tokenizer.model.decode(labels, skip_special_tokens=False) == expected
    assert source.skipped == {"nothing to predict": 1}
    assert skipped_places(source) == {"nothing to predict": ["line 2 of 'in.jsonl'"]}


def test_a_whole_chat_is_predicted_unless_told_otherwise(make: Maker) -> None:
    (row,) = read(make([{"m": CHAT}], messages="m", packing="documents"))
    assert row["position_index"] == list(range(len(row["input_ids"]) - 1))


def test_chats_that_cannot_be_rendered_are_counted(make: Maker) -> None:
    bad = [[], [{"role": "gpt", "content": "x"}], [{"role": "user"}], "text"]
    source = make([{"m": chat} for chat in [*bad, CHAT]], messages="m")
    assert source.skipped == {
        "chat without messages": 1,
        "unknown role": 1,
        "malformed chat": 1,
        "field of a wrong type": 1,
    }
    places = skipped_places(source)
    assert places["unknown role"] == ["line 2 of 'in.jsonl': 'gpt' in message 1"]


# Masked models


def test_masks_are_drawn_by_seed_and_never_on_special_tokens(
    make: Maker, tokenizer: Tokenizer
) -> None:
    records = texts([" ".join(SENTENCES) + f" {i}" for i in range(40)])
    settings: dict[str, Any] = {"kind": "masked", "length": 64, "mask_rate": 0.3}
    plain = read(make(records, length=64))
    rows = read(make(records, **settings))
    assert len(rows) == len(plain)
    masked = total = 0
    for row, before in zip(rows, plain, strict=True):
        where, ids = row["position_index"], row["input_ids"]
        assert where == sorted(set(where))
        assert where
        assert [before["input_ids"][p] for p in where] == row["label_ids"]
        assert {ids[p] for p in where} == {tokenizer.mask_id}
        others = set(range(len(ids))) - set(where)
        assert all(ids[p] == before["input_ids"][p] for p in others)
        assert not np.isin(row["label_ids"], tokenizer.special_ids).any()
        assert row["segment_ids"] == before["segment_ids"]
        masked, total = masked + len(where), total + len(ids)
    # 4,000 and more draws of .3: four standard deviations.
    assert abs(masked / total - 0.3) < 4 * (0.21 / total) ** 0.5
    again = read(make(records, **settings))
    assert again == rows
    other = read(make(records, seed=1, **settings))
    assert sum(a == b for a, b in zip(rows, other, strict=True)) == 0
    # Another mask is another example: both may be in one table.
    assert not {r["example_id"] for r in rows} & {r["example_id"] for r in other}


def test_a_masked_sequence_has_one_position_at_least(make: Maker) -> None:
    records = texts(["the cat", "a dog", "the sea"])
    rows = read(make(records, kind="masked", mask_rate=1e-9, packing="documents"))
    assert [len(row["position_index"]) for row in rows] == [1, 1, 1]


def test_masks_depend_on_the_example_not_on_its_place(make: Maker) -> None:
    records = [{"text": text, "id": str(i)} for i, text in enumerate(SENTENCES)]
    settings: dict[str, Any] = {"kind": "masked", "packing": "documents", "example_id": "id"}
    one = read(make(records, **settings))
    other = read(make(records[::-1], **settings))
    assert one == other[::-1]


def test_given_positions_are_the_masked_ones(make: Maker, tokenizer: Tokenizer) -> None:
    record = {"ids": [10, 11, 12], "position_index": [0, 2]}
    (row,) = read(make([record], kind="masked", input_ids="ids", packing="documents"))
    assert row["input_ids"] == [tokenizer.mask_id, 11, tokenizer.mask_id]
    assert (row["position_index"], row["label_ids"]) == ([0, 2], [10, 12])


def test_the_same_masks_in_other_segments_are_another_example(make: Maker) -> None:
    record = {"ids": [10, 11, 12], "position_index": [1]}
    records = [{**record, "segment_ids": segments} for segments in ([0, 0, 0], [0, 1, 1])]
    rows = read(make(records, kind="masked", input_ids="ids", packing="documents"))
    assert [row["input_ids"] for row in rows] == [rows[0]["input_ids"]] * 2
    assert rows[0]["example_id"] != rows[1]["example_id"]


def test_a_sequence_of_special_tokens_has_nothing_to_mask(make: Maker) -> None:
    records = [{"ids": [0, 1]}, {"ids": [0, 9]}]
    source = make(records, kind="masked", input_ids="ids", packing="documents")
    assert source.num_rows == 1
    assert source.skipped == {"nothing to predict": 1}


# Settings that do not fit


def test_the_length_must_fit_the_models_context(make: Maker) -> None:
    with pytest.raises(BadInputError, match=r"source.length is 512 tokens, .* 64: say length: 64"):
        make(texts(SENTENCES), context=64)
    with pytest.raises(BadInputError, match=r"source.length is 65 tokens"):
        make(texts(SENTENCES), context=64, length=65)
    assert make(texts(SENTENCES), context=64, length=64).num_rows == 2


def test_what_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    bare = tiny_tokenizer(tmp_path / "bare", eos_token=None, mask_token=None)
    make = Maker(tmp_path, bare)
    with pytest.raises(BadInputError, match=r"names no end-of-text token: say end: false"):
        make(texts(SENTENCES))
    with pytest.raises(BadInputError, match=r"kind: masked needs a mask token"):
        make(texts(SENTENCES), kind="masked", end=False)
    assert make(texts(SENTENCES), end=False).num_rows == 1
    with pytest.raises(BadInputError, match="has no chat template"):
        make([{"m": CHAT}], messages="m")
    spec = text_spec(tmp_path, bare, files=str(tmp_path / "in.jsonl"), messages="m")
    with pytest.raises(BadInputError, match="loaded without a chat template"):
        open_sequences(spec, load_tokenizer(str(bare)))


def test_keys_are_for_documents(make: Maker) -> None:
    with pytest.raises(BadInputError, match=r"source.example_id 'id': .* say packing: documents"):
        make([{"text": "x", "id": "a"}], example_id="id")


def test_a_carried_column_may_not_have_the_name_of_another(make: Maker) -> None:
    with pytest.raises(BadInputError, match=r"carry: column 'Input_IDs' has the name"):
        make([{"text": "x", "Input_IDs": 1}], packing="documents", carry=["Input_IDs"])


def test_nothing_left_shows_the_counts(make: Maker, cache: Path) -> None:
    message = (
        r"nothing is left of .*in.jsonl': 2 empty document \(first: line 1 of 'in.jsonl'\); 1 f"
    )
    with pytest.raises(BadInputError, match=message):
        make([{"text": ""}, {"text": " "}, {"body": "x"}])
    assert list(cache.iterdir()) == []
    (folder := cache.parent.parent / "none").mkdir()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    with pytest.raises(BadInputError, match="there is no document"):
        make([], files=str(folder / "a.parquet"))


# The file


def test_the_file_has_the_types_of_the_contract(make: Maker) -> None:
    records = [{"text": text, "n": i} for i, text in enumerate(SENTENCES)]
    source = make(records, packing="documents", carry=["n"])
    assert source.schema.names == ["example_id", *LISTS, "n"]
    assert source.schema.field("example_id").type == pa.string()
    assert {source.schema.field(name).type for name in LISTS} == {INTS}
    assert source.schema.field("n").type == pa.int64()
    assert [row["n"] for row in read(source)] == [0, 1, 2, 3]


def test_it_is_made_once(make: Maker, cache: Path, folder: Path, tmp_path: Path) -> None:
    first = make([*texts(SENTENCES), {"text": ""}], length=13)
    (path,) = cache.iterdir()
    before = path.stat()
    spec = text_spec(tmp_path, folder, files=str(tmp_path / "in.jsonl"), length=13)

    def never(documents: int) -> None:
        raise AssertionError("it was made again")

    again = open_sequences(spec, tokenizer_of(spec), advance=never)
    assert again.fingerprint == first.fingerprint == first.origin
    assert again.files == first.files
    assert again.skipped == first.skipped == {"empty document": 1}
    assert [p.stat().st_mtime_ns for p in cache.iterdir()] == [before.st_mtime_ns]
    assert path.name == f"{first.origin}-{first.files[0].sha256}.parquet"


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "name"])
def test_a_damaged_file_is_made_anew(make: Maker, cache: Path, damage: str) -> None:
    first = make(texts(SENTENCES), length=13)
    rows = read(first)
    (path,) = cache.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-20])
    elif damage == "flip":
        data[60] ^= 1
        path.write_bytes(data)
    elif damage == "name":
        path.rename(cache / f"{first.origin}-{'0' * 64}.parquet")
    else:
        pq.write_table(pa.table({"x": [1]}), path)
    again = make(texts(SENTENCES), length=13)
    assert read(again) == rows
    assert again.files == first.files
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_batches_and_groups_do_not_show(
    make: Maker, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = texts([SENTENCES[i % 4] + str(i) for i in range(50)])
    first = make(records, length=13)
    names = {path.name for path in cache.iterdir()}
    for path in cache.iterdir():
        path.unlink()
    monkeypatch.setattr("softlabels.teacher.tokenised.BATCH_DOCUMENTS", 3)
    assert {make(records, length=13).files[0].sha256} == {first.files[0].sha256}
    assert {path.name for path in cache.iterdir()} == names
    rows = read(first)
    for path in cache.iterdir():
        path.unlink()
    monkeypatch.setattr("softlabels.teacher.sequence_file.GROUP_TOKENS", 40)
    small = make(records, length=13)
    assert read(small) == rows
    assert small.fingerprint == first.fingerprint
    (path,) = cache.iterdir()
    assert pq.ParquetFile(path).num_row_groups > 10


def test_the_origin_is_the_text_and_what_becomes_of_it(
    make: Maker, folder: Path, tmp_path: Path
) -> None:
    records = [{"text": text, "id": str(i), "m": CHAT} for i, text in enumerate(SENTENCES)]
    found = [
        make(records, **settings).fingerprint
        for settings in (
            {},
            {"length": 13},
            {"isolate": False},
            {"end": False},
            {"shortest": 3},
            {"packing": "documents"},
            {"packing": "documents", "example_id": "id"},
            {"packing": "documents", "carry": ["id"]},
            {"packing": "documents", "too_long": "drop"},
            {"text": "id"},
            {"messages": "m"},
            {"messages": "m", "loss_on": "assistant"},
            {"kind": "masked"},
            {"kind": "masked", "mask_rate": 0.2},
            {"kind": "masked", "seed": 1},
        )
    ]
    found.append(make([*records, records[0]]).fingerprint)
    template = tmp_path / "other.jinja"
    template.write_text(CHATML + " ")
    found.append(make(records, messages="m", chat_template=str(template)).fingerprint)
    other = tiny_tokenizer(tmp_path / "other", vocabulary=300)
    found.append(Maker(tmp_path, other)(records).fingerprint)
    assert len(set(found)) == len(found)
    # These decide nothing: the seed of a causal teacher, where things are, what is said twice.
    same = [make(records, text="text").fingerprint]
    same += [make(records, seed=5).fingerprint, make(records, mask_rate=0.5).fingerprint]
    moved = write_lines(tmp_path / "moved" / "b.jsonl", records)
    same.append(make(records, files=str(moved)).fingerprint)
    assert set(same) == {found[0]}


def test_a_stop_leaves_nothing_behind(tmp_path: Path, folder: Path, cache: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", texts([*SENTENCES, ""]))
    spec = text_spec(tmp_path, folder, files=str(path))
    seen: list[int] = []

    def stop(documents: int) -> None:
        seen.append(documents)
        raise TryAgainError("stopped")

    with pytest.raises(TryAgainError):
        open_sequences(spec, tokenizer_of(spec), advance=stop)
    assert list(cache.iterdir()) == []
    assert seen == [5]
    assert open_sequences(spec, tokenizer_of(spec)).num_rows == 1


def test_the_cache_is_a_folder_here_that_can_be_written(
    make: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOFTLABELS_CACHE", "memory://x")
    with pytest.raises(BadInputError, match=r"SOFTLABELS_CACHE is 'memory://x': expected a folder"):
        make(texts(SENTENCES))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "sequences").write_text("a file, where a folder should be")
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "full"))
    with pytest.raises(StorageError, match="cannot write"):
        make(texts(SENTENCES))
    monkeypatch.setenv("SOFTLABELS_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make(texts(SENTENCES))
    assert len(list((tmp_path / "home/.cache/softlabels/sequences").iterdir())) == 1


def test_parquet_and_json_give_the_same_rows(make: Maker, tmp_path: Path) -> None:
    records = [{"text": text, "m": list(CHAT)} for text in SENTENCES]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "in.parquet", row_group_size=3)
    kinds: list[dict[str, Any]] = [{}, {"messages": "m", "loss_on": "assistant"}]
    for settings in kinds:
        one = read(make(records, **settings))
        other = read(make([], files=str(tmp_path / "in.parquet"), **settings))
        assert one == other


def test_notes_are_json_in_the_files_metadata(make: Maker, cache: Path) -> None:
    make([*texts(SENTENCES), {"text": ""}])
    (path,) = cache.iterdir()
    notes = json.loads(pq.read_metadata(path).metadata[b"softlabels.skipped"])
    assert notes == {"empty document": [1, ["line 5 of 'in.jsonl'"]]}


@pytest.mark.parametrize("value", [2**70, "\ud800", [2**70]])
def test_carried_values_that_no_column_holds(make: Maker, value: Any) -> None:
    records = [{"text": "The cat sat.", "x": value}]
    with pytest.raises(DataError, match=r"carry: field 'x' has a value in examples .* cannot hold"):
        make(records, packing="documents", carry=["x"])


def test_what_killed_runs_left_is_cleared(make: Maker, cache: Path) -> None:
    source = make(texts(SENTENCES))
    (path,) = cache.iterdir()
    path.unlink()
    old = cache / f"{source.origin}-0.tmp"
    fresh = cache / f"{source.origin}-1.tmp"  # another run may be writing it
    for file in (old, fresh):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    make(texts(SENTENCES))
    assert sorted(cache.iterdir()) == sorted([path, fresh])

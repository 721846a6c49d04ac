"""Raw files to documents: what is read, what is left out and why, what is refused."""

from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import BadInputError, DataError
from softlabels.teacher.documents import Document, RawFiles, Skipped, open_documents
from softlabels.teacher.spec import TextSpec
from tests.teacher.texts import CHAT, write_lines


def opened(files: Path, carry: Sequence[str] = (), **source: Any) -> RawFiles:
    # Rows of their own where keys or token ids are.
    apart: dict[str, Any] = {"packing": "documents"} if "input_ids" in source else {}
    return open_documents(TextSpec(files=str(files), **apart, **source), carry)


def read(files: Path, carry: Sequence[str] = (), **source: Any) -> tuple[list[Document], Skipped]:
    skipped = Skipped()
    found = list(opened(files, carry, **source).documents(skipped))
    return [document for document in found if document is not None], skipped


def values(documents: Sequence[Document]) -> list[Any]:
    return [d.value if isinstance(d.value, str) else list(d.value) for d in documents]


def write_parquet(path: Path, row_group_size: int = 2, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


# Text files


def test_each_text_file_is_a_document_in_order_of_path(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_bytes("zwei\r\n— ü".encode())
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf# one")
    (tmp_path / "deep" / "c.RST").write_text("three")
    documents, skipped = read(tmp_path / "**")
    assert values(documents) == ["# one", "zwei\r\n— ü", "three"]
    assert [d.place for d in documents] == ["'a.md'", "'b.txt'", "'deep/c.RST'"]
    assert not skipped.counts


def test_text_that_is_none_is_counted(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "space.txt").write_text(" \n\t")
    documents, skipped = read(tmp_path / "*.txt")
    assert values(documents) == ["good"]
    assert skipped.counts == {"invalid UTF-8": 1, "empty document": 2}
    assert skipped.places["empty document"] == ["'empty.txt'", "'space.txt'"]
    expected = "2 empty document (first: 'empty.txt'); 1 invalid UTF-8 (first: 'bad.txt')"
    assert str(skipped) == expected


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    write_lines(tmp_path / "b.jsonl", [{"text": "x"}])
    with pytest.raises(BadInputError, match=r"two kinds, 'a.txt' and 'b.jsonl'"):
        opened(tmp_path / "*")
    (tmp_path / "c.csv").write_text("x")
    with pytest.raises(BadInputError, match=r"'c.csv' .* expected one of .txt, .md"):
        opened(tmp_path / "c*")
    with pytest.raises(BadInputError, match="no file matches"):
        opened(tmp_path / "d*")


@pytest.mark.parametrize(
    ("source", "carry"),
    [
        ({"messages": "chat"}, ()),
        ({"input_ids": "chat"}, ()),
        ({"text": "chat"}, ()),
        ({"example_id": "chat"}, ()),
        ({}, ("chat",)),
    ],
)
def test_a_text_file_has_no_columns(
    tmp_path: Path, source: dict[str, str], carry: Sequence[str]
) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(BadInputError, match=r"'a.txt' is one text and has no columns, so no 'chat"):
        opened(tmp_path / "a.txt", carry, **source)
    assert opened(tmp_path / "a.txt", text="text").kind == "text"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / name, [{"text": "before"}])
    raw = opened(tmp_path / name)
    write_lines(tmp_path / name, [{"text": "later"}])
    with pytest.raises(DataError, match=f"'{name}' was replaced while it was read"):
        list(raw.documents(Skipped()))


# JSON lines


def test_every_fault_of_a_line_has_its_reason(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "a.jsonl",
        [
            b'\xef\xbb\xbf{"text": "first"}',
            '{"text": "cut sho',
            "",
            b'{"text": "caf\xe9"}',
            ["text"],
            {"body": "x", "n": 1},
            {"text": None},
            {"text": 7},
            {"text": ["x"]},
            {"text": "   "},
            r'{"text": "\ud800"}',
            '{"text": ' + "[" * 100_000,
            '{"text": ' + "9" * 5_000 + "}",
            {"text": "last — ü"},
        ],
    )
    documents, skipped = read(tmp_path / "a.jsonl")
    assert values(documents) == ["first", "last — ü"]
    assert [d.place for d in documents] == ["line 1 of 'a.jsonl'", "line 14 of 'a.jsonl'"]
    assert skipped.counts == {
        "not a whole JSON record": 3,
        "empty document": 2,
        "invalid UTF-8": 2,
        "JSON that is no object": 1,
        "field missing": 2,
        "field of a wrong type": 2,
    }
    (first, _) = skipped.places["field missing"]
    assert first == "line 6 of 'a.jsonl': no 'text' (fields: body, n)"
    cut = skipped.places["not a whole JSON record"][0]
    assert cut == "line 2 of 'a.jsonl': Unterminated string starting at (character 9)"


def test_only_the_first_places_are_kept(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": ""}] * 20)
    _, skipped = read(tmp_path / "a.jsonl")
    assert skipped.counts == {"empty document": 20}
    assert skipped.places["empty document"] == [f"line {i} of 'a.jsonl'" for i in range(1, 6)]


def test_json_keys_chats_and_token_ids(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "a.jsonl",
        [
            {"key": "a", "m": CHAT},
            {"key": 7, "m": CHAT[:1]},
            {"key": None, "m": CHAT},
            {"key": True, "m": CHAT},
            {"key": "", "m": CHAT},
            {"key": "b", "m": []},
            {"key": "c", "m": "hello"},
        ],
    )
    documents, skipped = read(tmp_path / "a.jsonl", messages="m", example_id="key")
    assert [d.example_id for d in documents] == ["a", "7"]
    assert documents[0].value == list(CHAT)
    assert skipped.counts == {
        "no example id": 2,
        "field of a wrong type": 2,
        "chat without messages": 1,
    }
    write_lines(
        tmp_path / "b.jsonl",
        [
            {"ids": [1, 2, 3], "position_index": [0, 1], "segment_ids": [0, 0, 1]},
            {"ids": [1, 2, 3]},
            {"ids": [1, 2.5, 3]},
            {"ids": [1, True]},
            {"ids": [1, 2], "position_index": "0"},
            {"ids": [1, 2], "segment_ids": [0, None]},
            {"ids": [2**70]},
            {"ids": []},
        ],
    )
    documents, skipped = read(tmp_path / "b.jsonl", input_ids="ids")
    assert values(documents) == [[1, 2, 3], [1, 2, 3]]
    assert (documents[0].position_index, documents[0].segment_ids) == ([0, 1], [0, 0, 1])
    assert (documents[1].position_index, documents[1].segment_ids) == (None, None)
    assert skipped.counts == {"field of a wrong type": 5, "empty document": 1}
    documents, _ = read(tmp_path / "b.jsonl", input_ids="ids", isolate=False)
    assert documents[0].segment_ids is None


def test_carried_fields_have_one_type(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "a.jsonl",
        [
            {"text": "x", "n": None, "w": 1, "tags": [], "ok": True, "v": [1, 2.5], "s": "ü"},
            {"text": "y", "n": 3, "w": 1.5, "tags": [1, 2], "v": [3]},
        ],
    )
    names = ("n", "w", "tags", "ok", "v", "s")
    raw = opened(tmp_path / "a.jsonl", names)
    assert [str(f.type) for f in raw.wanted.carry] == [
        "int64",
        "double",
        "list<item: int64>",
        "bool",
        "list<item: float>",
        "string",
    ]
    documents, _ = read(tmp_path / "a.jsonl", names)
    assert documents[1].carried == (3, 1.5, [1, 2], None, [3], None)


def test_carried_fields_that_no_table_holds(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "x", "a": 1, "o": {}}, {"text": "x", "a": "one"}])
    with pytest.raises(DataError, match=r"'a' is int64 in line 1 of 'a.jsonl', string in line 2"):
        opened(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(BadInputError, match=r"'o' in line 1 of 'a.jsonl' is dict"):
        opened(tmp_path / "a.jsonl", ["o"])
    with pytest.raises(BadInputError, match=r"no record has a field 'z' \(fields: a, o, text\)"):
        opened(tmp_path / "a.jsonl", ["z"])


# Parquet


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
def test_parquet_text_of_any_string_type(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["one", "zwei ü", None, "", "fünf"]
    write_parquet(tmp_path / "a.parquet", text=pa.array(texts).cast(kind))
    write_parquet(tmp_path / "b.parquet", text=pa.array(["six"]).cast(kind))
    documents, skipped = read(tmp_path / "*.parquet")
    assert values(documents) == ["one", "zwei ü", "fünf", "six"]
    places = [f"row {i} of 'a.parquet'" for i in (0, 1, 4)]
    assert [d.place for d in documents] == [*places, "row 0 of 'b.parquet'"]
    assert skipped.counts == {"field missing": 1, "empty document": 1}


def test_bytes_that_are_no_text_are_counted_in_parquet_too(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"caf\xe9", b"too"]).view(pa.string())
    turns = pa.StructArray.from_arrays([pa.array(["user"] * 3), texts], names=["role", "content"])
    chats = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), turns)
    write_parquet(tmp_path / "a.parquet", text=texts, chat=chats)
    documents, skipped = read(tmp_path / "a.parquet")
    assert values(documents) == ["good", "too"]
    assert skipped.places == {"invalid UTF-8": ["row 1 of 'a.parquet'"]}
    documents, skipped = read(tmp_path / "a.parquet", messages="chat")
    assert [d.value[0]["content"] for d in documents] == ["good", "too"]
    assert skipped.places == {"invalid UTF-8": ["row 1 of 'a.parquet'"]}


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int32()),
        pa.large_list(pa.int64()),
        pa.list_(pa.uint16()),
        pa.list_(pa.int32(), 3),
    ],
    ids=str,
)
def test_parquet_token_ids_of_any_integer_type(tmp_path: Path, kind: pa.DataType) -> None:
    ids = pa.array([[1, 2, 3], None, [4, 5, 6], [7, 8, 9]], kind)
    where = pa.array([[0, 1], [0], None, []], pa.list_(pa.int64()))
    write_parquet(tmp_path / "a.parquet", ids=ids, position_index=where)
    documents, skipped = read(tmp_path / "a.parquet", input_ids="ids")
    assert values(documents) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    positions = [d.position_index for d in documents]
    assert [None if p is None else p.tolist() for p in positions] == [[0, 1], None, []]
    assert skipped.counts == {"field missing": 1}


def test_a_null_among_token_ids_is_a_wrong_type(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ids=pa.array([[1, None], [1, 2]]))
    documents, skipped = read(tmp_path / "a.parquet", input_ids="ids")
    assert values(documents) == [[1, 2]]
    assert skipped.counts == {"field of a wrong type": 1}


@pytest.mark.parametrize("column", ["ids", "position_index", "segment_ids"])
def test_numbers_that_no_int64_holds_are_a_wrong_type(tmp_path: Path, column: str) -> None:
    kind = pa.list_(pa.uint64())
    names = ("ids", "position_index", "segment_ids")
    columns = {name: pa.array([[0, 1], [0, 1]], kind) for name in names}
    columns[column] = pa.array([[1, 2**64 - 1], [0, 1]], kind)
    write_parquet(tmp_path / "a.parquet", **columns)
    documents, skipped = read(tmp_path / "a.parquet", input_ids="ids")
    assert values(documents) == [[0, 1]]
    assert skipped.counts == {"field of a wrong type": 1}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"text": "ids"}, "column 'ids' of 'a.parquet' is list<.*, expected text"),
        ({"text": "number"}, "'number' of 'a.parquet' is int64, expected text"),
        ({"messages": "ids"}, "'ids' .* expected a list of structs"),
        ({"input_ids": "text"}, "'text' .* is string, expected a list of integers"),
        ({"text": "body"}, r"no column 'body' \(columns: text, ids, number\)"),
        ({"example_id": "key"}, "no column 'key'"),
    ],
)
def test_columns_that_cannot_be_meant(tmp_path: Path, source: dict[str, str], message: str) -> None:
    write_parquet(tmp_path / "a.parquet", text=["x"], ids=[[1]], number=[1])
    with pytest.raises(BadInputError, match=message):
        opened(tmp_path / "a.parquet", **source)


def test_position_index_is_in_every_file_or_in_none(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ids=[[1, 2]])
    write_parquet(tmp_path / "b.parquet", ids=[[1, 2]], position_index=[[0]])
    with pytest.raises(BadInputError, match=r"'a.parquet' has no column 'position_index'"):
        opened(tmp_path / "*.parquet", input_ids="ids")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"'a.parquet' is not a whole Parquet file"):
        opened(tmp_path / "*.parquet", input_ids="ids")


def test_carried_columns_keep_their_values(tmp_path: Path) -> None:
    when = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
    columns = {
        "text": ["x", "y"],
        "day": pa.array([date(2024, 1, 2), None]),
        "when": pa.array([when, None], pa.timestamp("us", "UTC")),
        "raw": [b"\xff", b""],
        "tags": pa.array([[1, 2], None], pa.list_(pa.int64())),
        "part": pa.array([0.1, None], pa.float32()),
    }
    write_parquet(tmp_path / "a.parquet", **columns)
    names = ("day", "when", "raw", "tags", "part")
    documents, _ = read(tmp_path / "a.parquet", names)
    part = pa.scalar(0.1, pa.float32()).as_py()
    assert documents[0].carried == (date(2024, 1, 2), when, b"\xff", [1, 2], part)
    assert documents[1].carried == (None, None, b"", None, None)
    write_parquet(tmp_path / "b.parquet", text=["x"], small=pa.array([1], pa.uint8()))
    with pytest.raises(BadInputError, match="'small' has type uint8"):
        opened(tmp_path / "b.parquet", ["small"])


def test_a_column_may_be_key_and_carried(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", text=["x", "y"], key=pa.array([4, 5], pa.int64()))
    documents, _ = read(tmp_path / "a.parquet", ("key", "text"), example_id="key")
    assert [d.example_id for d in documents] == ["4", "5"]
    assert [d.carried for d in documents] == [(4, "x"), (5, "y")]

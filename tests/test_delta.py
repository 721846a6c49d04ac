"""Pages whose size or counts do not bind the decoder; what honest writers make of texts is read."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import IntegrityError
from softlabels.parquet import Parquet
from tests.faults import parquets

TEXTS = ["", "one", None, "three" * 50] * 300


def written(column: pa.Array, path: str, encoding: str, **options: Any) -> Parquet:
    sink = pa.BufferOutputStream()
    settings = {"use_dictionary": False, "column_encoding": {path: encoding}}
    pq.write_table(pa.table({"a": column}), sink, data_page_size=2_000, **settings, **options)
    return Parquet(sink.getvalue())


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip", "brotli", "lz4"])
@pytest.mark.parametrize("lists", [False, True])
def test_lengths_of_honest_writers_are_read(version: str, codec: str, lists: bool) -> None:
    texts: list[Any] = [TEXTS[at : at + at % 3] for at in range(600)] if lists else TEXTS
    column = pa.array(texts, pa.list_(pa.string()) if lists else pa.string())
    path = "a.list.element" if lists else "a"
    options = {"compression": codec, "data_page_version": version}
    file = written(column, path, "DELTA_LENGTH_BYTE_ARRAY", **options)
    file.check([0])
    assert file.rows_at_once([0], ["a"], 100, 1 << 20) > 1
    assert file.read_row_group(0).column(0).to_pylist() == texts


@pytest.mark.parametrize("lists", [False, True])
def test_texts_that_share_beginnings_are_refused_and_other_columns_read(lists: bool) -> None:
    column = pa.array([TEXTS] if lists else TEXTS)
    file = written(column, "a.list.element" if lists else "a", "DELTA_BYTE_ARRAY")
    with pytest.raises(IntegrityError, match="DELTA_BYTE_ARRAY"):
        file.check([0])
    with pytest.raises(IntegrityError, match="DELTA_BYTE_ARRAY"):
        file.rows_at_once([0], ["a"], 100, 1 << 20)
    file.check([0], ["b"])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a billion lengths", "10 values has the lengths of 1000000000"),
        ("lengths without an end", "damaged"),
        ("no lengths", "damaged"),
        ("texts that share a megabyte", "DELTA_BYTE_ARRAY"),
        ("lists forty deep", "would become"),
        ("a dictionary of two billion words", "damaged"),
        ("a page header that is deep", "damaged"),
        ("a page header of a long list", "more values than Parquet needs"),
        ("a footer of a long list", "more values than Parquet needs"),
    ],
)
def test_pages_that_lie_are_refused_before_they_are_decoded(what: str, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        Parquet(pa.py_buffer(parquets.pages_that_lie()[what])).check([0])

"""What other engines see of a real table, and which columns may be carried into one."""

from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels import schema
from softlabels.errors import BadInputError
from softlabels.schema import COLUMNS, STATISTICS, portable_type, table_schema, temper_columns
from tests.tables import dense_logprobs, make_table

READ_BY_ALL = {
    pa.string(),
    pa.int32(),
    pa.float32(),
    schema.INTS,
    schema.FLOATS,
}


def test_fixed_columns_have_only_types_that_every_reader_knows() -> None:
    assert {column.type for column in COLUMNS.values()} == READ_BY_ALL
    assert all(not t.value_field.nullable for t in (schema.INTS, schema.FLOATS))
    assert set(STATISTICS) <= set(COLUMNS)


def test_polars_and_duckdb_read_the_numbers_of_a_table_with_none_of_our_code(
    tmp_path: Path,
) -> None:
    table = make_table(tmp_path / "t", rows=120, k=4, classes=9, temperatures=(2.0,), draws=3)
    dense = dense_logprobs(120, 9)
    order = np.argsort(-dense, axis=1, kind="stable")[:, :4]
    wanted = np.take_along_axis(dense, order, 1)

    frame = pl.scan_delta(str(tmp_path / "t")).sort("example_id").collect()
    files = [str(tmp_path / "t" / file.path) for file in table.files]
    rows = (
        duckdb.connect()
        .execute(
            "SELECT topk_ids, topk_logprobs, label, tail_logprob_2 FROM read_parquet($1) "
            "ORDER BY example_id",
            [files],
        )
        .fetchall()
    )
    for ids, logprobs in (
        (frame["topk_ids"].to_list(), frame["topk_logprobs"].to_list()),
        ([row[0] for row in rows], [row[1] for row in rows]),
    ):
        assert np.array_equal(np.array(ids), order)
        assert np.allclose(np.array(logprobs), wanted, rtol=2.0**-11, atol=0)
    assert [row[2] for row in rows] == [i % 9 for i in range(120)] == frame["label"].to_list()
    assert [row[3] for row in rows] == frame["tail_logprob_2"].to_list()


@pytest.mark.parametrize(
    "kind",
    [
        pa.uint8(),
        pa.uint64(),
        pa.float16(),
        pa.struct([("x", pa.int32())]),
        pa.list_(pa.int32(), 3),
        pa.list_(pa.uint8()),
        pa.timestamp("us"),
        pa.time64("us"),
        pa.dictionary(pa.int8(), pa.uint16()),
        pa.null(),
    ],
)
def test_carried_types_that_some_reader_lacks_are_refused(kind: pa.DataType) -> None:
    with pytest.raises(BadInputError, match=r"column 'pixels' has type .* cast it"):
        table_schema((), [pa.field("pixels", kind)])


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        (pa.large_string(), pa.string()),
        (pa.dictionary(pa.int32(), pa.string()), pa.string()),
        (pa.large_binary(), pa.binary()),
        (pa.timestamp("ns", "Europe/Berlin"), pa.timestamp("us", "UTC")),
        (pa.int8(), pa.int8()),
        (pa.list_(pa.float32()), schema.FLOATS),
        (pa.date32(), pa.date32()),
        (pa.bool_(), pa.bool_()),
    ],
)
def test_carried_types_are_stored_as_what_every_reader_knows(
    kind: pa.DataType, stored: pa.DataType
) -> None:
    assert portable_type(pa.field("x", kind)) == stored


@pytest.mark.parametrize("name", ["label", "Label", "TOPK_IDS", "temper_shift_2"])
def test_a_carried_column_cannot_take_a_fixed_name_in_any_case(name: str) -> None:
    # Delta, DuckDB and Spark ignore case: "Label" beside "label" would be one column to them.
    with pytest.raises(BadInputError, match=rf"column '{name}' has the name of"):
        table_schema((2.0,), [pa.field(name, pa.int32())])


def test_two_carried_columns_cannot_differ_by_case_alone() -> None:
    with pytest.raises(BadInputError, match="'Domain'"):
        table_schema((), [pa.field("domain", pa.string()), pa.field("Domain", pa.string())])


def test_carried_columns_of_every_stored_type_come_back_from_a_table(tmp_path: Path) -> None:
    carried = {
        "image": pa.array([bytes([i]) * 3 for i in range(30)], pa.binary()),
        "domain of it": pa.array([None if i % 7 == 0 else f"d{i % 3}" for i in range(30)]),
        "flag": pa.array([i % 2 == 0 for i in range(30)]),
        "pixels": pa.array([[i, i + 1] for i in range(30)], schema.INTS),
        "size": pa.array(range(30), pa.int64()),
    }
    table = make_table(tmp_path / "t", rows=30, shard_rows=20, row_group_rows=10, carried=carried)
    read = pa.Table.from_batches(list(table.batches()))
    for name, values in carried.items():
        assert read[name].to_pylist() == values.to_pylist(), name
    frame = pl.scan_delta(str(tmp_path / "t")).sort("example_id").collect()
    assert frame["pixels"].to_list() == carried["pixels"].to_pylist()
    for file in table.files:
        metadata = pq.ParquetFile(tmp_path / "t" / file.path).metadata.row_group(0)
        for i in range(metadata.num_columns):
            assert metadata.column(i).compression == "ZSTD", metadata.column(i).path_in_schema


@pytest.mark.parametrize(
    ("temperature", "names"),
    [
        (2.0, ("temper_shift_2", "tail_logprob_2")),
        (1.5, ("temper_shift_1p5", "tail_logprob_1p5")),
        (0.25, ("temper_shift_0p25", "tail_logprob_0p25")),
    ],
)
def test_temperature_columns_carry_no_dot(temperature: float, names: tuple[str, str]) -> None:
    assert temper_columns(temperature) == names
    assert table_schema([temperature]).names[-2:] == list(names)

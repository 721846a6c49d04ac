"""Hard labels of every kind, and carried columns."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import BadInputError, DataError, MismatchError, SoftLabelsError
from softlabels.store.table import Table
from softlabels.teacher.capture import capture
from tests.teacher.jobs import NAMES, make_spec, rows_table, stored


def write_with(folder: Path, rows: int, **columns: pa.Array) -> None:
    """A source of `rows` rows with columns replaced or added, small row groups."""
    table = rows_table(0, rows)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        if place < 0:
            table = table.append_column(name, values)
        else:
            table = table.set_column(place, name, values)
    (folder / "src").mkdir(exist_ok=True)
    pq.write_table(table, folder / "src" / "a.parquet", row_group_size=7)


def captured(folder: Path, **changes: Any) -> dict[str, list[Any]]:
    """Rows of a fresh capture."""
    capture(make_spec(folder, **changes))
    return stored(folder / "table")


def refused(kind: type[SoftLabelsError], folder: Path, **changes: Any) -> str:
    """The one line with which a capture ends."""
    with pytest.raises(kind) as caught:
        capture(make_spec(folder, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", [pa.int8(), pa.int32(), pa.uint8(), pa.uint64(), pa.int64()])
def test_integer_labels(tmp_path: Path, kind: pa.DataType) -> None:
    write_with(tmp_path, 20, label=pa.array([None, *(i % 6 for i in range(1, 20))], kind))
    rows = captured(tmp_path)
    assert rows["label"] == [None, *(i % 6 for i in range(1, 20))]
    assert rows["label_ids"][0] == rows["label_ranks"][0] == [-1]
    assert np.isnan(rows["label_logprobs"][0][0])


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_labels_by_name(tmp_path: Path, kind: pa.DataType) -> None:
    names = [None, *(NAMES[i % 6] for i in range(1, 50))]
    write_with(tmp_path, 50, name=pa.array(names, pa.string()).cast(kind))
    rows = captured(tmp_path, source={"label": "name"})
    assert rows["label"] == [None, *(i % 6 for i in range(1, 50))]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (pa.array([0, 6], pa.int64()), "6"),
        (pa.array([0, -2], pa.int64()), "-2"),
        (pa.array([0, 2**63 + 5], pa.uint64()), str(2**63 + 5)),
        (pa.array([0, 2**32 + 1], pa.int64()), str(2**32 + 1)),
        (pa.array(["class0", "cat"]), "'cat'"),
        (pa.array([0.0, 1.0]), "0.0"),
    ],
)
def test_labels_that_are_no_class(tmp_path: Path, values: pa.Array, shown: str) -> None:
    write_with(tmp_path, 2, label=values)
    text = refused(DataError, tmp_path)
    assert f"has label {shown}" in text
    assert "'class5'" in text
    assert "row0000" in text


def test_names_need_names(tmp_path: Path) -> None:
    write_with(tmp_path, 5)
    text = refused(DataError, tmp_path, source={"label": "name"}, teacher={"classes": 6})
    assert "class names need teacher.classes" in text


MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
CARRIED = {
    "c_int8": pa.array([1, None, -128], pa.int8()),
    "c_int16": pa.array([1, None, 300], pa.int16()),
    "c_int64": pa.array([1, None, 2**62], pa.int64()),
    "c_float": pa.array([0.1, None, float("inf")], pa.float32()),
    "c_double": pa.array([0.1, None, 1e300], pa.float64()),
    "c_bool": pa.array([True, None, False]),
    "c_text": pa.array(["é", None, ""]),
    "c_large": pa.array(["é", None, ""], pa.large_string()),
    "c_coded": pa.array(["a", None, "b"]).dictionary_encode(),
    "c_bytes": pa.array([b"\x00\xff", None, b""]),
    "c_date": pa.array([date(2026, 1, 2), None, date(1, 1, 1)]),
    "c_time": pa.array([MOMENT, None, MOMENT], pa.timestamp("us", "UTC")),
    "c_millis": pa.array([MOMENT.replace(microsecond=5000), None, None], pa.timestamp("ms", "UTC")),
    "c_ints": pa.array([[1, 2], None, []], pa.list_(pa.int64())),
    "c_floats": pa.array([[0.5], None, []], pa.list_(pa.float32())),
}


def test_carried_columns_are_kept_exactly(tmp_path: Path) -> None:
    write_with(tmp_path, 3, **CARRIED)
    names = list(CARRIED)
    rows = captured(tmp_path, carry=names)
    for name in names:
        assert rows[name] == CARRIED[name].to_pylist(), name
    assert capture(make_spec(tmp_path, carry=names)).rows == 0


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2, 3], pa.uint8()),
        pa.array([1.0, 2.0, 3.0], pa.float16()),
        pa.array([{"a": 1}] * 3),
        pa.array([MOMENT.replace(tzinfo=None)] * 3, pa.timestamp("us")),
    ],
)
def test_types_that_not_every_reader_knows_are_refused(tmp_path: Path, values: pa.Array) -> None:
    write_with(tmp_path, 3, extra=values)
    text = refused(BadInputError, tmp_path, carry=["extra"])
    assert "'extra'" in text
    assert str(values.type) in text
    assert not (tmp_path / "table").exists()


def test_a_carried_column_keeps_its_type_in_a_table(tmp_path: Path) -> None:
    write_with(tmp_path, 3, extra=pa.array([1, 2, 3], pa.int32()))
    capture(make_spec(tmp_path, carry=["extra"]))
    write_with(tmp_path, 4, extra=pa.array([1, 2, 3, 4], pa.int64()))
    text = refused(MismatchError, tmp_path, carry=["extra"])
    assert "int32" in text
    assert "int64" in text
    assert Table.open(str(tmp_path / "table")).num_rows == 3


@pytest.mark.parametrize("name", ["label", "view", "topk_ids"])
def test_carried_columns_cannot_hide_ours(tmp_path: Path, name: str) -> None:
    write_with(tmp_path, 3, **{name: pa.array([1, 2, 3])})
    assert "name of a softlabels column" in refused(BadInputError, tmp_path, carry=[name])


def test_values_that_would_change_are_refused(tmp_path: Path) -> None:
    moments = pa.array([1, 1_000_000_001, 3], pa.int64()).cast(pa.timestamp("ns", "UTC"))
    write_with(tmp_path, 3, moment=moments)
    text = refused(DataError, tmp_path, carry=["moment"])
    assert "'moment' cannot be kept as timestamp[us, tz=UTC]" in text
    write_with(tmp_path, 30, tags=pa.array([[2]] * 29 + [[1, None]], pa.list_(pa.int32())))
    assert "'tags' has a null inside a list" in refused(DataError, tmp_path, carry=["tags"])


def test_files_may_differ_in_what_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    first, second = rows_table(0, 10), rows_table(10, 25)
    pq.write_table(first, tmp_path / "src" / "a.parquet")
    fields = [field.with_nullable(field.name not in ("id", "x", "note")) for field in second.schema]
    second = pa.table(second.columns, pa.schema(fields, {"made": "elsewhere"}))
    pq.write_table(second.select(["note", "x", "label", "id"]), tmp_path / "src" / "b.parquet")
    rows = captured(tmp_path, carry=["note"])
    assert len(rows["example_id"]) == 25
    assert rows["note"] == rows_table(0, 25)["note"].to_pylist()

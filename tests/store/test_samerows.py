"""A digest of rows sees every bit of them, and nothing of how they are cut."""

import numpy as np
import pyarrow as pa
import pytest

from softlabels.store.samerows import RowsDigest

NAN = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
COLUMNS = {
    "text": pa.array(["a", "", None, "bc", "d"]),
    "data": pa.array([b"x", None, b"", b"yz", b"w"], pa.binary()),
    "flag": pa.array([True, False, None, True, False]),
    "number": pa.array([1, None, 3, 4, 5], pa.int64()),
    "float": pa.array([0.0, 1.5, None, float("inf"), -2.0], pa.float32()),
    "ids": pa.array([[1, 2], [], None, [3], [4, 5, 6]], pa.list_(pa.int32())),
    "when": pa.array([0, 1, None, 2, 3], pa.timestamp("us", "UTC")),
    "day": pa.array([0, 1, None, 2, 3], pa.date32()),
}
ROWS = pa.RecordBatch.from_arrays(list(COLUMNS.values()), names=list(COLUMNS))


def digest(*batches: pa.RecordBatch) -> str:
    found = RowsDigest(batches[0].schema)
    for batch in batches:
        found.add(batch)
    return found.result()


@pytest.mark.parametrize("cuts", [[5], [1, 4], [2, 0, 3], [1, 1, 1, 1, 1], [4, 1]])
def test_batches_may_be_cut_anywhere(cuts: list[int]) -> None:
    parts, start = [], 0
    for cut in cuts:
        parts.append(ROWS.slice(start, cut))
        start += cut
    assert digest(*parts) == digest(ROWS)


def test_what_lies_under_a_null_does_not_count() -> None:
    valid = pa.py_buffer(b"\x05")
    one, two = (
        pa.Array.from_buffers(
            pa.int32(), 3, [valid, pa.py_buffer(np.array([1, hidden, 3], np.int32).tobytes())]
        )
        for hidden in (7, 8)
    )
    found = [digest(pa.RecordBatch.from_arrays([a], names=["x"])) for a in (one, two)]
    assert found[0] == found[1]


def changed(name: str, values: pa.Array) -> pa.RecordBatch:
    return ROWS.set_column(ROWS.schema.get_field_index(name), name, values)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("text", ["a", None, "", "bc", "d"]),
        ("text", ["ab", "", None, "c", "d"]),
        ("data", [b"x", b"", b"", b"yz", b"w"]),
        ("flag", [True, False, None, True, True]),
        ("number", [1, 0, 3, 4, 5]),
        ("float", [-0.0, 1.5, None, float("inf"), -2.0]),
        ("ids", [[1], [2], None, [3], [4, 5, 6]]),
        ("ids", [[1, 2], None, None, [3], [4, 5, 6]]),
        ("ids", [[1, 2], [], None, [3], [4, 6, 5]]),
    ],
)
def test_every_change_shows(name: str, values: list[object]) -> None:
    other = changed(name, pa.array(values, ROWS.schema.field(name).type))
    assert digest(other) != digest(ROWS)


def test_order_and_the_bits_of_a_nan_count() -> None:
    assert digest(ROWS.take(pa.array([1, 0, 2, 3, 4]))) != digest(ROWS)
    quiet, other = (
        pa.RecordBatch.from_arrays([pa.array(NAN[i : i + 1])], names=["x"]) for i in (0, 1)
    )
    assert digest(quiet) != digest(other)


def test_no_rows_have_a_digest_of_their_own() -> None:
    assert digest(ROWS.slice(0, 0)) == digest(ROWS.slice(0, 0), ROWS.slice(3, 0)) != digest(ROWS)

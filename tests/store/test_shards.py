"""Value profiles, and one Parquet file whole, cut, flipped and foreign."""

import struct
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from softlabels.errors import IntegrityError
from softlabels.fingerprint import sha256_bytes
from softlabels.schema import FORMAT_VERSION, STATISTICS, table_schema
from softlabels.store import shards
from softlabels.store.shards import (
    MASS_TOLERANCE,
    Profile,
    ShardWriter,
    compact_levels,
    footer,
    open_shard,
    read_row_groups,
    round_to_profile,
    to_compact_levels,
    to_float16_precision,
)
from softlabels.targets import SoftTargets
from tests.faults import parquets
from tests.tables import dense_logprobs, make_targets

PROFILES: tuple[Profile, ...] = ("compact", "precise")
DEEPEST = float(compact_levels()[-1])

logprob_arrays = hnp.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.floats(-40, 0, width=32) | st.sampled_from([0.0, -np.inf, -1e-7, -1e-30, -1e9]),
)


def made_shard(
    profile: Profile = "precise",
    rows: int = 200,
    batch_rows: int = 20,
    row_group_positions: int = 50,
    metadata: dict[str, str] | None = None,
) -> tuple[shards.Shard, pa.RecordBatch]:
    targets = round_to_profile(
        make_targets(dense_logprobs(rows, 30), 6, np.arange(rows) % 30, 4, (2.0,)), profile
    )
    schema = table_schema((2.0,), [pa.field("domain", pa.string())])
    columns = targets.columns() | {
        "example_id": pa.array([f"e{i}" for i in range(rows)]),
        "view": pa.array(np.zeros(rows, np.int32)),
        "domain": pa.array([f"d{i % 3}" for i in range(rows)]),
    }
    arrays = [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    writer = ShardWriter(schema, profile, metadata, row_group_positions)
    for start in range(0, rows, batch_rows):
        writer.write(batch.slice(start, batch_rows))
    return writer.close(), batch


def read_all(data: bytes | memoryview) -> pa.RecordBatch:
    opened = open_shard(data, "s")
    return read_row_groups(opened, "s", range(opened.num_row_groups))


def test_the_compact_levels_are_those_of_the_format() -> None:
    levels = compact_levels().astype(np.float64)
    assert (len(levels), levels[0]) == (256, 0.0)
    steps = np.minimum(np.exp(levels[:-1] / 2) / 96, 0.25)
    assert np.allclose(np.diff(levels), steps, rtol=1e-4)
    assert 23 < levels[-1] < 25


@settings(max_examples=150, deadline=None)
@given(logprob_arrays)
def test_compact_rounds_by_at_most_half_the_step_at_that_depth(logprobs: np.ndarray) -> None:
    rounded = to_compact_levels(logprobs)
    inside = np.isfinite(logprobs) & (-logprobs <= DEEPEST)
    levels = compact_levels().astype(np.float64)
    above = np.searchsorted(levels, -logprobs[inside].astype(np.float64))
    step = levels[np.minimum(above, 255)] - levels[np.maximum(above - 1, 0)]
    error = np.abs(rounded[inside].astype(np.float64) - logprobs[inside])
    assert (error <= step / 2 + 2e-6).all()
    assert np.isin(-rounded[np.isfinite(rounded)], compact_levels()).all()
    assert np.array_equal(np.isneginf(rounded), np.isneginf(logprobs)), "only padding is infinite"
    assert (rounded[np.isfinite(logprobs) & ~inside] == np.float32(-DEEPEST)).all()


@settings(max_examples=150, deadline=None)
@given(logprob_arrays)
def test_precise_rounds_as_float16_does_and_stays_finite(logprobs: np.ndarray) -> None:
    rounded = to_float16_precision(logprobs).astype(np.float64)
    inside = np.isfinite(logprobs) & (logprobs >= -65504)
    bound = np.maximum(np.abs(logprobs[inside]) * 2.0**-11, 2.0**-25)
    assert (np.abs(rounded[inside] - logprobs[inside]) <= bound).all()
    assert np.array_equal(np.isneginf(rounded), np.isneginf(logprobs))


@settings(max_examples=100, deadline=None)
@given(logprob_arrays, st.sampled_from([to_compact_levels, to_float16_precision]))
def test_rounding_keeps_the_order_and_does_nothing_twice(logprobs: np.ndarray, rule: Any) -> None:
    falling = -np.sort(-logprobs)
    rounded = rule(falling)
    assert (rounded[1:] <= rounded[:-1]).all()
    assert (rounded <= 0).all()
    assert np.array_equal(rule(rounded), rounded)
    assert rounded.dtype == np.float32


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("sharpness", [0.01, 2.0, 30.0])
def test_rounded_targets_keep_every_invariant_and_are_fixed_points(
    profile: Profile, sharpness: float
) -> None:
    dense = dense_logprobs(300, 20, sharpness=sharpness)
    targets = make_targets(dense, 5, np.arange(300) % 20, draws=3, temperatures=(2.0,))
    rounded = round_to_profile(targets, profile)
    rounded.check([str(i) for i in range(300)], 20, MASS_TOLERANCE[profile])
    for name in ("num_positions", "ids", "draws", "label_ids", "label_ranks"):
        assert getattr(rounded, name) is getattr(targets, name), name
    assert rounded.tail is not None
    assert (rounded.tail < 0).all(), "a tail of 0 would leave no mass for the head"
    assert (rounded.temper[2.0].tail < 0).all()
    again = round_to_profile(rounded, profile)
    for f in fields(SoftTargets):
        if f.name != "temper":
            assert np.array_equal(getattr(again, f.name), getattr(rounded, f.name)), f.name


def test_without_a_head_the_tail_is_all_the_mass() -> None:
    targets = make_targets(dense_logprobs(4, 5), 0, draws=2)
    assert targets.tail is not None
    tail = round_to_profile(targets, "precise").tail
    assert tail is not None
    assert np.array_equal(tail, targets.tail)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_leaf_has_the_encoding_of_the_format(profile: Profile) -> None:
    shard, _ = made_shard(profile)
    metadata = pq.ParquetFile(pa.BufferReader(pa.py_buffer(shard.data))).metadata
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            path, encodings = column.path_in_schema, set(column.encodings)
            assert column.compression == "ZSTD", path
            if path == "topk_logprobs.list.element" and profile == "compact":
                assert "RLE_DICTIONARY" in encodings, path
            elif ".list.element" in path or column.physical_type == "FLOAT":
                assert "BYTE_STREAM_SPLIT" in encodings, path
                assert "RLE_DICTIONARY" not in encodings, path
            else:
                assert "RLE_DICTIONARY" in encodings, path
    statistics = {
        metadata.row_group(0).column(i).path_in_schema
        for i in range(metadata.num_columns)
        if metadata.row_group(0).column(i).is_stats_set
    }
    assert statistics == set(STATISTICS)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_rows_written_are_the_rows_read(profile: Profile) -> None:
    shard, batch = made_shard(profile)
    assert read_all(shard.data).equals(batch)
    assert shard.num_rows == 200
    assert shard.sha256 == sha256_bytes(shard.data)
    again, _ = made_shard(profile)
    assert again.data == shard.data, "equal rows give equal bytes"


def test_row_groups_hold_the_least_number_of_positions_but_the_last() -> None:
    shard, _ = made_shard(rows=210, batch_rows=20, row_group_positions=50)
    metadata = open_shard(shard.data, "s").metadata
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert rows == [60, 60, 60, 30]
    opened = open_shard(shard.data, "s")
    part = read_row_groups(opened, "s", [3, 0], ["example_id"])
    wanted = [*range(180, 210), *range(60)]
    assert part["example_id"].to_pylist() == [f"e{i}" for i in wanted]
    assert read_row_groups(opened, "s", []).num_rows == 0


def test_a_shard_without_rows_is_whole() -> None:
    shard, batch = made_shard(rows=0)
    assert shard.num_rows == 0
    assert read_all(shard.data).schema.equals(batch.schema)
    assert shard.statistics["numRecords"] == 0


def test_statistics_are_least_and_greatest() -> None:
    shard, batch = made_shard()
    for name in ("entropy", "top1_prob", "label"):
        values = batch[name].to_pylist()
        assert shard.statistics["minValues"][name] == min(values)
        assert shard.statistics["maxValues"][name] == max(values)
    assert shard.statistics["nullCount"]["label"] == 0
    assert shard.statistics["numRecords"] == 200


def test_a_column_with_nan_has_no_bounds() -> None:
    _, batch = made_shard()
    place = batch.schema.get_field_index("entropy")
    values = [float("nan"), *batch["entropy"].to_pylist()[1:]]
    column = pa.array(values, pa.float32())
    writer = shards.ShardWriter(batch.schema, "precise")
    writer.write(batch)
    writer.write(batch.set_column(place, batch.schema.field(place), column))
    writer.write(batch)
    statistics = writer.close().statistics
    for bounds in ("minValues", "maxValues"):
        assert "entropy" not in statistics[bounds]
        assert "label" in statistics[bounds]


def test_bytes_by_column_sum_to_nearly_the_whole_file() -> None:
    shard, _ = made_shard(rows=4000, batch_rows=500, row_group_positions=2000)
    sizes = shards.bytes_by_column(open_shard(shard.data, "s"))
    body = len(shard.data) - len(footer(shard.data))
    assert 0.98 * body <= sum(sizes.values()) <= body
    # 6 ids, 6 logprobs, 4 draws, tail and the rest: plain float32 and int32 would be 104.
    assert 20 < sum(sizes.values()) / 4000 < 60


def test_a_flipped_byte_changes_the_sha256_and_is_refused_or_harmless() -> None:
    shard, batch = made_shard("compact", rows=60, row_group_positions=30)
    whole = bytes(shard.data)
    body = len(whole) - len(footer(whole))
    rng = np.random.default_rng(0)
    refused = []
    for at in rng.choice(np.arange(4, body), 400, replace=False):
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        assert sha256_bytes(bytes(data)) != shard.sha256
        try:
            assert read_all(bytes(data)).equals(batch), f"byte {at} changed values in silence"
        except IntegrityError as error:
            refused.append(str(error))
    assert len(refused) > 300
    assert not [message for message in refused if "\n" in message]


def test_a_flip_in_the_footer_shows_in_its_sha256_and_never_ends_in_another_error() -> None:
    # Page checksums do not cover the footer: that is why its sha256 is kept beside.
    shard, _ = made_shard("compact", rows=60, row_group_positions=30)
    whole = bytes(shard.data)
    start = len(whole) - len(footer(whole))
    rng = np.random.default_rng(1)
    refused = 0
    for at in rng.choice(np.arange(start, len(whole)), 500, replace=False):
        data = bytearray(whole)
        data[at] ^= 1 << int(rng.integers(8))
        try:
            assert sha256_bytes(footer(bytes(data))) != shard.footer_sha256
            read_all(bytes(data))
        except IntegrityError:
            refused += 1
    assert refused > 50


def test_a_file_cut_anywhere_is_refused() -> None:
    whole = bytes(made_shard(rows=40)[0].data)
    for length in {0, 3, 8, 11, 12, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1}:
        with pytest.raises(IntegrityError, match="shard 's' cannot be read: not a whole Parquet"):
            open_shard(whole[:length], "s")
    with pytest.raises(IntegrityError):
        read_all(whole[1:])
    with pytest.raises(IntegrityError, match="not a whole Parquet file: footer of"):
        footer(whole[:-8] + struct.pack("<I", 2**31) + b"PAR1")


def test_the_footer_is_the_end_of_the_file() -> None:
    whole = bytes(made_shard(rows=40)[0].data)
    end = bytes(footer(whole))
    (length,) = struct.unpack("<I", whole[-8:-4])
    assert (whole.endswith(end), len(end)) == (True, length + 8)
    assert sha256_bytes(end) == made_shard(rows=40)[0].footer_sha256


@pytest.mark.parametrize("version", [str(FORMAT_VERSION + 1), "999"])
def test_a_newer_format_is_refused(version: str) -> None:
    sink = pa.BufferOutputStream()
    table = pa.table({"x": [1]}).replace_schema_metadata({shards.FORMAT_KEY: version})
    pq.write_table(table, sink)
    with pytest.raises(IntegrityError, match=f"format version {version}, this release reads"):
        open_shard(memoryview(sink.getvalue()), "s")


@pytest.mark.parametrize("version", [None, "", "0", "²", "-1", "one", b"\xff\xfe"])
def test_a_file_not_made_by_softlabels_is_refused(version: str | bytes | None) -> None:
    sink = pa.BufferOutputStream()
    metadata = None if version is None else {shards.FORMAT_KEY: version}
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(metadata), sink)
    with pytest.raises(IntegrityError, match="was not made by softlabels"):
        open_shard(memoryview(sink.getvalue()), "s")


def test_metadata_is_kept_in_the_file() -> None:
    shard, _ = made_shard(rows=20, metadata={"softlabels.unit": "u"})
    metadata = open_shard(shard.data, "s").metadata.metadata
    assert metadata[b"softlabels.unit"] == b"u"
    assert metadata[shards.FORMAT_KEY] == str(FORMAT_VERSION).encode()


def test_a_row_group_also_ends_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_shard(made_shard(rows=40)[0].data, "s")
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 1)
    split = open_shard(made_shard(rows=40)[0].data, "s")
    assert split.num_row_groups > whole.num_row_groups == 1
    assert split.read().equals(whole.read())


@pytest.mark.parametrize("what", ["a chunk without a description", "fewer chunks than columns"])
def test_bytes_of_columns_that_the_footer_lacks_are_refused(what: str) -> None:
    opened = open_shard(parquets.lies()[what], "s")
    with pytest.raises(IntegrityError, match="row group 0"):
        shards.bytes_by_column(opened)

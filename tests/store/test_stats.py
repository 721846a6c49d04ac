"""Bytes and codec errors that `stats` reports, against shards and sums made another way."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError
from softlabels.schema import table_schema
from softlabels.store import codec, shards, stats
from softlabels.store.table import Table
from softlabels.targets import SoftTargets
from tests.store.markov import columns, make_language, write
from tests.tables import dense_logprobs, make_contents, make_table, make_targets

VOCABULARY = 1_000


@cache
def zipf(positions: int, seed: int = 0) -> np.ndarray:
    """Log-probabilities with the long tail of a language model, float64 [positions, V]."""
    rng = np.random.default_rng(seed)
    common = -1.1 * np.log(np.arange(1, VOCABULARY + 1) + 2.7)[rng.permutation(VOCABULARY)]
    logits = common + rng.normal(size=(positions, VOCABULARY)) * rng.uniform(1, 3, (positions, 1))
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def zipf_table(
    folder: Path, k: int, draws: int, profile: shards.Profile, rows: int = 6, length: int = 101
) -> Table:
    dense = zipf(rows * (length - 1))
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCABULARY, (rows, length)).astype(np.int32)
    targets = make_targets(dense, k, tokens[:, 1:].ravel(), draws)
    places = np.tile(np.arange(length - 1), (rows, 1))
    made = columns(targets, tokens, places)
    return write(folder, made, VOCABULARY, k, draws, profile=profile, files=1)


def kl_by_hand(p: np.ndarray, tail: float, stored: np.ndarray, stored_tail: float) -> float:
    head = np.exp(stored.astype(np.float64))
    q = head / head.sum() * (1 - math.exp(stored_tail))
    total = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)
    return float(total) + (tail * (math.log(tail) - stored_tail) if tail > 0 else 0.0)


@pytest.mark.parametrize("profile", ["compact", "precise"])
def test_the_rounding_error_is_the_kl_of_what_readers_decode(profile: shards.Profile) -> None:
    dense = zipf(50)
    targets = make_targets(dense, 20)
    head = np.take_along_axis(np.exp(dense), targets.ids, 1)
    tail = 1 - head.sum(1)
    rounded = shards.round_to_profile(targets, profile)
    assert rounded.tail is not None
    wanted = [
        kl_by_hand(head[i], tail[i], rounded.logprobs[i], float(rounded.tail[i])) for i in range(50)
    ]
    found = codec.rounding_error(head, tail, profile)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-10)
    assert (found >= 0).all()
    low, high = (1e-9, 1e-6) if profile == "precise" else (1e-5, 1e-3)
    assert low < found.mean() < high


def test_padding_and_an_empty_tail_lose_nothing() -> None:
    head = np.array([[0.5, 0.5, 0], [1, 0, 0]])
    for profile in stats.PROFILES:
        assert codec.rounding_error(head, np.zeros(2), profile) == pytest.approx(0, abs=1e-7)


def test_a_known_tail_fixes_the_mass_of_the_head() -> None:
    targets = shards.round_to_profile(make_targets(zipf(30), 20), "compact")
    head, tail = codec.head_and_tail(targets)
    np.testing.assert_allclose(head.sum(1) + tail, 1, rtol=1e-12)
    unknown = SoftTargets(**(vars(targets) | {"tail": None}))
    head, tail = codec.head_and_tail(unknown)
    np.testing.assert_allclose(head, np.exp(targets.logprobs.astype(np.float64)), rtol=1e-12)
    np.testing.assert_allclose(tail, np.maximum(0, 1 - head.sum(1)))


@pytest.mark.parametrize("profile", ["compact", "precise"])
def test_values_move_only_within_the_step_they_were_rounded_to(profile: shards.Profile) -> None:
    stored = shards.round_to_profile(make_targets(zipf(400), 30), profile)
    moved = codec.unrounded(stored, profile)
    again = shards.round_to_profile(moved, profile)
    assert stored.tail is not None
    assert moved.tail is not None
    assert again.tail is not None
    # A value in the middle between two levels may go either way.
    assert (again.logprobs == stored.logprobs).mean() > 0.999
    assert (again.tail == stored.tail).mean() > 0.99
    changed = moved.logprobs != stored.logprobs
    assert changed.mean() > 0.9
    assert (np.diff(moved.logprobs, axis=1) <= 0).all()
    # The error that is measured afterwards is that of values never rounded.
    truth = make_targets(zipf(400), 30)
    errors = [codec.rounding_error(*codec.head_and_tail(t), profile).mean() for t in (moved, truth)]
    assert errors[0] == pytest.approx(errors[1], rel=0.15)


def test_moved_values_keep_padding_and_an_empty_tail() -> None:
    minus = -np.inf
    logprobs = np.array([[0, minus], [math.log(0.5), math.log(0.5)]], np.float32)
    ids = np.array([[3, -1], [1, 2]], np.int32)
    targets = SoftTargets(np.ones(2, np.int32), ids, logprobs, np.full(2, minus, np.float32))
    for profile in stats.PROFILES:
        moved = codec.unrounded(shards.round_to_profile(targets, profile), profile)
        assert moved.logprobs[0, 1] == minus
        assert moved.tail is not None
        assert np.isneginf(moved.tail).all()


def test_redrawn_ids_follow_the_known_tail_and_the_stored_draws() -> None:
    # Of the tail's 0.4, ids 7 and 8 are known to hold 0.2 and 0.1, draws 20 and 21 the rest.
    rows = 2_000
    probs, ids = np.tile([0.2, 0.1], (rows, 1)), np.tile(np.array([7, 8], np.int32), (rows, 1))
    stored = np.tile(np.array([20, 21], np.int32), (rows, 1))
    tail = np.full(rows, 0.1)
    pool = np.array([99], np.int32)
    found = codec.redraw(probs, ids, tail, stored, pool, 8)
    assert found.shape == (rows, 8)
    assert ((found == 7).sum(1) == 4).all(), "systematic: exactly half"
    assert ((found == 8).sum(1) == 2).all()
    assert ((found == 20).sum(1) == 1).all()
    assert ((found == 21).sum(1) == 1).all()
    assert abs((found[:, 0] == 7).mean() - 0.5) < 0.05, "in no order"
    more = codec.redraw(probs, ids, tail, stored, pool, 16)
    assert ((more == 99).sum(1) == 2).all(), "the pool where stored draws do not suffice"
    own = codec.redraw(probs[:, :0], ids[:, :0], tail, stored, pool, 2)
    assert (np.sort(own, 1) == [20, 21]).all(), "the same head: the stored draws"
    none = codec.redraw(probs[:, :0], ids[:, :0], np.zeros(rows), stored, pool, 2)
    assert (none == -1).all()


@pytest.mark.parametrize(
    ("classes", "recommended", "budget"),
    [(49_152, 312, 114), (128_256, 328, 121), (151_936, 344, 127)],
)
def test_bytes_of_other_formats(classes: int, recommended: int, budget: int) -> None:
    found = {row["what"]: row["bytes"] for row in codec.references(classes)}
    assert found["dense bf16"] == 2 * classes
    assert found["DistillKit recommended, k = 128"] == recommended
    assert found["DistillKit budget, k = 50"] == budget
    assert found.get("random sampling, 12 ids") == (36 if classes < 2**17 else None)


def test_few_classes_have_no_presets() -> None:
    assert [row["what"] for row in codec.references(10)] == [
        "dense bf16",
        "random sampling, 12 ids",
    ]


@pytest.mark.parametrize(("profile", "draws"), [("compact", 16), ("precise", 0)])
def test_a_tables_own_setting_costs_what_the_table_costs(
    tmp_path: Path, profile: shards.Profile, draws: int
) -> None:
    table = zipf_table(tmp_path / "t", 16, draws, profile)
    found = stats.measure(table)
    assert (found["rows"], found["positions"]) == (6, 600)
    assert found["stored"] == {"k": 16, "draws": draws, "profile": profile}
    (own,) = [
        row
        for row in found["settings"]
        if (row["k"], row["profile"], row["draws"]) == (16, profile, draws)
    ]
    stored = {row["column"]: row["bytes"] for row in found["columns"]}
    for part, column in stats.PARTS.items():
        assert own[part] == pytest.approx(stored[column], rel=0.03, abs=0.02), part
    body = sum(file.size for file in table.files) / 600
    assert own["bytes"] == pytest.approx(body, rel=0.03)
    parts = [own[part] for part in (*stats.PARTS, "rest")]
    assert sum(parts) == pytest.approx(own["bytes"], abs=0.1)
    assert sum(stored.values()) < body


def test_settings_are_all_heads_profiles_and_draws(tmp_path: Path) -> None:
    found = stats.measure(zipf_table(tmp_path / "t", 40, 0, "precise"))
    rows = found["settings"]
    assert [(r["k"], r["profile"], r["draws"]) for r in rows] == [
        (k, profile, draws)
        for k in (16, 32, 40)
        for profile in ("compact", "precise")
        for draws in (0, k)
    ]
    truth = zipf(600)
    heads = {
        k: np.take_along_axis(np.exp(truth), make_targets(truth, k).ids, 1) for k in (16, 32, 40)
    }
    by = {(r["k"], r["profile"], r["draws"]): r for r in rows}
    for (k, profile, draws), row in by.items():
        head = heads[k]
        assert row["head_mass"] == pytest.approx(head.sum(1).mean(), abs=1e-3)
        error = codec.rounding_error(head, 1 - head.sum(1), profile)
        assert row["kl_mean"] == pytest.approx(error.mean(), rel=0.15)
        assert row["kl_p99"] == pytest.approx(np.quantile(error, 0.99), rel=0.3)
        assert (row["drawn"] > 1) == (draws > 0)
    assert by[16, "compact", 16]["bytes"] < by[32, "precise", 32]["bytes"]
    assert by[32, "compact", 0]["logprobs"] < by[32, "precise", 0]["logprobs"]
    assert by[16, "compact", 0]["ids"] == by[16, "precise", 0]["ids"]
    json.dumps(found)


def test_what_a_reference_lacks_is_said(tmp_path: Path) -> None:
    precise = stats.measure(zipf_table(tmp_path / "p", 16, 0, "precise", rows=1))["notes"]
    compact = stats.measure(zipf_table(tmp_path / "c", 16, 0, "compact", rows=1))["notes"]
    assert "profile precise" in precise[0]
    assert not [note for note in precise if "better reference" in note]
    assert [note for note in compact if "better reference" in note]


def test_rows_of_the_sample_are_spread_over_the_files(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300, shard_rows=100, draws=2)
    for rows in (1, 7, 100, 299, 300, 1000):
        found = stats.measure(table, rows)
        assert found["rows"] == min(rows, 300)
        assert found["positions"] == found["rows"]
    names: set[str] = set()
    for batch in stats._sample(table, 30):
        names |= {name[1:4] for name in batch["example_id"].to_pylist()}
    assert names == {"000", "001", "002"}


def test_sequences_of_many_positions_stop_at_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_language(tmp_path / "t", rows=40, length=100)
    monkeypatch.setattr(stats, "SAMPLE_POSITIONS", 500)
    assert 500 <= stats.measure(table)["positions"] < 40 * 99


def test_classification_is_measured_at_its_own_k(tmp_path: Path) -> None:
    found = stats.measure(make_table(tmp_path / "t", rows=200, classes=10, k=5))
    assert [(r["k"], r["draws"]) for r in found["settings"]] == [(5, 0), (5, 5)] * 2
    whole = stats.measure(make_table(tmp_path / "w", rows=50, classes=5, k=5))
    assert {r["drawn"] > 0.5 for r in whole["settings"]} <= {True, False}
    carried = {"image": pa.array([bytes(1000)] * 50, pa.binary())}
    with_image = stats.measure(make_table(tmp_path / "i", rows=50, classes=5, k=5, carried=carried))
    assert with_image["settings"] == whole["settings"], "what is carried is no label"


def test_an_unknown_tail_is_said_and_not_invented(tmp_path: Path) -> None:
    dense = dense_logprobs(120, 30, 3)
    targets = make_targets(dense, 5)
    targets = SoftTargets(**(vars(targets) | {"tail": None, "entropy": None}))
    tokens = np.zeros((2, 61), np.int32)
    made = columns(targets, tokens, np.tile(np.arange(60), (2, 1)))
    found = stats.measure(write(tmp_path / "t", made, 30, 5))
    assert [note for note in found["notes"] if "tail is unknown" in note]
    assert all(row["tail"] < 0.6 for row in found["settings"])
    assert all(0 <= row["kl_mean"] < 1e-3 for row in found["settings"])


def test_nothing_to_measure_is_refused(tmp_path: Path) -> None:
    empty = Table.open_or_create(str(tmp_path / "e"), table_schema(), make_contents())
    with pytest.raises(BadInputError, match="has no rows at version 0"):
        stats.measure(empty)
    targets = make_targets(dense_logprobs(0, 30), 5)
    none = columns(targets, np.zeros((2, 4), np.int32), np.zeros((2, 0), np.int32))
    with pytest.raises(BadInputError, match="have no position"):
        stats.measure(write(tmp_path / "n", none, 30, 5))
    with pytest.raises(BadInputError, match="stores draws alone"):
        stats.measure(make_table(tmp_path / "d", rows=10, k=0, draws=4))


def report(table: Table) -> dict[str, Any]:
    return {row["column"]: row["bytes"] for row in stats.measure(table)["columns"]}


def test_columns_of_the_table_are_bytes_a_position(tmp_path: Path) -> None:
    table = zipf_table(tmp_path / "t", 16, 16, "compact")
    found = report(table)
    assert set(found) == set(table.schema.names)
    # 16 ids of 12 bits, 16 logprobs of a byte at most, a tail of two.
    assert 20 < found["topk_ids"] < 32
    assert 6 < found["topk_logprobs"] < 16
    assert 1 < found["tail_logprob"] < 3


def test_a_sample_that_arrow_cannot_hold_in_one_piece_is_refused() -> None:
    # Lists of nulls: they take no memory, and their offsets are as large as any.
    length = 1_500_000_000
    lists = pa.ListArray.from_arrays(pa.array([0, length], pa.int32()), pa.nulls(length))
    batch = pa.RecordBatch.from_arrays([lists], ["x"])
    assert stats._whole([batch], "t").num_rows == 1
    with pytest.raises(BadInputError, match=r"table 't': 2 rows are too many .*give fewer"):
        stats._whole([batch, batch], "t")

"""One table of several: the mixture in numbers, refusals where it is not exact, going on."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError, IntegrityError, MismatchError, TryAgainError
from softlabels.query import gathering
from softlabels.query import materialise as module
from softlabels.query.materialise import EnsembleSpec, Materialised, Watching, materialise
from softlabels.query.mixture import Known, Unknown, first_unknown, mix_targets, width
from softlabels.query.view import query
from softlabels.specs import validate
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from softlabels.targets import SoftTargets
from tests.query.tables import reordered
from tests.sequences import make_uneven
from tests.tables import dense_logprobs, make_table

ROWS, CLASSES = 60, 10
LABELS = np.arange(ROWS) % CLASSES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All classes stored: a in order, b in another, c of 45 rows in a third one."""
    folder = tmp_path_factory.mktemp("teachers")
    rng = np.random.default_rng(0)
    image = {"image": pa.array([bytes([i]) for i in range(ROWS)])}
    make_table(folder / "a", ROWS, k=CLASSES, shard_rows=25, row_group_rows=10, carried=image)
    for seed, name in ((1, "b"), (2, "c")):
        plain = make_table(folder / f"p{seed}", ROWS, k=CLASSES, seed=seed, temperatures=[2.0, 0.5])
        rows = rng.permutation(ROWS)[: 45 if name == "c" else ROWS]
        reordered(plain, folder / name, rows, shard_rows=20)
    make_table(folder / "head", ROWS, k=4, seed=5)
    return folder


def spec(folder: Path, profile: str = "precise", /, **settings: Any) -> EnsembleSpec:
    members = {
        name: {"table": str(folder / name.rstrip("_")), **value} for name, value in settings.items()
    }
    return validate(EnsembleSpec, {"ensemble": members, "profile": profile}, "spec")


def targets_of(table: Table) -> tuple[list[str], Any]:
    """Example ids and soft targets of all rows, every optional part there."""
    batch = pa.Table.from_batches(list(table.batches())).combine_chunks().to_batches()[0]
    columns = {name: batch[name] for name in batch.schema.names}
    found = SoftTargets.from_columns(columns, table.contents.k)
    return batch["example_id"].to_pylist(), found


def dense(targets: SoftTargets, classes: int = CLASSES) -> np.ndarray:
    probs = np.zeros((len(targets.ids), classes + 1))
    np.put_along_axis(probs, targets.ids, np.exp(targets.logprobs.astype(np.float64)), 1)
    return probs[:, :classes]


def live(seed: int, temperature: float = 1) -> np.ndarray:
    scaled = np.exp(dense_logprobs(ROWS, CLASSES, seed) / temperature)
    return np.asarray(scaled / scaled.sum(1, keepdims=True))


def make(spec: EnsembleSpec, folder: Path, **given: object) -> tuple[Materialised, Table]:
    report = materialise(spec, str(folder), **given)  # type: ignore[arg-type]
    return report, Table.open(str(folder))


def test_two_teachers_are_their_mixture(folder: Path, tmp_path: Path) -> None:
    report, table = make(spec(folder, a={"weight": 2}, b={"temperature": 2}), tmp_path / "t")
    names, found = targets_of(table)
    assert names == [f"x{i:05d}" for i in range(ROWS)]
    expected = 2 / 3 * live(0) + 1 / 3 * live(1, 2)
    np.testing.assert_allclose(dense(found), expected, rtol=6e-3)
    np.testing.assert_allclose(found.entropy, -(expected * np.log(expected)).sum(1), rtol=2e-3)
    assert (found.tail == -np.inf).all()
    assert (found.label_ids == LABELS).all()
    own = np.log(expected[np.arange(ROWS), LABELS])
    np.testing.assert_allclose(found.label_logprobs, own, atol=6e-3)
    probs = dense(found)
    mine = probs[np.arange(ROWS), LABELS][:, None]
    assert (found.label_ranks == (probs > mine).sum(1)).all()
    assert (report.rows, report.k, report.committed, report.version) == (ROWS, CLASSES, 1, 1)
    images = query(table, "SELECT image FROM labels")["image"].to_pylist()
    assert images == [bytes([i]) for i in range(ROWS)]


def test_three_teachers_with_weights_by_row(folder: Path, tmp_path: Path) -> None:
    settings = {
        "c": {"weight": "1 + label"},
        "a": {"by_class": {"class3": 0.0}},
        "b": {"weight": 0.25, "temperature": 0.5},
    }
    report, table = make(spec(folder, **settings), tmp_path / "t")
    names, found = targets_of(table)
    assert len(names) == report.rows == 45
    assert report.dropped == {"not in a": 0, "not in b": 0}
    rows = np.array([int(name[1:]) for name in names])
    weights = np.stack([1 + LABELS, LABELS != 3, np.full(ROWS, 0.25)])
    weights = weights / weights.sum(0)
    teachers = (live(2), live(0), live(1, 0.5))
    expected = sum(w[:, None] * p for w, p in zip(weights, teachers, strict=True))[rows]
    np.testing.assert_allclose(dense(found), expected, rtol=8e-3, atol=1e-6)


def test_a_materialised_table_is_a_table(folder: Path, tmp_path: Path) -> None:
    from softlabels.query.mix import mix
    from softlabels.query.recipe import Recipe

    _, table = make(spec(folder, "compact", a={}, b={}), tmp_path / "t")
    report = verify(table)
    assert (report["rows"], report["problems"]) == (ROWS, [])
    contents = table.contents
    assert (contents.teacher.kind, contents.teacher.name) == ("ensemble", "a+b")
    assert (contents.k, contents.draws, contents.temperatures) == (CLASSES, 0, ())
    assert (contents.profile, contents.carried) == ("compact", ("image",))
    parents = contents.parents
    assert [p.name for p in parents] == ["a", "b"]
    opened = Table.open(str(folder / "b"))
    assert (parents[1].snapshot_digest, parents[1].version) == (opened.snapshot_digest, 1)
    recipe = {"sources": {"s": {"table": str(tmp_path / "t"), "where": "margin > 0.1"}}}
    plan = mix(validate(Recipe, recipe, "recipe"))
    assert plan.tables["s"].contents.parents == parents
    (run,) = [commit["run"] for commit in table.history() if commit["run"]]
    assert run.spec["ensemble"]["b"]["table"] == str(folder / "b")
    assert run.source["tables"]["b"] == {"uri": str(folder / "b"), "version": 1}
    # Its own table can be a teacher again.
    twice = {"t": {"table": str(tmp_path / "t")}, "c": {}}
    assert make(spec(folder, **twice), tmp_path / "again")[0].rows == 45


def test_a_missing_id_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    message = (
        r"example 'x00000': class or token \d+ is stored by another teacher, not by 'head', "
        r"which has a mass of 0\.\d+ outside .* keep the teachers apart as an `ensemble:`"
    )
    with pytest.raises(MismatchError, match=message):
        materialise(spec(folder, a={}, head={}), str(tmp_path / "t"))
    assert not (tmp_path / "t").exists()
    # Without a weight in any row it is not asked.
    _, table = make(spec(folder, a={}, head={"weight": 0}), tmp_path / "u")
    np.testing.assert_allclose(dense(targets_of(table)[1]), live(0), rtol=6e-3)


def test_equal_heads_with_tails_are_exact(folder: Path, tmp_path: Path) -> None:
    """One teacher at two temperatures has one set of ids: heads and tails add up."""
    make_table(tmp_path / "hot", ROWS, k=4, seed=7, temperatures=[2.0])
    both = spec(tmp_path, hot={}, hot_={"temperature": 2, "weight": 3})
    report, table = make(both, tmp_path / "t")
    _, found = targets_of(table)
    cold, hot = live(7), live(7, 2)
    top = np.argsort(-cold, axis=1)[:, :4]
    expected = cold / 4 + hot * 3 / 4
    np.testing.assert_array_equal(np.sort(found.ids, 1), np.sort(top, 1))
    heads = np.take_along_axis(expected, found.ids, 1)
    np.testing.assert_allclose(np.exp(found.logprobs), heads, rtol=6e-3)
    np.testing.assert_allclose(np.exp(found.tail), 1 - heads.sum(1), rtol=8e-3)
    assert np.isnan(found.entropy).all()  # of the tail's classes each one's share is not known
    assert query(table, "SELECT count(entropy) AS n FROM labels")["n"].to_pylist() == [0]
    inside = (found.ids == LABELS[:, None]).any(1)
    assert 0 < inside.sum() < ROWS
    own = np.log(expected[np.arange(ROWS), LABELS])
    np.testing.assert_allclose(found.label_logprobs, own, atol=8e-3)
    assert ((found.label_ranks == -1) == ~inside).all()
    assert (report.k, verify(table)["problems"]) == (4, [])


def test_sequences_become_one_table(tmp_path: Path) -> None:
    first = make_uneven(tmp_path / "a", rows=30, k=40, draws=0)

    def turned(batch: pa.RecordBatch) -> pa.RecordBatch:
        """Another teacher: of each position the likeliest token is the unlikeliest."""
        ids = batch["topk_ids"]
        flat = np.ascontiguousarray(np.asarray(ids.flatten()).reshape(-1, 40)[:, ::-1])
        values = pa.ListArray.from_arrays(ids.offsets, pa.array(flat.reshape(-1)), type=ids.type)
        return batch.set_column(batch.schema.get_field_index("topk_ids"), "topk_ids", values)

    other = reordered(first, tmp_path / "b", np.arange(29, 4, -1), shard_rows=10, change=turned)
    report, table = make(spec(tmp_path, a={"weight": 3}, b={}), tmp_path / "t")
    assert (report.rows, report.dropped) == (25, {"not in b": 5})
    assert verify(table)["problems"] == []
    _, found = targets_of(table)
    kept = targets_of(first)[1].take(np.arange(5, 30))
    theirs = targets_of(other)[1].take(np.arange(24, -1, -1))
    expected = 0.75 * dense(kept, 40) + 0.25 * dense(theirs, 40)
    np.testing.assert_allclose(dense(found, 40), expected, rtol=1e-2, atol=1e-6)
    assert (found.num_positions == kept.num_positions).all()
    assert (found.label_ids == kept.label_ids).all()
    assert ((found.label_ranks == -1) == (kept.label_ids == -1)).all()
    columns = "input_ids, position_index, example_id, label, top1_id"
    kept_rows = query(first, f"SELECT {columns} FROM labels WHERE example_id >= 's00005'")
    assert query(table, f"SELECT {columns} FROM labels").equals(kept_rows)
    assert (table.contents.alignment, table.contents.tokenizer_sha256) == ("next", "ab" * 32)


@pytest.mark.parametrize("values", [60, 1500])
def test_chunks_of_any_size_make_the_same_rows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    settings: dict[str, Mapping[str, object]] = {"a": {}, "b": {"weight": "margin"}, "c": {}}
    whole = make(spec(folder, **settings), tmp_path / "whole")[1]
    monkeypatch.setattr(gathering, "CHUNK_VALUES", values)
    monkeypatch.setattr(gathering, "CACHE_BYTES", 1)
    parts = make(spec(folder, **settings), tmp_path / "parts")[1]
    assert parts.contents == whole.contents
    one, other = (pa.Table.from_batches(list(t.batches())) for t in (whole, parts))
    assert one.combine_chunks().equals(other.combine_chunks())


def test_a_small_head_is_read_with_a_large_one(folder: Path, tmp_path: Path) -> None:
    """k is what the rows need: where all of a teacher's mass is stored, others need not have it."""
    sure = np.full((ROWS, 2), -np.inf, np.float32)
    sure[:, 0] = 0

    def certain(batch: pa.RecordBatch) -> pa.RecordBatch:
        ids = np.stack([np.arange(ROWS) % 7, np.full(ROWS, -1)], 1).astype(np.int32)
        found = SoftTargets(np.ones(ROWS, np.int32), ids, sure, np.full(ROWS, -np.inf, np.float32))
        for name, values in found.columns().items():
            place = batch.schema.get_field_index(name)
            if name in ("topk_ids", "topk_logprobs", "tail_logprob"):
                batch = batch.set_column(place, batch.schema.field(place), values)
        return batch

    plain = make_table(tmp_path / "p", ROWS, k=2, seed=5)
    reordered(plain, tmp_path / "one", np.arange(ROWS), change=certain)
    shift = {"image": pa.array([b""] * ROWS)}
    plain = make_table(tmp_path / "q", ROWS, k=2, seed=6, carried=shift)

    def next_class(batch: pa.RecordBatch) -> pa.RecordBatch:
        ids = pa.array([[(i + 1) % 7, -1] for i in range(ROWS)], batch["topk_ids"].type)
        return certain(batch).set_column(batch.schema.get_field_index("topk_ids"), "topk_ids", ids)

    reordered(plain, tmp_path / "two", np.arange(ROWS), change=next_class)
    report, table = make(spec(tmp_path, one={}, two={"weight": 3}), tmp_path / "t")
    _, found = targets_of(table)
    assert report.k == 2
    assert found.ids.tolist() == [[(i + 1) % 7, i % 7] for i in range(ROWS)]
    np.testing.assert_allclose(np.exp(found.logprobs), [[0.75, 0.25]] * ROWS, atol=1e-3)
    # Labels 7 to 9 have no mass; their rank counts the classes without any, by id.
    assert found.label_ids is not None
    assert found.label_ranks is not None
    assert found.label_logprobs is not None
    outside = LABELS >= 7
    assert (found.label_ranks[outside] == LABELS[outside]).all()
    assert (found.label_logprobs[outside] == -np.inf).all()


def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_PER_UNIT", 20)


def test_the_same_call_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_units(monkeypatch)
    both = spec(folder, a={}, b={"weight": "margin"})
    _, whole = make(both, tmp_path / "whole")
    seen = []

    def crash(rows: int, total: int) -> None:
        seen.append(rows)
        if len(seen) == 2:
            raise MemoryError("as a crash would")

    with pytest.raises(MemoryError):
        materialise(both, str(tmp_path / "t"), Watching(written=crash))
    assert Table.open(str(tmp_path / "t")).num_rows == 20
    report, table = make(both, tmp_path / "t")
    assert (report.rows, report.already, report.committed, report.units) == (40, 20, 2, 3)
    assert table.snapshot_digest == whole.snapshot_digest
    again, same = make(both, tmp_path / "t")
    assert (again.rows, again.already, again.committed) == (0, 60, 0)
    assert same.version == table.version


def test_a_signal_ends_it_between_chunks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_units(monkeypatch)
    both = spec(folder, a={}, b={})
    stop = Watching(written=lambda rows, total: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TryAgainError, match="1 units were committed, run the same command"):
        materialise(both, str(tmp_path / "t"), stop)
    assert make(both, tmp_path / "t")[0].rows == 40


def test_a_place_that_holds_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    both = spec(folder, a={}, b={})
    make(both, tmp_path / "t")
    with pytest.raises(MismatchError, match="holds rows of run"):
        materialise(spec(folder, a={}, b={"weight": 2}), str(tmp_path / "t"))
    with pytest.raises(MismatchError, match="holds rows of run"):
        materialise(spec(folder, "compact", a={}, b={}), str(tmp_path / "t"))
    with pytest.raises(MismatchError, match="holds rows of run"):
        materialise(both, str(folder / "a"))
    with pytest.raises(BadInputError, match="expected a table, not one version"):
        materialise(both, str(tmp_path / "t@1"))


def test_the_table_of_another_ensemble_is_named(folder: Path, tmp_path: Path) -> None:
    first, table = make(spec(folder, a={}, b={}), tmp_path / "t")
    second = spec(folder, a={"weight": 2}, b={})
    with pytest.raises(MismatchError, match=r"holds rows of run .*: use another table") as caught:
        materialise(second, str(tmp_path / "t"))
    assert first.run_id[:16] in str(caught.value)
    assert Table.open(str(tmp_path / "t")).version == table.version


def test_units_that_another_run_committed_are_not_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _small_units(monkeypatch)
    both = spec(folder, a={}, b={})
    raced: list[Materialised] = []

    def race(rows: int, total: int) -> None:
        if not raced:
            raced.append(Materialised("", None, ""))
            raced[0] = make(both, tmp_path / "t")[0]

    report, table = make(both, tmp_path / "t", watching=Watching(written=race))
    assert (raced[0].rows, raced[0].committed) == (60, 3)
    assert (report.rows, report.committed, report.already) == (0, 0, 60)
    assert table.num_rows == 60


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    report = materialise(spec(folder, a={}, b={}), str(tmp_path / "t"), dry_run=True)
    assert (report.version, report.k, report.units, report.rows) == (None, CLASSES, 1, 0)
    assert not (tmp_path / "t").exists()


def test_an_ensemble_without_rows_is_refused(folder: Path, tmp_path: Path) -> None:
    make_table(tmp_path / "z", 20, k=CLASSES, prefix="z")
    settings = {"a": {}, "z": {"table": str(tmp_path / "z")}}
    with pytest.raises(BadInputError, match="is left without rows: 60 not in z"):
        materialise(spec(folder, **settings), str(tmp_path / "t"))


def test_unknown_tails_are_refused(folder: Path, tmp_path: Path) -> None:
    def without_tail(batch: pa.RecordBatch) -> pa.RecordBatch:
        place = batch.schema.get_field_index("tail_logprob")
        return batch.set_column(
            place, "tail_logprob", pa.nulls(batch.num_rows, batch.schema.field(place).type)
        )

    plain = make_table(tmp_path / "p", ROWS, k=4, seed=5)
    reordered(plain, tmp_path / "u", np.arange(ROWS), change=without_tail)
    settings = {"a": {}, "u": {"table": str(tmp_path / "u")}}
    with pytest.raises(IntegrityError, match="rows whose tail is unknown"):
        materialise(spec(folder, **settings), str(tmp_path / "t"))


def known(ids: list[list[int]], head: list[list[float]]) -> Known:
    probs = np.array(head)
    return Known(np.array(ids, np.int32), probs, 1 - probs.sum(1), None, None)


def test_an_unknown_share_is_told_with_its_place() -> None:
    one = known([[0, 1], [2, 1], [3, 0]], [[0.5, 0.25], [0.5, 0.25], [0.75, 0.25]])
    two = known([[1, 0], [2, 3], [0, -1]], [[0.5, 0.25], [0.5, 0.375], [1, 0]])
    half = np.full((2, 3), 0.5)
    # Position 1: one has not 3, two has not 1. Position 2: nobody has anything else.
    assert first_unknown([one, two], half) == Unknown(1, 1, 1, 0.125)
    alone = half.copy()
    alone[:, 1] = [1, 0]
    assert first_unknown([one, two], alone) is None
    assert width([one, two], alone) == 2
    ones = np.ones(3, np.int32)
    assert mix_targets([one, two], half, ones, None, 3) == Unknown(1, 1, 1, 0.125)
    found = mix_targets([one, two], alone, ones, None, 3)
    assert isinstance(found, SoftTargets)
    assert found.ids.tolist() == [[0, 1, -1], [2, 1, -1], [0, 3, -1]]
    expected = [[0.375, 0.375, 0], [0.5, 0.25, 0], [0.625, 0.375, 0]]
    np.testing.assert_allclose(np.exp(found.logprobs), expected, atol=1e-7)
    assert found.tail is not None
    np.testing.assert_allclose(np.exp(found.tail), [0.25, 0.25, 0], atol=1e-7)


def test_a_labels_probability_outside_the_ids_needs_every_teacher() -> None:
    ids, head = [[0, 1]] * 4, [[0.5, 0.25]] * 4
    labels = np.array([5, 5, 1, -1], np.int32)
    said = [np.array([5, 5, 1, -1], np.int32), np.array([5, 6, 1, -1], np.int32)]
    probs = [np.array([0.125, 0.125, 0.25, np.nan]), np.array([0.25, 0.25, 0.25, np.nan])]
    plain = known(ids, head)
    teachers = [
        Known(plain.ids, plain.head, plain.tail, label, prob)
        for label, prob in zip(said, probs, strict=True)
    ]
    found = mix_targets(teachers, np.full((2, 4), 0.5), np.ones(4, np.int32), labels, 2)
    assert isinstance(found, SoftTargets)
    assert found.label_logprobs is not None
    assert found.label_ranks is not None
    # The second teacher's label of the second example is another one.
    expected = [0.1875, np.nan, 0.25, np.nan]
    np.testing.assert_allclose(np.exp(found.label_logprobs), expected, atol=1e-6)
    assert found.label_ranks.tolist() == [-1, -1, 1, -1]

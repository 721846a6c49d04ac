"""capture(): rows that are the teacher's own, once each, however often it is called or stopped."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from softlabels.errors import DataError, MismatchError, TryAgainError
from softlabels.query.takedown import Request, take_down
from softlabels.store.compact import compact
from softlabels.store.inspect import verify
from softlabels.store.publish import publish
from softlabels.store.table import Table
from softlabels.teacher.capture import Progress, capture
from softlabels.teacher.estimate import estimate
from softlabels.teacher.labeller import Labeller
from tests.teacher.jobs import (
    TOYS,
    make_spec,
    rows_table,
    settings,
    stored,
    teacher_logits,
    write_source,
)
from tests.teacher.test_extract import log_softmax
from tests.teacher.toys import NAN_AT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a source of 100 rows in two files."""
    write_source(tmp_path / "src" / "a.parquet", 0, 60)
    write_source(tmp_path / "src" / "b.parquet", 60, 100)
    return tmp_path


def stop_after(rows: int) -> Progress:
    """Progress that sends this process a SIGTERM once so many rows are labelled."""
    seen = 0

    def done(more: int, bytes_per_row: float) -> None:
        nonlocal seen
        seen += more
        if more and seen >= rows:
            os.kill(os.getpid(), signal.SIGTERM)

    return Progress(done=done)


def ids(start: int, stop: int) -> list[str]:
    """Example ids of source rows."""
    return [f"row{i:05d}" for i in range(start, stop)]


def test_rows_are_what_the_teacher_says(folder: Path) -> None:
    spec = make_spec(folder, temperatures=[0.5, 2], draws=2, carry=["note", "x"])
    report = capture(spec)
    assert (report.rows, report.already, report.units, report.committed) == (100, 0, 3, 3)
    assert (report.repeated, report.relabelled) == (0, 0)
    z = teacher_logits(spec, 0, 100)
    dense = log_softmax(z)
    rows = stored(folder / "table")
    labels = np.arange(100) % 6
    order = np.argsort(-dense, 1)
    assert rows["example_id"] == ids(0, 100)
    assert rows["view"] == [0] * 100
    assert rows["num_positions"] == [1] * 100
    np.testing.assert_array_equal(rows["topk_ids"], order[:, :3])
    head = np.take_along_axis(dense, order[:, :3], 1)
    np.testing.assert_allclose(rows["topk_logprobs"], head, rtol=2**-10, atol=1e-4)
    tail = np.log(1 - np.exp(head).sum(1))
    np.testing.assert_allclose(np.ravel(rows["tail_logprob"]), tail, rtol=2**-10, atol=1e-4)
    entropy = -(np.exp(dense) * dense).sum(1)
    np.testing.assert_allclose(np.ravel(rows["position_entropy"]), entropy, rtol=2**-10, atol=1e-4)
    np.testing.assert_allclose(rows["entropy"], entropy, rtol=2**-10, atol=1e-4)
    np.testing.assert_allclose(rows["top1_prob"], np.exp(head[:, 0]), rtol=1e-2)
    np.testing.assert_allclose(rows["margin"], np.exp(head[:, 0]) - np.exp(head[:, 1]), atol=1e-2)
    assert rows["label"] == labels.tolist()
    assert np.ravel(rows["label_ids"]).tolist() == labels.tolist()
    np.testing.assert_allclose(
        np.ravel(rows["label_logprobs"]), dense[np.arange(100), labels], rtol=2**-10, atol=1e-4
    )
    np.testing.assert_array_equal(
        np.ravel(rows["label_ranks"]), (order == labels[:, None]).argmax(1)
    )
    for temperature, suffix in ((0.5, "0p5"), (2.0, "2")):
        tempered = log_softmax(z / temperature)
        shift = np.ravel(rows[f"temper_shift_{suffix}"])[:, None]
        np.testing.assert_allclose(
            np.array(rows["topk_logprobs"]) / temperature + shift,
            np.take_along_axis(tempered, order[:, :3], 1),
            rtol=2**-8,
            atol=5e-3,
        )
    drawn = np.array(rows["sampled_ids"])
    assert drawn.shape == (100, 2)
    assert not (drawn[:, :, None] == order[:, None, :3]).any()
    source = rows_table(0, 100)
    assert rows["note"] == source["note"].to_pylist()
    assert rows["x"] == source["x"].to_pylist()
    assert verify(Table.open(spec.table))["problems"] == []


def test_a_stopped_capture_goes_on_and_then_does_nothing(folder: Path) -> None:
    spec = make_spec(folder)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TryAgainError, match="1 units were committed"):
        capture(spec, stop_after(50))
    assert signal.getsignal(signal.SIGTERM) == before
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 40)
    second = capture(spec)
    assert (second.rows, second.already, second.committed) == (60, 40, 2)
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 100)
    third = capture(spec)
    assert (third.rows, third.already, third.committed) == (0, 100, 0)
    assert third.repeated is None
    assert third.version == second.version
    undisturbed = make_spec(folder, table=str(folder / "other"))
    capture(undisturbed)
    assert repr(stored(spec.table)) == repr(stored(undisturbed.table))


def test_a_signal_while_planning_stops_before_the_teacher_runs(folder: Path) -> None:
    spec = make_spec(folder, teacher={"module": f"{TOYS}:Infinite"})
    progress = Progress(scanned=lambda rows: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TryAgainError, match="planning"):
        capture(spec, progress)


def test_new_source_files_make_a_run_of_the_absent_rows(folder: Path) -> None:
    spec = make_spec(folder)
    first = capture(spec)
    write_source(folder / "src" / "c.parquet", 90, 130)
    second = capture(spec)
    assert second.run_id != first.run_id
    assert (second.rows, second.already, second.repeated) == (30, 100, 10)
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 130)
    runs = {commit["run"].run_id for commit in Table.open(spec.table).history() if commit["run"]}
    assert runs == {first.run_id, second.run_id}
    # The old files alone are the first run again.
    (folder / "src" / "c.parquet").unlink()
    assert capture(spec).committed == 0


@pytest.mark.parametrize("order", ["compact delete", "delete compact", "delete", "publish"])
def test_rows_that_are_gone_do_not_count_as_there_before(folder: Path, order: str) -> None:
    spec = make_spec(folder)
    capture(spec)
    for what in order.split():
        table = Table.open(spec.table)
        if what == "compact":
            assert compact(table).made == 1
        elif what == "delete":
            assert take_down(table, Request(ids=frozenset(ids(3, 4)))).rows == 1
        else:
            spec = make_spec(folder, table=str(folder / "copy"))
            publish(table, spec.table)
    report = capture(spec)
    there = Table.open(spec.table).num_rows
    assert (report.rows, report.already) == (0, there)
    write_source(folder / "src" / "c.parquet", 100, 130)
    report = capture(spec)
    assert (report.rows, report.already, report.deleted) == (30, there, 100 - there)


def test_what_is_left_is_not_counted_anew_for_each_unit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = Table.committed

    def committed(table: Table, key: str) -> bool:
        asked.append(key)
        return real(table, key)

    monkeypatch.setattr(Table, "committed", committed)
    left: list[int] = []
    report = capture(
        make_spec(folder, shard_rows=2), Progress(reported=lambda r: left.append(r.left))
    )
    assert report.committed == 50
    assert sorted({*left}, reverse=True) == list(range(50, -1, -1))
    assert len(asked) < 12 * 50


def test_batch_size_may_change_under_way(folder: Path) -> None:
    with pytest.raises(TryAgainError):
        capture(make_spec(folder, batch_size=16), stop_after(50))
    capture(make_spec(folder, batch_size=7))
    capture(make_spec(folder, batch_size=100, table=str(folder / "other")))
    mixed, whole = stored(folder / "table"), stored(folder / "other")
    assert mixed["example_id"] == whole["example_id"]
    assert mixed["topk_ids"] == whole["topk_ids"]
    np.testing.assert_allclose(mixed["topk_logprobs"], whole["topk_logprobs"], rtol=2e-3)


def test_draws_depend_on_seed_and_example_alone(folder: Path) -> None:
    row_by_row = {"module": f"{TOYS}:RowByRow"}

    def rows(table: str, **changes: object) -> dict[str, list[object]]:
        capture(
            make_spec(folder, table=str(folder / table), teacher=row_by_row, draws=3, **changes)
        )
        return stored(folder / table)

    first = rows("one")
    # Other batches, other units, another order of the source: the very same rows.
    (folder / "src" / "a.parquet").rename(folder / "src" / "z.parquet")
    assert repr(rows("two", batch_size=7, shard_rows=33)) == repr(first)
    other = rows("three", seed=1)
    assert other["sampled_ids"] != first["sampled_ids"]
    assert other["topk_logprobs"] == first["topk_logprobs"]


def meanwhile(action: Callable[[], object]) -> Progress:
    """Progress that does something else once, while the first unit is being labelled."""
    left = [action]

    def done(rows: int, bytes_per_row: float) -> None:
        if rows and left:
            left.pop()()

    return Progress(done=done)


def test_a_unit_that_another_run_overtakes_is_labelled_again_without_its_rows(
    folder: Path,
) -> None:
    write_source(folder / "other" / "a.parquet", 30, 50)
    other = make_spec(folder, source={"files": str(folder / "other" / "*.parquet")})
    spec = make_spec(folder)
    report = capture(spec, meanwhile(lambda: capture(other)))
    assert (report.rows, report.already) == (80, 20)
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 100)
    table = Table.open(spec.table)
    kept = {str(path.relative_to(spec.table)) for path in Path(spec.table, "data").iterdir()}
    assert kept == {file.path for file in table.files}  # the overtaken shard is gone
    assert verify(table)["problems"] == []


def test_a_second_process_at_the_same_run_counts_only_its_own(folder: Path) -> None:
    spec = make_spec(folder)
    inner = []
    outer = capture(spec, meanwhile(lambda: inner.append(capture(spec))))
    assert (inner[0].rows, inner[0].committed) == (100, 3)
    assert (outer.rows, outer.committed) == (0, 0)
    assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 100)


def test_repeated_content_is_labelled_once(folder: Path) -> None:
    write_source(folder / "src" / "c.parquet", 30, 70)
    report = capture(make_spec(folder))
    assert (report.rows, report.repeated, report.relabelled) == (100, 40, 0)
    assert stored(folder / "table", ["example_id"])["example_id"] == ids(0, 100)


def test_ids_by_content_join_the_same_rows(folder: Path) -> None:
    write_source(folder / "src" / "c.parquet", 0, 5)
    spec = make_spec(folder, source={"example_id": None})
    report = capture(spec)
    assert (report.rows, report.repeated) == (100, 5)
    found = stored(spec.table, ["example_id"])["example_id"]
    assert len(set(found)) == 100
    assert {len(name) for name in found} == {64}
    with pytest.raises(MismatchError, match=r"example_ids differs.*'column'.*'content'"):
        capture(make_spec(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 2}, ["k differs", "has 2,", "has 3"]),
        ({"seed": 4}, ["seed differs", "has 4,", "has 0"]),
        ({"profile": "compact"}, ["profile differs", "'compact'", "'precise'"]),
        ({"carry": ["note"]}, ["carried differs", "('note',)", "()"]),
        ({"teacher": {"module": f"{TOYS}:RowByRow"}}, ["teacher differs", "the run has", "table"]),
        ({"teacher": {"classes": 6}}, ["classes differs", "None", "'class0'"]),
        ({"temperatures": [2]}, ["temperatures differs", "(2.0,)", "()"]),
    ],
)
def test_another_kind_of_label_is_refused(
    folder: Path, changes: dict[str, object], words: list[str]
) -> None:
    capture(make_spec(folder))
    with pytest.raises(MismatchError) as caught:
        capture(make_spec(folder, **changes))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Table.open(str(folder / "table")).num_rows == 100


@pytest.mark.parametrize(
    ("k", "draws", "temperatures", "profile"),
    [(6, 0, [2], "precise"), (0, 4, [0.5], "precise"), (2, 3, [], "compact")],
)
def test_every_shape_of_row_is_whole(
    folder: Path, k: int, draws: int, temperatures: list[float], profile: str
) -> None:
    spec = make_spec(folder, k=k, draws=draws, temperatures=temperatures, profile=profile)
    assert capture(spec).rows == 100
    assert capture(spec).rows == 0
    assert verify(Table.open(spec.table)) == {"files": 3, "rows": 100, "problems": []}
    assert pl.scan_delta(spec.table).collect().height == 100


def test_no_labels_no_column(folder: Path) -> None:
    capture(make_spec(folder, source={"label": None}))
    rows = stored(folder / "table")
    assert rows["label"] == rows["label_ids"] == rows["label_logprobs"] == [None] * 100


def test_one_hot_teachers(folder: Path) -> None:
    spec = make_spec(folder, teacher={"module": f"{TOYS}:Extreme"}, temperatures=[2], draws=1)
    capture(spec)
    rows = stored(spec.table)
    assert [row[0] for row in rows["topk_ids"]] == [0] * 100
    assert [row[0] for row in rows["topk_logprobs"]] == [0.0] * 100
    assert rows["sampled_ids"] == [[-1]] * 100
    assert verify(Table.open(spec.table))["problems"] == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_teachers(folder: Path, dtype: str) -> None:
    spec = make_spec(folder, teacher={"arguments": {"dtype": dtype}}, temperatures=[2], draws=2)
    capture(spec)
    dense = log_softmax(teacher_logits(spec, 0, 100))
    rows = stored(spec.table)
    found = np.take_along_axis(dense, np.array(rows["topk_ids"]), 1)
    np.testing.assert_allclose(rows["topk_logprobs"], found, rtol=2e-3, atol=1e-3)
    assert verify(Table.open(spec.table))["problems"] == []


def test_an_empty_source_makes_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    pq.write_table(rows_table(0, 0), tmp_path / "src" / "a.parquet")
    report = capture(make_spec(tmp_path))
    assert (report.units, report.rows) == (0, 0)
    assert Table.open(str(tmp_path / "table")).num_rows == 0
    assert estimate(make_spec(tmp_path))["rows_left"] == 0


def test_logits_that_are_nan_keep_the_units_before(folder: Path) -> None:
    sick = rows_table(70, 71).set_column(
        1, "x", pa.array([[NAN_AT, 0.0, 0.0, 0.0]], pa.list_(pa.float32()))
    )
    pq.write_table(pa.concat_tables([rows_table(60, 70), sick]), folder / "src" / "b.parquet")
    spec = make_spec(folder, teacher={"module": f"{TOYS}:Sick"})
    for _ in range(2):  # trying again does not help, and does no harm
        with pytest.raises(DataError, match="'row00070'"):
            capture(spec)
        assert stored(spec.table, ["example_id"])["example_id"] == ids(0, 40)
    # A mended teacher is another teacher: its labels do not go into the same table.
    with pytest.raises(MismatchError, match=r"teacher differs.*use another table"):
        capture(make_spec(folder, teacher={"module": f"{TOYS}:RowByRow"}))
    # Mended data make another run of the same teacher, which takes up what is there.
    write_source(folder / "src" / "b.parquet", 60, 71)
    assert capture(spec).rows == 31


def test_one_id_with_two_contents_writes_nothing(folder: Path) -> None:
    other = rows_table(70, 71).set_column(0, "id", pa.array(["row00007"]))
    pq.write_table(other, folder / "src" / "c.parquet")
    with pytest.raises(DataError, match="two contents"):
        # Before any teacher work: this one could not label a row.
        capture(make_spec(folder, teacher={"module": f"{TOYS}:Infinite"}))
    assert not (folder / "table").exists()


def test_a_spec_that_fails_at_once_leaves_no_table_in_its_way(folder: Path) -> None:
    with pytest.raises(MismatchError, match=r"\(16, 6\).*\(16, 7\)"):
        capture(make_spec(folder, teacher={"classes": 7}))
    assert not (folder / "table").exists()
    assert capture(make_spec(folder)).rows == 100


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    spec = make_spec(folder)
    found = estimate(spec)
    assert not (folder / "table").exists()
    assert set(found) == {
        "table", "run_id", "source_rows", "repeated", "units", "units_left", "rows_left",
        "batch_size", "rows_per_s", "seconds", "bytes_per_row", "bytes",
    }  # fmt: skip
    assert (found["source_rows"], found["units"], found["units_left"]) == (100, 3, 3)
    assert (found["rows_left"], found["batch_size"], found["repeated"]) == (100, 16, 0)
    assert found["bytes"] > 0
    with pytest.raises(TryAgainError):
        capture(spec, stop_after(50))
    later = estimate(spec)
    assert later["run_id"] == found["run_id"]
    assert (later["units_left"], later["rows_left"]) == (2, 60)
    assert Table.open(spec.table).num_rows == 40


def test_a_dry_run_refuses_what_the_capture_would(folder: Path) -> None:
    capture(make_spec(folder))
    with pytest.raises(MismatchError, match="k differs"):
        estimate(make_spec(folder, k=2))


def test_progress_adds_up(folder: Path) -> None:
    write_source(folder / "src" / "c.parquet", 30, 70)
    counts = {"scanned": 0, "planned": 0, "done": 0}
    sizes = []

    def done(rows: int, bytes_per_row: float) -> None:
        counts["done"] += rows
        sizes.append(bytes_per_row)

    def add(name: str, rows: int) -> None:
        counts[name] += rows

    capture(
        make_spec(folder),
        Progress(lambda rows: add("scanned", rows), lambda rows: add("planned", rows), done),
    )
    assert counts == {"scanned": 140, "planned": 140, "done": 140}
    assert sizes[0] == 0
    assert sizes[-1] > 0


def test_a_table_url(folder: Path) -> None:
    spec = make_spec(folder, table=f"file://{folder}/table")
    assert capture(spec).rows == 100
    assert capture(make_spec(folder)).rows == 0


def test_settings_are_not_changed_by_their_use(folder: Path) -> None:
    assert settings(folder) == settings(folder)


def test_threads_are_the_spec_s_and_are_given_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def peek(self: Any, *arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return rehearse(self, *arguments)

    rehearse = Labeller.rehearse
    monkeypatch.setattr(Labeller, "rehearse", peek)
    before = torch.get_num_threads()
    first = capture(make_spec(folder, threads=3))
    assert seen == [3]
    assert torch.get_num_threads() == before
    # They decide no label, so the run is the same.
    assert capture(make_spec(folder, threads=1)).run_id == first.run_id

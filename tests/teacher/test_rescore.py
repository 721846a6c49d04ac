"""A live teacher asked again: what it stored is found right, what it did not say is found wrong."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from softlabels.errors import BadInputError, MismatchError
from softlabels.lineage import Contents
from softlabels.store import shards
from softlabels.store.compact import compact
from softlabels.store.table import Table
from softlabels.targets import SoftTargets
from softlabels.teacher.capture import capture
from softlabels.teacher.rescore import compare, rescore
from softlabels.teacher.spec import CaptureSpec
from tests.tables import dense_logprobs, make_lineage, make_targets
from tests.teacher.jobs import TOYS, make_spec, write_source
from tests.teacher.language_models import language_spec, tiny_model
from tests.teacher.texts import SENTENCES


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def captured(folder: Path, rows: int = 150, **changes: Any) -> tuple[Table, CaptureSpec]:
    write_source(folder / "src" / "a.parquet", 0, rows)
    spec = make_spec(folder, **changes)
    capture(spec)
    return Table.open(spec.table), spec


def forged(table: Table, unit: str, change: dict[str, Any]) -> Table:
    """The table at a new version in which a unit's columns are others."""
    (file,) = [file for file in table.files if file.unit == unit]
    rows = pa.Table.from_batches(table.batches(None, [file]))
    for name, values in change.items():
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.field(name), pa.array(values, rows.field(name).type))
    units = []
    for one in table.files:
        writer = shards.ShardWriter(table.schema, table.contents.profile)
        every = rows.to_batches() if one is file else table.batches(None, [one])
        for batch in every:
            writer.write(batch)
        units.append(table.store_shard(f"forged/{uuid.uuid4().hex}", one.unit, writer.close()))
    lineage = make_lineage("f" * 64, [one.key for one in units], table.num_rows)
    return table.latest().replace(units, lineage, table.schema, table.contents)


@pytest.mark.parametrize("profile", ["precise", "compact"])
def test_what_the_teacher_said_is_what_it_says(tmp_path: Path, profile: str) -> None:
    table, spec = captured(tmp_path, profile=profile, draws=2)
    asked: list[int] = []
    done: list[int] = []
    found = rescore(table, spec, 1000, planned=asked.append, done=done.append)
    assert (found["rows"], found["of_rows"], found["positions"]) == (150, 150, 150)
    assert (found["absent"], found["problems"], found["top1_changed"]) == (0, [], 0)
    assert found["max_delta"] < 0.3 if profile == "compact" else found["max_delta"] < 1e-2
    assert found["kl_max"] < 1e-3
    assert asked == [150]
    assert sum(done) == 150


def test_a_sample_is_about_as_large_as_asked_and_repeats_by_its_seed(tmp_path: Path) -> None:
    table, spec = captured(tmp_path)
    found = rescore(table, spec.model_copy(update={"batch_size": 7}), 32, seed=3)
    assert 16 <= found["rows"] <= 32
    assert found["seed"] == 3
    assert rescore(table, spec, 32, seed=3)["rows"] == found["rows"]
    assert rescore(table, spec, 1)["rows"] <= 16


def test_one_row_that_the_teacher_never_said_is_found(tmp_path: Path) -> None:
    table, spec = captured(tmp_path)
    unit = table.files[2].unit
    rows = pa.Table.from_batches(table.batches(None, [table.files[2]])).to_pydict()
    logs = [list(row) for row in rows["topk_logprobs"]]
    logs[5][2] -= 0.5
    found = rescore(forged(table, unit, {"topk_logprobs": logs}), spec, 1000)
    (problem,) = found["problems"]
    name = rows["example_id"][5]
    assert problem.startswith("1 of 150 positions are not what the teacher says now: ")
    assert f"example {name!r} by 0.5 nats" in problem
    assert found["worst"][0]["position"] == f"example {name!r}"
    assert found["worst"][0]["delta"] == pytest.approx(0.5, abs=0.01)
    assert found["top1_changed"] == 0
    looser = rescore(forged(table, unit, {"topk_logprobs": logs}), spec, 1000, tolerance=1.0)
    assert looser["problems"] == []


def test_swapped_rows_show_as_another_choice_of_class(tmp_path: Path) -> None:
    table, spec = captured(tmp_path)
    rows = pa.Table.from_batches(table.batches(None, [table.files[0]])).to_pydict()
    ids = [list(reversed(row)) for row in rows["topk_ids"]]
    found = rescore(forged(table, table.files[0].unit, {"topk_ids": ids}), spec, 1000)
    assert found["top1_changed"] == 40
    assert found["kl_mean"] > 0.01
    assert len(found["problems"]) == 1


def test_a_hard_label_that_changed_in_the_source_is_counted(tmp_path: Path) -> None:
    table, spec = captured(tmp_path)
    rows = pa.Table.from_batches(table.batches(None, [table.files[0]])).to_pydict()
    labels = [[(row[0] + 1) % 6] for row in rows["label_ids"]]
    found = rescore(forged(table, table.files[0].unit, {"label_ids": labels}), spec, 1000)
    assert (found["labels_changed"], found["problems"]) == (40, [])


def test_another_teacher_source_or_table_is_refused(tmp_path: Path) -> None:
    table, spec = captured(tmp_path)
    other = make_spec(tmp_path, teacher={"module": f"{TOYS}:RowByRow"})
    with pytest.raises(MismatchError, match="teacher differs"):
        rescore(table, other)
    with pytest.raises(MismatchError, match="k differs"):
        rescore(table, make_spec(tmp_path, k=2))
    with pytest.raises(MismatchError, match=r"run '[0-9a-f]{16}' has labelled nothing of table"):
        rescore(table, make_spec(tmp_path, shard_rows=50))
    with pytest.raises(MismatchError, match="at version 0"):
        rescore(Table.open(f"{spec.table}@0"), spec)
    write_source(tmp_path / "src" / "b.parquet", 500, 510)
    with pytest.raises(MismatchError, match="its source or shard_rows is another"):
        rescore(table, spec)


def test_a_table_without_log_probabilities_is_refused(tmp_path: Path) -> None:
    table, spec = captured(tmp_path, k=0, draws=4)
    with pytest.raises(BadInputError, match="stores draws alone"):
        rescore(table, spec)


def test_a_calibrated_table_is_refused(tmp_path: Path) -> None:
    table, spec = captured(tmp_path)
    calibration = {"temperature": 2.0, "snapshot_digest": "0" * 64, "fitted": False}
    contents = Contents.model_validate(table.contents.model_dump() | {"calibration": calibration})
    table.contents = contents
    with pytest.raises(MismatchError, match="was calibrated at temperature 2"):
        rescore(table, spec)


def test_rows_of_another_run_are_absent_and_not_compared(tmp_path: Path) -> None:
    captured(tmp_path, rows=100)
    write_source(tmp_path / "src" / "a.parquet", 60, 150)
    spec = make_spec(tmp_path)
    capture(spec)
    found = rescore(Table.open(spec.table), spec, 1000)
    assert (found["rows"], found["absent"], found["of_rows"]) == (50, 40, 150)
    assert found["problems"] == []


def test_files_that_were_joined_are_searched(tmp_path: Path) -> None:
    table, spec = captured(tmp_path)
    compact(table)
    newest = table.latest()
    assert (len(newest.files), newest.num_rows) == (1, 150)
    found = rescore(newest, spec, 48)
    assert (found["rows"] > 16, found["absent"], found["problems"]) == (True, 0, [])
    assert rescore(newest, spec, 1000)["rows"] == 150


def test_sequences_are_compared_position_by_position(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = tiny_model(tmp_path_factory.mktemp("llama"))
    (tmp_path / "src").mkdir()
    for number in range(4):
        text = " ".join(SENTENCES[i % 4] for i in range(number, 2 * number + 1))
        (tmp_path / "src" / f"{number}.txt").write_text(text)
    spec = language_spec(tmp_path, model)
    capture(spec)
    table = Table.open(spec.table)
    found = rescore(table, spec, 1000)
    assert found["rows"] == table.num_rows
    assert found["positions"] > found["rows"]
    assert (found["problems"], found["absent"]) == ([], 0)
    file = table.files[0]
    rows = pa.Table.from_batches(table.batches(None, [file])).to_pydict()
    logs = [list(row) for row in rows["topk_logprobs"]]
    logs[0][table.contents.k] += -2.0
    moved = rescore(forged(table, file.unit, {"topk_logprobs": logs}), spec, 1000)
    assert f"example {rows['example_id'][0]!r} position 1 by" in moved["problems"][0]
    tokens = [list(row) for row in rows["input_ids"]]
    tokens[0][0] += 1
    other = rescore(forged(table, file.unit, {"input_ids": tokens}), spec, 1000)
    assert other["problems"][0].startswith("1 rows have other tokens now")


def exact_kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * (np.log(p) - np.log(q))).sum())


def test_kl_and_differences_are_those_of_the_distributions() -> None:
    a, b = dense_logprobs(20, 8, 0), dense_logprobs(20, 8, 1)
    here, there = make_targets(a, 8), make_targets(b, 8)
    found = compare(here, there, "precise", 0.01)
    for row in range(20):
        assert found.kl[row] == pytest.approx(exact_kl(np.exp(a[row]), np.exp(b[row])), abs=1e-5)
        assert found.delta[row] == pytest.approx(np.abs(a[row] - b[row]).max(), abs=1e-5)
    assert (found.top1 == (a.argmax(1) != b.argmax(1))).all()
    assert (found.excess > 0).all()
    same = compare(here, here, "precise", 0.01)
    assert (same.delta == 0).all()
    assert (same.excess < 0).all()


def test_an_id_that_one_side_lacks_differs_by_what_must_be_lacking() -> None:
    ids = np.array([[0, 1]], np.int32), np.array([[0, 2]], np.int32)
    logs = np.log(np.array([[0.5, 0.4]], np.float32)), np.log(np.array([[0.5, 0.1]], np.float32))
    ones = np.ones(1, np.int32)
    sides = [SoftTargets(ones, i, x) for i, x in zip(ids, logs, strict=True)]
    for a, b in (sides, sides[::-1]):
        found = compare(a, b, "precise", 0.01)
        assert found.delta[0] == pytest.approx(np.log(4), abs=1e-5)
        assert not found.top1[0]

"""Runs: what their id depends on, their units, and what a scan of the source finds."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from softlabels.errors import DataError
from softlabels.teacher.run import Run, scan
from tests.teacher.jobs import NAMES, TOYS, make_run, rows_table, write_source
from tests.teacher.toys import Linear


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a source of 100 rows and a weights file."""
    write_source(tmp_path / "src" / "a.parquet", 0, 60)
    write_source(tmp_path / "src" / "b.parquet", 60, 100)
    torch.manual_seed(1)
    save_file(Linear().state_dict(), tmp_path / "w.safetensors")
    return tmp_path


def run_of(folder: Path, **changes: Any) -> Run:
    """The run with the weights file."""
    teacher = {"weights": str(folder / "w.safetensors")} | changes.pop("teacher", {})
    return make_run(folder, teacher=teacher, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 3},
        {"table": "/elsewhere"},
        {"teacher": {"name": "other"}},
    ],
)
def test_what_is_no_part_of_the_id(folder: Path, changes: dict[str, Any]) -> None:
    assert run_of(folder, **changes).id == run_of(folder).id


def test_the_place_of_files_is_no_part_of_the_id(folder: Path, tmp_path: Path) -> None:
    before = run_of(folder).id
    (folder / "src").rename(folder / "moved")
    (folder / "w.safetensors").rename(folder / "v.safetensors")
    moved = run_of(
        folder,
        source={"files": str(folder / "moved" / "*.parquet")},
        teacher={"weights": str(folder / "v.safetensors")},
    )
    assert moved.id == before


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 2},
        {"seed": 1},
        {"draws": 2},
        {"shard_rows": 41},
        {"profile": "compact"},
        {"temperatures": [2]},
        {"carry": ["note"]},
        {"teacher": {"classes": 6}},
        {"teacher": {"classes": [*NAMES[:5], "other"]}},
        {"teacher": {"arguments": {"scale": 2.0}}},
        {"teacher": {"module": f"{TOYS}:RowByRow"}},
        {"source": {"example_id": None}},
        {"source": {"label": None}},
        {"source": {"label": "name"}},
        {"source": {"columns": ["x", "label"]}},
    ],
)
def test_what_is_part_of_the_id(folder: Path, changes: dict[str, Any]) -> None:
    assert run_of(folder, **changes).id != run_of(folder).id


def test_weights_and_source_content_are_part_of_the_id(folder: Path) -> None:
    seen = {run_of(folder).id}
    torch.manual_seed(2)
    save_file(Linear().state_dict(), folder / "w.safetensors")
    seen.add(run_of(folder).id)
    write_source(folder / "src" / "b.parquet", 60, 101)
    seen.add(run_of(folder).id)
    assert len(seen) == 3


def test_the_source_of_module_and_decode_is_part_of_the_id(folder: Path) -> None:
    code = Path(__file__).with_name("toys.py").read_text()
    (folder / "module.py").write_text(code)
    (folder / "decode.py").write_text(code)

    def run_id() -> str:
        return run_of(
            folder,
            teacher={"module": f"{folder}/module.py:Linear"},
            source={"decode": f"{folder}/decode.py:decode"},
        ).id

    seen = [run_id(), run_id()]
    assert seen[0] == seen[1]
    for name in ("module.py", "decode.py"):
        (folder / name).write_text(code + "# changed\n")
        seen.append(run_id())
    assert len(set(seen)) == 3


def test_units_cut_the_source_into_ranges(folder: Path) -> None:
    run = run_of(folder, shard_rows=40)
    assert [(unit.start, unit.stop) for unit in run.units] == [(0, 40), (40, 80), (80, 100)]
    assert [unit.name for unit in run.units] == [f"{run.id[:16]}-{n:06d}" for n in range(3)]
    assert all(unit.key == f"{run.id}/{unit.name}" for unit in run.units)
    assert [(u.start, u.stop) for u in run_of(folder, shard_rows=100).units] == [(0, 100)]
    for file in ("a", "b"):
        pq.write_table(rows_table(0, 0), folder / "src" / f"{file}.parquet")
    assert run_of(folder).units == ()


@pytest.mark.parametrize("example_id", ["id", None])
def test_equal_content_is_found_and_counted(folder: Path, example_id: str | None) -> None:
    rows = pa.concat_tables([rows_table(10, 13), rows_table(12, 13), rows_table(200, 201)])
    labels = pa.array([rows["label"][0].as_py(), 0, 1, 2, None], pa.int64())
    pq.write_table(rows.set_column(2, "label", labels), folder / "src" / "c.parquet")
    found = scan(run_of(folder, source={"example_id": example_id}))
    assert found.repeated.tolist() == [100, 101, 102, 103]
    # 10 keeps its label 4; 11 had 5 and has 0; 12 had 0 and has 1 and 2.
    assert found.relabelled == 3
    assert len(found.keys) == 105
    assert found.keys[100] == found.keys[10]


def test_a_null_label_differs_from_a_label(folder: Path) -> None:
    rows = rows_table(0, 1)
    labels = pa.array([None], pa.int64())
    pq.write_table(rows.set_column(2, "label", labels), folder / "src" / "c.parquet")
    assert scan(run_of(folder)).relabelled == 1
    assert scan(run_of(folder, source={"label": None})).relabelled == 0


def test_one_id_with_two_contents_names_both_places(folder: Path) -> None:
    other = rows_table(70, 71).set_column(0, "id", pa.array(["row00007"]))
    pq.write_table(other, folder / "src" / "c.parquet")
    with pytest.raises(DataError) as caught:
        scan(run_of(folder))
    assert "row 0 of 'c.parquet' and row 7 of 'a.parquet'" in str(caught.value)
    assert "\n" not in str(caught.value)
    # Without the column the content is the id, and nothing contradicts.
    assert scan(run_of(folder, source={"example_id": None})).repeated.tolist() == [100]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("id", None, "row 4 of 'c.parquet': example id 'id' is null"),
        ("id", "", "row 4 of 'c.parquet': example id 'id' is empty"),
        ("x", None, "row 4 of 'c.parquet': column 'x' is null"),
    ],
)
@pytest.mark.parametrize("example_id", ["id", None])
def test_nulls_are_refused_with_their_place(
    folder: Path, column: str, value: Any, words: str, example_id: str | None
) -> None:
    rows = rows_table(200, 206)
    values = rows[column].to_pylist()
    values[4] = value
    place = rows.schema.get_field_index(column)
    rows = rows.set_column(place, column, pa.array(values, rows[column].type))
    pq.write_table(rows, folder / "src" / "c.parquet")
    run = run_of(folder, source={"example_id": example_id})
    if column == "id" and example_id is None:
        assert len(scan(run).keys) == 106
        return
    with pytest.raises(DataError) as caught:
        scan(run)
    assert str(caught.value) == words


def test_content_ids_do_not_run_together(folder: Path) -> None:
    texts = pa.table({"a": ["ab", "a", "abc"], "b": ["c", "bc", ""]})
    pq.write_table(texts, folder / "texts.parquet")
    run = run_of(
        folder,
        source={
            "files": str(folder / "texts.parquet"),
            "columns": ["a", "b"],
            "example_id": None,
            "label": None,
        },
    )
    assert len(scan(run).repeated) == 0


def test_integer_ids_become_text(folder: Path) -> None:
    names = [str(key) for key in range(3)]
    for ids in (pa.array(names), pa.array(range(3), pa.int64())):
        rows = rows_table(0, 3).set_column(0, "id", ids)
        pq.write_table(rows, folder / "ids.parquet")
        run = run_of(folder, source={"files": str(folder / "ids.parquet")})
        found = scan(run).keys.tolist()
        if ids.type == pa.string():
            expected = found
    assert found == expected


def test_scan_tells_how_far_it_is(folder: Path) -> None:
    seen: list[int] = []
    scan(run_of(folder), seen.append)
    assert sum(seen) == 100


def test_a_run_is_a_value(folder: Path) -> None:
    run = run_of(folder)
    assert dataclasses.replace(run).id == run.id

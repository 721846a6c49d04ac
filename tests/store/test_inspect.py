"""verify: each kind of damage to a real table is found and said."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import IntegrityError
from softlabels.schema import table_schema
from softlabels.store import inspect, shards, tags
from softlabels.store.table import Table
from tests.tables import (
    dense_logprobs,
    forget_records,
    make_contents,
    make_lineage,
    make_table,
    make_targets,
)

RUN = "cd" * 32


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return make_table(tmp_path / "t", rows=60, shard_rows=20, row_group_rows=10, draws=2)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def commit_rows(table: Table, names: list[str], change: dict[str, object]) -> Table:
    """Commits one unit of random rows called `names`; `change` overwrites columns or statistics."""
    rows = len(names)
    targets = shards.round_to_profile(
        make_targets(dense_logprobs(rows, 10, 9), 5, np.zeros(rows, int), draws=2), "precise"
    )
    schema = table_schema()
    columns = targets.columns() | {
        "example_id": pa.array(names),
        "view": pa.array(np.zeros(rows, np.int32)),
    }
    for name in columns.keys() & change.keys():
        columns[name] = pa.array(change[name], columns[name].type)
    arrays = [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    writer = shards.ShardWriter(schema, "precise")
    writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
    shard = writer.close()
    shard.statistics.update({k: v for k, v in change.items() if k == "numRecords"})
    unit = f"{RUN[:16]}-000000"
    stored = table.store_shard(f"{RUN}/{unit}", unit, shard)
    return table.commit([stored], make_lineage(RUN, [unit], rows))


def test_a_whole_table_has_no_problem(table: Table) -> None:
    done = []
    report = inspect.verify(table, lambda: done.append(1))
    assert report == {"files": 3, "rows": 60, "problems": []}
    assert len(done) == 3


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda file: flip(file, file.stat().st_size // 3), "sha256 is "),
        (lambda file: flip(file, file.stat().st_size - 20), "sha256 is "),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "bytes, the log says"),
        (lambda file: file.write_bytes(b""), "0 bytes, the log says"),
        (lambda file: file.unlink(), "No such file"),
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_still_read(
    table: Table, tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    damage(tmp_path / "t" / table.files[1].path)
    report = inspect.verify(Table.open(str(tmp_path / "t")))
    (problem,) = report["problems"]
    assert problem.startswith(table.files[1].path)
    assert expected in problem
    assert "\n" not in problem
    assert report["rows"] == 40


def test_two_files_that_changed_places_are_both_reported(table: Table, tmp_path: Path) -> None:
    one, two = (tmp_path / "t" / file.path for file in table.files[:2])
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)
    assert len(inspect.verify(table)["problems"]) == 2


def test_a_doubled_row_is_reported(table: Table) -> None:
    changed = commit_rows(table, ["new", "x00007"], {})
    assert inspect.verify(changed)["problems"] == [
        "1 rows have an (example_id, view) that is there already"
    ]
    assert inspect.verify(table)["problems"] == [], "the version before is whole"


def test_a_second_view_of_an_example_is_no_double(table: Table) -> None:
    assert inspect.verify(commit_rows(table, ["x00007"], {"view": [1]}))["problems"] == []


def test_a_count_of_rows_that_lies_is_reported(table: Table) -> None:
    (problem,) = inspect.verify(commit_rows(table, ["a", "b"], {"numRecords": 3}))["problems"]
    assert "2 rows, the log says 3" in problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"topk_ids": [[1, 1, 2, 3, 4]]}, "example 'a' has an id twice in its top k"),
        ({"topk_ids": [[1, 2, 3, 4, 10]]}, "an id not below 10"),
        ({"topk_logprobs": [[-9.0, -9, -9, -9, -9]]}, "do not sum to 1"),
        ({"topk_logprobs": [[-3.0, -2, -9, -9, -9]]}, "rise"),
        ({"topk_ids": [[1, 2, 3, 4]]}, "column 'topk_ids'"),
        ({"sampled_ids": [[77, 77]]}, "an id not below 10"),
        ({"num_positions": [2]}, "num_positions"),
    ],
)
def test_rows_that_break_an_invariant_are_reported(
    table: Table, change: dict[str, object], expected: str
) -> None:
    (problem,) = inspect.verify(commit_rows(table, ["a"], change))["problems"]
    assert expected in problem


def test_a_file_under_a_foreign_name_is_reported(table: Table, tmp_path: Path) -> None:
    entry = tmp_path / "t" / "_delta_log" / f"{table.version:020d}.json"
    lines = entry.read_text().splitlines()
    index = next(i for i, line in enumerate(lines) if "add" in json.loads(line))
    action = json.loads(lines[index])
    (tmp_path / "t" / "part-0.parquet").write_bytes(
        (tmp_path / "t" / action["add"]["path"]).read_bytes()
    )
    action["add"]["path"] = "part-0.parquet"
    entry.write_text("\n".join([*lines[:index], json.dumps(action), *lines[index + 1 :]]) + "\n")
    with pytest.raises(IntegrityError, match="other files than its commit recorded"):
        Table.open(str(tmp_path / "t"))
    forget_records(tmp_path / "t")
    (problem,) = inspect.verify(Table.open(str(tmp_path / "t")))["problems"]
    assert "was not written by softlabels" in problem


def test_a_hostile_path_in_the_log_is_never_followed(table: Table, tmp_path: Path) -> None:
    (tmp_path / "secret.parquet").write_bytes(b"secret")
    entry = tmp_path / "t" / "_delta_log" / f"{table.version:020d}.json"
    forget_records(tmp_path / "t")  # with them it cannot even be opened
    for path in ("../secret.parquet", str(tmp_path / "secret.parquet")):
        entry.write_text(entry.read_text().replace(table.files[0].path, path))
        opened = Table.open(str(tmp_path / "t"))
        problems = inspect.verify(opened)["problems"]
        assert len(problems) == 1
        entry.write_text(entry.read_text().replace(path, table.files[0].path))


def test_a_description_sums_up(table: Table) -> None:
    tags.make_tag(table.root, "v1", table.version, table.snapshot_digest)
    tags.make_tag(table.root, "v0", 0, "a" * 64)
    found = inspect.describe(table)
    assert (found["rows"], found["files"], found["tags"]) == (60, 3, ["v1"])
    assert found["bytes"] == sum(file.size for file in table.files)
    assert (found["k"], found["draws"], found["profile"]) == (5, 2, "precise")
    assert found["snapshot_digest"] == table.snapshot_digest
    sizes = {column["column"]: column["bytes_per_row"] for column in found["columns"]}
    assert list(sizes) == table.schema.names
    assert sum(sizes.values()) == pytest.approx(found["label_bytes_per_row"], abs=0.2)
    assert sum(sizes.values()) * 60 < found["bytes"]
    json.dumps(found)


def test_carried_bytes_are_not_label_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = pa.array([rng.bytes(500) for _ in range(40)], pa.binary())
    found = inspect.describe(make_table(tmp_path / "t", rows=40, carried={"image": image}))
    sizes = {column["column"]: column["bytes_per_row"] for column in found["columns"]}
    assert sizes["image"] > 500
    labels = sum(sizes.values()) - sizes["image"]
    assert found["label_bytes_per_row"] == pytest.approx(labels, abs=1)


def test_a_table_without_rows_is_described_and_whole(tmp_path: Path) -> None:
    empty = Table.open_or_create(str(tmp_path / "t"), table_schema(), make_contents())
    assert inspect.describe(empty)["rows"] == 0
    assert inspect.verify(empty) == {"files": 0, "rows": 0, "problems": []}


def test_a_sample_reads_some_files_and_says_how_many_there_are(
    table: Table, tmp_path: Path
) -> None:
    report = inspect.verify(table, sample=2, seed=1)
    assert (report["files"], report["rows"], report["problems"]) == (2, 40, [])
    part = report["sample"]
    assert (part["seed"], part["of_files"], part["of_rows"]) == (1, 3, 60)
    assert 0 < part["bytes"] < part["of_bytes"] == sum(f.size for f in table.files)
    assert inspect.verify(table, sample=9)["files"] == 3
    for file in table.files:
        flip(tmp_path / "t" / file.path, 100)
    assert len(inspect.verify(table, sample=1)["problems"]) == 1
    # By each seed the same file, and not by every one the same.
    chosen = [inspect.verify(table, sample=1, seed=s)["problems"][0] for s in (0, 0, 1, 2, 3, 4)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1


def test_all_reads_each_file_of_the_kept_versions_once(table: Table, tmp_path: Path) -> None:
    tags.make_tag(table.root, "v1", table.version, table.snapshot_digest)
    tags.make_tag(table.root, "also", table.version, table.snapshot_digest)
    commit_rows(table, ["new"], {})
    asked: list[int] = []
    done: list[int] = []
    report = inspect.verify_all(table, asked.append, lambda: done.append(1))
    assert (report["files"], report["rows"], report["problems"]) == (4, 61, [])
    assert (asked, len(done)) == ([4], 4)
    assert [(v["version"], v["tags"], v["rows"]) for v in report["versions"]] == [
        (2, [], 61),
        (1, ["also", "v1"], 60),
    ]
    flip(tmp_path / "t" / table.files[0].path, 100)
    problems = inspect.verify_all(table)["problems"]
    assert len(problems) == 2, "in both versions"
    assert problems[0].startswith(f"version 2: {table.files[0].path}: sha256 is ")


def test_all_finds_what_only_a_tagged_version_has(table: Table, tmp_path: Path) -> None:
    """A version of another kind, whose files are checked by its own contents."""
    tags.make_tag(table.root, "v1", table.version, table.snapshot_digest)
    contents = table.contents.model_copy(update={"num_classes": 11, "classes": None})
    schema = table.schema
    writer = shards.ShardWriter(schema, "precise")
    for batch in table.batches():
        writer.write(batch)
    shard = writer.close()
    unit = table.store_shard(f"{RUN}/{RUN[:16]}-000000", f"{RUN[:16]}-000000", shard)
    table.replace([unit], make_lineage(RUN, [unit.key], 60), schema, contents)
    assert inspect.verify_all(table)["files"] == 4
    flip(tmp_path / "t" / table.files[1].path, 100)
    assert inspect.verify(table.latest())["problems"] == []
    (problem,) = inspect.verify_all(table)["problems"]
    assert problem.startswith("version 1: ")
    (tmp_path / "t" / tags.FOLDER / "v1.json").write_text("{")
    (problem,) = inspect.verify_all(table)["problems"]
    assert problem.startswith("tag 'v1': ")

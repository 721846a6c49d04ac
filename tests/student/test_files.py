import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from softlabels import parquet
from softlabels.errors import BadInputError, IntegrityError, StorageError
from softlabels.plan import Plan
from softlabels.store.table import Table
from softlabels.student import files
from softlabels.student.files import Files
from tests.plans import make_plan
from tests.tables import make_table

COLUMNS = ["example_id", "topk_ids", "topk_logprobs"]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    big = pa.array([np.random.default_rng(i).bytes(1000) for i in range(60)])
    return make_table(
        tmp_path / "t", rows=60, shard_rows=30, row_group_rows=10, carried={"big": big}
    )


@pytest.fixture
def plan(table: Table) -> Plan:
    return make_plan(table)


@pytest.fixture
def remote(table: Table) -> Iterator[str]:
    """The table's files on a filesystem that is not this machine's."""
    uri = f"memory://{uuid.uuid4().hex}"
    fs, path = fsspec.url_to_fs(uri)
    for file in table.files:
        fs.pipe_file(f"{path}/{file.path}", table.root.read(file.path))
    yield uri
    fs.rm(path, recursive=True)


def first_file(plan: Plan) -> Path:
    return Path(plan.tables["a"].uri) / plan.tables["a"].files[0].path


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def read_all(found: Files, plan: Plan) -> list[str]:
    batches = [found.read("a", path, group, COLUMNS) for path, group in groups(plan)]
    return [name for batch in batches for name in batch["example_id"].to_pylist()]


def groups(plan: Plan) -> list[tuple[str, int]]:
    return [(e["file"], e["row_group"]) for e in plan.entries.to_pylist()]


def test_only_the_columns_asked_are_read(plan: Plan, table: Table) -> None:
    batch = Files(plan).read("a", table.files[0].path, 1, COLUMNS)
    assert batch.schema.names == COLUMNS
    assert batch["example_id"].to_pylist() == [f"x{i:05d}" for i in range(10, 20)]


def test_files_beyond_the_open_ones_are_opened_again(
    plan: Plan, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "OPEN_FILES", 1)
    found = Files(plan)
    for _ in range(3):
        assert read_all(found, plan) == [f"x{i:05d}" for i in range(60)]
        assert len(found._open) == 1


def test_remote_files_give_the_same_rows_by_ranges(plan: Plan, table: Table, remote: str) -> None:
    here, there = Files(plan), Files(plan, {"a": remote})
    for _ in range(2):
        for path, group in groups(plan):
            assert there.read("a", path, group, COLUMNS).equals(
                here.read("a", path, group, COLUMNS)
            )


def test_after_the_first_read_a_remote_row_group_costs_its_own_bytes(
    plan: Plan, table: Table, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Files(plan, {"a": remote})
    read_all(found, plan)
    fs, _ = fsspec.url_to_fs(remote)
    sizes: list[int] = []
    whole = fs.cat_file

    def counted(path: str, start: int | None = None, end: int | None = None) -> bytes:
        part: bytes = whole(path, start, end)
        sizes.append(len(part))
        return part

    monkeypatch.setattr(fs, "cat_file", counted)
    found.read("a", table.files[0].path, 0, COLUMNS)
    assert 0 < sum(sizes) < table.files[0].size / 20


def test_where_columns_are_is_found_once_a_file(
    plan: Plan, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, parsed = parquet._parse_footer, []

    def counted(end: memoryview, wanted: Any) -> Any:
        parsed.append(len(end))
        return parse(end, wanted)

    monkeypatch.setattr(parquet, "_parse_footer", counted)
    monkeypatch.setattr(files, "OPEN_FILES", 1)
    for roots in ({}, {"a": remote}):
        parsed.clear()
        found = Files(plan, roots)
        for _ in range(2):
            read_all(found, plan)
        assert len(parsed) == len(plan.tables["a"].files) == 2


def test_a_remote_file_that_changes_later_is_noticed(plan: Plan, table: Table, remote: str) -> None:
    found = Files(plan, {"a": remote})
    read_all(found, plan)
    fs, path = fsspec.url_to_fs(remote)
    name = table.files[0].path
    data = bytearray(fs.cat_file(f"{path}/{name}"))
    data[:-8] = bytes(255 - byte for byte in data[:-8])
    fs.pipe_file(f"{path}/{name}", bytes(data))
    with pytest.raises(IntegrityError, match="is damaged"):
        found.read("a", name, 0, COLUMNS)
    fs.pipe_file(f"{path}/{name}", b"short")
    with pytest.raises(IntegrityError, match="is too short"):
        found.read("a", name, 0, COLUMNS)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_flipped_bit_is_refused_with_both_sums(plan: Plan, table: Table, part: float) -> None:
    path = first_file(plan)
    damage(path, int(part * path.stat().st_size))
    with pytest.raises(IntegrityError) as refused:
        read_all(Files(plan), plan)
    assert table.files[0].path in str(refused.value)
    assert table.files[0].sha256 in str(refused.value)


def test_a_cut_file_is_refused_with_both_lengths(plan: Plan, table: Table) -> None:
    path = first_file(plan)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(IntegrityError, match=f"{size - 1} bytes, the plan says {size}"):
        read_all(Files(plan), plan)


def test_a_missing_file_is_a_storage_error(plan: Plan, table: Table) -> None:
    found = Files(plan)
    first_file(plan).unlink()
    with pytest.raises(StorageError, match="No such file"):
        read_all(found, plan)


def test_a_remote_file_that_is_missing_is_a_storage_error(
    plan: Plan, table: Table, remote: str
) -> None:
    fs, path = fsspec.url_to_fs(remote)
    fs.rm(f"{path}/{table.files[1].path}")
    with pytest.raises(StorageError, match="cannot read"):
        read_all(Files(plan, {"a": remote}), plan)


@pytest.mark.parametrize("field", ["footer_sha256", "num_rows"])
def test_a_plan_that_contradicts_its_file_is_refused(plan: Plan, table: Table, field: str) -> None:
    made = plan.tables["a"]
    value: object = "0" * 64 if field == "footer_sha256" else 29
    changed = (made.files[0].model_copy(update={field: value}), *made.files[1:])
    wrong = Plan({"a": made.model_copy(update={"files": changed})}, plan.entries, plan.recipe)
    with pytest.raises(IntegrityError, match="the plan says"):
        read_all(Files(wrong), plan)


def test_what_the_plan_does_not_list_is_refused(plan: Plan, table: Table, remote: str) -> None:
    with pytest.raises(IntegrityError, match="not listed"):
        Files(plan).read("a", "data/other.parquet", 0, COLUMNS)
    for roots in ({}, {"a": remote}):
        found = Files(plan, roots)
        for _ in range(2):
            with pytest.raises(IntegrityError, match="row group 3 of"):
                found.read("a", table.files[0].path, 3, COLUMNS)


def test_a_root_for_a_table_that_is_not_in_the_plan_is_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no table 'b'"):
        Files(plan, {"b": str(tmp_path)})


def test_values_survive_mapping_and_eviction(plan: Plan, table: Table) -> None:
    found = Files(plan)
    batch = found.read("a", table.files[0].path, 0, COLUMNS)
    before = np.array(batch["topk_ids"].flatten())
    found._open.clear()
    del found
    assert np.array_equal(before, np.array(batch["topk_ids"].flatten()))

"""Augmented views of a source's rows, labelled into a table."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from softlabels.errors import DataError, MismatchError
from softlabels.store.deleted import example_keys, record_deleted
from softlabels.store.table import Table
from softlabels.teacher.capture import capture
from softlabels.teacher.rescore import rescore
from tests.student.pictures import HERE, capture_spec, write_pictures
from tests.teacher.jobs import make_spec, write_source

AUGMENT = f"{HERE}:shift_and_flip"


def rows(table: str) -> set[tuple[str, int]]:
    batches = Table.open(table).batches(["example_id", "view"])
    pairs = [zip(*batch.to_pydict().values(), strict=True) for batch in batches]
    return {pair for part in pairs for pair in part}


def test_each_view_is_labelled_once_and_more_views_are_added_later(tmp_path: Path) -> None:
    write_pictures(tmp_path / "source" / "a.parquet", 0, 30)
    two = capture_spec(tmp_path, source={"augment": AUGMENT, "views": 2})
    four = capture_spec(tmp_path, source={"augment": AUGMENT, "views": 4})
    plain = capture_spec(tmp_path, source={"augment": AUGMENT})
    assert capture(two).rows == 60
    assert capture(two).rows == 0
    assert capture(four).rows == 60
    assert capture(plain).rows == 30
    names = [f"p{i:04d}" for i in range(30)]
    assert rows(two.table) == {(name, view) for name in names for view in range(5)}
    assert sum(batch.num_rows for batch in Table.open(two.table).batches()) == 150


def test_a_views_seed_and_label_do_not_hang_on_units_and_batches(tmp_path: Path) -> None:
    found = []
    for name, sizes in (("one", {}), ("other", {"shard_rows": 7, "batch_size": 3})):
        folder = tmp_path / name
        write_pictures(folder / "source" / "a.parquet", 0, 20)
        spec = capture_spec(folder, source={"augment": AUGMENT, "views": 2}, **sizes)
        capture(spec)
        table = [row for batch in Table.open(spec.table).batches() for row in batch.to_pylist()]
        found.append({(row["example_id"], row["view"]): row for row in table})
    one, other = found
    assert one.keys() == other.keys()
    for key, row in one.items():
        assert row["view_params"] == other[key]["view_params"]
        assert row["topk_logprobs"] == pytest.approx(other[key]["topk_logprobs"], abs=1e-2)
        assert 0 <= int(row["view_params"]) < 2**53
    assert len({row["view_params"] for row in one.values()}) == 40
    assert one["p0003", 1]["topk_logprobs"] != one["p0003", 2]["topk_logprobs"]


def test_views_of_a_deleted_example_do_not_come(tmp_path: Path) -> None:
    write_pictures(tmp_path / "source" / "a.parquet", 0, 12)
    spec = capture_spec(tmp_path, source={"augment": AUGMENT})
    capture(spec)
    record_deleted(Table.open(spec.table).root, "c" * 64, example_keys(["p0003"]))
    report = capture(capture_spec(tmp_path, source={"augment": AUGMENT, "views": 3}))
    assert (report.rows, report.deleted, report.missing) == (33, 3, 0)
    assert {view for name, view in rows(spec.table) if name == "p0003"} == {0}


def test_rescore_asks_for_the_same_views(tmp_path: Path) -> None:
    write_pictures(tmp_path / "source" / "a.parquet", 0, 30)
    spec = capture_spec(tmp_path, source={"augment": AUGMENT, "views": 2})
    capture(spec)
    found = rescore(Table.open(spec.table), spec, rows=1_000, seed=0)
    assert found["rows"] == 60
    assert found["problems"] == []


def test_one_table_holds_views_of_one_augmentation(tmp_path: Path) -> None:
    write_pictures(tmp_path / "source" / "a.parquet", 0, 12)
    capture(capture_spec(tmp_path))
    with pytest.raises(MismatchError, match="augment differs"):
        capture(capture_spec(tmp_path, source={"augment": AUGMENT, "views": 1}))


def test_an_augmentation_that_fails_names_the_rows(tmp_path: Path) -> None:
    write_pictures(tmp_path / "source" / "a.parquet", 0, 12)
    spec = capture_spec(tmp_path, source={"augment": "tests.teacher.toys:decode", "views": 1})
    with pytest.raises(DataError, match="augment failed in examples 'p0000'"):
        capture(spec)
    assert not Path(spec.table).exists()


def test_a_source_column_called_view_is_content_as_any_other(tmp_path: Path) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 10)
    with pytest.raises(ValidationError, match="source column 'source_row'"):
        make_spec(tmp_path, carry=["source_row"], carry_position=True)
    with pytest.raises(ValidationError, match="source column 'view'"):
        make_spec(tmp_path, source={"columns": ["view"], "augment": AUGMENT, "views": 1})
    make_spec(tmp_path, source={"columns": ["view"]})
    with pytest.raises(ValidationError, match="augment names nothing"):
        make_spec(tmp_path, source={"views": 1})

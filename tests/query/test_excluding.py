"""`exclude`: the examples of the user's own file are left out of a source."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import BadInputError
from softlabels.plan import Plan
from softlabels.query.explain import funnel
from softlabels.query.mix import Recipe, mix
from softlabels.query.suspects import suspects
from softlabels.store.table import Table
from tests.query.tables import reordered
from tests.query.test_mix import every, one, reads
from tests.tables import make_table

SOME = ["x00003", "x00150", "x00151", "x00299", "elsewhere"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """300 rows; row i has the label i % 10."""
    return make_table(tmp_path_factory.mktemp("excluding") / "t")


def listed(path: Path, ids: list[Any], views: list[Any] | None = None) -> str:
    """A file of these examples, by its ending."""
    rows = [{"example_id": name, "score": place} for place, name in enumerate(ids)]
    if views is not None:
        rows = [{**row, "view": view} for row, view in zip(rows, views, strict=True)]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("ending", ["parquet", "csv", "json"])
def test_the_examples_of_a_file_are_left_out(table: Table, tmp_path: Path, ending: str) -> None:
    plan = one(table, exclude=listed(tmp_path / f"out.{ending}", SOME))
    assert set(reads(plan)) == set(every(300)) - set(SOME)
    assert dict(plan.report[0].dropped) == {"exclude": 4}
    assert plan.num_rows == 296


def test_it_comes_after_where_and_before_the_split(table: Table, tmp_path: Path) -> None:
    path = listed(tmp_path / "out.csv", SOME)
    split = {"take": "train", "holdout": 0.3}
    plan = one(table, where="label <> 3", exclude=path, split=split, limit=100)
    dropped = dict(plan.report[0].dropped)
    assert list(dropped) == ["where", "exclude", "split", "limit"]
    assert (dropped["where"], dropped["exclude"]) == (30, 3)
    alone = set(reads(one(table, where="label <> 3", split=split)))
    assert set(reads(plan)) <= alone - set(SOME)
    assert len(reads(plan)) == 100
    steps = [row["step"] for row in funnel(plan.report[0])]
    assert steps[1:5] == ["where", "exclude", "split", "limit"]


def test_views_are_left_out_one_by_one_or_all(tmp_path: Path) -> None:
    plain = make_table(tmp_path / "p", rows=20)
    twice = reordered(plain, tmp_path / "t", np.arange(40) % 20, views=np.arange(40) // 20)
    all_views = one(twice, exclude=listed(tmp_path / "a.csv", ["x00003", "x00004"]))
    assert all_views.num_rows == 36
    single = listed(tmp_path / "b.parquet", ["x00003", "x00004", "x00004"], [1, 0, 0])
    plan = one(twice, exclude=single)
    assert plan.num_rows == 38
    assert set(reads(plan)) == set(every(20))
    assert one(twice, exclude=listed(tmp_path / "c.csv", ["x00003"], ["0.0"])).num_rows == 39


def test_the_plan_knows_the_file_by_what_it_holds(table: Table, tmp_path: Path) -> None:
    first = one(table, exclude=listed(tmp_path / "a.parquet", SOME))
    again = one(table, exclude=listed(tmp_path / "b.csv", [*SOME[::-1], SOME[0]]))
    assert again.fingerprint == first.fingerprint
    (source,) = first.recipe["sources"]
    assert len(source["exclude"]) == 64
    assert str(tmp_path) not in json.dumps(source)
    # Even where the same rows are left, another list is another recipe.
    fewer = one(table, exclude=listed(tmp_path / "c.csv", SOME[:-1]))
    assert set(reads(fewer)) == set(reads(first))
    assert fewer.fingerprint != first.fingerprint
    by_view = one(table, exclude=listed(tmp_path / "d.csv", SOME, [0] * 5))
    assert set(reads(by_view)) == set(reads(first))
    assert by_view.fingerprint != first.fingerprint
    assert Plan.read(written(first, tmp_path)).fingerprint == first.fingerprint


def written(plan: Plan, folder: Path) -> str:
    plan.write(folder / "plan.parquet")
    return str(folder / "plan.parquet")


def test_what_suspects_writes_is_taken(table: Table, tmp_path: Path) -> None:
    found = suspects(table)
    assert 0 < found.num_rows < 300
    pq.write_table(found, tmp_path / "suspects.parquet")
    plan = one(table, exclude=str(tmp_path / "suspects.parquet"))
    assert set(reads(plan)) == set(every(300)) - set(found["example_id"].to_pylist())
    pq.write_table(found.slice(0, 0), tmp_path / "none.parquet")
    assert one(table, exclude=str(tmp_path / "none.parquet")).num_rows == 300


def test_ids_that_look_like_numbers_are_text(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=20, prefix="")
    path = tmp_path / "out.csv"
    path.write_text("example_id\n00007\n00008\n8\n")
    assert set(reads(one(table, exclude=str(path)))) == {f"{i:05d}" for i in range(20)} - {
        "00007",
        "00008",
    }


def test_once_takes_an_excluded_example_from_another_source(table: Table, tmp_path: Path) -> None:
    uri, path = table.root.uri, listed(tmp_path / "out.csv", SOME)
    sources = {"a": {"table": uri, "exclude": path}, "b": {"table": uri}}
    plan = mix(Recipe.model_validate({"once": True, "sources": sources}))
    assert [report.kept for report in plan.report] == [296, 4]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no file"),
        ("id,view\nx1,0\n", "no column example_id, only \\['id', 'view'\\]"),
        ("example_id,view\nx1,0\n,0\n", "a row without example_id"),
        ("example_id,view\nx1,0\nx2,\n", "a row without view"),
        ("example_id,view\nx1,0.5\n", "a row without view"),
        ("example_id,view\nx1,first\n", "a row without view"),
        ("example_id,view\nx1,0\nx2,0,7\n", "cannot be read"),
        ("", "line 1 must name the columns"),
    ],
)
def test_bad_files_are_refused(
    table: Table, tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "out.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInputError, match=f"source 'a': file 'exclude': .*{words}") as caught:
        one(table, exclude=str(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_leaves_nothing_is_refused(table: Table, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"left without rows.*exclude drops 300"):
        one(table, exclude=listed(tmp_path / "out.csv", every(300)))

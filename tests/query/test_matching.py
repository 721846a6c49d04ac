"""Rows of several tables matched by (example_id, view)."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError, DataError, MismatchError
from softlabels.query.matching import example_of, match
from softlabels.store.table import Table
from tests.query.tables import reordered
from tests.sequences import make_uneven
from tests.tables import make_table


def column(table: Table, name: str) -> list[object]:
    return [value for batch in table.batches([name]) for value in batch[name].to_pylist()]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    """60 rows; 50 of them in another order; 40, of which 10 are none of the first's."""
    folder = tmp_path_factory.mktemp("matching")
    first = make_table(folder / "a", rows=60, shard_rows=25, row_group_rows=10)
    plain = make_table(folder / "p", rows=60, seed=1)
    number = {"number": pa.array(np.arange(60.0)), "content": pa.array(np.arange(60))}
    other = make_table(folder / "q", rows=60, seed=2, carried=number, prefix="x")
    rng = np.random.default_rng(0)
    return {
        "a": first,
        "b": reordered(plain, folder / "b", rng.permutation(60)[:50], shard_rows=20),
        "c": reordered(other, folder / "c", np.arange(59, 19, -1), shard_rows=7),
    }


def test_rows_are_those_of_the_same_examples(tables: dict[str, Table]) -> None:
    found = match(tables)
    ids = {name: column(table, "example_id") for name, table in tables.items()}
    assert found.rows["a"].tolist() == list(range(60))
    for name in ("b", "c"):
        expected = [ids[name].index(x) if x in ids[name] else -1 for x in ids["a"]]
        assert found.rows[name].tolist() == expected
    assert found.values == {}


def test_only_the_wanted_rows_are_matched(tables: dict[str, Table]) -> None:
    whole = match(tables)
    rows = np.array([3, 24, 25, 40, 59])
    found = match(tables, rows)
    assert found.rows["a"].tolist() == rows.tolist()
    for name in ("b", "c"):
        assert found.rows[name].tolist() == whole.rows[name][rows].tolist()
    none = match(tables, np.zeros(0, np.int64), {"a": ["label"], "b": ["margin"]})
    assert [len(r) for r in none.rows.values()] == [0, 0, 0]
    assert none.values["a"].shape == none.values["b"].shape == (1, 0)


def test_expressions_are_of_each_tables_own_columns(tables: dict[str, Table]) -> None:
    asked = {
        "a": ["label", "CASE WHEN label > 4 THEN top1_prob END"],
        # `number` and `content` are names that the query itself uses.
        "c": ["number + content", "margin > 0.5"],
    }
    rows = np.array([1, 7, 26, 58])
    found = match(tables, rows, asked)
    labels = np.array(column(tables["a"], "label"))[rows]
    tops = np.array(column(tables["a"], "top1_prob"))[rows]
    np.testing.assert_array_equal(found.values["a"][0], labels)
    np.testing.assert_array_equal(found.values["a"][1], np.where(labels > 4, tops, np.nan))
    theirs = found.rows["c"]
    numbers, margins = np.array(column(tables["c"], "number")), column(tables["c"], "margin")
    for place, row in enumerate(theirs):
        expected = [2 * numbers[row], float(margins[row]) > 0.5] if row >= 0 else [np.nan] * 2
        np.testing.assert_array_equal(found.values["c"][:, place], expected)
    assert "b" not in found.values


def test_one_table_alone_is_all_there(tables: dict[str, Table]) -> None:
    found = match({"a": tables["a"]}, None, {"a": ["view + 1"]})
    assert found.values["a"].tolist() == [[1.0] * 60]


def test_one_version_may_come_twice(tables: dict[str, Table]) -> None:
    found = match({"first": tables["b"], "main": tables["b"]})
    assert found.rows["main"].tolist() == found.rows["first"].tolist() == list(range(50))


def test_views_are_told_apart(tmp_path: Path) -> None:
    plain = make_table(tmp_path / "p", rows=20)
    order = np.arange(20)
    views = np.arange(20) % 2
    one = reordered(plain, tmp_path / "a", order, views=views)
    two = reordered(plain, tmp_path / "b", order[::-1], views=1 - views[::-1])
    found = match({"a": one, "b": two}).rows["b"]
    assert found.tolist() == [-1] * 20
    three = reordered(plain, tmp_path / "c", order[::-1], views=views[::-1])
    assert match({"a": one, "c": three}).rows["c"].tolist() == list(range(19, -1, -1))


@pytest.mark.parametrize("double", ["first", "other"])
def test_an_example_that_a_table_holds_twice_is_refused(tmp_path: Path, double: str) -> None:
    plain = make_table(tmp_path / "p", rows=20)
    twice = reordered(plain, tmp_path / "t", np.array([4, 9, 3, 9]))
    both = (
        {"first": twice, "other": plain} if double == "first" else {"first": plain, "other": twice}
    )
    with pytest.raises(DataError, match=f"table '{double}'.*holds example 'x00009' twice"):
        match(both)
    if double == "first":  # of the rows that are wanted, it comes once
        assert match(both, np.array([0, 1])).rows["other"].tolist() == [4, 9]


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("top1_pro", "'top1_pro': .*top1_prob"),
        ("example_id", "'example_id' is VARCHAR: expected a number"),
        ("topk_logprobs", r"is FLOAT\[\]: expected a number"),
        ("label; DROP TABLE x", "exactly one SELECT"),
        ("random()", "not decided by the row alone"),
        ("(SELECT 1)", "a subquery is refused"),
        ("number", "Referenced column"),
    ],
)
def test_bad_expressions_are_refused_in_one_line(
    tables: dict[str, Table], expression: str, message: str
) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        match(tables, None, {"b": [expression]})
    assert "\n" not in str(caught.value)


def test_sequences_that_differ_are_refused_with_both_values(tmp_path: Path) -> None:
    first = make_uneven(tmp_path / "a", rows=12)
    same = make_uneven(tmp_path / "b", rows=12, k=6)
    columns = ("num_positions", "input_ids", "position_index")
    assert match({"a": first, "b": same}, same=columns).rows["b"].tolist() == list(range(12))
    for number, name in enumerate(columns):
        changed = _with_change(first, tmp_path / str(number), 5, name)
        with pytest.raises(MismatchError, match=f"example 's00005': {name} differs: 'a' has") as e:
            match({"a": first, "c": changed}, same=columns)
        assert "'c' has" in str(e.value)
        kept = np.array([0, 4, 6])  # the row that differs is not wanted
        assert match({"a": first, "c": changed}, kept, same=columns).rows["c"].tolist() == [0, 4, 6]


def _with_change(table: Table, folder: Path, row: int, name: str) -> Table:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        values = batch[name].to_pylist()
        values[row] = values[row] + 1 if name == "num_positions" else [*values[row][:-1], 39]
        place = batch.schema.get_field_index(name)
        field = batch.schema.field(name)
        return batch.set_column(place, field, pa.array(values, field.type))

    return reordered(table, folder, np.arange(table.num_rows), change=change)


def test_examples_are_found_by_number(tables: dict[str, Table]) -> None:
    ids = column(tables["b"], "example_id")
    assert [example_of(tables["b"], row) for row in (0, 19, 20, 49)] == [
        ids[row] for row in (0, 19, 20, 49)
    ]

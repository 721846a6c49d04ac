from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError, IntegrityError, MismatchError, StorageError
from softlabels.plan import Plan, entries_table
from softlabels.store import shards
from softlabels.student.reader import Reader, Rows
from tests.plans import make_plan
from tests.tables import dense_logprobs, make_table, make_targets


def stored(rows: int, k: int, seed: int = 0, **options: Any) -> Any:
    labels = np.arange(rows) % 10
    exact = make_targets(dense_logprobs(rows, 10, seed), k, labels, seed=seed, **options)
    return shards.round_to_profile(exact, "precise")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    table = make_table(
        tmp_path / "t",
        rows=60,
        draws=3,
        temperatures=[2.0],
        shard_rows=30,
        row_group_rows=10,
        carried={"number": pa.array(range(60), pa.int64())},
    )
    return make_plan(table)


def two_tables(folder: Path, left: dict[str, Any], right: dict[str, Any]) -> Plan:
    return make_plan(
        [
            make_table(folder / "a", rows=20, shard_rows=20, row_group_rows=10, **left),
            make_table(folder / "b", rows=20, shard_rows=20, row_group_rows=10, **right),
        ]
    )


def test_an_entry_holds_what_the_table_holds(plan: Plan) -> None:
    reader = Reader(plan, columns=["number", "label"], temperatures=[1.0, 2.0])
    expected = stored(60, 5, draws=3, temperatures=[2.0])
    assert (reader.k, reader.draws) == (5, 3)
    for entry in range(6):
        rows = reader.entry(entry)
        part = expected.slice(10 * entry, 10 * entry + 10)
        for name in ("ids", "logprobs", "tail", "draws", "entropy", "label_ids", "label_ranks"):
            np.testing.assert_array_equal(getattr(rows.targets, name), getattr(part, name))
        np.testing.assert_array_equal(rows.targets.temper[2.0].shift, part.temper[2.0].shift)
        np.testing.assert_array_equal(rows.targets.temper[2.0].tail, part.temper[2.0].tail)
        assert rows.columns["number"].to_pylist() == list(range(10 * entry, 10 * entry + 10))
        assert rows.columns["label"].to_pylist() == part.label_ids.tolist()
        assert rows.example_ids[0].as_py() == f"x{10 * entry:05d}"


def test_columns_and_temperatures_not_asked_are_not_decoded(plan: Plan) -> None:
    rows = Reader(plan).entry(0)
    assert rows.columns == {}
    assert rows.targets.temper == {}


def test_an_entry_takes_the_rows_it_names(plan: Plan) -> None:
    few = replace(plan, entries=with_rows(plan, [1, 4, 9]))
    rows = Reader(few, columns=["number"]).entry(2)
    assert rows.columns["number"].to_pylist() == [21, 24, 29]
    np.testing.assert_array_equal(
        rows.targets.ids, stored(60, 5, draws=3).take(np.array([21, 24, 29])).ids
    )


def with_rows(plan: Plan, rows: list[int], num_rows: int | None = None) -> pa.Table:
    count = len(rows) if num_rows is None else num_rows
    entries = [{**e, "rows": rows, "num_rows": count} for e in plan.entries.to_pylist()]
    return entries_table(entries)


def test_entries_that_do_not_fit_their_row_group_are_refused(plan: Plan) -> None:
    for entries in (with_rows(plan, [3, 10]), with_rows(plan, [-1, 3])):
        with pytest.raises(IntegrityError, match="of a row group of 10 rows"):
            Reader(replace(plan, entries=entries)).entry(0)
    with pytest.raises(IntegrityError, match="says 3 rows, it takes 2"):
        Reader(replace(plan, entries=with_rows(plan, [3, 4], num_rows=3))).entry(0)


def test_tables_of_different_k_are_padded_to_the_largest(tmp_path: Path) -> None:
    reader = Reader(two_tables(tmp_path, {"k": 5}, {"k": 3, "seed": 1}))
    small = reader.entry(2).targets
    assert (reader.k, small.k) == (5, 5)
    assert np.all(small.ids[:, 3:] == -1)
    assert np.all(small.logprobs[:, 3:] == -np.inf)
    np.testing.assert_array_equal(small.ids[:, :3], stored(20, 3, 1).ids[:10])
    assert reader.entry(0).targets.ids.min() >= 0


def test_draws_are_read_only_where_all_tables_have_equally_many(tmp_path: Path) -> None:
    plan = two_tables(tmp_path, {"draws": 3}, {"draws": 2, "seed": 1})
    reader = Reader(plan)
    assert reader.draws == 0
    assert reader.entry(0).targets.draws is None


def test_rows_that_contradict_the_lineage_name_their_file(plan: Plan) -> None:
    table = plan.tables["a"]
    wrong = table.model_copy(update={"contents": table.contents.model_copy(update={"k": 4})})
    with pytest.raises(IntegrityError, match=r"file 'data/.*of table 'a': column 'topk_ids'"):
        Reader(replace(plan, tables={"a": wrong})).entry(0)


def test_decoded_entries_are_kept_within_the_bound(plan: Plan) -> None:
    one = Reader(plan).entry(0).nbytes
    assert one > 10 * 5 * 8
    reader = Reader(plan, cache_bytes=2 * one)
    kept = [reader.entry(number) for number in (0, 1, 0, 2)]
    assert reader.entry(0) is kept[0]
    assert reader.entry(2) is kept[3]
    assert reader.entry(1) is not kept[1]
    assert reader._cached <= 2 * one
    nothing = Reader(plan, cache_bytes=0)
    assert nothing.entry(0) is not nothing.entry(0)
    assert nothing._cached == 0


def test_kept_entries_need_no_file(plan: Plan) -> None:
    reader = Reader(plan, cache_bytes=1 << 20)
    before = reader.entry(0)
    reader._files._open.clear()
    (Path(plan.tables["a"].uri) / plan.tables["a"].files[0].path).unlink()
    assert reader.entry(0) is before
    with pytest.raises(StorageError):
        reader.entry(1)


def test_a_column_that_a_table_lacks_is_refused(plan: Plan) -> None:
    with pytest.raises(BadInputError, match=r"table 'a' has no column 'nothing'.*\['number'\]"):
        Reader(plan, columns=["number", "nothing"])


def test_a_temperature_that_is_not_stored_is_refused(plan: Plan) -> None:
    with pytest.raises(MismatchError, match=r"temperature 3\.0 is asked.*\[1\.0, 2\.0\]"):
        Reader(plan, temperatures=[2.0, 3.0])


def test_tables_of_different_label_spaces_are_refused(tmp_path: Path) -> None:
    plan = two_tables(tmp_path, {"classes": 10}, {"classes": 12})
    with pytest.raises(MismatchError, match=r"num_classes differs: table 'a' has 10.*'b' has 12"):
        Reader(plan)


def test_a_column_of_two_types_is_refused(tmp_path: Path) -> None:
    numbers = [pa.array(range(20), kind) for kind in (pa.int64(), pa.float64())]
    plan = two_tables(
        tmp_path, {"carried": {"n": numbers[0]}}, {"carried": {"n": numbers[1]}, "seed": 1}
    )
    reader = Reader(plan, columns=["n"])
    reader.entry(0)
    with pytest.raises(MismatchError, match="int64 in table 'a', double in 'b'"):
        reader.entry(2)


def test_rows_are_taken_sliced_and_joined_together(plan: Plan) -> None:
    reader = Reader(plan, columns=["number"])
    rows = Rows.concat([reader.entry(0), reader.entry(3)])
    picked = rows.take(np.array([12, 0, 0, 19])).slice(1, 4)
    assert len(rows) == 20
    assert picked.columns["number"].to_pylist() == [0, 0, 39]
    assert picked.example_ids.to_pylist() == ["x00000", "x00000", "x00039"]
    np.testing.assert_array_equal(
        picked.targets.ids, stored(60, 5, draws=3).ids[np.array([0, 0, 39])]
    )

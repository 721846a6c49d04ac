from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError, IntegrityError, MismatchError, StorageError
from softlabels.plan import POSITIONS, Plan, entries_table
from softlabels.rules import Condition, PositionRules, PositionWeight
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.student.reader import Reader
from softlabels.student.rows import Rows
from softlabels.student.ruled import keep_positions
from tests.plans import make_plan
from tests.sequences import make_uneven
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
    assert reader._recent.nbytes <= 2 * one
    nothing = Reader(plan, cache_bytes=0)
    assert nothing.entry(0) is not nothing.entry(0)
    assert nothing._recent.nbytes == 0


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
    with pytest.raises(MismatchError, match=r"temperature 3\.0 is not stored.*\[1\.0, 2\.0\]"):
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


HARD = Condition(column="entropy", operator=">", constant=2.0)
LIGHT = PositionWeight(
    where=(Condition(column="label_rank", operator="=", constant=0),), weight=0.5
)
KNOWN = PositionRules(where=(Condition(column="tail_logprob", operator="<=", constant=0),))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """40 sequences in 2 files of several row groups; for tests that leave it as it is."""
    return make_uneven(tmp_path_factory.mktemp("uneven") / "t")


def flat(rows: Rows, name: str) -> list[Any]:
    return [value for row in rows.columns[name].to_pylist() for value in row]


def passing(rows: Rows) -> list[int]:
    """Row by row, how many positions are above 2 nats."""
    assert rows.targets.entropy is not None
    hard, counts = rows.targets.entropy > 2, rows.targets.num_positions
    return [int(part.sum()) for part in np.split(hard, np.cumsum(counts)[:-1])]


def ruled(table: Table, rules: PositionRules, **options: Any) -> Plan:
    """A plan of the rows that `rules` leave a position of, each row group an entry."""
    plain = make_plan(table, **options)
    reader = Reader(plain)
    rows = []
    for number, entry in enumerate(plain.entries.to_pylist()):
        found = reader.entry(number)
        counts = found.targets.num_positions
        parts = np.split(rules.keep(found.targets), np.cumsum(counts)[:-1])
        taken = entry["rows"] or list(range(entry["num_rows"]))
        kept = [row for row, part in zip(taken, parts, strict=True) if part.any()]
        rows.append({**entry, "rows": kept, "num_rows": len(kept)})
    tables = {"a": plain.tables["a"].model_copy(update={"positions": rules})}
    return replace(plain, entries=entries_table(rows), tables=tables, features=(POSITIONS,))


def test_positions_are_those_that_the_rules_keep(uneven: Table) -> None:
    columns = ["position_index", "input_ids", "num_positions", "topk_ids", "label_ids"]
    plan = ruled(uneven, PositionRules(where=(HARD,), weights=(LIGHT,)))
    reader, every = Reader(plan, columns), Reader(make_plan(uneven), columns)
    seen = 0
    for number in range(plan.entries.num_rows):
        rows, whole = reader.entry(number), every.entry(number)
        taken = np.flatnonzero(passing(whole))
        whole = whole.take(taken)
        assert whole.targets.entropy is not None
        assert whole.targets.label_ranks is not None
        assert whole.targets.label_ids is not None
        keep = whole.targets.entropy > 2
        assert rows.targets.num_positions.tolist() == passing(whole)
        for name in ("ids", "logprobs", "tail", "draws", "entropy", "label_ids", "label_ranks"):
            part = getattr(whole.targets, name)[keep]
            np.testing.assert_array_equal(getattr(rows.targets, name), part)
        assert rows.position_weights is not None
        light = whole.targets.label_ranks[keep] == 0
        assert rows.position_weights.tolist() == np.where(light, 0.5, 1.0).tolist()
        assert (
            flat(rows, "position_index") == np.array(flat(whole, "position_index"))[keep].tolist()
        )
        assert flat(rows, "topk_ids") == rows.targets.ids.reshape(-1).tolist()
        assert flat(rows, "label_ids") == whole.targets.label_ids[keep].tolist()
        assert rows.columns["num_positions"].to_pylist() == rows.targets.num_positions.tolist()
        assert rows.columns["input_ids"].equals(whole.columns["input_ids"])
        assert rows.columns["position_index"].type == whole.columns["position_index"].type
        rows.columns["topk_ids"].validate(full=True)
        seen += len(keep) - len(rows.targets.ids)
    assert seen > 50


def test_weights_go_with_their_positions(uneven: Table) -> None:
    plan = ruled(uneven, PositionRules(where=(HARD,), weights=(LIGHT,)))
    reader = Reader(plan, ["position_index"])
    rows = Rows.concat([reader.entry(0), reader.entry(1)])
    order = np.array([3, 0, 3, len(rows) - 1, 1])
    picked = rows.take(order).slice(1, 5)
    assert rows.position_weights is not None
    assert picked.position_weights is not None
    parts = np.split(rows.position_weights, np.cumsum(rows.targets.num_positions)[:-1])
    assert (
        picked.position_weights.tolist() == np.concatenate([parts[i] for i in order[1:]]).tolist()
    )
    assert picked.targets.label_ranks is not None
    light = picked.targets.label_ranks == 0
    assert picked.position_weights.tolist() == np.where(light, 0.5, 1.0).tolist()
    assert len({*picked.position_weights.tolist()}) == 2
    assert rows.nbytes - replace(rows, position_weights=None).nbytes == 4 * len(rows.targets.ids)


def test_weights_of_one_table_are_1_in_the_others(uneven: Table, tmp_path: Path) -> None:
    plain = make_uneven(tmp_path / "other", rows=10, prefix="o", seed=1)
    plan = make_plan([uneven, plain])
    weighing = plan.tables["a"].model_copy(update={"positions": PositionRules(weights=(LIGHT,))})
    reader = Reader(replace(plan, tables={**plan.tables, "a": weighing}))
    last = reader.entry(plan.entries.num_rows - 1)
    both = Rows.concat([reader.entry(0), last])
    assert both.position_weights is not None
    assert len(both.position_weights) == len(both.targets.ids)
    assert last.position_weights is not None
    assert set(last.position_weights.tolist()) == {1.0}
    assert Reader(plan).entry(0).position_weights is None
    kept = replace(
        plan, tables={**plan.tables, "a": weighing.model_copy(update={"positions": KNOWN})}
    )
    assert Reader(kept).entry(0).position_weights is None


def test_rules_that_keep_all_copy_nothing(uneven: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(uneven)
    table = plan.tables["a"].model_copy(update={"positions": KNOWN})
    copied = []

    def counted(targets: Any, *arguments: Any) -> Any:
        copied.append(targets)
        return keep_positions(targets, *arguments)

    monkeypatch.setattr("softlabels.student.reader.keep_positions", counted)
    Reader(replace(plan, tables={"a": table})).entry(0)
    assert not copied
    Reader(ruled(uneven, PositionRules(where=(HARD,)))).entry(0)
    assert copied


def test_a_row_that_the_rules_leave_empty_is_refused(uneven: Table) -> None:
    plan = ruled(uneven, PositionRules(where=(HARD,)))
    never = PositionRules(where=(HARD.model_copy(update={"constant": 2.8}),))
    table = plan.tables["a"].model_copy(update={"positions": never})
    with pytest.raises(
        IntegrityError,
        match=r"file 'data/.*of table 'a': example 's\d+' is left without a .*entropy > 2.8",
    ):
        Reader(replace(plan, tables={"a": table})).entry(0)


def test_entries_of_one_row_group_decode_it_once(plan: Plan, monkeypatch: Any) -> None:
    one = plan.entries.to_pylist()[0]
    rows: list[list[int] | None] = [[1, 4], [4, 9], None, [2], [9, 4]]
    entries = [{**one, "rows": r, "num_rows": 10 if r is None else len(r)} for r in rows]
    for chosen in ([0, 1, 3, 4], [0, 1, 2, 3, 4]):
        several = replace(plan, entries=entries_table([entries[i] for i in chosen]))
        reader = Reader(several, columns=["number"])
        decode = reader._decode
        decoded: list[int] = []

        def counted(
            group: int, wait: bool, decode: Any = decode, decoded: list[int] = decoded
        ) -> Rows:
            decoded.append(group)
            return decode(group, wait)  # type: ignore[no-any-return]

        monkeypatch.setattr(reader, "_decode", counted)
        for number, entry in enumerate(chosen):
            found = reader.entry(number)
            wanted = rows[entry] or list(range(10))
            assert found.columns["number"].to_pylist() == wanted
            np.testing.assert_array_equal(
                found.targets.ids, stored(60, 5, draws=3).ids[np.array(wanted)]
            )
        assert decoded == [0]
        # Only what some entry takes is kept.
        (kept,) = reader._recent.held.values()
        assert len(kept) == (10 if 2 in chosen else 4)
    assert reader.entry(2) is kept


def test_the_same_rows_by_other_rules_are_decoded_for_each(uneven: Table) -> None:
    plan = ruled(uneven, PositionRules(where=(HARD,)))
    bare = plan.tables["a"].model_copy(update={"name": "b", "positions": None})
    entries = plan.entries.to_pylist()[:1]
    both = replace(
        plan,
        tables={**plan.tables, "b": bare},
        entries=entries_table([*entries, {**entries[0], "table": "b"}]),
    )
    reader = Reader(both)
    few, all_positions = reader.entry(0), reader.entry(1)
    assert few.example_ids.equals(all_positions.example_ids)
    assert len(few.targets.ids) < len(all_positions.targets.ids)


@pytest.mark.parametrize(("rows", "named"), [([0, 11], 11), ([-1, 3], -1)])
def test_an_entry_that_lies_about_itself_is_named_whoever_reads_its_group(
    plan: Plan, rows: list[int], named: int
) -> None:
    one = plan.entries.to_pylist()[0]
    wrong = [{**one, "rows": rows, "num_rows": 2}, {**one, "rows": [1], "num_rows": 1}]
    reader = Reader(replace(plan, entries=entries_table(wrong)))
    with pytest.raises(
        IntegrityError, match=f"entry 0 of the plan takes row {named} of .* 10 rows"
    ):
        reader.entry(1)


def test_lists_that_contradict_their_positions_are_refused() -> None:
    targets = stored(4, 2)
    lists = pa.array([[1], [2], [3, 4], []], pa.list_(pa.int32()))
    with pytest.raises(IntegrityError, match="column 'position_index' holds 4 values"):
        keep_positions(targets, {"position_index": lists}, np.array([True, False, True, True]))
    own, _ = keep_positions(targets, {"carried": lists}, np.array([True, False, True, True]))
    assert own.num_positions.tolist() == [1, 0, 1, 1]

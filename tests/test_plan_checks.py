"""What a stranger's plan with a right fingerprint may not say of its rows."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from softlabels.errors import IntegrityError
from softlabels.plan import ENSEMBLE, ENTRIES, Plan, entries_table
from softlabels.plan_checks import MOST_READINGS, check_entries
from softlabels.plan_entries import ENSEMBLE_ENTRIES
from softlabels.store.table import Table
from tests.plans import make_ensemble_plan, make_plan
from tests.tables import make_table
from tests.test_plan import rewrite

HUGE = 2**31 - 1


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("checks") / "labels"
    return make_table(folder, rows=60, shard_rows=30, row_group_rows=15)


@pytest.fixture(scope="module")
def plan(table: Table) -> Plan:
    return make_plan(
        {"main": table}, repeats=[2], keep=lambda entry, rows: [0, 3, 7] if entry == 1 else None
    )


def changed(plan: Plan, change: Callable[[list[dict[str, Any]]], object], offsets: bool) -> Plan:
    """The plan with changed entries; `offsets`: counted anew."""
    rows = plan.entries.to_pylist()
    change(rows)
    if offsets:
        return replace(plan, entries=entries_table(rows))
    return replace(plan, entries=pa.Table.from_pylist(rows, schema=plan.entries.schema))


def entry(number: int, **values: Any) -> Callable[[list[dict[str, Any]]], object]:
    return lambda rows: rows[number].update(values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (entry(1, rows=[-5, 1, 2]), "entry 1 of the plan takes row -5, its file has 30"),
        (entry(1, rows=[0, 1, 30]), "entry 1 of the plan takes row 30, its file has 30"),
        (entry(1, rows=[0, HUGE], num_rows=2), f"takes row {HUGE}, its file has 30"),
        (entry(1, rows=[]), "entry 1 of the plan says 3 rows, it lists 0"),
        (entry(1, rows=[1, 2]), "entry 1 of the plan says 3 rows, it lists 2"),
        (entry(1, rows=[3, 0, 7]), "entry 1 of the plan lists row 0 after row 3: expected rising"),
        (entry(1, rows=[0, 3, 3]), "entry 1 of the plan lists row 3 after row 3: expected rising"),
        (entry(2, num_rows=HUGE), f"entry 2 of the plan takes {HUGE} rows, its file has 30"),
        (entry(2, num_rows=31), "entry 2 of the plan takes 31 rows, its file has 30"),
        (entry(2, num_rows=-1), "entry 2 of the plan takes -1 rows"),
        (entry(0, row_group=-1), "entry 0 of the plan reads row group -1"),
        (entry(0, stage=-1), "entry 0 of the plan is of stage -1"),
        (entry(3, repeats=0), "entry 3 of the plan comes 0 times"),
        (entry(3, repeats=-2), "entry 3 of the plan comes -2 times"),
        (entry(3, repeats=HUGE), f"an epoch reads entries {HUGE + 6} times, at most"),
        (entry(0, loss_weight=float("inf")), "entry 0 of the plan has the loss weight inf"),
        (entry(0, loss_weight=float("nan")), "entry 0 of the plan has the loss weight nan"),
        (entry(0, loss_weight=-1.0), r"entry 0 of the plan has the loss weight -1\.0"),
        (
            lambda rows: [row.update(loss_weight=0.0) for row in rows],
            "every entry of the plan has the loss weight 0",
        ),
    ],
)
def test_entries_that_cannot_be_meant_are_refused(
    plan: Plan, tmp_path: Path, change: Callable[[list[dict[str, Any]]], object], reason: str
) -> None:
    changed(plan, change, True).write(tmp_path / "p")
    with pytest.raises(IntegrityError, match=reason) as caught:
        Plan.read(tmp_path / "p")
    assert "\n" not in str(caught.value)


def test_offsets_must_be_the_rows_before(plan: Plan, tmp_path: Path) -> None:
    for number, offset in ((0, 1), (2, 35), (3, -(2**63))):
        changed(plan, entry(number, offset=offset), False).write(tmp_path / "p")
        with pytest.raises(IntegrityError, match=f"entry {number} of the plan has offset {offset}"):
            Plan.read(tmp_path / "p")


def test_entries_of_no_weight_may_stand_beside_others(plan: Plan, tmp_path: Path) -> None:
    changed(plan, entry(0, loss_weight=0.0), True).write(tmp_path / "p")
    assert Plan.read(tmp_path / "p").entries["loss_weight"].to_pylist() == [0.0, 1.0, 1.0, 1.0]


def test_null_row_numbers_are_refused(plan: Plan, tmp_path: Path) -> None:
    place = ENTRIES.get_field_index("rows")
    rows = plan.entries["rows"].to_pylist()
    rows[1][1] = None
    loose = pa.array(rows, pa.list_(pa.int32()))
    made = replace(plan, entries=plan.entries.set_column(place, "rows", loose))
    made.write(tmp_path / "p")
    with pytest.raises(IntegrityError, match="nulls"):
        Plan.read(tmp_path / "p")


def test_the_rows_of_an_ensemble_are_checked_too(table: Table, tmp_path: Path) -> None:
    other = make_table(tmp_path / "b", rows=60, shard_rows=30, row_group_rows=15, seed=1)
    plan = make_ensemble_plan({"a": table, "b": other})
    assert plan.entries.schema.equals(ENSEMBLE_ENTRIES)
    changed(plan, entry(0, repeats=0), True).write(tmp_path / "p")
    with pytest.raises(IntegrityError, match="entry 0 of the plan comes 0 times"):
        Plan.read(tmp_path / "p")
    assert plan.features == (ENSEMBLE,)


def test_rows_are_checked_in_blocks_as_in_one(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [[0, 5, 9], [3], None, [1, 2]]
    entries = entries_table(
        [
            row | {"rows": rows, "num_rows": 15 if rows is None else len(rows)}
            for row, rows in zip(plan.entries.to_pylist(), listed, strict=True)
        ]
    )
    files = {("main", file.path): file.num_rows for file in plan.tables["main"].files}
    for rows in (1, 3, 4, 100):
        monkeypatch.setattr("softlabels.plan_checks.BLOCK_ROWS", rows)
        check_entries(entries, files)
        wrong = changed(replace(plan, entries=entries), entry(3, rows=[2, 1]), True)
        with pytest.raises(IntegrityError, match="entry 3 of the plan lists row 1 after row 2"):
            check_entries(wrong.entries, files)


def test_readings_an_epoch_are_bounded_in_all(plan: Plan, tmp_path: Path) -> None:
    half = MOST_READINGS // 2

    def of(*repeats: int) -> Plan:
        rows = plan.entries.to_pylist()[: len(repeats)]
        each = [row | {"repeats": times} for row, times in zip(rows, repeats, strict=True)]
        return replace(plan, entries=entries_table(each))

    of(half, half).write(tmp_path / "p")
    assert Plan.read(tmp_path / "p").num_rows == half * 18
    of(half, half + 1).write(tmp_path / "p")
    with pytest.raises(IntegrityError, match=f"an epoch reads entries {2 * half + 1} times"):
        Plan.read(tmp_path / "p")


def test_checking_millions_of_rows_takes_no_time(plan: Plan, tmp_path: Path) -> None:
    file = plan.tables["main"].files[0].model_copy(update={"num_rows": 2_000_000})
    tables = {"main": plan.tables["main"].model_copy(update={"files": (file,)})}
    offsets, values = pa.array([0, 1_900_000], pa.int32()), pa.array(range(100_000, 2_000_000))
    rows = pa.ListArray.from_arrays(
        offsets, values.cast(pa.int32()), type=ENTRIES.field("rows").type
    )
    one = entries_table([plan.entries.to_pylist()[0] | {"file": file.path, "repeats": 1}])
    for name, column in (("rows", rows), ("num_rows", pa.array([1_900_000], pa.int32()))):
        one = one.set_column(ENTRIES.get_field_index(name), ENTRIES.field(name), column)
    replace(plan, tables=tables, entries=one).write(tmp_path / "p")
    before = time.perf_counter()
    assert Plan.read(tmp_path / "p").num_rows == 1_900_000
    assert time.perf_counter() - before < 1


@pytest.mark.parametrize("name", ["num_rows", "size"])
def test_files_hold_no_negative_counts(plan: Plan, tmp_path: Path, name: str) -> None:
    file = plan.tables["main"].files[0]
    for wrong in (-1, 2**63):
        files = (file.model_copy(update={name: wrong}), *plan.tables["main"].files[1:])
        table = plan.tables["main"].model_copy(update={"files": files})
        replace(plan, tables={"main": table}).write(tmp_path / "p")
        with pytest.raises(IntegrityError, match=name):
            Plan.read(tmp_path / "p")


@pytest.mark.parametrize("recipe", [[], [["seed", 0]], "x", None])
def test_a_recipe_that_is_no_mapping_is_refused(plan: Plan, tmp_path: Path, recipe: Any) -> None:
    replace(plan, recipe={}).write(tmp_path / "p")
    rewrite(tmp_path / "p", lambda meta: meta.update(recipe=recipe))
    with pytest.raises(IntegrityError):
        Plan.read(tmp_path / "p")


def test_a_recipe_of_a_thousand_levels_is_refused(plan: Plan, tmp_path: Path) -> None:
    deep: Any = 0
    for _ in range(200):
        deep = {"a": deep}
    replace(plan, recipe={"sources": deep}).write(tmp_path / "p")
    with pytest.raises(IntegrityError, match="p': its recipe is nested"):
        Plan.read(tmp_path / "p")


@pytest.mark.parametrize("version", ["1e999", "NaN", "0.5", "true", '"1"'])
def test_a_format_version_that_is_no_number_is_refused(
    plan: Plan, tmp_path: Path, version: str
) -> None:
    plan.write(tmp_path / "p")
    rewrite(
        tmp_path / "p",
        lambda meta: (
            json.dumps(meta).replace('"format_version": 1', f'"format_version": {version}').encode()
        ),
    )
    with pytest.raises(IntegrityError, match="is not a whole softlabels plan"):
        Plan.read(tmp_path / "p")

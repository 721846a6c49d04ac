"""Plans whose rows have several teachers: round trips, what the fingerprint covers, refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import IntegrityError
from softlabels.plan import ENSEMBLE, ENTRIES, Plan, entries_table, join_entries
from softlabels.plan_entries import ENSEMBLE_ENTRIES, MEMBERS, check_members
from softlabels.store.table import Table
from tests.plans import make_ensemble_plan, make_plan
from tests.tables import make_table


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    folder = tmp_path_factory.mktemp("ensembles")
    return {
        "a": make_table(folder / "a", rows=60, shard_rows=30, row_group_rows=15),
        "b": make_table(
            folder / "b", rows=50, shard_rows=50, row_group_rows=20, seed=1, temperatures=[2]
        ),
    }


@pytest.fixture(scope="module")
def plan(tables: dict[str, Table]) -> Plan:
    """Five entries of two teachers and two of one, a row of them with the weights 1/4 and 3/4."""
    return make_ensemble_plan(
        tables,
        weights={"b": lambda name: 1 + int(name[1:]) % 3},
        temperatures={"b": 2},
        partial=True,
    )


def rebuilt(plan: Plan, change: Callable[[list[dict[str, Any]]], object]) -> Plan:
    """The plan with changed entries, and a right fingerprint, as a stranger would make it."""
    rows = plan.entries.to_pylist()
    change(rows)
    return replace(plan, entries=pa.Table.from_pylist(rows, schema=ENSEMBLE_ENTRIES))


def test_a_plan_with_members_comes_back_as_it_was(plan: Plan, tmp_path: Path) -> None:
    plan.write(tmp_path / "p")
    read = Plan.read(tmp_path / "p")
    assert read.entries.equals(plan.entries)
    assert (read.tables, read.features, read.fingerprint) == (
        plan.tables,
        (ENSEMBLE,),
        plan.fingerprint,
    )
    assert read.tables["b"].temperature == 2
    assert (read.num_rows, read.num_members) == (60, 2)
    read.write(tmp_path / "q")
    assert (tmp_path / "p").read_bytes() == (tmp_path / "q").read_bytes()
    pieces = pa.concat_tables([plan.entries.slice(i, 1) for i in range(plan.entries.num_rows)])
    assert replace(plan, entries=pieces).fingerprint == plan.fingerprint


def test_members_are_read_slot_by_slot(plan: Plan) -> None:
    expected = plan.entries.to_pylist()
    for source in (plan, replace(plan, entries=plan.entries.slice(1))):
        wanted = expected[-source.entries.num_rows :]
        for slot in (0, 1):
            found = source.member(slot)
            assert found is not None
            assert found.schema.equals(ENTRIES)
            weights = source.member_weights(slot).to_pylist()
            for entry, row, weight in zip(wanted, found.to_pylist(), weights, strict=True):
                members = entry["members"]
                same = ("stage", "offset", "repeats", "loss_weight")
                assert {n: row[n] for n in same} == {n: entry[n] for n in same}
                if members is not None:
                    read = ("table", "file", "row_group", "rows")
                    assert {n: row[n] for n in read} == {n: members[slot][n] for n in read}
                    assert (row["num_rows"], weight) == (
                        entry["num_rows"],
                        members[slot]["weights"],
                    )
                elif slot == 0:
                    assert row == {n: v for n, v in entry.items() if n != "members"}
                    assert weight == [1.0] * entry["num_rows"]
                else:
                    assert (row["num_rows"], row["rows"], weight) == (0, [], [])
                    assert (row["table"], row["file"]) == (entry["table"], entry["file"])
        assert source.member(2) is None


def test_a_plain_plan_has_one_member(tables: dict[str, Table]) -> None:
    plain = make_plan(tables["a"], keep=lambda entry, rows: [0, 2] if entry else None)
    assert plain.num_members == 1
    assert plain.entries.equals(plain.member(0))
    assert plain.member(1) is None
    assert plain.member_weights(0).to_pylist() == [[1.0] * 15, *([[1.0] * 2] * 3)]
    assert plain.member_weights(1).to_pylist() == [[]] * 4
    empty = replace(plain, entries=entries_table([]))
    assert (empty.num_members, empty.member_weights(0).to_pylist()) == (1, [])


def test_null_rows_of_a_member_are_all_rows(tables: dict[str, Table]) -> None:
    made = rebuilt(
        make_ensemble_plan({"a": tables["a"], "b": tables["a"]}),
        lambda rows: [m.update(rows=None) for r in rows for m in (r, *r["members"])],
    )
    found = made.member(1)
    assert found is not None
    assert found["rows"].to_pylist() == [None] * 4
    assert found["num_rows"].to_pylist() == [15] * 4


def test_joined_entries_count_their_rows_anew(plan: Plan, tables: dict[str, Table]) -> None:
    plain = make_plan(tables["a"], repeats=[2]).entries
    joined = join_entries([plain.drop_columns(["offset"]), plan.entries])
    assert joined.schema.equals(ENSEMBLE_ENTRIES)
    assert joined["members"].num_chunks == 1
    assert joined["members"].to_pylist()[:4] == [None] * 4
    assert joined["offset"].to_pylist()[:6] == [0, 30, 60, 90, 120, 135]
    assert join_entries([plain, plain]).schema.equals(ENTRIES)
    assert join_entries([]).equals(ENTRIES.empty_table())


def _swap(name: str, value: Any, slot: int = 1) -> Callable[[list[dict[str, Any]]], object]:
    return lambda rows: rows[0]["members"][slot].update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        _swap("table", "a"),
        _swap("file", "data/x"),
        _swap("row_group", 1),
        _swap("rows", list(range(14, -1, -1))),
        _swap("rows", None),
        _swap("weights", [0.5] * 15),
        lambda rows: rows[0]["members"].reverse(),
        lambda rows: rows[0]["members"].pop(),
        lambda rows: rows[0].update(members=None),
        lambda rows: rows[1]["members"].insert(0, rows[0]["members"].pop()),
        lambda rows: rows[1].update(members=rows[0]["members"]),
    ],
)
def test_the_fingerprint_covers_members(
    plan: Plan, change: Callable[[list[dict[str, Any]]], object]
) -> None:
    assert rebuilt(plan, lambda rows: None).fingerprint == plan.fingerprint
    assert rebuilt(plan, change).fingerprint != plan.fingerprint


def test_the_fingerprint_covers_temperatures_and_files_by_content(plan: Plan) -> None:
    table = plan.tables["b"]
    colder = {**plan.tables, "b": table.model_copy(update={"temperature": 1.0})}
    assert replace(plan, tables=colder).fingerprint != plan.fingerprint
    (file,) = table.files
    moved = table.model_copy(update={"files": (file.model_copy(update={"path": "data/x"}),)})

    def rename(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for member in row["members"] or ():
                if member["table"] == "b":
                    member["file"] = "data/x"

    there = replace(rebuilt(plan, rename), tables={**plan.tables, "b": moved})
    assert there.fingerprint == plan.fingerprint


def test_a_temperature_of_1_is_not_written(tables: dict[str, Table], tmp_path: Path) -> None:
    make_plan(tables["b"]).write(tmp_path / "p")
    meta = pq.read_schema(tmp_path / "p").metadata[b"softlabels.plan"]
    assert "temperature" not in json.loads(meta)["tables"][0]
    assert MEMBERS.name not in pq.read_schema(tmp_path / "p").names


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap("weights", [NAN] * 15), "entry 0 of the plan has a member's weight below 0 or not"),
        (_swap("weights", [-0.5] * 15), "weight below 0 or not finite"),
        (_swap("weights", [float("inf")] * 15), "weight below 0 or not finite"),
        (_swap("weights", [0.9] * 15), "entry 0 of the plan has a row whose members' weights do"),
        (_swap("weights", [0.5] * 14), "weights are not one for each row"),
        (_swap("weights", []), "weights are not one for each row"),
        (_swap("rows", [0] * 14), "rows are not as many as its own"),
        (_swap("rows", [50] * 15), "a member's row that its file has not"),
        (_swap("rows", [-1] * 15), "a member's row that its file has not"),
        (_swap("file", "data/x"), "reads file 'data/x' of table 'b', not listed"),
        (_swap("table", "c"), "of table 'c', not listed"),
        (lambda rows: rows[0].update(members=[]), "entry 0 of the plan has a list of no members"),
        (lambda rows: rows[0]["members"].append(rows[0]["members"][1]), "two members of one table"),
        (lambda rows: rows[0]["members"].reverse(), "a first member that is not itself"),
        (_swap("row_group", 1, slot=0), "a first member that is not itself"),
        (_swap("rows", None, slot=0), "a first member that is not itself"),
        (_swap("rows", list(range(14, -1, -1)), slot=0), "other rows than its first member"),
        (
            lambda rows: rows[3]["members"][1].update(weights=[1.0] * rows[3]["num_rows"]),
            "entry 3 of the plan has a row",
        ),
        (lambda rows: rows[0].update(num_rows=2**31 - 1), "takes 2147483647 rows, its file has"),
        (lambda rows: rows[0].update(num_rows=-1), "takes -1 rows, its file has"),
    ],
)
def test_members_of_a_stranger_are_checked(
    plan: Plan,
    tmp_path: Path,
    change: Callable[[list[dict[str, Any]]], object],
    message: str,
) -> None:
    rebuilt(plan, change).write(tmp_path / "p")
    with pytest.raises(IntegrityError, match=message) as caught:
        Plan.read(tmp_path / "p")
    assert "\n" not in str(caught.value)


def test_members_are_checked_in_blocks_as_in_one(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softlabels.plan_entries.BLOCK_ROWS", 12)
    listed = {(t.name, f.path): f.num_rows for t in plan.tables.values() for f in t.files}
    check_members(plan.entries, listed)
    wrong = rebuilt(plan, lambda rows: rows[4]["members"][1].update(weights=[0.1] * 5))
    with pytest.raises(IntegrityError, match="entry 4 of the plan has a row"):
        check_members(wrong.entries, listed)


def test_members_and_their_feature_come_together(plan: Plan, tmp_path: Path) -> None:
    replace(plan, features=()).write(tmp_path / "p")
    with pytest.raises(IntegrityError):
        Plan.read(tmp_path / "p")
    replace(plan, entries=plan.member(0)).write(tmp_path / "p")
    with pytest.raises(IntegrityError):
        Plan.read(tmp_path / "p")


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (3.0, r"'b' is read at temperature 3.0, it stores \[1.0, 2.0\]"),
        (0.0, "is not a whole softlabels plan"),
        (-2.0, "is not a whole softlabels plan"),
    ],
)
def test_a_temperature_must_be_stored(
    plan: Plan, tmp_path: Path, temperature: float, message: str
) -> None:
    table = plan.tables["b"].model_copy(update={"temperature": temperature})
    replace(plan, tables={**plan.tables, "b": table}).write(tmp_path / "p")
    with pytest.raises(IntegrityError, match=message):
        Plan.read(tmp_path / "p")


def test_a_temperature_must_be_a_feature(tables: dict[str, Table], tmp_path: Path) -> None:
    plain = make_plan({"b": tables["b"]})
    table = plain.tables["b"].model_copy(update={"temperature": 2.0})
    replace(plain, tables={"b": table}).write(tmp_path / "p")
    with pytest.raises(
        IntegrityError, match=r"'b' has a temperature, the plan's features are \[\]"
    ):
        Plan.read(tmp_path / "p")


def test_a_flipped_bit_never_gives_other_members(plan: Plan, tmp_path: Path) -> None:
    plan.write(tmp_path / "p")
    whole = (tmp_path / "p").read_bytes()
    for at in np.linspace(4, len(whole) - 5, 150).astype(int):
        data = bytearray(whole)
        data[at] ^= 4
        (tmp_path / "q").write_bytes(data)
        try:
            assert Plan.read(tmp_path / "q").entries.equals(plan.entries)
        except IntegrityError:
            continue

"""The plan file: round trips, what its fingerprint covers, what is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabels.errors import BadInputError, IntegrityError
from softlabels.fingerprint import canonical_json
from softlabels.plan import (
    ENTRIES,
    FORMAT_VERSION,
    POSITIONS,
    Plan,
    SourceReport,
    entries_table,
)
from softlabels.rules import Condition, PositionRules, PositionWeight
from softlabels.store.table import Table
from tests.plans import make_plan
from tests.tables import make_table

META = b"softlabels.plan"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("plans") / "labels"
    return make_table(folder, rows=60, shard_rows=30, row_group_rows=15)


@pytest.fixture
def plan(table: Table) -> Plan:
    made = make_plan(
        {"main": table},
        repeats=[2],
        keep=lambda entry, rows: [0, 3, 7] if entry == 1 else None,
        recipe={"sources": {"main": {"where": "margin > 0.1"}}, "seed": 3},
    )
    report = SourceReport(
        source="main",
        table="main",
        rows=60,
        dropped={"where": 12},
        kept=48,
        reads=96,
        share_asked=None,
        share=1.0,
        loss_weight=1.0,
    )
    return replace(made, report=(report,))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the metadata of a plan file, as a hand with an editor would."""
    stored = pq.read_table(path)
    meta = json.loads(stored.schema.metadata[META])
    changed = change(meta)
    text = changed if isinstance(changed, bytes) else json.dumps(meta).encode()
    pq.write_table(stored.replace_schema_metadata({META: text}), path)


def test_a_plan_comes_back_as_it_was(plan: Plan, tmp_path: Path) -> None:
    plan.write(tmp_path / "p.plan")
    read = Plan.read(tmp_path / "p.plan")
    assert read.entries.equals(plan.entries)
    assert (read.tables, read.recipe, read.report, read.features) == (
        plan.tables,
        plan.recipe,
        plan.report,
        plan.features,
    )
    assert read.fingerprint == plan.fingerprint
    assert read.num_rows == plan.num_rows == 2 * (15 + 3 + 15 + 15)
    assert read.location == str(tmp_path)


def test_equal_plans_give_equal_bytes(plan: Plan, table: Table, tmp_path: Path) -> None:
    two = make_plan({"b": table, "a": table})
    turned = replace(
        two, tables={name: two.tables[name] for name in sorted(two.tables, reverse=True)}
    )
    pieces = [two.entries.slice(i, 1) for i in range(two.entries.num_rows)]
    chunked = replace(two, entries=pa.concat_tables(pieces))
    noted = replace(two, entries=two.entries.replace_schema_metadata({"made by": "polars"}))
    found = []
    for number, made in enumerate((two, turned, chunked, noted)):
        assert made.fingerprint == two.fingerprint
        made.write(tmp_path / str(number))
        found.append((tmp_path / str(number)).read_bytes())
    assert len(set(found)) == 1
    plan.write(tmp_path / "x")
    Plan.read(tmp_path / "x").write(tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_the_fingerprint_does_not_depend_on_places(plan: Plan, tmp_path: Path) -> None:
    table = plan.tables["main"]
    moved = {"main": table.model_copy(update={"uri": "s3://elsewhere/labels"})}
    assert replace(plan, tables=moved, location="gs://x").fingerprint == plan.fingerprint
    assert replace(plan, report=()).fingerprint == plan.fingerprint


@pytest.mark.parametrize("name", ENTRIES.names)
def test_any_changed_entry_changes_the_fingerprint(plan: Plan, name: str) -> None:
    for row in (0, 1, plan.entries.num_rows - 1):
        rows = plan.entries.to_pylist()
        old = rows[row][name]
        if name == "rows":
            rows[row][name] = [0] if old is None else None
        elif isinstance(old, str):
            rows[row][name] = old + "x"
        else:
            rows[row][name] = old + 1
        changed = replace(plan, entries=pa.Table.from_pylist(rows, schema=ENTRIES))
        assert changed.fingerprint != plan.fingerprint, (name, row)


def test_moved_row_indexes_and_moved_entries_change_the_fingerprint(plan: Plan) -> None:
    def with_rows(*rows: list[int] | None) -> str:
        entry = {**plan.entries.to_pylist()[0], "num_rows": 1}
        entries = [{**entry, "rows": r} for r in rows]
        return replace(plan, entries=entries_table(entries)).fingerprint

    found = [
        with_rows([1], [2, 3]),
        with_rows([1, 2], [3]),
        with_rows(None, [1, 2, 3]),
        with_rows([], [1, 2, 3]),
        with_rows([1, 2, 3], None),
        with_rows([1, 2, 3]),
    ]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"snapshot_digest": "f" * 64},
        {"files": ()},
    ],
)
def test_what_a_table_holds_changes_the_fingerprint(plan: Plan, change: dict[str, Any]) -> None:
    table = plan.tables["main"].model_copy(update=change)
    assert replace(plan, tables={"main": table}).fingerprint != plan.fingerprint


def test_recipe_features_and_contents_change_the_fingerprint(plan: Plan) -> None:
    table = plan.tables["main"]
    contents = table.contents.model_copy(update={"seed": 9})
    changed = [
        replace(plan, recipe={**plan.recipe, "seed": 4}),
        replace(plan, features=("x",)),
        replace(plan, tables={"main": table.model_copy(update={"contents": contents})}),
    ]
    assert len({p.fingerprint for p in (plan, *changed)}) == 4


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(meta: dict[str, Any]) -> None:
        inner: Any = meta
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("recipe", "seed", value=4),
        _set("fingerprint", value="0" * 64),
        _set("tables", 0, "snapshot_digest", value="0" * 64),
        _set("tables", 0, "contents", "k", value=4),
        _set("tables", 0, "contents", "classes", 0, value="cat"),
        _set("tables", 0, "files", 0, "sha256", value="0" * 64),
        _set("tables", 0, "files", 0, "footer_sha256", value="0" * 64),
        _set("tables", 0, "files", 0, "size", value=1),
        _set("tables", 0, "files", 0, "num_rows", value=1),
    ],
)
def test_tampered_metadata_is_refused(
    plan: Plan, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    plan.write(tmp_path / "p")
    rewrite(tmp_path / "p", change)
    with pytest.raises(IntegrityError, match="it was changed after it was made"):
        Plan.read(tmp_path / "p")


@pytest.mark.parametrize(
    "change",
    [
        _set("tables", value=[]),
        _set("tables", value=None),
        _set("tables", 0, value="main"),
        _set("tables", 0, "extra", value=1),
        _set("recipe", value=[1]),
        _set("recipe", value=None),
        _set("recipe", value={"x": float("nan")}),
        _set("report", value=[{"source": "x"}]),
        _set("features", value=3),
        _set("features", value=[[]]),
        _set("format_version", value="one"),
        _set("format_version", value=None),
        lambda meta: meta.pop("fingerprint"),
        lambda meta: meta.clear(),
        lambda meta: b"[]",
        lambda meta: b"{",
        lambda meta: b"\xff",
        lambda meta: b"[" * 100_000,
    ],
)
def test_metadata_that_is_nonsense_is_refused_in_one_line(
    plan: Plan, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    plan.write(tmp_path / "p")
    rewrite(tmp_path / "p", change)
    with pytest.raises(IntegrityError) as caught:
        Plan.read(tmp_path / "p")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_tampered_entries_are_refused(plan: Plan, tmp_path: Path) -> None:
    plan.write(tmp_path / "p")
    stored = pq.read_table(tmp_path / "p")
    cut = stored.slice(1)
    no_weight = stored.drop_columns(["loss_weight"])
    nulls = stored.set_column(
        0, pa.field("stage", pa.int32()), pa.nulls(stored.num_rows, pa.int32())
    )
    for changed in (cut, no_weight, nulls, stored.slice(0, 0)):
        pq.write_table(changed, tmp_path / "q")
        with pytest.raises(IntegrityError):
            Plan.read(tmp_path / "q")


def test_a_file_that_is_no_plan_is_refused(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="there is no plan at"):
        Plan.read(tmp_path / "none")
    plan.write(tmp_path / "p")
    whole = (tmp_path / "p").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").write_bytes(b"")
    for name in ("cut", "empty"):
        with pytest.raises(IntegrityError, match="is not a whole softlabels plan"):
            Plan.read(tmp_path / name)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "foreign")
    with pytest.raises(IntegrityError, match="is no softlabels plan, but another Parquet file"):
        Plan.read(tmp_path / "foreign")


def test_a_flipped_bit_never_gives_another_plan(plan: Plan, tmp_path: Path) -> None:
    plan.write(tmp_path / "p")
    whole = (tmp_path / "p").read_bytes()
    kept = 0
    for at in range(0, len(whole), max(1, len(whole) // 400)):
        data = bytearray(whole)
        data[at] ^= 4
        (tmp_path / "q").write_bytes(data)
        try:
            read = Plan.read(tmp_path / "q")
        except IntegrityError:
            continue
        kept += 1
        assert read.fingerprint == plan.fingerprint
        assert read.entries.equals(plan.entries)
    assert kept < 250


def test_a_newer_plan_or_an_unknown_feature_is_refused_by_name(plan: Plan, tmp_path: Path) -> None:
    replace(plan, features=("time-travel",)).write(tmp_path / "p")
    with pytest.raises(IntegrityError, match=r"needs \['time-travel'\], which this release cannot"):
        Plan.read(tmp_path / "p")
    plan.write(tmp_path / "p")
    rewrite(tmp_path / "p", _set("format_version", value=FORMAT_VERSION + 1))
    with pytest.raises(IntegrityError, match=r"has format version 2, .* upgrade softlabels"):
        Plan.read(tmp_path / "p")


@pytest.mark.parametrize("path", ["../x.parquet", "/etc/passwd", "s3://b/x", "a\\b", "~/x"])
def test_a_plan_whose_files_leave_their_table_is_refused(
    plan: Plan, tmp_path: Path, path: str
) -> None:
    # Made with a right fingerprint, as a stranger would.
    table = plan.tables["main"]
    file = table.files[0].model_copy(update={"path": path})
    hostile = table.model_copy(update={"files": (file, *table.files[1:])})
    rows = [{**row, "file": path} for row in plan.entries.to_pylist()]
    entries = pa.Table.from_pylist(rows, schema=ENTRIES)
    replace(plan, tables={"main": hostile}, entries=entries).write(tmp_path / "p")
    with pytest.raises(IntegrityError, match="leaves its root"):
        Plan.read(tmp_path / "p")


@pytest.mark.parametrize("change", [{"file": "data/other.parquet"}, {"table": "other"}])
def test_a_plan_that_reads_what_it_does_not_list_is_refused(
    plan: Plan, tmp_path: Path, change: dict[str, str]
) -> None:
    rows = [{**row, **change} for row in plan.entries.to_pylist()]
    entries = pa.Table.from_pylist(rows, schema=ENTRIES)
    replace(plan, entries=entries).write(tmp_path / "p")
    with pytest.raises(IntegrityError, match="not listed"):
        Plan.read(tmp_path / "p")


def test_a_table_is_found_by_override_then_where_it_was_then_beside_the_plan(
    tmp_path: Path,
) -> None:
    table = make_table(tmp_path / "made" / "labels", rows=20, shard_rows=20)
    (tmp_path / "shipped").mkdir()
    make_plan({"main": table}).write(tmp_path / "shipped" / "p")
    plan = Plan.read(tmp_path / "shipped" / "p")
    there = str(tmp_path / "made" / "labels")
    assert plan.root("main").uri == there
    assert plan.root("main", {"main": "memory://o"}).uri == "memory://o"
    assert plan.root("main", {"other": "memory://o"}).uri == there

    shutil.move(there, tmp_path / "shipped" / "labels")  # beside it, under the table's folder
    assert plan.root("main").uri == str(tmp_path / "shipped" / "labels")
    shutil.move(tmp_path / "shipped" / "labels", tmp_path / "shipped" / "main")  # or its name
    assert plan.root("main").uri == str(tmp_path / "shipped" / "main")
    shutil.move(tmp_path / "shipped" / "main", tmp_path / "gone")
    with pytest.raises(BadInputError, match="say where it is with --root main=URI"):
        plan.root("main")
    assert (
        replace(plan, location=None)
        .root("main", {"main": str(tmp_path / "gone")})
        .exists(plan.tables["main"].files[0].path)
    )


def test_a_plan_without_entries_is_a_plan(plan: Plan, tmp_path: Path) -> None:
    empty = replace(plan, entries=entries_table([]))
    assert empty.num_rows == 0
    empty.write(tmp_path / "p")
    assert Plan.read(tmp_path / "p").fingerprint == empty.fingerprint


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.none() | st.lists(st.integers(0, 9), max_size=4).map(sorted),
            st.integers(1, 5),
            st.integers(1, 4),
        ),
        max_size=6,
    )
)
def test_offsets_count_the_rows_before(entries: list[tuple[list[int] | None, int, int]]) -> None:
    rows: list[dict[str, Any]] = [
        {
            "stage": 0,
            "table": "t",
            "file": "f",
            "row_group": 0,
            "num_rows": number if kept is None else len(kept),
            "rows": kept,
            "repeats": repeats,
            "loss_weight": 1.0,
        }
        for kept, number, repeats in entries
    ]
    made = entries_table(rows)
    sizes = [row["num_rows"] * row["repeats"] for row in rows]
    assert made["offset"].to_pylist() == [sum(sizes[:i]) for i in range(len(sizes))]
    plan = Plan({}, made, {})
    assert plan.num_rows == sum(sizes)
    pieces = pa.concat_tables([made.slice(0, 2), made.slice(2)])
    assert replace(plan, entries=pieces).fingerprint == plan.fingerprint
    assert canonical_json(dict(plan.recipe)) == "{}"


def ruled(plan: Plan, **changes: Any) -> Plan:
    """The plan with a rule on its table, changed as a stranger might."""
    condition = Condition(column="entropy", operator=">", constant=0.5).model_copy(update=changes)
    rules = PositionRules(where=(condition,))
    table = plan.tables["main"].model_copy(update={"positions": rules})
    return replace(plan, tables={"main": table}, features=(POSITIONS,))


def test_a_plan_with_position_rules_comes_back_as_it_was(plan: Plan, tmp_path: Path) -> None:
    made = ruled(plan)
    counted = made.report[0].model_copy(update={"positions": 60, "positions_kept": 0})
    made = replace(made, report=(counted,))
    made.write(tmp_path / "p")
    read = Plan.read(tmp_path / "p")
    assert (read.tables, read.report) == (made.tables, made.report)
    assert (read.features, read.fingerprint) == (("positions",), made.fingerprint)


def test_the_fingerprint_covers_position_rules(plan: Plan) -> None:
    weight = PositionWeight(
        where=(Condition(column="entropy", operator="<", constant=1),), weight=2
    )
    rules = [
        ruled(plan).tables["main"].positions,
        ruled(plan, column="tail_logprob").tables["main"].positions,
        ruled(plan, operator=">=").tables["main"].positions,
        ruled(plan, constant=0.25).tables["main"].positions,
        PositionRules(weights=(weight,)),
        PositionRules(weights=(weight.model_copy(update={"weight": 3.0}),)),
        PositionRules(),
        None,
    ]
    found = set()
    for rule in rules:
        table = plan.tables["main"].model_copy(update={"positions": rule})
        found.add(replace(plan, tables={"main": table}, features=(POSITIONS,)).fingerprint)
    assert len(found) == len(rules)


def test_without_position_rules_a_plan_is_written_as_before_there_were_any(
    plan: Plan, tmp_path: Path
) -> None:
    plan.write(tmp_path / "p")
    meta = json.loads(pq.read_table(tmp_path / "p").schema.metadata[META])
    assert "positions" not in json.dumps(meta)
    assert meta["features"] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"column": "input_ids"},
        {"operator": "LIKE"},
        {"constant": 1e300},
        {"constant": "1; DROP TABLE x"},
    ],
)
def test_position_rules_of_a_stranger_are_checked(
    plan: Plan, tmp_path: Path, changes: dict[str, Any]
) -> None:
    # Made with a right fingerprint.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic warns of what it is made to write
        ruled(plan, **changes).write(tmp_path / "p")
    with pytest.raises(
        IntegrityError, match=r"is not a whole softlabels plan.*positions"
    ) as caught:
        Plan.read(tmp_path / "p")
    assert "\n" not in str(caught.value)


def test_position_rules_must_be_a_feature(plan: Plan, tmp_path: Path) -> None:
    replace(ruled(plan), features=()).write(tmp_path / "p")
    with pytest.raises(IntegrityError, match=r"'main' has position rules, the plan's features are"):
        Plan.read(tmp_path / "p")
    ruled(plan).write(tmp_path / "p")
    rewrite(tmp_path / "p", _set("tables", 0, "positions", "where", 0, "constant", value=0.25))
    with pytest.raises(IntegrityError, match="it was changed after it was made"):
        Plan.read(tmp_path / "p")

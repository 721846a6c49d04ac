"""plan_diff names what changed, and nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.plan import Plan, entries_table
from softlabels.query.differences import plan_diff
from softlabels.store.table import Table
from tests.query.test_mix import make
from tests.query.test_sources import retold
from tests.tables import make_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return make_table(tmp_path_factory.mktemp("diff") / "t")


def recipe(table: Table, **source: Any) -> dict[str, Any]:
    return {"sources": {"a": {"table": table.root.uri, **source}, "b": {"table": table.root.uri}}}


def test_equal_plans_are_the_same_wherever_their_tables_are(table: Table, tmp_path: Path) -> None:
    shutil.copytree(table.root.uri, tmp_path / "moved")
    moved = Table.open(str(tmp_path / "moved"))
    found = plan_diff(make(recipe(table, limit=7)), make(recipe(moved, limit=7)))
    assert found["same"]
    assert (found["recipe"], found["tables"], found["sources"]) == ([], [], [])
    assert found["files"] == {"both": 3, "a": 0, "b": 0}
    assert found["read"] == {"same": 300, "other": 0, "a": 0, "b": 0}


def test_settings_sources_and_rows_that_changed_are_named(table: Table) -> None:
    a = make(recipe(table, where="label < 5", split={"take": "train", "holdout": 0.1}))
    other = recipe(table, where="label < 4", split={"take": "train", "holdout": 0.2}, stage=1)
    found = plan_diff(a, make(other | {"seed": 3}))
    assert not found["same"]
    changes = {change["setting"]: (change["a"], change["b"]) for change in found["recipe"]}
    assert changes == {
        "seed": (0, 3),
        "sources.a.where": ("label < 5", "label < 4"),
        "sources.a.split.holdout": (0.1, 0.2),
        "sources.a.stage": (0, 1),
    }
    kept = {c["source"]: (c["a"], c["b"]) for c in found["sources"]}
    assert kept["a.kept"][0] > kept["a.kept"][1]
    assert kept["a.dropped.where"] == (150, 180)
    assert not any(name.startswith("b.kept") for name in kept)
    assert found["tables"] == []
    # "b" reads all rows once: those that "a" reads too come twice.
    gone = kept["a.kept"][0] - kept["a.kept"][1]
    assert found["read"] == {"same": 300 - gone, "other": gone, "a": 0, "b": 0}


def test_rows_of_one_side_are_counted(table: Table) -> None:
    uri = table.root.uri
    plans = [
        make({"sources": {"a": {"table": uri, "where": where}}})
        for where in ("label < 5", "label > 3")
    ]
    assert plan_diff(*plans)["read"] == {"same": 30, "other": 0, "a": 120, "b": 150}
    assert plan_diff(*reversed(plans))["read"] == {"same": 30, "other": 0, "a": 150, "b": 120}


def test_a_changed_version_is_named_with_its_files(table: Table, tmp_path: Path) -> None:
    grown = retold(tmp_path / "t", table, [0, 1])
    a, b = (make({"sources": {"a": {"table": t.root.uri}}}) for t in (table, grown))
    found = plan_diff(a, b)
    changes = {change["table"]: (change["a"], change["b"]) for change in found["tables"]}
    assert changes == {
        "a.digest": (table.snapshot_digest, grown.snapshot_digest),
        "a.files": (3, 1),
    }
    assert found["recipe"] == []
    assert found["files"] == {"both": 0, "a": 3, "b": 1}
    assert found["read"] == {"same": 0, "other": 0, "a": 300, "b": 600}
    assert not found["entries"]


def test_sources_that_come_go_or_change_places_are_named(table: Table) -> None:
    uri = table.root.uri
    both = {"a": {"table": uri}, "b": {"table": uri, "limit": 5}}
    turned = plan_diff(
        make({"sources": both}), make({"sources": dict(reversed(list(both.items())))})
    )
    assert {change["setting"] for change in turned["recipe"]} == {"order of sources"}
    found = plan_diff(make({"sources": both}), make({"sources": {"a": {"table": uri}}}))
    gone = {change["setting"]: change["b"] for change in found["recipe"]}
    assert gone["sources.b"] is None
    assert {"source": "b", "b": None}.items() <= found["sources"][-1].items()


def test_entries_in_another_order_are_told(table: Table) -> None:
    plan = make({"sources": {"a": {"table": table.root.uri}}})
    order = pa.array(reversed(range(plan.entries.num_rows)))
    found = plan_diff(plan, replace(plan, entries=plan.entries.take(order)))
    assert found["entries"]
    assert not found["same"]
    assert found["read"]["same"] == 300


def test_weights_of_teachers_are_told(table: Table, tmp_path: Path) -> None:
    other = make_table(tmp_path / "o", seed=1)

    def mixed(weight: float) -> Any:
        members = {"x": table.root.uri, "y": {"table": other.root.uri, "weight": weight}}
        return make({"sources": {"a": {"ensemble": members}}})

    found = plan_diff(mixed(1), mixed(2))
    # A weight of 1 is the default: one side does not name it.
    assert found["recipe"] == [{"setting": "sources.a.ensemble.y.weight", "a": None, "b": 2.0}]
    assert found["read"] == {"same": 600, "other": 0, "a": 0, "b": 0}


def test_plans_of_billions_of_rows_are_compared_in_no_memory(table: Table) -> None:
    plan = make({"sources": {"a": {"table": table.root.uri}}})
    one = plan.entries.to_pylist()[0] | {"num_rows": 2**31 - 1}
    some = one | {"rows": [5, 6, 2**31 - 2], "num_rows": 3}

    def of(*entries: dict[str, Any]) -> Plan:
        return replace(plan, entries=entries_table(entries))

    most = 2**31 - 1
    assert plan_diff(of(one), of(some))["read"] == {"same": 3, "other": 0, "a": most - 3, "b": 0}
    twice = of(one, some | {"rows": [6, 0], "num_rows": 2, "repeats": 4})
    assert plan_diff(of(one), twice)["read"] == {"same": most - 2, "other": 2, "a": 0, "b": 0}
    assert plan_diff(of(some), of())["read"] == {"same": 0, "other": 0, "a": 3, "b": 0}


def test_reads_are_counted_as_one_by_one(table: Table) -> None:
    plan = make({"sources": {"a": {"table": table.root.uri}}})
    random = np.random.default_rng(0)
    (first, *_), counts = plan.entries.to_pylist(), []
    plans = []
    for _ in range(2):
        count, entries = np.zeros(40, int), []
        for _ in range(6):
            rows = np.sort(random.permutation(40)[: random.integers(1, 30)])
            repeats = int(random.integers(1, 3))
            count[rows] += repeats
            listed = {"rows": rows.tolist(), "num_rows": len(rows), "repeats": repeats}
            entries.append(first | listed)
        counts.append(count)
        plans.append(replace(plan, entries=entries_table(entries)))
    a, b = counts
    assert plan_diff(*plans)["read"] == {
        "same": int(((a == b) & (a > 0)).sum()),
        "other": int(((a != b) & (a > 0) & (b > 0)).sum()),
        "a": int(((a > 0) & (b == 0)).sum()),
        "b": int(((b > 0) & (a == 0)).sum()),
    }


@pytest.mark.parametrize(
    "names", [[[1]], [{"x": 1}], [1], ["a", "a"], [None]], ids=lambda names: str(names)
)
def test_names_in_a_strangers_recipe_need_not_be_names(table: Table, names: list[Any]) -> None:
    plan = make({"sources": {"a": {"table": table.root.uri}}})
    other = replace(
        plan, recipe={"seed": 1, "sources": [{"name": name, "limit": 1} for name in names]}
    )
    for found in (plan_diff(plan, other), plan_diff(other, plan)):
        assert [change["setting"] for change in found["recipe"]] == ["seed", "sources"]

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from softlabels.plan import Plan
from softlabels.query.mix import Recipe, mix
from softlabels.query.recipe import Source
from softlabels.student.shares import entry_sources, plan_order
from softlabels.student.stream import Stream
from tests.plans import make_plan
from tests.tables import make_table


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of one table two sources of different weights, of another one; a fourth in a stage before."""
    folder = tmp_path_factory.mktemp("tables")
    for name, rows in (("x", 200), ("y", 90)):
        made = folder / name
        make_table(made, rows=rows, shard_rows=50, row_group_rows=25, prefix=name)
    x, y = str(folder / "x"), str(folder / "y")
    even = "CAST(substr(example_id, 2) AS INT) % 2 = 0"
    sources = {
        "even": Source(table=x, where=even, weight=0.5),
        "odd": Source(table=x, where=f"NOT ({even})", weight=0.2),
        "other": Source(table=y, weight=0.2),
        "first": Source(table=y, where=even, weight=0.1, stage=0),
    }
    late = {name: s.model_copy(update={"stage": 1}) for name, s in sources.items() if s.stage == 0}
    late["first"] = sources["first"]
    return mix(Recipe(sources=late, rows=600))


def test_sources_of_a_recipe_are_told_apart_also_in_one_table(mixed: Plan) -> None:
    reads = {source.source: source.reads for source in mixed.report}
    entries = mixed.entries.to_pylist()
    found: dict[int, int] = {}
    for source, entry in zip(entry_sources(mixed).tolist(), entries, strict=True):
        found[source] = found.get(source, 0) + entry["num_rows"] * entry["repeats"]
    # In the order of the plan: the source of stage 0 is first, whatever its place in the recipe.
    assert list(found.values()) == [reads[n] for n in ("first", "even", "odd", "other")]


def test_every_prefix_of_a_stream_holds_each_source_within_one_row_of_its_share(
    mixed: Plan,
) -> None:
    names = [n for b in Stream(mixed, batch_size=64, epochs=1) for n in b.example_ids.to_pylist()]
    reads = {source.source: source.reads for source in mixed.report}
    assert all(name.startswith("y") for name in names[: reads["first"]])
    stage = names[reads["first"] :]
    kinds = np.array(["y" if n[0] == "y" else f"x{int(n[1:]) % 2}" for n in stage])
    prefixes = np.arange(1, len(stage) + 1)
    for kind, source in (("x0", "even"), ("x1", "odd"), ("y", "other")):
        counts = np.cumsum(kinds == kind)
        assert counts[-1] == reads[source]
        assert np.abs(counts - prefixes * reads[source] / len(stage)).max() <= 1


def test_a_report_that_does_not_fit_the_entries_leaves_each_table_a_source(
    mixed: Plan, tmp_path: Path
) -> None:
    by_table = entry_sources(replace(mixed, report=()))
    tables = mixed.entries["table"].to_pylist()
    assert len(set(by_table.tolist())) == len(set(tables)) == 2
    assert len(set(zip(by_table.tolist(), tables, strict=True))) == 2
    wrong = [mixed.report[0].model_copy(update={"reads": mixed.report[0].reads + 1})]
    other = replace(mixed, report=(*wrong, *mixed.report[1:]))
    assert np.array_equal(entry_sources(other), by_table)
    table = make_table(tmp_path / "t", rows=10)
    assert entry_sources(make_plan(table)).tolist() == [0]


def test_another_mixture_of_the_same_entries_is_another_order(mixed: Plan) -> None:
    order = plan_order(mixed, 0, True, 50)
    other = plan_order(replace(mixed, report=()), 0, True, 50)
    assert order.fingerprint == other.fingerprint
    assert order.identity["sources"] != other.identity["sources"]

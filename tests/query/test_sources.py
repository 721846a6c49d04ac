"""Split, once, limits by value, balance, sample_by and choose: rows and counts, by brute force."""

import hashlib
import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError, RecipeMismatchError
from softlabels.plan import ENSEMBLE, Plan
from softlabels.query.explain import funnel
from softlabels.query.view import query
from softlabels.store import shards
from softlabels.store.table import Table
from tests.query.sequences import make_sequences
from tests.query.test_mix import every, hash_order, make, one, reads
from tests.tables import dense_logprobs, make_lineage, make_table

DOMAINS = ["web"] * 200 + ["books"] * 70 + ["code"] * 27 + [None] * 3


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """300 rows of three domains, 3 rows of none; row i has the label i % 10."""
    return make_table(tmp_path_factory.mktemp("a") / "t", carried={"domain": pa.array(DOMAINS)})


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Another teacher's labels of the same examples, in other shards."""
    folder = tmp_path_factory.mktemp("b") / "t"
    return make_table(folder, seed=1, shard_rows=120, row_group_rows=33)


def held_out(names: list[str], share: str, seed: int = 0) -> set[str]:
    """The documented split: md5("split/seed/example_id") below the share."""
    border = int(Fraction(share) * 2**64)
    digests = {n: hashlib.md5(f"split/{seed}/{n}".encode()).hexdigest() for n in names}
    return {name for name, digest in digests.items() if int(digest[:16], 16) < border}


def test_a_split_is_by_the_documented_hash_of_example_id(table: Table, other: Table) -> None:
    wanted = held_out(every(300), "0.2")
    taken = {
        side: one(table, split={"take": side, "holdout": 0.2}) for side in ("train", "holdout")
    }
    assert set(reads(taken["holdout"])) == wanted
    assert set(reads(taken["train"])) == set(every(300)) - wanted
    assert 30 < len(wanted) < 90
    assert dict(taken["train"].report[0].dropped) == {"split": len(wanted)}
    # The same in another table, under another seed of the recipe, after other steps.
    split = {"take": "holdout", "holdout": 0.2}
    seeded = {"seed": 9, "sources": {"a": {"table": other.root.uri, "split": split}}}
    assert set(reads(make(seeded))) == wanted
    assert set(reads(one(table, split=split | {"seed": 1}))) == held_out(every(300), "0.2", 1)
    assert set(reads(one(table, split=split | {"holdout": 0.1}))) == held_out(every(300), "0.1")
    assert held_out(every(300), "0.1") < wanted


def test_all_views_of_an_example_lie_on_one_side(tmp_path: Path) -> None:
    from tests.tables import make_contents  # noqa: F401  (the table below is made of its rows)

    table = make_table(tmp_path / "t", rows=100)
    tripled = query({"": table}, "SELECT example_id FROM labels")["example_id"].to_pylist()
    views = retold(tmp_path / "views", table, [0, 1, 2])
    plan = one(views, split={"take": "holdout", "holdout": 0.3})
    assert reads(plan) == Counter(dict.fromkeys(held_out(tripled, "0.3"), 3))


def retold(folder: Path, table: Table, views: list[int]) -> Table:
    """The rows of a table in several views."""
    made = Table.open_or_create(str(folder), table.schema, table.contents)
    writer = shards.ShardWriter(table.schema, table.contents.profile, row_group_positions=25)
    place = table.schema.get_field_index("view")
    for view in views:
        for batch in table.batches():
            column = pa.array(np.full(batch.num_rows, view, np.int32))
            writer.write(batch.set_column(place, table.schema.field(place), column))
    unit = made.store_shard("f" * 64 + "/u", "f" * 16 + "-000000", writer.close())
    return made.commit([unit], make_lineage("f" * 64, [unit.key], 0))


def test_a_limit_for_each_value_takes_its_lowest_hashes(table: Table) -> None:
    plan = one(table, limit={"each": 20, "by": "domain"})
    wanted: list[str] = []
    for domain in ("web", "books", "code"):
        names = [name for name, of in zip(every(300), DOMAINS, strict=True) if of == domain]
        wanted += hash_order(names)[:20]
    assert reads(plan) == Counter(wanted)
    assert dict(plan.report[0].dropped) == {"limit: null": 3, "limit": 237}
    assert reads(one(table, limit={"each": 1, "by": "label % 2 = 0"})).total() == 2
    assert reads(one(table, limit={"each": 1, "by": "example_id"})).total() == 300
    some = one(table, where="label < 3", limit={"each": 4, "by": "label"})
    assert Counter(int(name[1:]) % 10 for name in reads(some)) == {0: 4, 1: 4, 2: 4}


def test_balance_gives_values_equal_reads(table: Table) -> None:
    plan = one(table, balance="domain")
    per = Counter[str | None]()
    for name, times in reads(plan).items():
        per[DOMAINS[int(name[1:])]] += times
    assert per == {"web": 99, "books": 99, "code": 99}
    (report,) = plan.report
    assert dict(report.dropped) == {"balance: null": 3, "balance": 101}
    assert sum(report.dropped.values()) + report.kept == report.rows
    values = [(v.value, v.rows, v.reads) for v in report.values or ()]
    assert values == [("web", 200, 99), ("books", 70, 99), ("code", 27, 99)]
    assert plan.num_rows == report.reads == 297
    codes = [times for name, times in reads(plan).items() if DOMAINS[int(name[1:])] == "code"]
    assert sorted(codes) == [3] * 9 + [4] * 18


def test_balance_by_temperature_follows_the_root(table: Table) -> None:
    recipe: dict[str, Any] = {
        "rows": 1000,
        "sources": {
            "a": {
                "table": table.root.uri,
                "weight": 1,
                "balance": {"by": "domain", "temperature": 2},
            }
        },
    }
    plan = make(recipe)
    exact = np.sqrt([200, 70, 27]) / np.sqrt([200, 70, 27]).sum() * 1000
    found = [value.reads for value in plan.report[0].values or ()]
    assert np.abs(np.array(found) - exact).max() < 1
    assert plan.num_rows == sum(found) == 1000
    recipe["sources"]["a"]["balance"]["temperature"] = 1
    proportional = [value.reads for value in make(recipe).report[0].values or ()]
    assert np.abs(np.array(proportional) - np.array([200, 70, 27]) / 297 * 1000).max() < 1


@pytest.mark.parametrize(
    ("by", "wanted"),
    [
        ("label", [str(n) for n in range(10)]),
        ("label < 3", ["false", "true"]),
        ("upper(domain)", ["WEB", "BOOKS", "CODE"]),
        ("DATE '2026-01-01' + label % 2", ["2026-01-01", "2026-01-02"]),
        ("(label % 2)::DECIMAL(4, 1)", ["0.0", "1.0"]),
        ("CASE WHEN label = 0 THEN 'nan'::DOUBLE WHEN label < 5 THEN -0.0 ELSE 0 END", ["0.0"]),
        ("(label % 2)::HUGEINT", ["0", "1"]),
    ],
)
def test_balance_goes_by_any_plain_value(table: Table, by: str, wanted: list[str]) -> None:
    plan = one(table, balance={"by": by})
    assert sorted(str(value.value) for value in plan.report[0].values or ()) == sorted(wanted)


def test_of_many_values_the_largest_are_shown(table: Table) -> None:
    values = one(table, balance={"by": "example_id"}).report[0].values
    assert values is not None
    assert (len(values), values[-1].value, values[-1].others) == (21, None, 280)
    assert sum(value.rows for value in values) == 300


def test_sample_by_reads_rows_in_proportion(table: Table) -> None:
    plan = one(table, sample_by="label * 2.5", repeats=4)
    expected = np.arange(300) % 10 / np.arange(300).__mod__(10).sum() * plan.num_rows
    counts = reads(plan)
    found = np.array([counts[name] for name in every(300)])
    assert plan.num_rows == 4 * 270
    assert np.abs(found - expected).max() < 1
    assert set(found[np.arange(300) % 10 == 0]) == {0}
    (report,) = plan.report
    assert report.dropped["sample_by: 0"] == 30
    assert sum(report.dropped.values()) + report.kept == 300
    assert report.kept == np.count_nonzero(found)


@pytest.mark.parametrize(
    ("sample_by", "found"),
    [
        ("label - 1", "-1.0"),
        ("CASE WHEN label > 3 THEN label END", "NULL or NaN"),
        ("label / 0.0", "NULL or NaN|inf"),
        ("'nan'::FLOAT", "NULL or NaN"),
        ("'inf'::FLOAT", "inf"),
    ],
)
def test_sample_by_must_be_a_weight(table: Table, sample_by: str, found: str) -> None:
    with pytest.raises(BadInputError, match=rf"source 'a': sample_by .* is ({found}) for a row"):
        one(table, sample_by=sample_by)
    with pytest.raises(BadInputError, match=r"left without rows.*sample_by: 0 drops 300"):
        one(table, sample_by="0")


def test_once_gives_an_example_to_the_first_source_that_selects_it(
    table: Table, other: Table
) -> None:
    recipe: dict[str, Any] = {
        "once": True,
        "sources": {
            "a": {"table": table.root.uri, "where": "label < 5", "limit": 100},
            "b": {"table": other.root.uri, "where": "label > 2", "limit": 120},
            "c": {"table": table.root.uri},
        },
    }
    plan = make(recipe)
    assert reads(plan) == Counter(every(300))
    first = set(hash_order([n for n in every(300) if int(n[1:]) % 10 < 5])[:100])
    left = [n for n in every(300) if int(n[1:]) % 10 > 2 and n not in first]
    second = set(hash_order(left)[:120])
    assert [report.kept for report in plan.report] == [100, 120, 80]
    assert dict(plan.report[1].dropped)["once"] == 210 - len(left)
    assert dict(plan.report[2].dropped) == {"once": 220}
    by_source = [e["file"] for e in plan.entries.to_pylist() if e["table"] == "b"]
    assert by_source
    assert sum(e["num_rows"] for e in plan.entries.to_pylist() if e["table"] == "b") == len(second)
    recipe["once"] = False
    assert reads(make(recipe)).total() == 520


def test_once_leaves_out_what_a_table_holds_twice(tmp_path: Path) -> None:
    twice = retold(tmp_path / "t", make_table(tmp_path / "s", rows=50), [0, 0, 1])
    plan = make({"once": True, "sources": {"a": {"table": twice.root.uri}}})
    assert dict(plan.report[0].dropped) == {"once": 50}
    assert reads(plan) == Counter(dict.fromkeys(every(50), 2))  # two views


def test_choose_reads_each_example_from_the_best_teacher(table: Table, other: Table) -> None:
    choose = {"from": {"x": table.root.uri, "y": other.root.uri}, "by": "top1_prob"}
    plan = make({"sources": {"a": {"choose": choose}}})
    one_, two = stored(table, "top1_prob"), stored(other, "top1_prob")
    taken = by_table(plan)
    assert taken["a.x"] == {f"x{i:05d}" for i in np.flatnonzero(one_ >= two)}
    assert taken["a.y"] == {f"x{i:05d}" for i in np.flatnonzero(one_ < two)}
    assert reads(plan) == Counter(every(300))
    (report,) = plan.report
    assert report.chosen == {"x": len(taken["a.x"]), "y": len(taken["a.y"])}
    least = make({"sources": {"a": {"choose": {**choose, "by": "-top1_prob"}}}})
    assert by_table(least)["a.x"] == {f"x{i:05d}" for i in np.flatnonzero(one_ <= two)}
    assert ENSEMBLE not in plan.features


def stored(table: Table, column: str) -> np.ndarray:
    """A column as it is stored, rounded by the value profile, in the order of examples."""
    sql = f"SELECT {column} AS x FROM labels ORDER BY example_id"
    return np.array(query({"": table}, sql)["x"].to_pylist())


def by_table(plan: Plan) -> dict[str, set[str]]:
    """Examples by the table that they are read from."""
    found: dict[str, set[str]] = {}
    for name in plan.tables:
        mine = plan.entries.filter(pa.array([t == name for t in plan.entries["table"].to_pylist()]))
        found[name] = set(reads(Plan(plan.tables, mine, {})))
    return found


def test_teachers_that_agree_with_the_label_come_first(table: Table, other: Table) -> None:
    choose = {
        "from": {"x": table.root.uri, "y": other.root.uri},
        "by": "top1_prob",
        "agreeing": "label",
    }
    plan = make({"sources": {"a": {"choose": choose, "where": "label <> 7"}}})
    labels = np.arange(300) % 10
    right = [stored(t, "top1_id") == labels for t in (table, other)]
    prob = [stored(t, "top1_prob") for t in (table, other)]
    second = (right[1] & ~right[0]) | ((right[0] == right[1]) & (prob[1] > prob[0]))
    kept = labels != 7
    assert by_table(plan)["a.y"] == {f"x{i:05d}" for i in np.flatnonzero(second & kept)}
    assert by_table(plan)["a.x"] == {f"x{i:05d}" for i in np.flatnonzero(~second & kept)}


def test_a_teacher_without_the_example_is_not_chosen_and_ties_go_to_the_first(
    tmp_path: Path, table: Table
) -> None:
    short = make_table(tmp_path / "short", rows=40, seed=1)
    uri = table.root.uri
    choose = {"from": {"x": uri, "y": short.root.uri}, "by": "CASE WHEN k > 0 THEN k END"}
    with pytest.raises(BadInputError, match=r"source 'a': .*choose.by .*\"k\" not found"):
        make({"sources": {"a": {"choose": choose}}})
    choose["by"] = "7"
    assert by_table(make({"sources": {"a": {"choose": choose}}})) == {"a.x": set(every(300))}
    # Unknown values come last.
    choose["by"] = "CASE WHEN top1_id = label THEN 1.0 END"
    plan = make({"sources": {"a": {"choose": choose}}})
    right = [dense_logprobs(300, 10, s).argmax(1) == np.arange(300) % 10 for s in (0, 1)]
    short_right = dense_logprobs(40, 10, 1).argmax(1) == np.arange(40) % 10
    better = np.flatnonzero(short_right & ~right[0][:40])
    assert by_table(plan)["a.y"] == {f"x{i:05d}" for i in better}


@pytest.mark.parametrize(
    "source",
    [
        {"repeats": 1.5},
        {"limit": 30, "repeats": 0.5},
        {"balance": "domain", "repeats": 2},
        {"sample_by": "entropy"},
        {"split": {"take": "holdout", "holdout": 0.3}, "limit": {"each": 5, "by": "label"}},
    ],
)
def test_several_teachers_are_read_as_often_as_one(
    table: Table, other: Table, source: dict[str, Any]
) -> None:
    uris = {"x": table.root.uri, "y": other.root.uri}
    plain = reads(one(table, **source))
    chosen = make({"sources": {"a": {"choose": {"from": uris, "by": "top1_prob"}, **source}}})
    assert reads(chosen) == plain
    both = make({"sources": {"a": {"ensemble": uris, **source}}})
    second = both.member(1)
    assert second is not None
    assert reads(both) == plain == reads(Plan(both.tables, second, {}))
    for plan in (chosen, both):
        assert plan.report[0].kept == len(plain)


def test_an_ensemble_drops_what_a_teacher_lacks_and_reads_both(
    tmp_path: Path, table: Table
) -> None:
    short = make_table(tmp_path / "short", rows=120, seed=1, row_group_rows=10)
    members = {"x": {"table": table.root.uri, "weight": 3}, "y": short.root.uri}
    plan = make({"sources": {"a": {"ensemble": members, "where": "label < 5", "repeats": 1.5}}})
    (report,) = plan.report
    assert dict(report.dropped) == {"where": 150, "not in y": 90}
    wanted = [name for name in every(120) if int(name[1:]) % 10 < 5]
    expected = Counter(dict.fromkeys(wanted, 1))
    expected.update(hash_order(wanted)[:30])
    assert reads(plan) == expected
    assert (plan.num_members, plan.features) == (2, (ENSEMBLE,))
    second = plan.member(1)
    assert second is not None
    assert reads(Plan(plan.tables, second, {})) == expected
    assert sorted(plan.tables) == ["a.x", "a.y"]
    path = tmp_path / "plan"
    plan.write(path)
    assert Plan.read(path).fingerprint == plan.fingerprint


def test_values_that_a_teacher_has_no_rows_of_get_no_reads(tmp_path: Path, table: Table) -> None:
    short = make_table(tmp_path / "short", rows=231, seed=1)  # of "code" it has none
    members = {"x": table.root.uri, "y": short.root.uri}
    plan = make({"sources": {"a": {"ensemble": members, "balance": "domain"}}})
    values = [(v.value, v.rows, v.reads) for v in plan.report[0].values or ()]
    assert values == [("web", 200, 115), ("books", 31, 116)]
    steps = [step["step"] for step in funnel(plan.report[0])]
    assert steps[1:-1] == ["balance: null", "not in y", "balance"]


def test_plain_sources_and_ensembles_share_tables_of_one_version(
    table: Table, other: Table
) -> None:
    plan = make(
        {
            "sources": {
                "late": {"table": table.root.uri, "stage": 1},
                "both": {"ensemble": {"x": table.root.uri, "y": other.root.uri}},
                "best": {"choose": {"from": {"y": other.root.uri, "x": table.root.uri}, "by": "1"}},
            }
        }
    )
    assert sorted(plan.tables) == ["both.y", "late"]
    assert [report.table for report in plan.report] == ["late", "late", "both.y"]
    assert plan.num_rows == 900
    assert plan.entries["stage"].to_pylist() == sorted(plan.entries["stage"].to_pylist())


def test_a_source_and_a_teacher_of_one_name_are_two_tables(table: Table, other: Table) -> None:
    plan = make(
        {
            "sources": {
                "a.x": {"table": other.root.uri},
                "a": {"choose": {"from": {"x": table.root.uri, "y": other.root.uri}, "by": "1"}},
            }
        }
    )
    assert set(plan.tables) == {"a.x", "a.x'"}
    assert [f.sha256 for f in plan.tables["a.x'"].files] == [f.sha256 for f in table.files]


def test_positions_of_chosen_sequences_are_judged_in_each_table(tmp_path: Path) -> None:
    one_ = make_sequences(tmp_path / "1")
    choose = {"from": {"x": one_.root.uri, "y": one_.root.uri + "@1"}, "by": "entropy"}
    rule = {"where": "entropy > 0.5", "top": 0.5, "by": "entropy"}
    chosen = make({"sources": {"a": {"choose": choose, "positions": rule}}})
    plain = one(one_, positions=rule)
    assert reads(chosen) == reads(plain)
    assert chosen.report[0].positions_kept == plain.report[0].positions_kept
    rules = plain.tables["a"].positions
    assert rules is not None
    assert [t.positions for t in chosen.tables.values()] == [rules]
    with pytest.raises(BadInputError, match=r"source 'a': choose.agreeing .* labels sequences"):
        make({"sources": {"a": {"choose": choose | {"agreeing": "label"}}}})


def test_teachers_of_other_classes_are_refused_as_wrong_use(tmp_path: Path, table: Table) -> None:
    wide = make_table(tmp_path / "w", classes=12)
    uris = {"x": table.root.uri, "y": wide.root.uri}
    for source in ({"ensemble": uris}, {"choose": {"from": uris, "by": "entropy"}}):
        with pytest.raises(RecipeMismatchError, match=r"num_classes differs: source 'a.x'") as said:
            make({"sources": {"a": source}})
        assert said.value.exit_code == 2
    hot = {"x": table.root.uri, "y": {"table": table.root.uri, "temperature": 2}}
    with pytest.raises(RecipeMismatchError, match=r"source 'a': member 'y': temperature 2.0"):
        make({"sources": {"a": {"ensemble": hot}}})


def test_the_funnel_counts_down_to_what_is_read(table: Table) -> None:
    plan = one(
        table,
        where="label < 9",
        split={"take": "train", "holdout": 0.1},
        fraction=0.8,
        limit={"each": 15, "by": "domain"},
        balance="domain",
        repeats=0.5,
    )
    (report,) = plan.report
    steps = funnel(report)
    assert [step["step"] for step in steps] == [
        "rows of the version",
        "where",
        "split",
        "fraction",
        "limit: null",
        "limit",
        "balance: null",
        "balance",
        "reads an epoch",
    ]
    assert steps[-2]["left"] == report.kept == len(reads(plan))
    for before, after in itertools.pairwise(steps[:-1]):
        assert before["left"] - after["dropped"] == after["left"]


def test_a_read_plan_has_the_same_report(table: Table, other: Table, tmp_path: Path) -> None:
    choose = {"from": {"x": table.root.uri, "y": other.root.uri}, "by": "top1_prob"}
    plan = make(
        {"sources": {"a": {"choose": choose}, "b": {"table": table.root.uri, "balance": "domain"}}}
    )
    plan.write(tmp_path / "p")
    assert Plan.read(tmp_path / "p").report == plan.report


def test_a_choice_that_decides_nothing_is_refused(table: Table, other: Table) -> None:
    choose = {"from": {"x": table.root.uri, "y": other.root.uri}, "by": "top1_prob"}
    for by in ("'nan'::DOUBLE", "nullif(label, label)"):
        with pytest.raises(BadInputError, match="no value for any example of any teacher"):
            make({"sources": {"a": {"choose": choose | {"by": by}}}})
    for agreeing in ("entropy", "label + 1"):
        with pytest.raises(BadInputError, match=r"agreeing .* expected a column of class ids"):
            make({"sources": {"a": {"choose": choose | {"agreeing": agreeing}}}})


def test_chosen_counts_each_row_once(table: Table, other: Table) -> None:
    choose = {"from": {"x": table.root.uri, "y": other.root.uri}, "by": "top1_prob"}
    once = make({"sources": {"a": {"choose": choose}}}).report[0]
    more = make({"sources": {"a": {"choose": choose, "repeats": 1.5}}}).report[0]
    assert more.chosen == once.chosen
    assert sum((once.chosen or {}).values()) == once.kept

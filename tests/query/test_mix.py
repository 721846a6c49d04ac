"""Plans hold exactly the rows that a recipe asks for, and say what became of the others."""

import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import BadInputError, IntegrityError, MismatchError
from softlabels.plan import Plan
from softlabels.plan_checks import MOST_READINGS
from softlabels.query import view
from softlabels.query.mix import mix, pin
from softlabels.query.recipe import Recipe, Source
from softlabels.query.selection import lowest
from softlabels.query.takedown import Request, take_down
from softlabels.store import tags
from softlabels.store.compact import compact
from softlabels.store.rollback import rollback
from softlabels.store.table import Table
from softlabels.store.vacuum import Keep, vacuum
from tests.query.sequences import make_sequences
from tests.tables import dense_logprobs, make_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Of 300 rows in 3 files of 4 row groups; for tests that leave it as it is."""
    return make_table(tmp_path_factory.mktemp("mix") / "t")


def make(recipe: dict[str, Any]) -> Plan:
    return mix(Recipe.model_validate(recipe))


def one(table: Table, **source: Any) -> Plan:
    return make({"sources": {"a": {"table": table.root.uri, **source}}})


def reads(plan: Plan) -> Counter[str]:
    """How often each example comes in an epoch, by reading the files as the plan says."""
    found: Counter[str] = Counter()
    for entry in plan.entries.to_pylist():
        path = plan.root(entry["table"]).full(entry["file"])
        group = pq.ParquetFile(path).read_row_group(entry["row_group"], columns=["example_id"])
        names = group["example_id"].to_pylist()
        taken = names if entry["rows"] is None else [names[row] for row in entry["rows"]]
        assert len(taken) == entry["num_rows"]
        found.update(dict.fromkeys(taken, entry["repeats"]))
    return found


def hash_order(names: list[str], seed: int = 0) -> list[str]:
    """The documented order of subsets: by md5("seed/example_id/view")."""
    return sorted(names, key=lambda name: hashlib.md5(f"{seed}/{name}/0".encode()).hexdigest())


def every(rows: int) -> list[str]:
    return [f"x{i:05d}" for i in range(rows)]


def test_a_whole_table_is_read_once_without_row_lists(table: Table) -> None:
    plan = one(table)
    assert plan.num_rows == 300
    assert plan.entries["rows"].null_count == plan.entries.num_rows == 12
    assert plan.entries["offset"].to_pylist() == list(range(0, 300, 25))
    assert reads(plan) == Counter(every(300))
    (report,) = plan.report
    assert (report.kept, report.reads, dict(report.dropped), report.share) == (300, 300, {}, 1.0)
    assert [f.path for f in plan.tables["a"].files] == [f.path for f in table.files]
    path, written = Path(table.root.path) / table.files[0].path, plan.tables["a"].files[0]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == written.sha256
    assert written.size == path.stat().st_size


def test_where_takes_exactly_the_rows_it_names(table: Table) -> None:
    right = dense_logprobs(300, 10).argmax(1) == np.arange(300) % 10
    plan = one(table, where="top1_id = label -- the teacher is right\n")
    assert reads(plan) == Counter(np.array(every(300))[right].tolist())
    assert dict(plan.report[0].dropped) == {"where": 300 - right.sum()}
    for entry in plan.entries.to_pylist():
        assert entry["rows"] is None or entry["rows"] == sorted(set(entry["rows"]))


def test_a_row_group_that_where_takes_whole_needs_no_list(tmp_path: Path) -> None:
    part = pa.array(["left"] * 50 + ["right"] * 250)
    table = make_table(tmp_path / "t", carried={"part": part})
    plan = one(table, where="part = 'left' OR example_id = 'x00075'")
    assert plan.entries["rows"].to_pylist() == [None, None, [0]]
    assert plan.entries["row_group"].to_pylist() == [0, 1, 3]


def test_where_touches_only_files_that_may_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(tmp_path / "t", rows=60, shard_rows=5, row_group_rows=5)
    wanted = {f.path for f in table.files if f.bounds["label"] == (0, 4)}
    for file in table.files:
        if file.path not in wanted:
            (tmp_path / "t" / file.path).unlink()
    plan = one(table, where="label IN (1, 2)")
    assert len(wanted) == 6
    assert reads(plan) == Counter(f"x{i:05d}" for i in range(60) if i % 10 in (1, 2))
    assert dict(plan.report[0].dropped) == {"where": 48}


def test_counts_by_reason_sum_to_the_rows(table: Table) -> None:
    plan = one(table, where="label < 8", fraction=0.7, limit=100, repeats=0.5)
    (report,) = plan.report
    assert set(report.dropped) == {"where", "fraction", "limit", "repeats"}
    assert sum(report.dropped.values()) + report.kept == report.rows == 300
    assert report.dropped["where"] == 60
    assert report.dropped["repeats"] == 50
    assert report.kept == report.reads == sum(reads(plan).values()) == 50


def test_fractions_are_nested_subsets_of_the_documented_hash(table: Table) -> None:
    taken = [set(reads(one(table, fraction=f))) for f in (0.1, 0.3, 0.9)]
    assert taken[0] < taken[1] < taken[2]
    order = hash_order(every(300))
    for names, fraction in zip(taken, (0.1, 0.3, 0.9), strict=True):
        assert names == set(order[: len(names)])
        assert abs(len(names) - 300 * fraction) < 30
    assert set(reads(one(table, fraction=1.0))) == set(every(300))


def test_subsets_are_independent_of_the_layout_of_shards(tmp_path: Path) -> None:
    one_way = make_table(tmp_path / "1", shard_rows=100)
    other = make_table(tmp_path / "2", shard_rows=37, row_group_rows=10)
    for source in ({"fraction": 0.4}, {"limit": 50}, {"where": "label > 3", "repeats": 1.5}):
        assert reads(one(one_way, **source)) == reads(one(other, **source))


def test_a_limit_takes_the_lowest_hashes(table: Table) -> None:
    assert reads(one(table, limit=41)) == Counter(hash_order(every(300))[:41])
    assert reads(one(table, limit=1000)) == Counter(every(300))
    seeded = make({"seed": 5, "sources": {"a": {"table": table.root.uri, "limit": 41}}})
    assert reads(seeded) == Counter(hash_order(every(300), 5)[:41])


@pytest.mark.parametrize(("repeats", "extra"), [(1.5, 150), (2.0, 0), (2.1, 30), (0.25, 75)])
def test_repeats_come_whole_and_once_more_in_part(table: Table, repeats: float, extra: int) -> None:
    plan = one(table, repeats=repeats)
    expected = Counter({name: int(repeats) for name in every(300)})
    expected.update(hash_order(every(300))[:extra])
    assert reads(plan) == +expected
    assert plan.num_rows == 300 * int(repeats) + extra


@pytest.mark.parametrize("rows", [1, 7, 100, 997, None])
def test_weights_are_realised_within_one_row(table: Table, rows: int | None) -> None:
    weights = {"a": 2.0, "b": 0.5, "c": 1.0}
    where = {"a": "label = 1", "b": "label > 4", "c": "label = 3"}
    recipe: dict[str, Any] = {
        "sources": {
            n: {"table": table.root.uri, "weight": weights[n], "where": where[n]} for n in weights
        }
    }
    if rows is not None:
        recipe["rows"] = rows
    if rows == 1:
        with pytest.raises(BadInputError, match="source 'b' comes to 0 of 1 rows"):
            make(recipe)
        return
    plan = make(recipe)
    # "b" has most rows for its share: 150 / (1/7).
    assert plan.num_rows == (rows or 1050) == sum(reads(plan).values())
    for report in plan.report:
        exact = plan.num_rows * weights[report.source] / 3.5
        assert abs(report.reads - exact) < 1
        assert report.share_asked == pytest.approx(weights[report.source] / 3.5)
        assert report.share == report.reads / plan.num_rows
        assert sum(report.dropped.values()) + report.kept == 300
    if rows is None:
        assert plan.report[1].reads == plan.report[1].kept == 150
    counts = reads(plan)
    ones = [counts[name] for name in every(300) if int(name[1:]) % 10 == 1]
    assert max(ones) - min(ones) <= 1


def test_entries_are_ordered_by_stage_source_file_and_row_group(table: Table) -> None:
    uri = table.root.uri
    plan = make(
        {
            "sources": {
                "late": {"table": uri, "stage": 2, "repeats": 1.5},
                "second": {"table": uri, "where": "label = 1", "loss_weight": 0.5},
                "third": {"table": uri, "where": "label = 2", "loss_weight": 2.0},
            }
        }
    )
    entries = plan.entries.to_pylist()
    assert [e["stage"] for e in entries] == sorted(e["stage"] for e in entries)
    order = {0.5: 0, 2.0: 1, 1.0: 2}
    keys = [
        (e["stage"], order[e["loss_weight"]], e["file"], e["row_group"], e["rows"] is not None)
        for e in entries
    ]
    assert keys == sorted(keys)
    offsets = np.cumsum([0] + [e["num_rows"] * e["repeats"] for e in entries])
    assert [e["offset"] for e in entries] == offsets[:-1].tolist()


def test_sources_of_one_version_share_one_table(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t")
    tags.make_tag(table.root, "v1", table.version, table.snapshot_digest)
    plan = make(
        {
            "sources": {
                "b": {"table": f"{table.root.uri}@v1", "where": "label = 1"},
                "a": {"table": f"{table.root.uri}@1", "where": "label <> 1"},
            }
        }
    )
    assert list(plan.tables) == ["b"]
    assert {r.table for r in plan.report} == {"b"}
    assert reads(plan) == Counter(every(300))


def test_the_fingerprint_is_of_content_alone(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t")
    source = {"where": "entropy > 1", "repeats": 1.5, "fraction": 0.5}
    first = one(table, **source)
    shutil.copytree(tmp_path / "t", tmp_path / "moved")
    moved = one(Table.open(str(tmp_path / "moved")), **source)
    assert first.fingerprint == one(table, **source).fingerprint == moved.fingerprint
    first.write(tmp_path / "1.parquet")
    assert Plan.read(tmp_path / "1.parquet").fingerprint == first.fingerprint
    changed = [
        one(table, **source | {"where": "entropy > 1.01"}),
        one(table, **source | {"repeats": 1.6}),
        one(table, **source | {"fraction": 0.51}),
        one(table, **source | {"loss_weight": 2.0}),
        one(make_table(tmp_path / "other", seed=1), **source),
        make({"seed": 1, "sources": {"a": {"table": table.root.uri, **source}}}),
    ]
    assert len({plan.fingerprint for plan in [first, *changed]}) == 7


def test_the_fingerprint_is_the_same_for_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(tmp_path / "t", rows=2000, shard_rows=130)
    found = set()
    for threads in (1, 2, 5):
        settings = {"threads": threads, "preserve_insertion_order": threads == 1}
        monkeypatch.setattr(view, "CONFIG", view.CONFIG | settings)
        found.add(one(table, where="entropy > 0.7", repeats=1.3).fingerprint)
    assert len(found) == 1


def test_sources_must_have_one_label_space(tmp_path: Path) -> None:
    first = make_table(tmp_path / "1", classes=10).root.uri
    second = make_table(tmp_path / "2", classes=12).root.uri
    recipe = {"sources": {"a": {"table": first}, "b": {"table": second}}}
    with pytest.raises(
        MismatchError, match=r"num_classes differs: source 'a' has 10, .*'b' has 12"
    ):
        make(recipe)
    recipe["sources"]["b"]["table"] = make_sequences(tmp_path / "3").root.uri
    with pytest.raises(MismatchError, match=r"classes differs: .*'class0'.* has None"):
        make(recipe)


def test_teachers_may_differ(tmp_path: Path) -> None:
    uris = [make_table(tmp_path / str(s), seed=s, k=3 + s).root.uri for s in (0, 1)]
    plan = make({"sources": {"a": {"table": uris[0]}, "b": {"table": uris[1]}}})
    assert list(plan.tables) == ["a", "b"]
    assert reads(plan) == Counter(every(300) * 2)


def test_a_source_left_without_rows_is_named(table: Table) -> None:
    with pytest.raises(BadInputError, match=r"source 'a' is left without rows.*where drops 300"):
        one(table, where="label > 10")
    with pytest.raises(BadInputError, match=r"source 'a' is left without rows.*where drops 300"):
        one(table, where="example_id = 'none'")
    with pytest.raises(BadInputError, match="source 'a' is left without rows"):
        make({"sources": {"a": {"table": f"{table.root.uri}@0"}}})


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("entropi > 1", 'source \'a\': where .*"entropi" not found.*"entropy"'),
        ("softlabels_row < 3", "source 'a': where .*not found"),
        ("filename LIKE '%0%'", "source 'a': where .*not found"),
        ("rowid < 3", "source 'a': where .*"),
        ("label IN (SELECT 1)", "source 'a': where .*a subquery is refused"),
        ("1=1) OR (1=1", "source 'a': where .*one expression"),
        ("count(*) > 1", "source 'a': where .*"),
        ("row_number() OVER () > 1", "source 'a': where .*"),
        ("lable(1)", "source 'a': where .*"),
        ("example_id > DATE '2020-01-01'", "source 'a': .*Cannot compare values"),
        (
            # One row alone fails: of several, threads report whichever comes first.
            "CASE WHEN example_id = 'x00000' THEN example_id ELSE '1' END::INT > 3",
            "source 'a': .*Could not convert string 'x00000' to INT32",
        ),
    ],
)
def test_what_cannot_be_computed_is_one_line(table: Table, where: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        one(table, where=where)
    assert "\n" not in str(caught.value)


def test_a_changed_footer_is_refused(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t")
    path = tmp_path / "t" / table.files[0].path
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=table.files[0].path):
        one(table)


def test_pin_tags_every_version_and_may_be_repeated(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=50)
    plan = one(table)
    name = f"plan-{plan.fingerprint[:16]}"
    assert pin(plan) == pin(plan) == [f"{table.root.uri}@{name}"]
    assert tags.read_tag(table.root, name).version == 1
    assert one(Table.open(table.root.uri)).fingerprint == plan.fingerprint


def test_pin_keeps_the_plans_own_files_though_another_version_holds_the_same(
    tmp_path: Path,
) -> None:
    gone = Request(where="example_id = 'x00007'")
    first = make_table(tmp_path / "t", rows=50)
    uri = first.root.uri
    take_down(first, gone)
    former = one(Table.open(uri))
    pin(former)
    rollback(Table.open(f"{uri}@1"), deletions="bring back")
    take_down(Table.open(uri), gone)
    plan = one(Table.open(uri))
    assert plan.fingerprint == former.fingerprint
    (pinned,) = pin(plan)
    assert pinned == pin(plan)[0] == f"{uri}@plan-{plan.fingerprint[:16]}-4"
    compact(Table.open(uri))
    vacuum(Table.open(uri), Keep(retention=0.0))
    for kept in (former, plan):
        for name, table in kept.tables.items():
            assert all((tmp_path / "t" / file.path).exists() for file in table.files), name


def test_mixing_far_tables_gives_the_same_plan(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.query.sequences import far

    source = {"where": "entropy > 1 AND label IN (1, 2, 3)", "repeats": 1.5}
    near = one(table, **source)
    monkeypatch.setattr(Table, "open", classmethod(lambda cls, reference: far(table)))
    assert one(table, **source).fingerprint == near.fingerprint


def test_lowest_breaks_ties_by_place() -> None:
    keys = np.array([5, 1, 5, 0, 5, 9], np.uint64)
    assert lowest(keys, 3).tolist() == [0, 1, 3]
    assert lowest(keys, 4).tolist() == [0, 1, 2, 3]
    assert lowest(keys, 99).tolist() == list(range(6))


def test_the_same_labels_captured_again_give_the_same_plan(tmp_path: Path) -> None:
    first, again = (make_table(tmp_path / name) for name in ("first", "again"))
    assert {file.path for file in first.files}.isdisjoint(file.path for file in again.files)
    plans = [mix(Recipe(sources={"all": Source(table=t.root.uri)})) for t in (first, again)]
    assert plans[0].fingerprint == plans[1].fingerprint
    other = make_table(tmp_path / "other", seed=1)
    assert mix(Recipe(sources={"all": Source(table=other.root.uri)})).fingerprint not in {
        plan.fingerprint for plan in plans
    }


def test_more_readings_than_can_be_put_in_order_are_refused(table: Table, tmp_path: Path) -> None:
    sources = {"a": {"table": table.root.uri, "limit": 1, "weight": 1}}
    plan = make({"rows": MOST_READINGS, "sources": sources})
    assert plan.entries["repeats"].to_pylist() == [MOST_READINGS]
    plan.write(tmp_path / "p")
    assert Plan.read(tmp_path / "p").num_rows == MOST_READINGS
    with pytest.raises(BadInputError, match=f"reads entries {MOST_READINGS + 1} times") as caught:
        make({"rows": MOST_READINGS + 1, "sources": sources})
    assert "\n" not in str(caught.value)

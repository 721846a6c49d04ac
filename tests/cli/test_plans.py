"""mix --explain, plan diff, and recipes that cannot be meant, as a user runs them."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from softlabels.plan import Plan
from softlabels.store import tags
from softlabels.store.table import Table
from tests.cli.test_query import RUN, Runner, refused, run, softlabels
from tests.query.sequences import make_sequences
from tests.tables import make_table

__all__ = ["run"]  # a fixture


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    domain = pa.array(["web"] * 60 + ["books"] * 30 + [None] * 10)
    folder = tmp_path_factory.mktemp("cli") / "t"
    return make_table(folder, rows=100, shard_rows=50, carried={"domain": domain})


def written(folder: Path, recipe: Mapping[str, Any] | str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    text = recipe if isinstance(recipe, str) else yaml.safe_dump(dict(recipe), sort_keys=False)
    path.write_text(text)
    return path


def test_explain_shows_what_each_step_left(run: Runner, table: Table, tmp_path: Path) -> None:
    uri = table.root.uri
    recipe = written(
        tmp_path,
        {
            "sources": {
                "a [/x]": {"table": uri, "where": "label < 8", "balance": "domain"},
                "best": {"choose": {"from": {"x": uri, "y": uri}, "by": "entropy"}, "limit": 30},
            }
        },
    )
    result = run("mix", recipe, "--explain")
    assert result.returncode == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert "source 'a [/x]', table 'a [/x]'" in result.stdout
    assert ["rows", "of", "the", "version", "100"] in lines
    assert ["where", "20", "80"] in lines
    assert ["balance:", "null", "8", "72"] in lines
    assert ["reads", "an", "epoch", "72"] in lines
    assert ["web", "48", "36", "0.5"] in lines
    assert ["books", "24", "36", "0.5"] in lines
    assert ["limit", "70", "30"] in lines
    assert ["x", "30"] in lines
    assert ["y", "0"] in lines
    assert "20 where, 8 balance: null, 12 balance" in result.stdout
    as_json = json.loads(run("mix", recipe, "--explain", "--json").stdout)
    steps = as_json["sources"][0]["funnel"]
    assert steps[1] == {"step": "where", "dropped": 20, "left": 80}
    assert as_json["sources"][0]["values"][0]["reads"] == 36
    assert as_json["sources"][1]["chosen"] == {"x": 30, "y": 0}
    # The funnel of a plan that was written is the same, though JSON has its own order.
    path = tmp_path / "plan.parquet"
    assert run("mix", recipe, "-o", path, "--no-pin").returncode == 0
    shown = json.loads(run("plan", "show", path, "--json").stdout)
    assert shown["sources"][0]["funnel"] == steps
    assert "30 x, 0 y" in run("plan", "show", path).stdout


def test_plan_diff_says_what_changed_and_ends_with_0(
    run: Runner, table: Table, tmp_path: Path
) -> None:
    plans = []
    for number, where in enumerate(["label < 8", "label < 7"]):
        recipe = written(tmp_path, {"sources": {"a": {"table": table.root.uri, "where": where}}})
        plans.append(tmp_path / f"{number}.parquet")
        assert run("mix", recipe, "-o", plans[-1], "--no-pin").returncode == 0
    result = run("plan", "diff", *plans)
    assert result.returncode == 0
    assert "sources.a.where  label < 8  label < 7" in result.stdout
    assert "files: 2 in both, 0 only in A, 0 only in B" in result.stdout
    assert "rows: 70 read alike, 0 more or less often, 10 only in A, 0 only in B" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(f"{plans[0]} and {plans[1]} differ: 80 and 70")
    as_json = json.loads(run("plan", "diff", *plans, "--json").stdout)
    assert as_json["read"] == {"same": 70, "other": 0, "a": 10, "b": 0}
    same = run("plan", "diff", plans[0], plans[0])
    assert same.returncode == 0
    assert same.stdout.splitlines() == [
        f"{plans[0]} and {plans[0]} are the same: fingerprint {Plan.read(plans[0]).fingerprint}"
    ]
    assert "no plan at" in refused(run("plan", "diff", plans[0], tmp_path / "none"))


def test_plan_diff_needs_no_database(run: Runner, table: Table, tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    recipe = written(tmp_path, {"sources": {"a": {"table": table.root.uri}}})
    assert run("mix", recipe, "-o", path, "--no-pin").returncode == 0
    without = "import sys; sys.modules |= dict.fromkeys(['duckdb', 'polars', 'deltalake']); " + RUN
    assert softlabels("plan", "diff", path, path, code=without).returncode == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"where": "entropi > 1"}, r'where .*"entropy"'),
    ({"balance": "labl"}, r'balance.by .*"label"'),
    ({"limit": {"each": 3, "by": "domian"}}, r'limit.by .*"domain"'),
    ({"sample_by": "top1_porb"}, r'sample_by .*"top1_prob"'),
    ({"where": "entropy"}, "where 'entropy' is FLOAT: expected what is true or false"),
    ({"where": "NULL"}, "where 'NULL' is .*: expected what is true or false"),
    ({"limit": {"each": 3, "by": "topk_ids"}}, "limit.by 'topk_ids' is INTEGER"),
    ({"balance": "topk_logprobs"}, "balance.by 'topk_logprobs' is FLOAT"),
    ({"balance": "{'a': label}"}, "balance.by .* is STRUCT"),
    ({"sample_by": "domain"}, "sample_by 'domain' is VARCHAR: expected a number"),
    ({"sample_by": "label - 5"}, "sample_by .* is -5.0 for a row"),
    ({"sample_by": "0 * label"}, "left without rows.*sample_by: 0 drops 100"),
    ({"where": "label > 99"}, "left without rows.*where drops 100"),
    ({"where": "domain IS NULL", "balance": "domain"}, "balance: null drops 10"),
    ({"weight": 0}, "sources.a.weight: .*greater than 0"),
    ({"weight": -1}, "sources.a.weight: .*greater than 0"),
    ({"split": {"take": "test", "holdout": 0.1}}, "sources.a.split.take: .*train.*holdout"),
    ({"split": {"take": "train", "holdout": 1}}, "sources.a.split.holdout: .*less than 1"),
    ({"split": {"take": "train"}}, "key 'sources.a.split.holdout' is missing"),
    ({"limit": {"ech": 3, "by": "label"}}, "unknown key .*ech'; did you mean 'each'"),
    ({"limit": {"each": 0, "by": "label"}}, "each: .*greater than 0"),
    ({"balance": {"by": "label", "temperature": 0.5}}, "temperature: .*greater than or equal to 1"),
    ({"balance": "label", "sample_by": "entropy"}, "balance and sample_by both say"),
    ({"where": "1=1; DROP TABLE labels"}, "one expression"),
    ({"where": "1=1) OR (1=1"}, "one expression"),
    ({"balance": "label FROM labels; COPY labels TO '/tmp/x'; SELECT label"}, "one expression"),
    ({"sample_by": "1) AS x, (SELECT 2"}, "one expression"),
    ({"limit": {"each": 1, "by": "(SELECT 1)"}}, "limit.by .*a subquery is refused"),
    ({"balance": "read_text('/etc/passwd')"}, "balance.by"),
    ({"balance": "getenv('HOME')"}, "balance.by .*not decided by the row alone"),
    ({"sample_by": "random()"}, "sample_by .*'random' is not decided by the row alone"),
    ({"sample_by": "count(*)"}, "sample_by .*"),
    ({"sample_by": "row_number() OVER ()"}, "sample_by .*"),
    ({"rows": 3}, "unknown key 'sources.a.rows'"),
    ({"choose": {"from": {"x": "t", "y": "t"}, "by": "entropy"}}, "exactly one of table, ensemble"),
]


@pytest.mark.parametrize(("source", "message"), BAD, ids=[str(source) for source, _ in BAD])
def test_a_recipe_that_cannot_be_meant_is_one_line_and_makes_nothing(
    run: Runner, table: Table, tmp_path: Path, source: dict[str, Any], message: str
) -> None:
    recipe = written(tmp_path, {"sources": {"a": {"table": table.root.uri, **source}}})
    found = refused(run("mix", recipe, "-o", tmp_path / "plan.parquet"))
    assert re.search(message, found), found
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert tags.tag_names(table.root) == []


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", " ", ""])
def test_a_name_that_cannot_be_shown_is_refused(
    run: Runner, table: Table, tmp_path: Path, name: str
) -> None:
    recipe = written(tmp_path, {"sources": {name: {"table": table.root.uri}}})
    assert "is no name" in refused(run("mix", recipe, "--explain"))


def test_names_are_only_names(run: Runner, table: Table, tmp_path: Path) -> None:
    name = """x"; DROP TABLE labels; --' /../../y"""
    uri = table.root.uri
    sources = {
        name: {"table": uri, "where": "label = 1"},
        "b": {"choose": {"from": {name: uri, "'": uri}, "by": "entropy"}},
    }
    path = tmp_path / "plan.parquet"
    made = run("mix", written(tmp_path, {"sources": sources}), "-o", path, "--no-pin")
    assert (made.returncode, made.stderr) == (0, "")
    assert Plan.read(path).report[0].source == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.parquet", "recipe.yaml"]


@pytest.mark.parametrize("kind", ["table", "choose", "ensemble"])
def test_teachers_that_do_not_fit_are_wrong_use(
    run: Runner, table: Table, tmp_path: Path, kind: str
) -> None:
    wide = make_table(tmp_path / "wide", rows=20, classes=12).root.uri
    words = make_sequences(tmp_path / "words").root.uri
    for other, part in ((wide, "num_classes differs"), (words, "differs")):
        both = {"x": table.root.uri, "y": other}
        kinds: dict[str, Any] = {
            "table": {name: {"table": uri} for name, uri in both.items()},
            "choose": {"a": {"choose": {"from": both, "by": "entropy"}}},
            "ensemble": {"a": {"ensemble": both}},
        }
        path = tmp_path / "plan.parquet"
        found = refused(run("mix", written(tmp_path, {"sources": kinds[kind]}), "-o", path))
        assert part in found
        assert not path.exists()
        assert tags.tag_names(table.root) == []


ESCAPE = "\x1b]0;title\x07\x1b[31mred\u202e"


def test_what_a_strangers_plan_says_cannot_steer_a_terminal(
    run: Runner, table: Table, tmp_path: Path
) -> None:
    recipe = written(tmp_path, {"sources": {"a": {"table": table.root.uri, "where": "label < 5"}}})
    path, other = tmp_path / "p.parquet", tmp_path / "q.parquet"
    assert run("mix", recipe, "-o", path, "--no-pin").returncode == 0
    plan = Plan.read(path)
    (report,) = plan.report
    hostile = report.model_copy(
        update={
            "source": ESCAPE,
            "dropped": {ESCAPE: 1},
            "chosen": {ESCAPE: 2},
        }
    )
    tables = {"a": plan.tables["a"].model_copy(update={"uri": ESCAPE})}
    setting = {**plan.recipe, ESCAPE: ESCAPE}
    replace(plan, tables=tables, recipe=setting, report=(hostile,)).write(other)
    for arguments in (["show", other], ["diff", path, other]):
        result = run("plan", *arguments)
        assert result.returncode == 0
        assert "\\x1b]0;title\\x07\\x1b[31mred\\u202e" in result.stdout
        assert not {"\x1b", "\x07", "\u202e"} & set(result.stdout + result.stderr)


def test_errors_cannot_steer_a_terminal(run: Runner, table: Table, tmp_path: Path) -> None:
    recipe = written(tmp_path, {"sources": {"a": {"table": table.root.uri}}})
    path = tmp_path / "p.parquet"
    assert run("mix", recipe, "-o", path, "--no-pin").returncode == 0
    stored = pq.read_table(path)
    meta = json.loads(stored.schema.metadata[b"softlabels.plan"])
    meta["report"][0][ESCAPE] = 1
    text = json.dumps(meta).encode()
    pq.write_table(stored.replace_schema_metadata({b"softlabels.plan": text}), path)
    result = run("plan", "show", path)
    assert result.returncode == 1
    assert "\\x1b[31mred" in result.stderr
    assert "\x1b" not in result.stderr

"""query, mix and plan show as a user runs them: exit codes, streams, files."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from softlabels.cli import main
from softlabels.plan import Plan
from softlabels.store import tags
from softlabels.store.table import Table
from tests.sequences import make_uneven
from tests.tables import make_table

RUN = "import sys; from softlabels.cli import main; sys.argv[0] = 'softlabels'; main()"


def softlabels(*arguments: object, code: str = RUN) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class Runner:
    """The command line in this process: a second cheaper than a new one."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capsys = patch, capsys

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        self._patch.setattr(sys, "argv", ["softlabels", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        code = ended.value.code
        return subprocess.CompletedProcess([], code if isinstance(code, int) else 0, out, err)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return make_table(tmp_path_factory.mktemp("cli") / "t", rows=100, shard_rows=50)


def write_recipe(folder: Path, table: Table, **source: object) -> Path:
    recipe = {"sources": {"all [/x]": {"table": table.root.uri, **source}}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a wrong use ends with."""
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_query_prints_a_table_with_values_as_they_are(table: Table) -> None:
    sql = "SELECT '[red]a[/x] :smile:' AS [text] FROM labels".replace("[text]", '"[b]"')
    result = softlabels("query", table.root.uri, sql, "--limit-print", 2)
    assert result.returncode == 0
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines == ["[b]", *["[red]a[/x] :smile:"] * 2]
    assert result.stderr == "2 of 100 rows; --limit-print shows more\n"


def test_query_formats_hold_the_same_rows(run: Runner, table: Table, tmp_path: Path) -> None:
    sql = (
        "SELECT example_id, label, topk_ids, -'inf'::FLOAT AS never FROM labels ORDER BY 1 LIMIT 3"
    )
    as_json = json.loads(run("query", f"{table.root.uri}@1", sql, "--json").stdout)
    as_csv = run("query", f"{table.root.uri}@1", sql, "--format", "csv").stdout
    file = tmp_path / "out.parquet"
    made = run("query", f"{table.root.uri}@1", sql, "-o", file)
    assert [row["example_id"] for row in as_json] == ["x00000", "x00001", "x00002"]
    assert as_json[0]["never"] is None
    assert made.stdout.splitlines()[-1] == f"{file}: 3 rows"
    stored = pq.read_table(file).drop_columns(["never"]).to_pylist()
    assert stored == [{k: v for k, v in row.items() if k != "never"} for row in as_json]
    rows = list(csv.DictReader(io.StringIO(as_csv)))
    assert [json.loads(row["topk_ids"]) for row in rows] == [row["topk_ids"] for row in as_json]
    assert [row["never"] for row in rows] == ["-inf"] * 3


def test_bytes_are_base64_in_text_and_counted_in_a_table(run: Runner, table: Table) -> None:
    sql = "SELECT 'abc'::BLOB AS image FROM labels LIMIT 1"
    assert json.loads(run("query", table.root.uri, sql, "--json").stdout) == [{"image": "YWJj"}]
    assert "YWJj" in run("query", table.root.uri, sql, "--format", "csv").stdout
    assert "<3 bytes>" in run("query", table.root.uri, sql).stdout


def test_query_refuses_on_one_line(run: Runner, table: Table, tmp_path: Path) -> None:
    uri = table.root.uri
    assert "exactly one SELECT" in refused(softlabels("query", uri, "DROP VIEW labels"))
    assert '"label"' in refused(run("query", uri, "SELECT labl FROM labels"))
    assert "no tag 'v9'" in refused(run("query", f"{uri}@v9", "SELECT 1"))
    assert "add -o" in refused(run("query", uri, "SELECT 1", "--format", "parquet"))
    assert "which format" in refused(run("query", uri, "SELECT 1", "-o", tmp_path / "a.txt"))
    assert not list(tmp_path.iterdir())


def test_mix_makes_a_pinned_plan_and_says_so_last(
    run: Runner, table: Table, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, table, where="label < 5", repeats=1.5)
    path = tmp_path / "plan.parquet"
    explained = run("mix", recipe, "--explain")
    assert explained.returncode == 0
    assert not path.exists()
    assert tags.tag_names(table.root) == []

    result = run("mix", recipe, "-o", path)
    plan = Plan.read(path)
    assert result.returncode == 0
    assert (plan.num_rows, plan.report[0].kept) == (75, 50)
    last = f"{path}: 75 rows an epoch, fingerprint {plan.fingerprint}"
    assert result.stdout.splitlines()[-1] == last
    assert explained.stdout.splitlines()[-1].endswith(plan.fingerprint)
    assert tags.tag_names(table.root) == [f"plan-{plan.fingerprint[:16]}"]
    again = run("mix", recipe, "-o", path, "--json")
    assert json.loads(again.stdout)["fingerprint"] == plan.fingerprint


def test_mix_without_a_pin_leaves_the_table_alone(run: Runner, tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=20)
    path = tmp_path / "plan.parquet"
    result = run("mix", write_recipe(tmp_path, table), "-o", path, "--no-pin")
    assert result.returncode == 0
    assert path.exists()
    assert tags.tag_names(table.root) == []


def test_mix_refuses_on_one_line_and_makes_nothing(
    run: Runner, table: Table, tmp_path: Path
) -> None:
    path = tmp_path / "plan.parquet"
    unknown = softlabels("mix", write_recipe(tmp_path, table, wehre="label = 1"), "-o", path)
    assert "did you mean 'where'?" in refused(unknown)
    column = run("mix", write_recipe(tmp_path, table, where="entropi > 1"), "-o", path)
    assert '"entropy"' in refused(column)
    several = run("mix", write_recipe(tmp_path, table, where="1=1; DROP x"), "-o", path)
    assert "one expression" in refused(several)
    empty = run("mix", write_recipe(tmp_path, table, where="label > 99"), "-o", path)
    assert "left without rows" in refused(empty)
    nowhere = run("mix", write_recipe(tmp_path, table))
    assert "-o PLAN.parquet" in refused(nowhere)
    assert not path.exists()


def test_plan_show_needs_no_database(run: Runner, table: Table, tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    recipe = write_recipe(tmp_path, table, where="label < 5")
    assert run("mix", recipe, "-o", path, "--no-pin").returncode == 0
    # None in sys.modules makes an import fail: a student's machine has none of these.
    without = "import sys; sys.modules |= dict.fromkeys(['duckdb', 'polars', 'deltalake']); " + RUN
    shown = softlabels("plan", "show", path, code=without)
    assert shown.returncode == 0
    assert "all [/x]" in shown.stdout
    assert "50 where" in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith(f"{path}: 50 rows an epoch, fingerprint ")
    described = json.loads(run("plan", "show", path, "--json").stdout)
    assert described["tables"][0]["teacher"] == "random"
    assert described["sources"][0]["dropped"] == {"where": 50}
    assert described["fingerprint"] == Plan.read(path).fingerprint
    assert "no plan at" in refused(run("plan", "show", tmp_path / "none.parquet"))


def test_query_loads_no_torch(table: Table) -> None:
    code = (
        "import sys; import softlabels.query.view, softlabels.query.lazy, softlabels.query.mix; "
        "sys.exit('torch' in sys.modules)"
    )
    assert softlabels(code=code).returncode == 0


def test_no_file_is_written_over_unless_forced(run: Runner, table: Table, tmp_path: Path) -> None:
    precious, plan = tmp_path / "precious.csv", tmp_path / "plan.parquet"
    precious.write_text("mine")
    recipe = write_recipe(tmp_path, table)
    sql = "SELECT 1 AS one FROM labels LIMIT 1"
    assert "there already" in refused(softlabels("query", table.root.uri, sql, "-o", precious))
    assert "there already" in refused(softlabels("mix", recipe, "-o", precious))
    assert precious.read_text() == "mine"
    run("query", table.root.uri, sql, "-o", precious, "--force")
    assert precious.read_text() == "one\n1\n"
    for _ in range(2):
        assert run("mix", recipe, "-o", plan).returncode == 0
    first = Plan.read(plan).fingerprint
    other = write_recipe(tmp_path, table, where="label < 5")
    assert f"holds another plan, '{first[:16]}'" in refused(softlabels("mix", other, "-o", plan))
    assert Plan.read(plan).fingerprint == first
    assert run("mix", other, "-o", plan, "--force").returncode == 0
    assert Plan.read(plan).fingerprint != first


def test_position_rules_are_counted_and_said(run: Runner, tmp_path: Path) -> None:
    table = make_uneven(tmp_path / "t", rows=60)
    positions = {
        "where": "label_rank > 0",
        "top": 0.4,
        "by": "entropy",
        "weights": [{"where": "top1_prob >= 0.25", "weight": 0.5}],
    }
    recipe = write_recipe(tmp_path, table, positions=positions)
    path = tmp_path / "plan.parquet"
    explained, made = run("mix", recipe, "--explain"), run("mix", recipe, "-o", path)
    plan = Plan.read(path)
    (source,), rules = plan.report, plan.tables["all [/x]"].positions
    assert rules is not None
    assert source.positions is not None
    assert source.positions_kept is not None
    share = f"{source.positions_kept / source.positions:.1%}"
    counts = f"{source.positions_kept} of {source.positions} ({share}), "
    border = rules.where[1].constant
    words = f"keeps label_rank > 0 and entropy >= {border!s:.6}"
    for result in (explained, made, run("plan", "show", path)):
        assert result.returncode == 0
        assert counts + f"{source.positions_unknown} unknown" in result.stdout
        assert f"positions of table 'all [/x]': {words}" in result.stdout
        assert "weight 0.5 where top1_logprob >= -1.3862944" in result.stdout
    described = json.loads(run("plan", "show", path, "--json").stdout)
    assert described["tables"][0]["positions"] == str(rules)
    assert described["sources"][0]["positions_kept"] == source.positions_kept
    assert described["recipe"]["sources"][0]["positions"] == positions


def test_without_position_rules_nothing_is_said_of_them(run: Runner, table: Table) -> None:
    recipe = write_recipe(Path(table.root.uri).parent, table)
    result = run("mix", recipe, "--explain")
    assert "positions" not in result.stdout
    assert (
        "positions" not in json.loads(run("mix", recipe, "--explain", "--json").stdout)["tables"][0]
    )


def test_position_rules_are_refused_on_one_line(run: Runner, table: Table, tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    unknown = run("mix", write_recipe(tmp_path, table, positions="entropi > 1"), "-o", path)
    assert "did you mean 'entropy'?" in refused(unknown)
    nothing = run("mix", write_recipe(tmp_path, table, positions="entropy > 99"), "-o", path)
    assert "positions drops 100" in refused(nothing)
    assert not path.exists()


def test_a_plan_that_cannot_be_written_pins_nothing(run: Runner, tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=20)
    (tmp_path / "file").write_text("")
    plan = tmp_path / "file" / "p.parquet"
    result = run("mix", write_recipe(tmp_path, table), "-o", plan)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert tags.tag_names(table.root) == []


def test_a_plan_that_cannot_be_pinned_is_pinned_by_the_same_command(
    run: Runner, tmp_path: Path
) -> None:
    table = make_table(tmp_path / "t", rows=20)
    recipe, plan = write_recipe(tmp_path, table), tmp_path / "p.parquet"
    (tmp_path / "t" / tags.FOLDER).parent.mkdir(exist_ok=True)
    (tmp_path / "t" / tags.FOLDER).write_text("in the way")
    assert run("mix", recipe, "-o", plan).returncode == 1
    assert plan.exists()
    (tmp_path / "t" / tags.FOLDER).unlink()
    assert run("mix", recipe, "-o", plan).returncode == 0
    assert len(tags.tag_names(table.root)) == 1

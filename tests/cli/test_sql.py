"""query over several tables and the user's own files, as a user runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.query.view import query
from softlabels.store.table import Table
from tests.cli.test_query import RUN, Runner, refused
from tests.tables import make_table

BOTH = (
    "SELECT count(*) AS n, avg(kl(a, b)) AS kl, avg(agree(a, b)::INT) AS same "
    "FROM a.labels a JOIN b.labels b USING (example_id)"
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    folder = tmp_path_factory.mktemp("sql")
    return {name: make_table(folder / name, rows=60, seed=seed) for seed, name in enumerate("ab")}


def test_tables_by_name(run: Runner, pair: dict[str, Table]) -> None:
    a, b = (f"{name}={table.root.uri}@1" for name, table in pair.items())
    found = run("query", "--table", a, "--table", b, BOTH, "--format", "csv")
    assert found.returncode == 0, found.stderr
    wanted = query(dict(pair), BOTH).to_pylist()[0]
    header, line = found.stdout.splitlines()
    assert header == "n,kl,same"
    np.testing.assert_allclose([float(v) for v in line.split(",")], list(wanted.values()))
    assert 0 < wanted["same"] < 1


def test_a_table_without_a_name_beside_others_and_a_file(
    run: Runner, pair: dict[str, Table], tmp_path: Path
) -> None:
    meta = tmp_path / "meta.csv"
    meta.write_text("example_id,kind\nx00003,odd\nx00004,even\n")
    found = run(
        "query",
        pair["a"].root.uri,
        "SELECT kind, l.top1_id = o.top1_id AS same FROM labels l "
        "JOIN old.labels o USING (example_id) JOIN meta USING (example_id) ORDER BY kind",
        *("--table", f"old={pair['b'].root.uri}", "--file", f"meta={meta}", "--json"),
    )
    assert found.returncode == 0, found.stderr
    assert '"kind": "even"' in found.stdout
    assert found.stdout.count('"kind"') == 2


def test_arrow_goes_to_files_and_pipes(pair: dict[str, Table], run: Runner, tmp_path: Path) -> None:
    uri, sql = pair["a"].root.uri, "SELECT example_id, topk_ids FROM labels ORDER BY 1"
    wanted = query(pair["a"], sql)
    path = tmp_path / "out.arrow"
    made = run("query", uri, sql, "-o", path)
    assert made.stdout == f"{path}: 60 rows\n"
    assert pa.ipc.open_file(path).read_all() == wanted
    command = [sys.executable, "-W", "error", "-c", RUN, "query", uri, sql, "--format", "arrow"]
    piped = subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert pa.ipc.open_stream(piped.stdout).read_all() == wanted
    parquet = tmp_path / "out.parquet"
    run("query", uri, sql, "-o", parquet)
    assert pq.read_table(parquet).to_pylist() == wanted.to_pylist()


def test_columns_of_one_name_are_all_there(
    pair: dict[str, Table], run: Runner, tmp_path: Path
) -> None:
    sql = "SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a"
    for kind in ("json", "csv"):
        printed = run("query", pair["a"].root.uri, sql, "--format", kind).stdout
        if kind == "json":
            assert json.loads(printed) == [{"a": 1, "a_2": 2, "a_1": 3, "a_3": 4}]
        else:
            assert printed == "a,a_2,a_1,a_3\n1,2,3,4\n"
    shown = run("query", pair["a"].root.uri, sql).stdout
    assert "a_3" in shown


def test_sums_are_numbers_in_json(pair: dict[str, Table], run: Runner) -> None:
    sql = "SELECT sum(label) AS n, 0.25::DECIMAL(9, 2) AS d, [sum(label)] AS l FROM labels"
    found = json.loads(run("query", pair["a"].root.uri, sql, "--json").stdout)
    assert found == [{"n": 270, "d": 0.25, "l": [270]}]
    large = "SELECT 170141183460469231731687303715884105::HUGEINT AS n"
    found = json.loads(run("query", pair["a"].root.uri, large, "--json").stdout)
    assert found == [{"n": 170141183460469231731687303715884105}]


@pytest.mark.parametrize("kind", ["json", "csv", "table"])
def test_what_no_date_can_be_is_refused(pair: dict[str, Table], run: Runner, kind: str) -> None:
    sql = "SELECT 'infinity'::TIMESTAMP AS t"
    line = refused(run("query", pair["a"].root.uri, sql, "--format", kind))
    assert "a date or time cannot be shown" in line
    assert "::VARCHAR" in line


def test_wrong_use_is_one_line_and_writes_nothing(
    run: Runner, pair: dict[str, Table], tmp_path: Path
) -> None:
    uri, out = pair["a"].root.uri, tmp_path / "out.csv"
    hostile = 'a"; DROP VIEW labels; --'
    for arguments, words in (
        (["SELECT 1"], "which table?"),
        ([uri, "SELECT 1", "--json"], "json or, as '.*out.csv' says, csv"),
        ([uri, "SELECT 1", "--format", "parquet"], "parquet or, as '.*out.csv' says, csv"),
        ([uri, "SELECT 1", "--json", "--format", "csv"], "csv"),
        ([uri, "SELECT", "1"], "put the query in quotes"),
        ([uri, "SELECT 1", "--table", "a"], "--table 'a': expected NAME=VALUE"),
        ([uri, "SELECT 1", "--table", f"={uri}"], "expected NAME=VALUE"),
        ([uri, "SELECT 1", "--file", "m="], "--file 'm=': expected NAME=VALUE"),
        ([uri, "SELECT 1", "--file", f"m={tmp_path}/m.csv"], "there is no file"),
        ([uri, "SELECT 1", "--file", f"m={tmp_path}/*.csv"], "there is no file"),
        (["SELECT 1", "--table", f"a={uri}", "--table", f"a={uri}"], "is '.*' already"),
        (["SELECT 1", "--table", f"a={uri}", "--table", f"A={uri}"], "two tables have the name"),
        (["SELECT 1", "--table", f"main={uri}"], "'main' is DuckDB's own"),
        (["SELECT 1", "--table", f"a={tmp_path}/none"], "there is no table at"),
        (["SELECT 1 FROM labels", "--table", f"{hostile}={uri}"], "there is no relation 'labels'"),
        ([uri, "SELECT entropi FROM labels"], '"entropy"'),
        ([uri, "SELECT entropi FROM positions"], '"entropy"'),
        ([uri, "SELECT * FROM label"], "did you mean 'labels'?"),
        ([uri, "SELECT prob_off(l, 3) FROM labels l"], "prob_of"),
        ([uri, "SELECT kl(l) FROM labels l"], "kl"),
        ([uri, "SELECT margin(l) FROM classes l"], "topk_logprobs"),
        ([uri, "COPY (SELECT 1) TO 'x.csv'"], "exactly one SELECT"),
        ([uri, "CREATE MACRO agree(a, b) AS true"], "exactly one SELECT"),
        ([uri, "SELECT 1; SELECT 2"], "exactly one SELECT"),
    ):
        line = refused(run("query", *arguments, "-o", out))
        assert re.search(words, line) or words in line, (arguments, line)
    assert not list(tmp_path.iterdir())

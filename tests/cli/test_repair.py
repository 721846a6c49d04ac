"""calibrate, suspects and diff as a user runs them."""

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from softlabels.store.table import Table
from tests.cli.test_query import Runner, refused
from tests.query.planted import Planted, make_planted


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return make_planted(tmp_path_factory.mktemp("cli") / "t", rows=1500, noise=0.05, sharpness=9.0)


def test_calibrate_says_what_it_did(run: Runner, tmp_path: Path) -> None:
    uri = make_planted(tmp_path / "t", rows=3000, heat=2.0).table.root.uri
    dry = run("calibrate", uri, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "would be made at temperature" in dry.stdout
    assert Table.open(uri).version == 1
    done = run("calibrate", uri, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"] == 2
    assert found["calibration"]["ece_after"] < found["calibration"]["ece_before"]
    again = run("calibrate", uri)
    assert "calibrated already" in refused(again)
    more = run("calibrate", uri, "--again", "--temperature", "1.1")
    assert more.returncode == 0, more.stderr
    assert more.stdout.splitlines()[-1] == f"{uri}@3: 3000 rows at temperature 1.1"
    shown = run("show", uri, "--json")
    assert json.loads(shown.stdout)["calibration"]["temperature"] == 1.1


def test_calibrate_that_does_not_help_says_so_and_ends_well(run: Runner, tmp_path: Path) -> None:
    table = make_planted(tmp_path / "t", rows=1500, k=3, temperatures=(2.0,)).table
    done = run("calibrate", table.root.uri)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{table.root.uri}: as it was, at version 1"
    other = run("calibrate", table.root.uri, "--temperature", "3")
    assert other.returncode == 1
    assert "capture it with `temperatures: [3]`" in other.stderr
    assert len(other.stderr.splitlines()) == 1


def test_suspects_go_to_a_file_and_are_summed_up(
    run: Runner, noisy: Planted, tmp_path: Path
) -> None:
    uri = noisy.table.root.uri
    done = run("suspects", uri, "--limit", "2", "-o", str(tmp_path / "s.parquet"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["example_id", "view"]
    assert "estimated wrong labels" in done.stdout
    rows = pq.read_table(tmp_path / "s.parquet")
    assert lines[-1] == f"{tmp_path / 's.parquet'}: {rows.num_rows} rows"
    listed = run("suspects", uri, "--json", "--limit", "3", "-o", str(tmp_path / "s.csv"))
    found = json.loads(listed.stdout)
    assert found["count"] == rows.num_rows
    assert abs(found["noise"]["wrong"] - noisy.wrong.mean()) < 0.015
    assert [r["example_id"] for r in found["suspects"]] == rows["example_id"].to_pylist()[:3]
    with open(tmp_path / "s.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == rows.num_rows


def test_diff_lists_the_worst_and_writes_all(run: Runner, noisy: Planted, tmp_path: Path) -> None:
    other = make_planted(tmp_path / "b", rows=1600, sharpness=9.0, heat=1.3).table.root.uri
    uri = noisy.table.root.uri
    done = run("diff", uri, other, "--limit", "2", "-o", str(tmp_path / "d.csv"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("x0")]) == 2
    assert "1500 rows in both, 100 added, 0 removed" in done.stdout
    with open(tmp_path / "d.csv", newline="") as file:
        assert lines[-1] == f"{tmp_path / 'd.csv'}: {len(list(csv.DictReader(file)))} rows"
    found = json.loads(run("diff", uri, other, "--json", "--only", "added", "--limit", "5").stdout)
    assert found["added"] == 100
    assert [row["example_id"] for row in found["rows"]] == [f"x{i:05d}" for i in range(1500, 1505)]
    same = run("diff", uri, f"{uri}@1")
    assert "0 added, 0 removed" in same.stdout
    assert same.stdout.startswith("(no rows)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("suspects", "T", "-o", "x.txt"), "in which format 'x.txt'"),
        (("suspects", "T", "--sure", "2"), "sure 2.0"),
        (("suspects", "T", "--where", "nothing = 1"), "nothing"),
        (("diff", "T", "T", "--only", "new"), "--only 'new': expected one of added"),
        (("diff", "T", "T@9"), "no version 9"),
        (("calibrate", "T@nope"), "no tag 'nope'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    run: Runner, noisy: Planted, arguments: tuple[str, ...], message: str
) -> None:
    uri = noisy.table.root.uri
    done = run(*(a.replace("T", uri, 1) if a.startswith("T") else a for a in arguments))
    assert message in refused(done)

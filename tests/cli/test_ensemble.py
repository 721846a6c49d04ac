"""`softlabels ensemble`: one table of several, what it says, how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from softlabels.store.table import Table
from tests.tables import make_table


def run(*arguments: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "softlabels", "ensemble", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    for seed, (name, rows, k) in enumerate((("a", 30, 10), ("b", 25, 10), ("head", 30, 4))):
        make_table(folder / name, rows, k=k, seed=seed)
    lines = ("ensemble:", f"  a: {folder / 'a'}", f"  b: {{table: {folder / 'b'}@1, weight: 2}}")
    (folder / "spec.yaml").write_text("\n".join(lines))
    return folder / "spec.yaml"


def test_it_makes_a_table_once(spec: Path, tmp_path: Path) -> None:
    table = tmp_path / "both"
    code, out, _ = run(spec, "-o", table, "--dry-run")
    assert (code, table.exists()) == (0, False)
    assert out.splitlines()[-1] == f"{table} would be made: exact, k 10, 1 unit"
    code, out, _ = run(spec, "-o", table)
    assert (code, out.splitlines()) == (
        0,
        [
            "5 rows of the first teacher left out: not in b",
            f"{table}@1: 25 rows made, 0 before",
        ],
    )
    assert Table.open(str(table)).contents.parents[1].weight == 2
    code, out, _ = run(spec, "-o", table, "--json")
    report = json.loads(out)
    assert (code, report["rows"], report["already"], report["committed"]) == (0, 0, 25, 0)
    assert report["dropped"] == {"not in b": 5}


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (["ensemble.b.weight=margn"], 2, "member 'b': weight 'margn'"),
        (["ensemble.b.weight=-1"], 2, "ensemble.b.weight"),
        (["ensemble.c=nowhere"], 2, "there is no table at"),
        (["ensemble.b.by_class={claas1: 2}"], 2, "did you mean 'class1'?"),
        (["profil=compact"], 2, "did you mean 'profile'?"),
        (["ensemble.b.temperature=2"], 2, "temperature 2.0 is asked"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_makes_nothing(
    spec: Path, tmp_path: Path, changes: list[str], code: int, message: str
) -> None:
    options = [part for change in changes for part in ("--set", change)]
    found, out, err = run(spec, "-o", tmp_path / "t", *options)
    assert (found, out, (tmp_path / "t").exists()) == (code, "", False)
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert message in line


def test_what_is_not_exact_is_refused(spec: Path, tmp_path: Path) -> None:
    change = f"ensemble.b={spec.parent / 'head'}"
    code, _, err = run(spec, "-o", tmp_path / "t", "--set", change)
    assert (code, (tmp_path / "t").exists()) == (1, False)
    assert "not by 'b', which has a mass of" in err

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

from softlabels.cli import main
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.student.trainer import train
from tests.report.planted import label, labels, source, with_labels
from tests.student.problem import make_problem, run_spec
from tests.tables import make_table


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def softlabels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    def run(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["softlabels", "report", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return run


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = with_labels(np.roll(labels(), 1)).slice(0, 500)
    return label(tmp_path_factory.mktemp("shifted"), rows).root.uri


def test_a_page_and_a_line_for_each_finding(
    tmp_path: Path, shifted: str, softlabels: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = softlabels(shifted)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith("error: labels-shifted: The teacher's choice is the label of ")
    assert lines[-1] == "report.html: 1 error, 0 warnings, 0 notes"
    page = Path("report.html").read_text(encoding="utf-8")
    assert "error: labels-shifted" in page
    assert softlabels(shifted).code == 0  # a report may be written over


@pytest.mark.parametrize(("fail_on", "code"), [("warning", 1), ("error", 1), (None, 0)], ids=str)
def test_fail_on_an_error(shifted: str, softlabels: Run, fail_on: str | None, code: int) -> None:
    extra = [] if fail_on is None else ["--fail-on", fail_on]
    ended = softlabels(shifted, "--json", *extra)
    assert ended.code == code
    assert json.loads(ended.out)["findings"][0]["id"] == "labels-shifted"


def test_fail_on_a_warning_only(tmp_path: Path, softlabels: Run) -> None:
    table = label(tmp_path, source().slice(0, 600), arguments={"scale": 3.0}).root.uri
    assert softlabels(table, "--json", "--fail-on", "warning").code == 1
    assert softlabels(table, "--json", "--fail-on", "error").code == 0
    assert softlabels(table, "--fail-on", "note").code == 2


def test_json_has_all_facts_and_no_page(
    tmp_path: Path, shifted: str, softlabels: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(softlabels(f"{shifted}@1", "--json").out)
    assert not Path("report.html").exists()
    assert found["kind"] == "table"
    part = found["parts"][0]
    facts = {"lineage", "bytes", "teacher", "entropy", "kept", "codec", "classes", "duplicates"}
    assert facts | {"alignment", "examples", "looked_at", "rows"} <= part.keys()
    assert part["examples"]["hardest"][0]["picture"] == "28x28"
    both = softlabels(shifted, "--json", "-o", tmp_path / "page.html")
    assert json.loads(both.out)["kind"] == "table"
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_plan_with_its_funnel(
    tmp_path: Path, softlabels: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_table(tmp_path / "labels", rows=300)
    recipe = tmp_path / "recipe.yaml"
    source_ = {"table": str(tmp_path / "labels"), "where": "label < 5", "loss_weight": 0.5}
    recipe.write_text(yaml.safe_dump({"sources": {"some": source_}}))
    mix(Recipe.read(recipe)).write(tmp_path / "plan.parquet")
    page = tmp_path / "page.html"
    assert softlabels(tmp_path / "plan.parquet", "-o", page).code == 0
    text = " ".join(page.read_text(encoding="utf-8").split())
    assert "<h3>some</h3>" in text
    assert '<tr><td>− where</td><td class="number">150</td></tr>' in text
    assert '<tr><td>loss weight of a row</td><td class="number">0.5</td></tr>' in text
    found = json.loads(softlabels(tmp_path / "plan.parquet", "--json").out)
    assert found["plan"]["sources"][0]["kept"] == 150
    assert sum(c["labels"] for c in found["parts"][0]["classes"]["classes"]) == 150
    (tmp_path / "labels").rename(tmp_path / "away")
    lost = softlabels(tmp_path / "plan.parquet", "--json")
    assert (lost.code, "--root some=URI" in lost.err or "--root" in lost.err) == (2, True)
    name = next(iter(found["plan"]["tables"]))["table"]
    root = f"{name}={tmp_path / 'away'}"
    assert softlabels(tmp_path / "plan.parquet", "--json", "--root", root).code == 0


def test_what_was_not_judged_is_said_and_cannot_steer_a_terminal(
    tmp_path: Path, softlabels: Run
) -> None:
    names = [f"c{n}\x1b[31m" for n in range(10)]
    some = with_labels(np.where(labels() == 3, 4, labels())).slice(0, 600)
    table = label(tmp_path, some, classes=names).root.uri
    ended = softlabels(table, "-o", tmp_path / "page.html")
    assert "c3\\x1b[31m" in ended.out
    assert "\x1b" not in ended.out
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"sources": {"s": {"table": table, "where": "label < 5"}}}))
    mix(Recipe.read(recipe)).write(tmp_path / "plan.parquet")
    shutil.rmtree(Path(table) / "_delta_log")
    ended = softlabels(tmp_path / "plan.parquet", "-o", tmp_path / "page.html")
    assert "not judged: how good the teacher of" in ended.out.splitlines()[-2]
    assert ended.out.splitlines()[-1].endswith(": 0 errors, 0 warnings, 0 notes")


def test_a_run_beside_its_baseline(tmp_path: Path, softlabels: Run) -> None:
    plan = make_problem(tmp_path, rows=60)
    for name, weight in (("soft", 1.0), ("hard", 0.0)):
        out = str(tmp_path / name)
        train(run_spec(tmp_path, plan, steps=3, out=out, loss={"kd_weight": weight}))
    page = tmp_path / "page.html"
    ended = softlabels(tmp_path / "soft", "--baseline", tmp_path / "hard", "-o", page)
    assert ended.code == 0
    assert "Did soft labels help?:" in ended.out  # neither was evaluated
    found = json.loads(softlabels(tmp_path / "soft", "--json").out)
    assert found["verdict"]["helped"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "there is no table"),
        (["nowhere.parquet"], "there is no plan"),
        (["{table}", "--baseline", "x"], "--baseline is for a run's folder"),
        (["{table}", "--root", "a=b"], "--root is for plans and runs"),
        (["{table}", "--root", "a"], "expected TABLE=URI"),
        (["{table}", "--pixels", "28x28"], "expected COLUMN=HEIGHTxWIDTH"),
        (["{table}", "--pixels", "image=0x28"], "expected COLUMN=HEIGHTxWIDTH"),
        (["{table}", "--pixels", "image=4x4x2"], "expected COLUMN=HEIGHTxWIDTH"),
        (["{table}", "--pixels", "image=28x28"], "carries no column 'image'"),
        (["{table}", "-o", "{table}"], "is a folder"),
        (["{table}", "-o", "{file}"], "is there already"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(
    tmp_path: Path,
    shifted: str,
    softlabels: Run,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.html").write_text("<p>not a report")
    ended = softlabels(*(a.format(table=shifted, file="mine.html") for a in arguments))
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.html"]
    assert Path("mine.html").read_text() == "<p>not a report"


def test_force_writes_over_it(tmp_path: Path, shifted: str, softlabels: Run) -> None:
    page = tmp_path / "mine.html"
    page.write_text("<p>not a report")
    assert softlabels(shifted, "-o", page, "--force").code == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")

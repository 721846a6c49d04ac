"""A report of a plan: only the plan's own bytes, every teacher's rows, no false alarm."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from softlabels.errors import IntegrityError, StorageError
from softlabels.plan import Plan
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.report.finding import Finding
from softlabels.report.gather import Options, gather
from softlabels.report.opened import Group
from softlabels.report.page import render
from softlabels.report.rows import of_plan
from softlabels.report.verdict import run_findings
from softlabels.store.table import Table
from tests.plans import make_plan
from tests.query.planted import make_planted
from tests.report.planted import findings, ids
from tests.sequences import make_uneven


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three teachers of the same rows: p and q are sound, hot is three times too sure."""
    folder = tmp_path_factory.mktemp("tables")
    make_planted(folder / "p", 3000, 8)
    make_planted(folder / "q", 3000, 8, heat=1.15, name="other")
    make_planted(folder / "hot", 3000, 8, heat=3.0, temperatures=(3.0,))
    return folder


def mixed(folder: Path, **sources: Any) -> Path:
    """The plan of these sources."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"sources": sources}))
    mix(Recipe.read(recipe)).write(folder / "plan.parquet")
    return folder / "plan.parquet"


def grave(found: list[Finding]) -> list[str]:
    return [finding.id for finding in found if finding.severity != "note"]


BEST = {"from": {"a": "p", "b": "q"}, "by": "top1_prob"}
CURATED: dict[str, dict[str, Any]] = {
    "trusted": {"table": "p", "where": "top1_id = label"},
    "suspects": {"table": "p", "where": "top1_id <> label"},
    "unsure": {"table": "p", "where": "top1_prob < 0.5"},
    "sure": {"table": "p", "where": "top1_prob > 0.95"},
    "some classes": {"table": "p", "where": "label < 4"},
    "few of each": {"table": "p", "limit": {"each": 40, "by": "label"}},
    "ensemble": {"ensemble": {"a": "p", "b": "q"}},
    "some of an ensemble": {"ensemble": {"a": "p", "b": "q"}, "where": "top1_id <> label"},
    "chosen": {"choose": BEST},
    "agreeing": {"choose": BEST | {"agreeing": "label"}},
}


def located(source: Any, folder: Path) -> Any:
    """The source with the tables p and q where they are."""
    if isinstance(source, dict):
        return {key: located(value, folder) for key, value in source.items()}
    return str(folder / source) if source in ("p", "q") else source


@pytest.mark.parametrize("name", CURATED)
def test_sound_plans_raise_nothing(tmp_path: Path, tables: Path, name: str) -> None:
    assert grave(findings(mixed(tmp_path, s=located(CURATED[name], tables)))) == []


def test_halves_of_two_tables_raise_nothing(tmp_path: Path, tables: Path) -> None:
    halves = {"a": ("p", "label < 4"), "b": ("q", "label >= 4")}
    sources = {n: {"table": str(tables / t), "where": where} for n, (t, where) in halves.items()}
    assert ids(findings(mixed(tmp_path, **sources))) == []


def test_a_bad_teacher_is_found_whatever_rows_are_taken(tmp_path: Path, tables: Path) -> None:
    hot = str(tables / "hot")
    whole = findings(mixed(tmp_path, s={"table": hot}))
    assert ids(whole) == ["uncalibrated"]
    for where in ("top1_id = label", "top1_id <> label"):
        some = findings(mixed(tmp_path, s={"table": hot, "where": where}))
        assert [f.sentence for f in some if f.severity != "note"] == [whole[0].sentence]
    second = findings(mixed(tmp_path, s={"ensemble": {"a": str(tables / "p"), "b": hot}}))
    assert ids(second) == ["uncalibrated"]


def test_a_temperature_that_mends_a_teacher_is_seen(tmp_path: Path, tables: Path) -> None:
    members = {"a": str(tables / "p"), "b": {"table": str(tables / "hot"), "temperature": 3}}
    plan = mixed(tmp_path, s={"ensemble": members})
    assert [part["temperature"] for part in gather(str(plan))["parts"]] == [1.0, 3.0]
    assert ids(findings(plan)) == []


def test_each_teacher_of_an_ensemble_is_described(tmp_path: Path, tables: Path) -> None:
    ensemble = {"a": str(tables / "p"), "b": str(tables / "q")}
    facts = gather(str(mixed(tmp_path, s={"ensemble": ensemble, "where": "number < 450"})))
    first, second = facts["parts"]
    assert [part["rows"] for part in facts["parts"]] == [450, 450]
    assert [part["lineage"]["teacher"] for part in facts["parts"]] == ["planted", "other"]
    assert (first["further"], second["further"]) == (False, True)
    numbers = [int(e["id"][1:]) for e in second["examples"]["hardest"]]
    assert numbers
    assert max(numbers) < 450
    assert [part["version"]["rows"] for part in facts["parts"]] == [3000, 3000]
    text = render(facts, run_findings(facts), None)
    assert "judged on the whole version: 3,000 of its 3,000 rows" in text


def test_what_only_the_chosen_rows_show_is_a_note(tmp_path: Path) -> None:
    make_planted(tmp_path / "t", 3000, 8, sharpness=4)
    source = {"table": str(tmp_path / "t"), "where": "entropy < 0.01"}
    found = findings(mixed(tmp_path, s=source))
    assert [(f.id, f.severity) for f in found] == [("no-entropy", "note")]
    assert found[0].sentence.startswith("Of the rows that the plan takes, not of the table: ")


def test_position_rules_are_kept(tmp_path: Path) -> None:
    make_uneven(tmp_path / "t", rows=200)
    plan = mixed(tmp_path, s={"table": str(tmp_path / "t"), "positions": "entropy > 1.8"})
    facts = gather(str(plan))
    kept = Plan.read(plan).report[0]
    (part,) = facts["parts"]
    assert part["looked_at"]["positions"] == kept.positions_kept
    assert 0 < part["looked_at"]["positions"] < (kept.positions or 0)
    assert part["entropy"]["quantiles"]["1 %"] > 1.8
    assert part["version"]["looked_at"]["positions"] > part["looked_at"]["positions"]
    assert part["alignment"]["verdict"] != "contradiction"
    render(facts, run_findings(facts), None)


def test_without_its_log_chosen_rows_are_not_judged(tmp_path: Path, tables: Path) -> None:
    shutil.copytree(tables / "hot", tmp_path / "t")
    whole = mixed(tmp_path, s={"table": str(tmp_path / "t")}).rename(tmp_path / "whole.parquet")
    some = mixed(tmp_path, s={"table": str(tmp_path / "t"), "where": "top1_id = label"})
    shutil.rmtree(tmp_path / "t/_delta_log")
    assert ids(findings(whole)) == ["uncalibrated"]
    facts = gather(str(some))
    assert grave(run_findings(facts)) == []
    assert facts["parts"][0]["version"] == {}
    assert "cannot be told from chosen rows" in facts["notes"][0]
    render(facts, [], None)


def test_another_version_in_its_place_is_not_judged(tmp_path: Path, tables: Path) -> None:
    plan = mixed(tmp_path, s={"table": str(tables / "p"), "where": "label < 4"})
    (name,) = Plan.read(plan).tables
    shutil.copytree(tables / "q", tmp_path / "x")
    shutil.copytree(tables / "p/data", tmp_path / "x/data", dirs_exist_ok=True)
    facts = gather(str(plan), Options(roots={name: str(tmp_path / "x")}))
    assert "the plan read" in facts["notes"][0]
    assert facts["parts"][0]["version"] == {}


@pytest.mark.parametrize("what", ["another file", "a changed byte", "cut short"])
def test_only_the_files_that_the_plan_names(tmp_path: Path, tables: Path, what: str) -> None:
    root = tmp_path / "t"
    shutil.copytree(tables / "p", root)
    table = Table.open(str(root))
    plan = make_plan({"a": table})
    path = table.files[0].path
    data = bytearray((root / path).read_bytes())
    if what == "a changed byte":  # in a column that no report reads
        column = shard_column(root / path, "number")
        data[column] ^= 1
    if what == "cut short":
        data = data[:-100]
    (root / path).write_bytes(data)
    if what == "another file":  # one that who reports may read and who made the plan may not
        other = Table.open(str(tables / "q"))
        files = (plan.tables["a"].files[0].model_copy(update={"path": other.files[0].path}),)
        moved = {"uri": other.root.uri, "files": files}
        at = [n == 0 for n in range(plan.entries.num_rows)]
        entries = plan.entries.filter(at)
        place = entries.schema.get_field_index("file")
        entries = entries.set_column(place, entries.schema.field(place), [[other.files[0].path]])
        plan = replace(
            plan, entries=entries, tables={"a": plan.tables["a"].model_copy(update=moved)}
        )
    plan.write(tmp_path / "plan.parquet")
    with pytest.raises(IntegrityError, match=r"the plan says .*: it is not the file"):
        gather(str(tmp_path / "plan.parquet"))


def shard_column(path: Path, name: str) -> int:
    """Where the values of a column begin in a file."""
    import pyarrow.parquet as pq

    group = pq.read_metadata(path).row_group(0)
    chunks = [group.column(n) for n in range(group.num_columns)]
    found = next(chunk for chunk in chunks if chunk.path_in_schema == name)
    return int(found.data_page_offset) + int(found.total_compressed_size) // 2


def test_swapped_files_of_a_table_are_refused(tmp_path: Path, tables: Path) -> None:
    shutil.copytree(tables / "p", tmp_path / "t")
    first, second = (tmp_path / "t" / f.path for f in Table.open(str(tmp_path / "t")).files[:2])
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(IntegrityError, match="the log says"):
        gather(str(tmp_path / "t"))


def test_a_footer_of_another_file_is_refused(tmp_path: Path, tables: Path) -> None:
    shutil.copytree(tables / "p", tmp_path / "t")
    path = tmp_path / "t" / Table.open(str(tmp_path / "t")).files[0].path
    data = path.read_bytes()
    assert data.count(b"softlabels.format_version") == 1
    path.write_bytes(data.replace(b"softlabels.format_version", b"Softlabels.format_version"))
    with pytest.raises(IntegrityError, match=r"has a footer of sha256 .* the log says"):
        gather(str(tmp_path / "t"))


@pytest.mark.parametrize(
    ("group", "said"),
    [
        (Group("{file}", 7, 400), "reads row group 7 of .*, it has 3"),
        (Group("{file}", 0, 401), "reads 401 rows of row group 0 of .*, it has 400 rows"),
        (Group("{file}", 0, 2, np.array([0, 400], np.int32)), "reads row 400 of row group 0"),
        (Group("{file}", 0, 1, np.array([-1], np.int32)), "reads row -1 of row group 0"),
        (Group("data/x.parquet", 0, 1), "does not list file 'data/x.parquet'"),
    ],
)
def test_rows_that_are_not_there(tables: Path, group: Group, said: str) -> None:
    table = Table.open(str(tables / "p"))
    (part,) = of_plan(make_plan({"a": table}), {})
    path = group.path.format(file=table.files[0].path)
    with pytest.raises(IntegrityError, match=said):
        list(part.read([replace(group, path=path)], ["label"]))


def test_a_place_without_credentials_is_one_line(
    tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    plan = make_plan({"a": Table.open(str(tables / "p"))})
    moved = plan.tables["a"].model_copy(update={"uri": "s3://no-such-bucket/labels"})
    replace(plan, tables={"a": moved}).write(tmp_path / "plan.parquet")
    with pytest.raises(StorageError, match="cannot read 's3://no-such-bucket/labels/data/") as told:
        gather(str(tmp_path / "plan.parquet"))
    assert "\n" not in str(told.value)


def test_a_fault_of_table_and_chosen_rows_is_said_once(tmp_path: Path) -> None:
    make_planted(tmp_path / "t", 2000, 8, k=1)
    found = findings(mixed(tmp_path, s={"table": str(tmp_path / "t"), "where": "label < 4"}))
    assert [f.severity for f in found if f.id == "k-too-small"] == ["warning"]


def test_a_row_of_two_sources_is_looked_at_once(tmp_path: Path, tables: Path) -> None:
    p = str(tables / "p")
    sources = {"a": {"table": p, "where": "number < 30"}, "b": {"table": p, "where": "number < 50"}}
    facts = gather(str(mixed(tmp_path, **sources)))
    assert [part["rows"] for part in facts["parts"]] == [50]
    assert facts["parts"][0]["duplicates"]["same_id"] == 0

"""What a user meets of delete, compact and publish: what they say, their JSON, their errors."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softlabels.store import tags
from softlabels.store.table import Table
from tests.cli.test_table import error_of, run
from tests.tables import make_table


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return make_table(tmp_path / "labels", rows=300, shard_rows=50)


def json_of(*arguments: str, cwd: Path) -> Any:
    return json.loads(run(*arguments, "--json", cwd=cwd).stdout)


def last(text: str) -> str:
    return text.splitlines()[-1]


def test_delete_says_first_and_does_then(tmp_path: Path, table: Table) -> None:
    where = ("delete", "labels", "--where", "label = 7")
    said = run(*where, cwd=tmp_path).stdout
    assert "x00007, x00017" in said
    assert last(said) == (
        f"{table.root.uri}: 30 rows of 30 examples would be deleted, 270 left "
        "(6 files are written again, 0 dropped); add --yes to do it"
    )
    assert Table.open(table.root.uri).version == 1
    done = run(*where, "--yes", cwd=tmp_path)
    assert last(done.stdout) == (
        f"{table.root.uri}@2: 30 rows of 30 examples deleted, 270 left "
        "(6 files are written again, 0 dropped); captures will pass them over"
    )
    again = run(*where, "--yes", cwd=tmp_path).stdout
    assert "the same was asked for before: version 2 is without these rows" in again
    assert last(again) == f"{table.root.uri}@2: no row matches, nothing was deleted"
    assert "delete" in run("log", "labels", cwd=tmp_path).stdout


def test_its_commands_remove_the_rows_for_good(tmp_path: Path, table: Table) -> None:
    tags.make_tag(table.root, "v1", 1, table.snapshot_digest)
    tags.make_tag(table.root, "plan-0123456789abcdef", 1, table.snapshot_digest)
    said = run("delete", "labels", "--where", "label = 7", "--yes", cwd=tmp_path).stdout
    commands = [line.split("#")[0] for line in said.splitlines() if line.startswith("  softlabels")]
    assert len(commands) == 3
    assert "its plan cannot be trained from any more" in said
    for command in commands:
        run(*shlex.split(command)[1:], cwd=tmp_path)
    said = run("delete", "labels", "--where", "label = 7", "--yes", cwd=tmp_path).stdout
    assert "no older version holds the rows any more" in said


def test_delete_by_a_file_of_ids(tmp_path: Path, table: Table) -> None:
    (tmp_path / "ids.txt").write_text("x00003\nnobody\n\nx00004\n")
    said = run("delete", "labels", "--ids", "ids.txt", "--yes", cwd=tmp_path).stdout
    assert "1 id that was asked for: of no row" in said
    assert Table.open(table.root.uri).num_rows == 298
    lifted = run("delete", "labels", "--ids", "ids.txt", "--allow-again", "--yes", cwd=tmp_path)
    assert "3 examples may be labelled again" in lifted.stdout
    assert "captures will pass" not in lifted.stdout


def test_json_of_all_three(tmp_path: Path, table: Table) -> None:
    plan = json_of("delete", "labels", "--where", "label = 7", cwd=tmp_path)
    assert (plan["rows"], plan["deleted"], plan["version"]) == (30, False, 1)
    done = json_of("delete", "labels", "--where", "label = 7", "--yes", cwd=tmp_path)
    assert (done["rows"], done["deleted"], done["version"]) == (30, True, 2)
    assert done["holders"]["versions"] == [[1, 1]]
    plan = json_of("compact", "labels", "--dry-run", cwd=tmp_path)
    assert (plan["taken"], plan["made"], plan["version"], plan["dry_run"]) == (6, 1, 2, True)
    done = json_of("compact", "labels", cwd=tmp_path)
    assert (done["taken"], done["made"], done["version"]) == (6, 1, 3)
    plan = json_of("publish", "labels", "copy", "--dry-run", cwd=tmp_path)
    assert (plan["copied"], plan["version"]) == (1, None)
    assert not (tmp_path / "copy").exists()
    done = json_of("publish", "labels@3", "copy", "--tag", "v3", cwd=tmp_path)
    assert (done["copied"], done["version"], done["tag"], done["new"]) == (1, 1, "v3", True)


def test_compact_says_what_it_did(tmp_path: Path, table: Table) -> None:
    bytes_before = sum(file.size for file in table.files)
    said = run("compact", "labels", "--dry-run", cwd=tmp_path).stdout
    assert last(said) == (
        f"{table.root.uri}: 6 files of {bytes_before} bytes would become about 1; nothing was done"
    )
    said = run("compact", "labels", cwd=tmp_path).stdout
    assert last(said) == (
        f"{table.root.uri}@2: 300 rows as before, 6 files of {bytes_before} bytes became 1"
    )
    said = run("compact", "labels", "--target-size", "1 GiB", cwd=tmp_path).stdout
    assert last(said) == f"{table.root.uri}@2: nothing to compact, 1 file"


def test_publish_says_what_it_did(tmp_path: Path, table: Table) -> None:
    done = run("publish", "labels@1", "copy", "--tag", "v1", cwd=tmp_path, real=True)
    assert re.fullmatch(
        rf"v1: tag of version 1 there\n.*/copy@1: 300 rows of {table.root.uri}@1, "
        r"6 of 6 files, \d+ bytes copied\n",
        done.stdout,
    )
    assert "publish" in done.stderr  # its bar
    said = run("publish", "labels", "copy", cwd=tmp_path).stdout
    assert last(said).endswith(f"copy@1: holds {table.root.uri}@1 already")
    said = run("publish", "labels", "copy", "--dry-run", cwd=tmp_path).stdout
    assert "copy@1: holds it already" in said
    listed = run("log", "copy", cwd=tmp_path).stdout
    assert "publish" in listed
    assert f"of {table.root.uri}@1" in listed
    (tmp_path / "copy" / table.files[0].path).unlink()
    said = run("publish", "labels", "copy", cwd=tmp_path).stdout
    assert re.search(r"1 of 6 files, \d+ bytes: missing before, there again", said)


def test_publish_brings_the_tag_that_was_named_along(tmp_path: Path, table: Table) -> None:
    for name in ("v1", "other"):
        tags.make_tag(table.root, name, 1, table.snapshot_digest)
    plan = json_of("publish", "labels@v1", "copy", "--dry-run", cwd=tmp_path)
    assert (plan["tag"], (tmp_path / "copy").exists()) == ("v1", False)
    run("publish", "labels@v1", "copy", "--no-tag", cwd=tmp_path)
    copy = Table.open(str(tmp_path / "copy"))
    assert tags.tag_names(copy.root) == []
    run("publish", "labels@v1", "copy", cwd=tmp_path)
    assert tags.tag_names(copy.root) == ["v1"]
    assert json_of("publish", "labels@v1", "copy", cwd=tmp_path)["tag"] == "v1"
    assert Table.open(f"{tmp_path / 'copy'}@v1").snapshot_digest == table.snapshot_digest
    run("publish", "labels@v1", "copy", "--tag", "mine", cwd=tmp_path)
    assert tags.tag_names(copy.root) == ["mine", "v1"]
    # The name is taken there by something else.
    run("delete", "labels", "--where", "label = 7", "--yes", cwd=tmp_path)
    run("tag", "labels@2", "mine", cwd=tmp_path)
    done = run("publish", "labels@v1", "copy", cwd=tmp_path)
    assert f"{table.root.uri}@1 holds 30 rows that you deleted since" in done.stderr
    said = error_of("publish", "labels@mine", "copy", cwd=tmp_path)
    assert "stands for version 1" in said
    assert copy.latest().version == 1
    assert "Give one of them" in error_of(
        "publish", "labels", "copy", "--tag", "a", "--no-tag", cwd=tmp_path
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["delete", "labels"], "expected either --where SQL or --ids FILE"),
        (["delete", "labels", "--where", "a", "--ids", "b"], "either --where SQL or --ids FILE"),
        (["delete", "labels@1", "--where", "true"], "leave out @"),
        (["delete", "labels", "--where", "lable = 1"], "lable"),
        (["delete", "labels", "--ids", "empty.txt"], "is empty"),
        (["delete", "labels", "--ids", "latin.txt"], "expected UTF-8"),
        (["delete", "labels", "--ids", "ids.txt", "--record-where"], "ids are never recorded"),
        (["delete", "labels", "--ids", "none.txt"], "there is no file 'none.txt'"),
        (["delete", "nothing", "--where", "true"], "there is no table"),
        (["compact", "labels@1"], "leave out @"),
        (["compact", "labels", "--target-size", "128"], "expected a number and a unit"),
        (["compact", "labels", "--target-size", "5 miles"], "expected a number and a unit"),
        (["compact", "labels", "--target-size", "5GB"], "expected 1 to"),
        (["publish", "labels", "labels"], "own place"),
        (["publish", "labels", "copy@v1"], "not one version"),
        (["publish", "labels@9", "copy"], "has no version 9"),
        (["publish", "labels", "copy", "--tag", "7"], "tag name"),
    ],
)
def test_mistakes_are_one_line_and_2(
    tmp_path: Path, table: Table, arguments: list[str], said: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "ids.txt").write_text("x\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe4\n")
    assert said in error_of(*arguments, cwd=tmp_path)
    assert Table.open(table.root.uri).version == 1


def test_other_failures_are_1(tmp_path: Path, table: Table) -> None:
    (tmp_path / "folder").mkdir()
    assert "cannot be read" in error_of("delete", "labels", "--ids", "folder", cwd=tmp_path, code=1)
    make_table(tmp_path / "other", rows=10)
    assert "not by a publish" in error_of("publish", "labels", "other", cwd=tmp_path, code=1)


@pytest.mark.parametrize("verb", ["delete", "compact", "publish"])
def test_help_has_an_example(tmp_path: Path, verb: str) -> None:
    assert f"Example: softlabels {verb}" in run(verb, "--help", cwd=tmp_path).stdout


def test_the_work_goes_on_when_nobody_sees_its_progress(tmp_path: Path, table: Table) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "softlabels", "compact", table.root.uri]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    assert done.returncode == 0
    assert len(table.latest().files) == 1

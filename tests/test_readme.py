"""README's code and commands are run, not trusted."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout, where the Python example has run."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("data", "pipelines"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "printed").write_text(run(folder, "-c", blocks("python")[0]))
    return folder


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", *command], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_example_trains_a_student_as_good_as_the_table_says(checkout: Path) -> None:
    assert len(blocks("python")[0].splitlines()) <= 10
    accuracy = float((checkout / "printed").read_text())
    assert 0.74 < accuracy < 0.80


def test_one_line_reads_ids_and_logprobs_as_plain_numbers(checkout: Path) -> None:
    polars_line, duckdb_line = blocks("python")[1].splitlines()
    code = (
        "import duckdb, polars, math\n"
        f"a = {polars_line}.collect()\n"
        f"b = {duckdb_line}.fetchall()\n"
        "assert len(a) == len(b) == 15_000\n"
        "assert sorted(a.rows()) == sorted(b)\n"
        "print(abs(sum(math.exp(x) for x in b[0][2]) - 1) < 2e-3)\n"
    )
    assert run(checkout, "-c", code) == "True\n"


def test_every_command_of_the_list_exists(checkout: Path) -> None:
    listed = re.findall(r"^softlabels ([a-z |]+?) +[A-Z\"]", README, re.MULTILINE)
    names = {name.strip() for line in listed for name in line.split("|")}
    assert {"capture", "show", "log", "verify", "query", "mix", "plan show", "train"} <= names
    for name in sorted(names):
        assert "Usage" in run(checkout, "-m", "softlabels", *shlex.split(name), "--help")


def test_at_most_sixty_words_stand_before_the_first_command() -> None:
    prose = README.split("```")[0].split("# softlabels", 1)[1]
    assert len(prose.split()) <= 60


def test_paths_and_make_targets_that_are_named_are_there() -> None:
    for path in re.findall(r"`((?:softlabels|pipelines|tests|data)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", " ".join(re.findall(r"`[^`]*`", README))):
        assert f"\n{target}:" in makefile, target

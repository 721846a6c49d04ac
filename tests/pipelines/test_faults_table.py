"""`make faults`: which tests it runs, what it keeps of them, what README then says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.faults import Observer, chosen, in_words, merged, table
from softlabels.errors import BadInputError

ROOT = Path(__file__).parents[2]

FLIPS = """
from tests.faults.record import record, scaled

def test_flips():
    assert scaled(3, 1000) == 1000
    record("flips of a byte", {"flips": 1000, "undetected": 0, "p99 s": 0.04123})
    record("flips of two", {"flips": 10, "seconds": 5})

def test_more():
    record("more", {"faults": 7, "seed": "1 to 3"})
    assert MORE
"""
KILLS = """
import pytest
from tests.faults.record import record

@pytest.mark.slow
def test_kills():
    record("kills | cuts", {"kills": 200, "rows lost": 0})
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with two small files of fault tests."""
    for name in ("pyproject.toml", "tests/faults/record.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pipelines").mkdir()
    for name in ("__init__.py", "faults.py", "readme.py"):
        shutil.copy(ROOT / "pipelines" / name, tmp_path / "pipelines" / name)
    for folder in ("tests", "tests/faults"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "tests/faults/test_flips.py").write_text(f"MORE = True\n{FLIPS}")
    (tmp_path / "tests/faults/test_kills.py").write_text(KILLS)
    (tmp_path / "README.md").write_text("before\n<!-- faults -->\n<!-- /faults -->\nafter\n")
    return tmp_path


def faults(checkout: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pipelines.faults", *words]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


def lines_of(checkout: Path) -> dict[str, Any]:
    kept = json.loads((checkout / "pipelines/faults.json").read_text())
    return {line["what"]: line["counts"] for line in kept}


def test_readme_says_what_the_tests_that_passed_counted(checkout: Path) -> None:
    done = faults(checkout)
    assert done.returncode == 0, done.stdout
    assert "flips of a byte: flips 1,000, undetected 0, p99 s 0.0412" in done.stdout
    assert list(lines_of(checkout)) == ["flips of a byte", "flips of two", "more", "kills | cuts"]
    readme = (checkout / "README.md").read_text()
    assert "| flips of a byte | flips 1,000, undetected 0, p99 s 0.0412 | 0 |" in readme
    assert "| flips of two | flips 10 | 5 |" in readme
    assert "| kills \\| cuts | kills 200, rows lost 0 | 0 |" in readme
    assert readme.startswith("before\n")
    assert readme.endswith("<!-- /faults -->\nafter\n")

    # One part alone leaves the others' lines; a test that fails now takes its own out, and only
    # its own, and the run goes on and ends with 1.
    (checkout / "tests/faults/test_flips.py").write_text(f"MORE = False\n{FLIPS}")
    done = faults(checkout, "flips")
    assert done.returncode == 1
    assert "test_kills" not in done.stdout
    assert "README.md: 3 kinds of faults, 1 tests failed" in done.stdout
    assert list(lines_of(checkout)) == ["flips of a byte", "flips of two", "kills | cuts"]


def test_lines_whose_test_is_gone_go(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").touch()
    kept = [
        {"test": f"{tmp_path}/test_{name}.py::test", "what": what}
        for name, what in (("a", "still true"), ("a", "counted again"), ("b", "of a file gone"))
    ]
    observer = Observer(tmp_path / "report")
    observer.lines = [{"test": f"{tmp_path}/test_0.py::test", "what": "counted again"}]
    found = merged(kept, observer)
    assert [line["what"] for line in found] == ["counted again", "still true"]


def test_words_choose_files() -> None:
    files = [Path(f"tests/faults/test_{name}.py") for name in ("s3_faults", "s3_kill", "flips")]
    assert chosen(files, []) == files
    assert chosen(files, ["s3"]) == files[:2]
    assert chosen(files, ["flips", "kill"]) == files[1:]
    with pytest.raises(BadInputError, match="'s4'"):
        chosen(files, ["s3", "s4"])


def test_counts_in_words() -> None:
    assert in_words({"kills": 1200, "p99": 0.012345, "max s": 2417.3, "seeds": "1, 2"}) == (
        "kills 1,200, p99 0.0123, max s 2,417, seeds 1, 2"
    )
    assert table([]) == ""

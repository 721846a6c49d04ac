"""Output that nobody reads, or that cannot be written: how commands end then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from softlabels.store.table import Table
from tests.tables import make_table

COMMAND = [sys.executable, "-W", "error", "-m", "softlabels"]
FULL = Path("/dev/full")


def ended(command: list[str], cwd: Path, stdout: int | None = None) -> tuple[int, str]:
    """The exit code and stderr of a command; without `stdout` nobody reads it from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        command,
        check=False,
        cwd=cwd,
        stdout=writer if stdout is None else stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writer)
    return done.returncode, done.stderr


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return make_table(tmp_path / "labels", rows=40, shard_rows=20)


@pytest.mark.parametrize(
    "arguments",
    [
        ["log", "labels"],
        ["query", "labels", "SELECT * FROM entries", "--format", "arrow"],
        ["--help"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_reader_that_goes_away_is_no_failure(
    tmp_path: Path, table: Table, arguments: list[str]
) -> None:
    assert ended([*COMMAND, *arguments], tmp_path) == (0, "")


def test_the_exit_code_is_still_the_command_s_own(tmp_path: Path, table: Table) -> None:
    file = tmp_path / "labels" / table.files[0].path
    file.write_bytes(file.read_bytes()[:-50])
    code, said = ended([*COMMAND, "verify", "labels", "--json"], tmp_path)
    assert (code, "Traceback" in said) == (1, False)


def test_head_in_a_shell(tmp_path: Path, table: Table) -> None:
    sql = "SELECT * FROM entries e, entries f LIMIT 20000"
    line = " ".join([*COMMAND, "query", "labels", f"'{sql}'", "--format", "csv"])
    script = f"set -o pipefail; {line} | head -1"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines()), done.stderr) == (0, 1, "")


def test_a_closed_stdout_is_no_failure(tmp_path: Path, table: Table) -> None:
    script = " ".join([*COMMAND, "log", "labels", ">&-"])
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is full")
def test_a_full_disk_is_one_line_and_1(tmp_path: Path, table: Table) -> None:
    with FULL.open("w") as full:
        code, said = ended([*COMMAND, "log", "labels"], tmp_path, full.fileno())
    assert (code, said) == (1, "error: stdout cannot be written: No space left on device\n")

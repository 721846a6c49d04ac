"""Wherever a calibration is killed, the table is whole: the old version or the new one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from softlabels.errors import BadInputError
from softlabels.query.calibrate import calibrate
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from tests.query.planted import make_planted


def killed_at(table: str, moment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed_calibrate", table, "1.5", moment],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_kills_before_the_commit_leave_the_old_version_and_lose_no_work(tmp_path: Path) -> None:
    table = make_planted(tmp_path / "t", rows=3000, heat=1.5).table
    uri = table.root.uri
    for moment in ("1", "commit"):
        killed_at(uri, moment)
        found = Table.open(uri)
        assert (found.version, found.snapshot_digest) == (1, table.snapshot_digest)
        assert verify(found)["problems"] == []
    report = calibrate(uri, temperature=1.5)
    # All three files were written by the two that died.
    assert (report.found, report.units, report.version) == (3, 3, 2)
    made = Table.open(uri)
    assert verify(made)["problems"] == []
    undisturbed = make_planted(tmp_path / "u", rows=3000, heat=1.5).table
    calibrate(undisturbed.root.uri, temperature=1.5)
    assert made.snapshot_digest == Table.open(undisturbed.root.uri).snapshot_digest


def test_a_kill_after_the_commit_leaves_the_new_version(tmp_path: Path) -> None:
    uri = make_planted(tmp_path / "t", rows=1000, heat=1.5).table.root.uri
    killed_at(uri, "after")
    made = Table.open(uri)
    assert made.version == 2
    assert made.contents.calibration is not None
    assert verify(made)["problems"] == []
    with pytest.raises(BadInputError, match="calibrated already"):
        calibrate(uri, temperature=1.5)
    assert calibrate(f"{uri}@1", temperature=1.5).version == 2

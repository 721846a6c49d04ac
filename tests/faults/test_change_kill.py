"""Wherever delete, compact or publish are killed, a table is whole; running again ends right."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.killed_change import NONE, OPERATIONS
from tests.faults.record import record, scaled
from tests.store.test_compact import add_run, empty

SEED = 20261124


@pytest.mark.timeout(900)
def test_kills_leave_the_old_version_or_the_new_one(tmp_path: Path) -> None:
    table = empty(tmp_path / "seed" / "t")
    for run in "b0e":
        table = add_run(table, run, [700] * 6)
    kills = scaled(12, 60)
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed_change", str(tmp_path), str(kills), str(SEED)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    before, expected = found["before"], found["expected"]
    counts = {"kills": 0, "old version after": 0, "new version after": 0, "neither": 0}
    for run in found["runs"]:
        new = expected[run["operation"]]
        old = {"rows": NONE} if run["operation"] == "publish" else before
        for kill in run["kills"]:
            counts["kills"] += kill["status"] == -signal.SIGKILL
            assert kill["wrong"] == [], (run["operation"], kill)
            which = _which(kill, old, new)
            assert which in ("old version after", "new version after"), (run["operation"], kill)
            counts[which] += kill["status"] == -signal.SIGKILL
        assert run["status"] == 0
        assert run["end"] == new, run["operation"]
    assert {run["operation"] for run in found["runs"]} == set(OPERATIONS)
    assert counts["kills"] >= kills / 2
    assert counts["old version after"]
    assert counts["new version after"]
    assert expected["compact"]["rows"] == before["rows"] == expected["publish"]["rows"]
    assert expected["compact"]["files"] < before["files"] == expected["publish"]["files"]
    assert expected["delete"]["deleted"]
    record(
        "kill -9 in delete, compact, publish",
        {**counts, "ends that differ from an undisturbed one": 0, "seed": SEED},
    )


def _which(seen: dict[str, Any], old: dict[str, Any], new: dict[str, Any]) -> str:
    # The list of what must not be labelled again is there a moment before the rows are gone.
    for name, one in (("old version after", old), ("new version after", new)):
        same = seen["rows"] == one["rows"] and seen.get("files") == one.get("files", 0)
        if same and seen.get("version") == one.get("version"):
            return name
    return "neither"

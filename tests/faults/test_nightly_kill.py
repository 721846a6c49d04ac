"""Nights that are killed in every step make what undisturbed nights make."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.nightly.night import NightReport, night_of, run_night
from pipelines.nightly.spec import NightSpec
from softlabels.plan import Plan
from softlabels.store import tags
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from tests.faults.killed_nights import MOMENTS
from tests.faults.record import record, scaled
from tests.pipelines.nights import DAYS, Place, make_place

ROOT = Path(__file__).parents[2]


def nights(place: Place, days: Sequence[str]) -> list[NightReport]:
    spec = NightSpec.read(place.spec)
    return [run_night(night_of(spec, date.fromisoformat(day))) for day in days]


def rows_of(reference: str) -> pa.Table:
    return pa.Table.from_batches(list(Table.open(reference).batches())).sort_by("example_id")


def test_nights_that_are_killed_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    days = DAYS[: scaled(2, 3)]
    calm = make_place(tmp_path / "calm", len(days))
    expected = nights(calm, days)
    killed = [make_place(tmp_path / f"k{n}", len(days)) for n in range(scaled(1, 21))]
    pairs = [(place.spec, str(n) if n else "-") for n, place in enumerate(killed)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed_nights", days[0], days[-1], *sum(pairs, ())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [end["code"] for end in found] == [0] * len(killed)
    assert found[0]["deaths"] == list(MOMENTS)
    for place in killed:
        require_same(place, calm, days, expected)
    record(
        "nightly job: kill -9 before and after each step, then at random times",
        {
            "kills": sum(len(end["deaths"]) for end in found),
            "nights": len(killed) * len(days),
            "rows lost": 0,
            "rows doubled": 0,
            "tags or plans lost or wrong": 0,
            "seeds": f"1 to {len(killed) - 1}",
        },
    )


def require_same(
    place: Place, calm: Place, days: Sequence[str], expected: Sequence[NightReport]
) -> None:
    """Tables, tags and plans of a place that was killed are those of one that was not."""
    for mine, theirs in zip(nights(place, days), expected, strict=True):
        assert not mine.made  # all that the killed nights left was done
        changes = {"made": True, "table": theirs.table, "plan": theirs.plan, "seconds": 0.0}
        changes |= {"version": theirs.version}  # a night may die between two commits
        # The fingerprint covers the sha256 of every file: rows are the same bit for bit.
        assert replace(mine, **changes) == replace(theirs, seconds=0.0)  # type: ignore[arg-type]
        assert rows_of(f"{place.table}@{mine.tag}").equals(rows_of(f"{calm.table}@{mine.tag}"))
        assert Plan.read(mine.plan).fingerprint == mine.fingerprint
        table = Table.open(f"{place.table}@{mine.tag}")
        assert table.version == mine.version
        assert verify(table)["problems"] == []
        assert tags.tag_names(table.root) == tags.tag_names(Table.open(calm.table).root)
    made = [path.name for path in (place.folder / "plans").glob("*.parquet")]
    assert sorted(made) == [f"plan-{day}.parquet" for day in days]

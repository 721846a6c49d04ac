"""Vacuum beside writers, tags and rollbacks, all killed at random: nothing kept is ever lost."""

import json
import subprocess
import sys
from pathlib import Path

from softlabels.errors import BadInputError, TryAgainError
from softlabels.store import closed, tags
from softlabels.store.inspect import verify
from softlabels.store.lifetimes import read_lifetimes
from softlabels.store.table import Table
from softlabels.store.vacuum import Keep, vacuum
from tests.faults.record import record, scaled
from tests.tables import make_table

SEED = 20


def test_what_is_kept_outlives_kills_and_races(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60, shard_rows=20)
    tags.make_tag(table.root, "first", table.version, table.snapshot_digest)
    said = tmp_path / "said.jsonl"
    kills = scaled(5, 120)
    arguments = [table.root.uri, str(kills), str(SEED), str(said)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.racing_vacuum", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120 + 3 * kills,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in said.read_text().splitlines()]
    untagged = {line["untag"] for line in lines if "untag" in line}
    kept = {line["tag"] for line in lines if "tag" in line} - untagged
    units = [line["unit"] for line in lines if "unit" in line]
    newest = Table.open(table.root.uri)
    assert all(newest.committed(key) for key in units)
    assert len(units) >= 8

    def check() -> tuple[int, int]:
        """How many versions are whole and how many closed; every other one fails."""
        whole = 0
        for name in ("first", *sorted(kept)):
            assert verify_files(Table.open(f"{table.root.uri}@{name}")) == [], name
        newest = Table.open(table.root.uri)
        assert verify_files(newest) == []
        there = set(table.root.names("data"))
        for version in range(newest.version + 1):
            try:
                opened = Table.open(f"{table.root.uri}@{version}")
            except (BadInputError, TryAgainError) as error:
                assert "vacuumed" in str(error)  # noqa: PT017 - either it opens, or it says so
                continue
            assert {file.path.removeprefix("data/") for file in opened.files} <= there, version
            whole += 1
        return whole, newest.version + 1 - whole

    check()
    vacuum(newest, Keep(retention=0))
    whole, gone = check()
    assert gone > 0
    records = closed.vacuum_records(table.root)
    there = set(table.root.names("data"))
    every = read_lifetimes(table.root, Table.open(table.root.uri).version).spans
    deleted = sum(path.rpartition("/")[2] not in there for path in every)
    assert deleted > 0
    record(
        "vacuum beside writers, tags and rollbacks",
        {
            "kills": sum(json.loads(done.stdout).values()),
            "vacuums": len(records),
            "files deleted": deleted,
            "versions whole": whole,
            "versions closed": gone,
            "tags kept": len(kept) + 1,
            "kept files lost": 0,
            "acknowledged units lost": 0,
        },
    )


def verify_files(table: Table) -> list[str]:
    """What `verify` finds, but that units hold the same rows, for they do."""
    return [line for line in verify(table)["problems"] if "is there already" not in line]

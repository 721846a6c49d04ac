"""The same recipe gives the same plan in any process, folder, zone, language and thread count."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from softlabels.plan import Plan
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.store import shards
from softlabels.store.table import Table
from tests.query.test_mix import reads
from tests.query.test_sources import retold
from tests.tables import make_lineage, make_table

PROGRAM = """
import sys, json
import duckdb
from softlabels.query import view
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
threads = int(sys.argv[2])
view.CONFIG |= {"threads": threads, "preserve_insertion_order": threads == 1}
print(mix(Recipe.model_validate(json.loads(sys.argv[1]))).fingerprint)
"""


def recipe(folder: Path) -> dict[str, Any]:
    """One of every kind of source."""
    a, b = str(folder / "a"), str(folder / "b")
    return {
        "seed": 5,
        "once": True,
        "rows": 3000,
        "sources": {
            "sure": {
                "table": a,
                "where": "entropy < 1.2 AND made < TIMESTAMPTZ '2026-01-02 00:00:00+00'",
                "split": {"take": "train", "holdout": 0.1},
                "limit": {"each": 40, "by": "label"},
                "balance": {"by": "domain", "temperature": 3},
                "weight": 0.3,
            },
            "unsure": {
                "table": b,
                "where": "label IN (1, 2, 3)",
                "sample_by": "1 - top1_prob",
                "weight": 1,
            },
            "best": {
                "choose": {"from": {"a": a, "b": b}, "by": "-entropy", "agreeing": "label"},
                "fraction": 0.5,
                "weight": 1,
            },
            "both": {
                "ensemble": {"a": a, "b": {"table": b, "weight": "1 + margin"}},
                "weight": 0.5,
                "stage": 1,
            },
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables")
    domain = pa.array([("wéb", "Buch", "code", "böhm", None)[i % 5] for i in range(1200)])
    hours = pa.array([i * 3_600_000_000 for i in range(1200)], pa.timestamp("us", "UTC"))
    start = pa.scalar(1_767_225_600_000_000 - 300 * 3_600_000_000, pa.int64())
    made = pa.compute.add(hours.cast(pa.int64()), start).cast(pa.timestamp("us", "UTC"))
    carried = {"domain": domain, "made": made}
    make_table(path / "a", rows=1200, shard_rows=130, carried=carried)
    make_table(path / "b", rows=1200, seed=1, shard_rows=170, row_group_rows=40)
    return path


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return mix(Recipe.model_validate(recipe(folder)))


@pytest.mark.parametrize(
    ("threads", "zone", "language"),
    [(1, "Pacific/Auckland", "C"), (5, "America/Los_Angeles", "tr_TR.UTF-8")],
)
def test_another_process_makes_the_same_plan(
    folder: Path, plan: Plan, tmp_path: Path, threads: int, zone: str, language: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    asked = json.dumps(recipe(tmp_path / "copy"))
    settings = {"TZ": zone, "LANG": language, "LC_ALL": language, "PYTHONHASHSEED": str(threads)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, asked, str(threads)],
        env=os.environ | settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == plan.fingerprint


def test_a_changed_version_makes_another_plan(folder: Path, plan: Plan, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    retold(tmp_path / "copy" / "b", Table.open(str(folder / "b")), [1])
    pinned = recipe(tmp_path / "copy")
    assert mix(Recipe.model_validate(recipe(folder))).fingerprint == plan.fingerprint
    grown = mix(Recipe.model_validate(pinned))
    assert grown.fingerprint != plan.fingerprint


def test_the_rows_do_not_depend_on_how_shards_hold_them(folder: Path, plan: Plan) -> None:
    for name in ("a", "b"):
        turn(folder, name)
    other = mix(Recipe.model_validate(recipe(folder / "turned")))
    assert reads(other) == reads(plan)
    assert [r.model_dump() for r in other.report] == [r.model_dump() for r in plan.report]


def turn(folder: Path, name: str) -> None:
    """The same rows, the last row group first, in one shard."""
    table = Table.open(str(folder / name))
    made = Table.open_or_create(str(folder / "turned" / name), table.schema, table.contents)
    writer = shards.ShardWriter(table.schema, table.contents.profile, row_group_positions=100)
    for batch in reversed(list(table.batches())):
        writer.write(batch.take(pa.array(reversed(range(batch.num_rows)))))
    unit = made.store_shard("e" * 64 + "/u", "e" * 16 + "-000000", writer.close())
    made.commit([unit], make_lineage("e" * 64, [unit.key], table.num_rows))

"""A plan of 100 million rows: what it costs to open, to order and to resume, without its files."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softlabels.plan import Plan, PlanFile, entries_table
from tests.plans import plan_table
from tests.tables import make_table

FILES, GROUPS, GROUP_ROWS = 2_000, 10, 5_000

MEASURED = """
import json, sys, time

def highest():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before, figures = highest(), {}

def timed(name, act):
    start = time.process_time()
    found = act()
    figures[name] = time.process_time() - start
    return found

from softlabels.plan import Plan
from softlabels.student.order import EpochOrder
from softlabels.student.stream import Stream

plan = timed("open", lambda: Plan.read(sys.argv[1]))
stream = timed("stream", lambda: Stream(plan, batch_size=256))
figures["rows"] = stream.rows_per_epoch
state = stream.state_dict() | {"epoch": 3, "position": 99_000_000}
figures["state"] = len(json.dumps(state))
permuted, block = [], EpochOrder.block

def counted(self, place):
    found = block(self, place)
    permuted.append(len(found.rows))
    return found

EpochOrder.block = counted

def resume():
    stream.load_state_dict(state)
    epoch = stream._order.epoch(state["epoch"])
    return epoch.read(state["position"], state["position"] + 256)

entries, rows = timed("resume", resume)
figures |= {"read": len(rows), "permuted": sum(permuted)}
epoch = stream._order.epoch(4)
for segment, _ in zip(epoch.segments(50_000_000), range(6)):
    for place in segment.blocks:
        epoch.block(place)
figures["bytes"] = highest() - before
print(json.dumps(figures))
"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("large")
    path = folder / "plan.parquet"
    make_large_plan(folder).write(path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def make_large_plan(folder: Path) -> Plan:
    """Two tables that share 100 M rows by 7 : 3; of the files the first of each alone is there."""
    model = plan_table("a", make_table(folder / "model", rows=4))
    tables, rows = {}, []
    for name, count in (("a", FILES * 7 // 10), ("b", FILES * 3 // 10)):
        files = []
        for number in range(count):
            sha256 = hashlib.sha256(f"{name}{number}".encode()).hexdigest()
            file = PlanFile(
                path=f"{sha256[:20]}.parquet",
                size=GROUPS * GROUP_ROWS * 100,
                sha256=sha256,
                footer_sha256=sha256[::-1],
                num_rows=GROUPS * GROUP_ROWS,
            )
            files.append(file)
            entry = {"stage": 0, "table": name, "file": file.path, "num_rows": GROUP_ROWS}
            whole = {"rows": None, "repeats": 1, "loss_weight": 1.0}
            rows += [{**entry, **whole, "row_group": group} for group in range(GROUPS)]
        (folder / name).mkdir()
        (folder / name / files[0].path).touch()
        changes = {"name": name, "uri": str(folder / name), "files": tuple(files)}
        tables[name] = model.model_copy(update=changes)
    return Plan(tables, entries_table(rows), {"tables": list(tables)})


def test_a_hundred_million_rows_open_in_a_second(figures: dict[str, Any]) -> None:
    assert figures["rows"] == 100_000_000
    # Processor time: the wall clock of a shared machine shows its neighbours.
    assert figures["open"] < 1
    assert figures["stream"] < 1


def test_resuming_near_the_end_reads_nothing_of_what_came_before(figures: dict[str, Any]) -> None:
    assert figures["read"] == 256
    # A block of each source: together 65,536 rows, and an item each.
    assert 60_000 < figures["permuted"] < 65_536 + 2 * GROUP_ROWS
    assert figures["resume"] < 0.5
    assert figures["state"] < 1024


def test_memory_is_that_of_the_blocks_not_of_the_plan(figures: dict[str, Any]) -> None:
    assert figures["bytes"] < 300e6

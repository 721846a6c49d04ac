"""Rows of a plan once each: as a plain count of them says, and in little memory."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from softlabels.plan import entries_table, join_entries
from softlabels.plan_entries import ENSEMBLE_ENTRIES, ENTRIES
from softlabels.student.once import rows_once
from tests.plans import make_ensemble_plan, make_plan
from tests.tables import make_table

GROUPS = [("f", 0), ("f", 1), ("g", 0)]
SIZE = 12


def member(table: str, rows: list[int] | None, weights: list[float], at: int) -> dict[str, Any]:
    file, group = GROUPS[at]
    return {"table": table, "file": file, "row_group": group, "rows": rows, "weights": weights}


def random_entries(seed: int, several: bool) -> pa.Table:
    """Entries that overlap in many ways; a whole row group is null or listed."""
    random = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for number in range(int(random.integers(1, 12))):
        at = int(random.integers(0, 3))
        listed = np.sort(random.permutation(SIZE)[: random.integers(1, SIZE + 1)]).tolist()
        rows = None if random.random() < 0.2 else listed
        count = SIZE if rows is None else len(rows)
        file, group = GROUPS[at]
        members = None
        if several and random.random() < 0.8:
            shares = random.integers(1, 4, count) / 4
            other = random.permutation(SIZE)[:count].tolist()
            members = [
                member("t", rows, shares.tolist(), at),
                member(
                    "u",
                    None if count == SIZE and random.random() < 0.5 else other,
                    (1 - shares).tolist(),
                    int(random.integers(0, 3)),
                ),
            ]
        found.append(
            {
                "stage": number // 4,
                "table": "t",
                "file": file,
                "row_group": group,
                "num_rows": count,
                "rows": rows,
                "repeats": int(random.integers(1, 4)),
                "loss_weight": float(random.integers(1, 4)),
                "members": members,
            }
        )
    return entries_table(found)


def spelled(entries: pa.Table) -> list[tuple[Any, ...]]:
    """(row, what the first entry that takes it says of it) of each row, in the order of entries."""
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for entry in entries.to_pylist():
        rows = range(entry["num_rows"]) if entry["rows"] is None else entry["rows"]
        for place, row in enumerate(rows):
            others = tuple(
                (
                    one["table"],
                    one["file"],
                    one["row_group"],
                    place if one["rows"] is None else one["rows"][place],
                    one["weights"][place],
                )
                for one in entry.get("members") or ()
            )
            key = (entry["table"], entry["file"], entry["row_group"], row)
            found.setdefault(key, others)
    return [(*key, *others) for key, others in found.items()]


@pytest.mark.parametrize("seed", range(40))
def test_rows_of_ensembles_come_with_the_first_that_takes_them(seed: int) -> None:
    entries = random_entries(seed, True)
    found = rows_once(entries)
    assert spelled(found) == spelled(entries)
    assert sum(found["num_rows"].to_pylist()) == len(spelled(entries))
    assert found.schema.equals(entries.schema)
    assert set(found["repeats"].to_pylist()) == {1}
    assert found.equals(join_entries([found]))  # offsets
    for entry in found.to_pylist():
        listed = [entry["rows"], *(one["rows"] for one in (entry.get("members") or ()))]
        assert all(rows is None or len(rows) == entry["num_rows"] for rows in listed)
    assert rows_once(entries.slice(1)).equals(
        rows_once(pa.Table.from_pylist(entries.to_pylist()[1:], schema=entries.schema))
    )


@pytest.mark.parametrize("seed", range(20))
def test_row_groups_of_plain_plans_are_read_once(seed: int) -> None:
    entries = random_entries(seed, False)
    found = rows_once(entries)
    assert found.schema.equals(ENTRIES)
    assert sorted(spelled(found)) == sorted(spelled(entries))
    groups = [(e["file"], e["row_group"]) for e in entries.to_pylist()]
    read = [(e["file"], e["row_group"]) for e in found.to_pylist()]
    assert read == list(dict.fromkeys(groups))
    firsts = dict(reversed(list(zip(groups, entries.to_pylist(), strict=True))))
    for entry in found.to_pylist():
        first = firsts[entry["file"], entry["row_group"]]
        assert (entry["stage"], entry["loss_weight"]) == (first["stage"], first["loss_weight"])
        assert entry["rows"] is None or entry["rows"] == sorted(entry["rows"])


def test_a_plan_of_no_rows_has_none_once() -> None:
    for schema in (ENTRIES, ENSEMBLE_ENTRIES):
        assert rows_once(schema.empty_table()).num_rows == 0


def test_entries_that_overlap_nowhere_are_left_as_they_are(tmp_path: Path) -> None:
    tables = {
        name: make_table(tmp_path / name, rows=60, shard_rows=30, row_group_rows=15, seed=seed)
        for seed, name in enumerate("ab")
    }
    for plan in (make_plan(tables["a"]), make_ensemble_plan(tables)):
        assert rows_once(plan.entries).equals(plan.entries)


@pytest.mark.parametrize("several", [False, True])
def test_hundreds_of_thousands_of_rows_take_few_bytes(several: bool) -> None:
    rows, entries = 1000, 200
    listed = list(range(0, 2 * rows, 2))
    first = {"stage": 0, "table": "t", "file": "f", "num_rows": rows, "loss_weight": 1.0}
    made = entries_table(
        [
            first
            | {"row_group": number // 2, "rows": listed, "repeats": 1}
            | (
                {
                    "members": [
                        member(name, listed, [1 / 3] * rows, 0) | {"row_group": number // 2}
                        for name in "tuv"
                    ]
                }
                if several
                else {}
            )
            for number in range(entries)
        ]
    )
    tracemalloc.start()
    found = rows_once(made)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(found["num_rows"].to_pylist()) == rows * entries // 2
    assert peak < 90 * rows * entries

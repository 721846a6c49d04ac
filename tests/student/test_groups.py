"""Which rows of a row group entries take together, and where an entry's are among them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.plan import Plan, entries_table
from softlabels.student import groups
from softlabels.student.groups import Groups
from tests.plans import make_plan
from tests.tables import make_table


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """20 entries of 3 rows for each of 4 row groups, in turn; of the last one all rows too."""
    plan = make_plan(make_table(tmp_path / "t", rows=240, shard_rows=120, row_group_rows=60))
    whole = plan.entries.to_pylist()
    random = np.random.default_rng(0)
    shuffled = [random.permutation(60).tolist() for _ in whole]
    parts = [
        row | {"rows": sorted(order[start : start + 3]), "num_rows": 3}
        for start in range(0, 57, 3)
        for row, order in zip(whole, shuffled, strict=True)
    ]
    return replace(plan, entries=entries_table([*parts, whole[-1]]))


def check(plan: Plan, made: Groups) -> None:
    for number, entry in enumerate(plan.entries.to_pylist()):
        taken, place = made.taken(made.of(number), 60), made.places(number)
        every = np.arange(60) if taken is None else taken
        found = every if place is None else every[place]
        assert found.tolist() == (list(range(60)) if entry["rows"] is None else entry["rows"])


def test_places_are_those_of_the_rows_taken(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    check(plan, Groups(plan))
    for held in (0, 100):
        monkeypatch.setattr(groups, "MOST_HELD", held)
        check(plan, Groups(plan))


def test_entries_of_one_row_group_are_put_together_once(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    unions: list[int] = []
    union = groups._union

    def counted(parts: list[Any]) -> Any:
        unions.append(len(parts))
        return union(parts)

    monkeypatch.setattr(groups, "_union", counted)
    made = Groups(plan)
    for _ in range(3):
        for number in range(plan.entries.num_rows):
            made.places(number)
    assert unions == [19, 19, 19]


def test_what_is_held_is_bounded(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MOST_HELD", 60)
    made = Groups(plan)
    for number in range(plan.entries.num_rows):
        made.places(number)
        assert made._held <= 60

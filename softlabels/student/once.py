"""The rows of a plan once each, in its order, whatever repeats and overlaps it has."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from softlabels.errors import MismatchError
from softlabels.plan import Plan, entries_table
from softlabels.student.members import slot_plan
from softlabels.student.stream import Batch, Stream


def each_row_once(
    plan: Plan, batch_size: int, columns: Sequence[str], roots: Mapping[str, str] | None
) -> Iterator[Batch]:
    """Batches of the plan in its order; a row that several entries take comes once.

    In a plan with ensembles it comes with the teachers and weights of the first that takes it.

    Raises:
        MismatchError: one table version is there under several position rules, so that its rows
            would be counted by how many of them keep a position, or at several temperatures.
    """
    digests: dict[str, str] = {}
    tables = slot_plan(plan, 0).tables
    for name, table in tables.items():
        other = digests.setdefault(table.snapshot_digest, name)
        if other == name:
            continue
        differ, mine, theirs = "position rules", tables[other].positions, table.positions
        if tables[other].temperature != table.temperature:
            differ = "temperatures"
            mine, theirs = tables[other].temperature, table.temperature  # type: ignore[assignment]
        raise MismatchError(
            f"{other!r} and {name!r} are one table version under different {differ} "
            f"({mine} and {theirs}): evaluate on a plan of one"
        )
    rows = _distinct(plan) if plan.num_members == 1 else _first_taken(plan)
    once = dataclasses.replace(plan, entries=entries_table(rows))
    stream = Stream(
        once, batch_size=batch_size, epochs=1, shuffle=False, columns=tuple(columns), roots=roots
    )
    return iter(stream)


def _distinct(plan: Plan) -> list[dict[str, Any]]:
    merged: dict[tuple[str, str, int], dict[str, Any]] = {}
    for entry in plan.entries.to_pylist():
        key = (entry["table"], entry["file"], entry["row_group"])
        held = merged.setdefault(key, entry | {"repeats": 1})
        if held["rows"] is None or entry["rows"] is None:
            whole = held if held["rows"] is None else entry
            held |= {"rows": None, "num_rows": whole["num_rows"]}
        else:
            rows = sorted({*held["rows"], *entry["rows"]})
            held |= {"rows": rows, "num_rows": len(rows)}
    return list(merged.values())


def _first_taken(plan: Plan) -> list[dict[str, Any]]:
    """The entries with each row in the first alone, with its members."""
    seen: dict[tuple[str, str, int], set[int]] = {}
    found = []
    for entry in plan.entries.to_pylist():
        before = seen.setdefault((entry["table"], entry["file"], entry["row_group"]), set())
        rows = range(entry["num_rows"]) if entry["rows"] is None else entry["rows"]
        new = [place for place, row in enumerate(rows) if row not in before]
        before.update(rows)
        if not new:
            continue
        kept = entry | {"repeats": 1}
        if len(new) < len(rows):
            kept |= {"rows": [rows[place] for place in new], "num_rows": len(new)}
            kept["members"] = entry["members"] and [_picked(m, new) for m in entry["members"]]
        found.append(kept)
    return found


def _picked(member: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
    own, weights = member["rows"], member["weights"]
    rows = [place if own is None else own[place] for place in places]
    return member | {"rows": rows, "weights": [weights[place] for place in places]}

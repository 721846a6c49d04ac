"""What changed from one plan to another. Loads no database.

Rows are compared by the content of the files that hold them, so that tables may have moved.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.plan import Plan, PlanTable, SourceReport

Group = tuple[str, int]
Numbers = npt.NDArray[np.int64]
Steps = tuple[Numbers, Numbers]
Reads = dict[Group, Steps]
"""Row numbers of each row group, not in order, and by how much the reads of a row rise there: as
large as the plan, whatever row numbers it names."""
Change = dict[str, Any]

_SOURCE_FIELDS = ("rows", "kept", "reads", "share", "loss_weight", "chosen")


def plan_diff(a: Plan, b: Plan) -> dict[str, Any]:
    """What differs, as plain values; "same" is whether the fingerprints are equal.

    Returns:
        fingerprints, rows: of both.
        recipe: settings that differ, each with its dotted key and both values.
        tables, sources: what differs of those of one name; a side is None where it has none.
        files: how many are read by both, by `a` alone, by `b` alone.
        read: distinct rows that both read equally often, both but not equally often, `a` alone and
            `b` alone.
        entries: whether the plans differ though their recipes, tables and reads of rows do not:
            in order, stages, loss weights, or the teachers of an ensemble and their weights. False
            where one of those differs, whatever the entries do.
    """
    same = a.fingerprint == b.fingerprint
    found: dict[str, Any] = {
        "same": same,
        "fingerprints": [a.fingerprint, b.fingerprint],
        "rows": [a.num_rows, b.num_rows],
        "recipe": [],
        "tables": [],
        "sources": [],
        "files": _files(a, b),
        "read": {},
        "entries": False,
    }
    here, there = _reads(a), _reads(b)
    found["read"] = _compared(here, there)
    if same:
        return found
    found["recipe"] = list(_changes(_named(a.recipe), _named(b.recipe), "setting"))
    found["tables"] = list(_changes(_tables(a), _tables(b), "table"))
    found["sources"] = list(_changes(_sources(a), _sources(b), "source"))
    moved = found["read"]["a"] or found["read"]["b"] or found["read"]["other"]
    found["entries"] = not moved and not (found["recipe"] or found["tables"])
    return found


def _changes(
    a: Mapping[str, Any], b: Mapping[str, Any], kind: str, before: str = ""
) -> Iterator[Change]:
    """Values that differ below dotted keys, those of `a` in its order first."""
    for key in dict.fromkeys([*a, *b]):
        path = f"{before}.{key}" if before else key
        here, there = a.get(key), b.get(key)
        if here == there:
            continue
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            yield from _changes(here, there, kind, path)
        else:
            yield {kind: path, "a": here, "b": there}


def _named(value: Any) -> Any:
    """Lists of named settings as mappings, so that one is compared with its like."""
    if isinstance(value, Mapping):
        found = {key: _named(inner) for key, inner in value.items()}
        for key, inner in value.items():
            if _is_named(inner) and len(inner) > 1:
                found[f"order of {key}"] = [one["name"] for one in inner]
        return found
    if _is_named(value):
        return {one["name"]: _named({k: v for k, v in one.items() if k != "name"}) for one in value}
    return value


def _is_named(value: Any) -> bool:
    """Whether these are settings with a name each; a stranger's may have any or equal ones."""
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        return False
    names = [one.get("name") for one in value]
    return all(isinstance(name, str) for name in names) and 0 < len(names) == len(set(names))


def _tables(plan: Plan) -> dict[str, Any]:
    return {name: _table(table) for name, table in sorted(plan.tables.items())}


def _table(table: PlanTable) -> dict[str, Any]:
    contents = table.contents.model_dump(mode="json", exclude_defaults=True)
    if contents.get("classes"):
        contents["classes"] = " ".join(contents["classes"])
    return {
        "version": table.version,
        "digest": table.snapshot_digest,
        "files": len(table.files),
        "positions": None if table.positions is None else str(table.positions),
        "temperature": table.temperature,
        **contents,
    }


def _sources(plan: Plan) -> dict[str, Any]:
    return {source.source: _source(source) for source in plan.report}


def _source(source: SourceReport) -> dict[str, Any]:
    values = {name: getattr(source, name) for name in _SOURCE_FIELDS}
    return {name: value for name, value in values.items() if value is not None} | {
        "dropped": {reason: count for reason, count in source.dropped.items() if count}
    }


def _sha256s(plan: Plan) -> dict[tuple[str, str], str]:
    return {(t.name, f.path): f.sha256 for t in plan.tables.values() for f in t.files}


def _files(a: Plan, b: Plan) -> dict[str, int]:
    here, there = set(_sha256s(a).values()), set(_sha256s(b).values())
    return {"both": len(here & there), "a": len(here - there), "b": len(there - here)}


def _reads(plan: Plan) -> Reads:
    """How often the rows of each row group come in an epoch."""
    sha256s = _sha256s(plan)
    found: dict[Group, list[Steps]] = {}
    for slot in range(plan.num_members):
        entries = plan.entries if slot == 0 else plan.member(slot)
        if entries is None:
            break
        rows = _lists(entries["rows"])
        columns = ["table", "file", "row_group", "num_rows", "repeats"]
        values = zip(*(entries[name].to_pylist() for name in columns), strict=True)
        for number, (table, file, group, count, repeats) in enumerate(values):
            if count:
                steps = _steps(rows[number], count, repeats)
                found.setdefault((sha256s[table, file], group), []).append(steps)
    return {
        key: (np.concatenate([at for at, _ in steps]), np.concatenate([by for _, by in steps]))
        for key, steps in found.items()
    }


def _steps(rows: Numbers | None, count: int, repeats: int) -> Steps:
    """The steps of one entry: up where a run of its rows starts, down behind its end."""
    if rows is None:
        firsts, ends = np.zeros(1, np.int64), np.full(1, count)
    else:
        ordered = np.sort(rows)  # further teachers' rows need not rise
        breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
        firsts = ordered[np.append(0, breaks)]
        ends = ordered[np.append(breaks, len(ordered)) - 1] + 1
    by = np.repeat(np.array([repeats, -repeats]), len(firsts))
    return np.concatenate([firsts, ends]), by


def _lists(column: pa.ChunkedArray) -> list[Numbers | None]:
    found: list[Numbers | None] = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_pylist()
        values = np.array(chunk.values, np.int64) if len(chunk.values) else np.zeros(0, np.int64)
        valid = chunk.is_valid().to_pylist()
        found += [
            values[first:last] if known else None
            for first, last, known in zip(offsets[:-1], offsets[1:], valid, strict=True)
        ]
    return found


def _compared(here: Reads, there: Reads) -> dict[str, int]:
    counts = {"same": 0, "other": 0, "a": 0, "b": 0}
    none = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for key in here.keys() | there.keys():
        (at_a, by_a), (at_b, by_b) = here.get(key, none), there.get(key, none)
        at = np.concatenate([at_a, at_b])
        order = np.argsort(at, kind="stable")
        sizes = np.diff(at[order])  # rows from one step to the next: all are read alike
        zeros_a, zeros_b = np.zeros(len(at_a), np.int64), np.zeros(len(at_b), np.int64)
        one = np.cumsum(np.concatenate([by_a, zeros_b])[order])[:-1]
        two = np.cumsum(np.concatenate([zeros_a, by_b])[order])[:-1]
        counts["same"] += int(sizes[(one == two) & (one > 0)].sum())
        counts["other"] += int(sizes[(one != two) & (one > 0) & (two > 0)].sum())
        counts["a"] += int(sizes[(one > 0) & (two == 0)].sum())
        counts["b"] += int(sizes[(two > 0) & (one == 0)].sum())
    return counts

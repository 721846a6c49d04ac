"""Plans built by hand over real tables: what tests of readers start from, without `query`."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from softlabels.plan import ENSEMBLE, Plan, PlanFile, PlanTable, entries_table
from softlabels.store import shards
from softlabels.store.table import Table


def make_plan(
    tables: Table | Sequence[Table] | Mapping[str, Table],
    *,
    stages: Sequence[int] = (),
    repeats: Sequence[int] = (),
    loss_weights: Sequence[float] = (),
    keep: Callable[[int, int], Sequence[int] | None] = lambda entry, rows: None,
    recipe: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan of every row group of the tables, in order.

    Args:
        tables: one, several (named "a", "b", …), or by name.
        stages: of each table; 0 when not given.
        repeats: of each table; 1 when not given.
        loss_weights: of each table; 1 when not given.
        keep: from an entry's number and its row group's rows, the row indexes it takes, rising;
            None takes all, an empty list leaves the row group out.
        recipe: what the plan says it was made from.
    """
    if isinstance(tables, Table):
        tables = [tables]
    if not isinstance(tables, Mapping):
        tables = {"abcdefgh"[i]: table for i, table in enumerate(tables)}
    rows: list[dict[str, Any]] = []
    plan_tables = {}
    for number, (name, table) in enumerate(tables.items()):
        plan_tables[name] = plan_table(name, table)
        for file, group, size in row_groups(table):
            kept = keep(len(rows), size)
            if kept is not None and not len(kept):
                continue
            rows.append(
                {
                    "stage": stages[number] if stages else 0,
                    "table": name,
                    "file": file,
                    "row_group": group,
                    "num_rows": size if kept is None else len(kept),
                    "rows": None if kept is None else list(kept),
                    "repeats": repeats[number] if repeats else 1,
                    "loss_weight": loss_weights[number] if loss_weights else 1.0,
                }
            )
    return Plan(plan_tables, entries_table(rows), recipe or {"tables": list(tables)})


def make_ensemble_plan(
    tables: Mapping[str, Table],
    *,
    weights: Mapping[str, float | Callable[[str], float]] | None = None,
    temperatures: Mapping[str, float] | None = None,
    partial: bool = False,
) -> Plan:
    """A plan in which all tables are teachers of the first one's rows, in its order.

    Args:
        tables: by name, the first member first.
        weights: of each, a number or one from an example id, 1 when not given; normalised by row.
        temperatures: of each, 1 when not given.
        partial: whether a row that a later table lacks comes with fewer teachers; else it is left
            out.
    """
    (first, table), *others = tables.items()
    places = {name: _places(other) for name, other in others}
    rows: list[dict[str, Any]] = []
    for example, place in _places(table).items():
        found = {first: place} | {n: at[example] for n, at in places.items() if example in at}
        if len(found) < len(tables) and not partial:
            continue
        asked = [_weight((weights or {}).get(name, 1.0), example) for name in found]
        shares = np.asarray(asked, np.float64) / sum(asked)
        rows.append({"at": found, "weights": shares.astype(np.float32)})
    entries = []
    for _, run in itertools.groupby(rows, key=lambda r: [(n, p[:2]) for n, p in r["at"].items()]):
        together = list(run)
        members = [
            {
                "table": name,
                "file": together[0]["at"][name][0],
                "row_group": together[0]["at"][name][1],
                "rows": [row["at"][name][2] for row in together],
                "weights": [float(row["weights"][slot]) for row in together],
            }
            for slot, name in enumerate(together[0]["at"])
        ]
        own = {name: members[0][name] for name in ("table", "file", "row_group", "rows")}
        alone = len(members) == 1
        entries.append(
            {"stage": 0, **own, "num_rows": len(together), "repeats": 1, "loss_weight": 1.0}
            | {"members": None if alone else members}
        )
    heat = temperatures or {}
    plan_tables = {
        name: plan_table(name, t).model_copy(update={"temperature": float(heat.get(name, 1))})
        for name, t in tables.items()
    }
    return Plan(plan_tables, entries_table(entries), {"ensemble": list(tables)}, (), (ENSEMBLE,))


def _places(table: Table) -> dict[str, tuple[str, int, int]]:
    """(file, row group, row) of each example."""
    ids = [batch["example_id"].to_pylist() for batch in table.batches(["example_id"])]
    return {
        example: (file, group, row)
        for (file, group, _), examples in zip(row_groups(table), ids, strict=True)
        for row, example in enumerate(examples)
    }


def _weight(asked: float | Callable[[str], float], example: str) -> float:
    return asked(example) if callable(asked) else asked


def plan_table(name: str, table: Table) -> PlanTable:
    """What a plan says of one table version, every file of it in use."""
    return PlanTable(
        name=name,
        uri=table.root.uri,
        version=table.version,
        snapshot_digest=table.snapshot_digest,
        contents=table.contents,
        files=tuple(
            PlanFile(
                path=file.path,
                size=file.size,
                sha256=file.sha256,
                footer_sha256=file.footer_sha256,
                num_rows=file.num_rows,
            )
            for file in table.files
        ),
    )


def row_groups(table: Table) -> list[tuple[str, int, int]]:
    """(file, row group, rows) of every row group, in order."""
    found = []
    for file in table.files:
        metadata = shards.open_shard(table.root.read(file.path), file.path).metadata
        found += [
            (file.path, group, int(metadata.row_group(group).num_rows))
            for group in range(metadata.num_row_groups)
        ]
    return found

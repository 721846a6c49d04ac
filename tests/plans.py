"""Plans built by hand over real tables: what tests of readers start from, without `query`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from softlabels.plan import Plan, PlanFile, PlanTable, entries_table
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

"""plan show, plan diff: what a plan holds, and what changed from one to another."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softlabels.cli.output import print_json, print_table
from softlabels.errors import BadInputError, counted

if TYPE_CHECKING:
    from softlabels.plan import Plan

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    plan = typer.Typer(no_args_is_help=True, help="Look into plans.", rich_markup_mode=None)
    plan.command("show")(show)
    plan.command("diff")(diff)
    plan.callback()(_plan)
    app.add_typer(plan, name="plan", rich_help_panel="Query")


def show(
    plan: Annotated[str, typer.Argument(metavar="PLAN.parquet", help="A plan.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a plan holds: tables, teachers, sources, shares, what was left out and why."""
    found = _read(plan)
    description = describe(found)
    if as_json:
        print_json(description)
        return
    shown = [{k: v for k, v in row.items() if k != "positions"} for row in description["tables"]]
    print_table(shown, title="tables")
    print_table(_flat_sources(found), title="\nsources")
    _print_rules(found)
    rows = counted(found.num_rows, "row")
    print(f"{plan}: {rows} an epoch, fingerprint {found.fingerprint}")


def diff(
    a: Annotated[str, typer.Argument(metavar="A.parquet", help="A plan.")],
    b: Annotated[str, typer.Argument(metavar="B.parquet", help="Another one.")],
    as_json: JsonOption = False,
) -> None:
    """Show what changed from plan A to plan B: settings, table versions, files, rows, shares.

    Ends with 0 whether they are the same or not.
    """
    from softlabels.query.differences import plan_diff

    found = plan_diff(_read(a), _read(b))
    if as_json:
        print_json(found)
        return
    if found["same"]:
        print(f"{a} and {b} are the same: fingerprint {found['fingerprints'][0]}")
        return
    for kind, title in (("recipe", "recipe"), ("tables", "tables"), ("sources", "sources")):
        if found[kind]:
            print_table([_as_text(change) for change in found[kind]], title=title)
            print()
    files, read = found["files"], found["read"]
    print(f"files: {files['both']} in both, {files['a']} only in A, {files['b']} only in B")
    print(
        f"rows: {read['same']} read alike, {read['other']} more or less often, "
        f"{read['a']} only in A, {read['b']} only in B"
    )
    if found["entries"]:
        print("entries: their order, stages, loss weights or teachers' weights differ")
    rows = " and ".join(map(str, found["rows"]))
    fingerprints = " and ".join(fingerprint[:16] for fingerprint in found["fingerprints"])
    print(f"{a} and {b} differ: {rows} rows an epoch, fingerprints {fingerprints}")


def describe(plan: "Plan") -> dict[str, Any]:
    """What a plan holds, as plain values."""
    from softlabels.query.explain import funnel

    return {
        "fingerprint": plan.fingerprint,
        "rows": plan.num_rows,
        "row_groups": plan.entries.num_rows,
        "stages": sorted(set(plan.entries["stage"].to_pylist())),
        "tables": [
            {
                "table": table.name,
                "uri": table.uri,
                "version": table.version,
                "teacher": table.contents.teacher.name,
                "revision": table.contents.teacher.revision,
                "classes": table.contents.num_classes,
                "k": table.contents.k,
                "draws": table.contents.draws,
                "files": len(table.files),
                "bytes": sum(file.size for file in table.files),
                **({} if table.positions is None else {"positions": str(table.positions)}),
                **({} if table.temperature == 1 else {"temperature": table.temperature}),
            }
            for table in plan.tables.values()
        ],
        "sources": [
            {**source.model_dump(mode="json"), "funnel": funnel(source)} for source in plan.report
        ],
        "recipe": dict(plan.recipe),
    }


def print_sources(plan: "Plan") -> None:
    """A line a source."""
    print_table(_flat_sources(plan))
    _print_rules(plan)


def print_funnel(plan: "Plan") -> None:
    """Of each source what every step left, then a line each."""
    from softlabels.query.explain import funnel, values

    for source in plan.report:
        title = f"source {source.source!r}, table {source.table!r}"
        print_table(funnel(source), title=title)
        if source.values is not None:
            print_table(values(source), title=f"\nbalance of source {source.source!r}")
        if source.chosen is not None:
            rows = [{"teacher": name, "rows": n} for name, n in source.chosen.items()]
            print_table(rows, title=f"\nteachers chosen of source {source.source!r}")
        print()
    print_sources(plan)


def _plan() -> None:
    pass


def _read(path: str) -> "Plan":
    """The plan at a path; a folder, such as a table, is a mistake of its own."""
    from softlabels.plan import Plan

    if os.path.isdir(path):
        raise BadInputError(f"{path!r} is a folder: expected a plan, PLAN.parquet")
    return Plan.read(path)


def _as_text(change: dict[str, Any]) -> dict[str, Any]:
    return {name: "-" if value is None else str(value) for name, value in change.items()}


def _flat_sources(plan: "Plan") -> list[dict[str, Any]]:
    from softlabels.query.explain import in_order

    rows = []
    ruled = any(source.positions is not None for source in plan.report)
    chosen = any(source.chosen is not None for source in plan.report)
    for source in plan.report:
        row = source.model_dump(mode="json", exclude={"values", "chosen"})
        dropped = in_order(source.dropped)
        row["dropped"] = ", ".join(f"{n} {why}" for why, n in dropped.items() if n)
        counts = [row.pop(name) for name in ("positions", "positions_kept", "positions_unknown")]
        if ruled:
            row["positions"] = _kept_positions(*counts)
        if chosen:
            row["chosen"] = ", ".join(f"{n} {name}" for name, n in (source.chosen or {}).items())
        rows.append(row)
    return rows


def _kept_positions(total: int | None, kept: int | None, unknown: int | None) -> str:
    if total is None or kept is None:
        return "all"
    missing = f", {unknown} unknown" if unknown else ""
    return f"{kept} of {total} ({kept / max(total, 1):.1%}){missing}"


def _print_rules(plan: "Plan") -> None:
    for name, table in plan.tables.items():
        if table.positions is not None:
            print(f"positions of table {name!r}: {table.positions}")

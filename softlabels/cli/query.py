"""query, mix, plan show: SQL over labels, recipes into plans, what a plan holds."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from softlabels.cli.output import print_json, print_table

if TYPE_CHECKING:
    import pyarrow as pa

    from softlabels.plan import Plan

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Write over a file that is there already.")
]
Format = Literal["table", "csv", "json", "parquet"]


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(rich_help_panel="Query")(query)
    app.command(rich_help_panel="Query")(mix)
    plan = typer.Typer(no_args_is_help=True, help="Look into plans.", rich_markup_mode=None)
    plan.command("show")(show_plan)
    plan.callback()(_plan)
    app.add_typer(plan, name="plan", rich_help_panel="Query")


def query(
    table: Annotated[str, typer.Argument(metavar="TABLE[@TAG|@VERSION]", help="A table.")],
    sql: Annotated[
        str, typer.Argument(help="One SELECT over labels, positions, entries, classes.")
    ],
    as_format: Annotated[
        Format | None,
        typer.Option("--format", help="Default: by the ending of --output, else table."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a file instead of printing.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit-print", min=0, help="Most rows that a printed table shows.")
    ] = 50,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run one SELECT over a table version: labels, positions, entries, classes.

    Example: softlabels query labels@v1 "SELECT label, avg(entropy) FROM labels GROUP BY label"
    """
    from softlabels.query.view import query as run

    kind = "json" if as_json else as_format or _format_of(output)
    _check_output(kind, output)
    _check_free(output, force)
    result = run(table, sql)
    if output is not None:
        from softlabels.storage import open_root

        open_root(output.parent).write(output.name, _encode(result, kind))
        print(f"{output}: {result.num_rows} rows")
    elif kind == "table":
        print_table(result.slice(0, limit).to_pylist())
        if result.num_rows > limit:
            print(f"{limit} of {result.num_rows} rows; --limit-print shows more", file=sys.stderr)
    else:
        sys.stdout.write(_encode(result, kind).decode())


def mix(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PLAN.parquet", help="The plan to make."),
    ] = None,
    no_pin: Annotated[
        bool, typer.Option("--no-pin", help="Do not tag the table versions that it reads.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Only say what the plan would be; nothing is made.")
    ] = False,
) -> None:
    """Freeze a recipe into a plan: exactly which rows a student reads, how often, in which order.

    The table versions it reads are tagged plan-<fingerprint>, so that they are kept.
    """
    from softlabels.errors import BadInputError
    from softlabels.query.mix import mix as make
    from softlabels.query.mix import pin
    from softlabels.query.recipe import Recipe

    if (output is None) != explain:
        raise BadInputError("say where the plan goes with -o PLAN.parquet, or only --explain it")
    _check_free(output, force, "plan")
    plan = make(Recipe.read(recipe))
    tags = [] if no_pin or explain else pin(plan)
    if output is not None:
        plan.write(output)
    if as_json:
        print_json(_describe(plan) | {"plan": output and str(output), "tags": tags})
        return
    _print_sources(plan)
    for tag in tags:
        print(f"pinned {tag}")
    made = "would be made" if output is None else str(output)
    print(f"{made}: {plan.num_rows} rows an epoch, fingerprint {plan.fingerprint}")


def show_plan(
    plan: Annotated[str, typer.Argument(metavar="PLAN.parquet", help="A plan.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a plan holds: tables, teachers, sources, shares, what was left out and why."""
    from softlabels.plan import Plan

    found = Plan.read(plan)
    description = _describe(found)
    if as_json:
        print_json(description)
        return
    shown = [{k: v for k, v in row.items() if k != "positions"} for row in description["tables"]]
    print_table(shown, title="tables")
    print_table(_flat_sources(found), title="\nsources")
    _print_rules(found)
    print(f"{plan}: {found.num_rows} rows an epoch, fingerprint {found.fingerprint}")


def _plan() -> None:
    pass


def _describe(plan: "Plan") -> dict[str, Any]:
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
            }
            for table in plan.tables.values()
        ],
        "sources": [source.model_dump(mode="json") for source in plan.report],
        "recipe": dict(plan.recipe),
    }


def _flat_sources(plan: "Plan") -> list[dict[str, Any]]:
    rows = []
    ruled = any(source.positions is not None for source in plan.report)
    for source in plan.report:
        row = source.model_dump(mode="json")
        row["dropped"] = ", ".join(f"{n} {why}" for why, n in sorted(row["dropped"].items()) if n)
        counts = [row.pop(name) for name in ("positions", "positions_kept", "positions_unknown")]
        if ruled:
            row["positions"] = _kept_positions(*counts)
        rows.append(row)
    return rows


def _kept_positions(total: int | None, kept: int | None, unknown: int | None) -> str:
    if total is None or kept is None:
        return "all"
    missing = f", {unknown} unknown" if unknown else ""
    return f"{kept} of {total} ({kept / max(total, 1):.1%}){missing}"


def _print_sources(plan: "Plan") -> None:
    print_table(_flat_sources(plan))
    _print_rules(plan)


def _print_rules(plan: "Plan") -> None:
    for name, table in plan.tables.items():
        if table.positions is not None:
            print(f"positions of table {name!r}: {table.positions}")


def _format_of(output: Path | None) -> Format:
    endings: dict[str, Format] = {".csv": "csv", ".json": "json", ".parquet": "parquet"}
    return endings.get(output.suffix, "table") if output is not None else "table"


def _check_output(kind: Format, output: Path | None) -> None:
    from softlabels.errors import BadInputError

    if output is None and kind == "parquet":
        raise BadInputError("Parquet goes to a file: add -o FILE.parquet")
    if output is not None and kind == "table":
        raise BadInputError(f"in which format {str(output)!r}? --format csv, json or parquet")


def _check_free(output: Path | None, force: bool, kind: str = "") -> None:
    """Refuses to write over a file; a plan may replace a plan."""
    from softlabels.errors import BadInputError, SoftLabelsError
    from softlabels.plan import Plan

    if output is None or force or not output.exists():
        return
    try:
        if kind == "plan" and Plan.read(output):
            return
    except SoftLabelsError:
        pass
    raise BadInputError(f"{str(output)!r} is there already: choose another, or add --force")


def _encode(result: "pa.Table", kind: Format) -> bytes:
    import io
    import json

    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(result, sink, compression="zstd")
        return bytes(sink.getvalue())
    if kind == "json":
        rows = (json.dumps(_plain(row), default=str) for row in result.to_pylist())
        return ("[\n" + ",\n".join(rows) + "\n]\n").encode()
    import csv

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(result.column_names)
    for batch in result.to_batches(max_chunksize=10_000):
        columns = (column.to_pylist() for column in batch.columns)
        writer.writerows([_cell(value) for value in row] for row in zip(*columns, strict=True))
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    import json

    if isinstance(value, list | dict):
        return json.dumps(_plain(value), default=str)
    return _plain(value) if isinstance(value, bytes) else value


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity become null, bytes become base64."""
    import base64
    import math

    if isinstance(value, bytes):
        return base64.b64encode(value).decode()

    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value

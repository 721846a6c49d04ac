"""log, show, tag, verify: what a table holds and whether it is whole."""

from datetime import UTC, datetime
from typing import Annotated

import typer

from softlabels.cli.output import print_json, print_table, progress

TableArgument = Annotated[str, typer.Argument(metavar="TABLE[@TAG|@VERSION]", help="A table.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(rich_help_panel="Table")(log)
    app.command(rich_help_panel="Table")(show)
    app.command(rich_help_panel="Table")(tag)
    app.command(rich_help_panel="Table")(verify)


def log(table: TableArgument, as_json: JsonOption = False) -> None:
    """List the commits of a table, newest first: when, which run, how many rows."""
    from softlabels.store.table import Table

    commits = Table.open(table).history()
    if as_json:
        for commit in commits:
            commit["run"] = commit["run"] and commit["run"].model_dump(mode="json")
        print_json(commits)
        return
    print_table(
        [
            {
                "version": commit["version"],
                "when": datetime.fromtimestamp(commit["timestamp"] / 1000, UTC).strftime("%F %T"),
                "operation": commit["operation"],
                "run": commit["run"].run_id[:12] if commit["run"] else "",
                "units": len(commit["run"].units) if commit["run"] else 0,
                "rows": commit["run"].num_rows if commit["run"] else 0,
            }
            for commit in commits
        ]
    )


def show(table: TableArgument, as_json: JsonOption = False) -> None:
    """Show what one version holds: teacher, label space, columns, rows, bytes, tags."""
    from softlabels.store.inspect import describe
    from softlabels.store.table import Table

    description = describe(Table.open(table))
    if as_json:
        print_json(description)
        return
    columns = description.pop("columns")
    print_table([{"": key, " ": value} for key, value in description.items()])
    print_table(columns, title="\ncolumns")


def tag(
    table: TableArgument,
    name: Annotated[str | None, typer.Argument(help="The tag to make; none lists them.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Give a version a name that never moves, or list the names.

    Example: softlabels tag labels@12 v1
    """
    from softlabels.store import tags
    from softlabels.store.table import Table

    opened = Table.open(table)
    if name is None:
        found = [tags.read_tag(opened.root, name) for name in tags.tag_names(opened.root)]
    else:
        found = [tags.make_tag(opened.root, name, opened.version, opened.snapshot_digest)]
    rows = [tag.model_dump() for tag in found]
    print_json(rows) if as_json else print_table(rows)


def verify(table: TableArgument, as_json: JsonOption = False) -> None:
    """Read every file of a version and check sums, counts and invariants; exit 1 on damage."""
    from softlabels.store.inspect import verify as check
    from softlabels.store.table import Table

    opened = Table.open(table)
    with progress() as bar:
        task = bar.add_task("verify", total=len(opened.files))
        report = check(opened, lambda: bar.advance(task))
    if as_json:
        print_json(report)
    else:
        for problem in report["problems"]:
            print(problem)
        print(
            f"{opened.root.uri}@{opened.version}: {report['files']} files, {report['rows']} rows, "
            f"{len(report['problems'])} problems"
        )
    if report["problems"]:
        raise typer.Exit(1)

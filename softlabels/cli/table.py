"""log, show, tag, verify, stats: what a table holds, costs, and whether it is whole."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

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
    app.command(rich_help_panel="Table")(stats)


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
    """Read every file of a version and check sums, counts and invariants; exit 1 on damage.

    Where rows hold their tokens, it also moves the targets by one token: their fit must get worse.
    """
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
        if (found := report.get("alignment")) is not None:
            print(f"alignment {found['alignment']!r}: {_verdict(found)}")
        print(
            f"{opened.root.uri}@{opened.version}: {report['files']} files, {report['rows']} rows, "
            f"{len(report['problems'])} problems"
        )
    if report["problems"]:
        raise typer.Exit(1)


def stats(
    table: TableArgument,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Rows to measure; default: some of all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write FILE.json or a Markdown FILE.md.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there already.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure bytes and codec error a position for several k, profiles and draws.

    A sample of the rows is written again with each setting, in memory. Other formats stand beside
    by their formulas. Capture with profile precise at the largest k for the best reference.
    """
    from softlabels.cli.output import markdown_table
    from softlabels.errors import BadInputError
    from softlabels.storage import open_root
    from softlabels.store.stats import measure, num_settings
    from softlabels.store.table import Table

    if output is not None and output.suffix not in (".json", ".md"):
        raise BadInputError(f"in which format {str(output)!r}? Call it .json or .md")
    if output is not None and output.exists() and not force:
        raise BadInputError(f"{str(output)!r} is there already: choose another, or add --force")
    opened = Table.open(table)
    total = num_settings(opened)
    with progress() as bar:
        task = bar.add_task("stats", total=total)
        found = measure(opened, rows, lambda: bar.advance(task))
    if as_json:
        print_json(found)
    elif output is None:
        print_table(_settings(found))
        print_table(found["columns"], title="\nbytes a position as stored")
        print()
        for note in _notes(found):
            print(note)
    if output is not None:
        text = "\n".join(f"- {note}" for note in _notes(found))
        text = f"{markdown_table(_settings(found))}\n{text}\n"
        data = json.dumps(found, indent=2) + "\n" if output.suffix == ".json" else text
        open_root(output.parent).write(output.name, data.encode())
        if not as_json:
            print(f"{output}: {len(found['settings'])} settings, {found['positions']} positions")


def _settings(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each setting, then one for each other format."""
    lines: list[dict[str, Any]] = [
        {
            "stored": f"k = {row['k']}, {row['profile']}"
            + (f", {row['draws']} draws" if row["draws"] else ""),
            "bytes": row["bytes"],
            **{part: row[part] for part in ("ids", "logprobs", "tail", "drawn", "rest")},
            "KL mean": f"{row['kl_mean']:.2g}",
            "KL 99 %": f"{row['kl_p99']:.2g}",
            "head mass": row["head_mass"],
        }
        for row in found["settings"]
    ]
    blank = dict.fromkeys(lines[0])
    others = [blank | {"stored": r["what"], "bytes": r["bytes"]} for r in found["references"]]
    return [*lines, *others]


def _notes(found: Mapping[str, Any]) -> list[str]:
    counts = f"{found['positions']} positions of {found['rows']} rows"
    notes = [
        f"{found['table']}@{found['version']}: {counts}, V = {found['num_classes']}; bytes a "
        "position, KL in nats; rest: tokens, labels, entropies, names, footer.",
        *found["notes"],
    ]
    return notes + [f"{row['what']}: {row['formula']}." for row in found["references"]]


def _verdict(found: Mapping[str, Any]) -> str:
    losses = ", ".join(f"{loss:.4f} at {shift}" for shift, loss in found["losses"].items())
    notes = {
        "unclear": "too close to tell",
        "too few": "too few positions to judge",
    }
    verdict = notes.get(found["verdict"], found["verdict"])
    return f"{verdict}; mean -log p of the token {losses} ({found['positions']} positions)"

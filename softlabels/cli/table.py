"""show, stats: what a table holds and what it costs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from softlabels.cli.output import print_json, print_table, progress
from softlabels.errors import BadInputError, counted

TableArgument = Annotated[str, typer.Argument(metavar="TABLE[@TAG|@VERSION]", help="A table.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
YesOption = Annotated[
    bool, typer.Option("--yes", help="Delete; without it, as with --dry-run, nothing is.")
]
"""Of the commands that lose something for good; all others act at once unless --dry-run."""


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(rich_help_panel="Table")(show)
    app.command(rich_help_panel="Table")(stats)


def requires_yes(yes: bool, dry_run: bool) -> bool:
    """Whether nothing is to be done, of a command that acts only with --yes."""
    if yes and dry_run:
        raise BadInputError("--yes or --dry-run? Give one of them")
    return not yes


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
            settings = counted(len(found["settings"]), "setting")
            print(f"{output}: {settings}, {counted(found['positions'], 'position')}")


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
    counts = f"{counted(found['positions'], 'position')} of {counted(found['rows'], 'row')}"
    notes = [
        f"{found['table']}@{found['version']}: {counts}, V = {found['num_classes']}; bytes a "
        "position, KL in nats; rest: tokens, labels, entropies, names, footer.",
        *found["notes"],
    ]
    return notes + [f"{row['what']}: {row['formula']}." for row in found["references"]]

"""ensemble: several teachers' tables into one, where that is exact."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from softlabels.cli.output import print_json, progress
from softlabels.errors import counted

if TYPE_CHECKING:
    from softlabels.query.materialise import EnsembleSpec, Materialised


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command(rich_help_panel="Query")(ensemble)


def ensemble(
    spec: Annotated[str, typer.Argument(metavar="SPEC.yaml", help="The ensemble.")],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="TABLE", help="The table to make.")
    ],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only look whether it is exact; nothing is made.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make one table of several teachers' tables: the weighted mixture of what they say.

    Only where it is exact: each id that a teacher stored is stored by all, or those that lack it
    store all that they have (k = all classes always is). Elsewhere train from the tables
    themselves, as an `ensemble:` in a recipe. The same command again goes on where it stopped.

    Example: softlabels ensemble teachers.yaml -o out/both --set ensemble.vit.weight=2
    """
    from softlabels.query.materialise import EnsembleSpec

    report = _with_progress(EnsembleSpec.read(spec, changes or ()), output, dry_run)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    for reason, count in report.dropped.items():
        if count:
            print(f"{counted(count, 'row')} of the first teacher left out: {reason}")
    if dry_run and report.version is None:
        units = counted(report.units, "unit")
        print(f"{report.table} would be made: exact, k {report.k}, {units}")
        return
    if not report.committed:
        print(f"nothing left to do: {counted(report.units, 'unit was', 'units were')} there")
    rows = counted(report.rows, "row")
    print(f"{report.table}@{report.version}: {rows} made, {report.already} before")


def _with_progress(spec: "EnsembleSpec", output: str, dry_run: bool) -> "Materialised":
    from softlabels.query.materialise import Watching, materialise

    with progress() as bar:
        checking = bar.add_task("check", total=None, visible=False)
        writing = bar.add_task("write", total=None, visible=False)

        def checked(rows: int, total: int) -> None:
            bar.update(checking, advance=rows, total=total, visible=True)

        def written(rows: int, total: int) -> None:
            bar.update(checking, visible=False)
            bar.update(writing, advance=rows, total=total, visible=True)

        return materialise(spec, output, Watching(checked, written), dry_run)

"""import: log-probabilities that others recorded, into a table."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from softlabels.cli.output import print_json, progress
from softlabels.errors import counted

if TYPE_CHECKING:
    from softlabels.teacher.recorded.spec import ImportSpec


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command("import", rich_help_panel="Teacher")(import_)


def import_(
    spec: Annotated[str, typer.Argument(metavar="SPEC.yaml", help="The import spec.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and judge all records; print JSON.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a table of log-probabilities that a serving engine or an API has returned.

    Reads OpenAI-compatible responses, vLLM's prompt_logprobs, and the data sets of DistillKit and
    axolotl. What a record does not tell is stored as unknown; a record that cannot be read exactly
    is refused, or left out and counted. The same command again does nothing and exits 0.

    Example: softlabels import import.yaml --set on_bad=skip
    """
    from softlabels.teacher.recorded.spec import ImportSpec

    loaded = ImportSpec.read(spec, changes or ())
    if dry_run:
        from softlabels.teacher.recorded.report import plan_import

        print_json(plan_import(loaded))
        return
    report = _with_progress(loaded)
    if as_json:
        print_json(report)
        return
    for reason, count in report["skipped"].items():
        print(f"{count} left out: {reason}")
    if report["repeated"]:
        repeated = counted(report["repeated"], "record repeats", "records repeat")
        print(f"{repeated} a sequence: kept once")
    print(_tail(report))
    if not report["committed"]:
        units = counted(report["units"], "unit was", "units were")
        print(f"nothing left to import: {units} there")
    print(
        f"{report['table']}@{report['version']}: {counted(report['rows'], 'sequence')} imported, "
        f"{report['already']} before, {counted(report['positions'], 'position')} in all"
    )


def _tail(report: dict[str, Any]) -> str:
    recorded = report["recorded"]
    if recorded["tail"] == "unknown":
        tail = "tails unknown"
    else:
        tail = f"tails derived, their mass off by at most {recorded['tail_error']:g}"
    return (
        f"k {report['k']} of {counted(recorded['entries'], 'entry', 'entries')} a position, {tail}"
    )


def _with_progress(spec: "ImportSpec") -> dict[str, Any]:
    from softlabels.teacher.capture import Progress
    from softlabels.teacher.recorded.report import import_recorded

    with progress() as bar:
        reading = bar.add_task("read", total=None, visible=False)
        writing = bar.add_task("write", total=None, visible=False)

        def scanned(rows: int) -> None:
            bar.update(reading, advance=rows, visible=True)

        def planned(rows: int) -> None:
            bar.update(reading, visible=False)
            bar.update(writing, total=rows, visible=True)

        def done(rows: int, _: float) -> None:
            bar.update(writing, advance=rows)

        return import_recorded(spec, Progress(scanned, planned, done))

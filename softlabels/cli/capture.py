"""capture: a teacher labels a source into a table."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from softlabels.cli.output import print_json, progress

if TYPE_CHECKING:
    from softlabels.teacher.capture import Report
    from softlabels.teacher.spec import CaptureSpec, SequenceCaptureSpec


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(rich_help_panel="Teacher")(capture)


def capture(
    spec: Annotated[str, typer.Argument(metavar="SPEC.yaml", help="The capture spec.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time one batch; print rows, bytes, time as JSON.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a teacher once over a source and keep its soft labels.

    The same command again goes on where it stopped, however it stopped; when nothing is left it
    says so and exits 0. Stopped by a signal it exits 75 and loses nothing.
    """
    from softlabels.teacher.spec import read_capture

    loaded = read_capture(spec, changes or ())
    if dry_run:
        from softlabels.teacher.estimate import estimate

        print_json(estimate(loaded))
        return
    report = _with_progress(loaded)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    for reason, count in sorted(report.skipped.items()):
        print(f"{count} left out of the source: {reason}")
    if report.repeated:
        print(
            f"{report.repeated} source rows repeat an example and were labelled once"
            f" ({report.relabelled} of them with another hard label)"
        )
    if not report.committed:
        print(f"nothing left to label: all {report.units} units were there")
    print(f"{report.table}@{report.version}: {report.rows} rows labelled, {report.already} before")


def _with_progress(spec: "CaptureSpec | SequenceCaptureSpec") -> "Report":
    from rich.progress import TextColumn

    from softlabels.teacher.capture import Progress, capture

    with progress(TextColumn("{task.fields[note]}")) as bar:
        planning = bar.add_task("plan", total=None, note="", visible=False)
        labelling = bar.add_task("label", total=None, note="", visible=False)

        def scanned(rows: int) -> None:
            bar.update(planning, advance=rows, visible=True)

        def planned(rows: int) -> None:
            bar.update(planning, visible=False)
            bar.update(labelling, total=rows, visible=True)

        def done(rows: int, bytes_per_row: float) -> None:
            speed = bar.tasks[labelling].speed
            rate = f"{speed:,.0f} rows/s" if speed else ""
            size = f"{bytes_per_row:,.0f} B/row" if bytes_per_row else ""
            bar.update(labelling, advance=rows, note=f"{rate} {size}")

        return capture(spec, Progress(scanned, planned, done))

"""capture: a teacher labels a source into a table."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softlabels.cli.output import print_json, progress
from softlabels.errors import counted

if TYPE_CHECKING:
    from softlabels.cli.outcome import Outcome
    from softlabels.teacher.capture import Progress, Report


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
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only units whose number modulo N is I, I from 0."),
    ] = None,
    claim: Annotated[
        bool, typer.Option("--claim", help="Share the units with all others that claim.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="With --claim: end when others are at all the rest.")
    ] = False,
    lease: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="With --claim: a worker silent so long is dead."),
    ] = 60.0,
    metrics_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep numbers here: Prometheus text, or FILE.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a teacher once over a source and keep its soft labels.

    The same command again goes on where it stopped, however it stopped; when nothing is left it
    says so. Any number of processes on any machines may run it at once: --claim shares the work as
    it comes, waits for the others at the end and takes over from workers that died; --shard cuts
    it beforehand. Every unit is committed once whatever is mixed.

    Exit codes: 0 done, or done before; 1 failed; 2 wrong use; 75 stopped by a signal, or storage
    did not answer: nothing is lost, run it again. The last line of stdout is JSON with "exit", and
    "error" in failure; with --json it is the only line.

    Example: softlabels capture job.yaml --claim --metrics-file /var/lib/node_exporter/job.prom
    """
    from softlabels.errors import BadInputError

    if dry_run:
        if shard or claim or metrics_file:
            raise BadInputError(
                "--dry-run is of the whole run: leave out --shard, --claim, --metrics-file"
            )
        _dry_run(spec, changes or ())
        return
    _label(spec, changes or (), (shard, claim, not no_wait, lease), metrics_file, as_json)


def _label(
    spec: str,
    changes: Sequence[str],
    shared: tuple[str | None, bool, bool, float],
    metrics_file: Path | None,
    as_json: bool,
) -> None:
    """Captures; says how it ended, also in failure. `shared` is what `Sharing.parse` takes."""
    from softlabels.cli.outcome import MetricsFile, Outcome
    from softlabels.signals import stop_on_signal

    # From the first moment: a signal while libraries are loaded is one to try again after, too.
    with stop_on_signal(), Outcome() as outcome:
        from softlabels.teacher.sharing import Sharing
        from softlabels.teacher.spec import read_capture

        if metrics_file is not None:
            outcome.metrics = MetricsFile(metrics_file, spec)
        sharing = Sharing.parse(*shared)
        loaded = read_capture(spec, changes)
        with _progress(outcome) as shown:
            from softlabels.teacher.capture import capture as run

            report = run(loaded, shown, sharing)
        outcome.report = report
        outcome.lines = [] if as_json else list(_lines(report))


def _dry_run(spec: str, changes: Sequence[str]) -> None:
    from softlabels.teacher.spec import read_capture

    loaded = read_capture(spec, changes)
    from softlabels.teacher.estimate import estimate

    print_json(estimate(loaded))


def _lines(report: "Report") -> Iterator[str]:
    """What was done, for people; the last line says what was made."""
    for reason, count in sorted(report.skipped.items()):
        yield f"{count} left out of the source: {reason}"
    if report.repeated:
        yield (
            f"{counted(report.repeated, 'source row repeats', 'source rows repeat')} an example: "
            f"labelled once ({report.relabelled} with another hard label)"
        )
    if report.deleted:
        yield f"{counted(report.deleted, 'row')} left out: deleted from the table before"
    if report.left:
        yield f"{report.left} of {counted(report.units, 'unit')} left to other workers"
    elif not report.committed:
        yield f"nothing left to label: {counted(report.units, 'unit was', 'units were')} there"
    rows = counted(report.rows, "row")
    yield f"{report.table}@{report.version}: {rows} labelled, {report.already} before"


@contextmanager
def _progress(outcome: "Outcome") -> "Iterator[Progress]":
    """Callbacks that show a bar on stderr and keep the outcome up to date."""
    from rich.progress import TextColumn

    from softlabels.teacher.capture import Progress

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
            outcome.update()

        def waiting(units: int) -> None:
            bar.update(labelling, note=f"waiting for other workers, at {counted(units, 'unit')}")

        yield Progress(scanned, planned, done, waiting=waiting, reported=outcome.update)

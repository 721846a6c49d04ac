"""status: how far the runs of a table are, and who is at them."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softlabels.cli.output import print_json, print_table
from softlabels.errors import counted

if TYPE_CHECKING:
    from softlabels.store.status import RunStatus


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command(rich_help_panel="Teacher")(status)


def status(
    place: Annotated[
        str, typer.Argument(metavar="TABLE|SPEC.yaml", help="A table, or the spec that names it.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how far captures are: units, rows, rate, time left, workers and their last sign of life.

    Reads the table's log, run records and claims; no teacher is loaded. With a spec only its own
    runs are shown where they are known, else all. Workers that capture with --claim are listed;
    those that take a --shard, or all units, leave no sign but their commits. How long ago a thing
    was is this machine's clock against the times that the store gave its objects.

    Example: softlabels status job.yaml
    """
    from softlabels.store.status import CLOCK
    from softlabels.store.status import status as look
    from softlabels.store.table import Table

    uri, spec = _table_of(place) if os.path.isfile(place) else (place, None)
    table = Table.open(uri)
    runs = look(table, spec)
    if as_json:
        print_json(
            {
                "table": table.root.uri,
                "version": table.version,
                "rows": table.num_rows,
                "clock": CLOCK,
                "runs": [asdict(run) for run in runs],
            }
        )
        return
    if runs:
        print_table([_run_line(run) for run in runs])
    workers = [_worker_line(worker, run) for run in runs for worker in run.workers]
    if workers:
        print_table(workers, title="\nworkers with a claim")
    for run in runs:
        if run.staged_files:
            print(
                f"run {run.run_id[:12]}: {counted(run.staged_files, 'file')}, "
                f"{counted(run.staged_bytes, 'byte')} stored and not committed"
            )
    lost = sum(run.rows for run in runs) - table.num_rows
    if lost > 0:
        print(f"{counted(lost, 'row')} that runs put in went since: see softlabels log")
    unfinished = sum(run.finished is False for run in runs)
    print(
        f"{table.root.uri}@{table.version}: {counted(table.num_rows, 'row')}, "
        f"{counted(len(runs), 'run')}, {unfinished} unfinished"
    )


def _table_of(path: str) -> tuple[str, Mapping[str, Any]]:
    """The table that a spec names, and the spec as a run's record has it."""
    from softlabels.specs import read_yaml
    from softlabels.teacher.recorded.spec import ImportSpec
    from softlabels.teacher.spec import read_capture

    read = ImportSpec.read if "layout" in read_yaml(path) else read_capture
    spec = read(path)
    return spec.table, spec.model_dump(mode="json")


def _run_line(run: "RunStatus") -> dict[str, Any]:
    return {
        "run": run.run_id[:12],
        "": run.kind,
        "teacher": run.teacher,
        "units": f"{run.done}/{'?' if run.units is None else run.units}",
        "rows": run.rows,
        "state": _state(run),
        "last commit": "" if run.version is None else f"version {run.version}{_ago(run)}",
        "rows/s": "" if run.rows_per_s is None else f"{run.rows_per_s:.4g}",
        "left": "" if run.finished or run.seconds_left is None else f"~{_time(run.seconds_left)}",
        "workers": len(run.workers),
    }


def _state(run: "RunStatus") -> str:
    if run.finished is None:
        return "begun before runs were recorded"
    return "finished" if run.finished else "unfinished"


def _worker_line(worker: Any, run: "RunStatus") -> dict[str, Any]:
    return {
        "worker": worker.name or "?",
        "unit": worker.unit,
        "beats": "" if worker.beats is None else str(worker.beats),
        "last beat": "" if worker.seconds_ago is None else f"{_time(worker.seconds_ago)} ago",
        "": "silent: others may take its unit" if worker.dead else "",
    }


def _ago(run: "RunStatus") -> str:
    return "" if run.seconds_ago is None else f", {_time(run.seconds_ago)} ago"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"

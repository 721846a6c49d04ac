"""train, evaluate: a student learns from a plan, and how well it does."""

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softlabels.cli.output import print_json, print_table, progress
from softlabels.errors import BadInputError, MismatchError, counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from softlabels.student.spec import RunSpec
    from softlabels.student.trainer import Trained

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RootOption = Annotated[
    list[str] | None,
    typer.Option("--root", metavar="NAME=URI", help="Where a table of the plan is now."),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(rich_help_panel="Student")(train)
    app.command(rich_help_panel="Student")(evaluate)


def train(
    spec: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run spec.")],
    roots: RootOption = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of it.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check spec and plans; print the work as JSON.")
    ] = False,
    profile: Annotated[
        int | None,
        typer.Option("--profile", metavar="STEPS", min=1, help="Time some steps; write nothing."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a student from a plan; no teacher is needed.

    The same command again goes on from the newest checkpoint, however the last one ended; when
    the run is finished it says so and exits 0. Stopped by a signal it exits 75 and loses nothing.
    On several processes: torchrun --nproc-per-node 2 -m softlabels train run.yaml; torchrun exits
    1 whatever its processes exit with, and starts them again with --max-restarts.

    Example: softlabels train run.yaml --set loss.kd_weight=0 --set out=out/run-hard
    """
    first = _rank() == 0
    if "WORLD_SIZE" in os.environ:
        # torch advises on each rank against what any student needs: looking for parameters that
        # its loss leaves out.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from softlabels.student.spec import RunSpec

    loaded = _with_roots(RunSpec.read(spec, changes or ()), roots)
    if dry_run:
        if first:
            print_json(_work(loaded))
        return
    if profile is not None:
        _profile(loaded, profile, first, as_json)
        return
    trained = _with_progress(loaded, first)
    record = trained.record
    if not first:
        return
    if as_json:
        print_json({"student": str(trained.student), "already": trained.already, **record})
        return
    if record["evaluation"] is not None:
        print_table(_figures({"student": record["evaluation"]}))
    if trained.already:
        done = counted(record["steps"], "step was", "steps were")
        print(f"nothing left to train: {done} done")
    elif "time" in record:  # records of older releases have none
        share = record["time"]["parts"]["data wait"]["share"]
        print(f"data wait {share:.1%}; the run {record['time']['bottleneck']}")
    parameters, steps = record["parameters"], counted(record["steps"], "step")
    print(f"{trained.student}: {counted(parameters, 'parameter')}, {steps}")


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its RUN.yaml.")],
    plan: Annotated[
        str | None, typer.Option("--plan", help="What to measure on; default: the run's own.")
    ] = None,
    student: Annotated[
        str | None, typer.Option("--student", help="Weights (safetensors) of the same student.")
    ] = None,
    roots: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a trained student on a plan, beside its teacher, from stored labels alone.

    A run's folder names the code of its student, which is imported: do this to folders that you
    or people you trust have made.

    Example: softlabels evaluate out/run --plan out/test.plan.parquet
    """
    from softlabels.plan import Plan
    from softlabels.student.evaluate import evaluate_teacher
    from softlabels.student.saved import evaluate_saved, read_run

    spec = _with_roots(read_run(run), roots)
    path = plan or (spec.evaluate.plan if spec.evaluate is not None else None)
    if path is None:
        raise BadInputError("--plan: expected a plan, for the run itself was not evaluated on one")
    opened = Plan.read(path)
    found = {"student": evaluate_saved(spec, opened, student).as_dict()}
    try:
        teacher = evaluate_teacher(opened, roots=opened.roots_of(spec.roots))
        found["teacher"] = teacher.as_dict()
    except MismatchError as error:
        if opened.num_members == 1:
            raise
        # The student's figures stand without: of the mixture too little is stored.
        print(f"warning: {error}", file=sys.stderr)
    if as_json:
        print_json({"plan_fingerprint": opened.fingerprint, **found})
        return
    print_table(_figures(found))


def _with_roots(spec: "RunSpec", roots: list[str] | None) -> "RunSpec":
    found = dict(spec.roots)
    for root in roots or ():
        name, equals, uri = root.partition("=")
        if not name or not equals or not uri:
            raise BadInputError(f"--root {root!r}: expected NAME=URI")
        found[name] = uri
    return spec.model_copy(update={"roots": found})


def _work(spec: "RunSpec") -> dict[str, Any]:
    from softlabels.student.fit import require_fit

    plan, other = require_fit(spec)
    batches = -(-plan.num_rows // spec.batch_size)
    steps = spec.steps or (spec.epochs or 0) * batches
    return {
        "steps": steps,
        "epochs": steps / batches,
        "rows_per_epoch": plan.num_rows,
        "bytes": sum(file.size for table in plan.tables.values() for file in table.files),
        "evaluation_rows": other.num_rows if other else 0,
        "plan_fingerprint": plan.fingerprint,
        "identity_sha256": spec.fingerprint(),
        "spec": spec.model_dump(mode="json"),
    }


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _profile(spec: "RunSpec", steps: int, shown: bool, as_json: bool) -> None:
    from softlabels.student.measure import measure

    found = measure(spec, steps)
    if not shown:
        return
    if as_json:
        print_json(found)
        return
    rows = [
        {"": name, "s/step": round(part["seconds_per_step"], 6), "share": f"{part['share']:.1%}"}
        for name, part in found["parts"].items()
    ]
    print_table(rows)
    print(f"{found['steps']} steps in {found['seconds']:.2f} s: {found['bottleneck']}")


def _with_progress(spec: "RunSpec", shown: bool) -> "Trained":
    from rich.progress import TextColumn

    from softlabels.student.trainer import Progress, train

    bar = progress(TextColumn("{task.fields[note]}"))
    tasks: list[Any] = []

    def report(at: Progress) -> None:
        if not shown:
            return
        if not tasks:  # nothing is drawn for a run that is refused or done already
            bar.start()
            tasks.append(bar.add_task("train", total=at.total, note=""))
        note = f"loss {at.loss:.4f}"
        if at.line:
            wait = at.line["data_wait_share"]
            unit = "tokens" if "tokens_per_s" in at.line else "rows"
            note += f" {at.line[f'{unit}_per_s']:,.0f} {unit}/s {wait:.0%} waiting for data"
        bar.update(tasks[0], completed=at.step, note=note)

    try:
        return train(spec, report=report)
    finally:
        if tasks:
            bar.stop()


def _figures(found: "Mapping[str, Mapping[str, Any]]") -> list[dict[str, Any]]:
    """A row a figure, a column a subject; figures that no subject has are left out."""
    names = {name: None for one in found.values() for name in one if name != "bins"}
    rows = [
        {"": name, **{subject: one.get(name) for subject, one in found.items()}} for name in names
    ]
    return [row for row in rows if any(row[subject] is not None for subject in found)]

"""verify: whether a table is whole, and whether its labels are what the teacher says."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from softlabels.cli.output import print_json, progress
from softlabels.cli.table import JsonOption, TableArgument
from softlabels.errors import counted

SampleOption = Annotated[
    int | None,
    typer.Option("--sample", min=1, metavar="N", help="Read N files only, chosen at random."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of --rescore's spec."),
]


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command(rich_help_panel="Table")(verify)


def verify(
    table: TableArgument,
    every: Annotated[
        bool, typer.Option("--all", help="The newest version and each that a tag names.")
    ] = False,
    sample: SampleOption = None,
    rescore: Annotated[
        str | None,
        typer.Option("--rescore", metavar="SPEC.yaml", help="Ask this run's teacher again."),
    ] = None,
    changes: SetOption = None,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Source rows that --rescore labels, about.")
    ] = 256,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Nats that --rescore allows beyond rounding."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of what is chosen at random.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read every file of a version and check sums, counts and invariants; exit 1 on damage.

    Where rows hold their tokens, it also moves the targets by one token: their fit must get worse.
    With --rescore a live teacher labels some rows again, and differences beyond what rounding and
    other hardware explain are damage too. Where the spec was filled in for the run, as by a nightly
    job, fill it in as well: --set source.files='images/day=2024-02-29/*.parquet'.

    Example: softlabels verify labels@v1 --sample 10 --rescore job.yaml
    """
    from softlabels.errors import BadInputError
    from softlabels.store.table import Table

    if every and (sample is not None or rescore is not None):
        raise BadInputError("--all reads every file: leave out --sample and --rescore")
    if changes and rescore is None:
        raise BadInputError("--set changes the spec of --rescore: give that too")
    opened = Table.open(table)
    if every:
        report = _all(opened)
    else:
        # First: a spec that does not fit is refused before files are read.
        found = (
            None
            if rescore is None
            else _rescored(opened, (rescore, changes or ()), rows, tolerance, seed)
        )
        report = _one(opened, sample, seed)
        if found is not None:
            report["rescore"] = found
            report["problems"] += found["problems"]
    if as_json:
        of = {} if every else {"version": opened.version}
        print_json({"table": opened.root.uri} | of | report)
    else:
        _print(opened.root.uri, opened.version, report)
    if report["problems"]:
        raise typer.Exit(1)


def _one(table: Any, sample: int | None, seed: int | None) -> dict[str, Any]:
    from softlabels.store.inspect import verify as check

    count = len(table.files) if sample is None else min(sample, len(table.files))
    with progress() as bar:
        task = bar.add_task("verify", total=count)
        return check(table, lambda: bar.advance(task), sample, seed)


def _all(table: Any) -> dict[str, Any]:
    from softlabels.store.inspect import verify_all

    with progress() as bar:
        task = bar.add_task("verify", total=None)
        return verify_all(
            table, lambda files: bar.update(task, total=files), lambda: bar.advance(task)
        )


def _rescored(
    table: Any,
    spec: tuple[str, Sequence[str]],
    rows: int,
    tolerance: float | None,
    seed: int | None,
) -> dict[str, Any]:
    from softlabels.errors import IntegrityError
    from softlabels.teacher.rescore import rescore
    from softlabels.teacher.spec import read_capture

    loaded = read_capture(*spec)
    with contextlib.ExitStack() as stack:
        bar = progress()
        task = bar.add_task("label", total=None)

        def planned(count: int) -> None:
            bar.update(task, total=count)
            stack.enter_context(bar)  # not before: an error has a line of its own

        def done(count: int) -> None:
            bar.advance(task, count)

        try:
            return rescore(table, loaded, rows, tolerance, seed, planned, done)
        except IntegrityError as error:
            # The files that are read afterwards tell what else is wrong.
            return {"rows": 0, "problems": [f"rows were not labelled again: {error}"]}


def _print(uri: str, version: int, report: Mapping[str, Any]) -> None:
    for problem in report["problems"]:
        print(problem)
    if (found := report.get("alignment")) is not None:
        print(f"alignment {found['alignment']!r}: {_verdict(found)}")
    if (asked := report.get("rescore")) is not None and asked["rows"]:
        _print_rescored(asked)
    if (part := report.get("sample")) is not None:
        share = part["bytes"] / max(1, part["of_bytes"])
        print(
            f"a sample by seed {part['seed']}: {report['files']} of "
            f"{counted(part['of_files'], 'file')}, {report['rows']} of "
            f"{counted(part['of_rows'], 'row')}, {share:.1%} of the bytes; nothing is "
            "known of the others"
        )
    for one in report.get("versions", ()):
        tags = f" ({', '.join(one['tags'])})" if one["tags"] else ""
        print(f"version {one['version']}{tags}: {_counts(one)}")
    which = f"{counted(len(report['versions']), 'version')}, " if "versions" in report else ""
    where = uri if "versions" in report else f"{uri}@{version}"
    print(f"{where}: {which}{_counts(report)}")


def _counts(found: Mapping[str, Any]) -> str:
    files, rows = counted(found["files"], "file"), counted(found["rows"], "row")
    return f"{files}, {rows}, {counted(len(found['problems']), 'problem')}"


def _print_rescored(found: Mapping[str, Any]) -> None:
    absent = f" ({found['absent']} more not in it)" if found["absent"] else ""
    print(
        f"labelled again by seed {found['seed']}: {found['rows']} of "
        f"{counted(found['of_rows'], 'row')}{absent}, {counted(found['positions'], 'position')}"
    )
    print(
        f"max |difference of log p| {found['max_delta']:.2g} nats (allowed: a step of the profile "
        f"+ {found['tolerance']:g}), KL {found['kl_mean']:.2g} mean, {found['kl_max']:.2g} max, "
        f"{found['top1_changed']} with another top class"
    )
    if found["labels_changed"]:
        labels = counted(found["labels_changed"], "hard label is another", "hard labels are others")
        print(f"{labels} in the source now")


def _verdict(found: Mapping[str, Any]) -> str:
    losses = ", ".join(f"{loss:.4f} at {shift}" for shift, loss in found["losses"].items())
    notes = {
        "unclear": "too close to tell",
        "too few": "too few positions to judge",
    }
    verdict = notes.get(found["verdict"], found["verdict"])
    positions = counted(found["positions"], "position")
    return f"{verdict}; mean -log p of the token {losses} ({positions})"

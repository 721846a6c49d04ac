"""calibrate, suspects, diff: labels put right, hard labels doubted, versions compared."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softlabels.cli.output import print_json, print_table, progress
from softlabels.cli.query import ForceOption, JsonOption, check_free
from softlabels.cli.sql import Format, format_of, write_result
from softlabels.errors import counted

if TYPE_CHECKING:
    import pyarrow as pa

    from softlabels.query.calibrate import Calibrated
    from softlabels.query.noise import Noise

OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Write all rows to a .parquet, .csv, .json or .arrow."),
]
TableArgument = Annotated[str, typer.Argument(metavar="TABLE[@TAG|@VERSION]", help="A table.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the app."""
    app.command(rich_help_panel="Repair")(calibrate)
    app.command(rich_help_panel="Repair")(suspects)
    app.command(rich_help_panel="Repair")(diff)


def calibrate(
    table: TableArgument,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="Which labelled rows T is fitted on.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="Take this T, fit none.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="TABLE2", help="Make another table of it.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Calibrate labels that are calibrated already.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only fit; nothing is made.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Store the labels at the temperature that fits the hard labels best, as a new version.

    Only where that is exact: where all classes are stored, any temperature; else the best of those
    that were captured. Older versions and tags stay. The figures are of examples held out of the
    fit. The same command goes on where it stopped. Once it is done it is refused, for the labels
    would be tempered twice; with --to it says so and ends with 0.

    Example: softlabels calibrate labels --where "split = 'validation'"
    """
    from softlabels.query.calibrate import calibrate as run

    with contextlib.ExitStack() as stack:
        bar = progress()
        task = bar.add_task("write", total=None)

        def written(rows: int, total: int) -> None:
            if not bar.live.is_started:  # an empty one would print a line of its own
                stack.enter_context(bar)
            bar.update(task, advance=rows, total=total)

        report = run(table, where, temperature, to, again, dry_run, written)
    if as_json:
        print_json(
            dataclasses.asdict(report) | {"calibration": _dumped(report), "dry_run": dry_run}
        )
        return
    _print_calibrated(report, dry_run)


def suspects(
    table: TableArgument,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="Which rows to look at; default: all.")
    ] = None,
    rank: Annotated[
        int, typer.Option(help="Sequences: least rank of a suspect label, 0 is the likeliest.")
    ] = 5,
    below: Annotated[
        float, typer.Option(help="Sequences: its label is less likely than this.")
    ] = 0.01,
    sure: Annotated[
        float, typer.Option(help="Sequences: least probability of the teacher's own choice.")
    ] = 0.9,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Most rows that are printed.")] = 20,
    output: OutputOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the rows whose hard label is likely wrong, worst first, and estimate how many are.

    Classification: confident learning. A row is suspect where the likeliest of the classes that
    reach their threshold (the mean probability of a class over the rows that are labelled so) is
    not its label; error_prob is the probability that it is wrong by the estimated noise.

    Example: softlabels suspects labels@v1 -o suspects.parquet
    """
    from softlabels.query.noise import estimate_noise
    from softlabels.query.suspects import Doubt
    from softlabels.query.suspects import suspects as find
    from softlabels.store.table import Table

    kind = _checked(output, force)
    doubt = Doubt(rank, below, sure)
    opened = Table.open(table)
    noise = estimate_noise(opened, where)
    found = find(opened, where, doubt, noise)
    if output is not None:
        write_result(found, kind, output)
    if as_json:
        print_json(
            {
                "noise": noise and dataclasses.asdict(noise),
                "count": found.num_rows,
                "suspects": _plain(found.slice(0, limit)),
            }
        )
        return
    print_table([_short(row) for row in found.slice(0, limit).to_pylist()])
    _print_noise(noise, found)
    rows = counted(opened.num_rows, "row")
    print(f"{opened.root.uri}@{opened.version}: {found.num_rows} of {rows} suspect")
    _print_written(output, found.num_rows)


def diff(
    a: Annotated[str, typer.Argument(metavar="A[@TAG|@VERSION]", help="A table.")],
    b: Annotated[str, typer.Argument(metavar="B[@TAG|@VERSION]", help="The one to compare.")],
    only: Annotated[
        str | None,
        typer.Option(
            help="Rows of one kind: added, removed, positions, relabelled, top1, probabilities."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Most rows that are printed.")] = 20,
    output: OutputOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two teachers' tables, or two versions: what was added, relabelled, what differs most.

    Rows are matched by example_id and view. KL is over the ids that both store and one class for
    the rest: exact where all classes are stored, else at most the full KL.

    Example: softlabels diff labels@v1 labels@v2 --only relabelled -o relabelled.csv
    """
    from softlabels.errors import BadInputError
    from softlabels.query.diff import CHANGES, names_of
    from softlabels.query.diff import diff as compare

    if only is not None and only not in CHANGES:
        raise BadInputError(f"--only {only!r}: expected one of {', '.join(CHANGES)}")
    kind = _checked(output, force)
    found = compare(a, b)
    if output is not None:
        write_result(found.rows(only=only), kind, output)
    if as_json:
        rows = _plain(found.rows(limit, only))
        print_json({**found.summary, "rows": rows})
        return
    print_table([_short(row) for row in names_of(found, found.rows(limit, only))])
    said = found.summary
    sign = "" if said["exact"] else ">= "
    both = counted(said["both"], "row")
    print(
        f"{both} in both, {said['added']} added, {said['removed']} removed, "
        f"{said['other_positions']} with other positions"
    )
    if said["both"] == said["other_positions"]:
        print("no row can be compared: they have no example in common, or other positions of it")
        return
    infinite = counted(said["infinite"], "row")
    infinite = f" ({infinite} infinite, left out)" if said["infinite"] else ""
    print(
        f"KL(a|b) {sign}{said['kl_ab']:.4g}, KL(b|a) {sign}{said['kl_ba']:.4g} nats a "
        f"position{infinite}"
    )
    print(
        f"{a} -> {b}: {said['relabelled']} relabelled, {said['top1_changed']} with another top "
        f"class, {said['changed']} changed in all"
    )
    _print_written(output, found.rows(only=only).num_rows if only else len(found.change))


def _checked(output: Path | None, force: bool) -> Format:
    """The format of an output that may be written."""
    from softlabels.errors import BadInputError

    kind = format_of(output)
    if output is not None and kind == "table":
        raise BadInputError(
            f"in which format {str(output)!r}? Call it .parquet, .csv, .json or .arrow"
        )
    check_free(output, force)
    return kind


def _plain(rows: "pa.Table") -> list[dict[str, Any]]:
    """Rows as JSON can hold them: infinity and NaN become null."""
    return [
        {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        for row in rows.to_pylist()
    ]


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a terminal: without lists, and without ids that have a name beside them."""
    named = {name for name in row if row.get(f"{name}_name") is not None}
    return {
        name: value
        for name, value in row.items()
        if not isinstance(value, list)
        and name not in named
        and not (value is None and name.endswith("_name"))
    }


def _print_noise(noise: "Noise | None", found: "pa.Table") -> None:
    if noise is None:
        print("too few labelled positions to estimate how many labels are wrong")
        return
    print(
        f"estimated wrong labels: {noise.wrong:.2%} +- {noise.wrong_se:.2%} of "
        f"{counted(noise.positions, 'position')} (fitted with temperature {noise.temperature:.3g})"
    )
    if "error_prob" in found.column_names and found.num_rows:
        expected = sum(found["error_prob"].drop_null().to_pylist())
        suspects = counted(found.num_rows, "suspect")
        print(f"of the {suspects}, {expected:.0f} expected to be wrong")
    if noise.wrong < noise.wrong_se:
        print("no wrong labels show in the estimate: the list is a ranking, not a finding")


def _print_written(output: Path | None, rows: int) -> None:
    if output is not None:
        print(f"{output}: {counted(rows, 'row')}")


def _dumped(report: "Calibrated") -> dict[str, object] | None:
    found = report.calibration
    return None if found is None else found.model_dump(mode="json")


def _print_calibrated(report: "Calibrated", dry_run: bool) -> None:
    found = report.calibration
    if report.fits:
        best = report.temperature
        print_table(
            [
                {"temperature": t, "NLL of the fit": nll, "": "best" if t == best else ""}
                for t, nll in report.fits.items()
            ]
        )
    if report.temperature_se is not None:
        print(f"fitted: {report.temperature:.4g} +- {report.temperature_se:.2g}")
    if found is not None and found.nll_before is not None:
        held_out = counted(found.held_out, "labelled position")
        print(
            f"{held_out} held out: NLL {found.nll_before:.4f} -> "
            f"{found.nll_after:.4f}, calibration error {found.ece_before:.4f} -> "
            f"{found.ece_after:.4f}"
        )
    if report.unlabelled or report.unknown:
        print(
            f"left out of the fit: {counted(report.unlabelled, 'position')} without a label, "
            f"{report.unknown} whose label has no known probability"
        )
    for line in report.left_out:
        print(f"not in the new version: {line}")
    for note in report.notes:
        print(note)
    where = f"{report.table}@{report.version}"
    if found is None:
        print(f"{report.table}: as it was, at version {report.parent}")
    elif dry_run:
        print(f"{report.table} would be made at temperature {report.temperature:g}")
    else:
        print(f"{where}: {counted(report.rows, 'row')} at temperature {report.temperature:g}")

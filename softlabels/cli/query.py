"""mix: recipes into plans."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softlabels.cli.output import print_json
from softlabels.cli.plans import describe, print_funnel, print_sources
from softlabels.errors import counted

if TYPE_CHECKING:
    from softlabels.plan import Plan

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Write over a file that is there already.")
]


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command(rich_help_panel="Query")(mix)


def mix(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="The recipe.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PLAN.parquet", help="The plan to make."),
    ] = None,
    no_pin: Annotated[
        bool, typer.Option("--no-pin", help="Do not tag the table versions that it reads.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Only say what the plan would be: what each step of each source leaves. "
            "Nothing is made.",
        ),
    ] = False,
) -> None:
    """Freeze a recipe into a plan: exactly which rows a student reads, how often, in which order.

    The table versions it reads are tagged plan-<fingerprint>, so that they are kept. Bytes are not
    checked here, as by `query`; a student checks all that it reads.
    """
    from softlabels.errors import BadInputError
    from softlabels.plan import ENSEMBLE
    from softlabels.query.ensemble import advice
    from softlabels.query.mix import mix as make
    from softlabels.query.mix import pin
    from softlabels.query.recipe import Recipe

    if (output is None) != explain:
        raise BadInputError("say where the plan goes with -o PLAN.parquet, or only --explain it")
    check_free(output, force, "plan")
    plan = make(Recipe.read(recipe))
    if output is not None and output.exists() and not force:
        _require_same(plan, output)
    if output is not None:
        plan.write(output)
    # After it is there: a tag of a plan that nobody has would keep files for ever. One that cannot
    # be set is set when the same command is run again.
    tags = [] if no_pin or explain else pin(plan)
    if ENSEMBLE in plan.features:
        several = plan.entries.filter(plan.entries["members"].is_valid())
        if warning := advice(several):
            print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print_json(describe(plan) | {"plan": output and str(output), "tags": tags})
        return
    (print_funnel if explain else print_sources)(plan)
    for tag in tags:
        print(f"pinned {tag}")
    made = "would be made" if output is None else str(output)
    print(f"{made}: {counted(plan.num_rows, 'row')} an epoch, fingerprint {plan.fingerprint}")


def _require_same(plan: "Plan", output: Path) -> None:
    """Refuses to write over another plan: a run that goes on with it would be lost."""
    from softlabels.errors import BadInputError
    from softlabels.plan import Plan

    found = Plan.read(output).fingerprint
    if found != plan.fingerprint:
        raise BadInputError(
            f"{str(output)!r} holds another plan, {found[:16]!r}, the recipe gives "
            f"{plan.fingerprint[:16]!r}: choose another place, or add --force"
        )


def check_free(output: Path | None, force: bool, kind: str = "") -> None:
    """Refuses to write over a file, before any work; a plan may be in the place of a plan."""
    from softlabels.errors import BadInputError, SoftLabelsError
    from softlabels.plan import Plan

    if output is None or force or not output.exists():
        return
    try:
        if kind == "plan" and Plan.read(output):
            return
    except SoftLabelsError:
        pass
    raise BadInputError(f"{str(output)!r} is there already: choose another, or add --force")

"""report: a page that says what a table, a plan or a run is worth, and what is wrong with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from softlabels.cli.output import print_json
from softlabels.errors import counted, printable

if TYPE_CHECKING:
    from softlabels.report.finding import Finding

DEFAULT = Path("report.html")


SubjectArgument = Annotated[
    str,
    typer.Argument(
        metavar="TABLE|PLAN|RUN", help="TABLE[@TAG|@VERSION], PLAN.parquet or a run's folder."
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="PAGE.html", help=f"The page; {DEFAULT} if left out."),
]
PixelsOption = Annotated[
    str | None,
    typer.Option(metavar="COLUMN=HxW", help="Show a carried column of raw 8-bit pixels (x3: RGB)."),
]
RootOption = Annotated[
    list[str] | None,
    typer.Option("--root", metavar="TABLE=URI", help="Where a plan's table is now."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print facts and findings as JSON; a page only with -o.")
]


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command(rich_help_panel="Query")(report)


def report(
    subject: SubjectArgument,
    output: OutputOption = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="The same run on hard labels alone, to compare with."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="The table's tokenizer: show tokens as text."),
    ] = None,
    pixels: PixelsOption = None,
    root: RootOption = None,
    fail_on: Annotated[
        Literal["warning", "error"] | None,
        typer.Option(help="Exit 1 when there is a finding so grave."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is no report.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say how good a teacher's labels are, what is wrong with them, and why they did not help.

    Writes one HTML page that needs no network. Findings do not change the exit code: see --fail-on.

    Example: softlabels report out/runs/soft --baseline out/runs/hard -o report.html
    """
    from softlabels.report.examples import Pixels
    from softlabels.report.gather import Options, gather
    from softlabels.report.page import render
    from softlabels.report.verdict import run_findings, verdict

    page = DEFAULT if output is None and not as_json else output
    if page is not None:
        _check_free(page, force)
    options = Options(
        baseline=baseline,
        tokenizer=tokenizer,
        roots=_roots(root or []),
        pixels=None if pixels is None else Pixels.parse(pixels),
    )
    facts = gather(subject, options)
    findings = run_findings(facts)
    words = verdict(facts, findings)
    if page is not None:
        _write(page, render(facts, findings, words))
    if as_json:
        print_json(_plain(facts) | {"verdict": words, "findings": [vars(f) for f in findings]})
    else:
        _say(page, facts["notes"], findings, words)
    grave = {None: (), "error": ("error",), "warning": ("error", "warning")}[fail_on]
    if any(finding.severity in grave for finding in findings):
        raise typer.Exit(1)


def _say(
    page: Path | None,
    notes: "Sequence[str]",
    findings: "Sequence[Finding]",
    words: dict[str, Any] | None,
) -> None:
    """Findings, what was not looked at, a run's verdict, and last what was made."""
    lines = [f"{f.severity}: {f.id}: {f.sentence} {f.advice}" for f in findings]
    lines += [f"not judged: {note}" for note in notes]
    if words is not None:
        lines += [f"{words['title']}:", *(f"  {line}" for line in words["sentences"])]
    for line in lines:  # names of classes and files are a stranger's
        print(printable(line))
    counts = {s: sum(f.severity == s for f in findings) for s in ("error", "warning", "note")}
    print(f"{page}: " + ", ".join(counted(n, s) for s, n in counts.items()))


def _roots(given: list[str]) -> dict[str, str]:
    from softlabels.errors import BadInputError

    found = {}
    for text in given:
        name, equals, uri = text.partition("=")
        if not (name and equals and uri):
            raise BadInputError(f"--root {text!r}: expected TABLE=URI")
        found[name] = uri
    return found


def _check_free(page: Path, force: bool) -> None:
    """Refuses to write over anything but a report."""
    from softlabels.errors import BadInputError
    from softlabels.report.page import MARK

    if page.is_dir():
        raise BadInputError(f"{str(page)!r} is a folder: expected the name of an HTML file")
    if force or not page.exists():
        return
    with open(page, "rb") as file:
        if MARK.encode() in file.read(4096):
            return
    raise BadInputError(f"{str(page)!r} is there already: choose another, or add --force")


def _write(page: Path, text: str) -> None:
    from softlabels.storage import open_root

    open_root(page.parent).write(page.name, text.encode())


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    from softlabels.report.examples import without_pictures

    parts = [
        part | ({"examples": without_pictures(part["examples"])} if "examples" in part else {})
        for part in facts["parts"]
    ]
    return facts | {"parts": parts}

"""The app: which commands there are, and how errors end."""

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

import softlabels
from softlabels.cli.streams import patient
from softlabels.errors import SoftLabelsError, printable

SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}
"""Of every app that `run` runs: it is `main` that says how errors end."""

app = typer.Typer(name="softlabels", help=__doc__, no_args_is_help=True, **SETTINGS)


def main(command: Callable[[], object] = app) -> None:
    """Runs a command line and exits with its code; a user's mistake is one line on stderr."""
    patient("stdout")
    patient("stderr")
    try:
        command()
    except SoftLabelsError as error:
        if not error.told_elsewhere:
            _complain(printable(str(error)))
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        _complain(_missing(error))
        sys.exit(1)


def run(command: Callable[[], object] = app) -> None:
    """The console script: `main`, then an exit that no library's teardown can turn around.

    Thread pools of native libraries have aborted interpreters that were done ("terminate called
    without an active exception", 2 of 140 runs): a finished job would have looked failed.
    """
    code: object = 0
    try:
        main(command)
    except SystemExit as stop:
        code = stop.code
    try:
        sys.stdout.flush()
    except SoftLabelsError as error:
        _complain(str(error))
        code = code or error.exit_code
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _complain(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def _missing(error: ModuleNotFoundError) -> str:
    extras = {"deltalake": "teacher", "duckdb": "query", "polars": "query", "torch": "student"}
    extras |= {"safetensors": "student", "matplotlib": "report", "s3fs": "s3", "transformers": "hf"}
    extras |= {"jinja2": "report"}
    module = (error.name or "").split(".")[0]
    if module in extras:
        return f"this command needs {module!r}: pip install 'softlabels[{extras[module]}]'"
    return str(error)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"softlabels {softlabels.__version__}")
        raise typer.Exit


@app.callback(help="Distil a teacher offline: its soft labels as a versioned, queryable dataset.")
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    pass


# Registration only: none of these modules imports a heavy package at its top.
from softlabels.cli import (  # noqa: E402
    capture,
    change,
    ensemble,
    plans,
    query,
    recorded,
    reference,
    repair,
    report,
    sql,
    status,
    student,
    table,
    verify,
    versions,
)

capture.register(app)
status.register(app)
recorded.register(app)
table.register(app)
verify.register(app)
versions.register(app)
change.register(app)
sql.register(app)
query.register(app)
plans.register(app)
ensemble.register(app)
repair.register(app)
student.register(app)
report.register(app)
reference.register(app)

"""Injects faults by the hundred and writes README's table of what they did. `make faults` runs it.

    python -m pipelines.faults              all of tests/faults, hours
    python -m pipelines.faults flips s3     the files with one of these words in their names

Each test that passes gives its lines, which pipelines/faults.json keeps, so that one part can be
run alone. The lines of a test that fails are taken out. Exit 1 where one fails; the others are run
all the same.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from pipelines.readme import README, put, require_place
from softlabels.cli.main import SETTINGS, run
from softlabels.cli.output import markdown_table
from softlabels.errors import BadInputError
from tests.faults.record import FAULTS, REPORT

TESTS = Path("tests/faults")
KEPT = Path("pipelines/faults.json")
NAME = "faults"
TIMEOUT = 4 * 3600
"""Seconds for one test: the full counts take long."""

Line = dict[str, Any]

app = typer.Typer(**SETTINGS)


@app.command()
def main(
    only: Annotated[
        list[str] | None, typer.Argument(help="Words of file names in tests/faults; none: all.")
    ] = None,
) -> None:
    """Inject faults by the hundred and write README's table of what they did."""
    require_place(NAME)
    files = chosen(sorted(TESTS.glob("test_*.py")), only or [])
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else []
    with _report() as path:
        observer = Observer(path)
        settings = ["-v", "-m", "", "-o", f"timeout={TIMEOUT}", "-p", "no:cacheprovider"]
        try:
            code = pytest.main([*settings, *map(str, files)], plugins=[observer])
        finally:
            lines = merged(kept, observer)
            KEPT.write_text(json.dumps(lines, indent=1, ensure_ascii=False) + "\n")
            put(NAME, table(lines), README)
    failed = len(observer.failed)
    print(f"{README}: {len(lines)} kinds of faults, {failed} tests failed")
    if code:
        raise typer.Exit(1)


def chosen(files: Sequence[Path], words: Sequence[str]) -> list[Path]:
    """The files whose names hold one of `words`; all where there are none.

    Raises:
        BadInputError: a word is in no name.
    """
    for word in words:
        if not any(word in file.stem for file in files):
            known = ", ".join(file.stem.removeprefix("test_") for file in files)
            raise BadInputError(f"no file of {TESTS} has {word!r} in its name; there are: {known}")
    return [file for file in files if not words or any(word in file.stem for word in words)]


class Observer:
    """A pytest plugin that reads what each test recorded when it ends.

    Attributes:
        lines: of the tests that passed.
        failed: names of those that did not.
    """

    def __init__(self, report: Path) -> None:
        self.lines: list[Line] = []
        self.failed: set[str] = set()
        self._report = report
        self._read = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each phase of each test."""
        if report.failed:
            self.failed.add(report.nodeid)
            self.lines = [line for line in self.lines if line["test"] != report.nodeid]
        if report.when != "call":
            return
        text = self._report.read_text()
        for new in text[self._read :].splitlines():
            line = json.loads(new)
            # Where a test counts several things it may say how long each took.
            seconds = line["counts"].pop("seconds", round(report.duration))
            line = {"test": report.nodeid, **line, "seconds": seconds}
            print(f"\n  {line['what']}: {in_words(line['counts'])}", end="", flush=True)
            if report.passed:
                self.lines.append(line)
        self._read = len(text)


def merged(kept: Sequence[Line], observer: Observer) -> list[Line]:
    """The lines to keep: new ones, and old ones that are still true; by test and order in it.

    An old line goes with its file, when its test failed, and when `what` was recorded anew.
    """
    new = {line["what"] for line in observer.lines}
    done = {line["test"] for line in observer.lines} | observer.failed
    old = [
        line
        for line in kept
        if line["what"] not in new
        and line["test"] not in done
        and Path(line["test"].partition("::")[0]).exists()
    ]
    # Of one test in the order in which it recorded: sort is stable.
    return sorted([*old, *observer.lines], key=lambda line: str(line["test"]).partition("::")[0])


def in_words(counts: Mapping[str, Any]) -> str:
    """ "kills 200, rows lost 0, p99 s 0.0412"."""
    return ", ".join(f"{name} {_number(value)}" for name, value in counts.items())


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1_000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(lines: Sequence[Line]) -> str:
    """README's table: a line a kind of fault."""
    if not lines:
        return ""
    rows = [
        {"faults": line["what"], "counted": in_words(line["counts"]), "seconds": line["seconds"]}
        for line in lines
    ]
    note = f"`make faults`, {os.cpu_count()} cores; seconds are those of the test that counted.\n"
    return f"{markdown_table(rows)}\n{note}"


@contextlib.contextmanager
def _report() -> Any:
    """A new report file, named to the tests, which are told to inject all faults."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.jsonl"
        path.touch()
        os.environ |= {FAULTS: "full", REPORT: str(path)}
        yield path


if __name__ == "__main__":
    run(app)

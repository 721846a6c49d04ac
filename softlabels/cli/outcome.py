"""How a scheduled job ends, for machines: a last line of JSON on stdout and a file of metrics."""

import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from softlabels.teacher.capture import Report

SECONDS_BETWEEN = 5.0
"""Metrics are written again no sooner than this, but at the start and at the end."""

_HELP = {
    "rows": "Rows labelled by this call.",
    "already": "Rows of the source that the table held before.",
    "units": "Units of the run.",
    "committed": "Units committed by this call.",
    "left": "Units of the run that nobody had committed when this was written.",
    "missing": "Rows of the run that the newest version does not have.",
    "bytes": "Bytes of the files committed by this call.",
    "seconds": "Seconds since the call began.",
    "running": "1 while the call runs, then 0.",
    "exit_code": "What the call ended with: 0 done, 1 failed, 2 wrong use, 75 try again.",
    "last_success_timestamp_seconds": "When a call ended with 0, by this machine's clock.",
}
_COUNTS = ("rows", "already", "units", "committed", "left", "missing", "bytes")
_NAMES = ("table", "version", "run_id")
_SUCCESS = "last_success_timestamp_seconds"
_LAST_SUCCESS = re.compile(
    rf'^(?:softlabels_capture_{_SUCCESS}\{{.*\}}|  "{_SUCCESS}":) (\d+(?:\.\d+)?),?$', re.MULTILINE
)


class MetricsFile:
    """Numbers of one call in a file that is replaced as a whole: Prometheus text, or JSON.

    The name decides: FILE.json is JSON; anything else is for node_exporter's textfile collector,
    which reads FILE.prom in its folder.

    Raises:
        StorageError: it cannot be written; where that happens later, the work goes on.
    """

    def __init__(self, path: Path, spec: str) -> None:
        from softlabels.storage import open_root

        self._path, self._root = path, open_root(path.parent)
        # Two files in one folder must not hold the same series.
        self._labels = {"spec": spec, "file": path.stem}
        self._began = time.monotonic()
        self._success = self._last_success()
        self._written = -math.inf
        self._report: Report | None = None
        self._write(None)

    def update(self, report: "Report | None" = None) -> None:
        """Takes in what is known so far; writes it, unless that was done a moment ago."""
        from softlabels.errors import SoftLabelsError

        self._report = report or self._report
        if time.monotonic() - self._written >= SECONDS_BETWEEN:
            try:
                self._write(None)
            except SoftLabelsError as error:
                self._written = time.monotonic()
                print(f"metrics: {error}", file=sys.stderr)

    def end(self, report: "Report | None", code: int) -> None:
        """Writes how the call ended."""
        from softlabels.errors import SoftLabelsError

        self._report = report or self._report
        if code == 0:
            self._success = time.time()
        try:
            self._write(code)
        except SoftLabelsError as error:
            print(f"metrics: {error}", file=sys.stderr)

    def _write(self, code: int | None) -> None:
        values: dict[str, Any] = {}
        if self._report is not None:
            values |= {name: getattr(self._report, name) for name in _COUNTS}
        values["seconds"] = round(time.monotonic() - self._began, 3)
        values["running"] = int(code is None)
        values["exit_code"] = code
        values[_SUCCESS] = self._success
        text = self._json(values) if self._path.suffix == ".json" else self._prometheus(values)
        self._root.write(self._path.name, text.encode())
        self._written = time.monotonic()

    def _json(self, values: dict[str, Any]) -> str:
        run = {} if self._report is None else {k: getattr(self._report, k) for k in _NAMES}
        return json.dumps({**self._labels, **run, **values}, indent=2) + "\n"

    def _prometheus(self, values: dict[str, Any]) -> str:
        labels = ",".join(f'{name}="{_escaped(text)}"' for name, text in self._labels.items())
        lines = []
        for name, value in values.items():
            if value is not None:
                series = f"softlabels_capture_{name}"
                lines += [f"# HELP {series} {_HELP[name]}", f"# TYPE {series} gauge"]
                lines.append(f"{series}{{{labels}}} {value!r}")
        return "\n".join(lines) + "\n"

    def _last_success(self) -> float | None:
        """As the file says that is there: a failure must not make it forgotten."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        found = _LAST_SUCCESS.search(text)
        return float(found[1]) if found else None


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Outcome:
    """Says how a call ended, whichever way that is: `with Outcome(...) as outcome`.

    The last line on stdout is one JSON object: the report so far, "exit", and "error" in failure.
    Errors pass through to whoever ends the process.

    Attributes:
        report: what was done so far.
        lines: for people, to be printed before the last one.
        metrics: a file that is kept up to date with the report.
    """

    def __init__(self) -> None:
        self.report: Report | None = None
        self.lines: list[str] = []
        self.metrics: MetricsFile | None = None

    def __enter__(self) -> Self:
        return self

    def update(self, report: "Report | None" = None) -> None:
        """Takes in the report so far; without one, only gives the metrics a moment."""
        self.report = report or self.report
        if self.metrics is not None:
            self.metrics.update(report)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from softlabels.errors import SoftLabelsError

        code = _exit_code(error)
        if self.metrics is not None:
            self.metrics.end(self.report, code)
        said: dict[str, Any] = {} if self.report is None else dataclasses.asdict(self.report)
        said["exit"] = code
        if error is not None:
            said["error"] = str(error) or type(error).__name__
        try:
            print("\n".join([*self.lines, json.dumps(said)]), flush=True)
        except SoftLabelsError as failed:
            print(f"warning: {failed}", file=sys.stderr)  # how the work ended is what counts


def _exit_code(error: BaseException | None) -> int:
    """What the process will end with, as `cli.main` decides it."""
    from softlabels.errors import SoftLabelsError

    if error is None:
        return 0
    return error.exit_code if isinstance(error, SoftLabelsError) else 1

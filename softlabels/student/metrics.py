"""metrics.jsonl: what a run says of itself while it learns, no step of it twice."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softlabels.storage import open_root, storage_errors

NAME = "metrics.jsonl"

_SUMS = ("loss", "kl", "hard_ce")


class MetricsLog:
    """Sums up steps and writes one JSON line for every `every` of them.

    A line holds step, epoch, loss, kl and hard_ce (nats, means over the steps it sums up; kl null
    without targets, hard_ce without labels), lr, rows_per_s, for sequences tokens_per_s (padding
    left out), and data_wait_share (0 to 1, of those steps' time). An evaluation line holds step,
    epoch and evaluation.
    """

    def __init__(self, out: Path, every: int, writes: bool = True) -> None:
        self.last: dict[str, Any] = {}
        self._path = out / NAME
        self._every, self._writes = every, writes
        self._totals: dict[str, Any] = {}
        self._tokens: int | None = None
        self._clear()
        self._started = time.perf_counter()

    def resume(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Cuts the file after `step`, and takes the sums of an unfinished line from `state`."""
        if self._writes:
            self._cut(step)
        if state is not None:
            self._count = int(state["count"])
            self._totals = {name: state["totals"][name] for name in _SUMS}

    def state_dict(self) -> dict[str, Any]:
        """The sums of the line that is not full yet, plain JSON."""
        return {"count": self._count, "totals": dict(self._totals)}

    def go_on(self) -> None:
        """Leaves the time since the last step (an evaluation, a checkpoint) out of the rates."""
        self._started = time.perf_counter()

    def add(
        self,
        values: Mapping[str, Any],
        *,
        loss: float,
        kl: float | None,
        hard_ce: float | None,
        rows: int,
        waited: float,
        tokens: int | None = None,
    ) -> bool:
        """Counts one step; whether it completed a line, which is then in `last` and in the file.

        Args:
            values: what the line takes from its last step: step, epoch, lr.
            loss: of the step.
            kl: mean of the step, nats; None: there were no targets.
            hard_ce: mean of the step, nats.
            rows: of the step.
            waited: seconds in which the step waited for data.
            tokens: of the step; None: no sequences.
        """
        now = time.perf_counter()
        self._seconds += now - self._started
        self._started = now
        self._rows += rows
        self._waited += waited
        self._count += 1
        self._tokens = None if tokens is None else (self._tokens or 0) + tokens
        for name, value in zip(_SUMS, (loss, kl, hard_ce), strict=True):
            total = self._totals[name]
            self._totals[name] = None if value is None or total is None else total + value
        if values["step"] % self._every:
            return False
        self.write(self._line(values))
        self._clear()
        return True

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line, unless another process writes."""
        if "loss" in line:
            self.last = dict(line)
        if not self._writes:
            return
        with storage_errors("write", str(self._path)), open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _line(self, values: Mapping[str, Any]) -> dict[str, Any]:
        means = {n: None if t is None else t / self._count for n, t in self._totals.items()}
        seconds = max(self._seconds, 1e-9)
        speed = {"rows_per_s": round(self._rows / seconds, 1)}
        if self._tokens is not None:
            speed["tokens_per_s"] = round(self._tokens / seconds, 1)
        return {
            "step": values["step"],
            "epoch": values["epoch"],
            **means,
            "lr": values["lr"],
            **speed,
            "data_wait_share": round(min(1.0, self._waited / seconds), 4),
        }

    def _clear(self) -> None:
        self._count = self._rows = 0
        self._seconds = self._waited = 0.0
        self._tokens = None
        self._totals = dict.fromkeys(_SUMS, 0.0)

    def _cut(self, step: int) -> None:
        lines = [line for line in read_metrics(self._path.parent) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        open_root(self._path.parent).write(NAME, text.encode())
        self.last = next((line for line in reversed(lines) if "loss" in line), {})


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; from a damaged one on, such as one cut short, none."""
    path = out / NAME
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
            if type(value["step"]) is not int:
                break
        except (ValueError, LookupError, TypeError, RecursionError):
            break
        found.append(value)
    return found

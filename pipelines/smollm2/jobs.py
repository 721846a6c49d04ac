"""Captures and training runs side by side: two processes of one thread use two cores best."""

import multiprocessing
import os
import shlex
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

TELL_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """One command of the command line: softlabels `verb` `spec` --set change …"""

    verb: Literal["capture", "train"]
    spec: str
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        """What it makes."""
        wanted = "table=" if self.verb == "capture" else "out="
        places = [change for change in self.changes if change.startswith(wanted)]
        return Path(places[-1].removeprefix(wanted)).name

    @property
    def command(self) -> str:
        """As a user would type it."""
        changes = [part for change in self.changes for part in ("--set", change)]
        return shlex.join(["softlabels", self.verb, self.spec, *changes])


def in_parallel(jobs: Sequence[Job], workers: int) -> list[dict[str, Any]]:
    """Runs jobs, `workers` at a time in processes of their own, 0: here; what each gives, in order.

    Each goes on where it was stopped, and does nothing when it is done already.
    """
    for job in jobs:
        print(f"\n$ {job.command}", flush=True)
    if not workers:
        return [work(job) for job in jobs]
    # Read by the processes' thread pools when they start.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(work, jobs))


def work(job: Job) -> dict[str, Any]:
    """Does one job and says how far it is now and then."""
    said = _Said(job.name)
    if job.verb == "capture":
        from softlabels.teacher.capture import Progress, capture
        from softlabels.teacher.spec import read_capture

        spec = read_capture(job.spec, job.changes)
        report = capture(spec, Progress(planned=said.planned, done=lambda rows, _: said.add(rows)))
        said.end(f"{report.rows} sequences labelled, {report.already} before")
        return asdict(report)
    from softlabels.student.spec import RunSpec
    from softlabels.student.trainer import train

    with warnings.catch_warnings():
        # That it is biased is what the demo shows.
        warnings.filterwarnings("ignore", message="tail 'renormalize'")
        spec_of_run = RunSpec.read(job.spec, job.changes)
        trained = train(spec_of_run, report=lambda at: said.at(at.step, at.total))
    said.end("was trained before" if trained.already else "trained")
    return {**trained.record, "already": trained.already}


class _Said:
    """Lines about one job, at most one every TELL_SECONDS."""

    def __init__(self, name: str) -> None:
        self._name, self._done, self._total = name, 0, 0
        self._began = self._told = time.monotonic()

    def planned(self, total: int) -> None:
        self._total = total

    def add(self, rows: int) -> None:
        self.at(self._done + rows, self._total)

    def at(self, done: int, total: int) -> None:
        self._done, now = done, time.monotonic()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            left = (now - self._began) * (total - done) / max(1, done)
            print(f"{self._name}: {done} of {total}, about {left:,.0f} s left", flush=True)

    def end(self, what: str) -> None:
        print(f"{self._name}: {what}, {time.monotonic() - self._began:,.0f} s", flush=True)

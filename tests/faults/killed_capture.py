"""Starts captures and kills them with SIGKILL at random moments, then lets one end.

    python -m tests.faults.killed_capture JOB.yaml KILLS SEED

Everything heavy is imported once; each capture is a process forked before any of it is used.
Prints, as JSON, how each process ended and how many rows the table held then.
"""

import json
import os
import random
import select
import signal
import sys
import time

from softlabels.errors import BadInputError
from softlabels.specs import load_spec
from softlabels.store.table import Table
from softlabels.teacher.capture import Progress, capture
from softlabels.teacher.spec import CaptureSpec


def run_child(work: "Child") -> int:
    """The exit status of `work` in a forked process, as os.waitpid gives it."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work.run()
            code = 0
        finally:
            os._exit(code)
    work.disturb(pid)
    return os.waitpid(pid, 0)[1]


class Child:
    """One capture, killed `delay` seconds after its start or after labelling began."""

    def __init__(self, spec: CaptureSpec, delay: float | None, labelling: bool) -> None:
        self._spec = spec
        self._delay = delay
        self._labelling = labelling
        self._began, self._tell = os.pipe()

    def run(self) -> None:
        """Captures; says when labelling begins."""
        capture(self._spec, Progress(planned=lambda rows: os.close(self._tell)))

    def disturb(self, pid: int) -> None:
        """Kills the child at its moment, if it has one."""
        os.close(self._tell)
        if self._delay is not None:
            if self._labelling:
                select.select([self._began], [], [], 60)
            time.sleep(self._delay)
            os.kill(pid, signal.SIGKILL)
        os.close(self._began)


def count_rows(spec: CaptureSpec) -> int:
    """Rows of the table, counted in a process of its own: this one must stay fit to fork."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            rows = Table.open(spec.table).num_rows
        except BadInputError:
            rows = 0
        os.write(writer, str(rows).encode())
        os._exit(0)
    os.close(writer)
    rows = int(os.read(reader, 20))
    os.close(reader)
    os.waitpid(pid, 0)
    return rows


def main() -> None:
    """Runs it all."""
    path, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    spec = load_spec(path, CaptureSpec)
    rng = random.Random(seed)
    ends = []
    for number in range(kills):
        labelling = number % 4 != 0
        delay = rng.uniform(0, 0.3 if labelling else 0.1)
        status = run_child(Child(spec, delay, labelling))
        ends.append({"signal": os.WTERMSIG(status), "rows": count_rows(spec)})
    status = run_child(Child(spec, None, labelling=False))
    ends.append({"signal": os.WTERMSIG(status), "rows": count_rows(spec)})
    print(json.dumps({"ends": ends, "code": os.waitstatus_to_exitcode(status)}))


if __name__ == "__main__":
    main()

"""Runs commands under clocks that are wrong, or that jump.

    python -m tests.faults.shifted_clock

Reads a command a line, JSON: shifts, arguments, and out, a file; prints its process id. What the
command says goes to out and out.err, its exit code to out.code. Everything heavy is imported once;
each command is a process forked before any of it is used.

shifts: [[0, 18000]]: five hours ahead; [[0, 0], ["a/b", -86400]]: right at first, a day behind from
when the file a/b is there (a number: seconds after the start). Only the time of day that Python
asks for is shifted; waiting goes by another clock.
"""

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from softlabels.cli.main import main as command

_time, _time_ns = time.time, time.time_ns


def shift_clocks(shifts: Sequence[tuple[float | str, float]]) -> None:
    """Shifts all clocks of this process from now on."""
    began = time.monotonic()

    def reached(since: float | str) -> bool:
        if isinstance(since, str):
            return os.path.exists(since)
        return since <= time.monotonic() - began

    def shift() -> float:
        return [shift for since, shift in shifts if reached(since)][-1]

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(_time() + shift(), tz)

    for module in [module for name, module in sys.modules.items() if name.startswith("softlabels")]:
        if vars(module).get("datetime") is datetime:
            vars(module)["datetime"] = Shifted
    vars(time)["time"] = lambda: _time() + shift()
    vars(time)["time_ns"] = lambda: _time_ns() + int(shift() * 1e9)


def run(asked: dict[str, Any]) -> None:
    """Runs one command in this process, which ends with it."""
    for stream, name in ((1, asked["out"]), (2, f"{asked['out']}.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    shift_clocks(asked["shifts"])
    sys.argv = ["softlabels", *asked["arguments"]]
    code: object = 0
    try:
        command()
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        done = Path(f"{asked['out']}.tmp")
        done.write_text(str(code or 0))
        done.rename(f"{asked['out']}.code")
        os._exit(0)


def main() -> None:
    """Runs what is asked for until standard input ends."""
    # Modules that take names out of the standard library's must be there to be changed.
    for name in ("softlabels.teacher.capture", "softlabels.store.status"):
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            run(json.loads(line))
        print(pid, flush=True)


if __name__ == "__main__":
    main()

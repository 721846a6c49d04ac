"""Nightly jobs over a range of days that are killed with SIGKILL, again and again.

    python -m tests.faults.killed_nights FIRST LAST NIGHTLY.yaml SEED [NIGHTLY.yaml SEED …]

Where SEED is "-", one night dies at each of MOMENTS in turn; otherwise KILLS at random times. Then
one is let end. Everything heavy is imported once; each night is a process forked before any of it
is used. Prints, as JSON, of each spec the moments at which nights died, and how the last one ended.
"""

import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

from pipelines.nightly import night
from pipelines.nightly.spec import NightSpec
from softlabels.plan import Plan
from softlabels.store import tags
from softlabels.store.table import Table

MOMENTS = (
    *("store_shard", "commit", "after commit", "verify", "make_tag", "after make_tag"),
    *("mix", "write", "after write", "pin", "after pin"),
)
"""Where a night dies: before that step, or after it."""

KILLS = 10
SECONDS = 1.5
"""Of a night at most, when it is killed at a random time."""

_PLACES: dict[str, tuple[Any, str]] = {
    "store_shard": (Table, "store_shard"),
    "commit": (Table, "commit"),
    "verify": (night, "verify"),
    "make_tag": (tags, "make_tag"),
    "mix": (night, "mix"),
    "write": (Plan, "write"),
    "pin": (night, "pin"),
}

Try = tuple[str, Callable[[], None], float | None]


def die() -> None:
    """Ends this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Makes the step of a moment end this process."""
    owner, name = _PLACES[moment.removeprefix("after ")]
    step = getattr(owner, name)

    def killed(*arguments: Any, **settings: Any) -> Any:
        if not moment.startswith("after"):
            die()
        step(*arguments, **settings)
        die()

    setattr(owner, name, killed)


def in_child(work: Callable[[], None], delay: float | None = None) -> int:
    """How a forked process that does `work` ends; it is killed after `delay` seconds if one is."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ends(spec: NightSpec, days: list[date], seed: str) -> dict[str, Any]:
    """How the nights of one spec ended."""

    def nights(moment: str | None = None) -> None:
        if moment is not None:
            die_at(moment)
        for day in days:
            night.run_night(night.night_of(spec, day))

    if seed == "-":
        tries: list[Try] = [(moment, functools.partial(nights, moment), None) for moment in MOMENTS]
    else:
        rng = random.Random(int(seed))
        tries = [("any time", nights, rng.uniform(0, SECONDS)) for _ in range(KILLS)]
    deaths = [when for when, work, delay in tries if in_child(work, delay) == -signal.SIGKILL]
    return {"deaths": deaths, "code": in_child(nights)}


def main() -> None:
    """Runs it all."""
    first, last = map(date.fromisoformat, sys.argv[1:3])
    days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    pairs = zip(sys.argv[3::2], sys.argv[4::2], strict=True)
    print(json.dumps([ends(NightSpec.read(path), days, seed) for path, seed in pairs]))


if __name__ == "__main__":
    main()

"""Captures by four workers at once, killed with SIGKILL at random moments, then let end.

    python -m tests.faults.killed_capture JOB.yaml KILLS SEED

Everything heavy is imported once; each worker is a process forked before any of it is used. A table
that is done is followed by the next: table-0, table-1, … Each worker appends the units that it was
told are in, and the version, to table-N.acks in the job's folder. Prints what it did, as JSON.
"""

import json
import os
import random
import select
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from softlabels.signals import stop_on_signal
from softlabels.specs import load_spec
from softlabels.teacher.capture import Progress, Sharing, capture
from softlabels.teacher.spec import CaptureSpec

WORKERS = 4
LEASE = 1.0
LONGEST = 120.0


@dataclass
class Told:
    """What this program did.

    Attributes:
        tables: URIs.
        kills: processes that SIGKILL ended, by table.
        modes: how often a worker shared the work which way.
        ended: workers that ended by themselves before their kill.
        takeovers: claims of dead workers that were there when the last workers began.
    """

    tables: list[str] = field(default_factory=list)
    kills: list[int] = field(default_factory=list)
    modes: dict[str, int] = field(default_factory=dict)
    ended: int = 0


class Worker:
    """One forked capture."""

    def __init__(self, spec: CaptureSpec, sharing: Sharing, acks: Path) -> None:
        self.began, tell = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(tell)
            return
        code = 1
        try:
            os.close(self.began)
            code = 0 if work(spec, sharing, acks, tell) else 3
        finally:
            os._exit(code)

    def kill_after(self, delay: float, labelling: bool) -> float:
        """The moment of its kill: so long from now, or from when it labels."""
        if labelling:
            select.select([self.began], [], [], LONGEST)
        return time.monotonic() + delay

    def end(self) -> int:
        """Waits for its end: 0 all is labelled, 3 its share is, a negative signal."""
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.began)
        return os.waitstatus_to_exitcode(status)


def work(spec: CaptureSpec, sharing: Sharing, acks: Path, tell: int) -> bool:
    """Captures; whether nothing is left for others."""
    told = os.open(acks, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def committed(unit: str, version: int) -> None:
        os.write(told, f"{unit} {version}\n".encode())

    progress = Progress(planned=lambda rows: os.close(tell), committed=committed)
    with stop_on_signal():
        return not capture(spec, progress, sharing).left


def draw_sharing(rng: random.Random, number: int) -> Sharing:
    """Half of them claim; the others take a shard, and a few all units in order."""
    kind = rng.random()
    if kind < 0.5:
        return Sharing(claim=True, lease=LEASE)
    return Sharing(shard=(number, WORKERS)) if kind < 0.9 else Sharing()


def disturbed(spec: CaptureSpec, acks: Path, rng: random.Random, told: Told) -> bool:
    """Four workers, each killed at a moment of its own; whether one of them found all done."""
    sharings = [draw_sharing(rng, number) for number in range(WORKERS)]
    for one in sharings:
        mode = "claim" if one.claim else "shard" if one.shard else "alone"
        told.modes[mode] = told.modes.get(mode, 0) + 1
    workers = [Worker(spec, sharing, acks) for sharing in sharings]
    moments = []
    for worker in workers:
        labelling = rng.random() < 0.75
        delay = rng.uniform(0, 0.5 if labelling else 0.3)
        moments.append((worker.kill_after(delay, labelling), worker))
    for moment, worker in sorted(moments, key=lambda one: one[0]):
        time.sleep(max(0.0, moment - time.monotonic()))
        os.kill(worker.pid, signal.SIGKILL)
    codes = [worker.end() for worker in workers]
    assert set(codes) <= {0, 3, -signal.SIGKILL}, codes
    told.kills[-1] += codes.count(-signal.SIGKILL)
    told.ended += len(codes) - codes.count(-signal.SIGKILL)
    return 0 in codes


def finished(spec: CaptureSpec, acks: Path) -> None:
    """Four workers that nobody disturbs: two that claim, two that take halves."""
    sharings = [Sharing(claim=True, lease=LEASE)] * 2 + [Sharing(shard=(i, 2)) for i in (0, 1)]
    codes = [worker.end() for worker in [Worker(spec, one, acks) for one in sharings]]
    # Whoever claims stays until all is labelled.
    assert codes[:2] == [0, 0], codes
    assert set(codes) <= {0, 3}, codes


def main() -> None:
    """Runs it all."""
    path, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    job = load_spec(path, CaptureSpec)
    if "://" in job.table:
        import s3fs  # noqa: F401  once for all workers
    rng = random.Random(seed)
    told = Told()
    while sum(told.kills) < kills:
        name = f"table-{len(told.tables)}"
        spec = job.model_copy(update={"table": f"{job.table}/{name}"})
        acks = path.parent / f"{name}.acks"
        told.tables.append(spec.table)
        told.kills.append(0)
        while sum(told.kills) < kills and not disturbed(spec, acks, rng, told):
            pass
        finished(spec, acks)
    print(json.dumps(vars(told)))


if __name__ == "__main__":
    main()

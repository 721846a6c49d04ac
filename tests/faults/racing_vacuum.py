"""Writers, taggers, rollbacks and vacuums at one table, killed and started again at random moments.

python -m tests.faults.racing_vacuum TABLE KILLS SEED ACKNOWLEDGED

Each kind of process works in a loop till it is killed. What it was told is done it appends to the
file ACKNOWLEDGED, a JSON line each: {"unit": key}, {"tag": name} and, before it is deleted,
{"untag": name}. Prints how many were killed of each kind as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable

from softlabels.errors import SoftLabelsError
from softlabels.lineage import ChangeLineage
from softlabels.store import shards, tags
from softlabels.store.rollback import rollback
from softlabels.store.runs import RunRecord, record_run
from softlabels.store.table import Table
from softlabels.store.vacuum import Keep, vacuum
from tests.tables import make_lineage

UNITS = 8
"""Acknowledged units that it waits for after the last kill."""

NOW = "2026-01-01T00:00:00+00:00"


class Worker:
    """One process at the table; `uri`, its random numbers and where it says what is done."""

    def __init__(self, uri: str, rng: random.Random, acknowledged: str) -> None:
        self.uri, self.rng, self._acknowledged = uri, rng, acknowledged

    def say(self, what: str, name: str) -> None:
        """Notes that something is done."""
        handle = os.open(self._acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, (json.dumps({what: name}) + "\n").encode())
        os.close(handle)

    def any_version(self) -> int:
        """One of the last few."""
        newest = Table.open(self.uri).version
        return self.rng.randint(max(1, newest - 6), newest)

    def write(self) -> None:
        """Commits a unit of a run of its own, and sometimes takes a file out."""
        table = Table.open(self.uri)
        run = f"{self.rng.getrandbits(256):064x}"
        record_run(
            table.root,
            RunRecord(run_id=run, units=1, rows=5, spec={}, source={}, started_at=NOW),
        )
        writer = shards.ShardWriter(table.schema, "precise")
        first = Table.open(f"{self.uri}@first")
        writer.write(next(first.batches()).slice(0, 5))
        unit = f"{run[:16]}-000000"
        stored = table.store_shard(f"{run}/{unit}", unit, writer.close())
        table = table.commit([stored], make_lineage(run, [stored.key], 5))
        self.say("unit", stored.key)
        if len(table.files) > 4:
            gone = self.rng.choice(table.files)
            lineage = ChangeLineage(
                operation="delete",
                change_id=f"{self.rng.getrandbits(256):064x}",
                from_version=table.version,
                rows_before=table.num_rows,
                rows_after=table.num_rows - gone.num_rows,
                packages={},
                started_at=NOW,
                seconds=0.0,
            )
            table.change([], [gone], lineage)

    def tag(self) -> None:
        """Tags a version, and sometimes deletes the tag of another."""
        table = Table.open(f"{self.uri}@{self.any_version()}")
        name = f"t{self.rng.getrandbits(40):x}z"
        tags.make_tag(table.root, name, table.version, table.snapshot_digest)
        self.say("tag", name)
        others = [n for n in tags.tag_names(table.root) if n.endswith("z")]
        if len(others) > 3:
            gone = self.rng.choice(others)
            self.say("untag", gone)
            tags.delete_tags(table.root, [gone])

    def back(self) -> None:
        """Rolls back to a version."""
        rollback(Table.open(f"{self.uri}@{self.any_version()}"))

    def vacuum(self) -> None:
        """Removes all that is not needed."""
        vacuum(Table.open(self.uri), Keep(retention=0))

    def work(self, act: Callable[[], None]) -> None:
        """Goes on for ever; what is refused is tried again."""
        while True:
            try:
                act()
            except SoftLabelsError as error:
                if "damaged" in str(error) or "is not there" in str(error):
                    raise
            time.sleep(self.rng.uniform(0, 0.02))


KINDS = ("write", "tag", "back", "vacuum")


def start(kind: str, uri: str, seed: int, acknowledged: str) -> int:
    """A process of that kind; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        worker = Worker(uri, random.Random(seed), acknowledged)
        worker.work(getattr(worker, kind))
    except BaseException as error:
        print(f"{kind}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def written(acknowledged: str) -> int:
    """Units that are acknowledged so far."""
    try:
        with open(acknowledged) as lines:
            return sum("unit" in line for line in lines)
    except FileNotFoundError:
        return 0


def main() -> None:
    """Starts one of each kind, and kills and replaces them."""
    uri, kills, seed, acknowledged = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    rng = random.Random(seed)
    counts = dict.fromkeys(KINDS, 0)
    running = {kind: start(kind, uri, rng.getrandbits(32), acknowledged) for kind in KINDS}
    failed = False
    for _ in range(kills):
        time.sleep(rng.uniform(0.1, 0.7))
        kind = rng.choice((*KINDS, "vacuum", "vacuum"))
        os.kill(running[kind], signal.SIGKILL)
        _, status = os.waitpid(running[kind], 0)
        failed |= not os.WIFSIGNALED(status)
        counts[kind] += 1
        running[kind] = start(kind, uri, rng.getrandbits(32), acknowledged)
    # On a slow machine little may be done by now.
    until = time.monotonic() + 60
    while written(acknowledged) < UNITS and time.monotonic() < until:
        time.sleep(0.2)
    for pid in running.values():
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        failed |= not os.WIFSIGNALED(status)
    print(json.dumps(counts))
    sys.exit(failed)


if __name__ == "__main__":
    main()

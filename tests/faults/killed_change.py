"""Deletes, compactions and publishes that are killed with SIGKILL, then let end.

Two of three kills come at a random moment, the third right before or after what decides: the
commit, of a publish the last log entry.

    python -m tests.faults.killed_change FOLDER KILLS SEED

Everything heavy is imported once; each change is a process forked before any of it is used, and so
is each look at what a kill has left. Works on copies of FOLDER/seed; prints a record a kill, JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softlabels.query.takedown import Request, take_down
from softlabels.storage import Root
from softlabels.store import commits, deleted
from softlabels.store.compact import compact
from softlabels.store.inspect import verify
from softlabels.store.publish import publish
from softlabels.store.samerows import RowsDigest
from softlabels.store.table import Table

WHERE = "label = 2"
TARGET = 150_000
OPERATIONS = ("delete", "compact", "publish")
LONGEST = 60.0
NONE = "no table"


def change(operation: str, folder: Path) -> None:
    """Does one of the three, on FOLDER/t."""
    table = Table.open(str(folder / "t"))
    if operation == "delete":
        take_down(table, Request(where=WHERE))
    elif operation == "compact":
        compact(table, TARGET)
    else:
        publish(table, str(folder / "copy"), "v1")


def deadly(operation: str, folder: Path, after: bool) -> None:
    """The same, killed right before or after what decides."""

    def dying(honest: Callable[..., Any], here: Callable[..., bool]) -> Callable[..., Any]:
        def act(*arguments: Any, **named: Any) -> Any:
            deciding = here(*arguments)
            if deciding and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = honest(*arguments, **named)
            if deciding:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return act

    patch: Callable[..., None] = setattr
    if operation == "publish":
        place = str(folder / "copy")
        patch(Root, "create", dying(Root.create, lambda root, *_: root.uri == place))
    else:
        patch(commits, "change", dying(commits.change, lambda *_: True))
    change(operation, folder)


def look(folder: Path, operation: str) -> dict[str, Any]:
    """What is there now: the table that the operation makes, every bit of its rows."""
    place = folder / ("copy" if operation == "publish" else "t")
    found: dict[str, Any] = {"wrong": []}
    if operation == "publish" and not (place / "_delta_log" / f"{0:020d}.json").exists():
        return found | {"version": None, "rows": NONE, "files": 0}
    table = Table.open(str(place))
    digest = RowsDigest(table.schema)
    for batch in table.batches():
        digest.add(batch)
    left = len(deleted.deleted_keys(table.root))
    return {
        "wrong": verify(table)["problems"],
        "version": table.version,
        "rows": digest.result(),
        "files": len(table.files),
        "changes": sum(commit["change"] is not None for commit in table.history()),
        "deleted": left,
    }


def in_child(work: Callable[[], Any], delay: float | None = None) -> tuple[int, Any, float]:
    """How a forked process ended, what it returned, and how long it took; killed after `delay`."""
    reader, writer = os.pipe()
    began = time.monotonic()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(reader)
            os.write(writer, json.dumps(work()).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    said = b"".join(iter(lambda: os.read(reader, 65536), b""))
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, json.loads(said) if said and not status else None, time.monotonic() - began


def one(folder: Path, number: int, rng: random.Random, usual: dict[str, float]) -> dict[str, Any]:
    """Kills an operation up to three times at a fresh copy, then lets it end."""
    operation = OPERATIONS[number % len(OPERATIONS)]
    shutil.copytree(folder / "seed", folder / "work")
    work = folder / "work"
    kills = []
    try:
        for kill in range(3):
            if kill == 2:
                after = number // len(OPERATIONS) % 2 == 0
                status, _, _ = in_child(lambda: deadly(operation, work, after))  # noqa: B023
            else:
                delay = rng.uniform(0.0, 1.1 * usual[operation])
                status, _, _ = in_child(lambda: change(operation, work), delay)
            kills.append({"status": status, **_seen(work, operation)})
            if status != -signal.SIGKILL:
                break
        status, _, seconds = in_child(lambda: change(operation, work))
        return {
            "operation": operation,
            "kills": kills,
            "status": status,
            "seconds": seconds,
            "end": _seen(work, operation),
        }
    finally:
        shutil.rmtree(work)


def _seen(folder: Path, operation: str) -> dict[str, Any]:
    status, found, _ = in_child(lambda: look(folder, operation))
    return found if found is not None else {"wrong": [f"cannot be read: {status}"]}


def main() -> None:
    """Runs it all."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    usual: dict[str, float] = {}
    expected: dict[str, Any] = {}
    for operation in OPERATIONS:
        shutil.copytree(folder / "seed", folder / "work")
        status, _, usual[operation] = in_child(lambda: change(operation, folder / "work"))  # noqa: B023
        assert status == 0, operation
        expected[operation] = _seen(folder / "work", operation)
        shutil.rmtree(folder / "work")
    before = in_child(lambda: look(folder / "seed", "compact"))[1]
    done: list[dict[str, Any]] = []
    while sum(len(run["kills"]) for run in done) < kills:
        done.append(one(folder, len(done), rng, usual))
    print(json.dumps({"before": before, "expected": expected, "runs": done}))


if __name__ == "__main__":
    main()

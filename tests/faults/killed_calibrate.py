"""A calibration that kills itself with SIGKILL at one moment.

python -m tests.faults.killed_calibrate TABLE TEMPERATURE MOMENT

MOMENT: "0", "1", …: after so many files are stored; "commit": when all are, before the commit;
"after": after the commit, before anything is said of it.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from softlabels.query.calibrate import calibrate
from softlabels.store import commits
from softlabels.store.table import Table


def die(*_: object) -> None:
    """Ends this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Calibrates until the moment."""
    table, temperature, moment = sys.argv[1:]
    store, replace = Table.store_shard, commits.replace
    left = [int(moment) if moment.isdecimal() else -1]

    def stored(self: Table, *arguments: Any) -> object:
        if left[0] == 0:
            die()
        left[0] -= 1
        return store(self, *arguments)

    def replaced(*arguments: Any) -> None:
        if moment == "commit":
            die()
        replace(*arguments)
        if moment == "after":
            die()

    patch: Callable[..., None] = setattr
    patch(Table, "store_shard", stored)
    patch(commits, "replace", replaced)
    calibrate(table, temperature=float(temperature))


if __name__ == "__main__":
    main()

"""How many faults a test injects, and where it writes down what they did.

`make faults` sets both variables; without them the tests do a short form and write nothing.
"""

import json
import os
from collections.abc import Mapping

FAULTS = "SOFTLABELS_FAULTS"
REPORT = "SOFTLABELS_FAULTS_REPORT"


def scaled(short: int, full: int) -> int:
    """The number of faults to inject: `full` under `make faults`, else `short`."""
    asked = os.environ.get(FAULTS, "short")
    if asked not in ("short", "full"):
        raise ValueError(f"{FAULTS} is short or full, not {asked!r}")
    return full if asked == "full" else short


def record(what: str, counts: Mapping[str, int | float | str]) -> None:
    """Append one line of the fault report: `what` was done, and what was counted.

    Call it when all is asserted. Writes nothing where no report is asked for. One write of one
    line, so that several processes may record at once.
    """
    report = os.environ.get(REPORT)
    if not report:
        return
    line = json.dumps({"what": what, "counts": dict(counts)}, ensure_ascii=False) + "\n"
    handle = os.open(report, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)

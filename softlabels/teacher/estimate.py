"""What a capture would cost, from one timed batch; nothing is written."""

import time
from typing import Any

from softlabels.teacher.labeller import Labeller
from softlabels.teacher.run import prepare, scan
from softlabels.teacher.spec import CaptureSpec


def estimate(spec: CaptureSpec) -> dict[str, Any]:
    """Rows, units, bytes and seconds that `capture(spec)` would take.

    The teacher labels one batch twice and the second pass is timed; bytes come from a real shard
    of that batch, so they are a little high: longer columns compress better.

    Returns:
        table, run_id, source_rows, repeated, units, units_left, rows_left (at most), batch_size,
        rows_per_s, seconds, bytes_per_row, bytes.
    """
    run, teacher = prepare(spec)
    labeller = Labeller(run, teacher)
    table = labeller.table()
    found = scan(run)
    left = [unit for unit in run.units if table is None or not table.committed(unit.key)]
    rows = sum(unit.stop - unit.start for unit in left)
    measured, size = labeller.rehearse()  # warms caches; its size counts, not its time
    began = time.monotonic()
    labeller.rehearse()
    rate = measured / max(time.monotonic() - began, 1e-9)
    bytes_per_row = size / max(measured, 1)
    return {
        "table": spec.table,
        "run_id": run.id,
        "source_rows": run.source.num_rows,
        "repeated": len(found.repeated),
        "units": len(run.units),
        "units_left": len(left),
        "rows_left": rows,
        "batch_size": spec.batch_size,
        "rows_per_s": round(rate, 1),
        "seconds": round(rows / rate, 1) if rate else None,
        "bytes_per_row": round(bytes_per_row, 1),
        "bytes": int(bytes_per_row * rows),
    }

"""What a capture would cost, from one timed batch; nothing is written."""

import time
from typing import Any

import numpy as np

from softlabels.errors import BadInputError
from softlabels.store.table import Table
from softlabels.teacher.labeller import Labeller
from softlabels.teacher.run import Unit, prepare, scan
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
    found = scan(run)
    left = _units_left(spec, run.units)
    rows = sum(unit.stop - unit.start for unit in left)
    first = Unit("dry-run", "", 0, min(spec.batch_size, run.source.num_rows))
    writer = labeller.writer(first)
    everything = np.ones(first.stop, bool)
    for batch in labeller.label(first, everything):  # warms caches; its size counts, not its time
        writer.write(batch)
    began = time.monotonic()
    measured = sum(batch.num_rows for batch in labeller.label(first, everything))
    rate = measured / max(time.monotonic() - began, 1e-9)
    bytes_per_row = len(writer.close().data) / max(measured, 1)
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


def _units_left(spec: CaptureSpec, units: tuple[Unit, ...]) -> list[Unit]:
    try:
        table = Table.open(spec.table)
    except BadInputError:
        return list(units)
    return [unit for unit in units if not table.committed(unit.key)]

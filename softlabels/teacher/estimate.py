"""What a capture would cost, from one timed batch; nothing is written."""

from typing import Any

from softlabels.teacher.labeller import Labeller
from softlabels.teacher.models import torch_threads
from softlabels.teacher.run import prepare, scan
from softlabels.teacher.spec import CaptureSpec, SequenceCaptureSpec


def estimate(spec: CaptureSpec | SequenceCaptureSpec) -> dict[str, Any]:
    """Rows, units, bytes and seconds that `capture(spec)` would take.

    The teacher labels one batch twice and the second pass is timed; bytes come from a real shard
    of that batch, so they are a little high: longer columns compress better.

    Returns:
        table, run_id, source_rows, repeated, units, units_left, rows_left (at most), batch_size,
        rows_per_s, seconds, bytes_per_row, bytes; of a language model batch_tokens instead, and
        tokens_per_s, positions_left (by the batch's share), bytes_per_position, skipped.
    """
    with torch_threads(spec.threads):
        return _estimate(spec)


def _estimate(spec: CaptureSpec | SequenceCaptureSpec) -> dict[str, Any]:
    run, annotator = prepare(spec)
    labeller = Labeller(run, annotator)
    table = labeller.table()
    found = scan(run)
    left = [unit for unit in run.units if table is None or not table.committed(unit.key)]
    rows = sum(unit.stop - unit.start for unit in left)
    labeller.rehearse(annotator.rehearsal)  # warms caches
    measured = labeller.rehearse(annotator.one_pass)
    rate = measured.rows / max(measured.seconds, 1e-9)
    bytes_per_row = measured.num_bytes / max(measured.rows, 1)
    at_once = (
        {"batch_size": spec.batch_size}
        if isinstance(spec, CaptureSpec)
        else {"batch_tokens": spec.batch_tokens}
    )
    costs = {
        "table": spec.table,
        "run_id": run.id,
        "source_rows": run.source.num_rows,
        "repeated": len(found.repeated),
        "units": len(run.units),
        "units_left": len(left),
        "rows_left": rows,
        **at_once,
        "rows_per_s": round(rate, 1),
        "seconds": round(rows / rate, 1) if rate else None,
        "bytes_per_row": round(bytes_per_row, 1),
        "bytes": int(bytes_per_row * rows),
    }
    if isinstance(spec, CaptureSpec):
        return costs
    return costs | {
        "tokens_per_s": round(measured.weight / max(measured.seconds, 1e-9), 1),
        "positions_left": int(measured.positions / max(measured.rows, 1) * rows),
        "bytes_per_position": round(measured.num_bytes / max(measured.positions, 1), 1),
        "skipped": dict(run.source.skipped),
    }

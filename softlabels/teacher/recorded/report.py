"""`softlabels import`: recorded rows into a table, and what was found about them."""

from dataclasses import asdict
from typing import Any

import pyarrow.compute as pc

from softlabels.store.table import Table
from softlabels.teacher.capture import Progress, capture
from softlabels.teacher.labeller import Labeller
from softlabels.teacher.recorded.spec import ImportSpec
from softlabels.teacher.run import prepare, scan


def import_recorded(spec: ImportSpec, progress: Progress | None = None) -> dict[str, Any]:
    """Puts the records of a spec into its table; the same call again does nothing.

    Returns:
        table, version, run_id, rows, already, repeated, units, committed, seconds, skipped (how
        often by reason) as `capture` reports them; positions and entries of the table now, k,
        recorded (`lineage.Recorded`).

    Raises:
        BadInputError: files, tokenizer or compression are missing or do not fit.
        DataError: records cannot be kept exactly, and the spec says to refuse.
        TryAgainError: it was told to stop; the same call goes on.
    """
    report = capture(spec, progress)
    table = Table.open(f"{report.table}@{report.version}")
    counts = (batch["num_positions"] for batch in table.batches(["num_positions"]))
    positions = sum(int(pc.sum(count).as_py() or 0) for count in counts)
    found = asdict(report)
    del found["relabelled"]
    recorded = table.contents.recorded
    assert recorded is not None  # the table's contents are the run's
    return found | {
        "positions": positions,
        "k": table.contents.k,
        "recorded": recorded.model_dump(mode="json"),
    }


def plan_import(spec: ImportSpec) -> dict[str, Any]:
    """What `import_recorded` would do; nothing is written.

    Returns:
        table, run_id, rows, repeated, units, units_left, rows_left (at most), bytes (of the first
        rows' share), positions_left (likewise), k, skipped, recorded.
    """
    run, annotator = prepare(spec)
    labeller = Labeller(run, annotator)
    table = labeller.table()
    left = [unit for unit in run.units if table is None or not table.committed(unit.key)]
    rows = sum(unit.stop - unit.start for unit in left)
    measured = labeller.rehearse(annotator.rehearsal)
    share = rows / max(measured.rows, 1)
    recorded = run.contents.recorded
    assert recorded is not None  # of an import
    return {
        "table": spec.table,
        "run_id": run.id,
        "rows": run.source.num_rows,
        "repeated": len(scan(run).repeated),
        "units": len(run.units),
        "units_left": len(left),
        "rows_left": rows,
        "positions_left": int(measured.positions * share),
        "bytes": int(measured.num_bytes * share),
        "k": run.contents.k,
        "skipped": dict(run.source.skipped),
        "recorded": recorded.model_dump(mode="json"),
    }

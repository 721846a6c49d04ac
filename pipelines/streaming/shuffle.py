"""How far a plan's order is from a shuffle of all its rows, and what it costs to come nearer.

    python -m pipelines.streaming.shuffle plan.parquet --batch-size 256

Rows are shuffled within blocks of whole row groups, and row groups among all blocks. That matters
where rows that are stored side by side are alike, as when sorted by class, source or day: the worst
case is a row group of one kind, whose part in a batch then varies more than by chance. Each line's
memory and time are of a process of its own, that reads an epoch without a local cache.
"""

import json
import os
import subprocess
import sys
import time
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from softlabels.cli.main import SETTINGS, run
from softlabels.cli.output import markdown_table
from softlabels.plan import Plan
from softlabels.student.order import Order
from softlabels.student.shares import plan_order
from softlabels.student.stream import Stream

SIZES = (1_024, 4_096, 16_384, 65_536, 262_144)
"""Rows that are shuffled among each other; and all."""

app = typer.Typer(**SETTINGS)


class Quality(NamedTuple):
    """An epoch's order against a shuffle of all rows, of which each of these is 1 or 0.

    Attributes:
        variance: of a row group's part in a batch, over that by chance; 1 of a shuffle of all. A
            label that is the same all over a row group makes batches' means vary so much more.
        neighbours: rows stored one after the other that come in one batch, over those by chance.
        correlation: of places in the plan and in the epoch; 0 of a shuffle of all.
    """

    variance: float
    neighbours: float
    correlation: float


def shuffle_quality(order: Order, epoch: int, batch_size: int) -> Quality:
    """How near the order of one epoch is to a shuffle of all its rows.

    Args:
        order: of one stage, each entry read once.
        epoch: from 0.
        batch_size: rows of a global batch; those of a short one at the end are left out.
    """
    total = order.rows_per_epoch
    entries, rows = order.epoch(epoch).read(0, total)
    sizes = order.num_rows.astype(np.int64)
    places = (np.cumsum(sizes) - sizes)[entries] + rows
    batches = total // batch_size
    of = np.arange(batches * batch_size) // batch_size
    mine = entries[: len(of)]
    # Pairs of rows of one row group in one batch: its part's variance, up to constants.
    _, counts = np.unique(of * len(sizes) + mine, return_counts=True)
    squares = float((counts.astype(np.float64) ** 2).sum())
    shares = sizes / total
    means = batches * float(((batch_size * shares) ** 2).sum())
    left = (total - batch_size) / max(1, total - 1)
    chance = batches * batch_size * float((shares * (1 - shares)).sum()) * left
    at = np.empty(total, np.int64)
    at[places] = np.arange(total)
    together = float((at[1:] // batch_size == at[:-1] // batch_size).mean())
    return Quality(
        variance=(squares - means) / chance if chance else 1.0,
        neighbours=together * (total - 1) / (batch_size - 1) if batch_size > 1 else 0.0,
        correlation=float(np.corrcoef(at, np.arange(total))[0, 1]),
    )


@app.command()
def main(
    plan: Annotated[str, typer.Argument(help="A plan of one stage.")],
    batch_size: Annotated[int, typer.Option(help="Rows of a global batch.")] = 256,
    rows: Annotated[int | None, typer.Option(help="Measure one size, as JSON.")] = None,
) -> None:
    """Print a table: how good a shuffle of ever more rows is, and what it takes."""
    if rows is not None:
        print(json.dumps(_measured(plan, batch_size, rows)))
        return
    total = Plan.read(plan).num_rows
    found = [_apart(plan, batch_size, size) for size in (*(s for s in SIZES if s < total), total)]
    print(
        markdown_table(
            [
                {
                    "rows shuffled among each other": f"{one['rows']:,}"
                    + (" (all)" if one["rows"] == total else ""),
                    "variance of a row group's part in a batch": f"{one['variance']:.2f}",
                    "neighbours in one batch": f"{one['neighbours']:.1f}",
                    "correlation with the plan's order": f"{one['correlation']:+.3f}",
                    "peak memory, MB": round(one["bytes"] / 1e6),
                    "CPU-seconds an epoch": round(one["seconds"], 2),
                }
                for one in found
            ]
        ),
        end="",
    )


def _apart(plan: str, batch_size: int, rows: int) -> dict[str, Any]:
    asked = [plan, "--batch-size", str(batch_size), "--rows", str(rows)]
    command = [sys.executable, "-m", "pipelines.streaming.shuffle", *asked]
    environment = os.environ | {"SOFTLABELS_CACHE_BYTES": "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def _measured(path: str, batch_size: int, rows: int) -> dict[str, Any]:
    plan = Plan.read(path)
    next(iter(Stream(plan, batch_size=batch_size, shuffle_rows=1, cache_bytes=0)))
    before, begun = _held("VmRSS"), time.process_time()
    for _ in Stream(plan, batch_size=batch_size, epochs=1, shuffle_rows=rows, cache_bytes=0):
        pass
    seconds, held = time.process_time() - begun, _held("VmHWM") - before
    quality = shuffle_quality(plan_order(plan, 0, True, rows), 0, batch_size)
    return {"rows": rows, **quality._asdict(), "bytes": held, "seconds": seconds}


def _held(name: str) -> int:
    with open("/proc/self/status") as file:
        return int(file.read().partition(f"{name}:")[2].split()[0]) * 1024


if __name__ == "__main__":
    run(app)

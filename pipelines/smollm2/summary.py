"""What the benchmark found so far: gaps, summary.json, the table in README and the pictures.

    python -m pipelines.smollm2.summary [FOLDER]    # writes README's table from a run's results

Gap closed = (hard - arm) / (hard - live), 1: as near to the teacher as the students that saw its
whole live distribution, 0: no nearer than those of hard labels; paired by seed, then averaged.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.torch import load_file
from torch import Tensor

from pipelines.readme import put
from pipelines.smollm2 import pictures
from pipelines.smollm2.arms import CURVE, MAIN, Arm, rounded
from softlabels.schema import table_schema
from softlabels.store import shards

TARGETS = ("topk_ids", "topk_logprobs", "tail_logprob", "sampled_ids")
"""Columns that a soft target is made of; the rest of a row a table of hard labels has too."""


SIZED_BLOCKS = 4
"""Kept files that bytes are measured on, some 30 thousand positions."""


def summarise(out: Path) -> dict[str, Any]:
    """Writes `summary.json` and the pictures from `results.jsonl`; returns the summary."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    settings = json.loads((out / "settings.json").read_text())
    points = [_point(lines, point) for point in sorted({line["point"] for line in lines})]
    summary = {
        "settings": settings,
        "teacher": json.loads((out / "teacher.json").read_text()),
        "finished": bool(points) and points[-1]["point"] == 1.0,
        "bytes": stored_bytes(out),
        "points": points,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    pictures.draw_gap(out / "gap.png", points)
    pictures.draw_ids(out / "ids.png", points[-1])
    return summary


def as_markdown(summary: Mapping[str, Any]) -> str:
    """The table of the last point: a line an arm."""
    last, settings = summary["points"][-1], summary["settings"]
    text = (
        "| student learns from | bytes a position | perplexity | KL to teacher | gap closed, KL | "
        "gap closed, nll |\n|---|---|---|---|---|---|\n"
    )
    for arm in (*MAIN, *CURVE):
        if (found := last["arms"].get(arm.name)) is None:
            continue
        size = summary["bytes"].get(arm.name)
        text += (
            f"| {title(arm)} | {'' if size is None else f'{size:.0f}'} | "
            f"{_mean(found, 'perplexity'):.1f} | {_mean(found, 'kl'):.3f} | "
            f"{_share(found, 'gap_kl')} | {_share(found, 'gap_nll')} |\n"
        )
    counts = sorted({len(found["kl"]) for found in last["arms"].values()})
    seeds = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    return text + (
        f"\n{last['positions']:,} positions, {settings['epochs']} passes over "
        f"{settings['rows'] * (settings['length'] - 1):,}; {seeds}; "
        f"teacher's perplexity {summary['teacher']['perplexity']:.1f}; KL is exact, over the whole "
        "vocabulary.\n"
    )


def stored_bytes(out: Path) -> dict[str, float]:
    """Bytes a position that a table of each stored arm takes, by its name, as far as labelled.

    Of ids, log-probabilities, tail and draws in one Parquet file of profile compact.
    """
    kept = out / "bytes.json"
    sizes: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    folder = out / "teacher"
    states = sorted(folder.glob("train-states-*.safetensors"))[:SIZED_BLOCKS]
    for arm in (*MAIN, *CURVE):
        draws = [Path(str(p).replace("states", f"draws{arm.draws}")) for p in states if arm.draws]
        known = arm.kind in ("hard", "live") or arm.name in sizes
        if known or len(states) < SIZED_BLOCKS or not all(path.exists() for path in draws):
            continue
        blocks = [load_file(path) for path in states]
        for block, path in zip(blocks, draws, strict=False):
            block |= load_file(path)
        sizes[arm.name] = round(_size(arm, blocks), 2)
    kept.write_text(json.dumps(sizes))
    return sizes


def _size(arm: Arm, blocks: Sequence[Mapping[str, Tensor]]) -> float:
    schema = table_schema()
    writer = shards.ShardWriter(schema, "compact")
    for block in blocks:
        rows, positions = block["top_ids"].shape[:2]
        found = rounded(arm, {name: values.flatten(0, 1) for name, values in block.items()})
        counts = np.full(rows, positions, np.int32)
        columns = replace(found, num_positions=counts).columns()
        columns["example_id"] = pa.array([str(row) for row in range(rows)])
        columns["view"] = pa.array(np.zeros(rows, np.int32))
        nulls = {f.name: pa.nulls(rows, f.type) for f in schema if f.name not in columns}
        arrays = [(columns | nulls)[field.name] for field in schema]
        writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
    shard = writer.close()
    sizes = shards.bytes_by_column(shards.open_shard(shard.data, arm.name))
    total = sum(sizes.get(name, 0) for name in TARGETS)
    return total / sum(block["top_ids"].shape[0] * block["top_ids"].shape[1] for block in blocks)


def title(arm: Arm) -> str:
    """The arm in a table."""
    return {
        "hard": "hard labels",
        "live": "the live teacher's whole distribution",
        "renormalize": f"top {arm.k}, renormalised",
        "bucket": f"top {arm.k}, the rest as one bucket",
        "sampled": f"top {arm.k} and {arm.draws} draws",
    }[arm.kind]


def _point(lines: Sequence[Mapping[str, Any]], point: float) -> dict[str, Any]:
    """All arms at one share of the way, values by seed."""
    here = [line for line in lines if line["point"] == point]
    by = {(line["arm"], line["seed"]): line for line in here}
    arms: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(line["arm"] for line in here):
        seeds = sorted(seed for arm, seed in by if arm == name)
        found: dict[str, Any] = {"seeds": seeds}
        for key in ("nll", "perplexity", "kl", "accuracy", "agreement", "acceptance"):
            found[key] = [by[name, seed][key] for seed in seeds]
        for key in ("kl", "nll"):
            gaps = [_gap(by, name, seed, key) for seed in seeds]
            found[f"gap_{key}"] = [gap for gap in gaps if gap is not None]
        arms[name] = found
    return {"point": point, "positions": here[0]["positions"], "arms": arms}


def _gap(
    by: Mapping[tuple[str, int], Mapping[str, Any]], name: str, seed: int, key: str
) -> float | None:
    ends = [by.get((end, seed)) for end in ("hard", "live")]
    if ends[0] is None or ends[1] is None or ends[0][key] == ends[1][key]:
        return None
    hard, live = ends[0][key], ends[1][key]
    return float((hard - by[name, seed][key]) / (hard - live))


def _mean(found: Mapping[str, Any], key: str) -> float:
    return float(np.mean(found[key]))


def _share(found: Mapping[str, Any], key: str) -> str:
    values = [100 * value for value in found[key]]
    if not values:
        return ""
    spread = f" ({min(values):.0f}–{max(values):.0f})" if len(values) > 1 else ""
    return f"{np.mean(values):.0f} %{spread}"


if __name__ == "__main__":
    put(
        "bench-lm",
        as_markdown(summarise(Path(sys.argv[1] if len(sys.argv) > 1 else "out/bench-lm"))),
    )

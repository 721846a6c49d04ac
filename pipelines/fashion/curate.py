"""Which half of the rows? Chosen by what the teacher said of them, against a random half and all.

    python -m pipelines.fashion.curate

The demo's teacher has labelled the committed images. A student learns, with the same steps, from
all rows of a pool, from a random half, and from halves that a recipe chooses: the least, the
most or the middling certain by the teacher's entropy, more often the less certain, or equally many
of each of the teacher's classes. The table goes into README.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from pipelines.readme import put, require_place
from softlabels.cli.output import markdown_table
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.query.view import query
from softlabels.student.spec import RunSpec
from softlabels.student.trainer import train
from softlabels.teacher.capture import capture
from softlabels.teacher.spec import CaptureSpec

HERE = Path("pipelines/fashion")
OUT = Path("out/curate")
POOLS = {1_000: "1555", 3_000: "4", 12_000: "g"}
"""Rows of a pool, about, and the bound of md5(example_id) below which its rows lie."""
SEEDS = (100, 101, 102, 103, 104)


def main() -> None:
    """Labels, chooses, trains, writes the table."""
    require_place("curate")
    torch.set_num_threads(2)
    for split in ("train", "test"):
        capture(CaptureSpec.read(HERE / f"capture-{split}.yaml", [f"table={OUT}/labels-{split}"]))
    (OUT / "plans").mkdir(parents=True, exist_ok=True)
    test = OUT / "plans/test.parquet"
    mix(Recipe.model_validate({"sources": {"t": {"table": f"{OUT}/labels-test"}}})).write(test)
    jobs = [(pool, arm, seed) for pool in POOLS for arm in arms(pool, 0) for seed in SEEDS]
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for pool, arm, seed in track(jobs, "students", console=Console(stderr=True)):
        record = train_one(pool, arm, seed, test)
        found.setdefault(pool, {}).setdefault(arm, []).append(record)
    summary = {str(pool): compare(records) for pool, records in found.items()}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2))
    text = as_markdown(summary)
    print(text, end="")
    put("curate", text)


def arms(pool: int, seed: int) -> dict[str, dict[str, Any]]:
    """Recipes' sources by arm; each of the halves has equally many rows, but for one."""
    inside = f"part = 'train' AND md5(example_id) < '{POOLS[pool]}'"
    table = f"{OUT}/labels-train"
    stats = query(
        table,
        "SELECT count(*) AS n, quantile_cont(entropy, [0.25, 0.5, 0.75]) AS quartiles "
        f"FROM labels WHERE {inside}",
    ).to_pylist()[0]
    half, (lower, middle, upper) = stats["n"] // 2, stats["quartiles"]
    between = f"{inside} AND entropy BETWEEN {lower} AND {upper}"
    own = {"table": table, "where": inside}
    return {
        "all": own,
        "a random half": own | {"limit": half},
        "the half with the highest entropy": own | {"where": f"{inside} AND entropy > {middle}"},
        "the half with the lowest entropy": own | {"where": f"{inside} AND entropy <= {middle}"},
        "the half between the quartiles of entropy": own | {"where": between},
        "a half drawn by entropy": own | {"sample_by": "entropy + 0.5", "repeats": 0.5},
        "a half, classes alike": own | {"limit": {"each": max(half // 10, 1), "by": "top1_id"}},
    }


def train_one(pool: int, arm: str, seed: int, test: Path) -> dict[str, Any]:
    """The finished student's figures on the test split, and its plan's rows."""
    name = f"{pool}-{arm.replace(' ', '-').replace(',', '')}-seed{seed}"
    plan = mix(Recipe.model_validate({"seed": seed, "sources": {"rows": arms(pool, seed)[arm]}}))
    plan.write(OUT / f"plans/{name}.parquet")
    spec = RunSpec.read(
        HERE / "train.yaml",
        [
            f"plan={OUT}/plans/{name}.parquet",
            f"out={OUT}/runs/{name}",
            "loss.temperature=2",
            "optimizer.lr=0.003",
            f"evaluate.plan={test}",
            "evaluate.every=600",
            f"seed={seed}",
        ],
    )
    found: dict[str, Any] = train(spec).record["evaluation"]
    return found | {"rows": sum(source.kept for source in plan.report)}


def compare(records: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures of each arm, and its gain over the random half, paired by seed."""
    random = np.array([one["accuracy"] for one in records["a random half"]])
    found = {}
    for arm, each in records.items():
        accuracy = np.array([one["accuracy"] for one in each])
        gain = 100 * (accuracy - random)
        found[arm] = {
            "rows": int(np.mean([one["rows"] for one in each])),
            "accuracy": float(accuracy.mean()),
            "nll": float(np.mean([one["nll"] for one in each])),
            "ece": float(np.mean([one["ece"] for one in each])),
            "gain": float(gain.mean()),
            "least": float(gain.min()),
            "greatest": float(gain.max()),
        }
    return found


def as_markdown(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a pool and arm."""
    rows = []
    for pool, records in summary.items():
        for arm, one in records.items():
            rows.append(
                {
                    "pool": f"{int(pool):,}",
                    "learns from": arm,
                    "rows": f"{one['rows']:,}",
                    "accuracy": f"{one['accuracy']:.4f}",
                    "NLL": f"{one['nll']:.3f}",
                    "points over the random half (least, greatest)": (
                        f"{one['gain']:+.2f} ({one['least']:+.2f}, {one['greatest']:+.2f})"
                    ),
                }
            )
    return markdown_table(rows) + f"\n600 steps of 100 rows, T = 2, {len(SEEDS)} seeds.\n"


if __name__ == "__main__":
    main()

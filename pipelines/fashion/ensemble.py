"""Several stored teachers at once, against their dense average computed live.

    python -m pipelines.fashion.ensemble

Three small teachers, each trained on other images, label the committed rows; each table stores
the top 3 and 4 draws from the rest, as of a label space too large to store whole. First: the
gradient that an ensemble plan gives against that of the dense average of their softmaxes. Then:
students of single teachers, of the first two and of all three, on the same rows, steps and seeds.
The table goes into README.md.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from pipelines.fashion.inputs import decode
from pipelines.fashion.student import MLPStudent
from pipelines.readme import put, require_place
from softlabels.cli.output import markdown_table
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.student.batch import targets_at
from softlabels.student.losses import TailMode, distillation_loss
from softlabels.student.spec import RunSpec
from softlabels.student.stream import Stream
from softlabels.student.trainer import train
from softlabels.teacher.capture import capture
from softlabels.teacher.models import load_teacher
from softlabels.teacher.spec import CaptureSpec

HERE = Path("pipelines/fashion")
OUT = Path("out/ensemble")
MEMBERS = ("a", "b", "c")
GROUPS = ("a", "b", "c", "ab", "abc")
SEEDS = (100, 101, 102, 103, 104)
ROWS = 3_000
K, DRAWS = 3, 4
CHECKED_ROWS = 12_000


def main() -> None:
    """Labels, checks the gradients, trains, writes the table."""
    require_place("ensemble")
    torch.set_num_threads(2)
    began = time.monotonic()
    for member in MEMBERS:
        for split in ("train", "test"):
            capture(capture_spec(member, split))
    bias = {group: check_gradient(group) for group in ("ab", "abc")}
    test = OUT / "plans/test.parquet"
    test.parent.mkdir(parents=True, exist_ok=True)
    mix(recipe("a", "test", 0)).write(test)
    jobs = [(group, seed) for group in GROUPS for seed in SEEDS]
    students: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for group, seed in track(jobs, "students", console=Console(stderr=True)):
        students[group].append(train_one(group, seed, test))
    summary = {
        "gradient": bias,
        "students": {group: figures(found) for group, found in students.items()},
        "gain_points": {group: gains(students, group) for group in ("ab", "abc")},
        "seconds": round(time.monotonic() - began, 1),
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2))
    text = as_markdown(summary)
    print(text, end="")
    put("ensemble", text)


def capture_spec(member: str, split: str) -> CaptureSpec:
    """How a member labels a split: the demo's spec with other weights, few ids and draws."""
    changes = [
        f"table={OUT}/labels-{member}-{split}",
        f"teacher.name=fashion-member-{member}",
        "teacher.arguments={widths: [16, 32, 56, 56]}",
        f"teacher.weights=data/fashion/member-{member}.safetensors",
        "temperatures=[]",
        f"k={K if split == 'train' else 10}",
        f"draws={DRAWS if split == 'train' else 0}",
    ]
    return CaptureSpec.read(HERE / f"capture-{split}.yaml", changes)


def recipe(group: str, split: str, seed: int) -> Recipe:
    """Rows of one member, or of several at equal weights."""
    tables = {member: f"{OUT}/labels-{member}-{split}" for member in group}
    source: dict[str, Any] = {"table": tables[group]} if len(group) == 1 else {"ensemble": {}}
    for member, table in tables.items():
        if len(group) > 1:
            source["ensemble"][member] = {"table": table, "weight": 1}
    if split == "train":
        source |= {"where": "part = 'train'", "limit": ROWS}
    return Recipe.model_validate({"seed": seed, "sources": {"fashion": source}})


def check_gradient(group: str) -> dict[str, float]:
    """How far the ensemble's gradient of the logits is from the dense average's, over many rows.

    Returns:
        bias: norm of the mean difference over all rows, relative to the norm of the dense mean
        gradient. expected: the same norm that sampling alone would give, from the spread between
        rows. bound: of bucket, without draws, the same bias.
    """
    whole = recipe(group, "train", 0).sources["fashion"].model_copy(update={"limit": CHECKED_ROWS})
    plan = mix(Recipe(sources={"fashion": whole}))
    teachers = [load_teacher(capture_spec(member, "train")).module for member in group]
    torch.manual_seed(0)
    student = MLPStudent()
    dense: list[torch.Tensor] = []
    sampled: list[torch.Tensor] = []
    bucket: list[torch.Tensor] = []
    tails: tuple[tuple[TailMode, list[torch.Tensor]], ...]
    tails = (("sampled", sampled), ("bucket", bucket))
    for batch in Stream(plan, batch_size=512, columns=["image"], shuffle=False, epochs=1):
        images = decode(batch.columns)
        with torch.no_grad():
            logits = student(images).double()
            mean = sum(t(images).double().softmax(1) for t in teachers) / len(teachers)
        dense.append(logits.softmax(1) - mean)
        soft = [batch.targets, *(other.targets for other in batch.others)]
        weights = torch.from_numpy(batch.member_weights)
        for tail, kept in tails:
            targets = [
                (targets_at(one, draws=tail == "sampled"), weights[:, number])
                for number, one in enumerate(soft)
            ]
            given = logits.clone().requires_grad_()
            loss = distillation_loss(given, targets, tail=tail, normalizer=1.0).loss
            (gradient,) = torch.autograd.grad(loss, given)
            kept.append(gradient)
    exact = torch.cat(dense)
    off = torch.cat(sampled) - exact
    scale = float(exact.mean(0).norm())
    spread = off.var(0).sum().div(len(off)).sqrt()
    return {
        "rows": len(off),
        "bias": float(off.mean(0).norm()) / scale,
        "expected": float(spread) / scale,
        "bucket_bias": float((torch.cat(bucket) - exact).mean(0).norm()) / scale,
    }


def train_one(group: str, seed: int, test: Path) -> dict[str, Any]:
    """The finished student's figures on the test split."""
    plan = OUT / f"plans/{group}-seed{seed}.parquet"
    mix(recipe(group, "train", seed)).write(plan)
    spec = RunSpec.read(
        HERE / "train.yaml",
        [
            f"plan={plan}",
            f"out={OUT}/runs/{group}-seed{seed}",
            "loss.tail=sampled",
            "loss.temperature=1",
            "optimizer.lr=0.003",
            f"evaluate.plan={test}",
            "evaluate.every=600",
            f"seed={seed}",
        ],
    )
    found: dict[str, Any] = train(spec).record["evaluation"]
    return found


def figures(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds."""
    return {
        name: {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
        for name in ("accuracy", "nll", "ece")
        if (values := [one[name] for one in found])
    }


def gains(students: Mapping[str, Sequence[Mapping[str, Any]]], group: str) -> dict[str, float]:
    """Points of accuracy over the mean and over the best of the single teachers, by seed."""
    mine = np.array([one["accuracy"] for one in students[group]])
    single = np.array([[one["accuracy"] for one in students[member]] for member in group])
    best = single[np.argmax(single.mean(1))]
    return {
        "over_mean": float(100 * (mine - single.mean(0)).mean()),
        "over_best": float(100 * (mine - best).mean()),
        "over_best_sd": float(100 * (mine - best).std(ddof=1)),
        "over_best_least": float(100 * (mine - best).min()),
    }


def as_markdown(summary: Mapping[str, Any]) -> str:
    """The two tables."""
    rows = []
    for group, found in summary["students"].items():
        gain = summary["gain_points"].get(group)
        rows.append(
            {
                "student of": " + ".join(group),
                "accuracy": f"{found['accuracy']['mean']:.4f} ± {found['accuracy']['sd']:.4f}",
                "NLL": f"{found['nll']['mean']:.3f}",
                "ECE": f"{found['ece']['mean']:.3f}",
                "points over its teachers' mean": f"{gain['over_mean']:+.2f}" if gain else "",
                "over the best of them (± sd)": (
                    f"{gain['over_best']:+.2f} ± {gain['over_best_sd']:.2f}" if gain else ""
                ),
            }
        )
    lines = [
        f"{' + '.join(group)}: the mean gradient is off by {found['bias']:.2%}, by sampling alone "
        f"{found['expected']:.2%} are expected; bucket is off by {found['bucket_bias']:.1%} "
        f"({found['rows']:,} rows)."
        for group, found in summary["gradient"].items()
    ]
    return (
        markdown_table(rows)
        + f"\n{ROWS:,} images, {len(SEEDS)} seeds, 600 steps, top {K} and {DRAWS} draws a teacher. "
        + "Against the dense average of the live teachers: "
        + " ".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    main()

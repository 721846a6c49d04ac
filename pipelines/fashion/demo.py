"""The whole way on real images: label, query, mix, train, measure. `make demo` runs it.

    python -m pipelines.fashion.demo

A convolutional teacher labels 25,000 images once. Then small students learn from 300, 1,000 or
12,000 of them, from hard labels or from the teacher's, all with the same steps, batch and seeds.
Learning rates were chosen on validation rows by `choose_lr.py`, which wrote `chosen.json`.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from pipelines.fashion.inputs import decode
from pipelines.fashion.student import MLPStudent
from softlabels.cli.output import print_table
from softlabels.plan import Plan
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.report.pictures import (
    Curve,
    LabelledImage,
    Reliability,
    draw_curves,
    draw_labels,
    draw_reliability,
)
from softlabels.store.inspect import describe
from softlabels.store.table import Table
from softlabels.student.evaluate import evaluate, evaluate_teacher
from softlabels.student.metrics import read_metrics
from softlabels.student.spec import RunSpec
from softlabels.student.trainer import train
from softlabels.teacher.models import load_teacher
from softlabels.teacher.spec import CaptureSpec

HERE = Path("pipelines/fashion")
OUT = Path("out/demo")
SEEDS = (100, 101, 102, 103, 104)
SPREAD = f"mean ± standard deviation of {len(SEEDS)} seeds, each with rows of its own"


@dataclass(frozen=True)
class Arm:
    """Students that differ in their seed only.

    Attributes:
        name: in files and in chosen.json.
        title: in the printed table.
        rows: training rows.
        temperature: of soft labels; None: hard labels.
        every: steps between measurements on the test split.
    """

    name: str
    title: str
    rows: int
    temperature: float | None = None
    every: int = 600


ARMS = (
    Arm("hard300", "hard labels, 300 images", 300, every=50),
    Arm("soft300", "soft labels, the same 300", 300, 2.0, every=50),
    Arm("hard1000", "hard labels, 1,000 images", 1_000),
    Arm("hard12000", "hard labels, 12,000 images", 12_000),
    Arm("soft12000", "soft labels, 12,000 images", 12_000, 2.0),
    Arm("soft12000-T4", "soft labels at T = 4, 12,000 images", 12_000, 4.0),
)


def main() -> None:
    """Runs everything; a second call finds the labels and students there."""
    began = time.monotonic()
    torch.set_num_threads(2)
    label()
    plans = make_plans()
    results = {arm.name: train_arm(arm, plans) for arm in ARMS}
    teacher = measure_teacher(plans["test"])
    summary = summarise(teacher, results)
    draw(plans["test"], results)
    summary["seconds"] = round(time.monotonic() - began, 1)
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2))
    show(summary)


def label() -> None:
    """The teacher labels both splits, each version gets a name, and SQL looks at them."""
    for split in ("train", "test"):
        softlabels("capture", f"{HERE}/capture-{split}.yaml")
        softlabels("tag", f"{OUT}/labels-{split}", "v1")
    softlabels(
        "query",
        f"{OUT}/labels-train@v1",
        "SELECT name AS class, count(*) AS images, avg((top1_id = label)::INT) AS teacher_right, "
        "avg(entropy) AS entropy_nats FROM labels JOIN classes ON id = label GROUP BY ALL "
        "ORDER BY entropy_nats DESC",
    )


def make_plans() -> dict[str, Path]:
    """A plan of the test split, and one for every number of rows and seed."""
    folder = OUT / "plans"
    plans = {"test": folder / "test.parquet"}
    softlabels("mix", f"{HERE}/mix-test.yaml", "-o", str(plans["test"]))
    softlabels("mix", f"{HERE}/mix.yaml", "-o", str(folder / "rows300-seed100.parquet"))
    recipe = Recipe.read(HERE / "mix.yaml")
    for rows in sorted({arm.rows for arm in ARMS}):
        for seed in SEEDS:
            source = recipe.sources["fashion"].model_copy(update={"limit": rows})
            drawn = recipe.model_copy(update={"seed": seed, "sources": {"fashion": source}})
            path = folder / f"rows{rows}-seed{seed}.parquet"
            mix(drawn).write(path)
            plans[f"rows{rows}-seed{seed}"] = path
    return plans


def train_arm(arm: Arm, plans: Mapping[str, Path]) -> list[dict[str, Any]]:
    """One finished student a seed; its record, with what metrics.jsonl says."""
    chosen = json.loads((HERE / "chosen.json").read_text())
    found = []
    for seed in track(SEEDS, f"{arm.title}: {len(SEEDS)} students", console=Console(stderr=True)):
        spec = RunSpec.read(
            HERE / "train.yaml",
            [
                f"plan={plans[f'rows{arm.rows}-seed{seed}']}",
                f"out={OUT}/runs/{arm.name}-seed{seed}",
                f"loss.kd_weight={int(arm.temperature is not None)}",
                f"loss.temperature={arm.temperature or 1.0}",
                f"optimizer.lr={chosen[arm.name]['lr']}",
                f"evaluate.every={arm.every}",
                f"seed={seed}",
            ],
        )
        trained = train(spec)
        found.append({**trained.record, "metrics": read_metrics(Path(spec.out))})
    return found


def measure_teacher(plan: Path) -> dict[str, Any]:
    """The teacher on the test split, run live and by the same measure as its students."""
    teacher = load_teacher(CaptureSpec.read(HERE / "capture-test.yaml")).module
    live = evaluate(teacher, Plan.read(plan), decode, ["image"]).as_dict()
    stored = evaluate_teacher(Plan.read(plan))
    if abs(live["accuracy"] - (stored.accuracy or 0)) > 1e-3:
        raise SystemExit(f"stored labels say {stored.accuracy}, the teacher {live['accuracy']}")
    return live


def forward_rates() -> dict[str, float]:
    """Examples a second of both models' forward passes: batches of 256, alternated, medians.

    On one thread: a small model loses more to a second one than it gains.
    """
    torch.set_num_threads(1)
    teacher = load_teacher(CaptureSpec.read(HERE / "capture-test.yaml")).module
    models: dict[str, Any] = {"teacher": teacher, "student": MLPStudent().eval()}
    images = torch.randn(256, 1, 28, 28)
    rates: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(9):
            for name, model in models.items():
                passes = 2 if name == "teacher" else 200
                began = time.perf_counter()
                for _ in range(passes):
                    model(images)
                rates[name].append(256 * passes / (time.perf_counter() - began))
    return {name: float(np.median(values)) for name, values in rates.items()}


def summarise(
    teacher: Mapping[str, Any], results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """What summary.json holds; every figure from the runs just made."""
    rates = forward_rates()
    arms: dict[str, dict[str, Any]] = {
        arm.name: {"title": arm.title, "rows": arm.rows, "temperature": arm.temperature}
        | {"lr": results[arm.name][0]["identity"]["optimizer"]["lr"]}
        | _figures([record["evaluation"] for record in results[arm.name]], rates["student"])
        for arm in ARMS
    }

    def compare(setting: str, hard: str, soft: str) -> dict[str, Any]:
        gain = _gain(results[hard], results[soft])
        return {"setting": setting, "hard": arms[hard], "soft": arms[soft], "gain_points": gain}

    headline = compare(f"300 labelled images, the same for both; {SPREAD}", "hard300", "soft300")
    return headline | {
        "teacher": {"title": "teacher"} | _figures([teacher], rates["teacher"]),
        "other_settings": [
            compare(
                "1,000 labelled images against the teacher's labels for 12,000: other images, "
                "not only other labels",
                "hard1000",
                "soft12000",
            ),
            compare("12,000 labelled images, the same for both", "hard12000", "soft12000"),
            compare("the same at temperature 4", "hard12000", "soft12000-T4"),
        ],
        "retention": arms["soft300"]["accuracy"]["mean"] / teacher["accuracy"],
        "size_ratio": teacher["parameters"] / arms["soft300"]["parameters"],
        "speed_ratio": rates["student"] / rates["teacher"],
        "bytes_per_row": describe(Table.open(f"{OUT}/labels-train@v1"))["label_bytes_per_row"],
        "seeds": SEEDS,
        "threads": torch.get_num_threads(),  # of examples_per_s
    }


def show(summary: Mapping[str, Any]) -> None:
    """Prints the table a user came for."""
    settings = [summary, *summary["other_settings"]]
    rows = [summary["teacher"]]
    for found in settings:
        rows += [row for row in (found["hard"], found["soft"]) if row not in rows]
    print_table([_line(row) for row in rows], title=f"\nFashion-MNIST test split; {SPREAD}")
    print("\nsoft minus hard, points of accuracy, paired by seed:")
    for found in settings:
        gain = found["gain_points"]
        print(f"  {gain['mean']:+.1f} ± {gain['sd']:.1f}  {found['setting']}")
    print(
        f"\nThe student of 300 images keeps {summary['retention']:.0%} of its teacher's accuracy, "
        f"{summary['size_ratio']:.1f} times smaller and {summary['speed_ratio']:.0f} times faster, "
        f"from {summary['bytes_per_row']:.0f} bytes of labels an image."
    )
    print(f"{OUT}/summary.json, labels.png, reliability.png, curves.png")


def draw(plan: Path, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The three pictures."""
    draw_labels(OUT / "labels.png", _examples())
    stored = evaluate_teacher(Plan.read(plan)).as_dict()
    draw_reliability(
        OUT / "reliability.png",
        {
            "teacher": _reliability([stored]),
            "hard labels": _reliability([r["evaluation"] for r in results["hard300"]]),
            "soft labels": _reliability([r["evaluation"] for r in results["soft300"]]),
        },
    )
    curves = {name: _curve(results[f"{name}300"]) for name in ("hard", "soft")}
    draw_curves(
        OUT / "curves.png",
        {f"{name} labels": curve for name, curve in curves.items()},
        "test accuracy",
        f"300 training images, {len(SEEDS)} seeds (line: mean, band: range)",
    )


def softlabels(*arguments: str) -> None:
    """Runs the command line as a user would, and shows what is run."""
    print(f"\n$ softlabels {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "softlabels", *arguments])
    if done.returncode:
        raise SystemExit(done.returncode)


def _figures(found: Sequence[Mapping[str, Any]], examples_per_s: float) -> dict[str, Any]:
    accuracy = [one["accuracy"] for one in found]
    return {
        "accuracy": {"mean": float(np.mean(accuracy)), "sd": _sd(accuracy)},
        **{
            name: float(np.mean([one[name] for one in found]))
            for name in ("agreement", "kl_to_teacher", "nll", "ece")
        },
        "parameters": found[0]["parameters"],
        "examples_per_s": examples_per_s,
    }


def _gain(hard: Sequence[Mapping[str, Any]], soft: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    points = [
        100 * (s["evaluation"]["accuracy"] - h["evaluation"]["accuracy"])
        for h, s in zip(hard, soft, strict=True)
    ]
    return {"mean": float(np.mean(points)), "sd": _sd(points), "least": min(points)}


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _line(row: Mapping[str, Any]) -> dict[str, str]:
    accuracy = row["accuracy"]
    spread = f" ± {accuracy['sd']:.4f}" if accuracy["sd"] else ""
    return {
        "": row["title"],
        "accuracy": f"{accuracy['mean']:.4f}{spread}",
        "agreement": f"{row['agreement']:.3f}",
        "KL to teacher, nats": f"{row['kl_to_teacher']:.3f}",
        "ECE": f"{row['ece']:.3f}",
        "parameters": f"{row['parameters']:,}",
        "examples/s": f"{row['examples_per_s']:,.0f}",
    }


def _reliability(found: Sequence[Mapping[str, Any]]) -> Reliability:
    bins = [one["bins"] for one in found]
    counts = np.array([[b["rows"] for b in one] for one in bins])

    def pooled(name: str) -> Any:
        sums = np.array([[(b[name] or 0.0) * b["rows"] for b in one] for one in bins]).sum(0)
        return sums / np.maximum(counts.sum(0), 1)

    ece = float(np.mean([one["ece"] for one in found]))
    return Reliability(pooled("confidence"), pooled("accuracy"), counts.sum(0), ece)


def _curve(found: Sequence[Mapping[str, Any]]) -> Curve:
    lines = [[line for line in one["metrics"] if "evaluation" in line] for one in found]
    values = [[line["evaluation"]["accuracy"] for line in one] for one in lines]
    return Curve([line["step"] for line in lines[0]], np.array(values))


def _examples() -> list[LabelledImage]:
    # One of each pair of classes that the teacher confuses most: where soft labels say most.
    rows = _query(
        "SELECT example_id, image, label, topk_ids, topk_logprobs FROM labels "
        "WHERE entropy BETWEEN 0.4 AND 1.2 "
        "QUALIFY row_number() OVER (PARTITION BY label ORDER BY md5(example_id)) = 1 "
        "ORDER BY label LIMIT 8"
    )
    classes = Table.open(f"{OUT}/labels-test@v1").contents.classes or ()
    return [
        LabelledImage(
            image=np.frombuffer(row["image"], np.uint8).reshape(28, 28),
            title=f"{row['example_id']}\n{classes[row['label']]}",
            names=[classes[i] for i in row["topk_ids"][:4]],
            probs=list(np.exp(row["topk_logprobs"][:4])),
            truth=classes[row["label"]],
        )
        for row in rows
    ]


def _query(sql: str) -> list[dict[str, Any]]:
    from softlabels.query.view import query

    return list(query(f"{OUT}/labels-test@v1", sql).to_pylist())


if __name__ == "__main__":
    main()

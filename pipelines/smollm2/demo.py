"""The whole way for a language model: label text, check, mix, train, measure. `make demo-lm`.

    python -m pipelines.smollm2.demo            # SMALL=1: less text, one seed, minutes

SmolLM2-135M labels pages of documentation twice: its top 16 tokens and 16 draws from the rest, and
its top 32, which is as many stored ids. Then students 19 times smaller learn from hard labels,
from the top 32 renormalised or with the rest as one bucket, and from the top 16 with the draws:
the same text, steps and starts. A second call finds the labels and students there.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from pipelines.smollm2 import pictures
from pipelines.smollm2.exact import Figures, measure, parts_of_plan
from pipelines.smollm2.jobs import Job, in_parallel
from pipelines.smollm2.summary import TARGETS
from pipelines.smollm2.teacher import FOLDER, teacher_folder
from pipelines.smollm2.text import DATA, Split
from softlabels.cli.main import app
from softlabels.cli.output import print_table
from softlabels.errors import SoftLabelsError
from softlabels.fingerprint import sha256_json
from softlabels.plan import Plan
from softlabels.storage import open_root
from softlabels.store.inspect import column_bytes, describe
from softlabels.store.table import Table
from softlabels.student.metrics import read_metrics
from softlabels.student.pretrained import build_language_model
from softlabels.student.saved import read_run
from softlabels.student.spec import LanguageModelSpec

HERE = Path("pipelines/smollm2")
TABLES = ("sampled", "top32", "heldout")


@dataclass(frozen=True)
class Demo:
    """How much is done.

    Attributes:
        out: folder of everything it makes.
        train_pages: first pages of data/lm/train.parquet that are labelled.
        heldout_pages: the same of heldout.parquet.
        few_rows: held-out sequences that students are measured on while they learn.
        seeds: of the students' start and reading order.
        workers: processes at a time, one thread each; 0: this one does all.
        teacher: folder of a causal model with its tokenizer.
        text: folder of train.parquet and heldout.parquet.
        capture, train: changes to the capture specs and to train.yaml.
    """

    out: Path
    train_pages: int
    heldout_pages: int
    few_rows: int
    seeds: tuple[int, ...]
    workers: int = 2
    teacher: Path = FOLDER
    text: Path = DATA
    capture: tuple[str, ...] = ()
    train: tuple[str, ...] = ()


FULL = Demo(Path("out/demo-lm"), train_pages=30, heldout_pages=5, few_rows=4, seeds=(0, 1))
SMALL = Demo(Path("out/demo-lm-small"), train_pages=3, heldout_pages=2, few_rows=4, seeds=(0,))


@dataclass(frozen=True)
class Arm:
    """Students that differ in their seed only.

    Attributes:
        name: in files.
        title: in the table.
        table: what they learn from.
        loss: changes to train.yaml.
    """

    name: str
    title: str
    table: str
    loss: tuple[str, ...]


ARMS = (
    Arm("hard", "hard labels", "sampled", ("loss.kd_weight=0",)),
    Arm("renormalize", "top 32, renormalised", "top32", ("loss.tail=renormalize",)),
    Arm("bucket", "top 32, the rest as one bucket", "top32", ("loss.tail=bucket",)),
    Arm("sampled", "top 16 and 16 draws", "sampled", ("loss.tail=sampled",)),
)


def main() -> None:
    """Runs the demo; SMALL=1 in the environment makes it short."""
    try:
        run(SMALL if os.environ.get("SMALL") else FULL)
    except SoftLabelsError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


def run(demo: Demo) -> dict[str, Any]:
    """Runs everything that is not there yet; returns what summary.json holds."""
    began = time.monotonic()
    teacher_folder(demo.teacher)
    seconds = {"teacher": time.monotonic() - began}
    label(demo)
    seconds["labels"] = time.monotonic() - began
    plans = make_plans(demo)
    records = train_students(demo, plans)
    seconds["students"] = time.monotonic() - began
    teacher, exact = measure_exactly(demo, plans["heldout"])
    summary = summarise(demo, teacher, exact, records)
    seconds["all"] = time.monotonic() - began
    summary["seconds_until"] = {name: round(value, 1) for name, value in seconds.items()}
    (demo.out / "summary.json").write_text(json.dumps(summary, indent=2))
    draw(demo, summary, records)
    show(demo, summary)
    return summary


def label(demo: Demo) -> None:
    """The teacher labels the pages; each version gets a name and is checked."""
    _cut(demo, "train", demo.train_pages)
    _cut(demo, "heldout", demo.heldout_pages)
    jobs = []
    for name in TABLES:
        text = "heldout" if name == "heldout" else "train"
        changes = (
            f"table={demo.out}/labels-{name}",
            f"source.files={demo.out}/text/{text}.parquet",
            f"teacher.model={demo.teacher}",
            *demo.capture,
        )
        jobs.append(Job("capture", f"{HERE}/capture-{name}.yaml", changes))
    in_parallel(jobs, demo.workers)
    for name in TABLES:
        softlabels("tag", f"{demo.out}/labels-{name}", "v1")
    softlabels("verify", f"{demo.out}/labels-sampled@v1")
    softlabels(
        "query",
        f"{demo.out}/labels-sampled@v1",
        "SELECT CASE WHEN label_rank = 0 THEN 'first' WHEN label_rank < 16 THEN 'stored' "
        "ELSE 'in the tail' END AS next_token, count(*) AS positions, "
        "avg(entropy) AS entropy_nats, avg(exp(tail_logprob)) AS tail_mass "
        "FROM positions GROUP BY ALL ORDER BY positions DESC",
    )


def make_plans(demo: Demo) -> dict[str, Path]:
    """A plan of each table, and one of a few held-out sequences to watch students by."""
    plans = {name: demo.out / f"plans/{name}.parquet" for name in (*TABLES, "heldout-few")}
    for name, path in plans.items():
        changes = [f"sources.text.table={demo.out}/labels-{name.removesuffix('-few')}@v1"]
        if name == "heldout-few":
            changes.append(f"sources.text.limit={demo.few_rows}")
        _mix(changes, path)
    return plans


def train_students(demo: Demo, plans: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """One finished student an arm and seed, by name; what it recorded and its metrics."""
    jobs, names = [], []
    for seed in demo.seeds:
        for arm in ARMS:
            name = f"{arm.name}-seed{seed}"
            changes = (
                f"plan={plans[arm.table]}",
                f"out={demo.out}/runs/{name}",
                f"evaluate.plan={plans['heldout-few']}",
                f"tokenizer={demo.teacher}",
                f"seed={seed}",
                *arm.loss,
                *demo.train,
            )
            jobs.append(Job("train", f"{HERE}/train.yaml", changes))
            names.append(name)
    records = in_parallel(jobs, demo.workers)
    return {
        name: {**record, "metrics": read_metrics(demo.out / "runs" / name)}
        for name, record in zip(names, records, strict=True)
    }


def measure_exactly(demo: Demo, path: Path) -> tuple[Figures, dict[str, Figures]]:
    """Teacher and students on the held-out pages, run live, over the whole vocabulary."""
    if demo.workers:
        torch.set_num_threads(demo.workers)
    plan = Plan.read(path)
    names = [f"{arm.name}-seed{seed}" for seed in demo.seeds for arm in ARMS]
    folders = {name: demo.out / "runs" / name for name in names}
    results = [json.loads((folder / "student.json").read_text()) for folder in folders.values()]
    key = sha256_json([plan.fingerprint, [result["student_sha256"] for result in results]])
    kept = demo.out / "exact.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["key"] == key:
        return found["teacher"], found["students"]
    num_classes = next(iter(plan.tables.values())).contents.num_classes
    teacher = build_language_model(LanguageModelSpec(checkpoint=str(demo.teacher)), "causal_lm")
    students = {name: load_student(folder, num_classes) for name, folder in folders.items()}
    measured = measure(parts_of_plan(plan, teacher, students, num_classes))
    record = {"key": key, "teacher": measured[0], "students": measured[1]}
    open_root(demo.out).write(kept.name, json.dumps(record).encode())
    return measured


def load_student(folder: Path, num_classes: int) -> torch.nn.Module:
    """The finished student of a run's folder; num_classes: V."""
    from softlabels.student import checkpoint
    from softlabels.student.build import build_student

    spec = read_run(folder)
    model = build_student(spec, num_classes)
    weights = checkpoint.read_weights(folder / checkpoint.STUDENT)
    checkpoint.load_weights(model, weights, f"run {str(folder)!r}")
    return model.eval()


def summarise(
    demo: Demo,
    teacher: Figures,
    exact: Mapping[str, Figures],
    records: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What summary.json holds; every figure from the runs just made."""
    tables = {name: _table(f"{demo.out}/labels-{name}@v1") for name in TABLES}
    arms: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        found = [exact[f"{arm.name}-seed{seed}"] for seed in demo.seeds]
        arms[arm.name] = {"title": arm.title} | {
            name: {"mean": float(np.mean(values)), "sd": _sd(values), "values": values}
            for name in found[0]
            if (values := [one[name] for one in found])
        }
        arms[arm.name]["label_bytes"] = (
            0.0 if arm.name == "hard" else tables[arm.table]["target_bytes"]
        )
    any_record = next(iter(records.values()))
    return {
        "teacher": {"title": "teacher", **teacher},
        "students": arms,
        "tables": tables,
        "steps": any_record["steps"],
        "parameters": any_record["parameters"],
        "seeds": demo.seeds,
        "note": "plans of two tables are read in two orders: seeds share the start, not the order",
    }


def show(demo: Demo, summary: Mapping[str, Any]) -> None:
    """Prints the table a user came for."""
    rows = [_line(summary["teacher"])]
    rows += [_line(found) for found in summary["students"].values()]
    tables = summary["tables"]
    seeds = len(demo.seeds)
    print_table(
        rows,
        title=f"\n{tables['heldout']['positions']:,} held-out positions after training on "
        f"{tables['sampled']['positions']:,}; mean of {seeds} seed{'s' * (seeds > 1)}; KL is exact",
    )
    print(f"\n{demo.out}/summary.json, bars.png, curves.png")


def draw(demo: Demo, summary: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> None:
    """The two pictures."""
    pictures.draw_bars(demo.out / "bars.png", summary["students"], summary["teacher"])
    curves = {
        arm.title: [records[f"{arm.name}-seed{seed}"]["metrics"] for seed in demo.seeds]
        for arm in ARMS
    }
    pictures.draw_learning(demo.out / "curves.png", curves)


def softlabels(*arguments: str) -> None:
    """Runs a command of the command line, and shows which."""
    print(f"\n$ softlabels {shlex.join(arguments)}", flush=True)
    code = app(list(arguments), standalone_mode=False)
    if code:
        raise SystemExit(code)


def _mix(changes: Sequence[str], path: Path) -> None:
    from softlabels.query.mix import mix
    from softlabels.query.recipe import Recipe
    from softlabels.specs import load_spec

    path.parent.mkdir(parents=True, exist_ok=True)
    mix(load_spec(HERE / "mix.yaml", Recipe, changes)).write(path)


def _cut(demo: Demo, split: Split, pages: int) -> None:
    """The first pages of a committed file, as a file of their own; the same bytes again."""
    path = demo.out / "text" / f"{split}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pq.read_table(demo.text / f"{split}.parquet").slice(0, pages), path)


def _table(name: str) -> dict[str, Any]:
    """Positions and bytes of a table; target_bytes: of ids, log-probabilities, tail and draws."""
    table = Table.open(name)
    found = describe(table)
    sizes = column_bytes(table)
    total = sum(sizes.get(column, 0) for column in TARGETS)
    return {
        "table": name,
        "rows": found["rows"],
        "positions": found["positions"],
        "bytes": found["bytes"],
        "label_bytes": found["label_bytes_per_position"],
        "target_bytes": round(total / found["positions"], 2),
    }


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _line(found: Mapping[str, Any]) -> dict[str, str]:
    def of(name: str, digits: int) -> str:
        value = found.get(name, "")
        if isinstance(value, Mapping):
            spread = f" ± {value['sd']:.{digits}f}" if value["sd"] else ""
            return f"{value['mean']:.{digits}f}{spread}"
        return value if isinstance(value, str) else f"{value:.{digits}f}"

    return {
        "": str(found["title"]),
        "perplexity": of("perplexity", 1),
        "KL to teacher": of("kl", 3),
        "agreement": of("agreement", 3),
        "acceptance": of("acceptance", 3),
        "bytes a position": of("label_bytes", 1),
    }


if __name__ == "__main__":
    main()

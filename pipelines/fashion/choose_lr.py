"""Compares hard and soft labels for the small student, each with its own best learning rate.

    python -m pipelines.fashion.choose_lr

The pool is the first 12,000 rows of `data/fashion/train.parquet`, the validation part its last
3,000. A setting trains on the first N rows of the pool. Its learning rate is the one with the
highest mean validation accuracy; only then are fresh seeds scored on the test split, at the chosen
rate. Soft labels are the teacher's full distribution, computed here from its weights.

    python -m pipelines.fashion.choose_lr --demo

chooses for the demo's arms only and writes `chosen.json`, which the demo reads.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

from pipelines.fashion.inputs import decode
from pipelines.fashion.student import MLPStudent
from pipelines.fashion.teacher import ConvTeacher

FOLDER = Path("data/fashion")
POOL_ROWS = 12_000
ROWS = (300, 1_000, 3_000, POOL_ROWS)
TEMPERATURES = (1.0, 2.0, 4.0)
KD_WEIGHTS = (1.0, 0.5)
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # wide enough that no edge is chosen
SMOOTHING = 0.1
STEPS = 600
BATCH = 100  # divides every N, so every batch is full
CHOSEN = Path("pipelines/fashion/chosen.json")


class Examples(NamedTuple):
    """Images float32 [N, 1, 28, 28], labels int64 [N], teacher logits float32 [N, 10]."""

    images: torch.Tensor
    labels: torch.Tensor
    teacher: torch.Tensor

    def take(self, rows: torch.Tensor | slice) -> "Examples":
        """Returns the examples of `rows` (positions or a slice)."""
        return Examples(self.images[rows], self.labels[rows], self.teacher[rows])


class Setting(NamedTuple):
    """What a student learns from: `rows` training rows and a loss.

    The loss is kd_weight · T² · KL(teacher‖student at T) + (1 - kd_weight) · cross-entropy with
    the hard label, smoothed by `smoothing`. With kd_weight = 1 no hard label is used.
    """

    rows: int
    kd_weight: float = 0.0
    temperature: float = 1.0
    smoothing: float = 0.0

    @property
    def name(self) -> str:
        """How the table calls the setting."""
        if self.kd_weight:
            return f"soft T={self.temperature:g} kd_weight={self.kd_weight:g}"
        return f"hard, smoothing {self.smoothing:g}" if self.smoothing else "hard"


DEMO_ARMS = {
    "hard300": Setting(300),
    "soft300": Setting(300, 1.0, 2.0),
    "hard1000": Setting(1_000),
    "hard12000": Setting(12_000),
    "soft12000": Setting(12_000, 1.0, 2.0),
    "soft12000-T4": Setting(12_000, 1.0, 4.0),
}


class Outcome(NamedTuple):
    """One setting at its chosen learning rate; test figures have one value a seed."""

    setting: Setting
    lr: float
    validation_accuracy: dict[float, float]
    test_accuracy: list[float]
    test_nll: list[float]


def main(
    folder: Annotated[Path, typer.Option(help="Folder of the data and the teacher.")] = FOLDER,
    choosing_seeds: Annotated[int, typer.Option(min=1, help="Seeds for each rate.")] = 3,
    test_seeds: Annotated[int, typer.Option(min=1, help="Fresh seeds for the test.")] = 5,
    draw: Annotated[
        int, typer.Option(min=0, help="0: the first N rows; else seeds a shuffle of the pool.")
    ] = 0,
    demo: Annotated[
        bool, typer.Option("--demo", help=f"Only choose for the demo's arms; write {CHOSEN}.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Prints the comparison; progress goes to stderr."""
    torch.set_num_threads(1)  # at 100 x 784 a second thread costs more than it does
    train, test = read(folder / "train.parquet", folder), read(folder / "test.parquet", folder)
    pool, validation = train.take(slice(0, POOL_ROWS)), train.take(slice(POOL_ROWS, None))
    if draw:
        order = torch.randperm(POOL_ROWS, generator=torch.Generator().manual_seed(draw))
        pool = pool.take(order)
    if demo:
        write_chosen(pool, validation, choosing_seeds)
        return
    found = []
    for setting in track(list(settings()), "settings", console=Console(stderr=True)):
        rates = validate(setting, pool, validation, choosing_seeds)
        lr = max(rates, key=rates.__getitem__)
        seeds = range(100, 100 + test_seeds)
        scores = [score(train_student(setting, pool, lr, seed), test) for seed in seeds]
        accuracy, nll = (list(values) for values in zip(*scores, strict=True))
        found.append(Outcome(setting, lr, rates, accuracy, nll))
    if as_json:
        print(json.dumps([{**one._asdict(), "setting": one.setting._asdict()} for one in found]))
    else:
        Console(width=100).print(as_table(found))


def write_chosen(pool: Examples, validation: Examples, seeds: int) -> None:
    """Writes the best rate of every demo arm, beside the validation accuracy of each rate."""
    chosen = {}
    for name, setting in track(list(DEMO_ARMS.items()), "arms", console=Console(stderr=True)):
        rates = validate(setting, pool, validation, seeds)
        lr = max(rates, key=rates.__getitem__)
        accuracy = {f"{rate:g}": round(value, 4) for rate, value in rates.items()}
        chosen[name] = {"lr": lr, "validation_accuracy": accuracy, "seeds": list(range(seeds))}
    CHOSEN.write_text(json.dumps(chosen, indent=1) + "\n")
    print(CHOSEN)


def settings() -> Iterator[Setting]:
    """Yields every setting of the comparison, hard labels first for each N."""
    for rows in ROWS:
        yield Setting(rows)
        yield Setting(rows, smoothing=SMOOTHING)
        for temperature, kd_weight in itertools.product(TEMPERATURES, KD_WEIGHTS):
            yield Setting(rows, kd_weight, temperature)


def read(path: Path, folder: Path) -> Examples:
    """Returns the rows of `path` with the logits of the teacher in `folder`."""
    table = pq.ParquetFile(path).read(["image", "label"]).combine_chunks()
    images = decode({"image": table["image"].chunk(0)})
    teacher = ConvTeacher()
    teacher.load_state_dict(load_file(folder / "teacher.safetensors"))
    teacher.eval()
    with torch.inference_mode():
        logits = torch.cat([teacher(batch) for batch in torch.split(images, 500)])
    return Examples(images, torch.tensor(table["label"].to_pylist()), logits.clone())


def validate(
    setting: Setting, pool: Examples, validation: Examples, seeds: int
) -> dict[float, float]:
    """Returns the mean validation accuracy over seeds 0 … seeds - 1 by learning rate."""
    rates = {}
    for lr in LEARNING_RATES:
        students = (train_student(setting, pool, lr, seed) for seed in range(seeds))
        rates[lr] = sum(score(student, validation)[0] for student in students) / seeds
    return rates


def train_student(setting: Setting, pool: Examples, lr: float, seed: int) -> MLPStudent:
    """Returns a student after STEPS steps of AdamW with a cosine decay to zero."""
    torch.manual_seed(seed)
    student = MLPStudent()
    optimiser = torch.optim.AdamW(student.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for rows in itertools.islice(batches(setting.rows), STEPS):
        loss = distillation_loss(student, pool.take(rows), setting)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
    return student


def batches(rows: int) -> Iterator[torch.Tensor]:
    """Yields positions int64 [BATCH] below `rows` without end, in a new order every epoch."""
    while True:
        yield from torch.split(torch.randperm(rows), BATCH)


def distillation_loss(student: nn.Module, batch: Examples, setting: Setting) -> torch.Tensor:
    """Returns the mean loss of `setting` over the batch, in nats (the soft part times T²)."""
    logits = student(batch.images)
    hard = F.cross_entropy(logits, batch.labels, label_smoothing=setting.smoothing)
    student_logprobs = (logits / setting.temperature).log_softmax(1)
    teacher_logprobs = (batch.teacher / setting.temperature).log_softmax(1)
    soft = F.kl_div(student_logprobs, teacher_logprobs, reduction="batchmean", log_target=True)
    scale = setting.kd_weight * setting.temperature**2
    return scale * soft + (1 - setting.kd_weight) * hard


@torch.inference_mode()
def score(student: nn.Module, examples: Examples) -> tuple[float, float]:
    """Returns accuracy and NLL (nats, against the hard labels) at temperature 1."""
    logits = student(examples.images)
    accuracy = (logits.argmax(1) == examples.labels).float().mean().item()
    return accuracy, F.cross_entropy(logits, examples.labels).item()


def as_table(outcomes: list[Outcome]) -> Table:
    """Returns the comparison for a terminal: mean ± standard deviation over the test seeds."""
    headings = ("N", "labels", "lr", "val acc", "test acc", "gain, points", "test NLL")
    table = Table(*headings)
    hard = {one.setting.rows: one for one in outcomes if one.setting == Setting(one.setting.rows)}
    for one in outcomes:
        accuracy, baseline = _mean(one.test_accuracy), _mean(hard[one.setting.rows].test_accuracy)
        table.add_row(
            f"{one.setting.rows}",
            one.setting.name,
            f"{one.lr:g}",
            f"{one.validation_accuracy[one.lr]:.4f}",
            f"{accuracy:.4f} ± {torch.tensor(one.test_accuracy).std(correction=0):.4f}",
            f"{100 * (accuracy - baseline):+.2f}",
            f"{_mean(one.test_nll):.3f}",
        )
    return table


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    typer.run(main)

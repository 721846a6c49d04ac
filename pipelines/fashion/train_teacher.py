"""Trains the Fashion-MNIST teacher on images that are not committed.

    python -m pipelines.fashion.train_teacher

Reads the original training split (60,000 images), leaves out the 15,000 of
`data/fashion/train.parquet`, trains on 40,000 of the rest and keeps 5,000 for choosing the epoch
and the calibration temperature. The chosen temperature is folded into the last layer, so the
stored logits are calibrated at temperature 1. Writes `teacher.safetensors` and `teacher.json`.
"""

import json
import platform
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from pipelines.fashion import make_data
from pipelines.fashion.inputs import MEAN, PIXELS, SIDE, STD, decode
from pipelines.fashion.teacher import ConvTeacher

VALIDATION_ROWS = 5_000
BATCH = 128
LR = 4e-3
WEIGHT_DECAY = 0.05
SHIFT = 2  # pixels
ECE_BINS = 15
BACKGROUND = -MEAN / STD  # a black pixel after normalisation


class Examples(NamedTuple):
    """Decoded images float32 [N, 1, 28, 28] and their labels int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor


def main(
    source: Annotated[
        Path, typer.Option(help="Folder of the four idx.gz files.")
    ] = make_data.SOURCE,
    folder: Annotated[
        Path, typer.Option(help="Folder of train.parquet; the weights go here.")
    ] = make_data.FOLDER,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the 40,000 images.")] = 16,
    seed: Annotated[int, typer.Option(help="Seeds weights, order and augmentation.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; part of the result.")] = 2,
) -> None:
    """Trains, calibrates, evaluates and writes the teacher."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    parts = load_parts(source, folder)
    started, started_cpu = time.perf_counter(), time.process_time()
    model, epoch = fit(parts["train"], parts["validation"], epochs)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    raw = {name: logits(model, part.images) for name, part in parts.items()}
    temperature = best_temperature(raw["validation"], parts["validation"].labels)
    uncalibrated = measure(raw["test"], parts["test"].labels)
    with torch.no_grad():
        model.classify.weight.div_(temperature)
        model.classify.bias.div_(temperature)
    record = {
        "model": "pipelines.fashion.teacher.ConvTeacher",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_on": "Fashion-MNIST training split without the rows of train.parquet",
        "rows": {name: len(part.labels) for name, part in parts.items()},
        "seeds": {"training": seed, "split": make_data.SEED},
        "epochs": epochs,
        "steps": epochs * -(-len(parts["train"].labels) // BATCH),
        "chosen_epoch": epoch,
        "batch": BATCH,
        "optimiser": f"AdamW, one cycle, peak lr {LR}, weight decay {WEIGHT_DECAY}",
        "augmentation": f"horizontal flip, shift by up to {SHIFT} pixels",
        "calibration_temperature": temperature,
        "metrics": {
            name: measure(raw[name] / temperature, part.labels) for name, part in parts.items()
        },
        "test_before_calibration": uncalibrated,
        "ece_bins": ECE_BINS,
        "train_seconds": round(seconds),
        "train_cpu_seconds": round(cpu_seconds),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(save(model, record, folder))


def load_parts(source: Path, folder: Path) -> dict[str, Examples]:
    """Returns the parts train (40,000), validation (5,000) and test (10,000).

    Raises:
        ValueError: A row or an image of `folder`/train.parquet is among the teacher's rows, or an
            image occurs twice anywhere.
    """
    images, labels = make_data.read_split(source, "train")
    test_images, test_labels = make_data.read_split(source, "test")
    committed = pq.ParquetFile(folder / "train.parquet").read(["example_id", "image"])
    rest = make_data.shuffled_indices(len(images))[make_data.TRAIN_ROWS :]
    shared = set(committed["example_id"].to_pylist()) & {f"train-{row:05d}" for row in rest}
    if shared:
        raise ValueError(f"expected no committed row among the teacher's, found {len(shared)!r}")
    pixels = np.frombuffer(b"".join(committed["image"].to_pylist()), np.uint8)
    make_data.refuse_shared_images(pixels.reshape(-1, PIXELS), images[rest], test_images)
    validation, train = rest[:VALIDATION_ROWS], rest[VALIDATION_ROWS:]
    return {
        "train": _examples(images[train], labels[train]),
        "validation": _examples(images[validation], labels[validation]),
        "test": _examples(test_images, test_labels),
    }


def _examples(images: make_data.Images, labels: make_data.Labels) -> Examples:
    """Returns uint8 [N, 784] and int32 [N] as the tensors that the models see."""
    column = pa.array([row.tobytes() for row in images], pa.binary())
    return Examples(decode({"image": column}), torch.from_numpy(labels.astype(np.int64)))


def fit(
    train: Examples,
    validation: Examples,
    epochs: int,
    widths: tuple[int, int, int, int] | None = None,
) -> tuple[ConvTeacher, int]:
    """Returns the teacher of the epoch with the lowest validation NLL, and that epoch (from 1).

    `widths` are the model's channels; None: its own.

    Cross-entropy on hard labels without label smoothing: smoothing erases the differences between
    wrong classes, which are what a student learns from.
    Source: Müller, Kornblith, Hinton, When Does Label Smoothing Help?, NeurIPS 2019.
    """
    model = ConvTeacher() if widths is None else ConvTeacher(widths)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    steps = -(-len(train.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LR, total_steps=epochs * steps)
    best_nll, best_epoch, best_state = float("inf"), 0, model.state_dict()
    with _progress() as progress:
        task = progress.add_task("teacher", total=epochs * steps, note="")
        for epoch in range(1, epochs + 1):
            model.train()
            for rows in torch.split(torch.randperm(len(train.labels)), BATCH):
                loss = F.cross_entropy(model(augment(train.images[rows])), train.labels[rows])
                optimiser.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimiser.step()
                schedule.step()
                progress.advance(task)
            found = measure(logits(model, validation.images), validation.labels)
            if found["nll"] < best_nll:
                best_nll, best_epoch = found["nll"], epoch
                best_state = {key: value.clone() for key, value in model.state_dict().items()}
            note = f"epoch {epoch}  val acc {found['accuracy']:.4f}  nll {found['nll']:.4f}"
            progress.update(task, note=note)
    model.load_state_dict(best_state)
    return model, best_epoch


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


def augment(images: torch.Tensor) -> torch.Tensor:
    """Returns the images shifted by up to SHIFT pixels each way and, half of them, mirrored.

    Args:
        images: Normalised, float32 [B, 1, 28, 28]; the result has the same shape. B: images.
    """
    batch = len(images)
    padded = F.pad(images[:, 0], (SHIFT,) * 4, value=BACKGROUND)
    window = torch.arange(SIDE)
    rows = window + torch.randint(0, 2 * SHIFT + 1, (batch, 1))
    columns = window + torch.randint(0, 2 * SHIFT + 1, (batch, 1))
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    example = torch.arange(batch)[:, None, None]
    return padded[example, rows[:, :, None], columns[:, None, :]][:, None]


@torch.inference_mode()
def logits(model: ConvTeacher, images: torch.Tensor) -> torch.Tensor:
    """Returns float32 [N, 10] logits of the model in evaluation mode. N: images."""
    model.eval()
    return torch.cat([model(batch) for batch in torch.split(images, 500)])


def best_temperature(values: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the temperature in 0.50, 0.51, … 3.00 with the lowest NLL of `values` / T.

    Args:
        values: Logits [N, 10].
        labels: int64 [N].

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    grid = [round(0.5 + step / 100, 2) for step in range(251)]
    return min(grid, key=lambda candidate: F.cross_entropy(values / candidate, labels).item())


def measure(values: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Returns accuracy, nll (nats), ece and mean entropy (nats) of softmax(values).

    Args:
        values: Logits [N, 10].
        labels: int64 [N].

    ece is the expected calibration error of the top-1 probability in ECE_BINS equal bins.
    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    logprobs = values.double().log_softmax(1)
    confidence, top1 = logprobs.exp().max(1)
    right = (top1 == labels).double()
    bins = (confidence * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, dtype=torch.double).index_add(0, bins, right - confidence)
    figures = {
        "accuracy": right.mean(),
        "nll": F.nll_loss(logprobs, labels),
        "ece": gaps.abs().sum() / len(labels),
        "entropy": -(logprobs.exp() * logprobs).sum(1).mean(),
    }
    return {name: round(figure.item(), 5) for name, figure in figures.items()}


def save(model: ConvTeacher, record: dict[str, object], folder: Path, name: str = "teacher") -> str:
    """Returns the last line for the terminal, after writing weights and record into `folder`.

    All metadata is one JSON string under one key: safetensors does not fix the order of keys.
    """
    weights = folder / f"{name}.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    lineage = {key: record[key] for key in ("model", "trained_on", "seeds", "torch")}
    save_file(tensors, weights, {"lineage": json.dumps(lineage, sort_keys=True)})
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return f"{weights}: {record['parameters']} parameters, {weights.stat().st_size} bytes"


if __name__ == "__main__":
    typer.run(main)

"""What softlabels costs over doing without it, as ratios in one run. `make bench` runs it.

    python -m pipelines.fashion.bench

Each line times two ways of the same work in turns (A B A B …) and takes the median of the ratios,
pair by pair, so a machine that slows down in between slows both. The table goes into README.md.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

from pipelines.fashion.inputs import decode
from pipelines.fashion.student import MLPStudent
from pipelines.readme import put, require_place
from softlabels.plan import Plan
from softlabels.query.mix import Recipe, mix
from softlabels.query.recipe import Source
from softlabels.student.batch import to_torch
from softlabels.student.losses import distillation_loss
from softlabels.student.stream import Batch, Stream
from softlabels.student.trainer import RunSpec, train
from softlabels.teacher.capture import CaptureSpec, capture
from softlabels.teacher.models import load_teacher

THREADS = 1
PAIRS = 7
ROWS = 10_000

Work = Callable[[], Any]


class Line(NamedTuple):
    """One comparison: ours over the baseline, the median of `ratios`."""

    what: str
    baseline: str
    ratios: list[float]


def main() -> None:
    """Measures, prints the table and puts it into README.md."""
    require_place("bench")
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        spec = CaptureSpec.read("pipelines/fashion/capture-test.yaml")
        spec = spec.model_copy(update={"table": f"{folder}/labels"})
        capture(spec)
        plan = mix(Recipe(sources={"all": Source(table=spec.table)}))
        plan.write(f"{folder}/plan.parquet")
        found = [
            Line(what, baseline, ratios(ours, theirs, what))
            for what, baseline, ours, theirs in comparisons(spec, plan, folder)
        ]
    table = as_markdown(found)
    print(table, end="")
    put("bench", table)


def comparisons(
    spec: CaptureSpec, plan: Plan, folder: str
) -> Iterator[tuple[str, str, Work, Work]]:
    """Yields what is compared: its name, the baseline's, ours, the baseline."""
    fresh = (f"{folder}/capture-{number}" for number in range(1_000))
    teacher = load_teacher(spec).module
    yield (
        "capture of 10,000 images",
        "the teacher's forward pass on the same images",
        lambda: capture(spec.model_copy(update={"table": next(fresh)})),
        lambda: forward(teacher, spec.source.files, spec.batch_size),
    )
    outs = (f"{folder}/run-{number}" for number in range(1_000))
    settings = RunSpec.read("pipelines/fashion/train.yaml").model_copy(
        update={"plan": f"{folder}/plan.parquet", "evaluate": None, "steps": 300}
    )
    hard = settings.loss.model_copy(update={"kd_weight": 0.0, "temperature": 1.0})
    soft = hard.model_copy(update={"kd_weight": 1.0})
    yield (
        "300 steps on soft labels",
        "300 steps on hard labels, same trainer",
        lambda: train(settings.model_copy(update={"loss": soft, "out": next(outs)})),
        lambda: train(settings.model_copy(update={"loss": hard, "out": next(outs)})),
    )
    batches = list(Stream(plan, batch_size=1_000, epochs=1, columns=["image"]))
    student = MLPStudent()
    yield (
        "forward, soft loss, backward",
        "forward, `F.cross_entropy`, backward",
        lambda: steps(student, batches, soft_loss),
        lambda: steps(student, batches, hard_loss),
    )
    files = [f"{folder}/labels/{file.path}" for file in plan.tables["all"].files]
    yield (
        "an epoch of shuffled, verified batches",
        "pyarrow decoding of the same columns",
        lambda: sum(len(batch) for batch in Stream(plan, batch_size=1_000, epochs=1)),
        lambda: [pq.read_table(file, columns=_COLUMNS) for file in files],
    )


_COLUMNS = ["example_id", "num_positions", "topk_ids", "topk_logprobs", "tail_logprob"]
_COLUMNS += ["position_entropy", "label_ids", "label_logprobs", "label_ranks"]


def ratios(ours: Work, baseline: Work, what: str) -> list[float]:
    """Time of ours over the baseline's in each of PAIRS turns, after one that does not count."""
    found = []
    for turn in track(range(PAIRS + 1), what, console=Console(stderr=True)):
        first, second = seconds(ours), seconds(baseline)
        if turn:
            found.append(first / second)
    return found


def seconds(work: Work) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.inference_mode()
def forward(teacher: torch.nn.Module, file: str, batch_size: int) -> None:
    """Reads, decodes and classifies the images, and keeps nothing."""
    images = pq.read_table(file, columns=["image"])["image"].combine_chunks()
    images = images.chunk(0) if isinstance(images, pa.ChunkedArray) else images
    for start in range(0, len(images), batch_size):
        teacher(decode({"image": images.slice(start, batch_size)}))


def steps(
    student: MLPStudent,
    batches: list[Batch],
    loss: Callable[[torch.Tensor, Batch], torch.Tensor],
) -> None:
    """Gradients of every batch."""
    for batch in batches:
        student.zero_grad()
        torch.autograd.backward(loss(student(decode(batch.columns)), batch))


def soft_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """KL to the stored labels, as the trainer computes it after the first epoch."""
    inputs = to_torch(batch)
    return distillation_loss(logits, inputs.targets, weights=inputs.weights, validate=False).loss


def hard_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Cross-entropy with the hard labels."""
    assert batch.targets.label_ids is not None
    return F.cross_entropy(logits, torch.from_numpy(batch.targets.label_ids).long())


def as_markdown(lines: list[Line]) -> str:
    """The table, with least and greatest ratio beside the median."""
    text = "| softlabels | baseline | time ratio (range) |\n|---|---|---|\n"
    for line in lines:
        median = statistics.median(line.ratios)
        spread = f"{min(line.ratios):.2f}–{max(line.ratios):.2f}"
        text += f"| {line.what} | {line.baseline} | {median:.2f} ({spread}) |\n"
    versions = f"torch {torch.__version__.split('+')[0]}, pyarrow {pa.__version__}"
    return text + f"\nMedians of {PAIRS} alternated pairs, {THREADS} torch thread, {versions}.\n"


if __name__ == "__main__":
    main()

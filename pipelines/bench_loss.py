"""What soft targets cost a language model's head: time and memory of losses, side by side.

    python -m pipelines.bench_loss

Each loss goes forward and back through a linear head, to the gradients of hidden states and
weight. All take turns (A B C … A B C …); a ratio is the median over turns, so a machine that slows
down slows all. Memory is what a process of its own needs beyond inputs and gradients, at its
peak. The table goes into README.md.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pipelines.readme import put, require_place
from softlabels.student.fused import linear_distillation_loss
from softlabels.student.losses import TailMode, Targets, check_targets

THREADS = 2
TURNS = 7
ROWS, WIDTH, STORED = 1_024, 512, 32
CLASSES = (32_768, 131_072)
TAIL_MASS = 0.15


class Problem(NamedTuple):
    """A head and a batch for it.

    Attributes:
        hidden: float32 [N, D].
        weight: float32 [V, D].
        labels: int64 [N].
        ids: int64 [N, 32], distinct.
        dense: float32 [N, V], a teacher's whole distributions; None where nobody asks.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ids: Tensor
    dense: Tensor | None

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients of hidden states and weight."""
        return self.hidden.nbytes + self.weight.nbytes


def problem(rows: int, width: int, classes: int, dense: bool) -> Problem:
    """Random inputs, made in place so that they leave no peak behind."""
    torch.manual_seed(0)
    hidden = torch.empty(rows, width).normal_().requires_grad_()
    weight = torch.empty(classes, width).normal_(std=width**-0.5).requires_grad_()
    labels = torch.randint(0, classes, (rows,))
    apart = torch.arange(STORED) * (classes // STORED)
    ids = (torch.randint(0, classes, (rows, 1)) + apart) % classes
    whole = None
    if dense:
        whole = torch.empty(rows, classes).normal_(std=3)
        torch.softmax(whole, 1, out=whole)
    return Problem(hidden, weight, labels, ids, whole)


def targets(of: Problem, draws: int) -> Targets:
    """32 stored ids a row, the last of them `draws` from the tail."""
    k = STORED - draws
    logprobs = torch.log_softmax(-torch.arange(k) / 4.0, 0) + torch.tensor(1 - TAIL_MASS).log()
    tail = torch.full((len(of.ids),), TAIL_MASS).log()
    drawn = of.ids[:, k:] if draws else None
    found = Targets(of.ids[:, :k], logprobs.expand(len(of.ids), k), tail, drawn)
    check_targets(found, len(of.weight))
    return found


def soft(tail: TailMode, draws: int = 0) -> Callable[[Problem], Callable[[], Tensor]]:
    """The fused loss on stored targets, which were checked before, as a stream's are."""

    def prepare(of: Problem) -> Callable[[], Tensor]:
        stored = targets(of, draws)
        return lambda: (
            linear_distillation_loss(of.hidden, of.weight, stored, tail=tail, validate=False).loss
        )

    return prepare


def hard(of: Problem) -> Callable[[], Tensor]:
    """The fused loss on hard labels."""
    return lambda: (
        linear_distillation_loss(
            of.hidden, of.weight, None, kd_weight=0.0, labels=of.labels, validate=False
        ).loss
    )


def cross_entropy(of: Problem) -> Callable[[], Tensor]:
    """torch's cross-entropy on logits [N, V]."""
    return lambda: F.cross_entropy(of.hidden @ of.weight.T, of.labels)


def dense_kl(of: Problem) -> Callable[[], Tensor]:
    """torch's KL to whole distributions [N, V], on logits [N, V]."""
    assert of.dense is not None
    dense = of.dense
    return lambda: F.kl_div(
        torch.log_softmax(of.hidden @ of.weight.T, 1), dense, reduction="batchmean"
    )


FUSED_HARD, PLAIN = "fused, hard labels", "`F.cross_entropy` on all logits"
DENSE = "`F.kl_div` on all logits"
LOSSES: dict[str, Callable[[Problem], Callable[[], Tensor]]] = {
    "fused, `bucket`, k = 32": soft("bucket"),
    "fused, `sampled`, k = 16 and 16 draws": soft("sampled", 16),
    "fused, `renormalize`, k = 32": soft("renormalize"),
    FUSED_HARD: hard,
    PLAIN: cross_entropy,
    DENSE: dense_kl,
}


class Line(NamedTuple):
    """What one loss costs on one size: seconds of each turn, and bytes beyond its gradients."""

    classes: int
    loss: str
    cpu: list[float]
    wall: list[float]
    extra: int


def main() -> None:
    """Measures, prints the table and puts it into README.md; or one loss's memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", nargs=4, metavar=("LOSS", "ROWS", "WIDTH", "CLASSES"))
    asked = parser.parse_args().memory
    torch.set_num_threads(THREADS)
    if asked:
        print(peak(asked[0], *map(int, asked[1:])))
        return
    require_place("bench-loss")
    table = as_markdown([line for v in CLASSES for line in measure(ROWS, WIDTH, v)])
    print(table, end="")
    put("bench-loss", table)


def measure(rows: int, width: int, classes: int, turns: int = TURNS) -> list[Line]:
    """Time of every loss in turns, after one that does not count, and its memory."""
    extra = {name: memory(name, rows, width, classes) for name in LOSSES}
    given = problem(rows, width, classes, dense=True)
    works = {name: prepare(given) for name, prepare in LOSSES.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}
    for _ in track(range(turns + 1), f"V = {classes:,}", console=Console(stderr=True)):
        for name, work in works.items():
            seconds[name].append(timed(given, work))
    return [
        Line(classes, name, [c for c, _ in took[1:]], [w for _, w in took[1:]], extra[name])
        for name, took in seconds.items()
    ]


def timed(given: Problem, work: Callable[[], Tensor]) -> tuple[float, float]:
    """Processor and wall seconds of one loss, forward and back."""
    cpu, wall = time.process_time(), time.perf_counter()
    torch.autograd.backward(work())
    took = time.process_time() - cpu, time.perf_counter() - wall
    given.hidden.grad = given.weight.grad = None
    return took


def memory(loss: str, rows: int, width: int, classes: int) -> int:
    """`peak` in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "pipelines.bench_loss", "--memory", loss]
    command += [str(rows), str(width), str(classes)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak(loss: str, rows: int, width: int, classes: int) -> int:
    """Bytes that one forward and backward needs beyond inputs and gradients. On Linux."""
    dense = loss == DENSE
    # What libraries set up once.
    torch.autograd.backward(LOSSES[loss](problem(64, width, 1_000, dense))())
    given = problem(rows, width, classes, dense)
    work = LOSSES[loss](given)
    # getrusage would not do: a process inherits the peak of the one that started it.
    Path("/proc/self/clear_refs").write_text("5")
    before = _highest()
    torch.autograd.backward(work())
    return _highest() - before - given.gradient_bytes


def _highest() -> int:
    """Bytes of memory that this process has had at most since its mark was last set back."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def as_markdown(lines: list[Line]) -> str:
    """The table: ratios of processor time, with least and greatest, of wall time, and MiB."""
    text = (
        f"| V | loss, forward and back | time / {FUSED_HARD} | time / {PLAIN} "
        "| the same, wall clock | extra memory |\n|---|---|---|---|---|---|\n"
    )
    for line in lines:
        of = {other.loss: other for other in lines if other.classes == line.classes}
        columns = [
            f"{line.classes:,}",
            line.loss,
            ratio(line.cpu, of[FUSED_HARD].cpu),
            ratio(line.cpu, of[PLAIN].cpu),
            ratio(line.wall, of[PLAIN].wall),
            f"{line.extra / 2**20:.0f} MiB",
        ]
        text += f"| {' | '.join(columns)} |\n"
    version = torch.__version__.split("+")[0]
    return text + (
        f"\nN = {ROWS:,} positions, D = {WIDTH}, float32; medians (range) of {TURNS} turns, "
        f"processor time unless said, {THREADS} torch threads, torch {version}. Extra: peak "
        "beyond inputs and gradients.\n"
    )


def ratio(ours: list[float], theirs: list[float]) -> str:
    """The median of the ratios turn by turn, with least and greatest."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    if ours == theirs:
        return "1"
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


if __name__ == "__main__":
    main()

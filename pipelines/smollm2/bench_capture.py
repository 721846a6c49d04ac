"""What a capture costs over the teacher's bare forward pass, and that its memory does not grow.

    python -m pipelines.smollm2.bench_capture [--threads 2] [--pairs 5] [--memory-length 128]

Each turn runs the teacher alone, `model(input_ids).logits` and nothing else, then the same tokens
through all that a capture does (head in chunks, top k, tail, entropy, label's rank, draws,
rounding, a Parquet shard), with draws and without. Ratios are taken turn by turn, of wall and of
processor time: on a shared machine only the second tells. Memory is the peak of a process that
captures 64 sequences, and of one that captures 512. The table goes into README.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import track

from pipelines.readme import put, require_place
from pipelines.smollm2.teacher import NAME, teacher_folder
from softlabels.teacher.causal import quiet_transformers
from softlabels.teacher.labeller import Labeller
from softlabels.teacher.run import Unit, prepare
from softlabels.teacher.spec import SequenceCaptureSpec

TEXT = "data/lm/train.parquet"
LENGTH = 512
ROWS = 2
"""Sequences a turn; all in one forward pass."""


class Times(NamedTuple):
    """Seconds of one call."""

    wall: float
    processor: float


def main() -> None:
    """Measures, prints the table and puts it into README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--pairs", type=int, default=5, help="turns that count")
    parser.add_argument("--memory-length", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.peak_of is not None:
        print(json.dumps(peak_of(asked.peak_of, asked.memory_length)))
        return
    require_place("bench-lm-capture")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(folder, asked.pairs)
    peaks = {count: in_a_process(count, asked) for count in (64, 512)}
    table = as_markdown(found, peaks, asked)
    print(table, end="")
    put("bench-lm-capture", table)


def spec_of(folder: str, length: int, draws: int, batch_tokens: int) -> SequenceCaptureSpec:
    """A capture of the committed text by the teacher; k is 16."""
    return SequenceCaptureSpec.model_validate(
        {
            "table": f"{folder}/labels",
            "teacher": {"name": NAME, "model": str(teacher_folder())},
            "source": {"files": TEXT, "text": "text", "length": length, "isolate": False},
            "draws": draws,
            "batch_tokens": batch_tokens,
        }
    )


def measure(folder: str, pairs: int) -> dict[int, list[tuple[Times, Times]]]:
    """For 0 and 16 draws: times of (capture, bare forward) in each turn after one that warms."""
    works = {draws: capture_work(folder, draws) for draws in (0, 16)}
    bare = bare_work(folder)
    found: dict[int, list[tuple[Times, Times]]] = {draws: [] for draws in works}
    for turn in track(range(pairs + 1), "capture", console=Console(stderr=True)):
        for draws, work in works.items():
            first, second = time_of(bare), time_of(work)
            if turn:
                found[draws].append((second, first))
    return found


def capture_work(folder: str, draws: int) -> Callable[[], Any]:
    """Labels the first rows into a shard in memory."""
    run, annotator = prepare(spec_of(folder, LENGTH, draws, ROWS * LENGTH))
    labeller = Labeller(run, annotator)
    unit = Unit("bench", "", 0, ROWS)

    def work() -> None:
        writer = labeller.writer(unit)
        for batch in labeller.label(unit, np.ones(ROWS, bool)):
            writer.write(batch)
        writer.close()

    return work


def bare_work(folder: str) -> Callable[[], Any]:
    """The same rows through the model, all logits of all tokens at once."""
    from transformers import AutoModelForCausalLM

    run, _ = prepare(spec_of(folder, LENGTH, 0, ROWS * LENGTH))
    rows = pa.Table.from_batches(run.source.batches(0, ROWS, ["input_ids"])).to_pydict()
    tokens = torch.tensor(rows["input_ids"])
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(teacher_folder(), dtype=torch.float32)
    model.eval()

    @torch.inference_mode()
    def work() -> Any:
        return model(tokens, use_cache=False).logits

    return work


def time_of(work: Callable[[], Any]) -> Times:
    """Wall and processor time of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Times(time.perf_counter() - wall, time.process_time() - processor)


def peak_of(sequences: int, length: int) -> dict[str, float]:
    """Captures so many sequences in this process; the largest memory that it ever held, MB."""
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(folder, length, 16, 1024).model_copy(update={"shard_rows": 64})
        whole, annotator = prepare(spec)
        if whole.source.num_rows < sequences:
            raise SystemExit(f"{TEXT} has {whole.source.num_rows} sequences of {length} tokens")
        labeller = Labeller(whole, annotator)
        for start in range(0, sequences, 64):  # as capture does, without the rest of the text
            unit = Unit("bench", "", start, start + 64)
            writer = labeller.writer(unit)
            for batch in labeller.label(unit, np.ones(64, bool)):
                writer.write(batch)
            writer.close()
    # Not getrusage: a process inherits the peak of the one that started it.
    status = Path("/proc/self/status").read_text()
    return {"megabytes": int(status.partition("VmHWM:")[2].split()[0]) / 1024}


def in_a_process(sequences: int, asked: argparse.Namespace) -> float:
    """`peak_of` in a fresh interpreter, MB."""
    command = [sys.executable, "-m", "pipelines.smollm2.bench_capture"]
    command += ["--peak-of", str(sequences), "--memory-length", str(asked.memory_length)]
    command += ["--threads", str(asked.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["megabytes"])


def as_markdown(
    found: dict[int, list[tuple[Times, Times]]],
    peaks: dict[int, float],
    asked: argparse.Namespace,
) -> str:
    """The table, with least and greatest ratio beside the median."""
    text = "| capture by SmolLM2-135M, k = 16 | wall time over the bare forward (range) "
    text += "| processor time (range) |\n|---|---|---|\n"
    for draws, pairs in found.items():
        name = f"with {draws} draws" if draws else "without draws"
        wall = spread([ours.wall / bare.wall for ours, bare in pairs])
        processor = spread([ours.processor / bare.processor for ours, bare in pairs])
        text += f"| {name}, with label rank | {wall} | {processor} |\n"
    text += f"\nMedians of {asked.pairs} alternated pairs of {ROWS} sequences of {LENGTH} tokens, "
    text += f"{asked.threads} torch threads, torch {torch.__version__.split('+')[0]}. "
    text += f"Peak memory over 64 sequences of {asked.memory_length} tokens {peaks[64]:,.0f} MB, "
    return text + f"over 512 {peaks[512]:,.0f} MB, the model's 513 MB among them.\n"


def spread(ratios: list[float]) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


if __name__ == "__main__":
    main()

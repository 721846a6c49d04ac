"""Several stored language models at once, against their dense average computed live.

    python -m pipelines.smollm2.ensemble  # after make demo-lm: its students teach here

SmolLM2-135M and two students of the demo label held-out pages: the top 16 and 16 draws each. The
gradient that an ensemble plan gives is compared with that of the average of the three softmaxes
over the whole vocabulary, computed live. The line goes into README.md.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from pipelines.readme import put, require_place
from pipelines.smollm2.demo import FULL, load_student
from pipelines.smollm2.teacher import FOLDER, teacher_folder
from softlabels.errors import BadInputError
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.student.batch import targets_at
from softlabels.student.causal import LanguageModel
from softlabels.student.losses import TailMode, distillation_loss
from softlabels.student.pretrained import build_language_model
from softlabels.student.sequences import COLUMNS
from softlabels.student.spec import LanguageModelSpec
from softlabels.student.stream import Batch, Stream
from softlabels.teacher.capture import capture
from softlabels.teacher.spec import read_capture

HERE = Path("pipelines/smollm2")
OUT = Path("out/ensemble-lm")
RUNS = FULL.out / "runs"
TEACHERS = {"large": FOLDER, "hard": RUNS / "hard-seed0", "sampled": RUNS / "sampled-seed0"}
STUDENT = RUNS / "bucket-seed0"
GROUPS = (("large", "hard"), ("large", "hard", "sampled"))
ROWS = 16
TAILS: tuple[TailMode, ...] = ("sampled", "bucket")


class Off:
    """Sums of how far gradients are from the exact ones, over positions."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | float = 0.0
        self._squares = 0.0

    def add(self, off: Tensor) -> None:
        """More positions, float64 [N, V]."""
        self._count += len(off)
        self._sum = self._sum + off.sum(0)
        self._squares += float(off.pow(2).sum())

    def relative(self, scale: float) -> dict[str, float]:
        """Norm of the mean over `scale`, and what the spread between positions alone gives."""
        mean = torch.as_tensor(self._sum) / self._count
        spread = max(self._squares / self._count - float(mean.pow(2).sum()), 0.0) / self._count
        return {"bias": float(mean.norm()) / scale, "expected": spread**0.5 / scale}


def main() -> None:
    """Labels, compares, writes the line."""
    require_place("ensemble-lm")
    torch.set_num_threads(2)
    teacher_folder()
    if not all((folder / "config.json").exists() for folder in (*TEACHERS.values(), STUDENT)):
        raise BadInputError(f"there are no students in {RUNS}: run make demo-lm first")
    for name, folder in TEACHERS.items():
        changes = (
            f"table={OUT}/labels-{name}",
            f"teacher.name={name}",
            f"teacher.model={folder}",
            f"teacher.tokenizer={FOLDER}",
            f"source.files={FULL.out}/text/heldout.parquet",
        )
        capture(read_capture(f"{HERE}/capture-sampled.yaml", changes))
    summary = {" + ".join(group): compare(group) for group in GROUPS}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2))
    text = as_text(summary)
    print(text, end="")
    put("ensemble-lm", text)


def compare(group: Sequence[str]) -> dict[str, Any]:
    """The mean gradient of the logits, by tail, against the dense average's."""
    members = {name: {"table": f"{OUT}/labels-{name}"} for name in group}
    source = {"ensemble": members, "limit": ROWS}
    plan = mix(Recipe.model_validate({"sources": {"text": source}}))
    num_classes = next(iter(plan.tables.values())).contents.num_classes
    models: list[nn.Module] = [
        build_language_model(LanguageModelSpec(checkpoint=str(TEACHERS[name])), "causal_lm").eval()
        for name in group
    ]
    models.append(load_student(STUDENT, num_classes))
    calls = [LanguageModel(model, num_classes, "next") for model in models]
    offs = {tail: Off() for tail in TAILS}
    total: Tensor | float = 0.0
    positions = 0
    stream = Stream(plan, batch_size=1, columns=COLUMNS, shuffle=False, epochs=1)
    for batch in track(stream, " + ".join(group), total=ROWS, console=Console(stderr=True)):
        with torch.no_grad():
            outputs = [call(batch) for call in calls]
        for parts in zip(*(output.chunks() for output in outputs), strict=True):
            here, (*said, logits) = parts[0][0], [part.double() for _, part in parts]
            average = sum(one.softmax(1) for one in said) / len(said)
            exact = logits.softmax(1) - average
            total, positions = total + exact.sum(0), positions + len(exact)
            for tail in TAILS:
                offs[tail].add(gradient(batch, here, logits, tail) - exact)
    scale = float((torch.as_tensor(total) / positions).norm())
    found = {str(tail): off.relative(scale) for tail, off in offs.items()}
    return {"positions": positions, **found}


def gradient(batch: Batch, here: slice, logits: Tensor, tail: TailMode) -> Tensor:
    """Of the ensemble's loss, float64 [N, V], at the positions `here` of a batch of one row."""
    assert batch.member_weights is not None
    targets = []
    for number, soft in enumerate([batch.targets, *(one.targets for one in batch.others)]):
        count = len(range(*here.indices(len(soft.ids))))
        part = soft.map_positions(here, torch.ones(count, dtype=torch.int32).numpy())
        weight = torch.full((count,), float(batch.member_weights[0, number]))
        targets.append((targets_at(part, draws=tail == "sampled"), weight))
    given = logits.clone().requires_grad_()
    loss = distillation_loss(given, targets, tail=tail, normalizer=1.0).loss
    (found,) = torch.autograd.grad(loss, given)
    return found


def as_text(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence a group."""
    names = {"large": "SmolLM2-135M", "hard": "a student", "sampled": "another student"}
    lines = [
        f"- {' and '.join(names[name] for name in group.split(' + '))}, {one['positions']:,} "
        f"positions: the mean gradient is off by {one['sampled']['bias']:.2%} of its norm, by "
        f"sampling alone {one['sampled']['expected']:.2%} are expected; bucket is off by "
        f"{one['bucket']['bias']:.1%}.\n"
        for group, one in summary.items()
    ]
    return "".join(lines)


if __name__ == "__main__":
    main()

"""Which stored soft labels come how near to the live teacher. `make bench-lm` runs it.

    python -m pipelines.smollm2.bench [key=value …]

Students of one size learn from hard labels, from the teacher's whole live distribution, and from
what a table of k ids and m draws keeps of it: the same batches, the same start, the same steps.
Settings are in bench.yaml. The same command continues where it was stopped, hours later too;
results come line by line (results.jsonl), and summary.json and pictures follow each of them.
"""

import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.readme import put
from pipelines.smollm2 import students
from pipelines.smollm2.arms import CURVE, MAIN, Arm
from pipelines.smollm2.evaluate import parts_of_labels
from pipelines.smollm2.exact import measure
from pipelines.smollm2.labels import Labels
from pipelines.smollm2.runs import WINDOW, Run
from pipelines.smollm2.summary import as_markdown, summarise
from pipelines.smollm2.teacher import FOLDER, teacher_folder
from pipelines.smollm2.text import pieces
from softlabels.errors import MismatchError
from softlabels.fingerprint import sha256_bytes, sha256_stream
from softlabels.specs import load_spec
from softlabels.storage import open_root
from softlabels.teacher.causal import quiet_transformers

HERE = Path("pipelines/smollm2")
TELL_SECONDS = 60.0
LABELS_VERSION = 1
"""Of how labels are made and kept: another does not go on with what this one left."""
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """What the benchmark runs.

    Attributes:
        out: folder of everything it makes.
        teacher: folder of a causal model and its tokenizer; the default is made when absent.
        student: config of the students.
        rows: training rows.
        epochs: passes over them.
        heldout_rows: rows that students are measured on.
        length: tokens a row.
        batch_rows: rows a step.
        seeds: of start and order.
        points: shares of the way at which students are measured; the last is 1.
        rates: learning rates to choose from.
        rate_rows: training rows of the short run that chooses.
        rate_heldout_rows: rows that it is measured on.
        threads: torch's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Path
    teacher: Path = FOLDER
    student: dict[str, Any] = Field(default_factory=students.settings)
    rows: Count
    epochs: Count
    heldout_rows: Count
    length: Count
    batch_rows: Count
    seeds: tuple[int, ...]
    points: tuple[float, ...]
    rates: tuple[float, ...]
    rate_rows: Count
    rate_heldout_rows: Count
    threads: Count

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        # Otherwise the last rows of a window would never come.
        for name, rows in (("rows", self.rows), ("rate_rows", self.rate_rows)):
            if rows % self.batch_rows or WINDOW % self.batch_rows:
                raise ValueError(
                    f"batch_rows {self.batch_rows} does not divide {name} {rows} and {WINDOW}"
                )
        return self


def main(changes: Sequence[str] = ()) -> None:
    """Trains and measures everything that is not there yet, and writes README's table."""
    settings = load_spec(HERE / "bench.yaml", Settings, changes)
    run(settings)
    put("bench-lm", as_markdown(summarise(settings.out)))


def run(settings: Settings) -> None:
    """The benchmark under these settings."""
    with warnings.catch_warnings():
        # That it is biased is what is measured.
        warnings.filterwarnings("ignore", message="tail 'renormalize'")
        _run(settings)


def _run(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    _same_settings(settings)
    training, heldout = open_labels(settings)
    same_contents(settings, training, heldout)
    progress = Progress()
    rate = choose_rate(settings, training, heldout, progress)
    for arms, seeds in plan(settings):
        runs = [make_run(settings, arm, seed, training, rate) for arm in arms for seed in seeds]
        for point in settings.points:
            advance(settings, runs, point, heldout, progress)
        for one in runs:
            one.close()


def plan(settings: Settings) -> list[tuple[tuple[Arm, ...], tuple[int, ...]]]:
    """What is trained side by side, in order: the question first, the curve after it."""
    return [(MAIN, settings.seeds), *((CURVE, (seed,)) for seed in settings.seeds)]


def open_labels(settings: Settings) -> tuple[Labels, Labels]:
    """The teacher over training and held-out rows; nothing is labelled yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = teacher_folder(settings.teacher)
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found = []
    for split, rows in (("train", settings.rows), ("heldout", settings.heldout_rows)):
        ids = pieces(split, tokenizer, settings.length, rows)  # type: ignore[arg-type]
        found.append(Labels(settings.out / "teacher", split, ids, model))
    return found[0], found[1]


def make_run(
    settings: Settings, arm: Arm, seed: int, labels: Labels, rate: float, short: bool = False
) -> Run:
    """One student; a short one is not saved."""
    return Run(
        arm,
        seed,
        labels,
        student=settings.student,
        rate=rate,
        rows=settings.rate_rows if short else settings.rows,
        epochs=1 if short else settings.epochs,
        batch_rows=settings.batch_rows,
        folder=None if short else settings.out / "runs",
    )


def choose_rate(
    settings: Settings, training: Labels, heldout: Labels, progress: "Progress"
) -> float:
    """The learning rate of every arm: the least sum of held-out losses of hard labels and live.

    Hard labels count by their nll, live by its KL: each by what it minimises.
    """
    path = settings.out / "rate.json"
    tried = json.loads(path.read_text()) if path.exists() else []
    done = {one["rate"] for one in tried}
    for rate in settings.rates:
        if rate in done:
            continue
        models = {}
        for arm in MAIN[:2]:
            one = make_run(settings, arm, 7, training, rate, short=True)
            progress.begin(f"rate {rate} {arm.name}", one.steps)
            one.train_to(one.steps, progress.tell)
            models[arm.name] = one.model
        _, found = measure(parts_of_labels(models, heldout, settings.rate_heldout_rows))
        tried.append({"rate": rate, "rows": settings.rate_rows} | found)
        print(json.dumps(tried[-1]), flush=True)
        open_root(settings.out).write(path.name, json.dumps(tried, indent=2).encode())
    best = min(tried, key=lambda one: one["hard"]["nll"] + one["live"]["kl"])
    return float(best["rate"])


def advance(
    settings: Settings, runs: Sequence[Run], point: float, heldout: Labels, progress: "Progress"
) -> None:
    """Brings all runs to a point of the way and measures them there, if that is not done."""
    path = settings.out / "results.jsonl"
    lines = read_lines(path)
    known = {(line["arm"], line["seed"], line["point"]) for line in lines}
    wanted = [one for one in runs if (one.arm.name, one.seed, point) not in known]
    if not wanted:
        return
    for one in wanted:
        step = max(1, round(point * one.steps))
        progress.begin(f"{one.arm.name} seed {one.seed} to {point}", step - one.step)
        one.train_to(step, progress.tell)
    for one in wanted:
        one.open()
        if one.step != max(1, round(point * one.steps)):
            raise MismatchError(
                f"{one.arm.name} seed {one.seed}: expected it at {point!r} of the way, found step "
                f"{one.step!r} of {one.steps!r} and no result of that point: remove {settings.out}"
            )
    models = {f"{one.arm.name}|{one.seed}": one.model for one in wanted}
    teacher, found = measure(parts_of_labels(models, heldout, settings.heldout_rows))
    with path.open("a") as file:
        for one in wanted:
            line = {"arm": one.arm.name, "seed": one.seed, "point": point, "step": one.step}
            line |= {"positions": one.step * settings.batch_rows * (settings.length - 1)}
            line |= {"train_seconds": one.seconds} | found[f"{one.arm.name}|{one.seed}"]
            file.write(json.dumps(line) + "\n")
    (settings.out / "teacher.json").write_text(json.dumps(teacher))
    summarise(settings.out)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of results so far; one that was cut short by a kill is left out."""
    if not path.exists():
        return []
    whole = path.read_text()
    kept = whole[: whole.rfind("\n") + 1]
    if kept != whole:
        path.write_text(kept)
    return [json.loads(line) for line in kept.splitlines()]


class Progress:
    """Says now and then what is trained and how fast."""

    def begin(self, what: str, steps: int) -> None:
        """A new piece of work, of so many steps."""
        self._what, self._left, self._done = what, steps, 0
        self._began = self._told = time.monotonic()

    def tell(self, positions: int, loss: float) -> None:
        """One step is done."""
        self._done += positions
        self._left -= 1
        now = time.monotonic()
        if now - self._told > TELL_SECONDS or not self._left:
            self._told = now
            speed = self._done / (now - self._began)
            left = self._left * positions / speed
            clock = time.strftime("%H:%M:%S")
            print(
                f"{clock} {self._what}: loss {loss:.3f}, {speed:,.0f} positions/s, "
                f"{self._left} steps and {left:,.0f} s left",
                flush=True,
            )


def same_contents(settings: Settings, *labels: Labels) -> None:
    """Records whose labels this folder's are, or compares them with what was recorded.

    Raises:
        MismatchError: they are of another text, teacher or version, or nobody recorded of which.
    """
    path = settings.out / "contents.json"
    weights = sorted(teacher_folder(settings.teacher).glob("*.safetensors"))
    now = {
        "labels": LABELS_VERSION,
        "tokens": [sha256_bytes(one.rows.numpy().tobytes()) for one in labels],
        "teacher": [sha256_file(file) for file in weights],
    }
    if path.exists() and (before := json.loads(path.read_text())) != now:
        raise MismatchError(
            f"{settings.out}: its labels are of {before!r}, this run's would be of {now!r}: give "
            "another out=FOLDER or remove this one"
        )
    kept = settings.out / "teacher"
    if not path.exists() and any(kept.glob("*.safetensors")):
        raise MismatchError(
            f"there are labels in {kept} without {path.name}, so of a teacher that is not known: "
            f"give another out=FOLDER or remove {settings.out}"
        )
    open_root(settings.out).write(path.name, json.dumps(now, indent=2).encode())


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with open(path, "rb") as stream:
        return sha256_stream(stream)


def _same_settings(settings: Settings) -> None:
    path = settings.out / "settings.json"
    now = settings.model_dump(mode="json", exclude={"threads", "out"})
    if path.exists() and (before := json.loads(path.read_text())) != now:
        changed = [key for key in now if now[key] != before.get(key)]
        raise MismatchError(
            f"{settings.out}: expected the settings it was begun with, found another "
            + ", ".join(f"{key}: {before.get(key)!r} before, {now[key]!r} now" for key in changed)
            + ": give another out=FOLDER or remove this one"
        )
    path.write_text(json.dumps(now, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])

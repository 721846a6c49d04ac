"""The trainer: a student learns from a plan, and any stop goes on as if it had not been.

    spec = RunSpec.read("run.yaml")
    trained = train(spec)                                  # what the spec names
    trained = train(spec, model=MyStudent(), decode=mine)  # or live objects

Started by torchrun it is one of several processes, whose steps are those of one on the whole
batch; each raises what any of them has raised.

Bits repeat on a CPU for the same number of threads and processes: initialisation and dropout draw
from torch's random numbers, seeded by the spec; a `decode` that draws its own numbers is outside
this promise. Another number of processes sums in another order, and drops out other units.
"""

import contextlib
import fcntl
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from softlabels.errors import DataError, SoftLabelsError, TryAgainError
from softlabels.plan import Plan
from softlabels.signals import stop_on_signal
from softlabels.storage import storage_errors
from softlabels.student import checkpoint
from softlabels.student.batch import Decode
from softlabels.student.build import pick_device
from softlabels.student.fit import require_fit
from softlabels.student.group import Group, joined
from softlabels.student.losses import DistillationLoss
from softlabels.student.profile import OPTIMIZER
from softlabels.student.run import CHECKPOINTS, Run
from softlabels.student.saved import read_result, require_same, restore_student
from softlabels.student.sharding import number
from softlabels.student.spec import OptimizerSpec, RunSpec
from softlabels.student.step import Figures, Work, figures, learn, take
from softlabels.student.stream import Batch

__all__ = ["Progress", "RunSpec", "Trained", "learning_rate", "require_fit", "train"]


class Progress(NamedTuple):
    """What a step reports.

    Attributes:
        step: steps done.
        total: steps of the run.
        loss: of the step.
        line: the newest line of metrics.jsonl, empty before the first.
    """

    step: int
    total: int
    loss: float
    line: Mapping[str, Any]


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        student: its safetensors file.
        record: what student.json says: spec, lineage, metrics, evaluation.
        already: whether it was finished before this call.
    """

    student: Path
    record: Mapping[str, Any]
    already: bool


def train(
    spec: RunSpec,
    *,
    model: nn.Module | None = None,
    decode: Decode | None = None,
    report: Report = lambda _: None,
) -> Trained:
    """The finished run of a spec: begun, continued or found done.

    The same call again continues from the newest checkpoint, however the last one ended; after
    the end it only loads the weights into `model`, where one is given.

    Args:
        spec: what to do.
        model: a live student, in place of `spec.student`; trained in place.
        decode: a live function, in place of `spec.inputs.decode`.
        report: called after each step.

    Raises:
        BadInputError: neither spec nor call gives a student or a decode function, a file that
            the spec names is not there.
        MismatchError: plan, student, loss or the run in `out` do not fit each other.
        IntegrityError: the newest checkpoint is damaged.
        DataError: the loss is not finite.
        StorageError: `out` cannot be written.
        TryAgainError: stopped by SIGTERM or SIGINT, another process trains into `out`, data or
            another rank do not answer.
    """
    with joined(pick_device(spec.device)) as group, threads(spec.threads):
        with _alone(Path(spec.out), group), stop_on_signal() as stopped:
            return _train(spec, group, model, decode, report, stopped)


def _train(
    spec: RunSpec,
    group: Group,
    model: nn.Module | None,
    decode: Decode | None,
    report: Report,
    stopped: Callable[[], bool],
) -> Trained:
    out = Path(spec.out)
    plan, evaluation_plan = group.together(lambda: require_fit(spec))
    record = group.first(lambda: read_result(out))
    if record is not None:
        found = group.together(partial(_finished, spec, plan, record, model))
        return Trained(found, record, already=True)
    saved = _newest(spec, plan, group)
    run = group.together(lambda: Run.prepare(spec, plan, evaluation_plan, model, decode, group))
    run.spread()
    run.restore(saved)
    _fit(run, stopped, report)
    student, record = run.finish()
    return Trained(student, record, already=False)


def _finished(
    spec: RunSpec, plan: Plan, record: Mapping[str, Any], model: nn.Module | None
) -> Path:
    require_same(spec, plan, record, f"the run in {spec.out!r}")
    return restore_student(Path(spec.out), record, model)


def _newest(spec: RunSpec, plan: Plan, group: Group) -> checkpoint.Checkpoint | None:
    """The newest checkpoint, which rank 0 alone has to see; None: there is none."""
    found: list[checkpoint.Checkpoint] = []

    def look() -> tuple[str, Mapping[str, Any]] | None:
        folder = Path(spec.out) / CHECKPOINTS
        checkpoint.sweep(folder)
        saved = checkpoint.load_newest(folder)
        if saved is None:
            return None
        require_same(spec, plan, saved.state, f"checkpoint {str(saved.path)!r}")
        found.append(saved)
        return str(saved.path), saved.state

    told = group.first(look)
    if told is None:
        return None
    mine = found[0] if found else None
    student = group.tensors(mine.student if mine else None)
    optimizer = group.tensors(mine.optimizer if mine else None)
    return checkpoint.Checkpoint(Path(told[0]), student, optimizer, told[1])


def learning_rate(spec: OptimizerSpec, step: int, total: int) -> float:
    """The learning rate of step `step` (from 0) of `total`: a rise in a line, then the schedule."""
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, total - spec.warmup_steps)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return spec.lr * left[spec.schedule]


def _fit(run: Run, stopped: Callable[[], bool], report: Report) -> None:
    """Steps until the last, until a signal to any rank, or until data cannot be read."""
    spec, batches = run.spec, iter(run.stream)
    run.model.train()
    run.log.go_on()
    run.clock.clear()
    while True:
        found = step_once(run, _next(run, batches), stopped)
        run.note(found)
        report(Progress(run.step, run.total, found.loss, run.log.last))
        if run.step == run.total:
            return
        if spec.evaluate is not None and run.step % spec.evaluate.every == 0:
            run.evaluate()
        # Alone, a signal that came since the figures counts, too; ranks have to agree.
        stop = found.stop or (run.group.size == 1 and stopped())
        if stop or run.step % spec.checkpoint.every == 0:
            run.save()
        if stop:
            raise _stopped(run)
        run.log.go_on()


def step_once(run: Run, work: Work, stopped: Callable[[], bool]) -> Figures:
    """One step of the optimiser on every rank's rows, and what it came to.

    Raises:
        DataError: loss or gradient is not finite; the step is not taken.
    """
    run.draw_anew()
    parts = learn(run, work)
    found = figures(run, work, parts, stopped())
    _update(run, work.batch, parts, found.loss)
    run.step, run.epoch = run.step + 1, work.batch.epoch
    return found


def _next(run: Run, batches: Iterator[Batch]) -> Work:
    """A step's rows; where they cannot be read all that was learnt is saved first."""
    try:
        return take(run, batches)
    except SoftLabelsError:
        if run.step > run.saved:
            run.save()
        raise


def _stopped(run: Run) -> TryAgainError:
    error = TryAgainError(
        f"stopped by a signal after step {run.step} of {run.total}; nothing is lost, the same "
        f"command goes on from there ({run.spec.out!r})"
    )
    error.told_elsewhere = run.group.rank > 0
    return error


def _update(run: Run, batch: Batch, parts: DistillationLoss, loss: float) -> None:
    """One optimiser step, unless loss or gradient is not finite."""
    with run.clock.part(OPTIMIZER):
        parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        norm = number(
            nn.utils.clip_grad_norm_(parameters, run.spec.optimizer.clip_norm or math.inf)
        )
        if not math.isfinite(loss + norm):
            _refuse(run, batch, parts, loss, norm)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.spec.optimizer, run.step, run.total)
        run.optimizer.step()


def _refuse(run: Run, batch: Batch, parts: DistillationLoss, loss: float, norm: float) -> None:
    """Raises on all ranks; the one that has the rows, if one has, names them."""
    bad = ~torch.isfinite(parts.kl)
    mine = bool(bad.any()) or not math.isfinite(float(parts.loss))

    def refuse() -> None:
        at = torch.where(bad if bad.any() else torch.ones_like(bad))[0].cpu().numpy()
        ends = np.cumsum(batch.targets.num_positions)
        rows = np.unique(np.searchsorted(ends, at, side="right"))[:3].tolist()
        raise DataError(
            f"step {run.step + 1}: loss is {loss!r} and the gradient's norm {norm!r}, expected "
            "finite numbers; first seen in examples "
            f"{[batch.example_ids[row].as_py() for row in rows]!r}; the step was not taken and "
            "earlier checkpoints stay: lower optimizer.lr, or look at these rows"
        )

    someone = run.group.gather([mine]).any()
    run.group.together(refuse if mine or not someone else lambda: None)


@contextlib.contextmanager
def _alone(out: Path, group: Group) -> Iterator[None]:
    """Has rank 0 hold `out`; the lock goes with the process, however that ends."""
    with contextlib.ExitStack() as held:

        def hold() -> None:
            with storage_errors("make", str(out)):
                (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            with storage_errors("write", str(out)):
                file = held.enter_context(open(out / ".lock", "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TryAgainError(f"another process trains into {str(out)!r}") from error

        group.first(hold)
        yield


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Has torch use as many threads; None: as many as it does."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""The trainer: a student learns from a plan, and any stop goes on as if it had not been.

    spec = RunSpec.read("run.yaml")
    trained = train(spec)                                  # what the spec names
    trained = train(spec, model=MyStudent(), decode=mine)  # or live objects

Bits repeat on a CPU for the same number of threads: initialisation and dropout draw from torch's
random numbers, seeded by the spec; a `decode` that draws its own numbers is outside this promise.
"""

import contextlib
import fcntl
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from softlabels.errors import BadInputError, DataError, SoftLabelsError, TryAgainError
from softlabels.signals import stop_on_signal
from softlabels.storage import storage_errors
from softlabels.student import checkpoint
from softlabels.student.batch import Decode, labels_and_weights, tails_known, targets_of
from softlabels.student.fit import require_fit
from softlabels.student.losses import DistillationLoss
from softlabels.student.run import CHECKPOINTS, Run
from softlabels.student.saved import read_result, require_same, restore_student
from softlabels.student.sequences import loss_weights, num_tokens, row_slices
from softlabels.student.spec import OptimizerSpec, RunSpec
from softlabels.student.stream import Batch
from softlabels.targets import Floats

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
            the spec names is not there, or this is one process of several.
        MismatchError: plan, student, loss or the run in `out` do not fit each other.
        IntegrityError: the newest checkpoint is damaged.
        DataError: the loss is not finite.
        StorageError: `out` cannot be written.
        TryAgainError: stopped by SIGTERM or SIGINT, or another process trains into `out`.
    """
    _require_alone()
    out = Path(spec.out)
    with storage_errors("make", spec.out):
        (out / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    with _alone(out), _threads(spec.threads), stop_on_signal() as stopped:
        plan, evaluation_plan = require_fit(spec)
        record = read_result(out)
        if record is not None:
            require_same(spec, plan, record, f"the run in {spec.out!r}")
            student = restore_student(out, record, model)
            return Trained(student, record, already=True)
        checkpoint.sweep(out / CHECKPOINTS)
        saved = checkpoint.load_newest(out / CHECKPOINTS)
        if saved is not None:
            require_same(spec, plan, saved.state, f"checkpoint {str(saved.path)!r}")
        run = Run.prepare(spec, plan, evaluation_plan, model, decode)
        run.restore(saved)
        _fit(run, stopped, report)
        student, record = run.finish()
        return Trained(student, record, already=False)


def _require_alone() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            raise BadInputError(
                f"train: expected one process, found a process group of {ranks}: train in one, or "
                "write the loop yourself with Stream(rank=…), ranks.sum_over_ranks and the losses"
            )


def learning_rate(spec: OptimizerSpec, step: int, total: int) -> float:
    """The learning rate of step `step` (from 0) of `total`: a rise in a line, then the schedule."""
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, total - spec.warmup_steps)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return spec.lr * left[spec.schedule]


def _fit(run: Run, stopped: Callable[[], bool], report: Report) -> None:
    """Steps until the last, or until a signal."""
    spec, waited = run.spec, run.stream.waited_seconds
    run.model.train()
    run.log.go_on()
    for batch in run.stream:
        parts = _learn(run, batch)
        lr = learning_rate(spec.optimizer, run.step, run.total)
        _update(run, lr, batch, parts)
        run.step, run.epoch = run.step + 1, batch.epoch
        _log(run, batch, parts, lr, run.stream.waited_seconds - waited)
        waited = run.stream.waited_seconds
        report(Progress(run.step, run.total, float(parts.loss), run.log.last))
        if run.step == run.total:
            return
        if spec.evaluate is not None and run.step % spec.evaluate.every == 0:
            run.evaluate()
        if (stop := stopped()) or run.step % spec.checkpoint.every == 0:
            run.save()
        if stop:
            raise TryAgainError(
                f"stopped by a signal after step {run.step} of {run.total}; nothing is lost, the "
                f"same command goes on from there ({spec.out!r})"
            )
        run.log.go_on()


def _learn(run: Run, batch: Batch) -> DistillationLoss:
    """Leaves a batch's gradients in the student; its loss and parts, detached, [N].

    Micro-batches share the normalizer of the whole step, so their gradients add up to the batch's.
    """
    run.optimizer.zero_grad()
    normalizer, weights = batch.global_weight, None
    if run.space.alignment is not None:
        weights = loss_weights(batch, run.spec.loss.normalization)
        normalizer = float(weights.sum(dtype=np.float64))
    parts = []
    for piece, positions in row_slices(batch, run.spec.micro_batch_size):
        mine = None if weights is None else weights[positions]
        part = _forward(run, piece, mine, normalizer)
        part.loss.backward()  # type: ignore[no-untyped-call]
        parts.append(part._replace(loss=part.loss.detach()))
    if len(parts) == 1:
        return parts[0]
    hard = [part.hard for part in parts if part.hard is not None]
    return DistillationLoss(
        torch.stack([part.loss for part in parts]).sum(),
        torch.cat([part.kl for part in parts]),
        torch.cat(hard) if hard else None,
    )


def _forward(run: Run, batch: Batch, weights: Floats | None, normalizer: float) -> DistillationLoss:
    """The loss of a micro-batch; `weights` float32 [N], None: those of its rows."""
    loss = run.spec.loss
    # Hard labels alone need no tail mode, and so no draws.
    tail = loss.tail if loss.kd_weight else "bucket"
    targets = None  # those of unknown tails serve hard labels only
    if loss.kd_weight or tails_known(batch):
        targets = targets_of(batch, loss.temperature, run.device, tail == "sampled")
    labels, own = labels_and_weights(batch, run.device, weights)
    with _users_code(run, batch):
        outputs = run.forward(batch)
    return outputs.loss(
        targets,
        tail=tail,
        divergence=loss.divergence,
        temperature=loss.temperature,
        kd_weight=loss.kd_weight,
        labels=labels,
        weights=own,
        normalizer=normalizer,
        validate=batch.epoch == 0,  # later epochs bring the same rows
    )


@contextlib.contextmanager
def _users_code(run: Run, batch: Batch) -> Iterator[None]:
    """One line where the student or its decode fails, such as batch norm on a single row."""
    try:
        yield
    except SoftLabelsError:
        raise
    except Exception as error:
        first, last = batch.example_ids[0].as_py(), batch.example_ids[-1].as_py()
        raise DataError(
            f"step {run.step + 1}: the student or its decode failed on {len(batch)} rows, "
            f"{first!r} to {last!r}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


def _update(run: Run, lr: float, batch: Batch, parts: DistillationLoss) -> None:
    """One optimiser step, unless loss or gradient is not finite."""
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, run.spec.optimizer.clip_norm or math.inf)
    if not math.isfinite(float(parts.loss + norm)):
        bad = ~torch.isfinite(parts.kl)
        at = torch.where(bad if bad.any() else torch.ones_like(bad))[0].cpu().numpy()
        ends = np.cumsum(batch.targets.num_positions)
        rows = np.unique(np.searchsorted(ends, at, side="right"))[:3].tolist()
        raise DataError(
            f"step {run.step + 1}: loss is {float(parts.loss)!r} and the gradient's norm "
            f"{float(norm)!r}, expected finite numbers; first seen in examples "
            f"{[batch.example_ids[row].as_py() for row in rows]!r}; the step was not taken and "
            "earlier checkpoints stay: lower optimizer.lr, or look at these rows"
        )
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()


def _log(run: Run, batch: Batch, parts: DistillationLoss, lr: float, waited: float) -> None:
    labels, hard = batch.targets.label_ids, None
    if labels is not None and parts.hard is not None:
        hard = float(parts.hard.sum()) / max(1, int((labels >= 0).sum()))
    kl = float(parts.kl.mean())
    run.log.add(
        {"step": run.step, "epoch": batch.epoch, "lr": lr},
        loss=float(parts.loss),
        kl=kl if math.isfinite(kl) else None,
        hard_ce=hard,
        rows=len(batch.example_ids),
        waited=waited,
        tokens=None if run.space.alignment is None else num_tokens(batch),
    )


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Holds `out` for this process; the lock goes with the process, however that ends."""
    with storage_errors("write", str(out)):
        file = open(out / ".lock", "w")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TryAgainError(f"another process trains into {str(out)!r}") from error
        yield


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""One step of a run on its rank's rows: the loss of the whole batch, and its gradients.

Every rank divides by the same number, the weight of the rows of all, and gradients are summed: so
they are those of one process on the whole batch, however unevenly its rows are dealt out.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import torch

from softlabels.errors import DataError, SoftLabelsError
from softlabels.student.batch import labels_and_weights, tails_known, targets_of
from softlabels.student.causal import Forward
from softlabels.student.group import peers
from softlabels.student.losses import DistillationLoss
from softlabels.student.profile import BACKWARD, DATA, FORWARD, INPUTS, RANKS, Clock
from softlabels.student.sequences import loss_weights, num_tokens, row_slices
from softlabels.student.sharding import syncing
from softlabels.student.spec import LossSpec
from softlabels.student.stream import Batch
from softlabels.targets import Floats

if TYPE_CHECKING:
    from softlabels.student.run import Run


class Work(NamedTuple):
    """A rank's part of a step.

    Attributes:
        batch: its rows; may be none.
        weights: float32 [N], what each position counts; None: what its row counts.
        normalizer: sum of the weights of all ranks.
        passes: forward passes, as many as the rank with most rows needs.
        waited: seconds in which this rank had no rows.
    """

    batch: Batch
    weights: Floats | None
    normalizer: float
    passes: int
    waited: float = 0.0


class Figures(NamedTuple):
    """What a step comes to over all ranks.

    Attributes:
        loss: of the whole batch.
        kl: mean over its positions, nats; NaN: there were no targets.
        hard: the same of the hard labels' cross-entropy; None: there were none.
        rows: of the whole batch.
        tokens: the same; None: no sequences.
        waited: seconds without data of the rank that waited longest.
        stop: whether a rank was told to stop.
    """

    loss: float
    kl: float
    hard: float | None
    rows: int
    tokens: int | None
    waited: float
    stop: bool


class Loss(torch.nn.Module):
    """A student's call on a batch and its loss as one module: what is copied, sharded, compiled.

    The student may be called by any of its methods, more than once, or only to look at it; to
    torch it is one forward pass.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        forward: Forward,
        spec: LossSpec,
        device: torch.device,
        autocast: torch.dtype | None,
        clock: Clock,
    ) -> None:
        super().__init__()
        self.student = student
        self._call, self._spec, self._device = forward, spec, device
        self._autocast, self._clock = autocast, clock

    def forward(self, batch: Batch, weights: Floats | None, normalizer: float) -> DistillationLoss:
        """The loss; `weights` float32 [N], None: those of its rows."""
        spec = self._spec
        # Hard labels alone need no tail mode, and so no draws.
        tail = spec.tail if spec.kd_weight else "bucket"
        targets = None  # those of unknown tails serve hard labels only
        with self._clock.part(INPUTS):
            if spec.kd_weight or tails_known(batch):
                targets = targets_of(batch, spec.temperature, self._device, tail == "sampled")
            labels, own = labels_and_weights(batch, self._device, weights)
        with autocast(self._device, self._autocast):
            outputs = self._call(batch)
        return outputs.loss(
            targets,
            tail=tail,
            divergence=spec.divergence,
            temperature=spec.temperature,
            kd_weight=spec.kd_weight,
            labels=labels,
            weights=own,
            normalizer=normalizer,
            validate=batch.epoch == 0,  # later epochs bring the same rows
        )


def take(run: "Run", batches: Iterator[Batch]) -> Work:
    """This rank's part of the next step, when every rank has got its own.

    Raises:
        SoftLabelsError: on all ranks, when one could not read.
    """
    before = run.clock.seconds[DATA]
    try:
        with run.clock.part(DATA):
            batch = next(batches)
    except SoftLabelsError as error:
        failed = error
    else:
        return work_of(run, batch)._replace(waited=run.clock.seconds[DATA] - before)
    run.group.gather(_FAILED)
    return run.group.together(partial(_fail, failed))


def work_of(run: "Run", batch: Batch) -> Work:
    """What a step has to know of all ranks, beside its own rows.

    Raises:
        SoftLabelsError: when another rank could not read.
    """
    weights, own = None, 0.0
    if run.space.alignment is not None:
        weights = loss_weights(batch, run.spec.loss.normalization)
        own = float(weights.sum(dtype=np.float64))
    passes = -(-len(batch) // (run.spec.micro_batch_size or run.spec.batch_size))
    with run.clock.part(RANKS):
        said = run.group.gather([0, own, passes])
    if said[:, 0].any():
        run.group.together(lambda: None)
    # The rows' own weights are known of all ranks already: the plan says them.
    normalizer = batch.global_weight if weights is None else float(said[:, 1].sum())
    return Work(batch, weights, normalizer, int(said[:, 2].max()))


def learn(run: "Run", work: Work) -> DistillationLoss:
    """Leaves a step's gradients in the student; this rank's loss and its parts, detached, [N].

    Micro-batches share the normalizer of the whole step, so their gradients add up to the batch's.
    """
    run.optimizer.zero_grad()
    run.keep_spare(work.batch)
    pieces = list(_pieces(run, work))
    parts = []
    for number, (piece, weights) in enumerate(pieces, 1):
        with syncing(run.loss, number == len(pieces)):
            with run.clock.part(FORWARD), _users_code(run.step, piece), peers():
                part = run.loss(piece, weights, work.normalizer)
            with run.clock.part(BACKWARD), peers():
                part.loss.backward()
        parts.append(part._replace(loss=part.loss.detach()))
    return _joined(parts, len(work.batch.targets.ids))


def figures(run: "Run", work: Work, parts: DistillationLoss, stop: bool) -> Figures:
    """What the step comes to over all ranks; `stop`: whether this one was told to stop."""
    batch, hard = work.batch, parts.hard
    labels = batch.targets.label_ids
    sequences = run.space.alignment is not None
    own = [
        float(parts.loss),
        float(parts.kl.sum(dtype=torch.float64)),
        len(parts.kl),
        0.0 if hard is None else float(hard.sum(dtype=torch.float64)),
        0 if hard is None or labels is None else int((labels >= 0).sum()),
        hard is not None,
        len(batch),
        num_tokens(batch) if sequences else 0,
        stop,
        work.waited,
    ]
    with run.clock.part(RANKS):
        said = run.group.gather(own)
    loss, kl, n, ce, labelled, some, rows, tokens, stops, _ = said.sum(0).tolist()
    return Figures(
        loss,
        kl / max(1, n),
        ce / max(1, labelled) if some else None,
        int(rows),
        int(tokens) if sequences else None,
        float(said[:, -1].max()),
        stops > 0,
    )


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Arithmetic in `dtype` where it is safe; None: as the weights are."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


_FAILED = (1, 0, 0)


def _fail(error: SoftLabelsError) -> NoReturn:
    raise error


def _pieces(run: "Run", work: Work) -> Iterator[tuple[Batch, Floats | None]]:
    """Micro-batches with the weights of their positions.

    A rank without rows takes part with some that count nothing; one whose student is sharded
    makes as many passes as all others, since they wait for its part of the weights.
    """
    made = 0
    if len(work.batch):
        for piece, places in row_slices(work.batch, run.spec.micro_batch_size):
            yield piece, None if work.weights is None else work.weights[places]
            made += 1
    least = work.passes if run.sharded else 1
    if made < least:
        spare = run.spare_rows()
        yield from [(spare, np.zeros(len(spare.targets.ids), np.float32))] * (least - made)


def _joined(parts: list[DistillationLoss], positions: int) -> DistillationLoss:
    """The loss and the parts of all micro-batches; what spare rows said is left out."""
    if len(parts) == 1:
        loss, kl, hard = parts[0]
        return DistillationLoss(loss, kl[:positions], None if hard is None else hard[:positions])
    hards = [part.hard for part in parts if part.hard is not None]
    return DistillationLoss(
        torch.stack([part.loss for part in parts]).sum(),
        torch.cat([part.kl for part in parts])[:positions],
        torch.cat(hards)[:positions] if hards else None,
    )


@contextlib.contextmanager
def _users_code(step: int, batch: Batch) -> Iterator[None]:
    """One line where the student or its decode fails, such as batch norm on a single row."""
    try:
        yield
    except SoftLabelsError:
        raise
    except Exception as error:
        first, last = batch.example_ids[0].as_py(), batch.example_ids[-1].as_py()
        raise DataError(
            f"step {step + 1}: the student or its decode failed on {len(batch)} rows, "
            f"{first!r} to {last!r}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error

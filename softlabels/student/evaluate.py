"""How well a student does on a plan, beside what its teacher does: one pass, each row once.

B rows, N positions of theirs (one a row in classification), V classes, p the teacher's and q the
student's distribution at temperature 1, S the ids that are stored for a position.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softlabels.errors import BadInputError, MismatchError
from softlabels.plan import Plan
from softlabels.student.batch import (
    Decode,
    LabelSpace,
    evaluating,
    label_space,
    logits_of,
    targets_at,
    targets_of,
)
from softlabels.student.causal import CHUNK_BYTES, Forward, LanguageModel, Outputs
from softlabels.student.figures import BINS, Bin, Collected, Evaluation, reliability
from softlabels.student.losses import distillation_loss
from softlabels.student.mixture import mixture
from softlabels.student.once import each_row_once
from softlabels.student.profile import INPUTS, Clock
from softlabels.student.sequences import COLUMNS, num_tokens
from softlabels.student.several import Teacher, teachers_of
from softlabels.student.spec import Fused
from softlabels.student.stream import Batch
from softlabels.student.temper import rescale_head
from softlabels.student.zipped import SourceFiles
from softlabels.targets import SoftTargets

__all__ = ["BINS", "Bin", "Evaluation", "evaluate", "evaluate_teacher", "reliability"]

ROWS, SEQUENCES = 256, 8
"""Of one forward pass, where nothing is said."""


def evaluate(
    model: nn.Module,
    plan: Plan,
    decode: Decode | None = None,
    columns: Sequence[str] = (),
    *,
    batch_size: int | None = None,
    roots: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    fused: Fused = "auto",
    source: SourceFiles | None = None,
) -> Evaluation:
    """The student's figures on a plan, in plan order, loss weights and repeats left out.

    The student runs in evaluation mode and is given back in the mode it came in; torch's random
    numbers are left as they were, so evaluating never changes a training run.

    Args:
        model: already on `device`; gives logits [B, V], or is a language model as in `causal`.
        plan: what to measure on.
        decode: makes a classifier's input from the carried columns.
        columns: the carried columns that it needs.
        batch_size: rows a forward pass; None: `ROWS`, or `SEQUENCES` of a language model.
        roots: where tables are on this machine, by name.
        device: where the model is.
        fused: language models: see `LossSpec`; it decides only what memory is needed.
        source: where columns are that the plan's tables do not carry.

    Raises:
        BadInputError: a classifier without decode.
        MismatchError: the student does not fit the plan's label space, or no tail is stored.
    """
    space = label_space(plan, "the evaluation plan")
    forward = make_forward(model, space, decode, device, fused)
    sequences = space.alignment is not None
    wanted = COLUMNS if sequences else columns
    found, seconds, tokens = Collected(), 0.0, 0
    with evaluating(model):
        for batch in each_row_once(
            plan, batch_size or _batch_size(sequences), wanted, roots, source
        ):
            found.rows += len(batch)
            tokens += num_tokens(batch) if sequences else 0
            teachers = _teachers(batch, device)
            started = time.perf_counter()
            outputs = forward(batch)
            _wait(device)
            for here, logits in _in_chunks(outputs, sequences):
                _wait(device)
                seconds += time.perf_counter() - started
                found.add(**_figures(logits, batch, here, teachers))
                started = time.perf_counter()
    speed = 1 / seconds if seconds else None
    return dataclasses.replace(
        found.evaluation(sequences),
        examples_per_s=speed and found.rows * speed,
        tokens_per_s=speed and tokens * speed if sequences else None,
        threads=torch.get_num_threads(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def make_forward(
    model: nn.Module,
    space: LabelSpace,
    decode: Decode | None,
    device: torch.device | str = "cpu",
    fused: Fused = "auto",
    clock: Clock | None = None,
) -> Forward:
    """The student's call on a batch of a plan of that label space; `clock` counts its inputs.

    Raises:
        BadInputError: a classifier without decode.
    """
    if space.alignment is not None:
        return LanguageModel(model, space.num_classes, space.alignment, device, fused, clock)
    if decode is None:
        raise BadInputError("decode: a plan of classification needs it, found None")

    clock = clock or Clock()

    def forward(batch: Batch) -> Outputs:
        with clock.part(INPUTS):
            inputs = decode(batch.columns) if batch.inputs is None else batch.inputs
        logits = logits_of(model, inputs, len(batch), space.num_classes, device)
        return Outputs(logits, space.num_classes)

    return forward


def evaluate_teacher(
    plan: Plan, *, batch_size: int | None = None, roots: Mapping[str, str] | None = None
) -> Evaluation:
    """The teacher's figures on a plan from its stored labels alone: no teacher is needed.

    Of an ensemble plan they are those of the weighted mixture.

    Raises:
        MismatchError: a plan with ensembles reads a table that does not store every class.
    """
    space = label_space(plan, "the evaluation plan")
    sequences = space.alignment is not None
    if plan.num_members > 1:
        _require_every_class(plan)
    found = Collected()
    for batch in each_row_once(plan, batch_size or (256 if sequences else 4_096), (), roots):
        found.rows += len(batch)
        if batch.others:
            for values in _mixture_figures(batch, space.num_classes):
                found.add(**values)
        else:
            found.add(**_stored_figures(batch.targets))
    return found.evaluation(sequences)


def _stored_figures(soft: SoftTargets) -> dict[str, npt.NDArray[Any]]:
    """Per position: whether it has a hard label, the teacher's nll, confidence, whether right."""
    labels = np.full(len(soft.ids), -1) if soft.label_ids is None else soft.label_ids
    values: dict[str, npt.NDArray[Any]] = {"labelled": labels >= 0}
    if soft.label_logprobs is not None:
        values["nll"] = -soft.label_logprobs.astype(np.float64)
    if soft.k and soft.tail is not None:
        targets = targets_at(soft)
        head = rescale_head(targets.logprobs, targets.tail_logprob)
        values["confidence"] = head[:, 0].double().exp().numpy()
        values["right"] = np.where(np.isnan(soft.tail), np.nan, soft.ids[:, 0] == labels)
    return values


def _mixture_figures(batch: Batch, num_classes: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The same of the teachers' mixture, some positions at a time."""
    labels = batch.targets.label_ids
    teachers, size = _teachers(batch, "cpu"), max(1, CHUNK_BYTES // (8 * num_classes))
    for start in range(0, len(batch.targets.ids), size):
        here = slice(start, start + size)
        mine = [teacher.rows(here) for teacher in teachers]
        p, _ = mixture(mine, num_classes, torch.float64)
        yield _labelled(p.log(), None if labels is None else labels[here])


def _require_every_class(plan: Plan) -> None:
    for name, table in sorted(plan.tables.items()):
        contents = table.contents
        if contents.k < contents.num_classes:
            raise MismatchError(
                "the teacher's figures of an ensemble need every class stored, table "
                f"{name!r} has {contents.k} of {contents.num_classes}: evaluate each teacher on a "
                "plan of its own, or a student on this one"
            )


def _batch_size(sequences: bool) -> int:
    return SEQUENCES if sequences else ROWS


def _in_chunks(outputs: Outputs, sequences: bool) -> Iterator[tuple[slice, Tensor]]:
    """Positions and their logits: of a language model never all at once."""
    if sequences:
        return outputs.chunks()
    return iter([(slice(0, len(outputs.values)), outputs.values.double())])


def _figures(
    logits: Tensor, batch: Batch, here: slice, teachers: Sequence[Teacher]
) -> dict[str, npt.NDArray[Any]]:
    """What the positions `here` of a batch say, by name."""
    labels = batch.targets.label_ids
    found = _labelled(logits, None if labels is None else labels[here])
    mine = [teacher.rows(here) for teacher in teachers]
    if not mine:
        return found
    known = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    for targets, weight in mine:
        counts = True if weight is None else weight > 0
        known &= ~(targets.tail_logprob.isnan() & counts)
    if not bool(known.all()):
        mine, logits = [teacher.rows(known) for teacher in mine], logits[known]
    return found | (_compare_one if mine[0].weight is None else _compare_all)(logits, mine)


def _teachers(batch: Batch, device: torch.device | str) -> tuple[Teacher, ...]:
    """Those that speak of the batch's rows; none where one does not know its tails."""
    soft = (batch.targets, *(one.targets for one in batch.others))
    if any(one.tail is None for one in soft):
        return ()
    return teachers_of(targets_of(batch, device=device), len(batch.targets.ids))


def _compare_one(logits: Tensor, teachers: Sequence[Teacher]) -> dict[str, npt.NDArray[Any]]:
    """Per row: kl, acceptance and, where a top class is stored, agreement with it."""
    targets = teachers[0].targets
    kl = distillation_loss(logits, targets, tail="bucket").kl
    stored = targets.ids >= 0
    at = targets.ids.clamp(min=0).long()
    q = logits.softmax(1)
    # Added, not set: a pad points at class 0, which may be stored too. x - x is exactly 0.
    tail_q = q.scatter_add(1, at, -q.gather(1, at) * stored).sum(1)
    p = rescale_head(targets.logprobs, targets.tail_logprob).to(q.dtype).exp()
    both = torch.minimum(p, q.gather(1, at) * stored).sum(1)
    acceptance = both + torch.minimum(targets.tail_logprob.to(q.dtype).exp(), tail_q)
    values = {"kl": kl, "acceptance": acceptance}
    if targets.ids.shape[1]:
        values["agreement"] = logits.argmax(1) == targets.ids[:, 0]
    return {name: value.cpu().numpy() for name, value in values.items()}


def _compare_all(logits: Tensor, teachers: Sequence[Teacher]) -> dict[str, npt.NDArray[Any]]:
    """The same of several teachers: their KLs weighted, the rest against their mixture."""
    pairs = [(teacher.targets, cast(Tensor, teacher.weight)) for teacher in teachers]
    kl = distillation_loss(logits, pairs, tail="bucket").kl
    q = logits.softmax(1)
    p, inside = mixture(teachers, q.shape[1], q.dtype)
    left = (1 - p.sum(1)).clamp(min=0)
    outside = q.masked_fill(inside, 0).sum(1)
    values = {"kl": kl, "acceptance": torch.minimum(p, q).sum(1) + torch.minimum(left, outside)}
    if bool(inside.any()):
        values["agreement"] = logits.argmax(1) == p.argmax(1)
    return {name: value.cpu().numpy() for name, value in values.items()}


def _labelled(
    logits: Tensor, label_ids: npt.NDArray[np.int32] | None
) -> dict[str, npt.NDArray[Any]]:
    """Per row: whether it has a hard label, confidence, whether it is right, nll."""
    log_q = logits.log_softmax(1).cpu()
    top, choice = log_q.max(1)
    labels = np.full(len(log_q), -1) if label_ids is None else label_ids
    at = torch.from_numpy(np.maximum(labels, 0).astype(np.int64))
    nll = -log_q.gather(1, at.unsqueeze(1)).squeeze(1)
    return {
        "labelled": labels >= 0,
        "confidence": top.exp().numpy(),
        "right": choice.numpy() == labels,
        "nll": nll.numpy(),
    }


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

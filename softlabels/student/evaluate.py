"""How well a student does on a plan, beside what its teacher does: one pass, each row once.

B rows, N positions of theirs (one a row in classification), V classes, p the teacher's and q the
student's distribution at temperature 1, S the ids that are stored for a position.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softlabels.errors import BadInputError, MismatchError
from softlabels.plan import Plan, entries_table
from softlabels.student.batch import (
    Decode,
    LabelSpace,
    evaluating,
    label_space,
    logits_of,
    targets_at,
)
from softlabels.student.causal import Forward, LanguageModel, Outputs
from softlabels.student.losses import distillation_loss
from softlabels.student.sequences import COLUMNS, num_tokens
from softlabels.student.spec import Fused
from softlabels.student.stream import Batch, Stream
from softlabels.student.temper import Targets, rescale_head

BINS = 15
"""Of the calibration error; Guo et al. use 15."""

ROWS, SEQUENCES = 256, 8
"""Of one forward pass, where nothing is said."""

Values = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Bin:
    """One bar of a reliability picture.

    Attributes:
        lower: confidences above it (the first bin takes 0 too),
        upper: up to it.
        rows: labelled positions in the bin, one a row in classification.
        confidence: their mean confidence, 0 to 1; None when there are none.
        accuracy: the share that is right; None when there are none.
    """

    lower: float
    upper: float
    rows: int
    confidence: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one pass found; None where the plan or the subject cannot say.

    Attributes:
        rows: rows seen.
        labelled: positions with a hard label; accuracy, nll and ece are over these.
        accuracy: share whose likeliest class is the hard label, 0 to 1.
        nll: mean -log q of the hard label, nats.
        ece: expected calibration error of the likeliest class, 0 to 1.
        agreement: share whose likeliest class is the teacher's, 0 to 1.
        kl_to_teacher: mean KL(teacher‖student), nats, over S and the tail as one class: a lower
            bound of the full KL, equal to it when all classes are stored.
        acceptance: mean of sum min(p, q), 0 to 1, tail as one class (an upper bound): how often a
            draw of q passes for one of p.
        perplexity: language models: e^nll.
        positions: language models: N, positions seen; means are over these.
        examples_per_s: of the student's forward pass alone, without reading and decoding.
        tokens_per_s: language models: the same in tokens, without padding.
        threads: of torch at that time.
        parameters: numbers in the student.
        bins: for a reliability picture; `BINS` of equal width.
    """

    rows: int
    labelled: int
    accuracy: float | None
    nll: float | None
    ece: float | None
    agreement: float | None = None
    kl_to_teacher: float | None = None
    acceptance: float | None = None
    perplexity: float | None = None
    positions: int | None = None
    examples_per_s: float | None = None
    tokens_per_s: float | None = None
    threads: int | None = None
    parameters: int | None = None
    bins: tuple[Bin, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return dataclasses.asdict(self)


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

    Raises:
        BadInputError: a classifier without decode.
        MismatchError: the student does not fit the plan's label space, or no tail is stored.
    """
    space = label_space(plan, "the evaluation plan")
    forward = make_forward(model, space, decode, device, fused)
    sequences = space.alignment is not None
    wanted = COLUMNS if sequences else columns
    found, seconds, tokens = _Collected(), 0.0, 0
    with evaluating(model):
        for batch in _each_row_once(plan, batch_size or _batch_size(sequences), wanted, roots):
            found.rows += len(batch)
            tokens += num_tokens(batch) if sequences else 0
            started = time.perf_counter()
            outputs = forward(batch)
            _wait(device)
            for here, logits in _in_chunks(outputs, sequences):
                _wait(device)
                seconds += time.perf_counter() - started
                found.add(**_figures(logits, batch, here, device))
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
) -> Forward:
    """The student's call on a batch of a plan of that label space.

    Raises:
        BadInputError: a classifier without decode.
    """
    if space.alignment is not None:
        return LanguageModel(model, space.num_classes, space.alignment, device, fused)
    if decode is None:
        raise BadInputError("decode: a plan of classification needs it, found None")

    def forward(batch: Batch) -> Outputs:
        inputs = decode(batch.columns)
        logits = logits_of(model, inputs, len(batch), space.num_classes, device)
        return Outputs(logits, space.num_classes)

    return forward


def evaluate_teacher(
    plan: Plan, *, batch_size: int | None = None, roots: Mapping[str, str] | None = None
) -> Evaluation:
    """The teacher's figures on a plan from its stored labels alone: no teacher is needed."""
    sequences = label_space(plan, "the evaluation plan").alignment is not None
    found = _Collected()
    for batch in _each_row_once(plan, batch_size or (256 if sequences else 4_096), (), roots):
        soft = batch.targets
        found.rows += len(batch)
        count = len(soft.ids)
        labels = np.full(count, -1) if soft.label_ids is None else soft.label_ids
        values: dict[str, npt.NDArray[Any]] = {"labelled": labels >= 0}
        if soft.label_logprobs is not None:
            values["nll"] = -soft.label_logprobs.astype(np.float64)
        if soft.k and soft.tail is not None:
            targets = targets_at(soft)
            head = rescale_head(targets.logprobs, targets.tail_logprob)
            values["confidence"] = head[:, 0].double().exp().numpy()
            values["right"] = np.where(np.isnan(soft.tail), np.nan, soft.ids[:, 0] == labels)
        found.add(**values)
    return found.evaluation(sequences)


def reliability(confidence: Values, right: npt.NDArray[np.bool_]) -> tuple[float, tuple[Bin, ...]]:
    """The expected calibration error of labelled positions, and the bins that it sums over.

    ece = sum over bins of rows in it / rows * |accuracy - confidence|, bins (lower, upper] of
    equal width.

    Args:
        confidence: float64 [N], probability of the likeliest class, 0 to 1.
        right: bool [N], whether that class is the hard label.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", 2017.
    """
    return _calibration(_binned(confidence, right))


def _binned(confidence: Values, right: npt.NDArray[np.bool_]) -> Values:
    """Float64 [3, BINS]: of each bin, how many, and the sums of confidence and of right."""
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    weights = (None, confidence, right)
    return np.stack([np.bincount(place, one, BINS).astype(np.float64) for one in weights])


def _calibration(binned: Values) -> tuple[float, tuple[Bin, ...]]:
    counts, confidences, rights = binned
    error = float(np.abs(rights - confidences).sum() / max(counts.sum(), 1))
    bins = []
    for i, rows in enumerate(counts.astype(int).tolist()):
        confident, accurate = (float(s[i] / rows) if rows else None for s in (confidences, rights))
        bins.append(Bin(i / BINS, (i + 1) / BINS, rows, confident, accurate))
    return error, tuple(bins)


class _Collected:
    """Sums of the figures of every position seen so far, by name."""

    def __init__(self) -> None:
        self.rows = self._positions = self._labelled = 0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._bins = np.zeros((3, BINS))
        self._binned = False

    def add(self, labelled: npt.NDArray[np.bool_], **values: npt.NDArray[Any]) -> None:
        """Adds N positions; nll and right count at labelled ones only, NaN nowhere."""
        self._positions += len(labelled)
        self._labelled += int(labelled.sum())
        for name, value in values.items():
            counted = value[labelled] if name in ("nll", "right", "confidence") else value
            counted = counted[~np.isnan(counted)] if counted.dtype.kind == "f" else counted
            self._sums[name] = self._sums.get(name, 0.0) + float(counted.sum(dtype=np.float64))
            self._counts[name] = self._counts.get(name, 0) + len(counted)
        if "right" in values:
            judged = labelled & ~np.isnan(values["confidence"])
            self._bins += _binned(values["confidence"][judged], values["right"][judged])
            self._binned = True

    def evaluation(self, sequences: bool) -> Evaluation:
        def mean(name: str) -> float | None:
            # What some tables do not say, such as tails, does not count for them.
            count = self._counts.get(name, 0)
            return self._sums[name] / count if count else None

        ece, bins = _calibration(self._bins)
        nll = mean("nll")
        judged = self._binned and self._bins[0].sum() > 0
        return Evaluation(
            rows=self.rows,
            labelled=self._labelled,
            accuracy=mean("right"),
            nll=nll,
            ece=ece if judged else None,
            agreement=mean("agreement"),
            kl_to_teacher=mean("kl"),
            acceptance=mean("acceptance"),
            perplexity=_exp(nll) if sequences and nll is not None else None,
            positions=self._positions if sequences else None,
            bins=bins if judged else (),
        )


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _batch_size(sequences: bool) -> int:
    return SEQUENCES if sequences else ROWS


def _in_chunks(outputs: Outputs, sequences: bool) -> Iterator[tuple[slice, Tensor]]:
    """Positions and their logits: of a language model never all at once."""
    if sequences:
        return outputs.chunks()
    return iter([(slice(0, len(outputs.values)), outputs.values.double())])


def _figures(
    logits: Tensor, batch: Batch, here: slice, device: torch.device | str
) -> dict[str, npt.NDArray[Any]]:
    """What the positions `here` of a batch say, by name."""
    one_each = np.ones(here.stop - here.start, np.int32)
    soft = batch.targets.map_positions(here, one_each)
    found = _labelled(logits, soft.label_ids)
    if soft.tail is not None:
        known = ~np.isnan(soft.tail)
        if not known.all():
            soft = soft.map_positions(known, one_each[known])
            logits = logits[torch.from_numpy(known).to(logits.device)]
        found |= _compare(logits, targets_at(soft, device=device))
    return found


def _each_row_once(
    plan: Plan, batch_size: int, columns: Sequence[str], roots: Mapping[str, str] | None
) -> Iterator[Batch]:
    """Batches of the plan in its order; a row that several entries take comes once.

    Raises:
        MismatchError: one table version is there under several position rules, so that its rows
            would be counted by how many of them keep a position.
    """
    digests: dict[str, str] = {}
    for name, table in plan.tables.items():
        other = digests.setdefault(table.snapshot_digest, name)
        if other != name:
            raise MismatchError(
                f"{other!r} and {name!r} are one table version under different position rules "
                f"({plan.tables[other].positions} and {table.positions}): evaluate on a plan of one"
            )
    once = dataclasses.replace(plan, entries=entries_table(_distinct(plan)))
    stream = Stream(
        once, batch_size=batch_size, epochs=1, shuffle=False, columns=tuple(columns), roots=roots
    )
    return iter(stream)


def _distinct(plan: Plan) -> list[dict[str, Any]]:
    merged: dict[tuple[str, str, int], dict[str, Any]] = {}
    for entry in plan.entries.to_pylist():
        key = (entry["table"], entry["file"], entry["row_group"])
        held = merged.setdefault(key, entry | {"repeats": 1})
        if held["rows"] is None or entry["rows"] is None:
            whole = held if held["rows"] is None else entry
            held |= {"rows": None, "num_rows": whole["num_rows"]}
        else:
            rows = sorted({*held["rows"], *entry["rows"]})
            held |= {"rows": rows, "num_rows": len(rows)}
    return list(merged.values())


def _compare(logits: Tensor, targets: Targets) -> dict[str, npt.NDArray[Any]]:
    """Per row: kl, acceptance and, where a top class is stored, agreement with it."""
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

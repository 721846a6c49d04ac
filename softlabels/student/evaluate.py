"""How well a student does on a plan, beside what its teacher does: one pass, each row once.

B rows, V classes, p the teacher's and q the student's distribution at temperature 1, S the ids
that are stored for a row.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from softlabels.errors import MismatchError
from softlabels.plan import Plan, entries_table
from softlabels.student.batch import Decode, label_space, logits_of, targets_at
from softlabels.student.losses import distillation_loss
from softlabels.student.stream import Stream
from softlabels.student.temper import Targets, rescale_head

BINS = 15
"""Of the calibration error; Guo et al. use 15."""

Values = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Bin:
    """One bar of a reliability picture.

    Attributes:
        lower: confidences above it (the first bin takes 0 too),
        upper: up to it.
        rows: labelled rows in the bin.
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
        labelled: of them with a hard label; accuracy, nll and ece are over these.
        accuracy: share whose likeliest class is the hard label, 0 to 1.
        nll: mean -log q of the hard label, nats.
        ece: expected calibration error of the likeliest class, 0 to 1.
        agreement: share whose likeliest class is the teacher's, 0 to 1.
        kl_to_teacher: mean KL(teacher‖student), nats, over S and the tail as one class: a lower
            bound of the full KL, equal to it when all classes are stored.
        acceptance: mean of sum min(p, q), 0 to 1, tail as one class (an upper bound): how often a
            draw of q passes for one of p.
        examples_per_s: of the student's forward pass alone, without reading and decoding.
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
    examples_per_s: float | None = None
    threads: int | None = None
    parameters: int | None = None
    bins: tuple[Bin, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return dataclasses.asdict(self)


def evaluate(
    model: nn.Module,
    plan: Plan,
    decode: Decode,
    columns: Sequence[str],
    *,
    batch_size: int = 256,
    roots: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """The student's figures on a plan, in plan order, loss weights and repeats left out.

    The student runs in evaluation mode and is given back in the mode it came in; torch's random
    numbers are left as they were, so evaluating never changes a training run.

    Args:
        model: gives logits [B, V]; already on `device`.
        plan: what to measure on.
        decode: makes the student's input from the carried columns.
        columns: the carried columns that it needs.
        batch_size: rows a forward pass.
        roots: where tables are on this machine, by name.
        device: where the model is.

    Raises:
        MismatchError: the logits are not as wide as the plan's label space, or no tail is stored.
    """
    space = label_space(plan, "the evaluation plan")
    found = _Collected()
    seconds = 0.0
    with _evaluating(model):
        for batch in _each_row_once(plan, batch_size, columns, roots):
            inputs = decode(batch.columns)
            rows = len(batch.example_ids)
            started = time.perf_counter()
            logits = logits_of(model, inputs, rows, space.num_classes, device)
            _wait(device)
            seconds += time.perf_counter() - started
            targets = targets_at(batch.targets, device=device)
            found.add(**_compare(logits, targets), **_labelled(logits, batch.targets.label_ids))
    return dataclasses.replace(
        found.evaluation(),
        examples_per_s=found.rows / seconds if seconds else None,
        threads=torch.get_num_threads(),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def evaluate_teacher(
    plan: Plan, *, batch_size: int = 4_096, roots: Mapping[str, str] | None = None
) -> Evaluation:
    """The teacher's figures on a plan from its stored labels alone: no teacher is needed.

    Raises:
        MismatchError: the plan stores no top class, or no tail.
    """
    label_space(plan, "the evaluation plan")
    found = _Collected()
    for batch in _each_row_once(plan, batch_size, (), roots):
        soft = batch.targets
        if not soft.k:
            raise MismatchError("the teacher's top class is not stored: the plan's tables have k 0")
        targets = targets_at(soft)
        top = rescale_head(targets.logprobs, targets.tail_logprob)[:, 0].double().exp().numpy()
        rows = len(top)
        labels = np.full(rows, -1) if soft.label_ids is None else soft.label_ids
        nll = np.full(rows, np.nan) if soft.label_logprobs is None else -soft.label_logprobs
        right = soft.ids[:, 0] == labels
        found.add(labelled=labels >= 0, right=right, confidence=top, nll=nll)
    return found.evaluation()


def reliability(confidence: Values, right: npt.NDArray[np.bool_]) -> tuple[float, tuple[Bin, ...]]:
    """The expected calibration error of labelled rows, and the bins that it sums over.

    ece = sum over bins of rows in it / rows * |accuracy - confidence|, bins (lower, upper] of
    equal width.

    Args:
        confidence: float64 [B], probability of the likeliest class, 0 to 1.
        right: bool [B], whether that class is the hard label.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", 2017.
    """
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    sums = np.bincount(place, confidence, BINS), np.bincount(place, right, BINS)
    error = float(np.abs(sums[1] - sums[0]).sum() / max(len(confidence), 1))
    bins = []
    for i, rows in enumerate(counts.tolist()):
        confident, accurate = (float(s[i] / rows) if rows else None for s in sums)
        bins.append(Bin(i / BINS, (i + 1) / BINS, rows, confident, accurate))
    return error, tuple(bins)


class _Collected:
    """Figures of every row seen so far, by name."""

    def __init__(self) -> None:
        self.rows = 0
        self._parts: dict[str, list[npt.NDArray[Any]]] = {}

    def add(self, **values: npt.NDArray[Any]) -> None:
        self.rows += len(values["labelled"])
        for name, value in values.items():
            self._parts.setdefault(name, []).append(value)

    def evaluation(self) -> Evaluation:
        values = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        labelled = values["labelled"]
        right, confidence = values["right"][labelled], values["confidence"][labelled]
        ece, bins = reliability(confidence, right)
        any_label = bool(labelled.any())
        return Evaluation(
            rows=self.rows,
            labelled=int(labelled.sum()),
            accuracy=_mean(right),
            nll=_mean(values["nll"][labelled]),
            ece=ece if any_label else None,
            agreement=_mean(values.get("agreement")),
            kl_to_teacher=_mean(values.get("kl")),
            acceptance=_mean(values.get("acceptance")),
            bins=bins if any_label else (),
        )


def _each_row_once(
    plan: Plan, batch_size: int, columns: Sequence[str], roots: Mapping[str, str] | None
) -> Iterator[Any]:
    """Batches of the plan in its order; a row that several entries take comes once."""
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


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _compare(logits: Tensor, targets: Targets) -> dict[str, npt.NDArray[Any]]:
    """Per row: kl, acceptance and, where a top class is stored, agreement with it."""
    logits = logits.double()
    kl = distillation_loss(logits, targets, tail="bucket").kl
    stored = targets.ids >= 0
    at = targets.ids.clamp(min=0).long()
    q = logits.softmax(1)
    # Added, not set: a pad points at class 0, which may be stored too. x - x is exactly 0.
    tail_q = q.scatter_add(1, at, -q.gather(1, at) * stored).sum(1)
    p = rescale_head(targets.logprobs, targets.tail_logprob).double().exp()
    both = torch.minimum(p, q.gather(1, at) * stored).sum(1)
    acceptance = both + torch.minimum(targets.tail_logprob.double().exp(), tail_q)
    values = {"kl": kl, "acceptance": acceptance}
    if targets.ids.shape[1]:
        values["agreement"] = logits.argmax(1) == targets.ids[:, 0]
    return {name: value.cpu().numpy() for name, value in values.items()}


def _labelled(
    logits: Tensor, label_ids: npt.NDArray[np.int32] | None
) -> dict[str, npt.NDArray[Any]]:
    """Per row: whether it has a hard label, confidence, whether it is right, nll."""
    log_q = logits.double().log_softmax(1).cpu()
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


def _mean(values: npt.NDArray[Any] | None) -> float | None:
    return float(values.mean()) if values is not None and len(values) else None


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

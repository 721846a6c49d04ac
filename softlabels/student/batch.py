"""Stream batches as torch tensors, the student's call, and what the classes of a plan are."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from softlabels.errors import BadInputError, MismatchError
from softlabels.lineage import Contents
from softlabels.plan import Plan
from softlabels.student.several import Several
from softlabels.student.stream import Batch
from softlabels.student.temper import Targets, temper
from softlabels.targets import Floats, SoftTargets

Decode = Callable[[Mapping[str, pa.Array]], Any]
"""Columns of B rows to a tensor [B, ...], or a tuple or mapping of such tensors."""


class LossInputs(NamedTuple):
    """What `distillation_loss` takes beside the logits, on the run's device.

    Attributes:
        targets: values at the run's temperature, N rows; of an ensemble plan one of each teacher,
            with its weight.
        labels: int32 [N], -1 where there is none; None: the tables hold none.
        weights: float32 [N].
    """

    targets: Several
    labels: Tensor | None
    weights: Tensor


class LabelSpace(NamedTuple):
    """What the classes of a plan are.

    Attributes:
        num_classes: V.
        classes: names in order of id; None: unknown.
        tokenizer_sha256: language models: of the exact map of tokens to ids.
        alignment: language models: "next" or "same"; None: classification.
    """

    num_classes: int
    classes: tuple[str, ...] | None
    tokenizer_sha256: str | None = None
    alignment: str | None = None

    @classmethod
    def of(cls, contents: Contents) -> Self:
        """The label space of a table."""
        fields = (getattr(contents, name) for name in cls._fields)
        return cls(*fields)

    def require(self, other: "LabelSpace", here: str, there: str) -> None:
        """Raises MismatchError with both values unless the two are the same space."""
        for name in ("alignment", "tokenizer_sha256"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise MismatchError(
                    f"label spaces differ: {here} has {name} {mine!r}, {there} has {theirs!r}"
                )
        if self.num_classes != other.num_classes:
            raise MismatchError(
                f"label spaces differ: {here} has {self.num_classes} classes, "
                f"{there} has {other.num_classes}"
            )
        if None in (self.classes, other.classes) or self.classes == other.classes:
            return
        pairs = enumerate(zip(self.classes or (), other.classes or (), strict=True))
        place, (mine, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise MismatchError(
            f"label spaces differ: class {place} is {mine!r} in {here}, {theirs!r} in {there}"
        )


def to_torch(
    batch: Batch,
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    draws: bool = False,
    weights: Floats | None = None,
) -> LossInputs:
    """A batch as what the loss takes; on the CPU at temperature 1 no array is copied.

    Args:
        batch: of a stream that was asked for `temperature`, when it is not 1.
        temperature: T, of the loss.
        device: where the student is.
        draws: take the stored draws, for tail "sampled". They must have been made at T, which
            `require_servable` finds out.
        weights: as `labels_and_weights`.

    Raises:
        MismatchError: T is not stored, tails are unknown, or a row has not one position.
    """
    labels, own = labels_and_weights(batch, device, weights)
    return LossInputs(targets_of(batch, temperature, device, draws), labels, own)


def labels_and_weights(
    batch: Batch, device: torch.device | str = "cpu", weights: Floats | None = None
) -> tuple[Tensor | None, Tensor]:
    """The hard labels of a batch, None where no table holds any, and what each position counts.

    Args:
        batch: any.
        device: where the student is.
        weights: float32 [N], of sequences (`sequences.loss_weights`); None: those of the rows,
            which have one position each.

    Raises:
        MismatchError: a row has not one position, and there are no weights.
    """
    stored = batch.targets
    if weights is None and not bool((stored.num_positions == 1).all()):
        raise MismatchError(
            f"rows hold up to {int(stored.num_positions.max())!r} positions: expected one a row, "
            "as in classification; sequences need weights of their positions"
        )
    labels = None if stored.label_ids is None else _tensor(stored.label_ids, device)
    return labels, _tensor(batch.loss_weights if weights is None else weights, device)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and torch's random numbers come back as they were.

    Not `inference_mode`: models keep tables of positions that they make in a forward pass, and a
    later training step could not use those.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def targets_of(
    batch: Batch,
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    draws: bool = False,
) -> Several:
    """What the losses take of a batch: its targets, or those of each teacher with its weights.

    A teacher that counts in none of the batch's rows is left out, and where the first alone
    speaks, with the weight 1, it is as in a plan without ensembles.

    Raises:
        MismatchError: T is not stored, or tails are unknown.
    """
    shares = batch.member_weights
    if shares is None or (bool((shares[:, 0] == 1).all()) and not shares[:, 1:].any()):
        return targets_at(batch.targets, temperature, device, draws)
    counts, pairs = batch.targets.num_positions, []
    for slot, soft in enumerate((batch.targets, *(one.targets for one in batch.others))):
        if shares[:, slot].any():
            weight = _tensor(np.repeat(shares[:, slot], counts), device)
            pairs.append((targets_at(soft, temperature, device, draws), weight))
    return pairs


def tails_known(batch: Batch) -> bool:
    """Whether the mass outside the stored ids is known at every position of every teacher."""
    every = (batch.targets, *(one.targets for one in batch.others))
    return not any(soft.tail is None or np.isnan(soft.tail).any() for soft in every)


def targets_at(
    soft: SoftTargets,
    temperature: float = 1.0,
    device: torch.device | str = "cpu",
    draws: bool = False,
) -> Targets:
    """Soft targets as torch tensors, at temperature T if they hold it; with their draws if asked.

    Raises:
        MismatchError: T is not stored, or tails are unknown.
    """
    if soft.tail is None:
        raise MismatchError("tail_logprob is not stored: the mass outside the top k is unknown")
    stored = Targets(
        ids=_tensor(soft.ids, device),
        logprobs=_tensor(soft.logprobs, device),
        tail_logprob=_tensor(soft.tail, device),
        draws=_tensor(soft.draws, device) if draws and soft.draws is not None else None,
        entropy=None if soft.entropy is None else _tensor(soft.entropy, device),
    )
    if temperature == 1:
        return stored
    if temperature not in soft.temper:
        raise MismatchError(_not_stored(temperature, "the batch", soft.temper))
    extra = soft.temper[temperature]
    return temper(
        stored,
        temperature,
        shift=_tensor(extra.shift, device),
        tail_logprob=_tensor(extra.tail, device),
        draws=stored.draws,
    )


def logits_of(
    model: nn.Module, inputs: Any, rows: int, num_classes: int, device: torch.device | str
) -> Tensor:
    """The student's logits, float [B, V], for what `decode` gave.

    Args:
        model: returns the logits, or an object with them as `logits`.
        inputs: a tensor, a tuple of them (positional) or a mapping (by keyword).
        rows: B, what the logits must have.
        num_classes: V, the same.
        device: inputs are moved there.

    Raises:
        BadInputError: `inputs` is nothing that a student can be called with.
        MismatchError: the logits have another shape.
    """
    # From pinned memory a copy runs beside the GPU's work; from other memory it is waited for.
    there = each_tensor(inputs, lambda values: values.to(device, non_blocking=True))
    if isinstance(there, tuple):
        found = model(*there)
    else:
        found = model(**there) if isinstance(there, Mapping) else model(there)
    logits = getattr(found, "logits", found)
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (rows, num_classes):
        raise MismatchError(
            f"the student gives logits of shape {shape!r}, the batch and the plan's label space "
            f"need {(rows, num_classes)!r}"
        )
    return cast(Tensor, logits)


def each_tensor(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What `decode` gave, each of its tensors changed.

    Raises:
        BadInputError: it is nothing that a student can be called with.
    """
    if isinstance(inputs, Tensor):
        return change(inputs)
    found = tuple(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if not isinstance(found, tuple) or not all(isinstance(value, Tensor) for value in found):
        raise BadInputError(
            f"decode: expected a tensor, or a tuple or mapping of tensors, found {type(inputs)!r}"
        )
    changed = tuple(change(value) for value in found)
    return dict(zip(inputs, changed, strict=True)) if isinstance(inputs, Mapping) else changed


def label_space(plan: Plan, where: str) -> LabelSpace:
    """The label space that all tables of a plan share.

    Raises:
        MismatchError: two tables differ, or the plan reads no table.
    """
    spaces = [(name, LabelSpace.of(contents)) for name, contents in _contents(plan, where)]
    first, space = spaces[0]
    for name, other in spaces[1:]:
        space.require(other, first, name)
    return space


def _contents(plan: Plan, where: str) -> list[tuple[str, Contents]]:
    if not plan.tables or not plan.num_rows:
        raise MismatchError(f"{where} reads no rows: there is nothing to learn from")
    return [(f"table {name!r}", table.contents) for name, table in sorted(plan.tables.items())]


def _not_stored(temperature: float, where: str, stored: Iterable[float]) -> str:
    return (
        f"temperature {temperature!r} is not stored: {where} has {[1.0, *stored]!r}, and a tail "
        "at another temperature cannot be derived; train at one of these, or capture with it"
    )


def _tensor(values: "np.ndarray[Any, Any]", device: torch.device | str) -> Tensor:
    # torch warns about arrays that it could write to but must not: those over Arrow's memory.
    # Only they are copied; what a stream gathered is its own.
    own = torch.from_numpy(values if values.flags.writeable else values.copy())
    if torch.device(device).type != "cuda":
        return own.to(device)
    # No GPU was at hand to try this. From pinned memory the copy runs beside the GPU's work, and
    # torch keeps that memory, and uses it again, until the copy is done.
    return own.pin_memory().to(device, non_blocking=True)

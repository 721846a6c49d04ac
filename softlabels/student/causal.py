"""Language models as students: any module that predicts tokens, called on a batch of sequences.

A student is one of these; the first that fits is taken:

- it has `hidden_and_head(input_ids, position_ids, attention_mask)`, which gives hidden states
  [B, L, D], the head's weight [W, D] and its bias [W] or None;
- a model of `transformers` whose logits are its output embeddings applied to its base model's last
  hidden states, which a probe on a few tokens finds out;
- it is called as model(input_ids, position_ids=..., attention_mask=...), as far as it names these,
  and gives logits [B, L, W], or an object with them as `logits`.

The first two never hold logits of a whole batch. W may exceed the vocabulary's V by padding rows.
`SequenceInputs` says what the arguments are; `position_ids` are always given, except to models of
`transformers` where each row is one document: some number their tokens in a way of their own.

Before the first step, and now and then after it, a student is looked at from outside: one that
sees later tokens ("next"), other documents of the row, or pads is refused, since its targets were
made without.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from softlabels.errors import MismatchError
from softlabels.student.batch import evaluating
from softlabels.student.fused import linear_distillation_loss
from softlabels.student.losses import DistillationLoss, distillation_loss
from softlabels.student.profile import INPUTS, Clock
from softlabels.student.room import require_room, require_width
from softlabels.student.sequences import SequenceInputs, padded
from softlabels.student.several import Several
from softlabels.student.spec import Fused
from softlabels.student.stream import Batch
from softlabels.student.temper import Targets

CHUNK_BYTES = 32 << 20
"""Of logits that are looked at at once, outside of a loss."""

_PROBE_TOKENS = 16
_PROBE_FACTOR = 1000.0
"""What hidden states are multiplied by: a head that bends large logits only shows it there."""


class Outputs(NamedTuple):
    """What a student says at N positions: logits, or hidden states and the head that makes them.

    Attributes:
        values: float [N, V], or [N, D] with a head.
        num_classes: V.
        weight: float [W, D]; None: `values` are logits.
        bias: float [W]; None: none.
    """

    values: Tensor
    num_classes: int
    weight: Tensor | None = None
    bias: Tensor | None = None

    def loss(self, targets: Several | None, **options: Any) -> DistillationLoss:
        """The distillation loss; options as `distillation_loss`.

        Without targets, which needs kd_weight 0, `kl` is NaN.
        """
        if self.weight is None and targets is not None:
            return distillation_loss(self.values, targets, **options)
        if self.weight is None:
            found = distillation_loss(self.values, _nothing(self.values), **options)
            return found._replace(kl=torch.full_like(found.kl, torch.nan))
        return linear_distillation_loss(
            self.values,
            self.weight,
            targets,
            bias=self.bias,
            num_classes=self.num_classes,
            **options,
        )

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive positions and their logits, float32 or float64 [C, V]."""
        size = max(1, CHUNK_BYTES // (4 * self.num_classes))
        for start in range(0, len(self.values), size):
            here = slice(start, min(start + size, len(self.values)))
            logits = self.values[here]
            if self.weight is not None:
                bias = None if self.bias is None else self.bias[: self.num_classes]
                logits = nn.functional.linear(logits, self.weight[: self.num_classes], bias)
            yield here, logits if logits.dtype == torch.float64 else logits.float()


def _nothing(values: Tensor) -> Targets:
    """Targets of N positions that say nothing: all mass is in the tail."""
    ids = torch.zeros((len(values), 0), dtype=torch.int64, device=values.device)
    return Targets(ids, ids.float(), torch.zeros(len(values), device=values.device))


Forward = Callable[[Batch], Outputs]
"""A student's call on a batch, its inputs made on the way."""


class LanguageModel:
    """A student's call on batches of sequences, one `Outputs` each.

    Args:
        model: the student, on `device`.
        num_classes: V.
        alignment: "next" or "same".
        device: where it is.
        fused: whether hidden states and head are handed on in place of logits.
        clock: counts how long inputs take.

    Raises:
        MismatchError: when called: the head's width is not V, the student sees what it must not,
            or fused is "always" and there is no linear head.
        DataError: when called: the batch's sequences contradict themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        alignment: str,
        device: torch.device | str = "cpu",
        fused: Fused = "auto",
        clock: Clock | None = None,
    ) -> None:
        self._model, self._device = model, device
        self._clock = clock or Clock()
        self._common: Batch | None = None
        self._num_classes, self._alignment, self._fused = num_classes, alignment, fused
        self._call: Callable[[SequenceInputs], Outputs] | None = None
        self._looked: set[str] = set()
        self._calls = 0

    def __call__(self, batch: Batch) -> Outputs:
        """What the student says at the batch's positions."""
        inputs = self._inputs(batch)
        self._calls += 1
        # Again at calls 2, 4, 8, …: a way that begins with weights of zero shows only later.
        due = self._calls & (self._calls - 1) == 0
        if due:
            self._looked.clear()
        if self._common is None:
            self._look_at(inputs)
        elif due:
            self._look_at(self._inputs(self._common))
        assert self._call is not None
        return self._call(inputs)

    def look_only_at(self, batch: Batch) -> None:
        """Has the student looked at in this batch alone: the same calls on all ranks of a run."""
        self._common = batch

    def _inputs(self, batch: Batch) -> SequenceInputs:
        with self._clock.part(INPUTS):
            inputs = padded(batch, self._num_classes, self._alignment, self._device)
        require_room(self._model, inputs)
        return inputs

    def _look_at(self, inputs: SequenceInputs) -> None:
        if self._call is None:
            self._call = self._chosen(inputs)
        for name, part, changed, kept in _looks(inputs, self._alignment):
            if name not in self._looked:
                self._look(name, part, changed, kept)
                self._looked.add(name)

    def _chosen(self, inputs: SequenceInputs) -> Callable[[SequenceInputs], Outputs]:
        model = self._model
        if self._fused == "never":
            return self._unfused
        if hasattr(model, "hidden_and_head"):
            return self._own_head
        few = inputs.input_ids[:1, : int(inputs.lengths[0])][:, :_PROBE_TOKENS]
        if _is_pretrained(model) and _head_is_linear(model, few):
            return self._base_and_head
        if self._fused == "always":
            raise MismatchError(
                f"loss.fused 'always': {type(model).__name__!r} has no hidden_and_head, and its "
                "logits are not a linear function of its base model's hidden states: use 'auto'"
            )
        return self._unfused

    def _unfused(self, inputs: SequenceInputs) -> Outputs:
        found = _call(self._model, inputs)
        logits = getattr(found, "logits", found)
        shape = tuple(getattr(logits, "shape", ()))
        if shape[:2] != tuple(inputs.input_ids.shape) or len(shape) != 3:
            raise MismatchError(
                f"the student gives logits of shape {shape!r}, expected one row for each of the "
                f"tokens {tuple(inputs.input_ids.shape)!r}"
            )
        require_width(shape[2], self._num_classes)
        values = cast(Tensor, logits).flatten(0, 1)[inputs.at]
        return Outputs(values[:, : self._num_classes], self._num_classes)

    def _own_head(self, inputs: SequenceInputs) -> Outputs:
        positions, mask = _positions(inputs), inputs.attention_mask
        found = cast(Any, self._model).hidden_and_head(inputs.input_ids, positions, mask)
        return self._with_head(inputs, *found)

    def _base_and_head(self, inputs: SequenceInputs) -> Outputs:
        model = cast(Any, self._model)
        head = model.get_output_embeddings()
        return self._with_head(inputs, _call(model.base_model, inputs)[0], head.weight, head.bias)

    def _with_head(
        self, inputs: SequenceInputs, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Outputs:
        expected = (*inputs.input_ids.shape, weight.shape[1])
        if tuple(hidden.shape) != expected:
            raise MismatchError(
                f"the student gives hidden states of shape {tuple(hidden.shape)!r}, its tokens and "
                f"its head need {tuple(expected)!r}"
            )
        require_width(weight.shape[0], self._num_classes)
        values = hidden.flatten(0, 1)[inputs.at]
        return Outputs(values, self._num_classes, weight, bias)

    def _look(self, name: str, one: SequenceInputs, changed: Tensor, kept: Tensor) -> None:
        """Raises when changing the tokens `changed` of a row changes what is said at `kept`."""
        assert self._call is not None
        other = (one.input_ids + 1) % self._num_classes
        every = one._replace(at=torch.arange(one.input_ids.numel(), device=one.input_ids.device))
        kept = kept.repeat(len(one.input_ids))
        with evaluating(self._model):
            said = self._call(every).values
            again = self._call(
                every._replace(input_ids=torch.where(changed, other, one.input_ids))
            ).values
        tolerance = 1e-5 if said.dtype in (torch.float32, torch.float64) else 1e-2
        apart = float((said - again)[kept].abs().max())
        if not apart <= tolerance * float(said.abs().max()):
            raise MismatchError(f"{_SEEN[name]} (its outputs there changed by {apart:.3g})")


_SEEN = {
    "later tokens": (
        "the plan's targets are those of the next token (alignment 'next'), and the student sees "
        "later tokens: expected a causal model, found one whose output changes with the token after"
    ),
    "documents": (
        "the plan's rows hold several documents that do not see each other (segment_ids), and the "
        "student sees from one into another: expected one that keeps them apart by position_ids "
        "that start again at 0, or capture with isolate: false or packing: documents"
    ),
    "pads": (
        "the plan's rows differ in length, and the student sees their padding: expected one that "
        "heeds attention_mask"
    ),
}


def _looks(
    inputs: SequenceInputs, alignment: str
) -> Iterator[tuple[str, SequenceInputs, Tensor, Tensor]]:
    """What to look at in a batch: name, one row, tokens to change, places that must not care."""
    ids = inputs.input_ids
    columns = torch.arange(ids.shape[1], device=ids.device)
    positions = _positions(inputs)
    real = columns < inputs.lengths.unsqueeze(1)
    if alignment == "next":
        followed = ((positions > 0) & real).nonzero()
        if len(followed):
            row, last = (int(i) for i in followed[-1])
            yield "later tokens", _row(inputs, row), columns == last, columns < last
    if inputs.position_ids is not None:
        borders = ((positions == 0) & real & (columns > 0)).nonzero()
        if len(borders):
            row, border = (int(i) for i in borders[0])
            kept = (columns >= border) & real[row]
            yield "documents", _row(inputs, row), columns < border, kept
    if alignment == "same" and not bool(real.all()):
        row = int(inputs.lengths.argmin())
        yield "pads", _row(inputs, row), ~real[row], real[row]


def _row(inputs: SequenceInputs, row: int) -> SequenceInputs:
    # Twice, where batches have several rows: some attention keeps documents apart only in one.
    here = [row] * min(2, len(inputs.input_ids))
    positions, mask = (
        None if value is None else value[here]
        for value in (inputs.position_ids, inputs.attention_mask)
    )
    return SequenceInputs(
        inputs.input_ids[here], positions, mask, inputs.at[:0], inputs.lengths[here]
    )


def _positions(inputs: SequenceInputs) -> Tensor:
    """Int64 [B, L]: position ids, counted where every row is one document."""
    if inputs.position_ids is not None:
        return inputs.position_ids
    ids = inputs.input_ids
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def _is_pretrained(model: nn.Module) -> bool:
    """Whether it is a model of `transformers`, told without importing that."""
    return all(hasattr(model, name) for name in ("config", "base_model", "get_output_embeddings"))


def _call(model: nn.Module, inputs: SequenceInputs) -> Any:
    """What the model gives for the arguments that it names."""
    named = inspect.signature(model.forward).parameters
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in named.values())
    if not hasattr(model, "base_model"):
        positions: Tensor | None = _positions(inputs)
    elif (positions := inputs.position_ids) is not None:
        positions = positions + _first_position(model)
    given = {"position_ids": positions, "attention_mask": inputs.attention_mask}
    arguments: dict[str, Any] = {
        name: value
        for name, value in given.items()
        if name in named or (open_ended and value is not None)
    }
    if "use_cache" in named:
        # With a cache transformers does not take documents apart by their position ids.
        arguments["use_cache"] = False
    return model(inputs.input_ids, **arguments)


def _first_position(model: nn.Module) -> int:
    """The position id of a first token: models after RoBERTa count from behind their pad's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _head_is_linear(model: nn.Module, few: Tensor) -> bool:
    """Whether logits are the output embeddings of the last hidden states, large ones too."""
    base, head = cast(Any, model).base_model, cast(Any, model).get_output_embeddings()
    if base is model or not isinstance(base, nn.Module) or type(head) is not nn.Linear:
        return False
    lengths = torch.full((1,), few.shape[1], device=few.device)
    inputs = SequenceInputs(few, None, None, few[0, :0], lengths)

    def enlarge(module: nn.Module, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * _PROBE_FACTOR, *output[1:])
        output[next(iter(output.keys()))] = output[0] * _PROBE_FACTOR
        return output

    hook = base.register_forward_hook(enlarge)
    try:
        with evaluating(model):
            hidden = _call(base, inputs)[0]
            logits = _call(model, inputs).logits
            if hidden.shape[-1] != head.weight.shape[1]:
                return False
            expected = head(hidden)
    finally:
        hook.remove()
    if expected.shape != logits.shape:
        return False
    tolerance = 1e-4 if logits.dtype == torch.float32 else 3e-2
    apart = (expected - logits).abs().max()
    return bool(apart <= tolerance * expected.abs().max())

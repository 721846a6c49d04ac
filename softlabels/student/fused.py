"""The distillation loss of a linear head, in chunks: the logits [N, V] never exist.

N positions, D hidden units, V classes, C rows of a chunk.
A chunk's logits go into one [C, V] buffer, become their own gradient there (`kernel`), and are
multiplied into the gradients of hidden states, weight and bias. So gradients are made in the
forward pass, and backward multiplies them by one number.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from softlabels.errors import BadInputError, MismatchError
from softlabels.student.blocks import Scratch, evaluate_blocks_
from softlabels.student.call import Call, check, share
from softlabels.student.kernel import Factors, no_targets
from softlabels.student.losses import DistillationLoss
from softlabels.student.several import Several, Teacher, Weighed, resolve, teachers_of
from softlabels.student.temper import Divergence, TailMode

__all__ = ["linear_distillation_loss"]

BUFFER_BYTES = 48 * 2**20
"""Of the logits of a chunk: with what libraries need beside it, less than 64 MiB in all."""
LEAST_ROWS, MOST_ROWS = 64, 512
"""Fewer rows starve the matrix products; more gain nothing."""
CAST_BYTES = 4 * 2**20
"""Of a block of the weight that is cast for a product."""


class Head(NamedTuple):
    """A linear head, cut to the label space: views, no copies.

    Attributes:
        weight: float [V, D].
        bias: float [V]; None: none.
    """

    weight: Tensor
    bias: Tensor | None


class Gradients(NamedTuple):
    """What is accumulated, in the dtype of the arithmetic; None where nobody asks for it.

    Attributes:
        hidden: float [N, D].
        weight: float [V or more, D]; 0 in padding rows.
        bias: float [V or more]; the same.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def linear_distillation_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "W D"],
    targets: Several | None,
    *,
    bias: Float[Tensor, " W"] | None = None,
    num_classes: int | None = None,
    tail: TailMode = "bucket",
    divergence: Divergence = "forward",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    labels: Int[Tensor, " N"] | None = None,
    weights: Float[Tensor, "#N"] | Float[Tensor, ""] | None = None,
    normalizer: float | Float[Tensor, ""] | None = None,
    chunk_rows: int | None = None,
    validate: bool = True,
) -> DistillationLoss:
    """`distillation_loss` of the logits hidden weightᵀ + bias, in memory that N does not change.

    Arithmetic, options, several teachers and refusals are those of `distillation_loss`. Beside the
    gradients it takes one buffer, 48 MiB, or 64 rows of logits where these are more, and a few
    rows' copies where one softmax is not enough; however many teachers, the head is multiplied
    once forward and once back. A model that scales its logits scales `hidden` and `bias` instead;
    one that caps them needs `distillation_loss`.

    Gradients are made here, in float32 (float64 stays), for the inputs that require one, and come
    back in their dtypes. Backward scales them in place and hands them over, so it runs once.

    Args:
        hidden: the last hidden states of the kept positions, any float dtype.
        weight: of the head; tied embeddings add up as usual. Rows from V on are padding: they get
            no probability and no gradient.
        targets: None only with kd_weight 0: hard labels alone, and `kl` is NaN.
        bias: of the head, padded like `weight`.
        num_classes: V; default: all rows of `weight`.
        chunk_rows: C; default: what fits the buffer.

    Raises:
        BadInputError: an option or dtype is wrong, or backward runs a second time.
        MismatchError: shapes disagree, or ids or labels are not below V.
        DataError: targets contradict themselves.

    Source: chunks with gradients in the forward pass: Hsu et al., "Liger Kernel", 2024.
    """
    head = _head(hidden, weight, bias, num_classes, chunk_rows)
    call = Call(tail, divergence, temperature, kd_weight, labels, weights, normalizer)
    teachers = teachers_of(targets, len(hidden))
    check(call, teachers, len(hidden), len(head.weight), validate)
    inputs = (hidden, weight, bias)
    gradients = Gradients(*(_zeros(x, _sum_dtype(hidden, weight)) for x in inputs))
    # Autocast changes nothing here: it leaves products in place alone.
    with torch.no_grad():
        value, kl, hard = _evaluate(hidden, head, teachers, call, chunk_rows, gradients)
    loss = _HandOver.apply(value, _kept(gradients, inputs), *inputs)  # type: ignore[no-untyped-call]
    return DistillationLoss(cast(Tensor, loss), kl, hard)


def default_rows(n: int, v: int, dtype: torch.dtype) -> int:
    """C for `n` rows of `v` logits: chunks of one size, as many rows as the buffer holds."""
    rows = BUFFER_BYTES // (dtype.itemsize * max(v, 1))
    rows = min(max(rows, LEAST_ROWS), MOST_ROWS)
    chunks = -(-n // rows)
    return max(-(-n // max(chunks, 1)), 1)


def _evaluate(
    hidden: Tensor,
    head: Head,
    teachers: tuple[Teacher, ...],
    call: Call,
    chunk_rows: int | None,
    gradients: Gradients,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, and each row's KL and CE; adds to `gradients`."""
    n, v = len(hidden), len(head.weight)
    kl = torch.empty(n, dtype=_sum_dtype(hidden, head.weight), device=hidden.device)
    log_label = torch.empty_like(kl)
    parts = share(call, kl)
    chunk_rows = chunk_rows or default_rows(n, v, kl.dtype)
    temperature = call.temperature if teachers else 1.0
    apart = temperature != 1 and call.labels is not None
    buffer = kl.new_empty((min(chunk_rows, n), v))
    softmaxes = len(teachers) if call.tail == "bucket" else 1
    scratch = Scratch(kl, len(buffer), v, softmaxes, apart)
    some = any(gradient is not None for gradient in gradients)
    for start in range(0, n, chunk_rows):
        chunk = slice(start, min(start + chunk_rows, n))
        z = buffer[: chunk.stop - start]
        h = hidden[chunk].to(_product_dtype(hidden, head.weight))
        _logits_(z, h, head)
        kl[chunk], log_label[chunk] = evaluate_blocks_(
            z,
            _resolved(teachers, call, chunk, kl, v),
            parts.at[chunk],
            Factors(*(x[chunk] for x in parts.factors)) if some else None,
            temperature,
            scratch,
        )
        if some:
            _accumulate_(gradients, chunk, z, h, head)
    if not teachers:
        kl.fill_(torch.nan)
    value, hard = parts.total(kl, log_label)
    return value, kl, None if call.labels is None else hard


def _resolved(
    teachers: tuple[Teacher, ...], call: Call, chunk: slice, like: Tensor, num_classes: int
) -> list[Weighed]:
    """The targets of a chunk of rows: those of all rows would grow with N and with teachers."""
    if not teachers:
        return [Weighed(no_targets(like[chunk]), None)]
    own = [teacher.rows(chunk) for teacher in teachers]
    labels = None if call.labels is None else call.labels[chunk]
    return resolve(own, call.tail, labels, num_classes, like.dtype, call.divergence)


def _logits_(z: Tensor, h: Tensor, head: Head) -> None:
    """Writes h weightᵀ + bias into `z` [C, V]."""
    for part, weight in _blocks(head.weight, h.dtype):
        _add_product_(z[:, part], h, weight.t(), 0)
    if head.bias is not None:
        z.add_(head.bias)


def _accumulate_(gradients: Gradients, rows: slice, z: Tensor, h: Tensor, head: Head) -> None:
    """Adds what the gradient of the logits `z` [C, V] means for hidden states, weight and bias."""
    g = z.to(h.dtype)
    if gradients.hidden is not None:
        for part, weight in _blocks(head.weight, h.dtype):
            _add_product_(gradients.hidden[rows], g[:, part], weight)
    if gradients.weight is not None:
        _add_product_(gradients.weight[: z.shape[1]], g.t(), h)
    if gradients.bias is not None:
        gradients.bias[: z.shape[1]].add_(z.sum(0))


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in `dtype`: all at once, or block by block where that needs a copy."""
    if weight.dtype == dtype:
        yield slice(None), weight
        return
    step = max(CAST_BYTES // (dtype.itemsize * max(weight.shape[1], 1)), 1)
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        yield part, weight[part].to(dtype)


def _add_product_(out: Tensor, a: Tensor, b: Tensor, keep: int = 1) -> None:
    """out = keep out + a b; `out` may be wider than the product's dtype."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=keep)
    elif keep:
        out.add_(a @ b)
    else:
        out.copy_(a @ b)


def _sum_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any is; float32 for all else."""
    return torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the matrix products' factors; sums are in float32 or float64 everywhere.

    A CPU without bfloat16 instructions multiplies float32 16 to 20 times faster.
    """
    if hidden.device.type != "cpu" and hidden.dtype == weight.dtype:
        return hidden.dtype
    return _sum_dtype(hidden, weight)


def _zeros(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What the gradient of `x` is added up in; None where nobody asks for it."""
    if x is None or not (x.requires_grad and torch.is_grad_enabled()):
        return None
    return torch.zeros_like(x, dtype=dtype)


def _kept(gradients: Gradients, inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The gradients as backward needs them: float16 stays wide until loss scaling reached it."""
    return [
        g if g is None or x is None or x.dtype == torch.float16 else g.to(x.dtype)
        for g, x in zip(gradients, inputs, strict=True)
    ]


class _HandOver(torch.autograd.Function):
    """Returns a value whose gradients are known, and hands these over once.

    Out of place, the weight's gradient would exist twice.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *inputs: Any) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise BadInputError(
                "linear_distillation_loss: expected one backward a loss, found a second; its "
                "gradients were handed over: call the loss again, or add losses and go back once"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(factor) for g in gradients]
        return (
            None,
            None,
            *(None if g is None else g.to(t) for g, t in zip(scaled, ctx.dtypes, strict=True)),
        )


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_classes: int | None,
    chunk_rows: int | None,
) -> Head:
    """The head cut to the label space; raises where hidden states and head do not fit."""
    for name, value, axes in (("hidden", hidden, 2), ("weight", weight, 2), ("bias", bias, 1)):
        if value is None:
            continue
        if value.ndim != axes or not value.is_floating_point():
            raise BadInputError(
                f"{name}: expected {axes} axes of floats, "
                f"found shape {tuple(value.shape)!r} of {value.dtype}"
            )
    if hidden.shape[1] != weight.shape[1]:
        raise MismatchError(
            f"weight: expected {hidden.shape[1]} columns as hidden, found {weight.shape[1]}"
        )
    if bias is not None and len(bias) != len(weight):
        raise MismatchError(f"bias: expected {len(weight)} values as weight, found {len(bias)}")
    if num_classes is not None and not 0 < num_classes <= len(weight):
        raise MismatchError(
            f"num_classes: expected 1 to {len(weight)}, the rows of weight, found {num_classes!r}"
        )
    if chunk_rows is not None and chunk_rows < 1:
        raise BadInputError(f"chunk_rows: expected at least 1, found {chunk_rows!r}")
    return Head(weight[:num_classes], None if bias is None else bias[:num_classes])

"""The fused loss of a linear head against a dense float64 reference, and what it must not do."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from softlabels.errors import BadInputError, MismatchError, SoftLabelsError
from softlabels.student import blocks, fused, kernel
from softlabels.student.fused import default_rows, linear_distillation_loss
from softlabels.student.losses import (
    DistillationLoss,
    Several,
    TailMode,
    Targets,
    distillation_loss,
)
from tests.student.test_losses import (
    LABELS,
    MODES,
    WEIGHTS,
    K,
    N,
    V,
    reference_kl,
    teacher,
)

pytestmark = pytest.mark.filterwarnings("ignore:tail 'renormalize':UserWarning")
D, PADDED = 4, V + 6


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors as small as these only make threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Inputs(NamedTuple):
    """Hidden states, and a head whose rows from V on are padding."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x.detach().to(dtype).requires_grad_() for x in self))

    def logits(self) -> Tensor:
        return self.hidden @ self.weight[:V].T + self.bias[:V]


def inputs(seed: int = 1, n: int = N) -> Inputs:
    gen = torch.Generator().manual_seed(seed)
    shapes = ((n, D), (PADDED, D), (PADDED,))
    made = (2 * torch.randn(*s, generator=gen, dtype=torch.float64) for s in shapes)
    return Inputs(*(x.requires_grad_() for x in made))


def gradients(loss: Tensor, of: Inputs) -> Inputs:
    return Inputs(*torch.autograd.grad(loss, of))


def fused_loss(x: Inputs, targets: Several | None, **options: Any) -> DistillationLoss:
    settings: dict[str, Any] = {"bias": x.bias, "num_classes": V} | options
    return linear_distillation_loss(x.hidden, x.weight, targets, **settings)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("kd_weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", MODES)
def test_value_and_gradients_are_the_dense_ones_whatever_the_chunk(
    tail: TailMode,
    temperature: float,
    kd_weight: float,
    weights: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets, _ = teacher()
    labels = LABELS.clamp(min=0) if tail == "label" else LABELS
    x = inputs()
    logits = x.logits()
    kl = reference_kl(logits / temperature, targets, tail, labels)
    picked = torch.log_softmax(logits, 1)[torch.arange(N), labels.clamp(min=0)]
    hard = torch.where(labels >= 0, -picked, 0.0)
    w = torch.ones(N, dtype=torch.float64) if weights is None else weights
    want = (w * (kd_weight * temperature**2 * kl + (1 - kd_weight) * hard)).sum() / w.sum()
    want_gradients = gradients(want, x)
    # Rows of the second softmax at T != 1: two at a time.
    monkeypatch.setattr(blocks, "SCRATCH_BYTES", 2 * 8 * V)
    for chunk_rows in (1, 3, N - 1, N, N + 7, None):
        got = fused_loss(
            x,
            targets,
            tail=tail,
            temperature=temperature,
            kd_weight=kd_weight,
            labels=labels,
            weights=weights,
            chunk_rows=chunk_rows,
        )
        torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.kl, kl.detach(), rtol=1e-12, atol=1e-12)
        assert got.hard is not None
        torch.testing.assert_close(got.hard, hard.detach(), rtol=1e-12, atol=1e-12)
        found = gradients(got.loss, x)
        for name, ours, theirs in zip(Inputs._fields, found, want_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13, msg=f"d {name}")
        assert (found.weight[V:] == 0).all()
        assert (found.bias[V:] == 0).all()


@pytest.mark.parametrize("chunk_rows", [1, N - 1, N, N + 7])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", MODES)
def test_float32_is_distillation_loss_on_the_logits(
    tail: TailMode, temperature: float, chunk_rows: int
) -> None:
    targets, _ = teacher()
    x = inputs().to(torch.float32)
    options: dict[str, Any] = {
        "tail": tail,
        "temperature": temperature,
        "kd_weight": 0.5,
        "labels": LABELS.clamp(min=0).int(),
        "weights": WEIGHTS,
        "normalizer": 3.0,
    }
    want = distillation_loss(x.logits(), targets, **options)
    got = fused_loss(x, targets, chunk_rows=chunk_rows, **options)
    assert got.loss.dtype == got.kl.dtype == torch.float32
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.kl, want.kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.hard, want.hard)
    for ours, theirs in zip(gradients(got.loss, x), gradients(want.loss, x), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 3, None])
def test_hard_labels_alone_need_no_targets(chunk_rows: int | None) -> None:
    x = inputs()
    got = fused_loss(
        x, None, kd_weight=0.0, labels=LABELS, weights=WEIGHTS, chunk_rows=chunk_rows, temperature=3
    )
    each = nn.functional.cross_entropy(x.logits(), LABELS, ignore_index=-1, reduction="none")
    want = (WEIGHTS * each).sum() / WEIGHTS.sum()
    torch.testing.assert_close(got.loss, want)
    torch.testing.assert_close(got.hard, each.detach())
    assert got.kl.shape == (N,)
    assert got.kl.isnan().all()
    for ours, theirs in zip(gradients(got.loss, x), gradients(want, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", MODES)
def test_low_precision_within_its_rounding(
    tail: TailMode, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs are rounded once, sums are not: each gradient is the exact one, rounded once."""
    monkeypatch.setattr(fused, "CAST_BYTES", 4 * D * 5)  # five rows of the weight at a time
    targets, _ = teacher()
    low = inputs().to(dtype)
    exact = low.to(torch.float64)
    options: dict[str, Any] = {"tail": tail, "kd_weight": 0.5, "labels": LABELS.clamp(min=0)}
    got = fused_loss(low, targets, chunk_rows=3, **options)
    want = distillation_loss(exact.logits(), targets, **options)
    torch.testing.assert_close(got.kl.double(), want.kl, rtol=1e-5, atol=1e-5)
    unit = torch.finfo(dtype).eps / 2
    for ours, theirs in zip(gradients(got.loss, low), gradients(want.loss, exact), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=1.01 * unit, atol=1e-6)


def test_products_in_low_precision_where_the_device_is_good_at_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU does with bfloat16: its products are rounded, its sums are not."""
    monkeypatch.setattr(fused, "_product_dtype", lambda hidden, weight: torch.bfloat16)
    targets, _ = teacher()
    low = inputs().to(torch.bfloat16)
    exact = low.to(torch.float64)
    got = fused_loss(low, targets, tail="sampled", chunk_rows=2)
    want = distillation_loss(exact.logits(), targets, tail="sampled")
    torch.testing.assert_close(got.kl.double(), want.kl, rtol=0.02, atol=0.1)
    for ours, theirs in zip(gradients(got.loss, low), gradients(want.loss, exact), strict=True):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 0.02


def test_mixed_dtypes_and_autocast_do_not_lower_the_arithmetic() -> None:
    targets, _ = teacher()
    x = inputs().to(torch.float32)
    hidden = x.hidden.detach().bfloat16().requires_grad_()
    mixed = Inputs(hidden, x.weight, x.bias)
    exact = Inputs(hidden.detach().double().requires_grad_(), x.weight.double(), x.bias.double())
    want = distillation_loss(exact.logits(), targets).loss
    with torch.autocast("cpu", torch.bfloat16):
        got = fused_loss(mixed, targets, chunk_rows=2).loss
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    found = gradients(got, mixed)
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32, torch.float32]
    (want_weight,) = torch.autograd.grad(want, x.weight)
    torch.testing.assert_close(found.weight, want_weight, rtol=1e-4, atol=1e-6)


def test_float16_gradients_survive_until_loss_scaling() -> None:
    targets, _ = teacher()
    x = inputs().to(torch.float16)
    exact = x.to(torch.float32)
    found = gradients(fused_loss(x, targets, normalizer=1e8).loss * 2**20, x)
    want = gradients(distillation_loss(exact.logits(), targets).loss, exact)
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(
            ours.float(), theirs * (N * 2**20 / 1e8), rtol=2**-9, atol=2**-24
        )


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the storage of every tensor that an operation returns with more than `most` values."""

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most
        self.found: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() > self.most * x.itemsize:
                self.found[x.untyped_storage().data_ptr()] = x.numel()
        return out


@pytest.mark.parametrize(("temperature", "kd_weight"), [(1.0, 0.5), (2.0, 0.5), (1.0, 0.0)])
def test_logits_of_all_rows_never_exist(temperature: float, kd_weight: float) -> None:
    n, v, d, c = 96, 200, 8, 8
    targets, _ = teacher(n=n, v=v)
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=gen).requires_grad_()
    weight = torch.randn(v, d, generator=gen).requires_grad_()
    options: dict[str, Any] = {"labels": torch.arange(n), "kd_weight": kd_weight}
    options |= {"temperature": temperature, "validate": False}
    with Allocations(2 * c * v) as seen:
        loss = linear_distillation_loss(hidden, weight, targets, chunk_rows=c, **options).loss
        torch.autograd.backward(loss)
    assert not seen.found
    # The buffer is one, for all chunks, and the weight's gradient is made once.
    hidden.grad = weight.grad = None
    with Allocations(v * d - 1) as seen:
        loss = linear_distillation_loss(hidden, weight, targets, chunk_rows=c, **options).loss
        torch.autograd.backward(loss)
    assert weight.grad is not None
    known = {weight.grad.data_ptr(), weight.data_ptr()}
    assert weight.grad.data_ptr() in seen.found
    assert len(set(seen.found) - known) <= 1 + (temperature != 1), seen.found
    with Allocations(2 * c * v) as seen:
        torch.autograd.backward(distillation_loss(hidden @ weight.T, targets, **options).loss)
    assert seen.found


def test_chunks_are_even_and_fit_the_buffer() -> None:
    limit = 48 * 2**20
    assert default_rows(10_000, 131_072, torch.float32) == 96
    assert default_rows(10_000, 1_000, torch.float32) == 500  # 20 chunks of 500, not 512 … 272
    assert default_rows(1_024, 32_768, torch.float32) == 342
    assert default_rows(3, 131_072, torch.float32) == 3
    assert default_rows(10_000, 10**6, torch.float32) == 64
    assert default_rows(0, 10, torch.float32) == 1
    for v in (2, 1_000, 49_152, 151_936, 196_000):
        for n in (1, 63, 511, 513, 4_097):
            rows = default_rows(n, v, torch.float32)
            assert rows * v * 4 <= limit
            chunks = -(-n // rows)
            assert chunks * rows - n < chunks  # no chunk lacks more than its share


def test_no_rows_is_a_loss_of_zero_with_gradients_of_zero() -> None:
    targets, _ = teacher(n=0)
    x = inputs(n=0)
    for got in (
        fused_loss(x, targets, tail="sampled"),
        fused_loss(x, targets, temperature=2.0, labels=LABELS[:0], kd_weight=0.5),
        fused_loss(x, None, kd_weight=0.0, labels=LABELS[:0]),
    ):
        assert float(got.loss.detach()) == 0
        assert got.kl.shape == (0,)
        for gradient, of in zip(gradients(got.loss, x), x, strict=True):
            assert gradient.shape == of.shape
            assert (gradient == 0).all()


def test_tied_embeddings_add_up() -> None:
    targets, _ = teacher()
    gen = torch.Generator().manual_seed(4)
    table = torch.randn(V, D, generator=gen, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(0, V, (N,), generator=gen)
    got = linear_distillation_loss(table[tokens].tanh(), table, targets, chunk_rows=2).loss
    want = distillation_loss(table[tokens].tanh() @ table.T, targets).loss
    (found,), (expected,) = (torch.autograd.grad(loss, table) for loss in (got, want))
    torch.testing.assert_close(found, expected)


def test_only_the_gradients_that_are_wanted_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, _ = teacher()
    x = inputs()
    want = gradients(fused_loss(x, targets).loss, x)
    for name in Inputs._fields:
        alone = Inputs(*(value.detach() for value in x))
        getattr(alone, name).requires_grad_()
        loss = fused_loss(alone, targets, chunk_rows=3).loss
        torch.autograd.backward(loss)
        torch.testing.assert_close(getattr(alone, name).grad, getattr(want, name))
        assert sum(value.grad is not None for value in alone) == 1
    no_bias = linear_distillation_loss(x.hidden, x.weight, targets, num_classes=V)
    plain = distillation_loss(x.hidden @ x.weight[:V].T, targets)
    torch.testing.assert_close(no_bias.loss, plain.loss)
    monkeypatch.setattr(kernel, "gradient_", None)
    with torch.no_grad():
        silent = fused_loss(x, targets).loss
    frozen = fused_loss(Inputs(*(value.detach() for value in x)), targets).loss
    assert not silent.requires_grad
    assert not frozen.requires_grad
    torch.testing.assert_close(silent, fused_value(x, targets))


def fused_value(x: Inputs, targets: Targets) -> Tensor:
    return reference_kl(x.logits().detach(), targets, "bucket", None).mean()


def test_backward_multiplies_runs_once_and_is_not_differentiable() -> None:
    targets, _ = teacher()
    x = inputs()
    before = [value.detach().clone() for value in x]
    once = gradients(fused_loss(x, targets).loss, x)
    loss = fused_loss(x, targets).loss
    tripled = Inputs(*torch.autograd.grad(-3 * loss, x, retain_graph=True))
    for ours, theirs in zip(tripled, once, strict=True):
        torch.testing.assert_close(ours, -3 * theirs)
    with pytest.raises(BadInputError, match="expected one backward a loss, found a second"):
        torch.autograd.grad(loss, x)
    for value, old in zip(x, before, strict=True):
        torch.testing.assert_close(value.detach(), old, rtol=0, atol=0)
    first = torch.autograd.grad(fused_loss(x, targets).loss ** 2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(first[0].sum())


def test_losses_of_two_teachers_go_back_together() -> None:
    (one, _), (two, _) = teacher(1), teacher(2)
    x = inputs()
    share = torch.linspace(0, 1, N, dtype=torch.float64)
    pairs = ((one, share), (two, 1 - share))
    got = sum(fused_loss(x, t, weights=w, normalizer=N, chunk_rows=2).loss for t, w in pairs)
    want = sum(distillation_loss(x.logits(), t, weights=w, normalizer=N).loss for t, w in pairs)
    assert isinstance(got, Tensor)
    assert isinstance(want, Tensor)
    for ours, theirs in zip(gradients(got, x), gradients(want, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_row_of_weight_zero_is_silent_whatever_it_holds() -> None:
    targets, _ = teacher()
    x = inputs()
    weights = torch.ones(N, dtype=torch.float64)
    weights[2] = 0
    found = gradients(fused_loss(x, targets, weights=weights, chunk_rows=2).loss, x)
    assert (found.hidden[2] == 0).all()
    kept = torch.arange(N) != 2
    rest = Targets(*(None if t is None else t[kept] for t in targets))  # type: ignore[arg-type]
    want = distillation_loss(x.logits()[kept], rest).loss
    for ours, theirs in zip(found, gradients(want, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_extreme_logits_stay_finite() -> None:
    """A student sure to e^-1000 that the teacher is wrong, in float32."""
    targets, _ = teacher()
    x = inputs()
    sharp = Inputs(x.hidden * 100, x.weight, x.bias).to(torch.float32)
    exact = sharp.to(torch.float64)
    got = fused_loss(sharp, targets, chunk_rows=3)
    want = distillation_loss(exact.logits(), targets)
    assert float(want.kl.max()) > 300
    torch.testing.assert_close(got.kl.double(), want.kl, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(gradients(got.loss, sharp), gradients(want.loss, exact), strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-2)


REFUSED: dict[str, tuple[dict[str, Any], type[SoftLabelsError], str]] = {
    "hidden of a sequence": (
        {"hidden": torch.zeros(1, N, D)},
        BadInputError,
        r"hidden: expected 2 axes of floats, found shape \(1, 7, 4\) of torch.float32",
    ),
    "whole weight": ({"weight": torch.zeros(V, D).long()}, BadInputError, "weight.*int64"),
    "other width": (
        {"weight": torch.zeros(V, D + 1)},
        MismatchError,
        "weight: expected 4 columns as hidden, found 5",
    ),
    "short bias": ({"bias": torch.zeros(V - 1)}, MismatchError, "bias: expected 23 .* found 22"),
    "too many classes": (
        {"num_classes": V + 1},
        MismatchError,
        "num_classes: expected 1 to 23, the rows of weight, found 24",
    ),
    "no classes": ({"num_classes": 0}, MismatchError, "num_classes.*found 0"),
    "an id among the padding": (
        {"num_classes": 9},
        MismatchError,
        "targets.ids, row 0: expected ids from 0 to 8",
    ),
    "no rows a chunk": ({"chunk_rows": 0}, BadInputError, "chunk_rows: .* found 0"),
    "nothing to learn": (
        {"targets": None, "kd_weight": 0.5, "labels": LABELS},
        BadInputError,
        "targets: expected some with kd_weight 0.5, found None",
    ),
    "no labels": ({"targets": None, "kd_weight": 0.0}, BadInputError, "labels: .* found None"),
    "label too large": (
        {"targets": None, "kd_weight": 0.0, "labels": LABELS + 1},
        MismatchError,
        r"labels, row 3: expected ids from 0 to 22, or -1 for none, found \[23\]",
    ),
    "other rows": ({"hidden": torch.zeros(N + 1, D)}, MismatchError, "expected 8 rows.*found 7"),
    "reverse without a bucket": (
        {"divergence": "reverse", "tail": "sampled"},
        BadInputError,
        "divergence 'reverse' with tail 'sampled': expected tail 'bucket'",
    ),
    "unknown divergence": (
        {"divergence": "sideways"},
        BadInputError,
        r"divergence: expected one of \('forward', 'reverse'\), found 'sideways'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name: str) -> None:
    changes, error, message = REFUSED[name]
    call: dict[str, Any] = {
        "hidden": torch.zeros(N, D),
        "weight": torch.zeros(V, D),
        "targets": teacher(k=K)[0],
    }
    with pytest.raises(error, match=message) as caught:
        linear_distillation_loss(**(call | changes))
    assert "\n" not in str(caught.value)

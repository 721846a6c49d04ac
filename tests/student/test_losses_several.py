"""Several teachers a position: the sum of their losses, at the cost of one where that can be."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from softlabels.errors import BadInputError, DataError, MismatchError, SoftLabelsError
from softlabels.student import blocks, fused, kernel
from softlabels.student.fused import linear_distillation_loss
from softlabels.student.losses import DistillationLoss, TailMode, Targets, distillation_loss
from tests.student.test_fused import Allocations, fused_loss, gradients, inputs
from tests.student.test_losses import (
    LABELS,
    MODES,
    WEIGHTS,
    N,
    V,
    gradient,
    reference_kl,
    student,
    teacher,
)

pytestmark = pytest.mark.filterwarnings("ignore:tail 'renormalize':UserWarning")
Pairs = list[tuple[Targets, Tensor]]
LINEAR: tuple[TailMode, ...] = ("sampled", "renormalize", "label", "uniform")
SHAPES = ((5, 6), (3, 4), (7, 2))
"""k and m of each teacher."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def teachers(count: int, disjoint: bool = False) -> Pairs:
    """Teachers of other k and m each; shares of a row differ, and some are 0.

    Row 2 has the first teacher only, row 4 all but the first, row 6 none at all.
    """
    shares = torch.rand(N, count, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    shares[2, 1:] = 0
    if count > 1:
        shares[4, 0] = 0
    shares /= shares.sum(1, keepdim=True)
    shares[6] = 0
    pairs = []
    for number, (k, m) in enumerate(SHAPES[:count]):
        favoured = slice(7 * number, 7 * number + 7) if disjoint else slice(0, 0)
        pairs.append((teacher(number, k=k, m=m, favoured=favoured)[0], shares[:, number]))
    return pairs


def spoilt(pairs: Pairs) -> Pairs:
    """The same, with nonsense in every row that does not count."""
    out = []
    for targets, weight in pairs:
        rows = (weight == 0).unsqueeze(1)
        ids, draws = targets.ids.masked_fill(rows, 99), targets.draws
        logprobs = targets.logprobs.masked_fill(rows, torch.nan)
        tail = targets.tail_logprob.masked_fill(rows[:, 0], torch.nan)
        entropy = None
        if targets.entropy is not None:
            entropy = targets.entropy.masked_fill(rows[:, 0], torch.nan)
        draws = None if draws is None else draws.masked_fill(rows, -7)
        out.append((Targets(ids, logprobs, tail, draws, entropy), weight))
    return out


def in_float32(targets: Targets) -> Targets:
    assert targets.draws is not None
    assert targets.entropy is not None
    return Targets(
        targets.ids,
        targets.logprobs.float(),
        targets.tail_logprob.float(),
        targets.draws,
        targets.entropy.float(),
    )


def reference(
    logits: Tensor, pairs: Pairs, tail: TailMode, temperature: float, labels: Tensor
) -> Tensor:
    """Sum of w KL(teacher‖student) by loops over dense vectors, float64 [N]."""
    z = logits / temperature
    return sum(
        (weight * reference_kl(z, targets, tail, labels) for targets, weight in pairs),
        start=torch.zeros(len(logits), dtype=torch.float64),
    )


@pytest.mark.parametrize("disjoint", [False, True], ids=["overlapping", "disjoint"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("temperature", "kd_weight"), [(1.0, 1.0), (1.0, 0.3), (2.0, 0.6)])
@pytest.mark.parametrize("tail", MODES)
def test_value_and_gradient_are_the_dense_ones(
    tail: TailMode,
    temperature: float,
    kd_weight: float,
    count: int,
    disjoint: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = teachers(count, disjoint)
    heads = [set(targets.ids.flatten().tolist()) - {-1} for targets, _ in pairs]
    assert not disjoint or len(set.union(*heads)) == sum(map(len, heads))
    labels = LABELS.clamp(min=0) if tail == "label" else LABELS
    x = inputs()
    logits = x.logits()
    kl = reference(logits, pairs, tail, temperature, labels)
    picked = torch.log_softmax(logits, 1)[torch.arange(N), labels.clamp(min=0)]
    hard = torch.where(labels >= 0, -picked, 0.0)
    each = kd_weight * temperature**2 * kl + (1 - kd_weight) * hard
    want = (WEIGHTS * each).sum() / WEIGHTS.sum()
    wanted = gradients(want, x)
    options: dict[str, Any] = {"tail": tail, "temperature": temperature, "kd_weight": kd_weight}
    options |= {"labels": labels, "weights": WEIGHTS}
    monkeypatch.setattr(blocks, "SCRATCH_BYTES", 2 * 8 * V)  # two rows at a time
    for given in (pairs, spoilt(pairs)):
        results = [distillation_loss(x.logits(), given, **options)]
        results += [fused_loss(x, given, chunk_rows=rows, **options) for rows in (1, 3, None)]
        for got in results:
            torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got.kl, kl.detach(), rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got.hard, hard.detach(), rtol=1e-12, atol=1e-12)
            for ours, theirs in zip(gradients(got.loss, x), wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", MODES)
def test_weights_need_not_add_up_to_one(tail: TailMode, temperature: float) -> None:
    pairs = [(targets, weight * (1 + torch.arange(N))) for targets, weight in teachers(2)]
    labels, logits = LABELS.clamp(min=0), student()
    got = distillation_loss(logits, pairs, tail=tail, temperature=temperature, labels=labels)
    kl = reference(logits, pairs, tail, temperature, labels)
    torch.testing.assert_close(got.kl, kl.detach(), rtol=1e-12, atol=1e-12)
    (wanted,) = torch.autograd.grad(temperature**2 * kl.mean(), logits)
    torch.testing.assert_close(gradient(got, logits), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "kd_weight": 0.5, "labels": LABELS}])
@pytest.mark.parametrize("tail", MODES)
def test_one_teacher_of_weight_one_gives_the_same_bits(
    tail: TailMode, options: dict[str, Any]
) -> None:
    targets = in_float32(teacher()[0])
    if tail == "label":
        options = options | {"labels": LABELS.clamp(min=0)}
    x = inputs().to(torch.float32)
    results = []
    for given in (targets, [(targets, torch.ones(N))]):
        whole = distillation_loss(x.logits(), given, tail=tail, **options)
        in_chunks = fused_loss(x, given, tail=tail, chunk_rows=3, **options)
        results.append(
            [t for r in (whole, in_chunks) for t in (r.loss, r.kl, *gradients(r.loss, x))]
        )
    assert all(torch.equal(plain, several) for plain, several in zip(*results, strict=True))


@pytest.mark.parametrize("tail", MODES)
def test_with_everything_stored_it_is_the_dense_mixture(tail: TailMode) -> None:
    none = torch.full((N,), -torch.inf, dtype=torch.float64)
    full, dense = zip(*(teacher(seed, k=V, m=0, full_rows=True) for seed in range(3)), strict=True)
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    pairs = [(t._replace(tail_logprob=none), s) for t, s in zip(full, shares, strict=True)]
    mixture = sum(s * d.exp() for s, d in zip(shares, dense, strict=True))
    assert isinstance(mixture, Tensor)
    logits = student()
    got = distillation_loss(logits, pairs, tail=tail, labels=LABELS)
    wanted = (logits.softmax(1) - mixture).detach() / N
    torch.testing.assert_close(gradient(got, logits), wanted, rtol=0, atol=1e-14)
    # The value exceeds the KL to the mixture by what the teachers disagree among themselves.
    to_mixture = (mixture * (mixture.log() - logits.log_softmax(1))).sum(1)
    apart = sum(
        s * (d.exp() * (d - mixture.log())).sum(1) for s, d in zip(shares, dense, strict=True)
    )
    assert isinstance(apart, Tensor)
    assert float(apart.min()) > 0.1
    torch.testing.assert_close(got.kl, (to_mixture + apart).detach(), rtol=1e-10, atol=1e-10)


def test_draws_give_the_mixtures_gradient_on_average_and_a_bucket_does_not() -> None:
    many, v = 20_000, 12
    one, two = (teacher(seed, n=1, v=v, k=3, m=0) for seed in (0, 1))
    shares = torch.tensor([0.7, 0.3], dtype=torch.float64)
    gen = torch.Generator().manual_seed(5)
    pairs = []
    for (targets, dense), share in zip((one, two), shares, strict=True):
        rest = dense.exp().clone()
        rest[0, targets.ids[0]] = 0
        repeated = Targets(*(x.repeat_interleave(many, 0) for x in targets[:3]))
        draws = torch.multinomial(rest.repeat(many, 1), 4, replacement=True, generator=gen)
        pairs.append((repeated._replace(draws=draws), share))
    mixture = shares[0] * one[1].exp() + shares[1] * two[1].exp()
    z = student(n=1, v=v).detach()
    wanted = z.softmax(1) - mixture

    def error_and_noise(tail: TailMode) -> tuple[float, float]:
        logits = z.repeat(many, 1).requires_grad_()
        got = distillation_loss(logits, pairs, tail=tail, normalizer=1.0)
        off = gradient(got, logits) - wanted
        return float(off.mean(0).norm()), float(off.var(0).sum().div(many).sqrt())

    error, noise = error_and_noise("sampled")
    assert 0 < error < 3 * noise
    assert noise < 0.003
    assert error_and_noise("bucket")[0] > 20 * noise


@pytest.mark.parametrize("tail", LINEAR)
def test_linear_tails_take_one_softmax_and_one_product_each_way(
    tail: TailMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert softmaxes_and_products(tail, 3, monkeypatch) == (1, 3)


def test_a_bucket_takes_a_softmax_a_teacher_and_one_product_each_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert softmaxes_and_products("bucket", 3, monkeypatch) == (3, 3)
    assert softmaxes_and_products("bucket", 1, monkeypatch) == (1, 3)


def softmaxes_and_products(
    tail: TailMode, count: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """How often a chunk is normalised, and multiplied: logits, hidden states, weight."""
    seen = {"softmax": 0, "product": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            seen[name] += 1
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        normalize, product = kernel.normalize_outside_, fused._add_product_
        patch.setattr(kernel, "normalize_outside_", counted("softmax", normalize))
        patch.setattr(fused, "_add_product_", counted("product", product))
        fused_loss(inputs(), teachers(count), tail=tail, labels=LABELS.clamp(min=0))
    return seen["softmax"], seen["product"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "sampled"])
def test_memory_does_not_grow_with_rows_or_teachers(
    tail: TailMode, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, v, d, c = 96, 200, 8, 8
    monkeypatch.setattr(blocks, "SCRATCH_BYTES", 4 * v * 3)
    one, _ = teacher(n=n, v=v)
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=gen).requires_grad_()
    weight = torch.randn(v, d, generator=gen).requires_grad_()
    options: dict[str, Any] = {"labels": torch.arange(n), "kd_weight": 0.5, "tail": tail}
    options |= {"temperature": temperature, "validate": False, "chunk_rows": c}
    with Allocations(c * v) as seen:
        for count in (2, 5):
            pairs = [(one, torch.full((n,), 1 / count))] * count
            loss = linear_distillation_loss(hidden, weight, pairs, **options).loss
            torch.autograd.backward(loss)
    known = {x.data_ptr() for x in (hidden, weight, weight.grad) if x is not None}
    assert not set(seen.found) - known
    # One buffer; copies of a few rows only where one softmax is not enough.
    still, fixed = hidden.detach(), weight.detach()
    with Allocations(2 * v) as seen:
        linear_distillation_loss(still, fixed, [(one, torch.ones(n))] * 3, **options)
    made = set(seen.found) - {x.data_ptr() for x in (still, fixed, *one) if x is not None}
    assert len(made) == 1 + (tail == "bucket") + (temperature != 1), seen.found


@pytest.mark.parametrize("tail", MODES)
def test_gradients_of_a_row_add_up_to_nothing_in_float32(tail: TailMode) -> None:
    """Shares that float32 rounded, and teachers that are sure of different classes."""
    pairs = []
    for number, (targets, _) in enumerate(teachers(3)):
        small = in_float32(targets)
        pairs.append((small, torch.full((N,), (0.1, 0.2, 0.7)[number])))
    logits = (student().float() * 30).detach().requires_grad_()
    got = distillation_loss(logits, pairs, tail=tail, labels=LABELS.clamp(min=0), normalizer=1.0)
    assert torch.isfinite(got.kl).all()
    sums = gradient(got, logits).double().sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=2e-6)


def test_a_missing_label_or_draw_matters_only_where_the_teacher_counts() -> None:
    (one, _), (two, _) = teachers(2)
    labels = LABELS.clone()
    there = (labels >= 0).double()
    good: Pairs = [(one, there), (two, there)]
    distillation_loss(student(), good, tail="label", labels=labels)
    bad = [(one, there), (two, torch.ones(N))]
    with pytest.raises(DataError, match=r"targets\[1\] of 2: labels, row 2: expected a label"):
        distillation_loss(student(), bad, tail="label", labels=labels)
    nowhere = torch.zeros(N)
    distillation_loss(
        student(), [(one, there), (two._replace(draws=None), nowhere)], tail="sampled"
    )
    empty = two._replace(ids=torch.full_like(two.ids, -1)), nowhere
    distillation_loss(student(), [(one, there), empty], tail="renormalize")


def test_an_unknown_entropy_is_taken_as_far_as_it_is_known() -> None:
    """As where tables that store it and others that do not are read together."""
    (targets, weight), *_ = teachers(2)
    assert targets.entropy is not None
    unknown = torch.arange(N) % 2 == 0
    part = targets._replace(entropy=targets.entropy.masked_fill(unknown, torch.nan))
    logits = student()
    got, full, none = (
        distillation_loss(logits, [(one, torch.ones(N)), (targets, weight)], tail="sampled").kl
        for one in (part, targets, targets._replace(entropy=None))
    )
    assert torch.equal(got, none.where(unknown, full))
    assert not torch.equal(none, full)


def _negative(at: int) -> Tensor:
    weights = torch.ones(N)
    weights[at] = -0.5
    return weights


ONES = torch.ones(N)
REFUSED: dict[str, tuple[Sequence[Any], dict[str, Any], type[SoftLabelsError], str]] = {
    "reverse": (
        [(teacher(0)[0], ONES), (teacher(1)[0], ONES)],
        {"divergence": "reverse"},
        BadInputError,
        "divergence 'reverse' with 2 teachers: expected one",
    ),
    "none": ([], {}, BadInputError, "expected at least one teacher, found an empty sequence"),
    "no weights": (
        [(teacher(0)[0], ONES), teacher(1)[0]],
        {},
        BadInputError,
        r"targets\[1\]: expected a pair of Targets and weights \[N\], found 'Targets'",
    ),
    "whole weights": (
        [(teacher(0)[0], ONES.long())],
        {},
        BadInputError,
        r"targets\[0\]: expected weights of floats, found torch.int64",
    ),
    "a number": ([(teacher(0)[0], 0.5)], {}, BadInputError, "weights of floats, found 'float'"),
    "few weights": (
        [(teacher(0)[0], ONES), (teacher(1)[0], ONES[:3])],
        {},
        MismatchError,
        r"targets\[1\]: expected weights of shape \(\) or \(7,\), found \(3,\)",
    ),
    "a negative weight": (
        [(teacher(0)[0], ONES), (teacher(1)[0], _negative(5))],
        {},
        DataError,
        r"targets\[1\] of 2: weights of targets, row 5: expected .* found \[-0.5\]",
    ),
    "a weight without end": (
        [(teacher(0)[0], ONES), (teacher(1)[0], ONES * torch.inf)],
        {},
        DataError,
        r"targets\[1\] of 2: weights of targets, row 0: expected .* found \[inf\]",
    ),
    "a weight that is none": (
        [(teacher(0)[0], ONES), (teacher(1)[0], ONES * torch.nan)],
        {},
        DataError,
        r"targets\[1\] of 2: weights of targets, row 0: expected .* found \[nan\]",
    ),
    "other rows": (
        [(teacher(0)[0], ONES), (teacher(1, n=8)[0], ONES)],
        {},
        MismatchError,
        r"targets\[1\] of 2: targets: expected 7 rows as logits, found 8",
    ),
    "an id too large": (
        [(teacher(0)[0], ONES), (teacher(1, v=V + 9, k=V)[0], ONES)],
        {},
        MismatchError,
        r"targets\[1\] of 2: targets.ids, row 0: expected ids from 0 to 22",
    ),
    "no draws": (
        [(teacher(0)[0], ONES), (teacher(1, m=0)[0], ONES)],
        {"tail": "sampled"},
        BadInputError,
        r"targets\[1\] of 2: tail 'sampled': expected draws, found none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(name: str) -> None:
    targets, options, error, message = REFUSED[name]
    calls: list[Any] = [
        lambda: distillation_loss(student(), targets, **options),
        lambda: fused_loss(inputs(), targets, **options),
    ]
    for call in calls:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_no_rows_is_a_loss_of_zero() -> None:
    pairs = [(teacher(seed, n=0)[0], torch.ones(0)) for seed in range(2)]
    for tail in MODES:
        found: DistillationLoss = fused_loss(inputs(n=0), pairs, tail=tail, labels=LABELS[:0])
        assert float(found.loss.detach()) == 0
        assert found.kl.shape == (0,)

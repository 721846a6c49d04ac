"""Distillation losses against a dense float64 reference, and the laws they must keep."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softlabels.student import kernel
from softlabels.student.losses import DistillationLoss, TailMode, Targets, distillation_loss

MODES: tuple[TailMode, ...] = get_args(TailMode)
N, V, K, M = 7, 23, 5, 6
pytestmark = pytest.mark.filterwarnings("ignore:tail 'renormalize':UserWarning")


def teacher(
    seed: int = 0,
    n: int = N,
    v: int = V,
    k: int = K,
    m: int = M,
    full_rows: bool = False,
    favoured: slice = slice(0, 0),
) -> tuple[Targets, Tensor]:
    """Float64 targets with ragged heads (1 to k ids a row, then -1), and the dense teacher.

    `favoured` classes are the likeliest: so that heads of several teachers share no id.
    """
    gen = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, v, generator=gen, dtype=torch.float64)
    logits[:, favoured] += 12
    dense = torch.log_softmax(logits, 1)
    logprobs, ids = dense.topk(k, 1)
    keep = torch.arange(k) < (k - torch.arange(n) % max(k, 1)).unsqueeze(1)
    if not full_rows:
        ids, logprobs = ids.where(keep, -1), logprobs.where(keep, -torch.inf)
    rest = dense.clone()
    for row, row_ids in enumerate(ids):
        rest[row, row_ids[row_ids >= 0]] = -torch.inf
    draws = None
    if m:
        draws = torch.multinomial(rest.exp(), m, replacement=True, generator=gen)
    entropy = -(dense.exp() * dense).sum(1)
    return Targets(ids, logprobs, rest.logsumexp(1), draws, entropy), dense


def student(seed: int = 1, n: int = N, v: int = V) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, v, generator=gen, dtype=torch.float64)).requires_grad_()


def reference_kl(z: Tensor, targets: Targets, tail: TailMode, labels: Tensor | None) -> Tensor:
    """KL of each row by loops over dense float64 vectors; z: logits over temperature."""
    rows = []
    for i in range(z.shape[0]):
        log_q = torch.log_softmax(z[i].double(), 0)
        ids = [int(j) for j in targets.ids[i] if j >= 0]
        r = targets.tail_logprob[i].double().exp()
        head = targets.logprobs[i][: len(ids)].double().exp()
        head = head / head.sum() * (1 - r) if ids else head
        dense = torch.zeros(z.shape[1], dtype=torch.float64)
        dense[ids] = head
        off = torch.ones(z.shape[1], dtype=torch.bool)
        off[ids] = False
        if tail == "bucket":
            log_q = torch.cat([log_q[ids], torch.logsumexp(log_q[off], 0).reshape(1)])
            dense = torch.cat([dense[ids], r.reshape(1)])
        elif tail == "uniform":
            dense[off] = r / max(int(off.sum()), 1)
        elif tail == "renormalize":
            dense = dense / dense.sum()
        elif tail == "label" and labels is not None and r > 0:
            dense[int(labels[i])] += r
        elif tail == "sampled" and targets.draws is not None:
            for draw in targets.draws[i]:
                dense[max(int(draw), 0)] += r / targets.draws.shape[1]
        used = dense > 0
        entropy = -(dense[used] * dense[used].log()).sum()
        if tail == "sampled" and targets.entropy is not None:
            entropy = targets.entropy[i]
        elif tail == "sampled":
            known = torch.cat([head, r.reshape(1)])
            entropy = -torch.xlogy(known, known).sum()
        rows.append(-(dense[used] * log_q[used]).sum() - entropy)
    return torch.stack(rows)


def off_support(targets: Targets, v: int = V) -> Tensor:
    on = torch.zeros(targets.ids.shape[0], v + 1, dtype=torch.bool)
    on.scatter_(1, targets.ids.where(targets.ids >= 0, v), True)
    return ~on[:, :v]


def gradient(result: DistillationLoss, logits: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(result.loss, logits)
    return grad


LABELS = torch.tensor([3, 0, -1, 22, 7, 1, 5])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 0.25, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("stored_entropy", [True, False])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("kd_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", MODES)
def test_value_and_gradient_are_the_dense_ones(
    tail: TailMode,
    temperature: float,
    kd_weight: float,
    weights: Tensor | None,
    stored_entropy: bool,
) -> None:
    targets, _ = teacher()
    if not stored_entropy:
        targets = targets._replace(entropy=None)
    labels = LABELS.clamp(min=0) if tail == "label" else LABELS
    logits = student()
    got = distillation_loss(
        logits,
        targets,
        tail=tail,
        temperature=temperature,
        kd_weight=kd_weight,
        labels=labels,
        weights=weights,
    )
    kl = reference_kl(logits / temperature, targets, tail, labels)
    picked = torch.log_softmax(logits, 1)[torch.arange(N), labels.clamp(min=0)]
    hard = torch.where(labels >= 0, -picked, 0.0)
    w = torch.ones(N, dtype=torch.float64) if weights is None else weights
    want = (w * (kd_weight * temperature**2 * kl + (1 - kd_weight) * hard)).sum() / w.sum()
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.kl, kl.detach(), rtol=1e-12, atol=1e-12)
    assert got.hard is not None
    torch.testing.assert_close(got.hard, hard.detach(), rtol=1e-12, atol=1e-12)
    (want_grad,) = torch.autograd.grad(want, logits)
    torch.testing.assert_close(gradient(got, logits), want_grad, rtol=1e-11, atol=1e-13)
    assert not got.kl.requires_grad
    assert not got.hard.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("tail", MODES)
def test_gradcheck(tail: TailMode, temperature: float) -> None:
    targets, _ = teacher(n=3, v=9, k=3)

    def loss(logits: Tensor) -> Tensor:
        return distillation_loss(
            logits,
            targets,
            tail=tail,
            temperature=temperature,
            kd_weight=0.4,
            labels=LABELS[:3].clamp(min=0),
            weights=WEIGHTS[:3],
        ).loss

    assert torch.autograd.gradcheck(loss, (student(n=3, v=9),))


@pytest.mark.parametrize("tail", MODES)
def test_float32_and_int32_agree_with_float64(tail: TailMode) -> None:
    targets, _ = teacher()
    small = Targets(*(None if x is None else x.to(_narrow(x)) for x in targets))  # type: ignore[arg-type]
    wide, narrow = student(), student().float().detach().requires_grad_()
    labels = LABELS.clamp(min=0)
    want = distillation_loss(wide, targets, tail=tail, labels=labels, kd_weight=0.7)
    got = distillation_loss(narrow, small, tail=tail, labels=labels.int(), kd_weight=0.7)
    assert got.loss.dtype == got.kl.dtype == torch.float32
    torch.testing.assert_close(got.kl.double(), want.kl, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(
        gradient(got, narrow).double(), gradient(want, wide), rtol=1e-5, atol=1e-7
    )


def _narrow(x: Tensor) -> torch.dtype:
    return torch.float32 if x.is_floating_point() else torch.int32


@pytest.mark.parametrize("tail", MODES)
def test_everything_stored_is_the_dense_kl(tail: TailMode) -> None:
    full, dense = teacher(k=V, m=0, full_rows=True)
    full = full._replace(tail_logprob=torch.full((N,), -torch.inf, dtype=torch.float64))
    logits = student()
    got = distillation_loss(logits, full, tail=tail, labels=LABELS)
    want = torch.nn.functional.kl_div(
        torch.log_softmax(logits, 1), dense, log_target=True, reduction="none"
    ).sum(1)
    torch.testing.assert_close(got.kl, want.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        gradient(got, logits), (logits.softmax(1) - dense.exp()).detach() / N, rtol=0, atol=1e-14
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(0, V - 1),
    sharp=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_bucket_lies_between_zero_and_the_full_kl(seed: int, k: int, sharp: float) -> None:
    targets, dense = teacher(seed, k=k, m=0, full_rows=True)
    logits = student(seed + 1) * sharp
    full = (dense.exp() * (dense - torch.log_softmax(logits, 1))).sum(1)
    kl = distillation_loss(logits, targets).kl
    assert (kl >= -1e-12).all()
    assert (kl <= full + 1e-12).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", MODES)
def test_gradients_sum_to_zero_and_reach_every_class(tail: TailMode, temperature: float) -> None:
    targets, _ = teacher()
    logits = student()
    labels = LABELS.clamp(min=0)
    got = distillation_loss(logits, targets, tail=tail, temperature=temperature, labels=labels)
    grad = gradient(got, logits)
    torch.testing.assert_close(grad.sum(1), torch.zeros_like(grad[:, 0]), rtol=0, atol=1e-15)
    # Normalising both sides on S would leave all of these at 0.
    assert (grad[off_support(targets)].abs() > 1e-12).all()


def test_repeated_draws_add() -> None:
    ids, logprobs = torch.tensor([[4]]), torch.tensor([[0.5]]).log()
    draws = torch.tensor([[2, 2, 2, 0]])
    targets = Targets(ids, logprobs, torch.tensor([0.5]).log(), draws)
    logits = torch.zeros(1, 6, requires_grad=True)
    got = gradient(distillation_loss(logits, targets, tail="sampled"), logits)
    want = 1 / 6 - torch.tensor([[0.125, 0, 0.375, 0, 0.5, 0]])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("k", [0, K])
def test_sampled_is_unbiased(k: int) -> None:
    """Over 40,000 real tail draws of one row, mean gradient and KL are the full teacher's."""
    n = 40_000
    gen = torch.Generator().manual_seed(5)
    dense = torch.log_softmax(1.5 * torch.randn(V, generator=gen, dtype=torch.float64), 0)
    logprobs, ids = dense.topk(k)
    rest = dense.clone()
    rest[ids] = -torch.inf
    draws = torch.multinomial(rest.exp().expand(n, V), 4, replacement=True, generator=gen)
    entropy = -(dense.exp() * dense).sum().expand(n)
    tail = rest.logsumexp(0).expand(n)
    targets = Targets(ids.expand(n, k), logprobs.expand(n, k), tail, draws, entropy)
    logits = student(n=1).detach().expand(n, V).clone().requires_grad_()
    got = distillation_loss(logits, targets, tail="sampled", normalizer=1.0)
    log_q = torch.log_softmax(logits[0].detach(), 0)
    for sample, want in (
        (gradient(got, logits), log_q.exp() - dense.exp()),
        (got.kl.unsqueeze(1), (dense.exp() * (dense - log_q)).sum()),
    ):
        error = sample.std(0) / n**0.5
        assert ((sample.mean(0) - want).abs() < 4.5 * error + 1e-12).all()
    assert got.kl.std() > 0.01


def test_sampled_without_entropy_is_off_by_a_constant_of_the_teacher() -> None:
    targets, dense = teacher()
    bare = targets._replace(entropy=None)
    first, second = (
        distillation_loss(student(seed), t, tail="sampled").kl
        for seed, t in ((3, bare), (3, targets))
    )
    other_first, other_second = (
        distillation_loss(student(seed), t, tail="sampled").kl
        for seed, t in ((4, bare), (4, targets))
    )
    rest = torch.where(off_support(targets), dense, -torch.inf)
    inside = torch.log_softmax(rest, 1)
    r_entropy = rest.exp().sum(1) * torch.special.entr(inside.exp()).sum(1)
    torch.testing.assert_close(first - second, r_entropy)
    torch.testing.assert_close(other_first - other_second, r_entropy)


def test_no_stored_ids_is_pure_sampling() -> None:
    targets, _ = teacher(k=0)
    logits = student()
    got = gradient(distillation_loss(logits, targets, tail="sampled"), logits)
    assert targets.draws is not None
    counts = torch.nn.functional.one_hot(targets.draws, V).sum(1) / M
    torch.testing.assert_close(got, (logits.softmax(1) - counts).detach() / N)


def test_weights_of_zero_silence_a_row_whatever_it_holds() -> None:
    targets, _ = teacher()
    logits = student().detach()
    logits[2, int(targets.ids[2, 0])] = -torch.inf
    logits.requires_grad_()
    weights = torch.ones(N, dtype=torch.float64)
    weights[2] = 0
    got = distillation_loss(logits, targets, weights=weights)
    kept = torch.arange(N) != 2
    rest = Targets(*(None if x is None else x[kept] for x in targets))  # type: ignore[arg-type]
    want = distillation_loss(logits[kept], rest)
    torch.testing.assert_close(got.loss, want.loss)
    grad = gradient(got, logits)
    assert (grad[2] == 0).all()
    assert (grad[kept] != 0).all()
    nothing = distillation_loss(logits, targets, weights=torch.zeros(N))
    assert float(nothing.loss.detach()) == 0
    assert (gradient(nothing, logits) == 0).all()


def test_a_weight_for_all_and_a_given_normalizer() -> None:
    targets, _ = teacher()
    logits = student()
    plain = distillation_loss(logits, targets)
    whole = gradient(plain, logits)
    for weights in (torch.tensor(0.5), torch.tensor([0.5])):
        same = distillation_loss(logits, targets, weights=weights)
        torch.testing.assert_close(same.loss, plain.loss)
        half = distillation_loss(logits, targets, weights=weights, normalizer=float(N))
        torch.testing.assert_close(half.loss, plain.loss / 2)
        torch.testing.assert_close(gradient(half, logits), whole / 2)
    tensor = distillation_loss(logits, targets, normalizer=torch.tensor(2.0 * N))
    torch.testing.assert_close(tensor.loss, plain.loss / 2)


def test_losses_of_teachers_add_to_the_loss_of_their_mixture() -> None:
    share = torch.linspace(0, 1, N, dtype=torch.float64)
    (one, dense_one), (two, dense_two) = teacher(1), teacher(2)
    one, two = (
        Targets(ids, dense.gather(1, ids), torch.full((N,), -torch.inf, dtype=torch.float64))
        for dense, ids in ((d, d.argsort(1, descending=True)) for d in (dense_one, dense_two))
    )
    logits = student()
    total = (
        distillation_loss(logits, one, weights=share, normalizer=N).loss
        + distillation_loss(logits, two, weights=1 - share, normalizer=N).loss
    )
    mixed = share.unsqueeze(1) * dense_one.exp() + (1 - share).unsqueeze(1) * dense_two.exp()
    (got,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(got, (logits.softmax(1) - mixed).detach() / N)


def test_a_missing_label_costs_nothing_and_keeps_the_normalizer() -> None:
    targets, _ = teacher()
    logits = student()
    got = distillation_loss(logits, targets, kd_weight=0.0, labels=LABELS)
    want = torch.nn.functional.cross_entropy(logits, LABELS, ignore_index=-1, reduction="sum") / N
    torch.testing.assert_close(got.loss, want)
    assert got.hard is not None
    assert got.hard[2] == 0
    assert (gradient(got, logits)[2] == 0).all()
    assert distillation_loss(logits, targets).hard is None


def test_the_head_is_rescaled_to_what_the_tail_leaves() -> None:
    targets, _ = teacher()
    rounded = targets._replace(logprobs=targets.logprobs + 0.05)
    logits = student()
    want, got = (distillation_loss(logits, t) for t in (targets, rounded))
    torch.testing.assert_close(got.kl, want.kl)
    torch.testing.assert_close(gradient(got, logits), gradient(want, logits))


@pytest.mark.parametrize(("temperature", "softmaxes"), [(1.0, 1), (2.0, 2)])
def test_hard_labels_share_the_softmax_at_temperature_one(
    temperature: float, softmaxes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    softmax = torch.softmax

    def counted(z: Tensor, dim: int, *, out: Tensor) -> Tensor:
        calls.append(dim)
        return softmax(z, dim, out=out)

    monkeypatch.setattr(torch, "softmax", counted)
    targets, _ = teacher()
    distillation_loss(student(), targets, temperature=temperature, kd_weight=0.5, labels=LABELS)
    assert len(calls) == softmaxes


def test_backward_multiplies_and_may_run_twice() -> None:
    targets, _ = teacher()
    logits = student()
    before = logits.detach().clone()
    loss = distillation_loss(logits, targets).loss
    once = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    again = torch.autograd.grad(-3 * loss, logits)[0]
    torch.testing.assert_close(again, -3 * once)
    torch.testing.assert_close(logits.detach(), before, rtol=0, atol=0)
    loss = distillation_loss(logits, targets).loss ** 2
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()  # type: ignore[no-untyped-call]


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, _ = teacher()
    want = distillation_loss(student(), targets).loss
    monkeypatch.setattr(kernel, "gradient_", None)
    plain = distillation_loss(student().detach(), targets).loss
    with torch.no_grad():
        silent = distillation_loss(student(), targets).loss
    assert not plain.requires_grad
    torch.testing.assert_close(plain, want.detach())
    torch.testing.assert_close(silent, want.detach())


def test_no_rows_is_a_loss_of_zero() -> None:
    targets, _ = teacher(n=0)
    logits = student(n=0)
    got = distillation_loss(logits, targets, tail="sampled")
    assert float(got.loss.detach()) == 0
    assert gradient(got, logits).shape == (0, V)

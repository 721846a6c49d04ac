"""Distillation losses where numbers are extreme or narrow: saturated students, low precision."""

import pytest
import torch

from softlabels.student.losses import TailMode, Targets, distillation_loss
from tests.student.test_losses import (
    LABELS,
    MODES,
    N,
    gradient,
    off_support,
    reference_kl,
    student,
    teacher,
)

pytestmark = pytest.mark.filterwarnings("ignore:tail 'renormalize':UserWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("winner", ["head", "tail", "neither"])
@pytest.mark.parametrize("tail", MODES)
@pytest.mark.parametrize("one_hot", [True, False])
def test_saturated_students_stay_finite(
    tail: TailMode, winner: str, dtype: torch.dtype, one_hot: bool
) -> None:
    """Logits of ±1e4: q underflows, and log q and the gradient must come from the logits."""
    k = 3
    base = student(n=2, v=8).detach()
    at = {"head": 1, "tail": 6, "neither": 0}[winner]
    base[:, :] += -1e4
    base[:, at] = 1e4
    logits = base.to(dtype).requires_grad_()
    head = torch.tensor([1.0, 0, 0] if one_hot else [0.5, 0.2, 0.1]).log()
    ids = torch.tensor([1, 2, 3]).expand(2, k)
    tail_logprob = torch.full((2,), -torch.inf) if one_hot else torch.full((2,), 0.2).log()
    draws = torch.full((2, 4), -1) if one_hot else torch.tensor([[5, 5, 6, 7]]).expand(2, 4)
    targets = Targets(ids, head.expand(2, k), tail_logprob, draws)
    labels = torch.tensor([6, 1])
    got = distillation_loss(logits, targets, tail=tail, labels=labels, kd_weight=0.5)
    grad = gradient(got, logits)
    assert torch.isfinite(grad).all()
    exact = logits.detach().double().requires_grad_()
    kl = reference_kl(exact, targets, tail, labels)
    ce = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (want,) = torch.autograd.grad((kl / 2 + ce / 2).mean(), exact)
    assert torch.isfinite(got.loss)
    torch.testing.assert_close(got.kl.double(), kl.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        grad.double(), want, rtol=0, atol=2e-3 if dtype != torch.float32 else 1e-6
    )


@pytest.mark.parametrize("gap", [12.0, 20.0, 80.0, 120.0])
def test_a_tiny_student_tail_is_exact(gap: float) -> None:
    """1 - sum is 0 from a gap of 17 nats in float32; the tail's log and shares must not be."""
    logits = torch.tensor([[gap, 0.0, -1.0, -2.0]], requires_grad=True)
    targets = Targets(torch.tensor([[0]]), torch.tensor([[0.75]]).log(), torch.tensor([0.25]).log())
    got = distillation_loss(logits, targets)
    exact = logits.detach().double().requires_grad_()
    want = reference_kl(exact, targets, "bucket", None)
    torch.testing.assert_close(got.kl.double(), want.detach(), rtol=1e-6, atol=0)
    (want_grad,) = torch.autograd.grad(want.sum(), exact)
    torch.testing.assert_close(gradient(got, logits).double(), want_grad, rtol=1e-5, atol=0)


def test_classes_masked_by_the_student() -> None:
    targets, _ = teacher()
    logits = student().detach()
    logits[:, 11] = -torch.inf
    logits.requires_grad_()
    held = (targets.ids == 11).any(1)
    got = distillation_loss(logits, targets)
    assert torch.isfinite(got.kl[~held]).all()
    assert torch.isinf(got.kl[held]).all()
    assert held.any()
    every = torch.where(off_support(targets), -torch.inf, logits.detach())
    alone = distillation_loss(every, targets)
    assert torch.isposinf(alone.kl).all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_bfloat16_within_its_rounding(temperature: float) -> None:
    targets, _ = teacher()
    low = student().detach().bfloat16().requires_grad_()
    high = low.detach().float().requires_grad_()
    for tail in MODES:
        results = [
            distillation_loss(
                x, targets, tail=tail, temperature=temperature, labels=LABELS.clamp(min=0)
            )
            for x in (low, high)
        ]
        grad, want = gradient(results[0], low), gradient(results[1], high)
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(results[0].kl, results[1].kl, rtol=0, atol=0)
        torch.testing.assert_close(grad.float(), want, rtol=2**-8, atol=0)


def test_float16_gradients_survive_until_loss_scaling() -> None:
    targets, _ = teacher()
    logits = student().detach().half().requires_grad_()
    loss = distillation_loss(logits, targets, normalizer=1e8).loss
    (grad,) = torch.autograd.grad(loss * 2**20, logits)
    exact = logits.detach().float().requires_grad_()
    (want,) = torch.autograd.grad(distillation_loss(exact, targets).loss, exact)
    torch.testing.assert_close(
        grad.float(), want * (N * 2**20 / 1e8), rtol=2**-10, atol=2**-14 * 2**-10
    )

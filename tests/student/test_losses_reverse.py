"""The reverse divergence KL(student‖teacher) over k + 1 classes: values, laws, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from softlabels.errors import BadInputError, DataError
from softlabels.student.fused import linear_distillation_loss
from softlabels.student.losses import TailMode, Targets, distillation_loss
from tests.student.test_losses import LABELS, MODES, WEIGHTS, N, V, gradient, student, teacher


def coarse(log_q: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """Row by row, log q and log p of the k + 1 classes, padded with (-inf, 0)."""
    width = targets.ids.shape[1] + 1
    ours, theirs = [], []
    for i, row in enumerate(targets.ids):
        ids = [int(j) for j in row if j >= 0]
        off = torch.ones(log_q.shape[1], dtype=torch.bool)
        off[ids] = False
        r = targets.tail_logprob[i].double()
        head = torch.log_softmax(targets.logprobs[i, : len(ids)].double(), 0)
        head = head + torch.log1p(-r.exp())
        pad = torch.full((width - len(ids) - 1,), -torch.inf, dtype=torch.float64)
        ours.append(torch.cat([log_q[i, ids], log_q[i, off].logsumexp(0)[None], pad]))
        theirs.append(torch.cat([head, r[None], torch.zeros_like(pad)]))
    return torch.stack(ours), torch.stack(theirs)


def reference(z: Tensor, targets: Targets) -> Tensor:
    log_q, log_p = coarse(torch.log_softmax(z.double(), 1), targets)
    used = log_q > -torch.inf
    log_q, log_p = log_q.masked_fill(~used, -1e3), log_p.masked_fill(~used, -1e3)
    return (log_q.exp() * (log_q - log_p)).sum(1)


@pytest.mark.parametrize("kd_weight", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_are_those_of_the_coarse_distributions(
    temperature: float, kd_weight: float
) -> None:
    targets, _ = teacher()
    logits = student()
    kl = reference(logits / temperature, targets)
    hard = torch.nn.functional.cross_entropy(logits, LABELS, ignore_index=-1, reduction="none")
    each = kd_weight * temperature**2 * kl + (1 - kd_weight) * hard
    want = (WEIGHTS * each).sum() / WEIGHTS.sum()
    (want_grad,) = torch.autograd.grad(want, logits)
    got = distillation_loss(
        logits,
        targets,
        divergence="reverse",
        temperature=temperature,
        kd_weight=kd_weight,
        labels=LABELS,
        weights=WEIGHTS,
    )
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.kl, kl.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(got, logits), want_grad, rtol=1e-11, atol=1e-13)
    # And through a head that is the identity.
    hidden, eye = logits.detach().requires_grad_(), torch.eye(V, dtype=torch.float64)
    fused = linear_distillation_loss(
        hidden,
        eye,
        targets,
        divergence="reverse",
        temperature=temperature,
        kd_weight=kd_weight,
        labels=LABELS,
        weights=WEIGHTS,
        chunk_rows=3,
    )
    torch.testing.assert_close(fused.loss, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused.kl, kl.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(fused, hidden), want_grad, rtol=1e-11, atol=1e-13)


def test_gradcheck() -> None:
    targets, _ = teacher(n=3, v=9, k=3)

    def loss(logits: Tensor) -> Tensor:
        return distillation_loss(logits, targets, divergence="reverse", temperature=1.5).loss

    assert torch.autograd.gradcheck(loss, (student(n=3, v=9),))


def test_everything_stored_is_the_dense_reverse_kl() -> None:
    full, dense = teacher(k=V, m=0, full_rows=True)
    full = full._replace(tail_logprob=torch.full((N,), -torch.inf, dtype=torch.float64))
    logits = student()
    got = distillation_loss(logits, full, divergence="reverse")
    log_q = torch.log_softmax(logits, 1)
    want = (log_q.exp() * (log_q - dense)).sum(1)
    torch.testing.assert_close(got.kl, want.detach(), rtol=1e-10, atol=1e-10)
    (want_grad,) = torch.autograd.grad(want.mean(), logits)
    torch.testing.assert_close(gradient(got, logits), want_grad, rtol=1e-10, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(0, V - 1),
    sharp=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_lies_between_zero_and_the_full_reverse_kl(seed: int, k: int, sharp: float) -> None:
    targets, dense = teacher(seed, k=k, m=0, full_rows=True)
    logits = (student(seed + 1).detach() * sharp).requires_grad_()
    log_q = torch.log_softmax(logits, 1)
    full = (log_q.exp() * (log_q - dense)).sum(1)
    got = distillation_loss(logits, targets, divergence="reverse")
    assert (got.kl >= -1e-12).all()
    assert (got.kl <= full + 1e-12).all()
    slopes = gradient(got, logits).sum(1)
    torch.testing.assert_close(slopes, torch.zeros_like(slopes), rtol=0, atol=1e-13)


def test_the_teacher_itself_has_no_loss_and_no_gradient() -> None:
    targets, dense = teacher()
    logits = dense.clone().requires_grad_()
    got = distillation_loss(logits, targets, divergence="reverse")
    torch.testing.assert_close(got.kl, torch.zeros_like(got.kl), rtol=0, atol=1e-12)
    assert float(gradient(got, logits).abs().max()) < 1e-13


@pytest.mark.parametrize("sharp", [30.0, 300.0])
def test_saturated_students_in_float32(sharp: float) -> None:
    targets, _ = teacher()
    logits = (student().detach() * sharp).float().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    got = distillation_loss(logits, targets, divergence="reverse")
    want = reference(exact, targets)
    (want_grad,) = torch.autograd.grad(want.mean(), exact)
    torch.testing.assert_close(got.kl.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(got, logits).double(), want_grad, rtol=1e-4, atol=1e-6)


def test_classes_masked_by_the_student_cost_nothing() -> None:
    """q log q is 0 at q = 0: what makes the forward KL infinite is no matter here."""
    targets, _ = teacher()
    logits = student().detach()
    masked = int(targets.ids[0, 0])
    logits[:, masked] = -torch.inf
    logits.requires_grad_()
    got = distillation_loss(logits, targets, divergence="reverse")
    assert torch.isfinite(got.kl).all()
    grad = gradient(got, logits)
    assert torch.isfinite(grad).all()
    assert (grad[:, masked] == 0).all()
    assert float(distillation_loss(logits, targets).kl[0].detach()) == torch.inf


@pytest.mark.parametrize("tail", [tail for tail in MODES if tail != "bucket"])
def test_every_other_tail_is_refused(tail: TailMode) -> None:
    targets, _ = teacher()
    with pytest.raises(
        BadInputError, match=f"divergence 'reverse' with tail '{tail}': expected tail 'bucket'"
    ):
        distillation_loss(student(), targets, tail=tail, divergence="reverse", labels=LABELS)


def test_a_teacher_without_mass_is_refused_with_its_row() -> None:
    targets, _ = teacher()
    none = targets.tail_logprob.clone()
    none[4] = -torch.inf
    lost = targets._replace(tail_logprob=none)
    lost.logprobs[4] = torch.log_softmax(lost.logprobs[4], 0)
    with pytest.raises(DataError, match=r"divergence 'reverse', row 4: .*found \[-inf\]"):
        distillation_loss(student(), lost, divergence="reverse")
    distillation_loss(student(), lost)
    zero, _ = teacher()
    zero.logprobs[3, 0] = torch.tensor([zero.logprobs[3, 0], zero.logprobs[3, 1]]).logsumexp(0)
    zero.logprobs[3, 1] = -torch.inf
    with pytest.raises(DataError, match=r"divergence 'reverse', row 3: .*found \[-inf\]"):
        distillation_loss(student(), zero, divergence="reverse")
    distillation_loss(student(), zero)

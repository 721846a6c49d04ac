"""One normalizer for a whole step: micro-batches and ranks add up to the batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from softlabels.student.fused import linear_distillation_loss
from softlabels.student.losses import Targets, distillation_loss
from tests.student.test_losses import V, teacher

ROWS, D = 12, 5
PARTS = (slice(0, 5), slice(5, 6), slice(6, ROWS))
"""Three micro-batches of unequal size, and of unequal weight."""
OPTIONS: dict[str, Any] = {"tail": "sampled", "kd_weight": 0.6, "temperature": 2.0}


class Student(nn.Module):
    """A layer and a head, both in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(D, D, dtype=torch.float64)
        self.head = nn.Linear(D, V, dtype=torch.float64)


def data() -> tuple[Tensor, Targets, Tensor, Tensor]:
    """Features, targets, labels (some missing) and weights (some 0)."""
    gen = torch.Generator().manual_seed(3)
    features = torch.randn(ROWS, D, generator=gen, dtype=torch.float64)
    labels = torch.randint(-1, V, (ROWS,), generator=gen)
    weights = torch.rand(ROWS, generator=gen, dtype=torch.float64)
    weights[7] = 0
    return features, teacher(n=ROWS)[0], labels, weights


def backward(model: Student, part: slice, normalizer: float | Tensor | None, fused: bool) -> float:
    """Adds the gradients of some rows; the value of their loss."""
    features, targets, labels, weights = data()
    hidden = model.body(features[part]).tanh()
    some = Targets(*(None if x is None else x[part] for x in targets))  # type: ignore[arg-type]
    options = OPTIONS | {"labels": labels[part], "weights": weights[part]}
    options["normalizer"] = normalizer
    if fused:
        weight, bias = model.head.weight, model.head.bias
        loss = linear_distillation_loss(hidden, weight, some, bias=bias, chunk_rows=2, **options)
    else:
        loss = distillation_loss(model.head(hidden), some, **options)
    torch.autograd.backward(loss.loss)
    return float(loss.loss.detach())


def gradients(model: Student) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture(scope="module")
def whole() -> tuple[float, list[Tensor]]:
    """Loss and gradients of the batch in one piece."""
    model = Student()
    value = backward(model, slice(0, ROWS), None, fused=False)
    assert len(gradients(model)) == 4
    return value, gradients(model)


@pytest.mark.parametrize("fused", [True, False])
def test_micro_batches_add_up_to_the_batch(whole: tuple[float, list[Tensor]], fused: bool) -> None:
    total = float(data()[3].sum())
    model = Student()
    value = sum(backward(model, part, total, fused) for part in PARTS)
    assert value == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(gradients(model), whole[1], rtol=1e-11, atol=1e-14)


def test_means_of_micro_batches_do_not() -> None:
    """What the given normalizer is for: each part's own mean weighs rows by their neighbours."""
    right, wrong = Student(), Student()
    backward(right, slice(0, ROWS), None, fused=True)
    for part in PARTS:
        backward(wrong, part, None, fused=True)
    for ours, theirs in zip(gradients(wrong), gradients(right), strict=True):
        assert float((ours / len(PARTS) - theirs).norm() / theirs.norm()) > 0.05


def _rank(rank: int, ranks: int, folder: str) -> None:
    """One process of a step: its own micro-batches, the weights of all, gradients summed."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
    )
    mine = PARTS[rank::ranks]
    total = torch.stack([data()[3][part].sum() for part in mine]).sum()
    dist.all_reduce(total)
    model = Student()
    values = [backward(model, part, total, fused=True) for part in mine]
    value = torch.tensor(sum(values), dtype=torch.float64)
    found = gradients(model)
    for tensor in (value, *found):
        dist.all_reduce(tensor)
    torch.save((float(value), found), f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_ranks_add_up_to_one_process(whole: tuple[float, list[Tensor]], tmp_path: Path) -> None:
    """Rank 0 has two micro-batches of 11 rows, rank 1 one of a single row."""
    spawn(_rank, (2, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        value, found = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert value == pytest.approx(whole[0], rel=1e-12)
        torch.testing.assert_close(found, whole[1], rtol=1e-11, atol=1e-14)

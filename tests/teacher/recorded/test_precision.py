"""How values were written, and what their rounding does to a mass at most."""

import numpy as np
import pytest
import torch

from softlabels.teacher.recorded.precision import Precision, Values


def top(seed: int, k: int, scale: float) -> Values:
    """log p of the k likeliest of 1,000 classes, for 200 distributions."""
    logits = np.random.default_rng(seed).normal(0, scale, (200, 1000))
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return np.asarray(-np.sort(-logprobs, 1)[:, :k])


def written(values: Values, kind: str) -> Values:
    """Values as a kind of record holds them."""
    if kind.endswith("decimals"):
        return np.round(values, int(kind[0]))
    found = torch.from_numpy(values).to(getattr(torch, kind)).double().numpy()
    return np.asarray(found)


KINDS = ["2 decimals", "4 decimals", "5 decimals", "bfloat16", "float16", "float32"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", [False, True])
def test_the_kind_is_seen_and_bounds_every_mass(kind: str, single: bool) -> None:
    precision = Precision()
    worst = 0.0
    for seed, scale in enumerate((0.1, 1.0, 3.0, 8.0)):
        truth = top(seed, 20, scale)
        values = written(truth, kind)
        if single:
            values = values.astype(np.float32).astype(np.float64)
        precision.add(values.reshape(-1))
        worst = max(worst, float(np.abs(np.exp(values).sum(1) - np.exp(truth).sum(1)).max()))
    assert precision.kind == kind
    assert worst <= precision.mass_error(20)
    assert precision.mass_error(20) < 60 * worst + 2e-6


def test_one_exact_value_among_round_ones_decides() -> None:
    precision = Precision()
    precision.add(np.array([-0.25, -1.5, -3.0]))
    assert precision.kind == "2 decimals"
    precision.add(np.array([-0.123456789]))
    assert precision.kind == "float32"

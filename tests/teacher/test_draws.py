"""Draws from the tail: where they fall, how often, and what they depend on."""

import numpy as np
import pytest
import torch

from softlabels.fingerprint import key64
from softlabels.teacher.extract import BLOCK, BLOCKED_FROM, draw_uniforms, extract

KEYS = np.array([key64(0, f"x{i}", 0) for i in range(30_000)], np.uint64)


def draw(
    logits: torch.Tensor, keys: np.ndarray, k: int, draws: int, temperature: float = 1.0
) -> np.ndarray:
    """Draws int32 [len(keys), draws] from one distribution, logits [V]."""
    z = logits.expand(len(keys), -1)
    temperatures = () if temperature == 1 else (temperature,)
    found = extract(
        z,
        k=k,
        draws=draws,
        temperatures=temperatures,
        draws_temperature=temperature,
        draw_keys=keys,
    )
    assert found.draws is not None
    return found.draws


def tail_probs(logits: torch.Tensor, k: int, temperature: float = 1.0) -> np.ndarray:
    """The tail's distribution in float64, zero on the top k."""
    probs = torch.softmax(logits.double() / temperature, 0)
    probs[logits.topk(k).indices] = 0
    return np.asarray((probs / probs.sum()).numpy())


LOGITS = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0, -3.0])


@pytest.mark.parametrize(("k", "temperature"), [(2, 1.0), (0, 1.0), (2, 2.0), (3, 4.0)])
def test_draws_follow_the_tail_at_their_temperature(k: int, temperature: float) -> None:
    found = draw(LOGITS, KEYS, k, 4, temperature)
    expected = tail_probs(LOGITS, k, temperature)
    counts = np.bincount(found.reshape(-1), minlength=10)
    assert (counts[expected == 0] == 0).all()
    share = counts / counts.sum()
    # Systematic draws vary less than independent ones, whose deviation this bounds.
    deviation = np.sqrt(expected * (1 - expected) / found.size)
    assert (np.abs(share - expected) <= 4 * deviation).all()


@pytest.mark.parametrize("prefix", [1, 2, 3])
def test_any_prefix_of_the_draws_is_a_sample_too(prefix: int) -> None:
    found = draw(LOGITS, KEYS, 2, 5)[:, :prefix]
    expected = tail_probs(LOGITS, 2)
    share = np.bincount(found.reshape(-1), minlength=10) / found.size
    deviation = np.sqrt(expected * (1 - expected) / found.size)
    assert (np.abs(share - expected) <= 4 * deviation).all()


def test_each_row_varies_less_than_independent_draws() -> None:
    draws = 8
    found = draw(LOGITS, KEYS, 2, draws)
    expected = tail_probs(LOGITS, 2)
    for v in np.flatnonzero(expected > 0.1):
        counts = (found == v).sum(1)
        assert counts.var() < 0.8 * draws * expected[v] * (1 - expected[v])
        # Systematic: a class with p gets floor(mp) or ceil(mp) of m draws.
        assert counts.min() >= np.floor(draws * expected[v] - 1e-6)
        assert counts.max() <= np.ceil(draws * expected[v] + 1e-6)


def test_draws_repeat_where_the_tail_is_peaked() -> None:
    logits = torch.tensor([9.0, 3.0, -4.0, -4.0])
    found = draw(logits, KEYS[:100], 1, 6)
    assert (np.diff(np.sort(found, 1), axis=1) == 0).any(1).all()


def test_an_empty_tail_gives_minus_one() -> None:
    logits = torch.tensor([2.0, 1.0, -torch.inf, -torch.inf])
    assert (draw(logits, KEYS[:10], 2, 3) == -1).all()
    assert (draw(logits, KEYS[:10], 4, 3) == -1).all()
    assert (draw(LOGITS, KEYS[:10], 10, 3) == -1).all()


def test_a_tail_of_one_class_is_always_drawn() -> None:
    logits = torch.tensor([50.0, -30.0, -torch.inf, -torch.inf])
    assert (draw(logits, KEYS[:1000], 1, 7) == 1).all()


def test_tails_that_float32_cannot_hold_are_empty() -> None:
    logits = torch.tensor([1e4, 0.0, 0.0, 0.0])
    assert (draw(logits, KEYS[:10], 1, 3) == -1).all()


def test_draws_depend_on_the_key_alone() -> None:
    again = draw(LOGITS, KEYS[:500], 2, 4)
    np.testing.assert_array_equal(draw(LOGITS, KEYS[:500], 2, 4), again)
    np.testing.assert_array_equal(draw(LOGITS, KEYS[:500][::-1], 2, 4)[::-1], again)
    assert (draw(LOGITS, KEYS[500:1000], 2, 4) != again).any(1).mean() > 0.5


def large_logits(classes: int) -> torch.Tensor:
    """One distribution with its mass on ids all over, blocks without any, and one full block."""
    z = torch.full((classes,), -torch.inf)
    some = torch.arange(0, classes, 211)
    z[some] = torch.linspace(0, 2, len(some))
    z[3 * BLOCK : 4 * BLOCK] = torch.linspace(-1, 1, BLOCK)
    z[classes - 1] = 2.5
    return z


@pytest.mark.parametrize("classes", [BLOCKED_FROM, 5_000])
@pytest.mark.parametrize(("k", "temperature"), [(3, 1.0), (0, 1.0), (3, 2.0)])
def test_draws_from_large_vocabularies_follow_the_tail(
    classes: int, k: int, temperature: float
) -> None:
    draws, keys = 6, KEYS[:1000]
    z = large_logits(classes)
    found = draw(z, keys, k, draws, temperature)
    expected = tail_probs(z, k, temperature)
    counts = np.bincount(found.reshape(-1), minlength=classes)
    assert (counts[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / found.size)
    assert (np.abs(counts / counts.sum() - expected) <= 4.5 * deviation + 1e-12).all()
    assert counts[3 * BLOCK : 4 * BLOCK].sum() / counts.sum() > 0.3
    for v in np.argsort(-expected)[:5]:
        of_row = (found == v).sum(1)
        assert of_row.min() >= np.floor(draws * expected[v] - 1e-6)
        assert of_row.max() <= np.ceil(draws * expected[v] + 1e-6)


@pytest.mark.parametrize("classes", [BLOCKED_FROM - 1, BLOCKED_FROM, 5_000, 20_000])
def test_blocks_find_what_a_float64_sum_over_all_entries_finds(classes: int) -> None:
    z = torch.randn(300, classes, generator=torch.Generator().manual_seed(1)) * 3
    keys = KEYS[:300]
    found = extract(z, k=2, draws=7, draw_keys=keys).draws
    probs = torch.softmax(z.double(), 1)
    probs.scatter_(1, z.topk(2).indices, 0)
    uniforms = draw_uniforms(keys, 8)
    points = torch.from_numpy((uniforms[:, :1] + np.arange(7)) / 7)
    cumulative = probs.cumsum(1)
    expected = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True).numpy()
    expected = np.take_along_axis(expected, uniforms[:, 1:].argsort(1, kind="stable"), 1)
    assert found is not None
    assert (found == expected).mean() > 0.999


def test_empty_and_single_tails_of_large_vocabularies() -> None:
    z = torch.full((5_000,), -torch.inf)
    z[4_000] = 1.0
    assert (draw(z, KEYS[:10], 1, 3) == -1).all()
    z[4_999] = -50.0
    assert (draw(z, KEYS[:500], 1, 7) == 4_999).all()
    z[0] = -50.0
    assert set(draw(z, KEYS[:500], 1, 7).reshape(-1)) == {0, 4_999}


def test_draws_without_keys_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="draw_keys"):
        extract(LOGITS[None], k=2, draws=2)


def test_uniforms_never_change() -> None:
    # The first number of key 0 is splitmix64's published first output, 0xE220A8397B1DCDAF.
    assert draw_uniforms(np.array([0], np.uint64), 1)[0, 0] == (0xE220A8397B1DCDAF >> 11) / 2**53
    found = draw_uniforms(np.array([0, 1, 2**64 - 1], np.uint64), 3)
    assert found.tolist() == GOLDEN


def test_uniforms_are_uniform() -> None:
    found = draw_uniforms(KEYS, 3)
    assert found.min() >= 0
    assert found.max() < 1
    for column in found.T:
        assert abs(column.mean() - 0.5) < 4 / np.sqrt(12 * len(column))
        counts = np.bincount((column * 20).astype(int), minlength=20)
        chi_square = ((counts - 1500) ** 2 / 1500).sum()
        assert chi_square < 43.8  # 19 degrees of freedom, one in a thousand
    assert abs(np.corrcoef(found.T) - np.eye(3)).max() < 0.025


GOLDEN = [
    [0.8833108082136426, 0.43152799704850997, 0.026433771592597743],
    [0.5665615751722809, 0.7457817572627011, 0.9710027535867962],
    [0.8939429202831845, 0.9125972035944532, 0.21948196289526756],
]

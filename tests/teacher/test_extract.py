"""extract() against a float64 dense reference."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from softlabels.targets import SoftTargets
from softlabels.teacher import extract as module
from softlabels.teacher.extract import BLOCK, BLOCKED_FROM, extract

TEMPERATURES = (0.5, 2.0, 4.0)


def log_softmax(z: np.ndarray) -> np.ndarray:
    """float64 log-softmax over the last axis."""
    z = z - z.max(1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(1, keepdims=True)))


@dataclass
class Reference:
    """What the format says of dense logits, in float64."""

    logprobs: np.ndarray
    tail: np.ndarray
    entropy: np.ndarray


def reference(z: np.ndarray, ids: np.ndarray, temperature: float = 1.0) -> Reference:
    """Head, tail and entropy at a temperature, for given ids (-1: padding)."""
    dense = log_softmax(z / temperature)
    head = np.where(ids >= 0, np.take_along_axis(dense, np.maximum(ids, 0), 1), -np.inf)
    probs = np.exp(dense)
    rest = probs.copy()
    for row, found in enumerate(ids):
        rest[row, found[found >= 0]] = 0
    with np.errstate(divide="ignore"):
        tail = np.log(rest.sum(1))
    terms = np.where(probs > 0, probs * np.where(probs > 0, dense, 0), 0)
    return Reference(head, tail, -terms.sum(1))


def make_logits(
    rows: int = 64, classes: int = 50, seed: int = 0, scale: float = 3.0
) -> torch.Tensor:
    """Random float32 logits [rows, classes]."""
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


def check_against_reference(z: torch.Tensor, found: SoftTargets, atol: float = 2e-6) -> None:
    """Every stored float equals the float64 value."""
    dense = z.double().numpy()
    expected = reference(dense, found.ids)
    assert found.tail is not None
    assert found.entropy is not None
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=atol, rtol=2e-6)
    np.testing.assert_allclose(found.tail, expected.tail, atol=atol, rtol=2e-6)
    np.testing.assert_allclose(found.entropy, expected.entropy, atol=atol, rtol=2e-6)
    for temperature, temper in found.temper.items():
        expected = reference(dense, found.ids, temperature)
        head = found.logprobs / np.float32(temperature) + temper.shift[:, None]
        np.testing.assert_allclose(head, expected.logprobs, atol=4 * atol, rtol=4e-6)
        np.testing.assert_allclose(temper.tail, expected.tail, atol=4 * atol, rtol=4e-6)


@pytest.mark.parametrize("k", [0, 1, 5, 50])
def test_head_tail_entropy_and_temperatures_equal_float64(k: int) -> None:
    z = make_logits()
    found = extract(z, k=k, temperatures=TEMPERATURES)
    assert found.ids.shape == found.logprobs.shape == (64, k)
    assert (found.num_positions == 1).all()
    assert found.ids.dtype == np.int32
    assert found.logprobs.dtype == np.float32
    check_against_reference(z, found)
    order = np.argsort(-z.numpy(), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.ids, order)
    found.check([str(i) for i in range(64)], 50)


def test_all_classes_leave_no_tail_and_none_leave_all_of_it() -> None:
    z = make_logits()
    everything = extract(z, k=50, temperatures=(2.0,))
    assert everything.tail is not None
    assert (everything.tail == -np.inf).all()
    assert (everything.temper[2.0].tail == -np.inf).all()
    nothing = extract(z, k=0, temperatures=(2.0,))
    assert nothing.tail is not None
    np.testing.assert_allclose(nothing.tail, 0, atol=1e-6)
    np.testing.assert_allclose(nothing.temper[2.0].tail, 0, atol=1e-6)


def test_impossible_classes_are_padded_away() -> None:
    z = make_logits(8, 10)
    z[:, 3:] = -torch.inf
    found = extract(z, k=5, temperatures=(2.0,))
    assert (found.ids[:, :3] >= 0).all()
    assert (found.ids[:, 3:] == -1).all()
    assert (found.logprobs[:, 3:] == -np.inf).all()
    check_against_reference(z, found)
    found.check([str(i) for i in range(8)], 10)


@pytest.mark.parametrize("offset", [-1e4, -300.0, 300.0, 1e4, 1e5])
def test_a_common_offset_costs_no_digits(offset: float) -> None:
    z = torch.tensor([[1.0, 0.5, 0.0, -1.0, -4.0]]) + offset
    found = extract(z, k=3, temperatures=(0.5, 2.0), labels=np.array([3], np.int32))
    check_against_reference(z, found)
    assert found.label_logprobs is not None
    np.testing.assert_allclose(
        found.label_logprobs, log_softmax(z.double().numpy())[:, 3], atol=1e-6
    )
    found.check(["a"], 5)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_one_hot_logits(size: float) -> None:
    z = torch.zeros(2, 6)
    z[:, 2] = size
    found = extract(z, k=2, temperatures=(0.5, 4.0), labels=np.array([2, 0], np.int32))
    check_against_reference(z, found)
    assert found.entropy is not None
    assert (found.entropy >= 0).all()
    assert found.label_logprobs is not None
    assert np.isfinite(found.label_logprobs).all()
    found.check(["a", "b"], 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_another_precision_are_computed_on_in_float32(dtype: torch.dtype) -> None:
    z = make_logits(scale=5).to(dtype)
    found = extract(z, k=7, temperatures=TEMPERATURES, labels=np.arange(64, dtype=np.int32) % 50)
    check_against_reference(z.float(), found)
    found.check([str(i) for i in range(64)], 50)


def test_input_is_left_as_it_was() -> None:
    z = make_logits()
    before = z.clone()
    extract(z, k=4, temperatures=(2.0,), draws=3, draw_keys=np.arange(64, dtype=np.uint64))
    assert torch.equal(z, before)


def test_label_logprob_and_rank_even_outside_the_head() -> None:
    z = make_logits()
    labels = (np.arange(64) * 7 % 50).astype(np.int32)
    labels[5] = -1
    found = extract(z, k=3, labels=labels)
    dense = log_softmax(z.double().numpy())
    ranks = (dense > np.take_along_axis(dense, np.maximum(labels, 0)[:, None], 1)).sum(1)
    known = labels >= 0
    assert found.label_logprobs is not None
    assert found.label_ranks is not None
    np.testing.assert_allclose(
        found.label_logprobs[known], dense[np.arange(64), labels][known], atol=2e-6
    )
    np.testing.assert_array_equal(found.label_ranks[known], ranks[known])
    assert found.label_ranks[5] == -1
    assert np.isnan(found.label_logprobs[5])
    assert (ranks[known] >= 3).any()


@pytest.mark.parametrize("k", [0, 1, 3, 4, 6])
def test_rank_and_head_agree_where_logits_tie(k: int) -> None:
    z = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 1.0]]).expand(6, 6)
    labels = np.arange(6, dtype=np.int32)
    found = extract(z, k=k, labels=labels)
    assert found.label_ranks is not None
    for row, label in enumerate(labels):
        place = np.flatnonzero(found.ids[row] == label)
        if len(place):
            assert found.label_ranks[row] == place[0]
        else:
            assert found.label_ranks[row] >= k
    assert sorted(found.label_ranks) == list(range(6))


def test_rank_and_head_agree_on_rounded_logits() -> None:
    z = make_logits(500, 40, scale=1.5).round()
    labels = (np.arange(500) % 40).astype(np.int32)
    found = extract(z, k=8, labels=labels)
    assert found.label_ranks is not None
    inside = (found.ids == labels[:, None]).any(1)
    np.testing.assert_array_equal(found.label_ranks < 8, inside)
    np.testing.assert_array_equal(
        found.label_ranks[inside], (found.ids == labels[:, None]).argmax(1)[inside]
    )


def test_nothing_depends_on_the_batch_a_row_stands_in() -> None:
    z = make_logits(40, 30)
    keys = np.arange(40, dtype=np.uint64) * 977
    whole = extract(z, k=4, temperatures=(2.0,), draws=5, draw_keys=keys)
    for start in range(0, 40, 7):
        part = slice(start, start + 7)
        some = extract(z[part], k=4, temperatures=(2.0,), draws=5, draw_keys=keys[part])
        np.testing.assert_array_equal(some.ids, whole.ids[part])
        np.testing.assert_array_equal(some.draws, whole.draws[part])  # type: ignore[index]
        np.testing.assert_array_equal(some.logprobs, whole.logprobs[part])


def test_smaller_k_is_a_prefix() -> None:
    z = make_logits()
    small, large = extract(z, k=4), extract(z, k=20)
    np.testing.assert_array_equal(small.ids, large.ids[:, :4])
    np.testing.assert_array_equal(small.logprobs, large.logprobs[:, :4])


LARGE = [BLOCKED_FROM - 1, BLOCKED_FROM, BLOCKED_FROM + 1, 5_000, 49 * BLOCK]
"""Widths on both sides of where blocks begin, whole blocks and not."""


@pytest.mark.parametrize("classes", LARGE)
@pytest.mark.parametrize("k", [0, 1, 7, 9, 40])
def test_large_vocabularies(classes: int, k: int) -> None:
    z = make_logits(6, classes, seed=k)
    z[0, 100:] = -torch.inf
    z[1, classes - 1] = 20.0
    z[2, : BLOCK + 3] = 9.0 + torch.arange(BLOCK + 3) / 50  # one block holds more than the head
    labels = np.array([3, classes - 1, 5, 0, 17, -1], np.int32)
    found = extract(z, k=k, labels=labels, temperatures=(2.0,))
    check_against_reference(z, found, atol=4e-6)
    expected = np.argsort(-z.numpy(), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.ids, expected)
    found.check([str(i) for i in range(6)], classes)
    ranks = (z > z.gather(1, torch.from_numpy(labels.clip(0)).long()[:, None])).sum(1).numpy()
    assert found.label_ranks is not None
    np.testing.assert_array_equal(found.label_ranks[:5], ranks[:5])


def test_ranks_of_tied_logits_in_a_large_vocabulary() -> None:
    z = make_logits(50, 5_000, scale=2.0).round()
    labels = (np.arange(50) * 97 % 5_000).astype(np.int32)
    found = extract(z, k=8, labels=labels)
    assert found.label_ranks is not None
    for row, label in enumerate(labels):
        place = np.flatnonzero(found.ids[row] == label)
        if len(place):
            assert found.label_ranks[row] == place[0]
            continue
        rest = np.setdiff1d(np.arange(5_000), found.ids[row])
        value = z[row, label]
        ahead = (z[row, rest] > value) | (
            (z[row, rest] == value) & (torch.from_numpy(rest) < int(label))
        )
        assert found.label_ranks[row] == 8 + int(ahead.sum())


def test_rows_of_one_call_do_not_depend_on_how_it_cuts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z = make_logits(30, 5_000)
    keys = np.arange(30, dtype=np.uint64) * 977
    labels = np.arange(30, dtype=np.int32) * 100
    settings: dict[str, Any] = {"k": 4, "labels": labels, "draws": 5, "draw_keys": keys}
    whole = extract(z, **settings)
    monkeypatch.setattr(module, "_ELEMENTS", 4 * 5_000)
    cut = extract(z, **settings)
    for name in ("ids", "logprobs", "tail", "entropy", "draws", "label_logprobs", "label_ranks"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name))


def test_no_rows() -> None:
    found = extract(torch.zeros(0, 5), k=2, temperatures=(2.0,), labels=np.zeros(0, np.int32))
    assert found.ids.shape == (0, 2)

"""Logits to soft targets: what is kept of a distribution, exact before any rounding."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softlabels.targets import Floats, Ints, SoftTargets, Temper


def extract(
    logits: Tensor,
    *,
    k: int,
    labels: Ints | None = None,
    temperatures: Sequence[float] = (),
    draws: int = 0,
    draws_temperature: float = 1.0,
    draw_keys: npt.NDArray[np.uint64] | None = None,
) -> SoftTargets:
    """Soft targets of N distributions, one position a row.

    Args:
        logits: float [N, V], finite or -inf; computed on in float32, where they are.
        k: ids to keep, at most V; classes of probability 0 are padded away.
        labels: int32 [N], -1 for none.
        temperatures: extra ones to make exact.
        draws: m, systematic draws from the mass outside the top k.
        draws_temperature: at which they are drawn.
        draw_keys: uint64 [N], what the draws of each row depend on; needed for draws.

    Returns:
        Targets on the CPU: logprob_i = z_i - lse(z); tail the sum of softmax outside the top k, for
        1 minus the head is lost to rounding; entropy lse - sum p z; shift lse(z)/T - lse(z/T).
    """
    z = logits.float()
    # Log-probabilities keep their digits whatever is added to all logits of a row.
    z = z - z.amax(1, keepdim=True)
    top, ids = z.topk(k, dim=1)
    lse, probs = _softmax(z)
    logprobs = top - lse[:, None]
    centred = torch.where(probs > 0, z - lse[:, None], torch.zeros((), device=z.device))
    entropy = -(probs * centred).sum(1)
    tail = _outside(probs, ids)
    drawn, temper = None, {}
    if draws and draws_temperature == 1:
        drawn = _systematic(tail, draws, draw_keys)
    tail_logprob = tail.sum(1).log()
    for temperature in temperatures:
        lse_t, probs_t = _softmax(z / temperature)
        tail_t = _outside(probs_t, ids)
        if draws and draws_temperature == temperature:
            drawn = _systematic(tail_t, draws, draw_keys)
        shift = lse / temperature - lse_t
        temper[temperature] = Temper(_floats(shift), _floats(tail_t.sum(1).log()))
    label_logprobs, label_ranks = _labels(z, lse, labels, top, ids)
    ids = ids.masked_fill(logprobs == -torch.inf, -1)
    return SoftTargets(
        num_positions=np.ones(len(z), np.int32),
        ids=_ints(ids),
        logprobs=_floats(logprobs),
        tail=_floats(tail_logprob),
        draws=drawn,
        entropy=_floats(entropy),
        label_ids=labels,
        label_logprobs=label_logprobs,
        label_ranks=label_ranks,
        temper=temper,
    )


def draw_uniforms(keys: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 [N, count], a pure function of each key.

    Source: the splitmix64 generator (Steele, Lea, Flood 2014), 53 bits a number.
    """
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = keys[:, None] + steps[None, :]
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((x ^ (x >> np.uint64(31))) >> np.uint64(11), np.float64) * 2.0**-53


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    # Of logits whose largest is 0. torch.logsumexp is slower and needs the softmax again anyway.
    probs = z.exp()
    total = probs.sum(1, keepdim=True)
    return total.log().squeeze(1), probs.div_(total)


def _outside(probs: Tensor, ids: Tensor) -> Tensor:
    return probs.clone().scatter_(1, ids, 0.0)


def _systematic(tail: Tensor, draws: int, keys: npt.NDArray[np.uint64] | None) -> Ints:
    # m points (u + i)/m on the cumulative tail: less variance than m independent draws. Their
    # order is shuffled, so that any prefix is a sample too.
    if keys is None:
        raise ValueError("draws need draw_keys")
    uniforms = draw_uniforms(keys, draws + 1)
    points = torch.from_numpy((uniforms[:, :1] + np.arange(draws)) / draws).to(tail.device)
    cumulative = tail.double().cumsum(1)
    total = cumulative[:, -1:]
    found = torch.searchsorted(cumulative, points * total, right=True)
    last = (tail > 0).double().cumsum(1).argmax(1, keepdim=True)
    found = torch.minimum(found, last)
    order = torch.from_numpy(uniforms[:, 1:].argsort(axis=1, kind="stable")).to(tail.device)
    found = found.gather(1, order)
    return _ints(found.masked_fill(total <= 0, -1))


def _labels(
    z: Tensor, lse: Tensor, labels: Ints | None, top: Tensor, ids: Tensor
) -> tuple[Floats | None, Ints | None]:
    if labels is None:
        return None, None
    known = torch.from_numpy(labels >= 0).to(z.device)
    index = torch.from_numpy(np.maximum(labels, 0).astype(np.int64)).to(z.device)[:, None]
    of_label = z.gather(1, index)

    def before(values: Tensor, of: Tensor) -> Tensor:
        return ((values > of_label) | ((values == of_label) & (of < index))).sum(1)

    # Equal logits are ranked as topk put them in the head, and by id after it: a rank is unique,
    # and below k exactly where the head holds the label.
    after = ids.shape[1] + before(z, torch.arange(z.shape[1], device=z.device)) - before(top, ids)
    here = ids == index
    place = (here * torch.arange(ids.shape[1], device=z.device)).sum(1)
    ranks = torch.where(here.any(1), place, after)
    logprobs = (of_label.squeeze(1) - lse).masked_fill(~known, torch.nan)
    return _floats(logprobs), _ints(ranks.masked_fill(~known, -1))


def _floats(values: Tensor) -> Floats:
    return np.asarray(values.float().cpu().numpy())


def _ints(values: Tensor) -> Ints:
    return np.asarray(values.to(torch.int32).cpu().numpy())

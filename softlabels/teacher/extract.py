"""Logits to soft targets: what is kept of a distribution, exact before any rounding."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from softlabels.targets import Floats, Ints, SoftTargets, Temper

Keys = npt.NDArray[np.uint64]

BLOCK = 128
"""Entries of a large vocabulary whose largest and whose sum are looked at before themselves."""

BLOCKED_FROM = 4_096
"""V from which that is quicker: at 49,152 the top 16 take an eighth of the time, the draws less."""

_ELEMENTS = 1 << 19
"""Logits worked on at once on a CPU, so that every pass after the first finds them in its cache."""


def extract(
    logits: Tensor,
    *,
    k: int,
    labels: Ints | None = None,
    temperatures: Sequence[float] = (),
    draws: int = 0,
    draws_temperature: float = 1.0,
    draw_keys: Keys | None = None,
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
    if draws and draw_keys is None:
        raise ValueError("draws need draw_keys")
    step = max(1, len(logits))
    if logits.device.type == "cpu":
        step = min(step, max(1, _ELEMENTS // logits.shape[1]))
    room = _Room(logits, step)
    parts = []
    for start in range(0, max(1, len(logits)), step):
        part = slice(start, start + step)
        points = None
        if draws and draw_keys is not None:
            points = _Points(draw_keys[part], draws, draws_temperature)
        parts.append(
            _extract(
                logits[part],
                k,
                None if labels is None else labels[part],
                temperatures,
                points,
                room,
            )
        )
    return SoftTargets.concat(parts)


def draw_uniforms(keys: Keys, count: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 [N, count], a pure function of each key.

    Source: the splitmix64 generator (Steele, Lea, Flood 2014), 53 bits a number.
    """
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = _mix(keys[:, None] + steps[None, :])
    return np.asarray(x >> np.uint64(11), np.float64) * 2.0**-53


def position_keys(row_keys: Keys, num_positions: Ints) -> Keys:
    """The draw key of every position of some rows, uint64 [N]: a row's own key for its first.

    Args:
        row_keys: uint64 [B].
        num_positions: int32 [B].

    Source: splitmix64's mixing function, of another odd step than `draw_uniforms` takes.
    """
    first = np.cumsum(num_positions, dtype=np.int64) - num_positions
    total = int(num_positions.sum())
    within = (np.arange(total) - np.repeat(first, num_positions)).astype(np.uint64)
    keys = np.repeat(row_keys, num_positions)
    with np.errstate(over="ignore"):
        mixed = _mix(keys + within * np.uint64(0xD1342543DE82EF95))
    return np.where(within == 0, keys, mixed)


def _mix(x: Keys) -> Keys:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


class _Points:
    # m points (u + i)/m on the cumulative tail: less variance than m independent draws. Their
    # order is shuffled, so that any prefix is a sample too.
    def __init__(self, keys: Keys, draws: int, temperature: float) -> None:
        uniforms = draw_uniforms(keys, draws + 1)
        self.temperature = temperature
        self._points = torch.from_numpy((uniforms[:, :1] + np.arange(draws)) / draws)
        self._order = torch.from_numpy(uniforms[:, 1:].argsort(axis=1, kind="stable"))

    def draw(self, tail: Tensor, sums: Tensor) -> Ints:
        """Draws int32 [N, m] from tail weights [N, W] whose block sums are known, [N, W / BLOCK].

        Float64 adds up the blocks, and the entries of those alone in which a point falls.
        """
        points = self._points.to(tail.device)
        blocks, share = _invert(sums, points)
        size = tail.shape[1] // sums.shape[1]
        found = blocks
        if sums.shape[1] == 1:
            found, _ = _invert(tail, points)
        elif size > 1:
            chosen = _blocks(tail, blocks, sums.shape[1])
            inside, _ = _invert(chosen, share[:, :, None])
            found = blocks * size + inside.squeeze(2)
        found = found.gather(1, self._order.to(tail.device))
        return _ints(found.masked_fill(sums.sum(1, keepdim=True) <= 0, -1))


def _invert(weights: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    # Where points in [0, 1) fall among weights, and how far into the one that they fall in.
    ends = weights.double().cumsum(-1)
    targets = points * ends[..., -1:]
    found = torch.searchsorted(ends, targets, right=True)
    last = (weights > 0).to(torch.uint8).flip(-1).argmax(-1, keepdim=True)
    found = torch.minimum(found, weights.shape[-1] - 1 - last)
    weight = weights.double().gather(-1, found)
    share = (targets - (ends.gather(-1, found) - weight)) / weight.clamp(min=1e-300)
    return found, share.clamp(0, 1 - 2**-53)


def _blocks(values: Tensor, which: Tensor, count: int) -> Tensor:
    # Of values [N, W] in `count` blocks: those called for, [N, m, W / count].
    cut = values.view(len(values), count, values.shape[1] // count)
    return cut.gather(1, which[:, :, None].expand(-1, -1, cut.shape[2]))


def _extract(
    logits: Tensor,
    k: int,
    labels: Ints | None,
    temperatures: Sequence[float],
    points: _Points | None,
    room: "_Room",
) -> SoftTargets:
    z, weights, product = room.of(len(logits))
    _centre(logits, z)
    top, ids = _largest(z, k)
    torch.exp(z, out=weights)
    total = weights.sum(1)
    lse = total.log()
    entropy = lse - _expected(weights, z, product) / total
    sums = _outside(weights, ids)
    drawn, temper = None, {}
    if points is not None and points.temperature == 1:
        drawn = points.draw(weights, sums)
    for temperature in temperatures:
        torch.div(z, temperature, out=weights).exp_()
        lse_t = weights.sum(1).log()
        sums_t = _outside(weights, ids)
        if points is not None and points.temperature == temperature:
            drawn = points.draw(weights, sums_t)
        tail_t = sums_t.sum(1).log() - lse_t
        temper[temperature] = Temper(_floats(lse / temperature - lse_t), _floats(tail_t))
    logprobs = top - lse[:, None]
    label_logprobs, label_ranks = _labels(z, lse, labels, top, ids)
    return SoftTargets(
        num_positions=np.ones(len(z), np.int32),
        ids=_ints(ids.masked_fill(logprobs == -torch.inf, -1)),
        logprobs=_floats(logprobs),
        tail=_floats(sums.sum(1).log() - lse),
        draws=drawn,
        entropy=_floats(entropy),
        label_ids=labels,
        label_logprobs=label_logprobs,
        label_ranks=label_ranks,
        temper=temper,
    )


class _Room:
    # Memory for some rows, used again for the next ones: fresh pages cost as much as the work. A
    # large vocabulary is filled up to whole blocks.
    def __init__(self, logits: Tensor, rows: int) -> None:
        width = logits.shape[1]
        if width >= BLOCKED_FROM:
            width += -width % BLOCK
        self._rows = torch.empty(3, rows, width, device=logits.device)

    def of(self, rows: int) -> Tensor:
        """Three tensors [rows, W], whatever is in them."""
        return self._rows[:, :rows]


def _centre(logits: Tensor, z: Tensor) -> None:
    # Log-probabilities keep their digits whatever is added to all logits of a row: the largest
    # becomes 0. What fills up the last block has no probability.
    found = logits.float()
    torch.sub(found, found.amax(1, keepdim=True), out=z[:, : found.shape[1]])
    z[:, found.shape[1] :] = -torch.inf


def _num_blocks(width: int) -> int:
    return width // BLOCK if width >= BLOCKED_FROM else 1


def _largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # The top k stand in the k blocks with the largest maxima.
    count = _num_blocks(z.shape[1])
    if not 0 < k <= count // 3:
        return z.topk(k, dim=1)
    blocks = z.view(len(z), count, BLOCK).amax(2).topk(k, dim=1).indices
    chosen = _blocks(z, blocks, count)
    top, found = chosen.flatten(1).topk(k, dim=1)
    size = chosen.shape[2]
    return top, blocks.gather(1, found // size) * size + found % size


def _outside(weights: Tensor, ids: Tensor) -> Tensor:
    # Takes the top k out of weights [N, W], in place; gives the sums by block of what is left.
    weights.scatter_(1, ids, 0.0)
    count = _num_blocks(weights.shape[1])
    return weights.view(len(weights), count, weights.shape[1] // count).sum(2)


def _expected(weights: Tensor, z: Tensor, product: Tensor) -> Tensor:
    found = torch.mul(weights, z, out=product).sum(1)
    if not found.isfinite().all():  # 0 * -inf, where something is impossible
        found = product.masked_fill_(weights == 0, 0.0).sum(1)
    return found


def _labels(
    z: Tensor, lse: Tensor, labels: Ints | None, top: Tensor, ids: Tensor
) -> tuple[Floats | None, Ints | None]:
    if labels is None:
        return None, None
    known = torch.from_numpy(labels >= 0).to(z.device)
    index = torch.from_numpy(np.maximum(labels, 0).astype(np.int64)).to(z.device)[:, None]
    of_label = z.gather(1, index)
    here = ids == index
    ranks = (here * torch.arange(ids.shape[1], device=z.device)).sum(1)
    # Equal logits are ranked as topk put them in the head, and by id after it: a rank is unique,
    # and below k exactly where the head holds the label.
    rest = (known & ~here.any(1)).nonzero().squeeze(1)
    if len(rest):
        label, of, inside = of_label[rest], index[rest], ids[rest]
        ahead = _ahead(z[rest], label, of)
        ahead -= ((top[rest] > label) | ((top[rest] == label) & (inside < of))).sum(1)
        ranks[rest] = ids.shape[1] + ahead
    logprobs = (of_label.squeeze(1) - lse).masked_fill(~known, torch.nan)
    return _floats(logprobs), _ints(ranks.masked_fill(~known, -1))


def _ahead(z: Tensor, label: Tensor, of: Tensor) -> Tensor:
    # How many entries of z [N, W] are larger, or equal and of a lower id. Counting in float32,
    # exact below 2^24, is four times as quick as counting booleans.
    mask = torch.empty_like(z)
    ahead = torch.gt(z, label, out=mask).sum(1).long()
    tied = torch.eq(z, label, out=mask).sum(1) > 1
    if tied.any():
        equal = z[tied] == label[tied]
        lower = torch.arange(z.shape[1], device=z.device) < of[tied]
        ahead[tied] += (equal & lower).sum(1)
    return ahead


def _floats(values: Tensor) -> Floats:
    return np.asarray(values.float().cpu().numpy())


def _ints(values: Tensor) -> Ints:
    return np.asarray(values.to(torch.int32).cpu().numpy())

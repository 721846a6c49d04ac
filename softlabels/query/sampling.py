"""Which rows of a source come how often: quotas, balance, weights of rows, limits by value.

n rows. All of it is whole numbers, so that every machine finds the same; what a hash decides goes
by its keys (`selection`), never by how files hold the rows.
"""

import decimal
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import BadInputError
from softlabels.targets import to_numpy

Numbers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Name = TypeVar("Name", bound=Hashable)

MOST_READS = 2**31 - 1
"""Of a row, and of a source with `sample_by`: what a plan's int32 and exact int64 sums hold."""

_DIGITS = 60
_SCALE = 10**30


def largest_remainder(shares: Mapping[Name, Fraction], total: int) -> dict[Name, int]:
    """Whole numbers, each within 1 of its share of `total`, together exactly `total`.

    Args:
        shares: that sum to 1; of equal remainders the first ones get more.
        total: to divide.
    """
    exact = {name: total * share for name, share in shares.items()}
    quotas = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: quotas[name] - exact[name])
    for name in by_remainder[: total - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def value_shares(counts: Sequence[int], temperature: float | None) -> list[Fraction]:
    """Shares of values that have `counts` rows: n^(1/temperature) over their sum; None: alike."""
    if temperature is None:
        return [Fraction(1, len(counts))] * len(counts)
    # Decimal's powers are the same everywhere; those of floats are the C library's.
    with decimal.localcontext(decimal.Context(prec=_DIGITS, Emax=decimal.MAX_EMAX)):
        root = 1 / decimal.Decimal(str(temperature))
        sizes = {n: int(decimal.Decimal(n) ** root * _SCALE) for n in set(counts)}
    total = sum(sizes[n] for n in counts)
    return [Fraction(sizes[n], total) for n in counts]


def balanced_reads(codes: Numbers, keys: Keys, total: int, temperature: float | None) -> Numbers:
    """Reads of each row, int64 [n], that give values their shares of `total`.

    Args:
        codes: of each row's value, from 0, all of them used.
        keys: by which rows of a value are taken when its reads do not divide evenly.
        total: reads of all rows.
        temperature: as `value_shares`.
    """
    counts = np.bincount(codes).astype(np.int64)
    shares = value_shares(counts.tolist(), temperature)
    quotas = largest_remainder(dict(enumerate(shares)), total)
    times, more = np.divmod(np.array([quotas[code] for code in range(len(counts))]), counts)
    reads = times[codes]
    if more.any():
        reads += rank_in_value(codes, keys) < more[codes]
    return np.asarray(reads)


def rank_in_value(codes: Numbers, keys: Keys) -> Numbers:
    """Of each row how many rows of its value have lower keys, or equal ones and lie before it."""
    sizes = np.bincount(codes)
    order = np.argsort(keys, kind="stable")
    # numpy sorts 16 bits in linear time.
    small = codes.astype(np.uint16) if len(sizes) <= 1 << 16 else codes
    order = order[np.argsort(small[order], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    ranks = np.empty(len(codes), np.int64)
    ranks[order] = np.arange(len(codes)) - np.repeat(starts, sizes)
    return ranks


def systematic_reads(values: npt.NDArray[np.float64], keys: Keys, total: int, seed: int) -> Numbers:
    """Reads of each row, int64 [n], in proportion to its value: from expectation by less than 1.

    Systematic sampling along the order of keys: row i has
    floor(c_i total / c_n + u) - floor(c_(i-1) total / c_n + u) reads, where c_i is the sum of the
    values up to it, and u in [0, 1) is drawn from the seed. All sums are of whole numbers: values
    count in steps of the largest one's 2^-36 (finer of fewer than 2^25 rows).

    Args:
        values: finite, at least 0, not all 0.
        keys: of the rows.
        total: reads of all rows, up to MOST_READS.
        seed: of u.

    Source: systematic (unequal probability) sampling, Madow 1949, Annals of Math. Statistics 20.
    """
    order = np.argsort(keys, kind="stable")
    bits = min(52, 61 - len(values).bit_length())
    steps = np.rint(values[order] / values.max() * 2.0**bits).astype(np.int64)
    sums = np.cumsum(steps)
    whole = int(sums[-1])
    digest = hashlib.md5(f"{seed}/sample_by".encode()).hexdigest()
    start = int(digest[:16], 16) * whole >> 64
    reads = np.empty(len(values), np.int64)
    reads[order] = np.diff(reads_until(sums, total, whole, start), prepend=0)
    return reads


def reads_until(sums: Numbers, total: int, whole: int, start: int) -> Numbers:
    """floor((sums * total + start) / whole), exactly, where the products do not fit 64 bits.

    Args:
        sums: from 0 to `whole`.
        total: up to MOST_READS.
        whole: below 2^62.
        start: from 0, below `whole`.
    """
    step, rest = divmod(whole, total)
    offset, odd = divmod(start, total)

    def border(read: Numbers) -> Numbers:
        """The least sum at which there are `read` reads: sum * total + start >= read * whole."""
        return np.asarray(read * step - offset - (odd - read * rest) // total)

    # Floats are at most one read off, as their error is 2^-20 of one; whole numbers decide.
    found = np.floor(sums / whole * total + start / whole).astype(np.int64).clip(0, total)
    found -= (found > 0) & (border(found) > sums)
    found += (found < total) & (border(found + 1) <= sums)
    return np.asarray(found)


def flat_numbers(column: pa.ChunkedArray, kind: type[np.generic]) -> Any:
    """The numbers of a column without nulls, [n] of type `kind`."""
    parts = [to_numpy(chunk, kind) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, kind)


def parts_of(reads: Numbers) -> list[tuple[Numbers, int]]:
    """Places of rows that come equally often, with how often: by rising number, without 0."""
    counts = np.flatnonzero(np.bincount(reads)) if len(reads) and reads.max() < 1 << 20 else None
    found = np.unique(reads) if counts is None else counts
    return [(np.flatnonzero(reads == n).astype(np.int64), int(n)) for n in found.tolist() if n]


def even_parts(keys: Keys | None, count: int, total: int) -> list[tuple[Numbers, int]]:
    """As `parts_of`, of `count` rows that come alike: all of them, then the lowest keys again."""
    times, rest = divmod(total, count)
    parts = [(np.arange(count, dtype=np.int64), times)] if times else []
    if rest and keys is not None:
        parts.append((lowest(keys, rest), 1))
    return parts


def lowest(keys: Keys, count: int) -> Numbers:
    """Rising indexes of the `count` lowest keys, or of all when there are fewer."""
    if count >= len(keys):
        return np.arange(len(keys), dtype=np.int64)
    border = np.partition(keys, count - 1)[count - 1]
    below = np.flatnonzero(keys < border)
    at = np.flatnonzero(keys == border)[: count - len(below)]
    return np.sort(np.concatenate([below, at])).astype(np.int64)


def require_readable(name: str, reads: int, rows: int, sampled: bool) -> None:
    """Raises BadInputError where a plan could not say how often rows of a source come."""
    if reads == 0:
        return
    most = reads if sampled else -(-reads // rows)
    if most > MOST_READS:
        raise BadInputError(
            f"source {name!r}: {reads} rows an epoch of {rows}: at most {MOST_READS} are possible"
            f"{'' if sampled else ' of one row'}; give smaller rows, or weights that differ less"
        )


class Taken:
    """Examples that sources have selected so far, by 128 bits of their hash."""

    def __init__(self) -> None:
        self._high, self._low = np.zeros(0, np.uint64), np.zeros(0, np.uint64)

    def unseen(self, high: Keys, low: Keys) -> Mask:
        """Which of some examples are not taken yet, nor before in the same list."""
        count = len(self._high)
        highs, lows = np.concatenate([self._high, high]), np.concatenate([self._low, low])
        order = np.argsort(highs, kind="stable")  # what was taken comes before its like
        if not _decide(highs[order], lows[order]):
            order = np.lexsort((lows, highs))
        highs, lows = highs[order], lows[order]
        again = np.zeros(len(order), np.bool_)
        again[1:] = (highs[1:] == highs[:-1]) & (lows[1:] == lows[:-1])
        seen = np.empty(len(order), np.bool_)
        seen[order] = again
        return ~seen[count:]

    def add(self, high: Keys, low: Keys) -> None:
        """Takes examples."""
        self._high = np.concatenate([self._high, high])
        self._low = np.concatenate([self._low, low])


def _decide(highs: Keys, lows: Keys) -> bool:
    """Whether examples of equal high halves, side by side, are equal: but for chance they are."""
    same = highs[1:] == highs[:-1]
    return bool((lows[1:] == lows[:-1])[same].all())

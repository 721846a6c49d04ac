"""Which of several sources each position of a stage is of: evenly, from the first row on.

S sources have n_s rows each, N together; a_s = n_s / N is the share of source s. After any p
positions the rows of each source are within ONE of p a_s, and any position is found at once.

Two sources are split by rounding: of the first m rows of a node, floor(m n_left / n + 1/2) are of
its left side. Either side is then at most 1/2 from its share of m. More sources make a tree of such
splits, in which a node counts its own rows only. Let e be how far a node of A rows is from its
share of p, at most: rounding adds 1/2, and the node's own error comes on in proportion, so that a
child of B rows is off by at most 1/2 + e B / A. From the root, where e = 0, down to a source:

    error of s <= 1/2 (1 + sum of n_s / A over the nodes between root and source)

Up to four sources always have a tree with no more than 1: there is one node in between at most, and
n_s / A <= 1. Of eight most have, and more where they are alike. Where no such tree is found,
as for twelve sources of very different shares, the order of a stage of up to MOST_SCHEDULED rows is
worked out row by row, once a stream: each row has a first and a last position that keep its source
within one, and the row whose last position is nearest comes next. That is exact (rows are of unit
length and the earliest deadline goes first, which finds an order if there is one; that there is one
is Tijdeman's theorem), and costs some 2 s and 8 MB a million rows. Longer stages of such sources
have the best tree: off by 1.2 rows at most for twelve, 1.3 for thirty, as far as was tried.

Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from softlabels.student.splitting import Node, Side, best_splits

Int64s = npt.NDArray[np.int64]

MOST_SCHEDULED = 4_000_000
"""Rows of a stage whose order is worked out one by one, if need be."""


class Interleave(Protocol):
    """Where the rows of sources, each in an order of its own, are among all positions.

    Attributes:
        error: rows that a source may be from its share of any prefix.
    """

    error: float

    def counts(self, position: int) -> list[int]:
        """The rows of each source before a position."""

    def positions(self, source: int, start: int, stop: int) -> Int64s:
        """The positions of the rows [start, stop) of a source, int64, rising."""


def interleave(rows: Sequence[int]) -> Interleave:
    """The order of sources that have so many rows, each at least one.

    The same on every machine: whole numbers decide, and of equals the source that comes first.
    """
    tree, error = best_splits(rows)
    if error <= 1 or sum(rows) > MOST_SCHEDULED:
        return Split(tree, len(rows), error)
    return Scheduled(rows)


_Path = tuple[tuple[Node, bool], ...]
"""The nodes above a source, and whether it is on their left."""


class Split:
    """An order by splits: any position costs as many steps as the tree is deep.

    Attributes:
        error: rows that a source may be from its share.
    """

    def __init__(self, root: Side, num_sources: int, error: float) -> None:
        self.error = error
        self._root = root
        self._num_sources = num_sources
        self._paths = dict(_paths(root, ()))

    def counts(self, position: int) -> list[int]:
        """The rows of each source before a position."""
        found = [0] * self._num_sources
        waiting = [(self._root, position)]
        while waiting:
            side, count = waiting.pop()
            if isinstance(side, int):
                found[side] = count
                continue
            left = (2 * count * side.left_rows + side.rows) // (2 * side.rows)
            waiting += [(side.left, left), (side.right, count - left)]
        return found

    def positions(self, source: int, start: int, stop: int) -> Int64s:
        """The positions of the rows [start, stop) of a source, int64, rising."""
        found = np.arange(start, stop, dtype=np.int64)
        for node, is_left in reversed(self._paths[source]):
            # The row j of a side is the one that brings its rounded count to j + 1.
            if is_left:
                found = _scaled(found, node.rows, node.left_rows, 2 * node.left_rows - 1) - 1
            else:
                found = _scaled(found, node.rows, node.rows - node.left_rows, 0)
        return found


class Scheduled:
    """An order worked out row by row, for sources that no tree serves.

    Attributes:
        error: rows that a source may be from its share.
    """

    error = 1.0

    def __init__(self, rows: Sequence[int]) -> None:
        sources = np.array(list(_scheduled(rows)), np.int64)
        self._positions = [np.flatnonzero(sources == source) for source in range(len(rows))]

    def counts(self, position: int) -> list[int]:
        """The rows of each source before a position."""
        return [int(np.searchsorted(own, position)) for own in self._positions]

    def positions(self, source: int, start: int, stop: int) -> Int64s:
        """The positions of the rows [start, stop) of a source, int64, rising."""
        return self._positions[source][start:stop].astype(np.int64)


def _scaled(values: Int64s, multiplier: int, divisor: int, more: int) -> Int64s:
    """floor(((2 v + 1) multiplier + more) / (2 divisor)) of rising values, exactly."""
    if not len(values):
        return values
    base = int(values[0])
    whole, rest = divmod((2 * base + 1) * multiplier + more, 2 * divisor)
    beyond = values - base
    if 2 * multiplier * int(beyond[-1]) + 2 * divisor >= 2**63:
        beyond = beyond.astype(object)
    return np.asarray((rest + 2 * multiplier * beyond) // (2 * divisor) + whole, np.int64)


def _paths(side: Side, path: _Path) -> Iterator[tuple[int, _Path]]:
    if isinstance(side, int):
        yield side, path
        return
    yield from _paths(side.left, (*path, (side, True)))
    yield from _paths(side.right, (*path, (side, False)))


def _scheduled(rows: Sequence[int]) -> Iterator[int]:
    """The source of each position: of the rows that may come, that which must come first."""
    total = sum(rows)
    # Row j may be at p only if j + 1 <= (p + 1) a + 1, and must be at p before (p + 1) a - 1 > j.
    later = [(0, source, 0) for source in range(len(rows))]
    ready: list[tuple[int, int, int]] = []
    for position in range(total):
        while later and later[0][0] <= position:
            _, source, row = heapq.heappop(later)
            heapq.heappush(ready, ((row + 1) * total // rows[source], source, row))
        _, source, row = heapq.heappop(ready)
        if row + 1 < rows[source]:
            first = -(-(row + 1) * total // rows[source]) - 1
            heapq.heappush(later, (first, source, row + 1))
        yield source

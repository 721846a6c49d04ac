"""The tree of splits in two that keeps sources nearest to their shares, as far as it is found.

What a tree promises is in `interleave`. Which one is chosen decides the reading order, so that it
must be the same on every machine: one thread, one seed, sums and products alone.
"""

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

MOST_TRIED = 60_000
"""Sides of trees that are looked at: half a second."""

ROUNDING = 1e-9
"""More than floats err when errors are compared."""

Tree: TypeAlias = "tuple[Tree, Tree] | int"
Path: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """Two sides, rows of both, and of the left one."""

    left: "Side"
    right: "Side"
    rows: int
    left_rows: int


Side: TypeAlias = Node | int
"""A node, or a source."""


def best_splits(rows: Sequence[int]) -> tuple[Side, float]:
    """A tree of all sources, and how far, in rows, it lets one be from its share at most.

    It begins with the two smallest sides joined again and again; then a side moves elsewhere, or
    two change places, where the error is less or not much more, ever less as time goes on.
    """
    draw = random.Random(0).random  # `random` alone is promised never to change
    tree = _smallest_joined(rows)
    error = _error(tree, rows)
    best, least = tree, error
    steps = MOST_TRIED // (2 * len(rows))
    for step in range(steps):
        if least <= 1 - ROUNDING:
            break
        other = _moved(tree, draw)
        found = _error(other, rows)
        if found <= error + 0.1 * (1 - step / steps) * draw():
            tree, error = other, found
            if error < least:
                best, least = tree, error
    return _side(best, rows)[0], least


def _error(tree: Tree, rows: Sequence[int]) -> float:
    """(1 + sum of n / A) / 2 of the source where it is most, A of each node below the root."""
    sizes: dict[int, int] = {}

    def size(side: Tree) -> int:
        if isinstance(side, int):
            return rows[side]
        sizes[id(side)] = size(side[0]) + size(side[1])
        return sizes[id(side)]

    size(tree)
    most = 0.0
    waiting = [(tree, 0.0)]
    while waiting:
        side, load = waiting.pop()
        if isinstance(side, int):
            most = max(most, rows[side] * load)
            continue
        if side is not tree:
            load += 1 / sizes[id(side)]
        waiting += [(side[0], load), (side[1], load)]
    return (1 + most) / 2


def _smallest_joined(rows: Sequence[int]) -> Tree:
    heap: list[tuple[int, int, Tree]] = [(own, source, source) for source, own in enumerate(rows)]
    heapq.heapify(heap)
    number = len(rows)
    while len(heap) > 1:
        (own, _, one), (more, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (own + more, number, (one, other)))
        number += 1
    return heap[0][2]


def _moved(tree: Tree, draw: Callable[[], float]) -> Tree:
    """The tree with two sides exchanged, or one joined to another."""
    paths = list(_paths(tree, ()))
    while True:
        one, other = (paths[int(draw() * len(paths))] for _ in range(2))
        if one[: len(other)] == other or other[: len(one)] == one:
            continue
        mine, theirs = _at(tree, one), _at(tree, other)
        if draw() < 0.5:
            return _put(_put(tree, one, theirs), other, mine)
        joined = _put(tree, other, (theirs, mine))
        return _put(joined, one[:-1], _at(joined, (*one[:-1], 1 - one[-1])))


def _paths(tree: Tree, path: Path) -> Iterator[Path]:
    """Of all sides but the root."""
    if not isinstance(tree, int):
        for number, side in enumerate(tree):
            yield (*path, number)
            yield from _paths(side, (*path, number))


def _at(tree: Tree, path: Path) -> Tree:
    for number in path:
        assert not isinstance(tree, int)
        tree = tree[number]
    return tree


def _put(tree: Tree, path: Path, side: Tree) -> Tree:
    if not path:
        return side
    assert not isinstance(tree, int)
    left, right = tree
    if path[0]:
        return left, _put(right, path[1:], side)
    return _put(left, path[1:], side), right


def _side(tree: Tree, rows: Sequence[int]) -> tuple[Side, int]:
    if isinstance(tree, int):
        return tree, rows[tree]
    (left, own), (right, more) = _side(tree[0], rows), _side(tree[1], rows)
    return Node(left, right, own + more, own), own + more

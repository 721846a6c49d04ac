import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softlabels.student import flat, lease
from softlabels.student.gather import Parts
from softlabels.student.lease import Lease
from softlabels.student.records import MOST_OPEN, Descriptor, Records
from softlabels.student.rows import Rows
from tests.student.parts import assert_same, random_rows

SHAPES: dict[str, dict[str, Any]] = {
    "one position": {"positions": (1, 1), "temperatures": (2.0,)},
    "even": {"positions": (7, 7), "draws": 2},
    "uneven": {"positions": (1, 9), "draws": 4},
    "empty rows": {"positions": (0, 2)},
    "wide": {"positions": (3, 3), "k": 512},
    "no ids": {"positions": (2, 2), "k": 0},
}


def expected(parts: list[Rows], which: Any, index: Any) -> Rows:
    starts = np.cumsum([0, *map(len, parts)])
    return Rows.concat(parts).take(starts[which] + index)


def picked(rng: np.random.Generator, parts: list[Rows], count: int) -> tuple[Any, Any]:
    which = rng.integers(0, len(parts), count)
    return which, np.array([rng.integers(0, len(parts[p])) for p in which], np.int64)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_those_of_all_parts_joined(shape: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [random_rows(rng, int(rng.integers(1, 12)), **SHAPES[shape]) for _ in range(5)]
    for count in (1, 2, 30):
        which, index = picked(rng, parts, count)
        assert_same(Parts(parts).gather(which, index), expected(parts, which, index))


def test_parts_of_other_lengths_of_rows_are_gathered_together() -> None:
    rng = np.random.default_rng(0)
    parts = [random_rows(rng, 4, (n, n)) for n in (2, 3, 2)]
    which, index = picked(rng, parts, 20)
    assert_same(Parts(parts).gather(which, index), expected(parts, which, index))


def test_what_only_some_parts_know_is_unknown_elsewhere() -> None:
    rng = np.random.default_rng(1)
    some = ("tail", "entropy", "label_ids", "label_logprobs", "label_ranks")
    parts = [random_rows(rng, 5, (1, 4)), random_rows(rng, 5, (1, 4), unknown=some)]
    which, index = picked(rng, parts, 20)
    assert_same(Parts(parts).gather(which, index), expected(parts, which, index))
    nobody = Parts(parts).gather(np.ones(3, np.int64), np.arange(3))
    assert nobody.targets.tail is None


@pytest.mark.parametrize("positions", [(1, 4), (1, 1)])
def test_weights_and_places_of_positions_go_with_them(positions: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    parts = []
    for part in (random_rows(rng, 5, positions) for _ in range(3)):
        n = len(part.targets.ids)
        parts.append(
            replace(
                part,
                position_weights=rng.random(n).astype(np.float32),
                kept=np.arange(n, dtype=np.int32),
                whole=part.targets.num_positions + 1,
            )
        )
    which, index = picked(rng, parts, 20)
    assert_same(Parts(parts).gather(which, index), expected(parts, which, index))


def as_records(path: Path, rows: Rows) -> Records:
    path.write_bytes(b"".join(bytes(part) for part in flat.dump(rows)))
    descriptor = Descriptor(os.open(path, os.O_RDONLY))
    found = flat.load(descriptor.number, path.stat().st_size)
    assert isinstance(found, Records)
    return replace(found, opened=lambda: Descriptor(os.open(path, os.O_RDONLY)))


@pytest.mark.parametrize("positions", [(64, 64), (50, 120)])
def test_records_give_the_same_rows(tmp_path: Path, positions: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    parts = [random_rows(rng, 4, positions, 16, 2, (2.0,)) for _ in range(5)]
    files = [as_records(tmp_path / str(i), part) for i, part in enumerate(parts)]
    which, index = picked(rng, parts, 30)
    assert_same(Parts(files).gather(which, index), expected(parts, which, index))
    # Mixed with parts in memory, as where one table is read by position rules.
    mixed: list[Rows | Records] = [*files[:2], *parts[2:]]
    assert_same(Parts(mixed).gather(which, index), expected(parts, which, index))


def test_more_files_than_may_be_open_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    part = random_rows(rng, 2, (40, 40), 16)
    file = as_records(tmp_path / "f", part)
    count = MOST_OPEN + 30
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    held = Parts([file] * count)
    which = np.arange(count)
    index = which % 2
    assert_same(held.gather(which, index), part.take(index))
    assert len(os.listdir("/proc/self/fd")) <= before + MOST_OPEN
    del held
    gc.collect()
    # Others' garbage may go with it.
    assert len(os.listdir("/proc/self/fd")) <= before


def test_memory_is_used_again_when_its_last_view_is_gone() -> None:
    lease._free.clear()
    room = Lease(3 << 20)
    first = room.empty((1000, 100), np.int32)
    tensor = torch.from_numpy(room.empty((1000,), np.float32))[10:]
    assert not np.shares_memory(first, tensor.numpy())
    address = first.ctypes.data
    del room, first
    gc.collect()
    assert not lease._free.get(3 << 20)
    del tensor
    gc.collect()
    assert len(lease._free[3 << 20]) == 1
    assert Lease(3 << 20).empty((4,), np.int32).ctypes.data == address


def test_more_than_was_leased_is_memory_of_its_own() -> None:
    room = Lease(1 << 20)
    arrays = [room.empty((1 << 17,), np.int32) for _ in range(5)]
    for number, array in enumerate(arrays):
        array[:] = number
    assert [int(array[0]) for array in arrays] == [0, 1, 2, 3, 4]
    assert all(int(array.sum()) == n * len(array) for n, array in enumerate(arrays))

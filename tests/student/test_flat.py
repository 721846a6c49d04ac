import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.student import flat
from softlabels.student.gather import whole_rows
from softlabels.student.records import Descriptor, GoneError, Records
from softlabels.student.rows import Rows
from tests.student.parts import assert_same, random_rows

CASES: dict[str, dict[str, Any]] = {
    "classification": {"rows": 40},
    "draws and temperatures": {"rows": 9, "draws": 2, "temperatures": (2.0, 1.5)},
    "uneven": {"rows": 12, "positions": (1, 9), "draws": 3},
    "rows without positions": {"rows": 5, "positions": (0, 1)},
    "long rows": {"rows": 6, "positions": (40, 40), "k": 16},
    "long uneven rows": {"rows": 7, "positions": (20, 90), "k": 17, "temperatures": (0.5,)},
    "unknown": {"rows": 8, "unknown": ("tail", "entropy", "label_ids", "label_ranks")},
    "no ids": {"rows": 4, "k": 0, "positions": (3, 3)},
    "no rows": {"rows": 0},
    "no columns": {"rows": 3, "columns": False},
}
RECORDS = {"long rows", "long uneven rows"}


def write(path: Path, rows: Rows) -> int:
    path.write_bytes(b"".join(bytes(part) for part in flat.dump(rows)))
    return path.stat().st_size


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def read(path: Path, verify: bool = True) -> Rows:
    with opened(path) as descriptor:
        found = flat.load(descriptor, path.stat().st_size, verify)
    if isinstance(found, Records):
        found.__dict__["opened"] = lambda: Descriptor(os.open(path, os.O_RDONLY))
        return whole_rows(found)
    return found


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_back(tmp_path: Path, case: str, verify: bool) -> None:
    rows = random_rows(np.random.default_rng(1), **CASES[case])
    write(tmp_path / "f", rows)
    assert_same(read(tmp_path / "f", verify), rows)


@pytest.mark.parametrize("case", CASES)
def test_long_rows_are_records_and_hold_no_targets(tmp_path: Path, case: str) -> None:
    rows = random_rows(np.random.default_rng(2), **CASES[case])
    size = write(tmp_path / "f", rows)
    with opened(tmp_path / "f") as descriptor:
        found = flat.load(descriptor, size)
    assert isinstance(found, Records) == (case in RECORDS)
    if isinstance(found, Records):
        assert found.row_bytes == sum(v.nbytes for _, v in flat.arrays_of(rows.targets))
        held = sum(values.nbytes for values in [found.example_ids, *found.columns.values()])
        assert found.nbytes == held + found.counts.nbytes + 2000


@pytest.mark.parametrize("case", ["classification", "long uneven rows", "no rows"])
def test_any_changed_byte_is_noticed(tmp_path: Path, case: str) -> None:
    rng = np.random.default_rng(3)
    rows = random_rows(rng, **CASES[case])
    size = write(tmp_path / "f", rows)
    data = bytearray((tmp_path / "f").read_bytes())
    places = {*range(0, min(size, 300)), *rng.integers(0, size, 150).tolist()}
    noticed = 0
    for place in places:
        before = data[place]
        data[place] ^= int(rng.integers(1, 256))
        (tmp_path / "f").write_bytes(data)
        try:
            assert_same(read(tmp_path / "f"), rows)  # padding says nothing
            assert before == 0
        except flat.DamagedError:
            noticed += 1
        data[place] = before
    assert noticed > 0.7 * len(places)


def test_a_page_of_zeros_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "f", random_rows(np.random.default_rng(4), 2000))
    data = bytearray((tmp_path / "f").read_bytes())
    data[8192:12288] = bytes(4096)
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(flat.DamagedError, match="checksum"):
        read(tmp_path / "f")


def test_swapped_pages_are_noticed(tmp_path: Path) -> None:
    write(tmp_path / "f", random_rows(np.random.default_rng(4), 60, (60, 60), 16))
    data = bytearray((tmp_path / "f").read_bytes())
    at = len(data) // 2 // 4096 * 4096
    data[at : at + 8192] = data[at + 4096 : at + 8192] + data[at : at + 4096]
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(flat.DamagedError, match="checksum"):
        read(tmp_path / "f")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("case", ["classification", "long rows"])
def test_a_file_that_is_cut_is_noticed(tmp_path: Path, case: str, verify: bool) -> None:
    size = write(tmp_path / "f", random_rows(np.random.default_rng(5), **CASES[case]))
    for length in (0, 10, 63, 64, 100, size // 2, size - 1):
        os.truncate(tmp_path / "f", length)
        with pytest.raises(flat.DamagedError):
            read(tmp_path / "f", verify)
        write(tmp_path / "f", random_rows(np.random.default_rng(5), **CASES[case]))


def test_records_of_a_file_that_is_cut_later_are_gone(tmp_path: Path) -> None:
    size = write(tmp_path / "f", random_rows(np.random.default_rng(6), **CASES["long rows"]))
    with opened(tmp_path / "f") as descriptor:
        found = flat.load(descriptor, size)
    assert isinstance(found, Records)
    found.__dict__["opened"] = lambda: Descriptor(os.open(tmp_path / "f", os.O_RDONLY))
    os.truncate(tmp_path / "f", size - 500)
    with pytest.raises(GoneError):
        whole_rows(found)

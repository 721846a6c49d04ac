"""A disk that fills up, or cannot be written: what is committed stays, and what is not is said."""

import contextlib
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import BadInputError, StorageError, TryAgainError
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from softlabels.teacher.capture import Progress, Sharing, capture
from tests.faults.record import record, scaled
from tests.teacher.jobs import make_spec, rows_table, stored, write_source

SEED = 11
ROWS = 60
ROOM = 4_000_000


def mount(*arguments: str) -> None:
    """Calls mount or umount; the test is skipped where that is not allowed."""
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"A FULL DISK IS NOT TESTED: {done.stderr.strip()} (needs root)")


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """A disk of `size` bytes at `place`."""
    place.mkdir()
    mount("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def write_bulky_source(folder: Path) -> None:
    """Rows whose notes do not compress: a unit of ten takes some 20 kB."""
    rng = random.Random(SEED)
    notes = pa.array([rng.randbytes(2_000) for _ in range(ROWS)])
    (folder / "src").mkdir()
    pq.write_table(rows_table(0, ROWS).set_column(4, "note", notes), folder / "src" / "a.parquet")


def test_a_disk_that_fills_up_at_any_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTLABELS_PATIENCE", "1")
    write_bulky_source(tmp_path)
    changes: dict[str, Any] = {"shard_rows": 10, "carry": ["note"]}
    whole = make_spec(tmp_path, **changes, table=str(tmp_path / "whole"))
    capture(whole)
    rng = random.Random(SEED)
    times, kept, ends = scaled(4, 40), 0, {"before the table": 0, "within": 0}
    began = time.monotonic()
    for number in range(times):
        disk = tmp_path / f"disk{number}"
        size = rng.randrange(8, 44) * 4_096  # it fills up in blocks of a page
        with small_disk(disk, size):
            spec = make_spec(tmp_path, **changes, table=str(disk / "table"))
            acknowledged: list[str] = []

            def committed(unit: str, version: int, acks: list[str] = acknowledged) -> None:
                acks.append(unit)

            told = Progress(committed=committed)
            sharing = Sharing(claim=number % 2 == 0)
            with pytest.raises((StorageError, TryAgainError)) as caught:
                capture(spec, told, sharing)
            assert "\n" not in str(caught.value)
            assert str(disk) in str(caught.value)
            rows, units = rows_at(spec.table)
            assert set(acknowledged) <= units
            ends["within" if units else "before the table"] += 1
            kept += rows
            assert not list(disk.rglob("*.tmp"))
            mount("mount", "-o", f"remount,size={ROOM}", str(disk))
            capture(spec, sharing=sharing)
            table = Table.open(spec.table)
            assert verify(table)["problems"] == []
            assert repr(stored(spec.table)) == repr(stored(whole.table))
    assert ends["within"] > times // 4
    record(
        "disk full in a capture (tmpfs), then room again",
        {
            "disks": times,
            "rows kept meanwhile": kept,
            "acknowledged units lost": 0,
            "rows lost": 0,
            "rows doubled": 0,
            "seconds": round(time.monotonic() - began),
            "seed": SEED,
        },
    )


def rows_at(uri: str) -> tuple[int, set[str]]:
    """Rows and units of a table that a full disk holds, each version of it read; none: 0."""
    try:
        table = Table.open(uri)
    except BadInputError:  # there is none
        return 0, set()
    assert verify(table)["problems"] == []
    for version in range(table.version + 1):
        pl.scan_delta(uri, version=version).collect()
    return table.num_rows, {file.unit for file in table.files}


@contextlib.contextmanager
def read_only(place: Path) -> Iterator[None]:
    """Lets nobody write below `place`, a disk of its own where this is root's process."""
    if os.geteuid() == 0:
        mount("mount", "-o", "remount,ro", str(place))
        try:
            yield
        finally:
            mount("mount", "-o", "remount,rw", str(place))
        return
    folders = [place, *(path for path in place.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that can be made read-only."""
    found = tmp_path / "place"
    if os.geteuid() == 0:
        with small_disk(found, ROOM):
            yield found
    else:
        found.mkdir()
        yield found


def state_of(place: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file and folder."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in place.rglob("*")}


def test_a_folder_that_cannot_be_written(tmp_path: Path, place: Path) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, ROWS)
    spec = make_spec(tmp_path, shard_rows=10, table=str(place / "table"))
    sharings = [Sharing(), Sharing(claim=True), Sharing(shard=(1, 2))]
    refused = 0
    for begun in (False, True):
        if begun:
            capture(spec, sharing=Sharing(shard=(0, 2)))
        before = state_of(place)
        with read_only(place):
            for sharing in sharings:
                with pytest.raises(StorageError) as caught:
                    capture(spec, sharing=sharing)
                said = str(caught.value)
                assert re.search("Permission denied|Read-only file system", said)
                assert str(place) in said
                assert "\n" not in said
                refused += 1
        assert state_of(place) == before
    assert capture(spec).rows == ROWS // 2
    with read_only(place):  # nothing is left, so nothing need be written
        for sharing in sharings:
            report = capture(spec, sharing=sharing)
            assert (report.rows, report.already, report.left) == (0, ROWS, 0)
    record("read-only folder", {"refused": refused, "files changed": 0, "rows lost": 0})

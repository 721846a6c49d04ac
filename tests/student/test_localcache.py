import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softlabels.errors import BadInputError
from softlabels.student import flat, localcache
from softlabels.student.gather import whole_rows
from softlabels.student.localcache import LocalCache, open_cache
from softlabels.student.records import GoneError, Records
from softlabels.student.rows import Rows
from tests.faults.test_disk import small_disk
from tests.student.parts import assert_same, random_rows

SHARDS = ["ab" * 32, "cd" * 32, "ef" * 32]
COLUMNS = ["topk_ids", "number"]


@pytest.fixture(autouse=True)
def forget_what_was_told() -> Iterator[None]:
    localcache._TOLD.clear()
    yield
    localcache._TOLD.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def rows_of(group: int, long: bool = False) -> Rows:
    """Some 20 kB; as records, where `long`."""
    rng = np.random.default_rng(group)
    if long:
        return random_rows(rng, 4, (30, 50), 16, columns=False)
    return random_rows(rng, 60, (1, 1), 40, columns=False)


def maker(group: int, calls: list[int] | None = None, long: bool = False) -> Callable[[], Rows]:
    def make() -> Rows:
        if calls is not None:
            calls.append(group)
        return rows_of(group, long)

    return make


def whole(found: Rows | Records | None) -> Rows:
    assert found is not None
    return whole_rows(found) if isinstance(found, Records) else found


def on_disk(folder: Path) -> int:
    files = [f for f in (folder / "shards").rglob("*") if f.is_file()]
    return sum(-(-f.stat().st_size // 4096) * 4096 for f in files)


@pytest.mark.parametrize("long", [False, True])
def test_a_row_group_is_made_once_and_then_read(folder: Path, long: bool) -> None:
    cache = LocalCache(folder, 1 << 20, SHARDS)
    calls: list[int] = []
    assert cache.load(SHARDS[0], 3, COLUMNS) is None
    for _ in range(3):
        found = cache.fill(SHARDS[0], 3, COLUMNS, maker(3, calls, long))
        assert isinstance(found, Records) == long
        assert_same(whole(found), rows_of(3, long))
    assert calls == [3]
    assert_same(whole(cache.load(SHARDS[0], 3, COLUMNS)), rows_of(3, long))
    later = LocalCache(folder, 1 << 20, [])
    assert_same(whole(later.load(SHARDS[0], 3, COLUMNS)), rows_of(3, long))
    # Files, and nothing half done beside them.
    assert not list(folder.rglob("*.tmp"))


def test_other_bytes_groups_or_columns_are_other_rows(folder: Path) -> None:
    cache = LocalCache(folder, 1 << 20, SHARDS)
    cache.fill(SHARDS[0], 3, COLUMNS, maker(3))
    assert cache.load(SHARDS[1], 3, COLUMNS) is None
    assert cache.load(SHARDS[0], 4, COLUMNS) is None
    assert cache.load(SHARDS[0], 3, COLUMNS[:1]) is None
    assert cache.load(SHARDS[0], 3, COLUMNS[::-1]) is not None


def test_a_name_that_is_no_sha256_leads_nowhere_else(folder: Path) -> None:
    cache = LocalCache(folder, 1 << 20, [])
    for name in ("../../x", "", "AB" * 32, "ab" * 31 + "/.", "ab" * 33):
        cache.fill(name, 0, COLUMNS, maker(0))
    outside = [p for p in folder.parent.rglob("*") if p.is_file() and folder not in p.parents]
    assert not outside
    assert {p.name for p in (folder / "shards").iterdir()} <= {"none"}


@pytest.mark.parametrize("long", [False, True])
def test_a_changed_byte_is_read_again_from_the_source(
    folder: Path, long: bool, caplog: pytest.LogCaptureFixture
) -> None:
    LocalCache(folder, 1 << 20, SHARDS).fill(SHARDS[0], 0, COLUMNS, maker(0, long=long))
    (path,) = [p for p in (folder / "shards").rglob("*") if p.is_file()]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    cache = LocalCache(folder, 1 << 20, SHARDS)
    calls: list[int] = []
    assert cache.load(SHARDS[0], 0, COLUMNS) is None
    assert not path.exists()
    assert_same(whole(cache.fill(SHARDS[0], 0, COLUMNS, maker(0, calls, long))), rows_of(0, long))
    assert calls == [0]
    assert "is damaged (another checksum)" in caplog.text


def test_what_is_verified_is_verified_once_a_process(folder: Path, monkeypatch: Any) -> None:
    LocalCache(folder, 1 << 20, SHARDS).fill(SHARDS[0], 0, COLUMNS, maker(0))
    asked: list[bool] = []
    load = flat.load

    def seen(descriptor: int, size: int, verify: bool) -> Any:
        asked.append(verify)
        return load(descriptor, size, verify)

    monkeypatch.setattr(flat, "load", seen)
    cache = LocalCache(folder, 1 << 20, SHARDS)
    for _ in range(3):
        cache.load(SHARDS[0], 0, COLUMNS)
    assert asked == [True, False, False]
    # A file that took its place is another one.
    (path,) = (folder / "shards").rglob("0-*")
    shutil.copy(path, folder / "copy")
    os.replace(folder / "copy", path)
    cache.load(SHARDS[0], 0, COLUMNS)
    assert asked[3:] == [True]


def test_records_whose_file_is_gone_say_so(folder: Path) -> None:
    cache = LocalCache(folder, 1 << 20, SHARDS)
    found = cache.fill(SHARDS[0], 0, COLUMNS, maker(0, long=True))
    assert isinstance(found, Records)
    shutil.rmtree(folder / "shards")
    with pytest.raises(GoneError):
        whole_rows(found)


def test_mapped_rows_outlive_their_file(folder: Path) -> None:
    cache = LocalCache(folder, 1 << 20, SHARDS)
    found = whole(cache.fill(SHARDS[0], 0, COLUMNS, maker(0)))
    shutil.rmtree(folder / "shards")
    assert_same(found, rows_of(0))


def test_the_least_recently_used_shard_makes_room(folder: Path) -> None:
    size = len(b"".join(bytes(p) for p in flat.dump(rows_of(0)))) + 4096
    limit = 9 * size
    for number, shard in enumerate(SHARDS[:2]):
        cache = LocalCache(folder, limit, [shard])
        for group in range(3):
            cache.fill(shard, group, COLUMNS, maker(group))
        os.utime(folder / "shards" / shard, (number, number))
        cache.close()
    used = LocalCache(folder, limit, [SHARDS[0]])
    assert used.load(SHARDS[0], 1, COLUMNS) is not None  # now the other one is the oldest
    used.close()
    cache = LocalCache(folder, limit, [SHARDS[2]])
    for group in range(6):
        cache.fill(SHARDS[2], group, COLUMNS, maker(group))
        assert on_disk(folder) <= limit
    assert cache.load(SHARDS[1], 0, COLUMNS) is None
    assert cache.load(SHARDS[0], 1, COLUMNS) is not None
    assert all(cache.load(SHARDS[2], group, COLUMNS) for group in range(6))


def test_what_a_running_stream_reads_stays(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit = 120_000
    mine = LocalCache(folder, limit, [SHARDS[0]])
    for group in range(20):
        assert_same(whole(mine.fill(SHARDS[0], group, COLUMNS, maker(group))), rows_of(group))
    held = [g for g in range(20) if mine.load(SHARDS[0], g, COLUMNS) is not None]
    assert 2 <= len(held) < 20
    other = LocalCache(folder, limit, [SHARDS[1]])
    calls: list[int] = []
    for _ in range(2):
        assert_same(whole(other.fill(SHARDS[1], 0, COLUMNS, maker(0, calls))), rows_of(0))
    assert calls == [0, 0]
    assert [g for g in range(20) if mine.load(SHARDS[0], g, COLUMNS) is not None] == held
    assert caplog.text.count("is full of what running streams use") == 1
    # Once that stream has ended, its rows make room.
    del mine
    gc.collect()
    other._full_until = 0
    assert other.fill(SHARDS[1], 0, COLUMNS, maker(0, calls)) is not None
    assert other.load(SHARDS[1], 0, COLUMNS) is not None
    assert on_disk(folder) <= limit


def test_a_process_that_was_killed_uses_nothing(folder: Path) -> None:
    code = f"""
import sys, time
sys.path.insert(0, {str(Path.cwd())!r})
from pathlib import Path
from softlabels.student.localcache import LocalCache
cache = LocalCache(Path({str(folder)!r}), 1 << 20, {SHARDS!r})
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert localcache._in_use(folder / "streams") == set(SHARDS)
        process.send_signal(signal.SIGKILL)
    assert localcache._in_use(folder / "streams") == set()
    assert not list((folder / "streams").iterdir())


def test_threads_and_processes_that_want_the_same_make_it_once(folder: Path) -> None:
    caches = [LocalCache(folder, 1 << 20, SHARDS) for _ in range(2)]
    calls: list[int] = []
    found: list[Rows] = []

    def slow() -> Rows:
        calls.append(0)
        time.sleep(0.2)
        return rows_of(0)

    def fill(cache: LocalCache) -> None:
        found.append(whole(cache.fill(SHARDS[0], 0, COLUMNS, slow)))

    # Locks are of open files: two caches of one process exclude each other as two processes do.
    threads = [threading.Thread(target=fill, args=(cache,)) for cache in caches * 2]
    for thread in threads:
        thread.start()
    while not calls:
        time.sleep(0.001)
    assert caches[0].fill(SHARDS[0], 0, COLUMNS, slow, wait=False) is None
    for thread in threads:
        thread.join()
    assert calls == [0]
    for one in found:
        assert_same(one, rows_of(0))


def test_a_turn_that_never_comes_is_not_waited_for(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(localcache, "TURN_SECONDS", 0.1)
    cache = LocalCache(folder, 1 << 20, SHARDS)
    calls: list[int] = []
    path = cache._path(SHARDS[0], 0, COLUMNS)
    path.parent.mkdir()
    descriptor = localcache._locked(Path(f"{path}.tmp"))  # as of a process that was stopped
    assert descriptor is not None
    assert_same(whole(cache.fill(SHARDS[0], 0, COLUMNS, maker(0, calls))), rows_of(0))
    os.close(descriptor)
    assert calls == [0]


def test_an_error_leaves_nothing_behind(folder: Path) -> None:
    cache = LocalCache(folder, 1 << 20, SHARDS)

    def fail() -> Rows:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache.fill(SHARDS[0], 0, COLUMNS, fail)
    assert not [p for p in (folder / "shards").rglob("*") if p.is_file()]


def test_a_full_disk_costs_speed_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk", 100_000):
        cache = LocalCache(tmp_path / "disk", 1 << 30, SHARDS)
        calls: list[int] = []
        for group in range(12):
            found = cache.fill(SHARDS[0], group, COLUMNS, maker(group, calls))
            assert_same(whole(found), rows_of(group))
        assert calls == list(range(12))
        assert not list((tmp_path / "disk").rglob("*.tmp"))
        again = [whole(cache.load(SHARDS[0], g, COLUMNS)) for g in range(2)]
        assert_same(again[1], rows_of(1))
        del cache, again, found
        gc.collect()
    assert caplog.text.count("takes no more: No space left on device") == 1


def test_settings(tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "a" / "b"))
    cache = open_cache(SHARDS)
    assert cache is not None
    assert cache.folder == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
    assert open_cache(SHARDS) is None
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "12345")
    cache = open_cache(SHARDS)
    assert cache is not None
    assert cache._limit == 12345
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "10 GB")
    with pytest.raises(BadInputError, match=r"SOFTLABELS_CACHE_BYTES: expected .* '10 GB'"):
        open_cache(SHARDS)
    monkeypatch.delenv("SOFTLABELS_CACHE_BYTES")
    monkeypatch.delenv("SOFTLABELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    cache = open_cache(SHARDS)
    assert cache is not None
    assert cache.folder == tmp_path / "home" / "softlabels" / "stream"
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SOFTLABELS_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert open_cache(SHARDS) is None
    assert "no local cache at" in caplog.text

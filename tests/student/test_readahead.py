import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from softlabels.errors import StorageError
from softlabels.student.readahead import ReadAhead


def count(limit: int, made: list[int] | None = None) -> Iterator[int]:
    for number in range(limit):
        if made is not None:
            made.append(number)
        yield number


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "softlabels-read-ahead"]


def test_items_come_in_order_and_the_thread_ends_with_them() -> None:
    ahead = ReadAhead(lambda stop: count(20), 3)
    assert [next(ahead) for _ in range(20)] == list(range(20))
    with pytest.raises(StopIteration):
        next(ahead)
    assert not readers()


def test_it_reads_no_further_ahead_than_asked() -> None:
    made: list[int] = []
    ahead = ReadAhead(lambda stop: count(100, made), 2)
    for taken in range(4):
        deadline = time.monotonic() + 5
        while len(made) < taken + 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(made) == taken + 2
        next(ahead)
    ahead.close()


def test_an_error_reaches_the_consumer_after_what_came_before_it() -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise StorageError("the disk is gone")

    ahead = ReadAhead(lambda stop: fails(), 4)
    assert next(ahead) == 1
    with pytest.raises(StorageError, match="the disk is gone"):
        next(ahead)
    assert not readers()


def test_closing_ends_the_thread_whether_it_waits_or_works() -> None:
    def endless(stop: threading.Event) -> Iterator[int]:
        while not stop.is_set():
            time.sleep(0.001)
        yield 0

    for make in (lambda stop: count(9), endless):
        ahead = ReadAhead(make, 1)
        time.sleep(0.01)
        assert len(readers()) == 1
        ahead.close()
        assert not readers()
        with pytest.raises(StopIteration):
            next(ahead)


def test_forgetting_it_ends_the_thread() -> None:
    ahead = ReadAhead(lambda stop: count(1000), 1)
    next(ahead)
    del ahead
    gc.collect()
    assert not readers()


def test_waiting_is_counted() -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.05)
        yield 1

    ahead = ReadAhead(lambda stop: slow(), 1)
    next(ahead)
    assert 0.03 < ahead.waited < 5
    ahead.close()


def test_the_interpreter_ends_while_a_thread_reads() -> None:
    code = """
import itertools, time
from softlabels.student.readahead import ReadAhead
kept = [ReadAhead(lambda stop: itertools.count(), 2), ReadAhead(lambda stop: iter([1]), 2)]
assert next(kept[0]) == 0
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, b"")

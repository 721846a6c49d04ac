"""Several things loaded at once by a few threads, which end with the last of them.

Not `concurrent.futures`: its threads are joined when the interpreter goes down, so that a read
that hangs would keep a process from ending.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

POLL_SECONDS = 0.05


def load_all(
    keys: Iterable[T],
    load: Callable[[T, bool], R | None],
    threads: int,
    closed: threading.Event,
) -> dict[T, R] | None:
    """What `load` gives for each of `keys`; None once `closed`.

    Args:
        keys: what to load, each once.
        load: of a key; with False it may give None where it would have to wait for another
            process, and is called again, with True, after all others.
        threads: how many at most; 1 takes the calling one.
        closed: whether anybody still wants them.

    Raises:
        Exception: the first that `load` raised, as it was.
    """
    work = _Work(keys, load, closed)
    count = min(threads, len(work.waiting))
    if count <= 1:
        work.run()
    else:
        helpers = [
            threading.Thread(target=work.run, name="softlabels-load", daemon=True)
            for _ in range(count)
        ]
        for helper in helpers:
            helper.start()
        for helper in helpers:
            while helper.is_alive() and not closed.is_set() and work.error is None:
                helper.join(POLL_SECONDS)
    if work.error is not None:
        raise work.error
    return None if closed.is_set() else work.found


class _Work(Generic[T, R]):
    """Keys that wait for a thread, and what became of the others."""

    def __init__(
        self, keys: Iterable[T], load: Callable[[T, bool], R | None], closed: threading.Event
    ) -> None:
        self.waiting = deque((key, False) for key in keys)
        self.found: dict[T, R] = {}
        self.error: BaseException | None = None
        self._load, self._closed = load, closed

    def run(self) -> None:
        """Loads until nothing is left, in one of several threads."""
        while not self._closed.is_set() and self.error is None:
            try:
                key, wait = self.waiting.popleft()
            except IndexError:
                return
            try:
                value = self._load(key, wait)
            except BaseException as error:
                self.error = error
                return
            if value is None:
                self.waiting.append((key, True))
            else:
                self.found[key] = value

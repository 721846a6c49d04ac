"""A thread that runs an iterator ahead of its consumer: decoding overlaps training.

Arrow and numpy drop the interpreter lock where they work, so a thread is enough; handing batches
between processes would cost more than decoding them.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, cast

JOIN_SECONDS = 10.0
"""How long `close` waits for what the thread is reading just now."""

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Items of an iterator that a thread of its own runs, some of them ahead.

    The thread ends with the iterator, with `close`, when this object is forgotten, and before the
    interpreter goes down.

    Attributes:
        waited: seconds that the consumer has waited for items.

    Args:
        make: from an event, the iterator; it should end soon after the event is set.
        depth: items it may be ahead of the consumer.
        name: of the thread.
    """

    def __init__(
        self,
        make: Callable[[threading.Event], Iterator[T]],
        depth: int,
        name: str = "softlabels-read-ahead",
    ) -> None:
        self.waited = 0.0
        self._items: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._slots = threading.Semaphore(depth)
        self._stop = threading.Event()
        parts = (self._items, self._slots, self._stop)
        # The thread must not know this object, or it could never be forgotten.
        thread = threading.Thread(target=_run, args=(make, *parts), name=name, daemon=True)
        self._end = weakref.finalize(self, _end, thread, self._slots, self._stop)
        thread.start()

    def __next__(self) -> T:
        """The next item.

        Raises:
            StopIteration: there is none, or `close` was called.
            Exception: whatever the iterator raised, as it was.
        """
        if self._stop.is_set():
            raise StopIteration
        begun = time.perf_counter()
        is_item, value = self._items.get()
        self.waited += time.perf_counter() - begun
        if is_item:
            self._slots.release()
            return cast(T, value)
        self.close()
        raise value

    def close(self) -> None:
        """Ends the thread; what it had read ahead is lost."""
        self._end()


def _run(
    make: Callable[[threading.Event], Iterator[T]],
    items: "queue.SimpleQueue[tuple[bool, Any]]",
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        source = make(stop)
        while slots.acquire() and not stop.is_set():
            items.put((True, next(source)))
        items.put((False, StopIteration()))
    except BaseException as error:
        items.put((False, error))


def _end(thread: threading.Thread, slots: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    slots.release()
    # The collector may forget the iterator in any thread, this one too. A read that hangs is left
    # to itself: the thread is a daemon.
    if thread is not threading.current_thread():
        thread.join(JOIN_SECONDS)

"""SIGTERM and SIGINT as a question: long work asks whether it should stop, and stops well."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

_blocks: list[threading.Event] = []
"""The outermost block that is open in the main thread, if one is."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT has come; a second one ends the process as it would have.

    Outside the main thread, where no handler can be set, the answer stays no. Within another such
    block both have one answer, so that a signal that ends a step ends the work that it is of.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    if _blocks:
        yield _blocks[0].is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(*_: object) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, handle)
    _blocks.append(stop)
    try:
        yield stop.is_set
    finally:
        _blocks.remove(stop)
        restore()

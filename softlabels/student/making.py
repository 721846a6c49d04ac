"""A stream whose batches bring the student's inputs, made by threads while the student learns."""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from softlabels.errors import BadInputError
from softlabels.student.readahead import JOIN_SECONDS
from softlabels.student.stream import Batch, Stream

State = dict[str, Any]


class InputStream:
    """The batches of a stream in its order, each with its `inputs`.

    Its state is that after the last batch handed out, whatever threads have made ahead. As of a
    `Stream`, one iteration runs at a time.

    Memory beside the stream's: the inputs of `threads` + 1 batches, and of the one handed out.

    Args:
        stream: gives the batches; from here on it must not be iterated or moved by others.
        make: the inputs of a batch, a pure function of it; called by several threads at once
            where there are several.
        threads: that make inputs; 0: the consumer's own does, when it asks for a batch.
    """

    def __init__(self, stream: Stream, make: Callable[[Batch], Any], threads: int = 1) -> None:
        if threads < 0:
            raise BadInputError(f"threads: expected at least 0, found {threads!r}")
        self._stream, self._make, self._threads = stream, make, threads
        self._state: State = stream.state_dict()
        self._makers: _Makers | None = None
        self._waited = 0.0

    @property
    def rows_per_epoch(self) -> int:
        """Rows an epoch over all ranks, repeats counted."""
        return self._stream.rows_per_epoch

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of a whole epoch, the short one counted."""
        return self._stream.batches_per_epoch

    @property
    def waited_seconds(self) -> float:
        """Seconds that the consumer has waited for data and inputs so far."""
        return self._waited

    def __len__(self) -> int:
        return self.batches_per_epoch

    def state_dict(self) -> State:
        """Where the stream stands after the last batch handed out."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where another stood; raises as `Stream.load_state_dict`."""
        self._end_iteration()
        self._stream.load_state_dict(state)
        self._state = self._stream.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present state on; raises what stream and `make` raise."""
        self._end_iteration()
        self._stream.load_state_dict(self._state)
        makers = self._makers = _Makers(self._stream, self._make, self._threads)
        try:
            while True:
                begun = time.perf_counter()
                found = makers.next()
                self._waited += time.perf_counter() - begun
                if found is None:
                    return
                batch, self._state = found
                yield batch
                if self._makers is not makers:
                    raise BadInputError(
                        "this iteration ended when its stream was moved or iterated anew"
                    )
        finally:
            if self._makers is makers:
                self._end_iteration()

    def _end_iteration(self) -> None:
        if self._makers is not None:
            self._makers.close()
            self._makers = None


Made = Future[tuple[Batch, State] | None]


class _Makers:
    """Threads that take a stream's batches in turn, and make inputs of them side by side."""

    def __init__(self, stream: Stream, make: Callable[[Batch], Any], threads: int) -> None:
        self._work = _Work(stream, make, threads + 1)
        helpers = [
            threading.Thread(target=self._work.run, name="softlabels-inputs", daemon=True)
            for _ in range(threads)
        ]
        # Forgotten or not: the threads end with this, and before the interpreter goes down.
        self._end = weakref.finalize(self, _end, self._work, helpers)
        for helper in helpers:
            helper.start()
        self._alone = not helpers

    def next(self) -> tuple[Batch, State] | None:
        """The next batch and the state after it; None: there is none."""
        if self._alone:
            self._work.one()
        made = self._work.made.get()
        self._work.slots.release()
        return made.result()

    def close(self) -> None:
        """Ends the threads; what they have made is lost."""
        self._end()


class _Work:
    """What the threads of one iteration share."""

    def __init__(self, stream: Stream, make: Callable[[Batch], Any], ahead: int) -> None:
        self.made: SimpleQueue[Made] = SimpleQueue()
        self.slots = threading.Semaphore(ahead)
        self.stop = threading.Event()
        self._stream, self._make = stream, make
        self.batches = iter(stream)
        self._turn = threading.Lock()

    def run(self) -> None:
        """Makes inputs until the stream ends or `stop` is set, in one of several threads."""
        while self.slots.acquire() and not self.stop.is_set():
            self.one()

    def one(self) -> None:
        """Takes a batch and makes its inputs; nothing once the stream has ended."""
        made: Made = Future()
        with self._turn:
            if self.stop.is_set():
                return
            self.made.put(made)  # in the stream's order, whoever is done first
            try:
                batch = next(self.batches)
                state = self._stream.state_dict()
            except BaseException as error:
                self.stop.set()
                if isinstance(error, StopIteration):
                    made.set_result(None)
                else:
                    made.set_exception(error)
                return
        try:
            made.set_result((replace(batch, inputs=self._make(batch)), state))
        except BaseException as error:
            made.set_exception(error)


def _end(work: _Work, helpers: list[threading.Thread]) -> None:
    work.stop.set()
    for _ in helpers:
        work.slots.release()
    for helper in helpers:
        # The collector may call this in any thread. One that hangs is left to itself.
        if helper is not threading.current_thread() and helper.ident is not None:
            helper.join(JOIN_SECONDS)
    with contextlib.suppress(ValueError):  # of one that hangs in the stream
        work.batches.close()  # type: ignore[attr-defined]

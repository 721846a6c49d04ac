"""Many writers at one table: turns where they can be taken, and trying again where they cannot.

Delta lets one of several that commit at once through, and the others look again. On a local disk
they take turns by a lock file, first come, first served, so that few attempts are in vain and none
waits for ever. Nothing rests on it: a turn is waited for a few seconds at most, and where there are
no locks, none is taken: then who has just won waits for those who lost (`pacing`).
"""

import collections
import contextlib
import errno
import fcntl
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from deltalake.exceptions import CommitFailedError, DeltaError

from softlabels.errors import StorageError, TryAgainError
from softlabels.storage import Root, is_denied, raise_storage_error, said_by
from softlabels.storage.options import PATIENCE, patience
from softlabels.store.pacing import Pace

LOCK = "_softlabels/commit.lock"
LOCK_SECONDS = 10.0
"""Longest wait for a turn: whoever has it may be stopped."""

COMMIT_ATTEMPTS = 12
"""Attempts in a row that may fail without anybody getting on."""

LOST_RACES = 1000
"""Attempts that may fail because another writer was quicker."""

_POLL = 0.0015
_COUNTER = struct.Struct("<Q")
_threads: dict[str, threading.RLock] = collections.defaultdict(threading.RLock)
"""Locks on a file hold between processes; these between the threads of one."""

_taken: set[str] = set()
"""Paths whose turn a thread of this process has; changed under the path's lock."""


class _Versioned(Protocol):
    @property
    def version(self) -> int: ...


V = TypeVar("V", bound=_Versioned)


@dataclass
class _Race:
    """How a commit stands.

    Attributes:
        first: the newest version at its first look; -1 before that.
        newest: at its last look.
        lost: attempts that were in vain because another writer was quicker.
        stuck: attempts in vain since anybody got on.
        moved: when somebody last did, by the monotonic clock.
    """

    first: int = -1
    newest: int = -1
    lost: int = 0
    stuck: int = 0
    moved: float = field(default_factory=time.monotonic)

    def saw(self, version: int, failed: bool) -> None:
        """A look found this version to be the newest, maybe after an attempt that failed."""
        if version > self.newest:
            self.lost += failed and self.newest >= 0
            self.newest, self.stuck, self.moved = version, 0, time.monotonic()
        if self.first < 0:
            self.first = version

    @property
    def waited(self) -> float:
        """Seconds since anybody got on."""
        return time.monotonic() - self.moved

    def is_over(self, failed: Exception | None) -> bool:
        """Whether trying again is given up, after `failed`."""
        # A look that storage has not answered was patient already.
        silent = self.waited > patience() or isinstance(failed, TryAgainError)
        return silent or self.stuck > COMMIT_ATTEMPTS or self.lost > LOST_RACES


def until_done(
    root: Root,
    what: str,
    look: Callable[[], V],
    done: Callable[[V], bool],
    guard: Callable[[V], None],
    attempt: Callable[[V], None],
) -> V:
    """The newest version once it is `done`, which `attempt` is to bring about.

    After any error it looks again: a lost reply is then seen to have been a success.

    Args:
        root: of the table.
        what: is being done, for the message: "commit 3 units to".
        look: opens the newest version.
        done: whether nothing is left to do there.
        guard: called before each attempt; raises to give up.
        attempt: tries to make the version after it.

    Raises:
        TryAgainError: the race was lost too often, or storage does not answer.
        SoftLabelsError: whatever `guard` raises, and `look` where trying again is of no use.
    """
    error: Exception | None = None
    race, pace = _Race(), Pace(root.uri)
    with _turn(root) as in_turn:
        if not in_turn:
            time.sleep(pace.first_wait())
        while True:
            began = time.monotonic()
            newest, failed = _looked(look)
            if newest is not None:
                race.saw(newest.version, error is not None)
                if done(newest):
                    pace.ended(race.newest - race.first - (error is None))
                    return newest
                if race.stuck < COMMIT_ATTEMPTS:
                    guard(newest)
                    failed = _failed(attempt, newest)
                    pace.tried(time.monotonic() - began)
                    if failed is None:
                        error = None
                        continue
            error = failed or error
            if error is not None and is_denied(error):
                raise_storage_error(what, root.uri, error)
            race.stuck += 1
            if race.is_over(failed):
                break
            # Of writers that race one gets on each time, so that a loser need not wait long;
            # storage that fails is left alone for longer and longer.
            raced = race.stuck == 1 and isinstance(failed, CommitFailedError)
            time.sleep(pace.lost_wait(race.lost + 1) if raced else _failure_wait(race.stuck))
    if isinstance(error, TryAgainError):
        raise error
    raise TryAgainError(
        f"could not {what} {root.uri!r} in {race.stuck - 1} attempts and {race.waited:.0f} s "
        f"({PATIENCE} is {patience():g}); nothing is lost, run the command again: {said_by(error)}"
    )


def _failure_wait(failures: int) -> float:
    return random.uniform(0, min(5.0, 0.02 * 2 ** (failures - 1)))


def _looked(look: Callable[[], V]) -> tuple[V | None, Exception | None]:
    try:
        return look(), None
    except (StorageError, TryAgainError) as error:
        return None, error


def _failed(attempt: Callable[[V], None], newest: V) -> Exception | None:
    try:
        attempt(newest)
    except (DeltaError, OSError) as error:
        return error
    return None


@contextlib.contextmanager
def _turn(root: Root) -> Iterator[bool]:
    """Waits for a turn; whether it came."""
    if not root.is_local:
        yield False
        return
    deadline = time.monotonic() + LOCK_SECONDS
    mine = _threads[root.path]
    if not mine.acquire(timeout=LOCK_SECONDS):
        yield False
        return
    try:
        with contextlib.ExitStack() as held:
            has = root.path in _taken  # this thread has it already
            if not has:
                has = held.enter_context(_queued(root, deadline))
                _taken.add(root.path)
                held.callback(_taken.discard, root.path)
            yield has
    finally:
        mine.release()


@contextlib.contextmanager
def _queued(root: Root, deadline: float) -> Iterator[bool]:
    """Waits until whoever came before is done; whether that came about.

    Each draws a number and locks the byte of that number, which the next one waits for. A process
    that dies loses its locks, so that nobody waits for it.
    """
    try:
        path = root.full(LOCK)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield False  # a folder that cannot be written fails later, with its own message
        return
    has = False
    try:
        with contextlib.suppress(OSError):  # no locks on this filesystem
            number = _draw(descriptor, deadline)
            if number is not None:
                has = _locks(descriptor, _COUNTER.size + number - 1, deadline)
        yield has
    finally:
        os.close(descriptor)


def _draw(descriptor: int, deadline: float) -> int | None:
    if not _locks(descriptor, 0, deadline):
        return None
    try:
        last = os.pread(descriptor, _COUNTER.size, 0).ljust(_COUNTER.size, b"\0")
        number = _COUNTER.unpack(last)[0] % 2**62 + 1
        if not _locks(descriptor, _COUNTER.size + number, 0):
            return None
        os.pwrite(descriptor, _COUNTER.pack(number), 0)
        return int(number)
    finally:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, 0)


def _locks(descriptor: int, byte: int, deadline: float) -> bool:
    """Whether a byte could be locked until then."""
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() >= deadline:
            return False
        time.sleep(random.uniform(_POLL / 2, _POLL))

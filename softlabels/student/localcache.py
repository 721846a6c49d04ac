"""Decoded row groups on local disk, mapped, shared by the processes of a host and by later runs.

A folder for each shard, named by the shard's sha256 and by nothing that a plan could say falsely;
in it a file (`flat`) for each row group and set of columns. Files come by rename, so none is half
there; their checksum is compared when a process maps them first, so that what a power cut or a
bad disk left behind is read from the table again. What is full, read-only or damaged costs speed,
never a row.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from softlabels.errors import BadInputError
from softlabels.student import flat
from softlabels.student.records import Descriptor, GoneError, Records
from softlabels.student.rows import Rows

FOLDER = "SOFTLABELS_CACHE"
BYTES = "SOFTLABELS_CACHE_BYTES"
MOST_BYTES = 20 << 30
"""By default; and no more than half of what was free when it is opened."""

TURN_SECONDS = 60.0
"""How long to wait for another process that fills the same row group."""

AGAIN_SECONDS = 30.0
"""After which a cache that was full of what is in use is tried again."""

OPEN_FILES = 128
"""Files of records kept open."""

Identity = tuple[int, int, int]

_BLOCK = 4096
_MOST_PARTS = 512
_LOG = logging.getLogger("softlabels")
_TOLD: set[str] = set()


def open_cache(shards: Iterable[str]) -> "LocalCache | None":
    """The cache that the environment asks for; None where it asks for none, or it cannot be.

    SOFTLABELS_CACHE is its folder, by default softlabels/stream in the user's cache folder;
    SOFTLABELS_CACHE_BYTES its bound, 0 for no cache.

    Args:
        shards: sha256 of the files that will be read: they are in use.

    Raises:
        BadInputError: the bound is no whole number.
    """
    text = os.environ.get(BYTES, "").strip()
    if text and not text.isdecimal():
        raise BadInputError(f"{BYTES}: expected a whole number of bytes, found {text!r}")
    if text and not int(text):
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get(FOLDER) or os.path.join(home, "softlabels", "stream"))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(folder).free + _used(folder)
        return LocalCache(folder, int(text) if text else min(MOST_BYTES, free // 2), shards)
    except OSError as error:
        _tell(f"no local cache at {str(folder)!r}: {error.strerror}; every epoch decodes its files")
        return None


class LocalCache:
    """Row groups as `flat` files in a folder, within a bound.

    The least recently used shards make room, but none that a running stream of this host reads:
    when all is in use, no more is added. May be used by several threads.

    Args:
        folder: exists; only this class writes there.
        limit: bytes of all files, over all processes.
        shards: sha256 of the files that will be read.
    """

    def __init__(self, folder: Path, limit: int, shards: Iterable[str]) -> None:
        self._folder, self._limit = folder, limit
        self._verified: set[Identity] = set()
        self._open: OrderedDict[str, Descriptor] = OrderedDict()
        self._touched: set[str] = set()
        self._off = False
        self._full_until = 0.0
        self._lock = threading.Lock()
        (folder / "shards").mkdir(exist_ok=True)
        (folder / "streams").mkdir(exist_ok=True)
        mine = folder / "streams" / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        with self._counted():
            descriptor = os.open(mine, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            # Held as long as this object lives; the system lets go of it however the process ends.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, "\n".join(sorted(set(shards))).encode())
        self._end = weakref.finalize(self, _leave, descriptor, mine, os.getpid())

    @property
    def folder(self) -> Path:
        """Where it is: a place for temporary files too."""
        return self._folder

    def has(self, shard: str, group: int, columns: Sequence[str]) -> bool:
        """Whether a row group is there, unverified."""
        return self._path(shard, group, columns).exists()

    def close(self) -> None:
        """Says that nothing is in use any more; mapped rows stay valid."""
        self._end()

    def load(self, shard: str, group: int, columns: Sequence[str]) -> Rows | Records | None:
        """A row group of which targets are mapped or still on disk; None: not there, or damaged.

        Args:
            shard: sha256 of the file.
            group: number of the row group in it.
            columns: the table's columns that the rows hold.
        """
        path = self._path(shard, group, columns)
        try:
            descriptor = Descriptor(os.open(path, os.O_RDONLY))
            found = os.fstat(descriptor.number)
            identity = _identity(found)
            rows = flat.load(descriptor.number, found.st_size, identity not in self._verified)
        except OSError:
            return None
        except flat.DamagedError as error:
            self._drop(path, error)
            return None
        self._verified.add(identity)
        if shard not in self._touched:
            self._touched.add(shard)
            with contextlib.suppress(OSError):
                os.utime(path.parent)  # by which the least recently used shards are known
        if isinstance(rows, Records):
            return dataclasses.replace(rows, opened=partial(self._opened, str(path), identity))
        return rows

    def _opened(self, path: str, identity: Identity) -> Descriptor:
        """The file as it was loaded; a few are kept open."""
        with self._lock:
            if (held := self._open.get(path)) is not None:
                self._open.move_to_end(path)
                return held
        try:
            descriptor = Descriptor(os.open(path, os.O_RDONLY))
        except OSError as error:
            raise GoneError(str(error)) from error
        if _identity(os.fstat(descriptor.number)) != identity:
            raise GoneError("another file")
        with self._lock:
            self._open[path] = descriptor
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return descriptor

    def fill(
        self,
        shard: str,
        group: int,
        columns: Sequence[str],
        make: Callable[[], Rows],
        wait: bool = True,
    ) -> Rows | Records | None:
        """The row group that `make` decodes, put here for everybody; made once on this host.

        Args:
            shard: sha256 of the file.
            group: number of the row group in it.
            columns: as for `load`.
            make: decodes it.
            wait: False: None at once where another process is making it just now.
        """
        if self._off or time.monotonic() < self._full_until:
            return make()
        path = self._path(shard, group, columns)
        with self._turn(path, wait) as turn:
            if turn is None and not wait:
                return None
            if (found := self.load(shard, group, columns)) is not None:
                return found
            rows = make()
            if turn is None or not self._write(turn, path, rows):
                return rows
        return self.load(shard, group, columns) or rows

    def _path(self, shard: str, group: int, columns: Sequence[str]) -> Path:
        text = "\0".join(sorted(columns))
        held = hashlib.sha256(text.encode()).hexdigest()[:16]
        # A plan may hold any text as a sha256: only what is one may name a folder.
        safe = shard if len(shard) == 64 and set(shard) <= set("0123456789abcdef") else "none"
        return self._folder / "shards" / safe / f"{int(group)}-{held}"

    @contextlib.contextmanager
    def _turn(self, path: Path, wait: bool) -> Iterator[int | None]:
        """The open, locked temporary file of `path`; None where another process has it."""
        temporary, descriptor = Path(f"{path}.tmp"), None
        deadline = time.monotonic() + (TURN_SECONDS if wait else 0)
        try:
            while descriptor is None:
                try:
                    descriptor = _locked(temporary)
                except OSError as error:
                    self._give_up(error)
                    break
                if descriptor is None:
                    if time.monotonic() >= deadline:
                        break
                    time.sleep(0.002)
            yield descriptor
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
                        os.unlink(temporary)  # nothing came of it
                os.close(descriptor)

    def _write(self, descriptor: int, path: Path, rows: Rows) -> bool:
        parts = flat.dump(rows)
        try:
            if not self._reserve(descriptor, sum(len(part) for part in parts)):
                return False
            while parts:
                written = os.writev(descriptor, parts[:_MOST_PARTS])
                while parts and written >= len(parts[0]):
                    written -= len(parts.pop(0))
                if written:
                    parts[0] = memoryview(parts[0])[written:]
            os.rename(f"{path}.tmp", path)
            found = os.fstat(descriptor)
        except FileNotFoundError:  # somebody removed the folder: it is made again for the next
            return False
        except OSError as error:
            self._give_up(error)
            return False
        self._verified.add(_identity(found))
        return True

    def _reserve(self, descriptor: int, size: int) -> bool:
        """Gives the file its size, when there is room or can be made: from then on it counts."""
        with self._counted() as counter:
            text = os.pread(counter, 32, 0)
            used = int(text) if text.isdigit() else self._limit
            if used + _on_disk(size) > self._limit:
                # What is counted may be more than is there: processes die, files are damaged.
                used = self._make_room(_on_disk(size))
            if fits := used + _on_disk(size) <= self._limit:
                used += _on_disk(size)
                os.ftruncate(descriptor, size)
            else:
                self._full_until = time.monotonic() + AGAIN_SECONDS
                _tell(
                    f"the local cache {str(self._folder)!r} is full of what running streams use "
                    f"(its bound is {self._limit} bytes): the rest is decoded every epoch; "
                    f"{BYTES} sets the bound"
                )
            # As wide as ever: a file that is cut first goes to the disk when it is closed.
            os.pwrite(counter, b"%020d" % used, 0)
            return fits

    @contextlib.contextmanager
    def _counted(self) -> Iterator[int]:
        """The open file that counts all bytes, for this thread of all processes alone."""
        with self._lock:
            counter = os.open(self._folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(counter, fcntl.LOCK_EX)
                yield counter
            finally:
                os.close(counter)

    def _make_room(self, size: int) -> int:
        """Removes the least recently used shards that nobody reads; what is left, in bytes."""
        used = {path: sum(map(_on_disk, _sizes(path))) for path in _folders(self._folder)}
        total, busy = sum(used.values()), _in_use(self._folder / "streams")
        wanted = self._limit - size - self._limit // 8  # an eighth more, or each file would look
        for path in sorted(used, key=_modified):
            if total + size <= self._limit and total <= wanted:
                break
            if path.name not in busy:
                shutil.rmtree(path, ignore_errors=True)
                total -= used[path]
        return total

    def _drop(self, path: Path, error: Exception) -> None:
        with contextlib.suppress(OSError):
            os.unlink(path)
        _tell(
            f"the local cache file {str(path)!r} is damaged ({error}): it is made anew from the "
            "table; if this comes again, look at the disk"
        )

    def _give_up(self, error: OSError) -> None:
        self._off = True
        _tell(
            f"the local cache {str(self._folder)!r} takes no more: {error.strerror}; "
            "files are decoded every epoch"
        )


def _locked(temporary: Path) -> int | None:
    """A descriptor of the file, locked by this thread; None where another has it."""
    temporary.parent.mkdir(exist_ok=True)
    descriptor = os.open(temporary, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who had it may have renamed or removed what was opened here.
        if os.path.samestat(os.fstat(descriptor), os.stat(temporary)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _in_use(streams: Path) -> set[str]:
    """The shards of all running streams; what dead ones left is removed."""
    found: set[str] = set()
    for path in streams.iterdir():
        with contextlib.suppress(OSError), open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.update(file.read().decode().split("\n"))
            else:
                os.unlink(path)
    return found


def _leave(descriptor: int, mine: Path, owner: int) -> None:
    if os.getpid() != owner:  # a fork's: its parent still reads
        return
    with contextlib.suppress(OSError):
        os.unlink(mine)
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _identity(found: os.stat_result) -> Identity:
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _on_disk(size: int) -> int:
    return size + -size % _BLOCK


def _used(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "lock").read_bytes())
    return 0


def _folders(folder: Path) -> list[Path]:
    return list((folder / "shards").iterdir())


def _sizes(folder: Path) -> list[int]:
    with contextlib.suppress(OSError):
        return [entry.stat().st_size for entry in os.scandir(folder)]
    return []


def _modified(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def _tell(message: str) -> None:
    """Says it once in this process."""
    if message not in _TOLD:
        _TOLD.add(message)
        _LOG.warning(message)

"""Row groups on their way into memory: from the local cache, else decoded, and put there.

Rows of remote files that are wanted now are decoded from ranged reads under page checksums. What
is put into the cache for good comes from files that a thread fetches whole meanwhile, and whose
sha256 was compared; where the plan reads less than half of a file's bytes, page checksums have to
do for these too.
"""

import queue
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from softlabels.errors import IntegrityError, SoftLabelsError
from softlabels.student.decode import Decoder
from softlabels.student.files import Files
from softlabels.student.flat import arrays_of, targets_of
from softlabels.student.lease import ALIGNMENT, Lease
from softlabels.student.localcache import LocalCache
from softlabels.student.records import Records
from softlabels.student.rows import Rows

Place = tuple[str, str, int]
"""A row group: table, file, number."""


class Source:
    """Decoded row groups of a plan, whole. May be used by several threads.

    Args:
        files: the plan's.
        decoder: of them.
        cache: where they may lie ready; None: nowhere.
        fill: whether what is decoded is put there.
    """

    def __init__(
        self,
        files: Files,
        decoder: Decoder,
        cache: LocalCache | None,
        fill: bool,
    ) -> None:
        self._files, self._decoder = files, decoder
        self._cache, self._fill = cache, fill and cache is not None
        self._fetcher: _Fetcher | None = None
        self._lock = threading.Lock()

    def rows(
        self, place: Place, wait: bool, in_file: Callable[[], list[int]]
    ) -> Rows | Records | None:
        """All rows of a row group; None where `wait` is false and another process decodes them.

        Args:
            place: the row group.
            wait: for another process that decodes it just now.
            in_file: gives all row groups of its file that the plan reads.

        Raises:
            StorageError, TryAgainError: its file is missing, or storage does not answer.
            IntegrityError: its file is not the one that the plan names.
        """
        table, path, group = place
        if self._cache is None:
            return self.decoded(place)
        shard, columns = self._files.file(table, path).sha256, self._decoder.wanted(table)
        if (found := self._cache.load(shard, group, columns)) is not None:
            return found
        if not self._fill or self._left_to_fetcher(table, path, in_file):
            return self.decoded(place)
        return self._cache.fill(shard, group, columns, lambda: self._decoder.decode(*place), wait)

    def decoded(self, place: Place) -> Rows:
        """All rows of a row group, from its file."""
        return _settled(self._decoder.decode(*place))

    def _left_to_fetcher(self, table: str, path: str, in_file: Callable[[], list[int]]) -> bool:
        """Whether a thread fetches the file whole, and fills the cache from it."""
        if self._files.is_local(table):
            return False
        with self._lock:
            if self._fetcher is None:
                assert self._cache is not None
                self._fetcher = _Fetcher(self._files, self._decoder, self._cache)
                weakref.finalize(self, self._fetcher.close)
            return self._fetcher.asked(table, path, in_file)


def _settled(rows: Rows) -> Rows:
    """`rows` with targets in memory that is used again.

    What they were decoded into is free at once, and still in the processor's caches when the next
    ones are: that saves more than the copy costs.
    """
    named = dict(arrays_of(rows.targets))
    lease = Lease(sum(values.nbytes + ALIGNMENT for values in named.values()))
    arrays = {name: lease.copy(values) for name, values in named.items()}
    return replace(rows, targets=targets_of(rows.targets.num_positions.copy(), arrays))


class _Fetcher:
    """A thread that fetches files whole, one after the other, and fills the cache from them."""

    def __init__(self, files: Files, decoder: Decoder, cache: LocalCache) -> None:
        self._stop = threading.Event()
        self._files, self._decoder, self._cache = files, decoder, cache
        self._fills: dict[tuple[str, str], bool] = {}
        self._error: IntegrityError | None = None
        self._waiting: queue.SimpleQueue[tuple[str, str, list[int]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="softlabels-fetch", daemon=True).start()

    def asked(self, table: str, path: str, in_file: Callable[[], list[int]]) -> bool:
        """Whether this thread fills the cache from a file, now or later.

        Raises:
            IntegrityError: a file was fetched, and is not the one that the plan names.
        """
        if self._error is not None:
            raise self._error
        key = (table, path)
        if key not in self._fills:
            groups, columns = in_file(), self._decoder.wanted(table)
            read = self._files.bytes_of(table, path, groups, columns)
            self._fills[key] = 2 * read >= self._files.file(table, path).size
            if self._fills[key]:
                self._waiting.put((table, path, groups))
        return self._fills[key]

    def close(self) -> None:
        """Ends the thread; it does not begin another row group."""
        self._stop.set()
        self._waiting.put(None)

    def _run(self) -> None:
        while (asked := self._waiting.get()) is not None and not self._stop.is_set():
            table, path, groups = asked
            try:
                self._take(table, path, groups)
            except IntegrityError as error:
                self._error = error
                return
            except (SoftLabelsError, OSError):
                # Storage that is away, a full disk: readers meet the first, and say it; without
                # the whole file, what they decode is put into the cache by themselves.
                self._fills[table, path] = False

    def _take(self, table: str, path: str, groups: list[int]) -> None:
        shard, columns = self._files.file(table, path).sha256, self._decoder.wanted(table)
        absent = [group for group in groups if not self._cache.has(shard, group, columns)]
        with tempfile.TemporaryFile(dir=self._cache.folder) as file:
            data = self._files.whole(table, path, file)
            for group in absent:
                if self._stop.is_set():
                    return
                make = partial(self._decoder.decode, table, path, group, data)
                self._cache.fill(shard, group, columns, make)


class Recent:
    """The rows used last, within a bound of bytes. Not for several threads at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held: OrderedDict[int, Rows | Records] = OrderedDict()
        self.nbytes = 0

    def get(self, group: int) -> Rows | Records | None:
        """Those of a row group, as far as they are still here."""
        if group in self.held:
            self.held.move_to_end(group)
        return self.held.get(group)

    def forget(self, group: int) -> None:
        """Keeps the rows of a row group no longer."""
        if group in self.held:
            self.nbytes -= self.held.pop(group).nbytes

    def put(self, group: int, rows: Rows | Records) -> None:
        """Keeps the rows of a row group; the ones not used for longest go."""
        if group in self.held:
            return
        self.held[group] = rows
        self.nbytes += rows.nbytes
        while self.nbytes > self._limit and self.held:
            self.nbytes -= self.held.popitem(last=False)[1].nbytes

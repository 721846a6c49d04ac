"""Verified bytes of a plan's shards: every byte that is decoded was checked against the plan.

Local files are mapped, and their sha256 compared at first use. Of remote ones a row group costs
the byte ranges of the columns that are read: what is in them is under page checksums, and where
they are is under the sha256 of the footer. `whole` fetches a remote file to compare all of it.
"""

import contextlib
import hashlib
import mmap
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import IO

import pyarrow as pa

from softlabels.errors import BadInputError, IntegrityError
from softlabels.fingerprint import sha256_bytes
from softlabels.pages import Chunk
from softlabels.parquet import Layout, Parquet
from softlabels.plan import Plan, PlanFile
from softlabels.storage import Root, storage_errors
from softlabels.store import shards

OPEN_FILES = 32
"""Local shards kept open, each mapped and with a parsed footer."""

FOOTER_BYTES = 64 << 10
"""Fetched from the end of a remote file at first; a longer footer costs another request."""

NEAR_BYTES = 64 << 10
"""Ranges that are no further apart are fetched as one: a request costs more than that."""

RANGE_BYTES = 8 << 20
"""The longest range that is asked for at once: longer ones are fetched in parallel parts."""

LAYOUTS = 256
"""Files of which it is kept in mind where their columns are: some 200 KB a file of 100 MB."""

Key = tuple[str, str]
"""A file: its table and its path."""


class Files:
    """The shards of a plan. May be used by several threads.

    Args:
        plan: what names the files and their checksums.
        roots: where tables are now, by name, when that is not where the plan says.

    Raises:
        BadInputError: a table is not where it should be, or `roots` names one the plan has not.
    """

    def __init__(self, plan: Plan, roots: Mapping[str, str] | None = None) -> None:
        require_roots(plan, roots or {})
        self._roots = {name: plan.root(name, roots) for name in plan.tables}
        self._files = {
            (name, file.path): file for name, table in plan.tables.items() for file in table.files
        }
        self._open: OrderedDict[Key, _Local] = OrderedDict()
        self._verified: set[Key] = set()
        self._footers: dict[Key, bytes] = {}
        self._layouts: OrderedDict[Key, Layout] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: dict[Key, threading.Lock] = {}

    def is_local(self, table: str) -> bool:
        """Whether a table's files are on this machine."""
        return self._roots[table].is_local

    def file(self, table: str, path: str) -> PlanFile:
        """What the plan says of a file; IntegrityError where it does not list it."""
        if (table, path) not in self._files:
            raise IntegrityError(f"the plan reads file {path!r} of table {table!r}, not listed")
        return self._files[table, path]

    def read(
        self,
        table: str,
        path: str,
        group: int,
        columns: Sequence[str],
        data: pa.Buffer | None = None,
    ) -> pa.RecordBatch:
        """Some columns of one row group.

        At first use the file's length, its footer's sha256 and, where it is local, its own are
        compared with the plan's.

        Args:
            table: its name in the plan.
            path: of the file.
            group: number of the row group.
            columns: by name.
            data: the file's bytes, where the caller has them from `whole`.

        Raises:
            StorageError: the file is missing or cannot be read.
            TryAgainError: storage does not answer.
            IntegrityError: it is not the file that the plan names, or a page is damaged.
        """
        root = self._roots[table]
        self.file(table, path)

        def decoded(shard: Parquet) -> pa.RecordBatch:
            _check_group(root, path, shard, group)
            return shards.read_row_groups(shard, root.where(path), [group], columns, threads=False)

        if data is not None:
            return decoded(self._parsed((table, path), data, checksums=False))
        if not root.is_local:
            return decoded(self._fetched(table, path, group, columns))
        local = self._local((table, path))
        parse = partial(self._parsed, (table, path), local.data, checksums=False)
        with local.parsed(parse) as shard:
            found = decoded(shard)
            local.forget(shard.chunks(group, columns))
        return found

    def bytes_of(self, table: str, path: str, groups: Sequence[int], columns: Sequence[str]) -> int:
        """How many of a remote file's bytes some columns of some row groups are."""
        shard = self._sparse(table, path)[0]
        found = [g for g in groups if 0 <= g < shard.num_row_groups]
        return sum(chunk.stored for group in found for chunk in shard.chunks(group, columns))

    def whole(self, table: str, path: str, into: IO[bytes]) -> pa.Buffer:
        """All bytes of a file, fetched into an empty local file and mapped, its sha256 compared.

        Raises:
            StorageError, TryAgainError, IntegrityError: as `read`.
        """
        root, file = self._roots[table], self.file(table, path)
        digest = hashlib.sha256()
        for start in range(0, file.size, RANGE_BYTES):
            (part,) = root.ranges(path, [start], [min(start + RANGE_BYTES, file.size)])
            digest.update(part)
            into.write(part)
        into.flush()
        _require_sha256(root, file, digest.hexdigest())
        return pa.py_buffer(mmap.mmap(into.fileno(), file.size, prot=mmap.PROT_READ))

    def _local(self, key: Key) -> "_Local":
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:  # hashed once, however many threads ask
            with self._lock:
                if key in self._open:
                    self._open.move_to_end(key)
                    return self._open[key]
            root, file = self._roots[key[0]], self._files[key]
            _check_size(root, file)
            full = root.full(file.path)
            with storage_errors("read", full), open(full, "rb") as source:
                if key not in self._verified:
                    # A quarter of a megabyte at a time: it is hashed while it is in the caches.
                    digest = hashlib.file_digest(source, "sha256")
                    _require_sha256(root, file, digest.hexdigest())
                mapped = mmap.mmap(source.fileno(), file.size, prot=mmap.PROT_READ)
            data = pa.py_buffer(mapped)
            local = _Local(mapped, data, self._parsed(key, data, checksums=False))
            with self._lock:
                self._verified.add(key)
                self._open[key] = local
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
        return local

    def _fetched(self, table: str, path: str, group: int, columns: Sequence[str]) -> Parquet:
        root = self._roots[table]
        shard, sparse = self._sparse(table, path)
        _check_group(root, path, shard, group)
        ranges = list(_ranges(shard.chunks(group, columns)))
        starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
        for start, part in zip(starts, root.ranges(path, starts, ends), strict=True):
            sparse[start : start + len(part)] = part
        return shard

    def _sparse(self, table: str, path: str) -> tuple[Parquet, mmap.mmap]:
        """A remote file of which only the footer is there yet, and its bytes to fill in.

        Untouched pages of an anonymous map take no memory.
        """
        key = (table, path)
        root, file = self._roots[table], self.file(table, path)
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            if key not in self._footers:
                self._footers[key] = _fetch_footer(root, file)
        end = self._footers[key]
        sparse = mmap.mmap(-1, file.size)
        sparse[file.size - len(end) :] = end
        return self._parsed(key, pa.py_buffer(sparse), checksums=True), sparse

    def _parsed(self, key: Key, data: pa.Buffer, checksums: bool) -> Parquet:
        """A file over its bytes, of which no more than the footer has to be there yet.

        Page checksums cost an eighth of decoding: where the sha256 was compared they are passed by.
        """
        with self._lock:
            layout = self._layouts.get(key)
        shard = _open(self._roots[key[0]], self._files[key], data, layout, checksums)
        layout = shard.layout
        with self._lock:
            self._layouts[key] = layout
            self._layouts.move_to_end(key)
            if len(self._layouts) > LAYOUTS:
                self._layouts.popitem(last=False)
        return shard


class _Local:
    """A mapped file, with as many parsers as threads read it at once: none serves two."""

    def __init__(self, mapped: mmap.mmap, data: pa.Buffer, shard: Parquet) -> None:
        self._mapped, self.data = mapped, data
        self._idle = [shard]

    def forget(self, chunks: Sequence[Chunk]) -> None:
        """Lets go of pages that were read: else all of a file would count as this process's."""
        if not chunks:
            return
        start = min(chunk.start for chunk in chunks) // mmap.PAGESIZE * mmap.PAGESIZE
        stop = max(chunk.start + chunk.stored for chunk in chunks)
        self._mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)

    @contextlib.contextmanager
    def parsed(self, parse: Callable[[], Parquet]) -> Iterator[Parquet]:
        try:
            shard = self._idle.pop()
        except IndexError:
            shard = parse()
        yield shard
        self._idle.append(shard)


def require_roots(plan: Plan, roots: Mapping[str, str]) -> None:
    """Raises BadInputError where `roots` names a table that the plan does not read."""
    if unknown := sorted(set(roots) - set(plan.tables)):
        raise BadInputError(
            f"roots: the plan reads no table {unknown[0]!r}; it reads {sorted(plan.tables)!r}"
        )


def _fetch_footer(root: Root, file: PlanFile) -> bytes:
    """The footer of a remote file whose length and footer are as the plan says."""
    _check_size(root, file)
    (end,) = root.ranges(file.path, [max(0, file.size - FOOTER_BYTES)], [file.size])
    length = struct.unpack("<I", end[-8:-4])[0] + 8 if len(end) >= 8 else 0
    if len(end) < length <= file.size:
        (end,) = root.ranges(file.path, [file.size - length], [file.size])
    with _named(root, file):
        found = bytes(shards.footer(b"PAR1" + end))
    _require_footer(root, file, found)
    return found


def _check_size(root: Root, file: PlanFile) -> None:
    if (found := root.size(file.path)) != file.size or not found:
        raise IntegrityError(
            f"{root.where(file.path)} has {found} bytes, the plan says {file.size}: it is cut "
            "short or was changed after the plan was made"
        )


def _require_sha256(root: Root, file: PlanFile, found: str) -> None:
    if found != file.sha256:
        raise IntegrityError(
            f"{root.where(file.path)} has sha256 {found!r}, the plan says {file.sha256!r}: it was "
            "changed after the plan was made; restore it or mix again"
        )


def _require_footer(root: Root, file: PlanFile, end: bytes | memoryview) -> None:
    if (found := sha256_bytes(end)) != file.footer_sha256:
        raise IntegrityError(
            f"{root.where(file.path)} has a footer of sha256 {found!r}, the plan says "
            f"{file.footer_sha256!r}"
        )


@contextlib.contextmanager
def _named(root: Root, file: PlanFile) -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(f"{root.where(file.path)}: {error}") from error


def _open(
    root: Root, file: PlanFile, data: pa.Buffer, layout: Layout | None, checksums: bool
) -> Parquet:
    where = root.where(file.path)
    with _named(root, file):
        end = shards.footer(data)
    _require_footer(root, file, end)
    shard = shards.open_shard(data, where, layout, checksums)
    assert isinstance(shard, Parquet)
    if shard.metadata.num_rows != file.num_rows:
        raise IntegrityError(
            f"{where} has {shard.metadata.num_rows} rows, the plan says {file.num_rows}"
        )
    return shard


def _check_group(root: Root, path: str, shard: Parquet, group: int) -> None:
    if not 0 <= group < shard.num_row_groups:
        raise IntegrityError(
            f"the plan reads row group {group} of {root.where(path)}, it has {shard.num_row_groups}"
        )


def _ranges(chunks: Iterable[Chunk]) -> Iterator[tuple[int, int]]:
    """Where column chunks are, as (start, end): near neighbours joined, long ones in parts."""
    held: list[list[int]] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.start):
        if held and chunk.start - held[-1][1] <= NEAR_BYTES:
            held[-1][1] = max(held[-1][1], chunk.start + chunk.stored)
        else:
            held.append([chunk.start, chunk.start + chunk.stored])
    for start, end in held:
        for at in range(start, end, RANGE_BYTES):
            yield at, min(at + RANGE_BYTES, end)

"""A folder at a URI, and all that softlabels does to storage.

Local writes are whole or not there. Object stores are asked again while they do not answer, and
every answer's length is checked where it is known.
"""

import contextlib
import io
import os
import posixpath
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from softlabels.errors import IntegrityError
from softlabels.storage.exclusive import create_exclusive
from softlabels.storage.retrying import (
    ShortAnswerError,
    causes,
    is_passing,
    patiently,
    storage_errors,
)

PART_BYTES = 16 * 2**20
"""Objects whose size is known are read in parts of this size, several at a time."""

OPEN_BYTES = 4 * 2**20
"""What an opened object is read by."""


def safe_relative(path: str) -> str:
    """`path` normalised, when it names something below a root.

    Raises:
        IntegrityError: it is absolute, climbs out with "..", or names another scheme. Paths in
            tables and plans may come from a stranger.
    """
    parts = path.split("/")
    hostile = not path or path.startswith(("/", "~")) or "\\" in path or "\0" in path
    if hostile or ":" in parts[0] or ".." in parts:
        raise IntegrityError(f"path {path!r} leaves its root: expected a plain relative path")
    return posixpath.normpath(path)


@dataclass(frozen=True)
class Entry:
    """A file or folder: its name in its folder, bytes, and when the store says it was written.

    `modified` is in seconds since 1970; None where the store does not say.
    """

    name: str
    is_file: bool
    size: int
    modified: float | None


@dataclass(frozen=True, eq=False)
class Root:
    """A folder at a URI, and all that softlabels does to storage.

    Relative paths given to its methods must stay below it.

    Attributes:
        uri: what lineage and messages call it; for local folders the absolute path.
        fs: the fsspec filesystem.
        path: the folder inside `fs`, normalised.
    """

    uri: str
    fs: Any
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def full(self, relative: str) -> str:
        """The path inside `fs` of `relative`.

        Raises:
            IntegrityError: it leaves the root, be it by "..", a scheme or a symbolic link.
        """
        joined = posixpath.join(self.path, safe_relative(relative))
        if not self.is_local:
            return joined
        # realpath, not Path.resolve: that one raises on a link that leads to itself.
        real, top = os.path.realpath(joined), os.path.realpath(self.path)
        if not Path(real).is_relative_to(top):
            raise IntegrityError(f"path {relative!r} leaves its root {self.uri!r} by a link")
        return joined

    def where(self, relative: str) -> str:
        """What messages call a file."""
        return posixpath.join(self.uri, relative)

    def read(self, relative: str, size: int | None = None) -> bytes:
        """The bytes of a file.

        Args:
            relative: which.
            size: its length in bytes, where it is known: a shorter answer is then asked for
                again, and a long file is read in parts, several at a time.

        Raises:
            StorageError: it is missing or cannot be read.
            TryAgainError: storage does not answer.
        """
        path = self.full(relative)
        if size is None or self.is_local:
            return patiently("read", self.where(relative), lambda: self._whole(path))
        starts = list(range(0, size, PART_BYTES))
        ends = [min(start + PART_BYTES, size) for start in starts]
        return b"".join(self.ranges(relative, starts, ends))

    def ranges(self, relative: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes]:
        """Byte ranges of a file, each from its start up to its end, whole.

        Raises:
            IntegrityError: the file is shorter.
            StorageError: it is missing or cannot be read.
            TryAgainError: storage does not answer.
        """
        path, where = self.full(relative), self.where(relative)

        def attempt() -> list[bytes]:
            try:
                parts = self.fs.cat_ranges([path] * len(starts), starts, ends, on_error="raise")
                for start, end, part in zip(starts, ends, parts, strict=True):
                    if len(part) != end - start:
                        raise ShortAnswerError(f"{len(part)} bytes at {start}, asked {end - start}")
            except Exception as error:
                if is_passing(error) and not isinstance(error, ShortAnswerError):
                    raise
                if (size := int(self.fs.size(path))) >= max(ends):
                    raise
                raise IntegrityError(
                    f"{where} is too short: {max(ends)} bytes were asked for, it has {size}"
                ) from None  # a short answer as its cause would be taken for one that may pass
            return cast(list[bytes], parts)

        return patiently("read", where, attempt)

    def buffer(self, relative: str, size: int | None = None) -> pa.Buffer:
        """The bytes of a file for Arrow: memory-mapped where it is local, else read whole.

        Engines get bytes, never a Python file object: those have crashed interpreters at exit.
        """
        if not self.is_local:
            return pa.py_buffer(self.read(relative, size))
        with storage_errors("read", self.where(relative)):
            with pa.memory_map(self.full(relative)) as file:
                return file.read_buffer()

    def open(self, relative: str) -> IO[bytes]:
        """A file opened for reading."""
        path = self.full(relative)
        if self.is_local:
            with storage_errors("read", self.where(relative)):
                return cast(IO[bytes], self.fs.open(path, "rb"))
        return io.BufferedReader(_Remote(self, relative), OPEN_BYTES)

    def size(self, relative: str) -> int:
        """A file's length in bytes."""
        path = self.full(relative)
        return patiently("read", self.where(relative), lambda: int(self.fs.size(path)))

    def exists(self, relative: str) -> bool:
        """Whether a file is there."""
        path = self.full(relative)
        return patiently("look for", self.where(relative), lambda: bool(self.fs.exists(path)))

    def names(self, relative: str) -> list[str]:
        """Sorted names of the files in a folder; empty where there is no such folder."""
        found = self._listing(relative)
        return sorted(posixpath.basename(f["name"]) for f in found if f["type"] == "file")

    def entries(self, relative: str) -> list[Entry]:
        """What lies in a folder, by name, links left out; empty where there is no such folder."""
        found = [_entry(f) for f in self._listing(relative) if not f.get("islink")]
        return sorted(found, key=lambda entry: entry.name)

    def write(self, relative: str, data: bytes | memoryview) -> None:
        """Writes or replaces a file; readers see the old bytes or the new ones, never a part."""
        path = self.full(relative)
        if not self.is_local:
            whole = bytes(data)
            patiently("write", self.where(relative), lambda: self.fs.pipe_file(path, whole))
            return
        with storage_errors("write", self.where(relative)):
            with _temporary_file(path, data) as temporary:
                os.replace(temporary, path)
            _sync_folder(path)

    def create(self, relative: str, data: bytes) -> bool:
        """Writes a file that must not exist yet; whether this call was the one that made it.

        On an object store that is so only where `require_exclusive_create` finds no fault.
        """
        path = self.full(relative)
        if not self.is_local:
            return create_exclusive(self.fs, path, data, self.where(relative))
        with storage_errors("write", self.where(relative)):
            with _temporary_file(path, data) as temporary:
                try:
                    # fsspec's local mode="create" looks first and writes then: two can win.
                    os.link(temporary, path)
                except FileExistsError:
                    return False
            _sync_folder(path)
            return True

    def delete(self, relative: str) -> None:
        """Removes a file, when it is there."""
        path = self.full(relative)

        def attempt() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(path)

        patiently("delete", self.where(relative), attempt)

    def _whole(self, path: str) -> bytes:
        # s3fs asks for long objects in parts, and leaves zeros where one comes short.
        once = {"max_concurrency": 1} if "s3" in self.fs.protocol else {}
        return cast(bytes, self.fs.cat_file(path, **once))

    def _listing(self, relative: str) -> list[dict[str, Any]]:
        """What fsspec says of the files and folders in a folder, none where it is not there."""
        folder = self.full(relative)

        def attempt() -> list[dict[str, Any]]:
            # Never isdir on a store: it takes any failure for a no.
            if self.is_local and not self.fs.isdir(folder):
                return []
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(folder, detail=True)
            except FileNotFoundError as error:
                if any(_code(link) == "NoSuchBucket" for link in causes(error)):
                    raise
                return []
            # A store answers for a file as well, and some name the folder itself.
            return [f for f in found if posixpath.dirname(f["name"].rstrip("/")) == folder]

        return patiently("list", self.where(relative), attempt)


class _Remote(io.RawIOBase):
    """An object read from where one stands; each read is tried again as any other."""

    def __init__(self, root: Root, relative: str) -> None:
        self._root = root
        self._relative = relative
        self._size = root.size(relative)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, into: Any) -> int:
        end = min(self._at + len(into), self._size)
        if end <= self._at:
            return 0
        (part,) = self._root.ranges(self._relative, [self._at], [end])
        into[: len(part)] = part
        self._at = end
        return len(part)


def _code(error: BaseException) -> Any:
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _entry(found: Mapping[str, Any]) -> Entry:
    known = (found.get(name) for name in ("mtime", "LastModified", "last_modified", "updated"))
    at = next((value for value in known if value is not None), None)
    if isinstance(at, str):
        at = datetime.fromisoformat(at)
    return Entry(
        name=posixpath.basename(found["name"].rstrip("/")),
        is_file=found["type"] == "file",
        size=int(found.get("size") or 0),
        modified=at.timestamp() if isinstance(at, datetime) else at,
    )


@contextlib.contextmanager
def _temporary_file(path: str, data: bytes | memoryview) -> Iterator[str]:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(OSError):  # it is gone when it was renamed
            os.unlink(temporary)


def _sync_folder(path: str) -> None:
    # Without it a name can be lost in a power cut after its commit was acknowledged.
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

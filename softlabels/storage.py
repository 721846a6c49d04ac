"""URI to filesystem: the only place that opens storage and the only one that knows credentials.

Credentials come from the environment, which fsspec's and delta-rs's clients read themselves; none
is ever taken from a spec, and a URI that carries one is refused, so none can reach a log or a plan.
"""

import contextlib
import os
import posixpath
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from softlabels.errors import BadInputError, IntegrityError, StorageError, one_line

_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure")
"""Packages of object stores, whose own errors (no credentials, no such host) are no OSErrors."""


@contextlib.contextmanager
def storage_errors(action: str, path: str) -> Iterator[None]:
    """Turns an OSError or an object store's inside into a StorageError: what was done to which
    path.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _CLIENTS:
            raise
        said = error.strerror if isinstance(error, OSError) else None
        reason = said or one_line(error) or type(error).__name__
        raise StorageError(f"cannot {action} {path!r}: {reason}") from error


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
        # realpath, not Path.resolve: that one raises on a link that leads to itself.
        real, top = os.path.realpath(joined), os.path.realpath(self.path)
        if self.is_local and not Path(real).is_relative_to(top):
            raise IntegrityError(f"path {relative!r} leaves its root {self.uri!r} by a link")
        return joined

    def read(self, relative: str) -> bytes:
        """The bytes of a file."""
        with storage_errors("read", posixpath.join(self.uri, relative)):
            return cast(bytes, self.fs.cat_file(self.full(relative)))

    def buffer(self, relative: str) -> pa.Buffer:
        """The bytes of a file for Arrow: memory-mapped where it is local, else read whole.

        Engines get bytes, never a Python file object: those have crashed interpreters at exit.
        """
        if not self.is_local:
            return pa.py_buffer(self.read(relative))
        with storage_errors("read", posixpath.join(self.uri, relative)):
            with pa.memory_map(self.full(relative)) as file:
                return file.read_buffer()

    def open(self, relative: str) -> IO[bytes]:
        """A file opened for reading."""
        with storage_errors("read", posixpath.join(self.uri, relative)):
            return cast(IO[bytes], self.fs.open(self.full(relative), "rb"))

    def size(self, relative: str) -> int:
        """A file's length in bytes."""
        with storage_errors("read", posixpath.join(self.uri, relative)):
            return int(self.fs.size(self.full(relative)))

    def exists(self, relative: str) -> bool:
        """Whether a file is there."""
        with storage_errors("look for", posixpath.join(self.uri, relative)):
            return bool(self.fs.exists(self.full(relative)))

    def names(self, relative: str) -> list[str]:
        """Sorted names of the files in a folder; empty where there is no such folder."""
        folder = self.full(relative)
        self.fs.invalidate_cache()
        if not self.fs.isdir(folder):
            return []
        found = self.fs.ls(folder, detail=True)
        return sorted(posixpath.basename(f["name"]) for f in found if f["type"] == "file")

    def write(self, relative: str, data: bytes | memoryview) -> None:
        """Writes or replaces a file; readers see the old bytes or the new ones, never a part."""
        path = self.full(relative)
        with storage_errors("write", posixpath.join(self.uri, relative)):
            if not self.is_local:
                self.fs.pipe_file(path, bytes(data))
                return
            with _temporary_file(path, data) as temporary:
                os.replace(temporary, path)
            _sync_folder(path)

    def create(self, relative: str, data: bytes) -> bool:
        """Writes a file that must not exist yet; whether this call was the one that made it."""
        path = self.full(relative)
        with storage_errors("write", posixpath.join(self.uri, relative)):
            if not self.is_local:
                try:
                    self.fs.pipe_file(path, data, mode="create")
                except FileExistsError:
                    return False
                return True
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
        with storage_errors("delete", posixpath.join(self.uri, relative)):
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self.full(relative))


def open_root(uri: str | os.PathLike[str]) -> Root:
    """The folder at `uri`: a local path, file://, s3://, gs://, az:// or any fsspec URL.

    Raises:
        BadInputError: the URI carries credentials, or no installed filesystem serves its scheme.
    """
    text = os.fspath(uri)
    for link in text.split("::"):  # fsspec chains such as simplecache::s3://bucket/folder
        _refuse_credentials(link)
    try:
        fs, path = fsspec.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise BadInputError(f"cannot open {text!r}: {error}") from error
    path = path.rstrip("/") or "/"
    if isinstance(fs, LocalFileSystem) and ".." in path.split("/"):
        path = os.path.realpath(path)
    return Root(uri=path if isinstance(fs, LocalFileSystem) else text.rstrip("/"), fs=fs, path=path)


def find_files(pattern: str) -> tuple[Root, list[str]]:
    """The root above the first wildcard of `pattern`, and the sorted relative paths it matches.

    Raises:
        BadInputError: nothing matches.
    """
    head = pattern.split("*")[0].split("?")[0].split("[")[0]
    if "://" in head and "/" not in head.partition("://")[2]:
        raise BadInputError(f"{head}…: a wildcard cannot stand before the first folder of a URI")
    root = open_root(posixpath.dirname(head) or ".")
    prefix = posixpath.dirname(head)
    rest = pattern[len(prefix) :].lstrip("/") if prefix else pattern
    if urlsplit(prefix).scheme and re.search(r"[?][^/]*=", rest):
        raise BadInputError(f"a URI with a query is refused ({prefix}…): it may hold credentials")
    with storage_errors("list", pattern):
        matches = root.fs.glob(posixpath.join(root.path, rest), detail=True)
    found = [str(path) for path, info in matches.items() if info["type"] == "file"]
    if not found:
        raise BadInputError(f"no file matches {pattern!r}")
    return root, sorted(posixpath.relpath(path, root.path) for path in found)


def _refuse_credentials(uri: str) -> None:
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        # Nothing of a URI that cannot be taken apart is shown: it may hold a secret.
        raise BadInputError(f"a URI cannot be read: {error}") from error
    if "\0" in uri:
        raise BadInputError(f"path {uri!r} holds a NUL character")
    if parts.scheme and (parts.password or parts.username or parts.query):
        raise BadInputError(
            f"a URI with credentials or a query is refused ({parts.scheme}://{parts.hostname}…): "
            "give credentials by environment variables"
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

"""URI to filesystem: where a root comes from, and what delta-rs needs to reach the same place."""

import functools
import os
import posixpath
import re
import uuid
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from softlabels.errors import BadInputError, StorageError
from softlabels.storage.clients import make_client
from softlabels.storage.exclusive import overwrites
from softlabels.storage.options import (
    StoreSettings,
    delta_store_options,
    fsspec_options,
    polars_store_options,
    secrets_digest,
    store_settings,
)
from softlabels.storage.retrying import patiently, said_by
from softlabels.storage.root import Root


def open_root(uri: str | os.PathLike[str]) -> Root:
    """The folder at `uri`: a local path, file://, s3://, gs://, az:// or any fsspec URL.

    Raises:
        BadInputError: the URI is empty, carries credentials or says a place in a way that clients
            take differently, or no installed filesystem serves its scheme.
    """
    text = os.fspath(uri)
    if not text:
        raise BadInputError("expected a folder or URI, found '': '.' is the current folder")
    for link in text.split("::"):  # fsspec chains such as simplecache::s3://bucket/folder
        _refuse_credentials(link)
    scheme = text.rpartition("::")[2].partition("://")[0]
    settings = store_settings(scheme)
    try:
        if settings is None:
            fs, path = fsspec.url_to_fs(text)
        elif "::" in text:
            fs, path = fsspec.url_to_fs(text, **{scheme: fsspec_options(settings)})
        else:
            fs = _client(scheme, settings, secrets_digest(), os.getpid())
            path = fs._strip_protocol(text)
    except ImportError as error:
        extra = f": pip install 'softlabels[{settings.kind}]'" if settings else ""
        raise BadInputError(f"cannot open {text!r}: {said_by(error)}{extra}") from error
    except ValueError as error:
        # A client's own words may repeat what the environment holds.
        raise BadInputError(f"cannot open {text!r}: {said_by(error)}") from None
    path = path.rstrip("/") or "/"
    if settings is not None and not {"", ".", ".."}.isdisjoint(path.split("/")):
        # One client takes them for parts of a name, another for steps, the next refuses them.
        raise BadInputError(
            f"cannot open {text!r}: expected a bucket and names below it, found an empty name, '.' "
            "or '..'"
        )
    if isinstance(fs, LocalFileSystem) and ".." in path.split("/"):
        path = os.path.realpath(path)
    return Root(uri=path if isinstance(fs, LocalFileSystem) else text.rstrip("/"), fs=fs, path=path)


def delta_options(root: Root) -> dict[str, str]:
    """Storage options of delta-rs for the root's URI: what its own client has.

    No credentials: those are read from the environment there too.
    """
    return delta_store_options(_settings(root))


def polars_options(root: Root) -> dict[str, str]:
    """Storage options of polars for the root's URI, such as for `polars.scan_delta`."""
    return polars_store_options(_settings(root))


def require_exclusive_create(root: Root) -> None:
    """Proves once a process that two writers at `root` cannot overwrite each other.

    Commits, tags and claims are objects that must not exist yet. A store that ignores the condition
    would lose them silently, so it is found out with one small object, which is removed again.

    Raises:
        StorageError: it overwrites, or cannot be written.
        TryAgainError: it does not answer.
    """
    if not root.is_local:
        _require_exclusive(root.uri, _settings(root), secrets_digest())


def _settings(root: Root) -> StoreSettings | None:
    return None if root.is_local else store_settings(root.uri.partition("://")[0])


@functools.lru_cache(maxsize=256)
def _require_exclusive(uri: str, settings: StoreSettings | None, _secrets: str) -> None:
    root = open_root(uri)
    name = f"_softlabels/self-test-{uuid.uuid4().hex}"
    if overwrites(root.fs, root.full(name), root.where(name)):
        raise StorageError(
            f"{uri!r} cannot hold a table that is written to: its store overwrites an object that "
            "must not exist yet (conditional put, If-None-Match), so two writers could lose each "
            "other's commits; keep the table on a local disk, S3 or Azure, and copy finished "
            f"versions with: softlabels publish TABLE {uri}"
        )


@functools.lru_cache(maxsize=32)
def _client(scheme: str, settings: StoreSettings, _secrets: str, _process: int) -> Any:
    """One client for all that is the same; a forked process needs its own."""
    return make_client(scheme, settings)


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
    wanted = posixpath.join(root.path, rest)
    matches = patiently("list", pattern, lambda: root.fs.glob(wanted, detail=True))
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
    if "\0" in uri or any("\ud800" <= character <= "\udfff" for character in uri):
        raise BadInputError(f"path {uri!r} holds what no path can: a NUL or half a character")
    if parts.scheme and (parts.password or parts.username or parts.query):
        raise BadInputError(
            f"a URI with credentials or a query is refused ({parts.scheme}://{parts.hostname}…): "
            "give credentials by environment variables"
        )

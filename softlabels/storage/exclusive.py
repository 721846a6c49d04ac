"""Objects that must not exist yet: exactly one writer makes each, whatever happens to replies.

Commits, tags and claims stand on it. Where a store's client asks for the write and the reply is
lost, the second try is told that the object exists. So each try leaves a mark of its own with the
object, and a refusal is answered by looking whose mark is there.
"""

import contextlib
import uuid
from typing import Any

from softlabels.storage.options import AZURE, S3
from softlabels.storage.retrying import causes, patiently

GOOGLE = ("gs", "gcs")
CONDITIONAL = (*S3, *AZURE, *GOOGLE)
"""Schemes whose fsspec client sends the condition to the store, so that the store decides.

The others look first and write then, and two writers can both find nothing.
"""

_MARK = "softlabels-attempt"


def create_exclusive(fs: Any, path: str, data: bytes, where: str) -> bool:
    """Whether this call made the object at `path`, which must not have existed.

    Args:
        fs: of an object store.
        path: inside `fs`.
        data: the whole object.
        where: what messages call it.

    Raises:
        StorageError: it cannot be written.
        TryAgainError: storage does not answer.
    """
    mark = uuid.uuid4().hex
    scheme = _scheme(fs)

    def attempt() -> bool:
        try:
            fs.pipe_file(path, data, mode="create", **_marking(scheme, mark))
        except Exception as error:
            if not _is_refusal(error):
                raise
            return _mark_of(fs, scheme, path) == mark
        return True

    return patiently("write", where, attempt)


def overwrites(fs: Any, path: str, where: str) -> bool:
    """Whether the store writes an object that must not exist over one that does.

    `path` is used for two small objects, and gone after.
    """
    if _scheme(fs) not in CONDITIONAL:
        return True
    try:
        create_exclusive(fs, path, b"first", where)
        return create_exclusive(fs, path, b"second", where)
    finally:
        # What is left of it harms nobody: its name is its own.
        with contextlib.suppress(Exception):
            fs.rm_file(path)


def _scheme(fs: Any) -> str:
    protocol = fs.protocol
    return str(protocol if isinstance(protocol, str) else protocol[0])


def _marking(scheme: str, mark: str) -> dict[str, Any]:
    if scheme in S3:
        return {"Metadata": {_MARK: mark}}
    if scheme in AZURE:
        # adlfs sets the metadata itself and lets no other in; nothing reads this header.
        return {"content_settings": {"content_language": mark}}
    return {}


def _mark_of(fs: Any, scheme: str, path: str) -> str | None:
    """The mark of the object that is there; None for one that is not ours, or gone."""
    try:
        if scheme in S3:
            found = fs.metadata(path)
            return found.get(_MARK) if isinstance(found, dict) else None
        if scheme in AZURE:
            return str(fs.info(path)["content_settings"]["content_language"])
    except FileNotFoundError:
        pass
    return None


def _is_refusal(error: Exception) -> bool:
    """Whether the store said that the object exists."""
    if isinstance(error, FileExistsError):
        return True
    for link in causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return bool(response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412)
    return False

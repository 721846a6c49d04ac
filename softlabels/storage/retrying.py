"""Storage that does not answer: what is worth another try, how long, and what is said at the end.

Every operation is tried again while storage fails in a way that may pass (5xx, slow-downs,
time-outs, broken connections), with waits that grow and are drawn at random, for at most
SOFTLABELS_PATIENCE seconds. After that it is a TryAgainError; what trying again will not mend
(no permission, no such bucket) is a StorageError at once. No message shows a credential.
"""

import contextlib
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, unquote

from softlabels.errors import SoftLabelsError, StorageError, TryAgainError, one_line
from softlabels.storage.options import PATIENCE, SECRETS, patience

T = TypeVar("T")

FIRST_WAIT = 0.1
LONGEST_WAIT = 5.0

_CLIENTS = (
    "aiobotocore",
    "aiohttp",
    "azure",
    "botocore",
    "gcsfs",
    "google",
    "urllib3",
)
"""Packages of object stores, whose own errors (no credentials, no such host) are no OSErrors."""

_RUST = ("deltalake", "_internal")
"""What delta-rs calls the home of its errors."""

_PASSING_CODES = {
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
_PASSING_CLASSES = {
    "ClientPayloadError",
    "ConnectionClosedError",
    "ConnectTimeoutError",
    "EndpointConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ReadTimeoutError",
    "ResponseParserError",
    "ResponseStreamingError",
    "ServiceRequestError",
    "ServiceRequestTimeoutError",
    "ServiceResponseError",
    "ServiceResponseTimeoutError",
}
_PASSING_TEXT = re.compile(
    r"status code: (?:408|429|5\d\d)|error sending request|timed out|"
    r"connection (?:closed|refused|reset)|error decoding response body|request or response body",
    re.IGNORECASE,
)
"""How delta-rs tells them: as an OSError without a number, or in its own class."""


_DENIED_TEXT = re.compile(
    r"status code: 40[13]|NoSuchBucket|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|"
    r"lacked the required (?:privileges|permissions)|permission denied",
    re.IGNORECASE,
)


_SECRET_PART = re.compile(
    r"(?i)\b(sig|x-amz-signature|x-amz-security-token|accountkey|sharedaccesssignature)="
    r"([^&;\s\"')]+)"
)


class ShortAnswerError(OSError):
    """Storage sent fewer bytes than were asked for, of an object that has them."""


def is_passing(error: BaseException) -> bool:
    """Whether an error of a storage client may pass when the same is asked again."""
    if isinstance(error, SoftLabelsError):
        return False  # it was judged already, whatever caused it
    for link in causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore's ClientError
            return is_passing_answer(response)
        status = getattr(link, "status_code", None)  # azure's HttpResponseError
        if isinstance(status, int):
            return status in _PASSING_STATUS
        if isinstance(link, ConnectionError | TimeoutError | ShortAnswerError):
            return True
        if {kind.__name__ for kind in type(link).__mro__} & _PASSING_CLASSES:
            return True
        if _is_of_delta(link) and _PASSING_TEXT.search(_plain(link)):
            return True
    return False


def is_passing_answer(answer: Mapping[str, Any]) -> bool:
    """Whether what botocore has parsed is a failure that may pass."""
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in _PASSING_STATUS or answer.get("Error", {}).get("Code") in _PASSING_CODES


def is_denied(error: BaseException) -> bool:
    """Whether storage knows the request and refuses it: a permission, a key, no such bucket."""
    for link in causes(error):
        if isinstance(link, PermissionError):
            return True
        if _is_of_delta(link) and _DENIED_TEXT.search(_plain(link)):
            return True
    return False


def patiently(action: str, path: str, call: Callable[[], T], limit: float | None = None) -> T:
    """What `call` returns, asked for again as long as storage fails in a way that may pass.

    Args:
        action: what it does, for the message: "read".
        path: to what.
        call: must do no harm when it is done twice.
        limit: seconds; by default SOFTLABELS_PATIENCE.

    Raises:
        StorageError: trying again will not mend it.
        TryAgainError: storage stayed without an answer.
    """
    begun = time.monotonic()
    ceiling = FIRST_WAIT
    while True:
        try:
            return call()
        except Exception as error:
            if not is_passing(error):
                raise_storage_error(action, path, error)
            spent = time.monotonic() - begun
            wait = random.uniform(ceiling / 2, ceiling)
            if spent + wait > (patience() if limit is None else limit):
                raise_storage_error(action, path, error, f" for {spent:.0f} s")
        time.sleep(wait)
        ceiling = min(LONGEST_WAIT, 2 * ceiling)


@contextlib.contextmanager
def storage_errors(action: str, path: str) -> Iterator[None]:
    """Turns an OSError or an object store's inside into a StorageError or a TryAgainError."""
    try:
        yield
    except Exception as error:
        raise_storage_error(action, path, error)


def raise_storage_error(action: str, path: str, error: Exception, tried: str = "") -> NoReturn:
    """Raises what `error` means to the user; `error` itself when storage has not caused it.

    The cause is left out where its text holds a credential.
    """
    if not isinstance(error, OSError) and _package(error) not in (*_CLIENTS, *_RUST):
        raise error
    reason = said_by(error)
    cause = error if all(without_secrets(str(e)) == str(e) for e in causes(error)) else None
    if is_passing(error):
        raise TryAgainError(
            f"cannot {action} {path!r}: storage does not answer{tried}: {reason}; nothing is lost, "
            f"run the command again ({PATIENCE}, now {patience():g}, says for how many seconds it "
            "is tried)"
        ) from cause
    raise StorageError(f"cannot {action} {path!r}: {reason}") from cause


def without_secrets(text: str) -> str:
    """`text` with *** for every credential of the environment, and for signatures in URLs."""
    for name in SECRETS:
        value = os.environ.get(name, "").strip()
        # A connection string and a signature for sharing hold a secret among other things.
        for secret in (value, *(found[2] for found in _SECRET_PART.finditer(value))):
            forms = {secret, secret.lstrip("?"), quote(secret, safe=""), quote(secret)}
            for form in sorted(forms | {unquote(secret)}, key=len, reverse=True):
                if len(form) >= 4:
                    text = text.replace(form, "***")
    return _SECRET_PART.sub(r"\1=***", text)


def said_by(error: BaseException | None) -> str:
    """What an error says: one line, no colours, no credentials."""
    said = error.strerror if isinstance(error, OSError) else None
    return without_secrets(said or _plain(error)).rstrip(".") or type(error).__name__


def _plain(error: BaseException | None) -> str:
    """What an error says, on one line; delta-rs colours its errors and has arrows in them."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).replace("\u21b3", ":")
    return re.sub(r" :(?= )", ":", one_line(text))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_of_delta(error: BaseException) -> bool:
    return _package(error) in _RUST or (type(error) is OSError and error.errno is None)


def _package(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]

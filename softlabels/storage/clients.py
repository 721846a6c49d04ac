"""Clients of object stores, made to try each request again a few times by this program's rules.

An operation may be many requests (a search for files lists many folders) and must not begin anew
for each that fails. What is left over `patiently` does.
"""

import random
import time
from typing import Any

import fsspec

from softlabels.storage.options import StoreSettings, fsspec_options
from softlabels.storage.retrying import FIRST_WAIT, LONGEST_WAIT, is_passing, is_passing_answer

REQUEST_TRIES = 5
_BEGAN = "softlabels_began"


def make_client(scheme: str, settings: StoreSettings) -> Any:
    """A new fsspec filesystem of the store."""
    options = fsspec_options(settings)
    if settings.kind == "s3":
        from aiobotocore.session import AioSession

        session = AioSession()
        session.register("needs-retry.s3", _Retry(settings.patience / 4))
        fs = fsspec.filesystem(scheme, session=session, **options)
        fs.retries = 1  # s3fs's own tries have waits that are not drawn at random
        return fs
    fs = fsspec.filesystem(scheme, **options)
    policy: Any = getattr(getattr(fs.service_client, "_config", None), "retry_policy", None)
    if policy is not None:  # its own waits begin at 15 s
        policy.total_retries, policy.initial_backoff = REQUEST_TRIES - 1, 0
        policy.increment_base, policy.random_jitter_range = 1, 1
    return fs


class _Retry:
    """What botocore asks after each answer: the seconds to wait before another try, or None.

    Args:
        limit: seconds after the first failure from which on there is none.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def __call__(
        self,
        response: tuple[Any, Any] | None,
        attempts: int,
        caught_exception: Exception | None,
        request_dict: dict[str, Any],
        **_: Any,
    ) -> float | None:
        if caught_exception is not None:
            passing = is_passing(caught_exception)
        else:
            passing = response is not None and is_passing_answer(response[1])
        now = time.monotonic()
        began = request_dict.setdefault("context", {}).setdefault(_BEGAN, now)
        if not passing or attempts >= REQUEST_TRIES or now - began >= self._limit:
            return None
        ceiling = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempts - 1))
        return random.uniform(ceiling / 2, ceiling)

"""Fixtures that tests of several parts use."""

import signal
from collections.abc import Iterator

import pytest

from tests.servers import azure, azurite_endpoint, moto_endpoint, s3

__all__ = ["azure", "azurite_endpoint", "moto_endpoint", "s3"]


@pytest.fixture(scope="session", autouse=True)
def own_stream_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test fills the user's local cache, nor reads what another run left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTLABELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """No test leaves a handler behind: Dagster gives SIGTERM that of SIGINT, even to ignore it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)

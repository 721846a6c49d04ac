"""Fixtures that tests of several parts use."""

from tests.servers import azure, azurite_endpoint, moto_endpoint, s3

__all__ = ["azure", "azurite_endpoint", "moto_endpoint", "s3"]

"""How object stores are reached: one set of settings, from the environment, for both clients.

Python's client (fsspec: s3fs, adlfs) and Rust's (delta-rs, polars) get the same endpoint, region,
time-outs and patience. Secrets are not among them: each client reads those from the environment by
itself, so that none passes through this program.

    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN    s3://, secrets
    AWS_ENDPOINT_URL, AWS_REGION                                   s3://, where
    AWS_ALLOW_HTTP=true                                            http to other machines
    AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ENDPOINT             az://, where
    AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN           az://, secrets
    SOFTLABELS_PATIENCE                                            seconds without an answer
    SOFTLABELS_TIMEOUT                                             seconds for one answer
"""

import hashlib
import ipaddress
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from softlabels.errors import BadInputError

PATIENCE = "SOFTLABELS_PATIENCE"
TIMEOUT = "SOFTLABELS_TIMEOUT"
PATIENCE_SECONDS = 40.0
"""With one answer that never comes it is still less than a minute."""
TIMEOUT_SECONDS = 15.0
CONNECT_SECONDS = 5.0

S3 = ("s3", "s3a")
AZURE = ("az", "abfs", "abfss")
_TRUE = ("1", "true", "yes", "on")
SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_STORAGE_TOKEN",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
)
"""Environment variables whose values must never be seen."""


def patience() -> float:
    """Seconds that storage may stay without an answer before work is given up."""
    return _seconds(PATIENCE, PATIENCE_SECONDS)


def timeout() -> float:
    """Seconds that one answer may take before it is asked for again."""
    return _seconds(TIMEOUT, TIMEOUT_SECONDS)


@dataclass(frozen=True)
class StoreSettings:
    """Where a store is and how long to wait for it; no secrets.

    Attributes:
        kind: "s3" or "azure".
        endpoint: http(s) URL; None for the provider's own.
        region: of the bucket; None where the environment names none.
        account: of Azure; None for S3.
        timeout: seconds for one answer.
        connect_timeout: seconds to reach the host.
        patience: seconds without an answer.
    """

    kind: str
    endpoint: str | None
    region: str | None
    account: str | None
    timeout: float
    connect_timeout: float
    patience: float

    @property
    def insecure(self) -> bool:
        """Whether the endpoint is reached without TLS."""
        return self.endpoint is not None and self.endpoint.startswith("http://")


def store_settings(scheme: str) -> StoreSettings | None:
    """Settings of `scheme` from the environment; None for one that has none.

    Raises:
        BadInputError: a variable is missing or no number, or the endpoint is no usable URL.
    """
    account = region = None
    if scheme in S3:
        kind = "s3"
        endpoint = _variable("AWS_ENDPOINT_URL_S3") or _variable("AWS_ENDPOINT_URL")
        region = _variable("AWS_REGION") or _variable("AWS_DEFAULT_REGION")
        if endpoint and not region:
            region = "us-east-1"  # what stores that are not Amazon's expect in a signature
        allowed = "AWS_ALLOW_HTTP"
    elif scheme in AZURE:
        kind = "azure"
        endpoint = _variable("AZURE_STORAGE_ENDPOINT")
        account = _variable("AZURE_STORAGE_ACCOUNT_NAME")
        if account is None:
            raise BadInputError(
                f"{scheme}:// needs AZURE_STORAGE_ACCOUNT_NAME in the environment, and for secrets "
                "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN"
            )
        allowed = "AZURE_ALLOW_HTTP"
    else:
        return None
    if endpoint:
        endpoint = _checked_endpoint(endpoint, allowed)
    wait = timeout()
    return StoreSettings(
        kind, endpoint, region, account, wait, min(CONNECT_SECONDS, wait), patience()
    )


def delta_store_options(settings: StoreSettings | None) -> dict[str, str]:
    """What delta-rs and polars need to reach the store; empty for local folders."""
    if settings is None:
        return {}
    options = {
        "timeout": f"{settings.timeout:g}s",
        "connect_timeout": f"{settings.connect_timeout:g}s",
        "max_retries": "1000",  # bounded by the time
        "retry_timeout": f"{settings.patience:g}s",
        # Waits grow from 0.1 s to 5 s, each drawn at random (decorrelated jitter).
        "backoff_config.init_backoff": "100ms",
        "backoff_config.max_backoff": "5s",
        "backoff_config.base": "2",
    }
    if settings.insecure:
        options["allow_http"] = "true"
    if settings.kind == "s3":
        # A commit is one object that must not exist yet, never a rename.
        options["aws_conditional_put"] = "etag"
        options["aws_s3_allow_unsafe_rename"] = "false"
        if settings.endpoint:
            options["aws_endpoint_url"] = settings.endpoint
        if settings.region:
            options["aws_region"] = settings.region
    else:
        if settings.endpoint:
            options["azure_storage_endpoint"] = settings.endpoint
        if settings.account:
            options["azure_storage_account_name"] = settings.account
    return options


def polars_store_options(settings: StoreSettings | None) -> dict[str, str]:
    """What polars needs to reach the store: as delta-rs, but its own rules for trying again."""
    ours = ("timeout", "max_retries", "retry_timeout", "aws_conditional_put")
    return {
        name: value
        for name, value in delta_store_options(settings).items()
        if name not in ours and "backoff" not in name and "unsafe" not in name
    }


def fsspec_options(settings: StoreSettings | None) -> dict[str, Any]:
    """What fsspec's filesystem of the store is made with; empty for local folders."""
    if settings is None:
        return {}
    # Listings are never kept: another worker's files would stay unseen.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if settings.kind == "s3":
        options["config_kwargs"] = {
            "connect_timeout": settings.connect_timeout,
            "read_timeout": settings.timeout,
            # None of its own: they know nothing of SOFTLABELS_PATIENCE.
            "retries": {"mode": "standard", "total_max_attempts": 1},
        }
        options["client_kwargs"] = {"region_name": settings.region} if settings.region else {}
        if settings.endpoint:
            options["endpoint_url"] = settings.endpoint
    else:
        options["account_name"] = settings.account
        options["connection_timeout"] = settings.connect_timeout
        options["read_timeout"] = settings.timeout
        if settings.endpoint:
            options["connection_string"] = _connection_string(settings)
    return options


def secrets_digest() -> str:
    """Changes when credentials in the environment do: a client is made for one set of them."""
    values = "\0".join(f"{name}={os.environ.get(name, '')}" for name in SECRETS)
    return hashlib.sha256(values.encode()).hexdigest()


def _connection_string(settings: StoreSettings) -> str:
    # adlfs takes an endpoint in this form only; it stays inside the client's object.
    parts = {
        "DefaultEndpointsProtocol": "http" if settings.insecure else "https",
        "AccountName": settings.account,
        "AccountKey": _variable("AZURE_STORAGE_ACCOUNT_KEY"),
        "SharedAccessSignature": (_variable("AZURE_STORAGE_SAS_TOKEN") or "").lstrip("?") or None,
        "BlobEndpoint": settings.endpoint,
    }
    return ";".join(f"{name}={value}" for name, value in parts.items() if value)


def _variable(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _seconds(name: str, default: float) -> float:
    text = _variable(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86_400:
        raise BadInputError(f"{name} is {text!r}: expected seconds, more than 0, at most 86400")
    return value


def _checked_endpoint(endpoint: str, allowed: str) -> str:
    """Raises BadInputError for an endpoint that holds credentials or would show them."""
    try:
        parts = urlsplit(endpoint)
        host = parts.hostname or ""
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("http", "https"):
        raise BadInputError("the store's endpoint is no URL: expected https://host[:port]")
    if parts.username or parts.password or parts.query:
        raise BadInputError(
            f"the store's endpoint at {host!r} holds credentials or a query: give credentials by "
            "environment variables of their own"
        )
    asked = (_variable(allowed) or "").lower() in _TRUE
    if parts.scheme == "http" and not asked and not _is_loopback(host):
        raise BadInputError(
            f"the store's endpoint at {host!r} is http: data would travel in the clear; use https "
            f"or set {allowed}=true"
        )
    return endpoint.rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""Storage: the only part that opens it, and the only one that knows how credentials are found.

Credentials come from the environment, which fsspec's and delta-rs's clients read themselves; none
is ever taken from a spec, and a URI that carries one is refused, so none can reach a log or a plan.
"""

from softlabels.storage.opening import (
    delta_options,
    find_files,
    open_root,
    polars_options,
    require_exclusive_create,
)
from softlabels.storage.retrying import (
    ShortAnswerError,
    is_denied,
    patiently,
    raise_storage_error,
    said_by,
    storage_errors,
)
from softlabels.storage.root import Entry, Root, safe_relative

__all__ = [
    "Entry",
    "Root",
    "ShortAnswerError",
    "delta_options",
    "find_files",
    "is_denied",
    "open_root",
    "patiently",
    "polars_options",
    "raise_storage_error",
    "require_exclusive_create",
    "safe_relative",
    "said_by",
    "storage_errors",
]

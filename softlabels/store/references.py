"""How a table version is named: TABLE, TABLE@tag or TABLE@version."""

from softlabels.errors import BadInputError


def parse_reference(reference: str) -> tuple[str, str | None]:
    """A table reference split into its URI and what follows "@": "t@v1" gives ("t", "v1")."""
    uri, at, mark = reference.rpartition("@")
    authority = uri.partition("://")[2]
    if not at or "/" in mark or (":" in authority and "/" not in authority):
        return reference, None  # the last: user:password@bucket, which open_root refuses
    if not uri or not mark:
        raise BadInputError(f"table {reference!r}: expected TABLE, TABLE@tag or TABLE@version")
    return uri, mark

"""Tags: immutable names of table versions, made atomically, kept beside the log."""

import re
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from softlabels.errors import BadInputError, IntegrityError
from softlabels.storage import Root

FOLDER = "_softlabels/tags"
_NAME = re.compile(r"(?!\d+$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Tag(BaseModel):
    """A name for one version.

    Attributes:
        name: letters, digits, ".", "_" and "-"; not a number alone.
        version: the Delta version.
        snapshot_digest: what that version held when it was tagged.
        made_at: UTC, ISO 8601.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int
    snapshot_digest: str
    made_at: str


def make_tag(root: Root, name: str, version: int, snapshot_digest: str) -> Tag:
    """Tags a version; the same tag again is no error, other contents under its name are.

    Raises:
        BadInputError: the name is taken by another version, or is no name.
    """
    _check_name(name)
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    tag = Tag(name=name, version=version, snapshot_digest=snapshot_digest, made_at=made_at)
    if root.create(f"{FOLDER}/{name}.json", tag.model_dump_json().encode()):
        return tag
    standing = read_tag(root, name)
    # Versions that hold the same, such as before and after a commit without rows, are one.
    if standing.snapshot_digest != snapshot_digest:
        raise BadInputError(
            f"tag {name!r} of {root.uri!r} stands for version {standing.version}, not {version}; "
            "tags never move: choose another name"
        )
    return standing


def read_tag(root: Root, name: str) -> Tag:
    """The tag called `name`.

    Raises:
        BadInputError: there is none; the message lists those that are there.
        IntegrityError: its file is damaged.
    """
    _check_name(name)
    path = f"{FOLDER}/{name}.json"
    if not root.exists(path):
        known = ", ".join(tag_names(root)) or "none"
        raise BadInputError(f"table {root.uri!r} has no tag {name!r} (tags: {known})")
    try:
        return Tag.model_validate_json(root.read(path))
    except ValidationError as error:
        raise IntegrityError(f"tag {name!r} of {root.uri!r} is damaged") from error


def tag_names(root: Root) -> list[str]:
    """Sorted names of all tags."""
    return [n.removesuffix(".json") for n in root.names(FOLDER) if n.endswith(".json")]


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise BadInputError(
            f"tag name {name!r}: expected letters, digits, '.', '_' or '-', and not a number alone"
        )

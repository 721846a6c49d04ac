"""Tags: immutable names of table versions, made atomically, kept beside the log.

Vacuum keeps what they name, so a tag is deleted only by its exact name.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from softlabels.errors import BadInputError, IntegrityError, SoftLabelsError
from softlabels.storage import Root
from softlabels.store.closed import require_open
from softlabels.store.sealed import seal, unseal

FOLDER = "_softlabels/tags"
_NAME = re.compile(r"(?![0-9]+$)[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PLAN = re.compile(r"plan-([0-9a-f]{16})(?:-\d+)?")


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

    @property
    def plan(self) -> str | None:
        """First 16 digits of the fingerprint of the plan that pins the version; None: a user's."""
        found = _PLAN.fullmatch(self.name)
        return None if found is None else found[1]


def make_tag(root: Root, name: str, version: int, snapshot_digest: str) -> Tag:
    """Tags a version; the same tag again is no error, other contents under its name are.

    Raises:
        BadInputError: the name is taken by another version, or is no name; the version was
            vacuumed.
        TryAgainError: the version is being vacuumed.
    """
    check_name(name)
    made_at = datetime.now(UTC).isoformat(timespec="seconds")
    tag = Tag(name=name, version=version, snapshot_digest=snapshot_digest, made_at=made_at)
    if root.create(_path(name), seal(tag)):
        try:
            # After the tag is there, never before: see `closed`.
            require_open(root, version)
        except SoftLabelsError:
            root.delete(_path(name))
            raise
        return tag
    standing = read_tag(root, name)
    # Versions that hold the same, such as before and after a commit without rows, are one.
    if standing.snapshot_digest != snapshot_digest:
        raise BadInputError(
            f"tag {name!r} of {root.uri!r} stands for version {standing.version}, not {version}; "
            "tags never move: choose another name"
        )
    require_open(root, standing.version)
    return standing


def read_tag(root: Root, name: str) -> Tag:
    """The tag called `name`.

    Raises:
        BadInputError: there is none; the message lists those that are there.
        IntegrityError: its file is damaged.
    """
    check_name(name)
    path = _path(name)
    if not root.exists(path):
        known = ", ".join(tag_names(root)) or "none"
        raise BadInputError(f"table {root.uri!r} has no tag {name!r} (tags: {known})")
    try:
        tag = unseal(Tag, root.read(path))
    except ValueError as error:
        raise IntegrityError(f"tag {name!r} of {root.uri!r} is damaged") from error
    if tag.name != name:
        raise IntegrityError(
            f"tag {name!r} of {root.uri!r} is damaged: it calls itself {tag.name!r}"
        )
    return tag


def tag_names(root: Root) -> list[str]:
    """Sorted names of all tags."""
    return [n.removesuffix(".json") for n in root.names(FOLDER) if n.endswith(".json")]


def all_tags(root: Root) -> list[Tag]:
    """All tags, by version and name.

    Raises:
        IntegrityError: one is damaged.
    """
    found = []
    for name in tag_names(root):
        try:
            found.append(read_tag(root, name))
        except BadInputError:
            if root.exists(_path(name)):
                raise  # a file that is no tag stands among them
    return sorted(found, key=lambda tag: (tag.version, tag.name))


def tags_by_version(root: Root) -> dict[int, list[Tag]]:
    """All tags of each version that has some, by name."""
    found: dict[int, list[Tag]] = {}
    for tag in all_tags(root):
        found.setdefault(tag.version, []).append(tag)
    return found


def delete_tags(root: Root, names: Sequence[str]) -> dict[str, Tag | None]:
    """Deletes the tags of these exact names, none unless all are there; says what they were.

    Returns:
        By name; None for one that was damaged, of which nobody can say what it kept.

    Raises:
        BadInputError: there is none of such a name.
    """
    found: dict[str, Tag | None] = {}
    for name in names:
        try:
            found[name] = read_tag(root, name)
        except IntegrityError:
            found[name] = None
    for name in found:
        root.delete(_path(name))
    return found


def release(root: Root, name: str) -> None:
    """Deletes a tag that was made to keep a version for a moment; it may be gone already."""
    root.delete(_path(name))


def _path(name: str) -> str:
    return f"{FOLDER}/{name}.json"


def check_name(name: str) -> None:
    """Raises BadInputError unless a tag may have this name."""
    if not _NAME.fullmatch(name):
        raise BadInputError(
            f"tag name {name!r}: expected letters, digits, '.', '_' or '-', and not a number alone"
        )

"""A place that is published to: whether a table may be copied there, and which version it has.

What is there is looked at through a copy of its log on this machine, so that it may be any kind of
place, also one that delta-rs cannot reach.
"""

import os
from pathlib import Path
from typing import Any

from softlabels.errors import BadInputError, MismatchError, SoftLabelsError
from softlabels.storage import Root
from softlabels.store import files, tags
from softlabels.store.ahead import work_ahead
from softlabels.store.entries import FOLDER as LOG
from softlabels.store.entries import has_beginning
from softlabels.store.handle import table_root
from softlabels.store.origin import table_id
from softlabels.store.table import Table, parse_reference

_READERS = 16


def place_of(source: Table, uri: str) -> Root:
    """The root at `uri`, which may become a copy of a table.

    Raises:
        BadInputError: it is the table's own, or cannot be meant.
    """
    if parse_reference(uri)[1] is not None:
        raise BadInputError(f"{uri!r}: expected a place for the table, not one version of it")
    target, here = table_root(uri), source.root
    if target.is_local and here.is_local:
        one, other = os.path.realpath(target.path), os.path.realpath(here.path)
    else:
        one, other = target.uri.rstrip("/"), here.uri.rstrip("/")
    if f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/"):
        raise BadInputError(
            f"{target.uri!r} is the table's own place, is in it or around it: publish elsewhere"
        )
    return target


def require_free_tag(target: Root, source: Table, tag: str | None) -> None:
    """Raises BadInputError where a name is none, or stands for something else there."""
    if tag is None or tag not in tags.tag_names(target):
        tags.check_name(tag or "x")
        return
    standing = tags.read_tag(target, tag)
    if standing.snapshot_digest != source.snapshot_digest:
        raise BadInputError(
            f"tag {tag!r} of {target.uri!r} stands for version {standing.version}, which holds "
            "something else; tags never move: choose another name"
        )


def mirrored(target: Root, folder: str) -> Table | None:
    """The table that is at the target, its log copied into `folder`; None where there is none.

    Raises:
        MismatchError: it cannot be opened as one of ours.
    """
    if not has_beginning(target):
        return None  # also of entries that a stopped publish has left
    names = target.names(LOG)
    log = Path(folder) / LOG
    log.mkdir(parents=True)
    reading = work_ahead(
        names, lambda name: target.read(f"{LOG}/{name}"), lambda _: 1, _READERS, _READERS
    )
    for name, data in reading:
        (log / name).write_bytes(data)
    try:
        return Table.open(folder)
    except SoftLabelsError as error:
        said = str(error).replace(os.path.realpath(folder), target.uri).replace(folder, target.uri)
        raise MismatchError(
            f"{target.uri!r} holds a table that was not published there: {said}"
        ) from error


def _published(there: Table, place: str) -> dict[str, Any]:
    """What the newest version of a copy says of where it came from.

    Raises:
        MismatchError: it did not come by a publish.
    """
    change = there.history()[0]["change"]
    if change is None or change.operation != "publish":
        made = change.operation if change else "others"
        raise MismatchError(
            f"the newest version of {place!r}, {there.version}, was made by {made}, not by a "
            "publish: publish elsewhere"
        )
    found: dict[str, Any] = change.arguments["source"]
    return found


def require_older(there: Table, source: Table, place: str) -> None:
    """Raises unless the newest version of a copy is an older one of the same table.

    Args:
        there: the copy, as `mirrored` gives it.
        source: the version that is to be published there.
        place: what messages call the copy.

    Raises:
        MismatchError: it is a copy of another table, or was changed by others.
        BadInputError: it is newer.
    """
    published = _published(there, place)
    if published["table_id"] != table_id(source):
        raise MismatchError(
            f"{place!r} is a copy of {published['uri']!r}, another table than "
            f"{source.root.uri!r}: publish elsewhere"
        )
    if published["version"] > source.version:
        raise BadInputError(
            f"version {published['version']} is published at {place!r}, which is newer than "
            f"{source.version}: publish {source.version} elsewhere, or roll the table back to it "
            "and publish its newest version"
        )


def holds(there: Table, source: Table, place: str) -> bool:
    """Whether the newest version of a copy holds what a version of the same table does.

    In files of the same names: plans made of that version read them here too.

    Arguments and what it raises as `require_older`.
    """
    paths = [[file.path for file in table.files] for table in (there, source)]
    if there.snapshot_digest != source.snapshot_digest or paths[0] != paths[1]:
        return False
    return bool(_published(there, place)["table_id"] == table_id(source))


def sizes_at(root: Root) -> dict[str, int]:
    """Bytes of each data file at a place, by path."""
    found = root.entries(files.FOLDER)
    return {f"{files.FOLDER}/{entry.name}": entry.size for entry in found if entry.is_file}

"""Versions that vacuum closed: which of them lost files, when, kept beside the log.

The record is written before the first file goes. Whoever wants to keep a version makes its mark (a
tag) first and looks here then; vacuum makes its record first and looks for tags then. So of the two
at least one sees the other, and no version is both kept and emptied.
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from softlabels.errors import BadInputError, IntegrityError, TryAgainError
from softlabels.storage import Root
from softlabels.store.files import FOLDER as DATA
from softlabels.store.sealed import is_sealed, seal, unseal

FOLDER = "_softlabels/vacuum"


class VacuumRecord(BaseModel):
    """What one vacuum did.

    Attributes:
        vacuum_id: random, 32 hex digits.
        began_at: UTC, ISO 8601, by the clock of the machine that ran it.
        ended_at: when its last file was gone; null while it runs, and where it was killed.
        version: the newest version when it began.
        closed: first and last of each range of versions that cannot be opened any more.
        files: files that it set out to remove.
        bytes: of them.
        settings: what it was told to keep.
        packages: versions of what ran it.
        sealed: whether its file had a checksum; nothing is removed on the word of one that has
            none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vacuum_id: str
    began_at: str
    ended_at: str | None = None
    version: int
    closed: tuple[tuple[int, int], ...] = ()
    files: int = 0
    bytes: int = 0
    settings: Mapping[str, int | float] = {}
    packages: Mapping[str, str] = {}
    sealed: bool = Field(default=True, exclude=True)

    def closes(self, version: int) -> bool:
        """Whether it closed this version."""
        return any(first <= version <= last for first, last in self.closed)


def new_id() -> str:
    """An id for a record, random: two that run at once do not write one file."""
    return uuid.uuid4().hex


def write_record(root: Root, record: VacuumRecord) -> None:
    """Stores a record, in the place of what it said before."""
    root.write(f"{FOLDER}/{record.vacuum_id}.json", seal(record))


def read_record(root: Root, vacuum_id: str) -> VacuumRecord:
    """One record.

    Raises:
        IntegrityError: it is damaged.
    """
    path = f"{FOLDER}/{vacuum_id}.json"
    data = root.read(path)
    try:
        record = unseal(VacuumRecord, data)
    except ValueError as error:
        raise IntegrityError(
            f"vacuum record {path!r} of {root.uri!r} is damaged: restore it, or delete it; "
            "versions that it closed then fail only where a file of theirs is missed"
        ) from error
    return record.model_copy(update={"sealed": is_sealed(data)})


def vacuum_records(root: Root) -> list[VacuumRecord]:
    """All records, in the order in which they began.

    Raises:
        IntegrityError: one is damaged.
    """
    names = (name for name in root.names(FOLDER) if name.endswith(".json"))
    found = [read_record(root, name.removesuffix(".json")) for name in names]
    return sorted(found, key=lambda record: (record.began_at, record.vacuum_id))


def require_open(root: Root, version: int, tagged: Sequence[str] | None = None) -> None:
    """Raises unless all files of a version are there, as far as vacuum is concerned.

    Args:
        root: of the table.
        version: its number.
        tagged: its files, where it is opened by a tag: a vacuum that has not ended spares it then,
            and so it is open as long as they are there.

    Raises:
        BadInputError: a vacuum has removed files of it.
        TryAgainError: a vacuum that has not ended is about to; it may spare the version yet.
    """
    closing = [record for record in vacuum_records(root) if record.closes(version)]
    for record in closing:
        if record.ended_at is not None:
            raise BadInputError(
                f"version {version} of {root.uri!r} was vacuumed at {record.ended_at}: files that "
                "it held are deleted; open the newest version or a tag"
            )
    if not closing:
        return
    if tagged is not None and set(tagged) <= {f"{DATA}/{name}" for name in root.names(DATA)}:
        return
    raise TryAgainError(
        f"version {version} of {root.uri!r} is being vacuumed since {closing[0].began_at}; should "
        "that have been stopped, an hour later `softlabels vacuum` ends it"
    )


def ranges(versions: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """First and last of each run of neighbours: 1, 2, 3, 7 gives ((1, 3), (7, 7))."""
    found: list[tuple[int, int]] = []
    for version in sorted(set(versions)):
        if found and version == found[-1][1] + 1:
            found[-1] = (found[-1][0], version)
        else:
            found.append((version, version))
    return tuple(found)


def span_name(first: int, last: int) -> str:
    """What a message calls these versions."""
    return f"version {first}" if first == last else f"versions {first} to {last}"

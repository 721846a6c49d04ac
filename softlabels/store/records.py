"""What a commit records of the version that it makes, so that a damaged log is noticed.

Delta's log has no checksums, and a flipped bit in it or in a checkpoint can hide a file, prune rows
that match, or forget that a unit is in. Each commit of ours therefore carries the counts and sums
that the resulting version must have. They cost as much as the commit changes, not as the table
holds, and `Table` checks them when a version is opened.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from deltalake import Schema
from pydantic import BaseModel, ConfigDict, ValidationError

from softlabels.errors import IntegrityError
from softlabels.fingerprint import sha256_json
from softlabels.store.entries import LogEntry
from softlabels.store.files import TableFile, UnitShard, known_of

RECORD_KEY = "softlabels_record"
"""Of the record in a log entry."""

COMMIT_KEY = "softlabels"
"""Of a run's lineage in a log entry."""

CHANGE_KEY = "softlabels_change"
"""Of a change's lineage in a log entry."""

LINEAGE_KEYS = (COMMIT_KEY, CHANGE_KEY)

_MODULUS = 2**256


class Tally(BaseModel):
    """How many things there are, and the sum of their sha256 modulo 2^256.

    Equal sets have equal tallies, whatever the order, and adding to one is adding to the other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = 0
    sum: str = f"{0:064x}"

    def with_(self, more: Iterable[int], less: Iterable[int] = ()) -> "Tally":
        """This one with things added and taken away, given by their digests."""
        added, gone = list(more), list(less)
        total = (int(self.sum, 16) + sum(added) - sum(gone)) % _MODULUS
        return Tally(count=self.count + len(added) - len(gone), sum=f"{total:064x}")


class State(BaseModel):
    """What a version holds.

    Attributes:
        version: its number.
        files: of its files with size, rows and statistics.
        keys: of the app ids of all transactions up to it.
        schema_sha256: of its schema, with the contents that may travel in it.
        properties_sha256: of its properties and partition columns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    files: Tally
    keys: Tally
    schema_sha256: str
    properties_sha256: str

    def after(
        self,
        added: Iterable[UnitShard],
        removed: Iterable[TableFile],
        keys: Iterable[str],
        schema: Schema | None = None,
    ) -> "VersionRecord":
        """The record of the version that a commit makes of this one, without its lineage.

        Args:
            added: units whose files, where they have any, are put in.
            removed: files taken out.
            keys: app ids of its transactions, none of which was in.
            schema: of the new version, where it is another.
        """
        files = map(file_digest, (unit for unit in added if unit.path is not None))
        return VersionRecord(
            version=self.version + 1,
            files=self.files.with_(files, map(file_digest, removed)),
            keys=self.keys.with_(map(key_digest, keys)),
            schema_sha256=self.schema_sha256 if schema is None else schema_digest(schema),
            properties_sha256=self.properties_sha256,
            operation="WRITE",
            made_at=int(time.time() * 1000),
        )


class VersionRecord(State):
    """A version's state, and what the commit that made it says of itself.

    Attributes:
        operation: Delta's name for it.
        made_at: ms since 1970, by the clock of whoever made it.
        lineage_sha256: of the lineage beside it, JSON as it stands there; null where none is.
        sha256: of the record itself, without this.
    """

    operation: str
    made_at: int
    lineage_sha256: str | None = None
    sha256: str = ""

    def texts(self, lineage: Mapping[str, str]) -> dict[str, str]:
        """What the log entry gets: the record, and the lineage under its own key."""
        whole = self.model_copy(update={"lineage_sha256": _said(lineage)})
        whole = whole.model_copy(update={"sha256": whole.own_sha256()})
        return {**lineage, RECORD_KEY: whole.model_dump_json()}

    def own_sha256(self) -> str:
        """What `sha256` must be."""
        return sha256_json(self.model_dump(mode="json", exclude={"sha256"}))


def empty_table(schema: Schema, properties: Mapping[str, str]) -> VersionRecord:
    """The record of the version that makes a table."""
    return VersionRecord(
        version=0,
        files=Tally(),
        keys=Tally(),
        schema_sha256=schema_digest(schema),
        properties_sha256=properties_digest(properties),
        operation="CREATE TABLE",
        made_at=int(time.time() * 1000),
    )


def record_in(entry: LogEntry | None, lineage_keys: Iterable[str]) -> VersionRecord | None:
    """The record of a log entry, checked against the entry's own lineage; None where it has none.

    Raises:
        IntegrityError: it cannot be read, or is of another entry.
    """
    if entry is None:
        return None
    text = entry.info.get(RECORD_KEY)
    if text is None:
        if any(_is_record(value) for value in entry.info.values()):
            raise IntegrityError(
                f"log entry {entry.version} is damaged: its record has lost its name"
            )
        return None
    try:
        record = VersionRecord.model_validate_json(text)
    except ValidationError as error:
        raise IntegrityError(f"the record in log entry {entry.version} is damaged") from error
    found = {key: entry.info[key] for key in lineage_keys if entry.info.get(key) is not None}
    right = (entry.version, _said(found), record.own_sha256())
    if (record.version, record.lineage_sha256, record.sha256) != right:
        raise IntegrityError(
            f"log entry {entry.version} is damaged: its record is of another version, lineage or "
            "text"
        )
    return record


def _is_record(value: Any) -> bool:
    if not isinstance(value, str) or not value.startswith('{"version":'):
        return False
    with contextlib.suppress(ValidationError):
        return bool(VersionRecord.model_validate_json(value))
    return False


def _said(lineage: Mapping[str, Any]) -> str | None:
    return sha256_json(dict(lineage)) if lineage else None


def file_digest(file: TableFile | UnitShard) -> int:
    """Of a data file's path, size, rows and statistics, as the log gives them.

    Statistics are taken as delta-rs reads them: checkpoints hold them in other forms than entries.
    Columns behind the last that has any do not count, so that STATISTICS can grow at its end.
    """
    rows: int | None
    if isinstance(file, TableFile):
        rows, known = file.num_rows, file.known
    else:  # delta-rs knows rows from there
        rows, known = file.statistics.get("numRecords"), known_of(file.statistics)
    while known and known[-1] is None:
        known = known[:-1]
    # repr is exact for numbers, and this is done for every file when a table is opened.
    return _sha256(repr((file.path, file.size, rows, known)))


def key_digest(key: str) -> int:
    """Of a transaction's app id."""
    return _sha256(key)


def _sha256(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def schema_digest(schema: Schema) -> str:
    """The sha256 of a Delta schema, metadata included."""
    return sha256_json(json.loads(schema.to_json()))


def properties_digest(properties: Mapping[str, str], partitions: Iterable[str] = ()) -> str:
    """The sha256 of a table's properties and partition columns."""
    return sha256_json({"properties": dict(properties), "partitions": list(partitions)})


def differing(record: State, found: State) -> list[str]:
    """What of a version is not as its record says, in words."""
    names = {
        "files": "files",
        "keys": "units",
        "schema_sha256": "schema or contents",
        "properties_sha256": "properties",
    }
    return [words for name, words in names.items() if getattr(record, name) != getattr(found, name)]

"""The table: a Delta log over shards, opened at a version, grown by exactly-once commits."""

import itertools
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from pydantic import ValidationError

from softlabels.errors import (
    BadInputError,
    IntegrityError,
    MismatchError,
    StorageError,
    TryAgainError,
    one_line,
)
from softlabels.fingerprint import sha256_lines
from softlabels.lineage import Contents, RunLineage
from softlabels.schema import FORMAT_VERSION
from softlabels.storage import Root, open_root
from softlabels.store import commits, shards
from softlabels.store.commits import COMMIT_KEY, CONTENTS_PROPERTY
from softlabels.store.files import TableFile, UnitShard, file_path, table_file
from softlabels.store.tags import Tag, read_tag

__all__ = ["Table", "TableFile", "UnitShard", "parse_reference"]

FORMAT_PROPERTY = "softlabels.format_version"
COMMIT_ATTEMPTS = 30
"""Lost races a commit survives; each waits up to 2 s, so a minute of contention."""

_PROPERTIES = {
    # History is what tags and lineage stand on: Delta must not clean it up by itself.
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
    "delta.checkpointInterval": "50",
}


def parse_reference(reference: str) -> tuple[str, str | None]:
    """A table reference split into its URI and what follows "@": "t@v1" gives ("t", "v1")."""
    uri, at, mark = reference.rpartition("@")
    authority = uri.partition("://")[2]
    if not at or "/" in mark or (":" in authority and "/" not in authority):
        return reference, None  # the last: user:password@bucket, which open_root refuses
    if not uri or not mark:
        raise BadInputError(f"table {reference!r}: expected TABLE, TABLE@tag or TABLE@version")
    return uri, mark


class Table:
    """A soft-label table at one version. Opening reads the log, not the data."""

    def __init__(self, root: Root, delta: DeltaTable) -> None:
        self.root = root
        self._delta = delta
        properties = delta.metadata().configuration
        shards.check_format_version(properties.get(FORMAT_PROPERTY), f"table {root.uri!r}")
        try:
            self.contents = Contents.model_validate_json(commits.contents_of(delta) or "")
        except ValidationError as error:
            raise IntegrityError(f"table {root.uri!r} has no readable contents record") from error

    @classmethod
    def open(cls, reference: str) -> Self:
        """The table at `reference`: TABLE, TABLE@tag or TABLE@version.

        Raises:
            BadInputError: there is no such table, tag or version.
            IntegrityError: its format is newer, or the tag's snapshot is not what was tagged.
        """
        uri, mark = parse_reference(reference)
        root = _table_root(uri)
        tag: Tag | None = None
        if mark is not None and not mark.isdecimal():
            tag = read_tag(root, mark)
        version = tag.version if tag else int(mark) if mark else None
        table = cls(root, _open_delta(root, version))
        if tag and table.snapshot_digest != tag.snapshot_digest:
            raise IntegrityError(
                f"tag {mark!r} of {uri!r} was made for snapshot {tag.snapshot_digest!r}, "
                f"version {tag.version} is now {table.snapshot_digest!r}"
            )
        return table

    @classmethod
    def open_or_create(cls, uri: str, schema: pa.Schema, contents: Contents) -> Self:
        """The newest version at `uri`, made empty when there is none yet.

        Raises:
            MismatchError: a table is there with other contents or another schema.
            StorageError: the place cannot be written.
        """
        root = _table_root(uri)
        try:
            delta = _open_delta(root, None)
        except BadInputError:
            delta = _create_delta(root, schema, contents)
        table = cls(root, delta)
        contents.require_same(table.contents, "the run", f"table {uri!r}")
        for theirs, ours in itertools.zip_longest(map(str, table.schema), map(str, schema)):
            if theirs != ours:
                raise MismatchError(
                    f"table {uri!r} has another schema: column {theirs}, the run makes {ours}; "
                    "use another table"
                )
        return table

    @cached_property
    def schema(self) -> pa.Schema:
        """Arrow schema of its rows."""
        fields = pa.schema(self._delta.schema().to_arrow())
        return pa.schema([field.remove_metadata() for field in fields])

    @property
    def version(self) -> int:
        """The Delta version this object shows."""
        return int(self._delta.version())

    @cached_property
    def files(self) -> tuple[TableFile, ...]:
        """Its data files, by path (units of a run in order)."""
        actions = pa.table(self._delta.get_add_actions()).to_pylist()
        return tuple(sorted((table_file(action) for action in actions), key=lambda f: f.path))

    @property
    def num_rows(self) -> int:
        """Rows, by the log."""
        return sum(file.num_rows for file in self.files)

    @cached_property
    def snapshot_digest(self) -> str:
        """The sha256 of what this version holds: contents and each unit's bytes.

        Which attempt stored a unit does not count: the same labels captured again have the same
        digest, and so the same plans.
        """
        lines = [f"{f.unit} {f.sha256} {f.size} {f.num_rows}" for f in self.files]
        return sha256_lines([*lines, self.contents.digest()])

    def latest(self) -> Self:
        """The same table at its newest version."""
        return type(self)(self.root, _open_delta(self.root, None))

    def committed(self, key: str) -> bool:
        """Whether a unit's key is in the log up to this version."""
        return self._delta.transaction_version(key) is not None

    def history(self) -> list[dict[str, Any]]:
        """Commits, newest first: version, timestamp (ms), operation, run (RunLineage or None)."""
        entries = self._delta.history()
        commits = []
        # Whatever version it is at, delta-rs gives the whole log but calls its newest entry that
        # version. The log is never cleaned up, so an entry's place in it is its version.
        for version, entry in zip(reversed(range(len(entries))), entries, strict=True):
            if version > self.version:
                continue
            text = entry.get(COMMIT_KEY)
            commits.append(
                {
                    "version": version,
                    "timestamp": int(entry["timestamp"]),
                    "operation": entry.get("operation", ""),
                    "run": RunLineage.model_validate_json(text) if text else None,
                }
            )
        return commits

    def store_shard(self, key: str, unit: str, shard: shards.Shard) -> UnitShard:
        """Stores a finished shard under a name of its own, ready to be committed."""
        if not shard.num_rows:
            return UnitShard(key, None, 0, 0, {})
        path = file_path(unit, uuid.uuid4().hex[:8], shard)
        self.root.write(path, shard.data)
        return UnitShard(key, path, len(shard.data), shard.num_rows, shard.statistics)

    def commit(
        self,
        units: Sequence[UnitShard],
        lineage: RunLineage,
        guard: Callable[["Table"], None] = lambda _: None,
    ) -> Self:
        """Adds `units`, each exactly once whatever happened before; returns the version made.

        The keys are looked for in the newest version and the commit goes out from that very
        handle, so that a racing writer makes it fail rather than double a unit. After any error
        the log is looked at again: a lost reply is then seen to have been a success.

        Args:
            units: those to add; any that are already in the log are passed over.
            lineage: what the log says of this commit.
            guard: called with the newest version before each attempt; raises to give up.

        Raises:
            MismatchError: the newest version has other contents than this one.
            TryAgainError: the race was lost too often, or storage does not answer.
        """

        def unchanged(newest: Table) -> None:
            # A version may have got other contents since this one was opened.
            self.contents.require_same(newest.contents, "the run", f"table {self.root.uri!r}")
            guard(newest)

        return self._commit(units, lineage, unchanged, type(self)._commit_once)

    def replace(
        self,
        units: Sequence[UnitShard],
        lineage: RunLineage,
        schema: pa.Schema,
        contents: Contents,
    ) -> Self:
        """Puts `units` in the place of all files, in one commit; returns the version made.

        Older versions stay as they are. Exactly once as `commit`: where the units' keys are in the
        log already, nothing is done.

        Args:
            units: all rows of the new version.
            lineage: what the log says of this commit.
            schema: of the new version.
            contents: of the new version.

        Raises:
            MismatchError: the newest version holds something else than this one.
            TryAgainError: the race was lost too often, or storage does not answer.
        """

        def unchanged(newest: Table) -> None:
            if newest.snapshot_digest != self.snapshot_digest:
                raise MismatchError(
                    f"table {self.root.uri!r} was at version {self.version} with "
                    f"{self.num_rows} rows and is at {newest.version} with {newest.num_rows} now: "
                    "it was changed meanwhile, and nothing was done; run the command again"
                )

        def replace_all(newest: Table, all_units: Sequence[UnitShard], said: RunLineage) -> None:
            commits.replace(newest._delta, all_units, said, schema, contents)

        return self._commit(units, lineage, unchanged, replace_all)

    def _commit(
        self,
        units: Sequence[UnitShard],
        lineage: RunLineage,
        guard: Callable[["Table"], None],
        attempt_once: Callable[["Table", Sequence[UnitShard], RunLineage], None],
    ) -> Self:
        error: Exception | None = None
        for attempt in range(COMMIT_ATTEMPTS + 1):
            if error is not None:
                time.sleep(random.uniform(0, min(2.0, 0.02 * 2**attempt)))
            try:
                newest = self.latest()
            except StorageError as caught:
                error = caught
                continue
            # By key: a unit given twice is one unit.
            missing = {unit.key: unit for unit in units if not newest.committed(unit.key)}
            if not missing:
                return newest
            if attempt == COMMIT_ATTEMPTS:
                break
            guard(newest)
            try:
                attempt_once(newest, list(missing.values()), _narrowed(lineage, missing))
            except (DeltaError, OSError) as caught:
                error = caught
        raise TryAgainError(
            f"could not commit {len(units)} units to {self.root.uri!r} in {COMMIT_ATTEMPTS} "
            f"attempts; nothing is lost, run the command again: {one_line(error)}"
        )

    def batches(
        self, columns: Sequence[str] | None = None, files: Sequence[TableFile] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows, one record batch a row group, files in order."""
        for file in self.files if files is None else files:
            opened = shards.open_shard(self.root.buffer(file.path), file.path)
            for group in range(opened.num_row_groups):
                yield shards.read_row_groups(opened, file.path, [group], columns)

    def _commit_once(self, units: Sequence[UnitShard], lineage: RunLineage) -> None:
        commits.append(self._delta, units, lineage)


def _table_root(uri: str) -> Root:
    root = open_root(uri)
    if "%" in root.uri:
        # delta-rs decodes it in some places and not in others: "a%20b" would write into "a b".
        raise BadInputError(f"table {root.uri!r}: a '%' cannot be in a table's place, rename it")
    return root


def _open_delta(root: Root, version: int | None) -> DeltaTable:
    try:
        delta = DeltaTable(root.uri)
        newest = delta.version()
        # delta-rs counts up to any version that it is asked for, for hours if it is large.
        if version is not None and version > newest:
            raise BadInputError(f"table {root.uri!r} has no version {version}, only 0 to {newest}")
        if version is not None:
            delta.load_as_version(version)
        return delta
    except TableNotFoundError as error:
        raise BadInputError(f"there is no table at {root.uri!r}") from error
    except (DeltaError, OSError) as error:
        raise StorageError(f"cannot open table {root.uri!r}: {one_line(error)}") from error


def _create_delta(root: Root, schema: pa.Schema, contents: Contents) -> DeltaTable:
    properties = _PROPERTIES | {
        FORMAT_PROPERTY: str(FORMAT_VERSION),
        CONTENTS_PROPERTY: contents.model_dump_json(),
    }
    try:
        return DeltaTable.create(
            root.uri,
            schema=schema,
            name="softlabels",
            configuration=properties,
            raise_if_key_not_exists=False,
            # With retries, of two that create at once the later would become version 1 and put its
            # contents in place of the first one's.
            commit_properties=CommitProperties(max_commit_retries=0),
        )
    except (DeltaError, OSError) as error:
        try:
            return _open_delta(root, None)  # another worker made it first
        except BadInputError:
            raise StorageError(f"cannot make a table at {root.uri!r}: {one_line(error)}") from error


def _narrowed(lineage: RunLineage, units: Mapping[str, UnitShard]) -> RunLineage:
    # What another attempt has committed already is in that commit's record, not in this one's.
    names = {key.rpartition("/")[2] for key in units}
    return lineage.model_copy(
        update={
            "units": tuple(u for u in lineage.units if u.rpartition("/")[2] in names),
            "num_rows": sum(unit.num_rows for unit in units.values()),
        }
    )

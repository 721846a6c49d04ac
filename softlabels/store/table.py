"""The table: a Delta log over shards, opened at a version, grown by exactly-once commits."""

import itertools
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Self

import pyarrow as pa
from deltalake import DeltaTable, Schema
from pydantic import ValidationError

from softlabels.errors import BadInputError, IntegrityError, MismatchError
from softlabels.fingerprint import sha256_lines
from softlabels.lineage import ChangeLineage, Contents, RunLineage
from softlabels.schema import FORMAT_VERSION
from softlabels.storage import Root, require_exclusive_create
from softlabels.store import commits, records, shards, state
from softlabels.store.closed import require_open
from softlabels.store.commits import CONTENTS_PROPERTY
from softlabels.store.files import TableFile, UnitShard, file_path
from softlabels.store.handle import (
    bring_up_to_date,
    create_delta,
    open_delta,
    table_root,
    without_panics,
)
from softlabels.store.history import commits_of
from softlabels.store.racing import until_done
from softlabels.store.references import parse_reference
from softlabels.store.tags import Tag, read_tag

__all__ = ["Table", "TableFile", "UnitShard", "parse_reference"]

FORMAT_PROPERTY = "softlabels.format_version"

_PROPERTIES = {
    # History is what tags and lineage stand on: Delta must not clean it up by itself.
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
    "delta.checkpointInterval": "50",
}


class Table:
    """A soft-label table at one version. Opening reads the log, not the data.

    Every commit of ours records what the version that it makes holds, and opening checks that: a
    damaged log or checkpoint is an IntegrityError, not a table with other rows. A version that an
    earlier release or another engine (Spark's OPTIMIZE) made has no record. It is checked against
    the nearest recorded version before it and what was committed since, as far as 16 versions
    back; beyond that only a tag's digest can tell. The next commit of ours records again.
    """

    def __init__(self, root: Root, delta: DeltaTable, before: "Table | None" = None) -> None:
        """The version of a handle.

        Args:
            root: of the table.
            delta: the handle, which is this object's from now on.
            before: an older version, so that only what is new since is read.

        Raises:
            IntegrityError: it is no table of ours, is of a newer format, or its log is damaged.
        """
        self.root = root
        self.version = int(delta.version())
        self._handle: DeltaTable | None = delta
        properties = delta.metadata().configuration
        shards.check_format_version(properties.get(FORMAT_PROPERTY), f"table {root.uri!r}")
        try:
            self.contents = Contents.model_validate_json(commits.contents_of(delta) or "")
        except ValidationError as error:
            raise IntegrityError(f"table {root.uri!r} has no readable contents record") from error
        fields = pa.schema(delta.schema().to_arrow())
        self.schema = pa.schema([field.remove_metadata() for field in fields])
        """Arrow schema of its rows."""
        known = before._by_path if before else None
        self._by_path: dict[str, TableFile] = state.files_of(root, delta, known)
        self.files = tuple(self._by_path.values())
        """Its data files, by path (units of a run in order)."""
        tally = before._tally if before else None
        self._tally: records.Tally = state.tally_of(self._by_path, known, tally)
        self._record, entry = state.check(root, delta, self._by_path, self._tally)
        if before and "_keys" in before.__dict__:
            self._keys = before._keys.later(root, entry, self._record)

    @classmethod
    def open(cls, reference: str) -> Self:
        """The table at `reference`: TABLE, TABLE@tag or TABLE@version.

        Raises:
            BadInputError: there is no such table, tag or version, or the version was vacuumed.
            TryAgainError: the version is being vacuumed.
            IntegrityError: its format is newer, its log is damaged, or the tag's snapshot is not
                what was tagged.
        """
        uri, mark = parse_reference(reference)
        root = table_root(uri)
        tag: Tag | None = None
        if mark is not None and not (mark.isascii() and mark.isdecimal()):
            tag = read_tag(root, mark)
        version = tag.version if tag else int(mark) if mark else None
        table = cls(root, open_delta(root, version))
        if version is not None:
            table._handle = None
            require_open(root, version, tuple(f.path for f in table.files) if tag else None)
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
        root = table_root(uri)
        require_exclusive_create(root)
        try:
            delta = open_delta(root, None)
        except BadInputError:
            properties = _PROPERTIES | {
                FORMAT_PROPERTY: str(FORMAT_VERSION),
                CONTENTS_PROPERTY: contents.model_dump_json(),
            }
            columns = Schema.from_arrow(schema)
            record = records.empty_table(columns, properties)
            delta = create_delta(root, columns, properties, record.texts({}))
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

    def files_since(self, older: "Table") -> tuple[TableFile, ...]:
        """Files of this version that an older one of the same table does not hold, by path.

        For bookkeeping commit by commit: what was looked at in `older` need not be again. It
        compares names only, about a millisecond for 10,000 files.
        """
        new = self._by_path.keys() - older._by_path.keys()
        return tuple(self._by_path[path] for path in sorted(new))

    def latest(self) -> Self:
        """The same table at its newest version, itself when it is that; reads only what is new."""
        delta, self._handle = self._handle, None
        delta = bring_up_to_date(self.root, delta) if delta else open_delta(self.root, None)
        if int(delta.version()) == self.version:
            self._handle = delta
            return self
        return type(self)(self.root, delta, self)

    def at(self, version: int) -> Self:
        """The same table at another version, also at one that vacuum has closed."""
        table = type(self)(self.root, open_delta(self.root, version))
        table._handle = None  # delta-rs would catch up from there version by version
        return table

    def committed(self, key: str) -> bool:
        """Whether a unit's key is in the log up to this version.

        Raises:
            IntegrityError: the log's keys are not those that were recorded.
        """
        return key in self._keys.held

    def uncommitted(self, keys: frozenset[str]) -> frozenset[str]:
        """Those of `keys` that are not in the log up to this version, as `committed`."""
        return keys - self._keys.held

    def history(self) -> list[dict[str, Any]]:
        """Commits, newest first: version, timestamp (ms), operation, run, change.

        The last two are a RunLineage and a ChangeLineage, or None. Each is checked against the
        record beside it.

        Raises:
            IntegrityError: an entry of the log is damaged.
        """
        return commits_of(self.root, self.version)

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
            new = (schema, contents)
            commits.replace(newest._delta, newest._state, all_units, newest.files, said, new)

        return self._commit(units, lineage, unchanged, replace_all)

    def change(
        self,
        added: Sequence[UnitShard],
        removed: Sequence[TableFile],
        lineage: ChangeLineage,
        *,
        like: "Table | None" = None,
        guard: Callable[["Table"], None] = lambda _: None,
    ) -> Self:
        """Takes `removed` out and puts `added` in, in one commit; returns the version made.

        Files that others add meanwhile stay. Exactly once by `lineage.change_id`: where that is in
        the log already, nothing is done. A file cannot be both removed and added.

        Args:
            added: files that are stored already; their keys do not matter.
            removed: files of this version.
            lineage: what the log says of it.
            like: a version whose schema and contents become the new version's. Where they are not
                those of the newest one, all its files must be among `removed`.
            guard: called with the newest version before each attempt; raises to give up.

        Raises:
            MismatchError: the newest version does not hold one of `removed`, or is of other
                contents, or (`like`) holds more.
            TryAgainError: the race was lost too often, or storage does not answer.
        """
        wanted = like or self
        said = (wanted.schema, wanted.contents)
        gone = {file.path for file in removed}

        def possible(newest: Table) -> None:
            held = newest._by_path.keys()
            alike = (newest.schema, newest.contents) == said
            lost = sorted(gone - held)
            if lost or (not alike and (like is None or held != gone)):
                raise MismatchError(
                    f"table {self.root.uri!r} was at version {self.version} and is at "
                    f"{newest.version} now, "
                    + (f"without {lost[0]!r}" if lost else "with other contents or files")
                    + ": it was changed meanwhile, and nothing was done; run the command again"
                )
            guard(newest)

        def change_all(newest: Table, _: Sequence[UnitShard], __: object) -> None:
            alike = (newest.schema, newest.contents) == said
            new = None if alike else said
            commits.change(newest._delta, newest._state, added, removed, lineage, new)

        key = UnitShard(lineage.key, None, 0, 0, {})
        return self._commit([key], lineage, possible, change_all, added)

    def _commit(
        self,
        units: Sequence[UnitShard],
        lineage: Any,
        guard: Callable[["Table"], None],
        attempt_once: Callable[["Table", Sequence[UnitShard], Any], None],
        added: Sequence[UnitShard] | None = None,
    ) -> Self:
        def missing(newest: Table) -> dict[str, UnitShard]:
            # By key: a unit given twice is one unit.
            return {unit.key: unit for unit in units if not newest.committed(unit.key)}

        def attempt(newest: Table) -> None:
            left = missing(newest)
            newest._require_new(left.values() if added is None else added)
            said = commits.narrowed(lineage, left)
            without_panics(self.root, lambda: attempt_once(newest, list(left.values()), said))

        what = f"commit {len(units)} units to"
        return until_done(
            self.root, what, self.latest, lambda newest: not missing(newest), guard, attempt
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
        commits.append(self._delta, self._state, units, lineage)

    @property
    def _delta(self) -> DeltaTable:
        # The handle goes on with the newest version; an older one opens its own again.
        if self._handle is None:
            self._handle = open_delta(self.root, self.version)
        return self._handle

    @property
    def _state(self) -> records.State:
        """What this version holds, for the record of the next."""
        return state.state_of(self._delta, self._tally, self._keys.tally)

    @cached_property
    def _keys(self) -> state.Keys:
        return state.Keys.read(self.root, self.version, self._record)

    def _require_new(self, units: Iterable[UnitShard]) -> None:
        paths = [unit.path for unit in units if unit.path is not None]
        times = Counter(paths)
        held = next((p for p in paths if p in self._by_path or times[p] > 1), None)
        if held is not None:
            raise IntegrityError(
                f"file {held!r} would be twice in table {self.root.uri!r}: it is in version "
                f"{self.version} already, or was given twice; nothing was done"
            )

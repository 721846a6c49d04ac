"""Publish: one version of a table, copied whole to another place, with what is known of its labels.

The place may be a store on which nobody can commit, for it overwrites objects that must not exist
yet: it is only ever copied to. Data files come first, each checked after it has arrived. The Delta
log is made in a folder of this machine and uploaded last, of a new table its entry 0 last of all:
until then there is no table there for readers, or the version that was published before.

A place holds versions of one table: the newest there must be one that was published, of the same.
"""

import importlib.metadata
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from softlabels.errors import IntegrityError, TryAgainError
from softlabels.fingerprint import sha256_json
from softlabels.lineage import ChangeLineage
from softlabels.signals import stop_on_signal
from softlabels.storage import Root
from softlabels.store import deleted, files, tags
from softlabels.store.ahead import work_ahead
from softlabels.store.copies import (
    holds,
    mirrored,
    place_of,
    require_free_tag,
    require_older,
    sizes_at,
)
from softlabels.store.entries import FOLDER as LOG
from softlabels.store.origin import origin_of
from softlabels.store.returning import find_returning
from softlabels.store.rewriting import read_checked
from softlabels.store.table import Table, TableFile

AHEAD_BYTES = 256 * 2**20
ATTEMPTS = 3
"""Times that it looks again because another publish was at the same place."""


@dataclass
class Published:
    """What a publish did, or would do.

    Attributes:
        source: URI of the table.
        source_version: that is published.
        target: URI of the copy.
        version: of the copy that holds it; None where none does yet.
        rows: of it.
        files: of it, `bytes` in all.
        copied: files that were not there, `copied_bytes` of them.
        new: whether this call made the version.
        snapshot_digest: of both.
        tag: at the copy, made or there before.
        deleted_rows: of the version, that were deleted from the table since.
        seconds: time it took.
    """

    source: str
    source_version: int
    target: str
    version: int | None
    rows: int
    files: int
    bytes: int
    copied: int = 0
    copied_bytes: int = 0
    new: bool = False
    snapshot_digest: str = ""
    tag: str | None = None
    deleted_rows: int = 0
    seconds: float = 0.0


@dataclass
class Watching:
    """Callbacks that show how far it is: bytes to look at or copy, more were."""

    planned: Callable[[int], None] = lambda size: None
    done: Callable[[int], None] = lambda size: None


def plan_publish(source: Table, uri: str, tag: str | None = None) -> Published:
    """What `publish` would do; nothing is.

    Raises:
        As `publish`, where it can be known.
    """
    target = place_of(source, uri)
    require_free_tag(target, source, tag)
    with tempfile.TemporaryDirectory(prefix="softlabels-publish-") as folder:
        there = mirrored(target, folder)
        report = _report(source, target, there)
        if there is not None and report.version is None:
            require_older(there, source, target.uri)
        # Files that wait there uncommitted are compared when it is done.
        sizes = sizes_at(target)
        for file in source.files:
            if sizes.get(file.path) != file.size:
                report.copied += 1
                report.copied_bytes += file.size
    report.tag = tag
    return report


def publish(
    source: Table, uri: str, tag: str | None = None, watching: Watching | None = None
) -> Published:
    """Copies a version; where it is there already, only what is missing of it.

    Called again after a stop it goes on.

    Args:
        source: the version.
        uri: a folder of any kind that fsspec can write to.
        tag: a name to give the version there.
        watching: told how far it is.

    Raises:
        BadInputError: the place is the table's own, the tag is taken, or a newer version of the
            table is published there.
        MismatchError: another table is there, or the copy was changed by others.
        IntegrityError: a file is not as it was committed, or did not arrive whole.
        StorageError: something cannot be read or written.
        TryAgainError: it was told to stop, storage does not answer, or another publish was at it.
    """
    began = time.monotonic()
    watching = watching or Watching()
    target = place_of(source, uri)
    require_free_tag(target, source, tag)
    with stop_on_signal() as stopped:
        job = _Job(source, target, watching, stopped)
        for _ in range(ATTEMPTS):
            report = job.run()
            if report is not None:
                break
        else:
            raise TryAgainError(
                f"another publish is writing to {target.uri!r}: run the command again"
            )
    if tag is not None:
        assert report.version is not None
        report.tag = tags.make_tag(target, tag, report.version, report.snapshot_digest).name
    report.seconds = round(time.monotonic() - began, 3)
    return report


@dataclass
class _Job:
    """A version on its way to another place."""

    source: Table
    target: Root
    watching: Watching
    stopped: Callable[[], bool]
    copied: int = 0
    copied_bytes: int = 0

    def run(self) -> Published | None:
        """Copies, then commits; None where another was quicker and it must look again."""
        began, clock = datetime.now(UTC), time.monotonic()
        with tempfile.TemporaryDirectory(prefix="softlabels-publish-") as folder:
            there = mirrored(self.target, folder)
            report = _report(self.source, self.target, there)
            done = report.version is not None
            if there is not None and not done:
                require_older(there, self.source, self.target.uri)
            self._copy(there)
            deleted.copy_lists(self.source.root, self.target)
            if not done:
                before = set(os.listdir(Path(folder) / LOG)) if there else set()
                made = self._commit(folder, there, began, clock)
                if not self._upload(Path(folder) / LOG, before, made.version):
                    return None
                report.version, report.new = made.version, True
        report.copied, report.copied_bytes = self.copied, self.copied_bytes
        return report

    def _copy(self, there: Table | None) -> None:
        """Brings every data file of the version to the target, and looks at what arrived."""
        sizes = sizes_at(self.target)
        trusted = {file.path for file in there.files} if there else set()
        wanted = [
            file
            for file in self.source.files
            if file.path not in trusted or sizes.get(file.path) != file.size
        ]
        self.watching.planned(sum(file.size for file in wanted))

        def bring(file: TableFile) -> bool:
            if sizes.get(file.path) == file.size and self._arrived(file):
                return False
            data = read_checked(self.source.root, file)
            self.target.write(file.path, memoryview(data))
            read_checked(self.target, file)
            return True

        held = lambda file: 2 * file.size  # noqa: E731 - what is written and what is read back
        for file, copied in work_ahead(wanted, bring, held, AHEAD_BYTES):
            self.copied += copied
            self.copied_bytes += file.size if copied else 0
            self.watching.done(file.size)
            if self.stopped():
                raise TryAgainError(
                    f"stopped by a signal: {self.copied} files were copied, nothing is published "
                    "yet; run the same command to go on"
                )

    def _arrived(self, file: TableFile) -> bool:
        """Whether a file that is there is the one that is wanted."""
        try:
            read_checked(self.target, file)
        except IntegrityError:
            return False
        return True

    def _commit(self, folder: str, there: Table | None, began: datetime, clock: float) -> Table:
        """The copy's new version, as a log in a folder of this machine."""
        source = self.source
        origin = origin_of(source)
        standing = there or Table.open_or_create(folder, source.schema, source.contents)
        wanted = {file.path for file in source.files}
        held = {file.path for file in standing.files}
        lineage = ChangeLineage(
            operation="publish",
            change_id=sha256_json(
                {
                    "operation": "publish",
                    "source": origin["source"],
                    "onto": standing.version,
                }
            ),
            from_version=standing.version,
            arguments=origin,
            rows_before=standing.num_rows,
            rows_after=source.num_rows,
            packages={n: importlib.metadata.version(n) for n in ("softlabels", "deltalake")},
            started_at=began.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 3),
        )
        added = [files.readded(file) for file in source.files if file.path not in held]
        removed = [file for file in standing.files if file.path not in wanted]
        return standing.change(added, removed, lineage, like=source)

    def _upload(self, log: Path, before: set[str], version: int) -> bool:
        """Makes the log's new entries seen, the deciding one last; whether it was this call's."""
        new = sorted(set(os.listdir(log)) - before)
        entries = [name for name in new if name.endswith(".json")]
        # A checkpoint of a version that does not exist yet is read by nobody.
        for name in (name for name in new if ".checkpoint" in name):
            self.target.write(f"{LOG}/{name}", (log / name).read_bytes())
        *earlier, deciding = sorted(entries, reverse=True)
        for name in earlier:
            # Of a table that does not exist before its entry 0 does; what is there was left by
            # another attempt.
            self.target.write(f"{LOG}/{name}", (log / name).read_bytes())
        data = (log / deciding).read_bytes()
        if not self.target.create(f"{LOG}/{deciding}", data):
            return False
        for name in entries:
            if self.target.read(f"{LOG}/{name}") != (log / name).read_bytes():
                raise TryAgainError(
                    f"another publish wrote to {self.target.uri!r} at the same time: run the "
                    f"command again to see that version {version} there is the right one"
                )
        hint = log / "_last_checkpoint"
        if hint.exists():
            self.target.write(f"{LOG}/{hint.name}", hint.read_bytes())
        return True


def _report(source: Table, target: Root, there: Table | None) -> Published:
    same = there is not None and holds(there, source, target.uri)
    return Published(
        source=source.root.uri,
        source_version=source.version,
        target=target.uri,
        version=there.version if there is not None and same else None,
        rows=source.num_rows,
        files=len(source.files),
        bytes=sum(file.size for file in source.files),
        snapshot_digest=source.snapshot_digest,
        deleted_rows=find_returning(source, source.latest()).num_rows,
    )

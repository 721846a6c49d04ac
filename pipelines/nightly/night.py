"""One night's steps: partition, capture, verify, tag, mix; each is done once, however often run.

What is done is read from the table, its tags and the plan; there is no other state. A night that
was killed goes on at the step that it was in.
"""

import posixpath
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np

from pipelines.nightly.spec import NightSpec
from softlabels.errors import (
    BadInputError,
    DataError,
    IntegrityError,
    MismatchError,
    TryAgainError,
    counted,
)
from softlabels.plan import Plan
from softlabels.query.mix import mix, pin
from softlabels.query.recipe import Recipe
from softlabels.specs import validate
from softlabels.storage import find_files, open_root
from softlabels.store import tags
from softlabels.store.closed import require_open
from softlabels.store.inspect import verify
from softlabels.store.lifetimes import read_lifetimes
from softlabels.store.returning import find_returning, rows_lacking
from softlabels.store.table import Table, TableFile
from softlabels.teacher.capture import capture
from softlabels.teacher.spec import CaptureSpec, SequenceCaptureSpec, read_capture

PLACE = "{date}"
"""What stands for the day in `source.files` and in the recipe."""

_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass(frozen=True)
class Night:
    """One day's job, with its date put in everywhere.

    Attributes:
        day: "2024-02-29"; also the tag.
        capture: labels the day's partition.
        recipe: reads the table at the day's tag.
        plan: where the plan goes.
        marker: file that must be in the partition's folder; none: none.
    """

    day: str
    capture: CaptureSpec | SequenceCaptureSpec
    recipe: Recipe
    plan: str
    marker: str | None


@dataclass(frozen=True)
class NightReport:
    """What a night made, or had made before: the same values for the same day.

    Attributes:
        day: the date.
        made: whether this call made any of it.
        table: URI.
        version: that the tag names.
        tag: the day's.
        rows: that the day's run labelled.
        table_rows: of the version.
        bytes: of the version's files.
        entropy: mean of the day's rows, nats; null where files hold other rows too, or not all.
        plan: where it is.
        plan_rows: rows an epoch.
        fingerprint: of the plan.
        seconds: that this call took.
    """

    day: str
    made: bool
    table: str
    version: int
    tag: str
    rows: int
    table_rows: int
    bytes: int
    entropy: float | None
    plan: str
    plan_rows: int
    fingerprint: str
    seconds: float = 0.0


class DamagedError(IntegrityError):
    """A version did not pass `verify`: it gets no tag. `report` is what `verify` returned."""

    def __init__(self, message: str, report: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.report = report


def night_of(spec: NightSpec, day: date) -> Night:
    """The job of one day.

    Raises:
        BadInputError: the day is before the first; a spec is wrong; {date} is missing where it
            must be.
    """
    if day < spec.first:
        raise BadInputError(f"there is no day {day.isoformat()!r}: the first is {spec.first}")
    text = day.isoformat()
    job = read_capture(spec.capture)
    if PLACE not in job.source.files:
        raise BadInputError(
            f"{spec.capture}: source.files is {job.source.files!r}: expected {PLACE} in it, "
            "which stands for the day"
        )
    recipe = Recipe.read(spec.recipe)
    wanted = f"{job.table}@{PLACE}"
    if not any(wanted in source.references.values() for source in recipe.sources.values()):
        raise BadInputError(
            f"{spec.recipe}: no source reads {wanted!r}, the capture's table at the day's tag"
        )
    files = job.source.files.replace(PLACE, text)
    return Night(
        day=text,
        capture=job.model_copy(update={"source": job.source.model_copy(update={"files": files})}),
        recipe=validate(Recipe, _dated(_plain(recipe), text), spec.recipe),
        plan=posixpath.join(spec.plans, f"plan-{text}.parquet"),
        marker=spec.marker,
    )


def run_night(
    night: Night,
    say: Callable[[str], None] = lambda line: None,
    stopped: Callable[[], bool] = lambda: False,
) -> NightReport:
    """Does what is not done yet of one day.

    Args:
        night: the day.
        say: told what each step did, a line each.
        stopped: asked between steps whether to stop.

    Raises:
        TryAgainError: the partition is not there or not whole yet, it was told to stop, or storage
            does not answer: the same call later goes on.
        DamagedError: the version does not pass `verify`; it gets no tag.
        DataError: the day is done and files came to its partition since, or a rollback has taken
            rows of earlier days out.
        MismatchError: the day's rows were rolled back before they had a tag, or another plan is in
            the place of its own.
    """
    began = time.monotonic()
    done = finished(night)
    if done is not None:
        say(f"{night.day} is done: version {done.version}, {done.plan}")
        return replace(done, seconds=round(time.monotonic() - began, 3))

    def go_on() -> None:
        if stopped():
            raise TryAgainError(f"{night.day}: stopped by a signal; the same command goes on")

    version = tagged_version(night)
    if version is None:
        require_partition(night)
        require_earlier_rows(night)
        report = capture(night.capture)
        say(f"{night.day} capture: {report.rows} rows labelled, {report.units} units")
        go_on()
        newest = Table.open(night.capture.table)
        first = version_of(newest, report.run_id)
        version = without_deleted(newest, first)
        if version != first:
            say(
                f"{night.day}: versions before {version} hold rows that were deleted since, or "
                "were vacuumed; what later days added up to it is in its tag too"
            )
        if later := later_days(newest, night.day, version):
            say(f"{night.day}: done after {', '.join(later)}, whose rows are in its tag too")
        tag_verified(night, version, go_on)
        say(f"{night.day} verify, tag: version {version}")
    go_on()
    plan = freeze(night)
    say(f"{night.day} mix: {plan.num_rows} rows an epoch, {night.plan}")
    made = finished(night)
    assert made is not None  # the tag and the plan are there now
    return replace(made, made=True, seconds=round(time.monotonic() - began, 3))


def require_partition(night: Night) -> None:
    """Raises TryAgainError unless the day's files are there and said to be whole."""
    pattern = night.capture.source.files
    if night.marker is not None:
        folder = posixpath.dirname(pattern)
        if any(sign in folder for sign in "*?["):
            raise BadInputError(
                f"source.files {pattern!r} is no folder a day, so where is {night.marker!r}? Say "
                "marker: null, or let only the file's name have wildcards"
            )
        if not open_root(folder).exists(night.marker):
            raise TryAgainError(
                f"the partition of {night.day} is not whole yet: there is no "
                f"{posixpath.join(folder, night.marker)!r}; run the same command later"
            )
    if _matches(pattern) == 0:
        raise TryAgainError(
            f"the partition of {night.day} is not there yet: no file matches {pattern!r}; run the "
            "same command later"
        )


def require_earlier_rows(night: Night) -> None:
    """Raises DataError where a rollback has taken rows of the day before out again.

    The day's plan is to hold all rows up to it. What was deleted is no loss.
    """
    root = open_root(night.capture.table)
    named = [name for name in tags.tag_names(root) if _DAY.fullmatch(name)]
    before = max((name for name in named if name < night.day), default=None)
    if before is None:
        return
    newest, version = Table.open(night.capture.table), tags.read_tag(root, before).version
    changes = ((c["version"], c["change"]) for c in newest.history() if c["change"] is not None)
    back = [made for made, c in changes if made > version and c.operation == "rollback"]
    if back and (lacking := rows_lacking(Table.open(f"{root.uri}@{before}"), newest)):
        raise DataError(
            f"{counted(lacking, 'example')} of {root.uri}@{before} went by the rollback at version "
            f"{back[0]}: roll back to {before}, or delete that tag if its day shall be without them"
        )


def version_of(table: Table, run_id: str) -> int:
    """The version that has a run's rows and nothing of later runs.

    It is that of the run's last commit, or of the last delete or compact that followed directly.
    (A rollback that takes the day's rows away is refused by `capture`.)

    Raises:
        MismatchError: the run has no commit.
    """
    version = None
    for commit in reversed(table.history()):
        run = commit["run"]
        if run is not None and run.run_id == run_id:
            version = commit["version"]
        elif run is not None and version is not None:
            break
        elif commit["change"] is not None and version is not None:
            version = commit["version"]
    if version is None:
        raise MismatchError(f"no commit of {table.root.uri!r} is of run {run_id!r}")
    return int(version)


def without_deleted(newest: Table, first: int) -> int:
    """The earliest version from `first` on that can be opened and has no row that was deleted."""
    version, life = first, read_lifetimes(newest.root, newest.version)
    while version < newest.version:
        try:
            require_open(newest.root, version)
        except BadInputError:  # vacuumed
            version += 1
            continue
        held = find_returning(newest.at(version), newest).rows
        if not held:
            return version
        lasts = [span.last for path in held for span in life.spans[path] if span.last is not None]
        version = 1 + min(last for last in lasts if last >= version)
    return newest.version


def later_days(newest: Table, day: str, version: int) -> list[str]:
    """Days after `day` that were tagged on this version or earlier ones."""
    days = (tag for tag in tags.all_tags(newest.root) if _DAY.fullmatch(tag.name))
    return sorted(tag.name for tag in days if tag.name > day and tag.version <= version)


def tag_verified(night: Night, version: int, go_on: Callable[[], None] = lambda: None) -> None:
    """Gives a version the day's tag, if every file of it is whole.

    Raises:
        DamagedError: it is not.
    """
    table = Table.open(f"{night.capture.table}@{version}")
    report = verify(table, go_on)
    if report["problems"]:
        raise DamagedError(
            f"version {version} of {table.root.uri!r} gets no tag {night.day!r}, verify found "
            f"{counted(len(report['problems']), 'problem')}: {report['problems'][0]}",
            report,
        )
    tags.make_tag(table.root, night.day, version, table.snapshot_digest)


def freeze(night: Night) -> Plan:
    """Mixes the day's plan, writes it unless it is there, and pins the versions that it reads.

    Raises:
        MismatchError: another plan is in its place.
    """
    plan = mix(night.recipe)
    if _exists(night.plan):
        found = Plan.read(night.plan).fingerprint
        if found != plan.fingerprint:
            raise MismatchError(
                f"{night.plan!r} holds another plan, {found[:16]!r}; the recipe gives "
                f"{plan.fingerprint[:16]!r}: move the old one away"
            )
    else:
        plan.write(night.plan)
    pin(plan)
    return plan


def tagged_version(night: Night) -> int | None:
    """The version that the day's tag names; None where there is no such tag or table."""
    root = open_root(night.capture.table)
    if night.day not in tags.tag_names(root):
        return None
    return tags.read_tag(root, night.day).version


def finished(night: Night) -> NightReport | None:
    """What the day made; None while its tag, its plan or the plan's pins are missing.

    Raises:
        DataError: files came to the partition since.
        IntegrityError: the plan is damaged, or the tag is not of what was tagged.
    """
    if tagged_version(night) is None or not _exists(night.plan):
        return None
    plan = Plan.read(night.plan)
    table = Table.open(f"{night.capture.table}@{night.day}")
    pinned = f"plan-{plan.fingerprint[:16]}"
    if not any(name.startswith(pinned) for name in tags.tag_names(table.root)):
        return None
    runs = [c["run"] for c in table.history() if c["run"] is not None]
    pattern = night.capture.source.files
    mine = [run for run in runs if run.spec.get("source", {}).get("files") == pattern]
    _require_no_late_files(night, [run.source["files"] for run in mine])
    prefixes = {run.run_id[:16] for run in mine}
    rows = sum(run.num_rows for run in mine)
    files = [f for f in table.files if f.unit[:16] in prefixes and not f.compacted]
    whole = rows > 0 and sum(file.num_rows for file in files) == rows
    return NightReport(
        day=night.day,
        made=False,
        table=table.root.uri,
        version=table.version,
        tag=night.day,
        rows=rows,
        table_rows=table.num_rows,
        bytes=sum(file.size for file in table.files),
        entropy=_mean(table, files) if whole else None,
        plan=night.plan,
        plan_rows=plan.num_rows,
        fingerprint=plan.fingerprint,
    )


def _mean(table: Table, files: Sequence[TableFile]) -> float:
    """Mean entropy of the rows of `files`, nats."""
    values = [batch["entropy"].to_numpy() for batch in table.batches(["entropy"], files)]
    return round(float(np.concatenate(values).mean(dtype=np.float64)), 6)


def _require_no_late_files(night: Night, counts: list[int]) -> None:
    """Raises DataError where the partition has more files than were labelled."""
    there = _matches(night.capture.source.files)
    # A partition that was cleared away after it was labelled is no fault.
    if counts and there > max(counts):
        raise DataError(
            f"{night.day} is done with {max(counts)} files, and its partition has {there} now: "
            "what comes late belongs to the partition of another day"
        )


def _matches(pattern: str) -> int:
    try:
        return len(find_files(pattern)[1])
    except BadInputError as error:
        if "no file matches" in str(error):
            return 0
        raise


def _exists(path: str) -> bool:
    folder, name = posixpath.split(path)
    return open_root(folder or ".").exists(name)


def _plain(recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = recipe.model_dump(by_alias=True, exclude_unset=True)
    return found


def _dated(value: Any, day: str) -> Any:
    """`value` with the day in the place of {date} in every text."""
    if isinstance(value, str):
        return value.replace(PLACE, day)
    if isinstance(value, Mapping):
        return {name: _dated(inner, day) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_dated(inner, day) for inner in value]
    return value

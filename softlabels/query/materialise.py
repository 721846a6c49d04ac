"""One table made of an ensemble's tables, where their mixture is known exactly.

    profile: precise
    ensemble:
      resnet: {table: out/resnet@v1, weight: 2}
      vit: out/vit@v3

Rows are those that all teachers hold, in the first one's order, with its columns. As in a capture,
units of rows are committed under keys of the run, so that the same call again goes on where it
stopped. Rows are read a chunk at a time: once to see that all of them are exact, which is skipped
where all teachers store all classes, and once to be written.
"""

import importlib.metadata
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from softlabels.errors import BadInputError, MismatchError, RecipeMismatchError, TryAgainError
from softlabels.fingerprint import sha256_json
from softlabels.lineage import Contents, Parent, RunLineage, TeacherLineage
from softlabels.query.ensemble import Aligned, align, check_members
from softlabels.query.gathering import Chunk, Chunks, UnitWriter
from softlabels.query.members import Member
from softlabels.query.mixture import Unknown, first_unknown, mix_targets, width
from softlabels.schema import FORMAT_VERSION, table_schema
from softlabels.signals import stop_on_signal
from softlabels.specs import load_spec
from softlabels.store.table import Table, UnitShard, parse_reference
from softlabels.targets import SoftTargets

ROWS_PER_UNIT = 50_000
SEQUENCES_PER_UNIT = 2_000
"""As a capture's shards."""

_PACKAGES = ("softlabels", "numpy", "pyarrow", "deltalake", "duckdb")


class EnsembleSpec(BaseModel):
    """Which teachers become one table.

    Attributes:
        ensemble: the teachers by name, the first one first: rows, labels and carried columns are
            its.
        name: what people call the mixture; null: the teachers' names, joined.
        profile: the value profile of the new table.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ensemble: Mapping[str, Member] = Field(min_length=2)
    name: str | None = None
    profile: Literal["compact", "precise"] = "precise"

    @field_validator("name")
    @classmethod
    def _some(cls, name: str | None) -> str | None:
        if name is not None and not name.strip():
            raise ValueError("expected a name or null")
        return name

    @classmethod
    def read(cls, path: str | os.PathLike[str], changes: Sequence[str] = ()) -> Self:
        """The spec in a YAML file; `changes` are "dotted.key=value" texts that win over it."""
        return load_spec(path, cls, changes)


@dataclass
class Materialised:
    """What a call of `materialise` did, or would do.

    Attributes:
        table: URI of the table; version of it now, None where it is not made.
        run_id: of the run.
        k: ids a position; None where all was there already.
        rows: that this call wrote; `already` those that the table held before.
        dropped: rows of the first teacher left out, by reason.
        units: of the run; `committed` by this call.
        seconds: time it took.
    """

    table: str
    version: int | None
    run_id: str
    k: int | None = None
    rows: int = 0
    already: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    units: int = 0
    committed: int = 0
    seconds: float = 0.0


@dataclass
class Watching:
    """Callbacks that show how far it is: more rows were checked, more were written."""

    checked: Callable[[int, int], None] = lambda rows, total: None
    written: Callable[[int, int], None] = lambda rows, total: None


def materialise(
    spec: EnsembleSpec, output: str, watching: Watching | None = None, dry_run: bool = False
) -> Materialised:
    """Makes the table `output` of the teachers' mixture, or goes on with it.

    All rows are looked at before anything is written.

    Args:
        spec: the teachers.
        output: where the table is, or will be.
        watching: told how far it is.
        dry_run: only look whether it can be done.

    Raises:
        BadInputError: a member, a weight or `output` cannot be meant; RecipeMismatchError where
            tables are not of one label space or do not store a temperature.
        MismatchError: the mixture is not exact, or `output` holds something else.
        TryAgainError: it was told to stop; the same call goes on.
    """
    began = time.monotonic()
    if parse_reference(output)[1] is not None:
        raise BadInputError(f"{output!r}: expected a table, not one version of it (TABLE@...)")
    watching = watching or Watching()
    tables = {name: Table.open(member.table) for name, member in spec.ensemble.items()}
    try:
        check_members(tables, spec.ensemble)
    except MismatchError as error:
        raise RecipeMismatchError(str(error)) from error
    for name, table in tables.items():
        _require_tails(name, table)
    with stop_on_signal() as stopped:
        job = _Job(spec, tables, align(tables, spec.ensemble))
        report = job.run(output, watching, stopped, dry_run)
    report.seconds = round(time.monotonic() - began, 3)
    return report


class _Job:
    """An ensemble on its way into a table."""

    def __init__(self, spec: EnsembleSpec, tables: Mapping[str, Table], aligned: Aligned) -> None:
        self._spec = spec
        self._tables = tables
        self._aligned = aligned
        self._first = next(iter(tables.values()))
        self._sequences = self._first.contents.alignment is not None

    def run(
        self, output: str, watching: Watching, stopped: Callable[[], bool], dry_run: bool
    ) -> Materialised:
        """Looks at all rows, then writes the units that are not there yet."""
        try:
            table: Table | None = Table.open(output)
        except BadInputError:
            table = None
        report = Materialised(output, None, self.id, units=len(self.units))
        report.dropped = dict(self._aligned.dropped)
        if not self.units:
            reasons = ", ".join(f"{count} {why}" for why, count in report.dropped.items() if count)
            raise BadInputError(f"the ensemble is left without rows: {reasons or 'no rows'}")
        if table is not None:
            self._require_own(table)
        if table is not None and all(table.committed(key) for key, _ in self.units):
            return self._done(report, table)
        report.k = self._survey(watching, stopped)
        if dry_run:
            return report
        contents = self.contents(report.k)
        table = Table.open_or_create(output, self.schema, contents)
        self._require_own(table)
        for number, (key, name) in enumerate(self.units):
            if not table.committed(key):
                table = self._unit(table, number, name, key, report, watching, stopped)
        return self._done(report, table)

    def _unit(
        self,
        table: Table,
        number: int,
        name: str,
        key: str,
        report: Materialised,
        watching: Watching,
        stopped: Callable[[], bool],
    ) -> Table:
        """Writes and commits one unit; the version that this makes."""
        started, before = datetime.now(UTC), time.monotonic()
        start, stop = self._range(number)
        metadata = {"softlabels.unit": name, "softlabels.rows": f"{start}:{stop}"}
        profile, k = self._spec.profile, table.contents.k
        writer = UnitWriter(self.schema, profile, self._sequences, metadata)
        for chunk in self._chunks.range(start, stop):
            if stopped():
                raise TryAgainError(
                    f"stopped by a signal: {report.committed} units were committed, run the same "
                    "command to go on"
                )
            writer.write(chunk, self._mixed(chunk, k))
            watching.written(len(chunk), len(self._aligned.first))
        stored = table.store_shard(key, name, writer.close())
        lineage = self._lineage(stored, name, started, time.monotonic() - before)
        made = table.commit([stored], lineage, self._require_own)
        # Another run of the same ensemble may have been first: its file is the unit's then.
        if any(file.path == stored.path for file in made.files):
            report.committed += 1
            report.rows += stored.num_rows
        return made

    @cached_property
    def id(self) -> str:
        """The run's id: the sha256 of the parents' content and what is made of it."""
        return sha256_json(
            {
                "format_version": FORMAT_VERSION,
                "members": self._members(),
                "profile": self._spec.profile,
                "rows": self._step,
            }
        )

    @cached_property
    def units(self) -> tuple[tuple[str, str], ...]:
        """(key, name) of each range of `_step` rows."""
        count = -(-len(self._aligned.first) // self._step)
        names = (f"{self.id[:16]}-{number:06d}" for number in range(count))
        return tuple((f"{self.id}/{name}", name) for name in names)

    @cached_property
    def schema(self) -> Any:
        """Of the new table: the first teacher's carried columns, no extra temperature."""
        carried = self._first.contents.carried
        return table_schema((), [self._first.schema.field(name) for name in carried])

    @cached_property
    def _chunks(self) -> Chunks:
        heat = {name: member.temperature for name, member in self._spec.ensemble.items()}
        return Chunks(self._tables, self._aligned, heat)

    @property
    def _step(self) -> int:
        return SEQUENCES_PER_UNIT if self._sequences else ROWS_PER_UNIT

    def contents(self, k: int) -> Contents:
        """What the new table says of itself."""
        members = self._spec.ensemble
        parents = tuple(
            Parent(
                name=name,
                snapshot_digest=self._tables[name].snapshot_digest,
                version=self._tables[name].version,
                teacher=self._tables[name].contents.teacher.name,
                weight=member.weight,
                by_class={str(label): weight for label, weight in member.by_class.items()},
                temperature=member.temperature,
            )
            for name, member in members.items()
        )
        first = self._first.contents
        templates = {table.contents.chat_template_sha256 for table in self._tables.values()}
        return Contents(
            teacher=TeacherLineage(
                name=self._spec.name or "+".join(members),
                kind="ensemble",
                code="softlabels:ensemble",
                arguments={"members": self._members()},
            ),
            num_classes=first.num_classes,
            classes=first.classes,
            tokenizer_sha256=first.tokenizer_sha256,
            chat_template_sha256=first.chat_template_sha256 if len(templates) == 1 else None,
            alignment=first.alignment,
            k=k,
            profile=self._spec.profile,
            carried=first.carried,
            example_ids=first.example_ids,
            parents=parents,
            augment=first.augment,
        )

    def _members(self) -> list[dict[str, Any]]:
        # By content: what people call the teachers decides nothing.
        return [
            {"labels": self._tables[name].snapshot_digest, **member.normalised()}
            for name, member in self._spec.ensemble.items()
        ]

    def _survey(self, watching: Watching, stopped: Callable[[], bool]) -> int:
        """K, once every row was seen to be exact."""
        classes = self._first.contents.num_classes
        if all(table.contents.k == classes for table in self._tables.values()):
            return classes  # all is stored of all
        found = 1
        total = len(self._aligned.first)
        for chunk in self._chunks.range(0, total, targets_only=True):
            if stopped():
                raise TryAgainError("stopped by a signal before anything was written")
            weights = chunk.weights
            unknown = first_unknown(chunk.teachers, weights)
            if unknown is not None:
                raise self._inexact(chunk, unknown)
            found = max(found, width(chunk.teachers, weights))
            watching.checked(len(chunk), total)
        return found

    def _mixed(self, chunk: Chunk, k: int) -> SoftTargets:
        mixed = mix_targets(chunk.teachers, chunk.weights, chunk.num_positions, chunk.labels, k)
        if isinstance(mixed, Unknown):
            raise self._inexact(chunk, mixed)
        mixed.check(chunk.names, self._first.contents.num_classes)
        return mixed

    def _inexact(self, chunk: Chunk, unknown: Unknown) -> MismatchError:
        name = list(self._tables)[unknown.teacher]
        return MismatchError(
            f"{chunk.place(unknown.position)}: class or token {unknown.token} is stored by another "
            f"teacher, not by {name!r}, which has a mass of {unknown.mass:.3g} outside its stored "
            "ids: how much of it that id has is not known, and one table would have to invent it; "
            "keep the teachers apart as an `ensemble:` of a recipe, which is unbiased with draws"
        )

    def _require_own(self, table: Table) -> None:
        mine = self.id[:16]
        other = next((f for f in table.files if not f.unit.startswith(mine)), None)
        if other is not None:
            raise MismatchError(
                f"table {table.root.uri!r} holds rows of run {other.unit[:16]!r}, this ensemble is "
                f"run {mine!r}: use another table"
            )

    def _done(self, report: Materialised, table: Table) -> Materialised:
        report.table, report.version = table.root.uri, table.version
        report.already = table.num_rows - report.rows
        return report

    def _range(self, number: int) -> tuple[int, int]:
        start = number * self._step
        return start, min(start + self._step, len(self._aligned.first))

    def _lineage(
        self, stored: UnitShard, name: str, started: datetime, seconds: float
    ) -> RunLineage:
        spec = self._spec.model_dump(mode="json")
        return RunLineage(
            run_id=self.id,
            units=(name,),
            num_rows=stored.num_rows,
            spec=spec,
            spec_sha256=sha256_json(spec),
            source={
                "tables": {
                    name: {"uri": table.root.uri, "version": table.version}
                    for name, table in self._tables.items()
                },
                "dropped": dict(self._aligned.dropped),
            },
            packages={name: importlib.metadata.version(name) for name in _PACKAGES},
            device="cpu",
            started_at=started.isoformat(timespec="seconds"),
            seconds=round(seconds, 3),
        )


def _require_tails(name: str, table: Table) -> None:
    recorded = table.contents.recorded
    if recorded is not None and recorded.tail == "unknown":
        raise MismatchError(
            f"member {name!r}: the tails of {table.root.uri!r} are unknown, as they were recorded: "
            "what its teacher has outside the stored ids must be known; keep it as an `ensemble:` "
            "of a recipe"
        )

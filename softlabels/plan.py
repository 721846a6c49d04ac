"""The plan: a frozen reading order over table versions, all that a student needs.

One Parquet file. Its rows say which row groups to read, which rows of them, how often and with
which loss weight; its metadata holds the recipe, each table's lineage and every file's checksums.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from softlabels.errors import BadInputError, IntegrityError, one_line
from softlabels.fingerprint import canonical_json, sha256_json
from softlabels.lineage import Contents
from softlabels.parquet import UNREADABLE, Parquet
from softlabels.plan_checks import check_entries, check_place, check_recipe, is_folder_name
from softlabels.plan_entries import (
    ENSEMBLE_ENTRIES,
    ENTRIES,
    MEMBERS,
    check_members,
    entries_digest,
    entries_table,
    join_entries,
    member_entries,
    member_weights,
    num_members,
)
from softlabels.rules import PositionRules
from softlabels.storage import Root, open_root, safe_relative

__all__ = [
    "ENSEMBLE",
    "ENTRIES",
    "FORMAT_VERSION",
    "POSITIONS",
    "Plan",
    "PlanFile",
    "PlanTable",
    "SourceReport",
    "ValueCount",
    "entries_table",
    "join_entries",
]

FORMAT_VERSION = 1
POSITIONS = "positions"
ENSEMBLE = "ensemble"
FEATURES: frozenset[str] = frozenset({POSITIONS, ENSEMBLE})
"""What this release can do beyond the plain plan; a plan that needs more is refused."""

_META = b"softlabels.plan"
_FOOTER_BYTES = 32 << 20
"""Of a plan's footer, which lists its files twice: some 50,000 of them."""

Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanFile(_Frozen):
    """A shard that the plan reads: path below its root, bytes, checksums, rows."""

    path: str
    size: Count
    sha256: str
    footer_sha256: str
    num_rows: Count


class PlanTable(_Frozen):
    """One table version: its name in the recipe, where it was, what it held, its files in use.

    `positions` are the rules of its positions, where it has any; the plan then lists the feature
    "positions". `temperature` is the one at which its targets are taken, which it stores: a loss at
    temperature T has them at `temperature` times T. Where it is not 1, the plan lists "ensemble".
    A version that is read by different rules or at different temperatures is several of a plan's
    tables.
    """

    name: str
    uri: str
    version: int
    snapshot_digest: str
    contents: Contents
    files: tuple[PlanFile, ...]
    positions: PositionRules | None = None
    temperature: FiniteFloat = Field(default=1.0, gt=0)


class ValueCount(_Frozen):
    """Rows and reads an epoch of one value that `balance` goes by, or of `others` values."""

    value: str | None
    rows: int
    reads: int
    others: int = 0


class SourceReport(_Frozen):
    """What became of one source of the recipe.

    Attributes:
        source: its name in the recipe.
        table: the PlanTable it reads.
        rows: rows of the table version.
        dropped: rows left out, by reason.
        kept: distinct rows in the plan.
        reads: rows an epoch, repeats counted.
        share_asked: of the epoch, 0 to 1; None when nothing was asked.
        share: of the epoch, as realised.
        loss_weight: of each row.
        positions: of the rows that came before position rules; None where there are none.
        positions_kept: of them, those that pass the rules.
        positions_unknown: of them, those that fail because a value is not known.
        chosen: of `kept`, how many are read of which teacher, where one is chosen for each row.
        values: rows and reads of the values of `balance`, the most frequent ones first.
    """

    source: str
    table: str
    rows: int
    dropped: Mapping[str, int]
    kept: int
    reads: int
    share_asked: float | None
    share: float
    loss_weight: float
    positions: int | None = None
    positions_kept: int | None = None
    positions_unknown: int | None = None
    chosen: Mapping[str, int] | None = None
    values: tuple[ValueCount, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """A reading order.

    Attributes:
        tables: by name.
        entries: ENTRIES rows, in plan order; ENSEMBLE_ENTRIES where rows have several teachers,
            which the feature "ensemble" says.
        recipe: what it was made from, table locations left out.
        report: what became of each source.
        features: what a reader must be able to do.
        location: where it was read from, for finding tables copied beside it.
    """

    tables: Mapping[str, PlanTable]
    entries: pa.Table
    recipe: Mapping[str, Any]
    report: tuple[SourceReport, ...] = ()
    features: tuple[str, ...] = ()
    location: str | None = None

    @property
    def num_rows(self) -> int:
        """Rows an epoch, repeats counted."""
        if not self.entries.num_rows:
            return 0
        last = self.entries.slice(self.entries.num_rows - 1).to_pylist()[0]
        return int(last["offset"] + last["num_rows"] * last["repeats"])

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the logical content: entries, recipe, what tables hold.

        Files count by their bytes, not by their names, and locations do not count: the same
        recipe on the same labels has the same fingerprint anywhere.
        """
        return sha256_json(
            {
                "format_version": FORMAT_VERSION,
                "features": sorted(self.features),
                "recipe": dict(self.recipe),
                "tables": [
                    {
                        "name": t.name,
                        "digest": t.snapshot_digest,
                        "contents": t.contents.digest(),
                        "files": sorted(
                            canonical_json(f.model_dump(exclude={"path"}, exclude_defaults=True))
                            for f in t.files
                        ),
                        **_added(t),
                    }
                    for t in sorted(self.tables.values(), key=lambda t: t.name)
                ],
                "entries": entries_digest(
                    self.entries,
                    {(t.name, f.path): f.sha256 for t in self.tables.values() for f in t.files},
                ),
            }
        )

    @property
    def num_members(self) -> int:
        """T, the most teachers that a row has; 1 without ensembles."""
        return num_members(self.entries)

    def member(self, slot: int) -> pa.Table | None:
        """What the teacher `slot` of each entry reads, as ENTRIES; None from `num_members` on.

        As many rows as `entries`, with `num_rows` 0 where an entry has no such teacher; row j of
        one is the example of row j of the entry, so that `rows` need not rise. Position rules are
        those of slot 0: its positions are taken of the others, whatever values they have there.
        """
        return member_entries(self.entries, slot) if slot < self.num_members else None

    def member_weights(self, slot: int) -> pa.ListArray:
        """The weights of the teacher `slot`: float32 for each row of each entry.

        A list is empty where the entry has no such teacher; plain rows have 1 in the slot 0.
        """
        return member_weights(self.entries, slot)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a local path or URI; equal plans give equal bytes."""
        meta = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "features": list(self.features),
            "recipe": dict(self.recipe),
            "tables": [_stored(self.tables[name]) for name in sorted(self.tables)],
            "report": [_stored(source) for source in self.report],
        }
        sink = pa.BufferOutputStream()
        table = self.entries.replace_schema_metadata({_META: canonical_json(meta).encode()})
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        folder, name = os.path.split(os.fspath(path))
        open_root(folder or ".").write(name, memoryview(sink.getvalue()))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The plan in a file.

        Raises:
            BadInputError: there is no such file.
            IntegrityError: it is damaged, newer than this release, or not a plan.
        """
        folder, name = os.path.split(os.fspath(path))
        root = open_root(folder or ".")
        if not root.exists(name):
            raise BadInputError(f"there is no plan at {os.fspath(path)!r}")
        data = root.buffer(name)
        try:
            try:
                file = Parquet(data, _FOOTER_BYTES, page_checksum_verification=True)
                file.check(range(file.num_row_groups))
            except IntegrityError as error:
                raise ValueError(one_line(error)) from error
            held = file.schema_arrow.metadata or {}
            if _META not in held:
                raise IntegrityError(
                    f"{os.fspath(path)!r} is no softlabels plan, but another Parquet file: "
                    "expected what softlabels mix writes"
                )
            entries = file.read()
            meta = json.loads(held[_META])
            _require_known(meta, str(path))
            schema = ENSEMBLE_ENTRIES if ENSEMBLE in meta["features"] else ENTRIES
            plan = cls(
                tables={t["name"]: PlanTable.model_validate(t) for t in meta["tables"]},
                entries=entries.replace_schema_metadata(None).cast(schema),
                recipe=meta["recipe"],
                report=tuple(SourceReport.model_validate(s) for s in meta["report"]),
                features=tuple(meta["features"]),
                location=root.uri,
            )
            try:
                plan._check(meta["fingerprint"])
            except IntegrityError as error:
                raise IntegrityError(f"plan {os.fspath(path)!r}: {error}") from error
        except UNREADABLE as error:
            reason = one_line(error)[:200]
            raise IntegrityError(
                f"{os.fspath(path)!r} is not a whole softlabels plan: {reason}"
            ) from error
        return plan

    def root(self, name: str, overrides: Mapping[str, str] | None = None) -> Root:
        """Where table `name` is now.

        An override wins; then the place where it was when the plan was made; then a folder of the
        same name beside the plan. Whichever it is, files are checked against the plan's sha256.

        Raises:
            BadInputError: it is in none of these places.
        """
        table = self.tables[name]
        if overrides and name in overrides:
            return open_root(overrides[name])
        check_place(name, table.uri)
        root = open_root(table.uri)
        if not root.is_local or not table.files or root.exists(table.files[0].path):
            return root
        for beside in (name, os.path.basename(table.uri)):
            if self.location is not None and is_folder_name(beside):
                nearby = open_root(f"{self.location}/{beside}")
                if nearby.exists(table.files[0].path):
                    return nearby
        raise BadInputError(
            f"table {name!r} is not at {table.uri!r}, nor beside the plan: "
            f"say where it is with --root {name}=URI"
        )

    def roots_of(self, roots: Mapping[str, str]) -> dict[str, str]:
        """Those of `roots` that name a table of this plan: a run gives them for all its plans."""
        return {name: uri for name, uri in roots.items() if name in self.tables}

    def _check(self, fingerprint: str) -> None:
        check_recipe(self.recipe)
        if fingerprint != self.fingerprint:
            raise IntegrityError(
                f"the plan's content has fingerprint {self.fingerprint!r}, it says "
                f"{fingerprint!r}: it was changed after it was made"
            )
        files = {t.name: {safe_relative(f.path) for f in t.files} for t in self.tables.values()}
        for name, file in set(
            zip(*self.entries.select(["table", "file"]).to_pydict().values(), strict=True)
        ):
            if file not in files.get(name, ()):
                raise IntegrityError(f"the plan reads file {file!r} of table {name!r}, not listed")
        listed = {(t.name, f.path): f.num_rows for t in self.tables.values() for f in t.files}
        check_entries(self.entries, listed)
        if MEMBERS.name in self.entries.schema.names:
            check_members(self.entries, listed)
        for table in self.tables.values():
            self._check_table(table)

    def _check_table(self, table: PlanTable) -> None:
        needed = {POSITIONS: table.positions is not None, ENSEMBLE: table.temperature != 1}
        for feature, what in ((POSITIONS, "position rules"), (ENSEMBLE, "a temperature")):
            if needed[feature] and feature not in self.features:
                raise IntegrityError(
                    f"table {table.name!r} has {what}, the plan's features are "
                    f"{list(self.features)!r}: it was not made by softlabels"
                )
        contents = table.contents
        if not (0 <= contents.k <= contents.num_classes < 2**31 and 0 <= contents.draws < 2**20):
            raise IntegrityError(
                f"table {table.name!r} has k {contents.k!r}, draws {contents.draws!r} and "
                f"{contents.num_classes!r} classes: the plan was not made by softlabels"
            )
        stored = (1.0, *contents.temperatures)
        if table.temperature not in stored:
            raise IntegrityError(
                f"table {table.name!r} is read at temperature {table.temperature!r}, it stores "
                f"{list(stored)!r}: the plan was not made by softlabels"
            )


def _added(table: PlanTable) -> dict[str, Any]:
    # Left out where they say nothing: plans without them keep their fingerprints.
    found: dict[str, Any] = {}
    if table.positions is not None:
        found["positions"] = table.positions.model_dump(mode="json")
    if table.temperature != 1:
        found["temperature"] = table.temperature
    return found


def _stored(model: PlanTable | SourceReport) -> dict[str, Any]:
    """As JSON; fields that were added later have a default, and are left out where they have it."""
    values = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        if not field.is_required() and getattr(model, name) == field.default:
            del values[name]
    return values


def _require_known(meta: Mapping[str, Any], path: str) -> None:
    version = meta["format_version"]
    if type(version) is not int or version < 1:
        raise ValueError(f"its format version is {version!r}: expected a whole number from 1")
    if version > FORMAT_VERSION:
        raise IntegrityError(
            f"plan {path!r} has format version {version}, this release reads up to "
            f"{FORMAT_VERSION}: upgrade softlabels"
        )
    unknown = sorted(set(meta["features"]) - FEATURES)
    if unknown:
        raise IntegrityError(
            f"plan {path!r} needs {unknown}, which this release cannot do: upgrade"
        )

"""A recipe frozen into a plan: exactly which rows, how often, in which order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
import pyarrow as pa

from softlabels.errors import BadInputError, MismatchError, RecipeMismatchError
from softlabels.plan import (
    ENSEMBLE,
    POSITIONS,
    Plan,
    PlanFile,
    PlanTable,
    SourceReport,
    ValueCount,
    join_entries,
)
from softlabels.plan_checks import too_many_readings
from softlabels.query.ensemble import Part, ensemble_entries, require_alike
from softlabels.query.entries import plain_entries
from softlabels.query.excluding import Excluded, read_excluded
from softlabels.query.recipe import Recipe
from softlabels.query.sampling import (
    Numbers,
    Taken,
    balanced_reads,
    even_parts,
    largest_remainder,
    parts_of,
    require_readable,
    systematic_reads,
)
from softlabels.query.selection import RowGroups, files_of, row_groups
from softlabels.query.sources import Gathered, Piece, check, gather
from softlabels.storage import open_root
from softlabels.store import tags
from softlabels.store.table import Table, TableFile

__all__ = ["Recipe", "mix", "pin"]

SHOWN_VALUES = 20
"""Values of `balance` that a report counts one by one."""


@dataclass(frozen=True)
class _Mixed:
    """One source on its way into a plan; `reads` are rows an epoch, `names` its pieces' tables."""

    gathered: Gathered
    reads: int
    seed: int
    names: Sequence[str]

    @cached_property
    def counts(self) -> Numbers | None:
        """Reads of each row of the selection; None: they come alike."""
        source, selection = self.gathered.source, self.gathered.selection
        if selection.keys is None:
            return None
        if source.balance is not None:
            codes = selection.columns["balance"]
            used = np.bincount(codes) > 0  # other steps may have dropped all rows of a value
            codes = (np.cumsum(used) - 1)[codes]
            temperature = source.balance.temperature
            return balanced_reads(codes, selection.keys, self.reads, temperature)
        if source.sample_by is not None:
            values = selection.columns["sample_by"]
            return systematic_reads(values, selection.keys, self.reads, self.seed)
        return None

    @cached_property
    def parts(self) -> list[tuple[Numbers, int]]:
        """Places in the selection, rising, and how often these rows come."""
        if self.counts is not None:
            return parts_of(self.counts)
        return even_parts(self.gathered.selection.keys, self.gathered.kept, self.reads)

    @property
    def kept(self) -> int:
        """Distinct rows that are read."""
        if self.counts is not None:
            return int(np.count_nonzero(self.counts))
        return min(self.gathered.kept, self.reads)

    def rows_read(self, piece: Piece) -> list[tuple[Numbers, int]]:
        """Row numbers of a piece and how often they come."""
        read = []
        for places, times in self.parts:
            if self.gathered.source.choose is None:
                whole = len(places) == len(piece.rows)
                read.append((piece.rows if whole else piece.rows[places], times))
                continue
            wanted = np.zeros(self.gathered.kept, np.bool_)
            wanted[places] = True
            read.append((piece.rows[wanted[piece.places]], times))
        return [(rows, times) for rows, times in read if len(rows)]


def mix(recipe: Recipe) -> Plan:
    """The plan of a recipe.

    Entries are ordered by stage, then source as in the recipe, then (where a source chooses) by
    teacher, then file, then row group. Sources of one table version, the same position rules and
    temperature share one of the plan's tables, which has the name of the first of them.
    The plan's fingerprint is the same on any machine, from any copy of the same versions.

    Raises:
        BadInputError: a table is not there, a source is left without rows, an expression is wrong,
            a file of examples to leave out cannot be read,
            a position rule asks for what the table has not, an epoch is too long.
        RecipeMismatchError: tables have different label spaces, tokenizers or alignments, or
            teachers of an ensemble do not fit each other.
        IntegrityError: a file is not as its table's log says.
    """
    tables = _open(recipe)
    for name, source in recipe.sources.items():
        check(name, source, tables[name])
    taken = Taken() if recipe.once else None
    excluded = _excluded(recipe)
    gathered = [
        gather(recipe, name, tables[name], _needs_keys(recipe, name), taken, excluded.get(name))
        for name in tables
    ]
    reads = _reads(recipe, {g.name: g.kept for g in gathered})
    owners = _table_names(gathered)
    mixed = [_Mixed(g, reads[g.name], recipe.seed, owners[g.name]) for g in gathered]
    used, groups = _used(mixed)
    entries = join_entries(
        [_entries(m, groups) for m in sorted(mixed, key=lambda m: m.gathered.source.stage)]
    )
    if problem := too_many_readings(entries):
        raise BadInputError(f"{problem}: give fewer repeats or rows an epoch")
    rules = any(piece.rules for piece in used.values())
    several = any(g.aligned is not None for g in gathered)
    return Plan(
        tables={name: _plan_table(name, piece, groups[name]) for name, piece in used.items()},
        entries=entries,
        recipe=recipe.normalised({name: found.sha256 for name, found in excluded.items()}),
        report=tuple(_report(m, recipe, sum(reads.values())) for m in mixed),
        features=(*([POSITIONS] if rules else []), *([ENSEMBLE] if several else [])),
    )


def pin(plan: Plan) -> list[str]:
    """Tags each table version of a plan, so that it is kept; the tags as "uri@name".

    A tag is called plan-<first 16 digits of the fingerprint>; the version follows where a plan
    reads two versions of one table, or where the same plan of another version has that name. Such
    versions hold the same rows, but maybe in other files.
    """
    # By version: one that is read by several position rules is several of the plan's tables.
    versions = {(table.uri, table.version): table for table in plan.tables.values()}
    uris = [uri for uri, _ in versions]
    made = []
    for table in versions.values():
        name = f"plan-{plan.fingerprint[:16]}"
        if uris.count(table.uri) > 1:
            name += f"-{table.version}"
        root = open_root(table.uri)
        standing = tags.make_tag(root, name, table.version, table.snapshot_digest)
        if standing.version != table.version:
            name = f"plan-{plan.fingerprint[:16]}-{table.version}"
            tags.make_tag(root, name, table.version, table.snapshot_digest)
        made.append(f"{table.uri}@{name}")
    return made


def _open(recipe: Recipe) -> dict[str, dict[str, Table]]:
    """The tables of each source's teachers; one reference is opened once, at one version."""
    opened: dict[str, Table] = {}
    tables: dict[str, dict[str, Table]] = {}
    for name, source in recipe.sources.items():
        for reference in source.references.values():
            if reference not in opened:
                opened[reference] = Table.open(reference)
        tables[name] = {t: opened[reference] for t, reference in source.references.items()}
    named = {_dotted(name, t): table for name, of in tables.items() for t, table in of.items()}
    try:
        require_alike(
            named, "source", "a student learns one label space: mix them in separate plans"
        )
    except MismatchError as error:
        raise RecipeMismatchError(str(error)) from error
    return tables


def _excluded(recipe: Recipe) -> dict[str, Excluded]:
    """What each source with `exclude` leaves out."""
    found = {}
    for name, source in recipe.sources.items():
        if source.exclude is not None:
            try:
                found[name] = read_excluded(source.exclude)
            except BadInputError as error:
                raise BadInputError(f"source {name!r}: {error}") from error
    return found


def _dotted(source: str, teacher: str) -> str:
    return f"{source}.{teacher}" if teacher else source


def _needs_keys(recipe: Recipe, name: str) -> bool:
    source = recipe.sources[name]
    return source.weight is not None or Fraction(str(source.repeats or 1)).denominator > 1


def _reads(recipe: Recipe, kept: Mapping[str, int]) -> dict[str, int]:
    if recipe.weighted:
        shares = _shares(recipe)
        rows = recipe.rows or max(-int(-kept[name] // share) for name, share in shares.items())
        reads = largest_remainder(shares, rows)
    else:
        reads = {
            name: int(Fraction(str(source.repeats or 1)) * kept[name] + Fraction(1, 2))
            for name, source in recipe.sources.items()
        }
    for name, count in reads.items():
        if count == 0:
            raise BadInputError(
                f"source {name!r} comes to 0 of {sum(reads.values())} rows an epoch: "
                "give it a larger weight or repeats, or more rows"
            )
        source = recipe.sources[name]
        uneven = source.sample_by is not None or source.balance is not None
        require_readable(name, count, kept[name], uneven)
    return reads


def _shares(recipe: Recipe) -> dict[str, Fraction]:
    # The decimal that was written, not its nearest binary float: 0.1 is one tenth.
    weights = {name: Fraction(str(source.weight)) for name, source in recipe.sources.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _table_names(gathered: Sequence[Gathered]) -> dict[str, list[str]]:
    """What the plan calls the table of each piece, by source."""
    first: dict[tuple[object, ...], str] = {}
    found: dict[str, list[str]] = {}
    for source in gathered:
        names = found.setdefault(source.name, [])
        for piece in source.pieces:
            name = _dotted(source.name, piece.teacher)
            while name in first.values():  # "a.b" may be a source, and the teacher b of a
                name += "'"
            key = (piece.table.snapshot_digest, piece.rules, piece.temperature)
            names.append(first.setdefault(key, name))
    return found


def _used(mixed: Sequence[_Mixed]) -> tuple[dict[str, Piece], dict[str, RowGroups]]:
    """Of each of the plan's tables a piece, and the row groups of the files that are read."""
    pieces: dict[str, Piece] = {}
    paths: dict[str, set[str]] = {}
    for m in mixed:
        for name, piece in zip(m.names, m.gathered.pieces, strict=True):
            for rows, _ in m.rows_read(piece):
                pieces.setdefault(name, piece)
                files = files_of(piece.table, rows)
                paths.setdefault(name, set()).update(file.path for file in files)
    groups = {}
    for name, piece in pieces.items():
        files = [file for file in piece.table.files if file.path in paths[name]]
        groups[name] = row_groups(piece.table, files)
    return pieces, groups


def _entries(mixed: _Mixed, groups: Mapping[str, RowGroups]) -> pa.Table:
    found, source = mixed.gathered, mixed.gathered.source
    if found.aligned is not None:
        teachers = [piece.teacher for piece in found.pieces]
        parts = [Part(found.selection.rows[places], times) for places, times in mixed.parts]
        names = dict(zip(teachers, mixed.names, strict=True))
        of = {teacher: groups[name] for teacher, name in names.items()}
        return ensemble_entries(found.aligned, parts, of, names, source.stage, source.loss_weight)
    pieces = zip(mixed.names, found.pieces, strict=True)
    read = [(name, rows) for name, piece in pieces if (rows := mixed.rows_read(piece))]
    stage, weight = source.stage, source.loss_weight
    return pa.concat_tables(
        [plain_entries(rows, groups[name], name, stage, weight) for name, rows in read]
    )


def _plan_table(name: str, piece: Piece, groups: RowGroups) -> PlanTable:
    files: dict[str, TableFile] = {file.path: file for file in groups.files}
    table = piece.table
    return PlanTable(
        name=name,
        uri=table.root.uri,
        version=table.version,
        snapshot_digest=table.snapshot_digest,
        contents=table.contents,
        files=tuple(
            PlanFile(
                path=file.path,
                size=file.size,
                sha256=file.sha256,
                footer_sha256=file.footer_sha256,
                num_rows=file.num_rows,
            )
            for file in files.values()
        ),
        positions=piece.rules,
        temperature=piece.temperature,
    )


def _report(mixed: _Mixed, recipe: Recipe, total: int) -> SourceReport:
    found, source = mixed.gathered, mixed.gathered.source
    dropped = dict(found.selection.dropped)
    if mixed.kept < found.kept:
        named = {"balance": source.balance, "sample_by": source.sample_by}
        reasons = [name for name, setting in named.items() if setting is not None]
        reasons.append("weight" if recipe.weighted else "repeats")
        dropped[reasons[0]] = found.kept - mixed.kept
    used = [n for n, p in zip(mixed.names, found.pieces, strict=True) if mixed.rows_read(p)]
    sums = [sum(getattr(j, n) for j in found.judged) for n in ("positions", "kept", "unknown")]
    positions, positions_kept, unknown = sums if found.judged else (None, None, None)
    return SourceReport(
        source=found.name,
        table=used[0],
        rows=found.table.num_rows,
        dropped=dropped,
        kept=mixed.kept,
        reads=mixed.reads,
        share_asked=float(_shares(recipe)[found.name]) if recipe.weighted else None,
        share=mixed.reads / total,
        loss_weight=source.loss_weight,
        positions=positions,
        positions_kept=positions_kept,
        positions_unknown=unknown,
        chosen=_chosen(mixed) if source.choose is not None else None,
        values=_values(mixed),
    )


def _chosen(mixed: _Mixed) -> dict[str, int]:
    """Distinct rows that are read of each teacher."""
    # Of a row that comes twice for some and once for others, parts may have it two times.
    read = {piece.teacher: mixed.rows_read(piece) for piece in mixed.gathered.pieces}
    return {
        teacher: len(np.unique(np.concatenate([rows for rows, _ in parts]))) if parts else 0
        for teacher, parts in read.items()
    }


def _values(mixed: _Mixed) -> tuple[ValueCount, ...] | None:
    """Rows and reads of the values of `balance`: those with most rows, then all others."""
    selection, reads = mixed.gathered.selection, mixed.counts
    if mixed.gathered.source.balance is None or reads is None:
        return None
    codes = selection.columns["balance"]
    rows = np.bincount(codes, minlength=len(selection.values))
    read = np.zeros(len(rows), np.int64)
    np.add.at(read, codes, reads)
    order = np.argsort(-rows, kind="stable")[: np.count_nonzero(rows)]
    shown, rest = order[:SHOWN_VALUES], order[SHOWN_VALUES:]
    found = [
        ValueCount(value=selection.values[n], rows=int(rows[n]), reads=int(read[n]))
        for n in shown.tolist()
    ]
    if len(rest):
        counts = {"rows": int(rows[rest].sum()), "reads": int(read[rest].sum())}
        found.append(ValueCount(value=None, others=len(rest), **counts))
    return tuple(found)

"""A recipe frozen into a plan: exactly which rows, how often, in which order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from softlabels.errors import BadInputError, MismatchError
from softlabels.plan import POSITIONS, Plan, PlanFile, PlanTable, SourceReport, entries_table
from softlabels.query.judging import Judged, judge
from softlabels.query.recipe import Recipe, Source
from softlabels.query.selection import (
    Numbers,
    RowGroups,
    Selection,
    files_of,
    lowest,
    row_groups,
    select,
)
from softlabels.rules import PositionRules
from softlabels.storage import open_root
from softlabels.store import tags
from softlabels.store.table import Table, TableFile

__all__ = ["Recipe", "mix", "pin"]

_ALIKE = ("num_classes", "classes", "tokenizer_sha256", "alignment")
"""What tables of one plan must have in common for a student to learn from all of them."""


@dataclass(frozen=True)
class _Mixed:
    """One source on its way into a plan; `reads` are rows an epoch, `judged` what rules left."""

    name: str
    source: Source
    table_name: str
    selection: Selection
    judged: Judged | None
    reads: int

    @property
    def kept(self) -> int:
        return len(self.selection.rows)

    @cached_property
    def parts(self) -> list[tuple[Numbers, int]]:
        """Row numbers and how often they come: all of them, then some once more."""
        times, rest = divmod(self.reads, self.kept)
        parts = [(self.selection.rows, times)] if times else []
        if rest and self.selection.keys is not None:
            parts.append((self.selection.rows[lowest(self.selection.keys, rest)], 1))
        return parts


def mix(recipe: Recipe) -> Plan:
    """The plan of a recipe.

    Entries are ordered by stage, then source as in the recipe, then file, then row group. Sources
    of one table version and the same position rules share one of the plan's tables, which has the
    name of the first of them.
    The plan's fingerprint is the same on any machine, from any copy of the same versions.

    Raises:
        BadInputError: a table is not there, a source is left without rows, `where` is wrong, a
            position rule asks for what the table has not.
        MismatchError: two sources have different label spaces, tokenizers or alignments.
        IntegrityError: a file is not as its table's log says.
    """
    tables = {name: Table.open(source.table) for name, source in recipe.sources.items()}
    _require_alike(tables)
    selections = {name: _select(recipe, name, tables[name]) for name in tables}
    reads = _reads(recipe, {name: len(s.rows) for name, (s, _) in selections.items()})
    rules = {name: judged.rules if judged else None for name, (_, judged) in selections.items()}
    owners = _table_names(tables, rules)
    mixed = [
        _Mixed(name, source, owners[name], *selections[name], reads[name])
        for name, source in recipe.sources.items()
    ]
    groups = {
        name: _row_groups(tables[name], name, mixed) for name in dict.fromkeys(owners.values())
    }
    rows = [row for m in sorted(mixed, key=lambda m: m.source.stage) for row in _entries(m, groups)]
    return Plan(
        tables={
            name: _plan_table(name, tables[name], g, rules[name]) for name, g in groups.items()
        },
        entries=entries_table(rows),
        recipe=recipe.normalised(),
        report=tuple(_report(m, recipe, tables[m.name], sum(reads.values())) for m in mixed),
        features=(POSITIONS,) if any(rules.values()) else (),
    )


def pin(plan: Plan) -> list[str]:
    """Tags each table version of a plan, so that it is kept; the tags as "uri@name".

    A tag is called plan-<first 16 digits of the fingerprint>; where a plan reads two versions of
    one table, the version follows.
    """
    # By version: one that is read by several position rules is several of the plan's tables.
    versions = {(table.uri, table.version): table for table in plan.tables.values()}
    uris = [uri for uri, _ in versions]
    made = []
    for table in versions.values():
        name = f"plan-{plan.fingerprint[:16]}"
        if uris.count(table.uri) > 1:
            name += f"-{table.version}"
        tags.make_tag(open_root(table.uri), name, table.version, table.snapshot_digest)
        made.append(f"{table.uri}@{name}")
    return made


def _require_alike(tables: Mapping[str, Table]) -> None:
    (first, one), *others = tables.items()
    for name, other in others:
        for part in _ALIKE:
            here, there = getattr(one.contents, part), getattr(other.contents, part)
            if here != there:
                raise MismatchError(
                    f"{part} differs: source {first!r} has {here!r}, source {name!r} has "
                    f"{there!r}; a student learns one label space: mix them in separate plans"
                )


def _select(recipe: Recipe, name: str, table: Table) -> tuple[Selection, Judged | None]:
    source = recipe.sources[name]
    subset = source.weight is not None or Fraction(str(source.repeats or 1)).denominator > 1
    judged = None
    try:
        selection = select(table, source, recipe.seed, subset)
        if source.positions is not None and len(selection.rows):
            judged = judge(table, source.positions, selection)
            selection = judged.selection
    except BadInputError as error:
        raise BadInputError(f"source {name!r}: {error}") from error
    if not len(selection.rows):
        reasons = ", ".join(f"{why} drops {n}" for why, n in selection.dropped.items())
        if judged is not None and judged.unknown:
            reasons += (
                f"; {judged.unknown} of {judged.positions} positions lack a value that the rule "
                "compares, and so fail it"
            )
        raise BadInputError(
            f"source {name!r} is left without rows: {source.table!r} has {table.num_rows}"
            + (f", {reasons}" if reasons else "")
        )
    return selection, judged


def _reads(recipe: Recipe, kept: Mapping[str, int]) -> dict[str, int]:
    if recipe.weighted:
        reads = _quotas(_shares(recipe), kept, recipe.rows)
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
    return reads


def _shares(recipe: Recipe) -> dict[str, Fraction]:
    # The decimal that was written, not its nearest binary float: 0.1 is one tenth.
    weights = {name: Fraction(str(source.weight)) for name, source in recipe.sources.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _quotas(
    shares: Mapping[str, Fraction], kept: Mapping[str, int], rows: int | None
) -> dict[str, int]:
    """Rows an epoch by source: each within one row of its share, together exactly `rows`."""
    if rows is None:
        rows = max(-int(-kept[name] // share) for name, share in shares.items())
    exact = {name: rows * share for name, share in shares.items()}
    quotas = {name: int(value) for name, value in exact.items()}
    # Largest remainders first; sorting is stable, so the recipe's order breaks ties.
    by_remainder = sorted(exact, key=lambda name: quotas[name] - exact[name])
    for name in by_remainder[: rows - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _table_names(
    tables: Mapping[str, Table], rules: Mapping[str, PositionRules | None]
) -> dict[str, str]:
    first: dict[tuple[str, PositionRules | None], str] = {}
    return {
        name: first.setdefault((table.snapshot_digest, rules[name]), name)
        for name, table in tables.items()
    }


def _row_groups(table: Table, name: str, mixed: Sequence[_Mixed]) -> RowGroups:
    used: set[str] = set()
    for m in mixed:
        if m.table_name == name:
            for rows, _ in m.parts:
                used |= {file.path for file in files_of(table, rows)}
    return row_groups(table, [file for file in table.files if file.path in used])


def _entries(mixed: _Mixed, groups: Mapping[str, RowGroups]) -> list[dict[str, Any]]:
    found = groups[mixed.table_name]
    entries = []
    for part, (rows, repeats) in enumerate(mixed.parts):
        firsts = np.searchsorted(rows, found.starts)
        lasts = np.searchsorted(rows, found.starts + found.sizes)
        for group in np.flatnonzero(lasts > firsts).tolist():
            taken = rows[firsts[group] : lasts[group]]
            whole = len(taken) == found.sizes[group]
            entry = {
                "stage": mixed.source.stage,
                "table": mixed.table_name,
                "file": found.files[group].path,
                "row_group": found.indexes[group],
                "num_rows": len(taken),
                "rows": None if whole else (taken - found.starts[group]).astype(np.int32),
                "repeats": repeats,
                "loss_weight": mixed.source.loss_weight,
            }
            entries.append((group, part, entry))
    return [entry for *_, entry in sorted(entries, key=lambda e: e[:2])]


def _plan_table(
    name: str, table: Table, groups: RowGroups, rules: PositionRules | None
) -> PlanTable:
    files: dict[str, TableFile] = {file.path: file for file in groups.files}
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
        positions=rules,
    )


def _report(mixed: _Mixed, recipe: Recipe, table: Table, total: int) -> SourceReport:
    dropped = dict(mixed.selection.dropped)
    judged = mixed.judged
    kept = min(mixed.kept, mixed.reads)
    if kept < mixed.kept:
        dropped["weight" if recipe.weighted else "repeats"] = mixed.kept - kept
    return SourceReport(
        source=mixed.name,
        table=mixed.table_name,
        rows=table.num_rows,
        dropped=dropped,
        kept=kept,
        reads=mixed.reads,
        share_asked=float(_shares(recipe)[mixed.name]) if recipe.weighted else None,
        share=mixed.reads / total,
        loss_weight=mixed.source.loss_weight,
        positions=judged.positions if judged else None,
        positions_kept=judged.kept if judged else None,
        positions_unknown=judged.unknown if judged else None,
    )

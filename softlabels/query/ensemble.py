"""Ensembles: several teachers' targets of one example, with weights, as entries of a plan.

Cross-entropy is linear in the target, so that losses against each teacher add up to the loss
against their mixture; no supports are merged (query/materialise does, where that is exact).

n rows of the first member, T members. First `align` says which rows are left and their weights;
then `ensemble_entries` lays them out, as often as a recipe has them read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import BadInputError, MismatchError
from softlabels.lineage import LABEL_SPACE
from softlabels.plan_entries import ENSEMBLE_ENTRIES, MEMBER, MEMBERS
from softlabels.query.expressions import check_type
from softlabels.query.matching import ONE_LABEL, Matched, Values, example_of, match
from softlabels.query.members import Member
from softlabels.query.selection import Numbers, RowGroups
from softlabels.query.sql import suggestion
from softlabels.store.table import Table

SEQUENCE_COLUMNS = ("num_positions", "input_ids", "position_index")
"""What must be equal row by row for position j of each teacher to be the same position."""

FEW_ROWS = 64
"""Rows of the mean entry below which a plan is large and slow to read, where row groups hold more:
each entry reads from a row group of each teacher."""

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Aligned:
    """The rows of an ensemble: where each teacher holds them, and with which weight.

    Attributes:
        rows: int64 [n] of each member, by name: row numbers in its table; the first one's rise.
        weights: float32 [T, n], at least 0; the sum over T is 1.
        dropped: rows of the first member left out, by reason.
    """

    rows: Mapping[str, Numbers]
    weights: Weights
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def first(self) -> Numbers:
        """The first member's row numbers."""
        return next(iter(self.rows.values()))


@dataclass(frozen=True)
class Part:
    """Rows that are read together: numbers of the first member, rising, and times an epoch."""

    rows: Numbers
    repeats: int


def align(
    tables: Mapping[str, Table], members: Mapping[str, Member], rows: Numbers | None = None
) -> Aligned:
    """The rows that all members of an ensemble hold, with the weight of each member.

    Args:
        tables: of the members, by name, opened; the first one's rows are taken.
        members: by name, in the same order.
        rows: row numbers of the first one's that are wanted, rising; None: all.

    Raises:
        BadInputError: fewer than two members, a weight or a class that cannot be meant, a weight
            that is not finite or below 0.
        MismatchError: label spaces, tokenizers or alignments differ, a temperature is not stored,
            or an example has other hard labels, views or, of sequences, tokens in two tables.
        DataError: a table holds an example twice.
    """
    check_members(tables, members)
    asked = {n: [m.weight] for n, m in members.items() if isinstance(m.weight, str)}
    first = next(iter(tables))
    by_class = any(member.by_class for member in members.values())
    if by_class:
        asked[first] = ["label", *asked.get(first, ())]
    sequences = tables[first].contents.alignment is not None
    same = SEQUENCE_COLUMNS if sequences else ("num_positions",)
    labels_of = ("view_params", "segment_ids", "label_ids") if sequences else ONE_LABEL
    matched = match(tables, rows, asked, same, labels_of)
    dropped: dict[str, int] = {}
    for name in list(tables)[1:]:
        here = matched.rows[name] >= 0
        dropped[f"not in {name}"] = int((~here).sum())
        matched = matched.take(here)
    labels = None
    if by_class:
        labels, rest = matched.values[first][0], matched.values[first][1:]
        matched = Matched(matched.rows, {**matched.values, first: rest})
    shares = np.stack([_weights(n, tables, members[n], matched, labels) for n in tables])
    largest = shares.max(0)
    if (none := largest == 0).any():
        dropped["no weight"] = int(none.sum())
        matched, shares, largest = matched.take(~none), shares[:, ~none], largest[~none]
    shares /= largest  # the sum of the largest floats would overflow
    return Aligned(matched.rows, (shares / shares.sum(0)).astype(np.float32), dropped)


def check_members(tables: Mapping[str, Table], members: Mapping[str, Member]) -> None:
    """Raises unless these tables can be the teachers of one ensemble; data are not looked at.

    Raises:
        BadInputError: fewer than two, one version twice at one temperature, a weight or a class
            that cannot be meant.
        MismatchError: label spaces, tokenizers or alignments differ, a temperature is not stored.
    """
    if len(members) < 2:
        raise BadInputError(f"an ensemble has at least 2 members, found {list(members)!r}")
    require_alike(tables, "member", "an ensemble has one label space")
    first = next(iter(tables))
    seen: dict[tuple[str, float], str] = {}
    for name, member in members.items():
        contents = tables[name].contents
        stored = [1.0, *contents.temperatures]
        if member.temperature not in stored:
            raise MismatchError(
                f"member {name!r}: temperature {member.temperature!r} is asked, {member.table!r} "
                f"stores {stored!r}; another cannot be derived: capture it"
            )
        other = seen.setdefault((tables[name].snapshot_digest, member.temperature), name)
        if other != name:
            raise BadInputError(
                f"members {other!r} and {name!r} are the same labels at the same temperature: "
                "keep one of them, with the sum of their weights"
            )
        if isinstance(member.weight, str):
            try:
                check_type("weight", member.weight, tables[name], "number")
            except BadInputError as error:
                raise BadInputError(f"member {name!r}: {error}") from error
        _class_weights(name, member, tables[first])


def require_alike(tables: Mapping[str, Table], kind: str, why: str) -> None:
    """Raises MismatchError with both values where tables are not of one label space.

    Args:
        tables: by name.
        kind: what the message calls one of them.
        why: what it says must be so.
    """
    (first, one), *others = tables.items()
    for name, other in others:
        for part in LABEL_SPACE:
            here, there = getattr(one.contents, part), getattr(other.contents, part)
            if here != there:
                raise MismatchError(
                    f"{part} differs: {kind} {first!r} has {here!r}, {kind} {name!r} has "
                    f"{there!r}; {why}"
                )


def ensemble_entries(
    aligned: Aligned,
    parts: Sequence[Part],
    groups: Mapping[str, RowGroups],
    names: Mapping[str, str],
    stage: int = 0,
    loss_weight: float = 1.0,
) -> pa.Table:
    """Entries of a plan that read an ensemble's rows; `offset` is 0 in all of them.

    They are in the order of the first member's row groups, then of the parts. An entry lies in one
    row group of each member: rows of one row group of the first that lie in several of another's
    are several entries, ordered by the others' row groups.

    Args:
        aligned: the ensemble's rows.
        parts: which of them, how often.
        groups: row groups of each member, by name, which hold all of these rows.
        names: what the plan calls each member's table.
        stage, loss_weight: of all entries.
    """
    tables, firsts, numbers = [], [], []
    for number, part in enumerate(parts):
        if len(part.rows):
            made, first = _entries(aligned, part, groups, names)
            tables.append(made)
            firsts.append(first)
            numbers.append(np.full(len(first), number))
    if not tables:
        return ENSEMBLE_ENTRIES.empty_table()
    order = np.lexsort((np.concatenate(numbers), np.concatenate(firsts)))
    joined = pa.concat_tables(tables).combine_chunks()
    if not np.array_equal(order, np.arange(len(order))):
        joined = joined.take(pa.array(order)).combine_chunks()
    constant = {
        "stage": pa.array(np.full(len(order), stage, np.int32)),
        "offset": pa.array(np.zeros(len(order), np.int64)),
        "loss_weight": pa.array(np.full(len(order), loss_weight, np.float32)),
    }
    columns = {name: joined[name] for name in joined.schema.names} | constant
    return pa.table([columns[name] for name in ENSEMBLE_ENTRIES.names], schema=ENSEMBLE_ENTRIES)


def advice(entries: pa.Table) -> str | None:
    """What to say of a plan whose ensembles' entries are too small to be read well; else None."""
    if MEMBERS.name not in entries.schema.names:
        return None
    several = entries["num_rows"].filter(entries[MEMBERS.name].is_valid())
    rows = pc.sum(several).as_py() or 0
    if rows >= FEW_ROWS * len(several):
        return None
    # Where rows lie alike, an entry is a row group of the first teacher's, however small that is.
    read = entries.filter(entries[MEMBERS.name].is_valid())
    groups = read.group_by(["table", "file", "row_group", "repeats"]).aggregate([]).num_rows
    if len(several) < 2 * groups:
        return None
    return (
        f"the ensemble's {rows} rows are {len(several)} entries of {rows / len(several):.1f} rows, "
        "since its tables hold the same examples in different orders: the plan is large and slow "
        "to read; capture the teachers from the same files in the same order, or make one table of "
        "them with `softlabels ensemble`"
    )


def _weights(
    name: str,
    tables: Mapping[str, Table],
    member: Member,
    matched: Matched,
    labels: Values | None,
) -> Values:
    """The weights of a member before they are normalised, float64 [n]."""
    first = next(iter(tables))
    count = len(matched.rows[first])
    asked = isinstance(member.weight, str)
    values = matched.values[name][0].copy() if asked else np.full(count, float(member.weight))
    if labels is not None:
        for index, weight in _class_weights(name, member, tables[first]).items():
            values[labels == index] = weight
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        place = int(np.argmax(wrong))
        found = values[place]
        shown = "NULL or NaN" if np.isnan(found) else repr(float(found))
        example = example_of(tables[first], int(matched.rows[first][place]))
        raise BadInputError(
            f"member {name!r}: weight {member.weight!r} is {shown} for example {example!r} (and "
            f"wrong for {int(wrong.sum())} in all): expected a finite number not below 0"
        )
    return values


def _class_weights(name: str, member: Member, first: Table) -> dict[int, float]:
    """Weights by class id."""
    contents = first.contents
    if member.by_class and contents.alignment is not None:
        raise BadInputError(
            f"member {name!r}: by_class {sorted(map(str, member.by_class))!r}: sequences have a "
            "label a position, not one a row: weigh them by an SQL expression"
        )
    found: dict[int, float] = {}
    ids = {label: index for index, label in enumerate(contents.classes or ())}
    for key, weight in member.by_class.items():
        label = str(key)
        index = ids.get(label, int(label) if label.isdecimal() and label.isascii() else -1)
        if not 0 <= index < contents.num_classes:
            raise BadInputError(
                f"member {name!r}: by_class {key!r} is no class of {contents.num_classes}"
                f"{suggestion(label, list(ids))}"
            )
        if index in found:
            raise BadInputError(f"member {name!r}: by_class gives class {index} twice")
        found[index] = weight
    return found


def _entries(
    aligned: Aligned, part: Part, groups: Mapping[str, RowGroups], names: Mapping[str, str]
) -> tuple[pa.Table, Numbers]:
    """Entries of one part, and the row group of the first member that each reads."""
    places = np.searchsorted(aligned.first, part.rows)
    rows = {name: numbers[places] for name, numbers in aligned.rows.items()}
    group = {n: np.searchsorted(groups[n].starts, r, side="right") - 1 for n, r in rows.items()}
    # Stable, so that rows of the first member still rise within an entry.
    order = np.lexsort(tuple(reversed(list(group.values()))))
    changes = np.zeros(len(order), bool)
    changes[0] = True
    for name in rows:
        rows[name], group[name] = rows[name][order], group[name][order]
        changes[1:] |= group[name][1:] != group[name][:-1]
    starts = np.flatnonzero(changes)
    sizes = np.diff(np.append(starts, len(order)))
    weights = aligned.weights[:, places[order]]
    read = {
        name: _reading(groups[name], names[name], rows[name], group[name], starts, sizes)
        for name in rows
    }
    first = next(iter(read.values()))
    own = {name: first[name] for name in ("table", "file", "row_group", "rows")}
    columns = {
        **own,
        "num_rows": pa.array(sizes.astype(np.int32)),
        "repeats": pa.array(np.full(len(sizes), part.repeats, np.int32)),
        "members": _members(list(read.values()), weights, sizes),
    }
    return pa.table(columns), group[next(iter(rows))][starts]


def _reading(
    groups: RowGroups,
    table: str,
    rows: Numbers,
    group: Numbers,
    starts: Numbers,
    sizes: Numbers,
) -> dict[str, pa.Array]:
    """What entries read of one member's table: columns of MEMBER but the weights."""
    used = group[starts]
    within = (rows - groups.starts[group]).astype(np.int32)
    # Whole row groups, in order, are written as null.
    steps = within == np.arange(len(within)) - np.repeat(starts, sizes)
    whole = (sizes == groups.sizes[used]) & np.logical_and.reduceat(steps, starts)
    lengths = np.where(whole, 0, sizes)
    offsets = np.zeros(len(sizes) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    kind = MEMBER.field("rows").type
    paths = [file.path for file in groups.files]
    known = {path: number for number, path in enumerate(dict.fromkeys(paths))}
    codes = np.array([known[path] for path in paths], np.int32)[used]
    indexes = np.array(groups.indexes, np.int32)[used]
    return {
        "table": pa.array([table]).take(pa.array(np.zeros(len(sizes), np.int32))),
        "file": pa.array(list(known), pa.string()).take(pa.array(codes)),
        "row_group": pa.array(indexes),
        "rows": pa.ListArray.from_arrays(
            pa.array(offsets),
            pa.array(within[~np.repeat(whole, sizes)]),
            type=kind,
            mask=pa.array(whole),
        ),
    }


def _members(read: Sequence[Mapping[str, pa.Array]], weights: Weights, sizes: Numbers) -> pa.Array:
    """The column `members` of entries of `sizes` rows, from what each of T members reads."""
    count, entries = len(read), len(sizes)
    # Member by member, then turned: entry by entry.
    turn = pa.array(np.arange(count * entries).reshape(count, entries).T.reshape(-1))
    ends = np.tile(np.cumsum(sizes), (count, 1)) + np.arange(count)[:, None] * weights.shape[1]
    offsets = np.zeros(count * entries + 1, np.int32)
    offsets[1:] = ends.reshape(-1)
    columns = {name: pa.concat_arrays([member[name] for member in read]) for name in read[0]} | {
        "weights": pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(weights.reshape(-1)), type=MEMBER.field("weights").type
        )
    }
    structs = pa.StructArray.from_arrays(
        [columns[f.name] for f in MEMBER], fields=list(MEMBER)
    ).take(turn)
    edges = pa.array(np.arange(entries + 1, dtype=np.int32) * count)
    kind = ENSEMBLE_ENTRIES.field("members").type
    return pa.ListArray.from_arrays(edges, structs, type=kind)

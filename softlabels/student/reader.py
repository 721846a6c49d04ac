"""Decoded rows of a plan: entries from verified files, kept within a bound."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from softlabels.errors import BadInputError, IntegrityError, MismatchError
from softlabels.lineage import LABEL_SPACE, Contents
from softlabels.plan import Plan, PlanTable
from softlabels.rules import PositionRules
from softlabels.schema import COLUMNS, temper_columns
from softlabels.student.files import Files
from softlabels.student.groups import Groups
from softlabels.student.order import Int64s
from softlabels.student.rows import Rows
from softlabels.student.ruled import keep_positions
from softlabels.student.tempered import at_own, stored_temperature
from softlabels.targets import SoftTargets

_TARGETS = (
    "num_positions",
    "topk_ids",
    "topk_logprobs",
    "tail_logprob",
    "position_entropy",
    "label_ids",
    "label_logprobs",
    "label_ranks",
)
"""Whatever the loss: position rules may compare any of them."""


class Reader:
    """Decodes a plan's entries, and keeps what was decoded last.

    A row group is decoded once for all entries that read it by the same rules: of it are kept the
    rows that any of them takes, with the positions that the plan's rules leave.

    Attributes:
        k: ids a position of all rows, the largest of the plan's tables; others are padded.
        draws: tail draws a position; 0 unless all tables hold the same number, drawn at the same
            temperature relative to the table's own.

    Args:
        plan: what to read. A table with a temperature of its own is read as if that were 1.
        columns: further columns to decode.
        temperatures: extra temperatures to decode; 1 needs nothing and is passed over.
        roots: where tables are now, by name.
        cache_bytes: how much decoded data to keep.
        tracked: keep in mind which positions the rules left, for further teachers' rows.

    Raises:
        BadInputError: a column is not in a table.
        MismatchError: a temperature is not stored in a table, or tables do not share their label
            space.
    """

    def __init__(
        self,
        plan: Plan,
        columns: Sequence[str] = (),
        temperatures: Sequence[float] = (),
        roots: Mapping[str, str] | None = None,
        cache_bytes: int = 512 << 20,
        tracked: bool = False,
    ) -> None:
        self._contents = {name: table.contents for name, table in plan.tables.items()}
        self._rules = {name: table.positions for name, table in plan.tables.items()}
        self._weighted = any(rules.weights for rules in self._rules.values() if rules)
        self._columns = list(dict.fromkeys(columns))
        self._temperatures = [float(t) for t in dict.fromkeys(temperatures) if t != 1]
        check_label_space(self._contents)
        _check_columns(self._contents, self._columns)
        self._own, self._stored = {}, {}
        for name, table in plan.tables.items():
            self._own[name], self._stored[name] = _temperatures(table, self._temperatures)
        self.k = max((c.k for c in self._contents.values()), default=0)
        drawn = {(c.draws, c.draws_temperature / self._own[n]) for n, c in self._contents.items()}
        # A row's draws share its tail in equal parts: padding them would lose mass.
        self.draws = min(drawn)[0] if len(drawn) == 1 else 0
        self._groups = Groups(plan)
        self._files = Files(plan, roots)
        self._tracked = tracked
        self._types: dict[str, tuple[pa.DataType, str]] = {}
        self._cache: OrderedDict[int, Rows] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached = 0
        self._lock = threading.Lock()

    def entry(self, number: int) -> Rows:
        """The rows that an entry of the plan takes, in its order, with the positions kept.

        Raises:
            StorageError: its file is missing.
            IntegrityError: its file is not the one that the plan names, an entry asks for rows
                that the row group has not, or the plan's rules leave a row without positions.
        """
        with self._lock:
            group = self._groups.of(number)
            if group in self._cache:
                self._cache.move_to_end(group)
                rows = self._cache[group]
            else:
                rows = self._decode(group)
                self._cache[group] = rows
                self._cached += rows.nbytes
                while self._cached > self._cache_bytes and self._cache:
                    self._cached -= self._cache.popitem(last=False)[1].nbytes
        place = self._groups.places(number)
        return rows if place is None else rows.take(place)

    def gather(self, entries: Int64s, rows: Int64s, closed: threading.Event) -> Rows | None:
        """One row for each pair of an entry and a row that it takes; None once `closed`.

        Args:
            entries: int64 [B], at least one.
            rows: int64 [B], which of the entry's.
            closed: whether anybody still wants them.
        """
        needed, which = np.unique(entries, return_inverse=True)
        parts = []
        for entry in needed:
            if closed.is_set():
                return None
            parts.append(self.entry(int(entry)))
        sizes = np.array([len(part) for part in parts])
        index = (np.cumsum(sizes) - sizes)[which] + rows
        joined = Rows.concat(parts)
        parts.clear()  # what is joined and what was decoded would both be held beside the result
        return joined.take(index)

    def _decode(self, group: int) -> Rows:
        name, path, index = self._groups.location(group)
        rules, own = self._rules[name], self._own[name]
        needed = [t for t in dict.fromkeys([own, *self._stored[name].values()]) if t != 1]
        wanted = ["example_id", *_TARGETS, *self._columns]
        wanted += ["sampled_ids"] if self.draws else []
        wanted += [c for t in needed for c in temper_columns(t)]
        batch = self._files.read(name, path, index, wanted)
        if missing := sorted(set(wanted) - set(batch.schema.names)):
            raise IntegrityError(f"file {path!r} of table {name!r} has no column {missing[0]!r}")
        self._check_types(batch, name)
        values = {field: batch[field] for field in wanted}
        stored = self._contents[name].k
        try:
            targets = SoftTargets.from_columns(values, stored, self.draws, needed)
            columns = {column: values[column] for column in self._columns}
            rows = Rows(targets, values["example_id"], columns)
            taken = self._groups.taken(group, len(rows))
            rows = rows if taken is None else rows.take(taken)
            if self._tracked:
                rows = _numbered(rows)
            if rules is not None:
                rows = _ruled(rows, rules)
        except IntegrityError as error:
            raise IntegrityError(f"file {path!r} of table {name!r}: {error}") from error
        if self._weighted and rows.position_weights is None:
            rows = replace(rows, position_weights=np.ones(len(rows.targets.ids), np.float32))
        # After the rules, which compare values at temperature 1.
        at_one = at_own(rows.targets, own, self._stored[name])
        return replace(rows, targets=_padded(at_one, self.k))

    def _check_types(self, batch: pa.RecordBatch, table: str) -> None:
        for name in self._columns:
            found = batch.schema.field(name).type
            first, where = self._types.setdefault(name, (found, table))
            if found != first:
                raise MismatchError(
                    f"column {name!r} is {first} in table {where!r}, {found} in {table!r}: "
                    "streams hand out one type"
                )


def _numbered(rows: Rows) -> Rows:
    """`rows` with the place of each position in its row."""
    counts = rows.targets.num_positions
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    kept = (np.arange(len(starts)) - starts).astype(np.int32)
    return replace(rows, kept=kept, whole=counts)


def _ruled(rows: Rows, rules: PositionRules) -> Rows:
    """`rows` with the positions that `rules` keep, and their weights where they weigh any."""
    keep = rules.keep(rows.targets)
    if not keep.all():
        targets, columns = keep_positions(rows.targets, rows.columns, keep)
        kept = None if rows.kept is None else rows.kept[keep]
        rows = replace(rows, targets=targets, columns=columns, kept=kept)
    counts = rows.targets.num_positions
    if len(counts) and not counts.min():
        empty = rows.example_ids[int(np.argmin(counts))].as_py()
        raise IntegrityError(
            f"example {empty!r} is left without a position by the plan's rules ({rules}): "
            "they were not made for these labels"
        )
    return replace(rows, position_weights=rules.weigh(rows.targets)) if rules.weights else rows


def _padded(targets: SoftTargets, k: int) -> SoftTargets:
    missing = ((0, 0), (0, k - targets.k))
    if targets.k == k:
        return targets
    return replace(
        targets,
        ids=np.pad(targets.ids, missing, constant_values=-1),
        logprobs=np.pad(targets.logprobs, missing, constant_values=-np.inf),
    )


def check_label_space(tables: Mapping[str, Contents]) -> None:
    """Raises MismatchError unless ids mean the same, and positions align, in all tables."""
    first = next(iter(tables), "")
    for name, contents in tables.items():
        for field in LABEL_SPACE:
            mine, other = getattr(tables[first], field), getattr(contents, field)
            if mine != other:
                raise MismatchError(
                    f"{field} differs: table {first!r} has {mine!r}, table {name!r} has {other!r}; "
                    "a stream needs one label space"
                )


def _check_columns(tables: Mapping[str, Contents], columns: Sequence[str]) -> None:
    for name, contents in tables.items():
        for column in columns:
            if column not in COLUMNS and column not in contents.carried:
                raise BadInputError(
                    f"columns: table {name!r} has no column {column!r}; it carries "
                    f"{list(contents.carried)!r}"
                )


def _temperatures(table: PlanTable, asked: Sequence[float]) -> tuple[float, dict[float, float]]:
    """The table's own temperature, and the stored one for each of the loss's."""
    where = f"table {table.name!r}"
    own = stored_temperature(table.contents, table.temperature, 1.0, where)
    stored = {t: stored_temperature(table.contents, own, t, where) for t in asked}
    return own, stored

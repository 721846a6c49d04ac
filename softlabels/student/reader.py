"""Decoded rows of a plan: entries from verified files, kept within a bound."""

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa

from softlabels.errors import BadInputError, IntegrityError, MismatchError
from softlabels.lineage import LABEL_SPACE, Contents
from softlabels.plan import Plan, PlanTable
from softlabels.rules import PositionRules
from softlabels.schema import COLUMNS
from softlabels.student.decode import Decoder
from softlabels.student.files import Files
from softlabels.student.filling import Recent, Source
from softlabels.student.gather import whole_rows
from softlabels.student.groups import Groups
from softlabels.student.held import Held
from softlabels.student.loading import load_all
from softlabels.student.localcache import LocalCache
from softlabels.student.order import Int64s
from softlabels.student.records import GoneError, Records
from softlabels.student.rows import Rows
from softlabels.student.ruled import keep_positions
from softlabels.student.tempered import at_own, stored_temperature
from softlabels.student.zipped import SourceFiles
from softlabels.targets import Ints, SoftTargets

LOCAL_THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))
REMOTE_THREADS = 8
"""Row groups that are loaded at once: decoding takes a core each, waiting for storage none."""

CACHE_BYTES = 128 << 20
"""Of decoded rows that are kept in memory, by default: with windows a stream stays below 300 MB."""


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
        cache_bytes: how much decoded data to keep in memory; mapped data count too.
        tracked: keep in mind which positions the rules left, for further teachers' rows.
        local: where decoded row groups may lie ready; None: nowhere.
        fill: whether to put there what is decoded.
        source: where columns are that tables do not carry.

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
        cache_bytes: int = CACHE_BYTES,
        tracked: bool = False,
        local: LocalCache | None = None,
        fill: bool = False,
        source: SourceFiles | None = None,
    ) -> None:
        contents = {name: table.contents for name, table in plan.tables.items()}
        self._rules = {name: table.positions for name, table in plan.tables.items()}
        self._weighted = any(rules.weights for rules in self._rules.values() if rules)
        columns = list(dict.fromkeys(columns))
        asked = [float(t) for t in dict.fromkeys(temperatures) if t != 1]
        check_label_space(contents)
        if source is None:
            _check_columns(contents, columns)
        self._own, self._stored, needed = {}, {}, {}
        for name, table in plan.tables.items():
            own, stored = _temperatures(table, asked)
            self._own[name], self._stored[name] = own, stored
            needed[name] = [t for t in dict.fromkeys([own, *stored.values()]) if t != 1]
        self.k = max((c.k for c in contents.values()), default=0)
        drawn = {(c.draws, c.draws_temperature / self._own[n]) for n, c in contents.items()}
        # A row's draws share its tail in equal parts: padding them would lose mass.
        self.draws = min(drawn)[0] if len(drawn) == 1 else 0
        self._groups = Groups(plan)
        self._files = Files(plan, roots)
        decoder = Decoder(plan, self._files, columns, self.draws, needed, source)
        self._source = Source(self._files, decoder, local, fill)
        remote = any(not self._files.is_local(name) for name in plan.tables)
        self._threads = REMOTE_THREADS if remote else LOCAL_THREADS
        self._tracked = tracked
        self._types: dict[str, tuple[pa.DataType, str]] = {}
        self._plain = {
            name: rules is None
            and self._own[name] == 1
            and contents[name].k == self.k
            and not (self._weighted or tracked)
            for name, rules in self._rules.items()
        }
        self._recent = Recent(cache_bytes)
        self._lock = threading.Lock()

    def entry(self, number: int) -> Rows:
        """The rows that an entry of the plan takes, in its order, with the positions kept.

        Raises:
            StorageError: its file is missing.
            IntegrityError: its file is not the one that the plan names, an entry asks for rows
                that the row group has not, or the plan's rules leave a row without positions.
        """
        group = self._groups.of(number)
        loaded = self._loaded([group], threading.Event())
        assert loaded is not None
        found, place = loaded[group], self._groups.places(number)
        if isinstance(found, Records):
            found = self._fresh(group)
        return found if place is None else found.take(place)

    def hold(self, entries: Int64s, closed: threading.Event) -> Held | None:
        """What all `entries` take, in memory or mapped as long as the result lives.

        Args:
            entries: int64 [any], at least one.
            closed: whether anybody still wants them; once it is set, None.
        """
        needed = np.unique(entries)
        groups = self._groups.of_all(needed)
        loaded = self._loaded(np.unique(groups).tolist(), closed)
        return None if loaded is None else Held(needed, loaded, self._groups, self._fresh)

    def gather(self, entries: Int64s, rows: Int64s, closed: threading.Event) -> Rows | None:
        """One row for each pair of an entry and a row that it takes; None once `closed`.

        Args:
            entries: int64 [B], at least one.
            rows: int64 [B], which of the entry's.
            closed: whether anybody still wants them.
        """
        held = self.hold(entries, closed)
        return None if held is None else held.gather(entries, rows)

    def _loaded(
        self, groups: list[int], closed: threading.Event
    ) -> dict[int, Rows | Records] | None:
        with self._lock:
            kept = {group: self._recent.get(group) for group in groups}
        found = {group: rows for group, rows in kept.items() if rows is not None}
        absent = [group for group in groups if group not in found]
        loaded: dict[int, Rows | Records] | None = load_all(
            absent, self._decode, self._threads, closed
        )
        if loaded is None:
            return None
        with self._lock:
            for group, rows in loaded.items():
                self._recent.put(group, rows)
        return found | loaded

    def _fresh(self, group: int) -> Rows:
        """The rows of a row group whose file in the local cache is gone."""
        with self._lock:
            self._recent.forget(group)
        name = self._groups.location(group)[0]
        return self._made(group, name, self._source.decoded(self._groups.location(group)))

    def _decode(self, group: int, wait: bool = True) -> Rows | Records | None:
        place = self._groups.location(group)
        found = self._source.rows(place, wait, lambda: self._groups.in_file(group))
        if isinstance(found, Records):
            if self._plain[place[0]]:  # read as they are: what a plan leaves out stays on disk
                self._taken(group, found)
                return found
            try:
                found = whole_rows(found)
            except GoneError:
                found = self._source.decoded(place)
        return None if found is None else self._made(group, place[0], found)

    def _made(self, group: int, name: str, rows: Rows) -> Rows:
        """Of the stored rows those that the plan takes, as it wants them."""
        rules, own = self._rules[name], self._own[name]
        taken = self._taken(group, rows)
        rows = rows if taken is None else rows.take(taken)
        if self._tracked:
            rows = _numbered(rows)
        if rules is not None:
            with self._named(group):
                rows = _ruled(rows, rules)
        if self._weighted and rows.position_weights is None:
            rows = replace(rows, position_weights=np.ones(len(rows.targets.ids), np.float32))
        # After the rules, which compare values at temperature 1.
        at_one = at_own(rows.targets, own, self._stored[name])
        return replace(rows, targets=_padded(at_one, self.k))

    def _taken(self, group: int, rows: Rows | Records) -> Ints | None:
        self._check_types(rows.columns, self._groups.location(group)[0])
        with self._named(group):
            return self._groups.taken(group, len(rows))

    @contextlib.contextmanager
    def _named(self, group: int) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:
            name, path, _ = self._groups.location(group)
            raise IntegrityError(f"file {path!r} of table {name!r}: {error}") from error

    def _check_types(self, columns: Mapping[str, pa.Array], table: str) -> None:
        for name, values in columns.items():
            first, where = self._types.setdefault(name, (values.type, table))
            if values.type != first:
                raise MismatchError(
                    f"column {name!r} is {first} in table {where!r}, {values.type} in {table!r}: "
                    "streams hand out one type"
                )


MOST_PADDED = 1 << 28
"""Ids of a row group that is padded: 2 GB."""


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
    if len(targets.ids) * k > MOST_PADDED:
        raise IntegrityError(
            f"{len(targets.ids)} positions of {targets.k} ids would be padded to {k} ids, as "
            "another table of the plan says it has: train on them in plans of their own"
        )
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

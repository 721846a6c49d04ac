"""Decoded rows of a plan: entries from verified files, kept within a bound."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import BadInputError, IntegrityError, MismatchError
from softlabels.lineage import Contents
from softlabels.plan import Plan
from softlabels.rules import PositionRules
from softlabels.schema import COLUMNS, temper_columns
from softlabels.student.files import Files
from softlabels.student.groups import Groups
from softlabels.student.ruled import keep_positions
from softlabels.targets import Floats, SoftTargets

_ONE_SPACE = ("num_classes", "classes", "tokenizer_sha256", "alignment")
"""What tables must share for their ids to mean the same and their positions to align."""

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


@dataclass(frozen=True)
class Rows:
    """Decoded rows: soft targets, example ids and the columns asked, all of one length.

    `position_weights` are float32 [N]; None where the plan weighs no position.
    """

    targets: SoftTargets
    example_ids: pa.Array
    columns: Mapping[str, pa.Array]
    position_weights: Floats | None = None

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        values = [v for v in vars(self.targets).values() if isinstance(v, np.ndarray)]
        values += [a for t in self.targets.temper.values() for a in (t.shift, t.tail)]
        values += [] if self.position_weights is None else [self.position_weights]
        arrays = [self.example_ids, *self.columns.values()]
        return sum(int(value.nbytes) for value in [*values, *arrays])

    def take(self, index: npt.NDArray[np.integer[Any]]) -> Self:
        """The rows `index`, in that order; a row may come twice."""
        picked = pa.array(index)
        positions = self.targets.positions_of(index)
        weights = self.position_weights
        return type(self)(
            self.targets.map_positions(positions, self.targets.num_positions[index]),
            self.example_ids.take(picked),
            {name: values.take(picked) for name, values in self.columns.items()},
            None if weights is None else weights[positions],
        )

    def slice(self, start: int, stop: int) -> Self:
        """The rows [start, stop), without a copy."""
        targets = self.targets.slice(start, stop)
        weights = self.position_weights
        if weights is not None:
            first = int(self.targets.num_positions[:start].sum())
            weights = weights[first : first + len(targets.ids)]
        return type(self)(
            targets,
            self.example_ids.slice(start, stop - start),
            {n: values.slice(start, stop - start) for n, values in self.columns.items()},
            weights,
        )

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, one part after the other; a single part is itself.

        Raises:
            BadInputError: a column would hold over 2 GB, more than an Arrow array can.
        """
        if len(parts) == 1:
            return parts[0]

        def joined(arrays: list[pa.Array]) -> pa.Array:
            try:
                return pa.concat_arrays(arrays)
            except pa.ArrowInvalid as error:
                raise BadInputError(
                    f"a window's rows do not fit into one Arrow array ({error}): choose a smaller "
                    "shuffle_rows"
                ) from error

        return cls(
            SoftTargets.concat([part.targets for part in parts]),
            joined([part.example_ids for part in parts]),
            {name: joined([p.columns[name] for p in parts]) for name in parts[0].columns},
            _joined_weights(parts),
        )


class Reader:
    """Decodes a plan's entries, and keeps what was decoded last.

    A row group is decoded once for all entries that read it by the same rules: of it are kept the
    rows that any of them takes, with the positions that the plan's rules leave.

    Attributes:
        k: ids a position of all rows, the largest of the plan's tables; others are padded.
        draws: tail draws a position; 0 unless all tables hold the same number, drawn at the same
            temperature.

    Args:
        plan: what to read.
        columns: further columns to decode.
        temperatures: extra temperatures to decode; 1 needs nothing and is passed over.
        roots: where tables are now, by name.
        cache_bytes: how much decoded data to keep.

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
    ) -> None:
        self._contents = {name: table.contents for name, table in plan.tables.items()}
        self._rules = {name: table.positions for name, table in plan.tables.items()}
        self._weighted = any(rules.weights for rules in self._rules.values() if rules)
        self._columns = list(dict.fromkeys(columns))
        self._temperatures = [float(t) for t in dict.fromkeys(temperatures) if t != 1]
        _check_label_space(self._contents)
        _check_columns(self._contents, self._columns)
        _check_temperatures(self._contents, self._temperatures)
        self.k = max((c.k for c in self._contents.values()), default=0)
        drawn = {(c.draws, c.draws_temperature) for c in self._contents.values()}
        # A row's draws share its tail in equal parts: padding them would lose mass.
        self.draws = min(drawn)[0] if len(drawn) == 1 else 0
        self._groups = Groups(plan)
        self._files = Files(plan, roots)
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

    def _decode(self, group: int) -> Rows:
        name, path, index = self._groups.location(group)
        rules = self._rules[name]
        wanted = ["example_id", *_TARGETS, *self._columns]
        wanted += ["sampled_ids"] if self.draws else []
        wanted += [c for t in self._temperatures for c in temper_columns(t)]
        batch = self._files.read(name, path, index, wanted)
        if missing := sorted(set(wanted) - set(batch.schema.names)):
            raise IntegrityError(f"file {path!r} of table {name!r} has no column {missing[0]!r}")
        self._check_types(batch, name)
        values = {field: batch[field] for field in wanted}
        stored = self._contents[name].k
        try:
            targets = SoftTargets.from_columns(values, stored, self.draws, self._temperatures)
            columns = {column: values[column] for column in self._columns}
            rows = Rows(targets, values["example_id"], columns)
            taken = self._groups.taken(group, len(rows))
            rows = rows if taken is None else rows.take(taken)
            if rules is not None:
                rows = _ruled(rows, rules)
        except IntegrityError as error:
            raise IntegrityError(f"file {path!r} of table {name!r}: {error}") from error
        if self._weighted and rows.position_weights is None:
            rows = replace(rows, position_weights=np.ones(len(rows.targets.ids), np.float32))
        return replace(rows, targets=_padded(rows.targets, self.k))

    def _check_types(self, batch: pa.RecordBatch, table: str) -> None:
        for name in self._columns:
            found = batch.schema.field(name).type
            first, where = self._types.setdefault(name, (found, table))
            if found != first:
                raise MismatchError(
                    f"column {name!r} is {first} in table {where!r}, {found} in {table!r}: "
                    "streams hand out one type"
                )


def _ruled(rows: Rows, rules: PositionRules) -> Rows:
    """`rows` with the positions that `rules` keep, and their weights where they weigh any."""
    keep = rules.keep(rows.targets)
    if not keep.all():
        targets, columns = keep_positions(rows.targets, rows.columns, keep)
        rows = replace(rows, targets=targets, columns=columns)
    counts = rows.targets.num_positions
    if len(counts) and not counts.min():
        empty = rows.example_ids[int(np.argmin(counts))].as_py()
        raise IntegrityError(
            f"example {empty!r} is left without a position by the plan's rules ({rules}): "
            "they were not made for these labels"
        )
    return replace(rows, position_weights=rules.weigh(rows.targets)) if rules.weights else rows


def _joined_weights(parts: Sequence[Rows]) -> Floats | None:
    weights = [part.position_weights for part in parts if part.position_weights is not None]
    return np.concatenate(weights) if weights else None


def _padded(targets: SoftTargets, k: int) -> SoftTargets:
    missing = ((0, 0), (0, k - targets.k))
    if targets.k == k:
        return targets
    return replace(
        targets,
        ids=np.pad(targets.ids, missing, constant_values=-1),
        logprobs=np.pad(targets.logprobs, missing, constant_values=-np.inf),
    )


def _check_label_space(tables: Mapping[str, Contents]) -> None:
    first = next(iter(tables), "")
    for name, contents in tables.items():
        for field in _ONE_SPACE:
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


def _check_temperatures(tables: Mapping[str, Contents], temperatures: Sequence[float]) -> None:
    for name, contents in tables.items():
        for temperature in temperatures:
            if temperature not in contents.temperatures:
                raise MismatchError(
                    f"temperature {temperature!r} is asked, table {name!r} stores "
                    f"{[1.0, *contents.temperatures]!r}; another cannot be derived: capture it"
                )

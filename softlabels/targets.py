"""Soft targets in memory: what every layer hands to the next, and what must hold of them.

B rows, P positions of a row, N = sum of P, k stored ids a position, m draws a position.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.arrays import ids_of_rows, means, nested
from softlabels.arrays import to_numpy as to_numpy
from softlabels.errors import DataError, IntegrityError
from softlabels.schema import FLOATS, INTS, temper_columns

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

MASS_TOLERANCE = 1e-3
"""How far head and tail mass may be from one after rounding (float16 keeps 11 bits)."""

UNKNOWN = {
    "tail": np.nan,
    "entropy": np.nan,
    "label_ids": -1,
    "label_logprobs": np.nan,
    "label_ranks": -1,
}


@dataclass(frozen=True)
class Temper:
    """What makes one extra temperature T exact.

    Attributes:
        shift: float32 [N], nats; logprob at T = logprob / T + shift.
        tail: float32 [N], nats, log of the mass outside the top k at T.
    """

    shift: Floats
    tail: Floats


@dataclass(frozen=True)
class SoftTargets:
    """The teacher's distributions of B rows, flat by position.

    Attributes:
        num_positions: int32 [B].
        ids: int32 [N, k], by falling probability; -1 pads last.
        logprobs: float32 [N, k], nats, of the full softmax at temperature 1; -inf where padded.
        tail: float32 [N], nats, log of the mass outside the top k, -inf when none; None: unknown.
        draws: int32 [N, m], drawn from the tail, may repeat, -1 when the tail is empty.
        entropy: float32 [N], nats, of the full distribution; None: unknown.
        label_ids: int32 [N], hard label, -1 where none.
        label_logprobs: float32 [N], nats, NaN where there is no label.
        label_ranks: int32 [N], 0 for the likeliest class, -1 where there is no label.
        temper: what is stored for each extra temperature.
    """

    num_positions: Ints
    ids: Ints
    logprobs: Floats
    tail: Floats | None = None
    draws: Ints | None = None
    entropy: Floats | None = None
    label_ids: Ints | None = None
    label_logprobs: Floats | None = None
    label_ranks: Ints | None = None
    temper: Mapping[float, Temper] = field(default_factory=dict)

    @property
    def k(self) -> int:
        """Stored ids a position."""
        return int(self.ids.shape[1])

    @property
    def num_draws(self) -> int:
        """Draws a position, 0 when none are stored."""
        return 0 if self.draws is None else int(self.draws.shape[1])

    def check(
        self,
        names: Sequence[str],
        num_classes: int | None = None,
        mass_tolerance: float = MASS_TOLERANCE,
    ) -> None:
        """Raises unless the invariants of stored targets hold.

        Args:
            names: B example ids, for messages.
            num_classes: V, when known; ids must be below it.
            mass_tolerance: how far head and tail mass together may be from 1.

        Raises:
            DataError: a shape, an id, an order or a mass is wrong; names the first bad example.
        """
        self._check_shapes(names)
        self._check_ids(names, num_classes)
        used = self.ids >= 0
        self._refuse(names, np.isnan(self.logprobs).any(1), "a NaN log-probability")
        self._refuse(names, (self.logprobs > 0).any(1), "a log-probability above 0")
        self._refuse(names, (used[:, 1:] & ~used[:, :-1]).any(1), "an id after padding")
        padded = (np.isfinite(self.logprobs) & ~used).any(1)
        self._refuse(names, padded, "padding with a probability")
        with np.errstate(invalid="ignore"):
            rising = np.diff(self.logprobs, axis=1) > 0
        self._refuse(names, rising.any(1), "log-probabilities that rise; they must fall")
        self._refuse(names, _repeated(self.ids), "an id twice in its top k")
        mass = np.exp(self.logprobs.astype(np.float64)).sum(1)
        self._refuse(names, mass > 1 + mass_tolerance, "a head mass above 1")
        if self.tail is not None:
            wrong = ~(np.abs(mass + np.exp(self.tail) - 1) <= mass_tolerance)
            self._refuse(names, wrong, "head and tail mass that do not sum to 1")
        if self.draws is not None and self.num_draws:
            inside = np.zeros(len(self.draws), bool)
            for drawn in self.draws.T:  # m times [N, k], for [N, m, k] may not fit in memory
                inside |= ((drawn[:, None] == self.ids) & (drawn >= 0)[:, None]).any(1)
            self._refuse(names, inside, "a draw that is in its own top k")

    def columns(self, sequences: bool = False) -> dict[str, pa.Array]:
        """The table columns of these targets, one entry a row, summaries included.

        Args:
            sequences: rows are sequences of a language model: even where each has one position,
                that has no `label` and `top1_id` to choose rows by, and they are null.
        """
        counts = self.num_positions
        out = {
            "num_positions": pa.array(counts, pa.int32()),
            "topk_ids": nested(self.ids, counts, INTS),
            "topk_logprobs": nested(self.logprobs, counts, FLOATS),
            "tail_logprob": nested(self.tail, counts, FLOATS),
            "sampled_ids": nested(self.draws, counts, INTS),
            "position_entropy": nested(self.entropy, counts, FLOATS),
            "label_ids": nested(self.label_ids, counts, INTS),
            "label_logprobs": nested(self.label_logprobs, counts, FLOATS),
            "label_ranks": nested(self.label_ranks, counts, INTS),
        }
        for temperature, temper in self.temper.items():
            shift, tail = temper_columns(temperature)
            out[shift] = nested(temper.shift, counts, FLOATS)
            out[tail] = nested(temper.tail, counts, FLOATS)
        return out | self._summaries(sequences)

    @classmethod
    def from_columns(
        cls,
        columns: Mapping[str, pa.Array],
        k: int,
        draws: int = 0,
        temperatures: Sequence[float] = (),
    ) -> Self:
        """Targets of the rows in `columns`, without a copy where Arrow's layout allows.

        Args:
            columns: table columns by name (Array, not ChunkedArray); absent or null ones are
                unknown, except num_positions, the top k and the temperatures that are asked for.
            k: ids a position, from lineage.
            draws: m, from lineage.
            temperatures: the extra ones to take.

        Raises:
            IntegrityError: a needed column is missing, one is of another type, or null in some
                rows and not in others, or a list is not as long as its row's positions times k
                (or m).
        """
        counts = _counts(columns["num_positions"])

        def flat(
            name: str, kind: type[np.generic], width: int | None = None, needed: bool = False
        ) -> Any:
            values = columns.get(name)
            if values is None and needed:
                raise IntegrityError(f"column {name!r} is missing")
            if values is None or (values.null_count == len(values) and not needed):
                return None
            return _flatten(name, values, counts, kind, width)

        temper = {}
        for temperature in temperatures:
            shift, tail = (
                flat(name, np.float32, needed=True) for name in temper_columns(temperature)
            )
            temper[temperature] = Temper(shift, tail)
        empty: Any = (
            np.zeros((int(counts.sum()), 0), np.int32),
            np.zeros((int(counts.sum()), 0), np.float32),
        )
        return cls(
            num_positions=counts,
            ids=flat("topk_ids", np.int32, k, needed=True) if k else empty[0],
            logprobs=flat("topk_logprobs", np.float32, k, needed=True) if k else empty[1],
            tail=flat("tail_logprob", np.float32),
            draws=flat("sampled_ids", np.int32, draws) if draws else None,
            entropy=flat("position_entropy", np.float32),
            label_ids=flat("label_ids", np.int32),
            label_logprobs=flat("label_logprobs", np.float32),
            label_ranks=flat("label_ranks", np.int32),
            temper=temper,
        )

    def map_positions(self, index: npt.NDArray[Any] | slice, num_positions: Ints) -> Self:
        """The positions `index` (integers, a mask over N, a slice), as rows of `num_positions`."""

        if isinstance(index, np.ndarray) and index.dtype == np.bool_:
            index = np.flatnonzero(index)

        def pick(value: Any) -> Any:
            if value is None:
                return None
            # take copies whole rows: two to four times as fast as value[index].
            return value[index] if isinstance(index, slice) else np.take(value, index, axis=0)

        names = [name for name in vars(self) if name not in ("num_positions", "temper")]
        values = {name: pick(getattr(self, name)) for name in names}
        temper = {t: Temper(pick(own.shift), pick(own.tail)) for t, own in self.temper.items()}
        return type(self)(num_positions=num_positions, temper=temper, **values)

    def take(self, rows: npt.NDArray[np.integer[Any]]) -> Self:
        """The rows `rows`, in that order; a row may come twice."""
        return self.map_positions(self.positions_of(rows), self.num_positions[rows])

    def positions_of(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
        """Which of the N positions are those of `rows`, row after row."""
        counts = self.num_positions[rows]
        if len(self.num_positions) == len(self.ids) and bool((self.num_positions == 1).all()):
            return rows
        starts = np.cumsum(self.num_positions) - self.num_positions
        ends = np.cumsum(counts)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
        return np.asarray(np.repeat(starts[rows], counts) + within)

    def slice(self, start: int, stop: int) -> Self:
        """The rows [start, stop), without a copy."""
        counts = self.num_positions[start:stop]
        first = int(self.num_positions[:start].sum())
        return self.map_positions(slice(first, first + int(counts.sum())), counts)

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, one part after the other; a single part is itself.

        What only some parts know is filled in where it is unknown: labels and ranks with -1, the
        rest with NaN, which no loss lets pass.

        Raises:
            DataError: there is no part, or k, draws or temperatures differ.
        """
        shapes = [(part.k, part.num_draws, tuple(sorted(part.temper))) for part in parts]
        if len(set(shapes)) != 1:
            found = ", ".join(repr(shape) for shape in sorted(set(shapes))) or "no part"
            raise DataError(
                f"cannot join soft targets: expected one (k, draws, temperatures), found {found}"
            )
        if len(parts) == 1:
            return parts[0]
        names = [f.name for f in fields(cls) if f.name != "temper"]
        temper = {
            t: Temper(
                np.concatenate([part.temper[t].shift for part in parts]),
                np.concatenate([part.temper[t].tail for part in parts]),
            )
            for t in parts[0].temper
        }
        return cls(**{name: _joined(name, parts) for name in names}, temper=temper)

    def _summaries(self, sequences: bool) -> dict[str, pa.Array]:
        counts = self.num_positions
        probs = np.exp(self.logprobs)
        top1 = probs[:, 0] if self.k else np.full(len(probs), np.nan, np.float32)
        second = probs[:, 1] if self.k > 1 else np.full(len(probs), np.nan, np.float32)
        single = not sequences and bool((counts == 1).all())
        return {
            "entropy": means(self.entropy, counts),
            "top1_prob": means(top1, counts),
            "margin": means(top1 - second, counts),
            "label": ids_of_rows(self.label_ids, single, len(counts)),
            "top1_id": ids_of_rows(self.ids[:, 0] if self.k else None, single, len(counts)),
        }

    def _check_ids(self, names: Sequence[str], num_classes: int | None) -> None:
        for value in (self.ids, self.draws, self.label_ids):
            if value is None:
                continue
            table = value if value.ndim == 2 else value[:, None]
            self._refuse(names, (table < -1).any(1), "an id below -1, which marks none")
            if num_classes is not None:
                above = (table >= num_classes).any(1)
                self._refuse(names, above, f"an id not below {num_classes}")

    def _check_shapes(self, names: Sequence[str]) -> None:
        total = int(self.num_positions.sum())
        if len(names) != len(self.num_positions):
            raise DataError(f"{len(names)} example ids for {len(self.num_positions)} rows")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.ndarray) and f.name != "num_positions" and len(value) != total:
                raise DataError(f"{f.name} has {len(value)} positions, num_positions say {total}")
        for temperature, temper in self.temper.items():
            if len(temper.shift) != total or len(temper.tail) != total:
                raise DataError(f"temperature {temperature}: not {total} shifts and tails")
        if self.logprobs.shape != self.ids.shape:
            raise DataError(f"ids have shape {self.ids.shape}, logprobs {self.logprobs.shape}")

    def _refuse(
        self, names: Sequence[str], bad: npt.NDArray[np.bool_] | np.bool_, what: str
    ) -> None:
        if bad.any():
            place = position_name(names, self.num_positions, int(np.argmax(bad)))
            raise DataError(f"{place} has {what}")


def position_name(names: Sequence[str], num_positions: Ints, position: int) -> str:
    """How a message calls one of N positions: "example 'a'", and "position 3" where it has more.

    Args:
        names: B example ids.
        num_positions: int32 [B].
        position: 0 to N - 1.
    """
    ends = np.cumsum(num_positions)
    row = int(np.searchsorted(ends, position, side="right"))
    count = int(num_positions[row])
    where = f" position {position - int(ends[row]) + count}" if count > 1 else ""
    return f"example {names[row]!r}{where}"


def _joined(name: str, parts: Sequence[SoftTargets]) -> Any:
    values = [getattr(part, name) for part in parts]
    known = [value for value in values if value is not None]
    if len(known) == len(values):
        return np.concatenate(values)
    if not known or name not in UNKNOWN:
        return None
    filled = [
        np.full(len(part.ids), UNKNOWN[name], known[0].dtype) if value is None else value
        for part, value in zip(parts, values, strict=True)
    ]
    return np.concatenate(filled)


def flat_lists(name: str, values: pa.Array, kind: type[np.generic]) -> tuple[Any, Ints]:
    """All elements of a list column, of type `kind`, and the length of each row's list.

    Raises:
        IntegrityError: it is no such column, a row has no list, or a list holds a null; `name` is
            what the message calls the column.
    """
    expected = pa.from_numpy_dtype(kind)
    if not pa.types.is_list(values.type) or values.type.value_type != expected:
        raise IntegrityError(f"column {name!r} is {values.type}: expected lists of {expected}")
    if values.null_count:
        raise IntegrityError(
            f"column {name!r} is null in {values.null_count} of {len(values)} rows that are stored "
            "together: expected a list in every one of them"
        )
    offsets = to_numpy(values.offsets, np.int32)
    first, last = (int(offsets[0]), int(offsets[-1])) if len(offsets) else (0, 0)
    flat = values.values.slice(first, last - first)  # as `flatten`, at a tenth of its cost
    if flat.null_count:
        raise IntegrityError(f"column {name!r} holds {flat.null_count} nulls inside its lists")
    return to_numpy(flat, kind), np.diff(offsets)


def _counts(values: pa.Array) -> Ints:
    if values.type != pa.int32() or values.null_count:
        raise IntegrityError(
            f"column 'num_positions' is {values.type} with {values.null_count} nulls: expected "
            "int32 without"
        )
    counts: Ints = to_numpy(values, np.int32)
    if (counts < 0).any():
        raise IntegrityError(f"column 'num_positions' holds {int(counts.min())}: below 0")
    return counts


def _flatten(
    name: str, values: pa.Array, counts: Ints, kind: type[np.generic], width: int | None
) -> Any:
    flat, lengths = flat_lists(name, values, kind)
    if not np.array_equal(lengths, counts * (1 if width is None else width)):
        per = "1" if width is None else str(width)
        raise IntegrityError(f"column {name!r}: a row does not hold num_positions x {per} values")
    return flat if width is None else flat.reshape(-1, width)


def _repeated(ids: Ints) -> npt.NDArray[np.bool_]:
    ordered = np.sort(ids, axis=1)
    return np.asarray(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1))

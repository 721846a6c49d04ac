"""Rows picked from many parts at once, straight into their place: targets are joined nowhere.

B rows picked, from parts that are row groups in memory, mapped, or records on disk; N positions
of theirs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import BadInputError
from softlabels.student.flat import arrays_of, targets_of
from softlabels.student.lease import Lease
from softlabels.student.records import RecordReader, Records
from softlabels.student.rows import Rows
from softlabels.targets import UNKNOWN, SoftTargets, Temper

Int64s = npt.NDArray[np.int64]
Values = npt.NDArray[Any]

LONG_VALUE = 512
"""Mean bytes of a column's values from which they are taken from their parts one by one."""


class Parts:
    """What rows are picked from.

    Args:
        parts: at least one, of one teacher, with the same draws, temperatures and columns; those
            that are not records with the same k.
    """

    def __init__(self, parts: Sequence[Rows | Records]) -> None:
        records = [part for part in parts if isinstance(part, Records)]
        if len(records) < len(parts) or len({part.arrays for part in records}) > 1:
            records = []
        self._records = RecordReader(records) if records else None
        found = [] if records else [_whole(part) for part in parts]
        lengths = np.array([len(part) for part in parts], np.int64)
        self._starts = np.cumsum(lengths) - lengths
        short = _single(found)
        self._short = _joined(found) if short else None
        self._long = _LongRows(found) if found and not short else None
        known = {n: np.array([_knows(part, n) for part in found], bool) for n in UNKNOWN}
        self._partly = {name: parts for name, parts in known.items() if not parts.all()}
        self._ids = _Column([part.example_ids for part in parts])
        self._columns = {
            name: _Column([part.columns[name] for part in parts]) for name in parts[0].columns
        }
        size = sum(part.row_bytes if isinstance(part, Records) else part.nbytes for part in parts)
        self.row_bytes = size / max(1, int(lengths.sum()))

    @property
    def on_disk(self) -> bool:
        """Whether rows are read as they are gathered."""
        return self._records is not None

    def gather(self, which: Int64s, index: Int64s) -> Rows:
        """The rows `index[i]` of part `which[i]`, for each i, in memory of their own.

        What only some parts know is filled in as `SoftTargets.concat` does.

        Args:
            which: int64 [B].
            index: int64 [B].

        Raises:
            BadInputError: a column would hold over 2 GB, more than an Arrow array can.
            GoneError: a file of records is not there any more.
        """
        at = self._starts[which] + index
        ids = self._ids.gather(which, index, at)
        columns = {name: one.gather(which, index, at) for name, one in self._columns.items()}
        if self._records is not None:
            return Rows(targets_of(*self._records.read(which, index)), ids, columns)
        lease = Lease(int(1.1 * self.row_bytes * len(which)))
        if self._short is not None:
            rows = _taken(self._short, at, ids, columns, lease)
        else:
            assert self._long is not None
            rows = self._long.gather(which, at, ids, columns, lease)
        unknown: dict[str, Any] = {
            n: None for n, known in self._partly.items() if not known[which].any()
        }
        return replace(rows, targets=replace(rows.targets, **unknown)) if unknown else rows


def whole_rows(records: Records) -> Rows:
    """All rows of a file, in memory.

    Raises:
        GoneError: it is not there any more.
    """
    index = np.arange(len(records))
    targets = targets_of(*RecordReader([records]).read(np.zeros_like(index), index))
    return Rows(targets, records.example_ids, records.columns)


def _whole(part: Rows | Records) -> Rows:
    return whole_rows(part) if isinstance(part, Records) else part


def _knows(part: Rows, name: str) -> bool:
    return getattr(part.targets, name) is not None


def _single(parts: Sequence[Rows]) -> bool:
    """Whether all rows have one position each."""
    return bool(parts) and all(
        len(part) == len(part.targets.ids) and bool((part.targets.num_positions == 1).all())
        for part in parts
    )


def _joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts; of example ids and columns none.

    One more copy in order is cheap beside what it saves: short rows are then picked by one take an
    array, straight into their place.
    """
    return Rows.concat(
        [replace(part, example_ids=part.example_ids[:0], columns={}) for part in parts]
    )


def _taken(
    joined: Rows, at: Int64s, ids: pa.Array, columns: dict[str, pa.Array], lease: Lease
) -> Rows:
    """The rows `at`, int64 [B], of rows of one position each."""

    def take(values: Any) -> Any:
        if values is None:
            return None
        out = lease.empty((len(at), *values.shape[1:]), values.dtype)
        return np.take(values, at, axis=0, out=out, mode="clip")  # else numpy would copy once more

    soft = joined.targets
    names = [f.name for f in fields(SoftTargets) if f.name != "temper"]
    found = {name: take(getattr(soft, name)) for name in names}
    temper = {t: Temper(take(own.shift), take(own.tail)) for t, own in soft.temper.items()}
    own = (take(values) for values in (joined.position_weights, joined.kept, joined.whole))
    return Rows(SoftTargets(**found, temper=temper), ids, columns, *own)


class _LongRows:
    """Rows of many positions in parts, each copied at once from its part into its place."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        counts = [part.targets.num_positions for part in parts]
        self._counts = np.concatenate(counts)
        self._firsts = np.concatenate([np.cumsum(n, dtype=np.int64) - n for n in counts])
        named = [dict(_positions_of(part)) for part in parts]
        names = dict.fromkeys(name for one in named for name in one)
        self._arrays = {name: [one.get(name) for one in named] for name in names}
        whole = [part.whole for part in parts if part.whole is not None]
        self._whole = np.concatenate(whole) if whole else None

    def gather(
        self, which: Int64s, at: Int64s, ids: pa.Array, columns: dict[str, pa.Array], lease: Lease
    ) -> Rows:
        """The rows `at` of all, int64 [B], which are in the parts `which`."""
        counts = self._counts[at]
        stops = np.cumsum(counts, dtype=np.int64)
        places = [which, self._firsts[at], self._firsts[at] + counts, stops - counts, stops]
        rows = list(zip(*(values.tolist() for values in places), strict=True))
        total = int(stops[-1]) if len(stops) else 0
        found = {
            name: _copied(arrays, rows, total, UNKNOWN.get(name), lease)
            for name, arrays in self._arrays.items()
            if name in UNKNOWN or all(array is not None for array in arrays)
        }
        weights, kept = found.pop("position_weights", None), found.pop("kept", None)
        whole = None if self._whole is None else self._whole[at]
        return Rows(targets_of(counts, found), ids, columns, weights, kept, whole)


def _positions_of(part: Rows) -> Iterator[tuple[str, Values]]:
    yield from arrays_of(part.targets)
    if part.position_weights is not None:
        yield "position_weights", part.position_weights
    if part.kept is not None:
        yield "kept", part.kept


def _copied(
    arrays: Sequence[Values | None],
    rows: Sequence[tuple[int, int, int, int, int]],
    total: int,
    unknown: float | None,
    lease: Lease,
) -> Values:
    """Of each row (part, first, last, to, end) the positions [first, last), at [to, end)."""
    like = next(array for array in arrays if array is not None)
    out = lease.empty((total, *like.shape[1:]), like.dtype)
    for part, first, last, to, end in rows:
        array = arrays[part]
        out[to:end] = unknown if array is None else array[first:last]
    return out


class _Column:
    """An Arrow column of all parts; joined at first use where that is cheap."""

    def __init__(self, arrays: list[pa.Array]) -> None:
        self._arrays = arrays
        self._joined: pa.Array | None = None
        size = sum(array.nbytes for array in arrays)
        self._long = size >= LONG_VALUE * sum(map(len, arrays))

    def gather(self, which: Int64s, index: Int64s, at: Int64s) -> pa.Array:
        try:
            if self._long and len(which):
                pairs = zip(which.tolist(), index.tolist(), strict=True)
                return pa.concat_arrays([self._arrays[part].slice(at, 1) for part, at in pairs])
            if self._joined is None:
                self._joined, self._arrays = pa.concat_arrays(self._arrays), []
        except pa.ArrowInvalid as error:
            raise BadInputError(
                f"a window's rows do not fit into one Arrow array ({error}): choose a smaller "
                "shuffle_rows"
            ) from error
        return pc.take(self._joined, pa.array(at), boundscheck=False)

"""Rows picked from many parts at once, straight into their place: targets are joined nowhere.

B rows picked, from parts that are row groups in memory, mapped, or records on disk; N positions
of theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import BadInputError
from softlabels.student.flat import targets_of
from softlabels.student.lease import Lease
from softlabels.student.records import RecordReader, Records
from softlabels.student.rows import Rows
from softlabels.targets import UNKNOWN, SoftTargets, Temper

Int64s = npt.NDArray[np.int64]
Values = npt.NDArray[Any]

LONG_ROW = 2048
"""Bytes from which copying rows one by one beats numpy's take into a copy of its own."""

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
        self._parts = [] if records else [_whole(part) for part in parts]
        self._ids = _Column([part.example_ids for part in parts])
        self._columns = {
            name: _Column([part.columns[name] for part in parts]) for name in parts[0].columns
        }
        size = sum(part.row_bytes if isinstance(part, Records) else part.nbytes for part in parts)
        self.row_bytes = size / max(1, sum(map(len, parts)))

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
        ids = self._ids.gather(which, index)
        columns = {name: column.gather(which, index) for name, column in self._columns.items()}
        if self._records is not None:
            return Rows(targets_of(*self._records.read(which, index)), ids, columns)
        lease = Lease(int(1.1 * self.row_bytes * len(which)))
        return _gathered_rows(self._parts, which, index, ids, columns, lease)


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


@dataclass(frozen=True)
class _Picks:
    """What goes where, in units of `span` values: of each part `source`, to `place` of `total`."""

    source: list[Int64s]
    place: list[Int64s]
    total: int
    span: int = 1


def _gathered_rows(
    parts: Sequence[Rows],
    which: Int64s,
    index: Int64s,
    ids: pa.Array,
    columns: dict[str, pa.Array],
    lease: Lease,
) -> Rows:
    order = np.argsort(which, kind="stable")
    edges = np.searchsorted(which[order], np.arange(len(parts) + 1)).tolist()
    used = [i for i in range(len(parts)) if edges[i] < edges[i + 1]] or [0]
    parts, place = [parts[i] for i in used], [order[edges[i] : edges[i + 1]] for i in used]
    rows = _Picks([index[at] for at in place], place, len(which))
    counts = _filled([part.targets.num_positions for part in parts], rows, lease)
    positions = _of_positions(parts, rows, counts)

    def all_of(name: str, get: Callable[[Rows], Values | None]) -> Any:
        return _gathered(name, [get(part) for part in parts], positions, lease)

    names = [f.name for f in fields(SoftTargets) if f.name not in ("num_positions", "temper")]
    found = {name: all_of(name, lambda part, n=name: getattr(part.targets, n)) for name in names}  # type: ignore[misc]
    temper = {
        t: Temper(
            all_of("shift", lambda part, t=t: part.targets.temper[t].shift),  # type: ignore[misc]
            all_of("tail", lambda part, t=t: part.targets.temper[t].tail),  # type: ignore[misc]
        )
        for t in parts[0].targets.temper
    }
    whole = [part.whole for part in parts if part.whole is not None]
    return Rows(
        SoftTargets(num_positions=counts, **found, temper=temper),
        ids,
        columns,
        all_of("position_weights", lambda part: part.position_weights),
        all_of("kept", lambda part: part.kept),
        _filled(whole, rows, lease) if whole else None,
    )


def _of_positions(parts: Sequence[Rows], rows: _Picks, counts: Values) -> _Picks:
    """The picks of positions; of whole rows, where all rows of the parts have as many."""
    each = {int(n) for part in parts for n in _ends(part.targets.num_positions)}
    if len(each) == 1 and (span := each.pop()):
        return _Picks(rows.source, rows.place, rows.total, span)
    starts = np.cumsum(counts, dtype=np.int64) - counts
    source, place = [], []
    for part, index, at in zip(parts, rows.source, rows.place, strict=True):
        own = counts[at]
        ends = np.cumsum(own, dtype=np.int64)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - own, own)
        before = np.cumsum(part.targets.num_positions, dtype=np.int64) - part.targets.num_positions
        source.append(np.repeat(before[index], own) + within)
        place.append(np.repeat(starts[at], own) + within)
    return _Picks(source, place, int(counts.sum()))


def _ends(counts: Values) -> tuple[int, ...]:
    """Least and greatest; nothing of an empty part."""
    return (counts.min(), counts.max()) if len(counts) else ()


def _gathered(
    name: str, values: Sequence[Values | None], picks: _Picks, lease: Lease
) -> Values | None:
    known = [array for array in values if array is not None]
    if not known or (len(known) < len(values) and name not in UNKNOWN):
        return None
    return _filled(values, picks, lease, UNKNOWN.get(name))


def _filled(
    values: Sequence[Values | None], picks: _Picks, lease: Lease, unknown: float | None = None
) -> Values:
    """`picks` of one array a part; where there is none, `unknown`."""
    like = next(array for array in values if array is not None)
    width = int(np.prod(like.shape[1:], dtype=np.int64)) * picks.span
    out = lease.empty((picks.total, width), like.dtype)
    for array, source, place in zip(values, picks.source, picks.place, strict=True):
        if array is None:
            out[place] = unknown
            continue
        rows = array.reshape(-1, width) if width else array.reshape(len(array), 0)
        if width * out.itemsize >= LONG_ROW:
            for to, at in zip(place.tolist(), source.tolist(), strict=True):
                out[to] = rows[at]
        elif width == 1:
            out[place, 0] = np.take(rows[:, 0], source)
        else:
            out[place] = np.take(rows, source, axis=0)
    return out.reshape(picks.total * picks.span, *like.shape[1:])


class _Column:
    """An Arrow column of all parts; joined at first use where that is cheap."""

    def __init__(self, arrays: list[pa.Array]) -> None:
        self._arrays = arrays
        self._joined: pa.Array | None = None
        lengths = np.array([len(array) for array in arrays], np.int64)
        self._starts = np.cumsum(lengths) - lengths
        size = sum(array.nbytes for array in arrays)
        self._long = size >= LONG_VALUE * int(lengths.sum())

    def gather(self, which: Int64s, index: Int64s) -> pa.Array:
        try:
            if self._long and len(which):
                pairs = zip(which.tolist(), index.tolist(), strict=True)
                return pa.concat_arrays([self._arrays[part].slice(at, 1) for part, at in pairs])
            if self._joined is None:
                self._joined = pa.concat_arrays(self._arrays)
        except pa.ArrowInvalid as error:
            raise BadInputError(
                f"a window's rows do not fit into one Arrow array ({error}): choose a smaller "
                "shuffle_rows"
            ) from error
        return self._joined.take(pa.array(self._starts[which] + index))

"""Decoded rows of a plan, however many teachers speak of them: one flat value to take apart."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import BadInputError
from softlabels.targets import Floats, Ints, SoftTargets

Index = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Rows:
    """Decoded rows: soft targets, example ids and the columns asked, all of one length.

    B rows, N positions of theirs, T teachers.

    Attributes:
        targets: of the first teacher.
        example_ids: string [B].
        columns: those asked, by name, [B].
        position_weights: float32 [N]; None where the plan weighs no position.
        kept: int32 [N], where each position was in its row before position rules; None: unknown.
        whole: int32 [B], positions of each row before position rules; None with `kept`.
        others: of each further teacher, with the positions of `targets`.
        member_weights: float32 [B, T]; None: one teacher speaks, and counts 1.
    """

    targets: SoftTargets
    example_ids: pa.Array
    columns: Mapping[str, pa.Array]
    position_weights: Floats | None = None
    kept: Ints | None = None
    whole: Ints | None = None
    others: tuple[SoftTargets, ...] = ()
    member_weights: Floats | None = None

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        own = (self.position_weights, self.kept, self.whole, self.member_weights)
        values = [value for value in own if value is not None]
        for soft in (self.targets, *self.others):
            values += [v for v in vars(soft).values() if isinstance(v, np.ndarray)]
            values += [a for t in soft.temper.values() for a in (t.shift, t.tail)]
        arrays = [self.example_ids, *self.columns.values()]
        return sum(int(value.nbytes) for value in [*values, *arrays])

    @cached_property
    def _edges(self) -> npt.NDArray[np.int64]:
        """Positions before each row, int64 [B + 1]: batches are cut of the same rows in turn."""
        return np.concatenate([[0], np.cumsum(self.targets.num_positions, dtype=np.int64)])

    def take(self, index: Index) -> Self:
        """The rows `index`, in that order; a row may come twice."""
        picked = pa.array(index)
        positions = self.targets.positions_of(index)
        counts = self.targets.num_positions[index]
        return type(self)(
            self.targets.map_positions(positions, counts),
            self.example_ids.take(picked),
            {name: values.take(picked) for name, values in self.columns.items()},
            _at(self.position_weights, positions),
            _at(self.kept, positions),
            _at(self.whole, index),
            tuple(soft.map_positions(positions, counts) for soft in self.others),
            _at(self.member_weights, index),
        )

    def slice(self, start: int, stop: int) -> Self:
        """The rows [start, stop), without a copy."""
        rows = slice(start, stop)
        positions = slice(int(self._edges[start]), int(self._edges[stop]))
        counts = self.targets.num_positions[rows]
        return type(self)(
            self.targets.map_positions(positions, counts),
            self.example_ids.slice(start, stop - start),
            {n: values.slice(start, stop - start) for n, values in self.columns.items()},
            _at(self.position_weights, positions),
            _at(self.kept, positions),
            _at(self.whole, rows),
            tuple(soft.map_positions(positions, counts) for soft in self.others),
            _at(self.member_weights, rows),
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
            _concat(part.position_weights for part in parts),
            _concat(part.kept for part in parts),
            _concat(part.whole for part in parts),
            tuple(map(SoftTargets.concat, zip(*(p.others for p in parts), strict=True))),
            _concat(part.member_weights for part in parts),
        )


def _at(values: "np.ndarray[Any, Any] | None", index: Index | slice) -> Any:
    return None if values is None else values[index]


def _concat(parts: "Iterator[np.ndarray[Any, Any] | None]") -> Any:
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None

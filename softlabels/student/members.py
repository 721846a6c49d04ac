"""What the further teachers of an ensemble plan say of the rows that the first one gives.

A member is one of a row's teachers; the first brings example ids, hard labels, columns and
position rules. The others are read like plans of their own, and checked against it row by row.

B rows, N positions of theirs as the first has them, T members.
"""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import IntegrityError
from softlabels.plan import Plan
from softlabels.student.held import Held
from softlabels.student.localcache import LocalCache
from softlabels.student.order import Int64s
from softlabels.student.reader import CACHE_BYTES, Reader, check_label_space
from softlabels.student.rows import Rows
from softlabels.targets import Floats, Ints, SoftTargets, Temper, to_numpy


def slot_plan(plan: Plan, slot: int) -> Plan:
    """What the member `slot` reads, as a plan of its own; of further ones without position rules.

    Its tables are those that it reads. A plan without ensembles is its own slot 0.
    """
    if plan.num_members == 1:
        return plan
    entries = plan.member(slot)
    assert entries is not None
    used = entries.filter(pc.greater(entries["num_rows"], 0))
    names = set(used["table"].unique().to_pylist())
    tables = {name: table for name, table in plan.tables.items() if name in names}
    if slot:
        tables = {n: t.model_copy(update={"positions": None}) for n, t in tables.items()}
    return dataclasses.replace(plan, tables=tables, entries=entries)


class Members:
    """The further members of a plan's rows, and the weights of all.

    Args:
        plan: one with at least two members.
        temperatures: extra temperatures to decode.
        roots: where tables are now, by name.
        cache_bytes: how much decoded data to keep of each member.
        local: where decoded row groups may lie ready; None: nowhere.
        fill: whether to put there what is decoded.

    Raises:
        MismatchError: a temperature is not stored, or members do not share their label space.
    """

    def __init__(
        self,
        plan: Plan,
        temperatures: Sequence[float] = (),
        roots: Mapping[str, str] | None = None,
        cache_bytes: int = CACHE_BYTES,
        local: LocalCache | None = None,
        fill: bool = False,
    ) -> None:
        check_label_space({name: table.contents for name, table in plan.tables.items()})
        slots = range(plan.num_members)
        plans = [slot_plan(plan, slot) for slot in slots[1:]]
        self._readers = [
            Reader(
                own,
                (),
                temperatures,
                own.roots_of(roots or {}),
                cache_bytes,
                local=local,
                fill=fill,
            )
            for own in plans
        ]
        self._temperatures = [float(t) for t in dict.fromkeys(temperatures) if t != 1]
        self._weights = [_Weights(plan.member_weights(slot)) for slot in slots]
        self._tables = [own.entries["table"] for own in (slot_plan(plan, 0), *plans)]

    def hold(self, entries: Int64s, closed: threading.Event) -> "HeldMembers | None":
        """What the others say of all that `entries` take, in memory or mapped meanwhile.

        Args:
            entries: of the plan, int64 [any].
            closed: whether anybody still wants it; once it is set, None.
        """
        held: list[Held | None] = []
        for reader, weights in zip(self._readers, self._weights[1:], strict=True):
            there = entries[weights.present[entries]]
            found = reader.hold(there, closed) if len(there) else None
            if len(there) and found is None:
                return None
            held.append(found)
        return HeldMembers(self, held)

    def join(
        self, first: Rows, entries: Int64s, rows: Int64s, closed: threading.Event
    ) -> Rows | None:
        """`first` with what the others say of its rows; None once `closed`.

        Args:
            first: B rows, tracked where the plan has position rules.
            entries: of the plan, for each row.
            rows: which of those that the entry takes, for each row.
            closed: whether anybody still wants it.

        Raises:
            IntegrityError: a member's rows are other examples, or of other positions.
        """
        held = self.hold(entries, closed)
        return None if held is None else held.join(first, entries, rows)

    def joined(
        self, held: Sequence[Held | None], first: Rows, entries: Int64s, rows: Int64s
    ) -> Rows:
        """As `join`, of what is held for each further member."""
        others = [
            self._of(slot, one, first, entries, rows) for slot, one in enumerate(held, start=1)
        ]
        weights = [weights.of(entries, rows) for weights in self._weights]
        return dataclasses.replace(
            first,
            kept=None,
            whole=None,
            others=tuple(others),
            member_weights=np.stack(weights, axis=1),
        )

    def _of(
        self, slot: int, held: Held | None, first: Rows, entries: Int64s, rows: Int64s
    ) -> SoftTargets:
        """The member's targets, with dummies in the rows that have no such member."""
        places = np.flatnonzero(self._weights[slot].present[entries])
        if not len(places):
            return self._dummies(slot, first.targets.num_positions)
        assert held is not None
        found = held.gather(entries[places], rows[places])
        self._check(slot, first, found, places, entries)
        there = first.targets.positions_of(places)
        counts = first.targets.num_positions[places]
        targets = found.targets
        if first.kept is not None:
            whole = targets.num_positions.astype(np.int64)
            starts = np.repeat(np.cumsum(whole) - whole, counts)
            targets = targets.map_positions(starts + first.kept[there], counts)
        if len(places) == len(first):
            return targets
        return _spread(self._dummies(slot, first.targets.num_positions), targets, there)

    def _check(self, slot: int, first: Rows, found: Rows, places: Int64s, entries: Int64s) -> None:
        mine = first.example_ids.take(pa.array(places))
        whole = first.targets.num_positions if first.whole is None else first.whole
        counts = (whole[places], found.targets.num_positions)
        if mine.equals(found.example_ids) and np.array_equal(*counts):
            return
        same = np.array(pc.equal(mine, found.example_ids).to_pylist(), bool)
        row = int(np.argmin(same & (counts[0] == counts[1])))
        entry = int(entries[places[row]])
        names = [self._tables[number][entry].as_py() for number in (0, slot)]
        ids = [values[row].as_py() for values in (mine, found.example_ids)]
        what = [
            f"example {one!r} of {int(n[row])} positions"
            for one, n in zip(ids, counts, strict=True)
        ]
        raise IntegrityError(
            f"entry {entry} of the plan pairs {what[0]} in table {names[0]!r} with {what[1]} in "
            f"table {names[1]!r}: it was not made for these labels"
        )

    def _dummies(self, slot: int, counts: Ints) -> SoftTargets:
        """Rows that say nothing: no id, all mass in the tail."""
        reader, n = self._readers[slot - 1], int(counts.sum())

        def full(value: float, width: int | None = None, kind: Any = np.float32) -> Any:
            return np.full((n,) if width is None else (n, width), value, kind)

        return SoftTargets(
            num_positions=counts,
            ids=full(-1, reader.k, np.int32),
            logprobs=full(-np.inf, reader.k),
            tail=full(0),
            draws=full(-1, reader.draws, np.int32) if reader.draws else None,
            temper={t: Temper(full(0), full(0)) for t in self._temperatures},
        )


class HeldMembers:
    """What the further members say of some entries, in memory or mapped as long as this lives."""

    def __init__(self, members: Members, held: Sequence[Held | None]) -> None:
        self._members, self._held = members, held

    def join(self, first: Rows, entries: Int64s, rows: Int64s) -> Rows:
        """`first` with what the others say of its rows; see `Members.join`."""
        return self._members.joined(self._held, first, entries, rows)


class _Weights:
    """A member's weight in every row of a plan, and which entries have such a member."""

    def __init__(self, lists: pa.ListArray) -> None:
        offsets = to_numpy(lists.offsets, np.int32).astype(np.int64)
        self._starts = offsets[:-1] - offsets[0]
        self._values: Floats = to_numpy(lists.flatten(), np.float32)
        self.present = np.diff(offsets) > 0

    def of(self, entries: Int64s, rows: Int64s) -> Floats:
        """Float32 [B], 0 where an entry has no such member."""
        found = np.zeros(len(entries), np.float32)
        here = self.present[entries]
        found[here] = self._values[self._starts[entries[here]] + rows[here]]
        return found


def _spread(dummies: SoftTargets, found: SoftTargets, positions: npt.NDArray[Any]) -> SoftTargets:
    """`dummies` with `found` at `positions`. What only `found` knows is unknown elsewhere."""
    n = len(dummies.ids)

    def put(name: str, unknown: float) -> Any:
        given, out = getattr(found, name), getattr(dummies, name)
        if given is None:
            return out
        if out is None:
            out = np.full((n, *given.shape[1:]), unknown, given.dtype)
        out[positions] = given
        return out

    for temperature, own in found.temper.items():
        dummies.temper[temperature].shift[positions] = own.shift
        dummies.temper[temperature].tail[positions] = own.tail
    unknown = {"label_ids": -1, "label_ranks": -1}
    names = [f.name for f in dataclasses.fields(found) if f.name not in ("num_positions", "temper")]
    return dataclasses.replace(
        dummies, **{name: put(name, unknown.get(name, np.nan)) for name in names}
    )

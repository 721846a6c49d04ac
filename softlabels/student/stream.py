"""Plan to batches: each row once an epoch, in an order that only plan, seed and epoch decide.

The state after any batch is a few numbers. It resumes at once, on other ranks or with another
batch size, across an epoch border.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from softlabels.errors import BadInputError, MismatchError
from softlabels.plan import Plan
from softlabels.student.files import require_roots
from softlabels.student.localcache import LocalCache, open_cache
from softlabels.student.members import Members, slot_plan
from softlabels.student.order import check_ranks
from softlabels.student.readahead import ReadAhead
from softlabels.student.reader import CACHE_BYTES, Reader
from softlabels.student.rows import Rows
from softlabels.student.shares import entry_column, plan_order
from softlabels.student.windows import Share, Window, Windows
from softlabels.student.zipped import SourceFiles
from softlabels.targets import Floats, SoftTargets

DECODED_RATIO = 4
"""Bytes in memory for one in a file, at most, of targets; what decides on a local cache."""

WINDOW_BYTES = 32 << 20
"""Of files, that are shuffled among each other: in memory they are a few times as much."""


@dataclass(frozen=True)
class Member:
    """A further teacher of an ensemble plan's rows.

    Attributes:
        targets: with the positions of the batch's targets. A row that this teacher does not speak
            of has the weight 0 and says nothing: no id, all mass in its tail.
    """

    targets: SoftTargets


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch, B of them; none where the batch is tiny.

    Arrays are the batch's own to write to; they share memory with batches nearby.

    Attributes:
        targets: in stream order; k is the largest of the plan's tables, shorter rows end with
            (-1, -inf). Fields that no row of the batch knows are None.
        example_ids: string [B].
        columns: those asked, by name, [B].
        loss_weights: float32 [B].
        position_weights: float32 [N], of the positions in `targets`; None where the plan weighs
            none, so that each counts 1.
        others: the further teachers of an ensemble plan; T - 1 of them, none in other plans.
        member_weights: float32 [B, T], what the target of each teacher counts, `targets` first; a
            row's sum is 1. None in plans without ensembles.
        inputs: what the student is called with, where an `InputStream` has made it; else None.
        epoch: from 0.
        position: rows of this epoch before the batch, over all ranks.
        global_weight: sum of the loss weights over all ranks: what gradients are divided by.
    """

    targets: SoftTargets
    example_ids: pa.Array
    columns: dict[str, pa.Array]
    loss_weights: Floats
    epoch: int
    position: int
    global_weight: float
    position_weights: Floats | None = None
    others: tuple[Member, ...] = ()
    member_weights: Floats | None = None
    inputs: Any = None

    def __len__(self) -> int:
        return len(self.example_ids)


class Stream:
    """The batches of a plan, from where it stands.

    Iterating goes on from the present state, over epoch borders; a batch never crosses one, so
    the last of an epoch may be short. One iteration runs at a time: a new one, or
    `load_state_dict`, ends the former.

    The plan's position rules are applied: batches hold only the positions that they keep.

    Memory: the row groups of two blocks of each source, the one that is handed out and the next,
    decoded whole or mapped from the local cache: a source's share of `shuffle_rows`, and up to a
    row group more; `read_ahead` + 2 parts of PIECE_BYTES, or of a block where that is less; and
    `cache_bytes`. A position of 16 stored ids and 16 draws takes 212 bytes, and about 70 in a file:
    WINDOW_BYTES of files are 100 MB. In an ensemble plan blocks and parts are so for each teacher.

    Args:
        plan: what to read.
        batch_size: rows of a global batch, over all ranks.
        seed: of the order.
        epochs: how many from the start of training; None: without end.
        shuffle: False reads in plan order.
        columns: further columns of every batch.
        temperatures: extra temperatures whose shift and tail every batch holds. Of a table with a
            temperature of its own, that times these.
        roots: where tables are now, by their name in the plan.
        rank: which rank this is.
        world_size: ranks, at most 64.
        shuffle_rows: rows that are shuffled among each other; part of what decides the order.
            None: what `window_rows` gives for the plan.
        read_ahead: parts of a window that a thread gathers ahead.
        cache_bytes: decoded data kept in memory, so that later epochs of a small plan cost a gather
            only; those of larger plans are on local disk (`localcache`).
        worker: the first batch that this stream hands out; for one of several processes that share
            a rank's batches, as `loader` makes them.
        workers: of which batches it hands out every so many.
        source: where columns are that tables do not carry; its rows' bytes decide `window_rows`.

    Raises:
        BadInputError: an argument is out of range, the plan has no rows, a column or a root names
            nothing.
        MismatchError: a temperature is not stored, tables do not share their label space, or rows
            are of no file of `source`.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        batch_size: int,
        seed: int = 0,
        epochs: int | None = None,
        shuffle: bool = True,
        columns: Sequence[str] = (),
        temperatures: Sequence[float] = (),
        roots: Mapping[str, str] | None = None,
        rank: int = 0,
        world_size: int = 1,
        shuffle_rows: int | None = None,
        read_ahead: int = 2,
        cache_bytes: int = CACHE_BYTES,
        worker: int = 0,
        workers: int = 1,
        source: SourceFiles | None = None,
    ) -> None:
        check_ranks(rank, world_size)
        if not 0 <= worker < workers:
            raise BadInputError(f"worker: expected 0 to {workers - 1}, found {worker!r}")
        beside = 0.0 if source is None else source.row_bytes(columns)
        shuffle_rows = window_rows(plan, beside) if shuffle_rows is None else shuffle_rows
        _require(1, batch_size=batch_size, shuffle_rows=shuffle_rows, read_ahead=read_ahead)
        _require(0, epochs=epochs or 0)
        self._order = plan_order(plan, int(seed), shuffle, shuffle_rows)
        weights = entry_column(plan, "loss_weight", np.float32)
        if not self.rows_per_epoch:
            raise BadInputError("the plan has no rows: an epoch of it would never end")
        first, several, roots = slot_plan(plan, 0), plan.num_members > 1, dict(roots or {})
        require_roots(plan, roots)
        local, fill = local_cache(plan, roots, cache_bytes, epochs, beside)
        cache_bytes //= plan.num_members
        ruled = any(table.positions is not None for table in first.tables.values())
        self._reader = Reader(
            first,
            columns,
            temperatures,
            first.roots_of(roots),
            cache_bytes,
            several and ruled,
            local,
            fill,
            source,
        )
        members = Members(plan, temperatures, roots, cache_bytes, local, fill) if several else None
        share = Share(batch_size, rank, world_size, workers)
        self._windows = Windows(self._order, weights, self._reader, members, share, epochs)
        self._batch_size = batch_size
        self._worker, self._workers = worker, workers
        self._epochs = epochs
        self._depth = read_ahead
        self._epoch, self._position = self._after(0, 0, worker)
        self._ahead: ReadAhead[Window] | None = None
        self._waited = 0.0

    @property
    def rows_per_epoch(self) -> int:
        """Rows an epoch over all ranks, repeats counted."""
        return self._order.rows_per_epoch

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of a whole epoch, the short one counted."""
        return -(-self.rows_per_epoch // self._batch_size)

    @property
    def k(self) -> int:
        """Ids a position of every batch."""
        return self._reader.k

    @property
    def draws(self) -> int:
        """Tail draws a position; 0 unless all tables hold equally many of one temperature."""
        return self._reader.draws

    @property
    def waited_seconds(self) -> float:
        """Seconds that the consumer has waited for data so far."""
        return self._waited + (self._ahead.waited if self._ahead else 0.0)

    def __len__(self) -> int:
        return self.batches_per_epoch

    def state_dict(self) -> dict[str, int | str]:
        """Where the stream stands after the last batch handed out, and what decides its order.

        Below 1 KB, whatever the plan. Of a worker: where the next batch is that it hands out.
        """
        found = {**self._order.identity, "epoch": self._epoch, "position": self._position}
        if self._workers > 1:
            found |= {"worker": self._worker, "workers": self._workers}
        return found

    def state_after(self, batch: Batch) -> dict[str, int | str]:
        """Where a stream of this plan and batch size stands when it has handed out a batch."""
        epoch, position = self._after(batch.epoch, batch.position, 1)
        return {**self._order.identity, "epoch": epoch, "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to where another stream of this plan and order stood.

        Batch size, rank and number of ranks may differ.

        Raises:
            MismatchError: plan, seed or shuffling differ, so there is no such place in this order.
            BadInputError: the state lacks an entry, or stands outside of an epoch.
        """
        identity = self._order.identity
        if missing := sorted({*identity, "epoch", "position"} - set(state)):
            raise BadInputError(f"stream state: {missing[0]!r} is missing, found {sorted(state)!r}")
        for name, mine in identity.items():
            if state[name] != mine:
                raise MismatchError(
                    f"stream state: {name} is {state[name]!r}, this stream has {mine!r}; the order "
                    "would be another"
                )
        epoch, position = state["epoch"], state["position"]
        whole = isinstance(epoch, int) and isinstance(position, int)
        if not whole or epoch < 0 or not 0 <= position < self.rows_per_epoch:
            raise BadInputError(
                f"stream state: epoch {epoch!r}, position {position!r} is not a place in epochs of "
                f"{self.rows_per_epoch} rows"
            )
        worker = self._worker
        if "workers" in state:
            own, theirs = (worker, self._workers), (state.get("worker"), state["workers"])
            if own != theirs:
                raise MismatchError(
                    f"stream state: of worker {theirs[0]!r} of {theirs[1]!r}, this one is {own[0]} "
                    f"of {own[1]}: expected `stream_state` of the states of all"
                )
            worker = 0
        self._end_iteration()
        self._epoch, self._position = self._after(epoch, position, worker)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from the present state on.

        Raises:
            StorageError: a file is missing.
            IntegrityError: a file is not the one that the plan names.
        """
        self._end_iteration()
        begin = (self._epoch, self._position)
        ahead = ReadAhead(lambda closed: self._windows.read(*begin, closed), self._depth)
        self._ahead = ahead
        window: Window | None = None
        try:
            while self._epochs is None or self._epoch < self._epochs:
                epoch, start = self._epoch, self._position
                stop = min(start + self._batch_size, self.rows_per_epoch)
                pieces = []
                while start < stop:
                    while window is None or window.epoch != epoch or window.stop <= start:
                        window = next(ahead)
                    end = min(stop, window.stop)
                    pieces.append(window.cut(start, end))
                    start = end
                batch = _batch(pieces, epoch, self._position)
                self._epoch, self._position = self._after(epoch, self._position, self._workers)
                yield batch
                if self._ahead is not ahead:
                    raise BadInputError(
                        "this iteration ended when its stream was moved or iterated anew"
                    )
        finally:
            if self._ahead is ahead:
                self._end_iteration()

    def _end_iteration(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._waited += self._ahead.waited
            self._ahead = None

    def _after(self, epoch: int, position: int, batches: int) -> tuple[int, int]:
        """The epoch and position so many batches on."""
        while (left := -(-(self.rows_per_epoch - position) // self._batch_size)) <= batches:
            epoch, position, batches = epoch + 1, 0, batches - left
        return epoch, position + batches * self._batch_size


def _require(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise BadInputError(f"{name}: expected at least {least}, found {value!r}")


def local_cache(
    plan: Plan, roots: Mapping[str, str], cache_bytes: int, epochs: int | None, beside: float = 0.0
) -> tuple[LocalCache | None, bool]:
    """The local cache of a stream, and whether it fills it.

    None where all is on this machine and its decoded rows fit into memory: then that is the cache.
    One epoch of local files fills none: writing it would not pay in this run. `beside` are bytes
    of a row that come from source files.
    """
    files = {(t.name, file.path): file for t in plan.tables.values() for file in t.files}
    remote = any(not plan.root(name, roots).is_local for name in plan.tables)
    size = sum(file.size + int(beside * file.num_rows) for file in files.values())
    if not remote and DECODED_RATIO * size <= cache_bytes:
        return None, False
    return open_cache(file.sha256 for file in files.values()), remote or epochs != 1


def window_rows(plan: Plan, beside: float = 0.0) -> int:
    """Rows of WINDOW_BYTES in the plan's files, 256 to 65,536: a pure function of the plan.

    `beside` are bytes of a row that come from source files.
    """
    files = [file for table in plan.tables.values() for file in table.files]
    size = sum(file.size + int(beside * file.num_rows) for file in files)
    rows = WINDOW_BYTES * sum(file.num_rows for file in files) // max(size, 1)
    return min(max(rows, 256), 65_536)


def _batch(pieces: Sequence[tuple[Rows, Floats, float]], epoch: int, position: int) -> Batch:
    rows = Rows.concat([piece for piece, _, _ in pieces])
    return Batch(
        targets=rows.targets,
        example_ids=rows.example_ids,
        columns=dict(rows.columns),
        loss_weights=np.concatenate([weights for _, weights, _ in pieces]),
        epoch=epoch,
        position=position,
        global_weight=sum(weight for _, _, weight in pieces),
        position_weights=rows.position_weights,
        others=tuple(map(Member, rows.others)),
        member_weights=rows.member_weights,
    )

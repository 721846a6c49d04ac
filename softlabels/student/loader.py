"""Streams for users of PyTorch's DataLoader, whose worker processes share a rank's batches.

A stream's own threads are the cheaper way, and what `train` uses: worker processes each decode all
row groups (once in all where a local cache is at hand), and send every batch through a pipe.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
from torch.utils.data import IterableDataset, get_worker_info

from softlabels.errors import BadInputError
from softlabels.plan import Plan
from softlabels.student.stream import Batch, Stream

State = Mapping[str, Any]


class StreamDataset(IterableDataset[Batch]):
    """The batches of a stream, for a DataLoader with `batch_size=None` and any number of workers.

        dataset = StreamDataset(plan, batch_size=256, epochs=3)
        for batch in DataLoader(dataset, batch_size=None, num_workers=4):
            state = dataset.state_after(batch)

    Of W workers, number w makes the batches w, w + W, w + 2W, …; a DataLoader takes one of each in
    turn, and so hands out those of a single stream, in its order. One iteration goes from the
    dataset's state through all epochs.

    A state is that of a `Stream`, and goes on with any number of workers and ranks: load it before
    the DataLoader is iterated. torchdata's StatefulDataLoader keeps a state of each worker instead,
    and can go on with as many workers; of what it saves, `stream_state` makes one of a stream. It
    must take a snapshot every step, as it does unless told otherwise.

    Workers may be started by "spawn" or "forkserver", or by "fork" while no stream is iterated in
    this process and its tables are local: threads and connections do not outlive a fork.

    Args:
        plan: what to read.
        options: of `Stream`; `rank` and `world_size` too, where there are several ranks.
    """

    def __init__(self, plan: Plan, **options: Any) -> None:
        if taken := {"worker", "workers"} & set(options):
            raise BadInputError(f"{min(taken)}: expected none, a DataLoader says it")
        self._plan, self._options = plan, options
        self._state: State | None = None
        self._made: tuple[tuple[int, int], Stream] | None = None
        self._stream()  # what is wrong with the options is said here, not in a worker

    def __iter__(self) -> Iterator[Batch]:
        """The batches of this process, from the dataset's state on."""
        alone = get_worker_info() is None
        for batch in self._stream():
            yield batch if alone else _compact(batch)

    def state_dict(self) -> dict[str, int | str]:
        """Where the stream of this process stands."""
        return self._stream().state_dict()

    def state_after(self, batch: Batch) -> dict[str, int | str]:
        """Where a stream stands that has handed out a batch and all before it."""
        return self._stream().state_after(batch)

    def load_state_dict(self, state: State) -> None:
        """Goes to where another stream of this plan and order stood.

        Raises:
            MismatchError: it is of another order, or of a worker that this one is not.
            BadInputError: it is no state, or stands outside of an epoch.
        """
        self._stream().load_state_dict(state)
        self._state = dict(state)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}

    def _stream(self) -> Stream:
        info = get_worker_info()
        share = (0, 1) if info is None else (info.id, info.num_workers)
        if self._made is None or self._made[0] != share:
            stream = Stream(self._plan, worker=share[0], workers=share[1], **self._options)
            if self._state is not None:
                stream.load_state_dict(self._state)
            self._made = share, stream
        return self._made[1]


def stream_state(loader: State) -> dict[str, Any]:
    """The state of a single stream, from that of a StatefulDataLoader over a `StreamDataset`.

    Args:
        loader: its `state_dict()`, with any number of workers.

    Raises:
        BadInputError: there is no state of a stream in it.
    """
    states = list(_states(loader))
    if not states:
        raise BadInputError(
            f"loader state: no stream's state is in it, found {sorted(map(str, loader))!r}; "
            "expected that of a StatefulDataLoader over a StreamDataset"
        )
    # Batches go out in turn: the first that is still to come is the earliest of all workers'.
    first = min(states, key=lambda state: (state["epoch"], state["position"]))
    return {name: value for name, value in first.items() if name not in ("worker", "workers")}


def _states(value: Any) -> Iterator[State]:
    if not isinstance(value, Mapping):
        return
    if {"fingerprint", "epoch", "position"} <= set(value):
        yield value
        return
    for inner in value.values():
        yield from _states(inner)


def _compact(batch: Batch) -> Batch:
    """The batch without what its Arrow arrays are slices of, which would be sent as well."""
    columns = {name: pa.concat_arrays([values]) for name, values in batch.columns.items()}
    return replace(batch, example_ids=pa.concat_arrays([batch.example_ids]), columns=columns)

"""The pass over the records: what is wrong with one by itself, and what all have in common."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from softlabels.schema import INTS
from softlabels.teacher.recorded import axolotl, distillkit, openai, vllm
from softlabels.teacher.recorded.entries import BadRecordError, Recording
from softlabels.teacher.recorded.precision import Precision
from softlabels.teacher.recorded.reader import Context, Read
from softlabels.teacher.recorded.tally import Tally

DOUBLES = pa.list_(pa.field("element", pa.float64(), nullable=False))
WAITING_POSITIONS = 20_000
"""Kept as Python's objects before they are made a table."""

SEEN = pa.schema(
    [
        ("place", pa.string()),
        ("name", pa.string()),
        ("input_ids", INTS),
        ("position_index", INTS),
        ("label_ids", INTS),
        ("label_logprobs", DOUBLES),
        ("label_ranks", INTS),
        ("slack", DOUBLES),
        ("counts", INTS),
        ("entry_ids", INTS),
        ("entry_logprobs", DOUBLES),
    ]
)


def reader_of(context: Context) -> Read:
    """What reads records of the spec's layout."""
    if context.spec.layout == "distillkit":
        compression = None
        if context.spec.compression or not _uncompressed(context):
            compression = distillkit.open_compression(context)
        return partial(distillkit.read, context=context, compression=compression)
    modules = {"openai": openai.read, "vllm": vllm.read, "axolotl": axolotl.read}
    return partial(modules[context.spec.layout], context=context)


def _uncompressed(context: Context) -> bool:
    first = next(context.files.records(), None)
    return first is not None and "top_values" in first.fields


class Gather:
    """The pass over the records: what is wrong with one by itself, and what all have in common."""

    def __init__(self, context: Context) -> None:
        self.tally = Tally()
        self.precision = Precision()
        self.added = False
        self.first_position = True
        self.fewest: int | None = None
        self.most = 0
        self._context = context
        self._read = reader_of(context)
        self._rows: list[dict[str, Any]] = []
        self._waiting = 0

    def tables(self, advance: Callable[[int], None]) -> Iterator[pa.Table]:
        """Rows of SEEN, some thousand positions at a time."""
        for record in self._context.files.records():
            self.tally.records += 1
            try:
                if record.broken is not None:
                    raise BadRecordError(*record.broken)
                for recording in self._read(record.fields):
                    self._add(record.place, recording)
            except BadRecordError as error:
                detail = str(error).removeprefix(error.reason).removeprefix(": ")
                self.tally.add(error.reason, record.place, detail)
            advance(1)
            if self._waiting >= WAITING_POSITIONS:
                yield self._flush()
        yield self._flush()

    def finish(self) -> None:
        """Raises DataError when something was left out and nothing may be, or nothing is left."""
        if self._context.spec.on_bad == "refuse":
            self.tally.require_none()
        self.tally.require_some(self.fewest is not None, self._context.spec.files)

    def _add(self, place: str, recording: Recording) -> None:
        num_ids = self._context.tokenizer.num_ids
        for reason, count in recording.dropped.items():
            self.tally.add(reason, place, count=count)
        largest = max(recording.tokens, default=0)
        for position in recording.positions:
            largest = max(largest, max(position.ids))
        if largest >= num_ids:
            raise BadRecordError(
                "record with a token id above the tokenizer's",
                f"found {largest!r}, the tokenizer has ids 0 to {num_ids - 1!r}",
            )
        if not recording.positions:
            raise BadRecordError("record without positions")
        counts = [len(position.ids) for position in recording.positions]
        self.fewest = min(counts if self.fewest is None else [self.fewest, *counts])
        self.most = max(self.most, *counts)
        self.added |= recording.added
        self.first_position &= recording.first_position
        row = _row(place, recording, counts)
        self.precision.add(np.array(row["entry_logprobs"]))
        self._rows.append(row)
        self._waiting += len(counts)

    def _flush(self) -> pa.Table:
        table = pa.Table.from_pylist(self._rows, SEEN)
        self._rows, self._waiting = [], 0
        return table


def _row(place: str, recording: Recording, counts: list[int]) -> dict[str, Any]:
    positions = recording.positions
    return {
        "place": place,
        "name": recording.name,
        "input_ids": recording.tokens,
        "position_index": [position.index for position in positions],
        "label_ids": [position.label for position in positions],
        "label_logprobs": [position.label_logprob for position in positions],
        "label_ranks": [position.label_rank for position in positions],
        "slack": [position.slack for position in positions],
        "counts": counts,
        "entry_ids": [token for position in positions for token in position.ids],
        "entry_logprobs": [value for position in positions for value in position.logprobs],
    }

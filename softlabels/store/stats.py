"""What a table's labels cost a position and what rounding loses, as settings vary: `stats`.

Stored values are the reference, so a table captured with profile precise at the largest k that is
of interest is the best one: smaller k are prefixes of it.

N positions, k stored ids, m draws a position, V classes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import BadInputError
from softlabels.schema import table_schema
from softlabels.store import codec, shards
from softlabels.store.inspect import column_bytes
from softlabels.store.table import Table
from softlabels.targets import Ints, SoftTargets

HEADS = (16, 32, 64, 128)
"""The k that are compared, as far as the table has them, and its own."""

SAMPLE_POSITIONS = 40_000
"""Looked at when no number of rows is given: eight row groups."""

SAMPLE_FILES = 8
BATCH_POSITIONS = 1_000
"""Positions that a capture writes at once, about."""

PARTS = {
    "ids": "topk_ids",
    "logprobs": "topk_logprobs",
    "tail": "tail_logprob",
    "drawn": "sampled_ids",
}
PROFILES: tuple[shards.Profile, ...] = ("compact", "precise")


def num_settings(table: Table) -> int:
    """How many settings `measure` goes through.

    Raises:
        BadInputError: the table has no rows, or no stored ids to measure.
    """
    if not table.contents.k:
        raise BadInputError(f"table {table.root.uri!r} stores draws alone: it has no head to round")
    if not table.num_rows:
        raise BadInputError(
            f"table {table.root.uri!r} has no rows at version {table.version}: capture first"
        )
    return len(_heads(table)) * len(PROFILES) * 2


def measure(
    table: Table, max_rows: int | None = None, done: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Bytes a position and codec error of a sample of rows, rewritten with each setting.

    Args:
        table: the version.
        max_rows: rows of the sample, spread over the files; None: SAMPLE_POSITIONS positions.
        done: called after each setting.

    Returns:
        table, version, rows, positions, num_classes; stored (k, draws, profile); settings, each
        with k, profile, draws, bytes a position in all and by part (ids, logprobs, tail, drawn,
        rest), kl_mean and kl_p99 (nats) and head_mass; references (`codec.references`); columns,
        bytes a position of the table as it is stored; notes on what to make of it.

    Raises:
        BadInputError: the table has no rows, or no stored ids to measure.
    """
    contents = table.contents
    num_settings(table)
    batches = _sample(table, max_rows)
    positions = _positions(batches)
    if not positions:
        raise BadInputError(f"table {table.root.uri!r}: {len(batches)} row groups have no position")
    sample = _Sample(table, _whole(batches, table.root.uri))
    settings = []
    for k in _heads(table):
        for row in sample.settings(k):
            settings.append(row)
            done()
    every = _positions(table.batches(["num_positions"]))
    return {
        "table": table.root.uri,
        "version": table.version,
        "rows": sum(batch.num_rows for batch in batches),
        "positions": positions,
        "num_classes": contents.num_classes,
        "stored": {"k": contents.k, "draws": contents.draws, "profile": contents.profile},
        "settings": settings,
        "references": codec.references(contents.num_classes),
        "columns": [
            {"column": name, "bytes": round(size / every, 3)}
            for name, size in column_bytes(table).items()
        ],
        "notes": _notes(table, sample.tail_known),
    }


class _Sample:
    """Rows that are written again with other settings."""

    def __init__(self, table: Table, batch: pa.RecordBatch) -> None:
        contents = table.contents
        columns = {name: batch[name] for name in batch.schema.names}
        self._targets = SoftTargets.from_columns(columns, contents.k, contents.draws)
        self._head, self._tail = codec.head_and_tail(
            codec.unrounded(self._targets, contents.profile)
        )
        self.tail_known = self._targets.tail is not None
        self._schema = table_schema()
        self._others = {
            field.name: columns[field.name] for field in self._schema if field.name in columns
        }
        self._sequences = contents.alignment is not None
        ends = self._targets.ids[:, contents.k // 2 :]
        pool = ends if self._targets.draws is None else self._targets.draws
        self._pool = pool[pool >= 0]

    def settings(self, k: int) -> Iterator[dict[str, Any]]:
        """A row for each profile, with m = 0 and m = k draws."""
        head = self._head[:, :k]
        left_out, ids = self._head[:, k:], self._targets.ids[:, k:]
        tail = left_out.sum(1) + self._tail
        stored = self._targets.draws
        drawn = codec.redraw(left_out, ids, self._tail, stored, self._pool, k)
        for profile in PROFILES:
            error = codec.rounding_error(head, tail, profile)
            for draws in (None, drawn):
                yield {
                    "k": k,
                    "profile": profile,
                    "draws": 0 if draws is None else k,
                    **self._bytes(head, tail, draws, profile),
                    "kl_mean": float(error.mean()),
                    "kl_p99": float(np.quantile(error, 0.99)),
                    "head_mass": round(float(head.sum(1).mean()), 4),
                }

    def _bytes(
        self, head: codec.Doubles, tail: codec.Doubles, draws: Ints | None, profile: shards.Profile
    ) -> dict[str, float]:
        """Bytes a position of a shard with these labels, in all and by part."""
        with np.errstate(divide="ignore"):
            logs = np.log(head).astype(np.float32)
            log_tail = np.log(tail).astype(np.float32) if self.tail_known else None
        targets = replace(
            self._targets,
            ids=self._targets.ids[:, : head.shape[1]],
            logprobs=np.minimum(logs, 0),
            tail=log_tail,
            draws=draws,
        )
        columns = self._others | shards.round_to_profile(targets, profile).columns(self._sequences)
        rows = len(targets.num_positions)
        batch = pa.RecordBatch.from_arrays(
            [
                columns[f.name] if f.name in columns else pa.nulls(rows, f.type)
                for f in self._schema
            ],
            schema=self._schema,
        )
        writer = shards.ShardWriter(self._schema, profile)
        step = max(1, BATCH_POSITIONS * rows // max(1, len(head)))
        for row in range(0, rows, step):
            writer.write(batch.slice(row, step))
        data = writer.close().data
        sizes = shards.bytes_by_column(shards.open_shard(data, "sample"))
        parts = {part: sizes[name] / len(head) for part, name in PARTS.items()}
        total = len(data) / len(head)
        parts["rest"] = total - sum(parts.values())
        return {name: round(size, 2) for name, size in {"bytes": total, **parts}.items()}


def _heads(table: Table) -> list[int]:
    own = table.contents.k
    return sorted({k for k in HEADS if k <= own} | {own})


def _sample(table: Table, max_rows: int | None) -> list[pa.RecordBatch]:
    """Rows of up to SAMPLE_FILES files that stand evenly among all."""
    files = [file for file in table.files if file.num_rows]
    spread = np.linspace(0, len(files) - 1, min(SAMPLE_FILES, len(files)))
    chosen = [files[int(i)] for i in spread]
    batches: list[pa.RecordBatch] = []
    for number, file in enumerate(chosen, 1):
        for batch in table.batches(files=[file]):
            have = sum(b.num_rows for b in batches)
            held = _positions(batches)
            if max_rows is not None:
                batch = batch.slice(0, max(0, max_rows * number // len(chosen) - have))
                enough = not batch.num_rows
            else:
                enough = held >= SAMPLE_POSITIONS * number // len(chosen)
            if enough:
                break
            batches.append(batch)
    return batches


def _whole(batches: list[pa.RecordBatch], uri: str) -> pa.RecordBatch:
    """One batch of all; a list column holds at most 2^31 - 1 elements of it."""
    try:
        parts = pa.Table.from_batches(batches).combine_chunks().to_batches()
    except pa.ArrowInvalid:  # offset overflow
        parts = []
    if len(parts) != 1:
        rows = sum(batch.num_rows for batch in batches)
        raise BadInputError(
            f"table {uri!r}: {rows} rows are too many to look at in one piece: give fewer"
        )
    return parts[0]


def _positions(batches: Iterable[pa.RecordBatch]) -> int:
    return sum(int(pc.sum(batch["num_positions"]).as_py() or 0) for batch in batches)


def _notes(table: Table, tail_known: bool) -> list[str]:
    contents = table.contents
    notes = [
        f"Reference: the stored values (k = {contents.k}, profile {contents.profile}), each moved "
        "at random within the step that it was rounded to."
    ]
    if contents.profile == "compact":
        notes.append(
            "A table with profile precise is a better reference: the steps of compact are wide."
        )
    if not tail_known:
        notes.append("The tail is unknown: it is taken to be what the stored head leaves.")
    notes.append(
        "KL is that of the head and one class for the rest, after readers rescale the head; draws "
        "do not change it. Draws of another number than stored are made up for their bytes."
    )
    return notes

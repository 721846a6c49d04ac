"""One Parquet file: value profiles, writing in memory, reading whole or a row group.

A shard is written to memory, hashed, then stored under a name that carries its sha256, so that a
half-written file can never be taken for a whole one. Readers that never commit (the student) need
only this module of the store.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from softlabels.errors import IntegrityError, one_line
from softlabels.fingerprint import sha256_bytes
from softlabels.parquet import UNREADABLE, Layout, Parquet
from softlabels.parquet import footer as footer
from softlabels.schema import (
    COLUMNS,
    FLOATS,
    FORMAT_VERSION,
    INTS,
    ROW_GROUP_BYTES,
    ROW_GROUP_POSITIONS,
    SEQUENCE_GROUP_BYTES,
    STATISTICS,
)
from softlabels.targets import Floats, SoftTargets, Temper

Profile = Literal["compact", "precise"]

FORMAT_KEY = b"softlabels.format_version"
_VERSION = re.compile("[1-9][0-9]{0,8}")

MASS_TOLERANCE: dict[Profile, float] = {"precise": 2e-3, "compact": 0.14}
"""How far the stored head and tail of a row may be from mass 1 under each profile."""

_SMALLEST_TAIL = -(2.0**-24)
"""Largest negative float16: a tail of log-mass 0 would say that the head has no mass."""


@dataclass(frozen=True)
class Shard:
    """A finished Parquet file in memory.

    Attributes:
        data: its bytes.
        sha256: of all bytes.
        footer_sha256: of the Parquet footer, which page checksums do not cover.
        num_rows: rows in it.
        statistics: Delta's statistics object: numRecords, minValues, maxValues, nullCount.
    """

    data: memoryview
    sha256: str
    footer_sha256: str
    num_rows: int
    statistics: dict[str, Any]


@cache
def compact_levels() -> Floats:
    """The 256 depths (nats, rising from 0) on which the compact profile rounds -logprob.

    The step at depth x is min(e^(x/2)/96, 1/4): fine where a probability is large, because an
    error there moves much mass. 256 levels, so that a dictionary index is one byte.
    """
    depths = np.zeros(256)
    for i in range(1, 256):
        depths[i] = depths[i - 1] + min(np.exp(depths[i - 1] / 2) / 96, 0.25)
    return depths.astype(np.float32)


def to_float16_precision(values: Floats) -> Floats:
    """`values` rounded to what float16 holds, still float32 (float16 columns stop Spark).

    Finite values stay finite: an infinite log-probability would say that an id is padding.
    """
    largest = np.finfo(np.float16).max
    held = np.where(np.isfinite(values), np.clip(values, -largest, largest), values)
    return held.astype(np.float16).astype(np.float32)


def to_compact_levels(logprobs: Floats) -> Floats:
    """`logprobs` (nats, <= 0) rounded to the nearest compact level; -inf stays."""
    levels = compact_levels()
    middles = (levels[1:] + levels[:-1]) / 2
    rounded = -levels[np.searchsorted(middles, -logprobs)]
    return np.where(np.isfinite(logprobs), rounded, logprobs).astype(np.float32)


def round_to_profile(targets: SoftTargets, profile: Profile) -> SoftTargets:
    """`targets` as the profile stores them. Ids, draws, labels and ranks are never changed."""
    head = to_compact_levels if profile == "compact" else to_float16_precision

    def tail(values: Floats) -> Floats:
        rounded = np.minimum(to_float16_precision(values), np.float32(_SMALLEST_TAIL))
        return rounded if targets.k else values

    def optional(values: Floats | None) -> Floats | None:
        return None if values is None else to_float16_precision(values)

    return SoftTargets(
        num_positions=targets.num_positions,
        ids=targets.ids,
        logprobs=head(targets.logprobs),
        tail=None if targets.tail is None else tail(targets.tail),
        draws=targets.draws,
        entropy=optional(targets.entropy),
        label_ids=targets.label_ids,
        label_logprobs=optional(targets.label_logprobs),
        label_ranks=targets.label_ranks,
        temper={
            t: Temper(to_float16_precision(v.shift), tail(v.tail))
            for t, v in targets.temper.items()
        },
    )


class ShardWriter:
    """Collects rows into one Parquet file in memory.

    Row groups close at the first whole batch that brings them to `row_group_positions`; where that
    is None, to ROW_GROUP_POSITIONS and, in rows of several positions, to SEQUENCE_GROUP_BYTES.
    """

    def __init__(
        self,
        schema: pa.Schema,
        profile: Profile,
        metadata: Mapping[str, str] | None = None,
        row_group_positions: int | None = None,
    ) -> None:
        extra = {FORMAT_KEY: str(FORMAT_VERSION).encode()}
        extra |= {key.encode(): value.encode() for key, value in (metadata or {}).items()}
        self._schema = schema
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(self._sink, schema, **_encoding(schema, profile))
        self._writer.add_key_value_metadata(extra)
        self._statistics = _Statistics(schema)
        self._row_group_positions = row_group_positions
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_rows = self._waiting_positions = self._waiting_bytes = 0
        self._unpacked_bytes = self.num_rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Adds rows; `batch` must have the writer's schema."""
        self._waiting.append(batch)
        self._waiting_positions += int(pc.sum(batch["num_positions"]).as_py() or 0)
        self.num_rows += batch.num_rows
        self._statistics.add(batch)
        self._waiting_rows += batch.num_rows
        self._waiting_bytes += batch.nbytes
        if self._full():
            self._flush()

    @property
    def size(self) -> int:
        """Bytes of the file so far, about: rows that wait shrink as those before them did."""
        written = int(self._sink.tell())
        shrunk = written / self._unpacked_bytes if self._unpacked_bytes else 1.0
        return written + int(self._waiting_bytes * shrunk)

    def close(self) -> Shard:
        """Ends the file."""
        self._flush()
        self._writer.close()
        data = memoryview(self._sink.getvalue())
        return Shard(
            data=data,
            sha256=sha256_bytes(data),
            footer_sha256=sha256_bytes(footer(data)),
            num_rows=self.num_rows,
            statistics=self._statistics.result(self.num_rows),
        )

    def _full(self) -> bool:
        if self._waiting_bytes >= ROW_GROUP_BYTES:
            return True
        if self._row_group_positions is not None:
            return self._waiting_positions >= self._row_group_positions
        sequences = self._waiting_positions > self._waiting_rows
        least = SEQUENCE_GROUP_BYTES if sequences else 0
        return self._waiting_positions >= ROW_GROUP_POSITIONS and self._waiting_bytes >= least

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting, self._schema)
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
            self._unpacked_bytes += self._waiting_bytes
            self._waiting = []
            self._waiting_rows = self._waiting_positions = self._waiting_bytes = 0


def _native(data: bytes | memoryview | pa.Buffer) -> pa.Buffer:
    # Arrow's threads still hold a buffer over Python's bytes when the interpreter goes down, and
    # then abort it (12 of 25 runs): such bytes are copied into Arrow's own memory.
    if isinstance(data, pa.Buffer):
        return data
    sink = pa.BufferOutputStream()
    sink.write(data)
    return sink.getvalue()


def open_shard(
    data: bytes | memoryview | pa.Buffer,
    name: str,
    layout: Layout | None = None,
    checksums: bool = True,
) -> pq.ParquetFile:
    """A Parquet file over bytes in memory, checked for format version.

    Args:
        data: the file.
        name: what messages call it.
        layout: that of a file with the same footer, where it is known.
        checksums: compare those of pages; needless where all bytes were compared before.

    Raises:
        IntegrityError: it is not a whole Parquet file or is of a newer format version.
    """
    try:
        file = Parquet(_native(data), layout=layout, page_checksum_verification=checksums)
        file.schema_arrow  # noqa: B018 - what it says of types may be damaged too
    except (*UNREADABLE, IntegrityError) as error:
        raise IntegrityError(f"shard {name!r} cannot be read: {one_line(error)}") from error
    version = (file.metadata.metadata or {}).get(FORMAT_KEY, b"0").decode(errors="replace")
    check_format_version(version, f"shard {name!r}")
    return file


def check_format_version(version: str | None, where: str) -> None:
    """Raises IntegrityError unless `version` is one that this release reads."""
    if version is None or not _VERSION.fullmatch(version):
        raise IntegrityError(
            f"{where} has no softlabels format version: it was not made by softlabels"
        )
    if int(version) > FORMAT_VERSION:
        raise IntegrityError(
            f"{where} has format version {version}, this release reads up to {FORMAT_VERSION}: "
            "upgrade softlabels"
        )


def read_row_groups(
    file: pq.ParquetFile,
    name: str,
    groups: Sequence[int],
    columns: Sequence[str] | None = None,
    threads: bool = True,
) -> pa.RecordBatch:
    """The rows of some row groups, in the order given, as one record batch.

    Without `threads` columns are decoded one after the other: for callers with threads of their
    own, which it spares a quarter of the processor's time.

    Raises:
        IntegrityError: a page's checksum is wrong, its bytes cannot be decoded, or they would
            become more than a row group may (see `softlabels.parquet`).
    """
    try:
        if isinstance(file, Parquet):
            file.check(groups, columns)
        table = file.read_row_groups(list(groups), columns=columns, use_threads=threads)
        table = table.combine_chunks()
    except (*UNREADABLE, IntegrityError) as error:
        raise IntegrityError(f"shard {name!r} is damaged: {one_line(error)}") from error
    batches = table.to_batches()
    if len(batches) > 1:
        raise IntegrityError(f"shard {name!r} has row groups over 2 GB, which cannot be joined")
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _encoding(schema: pa.Schema, profile: Profile) -> dict[str, Any]:
    # pyarrow wants leaf paths for settings by column; a column that a compression dictionary does
    # not name is stored uncompressed, so every leaf is named.
    split, dictionary, levels = {}, [], {}
    for field in schema:
        leaf = f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        fixed = field.name in COLUMNS or field.name.startswith(("temper_shift_", "tail_logprob_"))
        if field.name == "topk_logprobs" and profile == "compact":
            dictionary.append(leaf)
            levels[leaf] = 3
        elif field.type in (INTS, FLOATS, pa.float32()) and fixed:
            split[leaf] = "BYTE_STREAM_SPLIT"
            levels[leaf] = 1
        elif pa.types.is_binary(field.type):
            levels[leaf] = 3
        else:
            dictionary.append(leaf)
            levels[leaf] = 3
    return {
        "use_dictionary": dictionary,
        "column_encoding": split,
        "compression": dict.fromkeys(levels, "zstd"),
        "compression_level": levels,
        "write_page_checksum": True,
        "write_statistics": [name for name in schema.names if name in STATISTICS],
    }


class _Statistics:
    def __init__(self, schema: pa.Schema) -> None:
        self._least: dict[str, Any] = {}
        self._greatest: dict[str, Any] = {}
        self._nulls = {name: 0 for name in STATISTICS if name in schema.names}
        self._unbounded: set[str] = set()

    def add(self, batch: pa.RecordBatch) -> None:
        for name in self._nulls:
            column = batch[name]
            self._nulls[name] += column.null_count
            # min_max passes over NaN, which engines take to be above all numbers.
            if pa.types.is_floating(column.type) and pc.any(pc.is_nan(column)).as_py():
                self._unbounded.add(name)
            bounds = pc.min_max(column).as_py()
            if bounds["min"] is not None:
                self._least[name] = min(self._least.get(name, bounds["min"]), bounds["min"])
                self._greatest[name] = max(self._greatest.get(name, bounds["max"]), bounds["max"])

    def result(self, num_rows: int) -> dict[str, Any]:
        return {
            "numRecords": num_rows,
            "minValues": self._bounded(self._least),
            "maxValues": self._bounded(self._greatest),
            "nullCount": self._nulls,
        }

    def _bounded(self, bounds: dict[str, Any]) -> dict[str, Any]:
        return {name: bound for name, bound in bounds.items() if name not in self._unbounded}


def statistics_of(file: pq.ParquetFile, name: str) -> dict[str, Any]:
    """`Shard.statistics` of a file that is there already."""
    schema = file.schema_arrow
    found = _Statistics(schema)
    columns = [column for column in STATISTICS if column in schema.names]
    for group in range(file.num_row_groups):
        found.add(read_row_groups(file, name, [group], columns))
    return found.result(file.metadata.num_rows)


def bytes_by_column(file: pq.ParquetFile) -> dict[str, int]:
    """Compressed bytes of each top-level column of a shard that `open_shard` opened.

    Raises:
        IntegrityError: its footer does not describe them.
    """
    assert isinstance(file, Parquet)
    totals: dict[str, int] = {}
    for group in range(file.metadata.num_row_groups):
        for chunk in file.chunks(group):
            totals[chunk.column] = totals.get(chunk.column, 0) + chunk.stored
    return totals

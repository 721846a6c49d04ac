"""Files of a table written anew: rows left out, or several in one, proven to be the same rows.

What is read is checked against the log first, or damage would get a new, valid checksum. What was
written is decoded again and compared with what was read before anything is stored.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq

from softlabels.errors import IntegrityError
from softlabels.fingerprint import sha256_bytes
from softlabels.storage import Root
from softlabels.store import shards
from softlabels.store.files import FOLDER, TableFile, UnitShard
from softlabels.store.lifetimes import read_lifetimes
from softlabels.store.samerows import RowsDigest
from softlabels.store.table import Table

_TAIL = f"-{'0' * 64}-{'0' * 64}.parquet"
"""Of a data file's name: two checksums."""

FEW_BYTES = 2**18
"""Bytes in memory at which small batches are joined to one."""

FRESH_SECONDS = 12 * 3600
"""Age up to which a file is taken up that another attempt has stored: vacuum removes older ones."""


def read_checked(root: Root, file: TableFile) -> pa.Buffer:
    """The bytes of a data file, which are those that were committed.

    Raises:
        IntegrityError: they are not.
        StorageError: it is missing or cannot be read.
    """
    where = f"file {file.path!r} of {root.uri!r}"
    if root.is_local and (size := root.size(file.path)) != file.size:
        raise IntegrityError(f"{where} has {size} bytes, the log says {file.size}")
    data = root.buffer(file.path, file.size)
    if len(data) != file.size:
        raise IntegrityError(f"{where} has {len(data)} bytes, the log says {file.size}")
    if (found := sha256_bytes(memoryview(data))) != file.sha256:
        raise IntegrityError(f"{where} has sha256 {found!r}, its name says {file.sha256!r}")
    return data


def open_checked(table: Table, file: TableFile, data: pa.Buffer) -> pq.ParquetFile:
    """A data file of a version, opened; it has as many rows as the log says."""
    opened = shards.open_shard(data, file.path)
    if opened.metadata.num_rows != file.num_rows:
        raise IntegrityError(
            f"file {file.path!r} of {table.root.uri!r} has {opened.metadata.num_rows} rows, the "
            f"log says {file.num_rows}"
        )
    return opened


def row_groups(opened: pq.ParquetFile, file: TableFile) -> Iterator[pa.RecordBatch]:
    """The rows of a data file, a batch a row group."""
    for group in range(opened.num_row_groups):
        yield shards.read_row_groups(opened, file.path, [group])


def said_of(opened: pq.ParquetFile) -> dict[str, str]:
    """What a data file says of itself: where its rows came from."""
    return {
        key.decode(): value.decode()
        for key, value in (opened.metadata.metadata or {}).items()
        if key.startswith(b"softlabels.") and key != shards.FORMAT_KEY
    }


class Rewritten:
    """One new file of a version's rows.

    Args:
        table: the version.
        unit: whose file it is.
        metadata: of the file, besides its unit.
    """

    def __init__(self, table: Table, unit: str, metadata: Mapping[str, str]) -> None:
        self._schema, self._profile = table.schema, table.contents.profile
        self._where = f"file of unit {unit!r} of {table.root.uri!r}"
        says = {**metadata, "softlabels.unit": unit}
        self._writer = shards.ShardWriter(self._schema, self._profile, says)
        self._given = RowsDigest(self._schema)
        self._few: list[pa.RecordBatch] = []
        self._few_bytes = 0

    @property
    def size(self) -> int:
        """Bytes so far, about."""
        return self._writer.size + self._few_bytes

    def add(self, batch: pa.RecordBatch) -> None:
        """Adds rows."""
        missing = [name for name in self._schema.names if name not in batch.schema.names]
        if missing:
            raise IntegrityError(f"{self._where}: it is made of rows without {missing[0]!r}")
        arrays = [
            values if values.type == field.type else values.cast(field.type)
            for field, values in ((field, batch[field.name]) for field in self._schema)
        ]
        self._few.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._few_bytes += batch.nbytes
        if self._few_bytes >= FEW_BYTES:
            self._join()

    def close(self) -> shards.Shard:
        """The file, whose rows were decoded again and are the ones that were added.

        Raises:
            IntegrityError: they are not.
        """
        self._join()
        shard = self._writer.close()
        opened = shards.open_shard(shard.data, self._where)
        found = RowsDigest(self._schema)
        for group in range(opened.num_row_groups):
            found.add(shards.read_row_groups(opened, self._where, [group]))
        if found.result() != self._given.result():
            raise IntegrityError(
                f"{self._where}: {found.num_rows} rows were written that are not the "
                f"{self._given.num_rows} that were read; nothing was changed"
            )
        return shard

    def _join(self) -> None:
        # What is done once a batch costs more than single rows do.
        if self._few:
            rows = pa.concat_batches(self._few)
            self._given.add(rows)
            self._writer.write(rows)
        self._few, self._few_bytes = [], 0


class Staging:
    """Where new files wait for their commit; one that a stopped attempt has stored is found again.

    Nothing is ever removed here: what a file is for, another process may be about to commit.

    Attributes:
        found: how many were there.
        stored: how many were not.
    """

    def __init__(self, table: Table, key: str) -> None:
        self._table, self._key = table, key
        self.found = self.stored = 0

    def store(self, unit: str, shard: shards.Shard) -> UnitShard:
        """A finished file, stored and ready to be committed."""
        path = self._found(unit, shard)
        if path is None:
            self.stored += 1
            return self._table.store_shard(self._key, unit, shard)
        self.found += 1
        return UnitShard(self._key, path, len(shard.data), shard.num_rows, shard.statistics)

    def _found(self, unit: str, shard: shards.Shard) -> str | None:
        tail = f"-{shard.sha256}-{shard.footer_sha256}.parquet"
        length = len(unit) + len("-01234567") + len(tail)
        for name in self._fresh.get(tail, ()):
            path = f"{FOLDER}/{name}"
            if name.startswith(f"{unit}-") and len(name) == length and path not in self._committed:
                data = self._table.root.buffer(path, len(shard.data))
                if sha256_bytes(memoryview(data)) == shard.sha256:
                    return path
        return None

    @cached_property
    def _committed(self) -> Collection[str]:
        """Files that were ever in the table: vacuum may be about to remove those that are not."""
        return read_lifetimes(self._table.root, self._table.version).spans

    @cached_property
    def _fresh(self) -> dict[str, list[str]]:
        """Names in the data folder by their ends, which say what is in the file."""
        now = time.time()
        found: dict[str, list[str]] = {}
        for entry in self._table.root.entries(FOLDER):
            age = None if entry.modified is None else abs(now - entry.modified)
            if entry.is_file and age is not None and age < FRESH_SECONDS:
                tail = entry.name[-len(_TAIL) :]
                found.setdefault(tail, []).append(entry.name)
        return found

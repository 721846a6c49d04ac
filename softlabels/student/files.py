"""Verified bytes of a plan's shards: every byte that is decoded was checked against the plan.

The seam for caches: a reader asks for row groups and does not know where their bytes come from.
Local files are mapped. Remote ones are fetched whole once, to be hashed; after that a row group
costs the byte ranges of the columns that are read, under page checksums.
"""

import mmap
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from softlabels.errors import BadInputError, IntegrityError
from softlabels.fingerprint import sha256_bytes
from softlabels.plan import Plan, PlanFile
from softlabels.storage import Root, storage_errors
from softlabels.store import shards

OPEN_FILES = 32
"""Local shards kept open, each with a descriptor and a parsed footer."""


class Files:
    """The shards of a plan. Not for several threads at once.

    Args:
        plan: what names the files and their checksums.
        roots: where tables are now, by name, when that is not where the plan says.

    Raises:
        BadInputError: a table is not where it should be, or `roots` names one the plan has not.
    """

    def __init__(self, plan: Plan, roots: Mapping[str, str] | None = None) -> None:
        require_roots(plan, roots or {})
        self._roots = {name: plan.root(name, roots) for name in plan.tables}
        self._files = {
            (name, file.path): file for name, table in plan.tables.items() for file in table.files
        }
        self._open: OrderedDict[tuple[str, str], pq.ParquetFile] = OrderedDict()
        self._verified: set[tuple[str, str]] = set()
        self._footers: dict[tuple[str, str], bytes] = {}

    def read(self, table: str, path: str, group: int, columns: Sequence[str]) -> pa.RecordBatch:
        """Some columns of one row group.

        At first use the file's length, its sha256 and its footer's are compared with the plan's.

        Raises:
            StorageError: the file is missing or cannot be read.
            IntegrityError: it is not the file that the plan names, or a page is damaged.
        """
        if (table, path) not in self._files:
            raise IntegrityError(f"the plan reads file {path!r} of table {table!r}, not listed")
        root = self._roots[table]
        if root.is_local:
            shard = self._local(table, path)
        else:
            shard = self._remote(table, path, group, columns)
        _check_group(root, path, shard, group)
        return shards.read_row_groups(shard, f"{root.uri}/{path}", [group], columns)

    def _local(self, table: str, path: str) -> pq.ParquetFile:
        key = (table, path)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        root, file = self._roots[table], self._files[key]
        _check_size(root, file)
        full = root.full(path)
        with storage_errors("read", full), pa.memory_map(full) as source:
            data = source.read_buffer()
        if key not in self._verified:
            _check_sha256(root, file, memoryview(data))
        shard = _open(root, file, data)
        self._verified.add(key)
        self._open[key] = shard
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return shard

    def _remote(self, table: str, path: str, group: int, columns: Sequence[str]) -> pq.ParquetFile:
        key = (table, path)
        root, file = self._roots[table], self._files[key]
        if key not in self._footers:
            _check_size(root, file)
            data = memoryview(root.read(path, file.size))
            _check_sha256(root, file, data)
            shard = _open(root, file, data)
            self._footers[key] = bytes(shards.footer(data))
            return shard
        # Untouched pages of an anonymous map take no memory: a file with only the bytes needed.
        sparse = mmap.mmap(-1, file.size)
        sparse[file.size - len(self._footers[key]) :] = self._footers[key]
        shard = _open(root, file, pa.py_buffer(sparse))
        _check_group(root, path, shard, group)
        starts, ends = _ranges(shard.metadata, group, columns)
        parts = root.ranges(path, starts, ends)
        for start, end, part in zip(starts, ends, parts, strict=True):
            sparse[start:end] = part
        return shard


def require_roots(plan: Plan, roots: Mapping[str, str]) -> None:
    """Raises BadInputError where `roots` names a table that the plan does not read."""
    if unknown := sorted(set(roots) - set(plan.tables)):
        raise BadInputError(
            f"roots: the plan reads no table {unknown[0]!r}; it reads {sorted(plan.tables)!r}"
        )


def _check_size(root: Root, file: PlanFile) -> None:
    if (found := root.size(file.path)) != file.size:
        raise IntegrityError(
            f"{root.uri}/{file.path} has {found} bytes, the plan says {file.size}: it is cut "
            "short or was changed after the plan was made"
        )


def _check_sha256(root: Root, file: PlanFile, data: memoryview) -> None:
    if (found := sha256_bytes(data)) != file.sha256:
        raise IntegrityError(
            f"{root.uri}/{file.path} has sha256 {found!r}, the plan says {file.sha256!r}: it was "
            "changed after the plan was made; restore it or mix again"
        )


def _open(root: Root, file: PlanFile, data: memoryview | pa.Buffer) -> pq.ParquetFile:
    where = f"{root.uri}/{file.path}"
    if (found := sha256_bytes(shards.footer(data))) != file.footer_sha256:
        raise IntegrityError(
            f"{where} has a footer of sha256 {found!r}, the plan says {file.footer_sha256!r}"
        )
    shard = shards.open_shard(data, where)
    if shard.metadata.num_rows != file.num_rows:
        raise IntegrityError(
            f"{where} has {shard.metadata.num_rows} rows, the plan says {file.num_rows}"
        )
    return shard


def _check_group(root: Root, path: str, shard: pq.ParquetFile, group: int) -> None:
    if not 0 <= group < shard.num_row_groups:
        raise IntegrityError(
            f"the plan reads row group {group} of {root.uri}/{path}, it has {shard.num_row_groups}"
        )


def _ranges(
    metadata: pq.FileMetaData, group: int, columns: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Byte ranges of a row group's columns, neighbours joined: (starts, ends)."""
    starts: list[int] = []
    ends: list[int] = []
    row_group = metadata.row_group(group)
    for index in range(metadata.num_columns):
        chunk = row_group.column(index)
        if chunk.path_in_schema.split(".")[0] not in columns:
            continue
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        start = min(start, chunk.data_page_offset)
        if ends and ends[-1] == start:
            ends[-1] += chunk.total_compressed_size
        else:
            starts.append(start)
            ends.append(start + chunk.total_compressed_size)
    return starts, ends

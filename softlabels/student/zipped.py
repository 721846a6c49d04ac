"""Rows of source files, for tables that carry where their rows came from and not the rows.

A file is known by its sha256, which each row of the table holds beside its number in the file
(`source_file`, `source_row`): whatever is read is what the teacher was shown.
"""

import mmap
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import BadInputError, DataError, IntegrityError, MismatchError, one_line
from softlabels.fingerprint import CHUNK_BYTES, sha256_bytes
from softlabels.parquet import UNREADABLE, Parquet
from softlabels.plan import Plan
from softlabels.schema import COLUMNS, POSITION, SOURCE_FILE, SOURCE_ROW
from softlabels.storage import Root, find_files, storage_errors
from softlabels.student.files import Files
from softlabels.student.loading import load_all
from softlabels.targets import to_numpy

READ_ROWS = 4_096
READ_BYTES = 8 << 20
"""Rows of a source decoded at once, and their bytes where rows are large."""

KEPT_BYTES = 64 << 20
"""Of decoded row groups that are kept, for the table's row groups are often parts of them. A
larger row group is read again, up to the rows that are wanted, for each of the table's."""

THREADS = 4
"""Files that are hashed at once."""

Int64s = npt.NDArray[np.int64]
Group = tuple[str, int]


class SourceFiles:
    """Parquet files that a teacher labelled. May be used by several threads.

    All are hashed when this is made. Those that are not on this machine are fetched for it, to
    temporary files that live as long as this: where that is too much, capture with `carry`.

    Args:
        patterns: paths or fsspec URLs, wildcards allowed.

    Raises:
        BadInputError: a pattern matches nothing, or there is none.
        DataError: a file is not Parquet.
        StorageError, TryAgainError: a file cannot be read.
    """

    def __init__(self, patterns: str | Sequence[str]) -> None:
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if not patterns:
            raise BadInputError("source: expected a path or URL of source files, found none")
        places = [
            (root, path) for p in patterns for root, paths in [find_files(p)] for path in paths
        ]
        opened = load_all(places, lambda place, _: _File(*place), THREADS, threading.Event())
        assert opened is not None
        self._patterns = patterns
        self._files = {opened[place].sha256: opened[place] for place in places}
        self._kept: OrderedDict[tuple[Group, tuple[str, ...]], pa.RecordBatch] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Self], tuple[list[str]]]:
        # Worker processes map and hash the files anew.
        return type(self), (self._patterns,)

    def row_bytes(self, columns: Sequence[str]) -> float:
        """Stored bytes of some columns of a row, in the mean."""
        files = self._files.values()
        stored = sum(file.sizes.get(name, 0) for file in files for name in columns)
        return float(stored / max(sum(file.num_rows for file in files), 1))

    def require(self, sha256s: Iterable[str], columns: Sequence[str], table: str) -> None:
        """Raises unless the files of these sha256s are all there and have the columns.

        Raises:
            MismatchError: a file is not there.
            BadInputError: it has not the columns.
        """
        for sha256 in sorted(sha256s):
            if sha256 not in self._files:
                found = ", ".join(f"{f.where} ({s[:16]})" for s, f in self._files.items())
                raise MismatchError(
                    f"inputs.source: table {table!r} has rows of a source file of sha256 "
                    f"{sha256!r}, {self._patterns!r} finds {found[:400]}: give the files that the "
                    "teacher labelled, as they were"
                )
            file = self._files[sha256]
            if missing := [name for name in columns if name not in file.sizes]:
                raise BadInputError(
                    f"inputs.columns: source file {file.where} has no column {missing[0]!r} "
                    f"(columns: {', '.join(file.sizes)})"
                )

    def take(
        self, files: pa.Array, rows: pa.Array, columns: Sequence[str], table: str
    ) -> dict[str, pa.Array]:
        """Some columns of B rows of the files.

        Args:
            files: string [B], the sha256 of each row's file.
            rows: int64 [B], its number in the file.
            columns: of the files.
            table: whose rows they are, for messages.

        Raises:
            MismatchError: a file is none of these.
            BadInputError: a file has no such column.
            IntegrityError: a file has no such row.
            DataError: a file is damaged.
        """
        if (
            files.type != pa.string()
            or rows.type != pa.int64()
            or files.null_count + rows.null_count
        ):
            raise IntegrityError(
                f"table {table!r}: {SOURCE_FILE} is {files.type} and {SOURCE_ROW} {rows.type}, "
                f"with {files.null_count + rows.null_count} nulls: expected string and int64"
            )
        coded, numbers = files.dictionary_encode(), to_numpy(rows, np.int64)
        names, codes = coded.dictionary.to_pylist(), to_numpy(coded.indices, np.int32)
        self.require(names, columns, table)
        parts, order = [], []
        for code, name in enumerate(names):
            order.append(np.flatnonzero(codes == code))
            parts.append(self._of_file(name, numbers[order[-1]], columns))
        if len(parts) == 1:
            return parts[0]
        back = pa.array(np.argsort(np.concatenate(order)))
        joined = {name: pa.concat_arrays([part[name] for part in parts]) for name in columns}
        return {name: values.take(back) for name, values in joined.items()}

    def _of_file(self, name: str, rows: Int64s, columns: Sequence[str]) -> dict[str, pa.Array]:
        file = self._files[name]
        if rows.min() < 0 or rows.max() >= file.num_rows:
            raise IntegrityError(
                f"source_row {int(rows.max())} of {file.where}, which has {file.num_rows} rows"
            )
        order = np.argsort(rows, kind="stable")
        rows, parts = rows[order], []
        groups = np.searchsorted(file.ends, rows, side="right")
        for group in np.unique(groups).tolist():
            first = int(file.ends[group - 1]) if group else 0
            parts += self._of_group((name, group), rows[groups == group] - first, columns)
        back = pa.array(np.argsort(order))
        return {
            column: pa.concat_arrays([part[column] for part in parts]).take(back)
            for column in columns
        }

    def _of_group(self, group: Group, rows: Int64s, columns: Sequence[str]) -> list[pa.RecordBatch]:
        """The rows `rows`, rising, of a row group."""
        key = (group, tuple(columns))
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
                return [kept.take(pa.array(rows))]
        found, whole, size, first = [], [], 0, 0
        for batch in self._files[group[0]].batches(group[1], columns):
            inside = rows[(rows >= first) & (rows < first + batch.num_rows)] - first
            found.append(batch.take(pa.array(inside)))
            first, size = first + batch.num_rows, size + batch.nbytes
            if size <= KEPT_BYTES:
                whole.append(batch)
            elif first > rows[-1]:
                break
        if size <= KEPT_BYTES:
            self._keep(key, pa.concat_batches(whole))
        return found

    def _keep(self, key: tuple[Group, tuple[str, ...]], rows: pa.RecordBatch) -> None:
        with self._lock:
            self._kept[key] = rows
            while sum(one.nbytes for one in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)


def zipped_columns(plan: Plan, columns: Sequence[str]) -> dict[str, list[str]]:
    """By table, the columns that it does not carry.

    Raises:
        BadInputError: a table that lacks one does not say where its rows came from.
    """
    found = {}
    for name, table in plan.tables.items():
        carried = table.contents.carried
        found[name] = [c for c in columns if c not in COLUMNS and c not in carried]
        if found[name] and not {field.name for field in POSITION} <= set(carried):
            raise BadInputError(
                f"inputs.source: table {name!r} carries {list(carried)!r}, neither column "
                f"{found[name][0]!r} nor where its rows are in the source: capture with "
                "carry_position: true"
            )
    return found


def require_sources(
    plan: Plan, files: Files, source: SourceFiles, zipped: Mapping[str, Sequence[str]]
) -> None:
    """Raises unless all source files of the plan's rows are there and have the columns.

    Reads one small column of every row group of the plan.

    Raises:
        MismatchError, BadInputError: as `SourceFiles.require`.
    """
    groups = plan.entries.select(["table", "file", "row_group"]).group_by(
        ["table", "file", "row_group"]
    )
    found: dict[str, set[str]] = {}
    for row in groups.aggregate([]).to_pylist():
        if zipped.get(row["table"]):
            place = (row["table"], row["file"], row["row_group"])
            names = files.read(*place, [SOURCE_FILE])[SOURCE_FILE]
            found.setdefault(row["table"], set()).update(map(str, names.unique().to_pylist()))
    for table, names in found.items():
        source.require(names, zipped[table], table)


class _File:
    """A source file, mapped and hashed, with as many parsers as threads read it at once.

    Attributes:
        where: what messages call it.
        sha256: of all of it.
        sizes: by top-level column, its stored bytes.
        ends: int64 [row groups], rows up to the end of each.
        num_rows: of all.
    """

    def __init__(self, root: Root, path: str) -> None:
        self.where = root.where(path)
        self._data = root.buffer(path) if root.is_local else _fetched(root, path)
        self.sha256 = sha256_bytes(memoryview(self._data))
        try:
            parsed = Parquet(self._data)
            groups = range(parsed.num_row_groups)
            counts = [parsed.metadata.row_group(group).num_rows for group in groups]
            self.sizes: Counter[str] = Counter()
            for chunk in (chunk for group in groups for chunk in parsed.chunks(group)):
                self.sizes[chunk.column] += chunk.stored
        except (*UNREADABLE, IntegrityError) as error:
            raise DataError(
                f"source file {self.where} is not a whole Parquet file: {one_line(error)}"
            ) from error
        self.ends: Int64s = np.cumsum(counts, dtype=np.int64)
        self.num_rows = sum(counts)
        self._idle = [parsed]

    def batches(self, group: int, columns: Sequence[str]) -> Iterable[pa.RecordBatch]:
        """The rows of a row group, some at a time."""
        try:
            parsed = self._idle.pop()
        except IndexError:
            parsed = Parquet(self._data)
        try:
            size = parsed.rows_at_once([group], columns, READ_ROWS, READ_BYTES)
            for batch in parsed.iter_batches(
                size, row_groups=[group], columns=list(columns), use_threads=False
            ):
                batch.validate(full=True)  # that text is UTF-8
                yield pa.RecordBatch.from_arrays([_plain(batch[n]) for n in columns], list(columns))
        except (*UNREADABLE, IntegrityError) as error:
            raise DataError(f"source file {self.where} is damaged: {one_line(error)}") from error
        finally:
            self._idle.append(parsed)


def _plain(values: pa.Array) -> pa.Array:
    # Dictionaries of different files do not join.
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _fetched(root: Root, path: str) -> pa.Buffer:
    size = root.size(path)
    if not size:
        return pa.py_buffer(b"")
    with tempfile.TemporaryFile() as file, storage_errors("write", tempfile.gettempdir()):
        for start in range(0, size, CHUNK_BYTES):
            file.writelines(root.ranges(path, [start], [min(start + CHUNK_BYTES, size)]))
        file.flush()
        return pa.py_buffer(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))

"""The files that a report opens: each is the one that the table's log or the plan names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from softlabels.errors import IntegrityError
from softlabels.fingerprint import sha256_bytes
from softlabels.plan import PlanFile
from softlabels.storage import Root
from softlabels.store import shards
from softlabels.store.files import TableFile


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of one row group: its file below the root, and which of its rows; None: all."""

    path: str
    number: int
    num_rows: int
    rows: npt.NDArray[np.int32] | None = None


class Shards:
    """Files of a table version, compared with what is known of them before they are read.

    A log is made by softlabels and lies beside its files: their length, their footer and pages'
    own checksums are compared. A plan may be a stranger's and name any file that its reader can
    open, so that all bytes are.

    Args:
        root: where they are.
        files: what is known of them.
        who: says so.
    """

    def __init__(
        self,
        root: Root,
        files: Sequence[PlanFile] | Sequence[TableFile],
        who: Literal["the log", "the plan"],
    ) -> None:
        self.root = root
        self._files: dict[str, PlanFile | TableFile] = {file.path: file for file in files}
        self._who = who
        self._open: dict[str, pq.ParquetFile] = {}

    def open(self, path: str) -> pq.ParquetFile:
        """The file at `path`.

        Raises:
            StorageError: it is missing or cannot be read.
            IntegrityError: it is not listed, or not the one that was written.
        """
        if path not in self._open:
            file = self._checked(path)
            if not self.root.is_local:
                self._open.clear()  # its bytes are in memory; local ones are mapped
            self._open[path] = file
        return self._open[path]

    def read(self, group: Group, columns: Sequence[str]) -> pa.RecordBatch:
        """The rows of `group`, with those of `columns` that the file has.

        Raises:
            IntegrityError: as `open`; the file has no such row group or not these rows in it.
        """
        file, where = self.open(group.path), self._where(group.path)
        if not 0 <= group.number < file.num_row_groups:
            raise IntegrityError(
                f"{self._who} reads row group {group.number} of {where}, it has "
                f"{file.num_row_groups}"
            )
        held = int(file.metadata.row_group(group.number).num_rows)
        if group.rows is None:
            wrong = None if group.num_rows == held else f"{group.num_rows} rows"
        else:
            bad = group.rows[(group.rows < 0) | (group.rows >= held)]
            wrong = f"row {int(bad[0])}" if len(bad) else None
        if wrong is not None:
            raise IntegrityError(
                f"{self._who} reads {wrong} of row group {group.number} of {where}, it has {held} "
                "rows"
            )
        names = [name for name in columns if name in file.schema_arrow.names]
        batch = shards.read_row_groups(file, where, [group.number], names)
        return batch if group.rows is None else batch.take(pa.array(group.rows))

    def _checked(self, path: str) -> pq.ParquetFile:
        if path not in self._files:
            raise IntegrityError(f"{self._who} does not list file {path!r} of {self.root.uri!r}")
        known, where = self._files[path], self._where(path)
        if (size := self.root.size(path)) != known.size:
            raise IntegrityError(
                f"{where} has {size} bytes, {self._who} says {known.size}: it is not the file that "
                "was written; restore it"
            )
        data = self.root.buffer(path)
        whole = self._who == "the plan"
        for what, held, said in (
            ("sha256", data if whole else None, known.sha256),
            ("a footer of sha256", shards.footer(data), known.footer_sha256),
        ):
            if held is not None and (found := sha256_bytes(memoryview(held))) != said:
                raise IntegrityError(
                    f"{where} has {what} {found!r}, {self._who} says {said!r}: it is not the file "
                    "that was written; restore it"
                )
        return shards.open_shard(data, where)

    def _where(self, path: str) -> str:
        return f"{self.root.uri}/{path}"

"""Which examples a takedown means, and where their rows are."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import BadInputError
from softlabels.fingerprint import sha256_bytes, sha256_lines
from softlabels.lineage import ChangeLineage
from softlabels.query.reading import read_rows
from softlabels.query.recipe import Source
from softlabels.query.selection import candidates, files_of, select
from softlabels.store.ahead import work_ahead
from softlabels.store.rewriting import read_checked
from softlabels.store.table import Table, TableFile

READ_AHEAD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Request:
    """What is to go; either `where` or `ids`.

    Attributes:
        where: SQL that is true of a row of each example.
        ids: of the examples.
        record_where: put the SQL into the log, not only its sha256.
        allow_again: captures may label the examples again, those too that were deleted before.
    """

    where: str | None = None
    ids: frozenset[str] | None = None
    record_where: bool = False
    allow_again: bool = False

    def __post_init__(self) -> None:
        if (self.where is None) == (self.ids is None):
            raise BadInputError("delete: expected either where or ids")
        if self.ids is not None and not self.ids:
            raise BadInputError("delete: the list of ids is empty")
        if self.record_where and self.where is None:
            raise BadInputError("record_where: there is no where; ids are never recorded")

    @cached_property
    def said(self) -> dict[str, str]:
        """What the log says was asked for."""
        if self.ids is not None:
            return {"ids_sha256": sha256_lines(self.ids)}
        text = self.where or ""
        digest = {"where_sha256": sha256_bytes(text.encode())}
        return digest | ({"where": text} if self.record_where else {})

    def is_of(self, change: ChangeLineage) -> bool:
        """Whether a change was asked for by the same words."""
        (key, value), *_ = self.said.items()
        return change.operation == "delete" and change.arguments.get(key) == value


@dataclass(frozen=True)
class Doomed:
    """What of a version goes.

    Attributes:
        ids: of the examples.
        rows: how many of each file that has some, by path.
        files: these files, in the table's order.
    """

    ids: frozenset[str]
    rows: dict[str, int]
    files: Sequence[TableFile]

    @property
    def num_rows(self) -> int:
        """In all files."""
        return sum(self.rows.values())

    @property
    def dropped(self) -> list[TableFile]:
        """Files of which no row is left."""
        return [file for file in self.files if not self.rows_left(file)]

    def rows_left(self, file: TableFile) -> int:
        """Rows of one of `files` that stay."""
        return file.num_rows - self.rows[file.path]


def find_doomed(
    table: Table,
    request: Request,
    planned: Callable[[int], None] = lambda size: None,
    done: Callable[[int], None] = lambda size: None,
) -> Doomed:
    """The examples of a version that a request means, with all their views.

    Args:
        table: the version.
        request: what is to go.
        planned: told the bytes of the files to look through.
        done: told those of each that was; may raise.

    Raises:
        BadInputError: the SQL cannot be meant.
        IntegrityError: a file that may hold such a row is not the one that was committed: what it
            answers may be wrong, and a row that must go would stay.
    """
    files = list(table.files)
    ids = request.ids
    if request.where is not None:
        _require_meant(table, request.where)
        judged = candidates(table, request.where)
        planned(sum(file.size for file in judged))
        reading = partial(read_checked, table.root)
        for file, _ in work_ahead(judged, reading, lambda file: file.size, READ_AHEAD_BYTES):
            done(file.size)
        source = {"table": table.root.uri, "where": request.where}
        rows = select(table, Source.model_validate(source), 0, with_keys=False).rows
        ids = frozenset(
            name
            for _, batch in read_rows(table, rows, ["example_id"])
            for name in batch["example_id"].to_pylist()
        )
        if all(file.bounds.get("view") == (0, 0) for file in files):
            files = files_of(table, rows)  # no example has another row
    files = files if ids else []
    here: set[str] = set()
    counts: dict[str, int] = {}
    planned(sum(file.size for file in files))
    for file in files:
        for batch in table.batches(["example_id"], [file]):
            mask = rows_of(ids or (), batch)
            if mask.any():
                here |= set(batch["example_id"].filter(pa.array(mask)).to_pylist())
                counts[file.path] = counts.get(file.path, 0) + int(mask.sum())
        done(file.size)
    return Doomed(frozenset(here), counts, [file for file in files if file.path in counts])


def _require_meant(table: Table, where: str) -> None:
    """Raises BadInputError where the SQL does not fit the table, before any file is read."""
    nothing = f"({where}\n) AND false"
    try:
        source = {"table": table.root.uri, "where": nothing}
        select(table, Source.model_validate(source), 0, with_keys=False)
    except BadInputError as error:
        raise BadInputError(str(error).replace(repr(nothing), repr(where))) from error


def rows_of(ids: Collection[str], batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    """Which rows are of these examples, bool [B]."""
    names = batch["example_id"].to_pylist()
    return np.fromiter((name in ids for name in names), np.bool_, len(names))


def read_ids(lines: Iterable[str]) -> frozenset[str]:
    """Ids that stand one a line; empty lines do not count, nor does the mark of UTF-8 before all.

    Raises:
        BadInputError: there is none.
    """
    ids = frozenset(line.rstrip("\r\n").removeprefix("\ufeff") for line in lines) - {""}
    if not ids:
        raise BadInputError("the file of ids is empty: expected one example_id a line")
    return ids

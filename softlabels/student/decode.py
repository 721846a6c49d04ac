"""Row groups of a plan decoded: all rows and positions of theirs, as the table stores them."""

from collections.abc import Mapping, Sequence

import pyarrow as pa

from softlabels.errors import IntegrityError, one_line
from softlabels.plan import Plan
from softlabels.schema import SOURCE_FILE, SOURCE_ROW, temper_columns
from softlabels.student.files import Files
from softlabels.student.rows import Rows
from softlabels.student.zipped import SourceFiles, require_sources, zipped_columns
from softlabels.targets import SoftTargets

_TARGETS = (
    "num_positions",
    "topk_ids",
    "topk_logprobs",
    "tail_logprob",
    "position_entropy",
    "label_ids",
    "label_logprobs",
    "label_ranks",
)
"""Whatever the loss: position rules may compare any of them."""


class Decoder:
    """Decodes row groups. May be used by several threads.

    Args:
        plan: whose tables' contents say how.
        files: its verified files.
        columns: further columns to decode.
        draws: tail draws a position to decode; 0: none.
        temperatures: of each table, the extra ones that it stores and that are wanted.
        source: where columns are that tables do not carry; None: they carry all.
    """

    def __init__(
        self,
        plan: Plan,
        files: Files,
        columns: Sequence[str],
        draws: int,
        temperatures: dict[str, list[float]],
        source: SourceFiles | None = None,
    ) -> None:
        self._source = source
        self._zipped: dict[str, list[str]] = {name: [] for name in plan.tables}
        if source is not None:
            self._zipped = zipped_columns(plan, columns)
            require_sources(plan, files, source, self._zipped)
        self._widths = {name: table.contents.k for name, table in plan.tables.items()}
        self._files, self._columns = files, list(columns)
        self._draws, self._temperatures = draws, temperatures

    def wanted(self, table: str) -> list[str]:
        """The columns of a table that its rows are made of, and what is beside them of the source.

        The latter by names that no column has: a path does not end in a slash.
        """
        return self._stored(table) + [f"{name}/" for name in self._zipped[table]]

    def _stored(self, table: str) -> list[str]:
        zipped = self._zipped[table]
        found = ["example_id", *_TARGETS, *(c for c in self._columns if c not in zipped)]
        found += [SOURCE_FILE, SOURCE_ROW] if zipped else []
        found += ["sampled_ids"] if self._draws else []
        found += [c for t in self._temperatures[table] for c in temper_columns(t)]
        return list(dict.fromkeys(found))

    def decode(self, table: str, path: str, group: int, data: pa.Buffer | None = None) -> Rows:
        """The rows of a row group.

        Args:
            table: its name in the plan.
            path: of the file.
            group: number in the file.
            data: the file's bytes, verified; None: read where the table is.

        Raises:
            StorageError: the file is missing.
            IntegrityError: it is not the one that the plan names, or not as its lineage says.
        """
        wanted = self._stored(table)
        batch = self._files.read(table, path, group, wanted, data)
        if missing := sorted(set(wanted) - set(batch.schema.names)):
            raise IntegrityError(f"file {path!r} of table {table!r} has no column {missing[0]!r}")
        values = {field: batch[field] for field in wanted}
        try:
            own = [column for column in self._columns if column in values]
            _check_texts({name: values[name] for name in ("example_id", *own)})
            targets = SoftTargets.from_columns(
                values, self._widths[table], self._draws, self._temperatures[table]
            )
        except IntegrityError as error:
            raise IntegrityError(f"file {path!r} of table {table!r}: {error}") from error
        if self._zipped[table] and self._source is not None:
            file, row = values[SOURCE_FILE], values[SOURCE_ROW]
            values |= self._source.take(file, row, self._zipped[table], table)
        columns = {column: values[column] for column in self._columns}
        return Rows(targets, values["example_id"], columns)


def _check_texts(columns: Mapping[str, pa.Array]) -> None:
    """Raises IntegrityError unless ids are text and texts are UTF-8, which Arrow does not check."""
    ids = columns["example_id"]
    if ids.type != pa.string() or ids.null_count:
        raise IntegrityError(
            f"column 'example_id' is {ids.type} with {ids.null_count} nulls: expected text in "
            "every row"
        )
    for name, column in columns.items():
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            raise IntegrityError(f"column {name!r}: {one_line(error)}") from error

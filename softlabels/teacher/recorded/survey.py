"""All records of an import, read once, judged together, and kept as rows of a source.

What can be kept is known only when every record was seen: the k that all positions have, the
digits that bound a tail. Until then the sequences wait in a temporary Parquet file.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from softlabels.fingerprint import sha256_json
from softlabels.teacher.recorded.gather import SEEN, Gather
from softlabels.teacher.recorded.judge import KEPT, Judge
from softlabels.teacher.recorded.reader import Context
from softlabels.teacher.recorded.tally import Tally
from softlabels.teacher.source import Source, open_source

VERSION = 1
"""Of how records become rows: another one makes other sources of the same files."""

READ_ROWS = 16
"""Sequences judged at once: each may be of a thousand positions of a hundred entries."""

_NO_ORIGIN = {
    *("table", "files", "tokenizer", "teacher", "profile", "shard_rows", "on_bad"),
    *("chat_template", "compression"),
}


@dataclass
class Survey:
    """An import's rows and what its records have in common.

    Attributes:
        source: rows of KEPT in a temporary file, which is gone with this object.
        k: entries a position.
        added: whether chosen tokens were put beside a position's top.
        first_position: whether the first recorded token of every sequence had a distribution.
        tail_error: how far a derived tail's mass may be off; None where tails are unknown.
        precision: how values were written.
    """

    source: Source
    k: int
    added: bool
    first_position: bool
    tail_error: float | None
    precision: str


def survey(context: Context, advance: Callable[[int], None] = lambda rows: None) -> Survey:
    """Reads all records of an import.

    Args:
        context: what is imported.
        advance: told how many more records were read; may raise.

    Raises:
        BadInputError: the spec asks for what the records cannot give.
        DataError: a record cannot be kept exactly and none may be left out, or none is left.
    """
    folder = Path(tempfile.mkdtemp(prefix="softlabels-import-"))
    try:
        found = _survey(context, folder, advance)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found


def _survey(context: Context, folder: Path, advance: Callable[[int], None]) -> Survey:
    seen, kept = folder / "seen.parquet", folder / "kept.parquet"
    first = Gather(context)
    with pq.ParquetWriter(seen, SEEN) as writer:
        for table in first.tables(advance):
            writer.write_table(table)
    first.finish()
    second = Judge(context, first)
    with pq.ParquetWriter(kept, KEPT) as writer:
        for batch in pq.ParquetFile(seen).iter_batches(READ_ROWS):
            advance(0)
            writer.write_batch(second.keep(batch))
    second.finish()
    seen.unlink()
    return Survey(
        source=_source(context, kept, first.tally),
        k=second.k,
        added=first.added,
        first_position=first.first_position,
        tail_error=second.tail_error,
        precision=first.precision.kind,
    )


@dataclass(frozen=True)
class RecordedSource(Source):
    """Records as rows: they are read from `kept`, and called by where they came from."""

    kept: Source | None = None

    def batches(
        self, start: int, stop: int, columns: Sequence[str], made: Sequence[str] = ()
    ) -> Iterator[pa.RecordBatch]:
        """As `Source.batches`."""
        assert self.kept is not None
        yield from self.kept.batches(start, stop, columns, made)

    def locate(self, row: int) -> str:
        """The record that a row was made of."""
        (batch,) = self.batches(row, row + 1, ["place"])
        return str(batch["place"][0].as_py())


def _source(context: Context, kept: Path, tally: Tally) -> RecordedSource:
    opened = open_source(str(kept), KEPT.names)
    # Neither places nor what the contents say; of files, what is in them.
    spec = context.spec.model_dump(mode="json", exclude=_NO_ORIGIN)
    others = [context.chat_template_sha256, context.compression_sha256, VERSION]
    origin = [context.files.fingerprint, context.tokenizer.digest, spec, *others]
    return RecordedSource(
        context.files.root,
        opened.files,
        opened.schema,
        origin=sha256_json(origin),
        skipped=dict(sorted(tally.reasons.items())),
        kept=opened,
    )

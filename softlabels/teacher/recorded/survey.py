"""All records of an import, read once, judged together, and kept as rows of a source.

What can be kept is known only when every record was seen: the k that all positions have, the
digits that bound a tail. Until then the sequences wait in a temporary Parquet file.
"""

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from softlabels.errors import BadInputError, DataError
from softlabels.fingerprint import sha256_json
from softlabels.schema import FLOATS, INTS
from softlabels.teacher.recorded import axolotl, distillkit, openai, vllm
from softlabels.teacher.recorded.entries import BadRecordError, Recording
from softlabels.teacher.recorded.precision import Precision
from softlabels.teacher.recorded.reader import Context, Read
from softlabels.teacher.source import Source, open_source

DOUBLES = pa.list_(pa.field("element", pa.float64(), nullable=False))
WAITING_POSITIONS = 20_000
VERSION = 1
"""Of how records become rows: another one makes other sources of the same files."""

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
KEPT = pa.schema(
    [
        ("place", pa.string()),
        ("example_id", pa.string()),
        ("input_ids", INTS),
        ("position_index", INTS),
        ("label_ids", INTS),
        ("label_logprobs", FLOATS),
        ("label_ranks", INTS),
        ("topk_ids", INTS),
        ("topk_logprobs", FLOATS),
        ("tail_logprob", FLOATS),
    ]
)


@dataclass
class Tally:
    """What could not be kept: how often for each reason, and where first.

    Attributes:
        records: that were seen.
        reasons: how often, by reason; a reason says whether it counts records or positions.
        first: the place and detail of the first one.
    """

    records: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    first: str = ""

    def add(self, reason: str, place: str, detail: str = "", count: int = 1) -> None:
        """Counts what is left out."""
        self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.first = self.first or f"{place}: {reason}{': ' if detail else ''}{detail}"

    def require_none(self) -> None:
        """Raises DataError when anything was left out."""
        if self.reasons:
            counts = ", ".join(f"{n} x {reason}" for reason, n in sorted(self.reasons.items()))
            raise DataError(
                f"expected {self.records} records that can be kept exactly; the first that cannot "
                f"is {self.first}; in all: {counts}; mend them, or say on_bad: skip to leave them "
                "out and count them"
            )


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
    first = _First(context)
    with pq.ParquetWriter(seen, SEEN) as writer:
        for table in first.tables(advance):
            writer.write_table(table)
    first.finish()
    second = _Second(context, first)
    with pq.ParquetWriter(kept, KEPT) as writer:
        for batch in pq.ParquetFile(seen).iter_batches(256):
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

    def batches(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """As `Source.batches`."""
        assert self.kept is not None
        yield from self.kept.batches(start, stop, columns)

    def locate(self, row: int) -> str:
        """The record that a row was made of."""
        (batch,) = self.batches(row, row + 1, ["place"])
        return str(batch["place"][0].as_py())


def _source(context: Context, kept: Path, tally: "Tally") -> RecordedSource:
    opened = open_source(str(kept), KEPT.names)
    spec = context.spec.model_dump(
        mode="json", exclude={"table", "files", "tokenizer", "teacher", "shard_rows", "profile"}
    )
    template = context.chat_template_sha256
    origin = [context.files.fingerprint, context.tokenizer.digest, spec, template, VERSION]
    return RecordedSource(
        context.files.root,
        opened.files,
        opened.schema,
        origin=sha256_json(origin),
        skipped=dict(sorted(tally.reasons.items())),
        kept=opened,
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


class _First:
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
        _require_rows(self.fewest is not None, self.tally, self._context)

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


def _require_rows(found: bool, tally: Tally, context: Context) -> None:
    if not found:
        counts = ", ".join(f"{n} x {reason}" for reason, n in sorted(tally.reasons.items()))
        raise DataError(
            f"{context.spec.files!r}: none of {tally.records} records can be kept: "
            f"{counts or 'there are none'}"
        )


class _Second:
    """The pass over the sequences: k entries a position, their mass, and the tail."""

    def __init__(self, context: Context, first: _First) -> None:
        self._context = context
        self._tally = first.tally
        assert first.fewest is not None
        self.k = context.spec.k or first.fewest
        if self.k > first.most:
            raise BadInputError(
                f"k is {self.k!r}, the records have at most {first.most!r} entries a position"
            )
        self._digits = first.precision.mass_error(self.k)
        self._precision = first.precision.kind
        self._largest = 0.0
        self._below = self._rows = 0

    @property
    def tail_error(self) -> float | None:
        """How far a derived tail's mass may be off, rounded up; None where tails are unknown."""
        spec = self._context.spec
        if spec.tail == "unknown":
            return None
        return spec.tail_error or _rounded_up(self._largest)

    def keep(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Rows of KEPT of rows of SEEN."""
        rows = [self._sequence(row) for row in batch.to_pylist()]
        return pa.RecordBatch.from_pylist([row for row in rows if row is not None], KEPT)

    def finish(self) -> None:
        """Raises as the first pass, and where the tails of all positions are an artefact."""
        spec = self._context.spec
        if spec.on_bad == "refuse":
            self._tally.require_none()
        _require_rows(bool(self._rows), self._tally, self._context)
        if spec.layout == "axolotl" and spec.tail == "derived" and not self._below:
            raise DataError(
                "every position's probabilities sum to 1: axolotl's writers renormalise the top "
                "k, and what the tail was cannot be told; expected tail: unknown, found tail: "
                "derived"
            )

    def _sequence(self, row: dict[str, Any]) -> dict[str, Any] | None:
        counts = np.array(row["counts"], np.int64)
        ids, logprobs = _padded(row["entry_ids"], row["entry_logprobs"], counts, self.k)
        mass = np.exp(logprobs).sum(1)
        error = self._errors(row, mass)
        heavy = mass > 1 + error
        if heavy.any():
            at = int(np.argmax(heavy))
            detail = (
                f"they sum to {mass[at]:.6f} in position {at}, expected at most 1 + "
                f"{error[at]:.1e} by {self._precision}"
            )
            if not any(row["slack"]):
                self._tally.add("record with probabilities that sum above 1", row["place"], detail)
                return None
            # Of a lossy layout only these positions are wrong.
            reason = "position with probabilities that sum above 1"
            self._tally.add(reason, row["place"], detail, int(heavy.sum()))
        keep = ~heavy
        if not keep.any():
            self._tally.add("record without positions", row["place"])
            return None
        self._rows += 1
        self._largest = max(self._largest, float(error[keep].max()))
        whole = keep & (mass >= 1 - error)
        self._below += int((keep & ~whole).sum())
        if self._context.spec.tail == "derived":
            # Within its error the head is all there is: so that head and tail sum to 1.
            logprobs[whole] -= np.log(mass[whole])[:, None]
            tail = np.full(len(mass), -np.inf)
            tail[keep & ~whole] = np.log1p(-mass[keep & ~whole])
        else:
            over = mass > 1
            logprobs[over] -= np.log(mass[over])[:, None]
            tail = None
        _take_labels(row, ids, logprobs)
        return self._kept(row, keep, ids, logprobs, tail)

    def _errors(self, row: dict[str, Any], mass: npt.NDArray[np.float64]) -> Any:
        spec = self._context.spec
        slack = np.array(row["slack"], np.float64)
        if spec.tail_error is not None:
            return np.full(len(mass), spec.tail_error)
        if np.isnan(slack).any() and spec.tail == "derived":
            raise DataError(
                f"{row['place']}: tail is 'derived', but what this compression leaves out has no "
                "bound in the files: expected tail: unknown, or tail_error: how far the mass of "
                "the top k may be off"
            )
        lossy = slack != 0
        return np.where(lossy, np.nan_to_num(slack), self._digits)

    def _kept(
        self,
        row: dict[str, Any],
        keep: npt.NDArray[np.bool_],
        ids: npt.NDArray[np.int64],
        logprobs: npt.NDArray[np.float64],
        tail: npt.NDArray[np.float64] | None,
    ) -> dict[str, Any]:
        at = np.flatnonzero(keep)
        index = [row["position_index"][i] for i in at]
        name = row["name"] or sha256_json([row["input_ids"], index])
        return {
            "place": row["place"],
            "example_id": name,
            "input_ids": row["input_ids"],
            "position_index": index,
            "label_ids": [row["label_ids"][i] for i in at],
            "label_logprobs": [row["label_logprobs"][i] for i in at],
            "label_ranks": [row["label_ranks"][i] for i in at],
            "topk_ids": ids[keep].reshape(-1).tolist(),
            "topk_logprobs": logprobs[keep].reshape(-1).tolist(),
            "tail_logprob": None if tail is None else tail[keep].tolist(),
        }


def _padded(
    ids: list[int], logprobs: list[float], counts: npt.NDArray[np.int64], k: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The first k entries of each position, [P, k], padded with (-1, -inf)."""
    starts = np.cumsum(counts) - counts
    place = starts[:, None] + np.arange(k)
    used = np.arange(k) < counts[:, None]
    place = np.where(used, place, 0)
    found = np.where(used, np.array(ids, np.int64)[place], -1)
    return found, np.where(used, np.array(logprobs, np.float64)[place], -np.inf)


def _take_labels(
    row: dict[str, Any], ids: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float64]
) -> None:
    """Labels in the top k get the log-probability that stands there, rescaled or not."""
    here = ids == np.array(row["label_ids"])[:, None]
    held = here.any(1) & (np.array(row["label_ids"]) >= 0)
    values = np.where(here, logprobs, 0.0).sum(1)
    row["label_logprobs"] = np.where(held, values, row["label_logprobs"]).tolist()


def _rounded_up(value: float) -> float:
    """One digit of it: equal for imports of one kind, which share a table."""
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.0e}")

"""Whether a table's distributions stand at the tokens they are said to: the ±1 self-test.

A distribution that is stored one token off trains a student without any error. Stored beside the
tokens it gives itself away: it fits its neighbour's next token better than its own.

B rows, N positions, k ids and m draws a position, V vocabulary entries.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import DataError, IntegrityError
from softlabels.lineage import Contents
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.targets import Floats, Ints, SoftTargets, flat_lists, position_name, to_numpy

LEAST_POSITIONS = 100
"""Fewer are reported and not judged."""

CLEAR = 3.0
LEAST_NATS = 0.5
"""Two losses must differ by so many standard errors, and by so much, before one is called the
lower: positions are not independent, and a teacher that was hardly trained may fit its own input
a little better than what follows. A real shift by one token costs nats."""

SMALLEST_MASS = 1e-9
"""Of a tail without mass, so that one surprising token does not make a mean infinite."""


@dataclass(frozen=True)
class Sequences:
    """The tokens of B rows, flat, and where their N positions stand among them.

    Attributes:
        tokens: int32 [sum of L], input_ids of all rows.
        document: int64 [sum of L], differs between tokens of two rows or of two segments.
        at: int64 [N], the index of each position's token in `tokens`.
        num_positions: int32 [B].
        names: B example ids, for messages.
    """

    tokens: Ints
    document: npt.NDArray[np.int64]
    at: npt.NDArray[np.int64]
    num_positions: Ints
    names: list[str]

    def moved(self, shift: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        """The token `shift` places after each position's, and whether its document has one."""
        place = np.clip(self.at + shift, 0, max(0, len(self.tokens) - 1))
        inside = (self.at + shift == place) & (self.document[place] == self.document[self.at])
        return self.tokens[place], inside

    def refuse(self, bad: npt.NDArray[np.bool_], what: str) -> None:
        """Raises DataError that names the first of the positions `bad` [N], if there is one."""
        if bad.any():
            place = position_name(self.names, self.num_positions, int(np.argmax(bad)))
            raise DataError(f"{place} {what} ({int(bad.sum())} such positions here)")


class SelfTest:
    """Adds up, batch by batch, how well distributions fit the tokens around them."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._positions = self._rows = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Checks and counts the rows of `batch`, which holds all columns of the table.

        Raises:
            DataError: a row's positions, segments or labels contradict its tokens.
            IntegrityError: a list is null in some rows and not in others, or is too long.
        """
        found = sequences(batch)
        if found is None:
            return
        contents = self._contents
        if contents.alignment is None:
            raise DataError("rows have input_ids, but the table's contents name no alignment")
        columns = {name: batch[name] for name in batch.schema.names}
        targets = SoftTargets.from_columns(columns, contents.k, contents.draws)
        self._rows += batch.num_rows
        check_labels(found, targets, contents)
        if not len(targets.ids):
            return
        tokens = self._tokens(found, targets)
        usable = np.logical_and.reduce([inside for _, inside in tokens.values()])
        self._positions += int(usable.sum())
        losses = {
            name: -_logprobs(targets, token, contents.num_classes)[usable]
            for name, (token, _) in tokens.items()
        }
        for name, loss in losses.items():
            over = loss - losses["0"]
            parts = np.array([loss.sum(), over.sum(), (over * over).sum()])
            self._sums[name] = self._sums.get(name, np.zeros(3)) + parts

    def result(self) -> dict[str, Any] | None:
        """What was found; None when no row had input_ids.

        Returns:
            alignment; rows; positions that were compared; losses, the mean -log p in nats of the
            token at each shift; verdict: "right", "wrong", "unclear" (losses too close to tell,
            as of a teacher that knows nothing) or "too few" positions; problem, a line when wrong.
        """
        if not self._rows:
            return None
        count = max(1, self._positions)
        losses = {name: float(sums[0] / count) for name, sums in self._sums.items()}
        low: list[str] = []
        verdict = "right"
        for name in losses.keys() - {"0"}:
            _, over, squares = self._sums[name] / count
            error = math.sqrt(max(squares - over**2, 0.0) / count)
            margin = max(CLEAR * error, LEAST_NATS)
            if over < -margin:
                low.append(name)
            elif over <= margin:
                verdict = "unclear"
        if self._positions < LEAST_POSITIONS:
            verdict = "too few"
        elif min(losses.values()) >= math.log(self._contents.num_classes):
            verdict = "unclear"  # no better than guessing: what fits by chance proves nothing
        elif low:
            verdict = "wrong"
        report = {
            "alignment": self._contents.alignment,
            "rows": self._rows,
            "positions": self._positions,
            "losses": {name: round(loss, 4) for name, loss in losses.items()},
            "verdict": verdict,
        }
        lowest = min(low, key=lambda name: losses[name], default="")
        return report | {"problem": self._problem(lowest, losses) if verdict == "wrong" else None}

    def _tokens(
        self, found: Sequences, targets: SoftTargets
    ) -> dict[str, tuple[Ints, npt.NDArray[np.bool_]]]:
        if self._contents.alignment == "next":
            return {name: found.moved(1 + int(name)) for name in ("-1", "0", "+1")}
        labels = targets.label_ids
        if labels is None:
            nothing = np.zeros(len(targets.ids), bool)
            return {"0": (np.zeros(len(targets.ids), np.int32), nothing)}
        # What stood at masked places before they were masked.
        original = found.tokens.copy()
        original[found.at[labels >= 0]] = labels[labels >= 0]
        unmasked = Sequences(original, found.document, found.at, found.num_positions, found.names)
        tokens = {name: unmasked.moved(int(name)) for name in ("-1", "0", "+1")}
        # And the labels of the positions before and after, which a slip in the gather shows.
        rows = np.repeat(np.arange(len(found.num_positions)), found.num_positions)
        for name, step in (("label -1", 1), ("label +1", -1)):
            other = np.roll(labels, step)
            same_row = np.roll(rows, step) == rows
            same_row[0 if step == 1 else -1] = False
            tokens[name] = (other, same_row & (other >= 0))
        token, inside = tokens["0"]
        return tokens | {"0": (token, inside & (labels >= 0))}

    def _problem(self, name: str, losses: dict[str, float]) -> str:
        numbers = ", ".join(f"{loss:.4f} at {shift}" for shift, loss in losses.items())
        sign = name.split()[-1][0]
        if name.startswith("label"):
            fits = f"label_ids[j {sign} 1]"
        elif self._contents.alignment == "same":
            fits = f"the token at position_index[j] {sign} 1"
        else:
            fits = "input_ids[position_index[j]" + (" + 2]" if sign == "+" else "]")
        return (
            f"targets are shifted by {sign}1: distribution j fits {fits}; the mean -log p of the "
            f"token must be least at 0, it is {numbers} (nats, {self._positions} positions)"
        )


def self_test(table: Table, max_rows: int | None = None) -> dict[str, Any] | None:
    """The self-test on a table version, see `SelfTest.result`; None without input_ids.

    Args:
        table: the version.
        max_rows: rows to look at, rounded up to a row group; None: all.

    Raises:
        DataError: a row's positions, segments or labels contradict its tokens.
    """
    test = SelfTest(table.contents)
    rows = 0
    for batch in table.batches():
        if max_rows is not None and rows >= max_rows:
            break
        test.add(batch)
        rows += batch.num_rows
    return test.result()


def sequences(batch: pa.RecordBatch) -> Sequences | None:
    """The token sequences of a batch of rows, checked; None where rows have none.

    Raises:
        DataError: position_index does not rise, leaves its row, or segment_ids fall.
        IntegrityError: a list is null in some rows and not in others, or of a wrong length.
    """
    if "input_ids" not in batch.schema.names or batch["input_ids"].null_count == batch.num_rows:
        return None
    names = batch["example_id"].to_pylist()
    counts = to_numpy(batch["num_positions"], np.int32)
    tokens, lengths = flat_lists("input_ids", batch["input_ids"], np.int32)
    index, found = flat_lists("position_index", batch["position_index"], np.int32)
    if not np.array_equal(found, counts):
        raise IntegrityError("column 'position_index': a row does not hold num_positions values")
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    row_of = np.repeat(np.arange(len(counts)), counts)
    whole = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    document = whole
    if batch["segment_ids"].null_count < batch.num_rows:
        segments, found = flat_lists("segment_ids", batch["segment_ids"], np.int32)
        if not np.array_equal(found, lengths):
            raise IntegrityError("column 'segment_ids': a row does not hold one for each token")
        falls = (segments < 0) | (np.diff(segments, prepend=segments[:1]) < 0) & (
            np.diff(whole, prepend=-1) == 0
        )
        if falls.any():
            row = int(whole[int(np.argmax(falls))])
            raise DataError(f"example {names[row]!r} has segment_ids that fall or are below 0")
        document = (whole << 32) + segments
    at = starts[row_of] + index
    made = Sequences(tokens, document, at, counts, names)
    made.refuse((index < 0) | (index >= lengths[row_of]), "has a position_index outside its row")
    falling = (np.diff(index, prepend=-1) <= 0) & (np.diff(row_of, prepend=-1) == 0)
    made.refuse(falling, "has a position_index that does not rise")
    return made


def check_labels(found: Sequences, targets: SoftTargets, contents: Contents) -> None:
    """Raises DataError unless labels are the tokens of their places and fit the stored head."""
    _refuse_tokens(found, contents.num_classes)
    following, inside = found.moved(1)
    if contents.alignment == "next":
        what = "is at the last token of its row or segment, which no token follows"
        found.refuse(~inside, what)
    labels = targets.label_ids
    if labels is None:
        return
    known = labels >= 0
    if contents.alignment == "next":
        wrong = known & (labels != following)
        found.refuse(wrong, "has another label than the token after it in input_ids")
    if not targets.k:
        return
    here = targets.ids == labels[:, None]
    held = here.any(1) & known
    ranks, logprobs = targets.label_ranks, targets.label_logprobs
    if ranks is not None:
        # A recorded teacher need not know the rank of a label that it did not list.
        stated = known & (ranks >= 0) if contents.recorded else known
        wrong = stated & np.where(held, ranks != here.argmax(1), (ranks >= 0) & (ranks < targets.k))
        wrong |= stated & (ranks < 0)
        found.refuse(wrong, "has a label_rank that is not its label's place in the top k")
    if logprobs is not None:
        head = np.where(
            held, np.take_along_axis(targets.logprobs, here.argmax(1)[:, None], 1)[:, 0], 0
        )
        apart = np.abs(head - logprobs) > _rounding(head, contents.profile)
        found.refuse(held & apart, "has a label_logprob that differs from its label's in the top k")


def _refuse_tokens(found: Sequences, num_classes: int) -> None:
    bad = (found.tokens < 0) | (found.tokens >= num_classes)
    if bad.any():
        token = int(found.tokens[int(np.argmax(bad))])
        raise DataError(f"input_ids hold {token}, expected ids from 0 to {num_classes - 1}")


def _rounding(logprobs: Floats, profile: shards.Profile) -> npt.NDArray[np.float64]:
    """How far two roundings of one log-probability may be apart: the profile's and float16's."""
    depth = np.abs(logprobs.astype(np.float64))
    error = depth * 2.0**-9 + 1e-5
    if profile == "compact":
        deepest = float(shards.compact_levels()[-1])
        error += np.where(depth < deepest, np.minimum(np.exp(depth / 2) / 96, 0.25), np.inf)
    return error


def _logprobs(targets: SoftTargets, tokens: Ints, num_classes: int) -> npt.NDArray[np.float64]:
    """log p_j(tokens[j]), nats, float64 [N]; the tail's mass is spread as its draws say.

    A token outside the top k has tail · (c + 1/(V - k)) / (m + 1), c of the m draws being it:
    with m = 0 the tail is spread evenly.
    """
    head = np.exp(targets.logprobs.astype(np.float64))
    mass = head.sum(1)
    tail = 1 - mass if targets.tail is None else np.exp(targets.tail.astype(np.float64))
    tail = np.where(np.isnan(tail), 1 - mass, tail)
    tail = np.clip(tail, SMALLEST_MASS, 1.0)
    here = targets.ids == tokens[:, None]
    inside = (head * here).sum(1) * (1 - tail) / np.maximum(mass, SMALLEST_MASS)
    rest = np.maximum(1, num_classes - (targets.ids >= 0).sum(1))
    drawn = np.zeros(len(tokens))
    if targets.draws is not None:
        drawn = (targets.draws == tokens[:, None]).sum(1).astype(np.float64)
    outside = tail * (drawn + 1 / rest) / (targets.num_draws + 1)
    probs = np.where(here.any(1), inside, outside)
    return np.asarray(np.log(np.maximum(probs, SMALLEST_MASS / num_classes)))

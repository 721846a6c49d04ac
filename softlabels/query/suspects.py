"""Likely errors among the hard labels, worst first, by what the teacher says of them.

Classification: confident learning. A class's threshold t_c is the mean of p(c) over the rows that
are labelled c. A row counts for the likeliest of the classes whose probability is not below their
threshold, and is suspect where that is another class than its label, which is not the teacher's
own choice either. Classes outside the stored ids are taken to be below their thresholds. Order:
p(label) minus the largest probability of another class, lowest first. Where the label noise was
estimated, error_prob is the probability that the label is wrong by that fit:
ε/V (1 - p) / ((1 - ε) p + ε/V) with p = p_T(label).

Sequences: positions whose label has a rank of at least `rank` and a probability below `below`
where the teacher gives its own choice at least `sure`, gathered by row. Order: the sum over these
positions of log p(choice) - log p(label), largest first.

Labels are judged by a teacher that may have been trained on them: it then doubts too few.

Source: Northcutt, Jiang, Chuang, Confident Learning, JAIR 2021.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.arrays import nested
from softlabels.errors import BadInputError
from softlabels.query.noise import Noise
from softlabels.query.reading import HEADS, LABELS, read_rows, targets_of
from softlabels.query.recipe import Source
from softlabels.query.selection import Numbers, select
from softlabels.query.tempering import Doubles, Exact, raw_label, temper
from softlabels.schema import FLOATS, INTS, temper_columns
from softlabels.store.table import Table
from softlabels.targets import Ints, SoftTargets, flat_lists

RANK = 5
BELOW = 0.01
SURE = 0.9

_CLASSIFIED = pa.schema(
    [
        ("example_id", pa.string()),
        ("view", pa.int32()),
        ("label", pa.int32()),
        ("label_name", pa.string()),
        ("label_prob", pa.float32()),
        ("suggested", pa.int32()),
        ("suggested_name", pa.string()),
        ("suggested_prob", pa.float32()),
        ("top1_id", pa.int32()),
        ("top1_prob", pa.float32()),
        ("margin", pa.float32()),
        ("error_prob", pa.float32()),
    ]
)
_SEQUENCES = pa.schema(
    [
        ("example_id", pa.string()),
        ("view", pa.int32()),
        ("num_suspects", pa.int32()),
        ("num_positions", pa.int32()),
        ("excess", pa.float32()),
        ("positions", INTS),
        ("token_ids", INTS),
        ("label_ids", INTS),
        ("label_probs", FLOATS),
        ("label_ranks", INTS),
        ("top1_ids", INTS),
        ("top1_probs", FLOATS),
    ]
)


@dataclass(frozen=True)
class Doubt:
    """When a position of a sequence is suspect.

    Attributes:
        rank: least rank of its label, from 0.
        below: its label's probability is below this.
        sure: least probability of the teacher's own choice.
    """

    rank: int = RANK
    below: float = BELOW
    sure: float = SURE

    def __post_init__(self) -> None:
        for name, value in (("below", self.below), ("sure", self.sure)):
            if not 0 < value <= 1:
                raise BadInputError(f"{name} {value!r}: expected a probability above 0, at most 1")
        if self.rank < 1:
            raise BadInputError(f"rank {self.rank!r}: expected at least 1; 0 is the likeliest")


def suspects(
    table: str | Table,
    where: str | None = None,
    doubt: Doubt | None = None,
    noise: Noise | None = None,
) -> pa.Table:
    """The rows of a table whose hard label is likely wrong, worst first.

    Args:
        table: a reference or an open table.
        where: SQL expression that chooses the rows to look at.
        doubt: for sequences.
        noise: as `estimate_noise` found it; for error_prob of classification.

    Returns:
        Of classification: example_id, view, label, suggested (the class they count for), top1_id,
        names and probabilities of these; margin, -1 to 1; error_prob, null without `noise`. Of
        sequences, a row each: lists with an entry a suspect position, and excess, nats.

    Raises:
        BadInputError: no position is labelled, or `where` cannot be meant.
    """
    opened = Table.open(table) if isinstance(table, str) else table
    rows = labelled_rows(opened, where)
    if opened.contents.alignment is None:
        return _classified(opened, rows, noise)
    return _sequences(opened, rows, doubt or Doubt())


def labelled_rows(table: Table, where: str | None) -> Numbers:
    """The numbers of the rows that fulfil `where`, rising."""
    source = Source.model_validate({"table": table.root.uri, "where": where})
    return select(table, source, 0, with_keys=False).rows


def _classified(table: Table, rows: Numbers, noise: Noise | None) -> pa.Table:
    thresholds = _thresholds(table, rows)
    extra = (
        ()
        if noise is None or noise.temperature not in table.contents.temperatures
        else (noise.temperature,)
    )
    parts = []
    for batch, targets, probs, label in _known(table, rows, (), extra):
        labels = targets.label_ids
        if labels is None:
            continue
        ids = targets.ids
        meets = (ids >= 0) & (probs >= thresholds[ids])
        place = meets.argmax(1)  # ids stand by falling probability
        every = np.arange(len(ids))
        suggested = ids[every, place]
        doubted = meets.any(1) & (suggested != labels) & (ids[:, 0] != labels) & ~np.isnan(label)
        other = np.where(ids == labels[:, None], -np.inf, probs).max(1)
        found = {
            "label": labels,
            "label_prob": np.exp(label),
            "suggested": suggested,
            "suggested_prob": probs[every, place],
            "top1_id": ids[:, 0],
            "top1_prob": probs[:, 0],
            "margin": np.exp(label) - other,
            "error_prob": _error_probs(table, targets, noise),
        }
        parts.append(_rows_of(table, batch, np.flatnonzero(doubted), found))
    joined = pa.concat_tables([_CLASSIFIED.empty_table(), *parts])
    return joined.sort_by([(name, "ascending") for name in ("margin", "example_id", "view")])


def _rows_of(
    table: Table, batch: pa.RecordBatch, chosen: Numbers, found: dict[str, npt.NDArray[Any]]
) -> pa.Table:
    """Rows of `_CLASSIFIED`: `chosen` ones of a batch with values of all of it."""
    taken = pa.array(chosen)
    columns: dict[str, Any] = {name: batch[name].take(taken) for name in ("example_id", "view")}
    for name, values in found.items():
        kind = _CLASSIFIED.field(name).type
        columns[name] = pa.array(values[chosen], kind, from_pandas=name == "error_prob")
    classes = table.contents.classes
    for name in ("label", "suggested"):
        names = pa.nulls(len(chosen), pa.string())
        if classes is not None:
            names = pa.array(classes, pa.string()).take(columns[name])
        columns[f"{name}_name"] = names
    return pa.table([columns[name] for name in _CLASSIFIED.names], schema=_CLASSIFIED)


def _error_probs(table: Table, targets: SoftTargets, noise: Noise | None) -> Doubles:
    """Of each label, float64 [N]; NaN where unknown."""
    if noise is None:
        return np.full(len(targets.ids), np.nan)
    probs = np.exp(temper(targets, noise.temperature, Exact.of(table.contents).whole).label)
    random = noise.noise / table.contents.num_classes
    mixed = (1 - noise.noise) * probs + random
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(mixed > 0, random * (1 - probs) / mixed, np.nan))


def _thresholds(table: Table, rows: Numbers) -> Doubles:
    """t_c, float64 [V + 1]; infinite where no row is labelled c, and for the id -1."""
    classes = table.contents.num_classes
    sums, counts = np.zeros(classes), np.zeros(classes, np.int64)
    for _, targets, _, label in _known(table, rows):
        if targets.label_ids is None:
            continue
        known = ~np.isnan(label)
        labels = targets.label_ids[known]
        sums += np.bincount(labels, np.exp(label[known]), classes)
        counts += np.bincount(labels, minlength=classes)
    if not counts.any():
        raise BadInputError(
            f"none of {len(rows)} rows of {table.root.uri!r} has a hard label of known "
            "probability: labels are judged by it"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.where(counts > 0, sums / counts, np.inf)
    return np.append(means, np.inf)


def _sequences(table: Table, rows: Numbers, doubt: Doubt) -> pa.Table:
    parts = []
    labelled = 0
    for batch, targets, probs, label in _known(table, rows, ("input_ids", "position_index")):
        labels = targets.label_ids
        if labels is None:
            continue
        labelled += int((~np.isnan(label)).sum())
        ranks = _ranks(targets, labels)
        with np.errstate(invalid="ignore"):
            doubted = (np.exp(label) < doubt.below) & (probs[:, 0] >= doubt.sure)
        doubted &= (ranks >= doubt.rank) | (ranks < 0)
        doubted &= labels >= 0
        chosen = np.flatnonzero(doubted)
        if not len(chosen):
            continue
        counts = targets.num_positions
        row = np.repeat(np.arange(len(counts)), counts)[chosen]
        within = chosen - (np.cumsum(counts) - counts)[row]
        excess = np.log(probs[chosen, 0]) - label[chosen]
        each = np.bincount(row, minlength=len(counts)).astype(np.int32)
        some = np.flatnonzero(each)
        lists = {
            "positions": within.astype(np.int32),
            "token_ids": _tokens(batch, counts)[chosen],
            "label_ids": labels[chosen],
            "label_probs": np.exp(label[chosen]).astype(np.float32),
            "label_ranks": ranks[chosen],
            "top1_ids": targets.ids[chosen, 0],
            "top1_probs": probs[chosen, 0].astype(np.float32),
        }
        sums = np.bincount(row, excess, len(counts))[some].astype(np.float32)
        columns = {
            **{name: batch[name].take(pa.array(some)) for name in ("example_id", "view")},
            "num_suspects": pa.array(each[some]),
            "num_positions": pa.array(counts[some]),
            "excess": pa.array(sums),
            **{n: nested(v, each[some], _SEQUENCES.field(n).type) for n, v in lists.items()},
        }
        parts.append(pa.table([columns[n] for n in _SEQUENCES.names], schema=_SEQUENCES))
    if not labelled:
        raise BadInputError(
            f"no position of {len(rows)} rows of {table.root.uri!r} has a hard label of known "
            "probability: labels are judged by it"
        )
    joined = pa.concat_tables([_SEQUENCES.empty_table(), *parts])
    order = [("excess", "descending"), ("example_id", "ascending"), ("view", "ascending")]
    return joined.sort_by(order)


def _known(
    table: Table,
    rows: Numbers,
    more: tuple[str, ...] = (),
    temperatures: tuple[float, ...] = (),
) -> Iterator[tuple[pa.RecordBatch, SoftTargets, Doubles, Doubles]]:
    """Batches with their targets, head probabilities [N, k] and log p(label) [N], NaN unknown."""
    columns = ["example_id", "view", "num_positions", *HEADS, *LABELS, *more]
    columns += [name for temperature in temperatures for name in temper_columns(temperature)]
    whole = Exact.of(table.contents).whole
    for _, batch in read_rows(table, rows, columns):
        targets = targets_of(table, batch, table.contents.k, temperatures)
        known = temper(targets, 1.0, whole)
        label = raw_label(targets) if targets.label_ids is None else known.label
        yield batch, targets, np.exp(known.logprobs), label


def _ranks(targets: SoftTargets, labels: Ints) -> Ints:
    """Of the labels, -1 where below the stored ids by an unknown number."""
    if targets.label_ranks is not None:
        return targets.label_ranks
    here = targets.ids == labels[:, None]
    return np.where(here.any(1), here.argmax(1), -1).astype(np.int32)


def _tokens(batch: pa.RecordBatch, counts: Ints) -> Ints:
    """The token at each position, int32 [N]; -1 where sequences are not stored."""
    if batch["input_ids"].null_count or batch["position_index"].null_count:
        return np.full(int(counts.sum()), -1, np.int32)
    tokens, lengths = flat_lists("input_ids", batch["input_ids"], np.int32)
    index, _ = flat_lists("position_index", batch["position_index"], np.int32)
    starts = np.cumsum(lengths) - lengths
    return np.asarray(tokens[np.repeat(starts, counts) + index], np.int32)

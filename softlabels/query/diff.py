"""What two tables, or two versions of one, say differently of the same examples.

Rows are matched by (example_id, view), by DuckDB, which spills to disk. Rows of a file that both
versions have are the same and are not read. What is held in memory is about 100 bytes a row.

n rows that both hold, N positions of some of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.query.divergence import divergence
from softlabels.query.ensemble import require_alike
from softlabels.query.gathering import CACHE_BYTES, CHUNK_VALUES, TableRows
from softlabels.query.matching import match
from softlabels.query.mixture import at_temperature
from softlabels.query.reading import HEADS, targets_of
from softlabels.query.selection import Numbers
from softlabels.store.table import Table
from softlabels.targets import Ints, SoftTargets

CHANGES = ("added", "removed", "positions", "relabelled", "top1", "probabilities")
"""What a row is listed for, the first that is so: only B has it; only A; it has other positions,
and cannot be compared; its hard label changed; the teacher's choice did; the probabilities did."""

_PLACES = ("input_ids", "position_index", "segment_ids")

_VALUES: dict[str, Any] = {
    "kl_ab": np.float32,
    "kl_ba": np.float32,
    "label_a": np.int32,
    "label_b": np.int32,
    "top1_a": np.int32,
    "top1_b": np.int32,
    "top1_prob_a": np.float32,
    "top1_prob_b": np.float32,
}
_OF_SEQUENCES: dict[str, Any] = {
    "kl_ab": np.float32,
    "kl_ba": np.float32,
    "num_positions": np.int32,
    "relabelled": np.int32,
    "top1_changes": np.int32,
    "worst_position": np.int32,
    "worst_kl_ab": np.float32,
    "worst_kl_ba": np.float32,
}


_COUNTS: dict[str, Any] = {"relabelled": np.int32, "top1_changes": np.int32}


@dataclass(frozen=True)
class Diff:
    """Two versions compared.

    Attributes:
        summary: counts and means in plain values.
        tables: a and b.
        numbers: int64 [2, rows that differ], the row of each in a and in b, -1 where it has none;
            in the order worst first.
        change: int8 of each, its place in CHANGES.
        values: of each, by column; 0 where it is not in both.
    """

    summary: Mapping[str, Any]
    tables: tuple[Table, Table]
    numbers: npt.NDArray[np.int64]
    change: npt.NDArray[np.int8]
    values: Mapping[str, npt.NDArray[Any]]

    def rows(self, limit: int | None = None, only: str | None = None) -> pa.Table:
        """The rows that differ, worst first: by KL both ways added, then those of one side.

        Args:
            limit: most rows.
            only: one of CHANGES.

        Returns:
            example_id, view, change; of classification label, top1 and top1_prob of a and b, of
            sequences num_positions, how many of them have another label and another top1, and the
            worst one; kl_ab and kl_ba, nats, means over the positions.
        """
        chosen = np.arange(len(self.change))
        if only is not None:
            chosen = np.flatnonzero(self.change == CHANGES.index(only))
        chosen = chosen[:limit]
        numbers, change = self.numbers[:, chosen], self.change[chosen]
        in_a = numbers[0] >= 0
        names = _names(self.tables[0], numbers[0], in_a)
        names = _merged(names, _names(self.tables[1], numbers[1], ~in_a), in_a)
        both = (numbers >= 0).all(0) & (change != CHANGES.index("positions"))
        columns = {
            **names,
            "change": pa.array(CHANGES).take(pa.array(change)),
            **{n: pa.array(v[chosen], mask=~both) for n, v in self.values.items()},
        }
        return pa.table(columns)


def diff(a: str | Table, b: str | Table) -> Diff:
    """Compares two tables, or two versions of one.

    Raises:
        MismatchError: they are not of one label space, tokenizer and alignment.
        DataError: one holds an example twice.
        IntegrityError: a file is not as the log says.
    """
    first, second = (Table.open(t) if isinstance(t, str) else t for t in (a, b))
    tables = {"a": first, "b": second}
    require_alike(tables, "table", "only distributions over the same classes can be compared")
    found = match(tables).rows
    numbers = np.stack([found["a"], found["b"]])
    here = np.zeros(second.num_rows, bool)
    here[numbers[1][numbers[1] >= 0]] = True
    added, removed = np.flatnonzero(~here), numbers[0][numbers[1] < 0]
    both = numbers[:, numbers[1] >= 0]
    same = _in_one_file(first, second, both)
    comparing = _Comparing(first, second)
    values, apart = comparing.run(both[:, ~same])
    change = _changes(values, apart)
    listed = change >= 0
    order = np.argsort(-(values["kl_ab"] + values["kl_ba"])[listed], kind="stable")
    lonely = np.full((2, len(added) + len(removed)), -1, np.int64)
    lonely[1, : len(added)] = added
    lonely[0, len(added) :] = removed
    alone = np.repeat(np.array([0, 1], np.int8), [len(added), len(removed)])
    shown = _OF_SEQUENCES if comparing.sequences else _VALUES
    numbers = np.concatenate([both[:, ~same][:, listed][:, order], lonely], 1)
    changes = np.concatenate([change[listed][order], alone])
    none = np.zeros(len(alone))
    kept = {
        n: np.concatenate([values[n][listed][order], none.astype(kind)])
        for n, kind in shown.items()
    }
    summary = _summary(first, second, changes, both.shape[1], values, apart)
    return Diff(summary, (first, second), numbers, changes, kept)


class _Comparing:
    """Reads the rows that two tables share and says how far apart each is."""

    def __init__(self, a: Table, b: Table) -> None:
        self._tables = (a, b)
        self.sequences = a.contents.alignment is not None
        columns = ["num_positions", *HEADS, "label_ids"]
        columns += _PLACES if self.sequences else ()
        self._readers = [TableRows(t, columns, CACHE_BYTES // 2) for t in (a, b)]
        largest = max((f.bounds.get("num_positions", (0, 1))[1] for f in a.files), default=1)
        width = max(1, a.contents.k + b.contents.k) * max(1, largest)
        self._step = max(1, CHUNK_VALUES // width)

    def run(
        self, numbers: npt.NDArray[np.int64]
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]:
        """Values of the rows, and what a summary counts: "comparable", "exact", positions."""
        rows = numbers.shape[1]
        kinds = _OF_SEQUENCES if self.sequences else _VALUES | _COUNTS
        values = {n: np.zeros(rows, kind) for n, kind in kinds.items()}
        apart = {"comparable": np.ones(rows, bool), "inexact": np.zeros(rows, np.int32)}
        for start in range(0, rows, self._step):
            part = slice(start, min(start + self._step, rows))
            self._compare(numbers[:, part], part, values, apart)
        return values, apart

    def _compare(
        self,
        numbers: npt.NDArray[np.int64],
        part: slice,
        values: Mapping[str, npt.NDArray[Any]],
        apart: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        batches = [r.take(n) for r, n in zip(self._readers, numbers, strict=True)]
        alike = _alike(batches)
        apart["comparable"][part] = alike
        places = np.flatnonzero(alike)
        a, b = (
            targets_of(t, x.take(pa.array(places)), t.contents.k)
            for t, x in zip(self._tables, batches, strict=True)
        )
        counts = a.num_positions
        rows = part.start + places
        sums = _Sums(counts)
        known = [at_temperature(t, 1.0) for t in (a, b)]
        found = divergence(*known)
        labels = [_labels(t) for t in (a, b)]
        choices = [_first(t) for t in (a, b)]
        values["kl_ab"][rows] = sums.mean(found.kl_ab)
        values["kl_ba"][rows] = sums.mean(found.kl_ba)
        values["relabelled"][rows] = sums.count(labels[0] != labels[1])
        values["top1_changes"][rows] = sums.count(choices[0] != choices[1])
        apart["inexact"][rows] = sums.count(~found.exact)
        if self.sequences:
            some = rows[counts > 0]
            at = sums.worst(found.kl_ab + found.kl_ba)
            values["num_positions"][rows] = counts
            values["worst_position"][rows] = -1
            values["worst_position"][some] = at - sums.starts[counts > 0]
            values["worst_kl_ab"][some] = found.kl_ab[at]
            values["worst_kl_ba"][some] = found.kl_ba[at]
            return
        for name, label, choice, one in zip("ab", labels, choices, known, strict=True):
            values[f"label_{name}"][rows], values[f"top1_{name}"][rows] = label, choice
            top = one.head[:, 0] if one.head.shape[1] else np.zeros(len(label))
            values[f"top1_prob_{name}"][rows] = top


class _Sums:
    """Over the positions of each row."""

    def __init__(self, counts: Ints) -> None:
        self.counts = counts
        self.starts = np.cumsum(counts) - counts
        self._row = np.repeat(np.arange(len(counts)), counts)

    def mean(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(self._row, values, len(self.counts)) / np.maximum(self.counts, 1)

    def count(self, values: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.bincount(self._row[values], minlength=len(self.counts))

    def worst(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The position of the largest value of each row that has one."""
        order = np.lexsort((-values, self._row))
        return np.asarray(order[self.starts[self.counts > 0]], np.int64)


def _alike(batches: list[pa.RecordBatch]) -> npt.NDArray[np.bool_]:
    """Rows of the same tokens and positions, bool [n]."""
    a, b = batches
    found = np.ones(a.num_rows, bool)
    for name in a.schema.names:
        if name not in ("num_positions", *_PLACES):
            continue
        if a[name].equals(b[name]):
            continue
        here, there = a[name].to_pylist(), b[name].to_pylist()
        found &= np.array([x == y for x, y in zip(here, there, strict=True)])
    return found


def _labels(targets: SoftTargets) -> Ints:
    if targets.label_ids is None:
        return np.full(len(targets.ids), -1, np.int32)
    return targets.label_ids


def _first(targets: SoftTargets) -> Ints:
    return targets.ids[:, 0] if targets.k else np.full(len(targets.ids), -1, np.int32)


def _changes(
    values: Mapping[str, npt.NDArray[Any]], apart: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[np.int8]:
    """The place in CHANGES of each row that both hold; -1 where nothing changed."""
    found = np.full(len(values["kl_ab"]), -1, np.int8)
    found[(values["kl_ab"] > 0) | (values["kl_ba"] > 0)] = CHANGES.index("probabilities")
    found[values["top1_changes"] > 0] = CHANGES.index("top1")
    found[values["relabelled"] > 0] = CHANGES.index("relabelled")
    found[~apart["comparable"]] = CHANGES.index("positions")
    return found


def _in_one_file(a: Table, b: Table, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Rows that both tables have in one file, bool [n]: an example is there once."""
    owners = []
    for table, rows in zip((a, b), numbers, strict=True):
        ends = np.cumsum([file.num_rows for file in table.files], dtype=np.int64)
        owners.append(np.searchsorted(ends, rows, side="right"))
    places = {file.sha256: number for number, file in enumerate(a.files)}
    of_b = np.array([places.get(file.sha256, -1) for file in b.files] or [-1], np.int64)
    return np.asarray(of_b[owners[1]] == owners[0], bool)


def _summary(
    a: Table,
    b: Table,
    changes: npt.NDArray[np.int8],
    both: int,
    values: Mapping[str, npt.NDArray[Any]],
    apart: Mapping[str, npt.NDArray[Any]],
) -> dict[str, Any]:
    counts = np.bincount(changes, minlength=len(CHANGES))
    comparable = apart["comparable"]
    finite = comparable & np.isfinite(values["kl_ab"]) & np.isfinite(values["kl_ba"])
    # Rows that were not read are the same: they count with a KL of 0.
    total = max(1, both - int((~finite).sum()))
    means = {n: float(values[n][finite].sum(dtype=np.float64) / total) for n in ("kl_ab", "kl_ba")}
    tables = {
        name: {
            "table": t.root.uri,
            "version": t.version,
            "rows": t.num_rows,
            "teacher": t.contents.teacher.name,
        }
        for name, t in (("a", a), ("b", b))
    }
    return {
        **tables,
        "both": both,
        "added": int(counts[0]),
        "removed": int(counts[1]),
        "other_positions": int((~comparable).sum()),
        "relabelled": int((values["relabelled"][comparable] > 0).sum()),
        "top1_changed": int((values["top1_changes"][comparable] > 0).sum()),
        "changed": int(len(changes) - counts[0] - counts[1]),
        **means,
        "infinite": int((comparable & ~finite).sum()),
        "exact": not bool(apart["inexact"][comparable].any()),
    }


def _names(table: Table, rows: Numbers, here: npt.NDArray[np.bool_]) -> dict[str, pa.Array]:
    """example_id and view of these rows of a table, where they are here."""
    columns = ["example_id", "view"]
    if not here.any():
        return {name: pa.array([], table.schema.field(name).type) for name in columns}
    found = TableRows(table, columns, CACHE_BYTES // 2).take(rows[here])
    return {name: found[name] for name in columns}


def _merged(
    ours: Mapping[str, pa.Array], theirs: Mapping[str, pa.Array], here: npt.NDArray[np.bool_]
) -> dict[str, pa.Array]:
    place = np.where(here, np.cumsum(here) - 1, int(here.sum()) + np.cumsum(~here) - 1)
    return {
        name: pa.concat_arrays([ours[name], theirs[name]]).take(pa.array(place)) for name in ours
    }


def names_of(found: Diff, rows: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as plain values, classes by name where the label space has names."""
    classes = found.tables[0].contents.classes
    for row in rows.to_pylist():
        if classes is not None:
            for name in ("label_a", "label_b", "top1_a", "top1_b"):
                if row.get(name) is not None and row[name] >= 0:
                    row[name] = classes[row[name]]
        yield row

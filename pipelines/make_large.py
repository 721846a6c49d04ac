"""Large made-up classification tables, through the product's own store, to measure queries on.

    python -m pipelines.make_large out/large --rows 10000000

Rows lie in order of their label, as data sets do that are folders of classes, so that a query for
one class needs one file or two. Teachers differ in their seed and how often they are right.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from softlabels.errors import BadInputError
from softlabels.lineage import Contents, RunLineage, TeacherLineage
from softlabels.schema import table_schema
from softlabels.store import shards
from softlabels.store.table import Table, UnitShard
from softlabels.targets import SoftTargets

CLASSES, STORED = 1_000, 10
FILE_ROWS, GROUP_ROWS = 250_000, 10_000
TEACHERS = {"a": 0.75, "b": 0.80, "c": 0.85}
"""Accuracy of the three teachers of benchmarks."""


def main() -> None:
    """Makes the three tables of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    asked = parser.parse_args()
    for name, table in make_all(asked.folder, asked.rows).items():
        print(f"{name}: {table.num_rows} rows in {len(table.files)} files at {table.root.uri}")


def make_all(folder: Path, rows: int) -> dict[str, Table]:
    """The tables of TEACHERS in a folder, by name; those that are there are taken as they are."""
    return {
        name: make(folder / name, rows, seed, accuracy)
        for seed, (name, accuracy) in enumerate(TEACHERS.items())
    }


def make(folder: Path, rows: int, seed: int, accuracy: float) -> Table:
    """A table of `rows` rows, one position each, V = 1,000, k = 10, as the default profile stores.

    Raises:
        BadInputError: a table with another number of rows is there.
    """
    teacher = TeacherLineage(
        name=f"made up {seed}", kind="recorded", code="pipelines/make_large.py"
    )
    contents = Contents(teacher=teacher, num_classes=CLASSES, k=STORED, profile="precise")
    schema = table_schema()
    table = Table.open_or_create(str(folder), schema, contents)
    if table.num_rows == rows:
        return table
    if table.files:
        raise BadInputError(f"{table.root.uri!r} has {table.num_rows} rows, not {rows}: delete it")
    run = f"{seed:064x}"
    units: list[UnitShard] = []
    starts = range(0, rows, FILE_ROWS)
    for start in track(starts, f"teacher {seed}", console=Console(stderr=True)):
        count = min(FILE_ROWS, rows - start)
        batch = _rows(schema, start, count, rows, seed, accuracy)
        writer = shards.ShardWriter(schema, "precise")
        for first in range(0, count, GROUP_ROWS):
            writer.write(batch.slice(first, GROUP_ROWS))
        unit = f"{run[-16:]}-{len(units):06d}"
        units.append(table.store_shard(f"{run}/{unit}", unit, writer.close()))
    lineage = RunLineage(
        run_id=run,
        units=tuple(unit.key for unit in units),
        num_rows=rows,
        spec={},
        spec_sha256="0" * 64,
        source={},
        packages={},
        device="cpu",
        started_at="2026-01-01T00:00:00+00:00",
        seconds=0.0,
    )
    return table.commit(units, lineage)


def _rows(
    schema: pa.Schema, start: int, count: int, total: int, seed: int, accuracy: float
) -> pa.RecordBatch:
    numbers = np.arange(start, start + count, dtype=np.int64)
    rng = np.random.default_rng((seed, start))
    targets = _targets(rng, (numbers * CLASSES // total).astype(np.int32), accuracy)
    columns = {
        "example_id": pa.array([f"{number:010x}" for number in numbers.tolist()]),
        "view": pa.array(np.zeros(count, np.int32)),
        **shards.round_to_profile(targets, "precise").columns(),
    }
    arrays = [columns[f.name] if f.name in columns else pa.nulls(count, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _targets(
    rng: np.random.Generator, labels: npt.NDArray[np.int32], accuracy: float
) -> SoftTargets:
    """Ten falling probabilities and a tail that the other classes share alike."""
    count = len(labels)
    wrong = rng.random(count) >= accuracy
    first = (labels + wrong * rng.integers(1, 20, count)) % CLASSES
    apart = rng.integers(1, CLASSES // STORED, count)  # so that ten multiples are distinct
    ids = ((first[:, None] + apart[:, None] * np.arange(STORED)) % CLASSES).astype(np.int32)
    depth = np.zeros((count, STORED))
    depth[:, 1:] = np.cumsum(rng.exponential(rng.uniform(0.3, 2.0, count)[:, None], (count, 9)), 1)
    tail = np.log(rng.uniform(1e-4, 0.3, count))
    head = np.log(-np.expm1(tail))
    logprobs = head[:, None] - depth - np.log(np.exp(-depth).sum(1, keepdims=True))
    each = tail - np.log(CLASSES - STORED)
    # No id outside the head may be likelier than one inside it.
    logprobs = np.maximum(logprobs, each[:, None])
    logprobs += (head - np.log(np.exp(logprobs).sum(1)))[:, None]
    entropy = -(np.exp(logprobs) * logprobs).sum(1) - np.exp(tail) * each
    hits = ids == labels[:, None]
    ranks = np.where(hits.any(1), hits.argmax(1), STORED)
    of_label = np.where(ranks < STORED, np.where(hits, logprobs, 0).sum(1), each)
    return SoftTargets(
        num_positions=np.ones(count, np.int32),
        ids=ids,
        logprobs=logprobs.astype(np.float32),
        tail=tail.astype(np.float32),
        entropy=entropy.astype(np.float32),
        label_ids=labels,
        label_logprobs=of_label.astype(np.float32),
        label_ranks=ranks.astype(np.int32),
    )


if __name__ == "__main__":
    main()

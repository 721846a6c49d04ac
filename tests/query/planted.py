"""Tables whose teacher and hard labels have known faults: a temperature, label noise."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabels.schema import table_schema
from softlabels.store import shards
from softlabels.store.table import Table
from tests.tables import make_contents, make_lineage, make_targets


@dataclass(frozen=True)
class Planted:
    """A table and what was done to it.

    Attributes:
        table: of examples "x00000" and so on, in order.
        truth: float64 [rows, classes], log of the distribution that the labels were drawn from.
        labels: int64 [rows], as stored.
        wrong: bool [rows], those that were replaced by a random other class.
    """

    table: Table
    truth: np.ndarray
    labels: np.ndarray
    wrong: np.ndarray


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row, float64."""
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def make_planted(
    folder: Path | str,
    rows: int = 4000,
    classes: int = 8,
    k: int | None = None,
    heat: float = 1.0,
    noise: float = 0.0,
    sharpness: float = 2.0,
    bias: float = 0.0,
    temperatures: tuple[float, ...] = (),
    draws: int = 0,
    profile: shards.Profile = "precise",
    seed: int = 0,
    name: str = "planted",
) -> Planted:
    """A table of labels drawn from softmax(z), and of a teacher that says softmax(z * heat).

    At temperature `heat` the teacher fits. A share `noise` of the labels is then replaced by
    another class at random. With a `bias` later classes are commoner. Files of a thousand rows.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, classes)) * sharpness + np.linspace(-bias, bias, classes)
    truth = log_softmax(logits)
    labels = np.argmax(truth + rng.gumbel(size=truth.shape), 1)
    wrong = rng.random(rows) < noise
    labels = np.where(wrong, (labels + rng.integers(1, classes, rows)) % classes, labels)
    targets = make_targets(
        log_softmax(logits * heat), k or classes, labels, draws, temperatures, seed
    )
    made = shards.round_to_profile(targets, profile)
    contents = make_contents(
        k or classes, classes, temperatures=temperatures, draws=draws, profile=profile
    )
    teacher = contents.teacher.model_copy(update={"name": name, "revision": str(seed)})
    contents = contents.model_copy(update={"teacher": teacher, "carried": ("number",)})
    schema = table_schema(temperatures, [pa.field("number", pa.int64())])
    columns = {
        "example_id": pa.array([f"x{i:05d}" for i in range(rows)]),
        "view": pa.array(np.zeros(rows, np.int32)),
        **made.columns(),
        "number": pa.array(np.arange(rows)),
    }
    arrays = [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    table = Table.open_or_create(str(folder), schema, contents)
    run_id = f"{seed:064x}"
    units = []
    for number, start in enumerate(range(0, rows, 1000)):
        writer = shards.ShardWriter(schema, profile, row_group_positions=400)
        for row in range(start, min(start + 1000, rows), 400):
            writer.write(batch.slice(row, min(400, start + 1000 - row)))
        unit = f"{run_id[-16:]}-{number:06d}"
        units.append(table.store_shard(f"{run_id}/{unit}", unit, writer.close()))
    lineage = make_lineage(run_id, [unit.key for unit in units], rows)
    return Planted(table.commit(units, lineage), truth, labels, wrong)

"""Real tables of random, valid soft targets: what most tests start from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabels.lineage import Contents, RunLineage, TeacherLineage
from softlabels.schema import table_schema
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.targets import SoftTargets, Temper


def dense_logprobs(rows: int, classes: int, seed: int = 0, sharpness: float = 2.0) -> np.ndarray:
    """Random teacher log-probabilities, float64 [rows, classes]."""
    logits = np.random.default_rng(seed).normal(size=(rows, classes)) * sharpness
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def make_targets(
    dense: np.ndarray,
    k: int,
    labels: np.ndarray | None = None,
    draws: int = 0,
    temperatures: Sequence[float] = (),
    seed: int = 0,
) -> SoftTargets:
    """Exact soft targets of dense log-probabilities [B, V], one position a row."""
    rows, classes = dense.shape
    order = np.argsort(-dense, axis=1, kind="stable")
    ids = order[:, :k].astype(np.int32)
    rest = order[:, k:]

    def log_tail(logprobs: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            mass = np.exp(np.take_along_axis(logprobs, rest, 1)).sum(1)
            return np.asarray(np.log(mass), dtype=np.float32)

    def temper(temperature: float) -> Temper:
        scaled = dense / temperature
        shift = -np.log(np.exp(scaled).sum(1))
        return Temper(shift.astype(np.float32), log_tail(scaled + shift[:, None]))

    rng = np.random.default_rng(seed)
    drawn = None
    if draws:
        drawn = np.full((rows, draws), -1, np.int32)
        for row in range(rows):
            if k < classes:
                p = np.exp(dense[row, rest[row]])
                drawn[row] = rng.choice(rest[row], draws, p=p / p.sum())
    label_ids = label_logprobs = label_ranks = None
    if labels is not None:
        label_ids = labels.astype(np.int32)
        label_logprobs = dense[np.arange(rows), labels].astype(np.float32)
        label_ranks = (order == labels[:, None]).argmax(1).astype(np.int32)
    return SoftTargets(
        num_positions=np.ones(rows, np.int32),
        ids=ids,
        logprobs=np.take_along_axis(dense, ids, 1).astype(np.float32),
        tail=log_tail(dense),
        draws=drawn,
        entropy=(-(np.exp(dense) * dense).sum(1)).astype(np.float32),
        label_ids=label_ids,
        label_logprobs=label_logprobs,
        label_ranks=label_ranks,
        temper={t: temper(t) for t in temperatures},
    )


def make_contents(k: int = 5, classes: int = 10, **changes: object) -> Contents:
    """Contents of a made-up torch teacher over `classes` named classes."""
    values: dict[str, object] = {
        "teacher": TeacherLineage(name="random", kind="torch", code="tests.tables:dense_logprobs"),
        "num_classes": classes,
        "classes": tuple(f"class{i}" for i in range(classes)),
        "k": k,
        "profile": "precise",
    }
    return Contents.model_validate(values | changes)


def make_lineage(run_id: str, units: Sequence[str], num_rows: int) -> RunLineage:
    """A run's lineage with the least that is needed."""
    return RunLineage(
        run_id=run_id,
        units=tuple(units),
        num_rows=num_rows,
        spec={},
        spec_sha256="0" * 64,
        source={},
        packages={},
        device="cpu",
        started_at="2026-01-01T00:00:00+00:00",
        seconds=0.0,
    )


def forget_records(folder: Path | str) -> None:
    """Makes a table's log that of an earlier release, whose commits recorded nothing."""
    for path in (Path(folder) / "_delta_log").glob("*.json"):
        actions = [json.loads(line) for line in path.read_text().splitlines() if line]
        for action in actions:
            action.get("commitInfo", {}).pop("softlabels_record", None)
        path.write_text("".join(json.dumps(action) + "\n" for action in actions))


def make_table(
    folder: Path | str,
    rows: int = 300,
    k: int = 5,
    classes: int = 10,
    seed: int = 0,
    draws: int = 0,
    temperatures: Sequence[float] = (),
    profile: shards.Profile = "precise",
    shard_rows: int = 100,
    row_group_rows: int = 25,
    carried: Mapping[str, pa.Array] | None = None,
    prefix: str = "x",
    name: str = "random",
    order: Sequence[int] | None = None,
) -> Table:
    """A real table: ceil(rows / shard_rows) files of row groups of `row_group_rows`, one commit.

    Row i has example_id f"{prefix}{i:05d}", label i % classes, and dense_logprobs(rows, classes,
    seed)[i] as the teacher's distribution, rounded by `profile`. `carried` adds columns of length
    `rows`. `order` says at which places rows are stored instead: row order[0] first.
    """
    carried = dict(carried or {})
    teacher = TeacherLineage(name=name, kind="torch", code="tests.tables:x", revision=str(seed))
    contents = make_contents(
        k,
        classes,
        teacher=teacher,
        draws=draws,
        temperatures=tuple(temperatures),
        profile=profile,
        carried=tuple(carried),
    )
    schema = table_schema(temperatures, [pa.field(n, c.type) for n, c in carried.items()])
    dense = dense_logprobs(rows, classes, seed)
    labels = np.arange(rows) % classes
    targets = shards.round_to_profile(
        make_targets(dense, k, labels, draws, temperatures, seed), profile
    )
    columns = {
        "example_id": pa.array([f"{prefix}{i:05d}" for i in range(rows)]),
        "view": pa.array(np.zeros(rows, np.int32)),
        **targets.columns(),
        **carried,
    }
    arrays = [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    if order is not None:
        batch = batch.take(pa.array(order))
    table = Table.open_or_create(str(folder), schema, contents)
    run_id = f"{seed:064x}"
    units = []
    for number, start in enumerate(range(0, rows, shard_rows)):
        writer = shards.ShardWriter(schema, profile, row_group_positions=row_group_rows)
        for row in range(start, min(start + shard_rows, rows), row_group_rows):
            writer.write(batch.slice(row, min(row_group_rows, start + shard_rows - row)))
        unit = f"{run_id[-16:]}-{number:06d}"
        units.append(table.store_shard(f"{run_id}/{unit}", unit, writer.close()))
    lineage = make_lineage(run_id, [unit.key for unit in units], rows)
    return table.commit(units, lineage)

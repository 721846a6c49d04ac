"""Made-up outputs of a teacher, as a soft-label table with its plan, and as plain arrays.

The table is written by the product's own store. The arrays hold what it holds, rounded as it
rounds: every contender stores the very same numbers, and compressors gain from the rounding alike.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from pipelines.streaming.cases import EXAMPLE_ID, Case
from softlabels.lineage import Contents, RunLineage, TeacherLineage
from softlabels.query.mix import Recipe, mix
from softlabels.query.recipe import Source
from softlabels.schema import ROW_GROUP_POSITIONS, table_schema
from softlabels.store import shards
from softlabels.store.shards import Profile
from softlabels.store.table import Table, UnitShard
from softlabels.targets import SoftTargets

FILES = 4
COMMON, TOPIC = 96, 160
"""Candidates of a position: frequent tokens, and tokens of the row's own topic."""
DRAWN_POSITIONS = 65_536


def make(folder: Path, case: Case) -> None:
    """Writes `folder`/table, `folder`/plan.parquet and `folder`/source; what is there, stays."""
    if (folder / "done").exists():
        return
    (folder / "source").mkdir(parents=True, exist_ok=True)
    fields: dict[str, tuple[Any, tuple[int, ...]]] = {EXAMPLE_ID: ("S16", ()), **case.fields}
    arrays = {
        name: np.lib.format.open_memmap(
            folder / "source" / f"{name}.npy", "w+", kind, (case.rows, *shape)
        )
        for name, (kind, shape) in fields.items()
    }
    carried = [pa.field("payload", pa.binary())] if case.payload else []
    schema, profile = table_schema((), carried), _profile(case)
    table = Table.open_or_create(str(folder / "table"), schema, _contents(case))
    units: list[UnitShard] = []
    for number in track(range(FILES), f"data of {case.name}", console=Console(stderr=True)):
        writer = shards.ShardWriter(schema, profile)
        start, stop = (case.rows * n // FILES for n in (number, number + 1))
        for first, made in _parts(case, start, stop):
            for name, values in made.items():
                arrays[name][first : first + len(values)] = values
            writer.write(_record(made, schema, case))
        unit = f"{'5' * 16}-{number:06d}"
        units.append(table.store_shard(f"{'5' * 64}/{unit}", unit, writer.close()))
    table.commit(units, _lineage(units, case.rows))
    mix(Recipe(sources={"all": Source(table=str(folder / "table"))})).write(
        str(folder / "plan.parquet")
    )
    for values in arrays.values():
        values.flush()
    (folder / "done").touch()


def _parts(case: Case, start: int, stop: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    positions = max(case.positions, 1)
    step = max(1, min(DRAWN_POSITIONS, ROW_GROUP_POSITIONS) // positions)
    for first in range(start, stop, step):
        count = min(step, stop - first)
        rng = np.random.default_rng((case.rows, first))
        soft = shards.round_to_profile(_targets(rng, case, count), _profile(case))
        made = {
            EXAMPLE_ID: np.array([key.hex() for key in _keys(rng, count)], "S16"),
            "ids": soft.ids,
            "logprobs": soft.logprobs,
            "tail": soft.tail,
            "entropy": soft.entropy,
            "label_ids": soft.label_ids,
            "label_logprobs": soft.label_logprobs,
            "label_ranks": soft.label_ranks,
        }
        if case.positions:
            # A sequence's labels are its own next tokens.
            labels = np.asarray(soft.label_ids).reshape(count, -1)
            made["input_ids"] = np.concatenate([labels[:, -1:], labels], 1)
        if case.payload:
            made["payload"] = rng.integers(0, 256, (count, case.payload), np.uint8)
        shaped = {name: case.fields[name][1] for name in made if name != EXAMPLE_ID}
        yield (
            first,
            {
                name: np.asarray(values).reshape(count, *shaped.get(name, ()))
                for name, values in made.items()
            },
        )


def _keys(rng: np.random.Generator, count: int) -> list[bytes]:
    text = rng.bytes(8 * count)
    return [text[8 * i : 8 * i + 8] for i in range(count)]


def _targets(rng: np.random.Generator, case: Case, rows: int) -> SoftTargets:
    """The top k of softmaxes whose logits fall with a token's rank, as Zipf found, plus noise.

    Some positions are sure and some are not; the label is drawn from the distribution itself.
    """
    positions = max(case.positions, 1)
    count = rows * positions
    common = min(COMMON, case.vocabulary // 4)
    topic = min(TOPIC, case.vocabulary // 4)
    # One stratum a topic token, so that none is drawn twice; low ranks come more often.
    places = np.arange(topic + 1)
    edges = np.geomspace(common, case.vocabulary, topic + 1).astype(np.int64)
    edges = np.maximum.accumulate(edges - places) + places
    ranks = edges[:-1] + (rng.random((rows, topic)) * np.diff(edges)).astype(np.int64)
    ranks = np.concatenate([np.tile(np.arange(common), (rows, 1)), ranks], 1)
    ids = np.random.default_rng(0).permutation(case.vocabulary)[ranks].astype(np.int32)
    sharp = rng.gamma(4.0, 0.6, (count, 1)).astype(np.float32)
    noise = rng.standard_normal((count, ranks.shape[1]), np.float32)
    prior = np.repeat(-np.log1p(ranks).astype(np.float32), positions, axis=0)
    logits = 0.7 * prior + sharp * noise
    logits -= logits.max(1, keepdims=True)
    rest = np.float32(0.02)  # what tokens that are no candidates have together, of the largest
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True) + rest)
    top = np.argpartition(-logprobs, case.k, axis=1)[:, : case.k]
    order = np.argsort(-np.take_along_axis(logprobs, top, 1), axis=1, kind="stable")
    top = np.take_along_axis(top, order, 1)
    head = np.take_along_axis(logprobs, top, 1)
    drawn = (logprobs + rng.gumbel(size=logprobs.shape).astype(np.float32)).argmax(1)
    hit = top == drawn[:, None]
    row = np.repeat(np.arange(rows), positions)
    return SoftTargets(
        num_positions=np.full(rows, positions, np.int32),
        ids=ids[row[:, None], top],
        logprobs=head,
        tail=np.log1p(-np.minimum(np.exp(head.astype(np.float64)).sum(1), 1 - 1e-7)).astype(
            np.float32
        ),
        entropy=-(np.exp(logprobs) * logprobs).sum(1),
        label_ids=ids[row, drawn],
        label_logprobs=logprobs[np.arange(count), drawn],
        label_ranks=np.where(
            hit.any(1), hit.argmax(1), (logprobs > logprobs[np.arange(count), drawn, None]).sum(1)
        ).astype(np.int32),
    )


def _record(made: dict[str, np.ndarray], schema: pa.Schema, case: Case) -> pa.RecordBatch:
    rows = len(made["tail"])
    flat: Callable[[str], np.ndarray] = lambda name: made[name].reshape(-1)  # noqa: E731
    soft = SoftTargets(
        num_positions=np.full(rows, max(case.positions, 1), np.int32),
        ids=made["ids"].reshape(-1, case.k),
        logprobs=made["logprobs"].reshape(-1, case.k),
        tail=flat("tail"),
        entropy=flat("entropy"),
        label_ids=flat("label_ids"),
        label_logprobs=flat("label_logprobs"),
        label_ranks=flat("label_ranks"),
    )
    found = {
        EXAMPLE_ID: pa.array([key.decode() for key in made[EXAMPLE_ID].tolist()]),
        "view": pa.array(np.zeros(rows, np.int32)),
        **soft.columns(sequences=bool(case.positions)),
    }
    if case.positions:
        found["input_ids"] = lists(made["input_ids"])
        found["position_index"] = lists(
            np.tile(np.arange(case.positions, dtype=np.int32), (rows, 1))
        )
    if case.payload:
        found["payload"] = pa.array([row.tobytes() for row in made["payload"]], pa.binary())
    arrays = [found[f.name] if f.name in found else pa.nulls(rows, f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def lists(values: np.ndarray) -> pa.Array:
    """The rows of int32 [B, n] as the table's lists."""
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    kind = pa.list_(pa.field("element", pa.int32(), nullable=False))
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)


def _profile(case: Case) -> Profile:
    return "compact" if case.positions else "precise"


def _contents(case: Case) -> Contents:
    return Contents(
        teacher=TeacherLineage(
            name="made up", kind="recorded", code="pipelines/streaming/make_data.py"
        ),
        num_classes=case.vocabulary,
        k=case.k,
        profile=_profile(case),
        carried=("payload",) if case.payload else (),
        tokenizer_sha256="5" * 64 if case.positions else None,
        alignment="next" if case.positions else None,
    )


def _lineage(units: list[UnitShard], rows: int) -> RunLineage:
    return RunLineage(
        run_id="5" * 64,
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

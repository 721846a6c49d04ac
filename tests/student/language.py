"""Real tables of sequences whose teacher is known: what tests of language models start from.

The teacher is a table of bigrams: what follows a token depends on that token alone, so a student
can learn it exactly, and every figure has a plain reference.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from softlabels.lineage import TeacherLineage
from softlabels.schema import INTS, table_schema
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.student.spec import RunSpec
from softlabels.targets import SoftTargets
from tests.plans import make_plan
from tests.tables import dense_logprobs, make_contents, make_lineage, make_targets

TOKENIZER = "7" * 64
CLASSES = 30
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Drawn:
    """Rows of tokens and their positions, as lists, and the teacher at each position.

    Attributes:
        input_ids: tokens of each row.
        segments: document of each token.
        positions: indexes that have a distribution.
        labels: hard label of each position.
        dense: float64 [N, V], the teacher's log-probabilities.
    """

    input_ids: list[list[int]]
    segments: list[list[int]]
    positions: list[list[int]]
    labels: list[list[int]]
    dense: np.ndarray


def bigrams(classes: int = CLASSES) -> np.ndarray:
    """Log-probabilities of what follows each token, float64 [V, V]."""
    return dense_logprobs(classes, classes, 0, sharpness=1.5)


def draw(
    rows: int = 40,
    length: int = 12,
    classes: int = CLASSES,
    documents: int = 1,
    vary: bool = True,
    alignment: str = "next",
    seed: int = 0,
) -> Drawn:
    """Text of the bigram teacher: `rows` of up to `length` tokens in up to `documents` documents.

    Of alignment "same" every third token is masked by the last id, and the teacher there is what
    follows the token before it.
    """
    rng = np.random.default_rng(seed)
    teacher = bigrams(classes)
    given: list[np.ndarray] = []
    found = Drawn([], [], [], [], teacher)
    for row in range(rows):
        size = int(rng.integers(2, length + 1)) if vary and row else length
        cuts = sorted(rng.choice(np.arange(1, size), min(documents, size) - 1, replace=False))
        segments = np.searchsorted(cuts, np.arange(size), side="right").tolist()
        tokens = [int(rng.integers(classes - 1))]
        for _ in range(size - 1):
            p = np.exp(teacher[tokens[-1], : classes - 1])
            tokens.append(int(rng.choice(classes - 1, p=p / p.sum())))
        shown = list(tokens)
        if alignment == "next":
            places = [i for i in range(size - 1) if segments[i] == segments[i + 1]]
            labels = [tokens[i + 1] for i in places]
            given += [teacher[tokens[i]] for i in places]
        else:
            places = list(range(1, size, 3))
            labels = [tokens[i] for i in places]
            given += [teacher[tokens[i - 1]] for i in places]
            for i in places:
                shown[i] = classes - 1
        for name, value in (
            ("input_ids", shown),
            ("segments", segments),
            ("positions", places),
            ("labels", labels),
        ):
            getattr(found, name).append(value)
    return Drawn(found.input_ids, found.segments, found.positions, found.labels, np.array(given))


def soft_targets(drawn: Drawn, k: int, **options: Any) -> SoftTargets:
    """The soft targets of all positions; options as `make_targets`."""
    labels = np.array([label for row in drawn.labels for label in row], np.int64)
    flat = make_targets(drawn.dense, k, labels, **options)
    return flat.map_positions(slice(None), np.array([len(p) for p in drawn.positions], np.int32))


def make_language_table(
    folder: Path | str,
    drawn: Drawn,
    k: int = 5,
    *,
    isolated: bool = False,
    alignment: str = "next",
    draws: int = 0,
    temperatures: tuple[float, ...] = (),
    known_tail: bool = True,
    group_rows: int = 10,
    **contents: Any,
) -> Table:
    """A real table of drawn sequences, one file; segment_ids are null unless `isolated`.

    `contents` change what the table says of itself.
    """
    rows, classes = len(drawn.input_ids), drawn.dense.shape[1]
    targets = soft_targets(drawn, k, draws=draws, temperatures=temperatures)
    settings: dict[str, Any] = {
        "teacher": TeacherLineage(name="bigrams", kind="hf", code="tests.student.language:bigrams"),
        "tokenizer_sha256": TOKENIZER,
        "alignment": alignment,
        "draws": draws,
        "temperatures": temperatures,
    }
    schema = table_schema(temperatures)
    columns: dict[str, pa.Array] = {
        "example_id": pa.array([f"s{i:05d}" for i in range(rows)]),
        "view": pa.array(np.zeros(rows, np.int32)),
        **shards.round_to_profile(targets, "precise").columns(),
        "input_ids": pa.array(drawn.input_ids, INTS),
        "position_index": pa.array(drawn.positions, INTS),
    }
    if isolated:
        columns["segment_ids"] = pa.array(drawn.segments, INTS)
    hidden = ["label", "top1_id"]
    hidden += [] if known_tail else ["tail_logprob"]
    for name in hidden:
        columns.pop(name, None)
    arrays = [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    made = make_contents(k, classes, **(settings | contents)).model_copy(update={"classes": None})
    table = Table.open_or_create(str(folder), schema, made)
    writer = shards.ShardWriter(schema, "precise", row_group_positions=1)
    for start in range(0, rows, group_rows):
        writer.write(batch.slice(start, group_rows))
    unit = f"{0:016x}-{0:06d}"
    shard = table.store_shard(f"run/{unit}", unit, writer.close())
    return table.commit([shard], make_lineage("run", [shard.key], rows))


def make_language_plan(folder: Path, name: str = "train", **options: Any) -> Path:
    """The path of a plan over a new table; options of `draw` and `make_language_table`."""
    drawing = {"rows", "length", "classes", "documents", "vary", "seed"}
    drawn = draw(
        **{key: options.pop(key) for key in drawing & set(options)},
        alignment=options.get("alignment", "next"),
    )
    table = make_language_table(folder / name, drawn, **options)
    path = folder / f"{name}.plan.parquet"
    make_plan({name: table}).write(path)
    return path


def language_spec(folder: Path, plan: Path, **changes: Any) -> RunSpec:
    """A run of 20 steps of a tiny Llama into `folder`/run."""
    values: dict[str, Any] = {
        "plan": str(plan),
        "out": str(folder / "run"),
        "student": {"causal_lm": {"config": LLAMA}},
        "optimizer": {"lr": 0.01, "weight_decay": 0.0},
        "steps": 20,
        "batch_size": 10,
        "threads": 1,
    }
    return RunSpec.model_validate(values | changes)

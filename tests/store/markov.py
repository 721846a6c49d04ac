"""Tables of sequences whose teacher knows the truth: a Markov chain and its own probabilities."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from softlabels.lineage import Contents
from softlabels.schema import INTS, table_schema
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.targets import SoftTargets
from tests.tables import make_contents, make_lineage, make_targets

MASK = 0


def chain(vocabulary: int, sharpness: float = 2.0, seed: int = 0) -> np.ndarray:
    """Transition probabilities, float64 [V, V]; hardly ever to MASK."""
    logits = np.random.default_rng(seed).normal(size=(vocabulary, vocabulary)) * sharpness
    logits[:, MASK] = -30
    weights = np.exp(logits)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def walk(probs: np.ndarray, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Random sequences of the chain, int32 [rows, length]."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((rows, length), np.int32)
    tokens[:, 0] = rng.integers(1, len(probs), rows)
    cumulative = probs.cumsum(1)
    for at in range(1, length):
        points = rng.random(rows)[:, None]
        found = (points >= cumulative[tokens[:, at - 1]]).sum(1)
        tokens[:, at] = np.minimum(found, len(probs) - 1)
    return tokens


def lists(values: Sequence[Sequence[int]] | np.ndarray) -> pa.Array:
    return pa.array([list(map(int, row)) for row in values], INTS)


def causal(
    tokens: np.ndarray, probs: np.ndarray, k: int, draws: int, shift: int = 0, documents: int = 0
) -> dict[str, pa.Array]:
    """Columns of rows whose every token but the last of a document is labelled.

    `shift` stores at each place the distribution of the place that many later. `documents` cuts
    each row into so many, told apart by segment_ids.
    """
    rows, length = tokens.shape
    segments = np.arange(length) * max(1, documents) // length
    places = np.flatnonzero(np.append(segments[1:] == segments[:-1], False))
    read = np.clip(places + shift, 0, length - 1)
    dense = np.log(probs[tokens[:, read].ravel()])
    labels = tokens[:, places + 1].ravel()
    targets = make_targets(dense, k, labels, draws)
    return columns(targets, tokens, np.tile(places, (rows, 1))) | (
        {"segment_ids": lists(np.tile(segments, (rows, 1)))} if documents else {}
    )


def masked(
    tokens: np.ndarray, probs: np.ndarray, k: int, rate: float = 0.15, shift: int = 0, slip: int = 0
) -> dict[str, pa.Array]:
    """Columns of rows whose masked tokens are labelled, given both neighbours.

    `shift` stores the distribution of the place that many later, `slip` of the position.
    """
    rows, length = tokens.shape
    each = max(2, int(length * rate))
    places = np.stack([1 + np.arange(each) * (length - 3) // each for _ in range(rows)])
    index = np.arange(rows)[:, None]
    read = np.clip(places + shift, 1, length - 2)
    around = probs[tokens[index, read - 1]] * probs[:, tokens[index, read + 1]].transpose(1, 2, 0)
    dense = np.log(around / around.sum(2, keepdims=True)).reshape(-1, len(probs))
    labels = tokens[index, places].ravel()
    targets = make_targets(np.roll(dense, -slip, 0), k, labels)
    hidden = tokens.copy()
    hidden[index, places] = MASK
    return columns(targets, hidden, places)


def columns(targets: SoftTargets, tokens: np.ndarray, places: np.ndarray) -> dict[str, pa.Array]:
    """Columns of targets with as many positions a row as `places` [rows, P]."""
    rows, per_row = places.shape
    flat = SoftTargets(**(vars(targets) | {"num_positions": np.full(rows, per_row, np.int32)}))
    return {
        "example_id": pa.array([f"s{i:04d}" for i in range(rows)]),
        "view": pa.array(np.zeros(rows, np.int32)),
        **flat.columns(sequences=True),
        "input_ids": lists(tokens),
        "position_index": lists(places),
    }


def rounded(
    made: Mapping[str, pa.Array], k: int, draws: int, profile: shards.Profile
) -> dict[str, pa.Array]:
    targets = SoftTargets.from_columns(made, k, draws)
    return dict(made) | shards.round_to_profile(targets, profile).columns(sequences=True)


def write(
    folder: Path | str,
    made: Mapping[str, pa.Array],
    vocabulary: int,
    k: int,
    draws: int = 0,
    alignment: Literal["next", "same"] = "next",
    profile: shards.Profile = "precise",
    files: int = 2,
    row_group_positions: int = 5_000,
    **changes: object,
) -> Table:
    """A table of these columns, rounded by `profile`, in so many files."""
    made = rounded(made, k, draws, profile)
    language: dict[str, object] = {"classes": None, "tokenizer_sha256": "ab" * 32}
    language |= {"alignment": alignment, "draws": draws, "profile": profile}
    plain = make_contents(k, vocabulary).model_dump()
    contents = Contents.model_validate(plain | language | changes)
    schema = table_schema()
    rows = len(made["example_id"])
    arrays = [made[f.name] if f.name in made else pa.nulls(rows, f.type) for f in schema]
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    table = Table.open_or_create(str(folder), schema, contents)
    units = []
    for number in range(files):
        start, stop = (rows * n // files for n in (number, number + 1))
        writer = shards.ShardWriter(schema, profile, row_group_positions=row_group_positions)
        step = max(1, 1_000 * rows // max(1, int(np.sum(made["num_positions"].to_numpy()))))
        for row in range(start, stop, step):
            writer.write(batch.slice(row, min(step, stop - row)))
        unit = f"{'ef' * 8}-{number:06d}"
        units.append(table.store_shard(f"run/{unit}", unit, writer.close()))
    return table.commit(units, make_lineage("run", [unit.key for unit in units], rows))


def make_language(
    folder: Path | str,
    rows: int = 40,
    length: int = 30,
    vocabulary: int = 40,
    k: int = 8,
    draws: int = 4,
    profile: shards.Profile = "precise",
    documents: int = 0,
    shift: int = 0,
) -> Table:
    """A causal table, see `causal` and `write`."""
    probs = chain(vocabulary)
    made = causal(walk(probs, rows, length), probs, k, draws, shift, documents)
    return write(folder, made, vocabulary, k, draws, profile=profile)

"""Tables of sequences of uneven length, whose positions are few and partly without a label."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.targets import SoftTargets
from tests.store import markov
from tests.tables import make_targets


def make_uneven(
    folder: Path | str,
    rows: int = 40,
    length: int = 24,
    vocabulary: int = 40,
    k: int = 4,
    draws: int = 3,
    known_entropy: bool = True,
    profile: shards.Profile = "precise",
    files: int = 2,
    row_group_positions: int = 60,
    prefix: str = "s",
    seed: int = 0,
) -> Table:
    """A causal table: row i has up to `length` tokens and 1 to `length` - 1 of their positions.

    A tenth of the positions has no label. `segment_ids` is null.
    """
    rng = np.random.default_rng(seed)
    probs = markov.chain(vocabulary, seed=seed)
    tokens = markov.walk(probs, rows, length, seed)
    lengths = rng.integers(2, length + 1, rows)
    chosen = rng.random((rows, length - 1)) < 0.7
    chosen &= np.arange(length - 1) < lengths[:, None] - 1
    chosen[:, 0] |= ~chosen.any(1)
    row, place = np.nonzero(chosen)
    dense = np.log(probs[tokens[row, place]])
    targets = make_targets(dense, k, tokens[row, place + 1], draws, seed=seed)
    targets = replace(
        targets,
        num_positions=chosen.sum(1).astype(np.int32),
        entropy=targets.entropy if known_entropy else None,
    )
    targets = unlabelled(targets, rng.random(len(row)) < 0.1)
    made = {
        "example_id": pa.array([f"{prefix}{i:05d}" for i in range(rows)]),
        "view": pa.array(np.zeros(rows, np.int32)),
        **targets.columns(sequences=True),
        "input_ids": markov.lists([t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)]),
        "position_index": markov.lists([np.flatnonzero(row).tolist() for row in chosen]),
    }
    return markov.write(
        folder,
        made,
        vocabulary,
        k,
        draws,
        profile=profile,
        files=files,
        row_group_positions=row_group_positions,
    )


def make_long(
    folder: Path | str, rows: int = 64, positions: int = 512, k: int = 16, draws: int = 16
) -> Table:
    """A table of the size that language models have: random ids of 49,152, no true teacher.

    A row group holds ten rows of 512 positions, as a capture writes them.
    """
    rng = np.random.default_rng(0)
    n = rows * positions
    ids = (np.arange(k) * (49_152 // k) + rng.integers(0, 49_152 // k, (n, k))).astype(np.int32)
    falling = -np.sort(rng.exponential(1.0, (n, k)), axis=1) - np.log(k)
    targets = SoftTargets(
        num_positions=np.full(rows, positions, np.int32),
        ids=ids,
        logprobs=falling.astype(np.float32),
        tail=(-1 - rng.random(n)).astype(np.float32),
        draws=rng.integers(0, 49_152, (n, draws)).astype(np.int32),
        entropy=(4 * rng.random(n)).astype(np.float32),
        label_ids=ids[:, 0].copy(),
        label_logprobs=falling[:, 0].astype(np.float32),
        label_ranks=rng.integers(0, 20, n).astype(np.int32),
    )
    tokens = rng.integers(0, 49_152, (rows, positions + 1))
    places = np.tile(np.arange(positions), (rows, 1))
    made = markov.columns(targets, tokens, places)
    return markov.write(folder, made, 49_152, k, draws, profile="compact", files=1)


def unlabelled(targets: SoftTargets, where: np.ndarray) -> SoftTargets:
    """`targets` without a label at some positions, bool [N]."""
    assert targets.label_ids is not None
    assert targets.label_logprobs is not None
    assert targets.label_ranks is not None
    return replace(
        targets,
        label_ids=np.where(where, -1, targets.label_ids).astype(np.int32),
        label_logprobs=np.where(where, np.nan, targets.label_logprobs).astype(np.float32),
        label_ranks=np.where(where, -1, targets.label_ranks).astype(np.int32),
    )

"""Rows with some of their positions left out, targets and columns alike."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import IntegrityError
from softlabels.rules import per_row
from softlabels.targets import SoftTargets, to_numpy

PER_POSITION = (
    "topk_ids",
    "topk_logprobs",
    "tail_logprob",
    "sampled_ids",
    "position_entropy",
    "label_ids",
    "label_logprobs",
    "label_ranks",
    "position_index",
)
"""Columns that hold as many values of each position as of any other. Carried lists are the
source's own: whether they go by position is not known, and they stay whole."""


def keep_positions(
    targets: SoftTargets, columns: Mapping[str, pa.Array], keep: npt.NDArray[np.bool_]
) -> tuple[SoftTargets, dict[str, pa.Array]]:
    """The same rows with the positions `keep` only, a row possibly with none.

    Args:
        targets: of B rows, N positions.
        columns: arrays of B rows by name; those in PER_POSITION and `num_positions` change with
            the positions, input_ids and all others stay as they are.
        keep: bool [N].

    Raises:
        IntegrityError: a column's lists are not as long as its rows' positions say.
    """
    positions = np.flatnonzero(keep)
    before = targets.num_positions
    counts = per_row(keep, before)
    found = dict(columns)
    for name, values in columns.items():
        if name == "num_positions":
            found[name] = pa.array(counts)
        elif name in PER_POSITION and values.null_count < len(values):
            found[name] = _picked(name, values, positions, before, counts)
    return targets.map_positions(positions, counts), found


def _picked(
    name: str,
    values: pa.ListArray,
    positions: npt.NDArray[np.int64],
    before: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int32],
) -> pa.ListArray:
    flat = values.flatten()
    kind = np.int32 if pa.types.is_integer(flat.type) else np.float32
    total = int(before.sum())
    width = len(flat) // max(total, 1)
    lengths = np.diff(to_numpy(values.offsets, np.int32))
    if values.null_count or not np.array_equal(lengths, before * width):
        raise IntegrityError(
            f"column {name!r} holds {len(flat)} values and {values.null_count} null rows for "
            f"{total} positions: expected as many of each position"
        )
    kept = np.take(to_numpy(flat, kind).reshape(total, width), positions, axis=0)
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts * width, out=offsets[1:])
    # Over the same memory; pa.array would copy it.
    leaf = pa.Array.from_buffers(flat.type, kept.size, [None, pa.py_buffer(kept)])
    return pa.Array.from_buffers(
        values.type, len(counts), [None, pa.py_buffer(offsets)], children=[leaf]
    )

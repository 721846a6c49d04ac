"""A seed for each row of a batch: a pure function of what the row is, never of where it stands."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Seeds = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

SEED_BITS = 53
"""Seeds are below 2^53: whole numbers that JSON, JavaScript and float64 hold exactly, too."""

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def seeds_of(seed: int, example_ids: pa.Array, views: npt.NDArray[np.int32], epoch: int) -> Seeds:
    """A seed for each row, int64 [B], 0 to 2^53 - 1.

    The same for the same (seed, example, view, epoch), whatever ranks, batch size and resumes.

    Args:
        seed: of the run.
        example_ids: string [B], no nulls.
        views: int32 [B].
        epoch: from 0.
    """
    found = _mixed(_texts(example_ids) ^ _mixed(views.astype(np.uint64)))
    found = _mixed(found ^ _word(epoch)) ^ _word(seed)
    return (_mixed(found) >> np.uint64(64 - SEED_BITS)).astype(np.int64)


def _texts(texts: pa.Array) -> Words:
    """A 64-bit hash of each text, uint64 [B], 8 bytes of all rows at a time."""
    if not len(texts):
        return np.zeros(0, np.uint64)
    # The offsets' buffer; `to_numpy` is for arrays whose values are numbers.
    offsets = np.frombuffer(texts.buffers()[1], np.int32, len(texts) + 1, texts.offset * 4)
    offsets = offsets.astype(np.int64)
    lengths = np.diff(offsets).astype(np.int64)
    steps = -(-lengths // 8)
    buffer = texts.buffers()[2]
    data = np.frombuffer(buffer or b"", np.uint8, count=int(offsets[-1]) if buffer else 0)
    found = _mixed(lengths.astype(np.uint64))
    for step in range(int(steps.max())):
        rows = np.flatnonzero(steps > step)
        at = offsets[rows, None] + 8 * step + np.arange(8)
        inside = at < offsets[rows + 1, None]
        part = np.where(inside, data[np.where(inside, at, 0)], 0).astype(np.uint8)
        found[rows] = _mixed(found[rows] ^ part.view("<u8")[:, 0])
    return found


def _word(value: int) -> Words:
    return _mixed(np.array([value % (1 << 64)], np.uint64))


def _mixed(words: Words) -> Words:
    """Words through SplitMix64's finaliser: each bit of a result hangs on all bits of its word.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014.
    """
    words = words + np.uint64(_STEP)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_SECOND)
    return words ^ (words >> np.uint64(31))

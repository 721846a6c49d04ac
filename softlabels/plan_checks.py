"""What the entries of a plan may say: checked before anything is read by them.

Whoever can write a plan can write a right fingerprint, so that this guards against what a
fingerprint cannot: rows that are not there, memory that nobody has, weights that train nothing.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import IntegrityError
from softlabels.plan_entries import BLOCK_ROWS, Counts, leaves, one_array, to_ints
from softlabels.targets import to_numpy

MOST_READINGS = 100_000_000
"""Readings of entries an epoch, repeats counted: they are put in order in memory, 8 bytes each."""

MOST_LEVELS = 50
"""Levels of a plan's recipe: recipes have about seven, and what is nested deeper has no use."""

SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf")
"""Where tables are besides folders. Any other place must be said by whoever reads the plan."""

Mask = npt.NDArray[np.bool_]


def check_entries(entries: pa.Table, listed: Mapping[tuple[str, str], int]) -> None:
    """Raises IntegrityError unless each entry can be read as ENTRIES says, members left aside.

    Args:
        entries: of ENTRIES or ENSEMBLE_ENTRIES, from a stranger's file; tables and files are known.
        listed: rows of each file that the plan lists, by table and path.
    """
    numbers = {
        name: to_ints(entries[name])
        for name in ("stage", "row_group", "offset", "num_rows", "repeats")
    }
    pairs = zip(entries["table"].to_pylist(), entries["file"].to_pylist(), strict=True)
    limits = np.array([listed[pair] for pair in pairs], np.int64)
    _refuse(numbers["stage"] < 0, "is of stage {}: expected 0 or more", numbers["stage"])
    _refuse(numbers["row_group"] < 0, "reads row group {}", numbers["row_group"])
    counts, repeats = numbers["num_rows"], numbers["repeats"]
    outside = (counts < 0) | (counts > limits)
    _refuse(outside, "takes {} rows, its file has {}", counts, limits)
    _refuse(repeats < 1, "comes {} times an epoch: expected 1 or more", repeats)
    if problem := too_many_readings(entries):
        raise IntegrityError(problem)
    reads = counts * repeats
    before = np.cumsum(reads) - reads
    offsets = numbers["offset"]
    _refuse(offsets != before, "has offset {}, before it are {} rows", offsets, before)
    _check_weights(entries)
    _check_rows(entries, counts, limits)


def too_many_readings(entries: pa.Table) -> str | None:
    """What is wrong where an epoch reads entries more often than can be put in order; else None."""
    readings = int(to_ints(entries["repeats"]).sum())
    if readings <= MOST_READINGS:
        return None
    return f"an epoch reads entries {readings} times, at most {MOST_READINGS} can be put in order"


def check_place(name: str, uri: str) -> None:
    """Raises IntegrityError unless a table's place is a folder or in an object store.

    Opening a URL of another kind, or a chain of them, may be a request to anybody by itself.
    """
    scheme, mark, _ = uri.partition("://")
    if "::" in uri or not (scheme in SCHEMES if mark else uri.startswith("/")):
        raise IntegrityError(
            f"the plan says that table {name!r} is at {uri!r}: expected the path of a folder from "
            f"/ on, or one of {', '.join(SCHEMES)}; where you trust it, say --root {name}=URI"
        )


def is_folder_name(text: str) -> bool:
    """Whether `text` can only mean a folder beside the plan."""
    return bool(text) and not text.startswith((".", "~")) and not set(text) & set("/\\:\0")


def check_recipe(recipe: Any) -> None:
    """Raises IntegrityError unless this is a mapping, of no more levels than can be walked."""
    if not isinstance(recipe, Mapping):
        raise IntegrityError(f"its recipe is {recipe!r:.80}: expected a mapping")
    level: list[Any] = [recipe]
    for _ in range(MOST_LEVELS):
        inner = [value.values() if isinstance(value, Mapping) else value for value in level]
        level = [one for values in inner for one in values if isinstance(one, Mapping | list)]
        if not level:
            return
    raise IntegrityError(f"its recipe is nested in more than {MOST_LEVELS} levels")


def _check_weights(entries: pa.Table) -> None:
    weights = to_numpy(one_array(entries["loss_weight"]), np.float32)
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    _refuse(wrong, "has the loss weight {}: expected a finite number not below 0", weights)
    if len(weights) and not weights.any():
        raise IntegrityError("every entry of the plan has the loss weight 0: nothing is learnt")


def _check_rows(entries: pa.Table, counts: Counts, limits: Counts) -> None:
    column = one_array(entries["rows"])
    lengths = to_ints(pc.fill_null(pc.list_value_length(column), -1))
    differs = (lengths >= 0) & (lengths != counts)
    _refuse(differs, "says {} rows, it lists {}", counts, lengths)
    ends = np.cumsum(np.maximum(lengths, 0))
    start = 0
    while start < len(lengths):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK_ROWS, side="right")))
        some = slice(start, stop)
        _check_listed(column[some], np.maximum(lengths[some], 0), limits[some], start)
        start = stop


def _check_listed(column: pa.ListArray, lengths: Counts, limits: Counts, first: int) -> None:
    rows = leaves(column, np.int32)
    entry_of = np.repeat(np.arange(len(lengths)), lengths)
    outside = (rows < 0) | (rows >= limits[entry_of])
    _refuse(outside, "takes row {}, its file has {}", rows, limits[entry_of], entry_of + first)
    falls = (rows[1:] <= rows[:-1]) & (entry_of[1:] == entry_of[:-1])
    what = "lists row {} after row {}: expected rising"
    _refuse(falls, what, rows[1:], rows[:-1], entry_of[1:] + first)


def _refuse(
    bad: Mask,
    what: str,
    value: npt.NDArray[Any],
    other: npt.NDArray[Any] | None = None,
    entry_of: npt.NDArray[Any] | None = None,
) -> None:
    """Raises where one is bad, with the values there; `entry_of`: the entry of each, or itself."""
    if bad.any():
        place = int(np.argmax(bad))
        entry = place if entry_of is None else int(entry_of[place])
        shown = what.format(*(v[place].item() for v in (value, other) if v is not None))
        raise IntegrityError(f"entry {entry} of the plan {shown}")

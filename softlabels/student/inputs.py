"""What a student is called with, made of a batch's columns: decoded, replayed, transformed.

decode      columns to tensors; of all rows, in training and in evaluation
augment     replays what the teacher saw of a row that is an augmented view (view > 0), by the
            seed that the table stores; in training and in evaluation
transform   the student's own augmentation, anew every epoch; in training alone
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from softlabels.errors import DataError, MismatchError, SoftLabelsError
from softlabels.student.batch import Decode, each_tensor
from softlabels.student.seeds import Seeds, seeds_of
from softlabels.student.stream import Batch
from softlabels.targets import to_numpy

Transform = Callable[[Any, Seeds], Any]
"""Inputs of B rows, as `decode` gives them, and a seed of each, int64 [B], to inputs of B rows.

What becomes of a row may hang on its own input and seed alone."""

VIEW, PARAMS = "view", "view_params"


def input_columns(
    columns: Sequence[str], augment: bool = False, transform: bool = False
) -> tuple[str, ...]:
    """What a stream must be asked for, so that inputs can be made of it."""
    more = [VIEW] * (augment or transform) + [PARAMS] * augment
    return tuple(dict.fromkeys([*columns, *more]))


def replaying(decode: Decode, augment: Transform, columns: Sequence[str]) -> Decode:
    """A decode whose augmented rows are as the teacher saw them.

    Args:
        decode: gives the plain inputs.
        augment: the function that the teacher's inputs went through.
        columns: those that `decode` is handed.
    """

    def replay(found: Mapping[str, pa.Array]) -> Any:
        inputs = decode({name: found[name] for name in columns})
        rows = np.flatnonzero(to_numpy(found[VIEW], np.int32))
        if not len(rows):
            return inputs
        seeds = _stored_seeds(found[PARAMS], rows)
        if len(rows) == len(found[VIEW]):
            return augment(inputs, seeds)
        index = torch.from_numpy(rows)
        some = augment(each_tensor(inputs, lambda values: values[index]), seeds)
        return _put(inputs, index, some)

    return replay


@dataclass(frozen=True)
class Maker:
    """Makes the inputs of a batch that a student learns from.

    Attributes:
        decode: of its columns; what replays views is part of it (`replaying`).
        transform: the student's own augmentation; None: none.
        seed: of the run.
        pin: whether inputs lie in pinned memory, from which copies to a GPU run beside its work.
    """

    decode: Decode
    transform: Transform | None = None
    seed: int = 0
    pin: bool = False

    def __call__(self, batch: Batch) -> Any:
        """The inputs of a batch; None where it has no rows.

        Raises:
            DataError: the user's code failed; names the rows.
        """
        if not len(batch):
            return None
        with_views = self.transform is not None
        try:
            inputs = self.decode(batch.columns)
            if self.transform is not None:
                views = to_numpy(batch.columns[VIEW], np.int32)
                seeds = seeds_of(self.seed, batch.example_ids, views, batch.epoch)
                inputs = self.transform(inputs, seeds)
            _require_rows(inputs, len(batch))
            return each_tensor(inputs, Tensor.pin_memory) if self.pin else inputs
        except SoftLabelsError:
            raise
        except Exception as error:
            names = batch.example_ids
            what = "decode or its transform" if with_views else "decode"
            raise DataError(
                f"inputs: the student's {what} failed on {len(batch)} rows, "
                f"{names[0].as_py()!r} to {names[-1].as_py()!r}: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            ) from error


def _require_rows(inputs: Any, rows: int) -> None:
    def look(values: Tensor) -> Tensor:
        if not values.ndim or len(values) != rows:
            raise MismatchError(
                f"inputs: a tensor of shape {tuple(values.shape)!r} was made of {rows} rows: "
                "expected one entry a row in each tensor"
            )
        return values

    each_tensor(inputs, look)


def _stored_seeds(params: pa.Array, rows: "np.ndarray[Any, Any]") -> Seeds:
    """The seeds that replay these rows, int64."""
    texts = params.take(pa.array(rows))
    try:
        seeds = pc.cast(texts, pa.int64())
    except pa.ArrowInvalid:
        seeds = pa.nulls(len(texts), pa.int64())
    if seeds.null_count:
        raise DataError(
            f"view_params is {texts[0].as_py()!r} in a row that is an augmented view: expected "
            "the seed that replays it, a whole number"
        )
    return np.asarray(to_numpy(seeds, np.int64), np.int64)


def _put(inputs: Any, index: Tensor, some: Any) -> Any:
    """`inputs` with the rows `index` replaced; what decode gave is left alone."""

    def put(values: Tensor, new: Tensor) -> Tensor:
        if new.shape[1:] != values.shape[1:] or new.dtype != values.dtype:
            raise MismatchError(
                f"augment gives {new.dtype} of shape {tuple(new.shape[1:])!r} a row, the batch "
                f"holds plain rows, too, {values.dtype} of shape {tuple(values.shape[1:])!r}: "
                "take one kind by `where: view > 0` in the recipe"
            )
        return values.index_copy(0, index, new)

    if isinstance(inputs, tuple):
        return tuple(put(*pair) for pair in zip(inputs, some, strict=True))
    if isinstance(inputs, Mapping):
        return {name: put(values, some[name]) for name, values in inputs.items()}
    return put(inputs, some)

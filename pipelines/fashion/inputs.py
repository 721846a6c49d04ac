"""What teacher and student both see: the ten classes and the decoded images.

The two models share this module and nothing else, so a stored soft label and the student's input
always describe the same pixels.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

CLASSES: tuple[str, ...] = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""Class names; the position is the value of the `label` column."""

SIDE = 28
PIXELS = SIDE * SIDE

MEAN = 0.2860
STD = 0.3530
"""Mean and standard deviation of pixel / 255 over the 60,000 training images, to four digits."""


def decode(columns: Mapping[str, pa.Array]) -> torch.Tensor:
    """Returns the images of a batch as normalised floats.

    Args:
        columns: The batch by column name. `image` is a binary or large_binary array of B values,
            each of 784 bytes: uint8 pixels, row-major, 28 x 28. Slices are fine; other columns are
            ignored.

    Returns:
        float32 [B, 1, 28, 28]; B: rows. Values are (pixel / 255 - MEAN) / STD, so they lie in
        [-0.811, 2.023].

    Raises:
        ValueError: `image` is missing, has another Arrow type, holds a null, or holds an image
            that is not 784 bytes long.
    """
    if "image" not in columns:
        raise ValueError(f"expected a column 'image', found {sorted(columns)!r}")
    pixels = _pixels(columns["image"])
    scaled = pixels.astype(np.float32)
    scaled *= np.float32(1.0 / (255.0 * STD))
    scaled -= np.float32(MEAN / STD)
    return torch.from_numpy(scaled).reshape(-1, 1, SIDE, SIDE)


def _pixels(images: pa.Array) -> npt.NDArray[np.uint8]:
    """Returns uint8 [B, 784], a view of the Arrow value buffer; raises ValueError as `decode`."""
    if images.type == pa.binary():
        offset_type: type[np.int32] | type[np.int64] = np.int32
    elif images.type == pa.large_binary():
        offset_type = np.int64
    else:
        raise ValueError(f"column 'image': expected binary values, found {str(images.type)!r}")
    if images.null_count:
        raise ValueError(f"column 'image': expected no nulls, found {images.null_count!r}")
    rows = len(images)
    if rows == 0:  # Arrow may leave both buffers of an empty array out
        return np.empty((0, PIXELS), np.uint8)
    _, offset_buffer, value_buffer = images.buffers()
    offsets = np.frombuffer(offset_buffer, offset_type)[images.offset : images.offset + rows + 1]
    lengths = np.diff(offsets)
    wrong = np.flatnonzero(lengths != PIXELS)
    if wrong.size:
        row = int(wrong[0])
        raise ValueError(
            f"column 'image': expected {PIXELS!r} bytes a row (28 x 28 uint8), "
            f"found {int(lengths[row])!r} in row {row!r} of the batch"
        )
    # Rows of equal length without nulls lie end to end, so one reshape cuts them apart.
    start, stop = int(offsets[0]), int(offsets[-1])
    return np.frombuffer(value_buffer, np.uint8)[start:stop].reshape(rows, PIXELS)

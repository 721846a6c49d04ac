"""Writes the committed part of Fashion-MNIST as Parquet.

    python -m pipelines.fashion.make_data

Reads the four idx.gz files of the Debian package `dataset-fashion-mnist` and writes
`data/fashion/test.parquet` (the whole test split, 10,000 rows) and `data/fashion/train.parquet`
(15,000 of the 60,000 training rows). The teacher learns from the other 45,000, so its soft labels
on the committed rows are those of unseen images. The same command again writes the same bytes.
"""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from pipelines.fashion.inputs import CLASSES, PIXELS

Split = Literal["train", "test"]
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]

SOURCE = Path("/usr/share/datasets/fashion-mnist")
FOLDER = Path("data/fashion")
TRAIN_ROWS = 15_000
VALIDATION_ROWS = 3_000
"""Last of the committed training rows: they choose settings, no reported student sees them."""
SEED = 0
ROW_GROUP_ROWS = 2_500
ZSTD_LEVEL = 19  # written once, read often: 4 % smaller than level 3 and read as fast

_FILES: dict[Split, str] = {"train": "train", "test": "t10k"}
_IMAGE_MAGIC = 0x0803
_LABEL_MAGIC = 0x0801


def main(
    source: Annotated[Path, typer.Option(help="Folder of the four idx.gz files.")] = SOURCE,
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = FOLDER,
) -> None:
    """Writes train.parquet and test.parquet and prints their sizes."""
    train_images, train_labels = read_split(source, "train")
    test_images, test_labels = read_split(source, "test")
    chosen = shuffled_indices(len(train_images))[:TRAIN_ROWS]
    refuse_shared_images(train_images[chosen], test_images)
    out.mkdir(parents=True, exist_ok=True)
    tables = {
        "test": as_table(
            "test", np.arange(len(test_images)), test_images, test_labels, ["test"] * 10_000
        ),
        "train": as_table(
            "train",
            chosen,
            train_images[chosen],
            train_labels[chosen],
            ["train"] * (TRAIN_ROWS - VALIDATION_ROWS) + ["validation"] * VALIDATION_ROWS,
        ),
    }
    for split, table in tables.items():
        path = out / f"{split}.parquet"
        write(table, path)
        print(f"{path}: {table.num_rows} rows, {path.stat().st_size} bytes")


def read_split(source: Path, split: Split) -> tuple[Images, Labels]:
    """Returns images uint8 [N, 784] and labels int32 [N] of one split, in the files' order.

    Args:
        source: Folder of the idx.gz files.
        split: `train` (N = 60,000) or `test` (N = 10,000).

    Raises:
        FileNotFoundError: A file is absent.
        ValueError: A file is not in idx format, or the counts differ.
    """
    name = _FILES[split]
    images = _read_idx(source / f"{name}-images-idx3-ubyte.gz", _IMAGE_MAGIC, 16)
    labels = _read_idx(source / f"{name}-labels-idx1-ubyte.gz", _LABEL_MAGIC, 8)
    if images.size != labels.size * PIXELS:
        raise ValueError(
            f"{source} {split!r}: expected {PIXELS!r} image bytes a label, "
            f"found {images.size!r} bytes and {labels.size!r} labels"
        )
    return images.reshape(-1, PIXELS), labels.astype(np.int32)


def _read_idx(path: Path, magic: int, header: int) -> npt.NDArray[np.uint8]:
    """Returns the uint8 payload of an idx.gz file, flat.

    Source: the IDX format, http://yann.lecun.com/exdb/mnist/ (big-endian magic, then sizes).
    """
    with gzip.open(path) as stream:
        content = stream.read()
    found = int.from_bytes(content[:4], "big")
    if found != magic:
        raise ValueError(f"{path}: expected idx magic {magic:#010x}, found {found:#010x}")
    return np.frombuffer(content, np.uint8, offset=header)


def shuffled_indices(total: int) -> npt.NDArray[np.int64]:
    """Returns a permutation of range(total), int64 [total], seeded by SEED.

    The first TRAIN_ROWS are the committed training rows, the rest is the teacher's. It sorts by a
    hash, because NumPy does not promise the same `permutation` in every release.
    """
    keys = [hashlib.sha256(f"{SEED}/{index}".encode()).digest() for index in range(total)]
    return np.array(sorted(range(total), key=keys.__getitem__), np.int64)


def refuse_shared_images(*parts: Images) -> None:
    """Raises ValueError if any image occurs twice, within one part or across parts.

    Args:
        parts: Image sets, each uint8 [N, 784].
    """
    images = [row.tobytes() for part in parts for row in part]
    doubled = len(images) - len(set(images))
    if doubled:
        raise ValueError(f"expected distinct images, found {doubled!r} copies in {len(images)!r}")


def as_table(
    split: Split,
    indices: npt.NDArray[np.int64],
    images: Images,
    labels: Labels,
    parts: Sequence[str],
) -> pa.Table:
    """Returns a table of example_id, image, label and part, all non-null.

    Args:
        split: Names the rows: `train-00017` is row 17 of the original training split.
        indices: Original row numbers, int64 [N].
        images: uint8 [N, 784].
        labels: int32 [N].
        parts: what each row is for: train, validation or test, [N].
    """
    schema = pa.schema(
        [
            pa.field("example_id", pa.string(), nullable=False),
            pa.field("image", pa.binary(), nullable=False),
            pa.field("label", pa.int32(), nullable=False),
            pa.field("part", pa.string(), nullable=False),
        ],
        metadata={
            "dataset": "Fashion-MNIST, Zalando SE, MIT",
            "image": json.dumps({"shape": [28, 28], "dtype": "uint8", "order": "row-major"}),
            "classes": json.dumps(CLASSES),
        },
    )
    ids = [f"{split}-{index:05d}" for index in indices.tolist()]
    pixels = [row.tobytes() for row in images]
    columns = [pa.array(ids, pa.string()), pa.array(pixels, pa.binary())]
    columns += [pa.array(labels), pa.array(parts, pa.string())]
    return pa.Table.from_arrays(columns, schema=schema)


def write(table: pa.Table, path: Path) -> None:
    """Writes `table` to `path` as Parquet with page checksums."""
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=["label", "part"],  # every image and id is distinct
        write_page_checksum=True,
    )


if __name__ == "__main__":
    typer.run(main)

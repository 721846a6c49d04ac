"""Small packed pictures, what decodes, augments and labels them, and where they lie."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from softlabels.store.table import Table
from softlabels.teacher.capture import capture
from softlabels.teacher.spec import CaptureSpec
from tests.plans import make_plan

HERE = "tests.student.pictures"
SIZE, CLASSES = 8, 5
SEEN: list[Tensor] = []
"""What the teacher was called with, one tensor a call."""


def picture(number: int) -> npt.NDArray[np.uint8]:
    """Picture `number`, uint8 [SIZE, SIZE, 3]; its first value is the number's."""
    found = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    found[0, 0, 0] = number % 256
    return found


def write_pictures(path: Path, start: int, stop: int, group: int = 23, shift: int = 0) -> Path:
    """A source file of pictures start to stop; `shift` moves pictures against their ids."""
    numbers = range(start, stop)
    packed = [zlib.compress(picture(i + shift).tobytes()) for i in numbers]
    rows = pa.table({"id": [f"p{i:04d}" for i in numbers], "image": pa.array(packed, pa.binary())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, row_group_size=group)
    return path


def decode(columns: Mapping[str, pa.Array]) -> Tensor:
    """Pictures as uint8 [B, SIZE, SIZE, 3]."""
    flat = b"".join(zlib.decompress(value) for value in columns["image"].to_pylist())
    return torch.from_numpy(np.frombuffer(flat, np.uint8).reshape(-1, SIZE, SIZE, 3).copy())


def shift_and_flip(pictures: Tensor, seeds: npt.NDArray[np.int64]) -> Tensor:
    """Each picture rolled by its seed, and mirrored where the seed is odd."""
    steps = torch.from_numpy(seeds % SIZE)
    places = (torch.arange(SIZE) + steps[:, None]) % SIZE
    places = torch.where(torch.from_numpy(seeds % 2 == 1)[:, None], places.flip(1), places)
    return pictures.gather(2, places[:, None, :, None].expand_as(pictures))


class Picture(nn.Module):
    """One linear layer on the pixels; keeps what it sees in SEEN."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIZE * SIZE * 3, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        SEEN.append(pictures.clone())
        logits: Tensor = self.layer(pictures.flatten(1).float() / 255)
        return logits


def capture_spec(folder: Path, **changes: Any) -> CaptureSpec:
    """A capture of folder/source/*.parquet into folder/table."""
    source = {
        "files": str(folder / "source" / "*.parquet"),
        "columns": ["image"],
        "decode": f"{HERE}:decode",
        "example_id": "id",
    } | changes.pop("source", {})
    values = {
        "table": str(folder / "table"),
        "teacher": {"name": "t", "module": f"{HERE}:Picture", "classes": CLASSES},
        "source": source,
        "k": CLASSES,
        "shard_rows": 40,
        "batch_size": 16,
        "device": "cpu",
    }
    return CaptureSpec.model_validate(values | changes)


def labelled(folder: Path, **changes: Any) -> Path:
    """The path of a plan over a capture of folder/source/*.parquet."""
    spec = capture_spec(folder, **changes)
    SEEN.clear()
    capture(spec)
    plan = make_plan({"pictures": Table.open(spec.table)})
    path = folder / "plan.parquet"
    plan.write(path)
    return path

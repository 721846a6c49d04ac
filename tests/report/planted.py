"""Real labels with one fault planted: the Fashion-MNIST teacher on real images, captured for real.

The convolutions run once; captures then read their logits from the source.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.fashion.inputs import CLASSES, SIDE
from pipelines.fashion.inputs import decode as decode_images
from pipelines.fashion.teacher import ConvTeacher
from softlabels.report.finding import Finding
from softlabels.report.gather import Options, gather
from softlabels.report.images import png
from softlabels.report.verdict import run_findings
from softlabels.store.table import Table
from softlabels.teacher.capture import capture
from softlabels.teacher.spec import CaptureSpec

DATA = Path("data/fashion")
ROWS = 2_000


class Scaled(nn.Module):
    """Gives back logits, times `scale`: at 3 too sure, at a half as if tempered before."""

    def __init__(self, scale: float = 1.0, classes: int = 10) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.classes = classes

    def forward(self, logits: Tensor) -> Tensor:
        return logits[:, : self.classes] * self.scale


def decode(columns: Mapping[str, pa.Array]) -> Tensor:
    """Logits float32 [B, V]."""
    values = columns["logits"].flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(values.reshape(len(columns["logits"]), -1).copy())


@cache
def source() -> pa.Table:
    """The first ROWS committed images: example_id, label, logits, picture (PNG)."""
    rows = pq.read_table(DATA / "train.parquet").slice(0, ROWS).combine_chunks()
    images = rows["image"].chunk(0)
    teacher = ConvTeacher()
    teacher.load_state_dict(load_file(DATA / "teacher.safetensors"))
    teacher.eval()
    with torch.inference_mode():
        logits = torch.cat([teacher(x) for x in torch.split(decode_images({"image": images}), 250)])
    return pa.table(
        {
            "example_id": rows["example_id"],
            "label": rows["label"],
            "logits": pa.array(logits.tolist(), pa.list_(pa.float32())),
            "picture": pa.array([png(x, SIDE, SIDE, 1) for x in images.to_pylist()], pa.binary()),
        }
    )


def with_labels(labels: np.ndarray) -> pa.Table:
    """The source with other labels."""
    return source().set_column(1, "label", pa.array(labels.astype(np.int32)))


def labels() -> np.ndarray:
    """Of the source, int [ROWS]."""
    return np.array(source()["label"].to_numpy())


def label(folder: Path, rows: pa.Table | None = None, **changes: Any) -> Table:
    """The table that a capture of `rows` makes; changes are of its spec."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(source() if rows is None else rows, folder / "source.parquet")
    classes = changes.pop("classes", CLASSES)
    arguments = changes.pop("arguments", {})
    values = {
        "table": str(folder / "labels"),
        "teacher": {
            "name": "convnet",
            "module": "tests.report.planted:Scaled",
            "arguments": arguments,
            "classes": list(classes),
        },
        "source": {
            "files": str(folder / "source.parquet"),
            "columns": ["logits"],
            "decode": "tests.report.planted:decode",
            "example_id": "example_id",
            "label": "label",
        },
        "carry": ["picture"],
        "k": 10,
        "device": "cpu",
        "shard_rows": 1_000,
        "batch_size": 500,
    }
    capture(CaptureSpec.model_validate(values | changes))
    return Table.open(str(folder / "labels"))


def findings(subject: Table | Path, **options: Any) -> list[Finding]:
    """What a report finds."""
    name = subject.root.uri if isinstance(subject, Table) else str(subject)
    return run_findings(gather(name, Options(**options)))


def ids(found: list[Finding]) -> list[str]:
    """Which, worst first."""
    return [finding.id for finding in found]

"""Sources, specs and captures of the toy teachers: what teacher tests start from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from softlabels.store.table import Table
from softlabels.teacher.models import load_teacher
from softlabels.teacher.run import Run, prepare
from softlabels.teacher.spec import CaptureSpec
from tests.teacher.toys import CLASSES, FEATURES

TOYS = "tests.teacher.toys"
NAMES = tuple(f"class{i}" for i in range(CLASSES))


def rows_table(start: int, stop: int) -> pa.Table:
    """Source rows start to stop; each a pure function of its number.

    Columns: id string, x list<float>, label int64, name string, note binary.
    """
    numbers = range(start, stop)
    x = [np.random.default_rng(i).normal(size=FEATURES).round(3).tolist() for i in numbers]
    return pa.table(
        {
            "id": pa.array([f"row{i:05d}" for i in numbers], pa.string()),
            "x": pa.array(x, pa.list_(pa.float32())),
            "label": pa.array([i % CLASSES for i in numbers], pa.int64()),
            "name": pa.array([NAMES[i % CLASSES] for i in numbers], pa.string()),
            "note": pa.array([f"note {i}".encode() for i in numbers], pa.binary()),
        }
    )


def write_source(path: Path, start: int, stop: int, row_group_size: int = 37) -> Path:
    """Writes rows start to stop as one Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows_table(start, stop), path, row_group_size=row_group_size)
    return path


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A spec's settings: table folder/table, source folder/src/*.parquet, a toy linear teacher.

    `changes` replace keys; teacher and source are merged.
    """
    values: dict[str, Any] = {
        "table": str(folder / "table"),
        "teacher": {"name": "toy", "module": f"{TOYS}:Linear", "classes": list(NAMES)},
        "source": {
            "files": str(folder / "src" / "*.parquet"),
            "columns": ["x"],
            "decode": f"{TOYS}:decode",
            "example_id": "id",
            "label": "label",
        },
        "k": 3,
        "shard_rows": 40,
        "batch_size": 16,
        "device": "cpu",
    }
    for key in ("teacher", "source"):
        values[key] |= changes.pop(key, {})
    return values | changes


def make_spec(folder: Path, **changes: Any) -> CaptureSpec:
    """`settings` as a validated spec."""
    return CaptureSpec.model_validate(settings(folder, **changes))


def make_run(folder: Path, **changes: Any) -> Run:
    """The run of `settings`."""
    return prepare(make_spec(folder, **changes))[0]


def stored(uri: str | Path, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """All rows of a table's newest version, sorted by example_id."""
    table = Table.open(str(uri))
    batches = list(table.batches())
    if not batches:
        return {name: [] for name in table.schema.names}
    rows = pa.Table.from_batches(batches).sort_by("example_id")
    return dict((rows.select(list(columns)) if columns else rows).to_pydict())


def teacher_logits(spec: CaptureSpec, start: int, stop: int) -> np.ndarray:
    """The teacher's own logits of source rows start to stop, float64 [rows, V]."""
    teacher = load_teacher(spec)
    columns = {name: rows_table(start, stop)[name].combine_chunks() for name in ("x",)}
    names = [str(i) for i in range(start, stop)]
    return np.asarray(teacher.logits(columns, names).to(torch.float64).numpy())

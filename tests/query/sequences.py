"""A table of rows with several positions, padding, missing labels and an unknown tail."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from softlabels.schema import table_schema
from softlabels.store import shards
from softlabels.store.table import Table
from softlabels.targets import SoftTargets
from tests.tables import make_contents, make_lineage

COUNTS = np.array([2, 0, 3, 1], np.int32)
IDS = np.array([[4, 2, 9], [1, 0, -1], [7, 8, 3], [5, -1, -1], [0, 1, 2], [6, 3, 2]], np.int32)
PROBS = np.array(
    [
        [0.5, 0.25, 0.125],
        [0.75, 0.25, 0],
        [0.5, 0.25, 0.0625],
        [1, 0, 0],
        [0.25] * 3,
        [0.5, 0.25, 0],
    ]
)
LABELS = np.array([2, -1, 0, 5, 2, -1], np.int32)


def make_sequences(folder: Path | str, known_tail: bool = True) -> Table:
    """Four rows of 2, 0, 3 and 1 positions over 10 classes, k = 3; the last id 2 has mass 0."""
    with np.errstate(divide="ignore"):
        logprobs = np.log(PROBS).astype(np.float32)
        tail = np.log(1 - PROBS.sum(1)).astype(np.float32)
    targets = SoftTargets(
        num_positions=COUNTS,
        ids=IDS,
        logprobs=logprobs,
        tail=tail if known_tail else None,
        entropy=np.float32(0.25) * np.arange(6, dtype=np.float32) if known_tail else None,
        label_ids=LABELS,
        label_logprobs=np.where(LABELS >= 0, -1.5, np.nan).astype(np.float32),
        label_ranks=np.where(LABELS >= 0, 1, -1).astype(np.int32),
    )
    language = {"classes": None, "tokenizer_sha256": "0" * 64, "alignment": "next"}
    contents = make_contents(3, 10).model_copy(update=language)
    schema = table_schema()
    columns = {
        "example_id": pa.array(["s0", "s1", "s2", "s3"]),
        "view": pa.array([0, 0, 1, 0], pa.int32()),
        **targets.columns(),
    }
    arrays = [columns[f.name] if f.name in columns else pa.nulls(4, f.type) for f in schema]
    writer = shards.ShardWriter(schema, "precise", row_group_positions=1)
    writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema).slice(0, 3))
    writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema).slice(3))
    table = Table.open_or_create(str(folder), schema, contents)
    unit = f"{0:016x}-{0:06d}"
    shard = table.store_shard(f"run/{unit}", unit, writer.close())
    return table.commit([shard], make_lineage("run", [shard.key], 4))


def far(table: Table) -> Table:
    """The same version behind a filesystem that is not known to be this machine's."""
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    from softlabels.storage import Root

    fs = DirFileSystem(path=table.root.path, fs=LocalFileSystem())
    return type(table)(Root(uri=table.root.uri, fs=fs, path="/"), table._delta)

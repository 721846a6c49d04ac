"""What a table version is and whether it is whole: behind `show` and `verify`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from softlabels.errors import SoftLabelsError
from softlabels.fingerprint import key64, sha256_bytes
from softlabels.lineage import Contents
from softlabels.schema import COLUMNS
from softlabels.store import shards, tags
from softlabels.store.alignment import SelfTest
from softlabels.store.table import Table, TableFile
from softlabels.targets import SoftTargets

_COUNT = ("num_positions",)


def describe(table: Table) -> dict[str, Any]:
    """One version in plain values: identity, counts, bytes a row, columns with their bytes."""
    contents = table.contents
    sizes = column_bytes(table)
    rows = max(1, table.num_rows)
    labels = sum(size for name, size in sizes.items() if name not in contents.carried)
    return {
        "table": table.root.uri,
        "version": table.version,
        "tags": [
            name
            for name in tags.tag_names(table.root)
            if tags.read_tag(table.root, name).version == table.version
        ],
        "teacher": contents.teacher.name,
        "revision": contents.teacher.revision,
        "weights_sha256": contents.teacher.weights_sha256,
        "classes": list(contents.classes) if contents.classes else contents.num_classes,
        **(_language(table, sizes) if contents.alignment else {}),
        "k": contents.k,
        "draws": contents.draws,
        "temperatures": [1.0, *contents.temperatures],
        "profile": contents.profile,
        **_calibration(contents),
        "rows": table.num_rows,
        "files": len(table.files),
        "bytes": sum(file.size for file in table.files),
        "label_bytes_per_row": round(labels / rows, 2),
        "snapshot_digest": table.snapshot_digest,
        "columns": [
            {
                "column": field.name,
                "type": str(field.type),
                "unit": COLUMNS[field.name].unit if field.name in COLUMNS else "",
                "bytes_per_row": round(sizes.get(field.name, 0) / rows, 2),
            }
            for field in table.schema
        ],
    }


def _calibration(contents: Contents) -> dict[str, Any]:
    found = contents.calibration
    return {} if found is None else {"calibration": found.model_dump(mode="json")}


def column_bytes(table: Table) -> dict[str, int]:
    """Compressed bytes of each column in all files of a version."""
    sizes: dict[str, int] = {}
    for file in table.files:
        opened = shards.open_shard(table.root.buffer(file.path), file.path)
        for name, size in shards.bytes_by_column(opened).items():
            sizes[name] = sizes.get(name, 0) + size
    return sizes


def _language(table: Table, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What only tables of sequences have, for `describe`."""
    contents = table.contents
    positions = sum(int(pc.sum(b["num_positions"]).as_py() or 0) for b in table.batches(_COUNT))
    labels = sum(size for name, size in sizes.items() if name not in contents.carried)
    found: dict[str, Any] = {
        "alignment": contents.alignment,
        "tokenizer_sha256": contents.tokenizer_sha256,
        "chat_template_sha256": contents.chat_template_sha256,
        "positions": positions,
        "label_bytes_per_position": round(labels / max(1, positions), 2),
    }
    if contents.logits_width is not None:
        found["logits_width"] = contents.logits_width
    if contents.recorded is not None:
        found["recorded"] = contents.recorded.model_dump(mode="json")
    return found


def verify(table: Table, done: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Reads every file of a version and says what is wrong with it.

    Checks length and sha256 of each file against the log, its format version, page checksums,
    row counts, the invariants of soft targets, that no (example_id, view) is there twice, and
    where rows hold their tokens, that distributions stand at the tokens they are said to.

    Args:
        table: the version.
        done: called after each file.

    Returns:
        files, rows, and problems: a line each, empty when all is well; alignment, what
        `alignment.SelfTest` found, where rows hold their tokens.
    """
    problems: list[str] = []
    keys: list[np.ndarray[Any, np.dtype[np.uint64]]] = []
    rows = 0
    test = SelfTest(table.contents)
    for file in table.files:
        try:
            found = _verify_file(table, file, test)
            rows += len(found)
            keys.append(found)
        except SoftLabelsError as error:
            problems.append(f"{file.path}: {error}")
        done()
    every = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    repeated = len(every) - len(np.unique(every))
    if repeated:
        problems.append(f"{repeated} rows have an (example_id, view) that is there already")
    report = {"files": len(table.files), "rows": rows, "problems": problems}
    alignment = test.result()
    if alignment is None:
        return report
    if alignment["problem"] is not None:
        problems.append(alignment["problem"])
    return report | {"alignment": alignment}


def _verify_file(
    table: Table, file: TableFile, test: SelfTest
) -> np.ndarray[Any, np.dtype[np.uint64]]:
    data = table.root.buffer(file.path)
    if len(data) != file.size:
        raise SoftLabelsError(f"{len(data)} bytes, the log says {file.size}")
    if (found := sha256_bytes(memoryview(data))) != file.sha256:
        raise SoftLabelsError(f"sha256 is {found}, its name says {file.sha256}")
    opened = shards.open_shard(data, file.path)
    if opened.metadata.num_rows != file.num_rows:
        raise SoftLabelsError(f"{opened.metadata.num_rows} rows, the log says {file.num_rows}")
    keys = []
    for group in range(opened.num_row_groups):
        batch = shards.read_row_groups(opened, file.path, [group])
        check_batch(table, batch)
        test.add(batch)
        keys.append(row_keys(batch))
    return np.concatenate(keys) if keys else np.zeros(0, np.uint64)


def check_batch(table: Table, batch: pa.RecordBatch) -> None:
    """Raises DataError or IntegrityError unless stored rows keep the invariants."""
    contents = table.contents
    columns = {name: batch[name] for name in batch.schema.names}
    targets = SoftTargets.from_columns(columns, contents.k, contents.draws, contents.temperatures)
    tolerance = shards.MASS_TOLERANCE[contents.profile]
    targets.check(columns["example_id"].to_pylist(), contents.num_classes, tolerance)


def row_keys(batch: pa.RecordBatch) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A 64-bit key of each row's (example_id, view): membership tests in 8 bytes a row."""
    pairs = zip(batch["example_id"].to_pylist(), batch["view"].to_pylist(), strict=True)
    return np.fromiter((key64(name, view) for name, view in pairs), np.uint64, batch.num_rows)

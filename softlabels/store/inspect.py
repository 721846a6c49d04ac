"""What a table version is and whether it is whole: behind `show` and `verify`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
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

Keys = npt.NDArray[np.uint64]

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
        "tags": [t.name for t in tags.tags_by_version(table.root).get(table.version, [])],
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


def verify(
    table: Table,
    done: Callable[[], None] = lambda: None,
    sample: int | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Reads every file of a version and says what is wrong with it.

    Checks length and sha256 of each file against the log, its format version, page checksums,
    row counts, the invariants of soft targets, that no (example_id, view) is there twice, and
    where rows hold their tokens, that distributions stand at the tokens they are said to.

    Args:
        table: the version.
        done: called after each file.
        sample: read so many files only, chosen at random.
        seed: of that choice; none: a new one.

    Returns:
        files, rows, and problems: a line each, empty when all is well; alignment, what
        `alignment.SelfTest` found, where rows hold their tokens. Of a sample also sample: seed,
        of_files, of_rows and of_bytes, what the version has, and bytes, what of it was read.
    """
    if sample is None:
        return _Checked(table).read(table, table.files, done)
    seed = int(np.random.default_rng().integers(2**32)) if seed is None else seed
    chosen = np.random.default_rng(seed).permutation(len(table.files))[:sample]
    files = [table.files[place] for place in sorted(chosen)]
    return _Checked(table).read(table, files, done) | {
        "sample": {
            "seed": seed,
            "of_files": len(table.files),
            "of_rows": table.num_rows,
            "of_bytes": sum(file.size for file in table.files),
            "bytes": sum(file.size for file in files),
        }
    }


def verify_all(
    table: Table,
    planned: Callable[[int], None] = lambda files: None,
    done: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Verifies the newest version and each that a tag names; a file of several is read once.

    Args:
        table: any version.
        planned: told how many files there are to read.
        done: called after each file.

    Returns:
        versions: of each, newest first, version, tags, and what `verify` returns; files, rows and
        problems of all, each file counted once.
    """
    opened, names, problems = _kept(table)
    unread: dict[str, set[str]] = {}
    for version in opened:
        unread.setdefault(_kind(version), set()).update(file.path for file in version.files)
    planned(sum(len(paths) for paths in unread.values()))
    checked: dict[str, _Checked] = {}
    versions = []
    for version in opened:
        checking = checked.setdefault(_kind(version), _Checked(version))
        found = checking.read(version, version.files, done)
        tagged = names.get(version.version, [])
        versions.append({"version": version.version, "tags": tagged, **found})
        problems += [f"version {version.version}: {line}" for line in found["problems"]]
    return {
        "versions": versions,
        "files": sum(len(one.rows) for one in checked.values()),
        "rows": sum(sum(one.rows.values()) for one in checked.values()),
        "problems": list(dict.fromkeys(problems)),
    }


def _kept(table: Table) -> tuple[list[Table], dict[int, list[str]], list[str]]:
    """The newest version and those with tags, newest first; these tags; why others do not open."""
    newest = table.latest()
    opened, problems = {newest.version: newest}, []
    names: dict[int, list[str]] = {}
    for name in tags.tag_names(table.root):
        try:
            tagged = Table.open(f"{table.root.uri}@{name}")
        except SoftLabelsError as error:
            problems.append(f"tag {name!r}: {error}")
        else:
            opened.setdefault(tagged.version, tagged)
            names.setdefault(tagged.version, []).append(name)
    return [opened[version] for version in sorted(opened, reverse=True)], names, problems


def _kind(table: Table) -> str:
    """Of versions with one kind, a file is right in all or in none."""
    return table.contents.digest()


class _Checked:
    """Files of one kind that were read: what was wrong, how many rows, which keys they have."""

    def __init__(self, table: Table) -> None:
        self.rows: dict[str, int] = {}
        self._problems: dict[str, str] = {}
        self._keys: dict[str, Keys] = {}
        self._test = SelfTest(table.contents)

    def read(
        self, table: Table, files: Sequence[TableFile], done: Callable[[], None]
    ) -> dict[str, Any]:
        """What `verify` returns of these files of a version; those read before are not again."""
        for file in files:
            if file.path not in self.rows:
                self._read(table, file)
                done()
        problems = [self._problems[f.path] for f in files if f.path in self._problems]
        keys = [self._keys[file.path] for file in files]
        every = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
        repeated = len(every) - len(np.unique(every))
        if repeated:
            problems.append(f"{repeated} rows have an (example_id, view) that is there already")
        rows = sum(self.rows[file.path] for file in files)
        report = {"files": len(files), "rows": rows, "problems": problems}
        alignment = self._test.result()
        if alignment is None:
            return report
        if alignment["problem"] is not None:
            problems.append(alignment["problem"])
        return report | {"alignment": alignment}

    def _read(self, table: Table, file: TableFile) -> None:
        keys: Keys = np.zeros(0, np.uint64)
        try:
            keys = _verify_file(table, file, self._test)
        except SoftLabelsError as error:
            self._problems[file.path] = f"{file.path}: {error}"
        self.rows[file.path], self._keys[file.path] = len(keys), keys


def _verify_file(table: Table, file: TableFile, test: SelfTest) -> Keys:
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


def row_keys(batch: pa.RecordBatch) -> Keys:
    """A 64-bit key of each row's (example_id, view): membership tests in 8 bytes a row."""
    pairs = zip(batch["example_id"].to_pylist(), batch["view"].to_pylist(), strict=True)
    return np.fromiter((key64(name, view) for name, view in pairs), np.uint64, batch.num_rows)

"""One byte of a table's log, tags or run records is changed: it is noticed, or changes nothing."""

import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from deltalake import DeltaTable

from softlabels.errors import SoftLabelsError
from softlabels.lineage import ChangeLineage
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.query.view import query
from softlabels.store import runs, tags
from softlabels.store.table import Table
from tests.faults.record import record, scaled
from tests.store.test_table import RUN, commit, empty, store_unit

COMMITS = 12
CHECKPOINT = 8

SEED = 5
LONGEST = 20.0
"""Seconds that reading a damaged log may take at most."""

MOST_MEMORY = 500 * 2**20


def made(folder: Path) -> tuple[Table, list[str]]:
    """A table with an empty unit, files that were taken out, a checkpoint, a tag and a run."""
    table = empty(folder)
    keys = []
    for number in range(COMMITS):
        unit = store_unit(table, number, rows=0 if number == 3 else 2)
        keys.append(unit.key)
        table = commit(table, unit)
        if number == 4:
            tags.make_tag(table.root, "v1", table.version, table.snapshot_digest)
        if number in (5, COMMITS - 2):
            table = table.change([], table.files[1:2], deletion(table))
        if number == CHECKPOINT:
            DeltaTable(table.root.uri).create_checkpoint()
    run = runs.RunRecord(
        run_id=RUN,
        units=COMMITS,
        rows=2 * COMMITS,
        spec={"teacher": "x"},
        source={"uri": "y"},
        started_at="2026-01-01T00:00:00+00:00",
    )
    runs.record_run(table.root, run)
    return table, keys


def deletion(table: Table) -> ChangeLineage:
    return ChangeLineage(
        operation="delete",
        change_id=f"{table.version:064x}",
        from_version=table.version,
        arguments={"where": "true"},
        rows_before=table.num_rows,
        rows_after=table.num_rows - 2,
        packages={},
        started_at="2026-01-01T00:00:00+00:00",
        seconds=0.0,
    )


def held(reference: str, keys: list[str]) -> tuple[Any, ...]:
    """All that a version says of itself, which units are in, its commits and its rows."""
    table = Table.open(reference)
    rows = [batch.to_pylist() for batch in table.batches()]
    said = (table.version, table.snapshot_digest, table.files, table.schema, table.contents)
    return (*said, [table.committed(key) for key in keys], table.history(), rows)


def questions(uri: str, keys: list[str]) -> dict[str, Callable[[], Any]]:
    """What is asked of the table, by name."""
    chosen = "SELECT example_id, top1_prob FROM t.labels WHERE top1_prob > 0.5 AND view = 0"
    recipe = Recipe.model_validate(
        {"sources": {"a": {"table": uri, "where": "entropy < 1.2"}}, "seed": 1}
    )

    def beside() -> Any:
        table = Table.open(uri)
        return (
            query({"t": table}, chosen).to_pylist(),
            runs.run_records(table.root),
            runs.open_runs(table),
            tags.all_tags(table.root),
        )

    return {
        "newest": lambda: held(uri, [*keys, "none"]),
        "tag": lambda: held(f"{uri}@v1", keys),
        "version": lambda: held(f"{uri}@6", keys),
        "query, runs and tags": beside,
        "mix": lambda: mix(recipe).fingerprint,
    }


def flips(folder: Path, count: int) -> list[tuple[Path, int, int]]:
    """Files, offsets and the bits to change, of every kind of file; more in the newest entries."""
    rng = np.random.default_rng(SEED)
    log = folder / "_delta_log"
    newest = sorted(log.glob("*.json"))[-6:]
    kinds = [
        sorted(log.glob("*.checkpoint.parquet")),
        newest,
        newest,
        sorted(log.glob("*.json")),
        [log / "_last_checkpoint"],
        sorted((folder / "_softlabels").rglob("*.json")),
    ]
    found = []
    for number in range(count):
        files = kinds[number % len(kinds)]
        path = files[rng.integers(len(files))]
        found.append((path, int(rng.integers(path.stat().st_size)), int(rng.integers(1, 256))))
    return found


def test_a_flipped_byte_of_the_log_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    table, keys = made(tmp_path / "t")
    asked = questions(table.root.uri, keys)
    right = {name: ask() for name, ask in asked.items()}
    assert right["newest"][5] == [True] * COMMITS + [False]
    assert len(right["newest"][2]) == COMMITS - 3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts: Counter[str] = Counter()
    lines = {0}
    for path, offset, bits in flips(tmp_path / "t", scaled(24, 400)):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[offset] ^= bits
        path.write_bytes(damaged)
        noticed = False
        for name, ask in asked.items():
            began = time.monotonic()
            try:
                answer = ask()
            except SoftLabelsError as error:
                noticed = True
                lines.add(str(error).count("\n"))
            else:
                assert answer == right[name], f"{name}: {path.name} at {offset} ^ {bits}"
            assert time.monotonic() - began < LONGEST, (name, path.name, offset, bits)
        counts["noticed" if noticed else "harmless"] += 1
        path.write_bytes(whole)
    assert {name: ask() for name, ask in asked.items()} == right
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MOST_MEMORY
    assert lines == {0}, "an error is one line"
    assert counts["noticed"] > counts.total() / 3
    record("Single-byte flips of log, checkpoint, tags and run records", {**counts, "wrong": 0})
    print(dict(counts))

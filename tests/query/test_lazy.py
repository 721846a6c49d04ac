"""Polars says what SQL says."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from softlabels.errors import StorageError
from softlabels.query.lazy import scan, scan_entries, scan_positions
from softlabels.query.view import query
from softlabels.store.table import Table
from tests.query.sequences import far, make_sequences
from tests.store.markov import make_language
from tests.tables import make_table

KEYS = {
    "labels": ["example_id", "view"],
    "positions": ["example_id", "view", "position"],
    "entries": ["example_id", "view", "position", "rank"],
}
SCANS: dict[str, Callable[[str | Table], pl.LazyFrame]] = {
    "labels": scan,
    "positions": scan_positions,
    "entries": scan_entries,
}


def tables(folder: Path) -> dict[str, Table]:
    made = make_table(folder / "plain", rows=90, shard_rows=40, draws=3, temperatures=[1.5])
    return {
        "plain": made,
        "whole": make_table(folder / "whole", rows=20, k=10),
        "draws only": make_table(folder / "draws", rows=20, k=0, draws=4),
        "compact": make_table(folder / "compact", rows=20, profile="compact"),
        "sequences": make_sequences(folder / "sequences"),
        "no tail": make_sequences(folder / "no tail", known_tail=False),
        "language": make_language(folder / "language", documents=3),
        "one whole": make_language(folder / "one whole", rows=5),
        "far language": far(make_language(folder / "far language", rows=5, documents=2)),
        "empty": Table.open(f"{made.root.uri}@0"),
        "far": far(made),
    }


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    return tables(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("relation", list(KEYS))
def test_polars_equals_sql(every_kind: dict[str, Table], relation: str) -> None:
    for name, table in every_kind.items():
        frame = SCANS[relation](table).collect().sort(KEYS[relation])
        expected = pl.DataFrame(query(table, f"SELECT * FROM {relation}")).sort(KEYS[relation])
        assert_frame_equal(frame, expected, check_exact=False, rel_tol=1e-6)
        assert frame.height > 0 or name in ("empty", "draws only")


def test_a_scan_is_lazy_and_reads_only_its_version(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=100)
    (tmp_path / "t" / "data" / "stray.parquet").write_bytes(b"not in the log")
    frame = scan(table.root.uri)
    assert frame.select(pl.len()).collect().item() == 100
    plan = frame.filter(pl.col("label") == 3).select("example_id").explain()
    assert "PROJECT 2/20" in plan or "PROJECT" in plan
    assert "SELECTION" in plan


def test_a_missing_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t")
    (tmp_path / "t" / table.files[0].path).unlink()
    with pytest.raises(StorageError, match=table.files[0].path):
        scan(table)

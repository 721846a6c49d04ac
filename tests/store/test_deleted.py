"""What was deleted does not come back: captures pass it over until it is lifted."""

from pathlib import Path

import numpy as np
import pytest

from softlabels.query.takedown import Request, take_down
from softlabels.storage import open_root
from softlabels.store import deleted
from softlabels.store.compact import compact
from softlabels.store.inspect import row_keys
from softlabels.store.table import Table
from softlabels.teacher.capture import capture
from tests.teacher.jobs import make_spec, write_source

ID = "1f" * 32


def ids_of(uri: str) -> list[str]:
    batches = Table.open(uri).batches(["example_id"])
    return [str(name) for batch in batches for name in batch[0].to_pylist()]


def test_keys_are_those_of_view_0(tmp_path: Path) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 20)
    spec = make_spec(tmp_path)
    capture(spec)
    batch = next(Table.open(spec.table).batches(["example_id", "view"]))
    keys = deleted.example_keys(batch["example_id"].to_pylist())
    assert (np.sort(row_keys(batch)) == keys).all()


def test_a_capture_of_a_new_run_passes_over_what_was_deleted(tmp_path: Path) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 100)
    spec = make_spec(tmp_path)
    capture(spec)
    take_down(Table.open(spec.table), Request(where="label = 1"))
    left = ids_of(spec.table)
    assert len(left) < 100
    # The same run is done; another of the same source labels all that is absent, but not these.
    assert capture(spec).rows == 0
    write_source(tmp_path / "src" / "b.parquet", 100, 130)
    report = capture(make_spec(tmp_path, shard_rows=33))
    assert (report.rows, report.deleted, report.already) == (30, 100 - len(left), len(left))
    assert set(ids_of(spec.table)) == {*left, *(f"row{n:05d}" for n in range(100, 130))}
    # Also when it is in one file with rows of others.
    compact(Table.open(spec.table))
    assert capture(make_spec(tmp_path, shard_rows=34)).rows == 0
    # Lifted, it is labelled again.
    gone = frozenset(f"row{n:05d}" for n in range(100)) - set(left)
    lifted = take_down(Table.open(spec.table), Request(ids=gone, allow_again=True))
    assert (lifted.rows, lifted.lifted) == (0, len(gone))
    again = capture(make_spec(tmp_path, shard_rows=35))
    assert (again.rows, again.deleted) == (len(gone), 0)
    assert len(ids_of(spec.table)) == len(set(ids_of(spec.table))) == 130


def test_rows_deleted_with_allow_again_are_labelled_by_the_next_run(tmp_path: Path) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 60)
    spec = make_spec(tmp_path)
    capture(spec)
    found = take_down(Table.open(spec.table), Request(where="label = 1", allow_again=True))
    assert capture(make_spec(tmp_path, shard_rows=33)).rows == found.rows > 0


def test_lists_of_several_deletes_are_one(tmp_path: Path) -> None:
    root = open_root(tmp_path)
    assert not len(deleted.deleted_keys(root))
    one, two = deleted.example_keys(["a", "b"]), deleted.example_keys(["b", "c"])
    deleted.record_deleted(root, ID, one)
    deleted.record_deleted(root, ID, one)
    deleted.record_deleted(root, "2e" * 32, two)
    every = deleted.deleted_keys(root)
    assert (every == np.union1d(one, two)).all()
    assert (deleted.keys_of_change(root, ID) == one).all()
    assert deleted.lift(root, deleted.example_keys(["b", "nobody"])) == 1
    assert (deleted.deleted_keys(root) == deleted.example_keys(["a", "c"])).all()
    other = open_root(tmp_path / "other")
    deleted.copy_lists(root, other)
    assert (deleted.deleted_keys(other) == deleted.example_keys(["a", "c"])).all()


def test_a_stopped_lift_lifts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = open_root(tmp_path)
    keys = deleted.example_keys(["a", "b"])
    deleted.record_deleted(root, ID, keys)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(root), "delete", stopped)
        with pytest.raises(KeyboardInterrupt):
            deleted.lift(root, deleted.example_keys(["a"]))
    assert (deleted.deleted_keys(root) == keys).all()
    assert deleted.lift(root, deleted.example_keys(["a"])) == 1
    assert (deleted.deleted_keys(root) == deleted.example_keys(["b"])).all()

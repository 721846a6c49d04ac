"""Deletes from real tables: exactly the rows that were asked for go, all else keeps its bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from softlabels.errors import BadInputError, IntegrityError, TryAgainError
from softlabels.query.doomed import read_ids
from softlabels.query.takedown import Request, plan_takedown, take_down
from softlabels.store import deleted, files, shards, tags
from softlabels.store.compact import compact
from softlabels.store.inspect import verify
from softlabels.store.rollback import rollback
from softlabels.store.table import Table
from softlabels.store.vacuum import Keep, vacuum
from tests.query.tables import reordered
from tests.tables import make_table


def rows_of(table: Table) -> pa.Table:
    return pa.Table.from_batches(list(table.batches()), table.schema)


def without(rows: pa.Table, ids: list[str]) -> pa.Table:
    return rows.filter(pc.invert(pc.is_in(rows["example_id"], pa.array(ids, pa.string()))))


def names(numbers: Any) -> list[str]:
    return [f"x{n:05d}" for n in numbers]


@pytest.mark.parametrize("profile", ["precise", "compact"])
def test_what_matches_goes_and_all_else_keeps_its_bits_and_its_order(
    tmp_path: Path, profile: shards.Profile
) -> None:
    table = make_table(tmp_path / "t", rows=300, profile=profile, draws=2, temperatures=[2.0])
    rows, untouched = rows_of(table), table.files[2]
    plan = plan_takedown(table, Request(where="label = 3 AND example_id < 'x00150'"))
    assert Table.open(table.root.uri).version == table.version
    report = take_down(table, Request(where="label = 3 AND example_id < 'x00150'"))
    gone = names(range(3, 150, 10))
    made = Table.open(table.root.uri)
    assert (plan.rows, plan.rewritten, plan.dropped, plan.rows_left) == (15, 2, 0, 285)
    assert (report.rows, report.examples, report.rewritten, report.rows_left) == (15, 15, 2, 285)
    assert report.some_ids == plan.some_ids == tuple(gone[:10])
    assert rows_of(made).equals(without(rows, gone))
    assert [file.unit for file in made.files] == [file.unit for file in table.files]
    assert untouched in made.files
    assert verify(made) == {"files": 3, "rows": 285, "problems": []}
    assert made.version == table.version + 1
    assert rows_of(Table.open(f"{table.root.uri}@1")).equals(rows)
    opened = shards.open_shard(made.root.buffer(made.files[0].path), "x")
    assert opened.num_row_groups == 1  # small row groups are joined, never made


def test_a_file_without_rows_left_is_dropped_and_so_may_be_all(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300)
    report = take_down(table, Request(where="example_id >= 'x00100' AND example_id < 'x00200'"))
    made = Table.open(table.root.uri)
    assert (report.rewritten, report.dropped, report.rows_left) == (0, 1, 200)
    assert made.files == (table.files[0], table.files[2])
    everything = take_down(table, Request(where="true"))
    made = Table.open(table.root.uri)
    assert (everything.rows, made.num_rows, made.files) == (200, 0, ())
    assert made.contents == table.contents
    assert take_down(table, Request(where="true")).rows == 0


def test_a_predicate_that_is_null_is_not_true(tmp_path: Path) -> None:
    license = pa.array(["cc", None, "gpl"] * 20)
    table = make_table(tmp_path / "t", rows=60, carried={"license": license})
    assert take_down(table, Request(where="license <> 'cc'")).rows == 20
    assert Table.open(table.root.uri).num_rows == 40
    assert take_down(table, Request(where="license IS NULL")).rows == 20


def test_no_match_makes_nothing(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60)
    before = sorted(path for path in (tmp_path / "t").rglob("*") if path.is_file())
    nobody = Request(ids=frozenset({"nobody"}), allow_again=True)
    for request in (Request(where="label > 50"), nobody):
        report = take_down(table, request)
        assert (report.rows, report.version) == (0, table.version)
        assert report.unknown == len(request.ids or ())
    assert sorted(path for path in (tmp_path / "t").rglob("*") if path.is_file()) == before


def test_ids_one_a_line(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300)
    rows = rows_of(table)
    ids = read_ids(["\ufeffx00007\n", "\n", "x00250\r\n", "x00007\n", "nobody\n", " x1 "])
    assert ids == {"x00007", "x00250", "nobody", " x1 "}
    plan = plan_takedown(table, Request(ids=ids))
    report = take_down(table, Request(ids=ids))
    assert (plan.rows, plan.unknown, report.rows, report.unknown) == (2, 2, 2, 2)
    made = Table.open(table.root.uri)
    assert rows_of(made).equals(without(rows, ["x00007", "x00250"]))
    with pytest.raises(BadInputError, match="ids is empty"):
        read_ids(["\n", ""])


def test_all_views_of_an_example_go(tmp_path: Path) -> None:
    base = make_table(tmp_path / "base", rows=50)
    order = np.concatenate([np.arange(50), np.arange(50)])
    views = np.repeat([0, 1], 50)
    kind = pa.array(["a"] * 100)

    def marked(batch: pa.RecordBatch) -> pa.RecordBatch:
        _ = kind
        place = batch.schema.get_field_index("margin")
        # Only view 1 of an example has a margin above 5.
        margin = np.where(batch["view"].to_numpy() == 1, 9.0, 0.5).astype(np.float32)
        return batch.set_column(place, "margin", pa.array(margin))

    table = reordered(base, tmp_path / "t", order, shard_rows=30, views=views, change=marked)
    report = take_down(table, Request(where="margin > 5 AND label = 0"))
    made = Table.open(table.root.uri)
    assert (report.rows, report.examples) == (10, 5)
    assert not set(rows_of(made)["example_id"].to_pylist()) & set(names(range(0, 50, 10)))
    assert rows_of(made).equals(without(rows_of(table), names(range(0, 50, 10))))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("labell = 3", "labell"),
        ("entropy", "expected what is true or false"),
        ("true) UNION (SELECT 1", "expected one expression"),
        ("label IN (SELECT 1)", "subquery"),
        ("random() < 0.5", "not decided by the row"),
        ("", "expected one expression|where"),
    ],
)
def test_sql_that_cannot_be_meant_is_refused(tmp_path: Path, where: str, said: str) -> None:
    table = make_table(tmp_path / "t", rows=20)
    for act in (plan_takedown, take_down):
        with pytest.raises(BadInputError, match=said):
            act(table, Request(where=where))
    assert Table.open(table.root.uri).version == table.version


def test_requests_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(BadInputError, match="either where or ids"):
        Request()
    with pytest.raises(BadInputError, match="either where or ids"):
        Request(where="true", ids=frozenset({"a"}))
    with pytest.raises(BadInputError, match="ids are never recorded"):
        Request(ids=frozenset({"a"}), record_where=True)


def all_bytes(folder: Path) -> bytes:
    """Of all that is not a data file."""
    paths = [p for p in folder.rglob("*") if p.is_file() and "data" not in p.parts]
    return b"".join(str(p).encode() + p.read_bytes() for p in paths)


def test_the_log_has_neither_ids_nor_the_words_unless_asked(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60)
    log = tmp_path / "t" / "_delta_log"
    known = set(log.iterdir())
    take_down(table, Request(where="example_id = 'x00007'"))
    take_down(table, Request(ids=frozenset({"x00008"})))
    written = b"".join(p.read_bytes() for p in set(log.iterdir()) - known)
    written += all_bytes(tmp_path / "t" / "_softlabels")
    assert b"x00007" not in written
    assert b"x00008" not in written
    assert b"example_id =" not in written
    first, second = [c["change"] for c in Table.open(table.root.uri).history()[:2]][::-1]
    assert (first.operation, first.rows_before, first.rows_after) == ("delete", 60, 59)
    assert {"where_sha256", "rows", "examples"} <= set(first.arguments)
    assert "ids_sha256" in second.arguments
    take_down(table, Request(where="label = 9", record_where=True))
    assert Table.open(table.root.uri).history()[0]["change"].arguments["where"] == "label = 9"


def test_what_still_holds_the_rows_is_named_and_can_be_removed_for_good(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300, shard_rows=50)
    uri = table.root.uri
    tags.make_tag(table.root, "before", table.version, table.snapshot_digest)
    compact(table)  # the rows are in another file than those of "before"
    compacted = Table.open(uri)
    tags.make_tag(table.root, "plan-0123456789abcdef", compacted.version, compacted.snapshot_digest)
    take_down(table, Request(where="label = 1"))
    other = Table.open(uri)
    tags.make_tag(table.root, "other", other.version, other.snapshot_digest)
    report = take_down(table, Request(where="example_id = 'x00007'"))
    assert report.holders is not None
    assert [tag.name for tag in report.holders.tags] == [
        "before",
        "plan-0123456789abcdef",
        "other",
    ]
    assert report.holders.versions == ((1, 3),)
    # The first request's rows are in two of these only.
    again = take_down(table, Request(where="label = 1"))
    assert (again.rows, again.earlier) == (0, (3,))
    assert again.holders is not None
    assert [tag.name for tag in again.holders.tags] == ["before", "plan-0123456789abcdef"]

    tags.delete_tags(table.root, ["before", "plan-0123456789abcdef", "other"])
    vacuum(Table.open(uri), Keep(retention=0.0))
    left = [
        name
        for path in (tmp_path / "t" / "data").iterdir()
        for name in pq.read_table(path, columns=["example_id"])["example_id"].to_pylist()
    ]
    assert "x00007" not in left
    assert len(left) == 269
    done = take_down(table, Request(ids=frozenset({"x00007"})))
    assert done.holders is not None
    assert (done.holders.versions, done.holders.tags) == ((), ())
    with pytest.raises(BadInputError, match="vacuumed"):
        Table.open(f"{uri}@1")


def test_a_list_of_keys_is_left_and_vacuum_keeps_it(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60)
    take_down(table, Request(where="label = 1"))
    take_down(table, Request(ids=frozenset(names([2]))))
    expected = deleted.example_keys(names([1, 11, 21, 31, 41, 51, 2]))
    vacuum(table.latest(), Keep(retention=0.0, grace=0.0))
    assert (deleted.deleted_keys(table.root) == expected).all()
    # Another machine, which has read nothing yet.
    deleted._read.clear()
    assert (deleted.deleted_keys(table.root) == expected).all()
    take_down(table, Request(where="label = 3", allow_again=True))
    assert (deleted.deleted_keys(table.root) == expected).all()


def test_allow_again_lifts_what_was_deleted_before(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60)
    take_down(table, Request(where="label = 1"))
    version = Table.open(table.root.uri).version
    report = take_down(table, Request(ids=frozenset(names([11, 21, 7])), allow_again=True))
    assert (report.lifted, report.rows, report.version) == (2, 1, version + 1)
    left = deleted.example_keys(names([1, 31, 41, 51]))
    assert (deleted.deleted_keys(table.root) == left).all()
    report = take_down(table, Request(ids=frozenset(names([1, 31, 41, 51])), allow_again=True))
    assert (report.lifted, report.rows) == (4, 0)
    assert not len(deleted.deleted_keys(table.root))
    assert not list((tmp_path / "t" / deleted.FOLDER).iterdir())


def test_a_damaged_list_is_an_error(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60)
    take_down(table, Request(where="label = 1"))
    (path,) = (tmp_path / "t" / deleted.FOLDER).iterdir()
    data = bytearray(path.read_bytes())
    data[3] ^= 4
    path.write_bytes(data)
    deleted._read.clear()
    with pytest.raises(IntegrityError, match="list of deleted examples"):
        deleted.deleted_keys(table.root)


Racing = Callable[[Table], object]


def race(monkeypatch: pytest.MonkeyPatch, act: Racing) -> None:
    """`act` runs once right before the next change is committed."""
    honest = Table.change
    raced: list[bool] = []

    def racing(self: Table, *arguments: Any, **named: Any) -> Table:
        if not raced:
            raced.append(True)
            act(self)
        return honest(self, *arguments, **named)

    monkeypatch.setattr(Table, "change", racing)


def more_rows(folder: Path, table: Table, prefix: str) -> Callable[[Table], object]:
    """Commits 100 rows of another run, with ids that begin with `prefix`."""

    def add(_: Table) -> None:
        other = make_table(folder / f"other{prefix}", rows=100, seed=0, prefix=prefix)
        run_id = "f" * 64
        file = other.files[0]
        name = f"{run_id[:16]}-000000{file.path[len('data/') + 23 :]}"
        (folder / "t" / "data" / name).write_bytes(
            (folder / f"other{prefix}" / file.path).read_bytes()
        )
        unit = files.UnitShard(
            f"{run_id}/x", f"data/{name}", file.size, file.num_rows, file.statistics
        )
        from tests.tables import make_lineage

        table.commit([unit], make_lineage(run_id, [unit.key], file.num_rows))

    return add


def test_a_racing_capture_loses_nothing_and_its_matching_rows_go_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(tmp_path / "t", rows=100)
    race(monkeypatch, more_rows(tmp_path, table, "y"))
    report = take_down(table, Request(where="label = 4"))
    made = Table.open(table.root.uri)
    assert (report.rows, made.num_rows) == (20, 180)
    assert 4 not in rows_of(made)["label"].to_pylist()
    assert verify(made)["problems"] == []


def test_a_racing_delete_and_a_racing_compaction_are_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(tmp_path / "t", rows=300)
    rows = rows_of(table)
    with monkeypatch.context() as patch:
        race(patch, lambda _: take_down(table, Request(where="label = 5")))
        assert take_down(table, Request(where="label IN (4, 5)")).rows == 30
    left = without(rows, names([n for n in range(300) if n % 10 in (4, 5)]))
    assert rows_of(Table.open(table.root.uri)).equals(left)
    with monkeypatch.context() as patch:
        race(patch, lambda _: compact(table))
        assert take_down(table, Request(where="label = 6")).rows == 30
    made = Table.open(table.root.uri)
    assert rows_of(made).equals(without(left, names(range(6, 300, 10))))
    assert verify(made)["problems"] == []


def test_a_delete_during_a_compaction_is_not_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(tmp_path / "t", rows=300)
    rows = rows_of(table)
    race(monkeypatch, lambda _: take_down(table, Request(where="label = 5")))
    assert compact(table).made == 1
    left = without(rows, names(range(5, 300, 10)))
    assert rows_of(Table.open(table.root.uri)).equals(left)


def test_the_same_delete_twice_at_once_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(tmp_path / "t", rows=300)
    race(monkeypatch, lambda _: take_down(table, Request(where="label = 5")))
    take_down(table, Request(where="label = 5"))
    made = Table.open(table.root.uri)
    assert (made.version, made.num_rows) == (table.version + 1, 270)
    assert sum(c["change"] is not None for c in made.history()) == 1


def test_a_retry_takes_up_what_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(tmp_path / "t", rows=300)

    def stopped(*_: object, **__: object) -> None:
        raise TryAgainError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Table, "change", stopped)
        with pytest.raises(TryAgainError):
            take_down(table, Request(where="label = 5"))
    # The list is there before the rows are gone: nothing can come back in between.
    assert len(deleted.deleted_keys(table.root)) == 30
    stored = set(table.root.names(files.FOLDER))
    take_down(table, Request(where="label = 5"))
    assert set(table.root.names(files.FOLDER)) == stored


def test_a_damaged_file_is_not_given_a_new_checksum(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300)
    path = tmp_path / "t" / table.files[1].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for request in (Request(where="label = 5"), Request(ids=frozenset({"x00105"}))):
        with pytest.raises(IntegrityError, match=r"has sha256|cannot be read|damaged"):
            take_down(table, request)
    assert Table.open(table.root.uri).version == table.version
    assert take_down(table, Request(ids=frozenset({"x00005"}))).rows == 1


def test_a_rollback_brings_rows_back_and_their_keys_stay(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=60)
    take_down(table, Request(where="label = 5"))
    rollback(Table.open(f"{table.root.uri}@1"), deletions="bring back")
    made = Table.open(table.root.uri)
    assert made.num_rows == 60
    assert len(deleted.deleted_keys(table.root)) == 6
    first = Table.open(f"{table.root.uri}@2")
    again = take_down(table, Request(where="label = 5"))
    assert (again.rows, again.earlier) == (6, (2,))
    second = Table.open(table.root.uri)
    assert second.snapshot_digest == first.snapshot_digest
    # A file that vacuum may remove, being of an old version only, is not taken up.
    assert not {file.path for file in second.files} & {file.path for file in first.files}


def test_another_engine_reads_the_new_version(tmp_path: Path) -> None:
    import polars as pl

    from softlabels.query.view import query

    table = make_table(tmp_path / "t", rows=300)
    take_down(table, Request(where="label = 5"))
    assert pl.scan_delta(table.root.uri).collect().height == 270
    assert pl.scan_delta(table.root.uri, version=1).collect().height == 300
    assert query(table.root.uri, "SELECT count(*) AS n FROM labels").to_pylist() == [{"n": 270}]
    assert json.dumps(Table.open(table.root.uri).history()[0]["change"].model_dump(mode="json"))


def test_where_over_a_damaged_file_is_refused_and_never_answers_that_nothing_matches(
    tmp_path: Path,
) -> None:
    license = pa.array([f"license-{n:05d}" for n in range(300)])
    table = make_table(tmp_path / "t", rows=300, carried={"license": license})
    path = Path(table.root.full(table.files[0].path))
    data = bytearray(path.read_bytes())
    # In the page itself: its checksum is looked at by no SQL engine.
    column = pq.read_metadata(path).row_group(0)
    chunk = next(
        column.column(n)
        for n in range(column.num_columns)
        if column.column(n).path_in_schema == "license"
    )
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    for where in ("license = 'license-00007'", "license = 'license-00207'"):
        with pytest.raises(IntegrityError, match="sha256"):
            take_down(table, Request(where=where))
    # A file that no row of which can match is not asked.
    assert take_down(table, Request(where="label = 3 AND entropy < -1")).rows == 0


def test_ids_that_no_row_has_yet_are_not_labelled_later(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=30)
    report = take_down(table, Request(ids=frozenset({"x00003", "later"})))
    assert (report.rows, report.unknown) == (1, 1)
    assert set(deleted.deleted_keys(table.root)) == set(deleted.example_keys(["x00003", "later"]))
    report = take_down(table, Request(ids=frozenset({"later"}), allow_again=True))
    assert report.lifted == 1
    assert set(deleted.deleted_keys(table.root)) == set(deleted.example_keys(["x00003"]))


def test_files_of_no_version_that_hold_the_rows_are_told(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=300)
    path = Path(table.root.full(table.files[0].path))
    lost = path.with_name(path.name.replace("-000000-", "-000009-"))  # as of a lost race
    lost.write_bytes(path.read_bytes())
    report = take_down(table, Request(ids=frozenset({"x00007"})))
    assert report.holders is not None
    assert (report.holders.files, report.holders.uncommitted) == (1, 1)
    vacuum(Table.open(table.root.uri), Keep(retention=0, grace=0))
    assert not lost.exists()
    report = take_down(Table.open(table.root.uri), Request(ids=frozenset({"x00007"})))
    assert report.holders is not None
    assert (report.holders.files, report.holders.uncommitted) == (0, 0)

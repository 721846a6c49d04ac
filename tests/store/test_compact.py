"""Compaction of real tables: the same rows in the same order, few files, one new version."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError, IntegrityError, MismatchError, TryAgainError
from softlabels.query.mix import mix, pin
from softlabels.query.recipe import Recipe
from softlabels.schema import table_schema
from softlabels.store import compact as compacting
from softlabels.store import files, runs, shards, tags
from softlabels.store.compact import compact, plan_compaction
from softlabels.store.inspect import verify
from softlabels.store.samerows import RowsDigest
from softlabels.store.table import Table
from softlabels.student.files import Files
from tests.tables import dense_logprobs, make_contents, make_lineage, make_table, make_targets


def rows_of(table: Table) -> pa.Table:
    """All rows in the table's order."""
    return pa.Table.from_batches(list(table.batches()), table.schema)


def digest_of(table: Table) -> str:
    found = RowsDigest(table.schema)
    for batch in table.batches():
        found.add(batch)
    return found.result()


def add_run(table: Table, run: str, sizes: list[int], first: int = 0, skip: int = 0) -> Table:
    """Commits units of run `run` (one hex digit) with these numbers of rows, ids of its own."""
    run_id, schema = run * 64, table.schema
    units = []
    for number, rows in enumerate(sizes, start=first):
        dense = dense_logprobs(rows, table.contents.num_classes, seed=ord(run) * 1000 + number)
        made = shards.round_to_profile(
            make_targets(dense, table.contents.k, np.arange(rows) % 3), table.contents.profile
        )
        columns = made.columns() | {
            "example_id": pa.array([f"{run}{number:05d}-{row}" for row in range(rows)]),
            "view": pa.array(np.zeros(rows, np.int32)),
        }
        arrays = [columns[f.name] if f.name in columns else pa.nulls(rows, f.type) for f in schema]
        writer = shards.ShardWriter(schema, table.contents.profile)
        writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema))
        unit = f"{run_id[:16]}-{number:06d}"
        units.append(table.store_shard(f"{run_id}/{unit}", unit, writer.close()))
    lineage = make_lineage(run_id, [unit.key for unit in units], sum(sizes))
    return table.commit(units, lineage)


def empty(folder: Path, profile: shards.Profile = "precise") -> Table:
    contents = make_contents(k=3, classes=6, profile=profile)
    return Table.open_or_create(str(folder), table_schema(), contents)


@pytest.mark.parametrize("profile", ["precise", "compact"])
def test_many_runs_become_one_file_with_the_same_rows_in_the_same_order(
    tmp_path: Path, profile: shards.Profile
) -> None:
    table = empty(tmp_path / "t", profile)
    for run, sizes in (("b", [3, 1, 4]), ("0", [2, 2]), ("f", [5])):
        table = add_run(table, run, sizes)
    before, rows = table, rows_of(table)
    tags.make_tag(table.root, "v1", table.version, table.snapshot_digest)
    report = compact(table)
    made = Table.open(table.root.uri)
    assert (report.taken, report.made, report.version) == (6, 1, before.version + 1)
    assert [file.unit for file in made.files] == [f"{'0' * 16}-000000c"]
    assert rows_of(made).equals(rows)
    assert digest_of(made) == digest_of(before)
    assert verify(made) == {"files": 1, "rows": 17, "problems": []}
    assert made.snapshot_digest != before.snapshot_digest
    assert made.contents == before.contents
    # What was there is as it was.
    tagged = Table.open(f"{table.root.uri}@v1")
    assert tagged.snapshot_digest == before.snapshot_digest
    assert rows_of(tagged).equals(rows)
    change = made.history()[0]["change"]
    assert (change.operation, change.rows_before, change.rows_after) == ("compact", 17, 17)
    assert change.arguments["files_before"] == 6
    assert change.arguments["files_after"] == 1
    # The same bounds for whoever skips files.
    bounds = [file.bounds["entropy"] for file in before.files]
    assert made.files[0].bounds["entropy"] == (
        min(low for low, _ in bounds),
        max(high for _, high in bounds),
    )


def test_again_does_nothing_and_later_files_join(tmp_path: Path) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [2, 2, 2])
    first = compact(table)
    again = compact(table)
    assert (again.made, again.version) == (0, first.version)
    table = add_run(table.latest(), "c", [3, 3])
    rows = rows_of(table)
    third = compact(table)
    made = Table.open(table.root.uri)
    assert (third.taken, third.made) == (3, 1)
    assert rows_of(made).equals(rows)
    assert [file.unit for file in made.files] == [f"{'a' * 16}-000000c"]
    # A run whose files come before takes the first place.
    table = add_run(made, "1", [1])
    rows = rows_of(table)
    compact(table)
    made = Table.open(table.root.uri)
    assert [file.unit for file in made.files] == [f"{'1' * 16}-000000c"]
    assert rows_of(made).equals(rows)
    assert all(made.committed(f"{'a' * 64}/{'a' * 16}-{n:06d}") for n in range(3))


def test_files_come_near_the_target_and_large_ones_are_left(tmp_path: Path) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [1500] * 30)
    one = table.files[0].size
    table = add_run(table, "a", [15_000], first=30)
    table = add_run(table, "a", [1500, 1500, 1500], first=31)
    rows, large = rows_of(table), table.files[30]
    target = 9 * one
    assert large.size > target / 2
    plan = plan_compaction(table, target)
    report = compact(table, target)
    made = Table.open(table.root.uri)
    assert rows_of(made).equals(rows)
    assert large.path in {file.path for file in made.files}
    assert plan.taken == 33
    assert 31 <= report.taken <= 33  # one that would stay alone is let be
    assert abs(plan.made - report.made) <= 1
    sizes = [file.size for file in made.files if file.path != large.path]
    assert all(size <= 1.05 * target for size in sizes)
    assert all(size > 0.75 * target for size in sizes[:-2])
    assert report.made == len(sizes) < 7
    assert report.version == table.version + 1
    assert compact(made, target).made == 0


def test_row_groups_are_large(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=12_000, k=2, classes=3, shard_rows=400)
    compact(table)
    made = Table.open(table.root.uri)
    opened = shards.open_shard(made.root.buffer(made.files[0].path), "x")
    groups = [opened.metadata.row_group(n).num_rows for n in range(opened.num_row_groups)]
    assert sum(groups) == 12_000
    assert all(rows >= 5_000 for rows in groups[:-1])


def test_an_unfinished_capture_is_left_alone(tmp_path: Path) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [2, 2])
    table = add_run(table, "5", [2, 2])
    record = runs.RunRecord(
        run_id="5" * 64, units=3, rows=6, spec={}, source={}, started_at="2026-01-01T00:00:00Z"
    )
    runs.record_run(table.root, record)
    report = compact(table)
    assert (report.open_files, report.taken, report.made) == (2, 2, 1)
    names = [file.unit for file in Table.open(table.root.uri).files]
    assert names == [f"{'5' * 16}-000000", f"{'5' * 16}-000001", f"{'a' * 16}-000000c"]
    table = add_run(table.latest(), "5", [2], first=2)
    rows = rows_of(table)
    assert compact(table).made == 1
    assert rows_of(Table.open(table.root.uri)).equals(rows)


def test_a_file_that_was_changed_stops_it_and_nothing_is_committed(tmp_path: Path) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [200, 200])
    path = Path(table.root.uri) / table.files[1].path
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="has sha256"):
        compact(table)
    assert Table.open(table.root.uri).version == table.version


def test_rows_that_were_written_wrong_are_never_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [3, 3])
    honest = shards.ShardWriter.write

    def reversing(self: shards.ShardWriter, batch: pa.RecordBatch) -> None:
        honest(self, batch.take(pa.array(range(batch.num_rows))[::-1]))

    monkeypatch.setattr(shards.ShardWriter, "write", reversing)
    with pytest.raises(IntegrityError, match="rows were written that are not"):
        compact(table)
    assert Table.open(table.root.uri).version == table.version


def test_what_a_stopped_attempt_stored_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [2] * 6)

    def stopped(*_: object, **__: object) -> None:
        raise TryAgainError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Table, "change", stopped)
        with pytest.raises(TryAgainError):
            compact(table)
    stored = set(table.root.names(files.FOLDER))
    report = compact(table)
    assert (report.made, report.found) == (1, 1)
    assert set(table.root.names(files.FOLDER)) == stored


def test_a_capture_that_commits_meanwhile_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [2, 2])
    honest = Table.change
    raced: list[Table] = []

    def racing(self: Table, *arguments: object, **named: object) -> Table:
        if not raced:
            raced.append(add_run(table.latest(), "c", [4]))
        return honest(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Table, "change", racing)
    compact(table)
    made = Table.open(table.root.uri)
    assert [file.unit for file in made.files] == [f"{'a' * 16}-000000c", f"{'c' * 16}-000000"]
    assert made.num_rows == 8
    assert rows_of(made).equals(rows_of(raced[0]))


def test_a_file_that_comes_between_is_seen_and_order_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = add_run(add_run(empty(tmp_path / "t"), "a", [2, 2]), "c", [2])
    honest = Table.change
    raced: list[Table] = []

    def racing(self: Table, *arguments: object, **named: object) -> Table:
        if not raced:
            raced.append(add_run(table.latest(), "b", [4]))
        return honest(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Table, "change", racing)
    report = compact(table)
    made = Table.open(table.root.uri)
    assert (report.taken, report.made) == (4, 1)
    assert rows_of(made).equals(rows_of(raced[0]))


def test_the_same_compaction_by_two_at_once_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [2, 2, 2])
    rows, honest = rows_of(table), Table.change
    raced: list[bool] = []

    def racing(self: Table, *arguments: object, **named: object) -> Table:
        if not raced:
            raced.append(True)
            compact(table)
        return honest(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Table, "change", racing)
    assert compact(table).version == table.version + 1
    made = Table.open(table.root.uri)
    assert (made.version, len(made.files)) == (table.version + 1, 1)
    assert rows_of(made).equals(rows)


def test_another_change_of_the_same_files_has_it_planned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [1500] * 6)
    one, rows, honest = table.files[0].size, rows_of(table), Table.change
    raced: list[bool] = []

    def racing(self: Table, *arguments: object, **named: object) -> Table:
        if not raced:
            raced.append(True)
            compact(table, 4 * one)
        return honest(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Table, "change", racing)
    report = compact(table)
    made = Table.open(table.root.uri)
    assert (report.version, made.version, len(made.files)) == (3, 3, 1)
    assert rows_of(made).equals(rows)


def test_changed_all_the_time_it_gives_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [2, 2, 2])

    def lost(*_: object, **__: object) -> Table:
        raise MismatchError("it was changed meanwhile")

    monkeypatch.setattr(Table, "change", lost)
    with pytest.raises(MismatchError, match="changed meanwhile"):
        compact(table)


def test_much_is_committed_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [40] * 12)
    monkeypatch.setattr(compacting, "COMMIT_BYTES", 1)
    rows = rows_of(table)
    report = compact(table, 4 * table.files[0].size)
    made = Table.open(table.root.uri)
    assert made.version == table.version + report.made > table.version + 1
    assert rows_of(made).equals(rows)


@pytest.mark.parametrize("target", [0, -1, 3 * 10**9])
def test_a_target_that_cannot_be_meant_is_refused(tmp_path: Path, target: int) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [1, 1])
    with pytest.raises(BadInputError, match="target size"):
        compact(table, target)


def test_a_plan_made_before_reads_its_own_files(tmp_path: Path) -> None:
    table = add_run(empty(tmp_path / "t"), "a", [20, 20])
    recipe = Recipe.model_validate({"sources": {"a": {"table": table.root.uri}}})
    plan = mix(recipe)
    pin(plan)
    before = [(f.path, f.sha256) for f in plan.tables["a"].files]
    compact(table)
    opened = Files(plan)
    for path, _ in before:
        assert opened.read("a", path, 0, ["example_id"]).num_rows == 20
    # Its version is pinned by a tag, and so kept; a plan of the new one is another.
    assert any(tag.plan for tag in tags.all_tags(table.root))
    assert mix(recipe).fingerprint != plan.fingerprint

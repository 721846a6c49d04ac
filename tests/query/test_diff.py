"""Two versions compared: what is planted is found, and nothing else."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import DataError, MismatchError
from softlabels.lineage import ChangeLineage
from softlabels.query import diff as module
from softlabels.query.diff import diff
from softlabels.query.divergence import divergence
from softlabels.query.mixture import at_temperature
from softlabels.store import shards
from softlabels.store.compact import compact
from softlabels.store.rollback import rollback
from softlabels.store.table import Table
from tests.query.planted import Planted, log_softmax, make_planted
from tests.query.tables import reordered
from tests.sequences import make_uneven
from tests.tables import dense_logprobs, make_table, make_targets

ROWS = 900


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return make_planted(tmp_path_factory.mktemp("diff") / "a", rows=ROWS, k=4)


def test_a_table_and_itself_do_not_differ(tmp_path: Path, planted: Planted) -> None:
    order = np.random.default_rng(0).permutation(ROWS)
    for other in (planted.table, reordered(planted.table, tmp_path / "b", order)):
        found = diff(planted.table, other)
        assert found.rows().num_rows == 0
        assert found.summary["both"] == ROWS
        numbers = ("added", "removed", "other_positions", "relabelled", "top1_changed", "changed")
        assert [found.summary[name] for name in numbers] == [0] * 6
        assert (found.summary["kl_ab"], found.summary["kl_ba"]) == (0, 0)


def test_rows_of_one_file_are_not_read(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "targets_of", lambda *_: pytest.fail("rows were read"))
    assert diff(planted.table, Table.open(planted.table.root.uri)).rows().num_rows == 0


def test_each_planted_change_is_listed_once(tmp_path: Path, planted: Planted) -> None:
    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        """Of the rows in their new order: 10 to 12 get another label, 20 to 21 another top1."""
        columns = {name: batch[name].to_pylist() for name in batch.schema.names}
        for row in (10, 11, 12):
            other = (columns["label"][row] + 1) % 8
            columns["label"][row], columns["label_ids"][row] = other, [other]
        for row in (20, 21):
            ids = columns["topk_ids"][row]
            columns["topk_ids"][row] = [ids[1], ids[0], *ids[2:]]
            columns["top1_id"][row] = ids[1]
        names = batch.schema.names
        arrays = [pa.array(columns[n], batch[n].type) for n in names]
        return pa.RecordBatch.from_arrays(arrays, names=names)

    # Without the first 5 rows, in another order; 3 rows that A has not.
    kept = np.random.default_rng(1).permutation(np.arange(5, ROWS))
    more = make_planted(tmp_path / "more", rows=ROWS + 3, k=4)
    b = reordered(planted.table, tmp_path / "b", kept, change=change)
    new = reordered(more.table, tmp_path / "c", np.arange(ROWS, ROWS + 3))
    unit = f"{'e' * 16}-000000"
    shard = b.store_shard(f"x/{unit}", unit, shard_of(new))
    b = b.commit([shard], b.history()[0]["run"])

    found = diff(planted.table, b)
    said = found.summary
    assert (said["added"], said["removed"], said["both"]) == (3, 5, ROWS - 5)
    assert (said["relabelled"], said["top1_changed"], said["changed"]) == (3, 2, 5)
    rows = found.rows().to_pylist()
    by_change: dict[str, set[str]] = {}
    for row in rows:
        by_change.setdefault(row["change"], set()).add(row["example_id"])
    assert by_change == {
        "added": {f"x{i:05d}" for i in range(ROWS, ROWS + 3)},
        "removed": {f"x{i:05d}" for i in range(5)},
        "relabelled": {f"x{kept[i]:05d}" for i in (10, 11, 12)},
        "top1": {f"x{kept[i]:05d}" for i in (20, 21)},
    }
    # Worst first: those whose probabilities moved, then those of one side, without numbers.
    assert [row["change"] for row in rows[:2]] == ["top1"] * 2
    assert rows[0]["kl_ab"] + rows[0]["kl_ba"] >= rows[1]["kl_ab"] + rows[1]["kl_ba"] > 0
    relabelled = found.rows(only="relabelled").to_pylist()
    assert all((row["label_a"] + 1) % 8 == row["label_b"] for row in relabelled)
    assert all(row["kl_ab"] == 0 for row in relabelled)
    assert all(row["kl_ab"] is None and row["label_a"] is None for row in rows[-8:])
    assert found.rows(limit=2).num_rows == 2
    assert found.rows(limit=2, only="added").num_rows == 2
    # The other way round, what was added is removed.
    back = diff(b, planted.table)
    assert (back.summary["added"], back.summary["removed"]) == (5, 3)
    assert back.summary["kl_ab"] == pytest.approx(said["kl_ba"])
    classes = [row["top1_a"] for row in module.names_of(found, found.rows(limit=1))]
    assert classes[0] == f"class{rows[0]['top1_a']}"


def shard_of(table: Table) -> shards.Shard:
    """All rows of a table."""
    writer = shards.ShardWriter(table.schema, table.contents.profile)
    for batch in table.batches():
        writer.write(batch)
    return writer.close()


def test_whole_targets_give_the_dense_divergence(tmp_path: Path) -> None:
    a = make_planted(tmp_path / "a", rows=300, heat=1.5)
    b = make_planted(tmp_path / "b", rows=300, heat=1.0)
    logs, other = log_softmax(a.truth * 1.5), b.truth
    found = diff(a.table, b.table)
    assert found.summary["exact"]
    kl = (np.exp(logs) * (logs - other)).sum(1)
    back = (np.exp(other) * (other - logs)).sum(1)
    assert found.summary["kl_ab"] == pytest.approx(kl.mean(), rel=1e-3)
    assert found.summary["kl_ba"] == pytest.approx(back.mean(), rel=1e-3)
    rows = found.rows().to_pylist()
    at = [int(row["example_id"][1:]) for row in rows]
    assert [row["kl_ab"] for row in rows] == pytest.approx(kl[at], rel=0.02, abs=1e-4)
    both = np.array([row["kl_ab"] + row["kl_ba"] for row in rows])
    assert (np.diff(both) <= 0).all()
    assert abs(int(at[0]) - int(np.argmax(kl + back))) == 0


@pytest.mark.parametrize(("k", "other"), [(4, 4), (3, 6), (1, 8), (8, 8)])
def test_of_a_top_k_it_is_that_of_the_shared_ids_and_one_more_class(k: int, other: int) -> None:
    dense = [dense_logprobs(50, 8, seed) for seed in (0, 1)]
    stored = [make_targets(d, n) for d, n in zip(dense, (k, other), strict=True)]
    known = [at_temperature(t, 1.0) for t in stored]
    found = divergence(*known)
    for row in range(50):
        shared = sorted(set(stored[0].ids[row].tolist()) & set(stored[1].ids[row].tolist()))
        p, q = (np.exp(d[row][shared]) for d in dense)
        p, q = np.append(p, max(0, 1 - p.sum())), np.append(q, max(0, 1 - q.sum()))
        some = p > 1e-12
        expected = (p[some] * np.log(p[some] / q[some])).sum()
        assert found.kl_ab[row] == pytest.approx(expected, abs=1e-5)
    full = (np.exp(dense[0]) * (dense[0] - dense[1])).sum(1)
    assert (found.kl_ab <= full + 1e-5).all()
    assert found.exact.all() == (k == other == 8)


def test_sequences_are_compared_position_by_position(tmp_path: Path) -> None:
    a = make_uneven(tmp_path / "a", k=6, draws=0)
    b = make_uneven(tmp_path / "b", k=6, draws=0, seed=5)
    found = diff(a, b)
    # Other text under the same ids: nothing can be compared, and nothing is invented.
    assert found.summary["other_positions"] == found.summary["both"] == 40
    assert set(found.rows()["change"].to_pylist()) == {"positions"}
    assert found.rows()["kl_ab"].null_count == 40

    def heat(batch: pa.RecordBatch) -> pa.RecordBatch:
        """The last position of row 4 swaps its first two ids, and of row 7 has another label."""
        columns = {name: batch[name].to_pylist() for name in batch.schema.names}
        ids = columns["topk_ids"][4]
        ids[-6], ids[-5] = ids[-5], ids[-6]
        columns["label_ids"][7][-1] = 39 - columns["label_ids"][7][-1]
        names = batch.schema.names
        arrays = [pa.array(columns[n], batch[n].type) for n in names]
        return pa.RecordBatch.from_arrays(arrays, names=names)

    c = reordered(a, tmp_path / "c", np.arange(40), change=heat)
    rows = diff(a, c).rows().to_pylist()
    assert [(row["example_id"], row["change"]) for row in rows] == [
        ("s00004", "top1"),
        ("s00007", "relabelled"),
    ]
    first = rows[0]
    assert first["num_positions"] > 3
    assert first["worst_position"] == first["num_positions"] - 1
    assert first["top1_changes"] == 1
    assert first["worst_kl_ab"] == pytest.approx(first["kl_ab"] * first["num_positions"], rel=1e-4)
    assert first["kl_ab"] > 0
    assert rows[1]["relabelled"] == 1


def test_small_chunks_give_the_same(
    tmp_path: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_planted(tmp_path / "b", rows=ROWS, k=3, heat=1.3).table
    whole = diff(planted.table, other)
    monkeypatch.setattr(module, "CHUNK_VALUES", 200)
    parts = diff(planted.table, other)
    assert parts.summary == whole.summary
    assert parts.rows().equals(whole.rows())


def test_tables_that_do_not_fit_are_refused_with_both_values(
    tmp_path: Path, planted: Planted
) -> None:
    other = make_planted(tmp_path / "b", rows=100, classes=5)
    with pytest.raises(MismatchError, match=r"num_classes differs: table 'a' has 8.* has 5"):
        diff(planted.table, other.table)


def test_an_example_that_is_there_twice_is_refused(tmp_path: Path, planted: Planted) -> None:
    twice = reordered(planted.table, tmp_path / "b", np.array([1, 2, 2, 3]))
    with pytest.raises(DataError, match="'x00002' twice"):
        diff(planted.table, twice)


def test_what_excludes_a_class_is_infinitely_far(tmp_path: Path) -> None:
    a = make_planted(tmp_path / "a", rows=50, classes=4)

    def certain(batch: pa.RecordBatch) -> pa.RecordBatch:
        """Every row gives all its mass to its first class."""
        n = batch.num_rows
        place = {name: batch.schema.get_field_index(name) for name in ("topk_logprobs", "topk_ids")}
        logprobs = pa.array([[0.0, -np.inf, -np.inf, -np.inf]] * n, batch["topk_logprobs"].type)
        ids = [[row[0], -1, -1, -1] for row in batch["topk_ids"].to_pylist()]
        batch = batch.set_column(place["topk_logprobs"], "topk_logprobs", logprobs)
        return batch.set_column(
            place["topk_ids"], "topk_ids", pa.array(ids, batch["topk_ids"].type)
        )

    b = reordered(a.table, tmp_path / "b", np.arange(50), change=certain)
    found = diff(a.table, b)
    assert found.summary["infinite"] == 50
    assert found.summary["kl_ab"] == 0
    assert np.isinf(found.rows()["kl_ab"].to_numpy()).all()
    assert np.isfinite(found.rows()["kl_ba"].to_numpy()).all()


def test_versions_of_one_table_after_delete_compact_and_rollback(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=90, shard_rows=30)
    lineage = ChangeLineage(
        operation="delete",
        change_id="d" * 64,
        from_version=1,
        rows_before=90,
        rows_after=60,
        packages={},
        started_at="2026-01-01T00:00:00+00:00",
        seconds=0.0,
    )
    table.change([], table.files[:1], lineage)
    compact(table)
    rollback(Table.open(f"{tmp_path / 't'}@1"))
    assert [len(Table.open(f"{tmp_path / 't'}@{v}").files) for v in (1, 2, 3, 4)] == [3, 2, 1, 3]

    def counts(a: int, b: int) -> tuple[int, int, int, int]:
        found = diff(f"{tmp_path / 't'}@{a}", f"{tmp_path / 't'}@{b}").summary
        assert (found["kl_ab"], found["relabelled"], found["top1_changed"]) == (0, 0, 0)
        return found["both"], found["added"], found["removed"], found["changed"]

    assert counts(1, 2) == (60, 0, 30, 0)
    assert counts(2, 3) == (60, 0, 0, 0), "other files, the same rows"
    assert counts(3, 4) == (60, 30, 0, 0)
    assert counts(1, 4) == (90, 0, 0, 0)
    gone = diff(f"{tmp_path / 't'}@1", f"{tmp_path / 't'}@3").rows()
    assert sorted(gone["example_id"].to_pylist()) == [f"x{i:05d}" for i in range(30)]
    assert set(gone["change"].to_pylist()) == {"removed"}

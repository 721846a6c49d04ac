"""Relations against the numbers that went in."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError, IntegrityError, StorageError
from softlabels.query.lazy import scan
from softlabels.query.view import query
from softlabels.store import shards
from softlabels.store.table import Table
from tests.query.sequences import COUNTS, IDS, LABELS, PROBS, far, make_sequences
from tests.store.markov import make_language
from tests.tables import dense_logprobs, make_table, make_targets


def test_labels_are_the_rows_of_the_table(tmp_path: Path) -> None:
    table = make_table(
        tmp_path / "t", temperatures=[2.0], carried={"domain": pa.array(["a"] * 300)}
    )
    found = query(table, "SELECT * FROM labels ORDER BY example_id")
    assert found.column_names == table.schema.names
    written = pa.Table.from_batches(table.batches()).sort_by("example_id")
    assert found.to_pylist() == written.to_pylist()


def test_entries_hold_each_stored_id_with_its_rescaled_probability(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=120, k=4, classes=9, shard_rows=50)
    dense = dense_logprobs(120, 9)
    stored = shards.round_to_profile(make_targets(dense, 4), "precise")
    found = query(table, "SELECT * FROM entries ORDER BY example_id, rank")
    assert stored.tail is not None
    head = np.exp(stored.logprobs.astype(np.float64))
    probs = (
        head / head.sum(1, keepdims=True) * (1 - np.exp(stored.tail.astype(np.float64)))[:, None]
    )
    assert found["id"].to_pylist() == stored.ids.ravel().tolist()
    assert found["rank"].to_pylist() == [0, 1, 2, 3] * 120
    assert found["logprob"].to_pylist() == stored.logprobs.ravel().tolist()
    np.testing.assert_allclose(found["prob"].to_pylist(), probs.ravel(), rtol=1e-6)
    # Rescaling brings the rounded head back to the true one.
    truth = np.take_along_axis(np.exp(dense), stored.ids, 1)
    np.testing.assert_allclose(probs, truth, rtol=3e-3)


def test_positions_unfold_rows_and_hide_what_is_not_there(tmp_path: Path) -> None:
    table = make_sequences(tmp_path / "t")
    found = query(table, "SELECT * FROM positions ORDER BY example_id, position").to_pydict()
    assert found["example_id"] == ["s0", "s0", "s2", "s2", "s2", "s3"]
    assert found["view"] == [0, 0, 1, 1, 1, 0]
    assert found["position"] == [0, 1, 0, 1, 2, 0]
    assert found["entropy"] == [0, 0.25, 0.5, 0.75, 1, 1.25]
    assert found["label_id"] == [None if i < 0 else i for i in LABELS.tolist()]
    assert found["label_rank"] == [None if i < 0 else 1 for i in LABELS.tolist()]
    assert found["label_logprob"] == [None if i < 0 else -1.5 for i in LABELS.tolist()]
    assert found["top1_id"] == IDS[:, 0].tolist()
    np.testing.assert_allclose(found["top1_prob"], PROBS[:, 0], rtol=1e-6)
    np.testing.assert_allclose(found["tail_prob"], 1 - PROBS.sum(1), atol=1e-7)
    assert found["tail_logprob"][1] == -np.inf


def test_positions_of_sequences_name_their_token_and_segment(tmp_path: Path) -> None:
    table = make_language(tmp_path / "t", rows=6, length=12, documents=3)
    found = query(table, "SELECT * FROM positions ORDER BY example_id, position").to_pylist()
    wanted = [
        (row["input_ids"][at], row["segment_ids"][at], row["input_ids"][at + 1])
        for row in pa.Table.from_batches(table.batches()).to_pylist()
        for at in row["position_index"]
    ]
    assert [(f["token_id"], f["segment"], f["label_id"]) for f in found] == wanted
    assert len(wanted) == 6 * 9
    whole = make_language(tmp_path / "u", rows=6, length=12)
    found = query(whole, "SELECT count(token_id) AS n, count(segment) AS m FROM positions")
    assert found.to_pylist() == [{"n": 6 * 11, "m": 0}]


def test_positions_of_classification_have_no_token(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=20)
    found = query(table, "SELECT token_id, segment FROM positions")
    assert found["token_id"].null_count == found["segment"].null_count == 20


def test_entries_are_position_major_without_padding(tmp_path: Path) -> None:
    table = make_sequences(tmp_path / "t")
    found = query(table, "SELECT * FROM entries ORDER BY example_id, position, rank").to_pydict()
    names = np.repeat(["s0", "s1", "s2", "s3"], COUNTS)
    position = np.concatenate([np.arange(c) for c in COUNTS])
    used = IDS >= 0
    assert found["id"] == IDS[used].tolist()
    assert found["example_id"] == np.repeat(names, used.sum(1)).tolist()
    assert found["position"] == np.repeat(position, used.sum(1)).tolist()
    np.testing.assert_allclose(found["prob"], PROBS[used], rtol=1e-6)


def test_without_a_known_tail_probabilities_are_as_stored(tmp_path: Path) -> None:
    table = make_sequences(tmp_path / "t", known_tail=False)
    found = query(table, "SELECT prob FROM entries ORDER BY example_id, position, rank")
    np.testing.assert_allclose(found["prob"].to_pylist(), PROBS[IDS >= 0], rtol=1e-6)
    positions = query(table, "SELECT entropy, tail_prob FROM positions")
    assert positions.num_rows == 6
    assert positions["tail_prob"].null_count == positions["entropy"].null_count == 6


def test_classes_name_ids_where_the_label_space_is_known(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", classes=10)
    found = query(table, "SELECT * FROM classes ORDER BY id").to_pydict()
    assert found == {"id": list(range(10)), "name": [f"class{i}" for i in range(10)]}
    with pytest.raises(BadInputError, match="there is no relation 'classes'"):
        query(make_sequences(tmp_path / "s"), "SELECT * FROM classes")


def test_several_tables_have_names(tmp_path: Path) -> None:
    tables: dict[str, str | Table] = {
        "one": make_table(tmp_path / "1", seed=1),
        'two "2"': str(make_table(tmp_path / "2", seed=2).root.uri),
    }
    found = query(
        tables,
        'SELECT count(*) AS n FROM one.labels a JOIN "two ""2""".labels b USING (example_id) '
        "WHERE a.top1_id = b.top1_id",
    )
    agree = dense_logprobs(300, 10, 1).argmax(1) == dense_logprobs(300, 10, 2).argmax(1)
    assert found["n"].to_pylist() == [agree.sum()]


def test_a_version_shows_its_own_files_only(tmp_path: Path) -> None:
    first = make_table(tmp_path / "t", seed=0, rows=100)
    make_table(tmp_path / "t", seed=0, rows=100)  # same keys: nothing is added
    (tmp_path / "t" / "data" / "stray.parquet").write_bytes(b"not in the log")
    assert query(f"{first.root.uri}@1", "SELECT count(*) AS n FROM labels")["n"].to_pylist() == [
        100
    ]
    assert query(f"{first.root.uri}@0", "SELECT * FROM labels").num_rows == 0
    assert query(f"{first.root.uri}@0", "SELECT * FROM entries").num_rows == 0


@pytest.mark.parametrize(
    ("folder", "matched"),
    [("a[1]", "a1"), ("c*d", "cXd"), ("e?", "e1"), ("f{1,2}", "f1"), ("b=2", "b"), ("it's", "it")],
)
def test_odd_folder_names_are_no_patterns(tmp_path: Path, folder: str, matched: str) -> None:
    table = make_table(tmp_path / folder, rows=50)
    shutil.copytree(tmp_path / folder, tmp_path / matched)
    found = query(table, "SELECT * FROM labels")
    assert found.num_rows == 50
    assert found.column_names == table.schema.names
    assert scan(table).collect().height == 50


def test_a_table_behind_a_link_is_read(tmp_path: Path) -> None:
    make_table(tmp_path / "t", rows=50)
    (tmp_path / "link").symlink_to(tmp_path / "t")
    assert query(str(tmp_path / "link"), "SELECT * FROM labels").num_rows == 50


@pytest.mark.parametrize("where", [-1, -5, -20, -300])
def test_a_damaged_footer_is_no_mistake_of_the_query(tmp_path: Path, where: int) -> None:
    table = make_table(tmp_path / "t")
    path = tmp_path / "t" / table.files[1].path
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)
    for read in (lambda: query(table, "SELECT 1 FROM labels"), lambda: scan(table)):
        with pytest.raises(IntegrityError, match=f"{table.files[1].path}.*its footer is not"):
            read()


def test_a_page_that_cannot_be_decoded_is_no_mistake_of_the_query(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t")
    path = tmp_path / "t" / table.files[1].path
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="softlabels verify") as caught:
        query(table, "SELECT * FROM labels")
    assert "\n" not in str(caught.value)


def test_a_table_cannot_have_the_name_of_a_schema_of_duckdb(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=10)
    with pytest.raises(BadInputError, match="'main' is DuckDB's own"):
        query({"main": table}, "SELECT 1")


def test_a_changed_or_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t")
    path = tmp_path / "t" / table.files[1].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=f"{table.files[1].path}.*the log says"):
        query(table, "SELECT 1 FROM labels")
    path.unlink()
    with pytest.raises(StorageError, match=table.files[1].path):
        query(table, "SELECT 1 FROM labels")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT example_id, entropy FROM labels ORDER BY ALL",
        "SELECT count(*) AS n FROM labels",
        "SELECT * FROM positions ORDER BY ALL",
        "SELECT id, sum(prob) AS mass FROM entries GROUP BY id ORDER BY id",
        "SELECT l.example_id, e.prob FROM labels l JOIN entries e USING (example_id) ORDER BY ALL",
        "SELECT labels.* FROM labels ORDER BY example_id",
        "SELECT labels FROM labels ORDER BY labels.example_id",
        "SELECT l FROM labels l ORDER BY l.example_id",
        "SELECT count(a.label) AS n FROM labels a JOIN labels b USING (example_id)",
        "SELECT count(a.label) AS n FROM labels a NATURAL JOIN (SELECT example_id FROM labels) b",
        "SELECT label AS a FROM labels ORDER BY a",
        "SELECT COLUMNS('^top1') FROM labels ORDER BY ALL",
        "SELECT count(*) AS n FROM (PIVOT labels ON label IN (1, 2) USING count(*))",
        "SELECT name, count(*) AS n FROM classes JOIN labels ON id = label GROUP BY 1 ORDER BY 1",
    ],
)
def test_far_tables_answer_as_near_ones(tmp_path: Path, sql: str) -> None:
    table = make_table(tmp_path / "t", rows=60, shard_rows=25)
    assert query(far(table), sql).to_pylist() == query(table, sql).to_pylist()


def test_an_unknown_column_suggests_the_nearest_on_one_line(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=10)
    with pytest.raises(BadInputError, match=r'"labl" not found.*"label"') as caught:
        query(table, "SELECT labl FROM labels")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInputError, match=r"'lables'.*did you mean 'labels'\?"):
        query(table, "SELECT label FROM lables")

"""Macros over rows against numpy in float64."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from softlabels.errors import BadInputError
from softlabels.query.view import query
from softlabels.store.table import Table
from tests.query.sequences import IDS, PROBS, far, make_sequences
from tests.query.tables import reordered
from tests.tables import dense_logprobs, make_table

CLASSES = 9
ROWS = 80
Row = dict[str, object]


def stored(table: Table) -> list[dict[int, float]]:
    """Head probabilities of each row by id, rescaled to 1 - exp(tail), by row."""
    found = []
    for row in pa.Table.from_batches(table.batches()).sort_by("example_id").to_pylist():
        head = np.exp(np.array(row["topk_logprobs"], np.float64))
        tail = np.exp(np.float64(row["tail_logprob"][0]))
        scaled = head * (1 - tail) / head.sum()
        found.append(dict(zip(row["topk_ids"], scaled.tolist(), strict=True)))
    return found


def divergence(a: dict[int, float], b: dict[int, float]) -> float:
    """KL over the ids of both and one class for the rest."""
    shared = sorted(a.keys() & b.keys())
    p = np.array([a[i] for i in shared] + [1 - sum(a[i] for i in shared)])
    q = np.array([b[i] for i in shared] + [1 - sum(b[i] for i in shared)])
    p, q = np.maximum(p, 0), np.maximum(q, 0)
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    folder = tmp_path_factory.mktemp("macros")
    return {
        "a": make_table(folder / "a", rows=ROWS, k=4, classes=CLASSES, seed=1),
        "b": make_table(folder / "b", rows=ROWS, k=6, classes=CLASSES, seed=2, profile="compact"),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: make_table(folder / name, rows=ROWS, k=CLASSES, classes=CLASSES, seed=seed)
        for seed, name in enumerate("ab")
    }


BOTH = "FROM a.{0} a JOIN b.{0} b USING (example_id) ORDER BY example_id"


@pytest.mark.parametrize("relation", ["labels", "positions"])
def test_prob_of_is_the_heads_the_labels_or_unknown(pair: dict[str, Table], relation: str) -> None:
    table = pair["a"]
    rows = query(
        table,
        "SELECT range AS id, prob_of(l, range) AS p "
        f"FROM {relation} l, range({CLASSES + 1}) ORDER BY l.example_id, id",
    ).to_pylist()
    heads = stored(table)
    dense = np.exp(dense_logprobs(ROWS, CLASSES, 1))
    outside = 0
    for number, row in enumerate(rows):
        example, label = number // (CLASSES + 1), number // (CLASSES + 1) % CLASSES
        if row["id"] in heads[example]:
            assert row["p"] == pytest.approx(heads[example][row["id"]], rel=1e-12)
        elif row["id"] == label:
            outside += 1
            assert row["p"] == pytest.approx(dense[example, label], rel=1e-2)
        else:
            assert row["p"] is None
    assert 10 < outside < 70


def test_prob_of_knows_that_nothing_is_outside_a_whole_head(whole: dict[str, Table]) -> None:
    found = query(whole["a"], f"SELECT prob_of(labels, {CLASSES}) AS p FROM labels")
    assert found["p"].to_pylist() == [0.0] * ROWS
    for none in ("-1", "NULL", "nullif(label, label)"):
        found = query(whole["a"], f"SELECT prob_of(l, {none}) AS p FROM labels l")
        assert found["p"].null_count == ROWS


@pytest.mark.parametrize("relation", ["labels", "positions"])
def test_margin_and_agree(pair: dict[str, Table], relation: str) -> None:
    sql = f"SELECT margin(a) AS m, agree(a, b) AS same {BOTH.format(relation)}"
    found = query(dict(pair), sql).to_pydict()
    for row, head in enumerate(stored(pair["a"])):
        first, second = sorted(head.values(), reverse=True)[:2]
        assert found["m"][row] == pytest.approx(first - second, abs=1e-12)
    a, b = (dense_logprobs(ROWS, CLASSES, seed).argmax(1) for seed in (1, 2))
    assert found["same"] == (a == b).tolist()
    assert 0 < sum(found["same"]) < ROWS


def test_margin_needs_two_ids(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=5, k=1)
    assert query(table, "SELECT margin(l) AS m FROM labels l")["m"].null_count == 5


@pytest.mark.parametrize("relation", ["labels", "positions"])
@pytest.mark.parametrize("order", ["a, b", "b, a"])
def test_kl_is_that_of_shared_ids_and_the_rest(
    pair: dict[str, Table], relation: str, order: str
) -> None:
    found = query(dict(pair), f"SELECT kl({order}) AS kl {BOTH.format(relation)}")["kl"]
    heads = [stored(pair[name]) for name in order.split(", ")]
    wanted = [divergence(a, b) for a, b in zip(*heads, strict=True)]
    np.testing.assert_allclose(found.to_pylist(), wanted, rtol=1e-9, atol=1e-12)
    dense = [dense_logprobs(ROWS, CLASSES, {"a": 1, "b": 2}[n]) for n in order.split(", ")]
    full = (np.exp(dense[0]) * (dense[0] - dense[1])).sum(1)
    # Rounding to the compact profile's levels aside.
    assert (np.array(wanted) <= full + 0.02).all()
    assert np.mean(wanted) < 0.95 * full.mean()


def test_kl_is_exact_where_every_id_is_stored(whole: dict[str, Table]) -> None:
    found = query(dict(whole), f"SELECT kl(a, b) AS kl, kl(a, a) AS same {BOTH.format('labels')}")
    a, b = (dense_logprobs(ROWS, CLASSES, seed) for seed in (0, 1))
    full = (np.exp(a) * (a - b)).sum(1)
    np.testing.assert_allclose(found["kl"].to_pylist(), full, rtol=2e-3)
    assert found["same"].to_pylist() == [0.0] * ROWS


def test_kl_between_positions_with_padding_and_ids_without_mass(tmp_path: Path) -> None:
    tables = {"a": make_sequences(tmp_path / "a"), "b": make_sequences(tmp_path / "b")}
    found = query(
        tables,
        "SELECT kl(a, b) AS kl FROM a.positions a, b.positions b "
        "ORDER BY a.example_id, a.position, b.example_id, b.position",
    )["kl"].to_pylist()
    heads = [
        {i: p for i, p in zip(ids, probs, strict=True) if i >= 0}
        for ids, probs in zip(IDS.tolist(), PROBS.tolist(), strict=True)
    ]
    with np.errstate(divide="ignore"):
        wanted = [divergence(a, b) for a in heads for b in heads]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    assert 0 < np.isinf(wanted).sum() < 10
    assert (np.array(wanted) == 0).sum() > 6


def test_kl_is_not_known_without_a_tail(tmp_path: Path) -> None:
    unknown = make_sequences(tmp_path / "c", known_tail=False)
    rows = query(unknown, "SELECT kl(p, p) AS kl, margin(p) AS m FROM positions p")
    assert rows["kl"].null_count == rows.num_rows == 6
    assert rows["m"].null_count == 0


@pytest.mark.parametrize("call", ["prob_of(l, 3)", "margin(l)", "kl(l, l)"])
def test_rows_of_several_distributions_are_refused(tmp_path: Path, call: str) -> None:
    table = make_sequences(tmp_path / "t", known_tail=call != "margin(l)")
    with pytest.raises(BadInputError, match="take rows of positions") as caught:
        query(table, f"SELECT {call} FROM labels l")
    assert "\n" not in str(caught.value)
    assert query(table, f"SELECT {call} FROM positions l").num_rows == 6


def test_macros_work_on_far_tables_subqueries_and_the_relations_own_name(
    pair: dict[str, Table],
) -> None:
    near, distant = pair["a"], far(pair["a"])
    for sql in (
        "SELECT prob_of(labels, 3) AS p FROM labels ORDER BY example_id",
        "SELECT prob_of(t, 3) AS p FROM (FROM labels WHERE label < 5) t ORDER BY example_id",
        "WITH t AS (FROM positions) SELECT kl(t, t) AS p FROM t ORDER BY example_id",
        "SELECT max(margin(positions)) AS p FROM positions",
    ):
        assert query(near, sql).to_pylist() == query(distant, sql).to_pylist()


def test_a_macro_reads_only_the_columns_it_needs(pair: dict[str, Table]) -> None:
    from softlabels.query.view import Session

    with Session({"": pair["a"]}) as session:
        plan = session.run("EXPLAIN SELECT avg(prob_of(l, 3)) FROM labels l")
    text = plan.to_pylist()[0]["explain_value"]
    read = text[text.rindex("Projections:") :]
    assert "topk_ids" in read
    for column in ("sampled_ids", "position_entropy", "input_ids", "example_id"):
        assert column not in read


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT margin(c) FROM classes c",
        "SELECT prob_of(label, 3) FROM labels",
        "SELECT agree(l, e) FROM labels l, entries e",
        "SELECT kl(t, t) FROM (SELECT topk_ids FROM labels) t",
    ],
)
def test_what_is_no_row_is_said(pair: dict[str, Table], sql: str) -> None:
    with pytest.raises(BadInputError, match="take rows: the name or alias of `labels`"):
        query(pair["a"], sql)


def test_a_tail_that_is_no_number_is_not_known(tmp_path: Path) -> None:
    plain = make_table(tmp_path / "p", rows=10, k=3, classes=CLASSES)

    def unknown(batch: pa.RecordBatch) -> pa.RecordBatch:
        place = batch.schema.get_field_index("tail_logprob")
        field = batch.schema.field(place)
        return batch.set_column(place, field, pa.array([[float("nan")]] * 10, field.type))

    table = reordered(plain, tmp_path / "t", np.arange(10), change=unknown)
    for relation in ("labels", "positions"):
        sql = (
            f"SELECT kl(a, b) AS kl, kl(b, a) AS lk, margin(a) AS margin, prob_of(a, a.top1_id) "
            f"AS top {BOTH.format(relation)}"
        )
        rows = query({"a": table, "b": plain}, sql).to_pylist()
        assert [(row["kl"], row["lk"]) for row in rows] == [(None, None)] * 10
        assert all(0 <= row["margin"] <= row["top"] <= 1 for row in rows)

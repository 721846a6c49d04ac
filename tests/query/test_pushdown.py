"""Whole queries leave files out only where that changes nothing; those are not touched."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from softlabels.errors import BadInputError, StorageError
from softlabels.query.pushdown import needed_files
from softlabels.query.sql import check_query
from softlabels.query.view import Session, query
from softlabels.store.table import Table
from tests.query.sequences import make_sequences
from tests.store.markov import make_language
from tests.tables import make_table

RELATIONS = ["labels", "positions", "entries", "classes"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Four files; row i has label i, so that they hold labels 0–9, 10–19, 20–29 and 30–39."""
    folder = tmp_path_factory.mktemp("pushdown")
    return make_table(folder / "t", rows=40, classes=40, k=3, shard_rows=10, row_group_rows=5)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """As `table`, of another teacher, with 20 rows of 40 classes in two files."""
    folder = tmp_path_factory.mktemp("pushdown")
    return make_table(folder / "u", rows=20, classes=40, k=3, shard_rows=10, seed=1)


@pytest.fixture(scope="module")
def everything(table: Table) -> Iterator[Session]:
    """All files of `table`, all columns."""
    with Session({"": table}) as session:
        yield session


def kept(sql: str, **tables: Table) -> dict[str, list[int]]:
    """Places of the files that a query needs; "one" stands for the table without a name."""
    named = {"" if name == "one" else name: table for name, table in tables.items()}
    relations = [f"{name}.{kind}" if name else kind for name in named for kind in RELATIONS]
    found = needed_files(check_query(sql, [*relations, "meta"]), named)
    return {
        name or "one": [named[name].files.index(file) for file in files]
        for name, files in found.items()
    }


ALL = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sql", "files"),
    [
        ("SELECT count(*) FROM labels WHERE label = 15", [1]),
        ("SELECT count(*) FROM labels l WHERE l.label BETWEEN 8 AND 11", [0, 1]),
        ("SELECT count(*) FROM labels AS L WHERE l.LABEL > 25 AND entropy > -1", [2, 3]),
        ("SELECT count(*) FROM labels WHERE labels.label IN (3, 33)", [0, 3]),
        ("SELECT count(*) FROM labels WHERE label < 10 OR label >= 35", [0, 3]),
        ("SELECT count(*) FROM labels WHERE label = 99", []),
        ('SELECT count(*) FROM "LABELS" WHERE "Label" = 5', [0]),
        ("FROM labels WHERE label = 15 ORDER BY ALL LIMIT 1", [1]),
        ("SELECT label, count(*) AS n FROM labels WHERE label < 3 GROUP BY 1 ORDER BY 1", [0]),
        ("SELECT example_id FROM positions WHERE label_id = 15", [1]),
        ("SELECT count(*) FROM positions p WHERE p.entropy < 0", []),
        ("SELECT count(*) FROM entries WHERE view = 1", []),
        ("SELECT count(*) FROM entries WHERE view = 0", ALL),
        # Inside other queries.
        ("SELECT * FROM (FROM labels WHERE label = 15) t WHERE label < 30", [1]),
        ("WITH t AS (FROM labels WHERE label = 15) SELECT count(*) FROM t a, t b", [1]),
        ("SELECT (SELECT max(entropy) FROM labels WHERE label = 15)", [1]),
        ("SELECT 1 WHERE EXISTS (FROM labels WHERE label = 15)", [1]),
        (
            "SELECT count(*) FROM classes WHERE id IN (SELECT label FROM labels WHERE label < 9)",
            [0],
        ),
        # Several readers: what any of them needs.
        (
            "FROM labels WHERE label = 15 UNION ALL FROM labels WHERE label = 35 ORDER BY ALL",
            [1, 3],
        ),
        (
            "SELECT count(*) FROM labels WHERE label = 15 UNION SELECT count(*) FROM labels "
            "ORDER BY 1",
            ALL,
        ),
        (
            "SELECT count(*) FROM labels a JOIN labels b USING (example_id) "
            "WHERE a.label = 15 AND b.label < 20",
            [0, 1],
        ),
        (
            "SELECT count(*) FROM labels WHERE label = 15 AND entropy > (SELECT avg(entropy) "
            "FROM labels WHERE label = 25)",
            [1, 2],
        ),
        ("SELECT count(*) FROM labels l, entries e WHERE l.label = 15", ALL),
        # Joins.
        ("SELECT count(*) FROM labels JOIN classes ON id = label WHERE label = 15", [1]),
        ("SELECT count(*) FROM labels JOIN classes ON id = label WHERE id = 15", ALL),
        ("SELECT count(*) FROM classes LEFT JOIN labels l ON id = l.label WHERE l.label = 15", [1]),
        (
            "SELECT count(*) FROM classes FULL JOIN labels l ON id = l.label WHERE l.label < 15",
            [0, 1],
        ),
        ("SELECT count(*) FROM labels SEMI JOIN classes ON id = label WHERE label = 15", [1]),
        ("SELECT count(*) FROM classes ANTI JOIN labels ON id = label WHERE id = 15", ALL),
        ("SELECT count(*) FROM labels, range(3) r WHERE labels.label = 15", [1]),
        # A reader without a WHERE, none at all.
        ("SELECT count(*) FROM labels", ALL),
        ("SELECT 1", []),
        ("SELECT name FROM classes WHERE id = 3", []),
    ],
)
def test_files_that_cannot_matter_are_left_out(
    table: Table, everything: Session, sql: str, files: list[int]
) -> None:
    assert kept(sql, one=table) == {"one": files}
    check_same(table, everything, sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM labels WHERE NOT label = 15",
        "SELECT count(*) FROM labels WHERE label = 15 OR entropy > 0",
        "SELECT count(*) FROM labels WHERE label = 15 IS NOT TRUE",
        "SELECT count(*) FROM labels WHERE label + 0 = 15",
        "SELECT count(*) FROM labels WHERE coalesce(label, 15) = 15",
        "SELECT count(*) FROM labels HAVING max(label) > 15",
        "SELECT example_id FROM labels QUALIFY row_number() OVER (ORDER BY label) = 1",
        "SELECT count(*) FILTER (WHERE label = 15) FROM labels",
        "SELECT count(*) FROM (FROM labels) t WHERE t.label = 15",
        "SELECT count(*) FROM classes LEFT JOIN labels l ON id = l.label AND l.label = 15",
        "SELECT count(*) FROM classes LEFT JOIN labels l ON id = l.label WHERE l.label IS NULL",
        # A name that is not certainly the table's column.
        "SELECT 15 - label AS label FROM labels WHERE label = 15",
        "SELECT count(*) FROM labels l(a, label) WHERE l.label = 0",
        "SELECT count(*) FROM positions p(a, b, label_id) WHERE label_id = 0",
        "SELECT (SELECT count(*) FROM classes ANTI JOIN labels l ON id = l.label - 20 "
        "WHERE label = 15) FROM (SELECT 15 AS label) t",
        "SELECT count(*) FROM labels, (SELECT 15 AS id) WHERE label > id",
        "SELECT count(*) FROM labels l, (SELECT 15 AS x) u WHERE u.x = 15",
        "SELECT (SELECT count(*) FROM labels WHERE t.label = 15) FROM (SELECT 15 AS label) t",
        "WITH labels AS (SELECT 15 AS label) SELECT count(*) FROM labels WHERE label = 15",
        "SELECT (WITH labels AS (SELECT 7 AS label) SELECT sum(label) FROM labels WHERE label = 7) "
        "+ count(*) FROM labels",
        "SELECT count(*) FROM (labels l JOIN classes c ON c.id = l.label) WHERE label IS NOT NULL",
        # Rows are counted before WHERE.
        "SELECT count(*) FROM labels POSITIONAL JOIN (SELECT unnest(range(40)) AS n) r "
        "WHERE labels.label = 15 AND n = 15",
        "SELECT count(*) FROM classes ASOF JOIN labels l ON id >= l.label WHERE l.label = 15",
        "SELECT count(*) FROM (labels TABLESAMPLE 100 ROWS) WHERE label = 15",
        "SELECT count(*) FROM labels TABLESAMPLE 100 ROWS WHERE label = 15",
        "SELECT count(*) FROM labels WHERE label = 15 USING SAMPLE 40 ROWS",
        "SELECT count(*) FROM (PIVOT labels ON view IN (0, 1) USING count(*)) WHERE label = 15",
        # Positions' probabilities are rescaled, a row's are not.
        "SELECT count(*) FROM positions WHERE top1_prob > 1",
    ],
)
def test_what_is_not_certain_leaves_all_files(table: Table, everything: Session, sql: str) -> None:
    assert kept(sql, one=table) == {"one": ALL}
    check_same(table, everything, sql)


def check_same(table: Table, everything: Session, sql: str) -> None:
    """The answer from what is needed is that from all."""
    try:
        wanted = everything.run(sql)
    except BadInputError:
        with pytest.raises(BadInputError):
            query(table, sql)
        return
    found = query(table, sql)
    assert found.to_pylist() == wanted.to_pylist()
    assert found.schema == wanted.schema


@pytest.mark.parametrize(
    ("sql", "a", "b"),
    [
        (
            "SELECT 1 FROM a.labels JOIN b.labels USING (view) WHERE a.labels.label = 15",
            [1],
            [0, 1],
        ),
        (
            "SELECT 1 FROM a.labels JOIN b.labels b USING (view) WHERE labels.label = 15",
            [1],
            [0, 1],
        ),
        ("SELECT 1 FROM a.labels x, b.labels y WHERE y.label = 3 AND x.label > 29", [3], [0]),
        (
            "SELECT 1 FROM a.labels x LEFT JOIN b.labels y USING (label) WHERE label = 3",
            ALL,
            [0, 1],
        ),
        ("SELECT 1 FROM a.labels x FULL JOIN b.labels y USING (label) WHERE y.label = 3", ALL, [0]),
        ("SELECT 1 FROM a.labels x JOIN b.entries y USING (view) WHERE label = 3", [0], [0, 1]),
        ("SELECT 1 FROM a.labels x JOIN meta USING (view) WHERE label = 3", ALL, []),
        ("SELECT 1 FROM a.labels x JOIN meta USING (view) WHERE x.label = 3", [0], []),
        ("SELECT 1 FROM a.labels WHERE labels.label = 3", [0], []),
        ("SELECT 1 FROM a.labels, b.labels WHERE labels.label = 3", ALL, [0, 1]),
        ("SELECT 1 FROM b.labels a, a.labels WHERE a.labels.label = 3", ALL, [0, 1]),
        ("SELECT 1 FROM a.labels x JOIN a.entries y ON x.label = 3 WHERE x.label = 3", ALL, []),
    ],
)
def test_each_table_of_several(
    table: Table, other: Table, sql: str, a: list[int], b: list[int]
) -> None:
    assert kept(sql, a=table, b=other) == {"a": a, "b": b}


def test_bounds_of_positions_need_rows_of_one_position(tmp_path: Path) -> None:
    language = make_language(tmp_path / "l", rows=6, length=12)
    assert language.files[0].bounds["entropy"][1] < 90
    for where in ("entropy < -1", "entropy > 99", "label_id = 12345", "top1_id = 12345"):
        assert kept(f"FROM positions WHERE {where}", one=language)["one"] == [0, 1]
    assert kept("FROM labels WHERE entropy > 99", one=language)["one"] == []
    assert kept("FROM positions WHERE view = 7", one=language)["one"] == []
    assert kept("FROM entries WHERE view = 7", one=make_sequences(tmp_path / "s"))["one"] == []


def test_an_unknown_entropy_is_the_greatest_in_sql(table: Table) -> None:
    # It is NaN in a position and NULL in a row, so that no bound is above it.
    assert kept("FROM positions WHERE entropy > 1000", one=table)["one"] == ALL
    assert kept("FROM positions WHERE entropy < 0", one=table)["one"] == []
    assert kept("FROM labels WHERE entropy > 1000", one=table)["one"] == []


def test_files_that_are_left_out_are_not_touched(tmp_path: Path) -> None:
    table = make_table(tmp_path / "t", rows=40, classes=40, k=3, shard_rows=10)
    for place in (0, 2, 3):
        (tmp_path / "t" / table.files[place].path).unlink()
    found = query(table, "SELECT example_id, topk_ids FROM labels WHERE label = 15")
    assert found["example_id"].to_pylist() == ["x00015"]
    assert query(table, "SELECT count(*) AS n FROM positions WHERE label_id = 15").to_pylist() == [
        {"n": 1}
    ]
    assert query(table, "SELECT name FROM classes WHERE id = 3").num_rows == 1
    with pytest.raises(StorageError, match=table.files[0].path):
        query(table, "SELECT example_id FROM labels WHERE label + 0 = 15")
    (tmp_path / "t" / table.files[1].path).unlink()
    assert query(table, "SELECT * FROM labels WHERE label = 99").schema.names == table.schema.names


def explain(table: Table, sql: str, shown: set[str] | None = None) -> str:
    with Session({"": table}, shown=shown) as session:
        rows = session.run(f"EXPLAIN ANALYZE {sql}").to_pylist()
    return str(rows[-1]["explain_value"])


def test_row_groups_are_left_out_by_parquets_statistics(table: Table) -> None:
    text = explain(table, "SELECT sum(entropy) FROM labels WHERE label = 12")
    # Of two row groups of five rows in each of four files.
    assert "Row Groups Scanned: 1 / 8" in text


def test_filters_on_the_example_go_below_the_unfolding(table: Table) -> None:
    for relation, rows in (("positions", 1), ("entries", 3)):
        text = explain(table, f"SELECT * FROM {relation} WHERE example_id = 'x00003'")
        below = text[text.index("Unnest") :]
        assert "Filters: example_id" in below
        assert "40 rows" not in text
        found = query(table, f"SELECT * FROM {relation} WHERE example_id = 'x00003'")
        assert found.num_rows == rows


@pytest.mark.parametrize(
    ("sql", "read"),
    [
        ("SELECT avg(entropy) FROM positions", {"num_positions", "position_entropy"}),
        ("SELECT count(*) AS n FROM positions ORDER BY n", {"num_positions"}),
        ("SELECT max(top1_id) FROM positions", {"num_positions", "topk_ids"}),
        ("SELECT count(id) FROM entries", {"num_positions", "topk_ids"}),
        (
            "SELECT id, sum(logprob) AS s FROM entries GROUP BY id ORDER BY s",
            {"num_positions", "topk_ids", "topk_logprobs"},
        ),
    ],
)
def test_only_lists_that_a_query_needs_are_read(table: Table, sql: str, read: set[str]) -> None:
    from softlabels.query.view import _shown_columns

    shown = _shown_columns(check_query(sql, RELATIONS), {"": table}, ())
    text = explain(table, sql, shown)
    scan = text[text.rindex("Projections:") :].split("Total Files")[0]
    found = {name for name in table.schema.names if name in scan.replace("\n", " ")}
    assert found >= read
    assert found - read <= {"view", "label", "entropy"}  # parts of longer names


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT entropy FROM positions margin WHERE margin.label_id = 3",
        "SELECT margin FROM positions margin ORDER BY margin.example_id LIMIT 1",
        "SELECT p FROM positions p ORDER BY p.example_id LIMIT 1",
        "SELECT positions FROM positions ORDER BY positions.example_id LIMIT 1",
        "SELECT max(#5) AS x FROM positions",
        "SELECT prob FROM positions prob ORDER BY prob.example_id, (SELECT count(*) FROM entries)",
        "SELECT label_rank AS r, count(*) FROM positions GROUP BY r ORDER BY r",
        "SELECT top1_prob, top1_prob AS label_id FROM positions ORDER BY label_id LIMIT 3",
        "SELECT p.tail_prob, e.prob FROM positions p JOIN entries e USING (example_id, position) "
        "ORDER BY ALL",
        "SELECT list_transform(topk_logprobs, lambda x: x + 1) FROM positions ORDER BY ALL",
        "SELECT COLUMNS('label') FROM positions ORDER BY ALL",
        "DESCRIBE positions",
    ],
)
def test_relations_with_fewer_columns_answer_the_same(
    table: Table, everything: Session, sql: str
) -> None:
    check_same(table, everything, sql)
    assert query(table, sql).num_rows > 0


@pytest.mark.parametrize("relation", ["positions", "labels", "entries"])
def test_a_mistaken_column_gets_suggestions_from_the_whole_relation(
    table: Table, relation: str
) -> None:
    near = {"positions": "label_id", "labels": "label_ranks", "entries": "logprob"}[relation]
    mistaken = {"positions": "label", "labels": "label_rank", "entries": "logprobs"}[relation]
    with pytest.raises(BadInputError, match=f'"{mistaken}" not found.*"{near}"'):
        query(table, f"SELECT {mistaken} FROM {relation}")

"""Hostile SQL: nothing is read, nothing is written, nothing of the process is seen."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from softlabels.errors import BadInputError
from softlabels.query.sql import check_expression, check_query
from softlabels.query.view import Session, query
from softlabels.store.table import Table
from tests.tables import make_table

HOSTILE = [
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM read_blob('{secret}')",
    "SELECT * FROM read_json_auto('{secret}')",
    "SELECT * FROM read_parquet('{shard}')",
    "SELECT * FROM parquet_metadata('{shard}')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM '{secret}'",
    "SELECT * FROM '{shard}'",
    "SELECT (SELECT content FROM read_text('{secret}'))",
    "WITH x AS (SELECT * FROM read_text('{secret}')) SELECT * FROM x",
    "COPY (SELECT 1) TO '{out}'",
    "COPY labels TO '{shard}' (use_tmp_file false)",
    "WITH x AS (COPY (SELECT 1 AS a) TO '{out}') SELECT 1",
    "WITH x AS (COPY labels TO '{shard}' (use_tmp_file false)) SELECT 1",
    "SELECT (WITH q AS (COPY (SELECT 1) TO '{out}') SELECT 1)",
    "SELECT * FROM (WITH q AS MATERIALIZED (COPY (SELECT 1) TO '{out}') SELECT 1) t",
    "SELECT 1; COPY (SELECT 1) TO '{out}'",
    "EXPORT DATABASE '{out}'",
    "ATTACH '{out}' AS other",
    "CREATE TABLE t AS SELECT 1",
    "INSERT INTO labels SELECT * FROM labels",
    "WITH x AS (DELETE FROM labels RETURNING *) SELECT * FROM x",
    "DROP VIEW labels",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET allowed_directories = ['/']",
    "RESET lock_configuration",
    "PRAGMA database_list",
    "CALL pragma_version()",
    "EXPLAIN ANALYZE SELECT 1",
    "PREPARE p AS SELECT 1",
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM query_table('labels')",
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM duckdb_views()",
    "SELECT * FROM pg_settings",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "SELECT getenv('HOME')",
    "SELECT current_setting('secret_directory')",
    "SELECT * FROM secret_table",
    "SELECT * FROM softlabels_numbered",
    "SELECT * FROM (WITH pg_settings AS (SELECT 1) SELECT 1) a, pg_settings",
    'SELECT * FROM (WITH "{secret}" AS (SELECT 1) SELECT 1) a, "{secret}"',
    "SELECT * FROM labels, LATERAL read_text(example_id)",
    "SHOW ALL TABLES",
    "",
]


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    folder = tmp_path_factory.mktemp("sandbox")
    (folder / "secret.csv").write_text("a,b\nhush,1\n")
    return make_table(folder / "t", rows=40, shard_rows=20)


@pytest.mark.parametrize("sql", HOSTILE)
def test_hostile_sql_is_refused_and_does_nothing(table: Table, sql: str) -> None:
    secret_table = pa.table({"a": ["hush"]})  # a Python variable that SQL must not find
    folder = Path(table.root.path).parent
    before = snapshot(folder)
    text = sql.format(
        secret=folder / "secret.csv",
        shard=folder / "t" / table.files[0].path,
        folder=folder,
        out=folder / "out.csv",
    )
    with pytest.raises(BadInputError) as caught:
        query(table, text)
    assert "\n" not in str(caught.value)
    assert "hush" not in str(caught.value)
    assert snapshot(folder) == before
    assert secret_table.num_rows == 1


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM glob('{folder}/*')",
        "COPY (SELECT 1) TO '{out}'",
        "ATTACH '{out}' AS other",
        "SET enable_external_access = true",
        "SET python_enable_replacements = true",
        "INSTALL httpfs",
        "SELECT * FROM secret_table",
        "SELECT getenv('HOME')",
    ],
)
def test_a_session_is_closed_even_to_unchecked_sql(table: Table, sql: str) -> None:
    secret_table = pa.table({"a": ["hush"]})
    folder = Path(table.root.path).parent
    before = snapshot(folder)
    text = sql.format(secret=folder / "secret.csv", folder=folder, out=folder / "out.csv")
    with Session({"": table}) as session, pytest.raises(BadInputError):
        session.run(text)
    assert snapshot(folder) == before
    assert secret_table.num_rows == 1


def test_a_session_holds_no_secret(table: Table) -> None:
    with Session({"": table}) as session:
        assert session.run("SELECT * FROM duckdb_secrets()").num_rows == 0


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "VALUES (1)",
        "FROM labels LIMIT 1",
        "DESCRIBE labels",
        "SUMMARIZE labels",
        "SELECT unnest([1, 2])",
        "SELECT * FROM range(3)",
        "WITH a AS (SELECT * FROM labels), B AS (FROM a) SELECT count(*) FROM b",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 3) FROM t",
        "SELECT label FROM labels UNION SELECT id FROM entries",
        "SELECT count(*) FROM LABELS l JOIN classes c ON l.label = c.id",
        "SELECT example_id FROM labels WHERE entropy > (SELECT avg(entropy) FROM labels)",
        "SELECT avg(entropy) OVER (PARTITION BY label) FROM labels",
        "SELECT count(*) FROM labels TABLESAMPLE 10%",
        "SELECT 1 -- a remark\n",
    ],
)
def test_honest_sql_runs(table: Table, sql: str) -> None:
    assert query(table, sql).num_rows > 0


@pytest.mark.parametrize(
    "where",
    [
        "1=1) UNION SELECT 1 FROM labels WHERE (1=1",
        "1=1) OR (1=1",
        "1=1; DROP VIEW labels",
        "1=1 LIMIT 3",
        "1=1 ORDER BY label",
        "1=1) ORDER BY (1",
        "1=1 GROUP BY label",
        "1=1) GROUP BY (label",
        "1=1 QUALIFY true",
        "1=1 UNION SELECT 2 FROM labels",
        "1=1 /*",
        "",
        "  ",
        "-- nothing",
        "label, entropy",
        "label IN (SELECT label FROM labels)",
        "EXISTS (SELECT 1)",
        "(SELECT content FROM read_text('/etc/hostname')) = 'x'",
        "random() < 0.5",
        "now() > TIMESTAMP '2020-01-01'",
        "current_date > DATE '2020-01-01'",
        "ago(INTERVAL 1 DAY) IS NULL",
        "current_setting('threads') = 1",
        "label = ?",
        "label = $1",
        "label ==",
    ],
)
def test_what_is_no_expression_of_a_row_is_refused(where: str) -> None:
    with pytest.raises(BadInputError, match="where ") as caught:
        check_expression(where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "where",
    [
        "label",
        "top1_id = label AND entropy > 0.1",
        "(label = 1) OR (label = 2)",
        "label IN (1, 2) AND NOT example_id LIKE 'x0%'",
        "entropy BETWEEN 0.1 AND 2 -- a remark",
        "list_sum(list_transform(topk_logprobs, lambda x: exp(x))) < 0.9",
        "CASE WHEN label = 3 THEN true ELSE margin < 0.2 END",
        "regexp_matches(example_id, '[)(;]')",
    ],
)
def test_expressions_of_a_row_are_taken(where: str) -> None:
    assert check_expression(where)["class"]


def test_the_refusal_names_the_statement() -> None:
    with pytest.raises(BadInputError, match="exactly one SELECT, found SELECT, COPY"):
        check_query("SELECT 1; COPY (SELECT 1) TO 'x'", ["labels"])

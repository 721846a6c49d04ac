"""SQL of recipes: what the row's own columns do not decide is refused, in any key."""

from typing import Any

import pyarrow as pa
import pytest

from softlabels.errors import BadInputError
from softlabels.query.mix import Recipe, mix
from softlabels.store.table import Table
from tests.query.test_mix import one
from tests.tables import make_table


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    folder = tmp_path_factory.mktemp("expressions")
    carried = {
        "user": pa.array(["me"] * 40),
        "labels": pa.array(list(range(40))),
    }
    return {
        "a": make_table(folder / "a", rows=40),
        "b": make_table(folder / "b", rows=40, seed=1),
        "c": make_table(folder / "c", rows=40, carried=carried),
    }


@pytest.mark.parametrize(
    "where",
    [
        "md5(labels::VARCHAR) < '8'",
        "to_json(labels) IS NOT NULL",
        "(labels).label = 1",
        "labels.md5() < '8'",
        "labels IS NOT NULL",
        "main.labels IS NOT NULL",
        "coalesce(*COLUMNS(*)) IS NOT NULL",
        "COLUMNS('.*_prob') > 0.5",
        "struct_pack(labels.*) IS NOT NULL",
        "#1 IS NOT NULL",
        "age(TIMESTAMP '2020-01-01') > INTERVAL 1 YEAR",
        "(TIMESTAMP '2020-01-01').age() > INTERVAL 1 YEAR",
        "hash(example_id) % 2 = 0",
        "list_approx_count_distinct(topk_ids) > 3",
        "version() LIKE 'v2%'",
        "current_user = 'duckdb'",
        "user = 'duckdb'",
        "current_user() = 'duckdb'",
        "session_user = 'duckdb'",
        "current_catalog = 'memory'",
        "current_database() = 'memory'",
        "inet_client_addr() IS NULL",
    ],
)
def test_what_a_row_does_not_decide_is_refused(tables: dict[str, Table], where: str) -> None:
    with pytest.raises(BadInputError, match="source 'a': where ") as caught:
        one(tables["a"], where=where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "where",
    [
        "labels.label < 20",
        "age(TIMESTAMP '2020-01-01', TIMESTAMP '2019-01-01') > INTERVAL 1 MONTH",
        "md5(example_id) >= '0'",
    ],
)
def test_what_a_row_decides_is_taken(tables: dict[str, Table], where: str) -> None:
    assert one(tables["a"], where=where).num_rows == 40


@pytest.mark.parametrize(
    "where", ["user = 'me'", "labels >= 0", "labels.user = 'me'", "labels.labels < 99"]
)
def test_columns_may_have_such_names(tables: dict[str, Table], where: str) -> None:
    assert one(tables["c"], where=where).num_rows == 40


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        ("row_number() over ()", "WHERE clause cannot contain window functions"),
        ("count(*) over ()", "name the columns|WHERE clause cannot contain window functions"),
        ("max(top1_prob)", "WHERE clause cannot contain aggregates"),
        ("unnest([1, 2])", "UNNEST"),
        ("length(labels::VARCHAR)", "a whole row of labels is no value"),
        ("INTERVAL 1 DAY", "is INTERVAL: expected a number"),
        ("[1]", r"is INTEGER\[\]: expected a number"),
    ],
)
def test_a_weight_is_a_number_of_its_row(tables: dict[str, Table], weight: str, words: str) -> None:
    members: dict[str, Any] = {
        "one": tables["a"].root.uri,
        "two": {"table": tables["b"].root.uri, "weight": weight},
    }
    recipe = Recipe.model_validate({"sources": {"e": {"ensemble": members}}})
    with pytest.raises(BadInputError, match=f"source 'e': member 'two': weight .*({words})"):
        mix(recipe)


@pytest.mark.parametrize("by", ["'infinity'::DATE", "'-infinity'::TIMESTAMP"])
def test_infinite_dates_do_not_balance(tables: dict[str, Table], by: str) -> None:
    with pytest.raises(BadInputError, match="balance\\.by: it has a date that is infinite"):
        one(tables["a"], balance={"by": by})

"""The benchmark of queries on small tables: what it makes, compares and writes."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines import bench_query, make_large
from pipelines.bench_query import QUESTIONS, RECIPE, Line, Mixed, as_markdown, measure
from softlabels.errors import BadInputError
from softlabels.query.mix import mix
from softlabels.query.recipe import Recipe
from softlabels.query.view import query
from softlabels.store.inspect import verify
from softlabels.store.table import Table


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    folder = tmp_path_factory.mktemp("large")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_large, "FILE_ROWS", 2_000)
        patch.setattr(make_large, "GROUP_ROWS", 1_000)
        return make_large.make_all(folder, 5_000)


def test_made_up_tables_are_sound(tables: dict[str, Table]) -> None:
    for name, accuracy in make_large.TEACHERS.items():
        assert verify(tables[name])["problems"] == []
        found = query(
            tables[name],
            "SELECT count(*) AS n, avg((label = top1_id)::INT) AS right, count(DISTINCT label) AS "
            "v, min(entropy) AS least, max(len(list_distinct(topk_ids))) AS k FROM labels",
        ).to_pylist()[0]
        assert (found["n"], found["v"], found["k"]) == (5_000, 1_000, 10)
        assert found["right"] == pytest.approx(accuracy, abs=0.03)
        assert found["least"] > 0
        assert [file.num_rows for file in tables[name].files] == [2_000, 2_000, 1_000]
    assert tables["a"].files[1].bounds["label"] == (400, 799)


def test_made_up_entropies_are_those_of_head_and_even_tail(tables: dict[str, Table]) -> None:
    row = query(tables["b"], "SELECT * FROM labels LIMIT 1").to_pylist()[0]
    head = np.exp(np.array(row["topk_logprobs"]))
    tail = np.exp(row["tail_logprob"][0])
    assert head.sum() + tail == pytest.approx(1, abs=3e-3)
    rest = np.full(990, tail / 990)
    whole = np.concatenate([head, rest])
    assert row["entropy"] == pytest.approx(-(whole * np.log(whole)).sum(), rel=5e-3)


def test_tables_that_are_there_are_taken_or_refused(tables: dict[str, Table]) -> None:
    folder = Path(tables["a"].root.path).parent
    assert make_large.make_all(folder, 5_000)["a"].version == tables["a"].version
    with pytest.raises(BadInputError, match="has 5000 rows, not 6000"):
        make_large.make_all(folder, 6_000)


def test_every_question_is_answered_alike(tables: dict[str, Table]) -> None:
    lines = {line.question: line for line in measure(tables, turns=1)}
    assert list(lines) == [question.name for question in QUESTIONS]
    assert (lines["filtered aggregate"].files, lines["filtered aggregate"].of) == (3, 3)
    assert lines["the same of one class of 1,000"].files == 1
    assert lines["top-1 confusion of two teachers"].of == 6


def test_answers_that_differ_end_the_benchmark(tables: dict[str, Table]) -> None:
    one, other = (query(tables["a"], f"SELECT {x} AS x FROM labels LIMIT 1") for x in (1, 2))
    with pytest.raises(SystemExit, match="is not"):
        bench_query._require_same("x", one, other)


def test_the_mix_is_that_of_the_recipe(tables: dict[str, Table]) -> None:
    folder = Path(tables["a"].root.path).parent
    found = bench_query.mix_elsewhere(folder)
    text = json.dumps(RECIPE)
    for name in tables:
        text = text.replace(f"{{{name}}}", str(folder / name))
    plan = mix(Recipe.model_validate(json.loads(text)))
    assert (found.rows, found.fingerprint) == (plan.num_rows, plan.fingerprint)
    assert 50e6 < found.peak < 1e9
    assert 0 < found.seconds < 60


def test_the_table_shows_ratios_and_the_mix() -> None:
    lines = [Line("q", [2.0, 3.0, 4.0], [1.0, 2.0, 4.0], 1, 40)]
    text = as_markdown(lines, Mixed(12.4, 1_500_000_000, 7, "f"), 1_000, 3)
    assert "| q | 1.50 (1.00–2.00) | 3.00 | 1 of 40 |" in text
    assert "into a plan of 7 rows an epoch took 12 s and 1.5 GB" in text

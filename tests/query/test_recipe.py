"""Recipes: what is taken, what is refused and how it is said."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from softlabels.errors import BadInputError
from softlabels.query.recipe import Recipe


def load(folder: Path, value: Any) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False))
    return Recipe.read(path)


def refusal(folder: Path, value: Any) -> str:
    # Not pytest.raises: what it keeps and pydantic's error keep each other alive to the exit.
    try:
        load(folder, value)
    except BadInputError as error:
        return str(error)
    raise AssertionError("the recipe was taken")


def with_source(**source: Any) -> dict[str, Any]:
    return {"sources": {"a": {"table": "t@v1", **source}}}


def test_a_whole_recipe_is_read(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        """
        seed: 7
        rows: 100
        sources:
          b: {table: t@v1, where: "top1_id = label and entropy > 0.1 ", weight: 2.0, limit: 10}
          a: {table: u, fraction: 0.5, weight: 1, loss_weight: 0.5, stage: 1}
        """,
    )
    assert recipe.weighted
    assert list(recipe.sources) == ["b", "a"]
    assert recipe.normalised() == {
        "seed": 7,
        "rows": 100,
        "sources": [
            {
                "name": "b",
                "where": "top1_id = label and entropy > 0.1",
                "limit": 10,
                "weight": 2.0,
                "loss_weight": 1.0,
                "stage": 0,
            },
            {"name": "a", "fraction": 0.5, "weight": 1.0, "loss_weight": 0.5, "stage": 1},
        ],
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (with_source(wehre="label = 1"), r"unknown key 'sources.a.wehre'; did you mean 'where'\?"),
        ({**with_source(), "sead": 1}, r"unknown key 'sead'; did you mean 'seed'\?"),
        ({"sources": {"a": {}}}, "exactly one of table, ensemble and choose.* found none"),
        ({"sources": {}}, "sources: "),
        ("sources: {a: {table: t}, a: {table: u}}", "'a' is there twice"),
        ("- 1", "expected a mapping"),
        ("sources: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (with_source(weight=0), "sources.a.weight: .*greater than 0"),
        (with_source(weight=-1), "sources.a.weight: .*greater than 0"),
        (with_source(weight=float("nan")), "sources.a.weight: "),
        (with_source(weight=float("inf")), "sources.a.weight: .*finite"),
        (with_source(weight="many"), "sources.a.weight: "),
        (with_source(repeats=0), "sources.a.repeats: .*greater than 0"),
        (with_source(fraction=1.5), "sources.a.fraction: .*less than or equal to 1"),
        (with_source(fraction=0), "sources.a.fraction: .*greater than 0"),
        (with_source(limit=0), "sources.a.limit.rows: .*greater than 0"),
        (with_source(limit=1.5), "sources.a.limit.rows: "),
        (with_source(stage=-1), "sources.a.stage: .*greater than or equal to 0"),
        (with_source(loss_weight=0), "sources.a.loss_weight: .*greater than 0"),
        (with_source(weight=1, repeats=2), "give one of them"),
        ({**with_source(), "rows": 5}, "give weights"),
        (
            {"sources": {"a": {"table": "t", "weight": 1}, "b": {"table": "t"}}},
            "source 'b' has no weight, others have: give all or none",
        ),
        (with_source(where="1=1) union select 1 from labels where (1=1"), "one expression"),
        (with_source(where="label in (select 1)"), "a subquery is refused"),
        (with_source(where="random() < 0.5"), "'random' is not decided by the row"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path: Path, value: Any, message: str) -> None:
    found = refusal(tmp_path, value)
    assert re.search(message, found)
    assert "\n" not in found


def test_a_missing_recipe_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no file"):
        Recipe.read(tmp_path / "none.yaml")

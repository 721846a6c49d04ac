"""Recipes: what is taken, what is refused and how it is said."""

import re
from pathlib import Path
from typing import Any

import numpy as np
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


def placed(key: str, value: Any) -> dict[str, Any]:
    """A recipe that has `value` at a dotted key, and else what makes it a recipe."""
    source: dict[str, Any] = {"table": "t@v1"}
    recipe: dict[str, Any] = {"sources": {"a": source}}
    if key in ("seed", "rows"):
        if key == "rows":
            source["weight"] = 1
        return recipe | {key: value}
    if key.startswith("member."):
        member = {"table": "u", key.removeprefix("member."): value}
        if key == "member.by_class":
            member = {"table": "u", "by_class": {"shirt": value}}
        return {"sources": {"a": {"ensemble": {"x": "t@v1", "y": member}}}}
    inner = {
        "split.holdout": {"split": {"take": "train", "holdout": value}},
        "split.seed": {"split": {"take": "train", "holdout": 0.5, "seed": value}},
        "limit.each": {"limit": {"each": value, "by": "label"}},
        "balance.temperature": {"balance": {"by": "label", "temperature": value}},
        "positions.top": {"positions": {"top": value, "by": "entropy"}},
        "positions.weight": {"positions": {"weights": [{"where": "entropy > 1", "weight": value}]}},
    }
    return recipe | {"sources": {"a": source | inner.get(key, {key: value})}}


FRACTIONS = ["fraction", "split.holdout", "positions.top"]
REALS = ["weight", "repeats", "loss_weight", "member.by_class", "member.temperature"]
REALS += ["balance.temperature", "positions.weight", "member.weight"]
WHOLE = ["seed", "rows", "limit", "limit.each", "split.seed", "stage"]


@pytest.mark.parametrize("key", FRACTIONS + REALS + WHOLE)
def test_truth_values_and_quoted_numbers_are_no_numbers(tmp_path: Path, key: str) -> None:
    sound = 0.5 if key in FRACTIONS else 2
    assert load(tmp_path, placed(key, sound))
    found = refusal(tmp_path, placed(key, True))
    assert "expected a number" in found
    assert "found True" in found
    if key not in (*FRACTIONS, "member.temperature"):
        assert "expected a number" in refusal(tmp_path, placed(key, False))
    if key != "member.weight":  # there text is SQL
        found = refusal(tmp_path, placed(key, str(sound)))
        assert "expected a number" in found
        assert f"found '{sound}'" in found


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    # To YAML 1.1 as PyYAML reads it, 1e-3 without a point is text.
    recipe = load(tmp_path, "sources: {a: {table: t, loss_weight: 1e-3, fraction: 5E-1}}")
    source = recipe.sources["a"]
    assert (source.loss_weight, source.fraction) == (0.001, 0.5)


@pytest.mark.parametrize("key", ["loss_weight", "positions.weight"])
@pytest.mark.parametrize("value", [1e300, 3.5e38, 1e-39, 1e-300, 5e-324, 0, -1.0])
def test_weights_of_losses_are_those_that_a_float32_holds(
    tmp_path: Path, key: str, value: float
) -> None:
    assert key.rpartition(".")[2] in refusal(tmp_path, placed(key, value))


def test_the_smallest_and_largest_loss_weights_are_taken(tmp_path: Path) -> None:
    limits = np.finfo(np.float32)
    for value in (float(limits.tiny), float(limits.max)):
        recipe = load(tmp_path, placed("loss_weight", value))
        assert np.float32(recipe.sources["a"].loss_weight) == value


def test_a_loss_weight_times_a_positions_weight_is_one_too(tmp_path: Path) -> None:
    for value in (1e-30, 1e30):
        source = placed("positions.weight", value)["sources"]["a"]
        assert load(tmp_path, {"sources": {"a": source | {"loss_weight": 1 / value}}})
        found = refusal(tmp_path, {"sources": {"a": source | {"loss_weight": value}}})
        assert f"times a position's weight {value!r}" in found

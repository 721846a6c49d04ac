"""`softlabels spec`: the reference of YAML keys is made of the models, so it cannot be stale."""

import subprocess
import sys

import pytest
import yaml

KINDS = ["capture", "capture-text", "import", "recipe", "ensemble", "run"]


def reference(kind: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "softlabels", "spec", kind], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_stands_there_as_yaml_with_its_meaning(kind: str) -> None:
    text = reference(kind)
    assert isinstance(yaml.safe_load(text), dict)
    assert [line for line in text.splitlines() if "#" not in line and "NAME:" not in line] == []


def test_defaults_required_keys_and_keys_by_name_are_told_apart() -> None:
    text = reference("recipe")
    assert "seed: 0  # of the hash that takes subsets." in text
    assert "sources:" in text
    assert "  NAME:\n    table: REQUIRED" in reference("ensemble")
    found = yaml.safe_load(reference("capture-text"))
    assert found["k"] == 16
    assert found["profile"] == "compact"
    assert found["teacher"]["revision"] == ""
    assert found["source"]["isolate"] is True


def test_the_recipe_is_shown_with_an_example_of_every_key() -> None:
    from softlabels.query.recipe import Choose, Recipe, Source

    example = "\n".join(
        line[4:] for line in reference("recipe").splitlines()[1:] if line.startswith("#   ")
    )
    found = yaml.safe_load(example)
    recipe = Recipe.model_validate(found)
    keys = {key for source in found["sources"].values() for key in source}
    # Sources of an example with weights have no repeats; the words below it say so.
    assert keys == set(Source.model_fields) - {"repeats"}
    assert set(found) == set(Recipe.model_fields)
    assert isinstance(recipe.sources["best"].choose, Choose)
    assert "      from: REQUIRED" in reference("recipe")

"""`softlabels spec`: the reference of YAML keys is made of the models, so it cannot be stale."""

import subprocess
import sys

import pytest
import yaml

KINDS = ["capture", "capture-text", "import", "recipe", "run"]


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
    assert "  NAME:\n    table: REQUIRED" in text
    found = yaml.safe_load(reference("capture-text"))
    assert found["k"] == 16
    assert found["profile"] == "compact"
    assert found["teacher"]["revision"] == ""
    assert found["source"]["isolate"] is True

"""The capture spec: every rule, and a line for each way to break it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from softlabels.errors import BadInputError
from softlabels.specs import load_spec, validate
from softlabels.teacher.spec import CaptureSpec
from tests.teacher.jobs import make_spec, settings


def refused(tmp_path: Path, **changes: Any) -> str:
    """The message that a spec with `changes` is refused with: one line."""
    with pytest.raises(BadInputError) as caught:
        validate(CaptureSpec, settings(tmp_path, **changes), "job.yaml")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("job.yaml: ")
    return text


def test_defaults(tmp_path: Path) -> None:
    values = settings(tmp_path)
    for key in ("k", "shard_rows", "batch_size", "device"):
        del values[key]
    spec = CaptureSpec.model_validate(values | {"k": 6})
    assert (spec.shard_rows, spec.batch_size, spec.profile) == (50_000, 256, "precise")
    assert (spec.draws, spec.temperatures, spec.seed, spec.device) == (0, (), 0, "auto")
    assert spec.teacher.num_classes == 6


def test_classes_may_be_a_number(tmp_path: Path) -> None:
    assert make_spec(tmp_path, teacher={"classes": 6}).teacher.num_classes == 6


def test_temperatures_come_sorted(tmp_path: Path) -> None:
    assert make_spec(tmp_path, temperatures=[4, 0.5, 2]).temperatures == (0.5, 2.0, 4.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 7}, ["k is 7", "6 classes"]),
        ({"k": 0}, ["k and draws are both 0"]),
        ({"k": -1}, ["k:", "-1"]),
        ({"k": "many"}, ["k:", "many"]),
        ({"k": 3.5}, ["k:", "3.5"]),
        ({"draws": 5000}, ["draws:", "5000"]),
        ({"draws": 2, "draws_temperature": 2}, ["draws_temperature 2.0", "temperatures"]),
        ({"draws": 2, "draws_temperature": float("nan")}, ["draws_temperature nan"]),
        ({"temperatures": [1]}, ["temperatures", "without 1"]),
        ({"temperatures": [0]}, ["temperatures", "above 0"]),
        ({"temperatures": [-2]}, ["temperatures", "above 0"]),
        ({"temperatures": [float("inf")]}, ["temperatures", "above 0"]),
        ({"temperatures": [2, 2.0]}, ["temperatures", "different"]),
        ({"temperatures": [2, 2.0000001]}, ["temperatures", "different"]),
        ({"temperatures": [1.0000001]}, ["temperatures", "without 1"]),
        ({"temperatures": 2}, ["temperatures", "2"]),
        ({"carry": ["note", "note"]}, ["carry names a column twice"]),
        ({"table": "labels@v1"}, ["table:", "not one version"]),
        ({"table": "s3://bucket/labels@12"}, ["table:", "not one version"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": 2**63}, ["seed"]),
        ({"shard_rows": 0}, ["shard_rows", "0"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"profile": "tiny"}, ["profile", "'compact' or 'precise'", "'tiny'"]),
        ({"source": {"columns": []}}, ["source.columns"]),
        ({"teacher": {"classes": 1}}, ["teacher.classes"]),
        ({"teacher": {"classes": ["a"]}}, ["teacher.classes", "two different class names"]),
        ({"teacher": {"classes": ["a", "a"]}}, ["teacher.classes", "two different class names"]),
        ({"teacher": {"arguments": {"x": float("nan")}}}, ["teacher.arguments", "JSON"]),
        ({"teacher": {"arguments": {"x": {1, 2}}}}, ["teacher.arguments", "JSON"]),
    ],
)
def test_wrong_values(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    text = refused(tmp_path, **changes)
    for word in words:
        assert word in text


def test_unknown_keys_are_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    assert "unknown key 'temprature'; did you mean 'temperatures'?" in refused(
        tmp_path, temprature=2
    )
    text = refused(tmp_path, source={"colums": ["x"]})
    assert "unknown key 'source.colums'; did you mean 'columns'?" in text
    text = refused(tmp_path, teacher={"weight": "w"})
    assert "unknown key 'teacher.weight'; did you mean 'weights'?" in text


def test_missing_keys(tmp_path: Path) -> None:
    values = settings(tmp_path)
    del values["teacher"]["module"]
    with pytest.raises(BadInputError, match=r"job: key 'teacher\.module' is missing"):
        validate(CaptureSpec, values, "job")


def test_draws_at_a_stored_temperature(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, k=0, draws=4, temperatures=[2], draws_temperature=2)
    assert spec.draws_temperature == 2.0


def test_a_spec_never_changes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_spec(tmp_path).k = 2


def test_a_file_and_changes_to_it(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path)))
    assert load_spec(file, CaptureSpec) == make_spec(tmp_path)
    changed = load_spec(file, CaptureSpec, ["batch_size=7", "teacher.name=other"])
    assert (changed.batch_size, changed.teacher.name) == (7, "other")

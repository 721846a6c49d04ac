from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from softlabels.errors import BadInputError
from softlabels.specs import MAX_BYTES, load_spec, read_yaml


class Loss(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kd_weight: float = 1.0
    temperature: float = 1.0


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid")
    table: str
    k: int = 10
    loss: Loss = Loss()
    parts: tuple[Loss, ...] = ()


def load(tmp_path: Path, text: str, *changes: str) -> Spec:
    file = tmp_path / "spec.yaml"
    file.write_text(text, encoding="utf-8")
    return load_spec(file, Spec, changes)


def refusal(tmp_path: Path, text: str, *changes: str) -> str:
    with pytest.raises(BadInputError) as caught:
        load(tmp_path, text, *changes)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_a_spec_is_read_and_changes_win(tmp_path: Path) -> None:
    spec = load(tmp_path, "table: t\nloss: {kd_weight: 0.5}\n", "loss.kd_weight=0.25", "k=3")
    assert spec == Spec(table="t", k=3, loss=Loss(kd_weight=0.25))
    made = load(tmp_path, "table: t\n", "loss.temperature=4", "table=a=b")
    assert (made.loss.temperature, made.table) == (4.0, "a=b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("table: t\nkk: 3\n", "unknown key 'kk'; did you mean 'k'?"),
        ("tabel: t\n", "unknown key 'tabel'; did you mean 'table'? (and 1 more)"),
        ("table: t\nloss: {kd_wieght: 1}\n", "'loss.kd_wieght'; did you mean 'kd_weight'?"),
        ("table: t\nparts: [{kd_wieght: 1}]\n", "'parts.0.kd_wieght'; did you mean 'kd_weight'?"),
        ("table: t\nxyzzy: 1\n", "unknown key 'xyzzy'"),
        ("k: 3\n", "key 'table' is missing"),
        ("table: t\nk: many\n", "k: Input should be a valid integer"),
        ("table: t\nk: many\n", "found 'many'"),
        ("table: t\nloss: 3\n", "loss: "),
        ("table: t\ntable: u\n", "key 'table' is there twice"),
        ("table: t\nloss: {kd_weight: 1, kd_weight: 2}\n", "'kd_weight' is there twice"),
        ("table: &a t\nk: *a\n", "aliases"),
        ("table: t\nloss:\n  <<: {kd_weight: 1}\n", "not valid YAML"),
        ("- table\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("just words\n", "expected a mapping"),
        ("table: [unclosed\n", "not valid YAML"),
        ("table: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("? [a, b]\n: c\n", "is not a name"),
        ("1: a\ntable: t\n", "1"),
        ("table: 2026-13-45\n", "not valid YAML"),
        ("table: " + "[" * 5000 + "\n", "not valid YAML"),
        ("k: " + "1" * 5000 + "\n", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "change",
    [
        "k",
        "=3",
        "loss..kd_weight=1",
        "table.x=1",
        "k=[",
        "k=2026-13-45",
        "k=" + "1" * 5000,
        "k=" + "[" * 5000,
        "k=*a",
        "nothing=1",
    ],
)
def test_a_wrong_change_is_refused(tmp_path: Path, change: str) -> None:
    refusal(tmp_path, "table: t\n", change)


def test_files_that_are_no_spec_are_refused(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(BadInputError, match="larger than"):
        read_yaml(big)
    (tmp_path / "latin.yaml").write_bytes(b"table: \xff\xfe\n")
    with pytest.raises(BadInputError, match="not valid YAML"):
        read_yaml(tmp_path / "latin.yaml")
    for absent in (tmp_path / "none.yaml", tmp_path, "x" * 5000):
        with pytest.raises(BadInputError, match="there is no file"):
            read_yaml(absent)


def test_text_that_is_not_ascii_is_kept(tmp_path: Path) -> None:
    assert load(tmp_path, "table: données/été\n").table == "données/été"

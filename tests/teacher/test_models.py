"""Teachers: weights that fit or do not, and what a module may give."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from softlabels.errors import BadInputError, DataError, MismatchError, SoftLabelsError
from softlabels.fingerprint import sha256_bytes
from softlabels.teacher.models import load_teacher, pick_device
from tests.teacher.jobs import TOYS, make_spec, rows_table
from tests.teacher.toys import Linear

COLUMNS = {"x": rows_table(0, 5)["x"].combine_chunks()}
IDS = [f"row{i}" for i in range(5)]


def weights_file(tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    """Weights of a random toy; a None drops a tensor, others add or replace one."""
    torch.manual_seed(5)
    tensors = dict(Linear().state_dict())
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    path = tmp_path / "teacher.safetensors"
    save_file(tensors, path)
    return path


def refused(kind: type[SoftLabelsError], tmp_path: Path, **changes: Any) -> str:
    """The one line with which a teacher is refused at loading or at its first batch."""
    with pytest.raises(kind) as caught:
        load_teacher(make_spec(tmp_path, **changes)).logits(COLUMNS, IDS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_logits_are_the_modules_own(tmp_path: Path) -> None:
    path = weights_file(tmp_path)
    teacher = load_teacher(make_spec(tmp_path, teacher={"weights": str(path)}))
    torch.manual_seed(5)
    expected = Linear()(torch.tensor(COLUMNS["x"].to_pylist()))
    torch.testing.assert_close(teacher.logits(COLUMNS, IDS), expected.detach())
    assert teacher.lineage.weights_sha256 == sha256_bytes(path.read_bytes())
    assert teacher.lineage.code_sha256 is not None
    assert teacher.lineage.decode == f"{TOYS}:decode"


def test_module_and_decode_may_be_files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(Path(__file__).with_name("toys.py").read_text())
    file = str(tmp_path / "mine.py")
    teacher = load_teacher(
        make_spec(
            tmp_path, teacher={"module": f"{file}:Linear"}, source={"decode": f"{file}:decode"}
        )
    )
    assert teacher.logits(COLUMNS, IDS).shape == (5, 6)


def test_random_weights_are_the_same_each_time(tmp_path: Path) -> None:
    first, second = (load_teacher(make_spec(tmp_path)) for _ in range(2))
    assert first.lineage == second.lineage
    torch.testing.assert_close(first.logits(COLUMNS, IDS), second.logits(COLUMNS, IDS))


def test_state_without_a_weights_file_is_fingerprinted_as_it_is(tmp_path: Path) -> None:
    def sha256(fill: float) -> str | None:
        spec = make_spec(
            tmp_path, teacher={"module": f"{TOYS}:WithBuffer", "arguments": {"fill": fill}}
        )
        return load_teacher(spec).lineage.weights_sha256

    nan = load_teacher(make_spec(tmp_path, teacher={"module": f"{TOYS}:WithBuffer"}))
    assert sha256(1.0) == sha256(1.0)
    assert len({sha256(1.0), sha256(2.0), nan.lineage.weights_sha256}) == 3


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    def text(**changes: torch.Tensor | None) -> str:
        weights = str(weights_file(tmp_path, **changes))
        found = refused(MismatchError, tmp_path, teacher={"weights": weights})
        assert repr(weights) in found
        return found

    assert "missing ['layer.bias']" in text(layer__bias=None)
    assert "unknown ['layer.more']" in text(layer__more=torch.zeros(2))
    shape = text(layer__bias=torch.zeros(7))
    assert "'layer.bias'" in shape
    assert "(7,)" in shape
    assert "(6,)" in shape


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    path = weights_file(tmp_path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 4):
        path.write_bytes(whole[:length])
        text = refused(BadInputError, tmp_path, teacher={"weights": str(path)})
        assert "not a whole safetensors file" in text
    path.unlink()
    assert "no weights file" in refused(BadInputError, tmp_path, teacher={"weights": str(path)})
    assert "no weights file" in refused(BadInputError, tmp_path, teacher={"weights": str(tmp_path)})


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("tests.teacher.nowhere:X", ["tests.teacher.nowhere"]),
        (f"{TOYS}:Nothing", ["no callable 'Nothing'"]),
        (f"{TOYS}", ["package.module:name"]),
        ("missing.py:X", ["no file 'missing.py'"]),
        (f"{TOYS}:not_a_module", ["no torch.nn.Module", "str"]),
        (f"{TOYS}:Picky", ["ValueError", "no model of size ''"]),
    ],
)
def test_modules_that_cannot_be_made(tmp_path: Path, module: str, words: list[str]) -> None:
    text = refused(BadInputError, tmp_path, teacher={"module": module})
    for word in words:
        assert word in text


@pytest.mark.parametrize("code", ["def broken(:\n", "raise ValueError('two\\nlines')\n"])
def test_modules_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    name = f"broken{len(code)}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for module in (name, str(tmp_path / f"{name}.py")):
        text = refused(BadInputError, tmp_path, teacher={"module": f"{module}:X"})
        assert "cannot import" in text
        assert name in text


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    text = refused(BadInputError, tmp_path, teacher={"arguments": {"depth": 3}})
    assert "teacher.arguments" in text
    assert "depth" in text


@pytest.mark.parametrize("device", ["cuda:9", "nonsense", "meta2"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(BadInputError, match=device) as caught:
        pick_device(device)
    assert "\n" not in str(caught.value)


def test_wrong_number_of_classes(tmp_path: Path) -> None:
    text = refused(MismatchError, tmp_path, teacher={"classes": 9})
    assert "(5, 6)" in text
    assert "(5, 9)" in text


def test_logits_must_be_a_tensor(tmp_path: Path) -> None:
    text = refused(MismatchError, tmp_path, teacher={"module": f"{TOYS}:Pair"})
    assert "tuple" in text


def test_nan_and_infinite_logits_name_the_example(tmp_path: Path) -> None:
    teacher = load_teacher(make_spec(tmp_path, teacher={"module": f"{TOYS}:Sick"}))
    x = pa.array([[0.0, 1, 2, 3], [13.0, 1, 2, 3]], pa.list_(pa.float32()))
    with pytest.raises(DataError, match=r"'bad'.*NaN"):
        teacher.logits({"x": x}, ["good", "bad"])
    text = refused(DataError, tmp_path, teacher={"module": f"{TOYS}:Infinite"})
    assert "'row0'" in text


@pytest.mark.parametrize(
    ("decode", "words"),
    [
        ("decode_refuse", ["decode", "not an image"]),
        ("decode_wrong_key", ["decode", "KeyError", "nothing"]),
        ("decode_list", ["decode", "list", "tensor"]),
        ("decode_narrow", ["the teacher", "RuntimeError"]),
    ],
)
def test_decode_and_module_that_fail_name_the_rows(
    tmp_path: Path, decode: str, words: list[str]
) -> None:
    text = refused(DataError, tmp_path, source={"decode": f"{TOYS}:{decode}"})
    for word in [*words, "'row0'", "'row4'"]:
        assert word in text

import hashlib
import sys
from pathlib import Path

import pytest

from softlabels.errors import BadInputError
from softlabels.imports import load_object, source_sha256


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_callable_is_found_in_a_file_and_in_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, "teacher_a1.py", "class A:\n    def f(): return 7\n")
    assert load_object(f"{file}:A.f")() == 7
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_object("teacher_a1:A").f() == 7  # type: ignore[attr-defined]
    assert load_object("teacher_a1.py:A") is load_object(f"{file}:A")


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "model.py", f"def which(): return {name!r}\n")
    found = [load_object(f"{tmp_path / name / 'model.py'}:which")() for name in ("a", "b")]
    assert found == ["a", "b"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("json", "expected 'package.module:name'"),
        (":name", "expected"),
        ("json:", "expected"),
        ("json:nothing", "no callable 'nothing'"),
        ("json:decoder.nothing.more", "no callable"),
        ("json:__doc__", "no callable"),
        ("no_such_package.x:f", "cannot import"),
        (".relative:f", "cannot import"),
        ("nowhere.py:f", "no file"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path: str, expected: str) -> None:
    with pytest.raises(BadInputError, match=expected) as caught:
        load_object(path)
    assert repr(path.rpartition(":")[0])[1:-1] in str(caught.value)


@pytest.mark.parametrize("text", ["def (", "1 / 0", "import no_such_package", "raise OSError"])
def test_a_user_module_that_fails_is_the_users_error_by_file_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    name = f"broken_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    file = write(tmp_path, f"{name}.py", text + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    for path in (f"{file}:f", f"{name}:f"):
        with pytest.raises(BadInputError, match="cannot import"):
            load_object(path)
    assert not {m for m in set(sys.modules) - before if name in m}, "half a module stays"


def test_source_sha256_is_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "teacher_b2.py", "def f(): return 1\n")
    wanted = hashlib.sha256(b"def f(): return 1\n").hexdigest()
    assert source_sha256(load_object(f"{file}:f")) == wanted
    assert source_sha256(len) is None

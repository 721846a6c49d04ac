"""Import paths: how a spec names the user's own module, decode function or student."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from softlabels.errors import BadInputError
from softlabels.fingerprint import sha256_bytes


def load_object(path: str) -> Callable[..., Any]:
    """The callable that `path` names: "package.module:name" or "folder/file.py:name".

    Modules are looked for on sys.path and in the current folder. Running code is what the user
    asked for by writing its name; nothing is ever imported because of data.

    Raises:
        BadInputError: the form, the module or the name is wrong, or it is not callable.
    """
    module_name, colon, name = path.rpartition(":")
    if not colon or not module_name or not name:
        raise BadInputError(
            f"import path {path!r}: expected 'package.module:name' or 'file.py:name'"
        )
    module = _load_file(module_name) if module_name.endswith(".py") else _load_module(module_name)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise BadInputError(f"import path {path!r}: {module_name!r} has no callable {name!r}")
    return cast(Callable[..., Any], found)


def source_sha256(target: Callable[..., Any]) -> str | None:
    """The sha256 of the source file that defines `target`; None where there is no file."""
    try:
        file = inspect.getsourcefile(target)
    except TypeError:
        return None
    return sha256_bytes(Path(file).read_bytes()) if file and Path(file).is_file() else None


def _load_module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        # The user's module may fail in any way: a missing package, its syntax, its own code.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInputError(
            f"cannot import {name!r} (looked on sys.path and in {here!r}): {reason}"
        ) from error


def _load_file(file: str) -> Any:
    path = Path(file).resolve()
    if not path.is_file():
        raise BadInputError(f"import path: no file {file!r}")
    name = f"softlabels_user_{sha256_bytes(str(path).encode())[:12]}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInputError(f"import path: {file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInputError(f"cannot import {file!r}: {reason}") from error
    return module

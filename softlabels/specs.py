"""YAML files into validated settings: one strict reader for specs, recipes and runs."""

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, FiniteFloat, ValidationError

from softlabels.errors import BadInputError, StorageError, one_line

MAX_BYTES = 1 << 20
"""Of a file: a label space of 20,000 names has half of it."""

MAX_NODES = 30_000
"""Values and keys, which take some 60 microseconds each."""

MAX_DIGITS = 64
"""Characters of a number. "1:1:1:…" is one in YAML, and a megabyte of it takes a minute."""

Model = TypeVar("Model", bound=BaseModel)

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
"""Numbers that PyYAML, which follows YAML 1.1, takes for text: 1e-3."""


def written_as_number(value: Any) -> Any:
    """`value`, unless it is text or a truth value, which pydantic would make a number of.

    `limit: yes` would be 1 row. To be called before other validation.
    """
    if isinstance(value, bool):
        raise ValueError("expected a number (yes, no, on and off are truth values in YAML)")
    if isinstance(value, str) and not _EXPONENT.fullmatch(value.strip()):
        raise ValueError("expected a number, without quotes")
    return value


WholeNumber = Annotated[int, BeforeValidator(written_as_number)]
RealNumber = Annotated[FiniteFloat, BeforeValidator(written_as_number)]


def load_spec(
    path: str | os.PathLike[str], model: type[Model], changes: Sequence[str] = ()
) -> Model:
    """The settings in a YAML file, validated.

    Args:
        path: a local YAML file.
        model: what it must fit.
        changes: "dotted.key=value" texts that win over the file; values are YAML.

    Raises:
        BadInputError: the file is no YAML mapping, a key is unknown or double, a value is wrong.
    """
    return load_spec_as(path, lambda _: model, changes)


def load_spec_as(
    path: str | os.PathLike[str],
    choose: Callable[[Mapping[str, Any]], type[Model]],
    changes: Sequence[str] = (),
) -> Model:
    """As `load_spec`; `choose` says from the file's content, changes made, what it must fit."""
    data = read_yaml(path)
    for change in changes:
        _apply(data, change)
    return validate(choose(data), data, str(path))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file: plain types only, no double keys, no aliases."""
    file = Path(path)
    if not os.path.isfile(file):  # unlike Path.is_file, no error for a name that is too long
        raise BadInputError(f"there is no file {str(path)!r}")
    if file.stat().st_size > MAX_BYTES:
        raise BadInputError(f"{str(path)!r} is larger than {MAX_BYTES} bytes: that is no spec")
    try:
        value = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise BadInputError(f"{str(path)!r} is not valid YAML: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise BadInputError(f"{str(path)!r}: expected a mapping of settings, found {value!r:.80}")
    return value


def parse_yaml(text: str) -> Any:
    """What a YAML text says, in plain types.

    Raises:
        ValueError: it is no YAML, too long or too deep, or has aliases, tags of other types, one
            key twice or numbers of more than MAX_DIGITS characters.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text)} characters, at most {MAX_BYTES} are read")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(one_line(error)) from error


def validate(model: type[Model], data: Any, where: str) -> Model:
    """`data` as `model`; the first thing wrong becomes a one-line BadInputError."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # An unknown key first: a misspelt one also shows as a missing one.
        problems = sorted(
            error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden"
        )
        text = _describe(problems[0], model)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise BadInputError(f"{where}: {text}{more}") from error


class _StrictLoader(yaml.SafeLoader):
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values")
        # A few nested aliases expand to gigabytes; no spec needs them.
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not allowed")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> int:
        self._require_short(node)
        return int(super().construct_yaml_int(node))

    def construct_yaml_float(self, node: Any) -> float:
        self._require_short(node)
        return float(super().construct_yaml_float(node))

    def _require_short(self, node: Any) -> None:
        if len(node.value) > MAX_DIGITS:
            raise yaml.YAMLError(f"a number of {len(node.value)} characters")

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                raise yaml.YAMLError(f"key {key!r} is not a name")
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is there twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)


def _apply(data: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise BadInputError(f"change {change!r}: expected key=value, such as loss.kd_weight=0")
    for part in parts[:-1]:
        inner = data.setdefault(part, {})
        if not isinstance(inner, dict):
            raise BadInputError(f"change {change!r}: {part!r} holds {inner!r}, not settings")
        data = inner
    try:
        data[parts[-1]] = parse_yaml(text)
    except ValueError as error:
        raise BadInputError(f"change {change[:80]!r}: {one_line(error)}") from error


def _describe(problem: Any, model: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _names_at(model, location[:-1]), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {key!r}{hint}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{key}: {message}, found {problem['input']!r:.80}" if key else message


def _names_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    for part in location:
        if part in model.model_fields:
            inner = _model_in(model.model_fields[part].annotation)
            if inner is None:
                return []
            model = inner
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        if (found := _model_in(argument)) is not None:
            return found
    return None

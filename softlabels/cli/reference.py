"""spec: every key of a YAML file, with its default and what it means."""

import inspect
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Kind = Literal["capture", "capture-text", "import", "recipe", "ensemble", "run"]


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command(rich_help_panel="Help")(spec)


def spec(
    kind: Annotated[
        Kind,
        typer.Argument(
            help="capture: a classifier over Parquet. capture-text: a language model over text. "
            "import: recorded log-probs. recipe: for mix. ensemble: one table of several. "
            "run: for train."
        ),
    ],
) -> None:
    """Print every key of a YAML file: its default, or that it is required, and what it means.

    Example: softlabels spec capture-text > job.yaml
    """
    model = _model(kind)
    for line in (*_example(model), *_lines(model, "")):
        print(line)


def _example(model: "type[BaseModel]") -> Iterator[str]:
    """The example in the docstring of a model's module, where it begins with one, as comments."""
    text = inspect.cleandoc(sys.modules[model.__module__].__doc__ or "")
    first, _, rest = text.partition("\n\n")
    lines = list(itertools.takewhile(lambda line: line.startswith("    "), rest.splitlines()))
    if lines:
        yield from (f"#   {line[4:]}" for line in (f"    {first} For example:", *lines))


def _model(kind: Kind) -> "type[BaseModel]":
    if kind == "recipe":
        from softlabels.query.recipe import Recipe

        return Recipe
    if kind == "ensemble":
        from softlabels.query.materialise import EnsembleSpec

        return EnsembleSpec
    if kind == "run":
        from softlabels.student.spec import RunSpec

        return RunSpec
    if kind == "import":
        from softlabels.teacher.recorded.spec import ImportSpec

        return ImportSpec
    from softlabels.teacher.spec import CaptureSpec, SequenceCaptureSpec

    return CaptureSpec if kind == "capture" else SequenceCaptureSpec


def _lines(model: "type[BaseModel]", indent: str) -> Iterator[str]:
    meanings = _meanings(model)
    for attribute, field in model.model_fields.items():
        inner, shape = _inner(field.annotation)
        name, meaning = field.alias or attribute, meanings.get(attribute, "")
        if inner is None:
            yield f"{indent}{name}: {_default(field)}  # {meaning}".rstrip(" #")
            continue
        given = "" if field.is_required() else f" (default: {_default(field)})"
        yield f"{indent}{name}:  # {meaning}{given}"
        if shape == "named":
            yield f"{indent}  NAME:"
        lines = list(_lines(inner, indent + ("  " if shape == "one" else "    ")))
        if shape == "listed":
            lines[0] = f"{indent}  - {lines[0].strip()}"
        yield from lines


def _default(field: "FieldInfo") -> str:
    if field.is_required():
        return "REQUIRED"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if hasattr(value, "model_dump"):
        return "as below"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value) or '""'


def _inner(annotation: Any) -> "tuple[type[BaseModel] | None, str]":
    """The settings model in an annotation, and how it stands there: one, named or listed."""
    from pydantic import BaseModel

    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation, "one"
    arguments = get_args(annotation)
    for argument in arguments:
        found, shape = _inner(argument)
        if found is not None:
            if len(arguments) == 2 and arguments[0] is str and get_origin(annotation) is Mapping:
                shape = "named"
            return found, "listed" if get_origin(annotation) is tuple else shape
    return None, "one"


def _meanings(model: "type[BaseModel]") -> dict[str, str]:
    """What "Attributes:" in the docstrings of a model and its bases says of each key."""
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        text = inspect.cleandoc(one.__doc__ or "") if hasattr(one, "model_fields") else ""
        _, _, attributes = text.partition("Attributes:\n")
        name = ""
        for line in attributes.splitlines():
            if entry := re.match(r" {4}(\w+): (.*)", line):
                name = entry[1]
                found[name] = entry[2]
            elif line.startswith("        ") and name:
                found[name] += " " + line.strip()
            else:
                break
    return found

"""spec: every key of a YAML file, with its default and what it means."""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Kind = Literal["capture", "capture-text", "import", "recipe", "run"]


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command(rich_help_panel="Help")(spec)


def spec(
    kind: Annotated[
        Kind,
        typer.Argument(
            help="capture: a classifier over Parquet. capture-text: a language model over text. "
            "import: recorded log-probs. recipe: for mix. run: for train."
        ),
    ],
) -> None:
    """Print every key of a YAML file: its default, or that it is required, and what it means.

    Example: softlabels spec capture-text > job.yaml
    """
    for line in _lines(_model(kind), ""):
        print(line)


def _model(kind: Kind) -> "type[BaseModel]":
    if kind == "recipe":
        from softlabels.query.recipe import Recipe

        return Recipe
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
    for name, field in model.model_fields.items():
        inner, shape = _inner(field.annotation)
        meaning = meanings.get(name, "")
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

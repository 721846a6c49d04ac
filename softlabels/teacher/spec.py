"""The capture spec: which teacher labels which data, and what is kept."""

import math
import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from softlabels.fingerprint import canonical_json
from softlabels.schema import temperature_suffix
from softlabels.specs import load_spec

ROWS_PER_SHARD = 50_000


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TeacherSpec(_Settings):
    """A torch module that gives logits.

    Attributes:
        name: what people call it.
        revision: your own mark of its state.
        module: import path of a `torch.nn.Module` class, "package.module:Class" or "file.py:Class".
        arguments: its constructor arguments.
        weights: safetensors file; none when the module brings its own.
        classes: class names in order of id, or just how many there are.
    """

    name: str
    revision: str = ""
    module: str
    arguments: dict[str, Any] = {}
    weights: str | None = None
    classes: tuple[str, ...] | Annotated[int, Field(ge=2)]

    @field_validator("classes")
    @classmethod
    def _distinct(cls, classes: tuple[str, ...] | int) -> tuple[str, ...] | int:
        if isinstance(classes, tuple) and (len(classes) < 2 or len(set(classes)) < len(classes)):
            raise ValueError("expected at least two different class names")
        return classes

    @field_validator("arguments")
    @classmethod
    def _recordable(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            canonical_json(arguments)
        except (TypeError, ValueError) as error:
            raise ValueError("expected values that JSON can hold, without NaN") from error
        return arguments

    @property
    def num_classes(self) -> int:
        """V."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)


class SourceSpec(_Settings):
    """Parquet files and which of their columns mean what.

    Attributes:
        files: path or fsspec URL of Parquet files, wildcards allowed.
        columns: those that the teacher reads.
        decode: import path of `decode(columns: Mapping[str, pyarrow.Array])`, which gives the
            module's input: a tensor [B, ...].
        example_id: column with a stable key; none: the sha256 of the columns' content.
        label: column with the hard label, a class id or a class name; none: no labels.
    """

    files: str
    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    decode: str
    example_id: str | None = None
    label: str | None = None


class CaptureSpec(_Settings):
    """One pass of a teacher over a source, into a table.

    Attributes:
        table: where the labels go.
        teacher: who labels.
        source: what is labelled.
        carry: source columns copied into the table, so that a student needs nothing else.
        k: ids stored an example, at most the number of classes.
        temperatures: extra temperatures stored exactly; 1 always is.
        draws: m, ids drawn from outside the top k.
        draws_temperature: the temperature at which they are drawn; 1 or one of `temperatures`.
        profile: how values are rounded.
        seed: of the draws.
        shard_rows: source rows a shard; decides the units of the run.
        batch_size: rows the teacher sees at once.
        device: auto, cpu, cuda, cuda:0, mps.
    """

    table: str
    teacher: TeacherSpec
    source: SourceSpec
    carry: tuple[str, ...] = ()
    k: Annotated[int, Field(ge=0)] = 10
    temperatures: tuple[float, ...] = ()
    draws: Annotated[int, Field(ge=0, le=4096)] = 0
    draws_temperature: float = 1.0
    profile: Literal["compact", "precise"] = "precise"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    shard_rows: Annotated[int, Field(ge=1, le=10_000_000)] = ROWS_PER_SHARD
    batch_size: Annotated[int, Field(ge=1)] = 256
    device: str = "auto"

    @classmethod
    def read(cls, path: str | os.PathLike[str], changes: Sequence[str] = ()) -> Self:
        """The spec in a YAML file, with "dotted.key=value" changes that win over it.

        Raises:
            BadInputError: a key is unknown or a value is wrong.
        """
        return load_spec(path, cls, changes)

    @field_validator("table")
    @classmethod
    def _no_version(cls, table: str) -> str:
        if "@" in table.rsplit("/", 1)[-1]:
            raise ValueError("expected a table, not one version of it (TABLE@...)")
        return table

    @field_validator("temperatures")
    @classmethod
    def _usable(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if any(not math.isfinite(t) or t <= 0 for t in temperatures):
            raise ValueError("expected finite temperatures above 0")
        # Columns are named by six digits of T; 1 itself is always stored.
        suffixes = {temperature_suffix(t) for t in (1.0, *temperatures)}
        if len(suffixes) <= len(temperatures):
            raise ValueError("expected different temperatures, without 1, which is always stored")
        return tuple(sorted(temperatures))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.k > self.teacher.num_classes:
            raise ValueError(f"k is {self.k}, the teacher has {self.teacher.num_classes} classes")
        if self.profile == "compact" and self.temperatures:
            raise ValueError(
                "profile compact has no levels below -23.7 nats, which another temperature "
                "needs: use profile precise with temperatures"
            )
        if self.k == 0 and self.draws == 0:
            raise ValueError("k and draws are both 0: nothing would be stored")
        if self.draws_temperature not in (1.0, *self.temperatures):
            raise ValueError(
                f"draws_temperature {self.draws_temperature} is neither 1 nor in temperatures"
            )
        if len(set(self.carry)) < len(self.carry):
            raise ValueError("carry names a column twice")
        return self

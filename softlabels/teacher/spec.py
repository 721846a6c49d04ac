"""The capture spec: which teacher labels which data, and what is kept."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from softlabels.fingerprint import canonical_json
from softlabels.schema import SOURCE_FILE, SOURCE_ROW, temperature_suffix
from softlabels.specs import load_spec, load_spec_as

ROWS_PER_SHARD = 50_000
SEQUENCES_PER_SHARD = 2_000
"""Of 512 tokens they are a million positions, 75 MB stored."""


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
        augment: import path of `augment(inputs, seeds)`, which what `decode` gave goes through in
            augmented views; `seeds` is int64 [B]. What becomes of a row may hang on its own input
            and seed alone, for students replay it in other batches.
        views: augmented views that are labelled of each row, numbered from 1; 0: the plain row.
    """

    files: str
    columns: Annotated[tuple[str, ...], Field(min_length=1)]
    decode: str
    example_id: str | None = None
    label: str | None = None
    augment: str | None = None
    views: Annotated[int, Field(ge=0, le=10_000)] = 0

    @model_validator(mode="after")
    def _views_are_made(self) -> Self:
        if self.views and self.augment is None:
            raise ValueError(f"views is {self.views}, and augment names nothing that makes them")
        return self


class _Capture(_Settings):
    """What every capture says.

    Attributes:
        table: where the labels go.
        carry: source columns copied into the table, so that a student needs nothing else.
        temperatures: extra temperatures stored exactly; 1 always is.
        draws_temperature: the temperature at which draws are made; 1 or one of `temperatures`.
        seed: of the draws.
        device: auto, cpu, cuda, cuda:0, mps.
        threads: for `torch.set_num_threads`; none leaves it. Bits repeat for the same number.
    """

    table: str
    carry: tuple[str, ...] = ()
    k: Annotated[int, Field(ge=0)]
    temperatures: tuple[float, ...] = ()
    draws: Annotated[int, Field(ge=0, le=4096)]
    draws_temperature: float = 1.0
    profile: Literal["compact", "precise"]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    threads: Annotated[int, Field(ge=1)] | None = None

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


class CaptureSpec(_Capture):
    """One pass of a classifier over a source, into a table.

    Attributes:
        teacher: who labels.
        source: what is labelled.
        k: ids stored an example, at most the number of classes.
        draws: m, ids drawn from outside the top k.
        profile: how values are rounded.
        shard_rows: source rows a shard; decides the units of the run.
        batch_size: rows the teacher sees at once.
        carry_position: store where each row is in the source (source_file, source_row), so that
            a student reads what is not carried from there; some bytes a row.
    """

    teacher: TeacherSpec
    source: SourceSpec
    k: Annotated[int, Field(ge=0)] = 10
    draws: Annotated[int, Field(ge=0, le=4096)] = 0
    profile: Literal["compact", "precise"] = "precise"
    shard_rows: Annotated[int, Field(ge=1, le=10_000_000)] = ROWS_PER_SHARD
    batch_size: Annotated[int, Field(ge=1)] = 256
    carry_position: bool = False

    @property
    def carried(self) -> tuple[str, ...]:
        """The table's columns beside the labels."""
        return (*self.carry, *((SOURCE_FILE, SOURCE_ROW) if self.carry_position else ()))

    @classmethod
    def read(cls, path: str | os.PathLike[str], changes: Sequence[str] = ()) -> Self:
        """The spec in a YAML file, with "dotted.key=value" changes that win over it.

        Raises:
            BadInputError: a key is unknown or a value is wrong.
        """
        return load_spec(path, cls, changes)

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.teacher.num_classes:
            raise ValueError(f"k is {self.k}, the teacher has {self.teacher.num_classes} classes")
        return self

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        source = self.source
        made = (SOURCE_FILE, SOURCE_ROW) * self.carry_position + ("view",) * (source.views > 0)
        named = {*self.carry, *source.columns, source.example_id, source.label}
        if taken := [name for name in made if name in named]:
            raise ValueError(
                f"source column {taken[0]!r} has the name of one that capture makes: rename it"
            )
        return self


class ModelSpec(_Settings):
    """A language model of `transformers`.

    Attributes:
        name: what people call it.
        model: a folder, a hub repository, or a .gguf file.
        revision: of a hub repository; otherwise your own mark of its state.
        kind: "causal": the distribution after each token; "masked": at each masked one.
        tokenizer: folder or repository; none: the model's own.
        dtype: of the weights; logits are made float32 before anything is taken from them.
    """

    name: str
    model: str
    revision: str = ""
    kind: Literal["causal", "masked"] = "causal"
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class TextSpec(_Settings):
    """Text and how it becomes sequences of tokens. One of text, messages, input_ids.

    Attributes:
        files: path or fsspec URL, wildcards allowed. A .txt, .md or .rst file is one document;
            .jsonl and .parquet hold one a row.
        text: column with a document; "text" when nothing else is said.
        messages: column with a chat, a list of {role, content}; rendered by the chat template.
        input_ids: column with token ids; "position_index" beside it, if there, says which
            positions are labelled, "segment_ids" which document each token is of.
        example_id: column with a stable key of each document; none: the content's sha256.
        length: most tokens of a sequence, at most the model's context.
        packing: "packed": documents one after the other, cut every `length` tokens; "documents":
            a document begins a sequence.
        too_long: what becomes of a longer document where they are not packed.
        isolate: packed documents do not see each other, in the teacher and in the student.
        end: add the tokenizer's end-of-text token to each text; a chat ends as its template says.
        chat_template: file with a Jinja template; none: the tokenizer's.
        loss_on: which tokens of a chat are to be predicted.
        mask_rate: masked models: share of the tokens that are masked, by `seed`.
        shortest: documents of fewer tokens are left out, and counted.
    """

    files: str
    text: str | None = None
    messages: str | None = None
    input_ids: str | None = None
    example_id: str | None = None
    length: Annotated[int, Field(ge=2, le=1_000_000)] = 512
    packing: Literal["packed", "documents"] = "packed"
    too_long: Literal["split", "refuse", "drop"] = "split"
    isolate: bool = True
    end: bool = True
    chat_template: str | None = None
    loss_on: Literal["all", "assistant"] = "all"
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    shortest: Annotated[int, Field(ge=2)] = 2

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in ("text", "messages", "input_ids") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say what is read: give one of them")
        if self.messages is None and (self.loss_on == "assistant" or self.chat_template):
            raise ValueError("loss_on: assistant and chat_template are for chats: give messages")
        if self.input_ids is not None and self.packing == "packed":
            raise ValueError("input_ids are sequences already: say packing: documents")
        return self


class SequenceCaptureSpec(_Capture):
    """One pass of a language model over text, into a table.

    Attributes:
        teacher: who labels.
        source: what is labelled.
        k: ids stored a position.
        draws: m, ids drawn from outside the top k at each position.
        profile: how values are rounded.
        shard_rows: sequences a shard; decides the units of the run.
        batch_tokens: tokens the teacher sees at once, padding counted.
        head_rows: positions whose logits over the vocabulary are in memory at once.
    """

    teacher: ModelSpec
    source: TextSpec
    k: Annotated[int, Field(ge=0)] = 16
    draws: Annotated[int, Field(ge=0, le=4096)] = 16
    profile: Literal["compact", "precise"] = "compact"
    shard_rows: Annotated[int, Field(ge=1, le=10_000_000)] = SEQUENCES_PER_SHARD
    batch_tokens: Annotated[int, Field(ge=1)] = 4_096
    head_rows: Annotated[int, Field(ge=1)] = 256

    @model_validator(mode="after")
    def _carries(self) -> Self:
        if self.carry and self.source.packing == "packed":
            raise ValueError("carry: a packed sequence is of many documents: use packing documents")
        return self


def read_capture(
    path: str | os.PathLike[str], changes: Sequence[str] = ()
) -> CaptureSpec | SequenceCaptureSpec:
    """The spec in a YAML file: teacher.model is a language model, teacher.module any module.

    Raises:
        BadInputError: a key is unknown or a value is wrong.
    """

    def kind(data: Mapping[str, Any]) -> type[CaptureSpec] | type[SequenceCaptureSpec]:
        teacher = data.get("teacher")
        sequences = isinstance(teacher, dict) and "model" in teacher
        return SequenceCaptureSpec if sequences else CaptureSpec

    return load_spec_as(path, kind, changes)

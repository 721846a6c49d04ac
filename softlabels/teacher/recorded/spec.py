"""The import spec: which recorded log-probabilities become a table, and how they came about."""

import os
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softlabels.specs import load_spec
from softlabels.teacher.spec import SEQUENCES_PER_SHARD

Layout = Literal["openai", "vllm", "distillkit", "axolotl"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RecordedTeacher(_Settings):
    """Who spoke, by what you know of it: its weights cannot be looked at.

    Attributes:
        name: what people call it.
        revision: your own mark of its state, such as the name of an API's snapshot.
    """

    name: str
    revision: str = ""


class ImportSpec(_Settings):
    """Recorded log-probabilities of a language model, into a table.

    Attributes:
        table: where the labels go.
        layout: "openai": JSON lines of chat or completion responses with `top_logprobs`; "vllm":
            JSON lines with `prompt_logprobs` of dicts; "distillkit": its compressed Parquet;
            "axolotl": rows with `target_token_ids`, or chats with their log-probabilities.
        files: path or fsspec URL of .jsonl or .parquet files, wildcards allowed.
        tokenizer: the teacher's: a folder, a tokenizer.json, a .gguf file or a hub repository.
        teacher: who spoke.
        scale: "raw": of the model's own softmax; "processed": after temperature, penalties and
            truncation. Engines differ by mode, and the numbers do not show it: say which.
        temperature: at which processed values were recorded; only 1 can be used.
        top_p: of processed values; only 1 can be used, for truncation hides the tail.
        tail: "derived": 1 minus the head's mass; "unknown": store none.
        tail_error: how far a tail's mass may be off, where the files do not tell.
        k: ids kept a position; none: as many as every position has.
        profile: how values are rounded.
        tokens: what token strings are: "text" they stand for, or "vocabulary", its own spelling.
        prompts: begin a sequence with the prompt that its record holds.
        chat_template: file with a Jinja template for messages; none: the tokenizer's.
        example_id: field with a stable key; none: the sha256 of tokens and positions.
        messages: axolotl's field_messages.
        logprobs: axolotl's logprobs_field.
        targets: axolotl's rows: entry i is the distribution "after" token i, as its loss reads
            it, or "at" it (it foretells token i), as its chat_template strategy writes it.
        compression: DistillKit's YAML; none: compression_config.yaml beside the files.
        on_bad: "refuse": one bad record ends the import; "skip": it is left out, and counted.
        shard_rows: sequences a shard.
    """

    table: str
    layout: Layout
    files: str
    tokenizer: str
    teacher: RecordedTeacher
    scale: Literal["raw", "processed"]
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    tail: Literal["derived", "unknown"] = "derived"
    tail_error: Annotated[float, Field(gt=0, lt=1)] | None = None
    k: Annotated[int, Field(ge=1)] | None = None
    profile: Literal["compact", "precise"] = "precise"
    tokens: Literal["text", "vocabulary"] = "text"
    prompts: bool = True
    chat_template: str | None = None
    example_id: str | None = None
    messages: str = "messages"
    logprobs: str = "logprobs"
    targets: Literal["after", "at"] | None = None
    compression: str | None = None
    on_bad: Literal["refuse", "skip"] = "refuse"
    shard_rows: Annotated[int, Field(ge=1, le=10_000_000)] = SEQUENCES_PER_SHARD

    @classmethod
    def read(cls, path: str | os.PathLike[str], changes: Sequence[str] = ()) -> Self:
        """The spec in a YAML file, with "dotted.key=value" changes that win over it.

        Raises:
            BadInputError: a key is unknown or a value is wrong.
        """
        return load_spec(path, cls, changes)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Extra temperatures: none, for recorded values cannot be re-tempered."""
        return ()

    @property
    def carry(self) -> tuple[str, ...]:
        """Columns copied from the source: none."""
        return ()

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if "@" in self.table.rsplit("/", 1)[-1]:
            raise ValueError("table: expected a table, not one version of it (TABLE@...)")
        if self.scale == "processed" and self.temperature != 1:
            raise ValueError(
                f"scale processed at temperature {self.temperature!r}: expected temperature 1.0, "
                "for the distribution at 1 cannot be had from the top of another; record raw "
                "log-probabilities (vLLM: logprobs_mode raw_logprobs)"
            )
        if self.scale == "processed" and self.top_p != 1:
            raise ValueError(
                f"scale processed at top_p {self.top_p!r}: expected top_p 1.0, for what was cut "
                "off is not in the records; record raw log-probabilities"
            )
        if self.tail == "unknown" and self.tail_error is not None:
            raise ValueError("tail_error is of a derived tail: leave it out with tail unknown")
        if self.targets is not None and self.layout != "axolotl":
            raise ValueError(f"targets is for layout axolotl, the layout is {self.layout!r}")
        if self.compression is not None and self.layout != "distillkit":
            raise ValueError(f"compression is for layout distillkit, the layout is {self.layout!r}")
        return self

"""The run spec: which student learns from which plan, and how."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from softlabels.fingerprint import sha256_json, sha256_lines, sha256_stream
from softlabels.specs import load_spec
from softlabels.storage import storage_errors
from softlabels.student.temper import Divergence, TailMode

Positive = Annotated[int, Field(ge=1)]

Normalization = Literal["token", "sequence"]
"""Whether every position counts the same, or every sequence."""

Autocast = Literal["auto", "bfloat16", "none"]
"""What the student computes in where it is safe: "auto" is bfloat16 on a GPU that has it."""

Distributed = Literal["ddp", "fsdp"]
"""Whether several processes hold the whole student each, or a part of every parameter."""

Fused = Literal["auto", "always", "never"]
"""Whether a language model's logits are made inside the loss, chunk by chunk."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LanguageModelSpec(_Settings):
    """A language model of `transformers`, new or trained; give config or checkpoint.

    Attributes:
        config: of a new one: a folder with a config.json, a hub repository, or its settings,
            `{model_type: llama, hidden_size: 512, …}`; vocab_size is the plan's if left out.
        checkpoint: of a trained one: a folder or hub repository with safetensors.
        gradient_checkpointing: recompute layers in the backward pass: less memory, more time.
        dtype: of the weights.
    """

    config: str | Mapping[str, Any] | None = None
    checkpoint: str | None = None
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.config is None) == (self.checkpoint is None):
            found = f"config {self.config!r} and checkpoint {self.checkpoint!r}"
            raise ValueError(f"expected exactly one of config and checkpoint, found {found}")
        if isinstance(self.config, Mapping) and "model_type" not in self.config:
            raise ValueError(f"config: expected a model_type, found {sorted(self.config)!r}")
        return self


class StudentSpec(_Settings):
    """What learns; exactly one of module, causal_lm and masked_lm.

    Attributes:
        module: import path of what builds any `torch.nn.Module`, "package.module:Class" or
            "file.py:Class". For classification it gives logits [B, V]; for language models it is
            called as described in `softlabels.student.causal`.
        arguments: what `module` is called with.
        weights: safetensors file to start from; none: as the seed initialises it.
        causal_lm: a model of `transformers` for plans of alignment "next".
        masked_lm: one for alignment "same".
    """

    module: str | None = None
    arguments: Mapping[str, Any] = {}
    weights: str | None = None
    causal_lm: LanguageModelSpec | None = None
    masked_lm: LanguageModelSpec | None = None

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        names = ("module", "causal_lm", "masked_lm")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {names!r}, found {given!r}")
        if self.module is None and self.arguments:
            raise ValueError(f"arguments are for module; {given[0]} has a config")
        return self

    @property
    def language_model(self) -> LanguageModelSpec | None:
        """The model of `transformers`, whichever kind it is."""
        return self.causal_lm or self.masked_lm


class InputSpec(_Settings):
    """How columns become the student's input.

    Attributes:
        decode: import path of `decode(columns: Mapping[str, pyarrow.Array])`, which gives a
            tensor [B, ...], or a tuple or dict of tensors that the student is called with. It may
            hang on the columns alone.
        columns: those that it is handed.
        source: path or fsspec URL of the Parquet files that the teacher labelled, wildcards
            allowed, or several: columns that a table does not carry come from there.
        augment: import path of the function that the teacher's augmented views went through, as
            its capture named it: replays them.
        transform: import path of `transform(inputs, seeds)`: the student's own augmentation of
            what decode gave. `seeds`, int64 [B], are of (seed, example, view, epoch).
        threads: that read ahead and make inputs while the student learns; with more than one,
            decode and transform are called by several at once. 0: none, the training loop does.
    """

    decode: str | None = None
    columns: tuple[str, ...] = ()
    source: str | tuple[str, ...] = ()
    augment: str | None = None
    transform: str | None = None
    threads: Annotated[int, Field(ge=0, le=64)] = 1

    @property
    def sources(self) -> tuple[str, ...]:
        """Each pattern of source files."""
        return (self.source,) if isinstance(self.source, str) else self.source


class LossSpec(_Settings):
    """Loss = kd_weight T² KL(teacher‖student at T) + (1 - kd_weight) CE of the hard label.

    Attributes:
        tail: what stands for the mass outside the stored ids; see `distillation_loss`.
        temperature: T; other than 1 it must be stored in every table of the plan.
        kd_weight: 1: soft targets alone; 0: hard labels alone, the like-for-like baseline.
        divergence: "reverse" takes KL(student‖teacher) instead, which needs tail "bucket".
        normalization: language models: "token": the sum over positions of weight times loss is
            divided by the sum of weights of the whole step; "sequence": the positions of a row
            share the row's weight first. Neither depends on micro-batches.
        fused: language models: "auto" makes logits inside the loss wherever the student's are a
            linear function of its hidden states; "always" refuses others.
    """

    tail: TailMode = "bucket"
    temperature: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    kd_weight: Annotated[FiniteFloat, Field(ge=0, le=1)] = 1.0
    divergence: Divergence = "forward"
    normalization: Normalization = "token"
    fused: Fused = "auto"

    @model_validator(mode="after")
    def _reverse_has_a_bucket(self) -> Self:
        if self.divergence == "reverse" and self.tail != "bucket":
            raise ValueError(
                f"divergence 'reverse' with tail {self.tail!r}: only tail 'bucket' has a "
                "probability for every id that the student may choose"
            )
        return self


class OptimizerSpec(_Settings):
    """The optimiser and its learning rate.

    Attributes:
        name: of torch's optimisers.
        lr: the highest learning rate.
        weight_decay: decoupled for adamw.
        momentum: of sgd; adamw keeps its betas (0.9, 0.999).
        schedule: of the rate after the warm-up: to 0 along half a cosine, to 0 in a line, or not.
        warmup_steps: steps in which the rate rises in a line to `lr`.
        clip_norm: largest norm of the whole gradient; null: not clipped.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: Annotated[FiniteFloat, Field(gt=0, le=1e4)] = 3e-3
    weight_decay: Annotated[FiniteFloat, Field(ge=0)] = 0.01
    momentum: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip_norm: Annotated[FiniteFloat, Field(gt=0)] | None = 1.0


class EvaluateSpec(_Settings):
    """What the student is measured on while it learns.

    Attributes:
        plan: another plan, over the same label space; it is not trained on.
        every: steps between evaluations; there is always one after the last step.
        batch_size: rows of one forward pass; none: 256, or 8 sequences.
    """

    plan: str
    every: Positive = 1_000
    batch_size: Positive | None = None


class CheckpointSpec(_Settings):
    """When the run is saved.

    Attributes:
        every: steps between checkpoints.
        keep: the newest that stay.
    """

    every: Positive = 200
    keep: Positive = 2


class RunSpec(_Settings):
    """One training run. Relative paths are taken from the current folder.

    Attributes:
        plan: what to read, made by `softlabels mix`.
        roots: where tables are on this machine, by the plan's table names.
        out: local folder for checkpoints, metrics and the finished student.
        student: what learns; none when a live module is handed to `train`.
        inputs: what it sees.
        loss: what it minimises.
        optimizer: how.
        steps: optimiser steps; or
        epochs: passes over the plan. Exactly one of the two.
        batch_size: rows a step.
        micro_batch_size: rows of one forward pass, where a whole batch does not fit into memory;
            gradients add up to those of the whole batch.
        seed: of the student's initialisation, of dropout and of the reading order.
        evaluate: optional.
        checkpoint: when to save.
        classes: the label space that the student expects; a plan with another is refused.
        tokenizer: language models: the student's tokenizer.json, or a folder with it; a plan of
            another is refused. None: that of `student.*_lm.checkpoint`, if it has one.
        chat_template: file with the chat template that the student expects; the same.
        device: "auto" takes cuda where there is one; else a torch device such as "cpu".
        threads: for `torch.set_num_threads`; null leaves it. Bits repeat for the same number.
        autocast: what the student computes in where it is safe, while it learns; its weights stay
            as they are. "auto": bfloat16 on a GPU that has it, else nothing.
        compile: whether torch compiles the student: a slow first step, faster ones after it.
        distributed: how torchrun's processes share the work, where there are several: "ddp" copies
            the student, "fsdp" (FSDP2) shards it with its gradients and its optimiser.
        log_every: steps that one line of metrics.jsonl sums up.
    """

    plan: str
    roots: Mapping[str, str] = {}
    out: str
    student: StudentSpec | None = None
    inputs: InputSpec = InputSpec()
    loss: LossSpec = LossSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    steps: Positive | None = None
    epochs: Positive | None = None
    batch_size: Positive = 64
    micro_batch_size: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    evaluate: EvaluateSpec | None = None
    checkpoint: CheckpointSpec = CheckpointSpec()
    classes: tuple[str, ...] | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    device: str = "auto"
    threads: Positive | None = None
    autocast: Autocast = "auto"
    compile: bool = False
    distributed: Distributed = "ddp"
    log_every: Positive = 10

    @classmethod
    def read(cls, path: str | os.PathLike[str], changes: Sequence[str] = ()) -> Self:
        """The spec in a YAML file, with "dotted.key=value" changes that win over it.

        Raises:
            BadInputError: a key is unknown or a value is wrong.
        """
        return load_spec(path, cls, changes)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            found = f"steps {self.steps!r} and epochs {self.epochs!r}"
            raise ValueError(f"expected exactly one of steps and epochs, found {found}")
        if "://" in self.out:
            raise ValueError(f"out: expected a local folder, found {self.out!r}")
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the trained weights, as plain JSON values.

        A run continues only a run of the same identity. Places, device, threads, processes, what
        is compiled, how the work is cut up and how often it saves, logs or evaluates are left
        out: a run may move and be watched more closely. The plan counts by its fingerprint, not
        by its path; a tokenizer or template only has to fit it. Steps count, for the schedule
        ends there. Files that the student starts from count by their content, where they are on
        this machine.
        """
        places = {"plan", "roots", "out", "device", "threads", "micro_batch_size"}
        places |= {"distributed", "compile"}
        checks = {"tokenizer", "chat_template"}
        cadence = {"checkpoint", "evaluate", "log_every"}
        found = self.model_dump(mode="json", exclude=places | checks | cadence)
        found["loss"].pop("fused")
        # Source files are pinned by the tables' own rows.
        for name in ("source", "threads"):
            found["inputs"].pop(name)
        if self.autocast == "auto":
            del found["autocast"]
        for kind in ("causal_lm", "masked_lm"):
            if found["student"] and found["student"][kind]:
                found["student"][kind].pop("gradient_checkpointing")
        if found["student"]:
            _by_content(found["student"])
        # Settings that came after the first release count where they say something.
        for part, names in _LATER.items():
            for name, default in names.items():
                if found[part] and found[part][name] == default:
                    del found[part][name]
        return found

    def fingerprint(self) -> str:
        """The sha256 of `identity()`."""
        return sha256_json(self.identity())


def _by_content(student: dict[str, Any]) -> None:
    """Replaces the paths of what a student starts from by the sha256 of what is there."""
    for holder, name in (
        (student, "weights"),
        *((student[kind], key) for kind in _KINDS if student[kind] for key in _STARTS),
    ):
        if isinstance(path := holder[name], str) and (files := _files_of(Path(path), name)):
            holder[name] = "sha256:" + sha256_lines(f"{f.name} {_sha256_of(f)}" for f in files)


def _files_of(path: Path, part: str) -> list[Path]:
    if path.is_file():
        return [path]
    names = ["config.json"]
    if part != "config":
        names += ["*.safetensors", "*.safetensors.index.json"]
    return sorted(file for name in names for file in path.glob(name))


def _sha256_of(file: Path) -> str:
    state = file.stat()
    return _sha256(file, state.st_mtime_ns, state.st_size)


@cache
def _sha256(file: Path, changed: int, size: int) -> str:
    with storage_errors("read", str(file)), open(file, "rb") as stream:
        return sha256_stream(stream)


_KINDS = ("causal_lm", "masked_lm")
_STARTS = ("config", "checkpoint")
_LATER: dict[str, dict[str, Any]] = {
    "inputs": {"augment": None, "transform": None},
    "loss": {"divergence": "forward", "normalization": "token"},
    "student": {"causal_lm": None, "masked_lm": None},
}

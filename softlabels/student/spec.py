"""The run spec: which student learns from which plan, and how."""

import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from softlabels.fingerprint import sha256_json
from softlabels.specs import load_spec
from softlabels.student.temper import TailMode

Positive = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StudentSpec(_Settings):
    """Any `torch.nn.Module` that gives logits [B, V].

    Attributes:
        module: import path of what builds it, "package.module:Class" or "file.py:Class".
        arguments: what it is called with.
        weights: safetensors file to start from; none: as the seed initialises it.
    """

    module: str
    arguments: Mapping[str, Any] = {}
    weights: str | None = None


class InputSpec(_Settings):
    """How carried columns become the student's input.

    Attributes:
        decode: import path of `decode(columns: Mapping[str, pyarrow.Array])`, which gives a
            tensor [B, ...], or a tuple or dict of tensors that the student is called with.
        columns: carried columns to read.
    """

    decode: str | None = None
    columns: tuple[str, ...] = ()


class LossSpec(_Settings):
    """Loss = kd_weight T² KL(teacher‖student at T) + (1 - kd_weight) CE of the hard label.

    Attributes:
        tail: what stands for the mass outside the stored ids; see `distillation_loss`.
        temperature: T; other than 1 it must be stored in every table of the plan.
        kd_weight: 1: soft targets alone; 0: hard labels alone, the like-for-like baseline.
    """

    tail: TailMode = "bucket"
    temperature: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    kd_weight: Annotated[FiniteFloat, Field(ge=0, le=1)] = 1.0


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
    """

    plan: str
    every: Positive = 1_000


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
        seed: of the student's initialisation, of dropout and of the reading order.
        evaluate: optional.
        checkpoint: when to save.
        classes: the label space that the student expects; a plan with another is refused.
        device: "auto" takes cuda where there is one; else a torch device such as "cpu".
        threads: for `torch.set_num_threads`; null leaves it. Bits repeat for the same number.
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
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    evaluate: EvaluateSpec | None = None
    checkpoint: CheckpointSpec = CheckpointSpec()
    classes: tuple[str, ...] | None = None
    device: str = "auto"
    threads: Positive | None = None
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

        A run continues only a run of the same identity. Places, device, threads and how often it
        saves, logs or evaluates are left out: a run may move and be watched more closely. The
        plan counts by its fingerprint, not by its path. Steps count, for the schedule ends there.
        """
        places = {"plan", "roots", "out", "device", "threads"}
        cadence = {"checkpoint", "evaluate", "log_every"}
        return self.model_dump(mode="json", exclude=places | cadence)

    def fingerprint(self) -> str:
        """The sha256 of `identity()`."""
        return sha256_json(self.identity())

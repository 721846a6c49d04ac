"""What a spec names, made: the student, its decode function, device, optimiser and arithmetic."""

from typing import Any, Literal

import torch
from torch import nn

from softlabels.errors import BadInputError, one_line
from softlabels.imports import load_object
from softlabels.plan import Plan
from softlabels.student import checkpoint
from softlabels.student.batch import Decode
from softlabels.student.files import Files
from softlabels.student.inputs import Maker, input_columns, replaying
from softlabels.student.members import slot_plan
from softlabels.student.pretrained import build_language_model
from softlabels.student.spec import Autocast, OptimizerSpec, RunSpec, StudentSpec
from softlabels.student.zipped import SourceFiles, require_sources, zipped_columns


def build_student(spec: RunSpec, num_classes: int | None = None) -> nn.Module:
    """A new student as the spec says: its start weights, or from torch's random numbers.

    Args:
        spec: names it.
        num_classes: V, for a language model whose config does not say.

    Raises:
        BadInputError: the spec names none, what it names makes no module, or there are no such
            weights.
        MismatchError: the weights are another module's.
    """
    if spec.student is None:
        raise BadInputError("student: the spec names none: add student.module, or hand in a module")
    found = _built(spec.student, num_classes)
    if spec.student.weights is not None:
        weights = checkpoint.read_weights(spec.student.weights)
        checkpoint.load_weights(found, weights, repr(spec.student.weights))
    return found


def _built(asked: StudentSpec, num_classes: int | None) -> nn.Module:
    if asked.module is None:
        kind: Literal["causal_lm", "masked_lm"] = "causal_lm" if asked.causal_lm else "masked_lm"
        assert asked.language_model is not None
        return build_language_model(asked.language_model, kind, num_classes)
    build = load_object(asked.module)
    try:
        found = build(**asked.arguments)
    except TypeError as error:
        raise BadInputError(
            f"student.arguments {dict(asked.arguments)!r} do not fit {asked.module!r}: {error}"
        ) from error
    if not isinstance(found, nn.Module):
        raise BadInputError(
            f"student.module {asked.module!r}: expected a torch.nn.Module, found {type(found)!r}"
        )
    return found


def load_decode(spec: RunSpec) -> Decode:
    """The decode function that the spec names.

    Raises:
        BadInputError: it names none, or there is none.
    """
    if spec.inputs.decode is None:
        raise BadInputError(
            "inputs.decode: the spec names none: add it, or hand in a decode function"
        )
    return load_object(spec.inputs.decode)


def load_maker(spec: RunSpec, decode: Decode | None, device: torch.device) -> Maker:
    """What makes the inputs of a run's batches; its `decode` is that of evaluations, too.

    Args:
        spec: names its functions.
        decode: a live function in place of the one that the spec names.
        device: where the student is.

    Raises:
        BadInputError: the spec names none, or something that is not there.
    """
    asked = spec.inputs
    decode = decode or load_decode(spec)
    if asked.augment is not None:
        decode = replaying(decode, load_object(asked.augment), asked.columns)
    transform = None if asked.transform is None else load_object(asked.transform)
    return Maker(decode, transform, spec.seed, pin=device.type == "cuda")


def columns_of(spec: RunSpec) -> tuple[str, ...]:
    """The columns that a classifier's inputs are made of."""
    asked = spec.inputs
    return input_columns(asked.columns, asked.augment is not None, asked.transform is not None)


def open_source(spec: RunSpec, evaluation_plan: Plan | None = None) -> SourceFiles | None:
    """The source files of a run's inputs; None: it needs none.

    Raises:
        MismatchError: rows of the evaluation plan are of other files.
    """
    if not spec.inputs.sources:
        return None
    source = SourceFiles(spec.inputs.sources)
    if evaluation_plan is not None:
        plan = slot_plan(evaluation_plan, 0)
        files = Files(plan, plan.roots_of(spec.roots))
        require_sources(plan, files, source, zipped_columns(plan, spec.inputs.columns))
    return source


def pick_device(name: str) -> torch.device:
    """The torch device that a spec's `device` means.

    Raises:
        BadInputError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error)[:120]
        raise BadInputError(f"device {name!r} is not here: {reason}") from error
    return device


def make_optimizer(spec: OptimizerSpec, model: nn.Module) -> torch.optim.Optimizer:
    """The spec's optimiser over every parameter that asks for a gradient.

    Raises:
        BadInputError: the student has none.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise BadInputError("student: no parameter asks for a gradient: nothing can be trained")
    if spec.name == "sgd":
        return torch.optim.SGD(
            parameters, spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
        )
    return torch.optim.AdamW(parameters, spec.lr, weight_decay=spec.weight_decay)


def compile_student(model: nn.Module) -> None:
    """Has torch compile a student, however it is going to be called; its parameters keep names."""
    model.compile()
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        base.compile()
    if hasattr(model, "hidden_and_head"):
        own: Any = model.hidden_and_head
        object.__setattr__(model, "hidden_and_head", torch.compile(own))


def autocast_dtype(asked: Autocast, device: torch.device) -> torch.dtype | None:
    """What a student computes in where it is safe; None: in what its weights are."""
    if asked == "none":
        return None
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if asked == "bfloat16" or fast else None

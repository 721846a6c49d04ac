"""One training run in its folder: what it is made of, saves, and leaves behind.

out/checkpoints/step-…/    see `checkpoint`
out/metrics.jsonl          see `metrics`
out/student.safetensors    the finished student
out/config.json            with model.safetensors and, if known, tokenizer.json: so that
                           transformers loads a student of its own
out/student.json           written last: the run is finished when it is there
"""

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn

from softlabels.errors import BadInputError, DataError, one_line
from softlabels.fingerprint import sha256_bytes
from softlabels.imports import load_object, source_sha256
from softlabels.plan import Plan
from softlabels.storage import open_root
from softlabels.student import checkpoint
from softlabels.student.batch import Decode, LabelSpace, label_space
from softlabels.student.causal import Forward
from softlabels.student.checkpoint import STUDENT
from softlabels.student.evaluate import evaluate, make_forward
from softlabels.student.fit import tokenizer_of
from softlabels.student.metrics import MetricsLog
from softlabels.student.pretrained import build_language_model, leave_folder
from softlabels.student.sequences import COLUMNS
from softlabels.student.spec import OptimizerSpec, RunSpec, StudentSpec
from softlabels.student.stream import Stream

RESULT = "student.json"
CHECKPOINTS = "checkpoints"


@dataclass
class Run:
    """What a step needs, and how far the run is.

    Attributes:
        spec: what to do.
        model: the student, on `device`.
        decode: makes its input from carried columns; None: it takes sequences.
        forward: its call on a batch.
        stream: gives batches, from where the run is.
        optimizer: over the student's trained parameters.
        log: metrics.jsonl.
        lineage: what checkpoints and student.json say of where the student comes from.
        evaluation_plan: None: no evaluation.
        space: what its classes or tokens are.
        device: where the student is.
        total: steps of the whole run.
        step: steps done.
        epoch: of the last step, from 0.
    """

    spec: RunSpec
    model: nn.Module
    decode: Decode | None
    forward: Forward
    stream: Stream
    optimizer: torch.optim.Optimizer
    log: MetricsLog
    lineage: Mapping[str, Any]
    evaluation_plan: Plan | None
    space: LabelSpace
    device: torch.device
    total: int
    step: int = 0
    epoch: int = 0

    @classmethod
    def prepare(
        cls,
        spec: RunSpec,
        plan: Plan,
        evaluation_plan: Plan | None,
        model: nn.Module | None,
        decode: Decode | None,
    ) -> Self:
        """The run before its first step. Seeds torch, then builds the student, in this order."""
        temperature = spec.loss.temperature
        space = label_space(plan, "the plan")
        stream = Stream(
            plan,
            batch_size=spec.batch_size,
            seed=spec.seed,
            epochs=spec.epochs,
            columns=spec.inputs.columns if space.alignment is None else COLUMNS,
            temperatures=() if temperature == 1 else (temperature,),
            roots=plan.roots_of(spec.roots),
        )
        decode = (decode or load_decode(spec)) if space.alignment is None else None
        device = pick_device(spec.device)
        torch.manual_seed(spec.seed)
        model = build_student(spec, space.num_classes) if model is None else model
        model.to(device)
        return cls(
            spec=spec,
            model=model,
            decode=decode,
            forward=make_forward(model, space, decode, device, spec.loss.fused),
            stream=stream,
            optimizer=make_optimizer(spec.optimizer, model),
            log=MetricsLog(Path(spec.out), spec.log_every),
            lineage=_lineage(spec, plan, model, decode),
            evaluation_plan=evaluation_plan,
            space=space,
            device=device,
            total=spec.steps or (spec.epochs or 0) * stream.batches_per_epoch,
        )

    def restore(self, saved: checkpoint.Checkpoint | None) -> None:
        """Puts the run where `saved` left it; None: at the start."""
        if saved is None:
            self.log.resume(0, None)
            return
        checkpoint.load_weights(self.model, saved.student, f"checkpoint {str(saved.path)!r}")
        checkpoint.load_optimizer(self.model, self.optimizer, saved.optimizer)
        self.stream.load_state_dict(saved.state["stream"])
        self.step, self.epoch = int(saved.state["step"]), int(saved.state["epoch"])
        self.log.resume(self.step, saved.state["log"])
        checkpoint.restore_random_state(saved.state["random"])

    def save(self) -> Path:
        """A new checkpoint of the run as it is now; DataError when a parameter is not finite."""
        self._require_finite()
        state = {
            **self.lineage,
            "step": self.step,
            "epoch": self.epoch,
            "stream": self.stream.state_dict(),
            "log": self.log.state_dict(),
            "random": checkpoint.random_state(),
        }
        return checkpoint.save(
            Path(self.spec.out) / CHECKPOINTS,
            self.step,
            self.model.state_dict(),
            checkpoint.optimizer_tensors(self.model, self.optimizer),
            state,
            self.spec.checkpoint.keep,
        )

    def evaluate(self) -> dict[str, Any] | None:
        """The student's figures now, also written to the metrics; None without such a plan."""
        if self.evaluation_plan is None:
            return None
        found = evaluate(
            self.model,
            self.evaluation_plan,
            self.decode,
            self.spec.inputs.columns,
            batch_size=self.spec.evaluate.batch_size if self.spec.evaluate is not None else None,
            roots=self.evaluation_plan.roots_of(self.spec.roots),
            device=self.device,
            fused=self.spec.loss.fused,
        ).as_dict()
        figures = {name: value for name, value in found.items() if name != "bins"}
        self.log.write({"step": self.step, "epoch": self.epoch, "evaluation": figures})
        return found

    def finish(self) -> tuple[Path, dict[str, Any]]:
        """The finished student's file and record; the record is written last.

        Raises:
            DataError: a parameter is not finite.
        """
        self._require_finite()
        root = open_root(self.spec.out)
        record = {
            **self.lineage,
            "steps": self.step,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "train": self.log.last,
            "evaluation": self.evaluate(),
        }
        data = checkpoint.tensor_bytes(self.model.state_dict())
        root.write(STUDENT, data)
        left = leave_folder(Path(self.spec.out), self.model, tokenizer_of(self.spec))
        record["student_sha256"] = sha256_bytes(data)
        record["files_sha256"] = {name: sha256_bytes(root.read(name)) for name in left}
        record["sha256"] = checkpoint.record_sha256(record)  # of all but itself
        root.write(RESULT, json.dumps(record, indent=1).encode())
        return Path(self.spec.out) / STUDENT, record

    def _require_finite(self) -> None:
        # A finite loss may still make a step that overflows; it must not replace a good checkpoint.
        for name, parameter in self.model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise DataError(
                    f"step {self.step}: parameter {name!r} is not finite after it, so nothing was "
                    "saved and earlier checkpoints stay: lower optimizer.lr"
                )


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


def _lineage(spec: RunSpec, plan: Plan, model: nn.Module, decode: Decode | None) -> dict[str, Any]:
    """Where a student comes from, plain JSON."""
    packages = checkpoint.package_versions()
    if spec.student is not None and spec.student.language_model is not None:
        packages["transformers"] = importlib.metadata.version("transformers")
    tables = [
        {
            "name": table.name,
            "version": table.version,
            "snapshot_digest": table.snapshot_digest,
            "teacher_fingerprint": table.contents.teacher.fingerprint(),
            "contents": table.contents.model_dump(mode="json"),
            # Left out where it says nothing, as before tables had one.
            **({} if table.temperature == 1 else {"temperature": table.temperature}),
        }
        for table in plan.tables.values()
    ]
    return {
        "identity": spec.identity(),
        "identity_sha256": spec.fingerprint(),
        "spec": spec.model_dump(mode="json"),
        "plan_fingerprint": plan.fingerprint,
        "tables": tables,
        "code": {
            "student": f"{type(model).__module__}:{type(model).__qualname__}",
            "student_sha256": source_sha256(type(model)),
            "decode_sha256": None if decode is None else source_sha256(decode),
        },
        "packages": packages,
        "threads": torch.get_num_threads(),
    }

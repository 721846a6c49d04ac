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
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from softlabels.errors import DataError
from softlabels.fingerprint import sha256_bytes, sha256_json
from softlabels.imports import load_object, source_sha256
from softlabels.plan import Plan
from softlabels.storage import open_root
from softlabels.student import checkpoint
from softlabels.student.batch import Decode, LabelSpace, label_space
from softlabels.student.build import (
    autocast_dtype,
    build_student,
    columns_of,
    compile_student,
    load_decode,
    load_maker,
    make_optimizer,
    open_source,
    pick_device,
)
from softlabels.student.causal import LanguageModel
from softlabels.student.checkpoint import STUDENT
from softlabels.student.evaluate import evaluate, make_forward
from softlabels.student.fit import tokenizer_of
from softlabels.student.group import Group
from softlabels.student.making import InputStream
from softlabels.student.metrics import MetricsLog
from softlabels.student.pretrained import leave_folder
from softlabels.student.profile import Clock, profile
from softlabels.student.sequences import COLUMNS, row_slices
from softlabels.student.sharding import copied, gathered, own_part, placed, sharded, whole
from softlabels.student.spec import RunSpec
from softlabels.student.step import Figures, Loss
from softlabels.student.stream import Batch, Stream
from softlabels.student.zipped import SourceFiles

RESULT = "student.json"
CHECKPOINTS = "checkpoints"
SPARE_ROWS = 8


@dataclass
class Run:
    """What a step needs, and how far the run is.

    Attributes:
        spec: what to do.
        group: the processes of the run; only rank 0 writes.
        plan: what it reads.
        model: the student, on `device`.
        decode: makes its input from carried columns; None: it takes sequences.
        source: where columns are that tables do not carry; None: they carry all.
        loss: the student's call on a batch with its loss, spread over the ranks.
        stream: gives this rank's part of batches, from where the run is.
        optimizer: over the student's trained parameters.
        log: metrics.jsonl.
        lineage: what checkpoints and student.json say of where the student comes from.
        evaluation_plan: None: no evaluation.
        space: what its classes or tokens are.
        device: where the student is.
        clock: what the time is spent on.
        total: steps of the whole run.
        step: steps done.
        epoch: of the last step, from 0.
        begun: steps that were done when this process began.
        saved: step of the newest checkpoint; 0: there is none.
        spare: some rows, for steps in which this rank has none.
    """

    spec: RunSpec
    group: Group
    plan: Plan
    model: nn.Module
    decode: Decode | None
    source: SourceFiles | None
    loss: nn.Module
    stream: Stream | InputStream
    optimizer: torch.optim.Optimizer
    log: MetricsLog
    lineage: Mapping[str, Any]
    evaluation_plan: Plan | None
    space: LabelSpace
    device: torch.device
    clock: Clock
    total: int
    step: int = 0
    epoch: int = 0
    begun: int = 0
    saved: int = 0
    spare: Batch | None = None

    @classmethod
    def prepare(
        cls,
        spec: RunSpec,
        plan: Plan,
        evaluation_plan: Plan | None,
        model: nn.Module | None,
        decode: Decode | None,
        group: Group | None = None,
        exact_clock: bool = False,
    ) -> Self:
        """The run before its first step. Seeds torch, then builds the student, in this order."""
        group = group or Group()
        space = label_space(plan, "the plan")
        source = open_source(spec, evaluation_plan)
        stream = make_stream(spec, plan, group, source)
        device = pick_device(spec.device)
        plain, maker = decode, None
        if space.alignment is None:
            plain = decode or load_decode(spec)
            maker = load_maker(spec, plain, device)
        decode = None if maker is None else maker.decode
        torch.manual_seed(spec.seed)
        model = build_student(spec, space.num_classes) if model is None else model
        model.to(device)
        lineage = _lineage(spec, plan, model, plain)
        clock = Clock(device, exact_clock)
        forward = make_forward(model, space, decode, device, spec.loss.fused, clock)
        if group.size > 1 and spec.distributed == "fsdp" and isinstance(forward, LanguageModel):
            # All ranks must make the same calls of a sharded student.
            forward.look_only_at(first_rows(spec, plan, source))
        if spec.compile:
            compile_student(model)
        loss = Loss(model, forward, spec.loss, device, autocast_dtype(spec.autocast, device), clock)
        return cls(
            spec=spec,
            group=group,
            plan=plan,
            model=model,
            decode=decode,
            source=source,
            loss=loss,
            stream=InputStream(stream, maker, spec.inputs.threads) if maker else stream,
            optimizer=make_optimizer(spec.optimizer, model),
            log=MetricsLog(Path(spec.out), spec.log_every, writes=group.rank == 0),
            lineage=lineage,
            evaluation_plan=evaluation_plan,
            space=space,
            device=device,
            clock=clock,
            total=spec.steps or (spec.epochs or 0) * stream.batches_per_epoch,
        )

    def spread(self) -> None:
        """Shares the student out among the ranks; every rank must call it, before `restore`."""
        if self.sharded:
            self.loss = sharded(self.loss)
            # Sharding has given the student other parameters.
            self.optimizer = make_optimizer(self.spec.optimizer, self.model)
        elif self.group.size > 1:
            self.loss = copied(self.loss)

    def restore(self, saved: checkpoint.Checkpoint | None) -> None:
        """Puts the run where `saved` left it; None: at the start."""
        if saved is None:
            self.log.resume(0, None)
            return
        student = placed(saved.student, self.model.state_dict())
        checkpoint.load_weights(self.model, student, f"checkpoint {str(saved.path)!r}")
        checkpoint.load_optimizer(self.model, self.optimizer, saved.optimizer)
        self.stream.load_state_dict(saved.state["stream"])
        self.step, self.epoch = int(saved.state["step"]), int(saved.state["epoch"])
        self.begun = self.saved = self.step
        self.log.resume(self.step, saved.state["log"])
        checkpoint.restore_random_state(saved.state["random"])

    @property
    def sharded(self) -> bool:
        """Whether ranks hold parts of the student."""
        return self.group.size > 1 and self.spec.distributed == "fsdp"

    def spare_rows(self) -> Batch:
        """Some rows for a step in which this rank has none: of another step, or the plan's."""
        if self.spare is None:
            self.spare = first_rows(self.spec, self.plan, self.source)
        return self.spare

    def keep_spare(self, batch: Batch) -> None:
        """Has `spare_rows` give some of these, where there may come a step without."""
        if self.group.size > 1 and len(batch):
            self.spare, _ = next(row_slices(batch, SPARE_ROWS))

    def draw_anew(self) -> None:
        """Seeds a rank's random numbers for this step, so that ranks differ and a stop is nothing.

        A run of one process draws on, and its checkpoints hold where it was.
        """
        if self.group.size > 1:
            digest = sha256_json([self.spec.seed, self.step, self.group.rank, "step"])
            torch.manual_seed(int(digest[:15], 16))

    def note(self, found: Figures) -> None:
        """Counts the step that was just done in the metrics."""
        self.log.add(
            {"step": self.step, "epoch": self.epoch, "lr": self.optimizer.param_groups[0]["lr"]},
            loss=found.loss,
            kl=found.kl if math.isfinite(found.kl) else None,
            hard_ce=found.hard,
            rows=found.rows,
            waited=found.waited,
            tokens=found.tokens,
        )

    def save(self) -> Path:
        """A new checkpoint of the run as it is now, by rank 0; every rank must call it.

        Raises:
            DataError: a parameter is not finite.
            StorageError: it cannot be written.
        """
        self._require_finite()
        student = whole(self.model.state_dict())
        optimizer = whole(checkpoint.optimizer_tensors(self.model, self.optimizer))
        state = {
            **self.lineage,
            "step": self.step,
            "epoch": self.epoch,
            "stream": self.stream.state_dict(),
            "log": self.log.state_dict(),
            "random": checkpoint.random_state(),
        }
        folder, keep = Path(self.spec.out) / CHECKPOINTS, self.spec.checkpoint.keep
        self.saved = self.step

        def save() -> str:
            return str(checkpoint.save(folder, self.step, student, optimizer, state, keep))

        return Path(self.group.first(save))

    def evaluate(self) -> dict[str, Any] | None:
        """The student's figures now, also written to the metrics; None without such a plan.

        Every rank reads the whole plan: a sharded student needs them all, and a copied one is
        done no sooner than the slowest.
        """
        if self.evaluation_plan is None:
            return None
        with gathered(self.loss):
            found = evaluate(
                self.model,
                self.evaluation_plan,
                self.decode,
                columns_of(self.spec),
                batch_size=self.spec.evaluate.batch_size if self.spec.evaluate else None,
                roots=self.evaluation_plan.roots_of(self.spec.roots),
                device=self.device,
                fused=self.spec.loss.fused,
                source=self.source,
            ).as_dict()
        figures = {name: value for name, value in found.items() if name != "bins"}
        self.log.write({"step": self.step, "epoch": self.epoch, "evaluation": figures})
        return found

    def finish(self) -> tuple[Path, dict[str, Any]]:
        """The finished student's file and record; the record is written last, by rank 0.

        Raises:
            DataError: a parameter is not finite.
        """
        self._require_finite()
        record = {
            **self.lineage,
            "steps": self.step,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "train": self.log.last,
            "time": profile(self.clock.stop(), self.step - self.begun),
            "evaluation": self.evaluate(),
        }
        student = whole(self.model.state_dict())
        record = self.group.first(lambda: self._leave(student, record))
        return Path(self.spec.out) / STUDENT, record

    def _leave(self, student: Mapping[str, Tensor], record: dict[str, Any]) -> dict[str, Any]:
        root, data = open_root(self.spec.out), checkpoint.tensor_bytes(student)
        root.write(STUDENT, data)
        left = leave_folder(Path(self.spec.out), self.model, tokenizer_of(self.spec))
        record["student_sha256"] = sha256_bytes(data)
        record["files_sha256"] = {name: sha256_bytes(root.read(name)) for name in left}
        record["sha256"] = checkpoint.record_sha256(record)  # of all but itself
        root.write(RESULT, json.dumps(record, indent=1).encode())
        return record

    def _require_finite(self) -> None:
        # A finite loss may still make a step that overflows; it must not replace a good checkpoint.
        def look() -> None:
            for name, parameter in self.model.named_parameters():
                if not bool(torch.isfinite(own_part(parameter)).all()):
                    raise DataError(
                        f"step {self.step}: parameter {name!r} is not finite after it, so nothing "
                        "was saved and earlier checkpoints stay: lower optimizer.lr"
                    )

        self.group.together(look)


def make_stream(
    spec: RunSpec,
    plan: Plan,
    group: Group,
    source: SourceFiles | None = None,
    batch_size: int | None = None,
) -> Stream:
    """The stream of a run: a rank's part of each of its batches."""
    temperature = spec.loss.temperature
    classes = label_space(plan, "the plan").alignment is None
    return Stream(
        plan,
        batch_size=batch_size or spec.batch_size,
        seed=spec.seed,
        epochs=spec.epochs,
        columns=columns_of(spec) if classes else COLUMNS,
        temperatures=() if temperature == 1 else (temperature,),
        roots=plan.roots_of(spec.roots),
        rank=group.rank,
        world_size=group.size,
        source=source,
    )


def first_rows(spec: RunSpec, plan: Plan, source: SourceFiles | None = None) -> Batch:
    """The first rows of a run, at most SPARE_ROWS, whole on every rank."""
    return next(iter(make_stream(spec, plan, Group(), source, SPARE_ROWS)))


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
            **{
                f"{name}_sha256": source_sha256(load_object(path))
                for name in ("augment", "transform")
                if (path := getattr(spec.inputs, name)) is not None
            },
        },
        "packages": packages,
        "threads": torch.get_num_threads(),
    }

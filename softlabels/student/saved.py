"""Finished and begun runs, read again: are they this spec's, and how good is the student?"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from softlabels.errors import BadInputError, IntegrityError, MismatchError, one_line
from softlabels.fingerprint import sha256_bytes
from softlabels.lineage import Contents
from softlabels.plan import Plan
from softlabels.specs import validate
from softlabels.student import checkpoint
from softlabels.student.batch import LabelSpace, label_space
from softlabels.student.build import build_student, columns_of, load_maker, open_source, pick_device
from softlabels.student.checkpoint import STUDENT
from softlabels.student.evaluate import Evaluation, evaluate
from softlabels.student.fit import require_inputs, require_student, require_tokens
from softlabels.student.pretrained import CONFIG
from softlabels.student.run import RESULT
from softlabels.student.spec import LanguageModelSpec, RunSpec
from softlabels.student.tokens import NAME

_ADVICE = f"remove {RESULT} to train on from the newest checkpoint"


def read_result(out: Path) -> dict[str, Any] | None:
    """What student.json says; None when the run in `out` is not finished.

    Raises:
        IntegrityError: it cannot be read, or it or a file that it describes was changed.
    """
    path = out / RESULT
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
        said = {RESULT: record["sha256"], STUDENT: record["student_sha256"]}
        beside = record["files_sha256"]
        if not set(beside) <= {CONFIG, NAME}:  # another name may be a path to anywhere
            raise ValueError(f"files_sha256 names {sorted(beside)!r}")
        said |= beside
        rest = {name: value for name, value in record.items() if name != "sha256"}
        found = {name: sha256_bytes((out / name).read_bytes()) for name in said if name != RESULT}
        found[RESULT] = checkpoint.record_sha256(rest)
    except (OSError, *checkpoint.DAMAGED) as error:
        raise IntegrityError(
            f"{str(path)!r} is damaged, or of another release: {one_line(error)}; {_ADVICE}"
        ) from error
    for name, expected in said.items():
        if found[name] != expected:
            raise IntegrityError(
                f"{str(out / name)!r} has sha256 {found[name]!r}, {RESULT} says {expected!r}: it "
                f"was changed; {_ADVICE}"
            )
    return cast(dict[str, Any], record)


def restore_student(out: Path, record: Mapping[str, Any], model: nn.Module | None) -> Path:
    """The file of a finished student, also loaded into `model` where one is given."""
    if model is not None:
        weights = checkpoint.read_weights(out / STUDENT)
        checkpoint.load_weights(model, weights, f"run {str(out)!r}")
    return out / STUDENT


def require_same(spec: RunSpec, plan: Plan, found: Mapping[str, Any], where: str) -> None:
    """Raises MismatchError with both values unless `found` records this spec on this plan."""
    advice = "give another out, or remove that folder to start over"
    if found["plan_fingerprint"] != plan.fingerprint:
        raise MismatchError(
            f"{where} was trained on plan {found['plan_fingerprint']!r}, {spec.plan!r} is "
            f"{plan.fingerprint!r}: {advice}"
        )
    ours, theirs = dict(_flat(spec.identity())), dict(_flat(found["identity"]))
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            raise MismatchError(
                f"{where} was trained with {key} {theirs.get(key)!r}, the spec says "
                f"{ours.get(key)!r}: {advice}"
            )


def read_run(path: str | os.PathLike[str]) -> RunSpec:
    """The spec of a run: of a finished run's folder, wherever it is now, or in a YAML file.

    Raises:
        BadInputError: it is neither.
        IntegrityError: the folder's student is not the one that its record describes.
    """
    folder = Path(path)
    if not folder.is_dir():
        return RunSpec.read(path)
    record = read_result(folder)
    if record is None:
        raise BadInputError(
            f"{str(path)!r} holds no finished run (no {RESULT}): give one, or a RUN.yaml with "
            "--student WEIGHTS"
        )
    spec = validate(RunSpec, record["spec"], str(folder / RESULT))
    return spec.model_copy(update={"out": str(folder)})


def evaluate_saved(spec: RunSpec, plan: Plan, weights: str | None = None) -> Evaluation:
    """The figures on `plan` of a student that was saved.

    Args:
        spec: names the student and its inputs.
        plan: what to measure on.
        weights: safetensors file; None: the finished student in `spec.out`.

    Raises:
        BadInputError: there are no such weights, or the spec names no student.
        MismatchError: weights, student and the plan's label space do not fit each other.
    """
    space = label_space(plan, "the evaluation plan")
    record = read_result(Path(spec.out))
    if record is not None and record["spec"]["student"] == spec.model_dump(mode="json")["student"]:
        spec = _from_its_folder(spec)
    require_student(spec, space)
    if record is not None:
        trained = Contents.model_validate(record["tables"][0]["contents"])
        LabelSpace.of(trained).require(space, "the student", "the evaluation plan")
    require_tokens(spec, plan, "the evaluation plan")
    require_inputs(spec, plan)
    path = weights or str(Path(spec.out) / STUDENT)
    tensors = checkpoint.read_weights(path)
    device = pick_device(spec.device)
    decode = load_maker(spec, None, device).decode if space.alignment is None else None
    model = build_student(spec, space.num_classes)
    checkpoint.load_weights(model, tensors, repr(path))
    return evaluate(
        model.to(device),
        plan,
        decode,
        columns_of(spec),
        batch_size=spec.evaluate.batch_size if spec.evaluate is not None else None,
        roots=plan.roots_of(spec.roots),
        device=device,
        fused=spec.loss.fused,
        source=open_source(spec),
    )


def _from_its_folder(spec: RunSpec) -> RunSpec:
    """The spec with what its finished student left, for its origin may be gone."""
    asked = spec.student.language_model if spec.student is not None else None
    if spec.student is None or asked is None or not (Path(spec.out) / CONFIG).is_file():
        return spec
    kept = LanguageModelSpec(config=spec.out, dtype=asked.dtype)
    kind = "causal_lm" if spec.student.causal_lm else "masked_lm"
    student = spec.student.model_copy(update={kind: kept, "weights": None})
    left = spec.out if (Path(spec.out) / NAME).is_file() else None
    return spec.model_copy(update={"student": student, "tokenizer": spec.tokenizer or left})


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as ("outer.inner", value)."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    else:
        yield key, value

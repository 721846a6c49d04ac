"""Whether plan, student, loss and tokenizer fit each other: asked before any work is done."""

from collections.abc import Sequence
from pathlib import Path

from softlabels.errors import BadInputError, MismatchError
from softlabels.imports import load_object, source_sha256
from softlabels.plan import Plan
from softlabels.student.batch import LabelSpace, label_space
from softlabels.student.members import slot_plan
from softlabels.student.servable import require_servable
from softlabels.student.spec import InputSpec, LossSpec, RunSpec
from softlabels.student.tokens import NAME, own_template_sha256, template_sha256, tokenizer_sha256
from softlabels.student.zipped import zipped_columns

_KINDS = {"next": "causal_lm", "same": "masked_lm"}


def require_fit(spec: RunSpec) -> tuple[Plan, Plan | None]:
    """The training plan and the evaluation plan, when they serve the spec; builds no student.

    Raises:
        BadInputError: there is no such plan, or the spec asks for what its kind of plan has not.
        MismatchError: a label space, tokenizer, temperature, column or draw does not fit.
    """
    plan = Plan.read(spec.plan)
    space = label_space(plan, "the plan")
    if spec.classes is not None:
        asked = space._replace(num_classes=len(spec.classes), classes=spec.classes)
        asked.require(space, "the spec (classes)", "the plan")
    require_student(spec, space)
    require_tokens(spec, plan, "the plan")
    require_inputs(spec, plan)
    require_servable(plan, spec.loss, _carried(spec))
    other = Plan.read(spec.evaluate.plan) if spec.evaluate is not None else None
    names = {*plan.tables, *(other.tables if other else ())}
    if unknown := sorted(set(spec.roots) - names):
        raise BadInputError(
            f"roots: no plan of the run reads a table {unknown[0]!r}; they read {sorted(names)!r}"
        )
    if other is None:
        return plan, None
    space.require(label_space(other, "the evaluation plan"), "the plan", "the evaluation plan")
    require_tokens(spec, other, "the evaluation plan")
    # Evaluation is at temperature 1 and needs neither draws nor tails, whatever the loss is.
    require_inputs(spec, other)
    require_servable(other, LossSpec(kd_weight=0), _carried(spec))
    return plan, other


def require_inputs(spec: RunSpec, plan: Plan) -> None:
    """Raises unless the student's inputs can be made as the teacher's were.

    Raises:
        BadInputError: a table carries neither a column nor where it is in the source; or it holds
            augmented views, and the spec names nothing that replays them.
        MismatchError: what the spec names is not what the views were made by.
    """
    tables = slot_plan(plan, 0)
    if spec.inputs.sources:
        zipped_columns(tables, spec.inputs.columns)
    for name, table in tables.tables.items():
        made = table.contents.augment
        if made is None:
            continue
        if spec.inputs.augment is None:
            raise BadInputError(
                f"inputs.augment: table {name!r} holds views of rows that {made.function!r} has "
                "augmented: expected the import path of that function, which replays them"
            )
        found = source_sha256(load_object(spec.inputs.augment))
        if found != made.code_sha256 or spec.inputs.augment.rpartition(":")[2] != made.function:
            raise MismatchError(
                f"inputs.augment: {spec.inputs.augment!r} is in a file of sha256 {found!r}, the "
                f"views of table {name!r} were made by {made.function!r} in {made.code_sha256!r}: "
                "they would be replayed as something else"
            )


def _carried(spec: RunSpec) -> Sequence[str]:
    """Columns that tables must carry."""
    return () if spec.inputs.sources else spec.inputs.columns


def require_student(spec: RunSpec, space: LabelSpace) -> None:
    """Raises unless the spec's kind of student and inputs are those of the plan's kind.

    Raises:
        BadInputError: inputs or loss are of the other kind.
        MismatchError: a causal student for masked positions, or the other way round.
    """
    asked = spec.student
    kind = (
        None if asked is None or asked.module else "causal_lm" if asked.causal_lm else "masked_lm"
    )
    expected = _KINDS.get(space.alignment or "")
    if kind is not None and kind != expected:
        raise MismatchError(
            f"student: found {kind!r}, a plan of alignment {space.alignment!r} needs "
            f"{expected or 'module'!r}"
        )
    if space.alignment is None:
        if spec.loss.fused == "always" or spec.loss.normalization == "sequence":
            raise BadInputError(
                "loss.fused 'always' and loss.normalization 'sequence' are for plans of "
                "sequences, this one is of classification"
            )
    elif spec.inputs != InputSpec():
        raise BadInputError(
            f"inputs: a plan of sequences (alignment {space.alignment!r}) brings the student's "
            f"input, found {spec.inputs.model_dump()!r}: leave it out"
        )


def require_tokens(spec: RunSpec, plan: Plan, where: str) -> None:
    """Raises unless tokenizer and chat template of the spec are those of a plan's tables.

    Raises:
        BadInputError: a file is not there, or the plan is not of sequences.
        MismatchError: tokenizers or templates differ; both values are in the message.
    """
    space = label_space(plan, where)
    if space.alignment is None:
        for name in ("tokenizer", "chat_template"):
            if getattr(spec, name) is not None:
                raise BadInputError(f"{name}: {where} is of classification, which has none")
        return
    paths = dict.fromkeys(path for path in (tokenizer_of(spec), _checkpoint(spec)) if path)
    for path in paths:
        if path != spec.tokenizer and not (Path(path) / NAME).is_file():
            continue  # a checkpoint whose tokenizer the spec gives
        found = tokenizer_sha256(path)
        if found != space.tokenizer_sha256:
            raise MismatchError(
                f"tokenizers differ: {path!r} has sha256 {found!r}, {where} was labelled with "
                f"{space.tokenizer_sha256!r}: its token ids would mean something else"
            )
    _require_template(spec, list(paths), plan, where)


def _require_template(spec: RunSpec, folders: Sequence[str], plan: Plan, where: str) -> None:
    """Raises unless the template that the spec names, or else the folders', are the plan's."""
    stored = {
        table.contents.chat_template_sha256
        for table in plan.tables.values()
        if table.contents.chat_template_sha256 is not None
    }
    if spec.chat_template is not None:
        own = {spec.chat_template: template_sha256(spec.chat_template)}
    else:
        brought = {folder: own_template_sha256(folder) for folder in folders}
        # Tables of plain text have no template, and so none that a folder's could differ from.
        own = {name: sha256 for name, sha256 in brought.items() if sha256 and stored}
    for path, found in own.items():
        if stored != {found}:
            raise MismatchError(
                f"chat templates differ: {path!r} has sha256 {found!r}, {where} was labelled with "
                f"{sorted(stored) or None!r}; chat_template names the file that the student will "
                "be used with"
            )


def _checkpoint(spec: RunSpec) -> str | None:
    asked = spec.student.language_model if spec.student is not None else None
    return asked.checkpoint if asked is not None else None


def tokenizer_of(spec: RunSpec) -> str | None:
    """The student's tokenizer: the spec's, or the one in its checkpoint; None: it is a new one.

    Raises:
        BadInputError: a checkpoint brings none that can be compared.
    """
    if spec.tokenizer is not None:
        return spec.tokenizer
    folder = _checkpoint(spec)
    if folder is None or (Path(folder) / NAME).is_file():
        return folder
    raise BadInputError(
        f"tokenizer: expected one to compare with the plan's, checkpoint {folder!r} has no {NAME} "
        "on this machine: add tokenizer, a tokenizer.json or a folder with one"
    )

"""Where labels come from: what a table version, a plan and a student checkpoint say of them."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from softlabels.errors import MismatchError
from softlabels.fingerprint import sha256_json

LABEL_SPACE = ("num_classes", "classes", "tokenizer_sha256", "alignment")
"""Fields of `Contents` that tables share when their ids mean the same and their positions align."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TeacherLineage(_Frozen):
    """Which teacher spoke.

    Attributes:
        name: what people call it.
        revision: the user's own mark of its state.
        kind: how it ran.
        code: import path, repository or file of the model.
        code_sha256: of the source file that defines it, where there is one.
        arguments: constructor arguments.
        weights_sha256: of the weights file.
        decode: import path of what turned source columns into its inputs.
        decode_sha256: of that source file.
    """

    name: str
    revision: str = ""
    kind: Literal["torch", "hf", "onnx", "recorded", "ensemble"]
    code: str
    code_sha256: str | None = None
    arguments: Mapping[str, Any] = {}
    weights_sha256: str | None = None
    decode: str | None = None
    decode_sha256: str | None = None

    def fingerprint(self) -> str:
        """The sha256 of all that decides what the teacher says; its name does not.

        Code that its source file imports is not seen: a new `revision` says that it changed.
        """
        found = self.model_dump(exclude={"name"}, exclude_defaults=True)
        for part, source in (("code", self.code_sha256), ("decode", self.decode_sha256)):
            if source is not None and part in found:
                # The source's sha256 says which file it is; its path differs by machine.
                found[part] = found[part].rpartition(":")[2]
        return sha256_json(json.loads(json.dumps(found)))  # as JSON keys sort: 10 before 2


class Augmentation(_Frozen):
    """What augmented views of rows went through before a teacher saw them.

    Attributes:
        function: its name in its file.
        code_sha256: of that source file, where there is one.
    """

    function: str
    code_sha256: str | None = None


class Recorded(_Frozen):
    """How log-probabilities were recorded that no teacher of ours has computed.

    Attributes:
        layout: of the files they came in.
        scale: "raw": of the model's own softmax; "processed": after temperature and the like.
        temperature: at which they were recorded, where they are processed.
        entries: what a position holds: k, or k + 1 where the sampled token is added.
        first_position: whether the first token of a sequence had a distribution.
        tail: "derived": 1 minus the head, whose bound is `tail_error`; "unknown".
        tail_error: the largest error of a derived tail's mass, by the digits that were recorded.
    """

    layout: str
    scale: Literal["raw", "processed"] = "raw"
    temperature: float = 1.0
    entries: Literal["k", "k+1"] = "k"
    first_position: bool = False
    tail: Literal["derived", "unknown"] = "derived"
    tail_error: float | None = None


class Parent(_Frozen):
    """A table version that another was made of.

    Attributes:
        name: what the spec calls it.
        snapshot_digest: of the version.
        version: its number in its table.
        teacher: the name of its teacher.
        weight: a number, or the SQL expression over its `labels` that gave one for each row;
            relative to the other parents'.
        by_class: weights in its place, by class.
        temperature: at which its targets were taken.
    """

    name: str
    snapshot_digest: str
    version: int
    teacher: str
    weight: float | str = 1.0
    by_class: Mapping[str, float] = {}
    temperature: float = 1.0


class Calibration(_Frozen):
    """How a table's labels were tempered after they were captured.

    Attributes:
        temperature: T; the distributions are softmax(log p / T) of the parent's p.
        snapshot_digest: of the parent, the version that they were made of.
        fitted: whether T is the fit below; else it was given.
        where: SQL that chose the labelled rows; null: all.
        rows: labelled positions that T was fitted on; 0 where it was given.
        held_out: labelled positions of the other examples, on which the figures below are.
        nll_before: mean -log p(label), nats, of the parent; null without labels.
        nll_after: the same of these labels.
        ece_before: expected calibration error of the likeliest class, 0 to 1, of the parent.
        ece_after: the same of these labels.
    """

    temperature: float
    snapshot_digest: str
    fitted: bool
    where: str | None = None
    rows: int = 0
    held_out: int = 0
    nll_before: float | None = None
    nll_after: float | None = None
    ece_before: float | None = None
    ece_after: float | None = None


_LATER = ("parents", "calibration", "augment")
"""Fields that were added when tables were there already: they are written only where they are set,
so that what is stored of other tables, and made from it, stays the same bytes."""


class Contents(_Frozen):
    """What is the same in every row of a table version.

    Attributes:
        teacher: one teacher a version.
        num_classes: V.
        classes: the label space, in order of id; language models have a tokenizer instead.
        tokenizer_sha256: of the exact token-to-id map.
        chat_template_sha256: of the template, where one was used.
        alignment: "next": a position holds the distribution after its token; "same": at it.
        k: stored ids a position.
        draws: m, tail draws a position.
        draws_temperature: the temperature at which they were drawn.
        temperatures: the extra ones that are stored exactly.
        profile: the value profile.
        carried: columns copied from the source.
        example_ids: whether example_id came from a source column or is the content's sha256;
            a table that mixed them would hold examples twice.
        seed: of the draws.
        logits_width: rows of the teacher's head where they are more than V; those above were cut
            and the rest renormalised.
        recorded: of an import, how its values came about.
        parents: of an ensemble's table, the versions that it mixes.
        calibration: of a table that was calibrated, what was done to the teacher's labels.
        augment: what rows with a view above 0 went through; their view_params is its seed.
    """

    teacher: TeacherLineage
    num_classes: int
    classes: tuple[str, ...] | None = None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    alignment: Literal["next", "same"] | None = None
    k: int
    draws: int = 0
    draws_temperature: float = 1.0
    temperatures: tuple[float, ...] = ()
    profile: Literal["compact", "precise"]
    carried: tuple[str, ...] = ()
    example_ids: Literal["column", "content"] = "column"
    seed: int = 0
    logits_width: int | None = None
    recorded: Recorded | None = None
    parents: tuple[Parent, ...] = ()
    calibration: Calibration | None = None
    augment: Augmentation | None = None

    @model_serializer(mode="wrap")
    def _without_later(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = write(self)
        for name in _LATER:
            if name in found and getattr(self, name) == type(self).model_fields[name].default:
                del found[name]
        return found

    def digest(self) -> str:
        """The sha256 of these contents.

        Defaults are left out, so that a field added later does not change what is stored today.
        """
        return sha256_json(self.model_dump(mode="json", exclude_defaults=True))

    def require_same(self, other: "Contents", here: str, there: str) -> None:
        """Raises MismatchError with both values at the first field that differs.

        Args:
            other: the contents to compare with.
            here: what to call these in the message.
            there: what to call the others.
        """
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "teacher":
                mine, theirs = mine.fingerprint(), theirs.fingerprint()
            if mine != theirs:
                raise MismatchError(
                    f"{name} differs: {here} has {mine!r}, {there} has {theirs!r}; "
                    "one table holds one kind of label: use another table"
                )


class RunLineage(_Frozen):
    """Which run a commit belongs to.

    Attributes:
        run_id: sha256 of the identity fields of its spec.
        units: those that the commit adds.
        num_rows: rows that it adds.
        spec: the run's spec; `spec_sha256` is of its canonical JSON.
        source: uri, fingerprint, number of files and rows of the source.
        packages: versions of what computed the labels.
        code_revision: git commit of the user's working folder, where there is one.
        device: cpu, cuda, …
        started_at: UTC time at which the first unit began, ISO 8601.
        seconds: teacher time for these units.
    """

    run_id: str
    units: tuple[str, ...]
    num_rows: int
    spec: Mapping[str, Any]
    spec_sha256: str
    source: Mapping[str, Any]
    packages: Mapping[str, str]
    code_revision: str | None = None
    device: str
    started_at: str
    seconds: float


class ChangeLineage(_Frozen):
    """What a commit says that no teacher's run made.

    Attributes:
        operation: which command it was.
        change_id: sha256 of what makes it this change and no other; it is made once.
        from_version: the version that it started from.
        arguments: what the user asked for, such as {"where": "..."}; never credentials.
        rows_before: rows of `from_version`.
        rows_after: rows of the version that it makes, where nobody else adds any meanwhile.
        packages: versions of what did it.
        code_revision: git commit of the user's working folder, where there is one.
        started_at: UTC, ISO 8601.
        seconds: that it took.
    """

    operation: Literal["delete", "compact", "rollback", "publish"]
    change_id: str
    from_version: int
    arguments: Mapping[str, Any] = {}
    rows_before: int
    rows_after: int
    packages: Mapping[str, str]
    code_revision: str | None = None
    started_at: str
    seconds: float

    @property
    def key(self) -> str:
        """Delta app id that makes the change happen once."""
        return f"{self.change_id}/change"

"""Annotators: what turns rows of a source into soft targets, whatever the teacher is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import DataError
from softlabels.fingerprint import key64
from softlabels.imports import load_object, source_sha256
from softlabels.lineage import Augmentation, Contents, TeacherLineage
from softlabels.targets import Ints, SoftTargets, to_numpy
from softlabels.teacher.extract import extract
from softlabels.teacher.models import TorchTeacher, load_teacher
from softlabels.teacher.source import VIEW
from softlabels.teacher.spec import CaptureSpec


@dataclass(frozen=True)
class Annotated:
    """Rows that a teacher has looked at.

    Attributes:
        targets: of every row, in the rows' order.
        columns: table columns besides them, such as input_ids.
    """

    targets: SoftTargets
    columns: Mapping[str, pa.Array] = field(default_factory=dict)


class Annotator(Protocol):
    """A teacher at work: rows in, soft targets out.

    Attributes:
        lineage: which teacher it is.
        device: where it runs.
        packages: distributions whose versions a commit records.
        budget: weight of the rows that it takes at once; memory grows with it.
        one_pass: weight of the rows that a dry run times, one forward pass at most.
        rehearsal: weight of the rows that show whether it works at all.
    """

    lineage: TeacherLineage
    device: str
    packages: Sequence[str]
    budget: int
    one_pass: int
    rehearsal: int

    def weigh(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """The weight of each row, int64 [B], such as 1 or its tokens."""

    def annotate(
        self, batch: pa.RecordBatch, names: Sequence[str], advance: Callable[[int], None]
    ) -> Annotated:
        """Targets of some rows.

        Args:
            batch: columns of the source.
            names: example id of each row.
            advance: told after each forward pass how many more rows are done; may raise.

        Raises:
            DataError: a row's input, label or logits are wrong; names the example.
        """


def view_seed(seed: int, example_id: str, view: int) -> int:
    """What an augmented view is made from: below 2^53, which any reader of JSON holds exactly."""
    return key64("view", seed, example_id, view) >> 11


def _augmentation(path: str | None) -> Augmentation | None:
    if path is None:
        return None
    return Augmentation(
        function=path.rpartition(":")[2], code_sha256=source_sha256(load_object(path))
    )


class Classifier:
    """A torch module that labels one distribution a row."""

    packages: Sequence[str] = ("torch",)

    def __init__(self, spec: CaptureSpec) -> None:
        self._spec = spec
        self._teacher: TorchTeacher = load_teacher(spec)
        self.lineage = self._teacher.lineage
        self.device = str(self._teacher.device)
        self.budget = self.one_pass = self.rehearsal = spec.batch_size

    def contents(self) -> Contents:
        """What the spec says that every row has in common."""
        spec, classes = self._spec, self._spec.teacher.classes
        return Contents(
            teacher=self.lineage,
            num_classes=spec.teacher.num_classes,
            classes=classes if isinstance(classes, tuple) else None,
            k=spec.k,
            draws=spec.draws,
            draws_temperature=spec.draws_temperature,
            temperatures=spec.temperatures,
            profile=spec.profile,
            carried=spec.carried,
            example_ids="content" if spec.source.example_id is None else "column",
            seed=spec.seed,
            augment=_augmentation(spec.source.augment),
        )

    def weigh(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """1 a row."""
        return np.ones(batch.num_rows, np.int64)

    def annotate(
        self, batch: pa.RecordBatch, names: Sequence[str], advance: Callable[[int], None]
    ) -> Annotated:
        """Targets of some rows, in one forward pass."""
        spec = self._spec
        labels = self._labels(batch, names)
        inputs = {name: batch[name] for name in spec.source.columns}
        views, columns, seeds = [0] * len(names), {}, None
        if spec.source.views:
            views = batch[VIEW].to_pylist()
            seeds = np.array([view_seed(spec.seed, *row) for row in zip(names, views, strict=True)])
            params = pa.array(seeds).cast(pa.string())
            columns = {VIEW: batch[VIEW], "view_params": params}
        targets = extract(
            self._teacher.logits(inputs, list(names), seeds),
            k=spec.k,
            labels=labels,
            temperatures=spec.temperatures,
            draws=spec.draws,
            draws_temperature=spec.draws_temperature,
            draw_keys=np.array(
                [key64(spec.seed, *row) for row in zip(names, views, strict=True)], np.uint64
            ),
        )
        advance(len(names))
        return Annotated(targets, columns)

    def _labels(self, batch: pa.RecordBatch, names: Sequence[str]) -> Ints | None:
        column = self._spec.source.label
        if column is None:
            return None
        values, classes = batch[column], self._spec.teacher.classes
        known = classes if isinstance(classes, tuple) else None
        if pa.types.is_integer(values.type):
            # Unchecked: what int64 cannot hold turns negative and is refused below.
            found = to_numpy(values.cast(pa.int64(), safe=False).fill_null(-1), np.int64)
        elif known is not None:
            index = {name: number for number, name in enumerate(known)} | {None: -1}
            found = np.array([index.get(value, -2) for value in values.to_pylist()], np.int64)
        else:
            raise DataError(f"label {column!r} is {values.type}: class names need teacher.classes")
        wrong = (found < -1) | (found >= self._spec.teacher.num_classes)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"example {names[row]!r} has label {values[row].as_py()!r}, expected one of "
                f"{list(known) if known else self._spec.teacher.num_classes} or null"
            )
        return np.asarray(found, np.int32)

"""An import as a capture: recorded rows go the way that a teacher's do, with the same care."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import DataError
from softlabels.lineage import Contents, Recorded, TeacherLineage
from softlabels.schema import INTS
from softlabels.store.alignment import SelfTest
from softlabels.targets import SoftTargets, to_numpy
from softlabels.teacher.annotator import Annotated
from softlabels.teacher.recorded.files import open_files
from softlabels.teacher.recorded.judge import KEPT
from softlabels.teacher.recorded.reader import Context
from softlabels.teacher.recorded.spec import ImportSpec
from softlabels.teacher.recorded.survey import Survey, survey
from softlabels.teacher.source import Source
from softlabels.teacher.tokenizer import load_tokenizer

POSITIONS_AT_ONCE = 20_000
"""Decoded and written at once."""


class Recital:
    """The annotator of recorded rows: it says what they say."""

    packages: Sequence[str] = ("transformers", "tokenizers")
    device = "recorded"
    budget = one_pass = rehearsal = POSITIONS_AT_ONCE

    def __init__(self, lineage: TeacherLineage, found: Survey) -> None:
        self.lineage = lineage
        self._survey = found  # the rows are gone with it

    def weigh(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Positions of each row, 1 at least."""
        lengths = np.diff(to_numpy(batch["position_index"].offsets, np.int32))
        return np.asarray(np.maximum(lengths, 1), np.int64)

    def annotate(
        self, batch: pa.RecordBatch, names: Sequence[str], advance: Callable[[int], None]
    ) -> Annotated:
        """The recorded targets of some rows."""
        counts = np.diff(to_numpy(batch["position_index"].offsets, np.int32)).astype(np.int32)
        columns = {name: batch[name] for name in batch.schema.names}
        columns["num_positions"] = pa.array(counts)
        targets = SoftTargets.from_columns(columns, self._survey.k)
        advance(len(names))
        none = pa.nulls(len(names), pa.int32())
        return Annotated(
            targets,
            {
                "input_ids": batch["input_ids"],
                "position_index": batch["position_index"],
                "label": none,
                "top1_id": none,
            },
        )


def prepare_import(
    spec: ImportSpec, advance: Callable[[int], None] = lambda rows: None
) -> tuple[Source, Contents, Recital]:
    """The rows of an import, what they have in common, and who says them; records are judged here.

    Args:
        spec: what is imported.
        advance: told how many more records were read; may raise.

    Raises:
        BadInputError: files, tokenizer or compression are missing or do not fit.
        DataError: records cannot be kept exactly, or their distributions fit other tokens than
            those they are said to be of.
    """
    files = open_files(spec.files, spec.layout)
    context = Context(spec, files, load_tokenizer(spec.tokenizer))
    found = survey(context, advance)
    lineage = TeacherLineage(
        name=spec.teacher.name,
        revision=spec.teacher.revision,
        kind="recorded",
        code=spec.teacher.name,  # all that tells one recorded teacher from another
    )
    contents = Contents(
        teacher=lineage,
        num_classes=context.tokenizer.num_ids,
        tokenizer_sha256=context.tokenizer.sha256,
        chat_template_sha256=context.chat_template_sha256,
        alignment="next",
        k=found.k,
        profile=spec.profile,
        example_ids="content" if spec.example_id is None else "column",
        recorded=Recorded(
            layout=spec.layout,
            scale=spec.scale,
            temperature=spec.temperature,
            entries="k+1" if found.added else "k",
            first_position=found.first_position,
            tail=spec.tail,
            tail_error=found.tail_error,
        ),
    )
    _refuse_shifted(found.source, contents)
    return found.source, contents, Recital(lineage, found)


def _refuse_shifted(source: Source, contents: Contents) -> None:
    test = SelfTest(contents)
    for batch in source.batches(0, source.num_rows, KEPT.names):
        counts = np.diff(to_numpy(batch["position_index"].offsets, np.int32)).astype(np.int32)
        test.add(
            pa.RecordBatch.from_arrays(
                [*batch.columns, pa.array(counts), pa.nulls(batch.num_rows, INTS)],
                [*batch.schema.names, "num_positions", "segment_ids"],
            )
        )
    found = test.result()
    if found is not None and found["problem"] is not None:
        raise DataError(
            f"{found['problem']}; nothing was imported: record them anew, or say where they stand "
            "(axolotl: targets)"
        )

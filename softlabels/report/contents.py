"""What a table is made of: bytes by column, classes, rows that are there twice, the self-test."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import SoftLabelsError
from softlabels.report.rows import Part, Sample, scalars
from softlabels.store.alignment import SelfTest
from softlabels.targets import Floats

MOST_CLASSES = 2_000
"""Whose counts are listed."""


def lineage(part: Part) -> dict[str, Any]:
    """Who the teacher is and what is stored of it, plain JSON."""
    contents = part.contents
    teacher = contents.teacher
    return {
        "teacher": teacher.name,
        "revision": teacher.revision,
        "kind": teacher.kind,
        "weights_sha256": teacher.weights_sha256,
        "classes": contents.num_classes,
        "alignment": contents.alignment,
        "tokenizer_sha256": contents.tokenizer_sha256,
        "k": contents.k,
        "draws": contents.draws,
        "temperatures": [1.0, *contents.temperatures],
        "profile": contents.profile,
        "carried": list(contents.carried),
    }


def bytes_by_column(part: Part) -> dict[str, Any]:
    """Compressed bytes a row of each column, in the files that were opened."""
    sizes: dict[str, int] = {}
    for footer in part.footers.values():
        for group in range(footer.num_row_groups):
            for index in range(footer.num_columns):
                chunk = footer.row_group(group).column(index)
                name = chunk.path_in_schema.split(".")[0]
                sizes[name] = sizes.get(name, 0) + chunk.total_compressed_size
    rows = sum(int(footer.num_rows) for footer in part.footers.values())
    falling = sorted(sizes.items(), key=lambda pair: -pair[1])
    return {
        "rows": rows,
        "columns": [
            {"column": name, "bytes": size, "per_row": size / max(1, rows)}
            for name, size in falling
            if size
        ],
    }


def classes(part: Part) -> dict[str, Any] | None:
    """How often each class is the label and the teacher's choice; None for language models."""
    contents = part.contents
    if contents.alignment is not None or not part.groups:
        return None
    batches, rows = scalars(part, ["label", "top1_id"])
    size = contents.num_classes
    labels = _counted((batch["label"] for batch in batches), size)
    chosen = _counted((batch["top1_id"] for batch in batches), size)
    hits = np.zeros(size, np.int64)
    for batch in batches:
        label, choice = _ints(batch["label"]), _ints(batch["top1_id"])
        hits += np.bincount(label[(label == choice) & (label >= 0)], minlength=size)
    names = contents.classes or tuple(str(n) for n in range(size))
    listed = range(size) if size <= MOST_CLASSES else np.argsort(-labels)[:MOST_CLASSES]
    return {
        "rows": rows,
        "labelled": int(labels.sum()),
        "num_classes": size,
        "never_label": [names[n] for n in np.flatnonzero(labels == 0)],
        "never_chosen": [
            {"name": names[n], "labels": int(labels[n])}
            for n in np.flatnonzero((chosen == 0) & (labels > 0))
            if contents.k  # draws alone do not say what is chosen
        ],
        "classes": [
            {
                "name": names[n],
                "labels": int(labels[n]),
                "chosen": int(chosen[n]),
                "recall": float(hits[n] / labels[n]) if labels[n] else None,
            }
            for n in listed
        ],
    }


def duplicates(sample: Sample) -> dict[str, Any]:
    """Rows of the sample that are there twice: the same targets under other ids, or one id twice.

    Two rows are taken for one when every stored number of them is the same: ids, log-probabilities,
    tail, entropy and tokens. A row without tokens must hold LEAST_NUMBERS log-probabilities that
    differ.
    """
    keys = list(zip(sample.names, sample.views.tolist(), strict=True))
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(_digests(sample)):
        if digest is not None:
            groups.setdefault(digest, []).append(row)
    repeated = 0
    examples: list[list[str]] = []
    for rows in groups.values():
        ids = list(dict.fromkeys(sample.names[row] for row in rows))
        repeated += len(ids) - 1
        if len(ids) > 1 and len(examples) < 5:
            examples.append(ids[:5])
    return {
        "rows": len(keys),
        "judged": sum(map(len, groups.values())),
        "same_targets": repeated,
        "same_id": len(keys) - len(set(keys)),
        "examples": examples,
    }


def alignment(sample: Sample) -> dict[str, Any] | None:
    """The ±1 self-test of `store.alignment` on the sample; None where rows hold no tokens.

    Rows that contradict their own tokens give the verdict "contradiction" and say where.
    """
    test = SelfTest(sample.part.contents)
    try:
        for batch in sample.batches:
            test.add(batch)
    except SoftLabelsError as error:
        return {"verdict": "contradiction", "problem": str(error), "losses": {}, "positions": 0}
    return test.result()


LEAST_NUMBERS = 3
"""Different log-probabilities that a row must hold to be compared with others: a teacher that is
certain rounds to two of them in many rows."""


def _digests(sample: Sample) -> Iterable[bytes | None]:
    """A digest of all that is stored of each row; None for rows that say too little."""
    targets = sample.targets
    optional: Sequence[Floats | None] = (targets.tail, targets.entropy)
    numbers = [targets.logprobs, *(v[:, None] for v in optional if v is not None)]
    flat = [np.ascontiguousarray(values) for values in (targets.ids, *numbers)]
    different = 1 + (targets.logprobs[:, 1:] < targets.logprobs[:, :-1]).sum(1)
    ends = np.cumsum(targets.num_positions)
    starts = ends - targets.num_positions
    tokens = [item for batch in sample.batches for item in _token_bytes(batch)]
    for own, start, end in zip(tokens, starts.tolist(), ends.tolist(), strict=True):
        if own is None and (start == end or different[start:end].max() < LEAST_NUMBERS):
            yield None
            continue
        digest = hashlib.blake2b(own or b"", digest_size=16)
        for values in flat:
            digest.update(values[start:end].tobytes())
        yield digest.digest()


def _token_bytes(batch: pa.RecordBatch) -> list[bytes | None]:
    """The tokens of each row as bytes; None where it has none."""
    if "input_ids" not in batch.schema.names:
        return [None] * batch.num_rows
    lists = batch["input_ids"]
    return [
        None if not item.is_valid else np.asarray(item.values.to_numpy(), np.int32).tobytes()
        for item in lists
    ]


def _counted(columns: Iterable[pa.Array], size: int) -> npt.NDArray[np.int64]:
    total = np.zeros(size, np.int64)
    for column in columns:
        values = _ints(column)
        total += np.bincount(values[(values >= 0) & (values < size)], minlength=size)
    return total


def _ints(column: pa.Array) -> npt.NDArray[np.int64]:
    """int64 of a column of ids, -1 where null."""
    return np.asarray(column.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)

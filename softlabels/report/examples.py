"""Examples to look at: where the label is least likely, where the teacher is sure of another."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from softlabels.errors import BadInputError
from softlabels.report.images import Picture, picture, png
from softlabels.report.rows import Part, Sample
from softlabels.report.teacher import label_logprobs
from softlabels.store import codec

SHOWN = 8
"""Examples of each kind."""

TOP = 5
CONTEXT = 48
"""Tokens before a position that are shown."""

MOST_TEXT = 300
"""Characters of a text that are shown."""

MOST_PICTURE_BYTES = 2_000_000
"""Of all pictures of a page together."""

Decoder = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Pixels:
    """How raw bytes of a carried column become a picture: 8-bit, grey (1 channel) or RGB (3)."""

    column: str
    height: int
    width: int
    channels: int = 1

    @classmethod
    def parse(cls, text: str) -> "Pixels":
        """From "COLUMN=28x28" or "COLUMN=32x32x3", height first.

        Raises:
            BadInputError: it is neither.
        """
        column, _, shape = text.rpartition("=")
        sizes = shape.split("x")
        right = column and len(sizes) in (2, 3) and all(s.isdecimal() and int(s) for s in sizes)
        if not right or (len(sizes) == 3 and sizes[2] not in ("1", "3")):
            raise BadInputError(
                f"--pixels {text!r}: expected COLUMN=HEIGHTxWIDTH or COLUMN=HEIGHTxWIDTHx3"
            )
        return cls(column, *map(int, sizes))


def examples(
    sample: Sample, decode: Decoder | None = None, pixels: Pixels | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Examples by kind: hardest, disagreeing, and unsure where there are no labels.

    Each is an example once: its id, view, position (None where it has one), label and its
    probability, the top classes and theirs, entropy; picture (`Picture`), texts (carried strings),
    or for language models the tokens before and after.

    Args:
        sample: where they are looked for.
        decode: makes text of token ids; None: ids are shown.
        pixels: how to read a column of raw pixels.
    """
    targets, labels = sample.targets, sample.labels
    if not targets.k or not len(targets.ids):
        return {}
    top = targets.logprobs[:, 0]
    own = label_logprobs(sample)
    known = np.isfinite(own)
    wrong = (labels >= 0) & (targets.ids[:, 0] != labels)
    kinds: dict[str, list[int]] = {}
    taken: set[int] = set()
    kinds["hardest"] = _first(np.where(known, own, np.inf), sample, taken)
    kinds["disagreeing"] = _first(np.where(wrong, -top, np.inf), sample, taken)
    if not (labels >= 0).any() and targets.entropy is not None:
        kinds["unsure"] = _first(
            np.where(np.isnan(targets.entropy), np.inf, -targets.entropy), sample, taken
        )
    carried = _carried(sample, sorted({p for places in kinds.values() for p in places}), pixels)
    return {
        kind: [_example(sample, place, own, decode) | carried[place] for place in places]
        for kind, places in kinds.items()
        if places
    }


def _first(score: npt.NDArray[np.floating[Any]], sample: Sample, taken: set[int]) -> list[int]:
    """The positions of the least finite scores, one a row, of rows that are not `taken` yet."""
    most = min(len(score), 50 * SHOWN)
    least = np.argpartition(score, most - 1)[:most]
    found: list[int] = []
    for place in least[np.argsort(score[least], kind="stable")]:
        row = int(sample.row_of[place])
        if row not in taken and np.isfinite(score[place]):
            taken.add(row)
            found.append(int(place))
        if len(found) == SHOWN:
            break
    return found


def _example(
    sample: Sample, place: int, own: npt.NDArray[np.float64], decode: Decoder | None
) -> dict[str, Any]:
    targets, contents = sample.targets, sample.part.contents
    row = int(sample.row_of[place])
    label = int(sample.labels[place])
    probs, _ = codec.head_and_tail(targets.map_positions(slice(place, place + 1), _ONE))
    many = contents.alignment is not None
    found: dict[str, Any] = {
        "id": sample.names[row],
        "view": int(sample.views[row]),
        "position": place - int(np.searchsorted(sample.row_of, row)) if many else None,
        "label": None if label < 0 else _name(label, contents.classes, decode),
        "label_prob": float(np.exp(own[place])) if np.isfinite(own[place]) else None,
        "top": [
            {
                "name": _name(int(id_), contents.classes, decode),
                "prob": float(prob),
                "right": int(id_) == label,
            }
            for id_, prob in zip(targets.ids[place, :TOP], probs[0, :TOP], strict=True)
            if id_ >= 0
        ],
        "entropy": None if targets.entropy is None else float(targets.entropy[place]),
    }
    if many and (held := sample.tokens(row)) is not None:
        ids, index = held
        at = int(index[found["position"]]) + (contents.alignment == "next")
        before = ids[max(0, at - CONTEXT) : at].tolist()
        found["before"] = _text(before, decode)
        if contents.alignment == "same":
            found["after"] = _text(ids[at + 1 : at + 1 + CONTEXT // 4].tolist(), decode)
    return found


def _text(ids: Sequence[int], decode: Decoder | None) -> str:
    return " ".join(map(str, ids)) if decode is None else decode(ids)


def _name(class_id: int, classes: Sequence[str] | None, decode: Decoder | None) -> str:
    if classes is not None and class_id < len(classes):
        return classes[class_id]
    # Quoted: a token may be nothing but white space.
    return str(class_id) if decode is None else json.dumps(decode([class_id]), ensure_ascii=False)


def _carried(
    sample: Sample, places: Sequence[int], pixels: Pixels | None
) -> dict[int, dict[str, Any]]:
    """picture and texts of the row of each position; only the row groups they are in are read."""
    columns = _shown_columns(sample.part, pixels)
    found: dict[int, dict[str, Any]] = {}
    left = MOST_PICTURE_BYTES
    last: tuple[Any, pa.RecordBatch] | None = None
    for place in places:
        group, number = sample.place(int(sample.row_of[place]))
        if columns and (last is None or last[0] is not group):
            (batch,) = sample.part.read([group], columns)
            last = group, batch
        values = {c: last[1][c][number].as_py() for c in columns} if last is not None else {}
        shown = next((p for v in values.items() if (p := _picture(*v, pixels))), None)
        if shown is not None and len(shown.uri) > left:
            shown = None
        left -= len(shown.uri) if shown is not None else 0
        texts = [
            {"column": column, "text": text[:MOST_TEXT] + ("…" if len(text) > MOST_TEXT else "")}
            for column, text in values.items()
            if isinstance(text, str)
        ]
        found[place] = {"picture": shown and vars(shown), "texts": texts}
    return found


def _shown_columns(part: Part, pixels: Pixels | None) -> list[str]:
    """Carried columns of strings and bytes."""
    schema = part.footers[part.groups[0].path].schema.to_arrow_schema()
    found = [
        name
        for name in part.contents.carried
        if name in schema.names
        and (
            pa.types.is_string(schema.field(name).type)
            or pa.types.is_binary(schema.field(name).type)
        )
    ]
    if pixels is not None and pixels.column not in found:
        raise BadInputError(
            f"--pixels: table {part.name!r} carries no column {pixels.column!r} of bytes, only "
            f"{found!r}"
        )
    return found


def _picture(column: str, value: object, pixels: Pixels | None) -> Picture | None:
    if not isinstance(value, bytes):
        return None
    if pixels is not None and column == pixels.column:
        made = png(value, pixels.height, pixels.width, pixels.channels)
        return None if made is None else picture(made)
    return picture(value)


def without_pictures(found: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Examples without the bytes of their pictures."""
    return {
        kind: [
            example | {"picture": (p := example["picture"]) and f"{p['width']}x{p['height']}"}
            for example in examples
        ]
        for kind, examples in found.items()
    }


_ONE = np.ones(1, np.int32)

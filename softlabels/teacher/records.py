"""Records to documents: what a line of JSON or a row of Parquet holds, and what it lacks."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from softlabels.errors import BadInputError, DataError, one_line
from softlabels.schema import portable_type
from softlabels.storage import Root, storage_errors
from softlabels.teacher.lines import TOO_LONG, read_lines
from softlabels.teacher.source import Source

PLACES = 5
"""Places remembered of each reason."""

MISSING = "field missing"
WRONG_TYPE = "field of a wrong type"
INVALID_TEXT = "invalid UTF-8"
NOT_JSON = "not a whole JSON record"
EMPTY = "empty document"
NO_ID = "no example id"

_INVALID: Any = object()
"""Stands for text that is not UTF-8."""

_BROKEN: Any = object()
"""Stands for a list of numbers with a null in it."""

_JSON_KINDS = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}


@dataclass
class Skipped:
    """What was left out, by reason.

    Attributes:
        counts: how many.
        places: of the first few.
    """

    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str, detail: str = "") -> None:
        """One more, at `place`."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES:
            places.append(f"{place}: {detail}" if detail else place)

    def __str__(self) -> str:
        order = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return "; ".join(f"{n} {why} (first: {self.places[why][0]})" for why, n in order)


@dataclass(frozen=True, slots=True)
class Document:
    """One document as it was written.

    Attributes:
        place: file and line or row, for messages.
        value: text, the messages of a chat, or token ids: a list or int64 [L].
        example_id: its key, where the spec names a column.
        position_index: of token ids, where it has one.
        segment_ids: of token ids, where it has them.
        carried: values of the carried columns, in their order.
    """

    place: str
    value: Any
    example_id: str | None = None
    position_index: Any = None
    segment_ids: Any = None
    carried: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What is read of a record.

    Attributes:
        column: with the document.
        holds: what its values are.
        example_id: column with the key, where there is one.
        beside: those of position_index and segment_ids that are read.
        carry: columns that go along.
    """

    column: str
    holds: Literal["text", "messages", "input_ids"]
    example_id: str | None = None
    beside: tuple[str, ...] = ()
    carry: tuple[pa.Field, ...] = ()

    @property
    def columns(self) -> list[str]:
        """All of them, each once."""
        key = [] if self.example_id is None else [self.example_id]
        return list(dict.fromkeys([self.column, *key, *self.beside, *(f.name for f in self.carry)]))

    def document(self, place: str, record: Mapping[str, Any], skipped: Skipped) -> Document | None:
        """The document in a record; None where there is none, which `skipped` counts."""
        value: Any = record.get(self.column)
        key = None if self.example_id is None else record.get(self.example_id)
        fault = self._fault(value, key, record)
        if fault is not None:
            skipped.add(fault[0], place, fault[1])
            return None
        return Document(
            place,
            value,
            None if key is None else str(key),
            record.get("position_index") if "position_index" in self.beside else None,
            record.get("segment_ids") if "segment_ids" in self.beside else None,
            tuple(record.get(f.name) for f in self.carry),
        )

    def _fault(self, value: Any, key: Any, record: Mapping[str, Any]) -> tuple[str, str] | None:
        if value is None:
            there = ", ".join(list(record)[:8])
            return MISSING, f"no {self.column!r} (fields: {there})"
        if value is _INVALID or (isinstance(value, str) and not _encodes(value)):
            return INVALID_TEXT, ""
        if value is not _BROKEN and not isinstance(value, _TYPES[self.holds]):
            return WRONG_TYPE, f"{self.column!r} is {type(value).__name__}"
        for name in self.beside if self.holds != "input_ids" else (self.column, *self.beside):
            ids = record.get(name)
            if ids is not None and not _are_ids(ids):
                return WRONG_TYPE, f"{name!r} is no list of token numbers"
        if len(value) == 0 or (isinstance(value, str) and not value.strip()):
            return ("chat without messages" if self.holds == "messages" else EMPTY), ""
        if self.example_id is not None:
            if key is None or key == "":
                return NO_ID, ""
            if isinstance(key, bool) or not isinstance(key, str | int) or not _encodes(str(key)):
                return WRONG_TYPE, f"{self.example_id!r} is {type(key).__name__}"
        return None


_TYPES = {"text": (str,), "messages": (list,), "input_ids": (list, np.ndarray)}


def _encodes(text: str) -> bool:
    try:
        text.encode()  # JSON can write half of a surrogate pair
    except UnicodeEncodeError:
        return False
    return True


def _are_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return True
    return isinstance(value, list) and all(type(i) is int and -(2**63) <= i < 2**63 for i in value)


# JSON lines


def json_records(
    root: Root, path: str, sha256: str, skipped: Skipped
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a JSONL file, read line by line.

    Raises:
        DataError: the file is no longer that of `sha256`.
    """
    digest = hashlib.sha256()
    with root.open(path) as stream, storage_errors("read", path):
        for number, line in enumerate(read_lines(stream, digest.update), 1):
            place = f"line {number} of {path!r}"
            text = "" if line is None else decode(line)
            if line is None:
                skipped.add(TOO_LONG, place)
            elif text is None:
                skipped.add(INVALID_TEXT, place)
            elif not text.strip():
                skipped.add(EMPTY, place)
            else:
                record = _json(text, place, skipped)
                if record is not None:
                    yield place, record
    require_same(path, digest.hexdigest(), sha256)


def _json(text: str, place: str, skipped: Skipped) -> dict[str, Any] | None:
    try:
        record = json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        skipped.add(NOT_JSON, place, f"{error.msg} (character {error.pos})")
        return None
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep
        skipped.add(NOT_JSON, place, one_line(error))
        return None
    if not isinstance(record, dict):
        skipped.add("JSON that is no object", place, type(record).__name__)
        return None
    return record


def decode(data: bytes) -> str | None:
    """`data` as text, without a byte order mark; None where it is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def require_same(path: str, found: str, sha256: str) -> None:
    """Raises DataError unless a file still has the sha256 that it was opened with."""
    if found != sha256:
        raise DataError(
            f"source file {path!r} was replaced while it was read: run the command again"
        )


def json_fields(
    files: Sequence[tuple[Root, str, str]], carry: Sequence[str]
) -> tuple[pa.Field, ...]:
    """Fields of carried JSON values. One pass over the (root, path, sha256) files finds types.

    Raises:
        BadInputError: no record has such a field, or its values are of no type that tables know.
        DataError: one field has two types.
    """
    kinds: dict[str, dict[pa.DataType, str]] = {name: {} for name in carry}
    there: set[str] = set()
    for file in files:
        for place, record in json_records(*file, Skipped()):
            there.update(record)
            for name in carry:
                kind = _json_kind(name, record.get(name), place)
                if kind is not None:
                    kinds[name].setdefault(kind, place)
    missing = [name for name in carry if name not in there]
    if missing:
        raise BadInputError(
            f"carry: no record has a field {missing[0]!r} (fields: {', '.join(sorted(there)[:20])})"
        )
    return tuple(pa.field(name, _one_type(name, kinds[name])) for name in carry)


def _json_kind(name: str, value: Any, place: str) -> pa.DataType | None:
    if value is None or value == []:
        return None
    if type(value) in _JSON_KINDS:
        return _JSON_KINDS[type(value)]
    inside = {type(v) for v in value} if isinstance(value, list) else {dict}
    if inside <= {int, float}:
        return pa.list_(pa.int64() if inside == {int} else pa.float32())
    raise BadInputError(
        f"carry: field {name!r} in {place} is {type(value).__name__}: expected text, a number, "
        "true or false, or a list of numbers"
    )


def _one_type(name: str, kinds: Mapping[pa.DataType, str]) -> pa.DataType:
    found = dict(kinds)
    # JSON writes 2.0 and 2 alike.
    for whole, real in ((pa.int64(), pa.float64()), (pa.list_(pa.int64()), pa.list_(pa.float32()))):
        if real in found:
            found.pop(whole, None)
    if len(found) > 1:
        (one, here), (other, there) = list(found.items())[:2]
        raise DataError(f"carry: field {name!r} is {one} in {here}, {other} in {there}")
    return next(iter(found), pa.string())


# Parquet


def require_type(wanted: Wanted, kind: pa.DataType, path: str) -> None:
    """Raises BadInputError unless a column's type can hold what it is said to hold."""
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if wanted.holds == "messages":
        good, expected = is_list and pa.types.is_struct(kind.value_type), "a list of structs"
    elif wanted.holds == "input_ids":
        is_list = is_list or pa.types.is_fixed_size_list(kind)
        good, expected = is_list and pa.types.is_integer(kind.value_type), "a list of integers"
    else:
        strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        good, expected = any(test(value) for test in strings), "text"
    if not good:
        raise BadInputError(f"column {wanted.column!r} of {path!r} is {kind}, expected {expected}")


def carried_field(column: pa.Field) -> pa.Field:
    """The field a Parquet column is carried as.

    Raises:
        BadInputError: not every reader of a table knows its type.
    """
    kind = portable_type(column)
    # Whoever labels looks for nulls in lists and names the column: until then they may be there.
    return pa.field(column.name, pa.list_(kind.value_type) if pa.types.is_list(kind) else kind)


def parquet_records(source: Source, wanted: Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each row, as `json_records` gives them.

    Raises:
        DataError: a carried value does not survive its portable type.
    """
    first = 0
    for file in source.files:
        row = 0
        for batch in source.batches(first, first + file.num_rows, wanted.columns):
            for record in _rows(batch, wanted, f"row {row} of {file.path!r}"):
                yield f"row {row} of {file.path!r}", record
                row += 1
        first += file.num_rows


def _rows(batch: pa.RecordBatch, wanted: Wanted, place: str) -> Iterator[dict[str, Any]]:
    read = {"text": _texts, "messages": _python, "input_ids": _integers}[wanted.holds]
    columns = {wanted.column: read(batch[wanted.column])}
    if wanted.example_id is not None:
        columns[wanted.example_id] = _python(batch[wanted.example_id])
    columns |= {name: _integers(batch[name]) for name in wanted.beside}
    # A carried column that is also read: its text is text in both.
    columns |= {
        f.name: _carried(batch[f.name], f, place) for f in wanted.carry if f.name not in columns
    }
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _texts(column: pa.Array) -> list[Any]:
    # As bytes: Arrow does not look whether a file's strings are UTF-8.
    found = column.cast(pa.large_binary()).to_pylist()
    texts = [None if data is None else decode(data) for data in found]
    return [
        _INVALID if text is None and data is not None else text
        for text, data in zip(texts, found, strict=True)
    ]


def _python(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _INVALID


def _integers(column: pa.Array) -> list[Any]:
    # Unchecked where int64 can hold all; what it cannot turns negative, and is no number of ours.
    lists = column.cast(pa.large_list(pa.int64()), safe=False)
    unsigned = column.type.value_type == pa.uint64()
    return [None if not row.is_valid else _int64(row.values, unsigned) for row in lists]


def _int64(values: pa.Array, unsigned: bool) -> Any:
    if values.null_count:
        return _BROKEN
    # Not to_numpy, which imports pandas where it is installed.
    data = np.frombuffer(values.buffers()[1] or b"", np.int64)
    found = data[values.offset : values.offset + len(values)]
    return _BROKEN if unsigned and (found < 0).any() else found


def _carried(column: pa.Array, field: pa.Field, place: str) -> list[Any]:
    try:
        return list(column.cast(field.type).to_pylist())
    except (pa.ArrowException, ValueError) as error:
        reason = one_line(error)
        raise DataError(
            f"carry: column {field.name!r} cannot be kept as {field.type}, at or after {place}: "
            f"{reason}"
        ) from error

"""DistillKit's Parquet: top-k log-probabilities, quantised and packed into bits.

Layout of a position's bytes, in order: the first `exact_k` values in `exact_dtype`; coefficients
of `polynomial_terms` in `term_dtype`, a curve through the others; then for each residual bin its
scale and its elements, packed most significant bit first. Values are log-probabilities by falling
order, or with `delta_encoding` the steps between them. Ids are packed in ceil(log2 d) bits.

Source: the format's published definition, distillkit/compression/ of DistillKit 2026-03.
"""

import math
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field

from softlabels.errors import BadInputError, one_line
from softlabels.fingerprint import sha256_json
from softlabels.specs import MAX_BYTES, parse_yaml
from softlabels.teacher.recorded.entries import (
    BadRecordError,
    Position,
    Recording,
    token_ids,
    top_by_logprob,
)
from softlabels.teacher.recorded.files import plain
from softlabels.teacher.recorded.reader import Context

CONFIG = "compression_config.yaml"
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
Bytes = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]

_NO_IDS = "record whose token_ids holds no token id"
_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


_MOST_VALUES = 1 << 16
"""Of a position: what a stranger's settings may make of a few bytes has a bound."""

Term = Annotated[int, Field(ge=-64, le=64)] | Literal["sqrt", "exp"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Bin(_Settings):
    """Residuals that share a scale."""

    scale_dtype: Dtype
    element_bits: Annotated[int, Field(ge=1, le=32)]
    num_elements: Annotated[int, Field(ge=1, le=_MOST_VALUES)]


class Compression(_Settings):
    """DistillKit's compression_config.yaml, with its own names."""

    d: Annotated[int, Field(ge=2, le=1 << 20)]
    k: Annotated[int, Field(ge=1, le=_MOST_VALUES)]
    exact_k: Annotated[int, Field(ge=0)]
    exact_dtype: Dtype = "float32"
    polynomial_terms: Annotated[tuple[Term, ...], Field(max_length=64)] | None = None
    term_dtype: Dtype = "float32"
    residual_bins: Annotated[tuple[Bin, ...], Field(max_length=64)]
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def index_bits(self) -> int:
        """Bits of a packed id."""
        return (self.d - 1).bit_length()

    @property
    def value_bytes(self) -> int:
        """Bytes of a position's values."""
        size = self.exact_k * _dtype(self.exact_dtype).itemsize
        size += len(self.polynomial_terms or ()) * _dtype(self.term_dtype).itemsize
        for part in self.residual_bins:
            size += _dtype(part.scale_dtype).itemsize
            size += -(-part.element_bits * part.num_elements // 8)
        return size

    @property
    def covered(self) -> int:
        """Values beyond the exact ones whose residuals are stored."""
        return sum(part.num_elements for part in self.residual_bins)


@dataclass(frozen=True)
class Decoded:
    """Positions of one row.

    Attributes:
        logprobs: float64 [P, k], nats, in the order in which they were stored.
        slack: float64 [P], how far their mass may be off by quantisation; NaN where nothing in
            the files bounds it.
    """

    logprobs: Values
    slack: Values


def open_compression(context: Context) -> Compression:
    """The compression settings that the spec names, or those beside the files.

    Raises:
        BadInputError: there are none, they are another kind's, or do not fit the tokenizer.
    """
    spec, root = context.spec, context.files.root
    if spec.compression is not None:
        place = spec.compression
        try:
            with open(place, encoding="utf-8") as file:
                text = file.read(MAX_BYTES + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise BadInputError(
                f"compression {place!r} cannot be read: {one_line(error)}"
            ) from error
    else:
        place = posixpath.join(posixpath.dirname(context.files.paths[0]), CONFIG)
        if not root.exists(place):
            raise BadInputError(
                f"there is no {place!r} beside the files in {root.uri!r}: give compression, the "
                "YAML that they were written with"
            )
        with root.open(place) as stream:
            text = stream.read(MAX_BYTES + 1).decode(errors="replace")
    try:
        found = Compression.model_validate(parse_yaml(text))
    except ValueError as error:  # a ValidationError is one
        raise BadInputError(f"compression {place!r} cannot be read: {one_line(error)}") from error
    if found.exact_k + found.covered > found.k:
        raise BadInputError(
            f"compression {place!r}: exact_k {found.exact_k!r} and {found.covered!r} residuals "
            f"are more than k {found.k!r}"
        )
    if found.d < context.tokenizer.num_ids - 1:
        raise BadInputError(
            f"compression {place!r} is for d {found.d!r} ids, the tokenizer has "
            f"{context.tokenizer.num_ids!r}: give the teacher's tokenizer"
        )
    context.compression_sha256 = sha256_json(found.model_dump(mode="json"))
    return found


def read(
    record: Mapping[str, Any], context: Context, compression: Compression | None
) -> list[Recording]:
    """The sequence of one row.

    Raises:
        BadRecordError: columns are missing, of another length, or of the legacy layout.
    """
    if "input_ids" not in record:
        raise BadRecordError("record without input_ids", f"columns are {list(record)!r:.120}")
    tokens = token_ids(plain(record["input_ids"]), "input_ids")
    if "packed_indices" in record:
        raise BadRecordError(
            "record of DistillKit's legacy logit compression",
            "it keeps centred logits, whose softmax cannot be had from their top",
        )
    if "token_ids" in record and "top_values" in record:
        ids = _between(record["token_ids"], context.tokenizer.num_ids, _NO_IDS)
        values = _matrix(record["top_values"])
        if values.dtype.kind not in "iuf":
            raise BadRecordError("record whose top_values hold no numbers", f"found {values.dtype}")
        found = Decoded(values.astype(np.float64), np.zeros(len(values)))
    elif compression is not None and "compressed_logprobs" in record:
        packed = _bytes(record, "bytepacked_indices")
        ids = unpack_bits(packed, compression.index_bits, compression.k)
        found = decode(_bytes(record, "compressed_logprobs"), compression)
    else:
        raise BadRecordError("record without logprobs", f"columns are {list(record)!r:.120}")
    if ids.shape != found.logprobs.shape or len(ids) != len(tokens) - 1:
        raise BadRecordError(
            "record whose logprobs differ in length",
            f"{len(tokens)} input_ids, {ids.shape} ids, {found.logprobs.shape} logprobs; expected "
            "one position fewer than tokens",
        )
    recording = Recording(context.name(record), tokens)
    padding = context.tokenizer.model.pad_token_id
    ending = context.tokenizer.end_id if padding is None else padding
    for index in range(len(ids)):
        chosen = tokens[index + 1]
        pairs = zip(ids[index].tolist(), found.logprobs[index].tolist(), strict=True)
        top = top_by_logprob(pairs, chosen, may_be_added=False)
        if not top.ids:
            recording.drop("position without certain logprobs")
            continue
        slack = float(found.slack[index])
        if index == len(ids) - 1 and chosen == ending:
            # Its sampler puts a padding token at the end, to have the last distribution as well.
            recording.positions.append(Position(index, top.ids, top.logprobs, -1, slack=slack))
            continue
        rank, logprob = top.label_rank, top.label_logprob
        recording.positions.append(
            Position(index, top.ids, top.logprobs, chosen, logprob, rank, slack)
        )
    return [recording]


def decode(packed: Bytes, compression: Compression) -> Decoded:
    """The log-probabilities of positions as the format defines them.

    Args:
        packed: uint8 [P, compression.value_bytes].
        compression: how they were packed.

    Raises:
        BadRecordError: a position has another number of bytes.
    """
    if packed.shape[1] != compression.value_bytes:
        raise BadRecordError(
            "record whose packed logprobs do not fit the compression",
            f"expected {compression.value_bytes} bytes a position, found {packed.shape[1]}",
        )
    exact, rest = _take(packed, compression.exact_k, compression.exact_dtype)
    terms = compression.polynomial_terms or ()
    coefficients, rest = _take(rest, len(terms), compression.term_dtype)
    others = compression.k - compression.exact_k
    out = _dtype(compression.exact_dtype)
    residuals, steps = [], []
    for part in compression.residual_bins:
        scale, rest = _take(rest, 1, part.scale_dtype)
        size = -(-part.element_bits * part.num_elements // 8)
        levels = unpack_bits(rest[:, :size], part.element_bits, part.num_elements)
        rest = rest[:, size:]
        if part.element_bits == 1:
            values = torch.from_numpy(levels).float() * 2 - 1
        else:
            values = torch.from_numpy(levels - (1 << (part.element_bits - 1))).float()
        residuals.append(values * scale)
        # Half a step by rounding, one where the largest was cut, and what the scale's own rounding
        # makes of that one; a single bit knows but two values.
        cut = 1 + (1 << (part.element_bits - 1)) * _UNIT[part.scale_dtype]
        step = scale.double() * (2 if part.element_bits == 1 else cut)
        steps.append(step + residuals[-1].double().abs() * _UNIT[compression.exact_dtype])
    residual = torch.zeros((len(packed), others), dtype=out)
    if residuals:
        known = torch.cat(residuals, 1)
        residual = torch.nn.functional.pad(known, (0, others - known.shape[1])).to(out)
    values = residual
    if terms:
        values = (_curve(compression, others) * coefficients[:, None, :]).sum(-1) + residual
    values = torch.cat([exact, values], 1)
    if compression.delta_encoding:
        values = values.float().cumsum(1).to(out)
    logprobs = values.double().numpy()
    return Decoded(logprobs, _slack(compression, exact, steps, logprobs))


def unpack_bits(packed: Bytes, bits: int, count: int) -> npt.NDArray[np.int64]:
    """`count` numbers of `bits` bits each from bytes [P, n], most significant bit first.

    Raises:
        BadRecordError: they are of another length.
    """
    if packed.shape[1] != -(-bits * count // 8):
        raise BadRecordError(
            "record whose packed ids do not fit the compression",
            f"expected {-(-bits * count // 8)} bytes a position, found {packed.shape[1]}",
        )
    flags = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    weights = np.left_shift(np.int64(1), np.arange(bits - 1, -1, -1, dtype=np.int64))
    return np.asarray(flags.astype(np.int64) @ weights)


def _curve(compression: Compression, count: int) -> torch.Tensor:
    dtype = _dtype(compression.term_dtype)
    if compression.normalize_t:
        at = torch.linspace(0, 1, steps=count, dtype=dtype)
    else:
        at = torch.arange(count, dtype=dtype)
    columns = []
    for term in compression.polynomial_terms or ():
        if isinstance(term, int):
            columns.append(at**term)
        else:
            columns.append(at.sqrt() if term == "sqrt" else at.exp())
    return torch.stack(columns, -1)


def _slack(
    compression: Compression, exact: torch.Tensor, steps: list[torch.Tensor], logprobs: Values
) -> Values:
    bounded = compression.exact_k + compression.covered == compression.k
    if not bounded or compression.error_diffusion:
        return np.full(len(logprobs), math.nan)
    unit = _UNIT[compression.exact_dtype]
    errors = torch.cat([exact.double().abs() * unit, *steps], 1).numpy()
    if compression.delta_encoding:
        errors = np.cumsum(errors, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        errors = errors + unit * np.abs(logprobs)
        lost = np.exp(logprobs) * np.expm1(errors)
    return np.asarray(np.nansum(lost, 1))


def _take(rest: Bytes, count: int, dtype: Dtype) -> tuple[torch.Tensor, Bytes]:
    size = count * _dtype(dtype).itemsize
    if not count:
        return torch.zeros((len(rest), 0), dtype=_dtype(dtype)), rest
    # A copy: torch looks at the strides of memory that it views as wider numbers.
    return torch.from_numpy(rest[:, :size].copy()).view(_dtype(dtype)), rest[:, size:]


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _bytes(record: Mapping[str, Any], name: str) -> Bytes:
    reason = f"record whose {name} holds no bytes"
    return _between(record.get(name), 256, reason).astype(np.uint8)


def _between(value: Any, limit: int, reason: str) -> npt.NDArray[Any]:
    """[P, n] whole numbers from 0 to below `limit`."""
    found = _matrix(value)
    if found.dtype.kind not in "iu":
        raise BadRecordError(reason, f"expected whole numbers, found {found.dtype}")
    if found.size and (found.min() < 0 or found.max() >= limit):
        raise BadRecordError(
            reason, f"expected 0 to {limit - 1}, found {found.min()} to {found.max()}"
        )
    return found


def _matrix(value: Any) -> npt.NDArray[Any]:
    """A list of lists of one length as [P, n]."""
    if isinstance(value, pa.Scalar) and value.is_valid:
        rows = value.values
        lengths = {len(row) for row in rows} if len(rows) else {0}
        if len(lengths) == 1 and pa.types.is_list(rows.type) and not rows.null_count:
            return np.asarray(rows.flatten().to_numpy(zero_copy_only=False)).reshape(
                len(rows), lengths.pop()
            )
    raise BadRecordError("record whose positions differ in length", f"found {str(value)[:80]}")

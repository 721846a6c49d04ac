"""Column names, Arrow types, units and the format version: the only place that knows them.

A shape legend used in all of softlabels: B rows, P positions of one row, N = sum of P over the
rows, k stored ids a position, m draws a position, V classes or vocabulary entries.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from softlabels.errors import BadInputError

FORMAT_VERSION = 1
"""Of tables and shards. A reader refuses a larger one."""

ROW_GROUP_POSITIONS = 5_000
"""Least positions a full row group holds: below it, decoding costs up to 8 times as much."""

SEQUENCE_GROUP_BYTES = 6 << 20
"""Least bytes in memory of a full row group of sequences: each costs 3 ms however small it is,
twice what 10 rows of 512 positions take to decode. 16 or more are in a stream's window."""

ROW_GROUP_BYTES = 64 << 20
"""Bytes in memory at which a row group ends all the same: carried images may be large, and Arrow
joins at most 2 GB of a column."""


@dataclass(frozen=True)
class Column:
    """One fixed column: its Arrow type, whether a row may lack it, its unit, what it holds."""

    type: pa.DataType
    nullable: bool
    unit: str
    meaning: str


def _list(value: pa.DataType) -> pa.DataType:
    # Delta names list elements "element"; Parquet leaf paths end with it.
    return pa.list_(pa.field("element", value, nullable=False))


INTS = _list(pa.int32())
FLOATS = _list(pa.float32())

COLUMNS: dict[str, Column] = {
    "example_id": Column(pa.string(), False, "", "stable content key of the example"),
    "view": Column(pa.int32(), False, "", "augmentation view, 0 for none"),
    "view_params": Column(pa.string(), True, "JSON", "what replays the view"),
    "num_positions": Column(pa.int32(), False, "positions", "P, 1 for classification"),
    "topk_ids": Column(INTS, False, "class ids", "P*k, by falling probability, -1 pads last"),
    "topk_logprobs": Column(FLOATS, False, "nats", "P*k, of the full softmax at temperature 1"),
    "tail_logprob": Column(FLOATS, True, "nats", "P, log of the mass outside the top k"),
    "sampled_ids": Column(INTS, True, "class ids", "P*m draws from the tail, -1 for no tail"),
    "position_entropy": Column(FLOATS, True, "nats", "P, of the full distribution"),
    "label_ids": Column(INTS, True, "class ids", "P hard labels, -1 where none"),
    "label_logprobs": Column(FLOATS, True, "nats", "P, of the hard label, NaN where none"),
    "label_ranks": Column(INTS, True, "rank", "P, 0 for the top class, -1 where none"),
    "entropy": Column(pa.float32(), True, "nats", "mean of position_entropy"),
    "top1_prob": Column(pa.float32(), True, "", "mean of the largest probability"),
    "margin": Column(pa.float32(), True, "", "mean of largest minus second probability"),
    "label": Column(pa.int32(), True, "class id", "classification: the hard label"),
    "top1_id": Column(pa.int32(), True, "class id", "classification: the teacher's choice"),
    "input_ids": Column(INTS, True, "token ids", "language models: the sequence"),
    "position_index": Column(INTS, True, "index", "P, which input_ids each position follows"),
    "segment_ids": Column(INTS, True, "", "document number of each input_ids entry"),
}

SOURCE_FILE, SOURCE_ROW = "source_file", "source_row"
"""Carried columns that say where a row's source is: sha256 of the file (string), row in it
(int64, from 0)."""

POSITION = (pa.field(SOURCE_FILE, pa.string()), pa.field(SOURCE_ROW, pa.int64()))

STATISTICS = ("view", "num_positions", "entropy", "top1_prob", "margin", "label", "top1_id")
"""Columns whose least and greatest value a commit records, so that a query can skip files."""


def temperature_suffix(temperature: float) -> str:
    """How a column name carries a temperature: 2.0 gives "2", 1.5 gives "1p5"."""
    return f"{temperature:g}".replace(".", "p")


def temper_columns(temperature: float) -> tuple[str, str]:
    """The two columns of an extra temperature: (temper_shift_<T>, tail_logprob_<T>), FLOATS."""
    suffix = temperature_suffix(temperature)
    return f"temper_shift_{suffix}", f"tail_logprob_{suffix}"


def table_schema(temperatures: Iterable[float] = (), carried: Iterable[pa.Field] = ()) -> pa.Schema:
    """The schema of a table: fixed columns, then temperatures', then carried ones.

    Raises:
        BadInputError: a carried column has the name of another column, or a type that not every
            reader of the table knows.
    """
    fields = [pa.field(name, c.type, nullable=c.nullable) for name, c in COLUMNS.items()]
    for temperature in temperatures:
        fields += [pa.field(name, FLOATS) for name in temper_columns(temperature)]
    names = {field.name.lower() for field in fields}
    for field in carried:
        # Delta, DuckDB and Spark take "Label" and "label" for one column.
        if field.name.lower() in names:
            raise BadInputError(
                f"carry: column {field.name!r} has the name of a softlabels column or of another "
                "carried one (case is ignored): rename it in the source"
            )
        if "." in field.name:
            raise BadInputError(
                f"carry: column {field.name!r} has a dot, which Parquet takes for nesting: rename "
                "it in the source"
            )
        fields.append(pa.field(field.name, portable_type(field)))
        names.add(field.name.lower())
    return pa.schema(fields)


def portable_type(field: pa.Field) -> pa.DataType:
    """The type that stands for `field` in a table that Delta, DuckDB, Polars and Spark all read.

    Raises:
        BadInputError: there is none (unsigned integers, half floats, structs).
    """
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    plain = (pa.string(), pa.binary(), pa.bool_(), pa.date32(), pa.float32(), pa.float64())
    if kind in plain or pa.types.is_signed_integer(kind):
        return kind
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        return pa.timestamp("us", "UTC")
    if pa.types.is_list(kind) and kind.value_type in (pa.int32(), pa.int64(), pa.float32()):
        return _list(kind.value_type)
    raise BadInputError(
        f"carry: column {field.name!r} has type {field.type}, which not every reader of a Delta "
        "table knows; cast it to a signed integer, float, string, binary, date or UTC timestamp"
    )

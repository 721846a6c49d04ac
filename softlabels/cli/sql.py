"""query: one SELECT over labels, with the user's own files, as text or for other programs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from softlabels.cli.output import print_table
from softlabels.cli.query import ForceOption, JsonOption, check_free
from softlabels.errors import counted

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["table", "csv", "json", "arrow", "parquet"]

_ENDINGS: dict[str, Format] = {
    ".csv": "csv",
    ".json": "json",
    ".arrow": "arrow",
    ".parquet": "parquet",
}
_EPILOG = """Relations: labels (a row an example), positions (a row a position), entries (a row a
stored id), classes (id, name); of a table named by --table A=…, A.labels and so on.

Macros over rows, by a relation's alias: prob_of(l, 3) the probability of id 3; margin(l) the
largest probability minus the second; agree(a, b) the same most probable id; kl(a, b) KL of b from
a in nats, over the ids that both store and one class for the rest, so never more than the full KL.

softlabels query --table a=labels@v1 --table b=labels@v3 "SELECT avg(kl(a, b)) FROM a.labels a JOIN
b.labels b USING (example_id, view) WHERE NOT agree(a, b)"

softlabels query labels@v1 --file meta=meta.csv "SELECT source, avg(entropy) FROM labels JOIN meta
USING (example_id) GROUP BY source" -o by_source.csv"""


def register(app: typer.Typer) -> None:
    """Adds the command to the app."""
    app.command(rich_help_panel="Query", epilog=_EPILOG)(query)


def query(
    table_and_sql: Annotated[
        list[str],
        typer.Argument(
            metavar="[TABLE[@TAG|@VERSION]] SQL",
            help="A table, unless --table names some; then one SELECT over labels, positions, "
            "entries, classes.",
        ),
    ],
    named: Annotated[
        list[str] | None,
        typer.Option(
            "--table",
            metavar="NAME=TABLE[@TAG|@VERSION]",
            help="One more table: its relations are NAME.labels, NAME.positions and so on.",
        ),
    ] = None,
    files: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            metavar="NAME=PATH",
            help="A CSV, JSON or Parquet file of yours, as the relation NAME. Its example_id is "
            "read as text.",
        ),
    ] = None,
    as_format: Annotated[
        Format | None,
        typer.Option("--format", help="Default: by the ending of --output, else table."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a file instead of printing.")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit-print", min=0, help="Most rows that a printed table shows.")
    ] = 50,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run one SELECT over table versions and your own files.

    Bytes are not checked: damage on disk is answered as it stands there; `verify` finds it.

    Example: softlabels query labels@v1 "SELECT label, avg(entropy) FROM labels GROUP BY label"
    """
    from softlabels.errors import BadInputError

    kind = "json" if as_json else as_format or format_of(output)
    _check_output(kind, output)
    if as_json and as_format not in (None, "json"):
        raise BadInputError(f"--json and --format {as_format} are two formats: give one of them")
    check_free(output, force)
    tables, sql = _tables(table_and_sql, named or ())
    own = _named(files or (), "--file")

    from softlabels.query.view import query as run

    result = run(tables, sql, own)
    result = result.rename_columns(_distinct(result.column_names))
    _put(result, kind, output, limit)


def format_of(output: Path | None) -> Format:
    """The format that a file's ending says; "table" where it says none."""
    return _ENDINGS.get(output.suffix, "table") if output is not None else "table"


def write_result(result: "pa.Table", kind: Format, output: Path) -> None:
    """Writes a result to a file."""
    from softlabels.storage import open_root

    open_root(output.parent).write(output.name, _encode(result, kind, stream=False))


def _put(result: "pa.Table", kind: Format, output: Path | None, limit: int) -> None:
    """Writes a result to a file or to stdout."""
    if output is not None:
        write_result(result, kind, output)
        print(f"{output}: {counted(result.num_rows, 'row')}")
    elif kind == "table":
        print_table(_rows(result.slice(0, limit)))
        if result.num_rows > limit:
            print(f"{limit} of {result.num_rows} rows; --limit-print shows more", file=sys.stderr)
    elif kind == "arrow":
        sys.stdout.buffer.write(_encode(result, kind, stream=True))
        sys.stdout.buffer.flush()
    else:
        sys.stdout.write(_encode(result, kind, stream=True).decode())


def _tables(table_and_sql: Sequence[str], named: Sequence[str]) -> tuple[dict[str, Any], str]:
    from softlabels.errors import BadInputError

    *first, sql = table_and_sql
    if len(first) > 1:
        raise BadInputError(
            f"expected a table and one SELECT, found {len(table_and_sql)} arguments: put the "
            "query in quotes, and further tables behind --table NAME=TABLE"
        )
    tables = dict(zip([""], first, strict=False)) | _named(named, "--table")
    if not tables:
        raise BadInputError("which table? softlabels query TABLE SQL, or --table NAME=TABLE")
    return tables, sql


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of columns, of which a second "a" is "a_1": JSON and rows hold each name once."""
    found: list[str] = []
    for name in names:
        number, new = 0, name
        while new in found or (number and new in names):
            number += 1
            new = f"{name}_{number}"
        found.append(new)
    return found


def _rows(result: "pa.Table") -> list[dict[str, Any]]:
    from softlabels.errors import BadInputError

    try:
        return cast("list[dict[str, Any]]", result.to_pylist())
    except (OverflowError, ValueError) as error:
        raise BadInputError(
            f"a date or time cannot be shown ({error}): it is infinite or not of the years 1 to "
            "9999; take its ::VARCHAR, or write Parquet or Arrow"
        ) from error


def _named(values: Sequence[str], option: str) -> dict[str, str]:
    from softlabels.errors import BadInputError

    found: dict[str, str] = {}
    for value in values:
        name, _, what = value.partition("=")
        if not name or not what:
            raise BadInputError(f"{option} {value!r}: expected NAME=VALUE")
        if name in found:
            raise BadInputError(f"{option} {value!r}: {name!r} is {found[name]!r} already")
        found[name] = what
    return found


def _check_output(kind: Format, output: Path | None) -> None:
    from softlabels.errors import BadInputError

    if output is None and kind == "parquet":
        raise BadInputError("Parquet goes to a file: add -o FILE.parquet")
    if output is None and kind == "arrow" and sys.stdout.isatty():
        raise BadInputError("Arrow is nothing for a terminal: pipe it, or add -o FILE.arrow")
    said = format_of(output)
    if said not in ("table", kind):
        raise BadInputError(f"{kind} or, as {str(output)!r} says, {said}? give one of them")
    if output is not None and kind == "table":
        raise BadInputError(
            f"in which format {str(output)!r}? --format csv, json, arrow or parquet"
        )


def _encode(result: "pa.Table", kind: Format, stream: bool) -> bytes:
    """`result` in a format; Arrow as what pipes (`stream`) or files hold."""
    import json

    if kind in ("arrow", "parquet"):
        return _binary(result, kind, stream)
    if kind == "json":
        rows = (json.dumps(_plain(row), default=str) for row in _rows(result))
        return ("[\n" + ",\n".join(rows) + "\n]\n").encode()
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(result.column_names)
    for start in range(0, result.num_rows, 10_000):
        for row in _rows(result.slice(start, 10_000)):
            writer.writerow([_cell(value) for value in row.values()])
    return text.getvalue().encode()


def _binary(result: "pa.Table", kind: Format, stream: bool) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(result, sink, compression="zstd")
    else:
        make = pa.ipc.new_stream if stream else pa.ipc.new_file
        with make(sink, result.schema) as writer:
            writer.write_table(result)
    return bytes(sink.getvalue())


def _cell(value: Any) -> Any:
    import json

    if isinstance(value, list | dict):
        return json.dumps(_plain(value), default=str)
    return _plain(value) if isinstance(value, bytes) else value


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity become null, bytes become base64.

    Sums of whole numbers, which are decimals without a fraction, stay whole.
    """
    import base64
    import decimal
    import math

    if isinstance(value, bytes):
        return base64.b64encode(value).decode()

    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value

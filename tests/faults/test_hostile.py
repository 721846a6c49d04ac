"""Files that strangers made to be read badly: each is refused or read, in bounded time and memory.

One process reads them all, with half a gigabyte of room beyond what it has imported.
"""

import base64
import itertools
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save
from torch import zeros

from softlabels.fingerprint import canonical_json, sha256_bytes
from softlabels.plan import Plan, PlanFile
from softlabels.store import shards
from tests.faults import parquets
from tests.faults.hostile import MEMORY, SECONDS
from tests.faults.record import record, scaled
from tests.plans import make_plan, plan_table
from tests.student.language import draw, make_language_table
from tests.tables import make_table

REPOSITORY = Path(__file__).parents[2]

DEEP = 100_000
META = b"softlabels.plan"

YAML = {
    "billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in itertools.pairwise("abcdefghi")
    ),
    "an alias to itself": "table: &a [*a]",
    "a huge whole number": "table: t\nk: " + "9" * 900_000,
    "a huge hexadecimal number": "table: t\nk: 0x" + "f" * 900_000,
    "a number to the base of sixty": "table: t\nk: 1" + ":1" * 400_000,
    "a float to the base of sixty": "table: t\nk: 1" + ":1" * 400_000 + ".5",
    "deep lists": "[" * 500_000,
    "deep mappings": "a: {" * 200_000,
    "deep block lists": "- " * DEEP + "x",
    "deep complex keys": "? " * DEEP + "x",
    "one key twice": "table: t\ntable: u\n",
    "many values": "table: [" + "a," * 500_000 + "]",
    "many keys": "\n".join(f"k{i}: 1" for i in range(80_000)),
    "a list as a key": "[1, 2]: 3",
    "Python's object": "table: !!python/object/apply:os.system ['touch {folder}/made']",
    "Python's name": "table: !!python/name:os.system",
    "an unknown tag": "table: !secret x",
    "bytes": "table: !!binary aGVsbG8=",
    "a set": "!!set {a, b}",
    "merge keys": "<<: {table: t}\nk: 3",
    "a list": "- a\n- b",
    "a number alone": "7",
    "nothing": "",
    "several documents": "table: t\n---\ntable: u",
    "wrong types": "table: [1]\nsources: 7\nplan: {a: 1}\nteacher: []\nk: {}\nout: 3",
    "not a date": "table: 2001-99-99",
    "infinity": "table: t\nk: .inf\nsteps: .nan",
    "a hundred megabytes": "#" + "x" * (100 << 20),
    "control characters": "table: \x07\x1b[31m",
    "half a character": 'table: "\\ud800"',
}

JSON_LINES: dict[str, str | bytes] = {
    "deep lists": '{"a": ' + "[" * DEEP + "}",
    "deep objects": '{"a":' * DEEP,
    "deep and whole": '{"a": ' + "[" * DEEP + "]" * DEEP + "}",
    "a huge number": '{"a": "x", "n": ' + "9" * 1_000_000 + "}",
    "no number": '{"a": NaN, "n": -Infinity}',
    "beyond double": '{"a": "x", "n": 1e999999}',
    "half a character": '{"a": "\\ud800", "n": 1}',
    "a line without end": '{"a": "' + "x" * (100 << 20),
    "millions of lists": '{"a": [' + "[]," * 5_000_000 + "[]]}",
    "a list": "[1, 2]",
    "one key twice": '{"a": "x", "a": 7, "n": 1}',
    "bytes that are no text": b'{"a": "\xff\xfe"}',
    "nul characters": b"\0" * 1000,
    "an object in carried": '{"a": "x", "n": {"b": 1}}',
}


def _schema_metadata(schema: bytes) -> bytes:
    """A plain file whose Arrow schema, which pyarrow believes over Parquet's, is `schema`."""
    sink = pa.BufferOutputStream()
    table = pa.table({"a": ["x", "y"]})
    with pq.ParquetWriter(sink, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"ARROW:schema": schema})
    return bytes(sink.getvalue())


def _arrow(field: pa.Field) -> bytes:
    return base64.b64encode(pa.schema([field]).serialize().to_pybytes())


def _written(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", **options)
    return bytes(sink.getvalue())


def _repeated_text(rows: int) -> bytes:
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["x" * (1 << 20)])
    return _written(pa.table({"a": text}), row_group_size=rows)


def foreign() -> dict[str, bytes]:
    """Parquet files with the columns of a source, written or described in a strange way."""
    # What pyarrow made of this before version 14 was unpickled when it was read.
    pickled = b"cos\nsystem\n(S'touch {folder}/made'\ntR."
    extension = pa.field("a", pa.string()).with_metadata(
        {
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickled,
        }
    )
    invalid = pa.array([b"\xff\xfe", b"ok"], pa.binary()).view(pa.string())
    return {
        "a schema of noise": _schema_metadata(b"////////" * 10),
        "a schema that is no base64": _schema_metadata(b"\xff\xfe\0"),
        "an extension type with a pickle": _schema_metadata(_arrow(extension)),
        "a schema of another type": _schema_metadata(_arrow(pa.field("a", pa.list_(pa.int8())))),
        "text that is no UTF-8": _written(pa.table({"a": invalid})),
        "one text 100,000 times": _repeated_text(100_000),
        "one list of zeros": _written(pa.table({"a": [np.zeros(40 << 20, np.int64)]})),
        "zeros": _written(pa.table({"a": np.zeros(80 << 20, np.int64)}), row_group_size=80 << 20),
        "columns of one name": _written(pa.table([[1], [2]], names=["a", "a"])),
        "no rows": _written(pa.table({"a": pa.array([], pa.string())})),
        "no column": _written(pa.table({"b": [1]})),
        "cut short": _written(pa.table({"a": ["x"] * 1000}))[:-100],
        "empty": b"",
    }


def plans(folder: Path) -> dict[str, bytes]:
    """Plans with metadata that nobody would write."""
    table = make_table(folder / "t", rows=30, shard_rows=30)
    good = make_plan(table)
    path = folder / "good.plan.parquet"
    good.write(path)
    entries = pq.read_table(path)
    meta = json.loads(entries.schema.metadata[META])

    def of(text: str | bytes) -> bytes:
        return _written(entries.replace_schema_metadata({META: text}))

    def changed(**changes: Any) -> bytes:
        return of(canonical_json(meta | changes))

    def resigned(change: Callable[[dict[str, Any]], None]) -> bytes:
        """A plan that says its own right fingerprint."""
        other = json.loads(json.dumps(meta))
        change(other["tables"][0])
        tables = {t["name"]: plan_table("a", table).model_validate(t) for t in other["tables"]}
        return changed(
            tables=other["tables"], fingerprint=Plan(tables, good.entries, good.recipe).fingerprint
        )

    def contents(**changes: Any) -> Callable[[dict[str, Any]], None]:
        return lambda t: t["contents"].update(changes)

    wide = {f"c{i}": pa.array([1], pa.int32()) for i in range(2000)}
    return {
        "JSON of deep lists": of('{"recipe": ' + "[" * DEEP + "]" * DEEP + "}"),
        "JSON of deep objects": of('{"a":' * DEEP + "1" + "}" * DEEP),
        "JSON with a huge number": of('{"format_version": ' + "9" * 500_000 + "}"),
        "JSON with NaN": of(json.dumps(meta | {"fingerprint": float("nan")})),
        "JSON with infinite numbers": of(json.dumps(meta | {"recipe": {"a": float("inf")}})),
        "JSON with half a character": of(json.dumps(meta | {"recipe": {"\ud800": "\udfff"}})),
        "JSON that is a list": of("[1]"),
        "JSON of 40 MB": of(json.dumps(meta | {"recipe": {"a": "x" * (40 << 20)}})),
        "no JSON": of(b"\xff\xfe\0"),
        "tables that are none": changed(tables=7),
        "features that are none": changed(features=[[[]]]),
        "no tables": changed(tables=[]),
        "a report that is none": changed(report=[{"source": 1}]),
        "a recipe that is none": changed(recipe=7),
        "columns of other types": _written(
            pa.table({n: pa.array([1.5]) for n in entries.schema.names}).replace_schema_metadata(
                entries.schema.metadata
            )
        ),
        "thousands of columns": _written(
            pa.table(wide).replace_schema_metadata(entries.schema.metadata)
        ),
        "a billion ids a position": resigned(contents(k=10**9, num_classes=2**31 - 1)),
        "fewer than no ids": resigned(contents(k=-5)),
        "a billion draws": resigned(contents(draws=10**9)),
        "more classes than numbers": resigned(contents(num_classes=10**30)),
        "a place with a NUL": resigned(lambda t: t.update(uri="/tmp/a\0b")),
        "a place with half a character": resigned(lambda t: t.update(uri="/tmp/\ud800")),
        "a file larger than can be": resigned(lambda t: t["files"][0].update(size=2**62)),
    }


def shard_plans(folder: Path) -> dict[str, Path]:
    """Plans, each right in all it says, of a table with one file that is not as tables are."""
    found: dict[str, Path] = {}
    plain = make_table(folder / "t", rows=40, shard_rows=40, row_group_rows=40)
    words = make_language_table(folder / "w", draw(8))

    def add(what: str, table: Any, data: bytes) -> None:
        path = f"data/{len(found)}.parquet"
        (Path(table.root.path) / path).write_bytes(data)
        listed = plan_table("a", table)
        end = shards.footer(data)
        file = PlanFile(
            path=path,
            size=len(data),
            sha256=sha256_bytes(data),
            footer_sha256=sha256_bytes(end),
            num_rows=pq.read_metadata(pa.BufferReader(data)).num_rows,
        )
        made = make_plan({"a": table})
        entry = made.entries.slice(0, 1).set_column(
            made.entries.schema.get_field_index("file"), made.entries.schema.field("file"), [[path]]
        )
        tables = {"a": listed.model_copy(update={"files": (file,)})}
        found[what] = folder / f"{len(found)}.plan.parquet"
        Plan(tables, entry, {"tables": ["a"]}).write(found[what])

    def rewritten(what: str, table: Any, name: str, column: Any, **options: Any) -> None:
        batch = pa.Table.from_batches(table.batches(files=table.files[:1])).slice(0)
        column = column(batch[name]) if callable(column) else column
        changed = batch.set_column(batch.schema.get_field_index(name), name, [column])
        meta = {b"softlabels.format_version": b"1"}
        add(what, table, _written(changed.replace_schema_metadata(meta), **options))

    rows = plain.num_rows
    for kind, value in (
        (pa.int64(), 1),
        (pa.int16(), 1),
        (pa.float64(), 1.0),
        (pa.string(), "1"),
        (pa.bool_(), True),
        (pa.list_(pa.int8()), [1]),
    ):
        column = pa.array([[value] * 5] * rows, pa.list_(kind))
        rewritten(f"ids of {kind}", plain, "topk_ids", column)
    rewritten("ids that are no lists", plain, "topk_ids", pa.array(range(rows), pa.int32()))
    rewritten("ids in large lists", plain, "topk_ids", lambda c: c.cast(pa.large_list(pa.int32())))
    nulls = [[1, None, 3, 4, 5]] * rows
    rewritten("ids with nulls", plain, "topk_ids", pa.array(nulls, pa.list_(pa.int32())))
    rewritten("rows without ids", plain, "topk_ids", pa.nulls(rows, pa.list_(pa.int32())))
    far = [[2**31 - 1, 10**9, -7, 99, 10]] * rows
    rewritten("ids of no class", plain, "topk_ids", pa.array(far, pa.list_(pa.int32())))
    rewritten("names that are numbers", plain, "example_id", pa.array(range(rows), pa.int64()))
    rewritten("names that are missing", plain, "example_id", pa.nulls(rows, pa.string()))
    invalid = pa.array([b"\xff\xfe"] * rows, pa.binary()).view(pa.string())
    rewritten("names that are no text", plain, "example_id", invalid)
    named = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), ["x" * (16 << 20)])
    rewritten("one long name", plain, "example_id", named)
    for what, counts in (("negative", -1), ("huge", 2**31 - 1)):
        column = pa.array(np.full(rows, counts, np.int32))
        rewritten(f"{what} counts", plain, "num_positions", column)
    rewritten("counts that are missing", plain, "num_positions", pa.nulls(rows, pa.int32()))
    rewritten("counts of doubles", plain, "num_positions", pa.array([1.0] * rows))
    unknown = pa.array([[np.nan] * 5] * rows, pa.list_(pa.float32()))
    rewritten("log-probabilities of NaN", plain, "topk_logprobs", unknown)
    count = words.num_rows
    for name in ("input_ids", "position_index", "segment_ids"):
        for kind in (pa.int64(), pa.float32()):
            column = pa.array([[1, 2, 3]] * count, pa.list_(kind))
            rewritten(f"{name} of {kind}", words, name, column)
        rewritten(f"{name} that are no lists", words, name, pa.array([1] * count, pa.int32()))
        short = pa.array([[10**9, -1]] * count, pa.list_(pa.int32()))
        rewritten(f"{name} out of range", words, name, short)
        holes = pa.array([[None, 1]] * count, pa.list_(pa.int32()))
        rewritten(f"{name} with nulls", words, name, holes)
    return found


def tensors() -> dict[str, bytes]:
    """Safetensors files whose header lies."""

    def of(header: Any, body: bytes = bytes(16)) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    def one(**changes: Any) -> dict[str, Any]:
        return {"weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}

    return {
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "a header of 100 GB": struct.pack("<Q", 100 << 30) + b"{}",
        "overlapping tensors": of(one() | {"bias": one()["weight"]}),
        "offsets that fall": of(one(data_offsets=[16, 0])),
        "offsets outside": of(one(data_offsets=[0, 10**12])),
        "negative offsets": of(one(data_offsets=[-16, 0])),
        "a shape of 2^124": of(one(shape=[2**62, 2**62])),
        "a shape that wraps around": of(one(shape=[2**32, 2**32, 2**32])),
        "a type that is none": of(one(dtype="PICKLE")),
        "a type that torch lacks": of(one(dtype="F4", shape=[32])),
        "deep JSON": of(b"[" * DEEP),
        "a list": of([1, 2]),
        "a gap": of(one(data_offsets=[4, 20]), bytes(20)),
        "a pickle": b"\x80\x04cos\nsystem\n.",
        "a zip": b"PK\x03\x04" + bytes(100),
        "empty": b"",
        "other tensors": save({"x": zeros(3)}),
    }


def records(folder: Path) -> list[tuple[str, str, Path]]:
    """Checkpoints, finished runs, tokenizers and tags of hostile JSON: (kind, what, place)."""
    texts = {
        "deep lists": "[" * DEEP + "]" * DEEP,
        "deep objects": '{"sha256":' * DEEP + "1" + "}" * DEEP,
        "a huge number": '{"format_version": ' + "9" * 100_000 + "}",
        "a list": "[1]",
        "no digests": '{"format_version": 1, "sha256": 7, "student_sha256": 1}',
        "NaN": '{"format_version": NaN, "sha256": {}}',
        "half a character": '{"format_version": 1, "sha256": {"\\ud800": "\\ud800"}}',
        "another file": '{"sha256": "", "student_sha256": "", "files_sha256": {"../../x": ""}}',
        "no text": "\x00\x01",
        "no model": '{"model": {"vocab": 7}}',
        "a vocabulary of lists": '{"model": {"vocab": [[[], []]]}}',
        "huge ids": '{"model": {"vocab": {"a": ' + "9" * 100_000 + "}}}",
    }
    found = []
    for number, (what, text) in enumerate(texts.items()):
        place = folder / str(number)
        (place / "_softlabels/tags").mkdir(parents=True)
        names = ("state.json", "student.json", "tokenizer.json", "_softlabels/tags/v1.json")
        for name in names:
            (place / name).write_text(text)
        for name in ("student.safetensors", "optimizer.safetensors"):
            (place / name).write_bytes(save({"x": zeros(1)}))
        found += [(kind, what, place) for kind in ("checkpoint", "run", "tokenizer", "tag")]
    return found


def cases(folder: Path) -> list[tuple[str, str, Path]]:
    """(reader, what, path) of all files, which are made in `folder`."""
    found: list[tuple[str, str, Path]] = []

    def add(kinds: tuple[str, ...], what: str, data: str | bytes, suffix: str) -> None:
        path = folder / f"{len(list(folder.iterdir()))}{suffix}"
        if isinstance(data, str):
            data = data.replace("{folder}", str(folder)).encode(errors="surrogatepass")
        path.write_bytes(data.replace(b"{folder}", str(folder).encode()))
        # In the short form each file goes to one of its readers, the next one to the next.
        some = kinds if scaled(0, 1) else kinds[len(found) % len(kinds) :][:1]
        found.extend((kind, what, path) for kind in some)

    content: str | bytes
    for what, content in YAML.items():
        kinds = ("recipe", "capture spec", "train spec", "import spec")
        add(kinds, what, content, ".yaml")
    for what, content in JSON_LINES.items():
        add(("documents", "records"), what, content, ".jsonl")
    readers = ("source", "records", "plan", "documents", "shard")
    strange = parquets.lies() | parquets.pages_that_lie() | foreign()
    # The short form reads every second one.
    for what, content in list(strange.items())[:: scaled(2, 1)]:
        add(readers, what, content, ".parquet")
    (folder / "plans").mkdir()
    for what, content in plans(folder / "plans").items():
        add(("plan",), what, content, ".parquet")
    (folder / "shards").mkdir()
    found += [("plan", what, path) for what, path in shard_plans(folder / "shards").items()]
    for what, content in tensors().items():
        add(("weights", "teacher"), what, content, ".safetensors")
    (folder / "records").mkdir()
    return found + records(folder / "records")


def test_hostile_files_are_refused_in_bounded_time_and_memory(tmp_path: Path) -> None:
    every = cases(tmp_path)
    lines = [json.dumps({"kind": kind, "path": str(path)}) for kind, _, path in every]
    (tmp_path / "cases.jsonl").write_text("\n".join(lines))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    environment = {
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": "1",
        "SOFTLABELS_CACHE_BYTES": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.hostile", str(tmp_path / "cases.jsonl")],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    told = [f"{kind}, {what}" for kind, what, _ in every]
    assert len(ends) == len(every), f"{told[len(ends)]}: ended the process: {done.stderr[-2000:]}"
    bad = []
    for name, end in zip(told, ends, strict=True):
        if not end["ended"].startswith(("refused", "read")):
            bad.append(f"{name}: {end}")
        if end.get("seconds", 0) > SECONDS / 2:
            bad.append(f"{name}: {end['seconds']} s")
    assert not bad, "\n".join(bad)
    grown = max(end["grown_mb"] for end in ends)
    assert grown << 20 < MEMORY, f"grew by {grown} MB"
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before  # nothing ran
    record(
        "hostile YAML, JSON, Parquet and safetensors read",
        {
            "files": len(every),
            "tracebacks": 0,
            "hangs": 0,
            "slowest s": max(end["seconds"] for end in ends),
            "memory grown MB": grown,
        },
    )

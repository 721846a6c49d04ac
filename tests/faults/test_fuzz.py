"""Random and mutated inputs of every reader: an error or a result, soon, in little memory.

Nothing but `SoftLabelsError` may come out. Seeds are fixed: the same inputs each time.
"""

import contextlib
import json
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import zeros

from softlabels.errors import SoftLabelsError
from softlabels.plan import Plan
from softlabels.query.recipe import Recipe
from softlabels.query.sql import check_expression, check_query
from softlabels.rules import PositionRules
from softlabels.specs import parse_yaml, read_yaml, validate
from softlabels.storage import open_root, safe_relative
from softlabels.store.table import parse_reference
from softlabels.store.tags import read_tag
from softlabels.student import checkpoint
from softlabels.student.saved import read_result
from softlabels.student.spec import RunSpec
from softlabels.student.stream import Stream
from softlabels.student.tokens import tokenizer_sha256
from softlabels.teacher.documents import Skipped, open_documents
from softlabels.teacher.recorded.files import open_files
from softlabels.teacher.recorded.reader import Context
from softlabels.teacher.recorded.spec import ImportSpec
from softlabels.teacher.recorded.survey import survey
from softlabels.teacher.source import open_source
from softlabels.teacher.spec import CaptureSpec, TextSpec, read_capture
from softlabels.teacher.tokenizer import Tokenizer, load_tokenizer
from tests.faults.record import record, scaled
from tests.plans import make_ensemble_plan, make_plan
from tests.tables import make_table
from tests.teacher.jobs import settings as capture_settings
from tests.teacher.recorded.recordings import write_tokenizer

INPUTS = scaled(1_500, 100_000)
SECONDS = 10
MEMORY = 500 << 20

COUNTED: dict[str, int] = {}
BROKEN: list[str] = []
"""Kinds of inputs of which one went through a reader as no error of ours, or hung."""


def fuzzed(share: float) -> Callable[[Any], Any]:
    """Settings of a test that takes `share` of all inputs."""
    return settings(
        max_examples=max(10, round(INPUTS * share)),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class HangError(BaseException):
    """An input took too long; no reader catches it."""


def _hang(*_: object) -> None:
    raise HangError


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Counts an input; what is not an error of ours goes through, and so does a hang."""
    COUNTED[what] = COUNTED.get(what, 0) + 1
    signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.suppress(SoftLabelsError):
            yield
    except BaseException:
        BROKEN.append(what)
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Start(NamedTuple):
    """When the first test began, and the most memory that the process had had by then."""

    seconds: float
    memory_kb: int


@pytest.fixture(scope="module", autouse=True)
def start() -> Start:
    return Start(time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# What inputs are made of

_WORDS = """
table teacher source files columns decode example_id label k shard_rows batch_size device name
module classes weights plan out student steps epochs loss tail bucket kd_weight temperature
optimizer lr sources weight where limit balance rows seed ensemble choose from by agreeing
positions repeats stage split fraction exclude once layout tokenizer scale raw openai 1 -1 0 0.5
1e-3 1e999 nan .inf true null ~ [] {} '' "" * & ! | > - ? : , [ ] { } # % @ ` \\
"""
WORDS = st.sampled_from(_WORDS.split())
KEYS = st.one_of(WORDS, st.text(max_size=8))
NUMBERS = st.one_of(
    st.integers(-3, 70_000),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 0, 1]),
)
ATOMS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20), WORDS)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["drop", "put", "double", "flip"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 40),
        st.binary(min_size=1, max_size=6) | WORDS.map(str.encode),
    ),
    min_size=1,
    max_size=5,
)


def edited(data: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    """`data` after some accidents."""
    for what, place, size, new in edits:
        at = int(place * len(data))
        if what == "drop":
            data = data[:at] + data[at + size :]
        elif what == "put":
            data = data[:at] + new + data[at:]
        elif what == "double":
            data = data[: at + size] + data[at:]
        elif data:
            data = data[:at] + bytes([data[at] ^ new[0] or 1]) + data[at + 1 :]
    return data


PATHS = st.recursive(st.just(()), lambda inner: st.tuples(st.integers(0, 9), inner), max_leaves=4)


def planted(value: Any, path: Any, new: Any) -> Any:
    """`value` with `new` in the place of something in it."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    out = dict(value) if isinstance(value, dict) else list(value)
    out[key] = planted(value[key], path[1] if len(path) > 1 else (), new)
    return out


SPECS: dict[str, tuple[Any, dict[str, Any]]] = {
    "capture": (CaptureSpec, capture_settings(Path("/tmp/none"))),
    "train": (
        RunSpec,
        {
            "plan": "a.plan.parquet",
            "out": "out/run",
            "roots": {"a": "s3://b/t"},
            "student": {"module": "a.b:C", "arguments": {"width": 3}},
            "inputs": {"decode": "a.b:decode", "columns": ["image"]},
            "loss": {"tail": "bucket", "temperature": 2.0, "kd_weight": 0.9},
            "optimizer": {"name": "sgd", "lr": 0.1, "schedule": "linear", "warmup_steps": 3},
            "steps": 10,
            "evaluate": {"plan": "b.plan.parquet", "every": 5},
            "checkpoint": {"every": 3, "keep": 2},
            "classes": ["a", "b"],
        },
    ),
    "import": (
        ImportSpec,
        {
            "table": "out/t",
            "layout": "openai",
            "files": "*.jsonl",
            "tokenizer": "folder",
            "teacher": {"name": "gpt", "revision": "1"},
            "scale": "raw",
            "k": 5,
        },
    ),
    "recipe": (
        Recipe,
        {
            "sources": {
                "a": {
                    "table": "out/t@v1",
                    "where": "entropy > 0.5 AND label <> 3",
                    "weight": 2,
                    "positions": "entropy > 0.5",
                    "limit": {"rows": 10, "by": "entropy"},
                    "balance": {"by": "label"},
                    "loss_weight": 0.5,
                    "stage": 1,
                },
                "b": {
                    "ensemble": {
                        "r": {"table": "out/r", "weight": "top1_prob"},
                        "v": {"table": "out/v", "by_class": {"shirt": 3}, "temperature": 2},
                    },
                    "weight": 1,
                },
                "c": {
                    "choose": {"from": {"r": "out/r", "v": "out/v"}, "by": "-entropy"},
                    "weight": 1,
                },
            },
            "rows": 100,
            "seed": 3,
        },
    ),
}
NAMES = st.sampled_from(sorted(SPECS))
READERS: dict[str, Callable[[Path], object]] = {
    "capture": read_capture,
    "train": RunSpec.read,
    "import": ImportSpec.read,
    "recipe": Recipe.read,
}


# Specs and recipes


@fuzzed(0.25)
@given(name=NAMES, path=PATHS, new=VALUES, more=st.dictionaries(KEYS, VALUES, max_size=1))
def test_settings_of_any_type(name: str, path: Any, new: Any, more: dict[str, Any]) -> None:
    model, values = SPECS[name]
    with refused("settings"):
        found = validate(model, planted(values, path, new) | more if path else new, "it")
        if isinstance(found, RunSpec):
            found.fingerprint()


@fuzzed(0.08)
@given(name=NAMES, edits=EDITS, change=st.none() | st.tuples(KEYS, ATOMS))
def test_texts_of_specs(folder: Path, name: str, edits: Any, change: Any) -> None:
    text = yaml.safe_dump(SPECS[name][1], sort_keys=False).encode()
    path = folder / "spec.yaml"
    path.write_bytes(edited(text, edits))
    with refused("texts of specs"):
        if change is not None and name == "train":
            RunSpec.read(path, [f"{change[0]}={change[1]}"])
        READERS[name](path)


@fuzzed(0.12)
@given(
    data=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode))
    | st.lists(WORDS | st.sampled_from(["\n", "  ", " ", ": ", "- "]), max_size=30).map(
        lambda words: "".join(words).encode()
    )
)
def test_raw_yaml(folder: Path, data: bytes) -> None:
    path = folder / "raw.yaml"
    path.write_bytes(data)
    with refused("raw YAML"):
        read_yaml(path)
    with refused("raw YAML"), contextlib.suppress(ValueError):
        parse_yaml(data.decode(errors="replace"))


# SQL

_TOKENS = """
SELECT FROM WHERE labels positions entries entropy label example_id topk_ids 1 0.5 'x' "y" * , (
) [ ] { } = <> < > AND OR NOT NULL IS IN BETWEEN LIKE CASE WHEN THEN ELSE END WITH AS UNION ALL
GROUP BY ORDER LIMIT HAVING JOIN ON USING LATERAL unnest read_text('/etc/passwd') COPY TO ATTACH
INSTALL SET PRAGMA lambda x : exp(x) list_transform :: INTEGER DATE INTERVAL -- /* */ ; $1 ? @ #
count(*) OVER PARTITION DISTINCT VALUES DESCRIBE SUMMARIZE PIVOT EXISTS ANY struct_pack
"""
TOKENS = st.sampled_from(_TOKENS.split())
SQL = st.one_of(
    st.lists(TOKENS, max_size=25).map(" ".join),
    st.text(max_size=60),
    st.tuples(
        st.sampled_from(
            [
                "SELECT label, count(*) FROM labels WHERE entropy > 0.5 GROUP BY label",
                "WITH a AS (SELECT * FROM labels) SELECT * FROM a JOIN entries USING (example_id)",
                "entropy > 0.5 AND list_sum(list_transform(topk_logprobs, lambda x: exp(x))) < 1",
                "CASE WHEN label IN (1, 2) THEN margin ELSE 0 END BETWEEN 0.1 AND 0.3",
            ]
        ),
        EDITS,
    ).map(lambda pair: edited(pair[0].encode(), pair[1]).decode(errors="replace")),
)


@fuzzed(0.15)
@given(sql=SQL)
def test_sql(sql: str) -> None:
    with refused("SQL"):
        check_query(sql, ["labels", "positions", "entries"])
    with refused("SQL"):
        check_expression(sql)


@fuzzed(0.04)
@given(value=VALUES)
def test_position_rules(value: Any) -> None:
    with refused("position rules"):
        validate(PositionRules, value, "rules")


@fuzzed(0.06)
@given(
    text=st.text(max_size=30)
    | st.lists(
        st.sampled_from(
            ["..", "/", "@", "s3://", "file://", "::", "~", ":", "\\", "\0", "a", "%2e"]
        ),
        max_size=8,
    ).map("".join)
)
def test_places(text: str) -> None:
    with refused("places"):
        parse_reference(text)
    with refused("places"):
        safe_relative(text)
    if text.partition("://")[0] in ("", "file", text):
        with refused("places"):
            open_root(text)


# Plans


@pytest.fixture(scope="module")
def plans(folder: Path) -> list[bytes]:
    """Of one teacher, with lists of rows; of two."""
    tables = {name: make_table(folder / name, rows=60, seed=i) for i, name in enumerate("ab")}
    made = [
        make_plan(tables, keep=lambda entry, rows: [0, 2] if entry % 2 else None),
        make_ensemble_plan(tables),
    ]
    for number, plan in enumerate(made):
        plan.write(folder / f"{number}.plan.parquet")
    return [(folder / f"{number}.plan.parquet").read_bytes() for number in range(len(made))]


@fuzzed(0.06)
@given(which=st.booleans(), edits=EDITS)
def test_bytes_of_plans(folder: Path, plans: list[bytes], which: bool, edits: Any) -> None:
    path = folder / "edited.plan.parquet"
    path.write_bytes(edited(plans[which], edits))
    with refused("bytes of plans"):
        Plan.read(path)


@fuzzed(0.05)
@given(which=st.booleans(), path=PATHS, new=VALUES, sign=st.booleans())
def test_metadata_of_plans(
    folder: Path, plans: list[bytes], which: bool, path: Any, new: Any, sign: bool
) -> None:
    """Also plans whose fingerprint is right for what they say."""
    table = pq.read_table(pa.BufferReader(plans[which]))
    meta = planted(json.loads(table.schema.metadata[b"softlabels.plan"]), path, new)
    place = folder / "meta.plan.parquet"
    with refused("metadata of plans"):
        for _ in range(2):
            text = json.dumps(meta)
            changed = table.replace_schema_metadata({b"softlabels.plan": text.encode()})
            pq.write_table(changed, place)
            try:
                plan = Plan.read(place)
            except SoftLabelsError as error:
                _, found, rest = str(error).partition("has fingerprint '")
                if not (sign and found and isinstance(meta, dict)):
                    raise
                meta["fingerprint"] = rest[:64]
                continue
            for batch in Stream(plan, batch_size=16, epochs=1):
                assert len(batch)
            break


# Data files and records


@pytest.fixture(scope="module")
def sources(folder: Path) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"a": ["x", "y", None] * 30, "b": [[1, 2], [], None] * 30, "n": range(90)})
    pq.write_table(table, sink, compression="zstd", row_group_size=40)
    return bytes(sink.getvalue())


@fuzzed(0.05)
@given(edits=EDITS)
def test_bytes_of_sources(folder: Path, sources: bytes, edits: Any) -> None:
    path = folder / "source.parquet"
    path.write_bytes(edited(sources, edits))
    with refused("bytes of sources"):
        source = open_source(str(path), ["a", "b"])
        for batch in source.batches(0, source.num_rows, ["a", "b"]):
            assert batch.nbytes >= 0
    with refused("bytes of sources"):
        list(open_documents(TextSpec(files=str(path), text="a"), ["n"]).documents(Skipped()))
    with refused("bytes of sources"):
        list(open_files(str(path), "axolotl").records())


LINES = st.one_of(
    st.binary(max_size=80),
    VALUES.map(lambda v: json.dumps(v).encode()),
    st.dictionaries(st.sampled_from(["a", "n", "messages"]), VALUES, max_size=3).map(
        lambda v: json.dumps(v).encode()
    ),
)


@fuzzed(0.03)
@given(lines=st.lists(LINES, max_size=3), carry=st.booleans())
def test_lines_of_documents(folder: Path, lines: list[bytes], carry: bool) -> None:
    path = folder / "docs.jsonl"
    path.write_bytes(b"\n".join(lines))
    with refused("lines of documents"):
        raw = open_documents(TextSpec(files=str(path), text="a"), ["n"] if carry else [])
        list(raw.documents(Skipped()))


RECORDS: dict[str, dict[str, Any]] = {
    "openai": {
        "id": "r1",
        "messages": [{"role": "user", "content": "the cat"}],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " sat"},
                "finish_reason": "stop",
                "logprobs": {
                    "content": [
                        {
                            "token": " sat",
                            "bytes": [32, 115, 97, 116],
                            "logprob": -0.1,
                            "top_logprobs": [
                                {"token": " sat", "bytes": [32, 115, 97, 116], "logprob": -0.1},
                                {"token": " on", "bytes": [32, 111, 110], "logprob": -3.5},
                            ],
                        }
                    ]
                },
            }
        ],
        "usage": {"prompt_tokens": 4},
    },
    "vllm": {
        "prompt_token_ids": [5, 6, 7],
        "prompt_logprobs": [
            None,
            {"6": {"logprob": -0.5, "rank": 1}, "9": {"logprob": -1.5, "rank": 2}},
            {"7": {"logprob": -0.7, "rank": 1}, "3": {"logprob": -2.0, "rank": 2}},
        ],
        "outputs": [{"token_ids": [8], "logprobs": [{"8": {"logprob": -0.3, "rank": 1}}]}],
    },
    "axolotl": {
        "input_ids": [5, 6, 7],
        "labels": [5, 6, 7],
        "attention_mask": [1, 1, 1],
        "target_token_ids": [[6, 9], [7, 3], [8, 4]],
        "target_logprobs": [[-0.5, -1.5], [-0.7, -2.0], [-0.1, -4.0]],
        "target_mask": [[1, 1], [1, 1], [1, 1]],
    },
}


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(write_tokenizer(folder / "tokenizer")))


@fuzzed(0.06)
@given(
    layout=st.sampled_from(sorted(RECORDS)),
    path=PATHS,
    new=VALUES,
    skip=st.booleans(),
    whole=st.booleans(),
)
def test_records_of_imports(
    folder: Path, tokenizer: Tokenizer, layout: str, path: Any, new: Any, skip: bool, whole: bool
) -> None:
    place = folder / "records.jsonl"
    records = [planted(RECORDS[layout], path, new)] + [RECORDS[layout]] * whole
    place.write_text("\n".join(json.dumps(one) for one in records))
    spec = ImportSpec.model_validate(
        {
            "table": "out/t",
            "layout": layout,
            "files": str(place),
            "tokenizer": str(folder / "tokenizer"),
            "teacher": {"name": "x"},
            "scale": "raw",
            "on_bad": "skip" if skip else "refuse",
            **({"targets": "after"} if layout == "axolotl" else {}),
        }
    )
    with refused("records of imports"):
        survey(Context(spec, open_files(str(place), layout), tokenizer))


# What runs and tables leave


@fuzzed(0.05)
@given(
    header=VALUES
    | st.dictionaries(
        KEYS,
        st.fixed_dictionaries(
            {"dtype": ATOMS | st.just("F32"), "shape": VALUES, "data_offsets": VALUES}
        ),
        max_size=2,
    ),
    size=st.none() | st.integers(0, 2**64 - 1),
    edits=st.none() | EDITS,
)
def test_weights(folder: Path, header: Any, size: int | None, edits: Any) -> None:
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text) if size is None else size) + text + bytes(16)
    if edits is not None:
        data = edited(save({"x": zeros(4)}), edits)
    path = folder / "w.safetensors"
    path.write_bytes(data)
    with refused("weights"):
        checkpoint.read_weights(path)


@fuzzed(0.04)
@given(
    value=VALUES,
    given_keys=st.dictionaries(
        st.sampled_from(
            [
                "sha256",
                "format_version",
                "student_sha256",
                "files_sha256",
                "model",
                "vocab",
                "version",
            ]
        ),
        VALUES,
        max_size=4,
    ),
)
def test_records_of_runs_and_tags(folder: Path, value: Any, given_keys: dict[str, Any]) -> None:
    place = folder / "records"
    (place / "_softlabels/tags").mkdir(parents=True, exist_ok=True)
    text = json.dumps(given_keys or value)
    for name in ("state.json", "student.json", "tokenizer.json", "_softlabels/tags/v1.json"):
        (place / name).write_text(text)
    for name in ("student.safetensors", "optimizer.safetensors"):
        (place / name).write_bytes(save({"x": zeros(1)}))
    for read in (
        lambda: checkpoint.load(place),
        lambda: read_result(place),
        lambda: tokenizer_sha256(place),
        lambda: read_tag(open_root(place), "v1"),
    ):
        with refused("records of runs and tags"):
            read()


def test_all_of_them_in_bounded_memory(start: Start) -> None:
    """The last: it records what those before it did."""
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start.memory_kb) << 10
    assert grown < MEMORY, f"grew by {grown >> 20} MB"
    assert not BROKEN
    total = sum(COUNTED.values())
    assert total >= INPUTS
    record(
        "fuzzed inputs of specs, recipes, SQL, plans, imports, weights and records",
        {
            "inputs": total,
            "tracebacks": 0,
            "hangs": 0,
            "memory grown MB": grown >> 20,
            "seconds": round(time.monotonic() - start.seconds),
        },
    )

"""Values that no engine writes, but files hold: a record skipped, never a traceback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softlabels.errors import DataError
from softlabels.teacher.recorded.files import open_files
from softlabels.teacher.recorded.report import import_recorded
from tests.teacher.recorded.recordings import Teacher, spec_of, write_lines
from tests.teacher.recorded.test_vllm import record


def first_entry(found: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(iter(found["prompt_logprobs"][1].values()))
    return entry


def huge_logprob(found: dict[str, Any]) -> None:
    first_entry(found)["logprob"] = -(10**400)


def huge_rank(found: dict[str, Any]) -> None:
    first_entry(found)["rank"] = 10**12


def long_key(found: dict[str, Any]) -> None:
    found["prompt_logprobs"][1]["9" * 5_000] = first_entry(found)


def half_a_character(found: dict[str, Any]) -> None:
    found["id"] = "\ud800"


def two_outputs(found: dict[str, Any]) -> None:
    found["outputs"] = [{"token_ids": [3]}, {"token_ids": [4]}]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (huge_logprob, "record whose logprob is no number"),
        (huge_rank, "record whose ranks are not 1 to n"),
        (long_key, "record whose logprobs are no dicts"),
        (half_a_character, "record whose text is not UTF-8"),
        (two_outputs, "record of several outputs"),
    ],
)
def test_a_bad_record_is_counted(
    teacher: Teacher, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], reason: str
) -> None:
    bad = record(teacher, 1)
    spoil(bad)
    write_lines(tmp_path / "records.jsonl", [record(teacher, 2), bad])
    spec = spec_of(teacher, tmp_path, layout="vllm", example_id="id", on_bad="skip")
    report = import_recorded(spec)
    assert (report["rows"], report["skipped"]) == (1, {reason: 1})


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "layout", "write"),
    [("a.jsonl", "vllm", write_lines), ("a.parquet", "distillkit", write_rows)],
)
def test_a_file_that_was_replaced_since_it_was_hashed_is_refused(
    tmp_path: Path, name: str, layout: str, write: Callable[..., Path]
) -> None:
    path = write(tmp_path / name, [{"x": 1}])
    files = open_files(str(path), layout)
    write(path, [{"x": 2}])
    with pytest.raises(DataError, match="was replaced while it was read"):
        list(files.records())

"""softlabels import: from records to a table that every other command takes."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from softlabels.plan import Plan
from softlabels.student.stream import Stream
from softlabels.teacher.recorded.report import import_recorded
from softlabels.teacher.recorded.spec import ImportSpec
from tests.cli.test_capture import Cli, cli, errors
from tests.teacher.recorded.recordings import (
    Teacher,
    chat_response,
    prompt_logprobs,
    require_true,
    write_lines,
)

__all__ = ["cli"]
K = 6


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """A teacher with a tokenizer in a folder."""
    return Teacher.make(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def folder(tmp_path: Path, teacher: Teacher) -> Path:
    """A folder with twelve vLLM records in two files, and the spec that imports them."""
    for part in range(2):
        records = []
        for seed in range(part * 6, part * 6 + 6):
            tokens = teacher.write(30, seed)
            logprobs = prompt_logprobs(teacher, tokens, K)
            records.append({"prompt_token_ids": tokens, "prompt_logprobs": logprobs})
        write_lines(tmp_path / "records" / f"{part}.jsonl", records)
    return tmp_path


def write_spec(folder: Path, teacher: Teacher, **changes: Any) -> Path:
    """A spec file."""
    settings = {
        "table": str(folder / "table"),
        "layout": "vllm",
        "files": str(folder / "records" / "*.jsonl"),
        "tokenizer": str(teacher.folder),
        "teacher": {"name": "bigram", "revision": "2026-10"},
        "scale": "raw",
        "shard_rows": 5,
    }
    file = folder / "import.yaml"
    file.write_text(yaml.safe_dump(settings | changes))
    return file


def problems(stderr: str) -> list[str]:
    """Lines of stderr apart from progress."""
    return [line for line in errors(stderr) if not line.startswith(("read ", "write ", "verify "))]


def test_it_says_what_it_made_and_then_that_nothing_is_left(
    folder: Path, teacher: Teacher, cli: Cli
) -> None:
    spec = write_spec(folder, teacher)
    code, out, err = cli("import", spec)
    assert (code, problems(err)) == (0, [])
    assert out.splitlines() == [
        "k 6 of k+1 entries a position, tails derived, their mass off by at most 2e-06",
        f"{folder}/table@3: 12 sequences imported, 0 before, 348 positions in all",
    ]
    code, out, err = cli("import", spec)
    assert (code, problems(err)) == (0, [])
    assert out.splitlines()[1:] == [
        "nothing left to import: 3 units were there",
        f"{folder}/table@3: 0 sequences imported, 12 before, 348 positions in all",
    ]


def test_a_dry_run_writes_nothing_and_json_says_the_same(
    folder: Path, teacher: Teacher, cli: Cli
) -> None:
    spec = write_spec(folder, teacher)
    code, out, _ = cli("import", spec, "--dry-run")
    planned = json.loads(out)
    assert code == 0
    assert not (folder / "table").exists()
    assert planned["rows_left"] == 12
    assert planned["positions_left"] == 348
    assert planned["bytes"] > 0
    code, out, _ = cli("import", spec, "--json")
    found = json.loads(out)
    assert (found["rows"], found["positions"]) == (12, 348)
    for name in ("run_id", "k", "recorded", "skipped", "units"):
        assert found[name] == planned[name]
    assert json.loads(cli("import", spec, "--dry-run")[1])["units_left"] == 0


def test_every_other_command_takes_the_table(folder: Path, teacher: Teacher, cli: Cli) -> None:
    assert cli("import", write_spec(folder, teacher))[0] == 0
    table = folder / "table"
    code, out, err = cli("verify", table)
    assert (code, problems(err)) == (0, [])
    assert "right" in out
    code, out, _ = cli("show", table, "--json")
    shown = json.loads(out)
    assert shown["recorded"]["layout"] == "vllm"
    assert shown["recorded"]["tail_error"] == pytest.approx(2e-6)
    assert shown["teacher"] == "bigram"
    sql = "SELECT count(*) AS n, min(tail_logprob) AS least FROM positions"
    code, out, err = cli("query", table, sql, "--format", "json")
    assert code == 0, err
    assert json.loads(out)[0]["n"] == 348
    commits = json.loads(cli("log", table, "--json")[1])
    assert commits[0]["run"]["device"] == "recorded"
    assert commits[0]["run"]["source"]["uri"].endswith("/records")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"sources": {"all": {"table": str(table)}}}))
    code, out, err = cli("mix", recipe, "-o", folder / "plan.parquet")
    assert code == 0, err
    plan = Plan.read(folder / "plan.parquet")
    rows, positions = 0, 0
    for batch in Stream(plan, batch_size=4, epochs=1):
        rows += len(batch.targets.num_positions)
        positions += int(batch.targets.num_positions.sum())
        assert batch.targets.tail is not None
        mass = np.exp(batch.targets.logprobs).sum(1) + np.exp(batch.targets.tail)
        np.testing.assert_allclose(mass, 1, atol=1e-3)
    assert (rows, positions) == (12, 348)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"scale": "processed", "temperature": 0.7}, 2, ["0.7", "expected temperature 1.0"]),
        ({"layout": "vlm"}, 2, ["'vlm'"]),
        ({"top_k": 5}, 2, ["unknown key 'top_k'"]),
        ({"files": "none/*.jsonl"}, 2, ["no file matches 'none/*.jsonl'"]),
        ({"tokenizer": "/none/such"}, 2, ["'/none/such'"]),
        ({"layout": "openai"}, 1, ["line 1 of '0.jsonl'", "12 x record without choices"]),
        ({"layout": "distillkit"}, 2, ["layout distillkit is read from .parquet"]),
        ({"k": 9}, 2, ["k is 9", "at most 7"]),
        ({"table": "x@1"}, 2, ["expected a table"]),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, teacher: Teacher, cli: Cli, changes: dict[str, Any], code: int, words: list[str]
) -> None:
    found, out, err = cli("import", write_spec(folder, teacher, **changes))
    assert (found, out) == (code, "")
    (line,) = problems(err)
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not (folder / "table").exists()


def test_skipped_records_are_counted(folder: Path, teacher: Teacher, cli: Cli) -> None:
    file = folder / "records" / "0.jsonl"
    file.write_text(file.read_text()[:-400] + "\n{}\n")
    code, out, err = cli("import", write_spec(folder, teacher))
    assert (code, out) == (1, "")
    assert "line 6 of '0.jsonl': line that is not JSON" in problems(err)[0]
    code, out, _ = cli("import", write_spec(folder, teacher), "--set", "on_bad=skip")
    assert code == 0
    assert out.splitlines()[:2] == [
        "1 left out: line that is not JSON, such as one cut short",
        "1 left out: record without prompt_token_ids",
    ]
    assert out.splitlines()[-1].endswith("11 sequences imported, 0 before, 319 positions in all")


def test_another_layout_is_another_table(folder: Path, teacher: Teacher, cli: Cli) -> None:
    assert cli("import", write_spec(folder, teacher))[0] == 0
    tokens = teacher.write(30, 50)
    write_lines(folder / "chat.jsonl", [chat_response(teacher, tokens, 1, K)])
    spec = write_spec(folder, teacher, layout="openai", files=str(folder / "chat.jsonl"))
    code, out, err = cli("import", spec)
    assert (code, out) == (1, "")
    (line,) = problems(err)
    assert "recorded differs" in line
    assert "layout='openai'" in line
    assert "layout='vllm'" in line


def test_two_at_once_import_every_row_once(folder: Path, teacher: Teacher) -> None:
    spec = ImportSpec.read(write_spec(folder, teacher, shard_rows=1))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(import_recorded, [spec, spec]))
    assert sum(report["rows"] for report in found) == 12
    rows = _rows(folder)
    assert len({row["example_id"] for row in rows}) == len(rows) == 12
    require_true(teacher, rows, K)


def _rows(folder: Path) -> list[dict[str, Any]]:
    from softlabels.store.table import Table

    table = Table.open(str(folder / "table"))
    return [row for batch in table.batches() for row in batch.to_pylist()]

"""Every command, again and again, in processes of its own: the exit code never lies.

Native libraries have aborted interpreters that were done; a schedule would have seen a failed job.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import typer
import yaml

from softlabels.cli.main import app
from softlabels.store.table import Table
from softlabels.student.trainer import train
from softlabels.teacher.capture import capture
from tests.cli.test_table import in_process
from tests.faults.record import record, scaled
from tests.plans import make_plan
from tests.student.problem import CLASSES, run_spec
from tests.tables import dense_logprobs, make_table
from tests.teacher.jobs import make_spec, settings, write_source
from tests.teacher.recorded.recordings import Teacher, prompt_logprobs, write_lines

REPOSITORY = Path(__file__).parents[2]
SECONDS = 300


@dataclass(frozen=True)
class Case:
    """A command line and how it must end.

    Attributes:
        arguments: after `softlabels`.
        code: its exit code.
        says: what is in its output, so that it ends so for the right reason.
    """

    arguments: tuple[str, ...]
    code: int
    says: str = ""


def case(line: str, code: int = 0, says: str = "") -> Case:
    """A case of a line whose arguments are separated by spaces; "_" stands for one in them."""
    words = tuple(word.replace("_", " ") if "(" in word else word for word in line.split())
    return Case(words, code, says)


CASES: dict[str, tuple[Case, Case]] = {
    "capture": (
        case("capture capture.yaml --set k=2 --set table=made", 0),
        case("capture capture.yaml --set kk=2", 2, "unknown key 'kk'"),
    ),
    "status": (case("status captured", 0), case("status missing", 2)),
    "import": (
        case("import import.yaml", 0),
        case("import import.yaml --set files=none/*.jsonl", 2, "no file matches"),
    ),
    "show": (case("show t", 0, "300"), case("show missing", 2, "there is no table")),
    "stats": (case("stats t", 0), case("stats t@99", 2, "no version 99")),
    "verify": (case("verify t", 0), case("verify damaged", 1, "sha256")),
    "log": (case("log t", 0), case("log missing", 2, "there is no table")),
    "tag": (case("tag t v2", 0, "v2"), case("tag t ../x", 2, "tag name")),
    "rollback": (case("rollback t@0", 0), case("rollback t@none", 2, "no tag")),
    "vacuum": (case("vacuum t", 0), case("vacuum t --retention soon", 2)),
    "delete": (
        case("delete t --where label=3 --yes", 0),
        case("delete t --where nothing=3 --yes", 2, "nothing"),
    ),
    "compact": (case("compact t", 0), case("compact t --target-size large", 2)),
    "publish": (
        case("publish t copied", 0),
        case("publish damaged copied-too", 1, "sha256"),
    ),
    "query": (
        case("query t SELECT_count(*)_FROM_entries", 0),
        case("query t COPY_(SELECT_1)_TO_'x'", 2, "exactly one SELECT"),
    ),
    "mix": (
        case("mix recipe.yaml -o made.plan.parquet", 0),
        case("mix bad-recipe.yaml -o made.plan.parquet", 2, "wher"),
    ),
    "ensemble": (
        case("ensemble ensemble.yaml -o both", 0),
        case("ensemble ensemble.yaml -o both --set ensemble.c=missing", 2),
    ),
    "calibrate": (
        case("calibrate t --temperature 1.2", 0, "1.2"),
        case("calibrate t --temperature 0", 2),
    ),
    "suspects": (case("suspects t", 0), case("suspects t --where nothing", 2)),
    "diff": (case("diff t u", 0), case("diff t missing", 2, "there is no table")),
    "train": (
        case("train run.yaml --set out=new", 0, "2 steps"),
        case("train run.yaml --set out=new --set loss.temperature=7", 1, "7"),
    ),
    "evaluate": (case("evaluate run --plan p.plan.parquet", 0), case("evaluate t", 2)),
    "report": (case("report t -o page.html", 0), case("report missing", 2)),
    "spec": (case("spec capture", 0, "table"), case("spec nothing", 2)),
    "plan show": (
        case("plan show p.plan.parquet", 0),
        case("plan show cut.plan.parquet", 1, "whole softlabels plan"),
    ),
    "plan diff": (
        case("plan diff p.plan.parquet p.plan.parquet", 0),
        case("plan diff p.plan.parquet none.plan.parquet", 2, "there is no plan"),
    ),
}


def commands(group: Any, before: str = "") -> Iterator[str]:
    """All commands of the app, those of groups after the group's name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}"


def test_every_command_has_cases() -> None:
    assert set(commands(typer.main.get_command(app))) == set(CASES)
    for good, bad in CASES.values():
        assert (good.code, bad.code > 0) == (0, True)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(values, sort_keys=False))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whatever the cases name; each process works in a copy of it."""
    folder = tmp_path_factory.mktemp("commands")
    features = dense_logprobs(300, CLASSES, 0).astype(np.float32)
    carried = {"features": pa.array(features.tolist(), pa.list_(pa.float32()))}
    tables: dict[str, Table] = {}
    for seed, name in enumerate(("t", "u")):
        options: dict[str, Any] = {"rows": 300, "classes": CLASSES, "k": CLASSES, "seed": seed}
        tables[name] = make_table(folder / name, carried=carried, **options)
    damaged = make_table(folder / "damaged", rows=20, shard_rows=20)
    file = folder / "damaged" / damaged.files[0].path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    plan = folder / "p.plan.parquet"
    make_plan({"t": tables["t"]}).write(plan)
    (folder / "cut.plan.parquet").write_bytes(plan.read_bytes()[:-50])
    write_source(folder / "src/a.parquet", 0, 60)
    capture(make_spec(folder, table=str(folder / "captured")))
    source = {"files": "src/*.parquet"}
    _write(folder / "capture.yaml", settings(folder, table="captured", source=source))
    recipe = {"table": "t", "where": "entropy > 0.1"}
    _write(folder / "recipe.yaml", {"sources": {"a": recipe}})
    _write(folder / "bad-recipe.yaml", {"sources": {"a": {"table": "t", "wher": "entropy > 0"}}})
    _write(folder / "ensemble.yaml", {"ensemble": {"a": "t", "b": "u"}})
    run = run_spec(folder, plan, steps=2)
    train(run)
    values = run.model_dump(mode="json", exclude_defaults=True)
    _write(folder / "run.yaml", values | {"plan": "p.plan.parquet", "out": "run"})
    _recorded(folder)
    return folder


def _recorded(folder: Path) -> None:
    teacher = Teacher.make(folder / "tokenizer")
    records = []
    for seed in range(6):
        tokens = teacher.write(20, seed)
        found = prompt_logprobs(teacher, tokens, 4)
        records.append({"prompt_token_ids": tokens, "prompt_logprobs": found})
    write_lines(folder / "records/a.jsonl", records)
    spec = {
        "table": "imported",
        "layout": "vllm",
        "files": "records/*.jsonl",
        "tokenizer": "tokenizer",
        "teacher": {"name": "bigram"},
        "scale": "raw",
    }
    _write(folder / "import.yaml", spec)


def _ended(made: Path, place: Path, asked: Case) -> str | None:
    """What is wrong with how a process ended; None: nothing."""
    shutil.copytree(made, place)
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "SOFTLABELS_CACHE": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "softlabels", *asked.arguments],
        cwd=place,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    shutil.rmtree(place)
    return _wrong(asked, done.returncode, done.stdout + done.stderr)


def _wrong(asked: Case, code: int, said: str) -> str | None:
    line = f"softlabels {' '.join(asked.arguments)}"
    if code != asked.code:
        return f"{line}: ended with {code}, not {asked.code}: {said[-500:]}"
    for word in ("terminate called", "Traceback", "core dumped", "Fatal Python error"):
        if word in said:
            return f"{line}: {said[-1500:]}"
    if asked.says not in " ".join(said.split()):
        return f"{line}: expected {asked.says!r} in {said[-500:]!r}"
    return None


def test_the_exit_code_is_right_each_time(made: Path, tmp_path: Path) -> None:
    good, bad = zip(*CASES.values(), strict=True)
    # In the short form wrong use costs no process: the interpreter's end is that of right use.
    asked = [*good, *bad] * 30 if scaled(0, 1) else list(good)
    with ThreadPoolExecutor(2) as pool:
        places = [tmp_path / str(number) for number in range(len(asked))]
        wrong = [found for found in pool.map(_ended, [made] * len(asked), places, asked) if found]
    for one in () if scaled(0, 1) else bad:
        done = in_process(*one.arguments, cwd=made)
        if found := _wrong(one, done.returncode, done.stdout + done.stderr):
            wrong.append(found)
    assert not wrong, "\n\n".join(wrong)
    counts = {"commands": len(CASES), "runs": len(asked), "wrong exit codes": len(wrong)}
    record("repeats of each command, once rightly and once wrongly used", counts)

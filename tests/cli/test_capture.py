"""softlabels capture: exit codes, one line for each mistake, and what is said."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from softlabels.cli import main
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from tests.teacher.jobs import TOYS, rows_table, settings, stored, write_source
from tests.teacher.toys import NAN_AT

ROOT = Path(__file__).parents[2]
MAIN = "from softlabels.cli import main; main()"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a source of 100 rows."""
    write_source(tmp_path / "src" / "a.parquet", 0, 100)
    return tmp_path


def write_job(folder: Path, **changes: Any) -> Path:
    """A spec file."""
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(settings(folder, **changes)))
    return file


class Cli:
    """Runs commands in this process: arguments in; exit code, stdout and stderr out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["softlabels", *map(str, arguments)])
        self._capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self._capsys.readouterr()
        return code, out, err


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs commands in this process."""
    return Cli(monkeypatch, capsys)


def errors(stderr: str) -> list[str]:
    """Lines of stderr apart from progress."""
    assert "Traceback" not in stderr
    lines = [line.rstrip() for line in stderr.replace("\r", "\n").splitlines()]
    return [line for line in lines if line and not line.startswith(("plan ", "label "))]


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Starts a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        **options,
    )


def test_a_capture_says_what_it_made_and_then_that_nothing_is_left(folder: Path, cli: Cli) -> None:
    job = write_job(folder)
    write_source(folder / "src" / "b.parquet", 98, 105)
    code, out, err = cli("capture", job)
    assert code == 0
    assert errors(err) == []
    assert out.splitlines() == [
        "2 source rows repeat an example and were labelled once"
        " (0 of them with another hard label)",
        f"{folder}/table@3: 105 rows labelled, 0 before",
    ]
    code, out, err = cli("capture", job)
    assert code == 0
    assert out.splitlines() == [
        "nothing left to label: all 3 units were there",
        f"{folder}/table@3: 0 rows labelled, 105 before",
    ]


def test_json(folder: Path, cli: Cli) -> None:
    code, out, _ = cli("capture", write_job(folder), "--json", "--set", "shard_rows=100")
    found = json.loads(out)
    assert code == 0
    assert found.pop("seconds") > 0
    assert len(found.pop("run_id")) == 64
    assert found == {
        "table": f"{folder}/table",
        "version": 1,
        "rows": 100,
        "already": 0,
        "repeated": 0,
        "relabelled": 0,
        "units": 1,
        "committed": 1,
        "skipped": {},
    }


def test_a_dry_run_prints_json_and_writes_nothing(folder: Path, cli: Cli) -> None:
    before = sorted(folder.rglob("*"))
    job = write_job(folder)
    code, out, err = cli("capture", job, "--dry-run")
    assert code == 0
    assert errors(err) == []
    assert list(json.loads(out)) == [
        "table", "run_id", "source_rows", "repeated", "units", "units_left", "rows_left",
        "batch_size", "rows_per_s", "seconds", "bytes_per_row", "bytes",
    ]  # fmt: skip
    assert sorted(folder.rglob("*")) == sorted([*before, job])


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"k": 9}, 2, ["job.yaml", "k is 9"]),
        ({"batchsize": 9}, 2, ["unknown key 'batchsize'; did you mean 'batch_size'?"]),
        ({"source": {"files": "none/*.parquet"}}, 2, ["no file matches 'none/*.parquet'"]),
        ({"source": {"columns": ["image"]}}, 2, ["'image'", "columns: id, x"]),
        ({"source": {"decode": "nowhere:decode"}}, 2, ["'nowhere'"]),
        ({"carry": ["label"]}, 2, ["'label'"]),
        ({"device": "cuda:7"}, 2, ["'cuda:7'"]),
        ({"teacher": {"module": f"{TOYS}:Missing"}}, 2, ["'Missing'"]),
        ({"teacher": {"weights": "none.safetensors"}}, 2, ["no weights file 'none.safetensors'"]),
        ({"teacher": {"classes": 7}}, 1, ["(16, 6)", "(16, 7)"]),
        ({"teacher": {"module": f"{TOYS}:Infinite"}}, 1, ["'row00000'", "infinite"]),
        ({"source": {"decode": f"{TOYS}:decode_refuse"}}, 1, ["not an image"]),
        ({"source": {"label": "note"}}, 1, ["b'note 0'", "'class0'"]),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, cli: Cli, changes: dict[str, Any], code: int, words: list[str]
) -> None:
    found, out, err = cli("capture", write_job(folder, **changes))
    assert found == code
    assert out == ""
    (line,) = errors(err)
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not (folder / "table").exists()


def test_damaged_inputs_are_one_line(folder: Path, cli: Cli) -> None:
    weights = folder / "w.safetensors"
    weights.write_bytes(b"\x00" * 20)
    code, _, err = cli("capture", write_job(folder, teacher={"weights": str(weights)}))
    assert code == 2
    assert "not a whole safetensors file" in errors(err)[0]
    path = folder / "src" / "a.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    code, _, err = cli("capture", write_job(folder))
    assert code == 1
    (line,) = errors(err)
    assert "'a.parquet' is not a whole Parquet file" in line


def test_nan_logits_name_the_example_and_keep_what_was_done(folder: Path, cli: Cli) -> None:
    sick = pa.array([[NAN_AT, 0.0, 0.0, 0.0]], pa.list_(pa.float32()))
    pq.write_table(rows_table(100, 101).set_column(1, "x", sick), folder / "src" / "b.parquet")
    job = write_job(folder, teacher={"module": f"{TOYS}:Sick"})
    for _ in range(2):
        code, out, err = cli("capture", job)
        assert (code, out) == (1, "")
        (line,) = errors(err)
        assert "'row00100'" in line
        assert Table.open(str(folder / "table")).num_rows == 80


def test_another_k_on_the_same_table_is_refused(folder: Path, cli: Cli) -> None:
    job = write_job(folder)
    assert cli("capture", job)[0] == 0
    code, out, err = cli("capture", job, "--set", "k=2")
    assert (code, out) == (1, "")
    (line,) = errors(err)
    assert "k differs: the run has 2" in line
    assert "has 3" in line
    code, out, err = cli("capture", job, "--set", "k=2", "--dry-run")
    assert (code, out) == (1, "")


def test_a_table_below_a_file_cannot_be_made(folder: Path, cli: Cli) -> None:
    (folder / "file").write_text("here")
    for place in ("file", "file/table"):
        code, out, err = cli("capture", write_job(folder, table=str(folder / place)))
        assert (code, out) == (1, "")
        (line,) = errors(err)
        assert str(folder / place) in line
    assert (folder / "file").read_text() == "here"


def wait_for_rows(table: Path, process: subprocess.Popen[str]) -> None:
    """Waits until a running capture has committed something."""
    deadline = time.monotonic() + 60
    while not list((table / "_delta_log").glob("*1.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_ends_it_with_75_and_the_same_command_completes(folder: Path, cli: Cli) -> None:
    arguments = {"module": f"{TOYS}:Slow", "arguments": {"seconds": 0.05}}
    job = write_job(folder, teacher=arguments, batch_size=2, shard_rows=10)
    process = start("capture", job)
    wait_for_rows(folder / "table", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert out == ""
    (line,) = errors(err)
    assert "run the same command to go on" in line
    rows = Table.open(str(folder / "table")).num_rows
    assert 0 < rows < 100
    assert rows % 10 == 0
    code, out, _ = cli("capture", job, "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["already"], found["rows"]) == (rows, 100 - rows)
    assert len(set(stored(folder / "table")["example_id"])) == 100


def limit_file_size(size: int) -> None:
    """What a full disk looks like to one process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_loses_nothing(folder: Path, cli: Cli) -> None:
    notes = pa.array([b"short"] * 40 + [os.urandom(2_000) for _ in range(60)])
    rows = rows_table(0, 100).set_column(4, "note", notes)
    pq.write_table(rows, folder / "src" / "a.parquet")
    job = write_job(folder, carry=["note"])
    process = start("capture", job, preexec_fn=lambda: limit_file_size(50_000))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert out == ""
    (line,) = errors(err)
    assert "File too large" in line
    table = Table.open(str(folder / "table"))
    assert table.num_rows == 40
    assert not list((folder / "table").rglob("*.tmp"))
    code, out, _ = cli("capture", job)
    assert code == 0
    assert out.endswith("60 rows labelled, 40 before\n")
    assert verify(Table.open(str(folder / "table")))["problems"] == []


def test_a_disk_without_room_for_the_log(folder: Path) -> None:
    job = write_job(folder)
    process = start("capture", job, preexec_fn=lambda: limit_file_size(500))
    out, err = process.communicate(timeout=60)
    assert process.returncode in (1, 75), err
    assert out == ""
    (line,) = errors(err)
    assert str(folder / "table") in line


def test_runs_that_share_examples_race_on_one_table(folder: Path) -> None:
    write_source(folder / "other" / "a.parquet", 50, 150)
    slow = {"module": f"{TOYS}:Slow", "arguments": {"seconds": 0.01}}
    first = write_job(folder, teacher=slow, shard_rows=10, batch_size=5)
    second = folder / "second.yaml"
    second.write_text(first.read_text().replace(f"{folder}/src/", f"{folder}/other/"))
    # Equal runs race for units, unequal ones for examples.
    processes = [start("capture", job, "--json") for job in (first, first, second)]
    reports = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert errors(err) == []
        reports.append(json.loads(out))
    rows = stored(folder / "table")["example_id"]
    assert rows == [f"row{i:05d}" for i in range(150)]
    assert sum(report["rows"] for report in reports) == 150
    assert len({report["run_id"] for report in reports}) == 2
    assert verify(Table.open(str(folder / "table")))["problems"] == []

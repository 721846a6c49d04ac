"""softlabels capture: exit codes, one line for each mistake, and what is said."""

import json
import os
import re
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
from softlabels.cli.outcome import MetricsFile
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from softlabels.teacher.labeller import Labeller
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


def failed(out: str, code: int) -> dict[str, Any]:
    """What the only line of stdout says of a failure."""
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    assert found["exit"] == code
    assert found["error"]
    return found


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
    *lines, last = out.splitlines()
    assert lines == [
        "2 source rows repeat an example: labelled once (0 with another hard label)",
        f"{folder}/table@3: 105 rows labelled, 0 before",
    ]
    found = json.loads(last)
    assert (found["rows"], found["committed"], found["exit"]) == (105, 3, 0)
    code, out, err = cli("capture", job)
    assert code == 0
    *lines, last = out.splitlines()
    assert lines == [
        "nothing left to label: 3 units were there",
        f"{folder}/table@3: 0 rows labelled, 105 before",
    ]
    assert json.loads(last)["exit"] == 0


def test_json(folder: Path, cli: Cli) -> None:
    code, out, _ = cli("capture", write_job(folder), "--json", "--set", "shard_rows=100")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert code == 0
    assert found.pop("seconds") > 0
    assert found.pop("bytes") == sum(f.size for f in Table.open(f"{folder}/table").files)
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
        "left": 0,
        "deleted": 0,
        "missing": 0,
        "skipped": {},
        "exit": 0,
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
    (line,) = errors(err)
    assert line == f"error: {failed(out, code)['error']}"
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
        assert code == 1
        assert failed(out, 1)["units"] == 3
        (line,) = errors(err)
        assert "'row00100'" in line
        assert Table.open(str(folder / "table")).num_rows == 80


def test_another_k_on_the_same_table_is_refused(folder: Path, cli: Cli) -> None:
    job = write_job(folder)
    assert cli("capture", job)[0] == 0
    code, out, err = cli("capture", job, "--set", "k=2")
    assert code == 1
    failed(out, 1)
    (line,) = errors(err)
    assert "k differs: the run has 2" in line
    assert "has 3" in line
    code, out, err = cli("capture", job, "--set", "k=2", "--dry-run")
    assert (code, out) == (1, "")


def test_a_table_below_a_file_cannot_be_made(folder: Path, cli: Cli) -> None:
    (folder / "file").write_text("here")
    for place in ("file", "file/table"):
        code, out, err = cli("capture", write_job(folder, table=str(folder / place)))
        assert code == 1
        failed(out, 1)
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
    found = failed(out, 75)
    (line,) = errors(err)
    assert "run the same command to go on" in line
    rows = Table.open(str(folder / "table")).num_rows
    assert 0 < rows < 100
    assert rows % 10 == 0
    assert found["rows"] == rows
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
    assert failed(out, 1)["rows"] == 40
    (line,) = errors(err)
    assert "File too large" in line
    table = Table.open(str(folder / "table"))
    assert table.num_rows == 40
    assert not list((folder / "table").rglob("*.tmp"))
    code, out, _ = cli("capture", job)
    assert code == 0
    assert out.splitlines()[-2].endswith("60 rows labelled, 40 before")
    assert verify(Table.open(str(folder / "table")))["problems"] == []


def test_a_disk_without_room_for_the_log(folder: Path) -> None:
    job = write_job(folder)
    process = start("capture", job, preexec_fn=lambda: limit_file_size(500))
    out, err = process.communicate(timeout=60)
    assert process.returncode in (1, 75), err
    failed(out, process.returncode)
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


def test_the_last_line_is_json_also_when_something_breaks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such\nluck")

    monkeypatch.setattr("softlabels.teacher.capture.prepare", broken)
    monkeypatch.setattr(sys, "argv", ["softlabels", "capture", str(write_job(folder))])
    with pytest.raises(RuntimeError):  # ours to mend: a traceback, and exit 1
        main()
    assert failed(capsys.readouterr().out, 1) == {"exit": 1, "error": "no such\nluck"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "2/2"], "from 0 to n - 1"),
        (["--shard", "half"], "expected i/n"),
        (["--shard", "0/2", "--claim"], "not both"),
        (["--no-wait"], "goes with claims"),
        (["--claim", "--lease", "0"], "expected 1 to 3600 seconds"),
    ],
)
def test_sharing_that_cannot_be_meant(
    folder: Path, cli: Cli, options: list[str], words: str
) -> None:
    code, out, err = cli("capture", write_job(folder), *options)
    assert code == 2
    assert words in failed(out, 2)["error"]
    assert len(errors(err)) == 1
    assert not (folder / "table").exists()


def test_a_dry_run_is_of_the_whole_run(folder: Path, cli: Cli) -> None:
    code, out, err = cli("capture", write_job(folder), "--dry-run", "--shard", "0/2")
    assert (code, out) == (2, "")
    assert "leave out --shard" in errors(err)[0]


def test_shards_by_hand(folder: Path, cli: Cli) -> None:
    job = write_job(folder)
    code, out, _ = cli("capture", job, "--shard", "0/2")
    *lines, last = out.splitlines()
    assert lines == [
        "1 of 3 units left to other workers",
        f"{folder}/table@2: 60 rows labelled, 0 before",
    ]
    assert (code, json.loads(last)["left"]) == (0, 1)
    code, out, _ = cli("capture", job, "--claim", "--json")
    found = json.loads(out)
    assert (found["rows"], found["already"], found["left"], found["exit"]) == (40, 60, 0, 0)


def metrics(file: Path) -> dict[str, float]:
    """Numbers of a file in Prometheus text format, which is checked on the way."""
    found, announced = {}, ""
    for line in file.read_text().splitlines():
        if line.startswith("# TYPE "):
            announced = line.split()[2]
            assert line == f"# TYPE {announced} gauge"
        elif not line.startswith("# HELP "):
            match = re.fullmatch(r'(\w+)\{spec="([^"]*)",file="([^"]*)"\} (\S+)', line)
            assert match, line
            assert match[1] == announced
            assert match[3] == file.stem
            found[match[1].removeprefix("softlabels_capture_")] = float(match[4])
    return found


def test_metrics_of_good_and_bad_ends(folder: Path, cli: Cli) -> None:
    file, began = folder / "prom" / "job.prom", time.time()
    job = write_job(folder)
    assert cli("capture", job, "--metrics-file", file)[0] == 0
    found = metrics(file)
    table = Table.open(f"{folder}/table")
    assert found.pop("seconds") > 0
    success = found.pop("last_success_timestamp_seconds")
    assert began <= success <= time.time()
    assert found == {
        "rows": 100,
        "already": 0,
        "units": 3,
        "committed": 3,
        "left": 0,
        "missing": 0,
        "bytes": sum(f.size for f in table.files),
        "running": 0,
        "exit_code": 0,
    }
    # A failure does not make the last success forgotten, and numbers of before are not its own.
    assert cli("capture", job, "--set", "k=2", "--metrics-file", file)[0] == 1
    found = metrics(file)
    assert found.pop("seconds") > 0
    assert found == {"running": 0, "exit_code": 1, "last_success_timestamp_seconds": success}
    assert cli("capture", job, "--set", "nonsense=2", "--metrics-file", file)[0] == 2
    assert metrics(file)["exit_code"] == 2
    assert [path.name for path in file.parent.iterdir()] == ["job.prom"]


def test_metrics_as_json(folder: Path, cli: Cli) -> None:
    file = folder / "job.json"
    job = write_job(folder)
    for _ in range(2):
        assert cli("capture", job, "--metrics-file", file)[0] == 0
    found = json.loads(file.read_text())
    assert (found["spec"], found["table"], found["version"]) == (str(job), f"{folder}/table", 3)
    assert (found["rows"], found["already"], found["exit_code"]) == (0, 100, 0)
    success = found["last_success_timestamp_seconds"]
    assert cli("capture", job, "--set", "k=2", "--metrics-file", file)[0] == 1
    found = json.loads(file.read_text())
    assert (found["exit_code"], found["last_success_timestamp_seconds"]) == (1, success)


def test_metrics_while_it_runs_and_after_a_signal(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softlabels.cli.outcome.SECONDS_BETWEEN", 0.0)
    file, seen = folder / "job.prom", []
    label = Labeller.label

    def peek(self: Labeller, *arguments: Any) -> Any:
        seen.append(metrics(file))
        if len(seen) == 3:  # the first is the rehearsal
            os.kill(os.getpid(), signal.SIGTERM)
        return label(self, *arguments)

    monkeypatch.setattr(Labeller, "label", peek)
    assert cli("capture", write_job(folder), "--metrics-file", file)[0] == 75
    assert [one["running"] for one in seen] == [1, 1, 1]
    assert "exit_code" not in seen[0]
    assert (seen[2]["rows"], seen[2]["committed"]) == (40, 1)
    last = metrics(file)
    assert (last["running"], last["exit_code"], last["rows"]) == (0, 75, 40)
    assert "last_success_timestamp_seconds" not in last


def test_metrics_that_cannot_be_written_are_said_before_any_work(folder: Path, cli: Cli) -> None:
    (folder / "file").write_text("here")
    code, out, err = cli("capture", write_job(folder), "--metrics-file", folder / "file" / "x.prom")
    assert code == 1
    assert str(folder / "file") in failed(out, 1)["error"]
    assert len(errors(err)) == 1
    assert not (folder / "table").exists()


def test_metrics_that_cannot_be_written_any_more_stop_no_work(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softlabels.cli.outcome.SECONDS_BETWEEN", 0.0)
    file = folder / "metrics" / "job.prom"
    label = Labeller.label

    def block(self: Labeller, *arguments: Any) -> Any:
        if file.is_file():
            file.unlink()
            file.mkdir()
        return label(self, *arguments)

    monkeypatch.setattr(Labeller, "label", block)
    code, out, err = cli("capture", write_job(folder), "--metrics-file", file)
    assert (code, json.loads(out.splitlines()[-1])["rows"]) == (0, 100)
    assert "metrics: cannot write" in err


def test_labels_are_escaped(tmp_path: Path) -> None:
    file = tmp_path / "a.prom"
    MetricsFile(file, 'a"b\\c\nd')
    (line,) = {line.partition("{")[2].partition("}")[0] for line in lines_of(file)}
    assert line == r'spec="a\"b\\c\nd",file="a"'


def lines_of(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if not line.startswith("#")]


def test_a_signal_before_the_work_begins_ends_it_with_75(folder: Path) -> None:
    job = write_job(folder)
    process = start("capture", job)
    # As early as Python can hear it: the interpreter starts, then libraries are loaded.
    wait_until_it_listens(process.pid)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    failed(out, 75)
    assert not (folder / "table").exists()


def wait_until_it_listens(pid: int) -> None:
    """Waits until a process has a handler for SIGTERM."""
    deadline = time.monotonic() + 60
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_exit_code_is_right_when_nobody_listens(folder: Path, stream: str) -> None:
    job = write_job(folder)
    for changes, code in (([], 0), (["--set", "k=99"], 2)):
        reader, writer = os.pipe()
        os.close(reader)
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: writer}
        command = [sys.executable, "-m", "softlabels", "capture", str(job), *changes]
        done = subprocess.run(command, check=False, cwd=ROOT, **streams)  # type: ignore[call-overload]
        os.close(writer)
        assert done.returncode == code
    assert Table.open(f"{folder}/table").num_rows == 100

"""What cron and systemd are told: as they read it, with the command that it names run for real."""

import json
import shlex
import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest

from pipelines.nightly.make_days import write_day
from tests.pipelines.nights import DAYS

ROOT = Path(__file__).parents[2]
HERE = ROOT / "pipelines/nightly"
FOLDER = "/srv/softlabels"
SERVICE = HERE / "softlabels-nightly.service"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the checkout, with two small days to label."""
    for name in ("data", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        write_day(Path("out/nightly/images"), number, 100)
    return tmp_path


def unit(name: str) -> RawConfigParser:
    parser = RawConfigParser(strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((HERE / name).read_text())
    return parser


def cron_lines() -> list[str]:
    text = (HERE / "crontab").read_text().splitlines()
    return [line for line in text if line and not line.startswith("#") and "=" not in line[:12]]


def test_systemd_starts_again_for_75_and_signals_and_stops_for_1_and_2() -> None:
    service = unit("softlabels-nightly.service")["Service"]
    assert service["Restart"] == "on-abnormal"  # a signal, not an exit code
    assert service["RestartForceExitStatus"] == "75"
    assert "SuccessExitStatus" not in service
    assert service["Type"] != "oneshot"  # for which systemd refuses RestartForceExitStatus
    assert service["KillSignal"] == "SIGTERM"
    alert = unit("softlabels-nightly.service")["Unit"]["OnFailure"]
    assert (HERE / alert).exists()
    assert unit("softlabels-nightly.timer")["Timer"]["Persistent"] == "true"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_takes_the_units(tmp_path: Path) -> None:
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    names = [file.name for file in HERE.glob("softlabels-nightly*")]
    assert len(names) == 3
    for name in names:
        text = (HERE / name).read_text().replace(FOLDER, str(tmp_path))
        (tmp_path / name).write_text(text.replace("/usr/bin/logger", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
    )
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "nightly" in line]
    assert (done.returncode, said) == (0, [])


def test_systemd_and_cron_run_one_command() -> None:
    (line,) = cron_lines()
    service = unit("softlabels-nightly.service")["Service"]["ExecStart"]
    command = service.replace(f"{FOLDER}/", "")
    assert command in line
    assert f"cd {FOLDER} " in line
    assert len(line.split()[:5]) == 5
    assert "%" not in line  # a new line to cron


@pytest.mark.skipif(shutil.which("flock") is None, reason="util-linux is not here")
def test_the_cron_line_runs(checkout: Path) -> None:
    (line,) = cron_lines()
    command = line.split(None, 5)[5].replace(FOLDER, str(checkout))
    asked = command.replace("--last 3", f"--from {DAYS[0]} --to {DAYS[1]}")
    done = subprocess.run(["sh", "-c", asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (checkout / "out/nightly.jsonl").read_text().splitlines()
    assert [json.loads(line)["day"] for line in lines] == list(DAYS[:2])
    # While another one runs it does nothing, and says that all is well.
    held = shlex.join(["flock", str(checkout / "out/nightly.lock"), "sh", "-c", command])
    done = subprocess.run(["sh", "-c", held], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_day_that_is_not_there_yet_exits_75_with_one_line(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pipelines.nightly.run", "--date", "2024-03-09"],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 75
    (line,) = done.stderr.splitlines()
    assert "is not whole yet" in line
    assert json.loads(done.stdout.splitlines()[-1])["exit"] == 75


def test_loading_the_definitions_loads_no_torch() -> None:
    pytest.importorskip("dagster")
    code = (
        "import sys, pipelines.nightly.definitions as d\n"
        "print(sorted({'torch', 'duckdb', 'polars', 'deltalake'} & set(sys.modules)), d.defs)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("[] "), done.stderr

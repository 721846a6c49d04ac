"""softlabels status: how far runs are and who is at them, without a teacher."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from softlabels.errors import TryAgainError
from softlabels.store.claims import Claims, claim_path
from softlabels.store.rollback import rollback
from softlabels.store.status import status
from softlabels.store.table import Table
from softlabels.teacher.capture import Sharing, capture
from tests.cli.test_capture import Cli, cli, write_job
from tests.servers import S3
from tests.teacher.jobs import make_run, make_spec, write_source
from tests.teacher.test_capture import stop_after

__all__ = ["cli"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a source of 100 rows."""
    write_source(tmp_path / "src" / "a.parquet", 0, 100)
    return tmp_path


@pytest.fixture
def begun(folder: Path) -> Path:
    """Two of five units are done, and a third was stored by a worker that died."""
    spec = make_spec(folder, shard_rows=20)
    with pytest.raises(TryAgainError):
        capture(spec, stop_after(50))
    table = Table.open(spec.table)
    name = table.files[0].path.replace("-000000-", "-000002-")
    table.root.write(name, b"x" * 1234)
    return folder


def test_an_unfinished_run(begun: Path) -> None:
    table = Table.open(f"{begun}/table")
    (run,) = status(table)
    assert (run.kind, run.teacher, run.units, run.done) == ("capture", "toy", 5, 2)
    assert (run.rows, run.source_rows, run.version, run.finished) == (40, 100, 2, False)
    assert (run.staged_files, run.staged_bytes, run.workers) == (1, 1234, ())
    assert run.seconds_ago is not None
    assert run.seconds_ago < 60
    assert run.rows_per_s is not None
    assert run.seconds_left is not None
    # Three units of 20 rows at the speed between the two commits.
    assert run.seconds_left == pytest.approx(60 / run.rows_per_s)


def test_a_finished_run(folder: Path) -> None:
    capture(make_spec(folder))
    (run,) = status(Table.open(f"{folder}/table"))
    assert (run.units, run.done, run.finished, run.seconds_left) == (3, 3, True, 0.0)


def test_the_rate_is_of_the_last_stretch_of_work(begun: Path) -> None:
    spec = make_spec(begun, shard_rows=20)
    capture(spec)
    log = Path(spec.table, "_delta_log")
    now = time.time()
    # Two commits, a night, three commits two seconds apart: by the store's times.
    for version, at in {1: 0, 2: 3, 3: 40_000, 4: 40_002, 5: 40_004}.items():
        os.utime(log / f"{version:020d}.json", (now, now - 50_000 + at))
    (run,) = status(Table.open(spec.table))
    assert run.rows_per_s == pytest.approx(10)
    assert run.seconds_ago == pytest.approx(50_000 - 40_004, abs=60)


def test_workers_and_their_last_beat(begun: Path) -> None:
    run, root = make_run(begun, shard_rows=20), Table.open(f"{begun}/table").root
    alive, dead = Claims(root, run.id[:16], 20), Claims(root, run.id[:16], 20)
    alive.take([run.units[3].name])
    dead.take([run.units[4].name])
    root.write(claim_path(run.units[0].name), b"{}")  # of a committed unit: nobody is at it
    past = time.time() - 100
    os.utime(Path(root.path, claim_path(run.units[4].name)), (past, past))
    root.write(claim_path(run.units[2].name), b"nonsense")
    (found,) = status(Table.open(f"{begun}/table"))
    third, fourth, fifth = found.workers
    assert (third.unit[-1], third.worker, third.beats, third.dead) == ("2", None, None, False)
    assert (fourth.worker, fourth.beats, fourth.dead) == (alive.worker, 1, False)
    assert fourth.name is not None
    assert fourth.name.endswith(f":{os.getpid()}")
    assert (fifth.worker, fifth.dead) == (dead.worker, True)
    assert fifth.seconds_ago == pytest.approx(100, abs=30)


def test_rows_that_went_since_are_said(begun: Path, cli: Cli) -> None:
    rollback(Table.open(f"{begun}/table@1"))
    code, out, _ = cli("status", f"{begun}/table")
    assert code == 0
    assert "20 rows that runs put in went since: see softlabels log" in out
    assert out.splitlines()[-1] == f"{begun}/table@3: 20 rows, 1 run, 1 unfinished"


def test_by_hand(begun: Path, cli: Cli) -> None:
    run, root = make_run(begun, shard_rows=20), Table.open(f"{begun}/table").root
    Claims(root, run.id[:16]).take([run.units[3].name])
    job = write_job(begun, shard_rows=20)
    outs = []
    for place in (f"{begun}/table", job):
        code, out, err = cli("status", place)
        assert (code, err) == (0, "")
        assert out.splitlines()[-1] == f"{begun}/table@2: 40 rows, 1 run, 1 unfinished"
        assert f"{run.id[:12]}: 1 file, 1234 bytes stored and not committed" in out
        assert "2/5" in out
        assert "workers with a claim" in out
        outs.append(out)
    code, out, _ = cli("status", job, "--json")
    found = json.loads(out)
    assert (code, found["version"], found["rows"]) == (0, 2, 40)
    assert "this machine's" in found["clock"]
    assert found["runs"][0]["run_id"] == run.id
    assert found["runs"][0]["workers"][0]["unit"] == run.units[3].name


def test_a_spec_shows_its_own_runs(folder: Path, cli: Cli) -> None:
    capture(make_spec(folder))
    write_source(folder / "src" / "b.parquet", 100, 130)
    capture(make_spec(folder))  # the same job on new files is another run
    write_source(folder / "else" / "a.parquet", 200, 210)
    other = {"files": f"{folder}/else/*.parquet"}
    capture(make_spec(folder, source=other))
    assert len(status(Table.open(f"{folder}/table"))) == 3
    mine = json.loads(cli("status", write_job(folder, batch_size=3), "--json")[1])["runs"]
    assert [run["source_rows"] for run in mine] == [100, 130]
    third = json.loads(cli("status", write_job(folder, source=other), "--json")[1])["runs"]
    assert [run["source_rows"] for run in third] == [10]
    # One that has not begun: all, for what is at the table may be in its way.
    none = json.loads(cli("status", write_job(folder, shard_rows=7), "--json")[1])["runs"]
    assert len(none) == 3


def test_a_run_of_an_earlier_release_has_no_record(folder: Path, cli: Cli) -> None:
    capture(make_spec(folder), sharing=Sharing(shard=(0, 2)))
    for record in Path(folder, "table", "_softlabels", "runs").iterdir():
        record.unlink()
    code, out, _ = cli("status", f"{folder}/table")
    assert code == 0
    assert "2/?" in out
    (run,) = status(Table.open(f"{folder}/table"))
    assert (run.units, run.finished, run.seconds_left, run.source_rows) == (None, None, None, 100)


def test_what_is_no_table_or_spec_is_one_line(folder: Path, cli: Cli) -> None:
    other = folder / "other.yaml"
    other.write_text(yaml.safe_dump({"table": 3}))
    for place, words in ((folder / "none", "there is no table"), (other, "other.yaml")):
        code, out, err = cli("status", place)
        assert (code, out) == (2, "")
        assert words in err
        assert err.count("\n") == 1


def test_a_run_is_known_before_its_first_commit(folder: Path) -> None:
    capture(make_spec(folder), sharing=Sharing(shard=(7, 8)))
    (run,) = status(Table.open(f"{folder}/table"))
    assert (run.done, run.version, run.seconds_left, run.rows_per_s) == (0, None, None, None)


def test_it_loads_no_teacher(folder: Path) -> None:
    capture(make_spec(folder))
    program = (
        "import sys\n"
        "from softlabels.cli import main\n"
        f"sys.argv = ['softlabels', 'status', {str(write_job(folder))!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'tests'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_on_s3(folder: Path, s3: S3) -> None:
    spec = make_spec(folder, table=s3.url("table"))
    capture(spec, sharing=Sharing(claim=True, wait=False))
    table = Table.open(spec.table)
    run = make_run(folder)
    table.root.write(claim_path(run.units[2].name), b"{}")
    (found,) = status(table)
    assert (found.done, found.rows, found.finished, found.workers) == (3, 100, True, ())
    assert found.seconds_ago is not None
    assert found.seconds_ago < 60

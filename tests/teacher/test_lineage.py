"""What a capture's commits say of themselves, and what never gets into them."""

from pathlib import Path

import pytest

from softlabels.errors import BadInputError
from softlabels.store.table import Table
from softlabels.teacher.capture import capture
from tests.teacher.jobs import TOYS, make_spec, write_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a source of 100 rows in two files."""
    write_source(tmp_path / "src" / "a.parquet", 0, 60)
    write_source(tmp_path / "src" / "b.parquet", 60, 100)
    return tmp_path


def test_lineage_says_where_labels_come_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-value")
    spec = make_spec(folder)
    report = capture(spec)
    table = Table.open(spec.table)
    commits = [commit for commit in table.history() if commit["run"]]
    assert len(commits) == 3
    for number, commit in enumerate(reversed(commits)):
        run = commit["run"]
        assert run.run_id == report.run_id
        assert run.units == (f"{report.run_id[:16]}-{number:06d}",)
        assert run.num_rows == (40, 40, 20)[number]
        assert run.spec == spec.model_dump(mode="json")
        assert run.device == "cpu"
        assert run.source["rows"] == 100
        assert run.source["files"] == 2
        assert run.source["uri"] == str(folder / "src")
        assert len(run.source["fingerprint"]) == 64
        assert set(run.packages) == {"softlabels", "torch", "numpy", "pyarrow", "deltalake"}
        assert run.started_at.endswith("+00:00")
        assert run.seconds >= 0
    teacher = table.contents.teacher
    assert (teacher.name, teacher.code, teacher.decode) == (
        "toy",
        f"{TOYS}:Linear",
        f"{TOYS}:decode",
    )
    log = "".join(path.read_text() for path in (folder / "table" / "_delta_log").glob("*.json"))
    assert "s3cr3t-value" not in log


def test_credentials_in_places_are_refused(folder: Path) -> None:
    for place in ("s3://key:s3cr3t@bucket/t", "s3://bucket/t?sig=s3cr3t"):
        with pytest.raises(BadInputError) as caught:
            capture(make_spec(folder, table=place))
        assert "s3cr3t" not in str(caught.value)
        with pytest.raises(BadInputError) as caught:
            capture(make_spec(folder, source={"files": place}))
        assert "s3cr3t" not in str(caught.value)

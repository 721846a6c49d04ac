"""Canaries: secrets of the environment turn up in nothing that is printed, raised or stored."""

import io
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from softlabels.errors import SoftLabelsError
from softlabels.query.view import query
from softlabels.storage import find_files, open_root, require_exclusive_create
from softlabels.storage.retrying import without_secrets
from softlabels.store.table import Table
from softlabels.student.stream import Stream
from softlabels.teacher.capture import capture
from tests.faults import proxy as p
from tests.faults.record import record, scaled
from tests.plans import make_plan
from tests.servers import S3, free_port
from tests.tables import make_table
from tests.teacher.jobs import make_spec, settings, write_source

ROOT = Path(__file__).parents[2]
CANARIES = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY0KEY0ID00X",
    "AWS_SECRET_ACCESS_KEY": "canary/secret+access=key0000000000000001",
    "AWS_SESSION_TOKEN": "canary-session-token//+==0002",
    "AZURE_STORAGE_ACCOUNT_KEY": "Y2FuYXJ5LWFjY291bnQta2V5LTAwMDAwMDAwMDAwMw==",
    "AZURE_STORAGE_SAS_TOKEN": "sv=2025-01-01&sp=rw&sig=canary%2Fsas%2Fsignature%3D0004",
    "AZURE_STORAGE_CONNECTION_STRING": "AccountName=a;AccountKey=Y2FuYXJ5MDAwMDA1;",
    "AZURE_STORAGE_CLIENT_SECRET": "canary~client~secret~0006",
}
FORMS = sorted(
    {form for value in CANARIES.values() for form in (value, quote(value, safe=""))}
    | {"canary/sas/signature=0004", "canary%2Fsas%2Fsignature%3D0004", "Y2FuYXJ5MDAwMDA1"}
)


def found_in(text: str) -> list[str]:
    """Canaries that `text` shows."""
    return [form for form in FORMS if form in text]


def everything_of(error: BaseException) -> str:
    """All that a logger, a debugger's page or a repr could print of an exception, causes too."""
    texts = ["".join(traceback.format_exception(error)), repr(error)]
    link: BaseException | None = error
    while link is not None:
        texts += [str(link), repr(link), repr(link.args), repr(getattr(link, "__notes__", ""))]
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n".join(texts)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All records of all loggers, of INFO and above, and of our own at any level."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("softlabels").setLevel(logging.DEBUG)
    yield text
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def canaries(s3: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The store, with canaries for credentials: moto takes any."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SOFTLABELS_PATIENCE", "0.1")
    monkeypatch.setenv("SOFTLABELS_TIMEOUT", "1")
    return s3


def echoing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a client's errors say more than they should, as an unlucky release would."""
    import s3fs

    async def leaky(self: Any, *_: Any, **__: Any) -> None:
        raise OSError(
            f"signing with {CANARIES['AWS_SECRET_ACCESS_KEY']} failed at "
            f"https://host/?X-Amz-Security-Token={quote(CANARIES['AWS_SESSION_TOKEN'], safe='')}"
        )

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", leaky)


def acts_on(uri: str, folder: Path) -> list[Callable[[], object]]:
    """Every way into storage."""
    root = open_root(uri)
    return [
        lambda: Table.open(uri),
        lambda: make_table(uri, rows=20),
        lambda: capture(make_spec(folder, table=uri)),
        lambda: require_exclusive_create(open_root(uri)),
        lambda: root.read("f"),
        lambda: root.read("f", 3),
        lambda: root.ranges("f", [0], [1]),
        lambda: root.open("f"),
        lambda: root.size("f"),
        lambda: root.exists("f"),
        lambda: root.names("f"),
        lambda: root.entries("f"),
        lambda: root.write("f", b"x"),
        lambda: root.create("f", b"x"),
        lambda: root.delete("f"),
        lambda: find_files(f"{uri}/*/*.parquet"),
    ]


def test_no_error_shows_a_credential(
    canaries: S3,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: io.StringIO,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_source(tmp_path / "src" / "a.parquet", 0, 20)
    raised = 0

    def provoke(acts: list[Callable[[], object]]) -> None:
        nonlocal raised
        for act in acts:
            caught: SoftLabelsError | None = None
            try:
                act()
            except SoftLabelsError as error:
                caught = error
            if caught is not None:
                raised += 1
                assert "\n" not in str(caught)
                assert found_in(everything_of(caught)) == []

    with p.running(canaries.endpoint) as front:
        monkeypatch.setenv("AWS_ENDPOINT_URL", front.url)
        kinds = (p.DENIED, p.ERROR, p.LOST, p.SLOW_DOWN, p.TIME_OUT, p.TRUNCATED, p.CUT)
        for kind in kinds[: scaled(2, len(kinds))]:
            front.set(p.Plan(1, 1.0, {kind: 1}, in_a_row=10**6), hang=0.1)
            provoke(acts_on(canaries.url(f"x{len(kind)}"), tmp_path))
        front.set()
        provoke(acts_on("s3://no-such-bucket-anywhere/x", tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    provoke(acts_on("s3://bucket/x", tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://no-such-host.invalid")
    provoke(acts_on("s3://bucket/x", tmp_path)[:2])
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{free_port()}/account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    provoke(acts_on("az://container/x", tmp_path)[:2])
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "no base64 of canary%2Fsas%2Fsignature%3D0004")
    with pytest.raises(SoftLabelsError):
        open_root("az://container/x").read("f")
    monkeypatch.setenv("AWS_ENDPOINT_URL", canaries.endpoint)
    echoing(monkeypatch)
    provoke(acts_on(canaries.url("leaky"), tmp_path)[4:])
    assert raised > 60
    assert found_in(log.getvalue()) == []
    out, err = capfd.readouterr()
    assert found_in(out + err) == []
    record("credentials in errors", {"errors provoked": raised, "credentials shown": 0})


@pytest.mark.slow
def test_nothing_that_is_stored_or_printed_holds_a_credential(
    canaries: S3, tmp_path: Path, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTLABELS_PATIENCE", "20")
    write_source(tmp_path / "src" / "a.parquet", 0, 20)
    uri = canaries.url("table")
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(settings(tmp_path, table=uri)))
    debugging = {"S3FS_LOGGING_LEVEL": "DEBUG", "RUST_LOG": "debug", "RUST_BACKTRACE": "1"}
    main = "from softlabels.cli import run; run()"
    said = ""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"sources": {"main": {"table": uri}}}))
    plan_file = tmp_path / "plan.parquet"
    for arguments, code in (
        (["capture", str(job)], 0),
        (["mix", str(recipe), "--output", str(plan_file)], 0),
        (["show", canaries.url("none")], 2),
        (["show", uri], 0),
    )[: scaled(2, 4)]:
        done = subprocess.run(
            [sys.executable, "-c", main, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | debugging,
            timeout=120,
        )
        assert done.returncode == code, done.stderr[-2000:]
        said += done.stdout + done.stderr
    assert "CALL: put_object" in said, "the client's debug log was on"
    # delta-rs's debug log names the key that it signs with, as a request does; no secret.
    shown = {form for line in said.splitlines() if " DEBUG " in line for form in found_in(line)}
    assert shown <= {CANARIES["AWS_ACCESS_KEY_ID"]}
    assert found_in("\n".join(x for x in said.splitlines() if " DEBUG deltalake" not in x)) == []
    table = Table.open(uri)
    assert table.num_rows == 20
    list(Stream(make_plan(table), batch_size=8, epochs=1))
    query({"t": table}, "SELECT count(*) FROM t.labels")
    assert found_in(json.dumps(table.history(), default=repr)) == []
    stored = [plan_file.read_bytes(), job.read_bytes()]
    client: Any = open_root(uri).fs
    stored += [client.cat_file(path) for path in client.find(f"{canaries.bucket}/table")]
    assert len(stored) > 4
    for data in stored:
        assert found_in(data.decode("latin-1")) == []
    assert found_in(repr(table) + repr(table.root) + repr(vars(table))) == []
    assert found_in(log.getvalue()) == []


def test_credentials_are_taken_out_of_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    for form in FORMS:
        assert found_in(without_secrets(f"a {form} b")) == [], form
    for text in (
        "GET https://a.blob.core.windows.net/c/x?sv=1&sig=OTHER%2Fsignature&se=2",
        "?X-Amz-Signature=OTHER&x",
        "AccountKey=OTHER;",
    ):
        assert "OTHER" not in without_secrets(text)
    assert without_secrets("plain: sign=1, s3://bucket/x") == "plain: sign=1, s3://bucket/x"

"""Tables on real object stores: captured, read by every reader, raced for, refused."""

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import polars as pl
import pytest

from softlabels.errors import BadInputError, IntegrityError, StorageError, TryAgainError
from softlabels.query.view import query
from softlabels.storage import (
    delta_options,
    find_files,
    open_root,
    polars_options,
    require_exclusive_create,
)
from softlabels.store.files import UnitShard
from softlabels.store.inspect import verify
from softlabels.store.table import Table
from softlabels.student.stream import Stream
from softlabels.teacher.capture import capture
from tests.faults import proxy as p
from tests.plans import make_plan
from tests.servers import (
    S3,
    Azure,
    find_program,
    free_port,
    make_bucket,
    s3_environment,
    set_environment,
    wait_for_port,
)
from tests.tables import make_lineage, make_table
from tests.teacher.jobs import make_spec, write_source

ROWS = 100


Store = S3 | Azure


@pytest.fixture(params=["s3", "azure"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each kind of object store in turn."""
    found: Store = request.getfixturevalue(request.param)
    return found


def test_a_capture_is_read_by_stream_polars_and_sql(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTLABELS_CACHE_BYTES", "0")
    write_source(tmp_path / "src" / "a.parquet", 0, ROWS)
    spec = make_spec(tmp_path, table=store.url("table"), draws=2)
    capture(spec)
    capture(make_spec(tmp_path, table=str(tmp_path / "local"), draws=2))
    table, local = Table.open(store.url("table")), Table.open(str(tmp_path / "local"))
    assert verify(table)["problems"] == []
    assert table.snapshot_digest == local.snapshot_digest
    names = [f"row{i:05d}" for i in range(ROWS)]

    found = pl.scan_delta(store.url("table"), storage_options=polars_options(table.root)).collect()
    assert sorted(found["example_id"]) == names
    sql = "SELECT example_id, topk_ids FROM t.labels ORDER BY example_id"
    assert query({"t": table}, sql).equals(query({"t": local}, sql))

    def epoch(of: Table) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for batch in Stream(make_plan(of), batch_size=16, seed=3, epochs=1):
            names = batch.example_ids.to_pylist()
            rows |= dict(zip(names, batch.targets.ids.tolist(), strict=True))
        return rows

    assert len(epoch(table)) == ROWS
    assert epoch(table) == epoch(local)


def test_what_is_written_is_read_by_every_method(store: Store) -> None:
    root = open_root(store.url("folder"))
    root.write("a/b/file", b"old")
    root.write("a/b/file", memoryview(b"newer"))
    root.write("a/b/empty", b"")
    assert root.read("a/b/file") == b"newer" == root.buffer("a/b/file").to_pybytes()
    assert root.read("a/b/file", 5) == b"newer" == root.buffer("a/b/file", 5).to_pybytes()
    assert root.ranges("a/b/file", [0, 3], [2, 5]) == [b"ne", b"er"]
    assert (root.read("a/b/empty"), root.read("a/b/empty", 0)) == (b"", b"")
    with root.open("a/b/file") as file:
        assert (file.read(2), file.seek(-1, 2), file.read(), file.read()) == (b"ne", 4, b"r", b"")
    assert root.size("a/b/file") == 5
    assert root.names("a/b") == ["empty", "file"]
    assert [(e.name, e.is_file, e.size) for e in root.entries("a")] == [("b", False, 0)]
    (_, entry) = root.entries("a/b")
    assert (entry.name, entry.is_file, entry.size) == ("file", True, 5)
    assert abs(time.time() - (entry.modified or 0)) < 3600
    assert root.names("a") == [] == root.names("none") == root.names("a/b/file")
    found = find_files(store.url("folder/a/*/*"))
    assert (found[0].uri, found[1]) == (store.url("folder/a"), ["b/empty", "b/file"])
    assert find_files(store.url("folder/**/f*"))[1] == ["a/b/file"]
    root.delete("a/b/file")
    root.delete("a/b/file")
    assert not root.exists("a/b/file")
    for method in (root.read, root.open, root.size, lambda path: root.read(path, 4)):
        with pytest.raises(StorageError, match=r"cannot read '.*a/b/file'") as caught:
            method("a/b/file")
        assert "\n" not in str(caught.value)


def test_what_another_process_does_is_seen_at_once(store: Store) -> None:
    """Two clients, each with whatever it remembers."""
    one = open_root(store.url("shared"))
    other = open_root(store.url("shared"))
    object.__setattr__(other, "fs", type(one.fs)(**one.fs.storage_options))
    assert one.fs is not other.fs
    for number in range(3):
        assert one.names("d") == [str(i) for i in range(number)]
        assert not one.exists(f"d/{number}")
        other.write(f"d/{number}", b"x" * number)
        assert one.exists(f"d/{number}")
        assert one.size(f"d/{number}") == number
    other.delete("d/1")
    assert one.names("d") == ["0", "2"]
    assert [entry.name for entry in one.entries("d")] == ["0", "2"]
    assert not one.exists("d/1")


def test_a_long_file_is_read_in_parts_and_a_shorter_one_is_noticed(
    s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softlabels.storage.root.PART_BYTES", 1000)
    root = open_root(s3.url("long"))
    data = bytes(range(256)) * 20
    root.write("file", data)
    assert root.read("file", len(data)) == data
    with root.open("file") as file:
        file.seek(300)
        assert file.read(5) == data[300:305]
    began = time.monotonic()
    with pytest.raises(IntegrityError, match=r"too short: 5500 bytes were asked for, it has 5120"):
        root.read("file", 5500)
    with pytest.raises(IntegrityError, match=r"too short: 7000 bytes were asked for, it has 5120"):
        root.read("file", 7000)
    assert time.monotonic() - began < 10, "asking again would be vain"


def test_one_of_many_makes_an_object(store: Store) -> None:
    root = open_root(store.url("race"))
    writers, rounds = 6, 12
    barrier = threading.Barrier(writers)
    wins: list[list[int]] = [[] for _ in range(rounds)]

    def run(writer: int) -> None:
        for number in range(rounds):
            barrier.wait()
            # The same contents: what tells writers apart is not what they write.
            if root.create(f"{number}", b"same"):
                wins[number].append(writer)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(winners) for winners in wins] == [1] * rounds
    assert len({winners[0] for winners in wins}) > 1


@pytest.fixture
def front(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[p.Proxy]:
    """A proxy before the S3 store, which the environment leads to."""
    with p.running(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.mark.parametrize("kind", [p.LOST, p.ERROR_AFTER])
def test_who_made_an_object_is_known_when_the_reply_is_lost(
    kind: str, s3: S3, front: p.Proxy
) -> None:
    root = open_root(s3.url("lost"))
    root.create("taken", b"same")
    plan = p.Plan(1, 1.0, {kind: 1}, in_a_row=2, only="^PUT")
    front.set(plan)
    assert root.create("mine", b"same")
    assert not root.create("taken", b"same")
    assert sum(front.set().values()) == 4
    assert not root.create("mine", b"same")


@pytest.mark.parametrize("kind", [p.ERROR, pytest.param(p.LOST, marks=pytest.mark.slow)])
def test_a_failure_is_never_taken_for_an_empty_folder(
    kind: str, s3: S3, front: p.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = open_root(s3.url("folder"))
    root.write("d/file", b"x")
    front.set(p.Plan(1, 1.0, {kind: 1}, in_a_row=1))
    assert root.names("d") == ["file"]
    assert root.exists("d/file")
    assert find_files(s3.url("folder/*/f*"))[1] == ["d/file"]
    assert find_files(s3.url("folder/**"))[1] == ["d/file"]
    monkeypatch.setenv("SOFTLABELS_PATIENCE", "0.3")
    root = open_root(s3.url("folder"))
    front.set(p.Plan(1, 1.0, {kind: 1}, in_a_row=1000))
    for act in (
        lambda: root.names("d"),
        lambda: root.entries("d"),
        lambda: root.exists("d/file"),
        lambda: find_files(s3.url("folder/*/f*")),
        lambda: find_files(s3.url("folder/**")),
        lambda: root.read("d/file"),
        lambda: root.write("d/file", b"y"),
        lambda: root.delete("d/file"),
        lambda: Table.open(s3.url("folder")),
    ):
        with pytest.raises(TryAgainError, match="storage does not answer"):
            act()
    front.set()
    assert root.exists("d/file") == (kind != p.LOST), "it is deleted, only the reply was lost"


def test_a_store_without_conditional_put_is_refused_and_publish_is_offered(
    s3: S3, front: p.Proxy, tmp_path: Path
) -> None:
    front.set(strip=("if-none-match",))
    root = open_root(s3.url("table"))
    for _ in range(2):
        with pytest.raises(StorageError, match=r"overwrites .* softlabels publish TABLE s3://"):
            require_exclusive_create(root)
    write_source(tmp_path / "src" / "a.parquet", 0, 10)
    with pytest.raises(StorageError, match="softlabels publish"):
        capture(make_spec(tmp_path, table=s3.url("table")))
    assert root.fs.find(root.path) == []  # neither a table nor what was tried
    front.set()
    make_table(s3.url("other"))  # the store itself is sound


def test_stores_that_look_first_and_write_then_are_refused() -> None:
    root = open_root(f"memory://{uuid.uuid4().hex}")
    with pytest.raises(StorageError, match="softlabels publish"):
        require_exclusive_create(root)


@pytest.fixture
def s3rver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A server that overwrites whatever the condition; skipped where it is not installed."""
    program = find_program("s3rver")
    if program is None:
        pytest.skip("s3rver IS NOT TESTED: not here; npm install s3rver in this folder")
    port = free_port()
    process = subprocess.Popen(
        [program, "--directory", str(tmp_path / "s3rver"), "--port", str(port), "--silent"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process)
        store = S3(f"http://127.0.0.1:{port}", "")
        environment = store.environment | {
            "AWS_ACCESS_KEY_ID": "S3RVER",
            "AWS_SECRET_ACCESS_KEY": "S3RVER",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }
        set_environment(monkeypatch, environment)
        client = botocore.session.Session().create_client(
            "s3", endpoint_url=store.endpoint, region_name="us-east-1"
        )
        client.create_bucket(Bucket="bucket")
        client.close()
        yield S3(store.endpoint, "bucket")
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_s3rver_overwrites_and_is_refused(s3rver: S3) -> None:
    root = open_root(s3rver.url("table"))
    root.write("file", b"x")
    assert root.read("file") == b"x"
    with pytest.raises(StorageError, match="softlabels publish"):
        require_exclusive_create(root)
    with pytest.raises(StorageError, match="softlabels publish"):
        make_table(s3rver.url("table"))


def test_what_will_not_pass_is_said_at_once(
    s3: S3, front: p.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(s3.url("table"), rows=20)
    began = time.monotonic()
    missing = open_root("s3://no-such-bucket-here/folder")
    for act in (
        lambda: missing.names("d"),
        lambda: missing.write("f", b""),
        lambda: missing.read("f"),
        lambda: missing.create("f", b""),
        lambda: make_table("s3://no-such-bucket-here/table"),
    ):
        with pytest.raises(StorageError, match=r"cannot .* bucket"):
            act()
    front.set(p.Plan(1, 1.0, {p.DENIED: 1}, in_a_row=1000))
    for act in (
        lambda: table.root.names("data"),
        lambda: table.root.read("f"),
        lambda: table.root.write("f", b""),
        lambda: Table.open(s3.url("table")),
    ):
        with pytest.raises(StorageError, match="cannot "):
            act()
    run, unit = "1" * 64, f"{'1' * 16}-000000"
    front.set(p.Plan(1, 1.0, {p.DENIED: 1}, in_a_row=1000, only="^PUT .*_delta_log"))
    with pytest.raises(StorageError, match="cannot commit"):
        table.commit([UnitShard(f"{run}/{unit}", None, 0, 0, {})], make_lineage(run, [unit], 0))
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", "http://example.org:9000", "'example.org' is http"),
        ("AWS_ENDPOINT_URL", "http://KEY:SECRET@127.0.0.1:9", "'127.0.0.1' holds credentials"),
        ("AWS_ENDPOINT_URL", "https://host/?sig=SECRET", "'host' holds credentials"),
        ("AWS_ENDPOINT_URL", "SECRET", "is no URL"),
        ("AWS_ENDPOINT_URL", "ftp://SECRET/", "is no URL"),
        ("AWS_ENDPOINT_URL", "http://[SECRET", "is no URL"),
        ("SOFTLABELS_PATIENCE", "-1", "SOFTLABELS_PATIENCE is '-1': expected seconds"),
        ("SOFTLABELS_PATIENCE", "nan", "SOFTLABELS_PATIENCE is 'nan'"),
        ("SOFTLABELS_TIMEOUT", "soon", "SOFTLABELS_TIMEOUT is 'soon'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadInputError) as caught:
        open_root("s3://bucket/x")
    assert said in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_azure_without_an_account_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(BadInputError, match="needs AZURE_STORAGE_ACCOUNT_NAME"):
        open_root("az://container/x")


@pytest.mark.parametrize(("scheme", "module"), [("s3", "aiobotocore.session"), ("az", "adlfs")])
def test_a_missing_client_is_said_with_what_to_install(
    scheme: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("SOFTLABELS_PATIENCE", "33")  # no client of another test will do
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    known: Any = vars(sys.modules["fsspec.registry"])["_registry"]
    monkeypatch.delitem(known, scheme, raising=False)
    with pytest.raises(BadInputError, match=r"pip install 'softlabels\[(s3|azure)\]'"):
        open_root(f"{scheme}://container/x")


def test_both_clients_get_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, s3_environment("http://minio.example.org:9000"))
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("SOFTLABELS_TIMEOUT", "7")
    monkeypatch.setenv("SOFTLABELS_PATIENCE", "90")
    root = open_root("s3://bucket/x")
    options = delta_options(root)
    client: Any = root.fs
    assert options["aws_endpoint_url"] == client.endpoint_url == "http://minio.example.org:9000"
    assert options["aws_region"] == client.client_kwargs["region_name"] == "eu-central-1"
    assert options["timeout"] == f"{client.config_kwargs['read_timeout']:g}s" == "7s"
    assert options["connect_timeout"] == f"{client.config_kwargs['connect_timeout']:g}s" == "5s"
    assert options["retry_timeout"] == "90s"
    assert options["allow_http"] == "true"
    assert not any("secret" in text.lower() for text in [*options, *options.values()])
    assert delta_options(open_root("/tmp")) == {}
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert open_root("s3://bucket/x").fs is not client, "a client is made for one set of secrets"


def test_a_bucket_made_later_is_found(s3: S3) -> None:
    """Nothing is remembered of what was not there."""
    bucket = f"later-{uuid.uuid4().hex[:8]}"
    root = open_root(f"s3://{bucket}/x")
    assert not root.exists("file")
    made = make_bucket(s3.endpoint)
    later = open_root(f"s3://{made}/x")
    later.write("file", b"x")
    assert later.exists("file")

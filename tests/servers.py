"""Object stores on this machine for tests: real servers on loopback, one process each.

    python -m tests.servers s3      serves until its standard input ends; prints its port

moto answers one request after the other: two writers of one object have both won when it did not.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.proxy import running

ROOT = Path(__file__).parents[1]
START_SECONDS = 60
REGION = "us-east-1"
KEY = "AKIATESTTESTTESTTEST"
SECRET = "secret-of-the-tests"
AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = (  # published by Microsoft: every emulator has it
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
_CLEARED = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION")


@dataclass(frozen=True)
class S3:
    """A store that tests can write to; the environment has what is needed to reach it.

    Attributes:
        endpoint: http URL of the server.
        bucket: of this test alone.
    """

    endpoint: str
    bucket: str

    def url(self, name: str) -> str:
        """The URI of a folder in the bucket."""
        return f"s3://{self.bucket}/{name}"

    @property
    def environment(self) -> dict[str, str]:
        """What other processes need to reach it; set here already."""
        return s3_environment(self.endpoint)


def s3_environment(endpoint: str) -> dict[str, str]:
    """Variables that lead S3 clients to `endpoint`."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": REGION,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def set_environment(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    """Sets `variables` and takes away those that would lead elsewhere."""
    for name in _CLEARED:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def make_bucket(endpoint: str) -> str:
    """A new, empty bucket's name."""
    import botocore.session

    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint,
        region_name=REGION,
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )
    client.create_bucket(Bucket=bucket)
    client.close()
    return bucket


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """The URL of a moto server that lives as long as the tests do."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.servers", "s3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin
    assert process.stdout
    try:
        port = process.stdout.readline().strip()
        assert port.isdecimal(), f"moto did not start: {process.poll()}"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


@pytest.fixture
def s3(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A bucket of its own on the moto server, reached by the environment."""
    store = S3(moto_endpoint, make_bucket(moto_endpoint))
    set_environment(monkeypatch, store.environment)
    return store


@dataclass(frozen=True)
class Azure:
    """A store of Azure's kind that tests can write to; the environment leads to it.

    Attributes:
        endpoint: http URL of the account.
        container: of this test alone.
    """

    endpoint: str
    container: str

    def url(self, name: str) -> str:
        """The URI of a folder in the container."""
        return f"az://{self.container}/{name}"

    @property
    def environment(self) -> dict[str, str]:
        """What other processes need to reach it; set here already."""
        return {
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
            "AZURE_STORAGE_ACCOUNT_NAME": AZURITE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURITE_KEY,
        }


@pytest.fixture(scope="session")
def azurite_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an azurite server's account; the test is skipped where azurite is not there."""
    program = find_program("azurite-blob")
    if program is None:
        pytest.skip("az:// IS NOT TESTED: no azurite-blob here; npm install azurite in this folder")
    folder, port = tmp_path_factory.mktemp("azurite"), free_port()
    arguments = ["--blobPort", str(port), "--location", str(folder), "--silent"]
    process = subprocess.Popen(
        [program, *arguments, "--skipApiVersionCheck", "--disableTelemetry"],
        stdout=subprocess.DEVNULL,
        cwd=folder,
    )
    try:
        wait_for_port(port, process)
        with running(f"http://127.0.0.1:{port}") as front:
            yield f"{front.url}/{AZURITE_ACCOUNT}"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def azure(azurite_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Azure:
    """A container of its own on the azurite server, reached by the environment."""
    from softlabels.storage import open_root

    store = Azure(azurite_endpoint, f"container-{uuid.uuid4().hex[:12]}")
    for name in os.environ:
        if name.startswith("AZURE_"):
            monkeypatch.delenv(name)
    set_environment(monkeypatch, store.environment)
    open_root(store.url("")).fs.mkdir(store.container)
    return store


def find_program(name: str) -> str | None:
    """The path of a program of npm, on PATH or in the folder that NODE_MODULES names."""
    folders = [os.environ.get("NODE_MODULES", ""), str(ROOT / "node_modules")]
    places = [os.path.join(folder, ".bin", name) for folder in folders if folder]
    return next((place for place in places if os.access(place, os.X_OK)), shutil.which(name))


def free_port() -> int:
    """A port of loopback that nothing listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for_port(port: int, process: "subprocess.Popen[Any]") -> None:
    """Returns when something listens on `port`."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert process.poll() is None, f"the server ended with {process.returncode}"
        with socket.socket() as client:
            client.settimeout(1)
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "the server does not listen"
        time.sleep(0.05)


def serve_s3() -> None:
    """Serves S3 by moto on a free port until standard input ends."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    inner = DomainDispatcherApplication(create_backend_app)
    turn = threading.Lock()

    def one_at_a_time(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        # The body is taken in before the turn: a slow upload must not keep others waiting.
        if not environ.get("wsgi.input_terminated"):
            import io

            length = int(environ.get("CONTENT_LENGTH") or 0)
            body = environ["wsgi.input"].read(length)
            environ["wsgi.input"] = io.BytesIO(body)
        with turn:
            answer = inner(environ, start_response)
            try:
                return list(answer)
            finally:
                if hasattr(answer, "close"):
                    answer.close()

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: Any) -> None:
            pass

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    {"s3": serve_s3}[sys.argv[1]]()

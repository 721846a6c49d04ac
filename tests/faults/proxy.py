"""An HTTP proxy on loopback that breaks what passes through it, by a seeded plan.

It stands in front of an object store: clients are given its URL for the store's. Each fault is one
that networks and stores really do; the store behind it stays whole.

    python -m tests.faults.proxy http://127.0.0.1:5000      prints its port; ends with its input

It is a process of its own: delta-rs keeps Python's lock in some calls until storage answers.
"""

import http.client
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LOST = "lost reply"
ERROR = "500 before"
ERROR_AFTER = "500 after"
SLOW_DOWN = "503 slow down"
TIME_OUT = "time-out"
TRUNCATED = "truncated read"
CUT = "cut upload"
DENIED = "403"
KINDS = (LOST, ERROR, ERROR_AFTER, SLOW_DOWN, TIME_OUT, TRUNCATED, CUT)

CONTROL = "/--proxy--"
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass
class Request:
    """What a plan decides on."""

    method: str
    path: str
    body: bytes

    @property
    def key(self) -> str:
        """What counts as the same request again."""
        return f"{self.method} {self.path}"


@dataclass
class Plan:
    """Which requests meet which fault: a share of them at random, never many in a row for one.

    Attributes:
        seed: of the choice; printed by tests.
        rate: share of requests that meet a fault.
        kinds: faults, and how often each in proportion.
        in_a_row: faults that the same request meets at most, one after the other.
        most: faults in all; none after that many.
        only: pattern of "METHOD /path" of requests that may meet one.
    """

    seed: int
    rate: float
    kinds: Mapping[str, float]
    in_a_row: int = 3
    most: int = 1_000_000
    only: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._random = random.Random(self.seed)
        self._row: Counter[str] = Counter()

    def choose(self, request: Request) -> str | None:
        """The fault that `request` meets; None lets it through."""
        with self._lock:
            fits = [
                kind
                for kind in self.kinds
                if (kind != TRUNCATED or request.method == "GET")
                and (kind != CUT or len(request.body) > 1)
            ]
            chosen = None
            if (
                fits
                and sum(self.counts.values()) < self.most
                and self._row[request.key] < self.in_a_row
                and re.search(self.only, request.key)
                and self._random.random() < self.rate
            ):
                chosen = self._random.choices(fits, [self.kinds[kind] for kind in fits])[0]
            if chosen is None:
                self._row[request.key] = 0
            else:
                self._row[request.key] += 1
                self.counts[chosen] = self.counts.get(chosen, 0) + 1
            return chosen


@dataclass
class State:
    """What a proxy does now.

    Attributes:
        plan: what breaks; None: nothing.
        down: seconds from now on in which every connection is closed unanswered.
        strip: names of request headers, small letters, that are taken away.
        hang: seconds that a request of a time-out is held before its connection is closed.
        requests: how many were passed on.
    """

    plan: Plan | None = None
    down: float = 0.0
    strip: tuple[str, ...] = ()
    hang: float = 2.0
    requests: int = 0

    @classmethod
    def from_json(cls, text: bytes) -> "State":
        """What `asdict` made of it."""
        values = json.loads(text)
        plan = values.pop("plan")
        return cls(plan=None if plan is None else Plan(**plan), **values)


class Server(ThreadingHTTPServer):
    """Passes requests on to `upstream`, "http://host:port", as `state` says."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.state = State()
        self.down_until = 0.0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away in the middle: that is what is tested."""


class Proxy:
    """The proxy of a test: what its clients are given, and what it is told to do.

    Attributes:
        url: what clients are given.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def set(
        self,
        plan: Plan | None = None,
        *,
        down: float = 0.0,
        strip: tuple[str, ...] = (),
        hang: float = 2.0,
    ) -> Counter[str]:
        """From now on it does this; returns the faults of the plan before."""
        before = self.state()
        self._ask("PUT", json.dumps(asdict(State(plan, down, strip, hang, before.requests))))
        return Counter(before.plan.counts if before.plan else {})

    def state(self) -> State:
        """What it does and has done."""
        return State.from_json(self._ask("GET", None))

    def _ask(self, method: str, body: str | None) -> bytes:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        try:
            connection.request(method, CONTROL, body)
            return connection.getresponse().read()
        finally:
            connection.close()


@contextmanager
def running(upstream: str) -> Iterator[Proxy]:
    """A proxy before `upstream` in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.proxy", upstream],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdin
    assert process.stdout
    try:
        yield Proxy(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _serve(self) -> None:
        state = self.server.state
        if self.path == CONTROL:
            self._control()
            return
        if time.monotonic() < self.server.down_until:
            self._hang_up()
            return
        request = Request(self.command, self.path, self._body())
        fault = state.plan.choose(request) if state.plan else None
        if fault == TIME_OUT:
            time.sleep(state.hang)
            self._hang_up()
        elif fault == CUT:
            self._hang_up()
        elif fault == ERROR:
            self._answer(500, "InternalError")
        elif fault == DENIED:
            self._answer(403, "AccessDenied")
        elif fault == SLOW_DOWN:
            self._answer(503, "SlowDown")
        else:
            status, headers, body = self._forward(request)
            if fault == LOST:
                self._hang_up()
            elif fault == ERROR_AFTER:
                self._answer(500, "InternalError")
            else:
                self._send(status, headers, body, fault == TRUNCATED)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = _serve

    def _control(self) -> None:
        body = self._body()
        if body:
            self.server.state = State.from_json(body)
            self.server.down_until = time.monotonic() + self.server.state.down
        answer = json.dumps(asdict(self.server.state)).encode()
        self._send(200, [("Content-Type", "application/json")], answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _forward(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.putrequest(
                request.method, request.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in _HOP | set(self.server.state.strip):
                    upstream.putheader(name, value)
            if request.body or request.method in ("PUT", "POST"):
                upstream.putheader("Content-Length", str(len(request.body)))
            upstream.endheaders(request.body or None)
            answer = upstream.getresponse()
            body = answer.read()
            self.server.state.requests += 1
            headers = answer.getheaders()
            if request.method == "HEAD":  # its length is that of what is not sent
                return answer.status, headers, b""
            return answer.status, headers, apply_start_from(request, body)
        finally:
            upstream.close()

    def _send(
        self, status: int, headers: list[tuple[str, str]], body: bytes, truncated: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in _HOP or (
                self.command == "HEAD" and name.lower() == "content-length"
            ):
                self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if truncated else body)
        if truncated:
            self._hang_up()

    def _answer(self, status: int, code: str) -> None:
        body = (
            f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code>"
            "<Message>made by the test</Message></Error>"
        ).encode()
        headers = [("Content-Type", "application/xml"), ("x-ms-error-code", code)]
        self._send(status, headers, body if self.command != "HEAD" else b"")

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def apply_start_from(request: Request, body: bytes) -> bytes:
    """What Azure answers to a listing from a name on; azurite 3.35 does not know `startFrom`."""
    start = parse_qs(urlsplit(request.path).query).get("startFrom")
    if not start:
        return body
    least = start[0].encode()

    def kept(found: "re.Match[bytes]") -> bytes:
        return found[0] if unquote(found[1].decode()).encode() >= least else b""

    return re.sub(rb"<Blob><Name>([^<]*)</Name>.*?</Blob>", kept, body, flags=re.DOTALL)


def main() -> None:
    """Serves until standard input ends."""
    server = Server(sys.argv[1])
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

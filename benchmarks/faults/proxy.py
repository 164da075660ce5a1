"""A web server in front of an object store that behaves badly: it refuses, loses answers, cuts them and dawdles.

Faults are drawn for each request, by a seed. What was asked reaches the store or does not:

- `refuse`: 500, 503, or 409 where something is written, at once; the store hears nothing.
- `lose`: the store does what was asked, and the connection ends without an answer.
- `cut`: the store answers, and the connection ends within the body.
- `slow`: the answer comes late.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REFUSALS = {True: (409, 500, 503), False: (500, 503)}  # of requests that write, and of others
CODES = {409: "OperationAborted", 500: "InternalError", 503: "SlowDown"}
HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}  # of one connection, not of the message
SHARES = {"refuse": 0.04, "lose": 0.03, "cut": 0.02, "slow": 0.05}


class FaultyProxy:
    """Stands at `endpoint` for the store at `upstream`, HOST:PORT. `counts` of requests and of each fault."""

    def __init__(self, upstream: str, seed: int, shares: Mapping[str, float] = SHARES, late: float = 0.2) -> None:
        self.upstream, self.shares, self.late = upstream, dict(shares), late
        self.counts: Counter[str] = Counter()
        self._rng, self._lock = random.Random(seed), threading.Lock()
        proxy = self

        class Handler(_Handler):
            of = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def draw(self) -> tuple[str, int]:
        """The fault of the next request, '' for none, and a number it may use."""
        with self._lock:
            at, number, fault = self._rng.random(), self._rng.randrange(1 << 30), ""
            for name, share in self.shares.items():
                if 0 <= at < share:
                    fault = name
                at -= share
            self.counts.update(["requests", *([fault] if fault else [])])
            return fault, number

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked was killed: nothing is printed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: FaultyProxy

    def _handle(self) -> None:
        fault, number = self.of.draw()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault == "refuse":
            refusals = REFUSALS[self.command not in ("GET", "HEAD")]
            self._refuse(refusals[number % len(refusals)])
            return
        connection = http.client.HTTPConnection(self.of.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        connection.request(self.command, self.path, body or None, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "lose":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(self.of.late)
        self.send_response_only(answer.status, answer.reason)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        for name, value in answer.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", length)
        with contextlib.suppress(ConnectionError):  # whoever asked was killed
            self.end_headers()
            if self.command != "HEAD":
                whole = fault != "cut"
                self.wfile.write(data if whole else data[: number % (len(data) + 1)])
                self.close_connection = self.close_connection or not whole

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _handle  # noqa: N815

    def _refuse(self, status: int) -> None:
        text = f"<Error><Code>{CODES[status]}</Code><Message>by the proxy</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        with contextlib.suppress(ConnectionError):
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

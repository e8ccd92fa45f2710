"""A proxy in front of a server that makes faults: what networks, busy servers and broken proxies do.

Each request gets a fault with a given probability, drawn from a seed; a request that was repeated often enough passes.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
import time
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
READING = ("drop", "reset", "503", "500", "short", "long", "wrong", "stall", "tag")
WRITING = ("drop", "reset", "503", "500", "wrong", "lost", "stall")


class FaultProxy:
    """``share``: of requests that get a fault. ``faults``: which. ``most``: faults in all; then everything passes.

    ``in_a_row``: the most faults of one kind of request (method and path), one after the other.
    """

    def __init__(
        self,
        upstream: str,
        seed: int = 0,
        share: float = 0.3,
        faults: tuple[str, ...] = (*READING, *WRITING),
        most: int = 1 << 60,
        in_a_row: int = 3,
    ) -> None:
        self._upstream = urllib.parse.urlsplit(upstream).netloc
        self._chance, self._share, self.faults = random.Random(seed), share, faults
        self._most, self._in_a_row = most, in_a_row
        self._rows: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.made: Counter[str] = Counter()
        self.stall_seconds = 0.9
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle_one_request()

            def do_any(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any

            def log_message(self, *args: object) -> None:
                """Says nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Says nothing of connections that the client closed."""

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _fault(self, method: str, path: str) -> str:
        kinds = [each for each in (READING if method in ("GET", "HEAD") else WRITING) if each in self.faults]
        row = f"{method} {path.partition('?')[0]}"
        with self._lock:
            if not kinds or sum(self.made.values()) >= self._most or self._chance.random() > self._share:
                self._rows[row] = 0
                return ""
            if self._rows[row] >= self._in_a_row:
                self._rows[row] = 0
                return ""
            self._rows[row] += 1
            fault = self._chance.choice(kinds)
            self.made[fault] += 1
            return fault

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        fault = self._fault(request.command, request.path)
        if fault == "reset":
            self._cut(request)
            return
        if fault in ("503", "500"):
            self._send(request, int(fault), {"Content-Type": "application/xml"}, SLOW_DOWN, len(SLOW_DOWN))
            return
        if fault == "stall":
            time.sleep(self.stall_seconds)
            self._cut(request)
            return
        if fault == "wrong" and request.command == "PUT" and body:
            body = _flipped(body, self._chance)
        upstream = http.client.HTTPConnection(self._upstream, timeout=60)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "connection"}
        upstream.request(request.command, request.path, body, headers)
        found = upstream.getresponse()
        data = found.read()
        told = {name: value for name, value in found.getheaders() if name.lower() not in _OURS}
        upstream.close()
        size = int(found.headers.get("Content-Length") or len(data)) if request.command == "HEAD" else len(data)
        if fault == "lost":  # done, and the answer is lost
            self._cut(request)
            return
        if found.status in (200, 206) and request.command == "GET":
            if fault == "wrong" and "Range" in request.headers and len(data) > 1:
                data = _flipped(data, self._chance)
            elif fault == "short" and data:
                data = data[:-1]
                size -= 1
            elif fault == "long":
                data += b"?"
                size += 1
        if fault == "tag":
            told = {name: '"00000000000000000000000000000000"' if name.lower() == "etag" else v for name, v in told.items()}
        if fault == "drop":
            self._send(request, found.status, told, data[: len(data) // 2], size)
            self._cut(request)
            return
        self._send(request, found.status, told, data, size)

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes, size: int) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(size))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    @staticmethod
    def _cut(request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        with contextlib.suppress(OSError):
            request.wfile.flush()
            request.connection.shutdown(socket.SHUT_RDWR)


_OURS = ("content-length", "connection", "transfer-encoding", "server", "date")


def _flipped(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]

"""A proxy on loopback that stands in front of an S3 server and injects faults by rule.

Requests are forwarded as they are, Host header included, so that their signatures hold; each is read whole
and each answer is forwarded whole. A rule names the requests that it applies to, how many of the same kind it
spoils, and how. What was spoilt is counted, so that a test can tell that its fault really happened.
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
_PER_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "expect"})
_UPSTREAM_SECONDS = 60.0


class Fault(Enum):
    """What can happen to a request."""

    INTERNAL_ERROR = "500"
    SLOW_DOWN = "503 SlowDown"
    RESET = "connection reset"
    HANG = "no answer"
    TRUNCATED = "body cut short"
    SHORT_LENGTH = "length and body too short"
    LOST_ANSWER = "done, but answered 500"
    EXPIRED_TOKEN = "expired credentials"
    ACCESS_DENIED = "access denied"


_ANSWERS = {
    Fault.INTERNAL_ERROR: (500, "InternalError", "We encountered an internal error. Please try again."),
    Fault.SLOW_DOWN: (503, "SlowDown", "Please reduce your request rate."),
    Fault.LOST_ANSWER: (500, "InternalError", "We encountered an internal error. Please try again."),
    Fault.EXPIRED_TOKEN: (400, "ExpiredToken", "The provided token has expired."),
    Fault.ACCESS_DENIED: (403, "AccessDenied", "Access Denied"),
}


@dataclass(slots=True)
class Rule:
    """Which requests get which fault."""

    fault: Fault | None
    """None: forwarded as it is, after `meanwhile`."""
    method: str = ".*"
    """Regular expression of the whole method."""
    path: str = ""
    """Regular expression to be found in the decoded path with its query."""
    times: int | None = None
    """Requests of one method for one path that are spoilt; None: all."""
    most: int | None = None
    """Requests that are spoilt of all kinds together; None: all."""
    meanwhile: Callable[[], object] | None = None
    """Called before each spoilt request is handled."""
    spoilt: Counter[tuple[str, str]] = field(default_factory=Counter, init=False)
    """How often it happened, by method and path."""

    def applies(self, method: str, path: str) -> bool:
        """Whether this request is to be spoilt; counts it."""
        if not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        if self.times is not None and self.spoilt[method, path] >= self.times:
            return False
        if self.most is not None and self.spoilt.total() >= self.most:
            return False
        self.spoilt[method, path] += 1
        return True


class FaultProxy:
    """A running proxy."""

    def __init__(self, upstream: str) -> None:
        place = urlsplit(upstream)
        self.upstream = (str(place.hostname), int(place.port or 80))
        self.released = threading.Event()
        """Set when requests that hang are to be let go."""
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def spoiling(self, *rules: Rule) -> Iterator[None]:
        """Apply rules while the context lasts; of several that match, the first."""
        with self._lock:
            self.released.clear()
            self._rules = list(rules)
        try:
            yield
        finally:
            with self._lock:
                self._rules = []
            self.released.set()

    def rule_for(self, method: str, path: str) -> Rule | None:
        """The rule that spoils this request."""
        with self._lock:
            return next((rule for rule in self._rules if rule.applies(method, unquote(path))), None)

    @contextmanager
    def running(self) -> Iterator[FaultProxy]:
        """Serve while the context lasts."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent: clients that give up in the middle are what this is for."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def handle_one_request(self) -> None:
        """One request of a connection."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self._body()
        rule = self.server.proxy.rule_for(self.command, self.path)
        if rule is not None and rule.meanwhile is not None:
            rule.meanwhile()
        if rule is None or rule.fault is None:
            self._send(self._forwarded(body))
        else:
            self._spoil(rule.fault, body)

    def _spoil(self, fault: Fault, body: bytes) -> None:
        if fault is Fault.RESET:
            self._reset()
        elif fault is Fault.HANG:
            self.server.proxy.released.wait(_UPSTREAM_SECONDS)
            self._reset()
        elif fault in (Fault.TRUNCATED, Fault.SHORT_LENGTH):
            answer = self._forwarded(body)
            half = answer.body[: len(answer.body) // 2]
            if fault is Fault.TRUNCATED:
                self._send(answer, half)
                self.close_connection = True
            else:
                headers = [item for item in answer.headers if item[0].lower() != "content-length"]
                headers.append(("Content-Length", str(len(half))))
                self._send(_Answer(answer.status, answer.reason, headers, half))
        else:
            if fault is Fault.LOST_ANSWER:
                self._forwarded(body)
            self._refuse(*_ANSWERS[fault])

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = _ERROR.format(code=code, message=message).encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        self._send(_Answer(status, code, headers, body))

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forwarded(self, body: bytes) -> _Answer:
        upstream = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=_UPSTREAM_SECONDS)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            chunked = "Transfer-Encoding" in self.headers
            for name, value in self.headers.items():
                if name.lower() not in _PER_CONNECTION:
                    upstream.putheader(name, value)
            if chunked:
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body or None)
            response = upstream.getresponse()
            content = response.read()
            headers = [item for item in response.getheaders() if item[0].lower() not in _PER_CONNECTION]
            if content and not any(name.lower() == "content-length" for name, _ in headers):
                headers.append(("Content-Length", str(len(content))))
            return _Answer(response.status, response.reason, headers, content)
        finally:
            upstream.close()

    def _send(self, answer: _Answer, body: bytes | None = None) -> None:
        """An answer with its own headers, and perhaps another body than they say."""
        bodiless = self.command == "HEAD" or answer.status in (204, 304)
        headers = [f"{name}: {value}" for name, value in answer.headers]
        if not bodiless and not any(line.lower().startswith("content-length:") for line in headers):
            headers.append("Content-Length: 0")
        head = "\r\n".join([f"HTTP/1.1 {answer.status} {answer.reason}", *headers, "", ""])
        content = answer.body if body is None else body
        self.wfile.write(head.encode("latin-1") + (b"" if bodiless else content))

    def _reset(self) -> None:
        """Close without a farewell, so that the client gets a reset and not an end."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # the files that the handler made of the socket keep it open beside it
            self.rfile.close()
            self.connection.close()

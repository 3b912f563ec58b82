"""The HTTP side of the test Hub: parsing, the log, faults, and answers with ranges."""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from .state import Entry, Fault


@dataclass
class Answer:
    """What is sent back."""

    status: int = 200
    body: bytes = b""
    headers: dict = field(default_factory=dict)

    @classmethod
    def json(cls, value, status=200, **headers):
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    @classmethod
    def error(cls, code, status=404, message=None, **headers):
        return cls(status, b"", {"X-Error-Code": code, "X-Error-Message": message or code, **headers})


@dataclass
class Request:
    """What came in."""

    method: str
    path: str  # raw: what is quoted stays quoted
    query: dict
    headers: object
    body: bytes
    user: str | None
    base: str

    def json(self):
        return json.loads(self.body or b"{}")


class Server(ThreadingHTTPServer):
    """A server of one hub on one port."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address, hub, routes):
        self.hub, self.routes = hub, routes
        super().__init__(address, Handler)

    def handle_error(self, request, client_address):
        """A client that was killed is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: the second would wait 40 ms for the client to acknowledge the first
    server: Server

    def log_message(self, *arguments):
        """The log is the hub's."""

    def handle_any(self):
        hub = self.server.hub
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if "chunked" not in self.headers.get("Transfer-Encoding", "") else self._chunked()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        port = self.server.server_address[1]
        entry = Entry(self.command, unquote(parts.path), parts.query, self.headers.get("Range"), token, port)
        with hub.lock:
            hub.log.append(entry)
        fault = hub.fault(f"{self.command} {entry.path}") or Fault()
        if fault.drop == "before":
            fault.strike()
            return self._hang_up()
        if fault.status is not None:
            answer = Answer.error("", fault.status, "on demand", **fault.headers)
        else:
            user = hub.tokens.get(token)
            request = Request(self.command, parts.path, parse_qs(parts.query, keep_blank_values=True), self.headers, body, user, f"http://127.0.0.1:{port}")
            try:
                with hub.lock:
                    answer = self._route(request) if token is None or user else Answer.error("", 401, "Invalid credentials in Authorization header")
            except Exception as error:  # a bug here must be seen in the test
                answer = Answer.error("", 418, f"{type(error).__name__}: {error}".replace("\n", " "))
        if fault.drop == "after":
            fault.strike()
            return self._hang_up()
        entry.status = answer.status
        self._send(answer, entry, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_any

    def _route(self, request):
        for methods, pattern, answer in self.server.routes:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in methods:
                return answer(self.server.hub, request, *(part and unquote(part) for part in match.groups()))
        return Answer.error("EntryNotFound", 404, f"no route for {request.method} {request.path}")

    def _chunked(self):
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, answer, entry, fault):
        body = answer.body
        if fault.change is not None:
            body = fault.change(body)
            answer.headers["ETag"] = '"changed"'
        if answer.status == 200 and entry.range and self.server.hub.ranges and "Accept-Ranges" in answer.headers:
            first, last = entry.range.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else len(body), len(body))
            if start >= len(body):
                answer = Answer.error("", 416)
                body = b""
            else:
                answer.status = entry.status = 206
                answer.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
                body = body[start:stop]
        body += b"x" * fault.more
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = len(body)
        body = body if fault.cut is None else body[: fault.cut]
        for start in range(0, len(body), 65536):
            if fault.delay:
                time.sleep(fault.delay)
            self.wfile.write(body[start : start + 65536])
            entry.sent += len(body[start : start + 65536])
        if len(body) < whole:
            self._hang_up()

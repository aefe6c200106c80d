"""A real HTTP server in front of an S3 endpoint: it checks checksums as S3 does, and goes wrong when told to."""

from __future__ import annotations

import http.client
import threading
import zlib
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "date", "server", "expect"}


@dataclass
class Request:
    """One request as it came in, with what it is in S3's terms."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""

    @property
    def operation(self) -> str:
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "partNumber" in query:
            return "UploadPart"
        if "uploads" in query:
            return "CreateMultipartUpload" if self.method == "POST" else "ListMultipartUploads"
        if "uploadId" in query:
            return {"POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}[self.method]
        return {"HEAD": "HeadObject", "GET": "GetObject", "PUT": "PutObject"}.get(self.method, self.method)

    @property
    def part(self) -> int:
        return int(parse_qs(urlsplit(self.path).query).get("partNumber", ["0"])[0])

    @property
    def upload(self) -> str:
        return parse_qs(urlsplit(self.path).query).get("uploadId", [""])[0]


@dataclass
class Response:
    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


def error(status: int, code: str) -> Callable[[FaultProxy, Request], Response]:
    """A fault: S3's error document."""
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>CANARY-MESSAGE</Message></Error>'.encode()
    return lambda _proxy, _request: Response(status, [("Content-Type", "application/xml")], body)


def reset(_proxy: FaultProxy, _request: Request) -> None:
    """A fault: the connection is cut without an answer."""


def lose_answer(proxy: FaultProxy, request: Request) -> None:
    """A fault: what was asked for is done, and the answer never arrives."""
    proxy.forward(request)


def hang(proxy: FaultProxy, _request: Request) -> None:
    """A fault: no answer until the server is stopped."""
    proxy.stopping.wait()


def edit_headers(edit: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[FaultProxy, Request], Response]:
    """A fault: an answer with other headers."""

    def fault(proxy: FaultProxy, request: Request) -> Response:
        response = proxy.forward(request)
        response.headers = list(edit(dict(response.headers)).items())
        return response

    return fault


@dataclass
class Fault:
    operation: str
    act: Callable[[FaultProxy, Request], Response | None]
    times: int = 1_000_000
    part: int = 0


class FaultProxy:
    """Stands in front of `upstream` (host, port). `faults` are tried in order; `seen` is every request's operation."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.requests: list[Request] = []
        self.bodies: dict[str, dict[int, bytes]] = {}
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take_fault(self, request: Request) -> Fault | None:
        with self.lock:
            self.seen.append(request.operation)
            self.requests.append(Request(request.method, request.path, request.headers))
            for fault in self.faults:
                if fault.operation == request.operation and fault.times > 0 and fault.part in {0, request.part}:
                    fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> Response | None:
        fault = self.take_fault(request)
        return self.forward(request) if fault is None else fault.act(self, request)

    def forward(self, request: Request) -> Response:
        refusal = self.check(request)
        if refusal is not None:
            return refusal
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        try:
            headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
            connection.request(request.method, request.path, request.body or None, headers)
            response = connection.getresponse()
            body = response.read()
            kept = [(k, v) for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP]
            if request.method == "HEAD":
                kept.append(("Content-Length", response.getheader("Content-Length") or "0"))
            return Response(response.status, kept, body)
        finally:
            connection.close()

    def check(self, request: Request) -> Response | None:
        """Checksums as S3 checks them; moto does not."""
        headers = {k.lower(): v for k, v in request.headers.items()}
        if request.operation == "UploadPart":
            if headers.get("x-amz-checksum-crc32") != crc_text(request.body):
                return error(400, "BadDigest")(self, request)
            with self.lock:
                self.bodies.setdefault(request.upload, {})[request.part] = request.body
        if request.operation == "CompleteMultipartUpload":
            parts = self.bodies.get(request.upload, {})
            whole = b"".join(parts[number] for number in sorted(parts))
            if headers.get("x-amz-checksum-type") != "FULL_OBJECT":
                return error(400, "InvalidRequest")(self, request)
            if headers.get("x-amz-mp-object-size") != str(len(whole)):
                return error(400, "InvalidRequest")(self, request)
            if headers.get("x-amz-checksum-crc32") != crc_text(whole):
                return error(400, "BadDigest")(self, request)
        return None


def crc_text(data: bytes) -> str:
    return b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Clients that lost patience are the point of it."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        request = Request(self.command, self.path, dict(self.headers.items()))
        request.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        response = self.owner.answer(request)
        if response is None:
            self.close_connection = True
            return
        self.send_response(response.status)
        for name, value in response.headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(response.body)))
        elif response.body:
            self.send_header("Content-Length", "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    def log_message(self, *_: Any) -> None: ...

"""A receiver of OTLP traces, gRPC or HTTP/protobuf, as good or as bad as a test wants it.

In this process, or as one of its own: `python otlp_sink.py` takes OTLP over HTTP, prints where, and serves until its
input ends; then it prints how many spans came.
"""

from __future__ import annotations

import dataclasses
import json
import ssl
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent import futures
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

if TYPE_CHECKING:
    from certificates import Pair

CLIENT = 3
"""The kind of a span that is a call."""
ERROR = 2


@dataclass(frozen=True)
class Received:
    """A span as it arrived. Ids in hexadecimal, times in nanoseconds."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    start: int
    end: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    status: int = 0
    message: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)


class OtlpSink:
    """Takes spans in. Use it as a context manager.

    Args:
        protocol: ``grpc`` or ``http/protobuf``.
        fault: ``hang`` (never answers), ``refuse`` (no, every time), ``bad`` (says 400 for ever), or none.
        pair: certificate and key, for TLS.
        client_ca: file with the authority whose clients are let in; everybody when None.
    """

    def __init__(
        self, protocol: str = "grpc", fault: str = "", *, pair: Pair | None = None, client_ca: Path | None = None
    ) -> None:
        self._pair, self._client_ca = pair, client_ca
        self.protocol = protocol
        self.fault = fault
        self.batches = 0
        self.headers: list[dict[str, str]] = []
        self._spans: list[Received] = []
        self._lock = threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> OtlpSink:
        if self.protocol == "grpc":
            self._grpc = grpc.server(futures.ThreadPoolExecutor(8))
            add_TraceServiceServicer_to_server(_Service(self), self._grpc)  # type: ignore[no-untyped-call]
            self.port = self._grpc_port("127.0.0.1:0")
            self._grpc.start()
        else:
            self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"sink": self}))
            self._http.daemon_threads = True
            if self._pair is not None:
                self._http.socket = self._tls(self._pair).wrap_socket(self._http.socket, server_side=True)
            self.port = self._http.server_address[1]
            threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self.protocol == "grpc":
            self._grpc.stop(0).wait(5)
        else:
            self._http.shutdown()
            self._http.server_close()

    def _grpc_port(self, address: str) -> int:
        if self._pair is None:
            return int(self._grpc.add_insecure_port(address))
        files = (self._pair.key.read_bytes(), self._pair.certificate.read_bytes())
        authority = self._client_ca.read_bytes() if self._client_ca else None
        credentials = grpc.ssl_server_credentials([files], authority, require_client_auth=authority is not None)
        return int(self._grpc.add_secure_port(address, credentials))

    def _tls(self, pair: Pair) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self._client_ca)
        context.load_cert_chain(pair.certificate, pair.key)
        if self._client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    @property
    def environment(self) -> dict[str, str]:
        """The standard variables that lead to this sink."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"{'https' if self._pair else 'http'}://127.0.0.1:{self.port}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": self.protocol,
        }

    @property
    def spans(self) -> list[Received]:
        with self._lock:
            return list(self._spans)

    def wait_for(self, name: str, count: int = 1, seconds: float = 20.0) -> list[Received]:
        """The spans of a name, when there are so many of them; all that came in when the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            found = [span for span in self.spans if span.name == name]
            if len(found) >= count or time.monotonic() > deadline:
                return found
            time.sleep(0.02)

    def take(self, request: ExportTraceServiceRequest, headers: Mapping[str, str]) -> str:
        """Returns the fault that the answer is to have."""
        with self._lock:
            self.batches += 1
            self.headers.append(dict(headers))
            if not self.fault:
                self._spans += _received(request)
        if self.fault == "hang":
            self._over.wait(60)
        return self.fault


class _Service(TraceServiceServicer):
    def __init__(self, sink: OtlpSink) -> None:
        self._sink = sink

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        fault = self._sink.take(request, {item.key: str(item.value) for item in context.invocation_metadata()})
        if fault:
            context.abort(
                grpc.StatusCode.UNAVAILABLE if fault == "refuse" else grpc.StatusCode.INVALID_ARGUMENT, "not here"
            )
        return ExportTraceServiceResponse()


class _Handler(BaseHTTPRequestHandler):
    sink: OtlpSink

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = ExportTraceServiceRequest.FromString(body)
        fault = self.sink.take(request, {key.lower(): value for key, value in self.headers.items()})
        self.send_response({"": 200, "refuse": 503}.get(fault, 400))
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def _received(request: ExportTraceServiceRequest) -> list[Received]:
    return [
        Received(
            span.name,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            int(span.kind),
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            _values(span.attributes),
            _values(group.resource.attributes),
            int(span.status.code),
            span.status.message,
            [{"name": e.name, "time": e.time_unix_nano} | _values(e.attributes) for e in span.events],
        )
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def _values(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}


def to_json(spans: Iterable[Received]) -> str:
    return json.dumps([dataclasses.asdict(span) for span in spans])


def from_json(text: str) -> list[Received]:
    return [Received(**item) for item in json.loads(text)]


def check_trace(spans: list[Received], run_id: str) -> Received:
    """One complete and connected trace: its id the run id, one root, parents there and around their children.

    A message that the hub got after the run's end, from whichever process, is a call that begins after its parent has
    ended: its parent must exist, its times are its own.

    Returns:
        The root.
    """
    trace_id = run_id.replace("-", "")
    assert {span.trace_id for span in spans} == {trace_id}
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans), "a span was exported twice"
    roots = [span for span in spans if not span.parent_id]
    assert [span.name for span in roots] == ["flip.run"]
    for span in spans:
        assert 0 < span.start <= span.end, span.name
        if not span.parent_id:
            continue
        assert span.parent_id in by_id, f"{span.name} has no parent"
        parent = by_id[span.parent_id]
        late = span.kind == CLIENT and parent.name == "flip.run" and span.start >= parent.end
        assert late or parent.start <= span.start, f"{span.name} begins before {parent.name}"
        assert late or span.end <= parent.end, f"{span.name} ends after {parent.name}"
        for event in span.events:
            assert span.start <= event["time"] <= span.end
    return roots[0]


def main() -> None:
    with OtlpSink("http/protobuf") as sink:
        print(f"http://127.0.0.1:{sink.port}/v1/traces", flush=True)
        sys.stdin.read()
        print(len(sink.spans), flush=True)


if __name__ == "__main__":
    main()

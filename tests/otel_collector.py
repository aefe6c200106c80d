"""A real OpenTelemetry Collector with the project's own configuration, and a trace store for it, for tests."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / "otel-collector.yaml"
TLS_CONFIG = REPOSITORY / "collector" / "tls.yaml"
MANIFEST = REPOSITORY / "collector" / "manifest.yaml"
BUILD = REPOSITORY / "collector" / "build.sh"
START_SECONDS = 60.0


def require() -> Path:
    """The collector's binary. A test that needs it and has none skips, and says how to get one."""
    found = subprocess.run(
        [str(BUILD), "--path"], capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()
    if not Path(found).is_file():
        pytest.skip("the collector has not been built: `make collector` builds it where Go and the network are")
    return Path(found)


def free_ports(number: int) -> list[int]:
    """Different ports that nobody listens on."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    try:
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def validate(*configs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Have the collector judge configuration files, merged in their order."""
    arguments = [argument for config in configs for argument in ("--config", str(config))]
    command = [str(require()), "validate", *arguments]
    clean = _clean_environment() | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=clean)


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("FLIP_", "OTEL_"))}


class Collector:
    """A collector on free ports of 127.0.0.1. Use it as a context manager.

    Only what must differ in a test does: the ports, and how long a batch waits.

    Args:
        trace_store: ``host:port`` of an OTLP gRPC service without TLS.
        configs: further configuration files, merged after the project's.
        environment: further variables.
    """

    def __init__(
        self,
        *,
        trace_store: str = "127.0.0.1:9",
        configs: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._binary = require()
        self.folder = Path(tempfile.mkdtemp(prefix="flip-collector-"))
        self._configs = list(configs)
        self._environment = _clean_environment() | {
            "FLIP_TRACE_STORE": trace_store,
            "FLIP_TRACE_STORE_INSECURE": "true",
            **(environment or {}),
        }
        self.grpc_port = self.http_port = self.health_port = self.metrics_port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> Collector:
        """Start it, and return when it is healthy."""
        for _ in range(3):
            self._spawn()
            if self._is_healthy():
                return self
            if "address already in use" not in self.log:
                break
        log = self.log
        self.close()
        raise AssertionError(f"the collector does not start:\n{log[-3_000:]}")

    def _spawn(self) -> None:
        self.grpc_port, self.http_port, self.health_port, self.metrics_port = free_ports(4)
        differences = {
            "receivers": {
                "otlp": {
                    "protocols": {
                        "grpc": {"endpoint": f"127.0.0.1:{self.grpc_port}"},
                        "http": {"endpoint": f"127.0.0.1:{self.http_port}"},
                    }
                }
            },
            "processors": {"batch": {"timeout": "50ms"}},
            "exporters": {"otlp_grpc": {"retry_on_failure": {"max_interval": "1s"}}},
            "extensions": {"health_check": {"endpoint": f"127.0.0.1:{self.health_port}"}},
        }
        overlay = self.folder / "test.json"
        overlay.write_text(json.dumps(differences))
        configs = [CONFIG, *self._configs, overlay]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(self._binary), *(f"--config={config}" for config in configs)],
                cwd=self.folder,
                env=self._environment | {"FLIP_COLLECTOR_METRICS_PORT": str(self.metrics_port)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _is_healthy(self) -> bool:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self._process is not None
            if self._process.poll() is not None:
                return False
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/", timeout=2):
                return True
            time.sleep(0.05)
        return False

    def stop(self) -> int:
        """SIGTERM, and wait: what it holds it sends first. Returns the exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.terminate()
        try:
            return process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(30)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Collector:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def metrics_address(self) -> str:
        """``host:port`` of its own /metrics, as Prometheus wants a target."""
        return f"127.0.0.1:{self.metrics_port}"

    def own_metrics(self) -> dict[str, float]:
        """Its own telemetry, summed over labels."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=10) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        sums: dict[str, float] = {}
        for sample in (sample for family in families for sample in family.samples):
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums


class TraceStore:
    """A service that takes spans by OTLP over gRPC, and keeps the requests as they came. Use it as a context manager.

    Args:
        port: 0 picks a free one, which stays the same when it is entered again.
    """

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self._lock = threading.Lock()
        self._requests: list[service.ExportTraceServiceRequest] = []
        self._server: grpc.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> TraceStore:
        store = self

        class Servicer(service_grpc.TraceServiceServicer):
            def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
                with store._lock:
                    store._requests.append(request)
                return service.ExportTraceServiceResponse()

        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        service_grpc.add_TraceServiceServicer_to_server(Servicer(), self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(self.address)
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.stop(0).wait(10)

    @property
    def requests(self) -> list[service.ExportTraceServiceRequest]:
        with self._lock:
            return list(self._requests)

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def text(self) -> str:
        """Everything that came, as one text to search in."""
        return "\n".join(str(request) for request in self.requests)

    def attribute_names(self) -> set[str]:
        """Names of all attributes of resources, scopes, spans, events and links."""
        names: set[str] = set()
        for request in self.requests:
            for resource in request.resource_spans:
                names |= _names(resource.resource.attributes)
                for scope in resource.scope_spans:
                    names |= _names(scope.scope.attributes)
                    for span in scope.spans:
                        names |= _names(span.attributes)
                        names = names.union(*(_names(event.attributes) for event in span.events))
                        names = names.union(*(_names(link.attributes) for link in span.links))
        return names


def _names(attributes: Sequence[KeyValue]) -> set[str]:
    return {attribute.key for attribute in attributes}


def values(attributes: Sequence[KeyValue]) -> dict[str, Any]:
    """Attributes as a dictionary."""
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


def wait_for_spans(store: TraceStore, number: int, seconds: float = 30.0) -> list[Span]:
    """Wait until that many spans have come, and return all."""
    until = time.monotonic() + seconds
    while len(spans := store.spans) < number:
        assert time.monotonic() < until, f"{len(spans)} of {number} spans after {seconds:g} s"
        time.sleep(0.05)
    return spans


def pairs(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf of a parsed configuration, with the keys that lead to it."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from pairs(value, (*path, str(key)))
    elif isinstance(tree, list):
        for value in tree:
            yield from pairs(value, path)
    else:
        yield path, tree

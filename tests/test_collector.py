"""The collector, really built and run: what goes in comes out, and what must not come out does not."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as ProtoResource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span
from opentelemetry.proto.trace.v1.trace_pb2 import Status as ProtoStatus
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode

from certificates import Authority
from demo_runs import DemoRuns
from otel_collector import (
    BUILD,
    CONFIG,
    MANIFEST,
    REPOSITORY,
    TLS_CONFIG,
    Collector,
    TraceStore,
    pairs,
    validate,
    values,
    wait_for_spans,
)
from otlp_sink import OtlpSink, Received, check_trace
from prometheus_tools import Prometheus
from waiting import wait_for

pytestmark = pytest.mark.system

CANARY = "canary-7f3a"


def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    return loaded


def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())
    return loaded


# -- what is written ---------------------------------------------------------------------------------------------------


def test_the_manifest_has_the_components_of_the_configuration_and_no_more() -> None:
    for section in ("receivers", "processors", "exporters", "extensions"):
        configured = {name.partition("/")[0].replace("_", "") for name in config()[section]}
        modules = [item["gomod"].split()[0].rpartition("/")[2] for item in manifest()[section]]
        built = {module.removesuffix(section.removesuffix("s")) for module in modules}
        if section == "exporters":  # its module has no transport in its name
            configured = {name.replace("otlpgrpc", "otlp") for name in configured}
        assert configured == built, section


def test_every_module_is_pinned_to_the_version_of_the_collector() -> None:
    version = manifest()["dist"]["version"]
    for section in ("receivers", "processors", "exporters", "extensions"):
        for item in manifest()[section]:
            assert item["gomod"].split()[1] == f"v{version}"
    assert all(re.fullmatch(r"v1\.\d+\.\d+", item["gomod"].split()[1]) for item in manifest()["providers"])


def test_pipelines_use_all_that_is_configured_in_the_right_order() -> None:
    service, used = config()["service"], set()
    for name, pipeline in service["pipelines"].items():
        processors = pipeline["processors"]
        assert processors[0] == "memory_limiter", name
        assert processors[-1] == "batch", name
        used |= {*pipeline["receivers"], *processors, *pipeline["exporters"]}
    traces = service["pipelines"]["traces"]["processors"]
    assert traces.index("resource_detection") < traces.index("redaction")
    assert {"transform/no_messages", "redaction"} <= set(traces)
    configured = {name for section in ("receivers", "processors", "exporters") for name in config()[section]}
    assert used == configured
    assert set(service["extensions"]) == set(config()["extensions"])


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    tree = config()
    own = tree["service"]["telemetry"]["metrics"]["readers"][0]["pull"]["exporter"]["prometheus"]
    listening = [
        value for path, value in pairs({k: tree[k] for k in ("receivers", "extensions")}) if "endpoint" in path
    ]
    listening.append(own["host"])
    assert len(listening) == 4
    for address in listening:
        assert address.startswith("${env:FLIP_COLLECTOR_HOST:-127.0.0.1}"), address


def test_what_waits_is_bounded() -> None:
    for exporter in config()["exporters"].values():
        assert 0 < exporter["sending_queue"]["queue_size"] <= 1000
        assert exporter["retry_on_failure"]["max_elapsed_time"] not in (0, "0", "0s")


def test_it_knows_no_cloud_and_no_metrics() -> None:
    """What finds Prometheus' targets brings the SDK of every cloud: Prometheus scrapes the exporters itself."""
    assert set(config()["service"]["pipelines"]) == {"traces"}
    assert "prometheus" not in MANIFEST.read_text().lower()


def test_the_variables_are_those_that_the_file_explains() -> None:
    text = CONFIG.read_text()
    explained = dict(re.findall(r"^#   (FLIP_\w+) +(\S+)", text, re.MULTILINE))
    used = dict(re.findall(r"\$\{env:(\w+):-(.*?)\}", text))
    assert used == explained


@pytest.mark.parametrize("files", [(CONFIG,), (CONFIG, TLS_CONFIG)], ids=["alone", "with TLS"])
def test_the_collector_accepts_the_configuration(files: tuple[Path, ...], tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("collector")
    told = validate(
        *files,
        FLIP_OTLP_CERT=str(pair.certificate),
        FLIP_OTLP_KEY=str(pair.key),
        FLIP_OTLP_CLIENT_CA=str(authority.certificate),
    )
    assert told.returncode == 0, told.stderr
    assert "deprecated" not in (told.stdout + told.stderr).lower()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("processors", "redaction", "allow_all_keys"), "perhaps"),
        (("service", "pipelines", "traces", "exporters"), ["nowhere"]),
        (("exporters", "otlp_grpc", "no_such_setting"), 1),
    ],
    ids=["type", "unknown exporter", "unknown setting"],
)
def test_the_collector_refuses_a_broken_one(path: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    broken = place = copy.deepcopy(config())
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(broken))
    assert validate(file).returncode != 0


def test_without_go_it_is_said_and_nothing_breaks(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "awk", "sha256sum", "cut", "dirname", "cat"):
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    environment = {"PATH": str(folder), "FLIP_COLLECTOR_CACHE": str(tmp_path / "cache"), "GO": "/nonexistent/go"}

    def build(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "bash"), str(BUILD), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert build().returncode == 1
    told = build("--if-possible")
    assert told.returncode == 0
    assert "no Go" in told.stderr
    assert build("--path").stdout.startswith(str(tmp_path / "cache"))


# -- spans -------------------------------------------------------------------------------------------------------------


class Tee(SpanExporter):
    """Exports, and keeps what it has exported."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter, self.memory = exporter, InMemorySpanExporter()

    def export(self, spans: Any) -> SpanExportResult:
        self.memory.export(spans)
        return self._exporter.export(spans)

    def shutdown(self) -> None:
        self._exporter.shutdown()


def grpc_exporter(collector: Collector) -> SpanExporter:
    return GrpcExporter(endpoint=f"http://127.0.0.1:{collector.grpc_port}", insecure=True)


def http_exporter(collector: Collector) -> SpanExporter:
    return HttpExporter(endpoint=f"http://127.0.0.1:{collector.http_port}/v1/traces")


def play(exporter: SpanExporter, rounds: int, **resource: str) -> list[ReadableSpan]:
    """Spans as a run has them, sent one by one."""
    tee = Tee(exporter)
    attributes: dict[str, Any] = {"service.name": "flip-fl-server", "flip.net_id": "net-1", **resource}
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(tee))
    tracer = provider.get_tracer("flip_observability", "0.1.0")
    with tracer.start_as_current_span("flip.run", attributes={"flip.run_id": "r-1", "flip.model_id": "m-1"}) as run:
        run.add_event("flip.status", {"flip.status": "TRAINING_STARTED"})
        for number in range(1, rounds + 1):
            with tracer.start_as_current_span("flip.round", attributes={"flip.round": number, "flip.total_rounds": 9}):
                task = {"flip.client": "site-1", "flip.task": "train", "flip.return_code": "OK"}
                with tracer.start_as_current_span("flip.client_task", kind=SpanKind.CLIENT, attributes=task):
                    pass
        run.set_status(Status(StatusCode.ERROR))
    provider.shutdown()
    return list(tee.memory.get_finished_spans())


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Collector, TraceStore]]:
    with TraceStore() as store, Collector(trace_store=store.address) as collector:
        yield collector, store


@pytest.mark.parametrize("exporter", [grpc_exporter, http_exporter], ids=["grpc", "http"])
def test_spans_come_out_whole(exporter: Callable[[Collector], SpanExporter]) -> None:
    with TraceStore() as store, Collector(trace_store=store.address) as collector:
        sent = play(exporter(collector), rounds=150)
        assert len(sent) == 301
        came = {span.span_id: span for span in wait_for_spans(store, len(sent))}
        counted = collector.own_metrics()
    assert len(came) == len(store.spans) == len(sent)
    for span in sent:
        context, parent = span.get_span_context(), span.parent
        assert context is not None
        other = came[context.span_id.to_bytes(8, "big")]
        assert other.trace_id == context.trace_id.to_bytes(16, "big")
        assert other.parent_span_id == (parent.span_id.to_bytes(8, "big") if parent else b"")
        assert (other.name, other.kind) == (span.name, span.kind.value + 1)
        assert (other.start_time_unix_nano, other.end_time_unix_nano) == (span.start_time, span.end_time)
        assert values(other.attributes) == dict(span.attributes or {})
        assert other.status.code == span.status.status_code.value
        assert [(event.name, event.time_unix_nano, values(event.attributes)) for event in other.events] == [
            (event.name, event.timestamp, dict(event.attributes or {})) for event in span.events
        ]
    resource = values(store.requests[0].resource_spans[0].resource.attributes)
    assert resource["service.name"] == "flip-fl-server"
    assert resource["flip.net_id"] == "net-1"
    assert resource["host.name"], "what the server did not say, the collector adds"
    assert counted["otelcol_receiver_accepted_spans_total"] == len(sent)
    assert counted["otelcol_exporter_sent_spans_total"] == len(sent)
    assert counted.get("otelcol_receiver_refused_spans_total", 0) == 0


def test_what_a_server_says_of_its_host_stands(traced: tuple[Collector, TraceStore]) -> None:
    collector, store = traced
    before = len(store.spans)
    play(grpc_exporter(collector), 1, **{"host.name": "fl-7"})
    wait_for_spans(store, before + 3)
    assert values(store.requests[-1].resource_spans[0].resource.attributes)["host.name"] == "fl-7"


def test_what_is_not_on_the_list_does_not_come_out(traced: tuple[Collector, TraceStore]) -> None:
    collector, store = traced
    before = len(store.spans)
    exporter = grpc_exporter(collector)
    attributes = {"service.name": "flip-fl-server", "patient.name": CANARY, "process.command_line": CANARY}
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("scope", attributes={"scope.secret": CANARY})
    span = tracer.start_span("flip.run", attributes={"flip.run_id": "r-2", "accession_number": CANARY})
    span.set_attribute("flip.unheard_of", [CANARY, CANARY])
    span.set_attribute("http.request.header.x-internal-service-key", CANARY)
    span.add_event("exception", {"exception.type": "ValueError", "exception.message": CANARY})
    span.add_event("exception", {"exception.stacktrace": CANARY})
    span.set_status(Status(StatusCode.ERROR, f"ValueError: {CANARY}"))
    span.end()
    provider.shutdown()
    wait_for_spans(store, before + 1)
    assert "r-2" in store.text()
    assert CANARY not in store.text()
    assert not {name for name in store.attribute_names() if name.startswith("redaction")}
    came = store.spans[-1]
    assert came.status.code == StatusCode.ERROR.value
    assert [values(event.attributes) for event in came.events] == [{"exception.type": "ValueError"}, {}]


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("http://hub:8000/api/model/1?X-Amz-Signature=0123abcd&a=b", "0123abcd"),
        ("https://user:hunter22@hub.example/api", "hunter22"),
        ("s3://AKIAIOSFODNN7EXAMPLE/x", "AKIAIOSFODNN7EXAMPLE"),
        ("Authorization: Bearer abcdefgh12345678", "abcdefgh12345678"),
        ("-----BEGIN RSA PRIVATE KEY-----", "RSA PRIVATE"),
    ],
    ids=["signed", "password", "key id", "bearer", "private key"],
)
def test_secrets_in_values_are_masked(text: str, secret: str, traced: tuple[Collector, TraceStore]) -> None:
    collector, store = traced
    before = len(store.spans)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(http_exporter(collector)))
    provider.get_tracer("t").start_span("GET", attributes={"url.full": text, "server.address": "hub.example"}).end()
    provider.shutdown()
    wait_for_spans(store, before + 1)
    came = values(store.spans[-1].attributes)
    assert secret not in came["url.full"]
    assert "****" in came["url.full"]
    assert came["server.address"] == "hub.example"


def _attributes(found: Mapping[str, Any]) -> list[KeyValue]:
    kinds = {bool: "bool_value", int: "int_value", float: "double_value", str: "string_value"}
    return [KeyValue(key=key, value=AnyValue(**{kinds[type(value)]: value})) for key, value in found.items()]


def _request(spans: list[Received]) -> ExportTraceServiceRequest:
    """The request that these spans came in."""
    groups: dict[str, ResourceSpans] = {}
    for span in spans:
        resource = groups.setdefault(
            json.dumps(span.resource, sort_keys=True),
            ResourceSpans(resource=ProtoResource(attributes=_attributes(span.resource)), scope_spans=[ScopeSpans()]),
        )
        resource.scope_spans[0].spans.append(
            Span(
                name=span.name,
                trace_id=bytes.fromhex(span.trace_id),
                span_id=bytes.fromhex(span.span_id),
                parent_span_id=bytes.fromhex(span.parent_id),
                kind=span.kind,  # type: ignore[arg-type]
                start_time_unix_nano=span.start,
                end_time_unix_nano=span.end,
                attributes=_attributes(span.attributes),
                status=ProtoStatus(code=span.status, message=span.message),  # type: ignore[arg-type]
                events=[
                    Span.Event(
                        name=event["name"],
                        time_unix_nano=event["time"],
                        attributes=_attributes({k: v for k, v in event.items() if k not in ("name", "time")}),
                    )
                    for event in span.events
                ],
            )
        )
    return ExportTraceServiceRequest(resource_spans=groups.values())


def _send(collector: Collector, request: ExportTraceServiceRequest, protocol: str) -> None:
    if protocol == "grpc":
        with grpc.insecure_channel(f"127.0.0.1:{collector.grpc_port}") as channel:
            TraceServiceStub(channel).Export(request, timeout=10)  # type: ignore[no-untyped-call]
        return
    body = urllib.request.Request(
        f"http://127.0.0.1:{collector.http_port}/v1/traces",
        data=request.SerializeToString(),
        headers={"Content-Type": "application/x-protobuf"},
    )
    with urllib.request.urlopen(body, timeout=10) as answer:
        assert answer.status == 200


def test_spans_of_every_demo_run_come_out_whole(demo_runs: DemoRuns) -> None:
    """What real runs of all scenarios had sent, by gRPC and by HTTP, goes through the collector unharmed."""
    with OtlpSink() as sink, Collector(trace_store=f"127.0.0.1:{sink.port}") as collector:
        for run in demo_runs:
            before = len(sink.spans)
            _send(collector, _request(run.spans), run.protocol)
            wait_for(lambda: len(sink.spans) - before >= len(run.spans), 30, f"the spans of {run.scenario}")  # noqa: B023
            came = sink.spans[before:]
            assert len(came) == len(run.spans) > 20
            own = [span for span in came if span.trace_id == run.run_id.replace("-", "")]
            check_trace(own, run.run_id)
            by_id = {span.span_id: span for span in came}
            for span in run.spans:
                other = by_id[span.span_id]
                assert other.resource.items() >= span.resource.items()
                assert other == dataclasses.replace(span, message="", resource=other.resource)
        counted = collector.own_metrics()
        sent = sum(len(run.spans) for run in demo_runs)
        assert counted["otelcol_receiver_accepted_spans_total"] == sent
        assert counted["otelcol_exporter_sent_spans_total"] == sent


def test_every_attribute_of_the_catalogue_is_let_through() -> None:
    from test_telemetry_docs import ATTRIBUTES

    allowed = set(config()["processors"]["redaction"]["allowed_keys"])
    assert set(ATTRIBUTES) - {"exception.message"} <= allowed
    assert not {"exception.message", "exception.stacktrace"} & allowed
    assert {name for name in allowed if name.startswith("flip.")} <= set(ATTRIBUTES)


def test_a_trace_store_that_is_away_for_a_while_loses_nothing() -> None:
    store = TraceStore()
    with store:
        pass
    with Collector(trace_store=store.address) as collector:
        sent = play(grpc_exporter(collector), rounds=10)
        wait_for(
            lambda: collector.own_metrics().get("otelcol_exporter_queue_size", 0) > 0, 20, "spans wait in the queue"
        )
        with store:
            wait_for_spans(store, len(sent))
    assert len(store.spans) == len(sent)


def test_what_it_holds_is_sent_before_it_ends() -> None:
    # The batch of the repository's own configuration waits a second: SIGTERM comes before.
    with TraceStore() as store, Collector(trace_store=store.address) as collector:
        sent = play(grpc_exporter(collector), rounds=20)
        assert collector.stop() == 0
        assert len(store.spans) == len(sent)


def test_with_tls_only_senders_with_a_certificate_are_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # they would win over what the exporter is told
        monkeypatch.delenv(name, raising=False)
    ours, theirs = Authority(tmp_path), Authority(tmp_path, "stranger")
    server, client, stranger = ours.issue("collector"), ours.issue("fl-server"), theirs.issue("other")
    environment = {
        "FLIP_OTLP_CERT": str(server.certificate),
        "FLIP_OTLP_KEY": str(server.key),
        "FLIP_OTLP_CLIENT_CA": str(ours.certificate),
    }
    with (
        TraceStore() as store,
        Collector(trace_store=store.address, configs=[TLS_CONFIG], environment=environment) as collector,
    ):
        endpoint = f"https://127.0.0.1:{collector.grpc_port}"

        def credentials(pair: Any) -> grpc.ChannelCredentials:
            read = (ours.certificate.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes())
            return grpc.ssl_channel_credentials(*read)

        for bad in (
            GrpcExporter(endpoint=endpoint, credentials=credentials(stranger), timeout=2),
            GrpcExporter(endpoint=endpoint.replace("https", "http"), insecure=True, timeout=2),
        ):
            play(bad, rounds=0)
        plain = urllib.request.Request(f"http://127.0.0.1:{collector.http_port}/v1/traces", data=b"{}")
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(plain, timeout=5)
        assert store.spans == []
        sent = play(GrpcExporter(endpoint=endpoint, credentials=credentials(client)), rounds=2)
        sent += play(
            HttpExporter(
                endpoint=f"https://127.0.0.1:{collector.http_port}/v1/traces",
                certificate_file=str(ours.certificate),
                client_certificate_file=str(client.certificate),
                client_key_file=str(client.key),
            ),
            rounds=2,
        )
        assert len(wait_for_spans(store, len(sent))) == len(sent) == 10


# -- its own telemetry -------------------------------------------------------------------------------------------------


def test_the_health_dashboard_shows_the_collector() -> None:
    """Every query about the collector returns data, at the latest when spans have been lost."""
    board = json.loads((REPOSITORY / "dashboards" / "json" / "flip-health.json").read_text())
    panels = [panel for outer in board["panels"] for panel in (outer, *outer.get("panels", []))]
    queries = [t["expr"] for panel in panels for t in panel.get("targets", []) if "otelcol_" in t.get("expr", "")]
    assert len(queries) >= 6
    with (
        TraceStore() as store,
        Collector(trace_store=store.address) as collector,
        Prometheus([collector.metrics_address], job="otel-collector") as prometheus,
    ):
        play(grpc_exporter(collector), rounds=1)
        wait_for_spans(store, 3)

        def silent() -> list[str]:
            found = [query for query in queries if not prometheus.query(query.replace("$__rate_interval", "1m"))]
            return [query for query in found if not re.search(r"refused|failed", query)]

        wait_for(lambda: not silent(), 30, "data for every query")
        assert prometheus.value('up{job="otel-collector"}') == 1


def test_the_binary_is_of_the_pinned_version() -> None:
    from otel_collector import require

    told = subprocess.run([str(require()), "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert manifest()["dist"]["version"] in told.stdout
    assert os.access(BUILD, os.X_OK)

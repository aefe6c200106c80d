"""Calls of ours as spans, and nobody else's: beside researchers' code, and beside instrumentations of the host."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from botocore.client import BaseClient
from botocore.config import Config
from botocore.endpoint import Endpoint

from flip_observability import client
from flip_observability.client import FLIP
from flip_observability.client_spans import ClientSpans
from flip_observability.constants import FlareEvents, FlipEvents, OwnEvents
from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.recorder import RunIdentity, RunRecorder
from flip_observability.results import ResultsUploadError
from flip_observability.settings import Settings
from flip_observability.tracing import Tracing
from otlp_sink import CLIENT, ERROR, OtlpSink, check_trace

PATIENT = "patient-id-4711"
MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def _no_otel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OTEL_", "AWS_")):
            monkeypatch.delenv(name)


@pytest.fixture(params=["good", "refusing"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedBucket]:
    with EmbeddedBucket(refusing=request.param == "refusing") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / f"{PATIENT}.bin").write_bytes(os.urandom(20 * MIB))
    return folder


@pytest.mark.parametrize("messages", [False, True], ids=["types", "messages"])
def test_an_upload_is_spans_below_its_own(
    messages: bool, bucket: EmbeddedBucket, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = vars(BaseClient)["_make_api_call"], vars(Endpoint)["prepare_request"], requests.Session.send
    with EmbeddedHub() as hub, OtlpSink() as sink:
        for name, value in sink.environment.items():
            monkeypatch.setenv(name, value)
        values = {
            "LOCAL_DEV": False,
            "FLIP_API_INTERNAL_URL": hub.url,
            "INTERNAL_SERVICE_KEY": hub.key,
            "UPLOADED_FEDERATED_DATA_BUCKET": bucket.destination,
            "FLIP_CAPTURE_EXCEPTION_MESSAGES": messages,
        }
        settings = Settings.model_validate(values)
        tracing = Tracing(settings)
        model_id = str(uuid.uuid4())
        identity = RunIdentity(str(uuid.uuid4()), "job-1", model_id)
        recorder = RunRecorder(identity, settings, tmp_path / "ledger", tracing=tracing)
        client.attach(recorder)
        try:
            recorder.record(FlareEvents.START_RUN)
            recorder.record(FlareEvents.ABOUT_TO_END_RUN)
            recorder.record(FlipEvents.RESULTS_UPLOAD_STARTED)
            status = upload(recorder, FLIP(settings=settings), run_dir, model_id)
            researchers_calls(bucket)
            recorder.record(FlareEvents.END_RUN, {"status": status})
            assert recorder.finish(20)
        finally:
            client.detach(recorder)
            recorder.close()
            tracing.close()
        check_trace(sink.spans, identity.run_id)
        upload_span = next(span for span in sink.spans if span.name == "flip.results_upload")
        calls = [span for span in sink.spans if span.kind == CLIENT and span.name.startswith("S3.")]
        assert {span.parent_id for span in calls} == {upload_span.span_id}
        names = [span.name for span in calls]
        if status == "RESULTS_UPLOADED":
            assert names.count("S3.UploadPart") == 3
            assert {"S3.CreateMultipartUpload", "S3.CompleteMultipartUpload", "S3.HeadObject"} <= set(names)
        else:
            assert {span.status for span in calls} == {ERROR}
            assert {span.message.partition(".")[0] for span in calls} == {"botocore"}
            assert ("exception.message" in calls[0].attributes) == messages
            assert ("exception.message" in upload_span.attributes) == messages
        text = repr(sink.spans)
        for canary in (PATIENT, hub.key, bucket.access_key, os.environ["AWS_SECRET_ACCESS_KEY"], "DescribeNothing"):
            assert canary not in text
        assert "S3.ListBuckets" not in names
    assert before == (vars(BaseClient)["_make_api_call"], vars(Endpoint)["prepare_request"], requests.Session.send)


def upload(recorder: RunRecorder, flip: FLIP, run_dir: Path, model_id: str) -> str:
    """What the components do between the events."""
    try:
        receipt = flip.upload_results_to_s3(run_dir, model_id)
    except ResultsUploadError as error:
        attrs: dict[str, Any] = {"reason": error.reason, "exception_type": "ResultsUploadError"}
        if recorder.settings.capture_exception_messages:
            attrs["exception_message"] = recorder.trace.scrubbed(str(error))
        recorder.record(OwnEvents.UPLOAD_FAILED, attrs)
        return "ERROR"
    recorder.record(FlipEvents.RESULTS_UPLOAD_COMPLETED, {"uri": receipt.uri, "bytes": receipt.size, "files": 1})
    return "RESULTS_UPLOADED"


def researchers_calls(bucket: EmbeddedBucket) -> None:
    """Made while a run is traced, by code that is not ours."""
    own = boto3.session.Session().client("s3", config=Config(retries={"total_max_attempts": 1}))
    own.list_buckets()
    requests.get(f"{os.environ['AWS_ENDPOINT_URL_S3']}/{PATIENT}?id={PATIENT}", timeout=5)


_HOST = """
    import os, sys, threading, uuid
    from http.server import BaseHTTPRequestHandler, HTTPServer
    seen = []
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("traceparent")))
            self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
        do_PUT = do_GET
        def log_message(self, *_): pass
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    import requests
    from opentelemetry import trace
    from opentelemetry.instrumentation.botocore import BotocoreInstrumentor
    from opentelemetry.instrumentation.requests import RequestsInstrumentor
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    def host():
        trace.set_tracer_provider(provider)
        RequestsInstrumentor().instrument()
        BotocoreInstrumentor().instrument()
        assert RequestsInstrumentor().is_instrumented_by_opentelemetry
    if WHEN == "before":
        host()
    from flip_observability.hub import HubTransport
    from flip_observability.ledger import Entry, Ledger, OutboxItem
    from flip_observability.settings import Settings
    from flip_observability.tracing import Tracing
    settings = Settings(LOCAL_DEV=False, FLIP_API_INTERNAL_URL=url, INTERNAL_SERVICE_KEY="k")
    tracing = Tracing(settings)
    if WHEN == "after":
        assert tracing.client_spans is not None
        host()
    run_id, model_id = str(uuid.uuid4()), str(uuid.uuid4())
    ledger = Ledger(None)
    ledger.append(Entry(run_id, 1.0, outbox=(OutboxItem(model_id, "status", {"status": "ERROR"}, True),)))
    assert HubTransport(settings, tracing=tracing).send(ledger.outbox()[0]).status == 200
    requests.get(url + "/own", timeout=5)
    tracing.flush(10)
    trace_id = run_id.replace("-", "")
    (_, ours), (_, own) = seen
    assert ours.split("-")[1] == trace_id, ours
    assert own and own.split("-")[1] != trace_id, own
    spans = [(span.name, f"{span.context.trace_id:032x}" == trace_id) for span in kept.get_finished_spans()]
    assert sorted(spans) == EXPECTED, spans
"""


@pytest.mark.parametrize(
    ("when", "expected"),
    [("before", [("GET", False), ("PUT", True)]), ("after", [("GET", False)])],
)
def test_the_hosts_own_instrumentation_stays_as_it_is(when: str, expected: list[tuple[str, bool]]) -> None:
    code = textwrap.dedent(_HOST).replace("WHEN", repr(when)).replace("EXPECTED", repr(expected))
    with OtlpSink() as sink:
        environment = {**os.environ, **sink.environment}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert [span.name for span in sink.spans] == (["PUT"] if when == "after" else [])


def test_headers_are_not_recorded_even_when_the_environment_asks(
    monkeypatch: pytest.MonkeyPatch, make_spans: Callable[[], tuple[ClientSpans, list[Any]]]
) -> None:
    monkeypatch.setenv("OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_CLIENT_REQUEST", ".*")
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "http/dup")
    spans, made = make_spans()
    with EmbeddedHub() as hub, requests.Session() as session, spans.within(str(uuid.uuid4())):
        url = f"{hub.url.replace('http://', 'http://user:pass-word@')}/model/x?patient={PATIENT}#f"
        request = session.prepare_request(requests.Request("GET", url, headers={"X-Internal-Service-Key": "canary"}))
        spans.send(session, request, timeout=5)
        context = contextvars.Context()
        context.run(spans.send, session, request, timeout=5)  # not in a run: no span
    (span,) = made
    text = repr(dict(span.attributes))
    assert "/model/x" in text
    for canary in ("canary", "pass-word", PATIENT, "user-agent", "User-Agent"):
        assert canary not in text


@pytest.fixture
def make_spans() -> Callable[[], tuple[ClientSpans, list[Any]]]:
    def make() -> tuple[ClientSpans, list[Any]]:
        import time

        from opentelemetry.sdk.resources import Resource

        made: list[Any] = []
        return ClientSpans(made.append, resource=Resource.get_empty(), clock=time.time), made

    return make

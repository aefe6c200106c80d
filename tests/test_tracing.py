"""Tracing against a real receiver of OTLP: what arrives, what does not, and what it may cost."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext

from flip_observability import errors, tracing
from flip_observability.client_spans import MAX_ALIKE, Budget, bare_url
from flip_observability.constants import FlareEvents, FlipEvents, OwnEvents
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.hub import HubTransport
from flip_observability.ledger import Entry, Ledger, OutboxItem
from flip_observability.lifecycle import RUN, TABLE, Event, RunState, Scalar, Span, derive_span_id
from flip_observability.recorder import RunIdentity, RunRecorder
from flip_observability.run_trace import complete_trace, complete_traces
from flip_observability.settings import Settings
from flip_observability.tracing import RunTags, Tracing, root_span_id, trace_id_of
from history import Run
from otlp_sink import CLIENT, ERROR, OtlpSink, check_trace
from waiting import wait_for

PROTOCOLS = ["grpc", "http/protobuf"]
KEY = "canary-service-key"
PATIENT = "patient-id-4711"


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tracing]]:
    made: list[Tracing] = []

    def build(environment: dict[str, str] | None = None, **values: Any) -> Tracing:
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        made.append(Tracing(Settings.model_validate({"NET_ID": "net-1"} | values)))
        return made[-1]

    yield build
    for item in made:
        item.close(0.5)


def span(run_id: str, name: str = RUN, key: str = RUN, **values: Any) -> Span:
    parent = None if name == RUN else root_span_id(run_id)
    return Span(name, derive_span_id(run_id, key), parent, 1_000.25, 1_002.5, {}, **values)


# -- what arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_spans_arrive_as_they_were_folded(protocol: str, make: Callable[..., Tracing]) -> None:
    run_id = str(uuid.uuid4())
    tags = RunTags(run_id, "job-1", "model-1", "net-1")
    with OtlpSink(protocol) as sink:
        made = make(sink.environment | {"OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=imaging"})
        child = span(
            run_id, "flip.round", "a", events=(("abort", 1_001.0, {"flip.client": "site-1"}),), error="EXECUTION"
        )
        made.submit(tags, [child])
        made.submit(tags, [span(run_id)])
        assert made.flush(20)
        root = check_trace(sink.spans, run_id)
        assert (root.start, root.end) == (1_000_250_000_000, 1_002_500_000_000)
        assert root.attributes == {
            "flip.run_id": run_id,
            "flip.model_id": "model-1",
            "flip.job_id": "job-1",
            "flip.net_id": "net-1",
        }
        assert root.resource["service.name"] == "flip-fl-server"
        assert root.resource["flip.net_id"] == "net-1"
        assert root.resource["service.version"]
        first = next(item for item in sink.spans if item.name == "flip.round")
        assert (first.status, first.message, first.attributes["exception.type"]) == (ERROR, "EXECUTION", "EXECUTION")
        assert first.attributes["flip.run_id"] == run_id
        assert first.events == [{"name": "abort", "time": 1_001_000_000_000, "flip.client": "site-1"}]
        assert sink.headers[0]["x-tenant"] == "imaging"


def test_the_environment_names_the_service(make: Callable[..., Tracing]) -> None:
    with OtlpSink() as sink:
        environment = {
            "OTEL_SERVICE_NAME": "ours",
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test,service.name=x",
        }
        made = make(sink.environment | environment)
        run_id = str(uuid.uuid4())
        made.submit(RunTags(run_id), [span(run_id)])
        assert made.flush(20)
        resource = sink.spans[0].resource
        assert (resource["service.name"], resource["deployment.environment"]) == ("ours", "test")


def test_the_variables_for_traces_come_first(make: Callable[..., Tracing]) -> None:
    with OtlpSink("http/protobuf") as sink:
        make(
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{sink.port}/v1/traces",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            }
        ).submit(RunTags(run_id := str(uuid.uuid4())), [span(run_id)])
        assert sink.wait_for(RUN)


def test_what_cannot_be_encoded_does_not_cost_its_batch(make: Callable[..., Tracing]) -> None:
    run_id = str(uuid.uuid4())
    with OtlpSink() as sink:
        made = make(sink.environment)
        odd: dict[str, Scalar] = {
            "flip.client": "half \ud800 a character",
            "flip.round": 2**80,
            "flip.task": "x" * 10_000,
        }
        made.submit(RunTags(run_id), [Span("flip.round", 5, root_span_id(run_id), 1.0, 2.0, odd, error="\udfff")])
        made.submit(RunTags(run_id), [span(run_id)])
        assert made.flush(20)
        assert {item.name for item in sink.spans} == {"flip.round", RUN}
    assert errors.drain() == {}


def test_many_threads_lose_nothing(make: Callable[..., Tracing]) -> None:
    run_id = str(uuid.uuid4())
    with OtlpSink() as sink:
        made = make(sink.environment)

        def work(number: int) -> None:
            for index in range(100):
                made.submit(RunTags(run_id), [span(run_id, "flip.client_task", f"{number}-{index}")])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made.flush(20)
        assert len({item.span_id for item in sink.spans}) == len(sink.spans) == 1_600


# -- off ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "True"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_SAMPLER": "always_off"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": "otlp"},
    ],
    ids=["nothing", "blank", "disabled", "always-off", "no-exporter", "no-endpoint"],
)
def test_without_somewhere_to_export_to_nothing_happens(
    environment: dict[str, str], make: Callable[..., Tracing], caplog: pytest.LogCaptureFixture
) -> None:
    before = threading.active_count()
    made = make(environment)
    run_id = str(uuid.uuid4())
    made.submit(RunTags(run_id), [span(run_id)])
    assert not made.enabled
    assert made.client_spans is None
    assert made.flush(0)
    assert not made.export_now(RunTags(run_id), [span(run_id)])
    assert threading.active_count() == before
    assert caplog.records == []
    assert errors.drain() == {}


def test_nothing_of_opentelemetry_is_imported_without_an_endpoint(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from flip_observability.recorder import RunIdentity, RunRecorder
        from flip_observability.settings import Settings
        recorder = RunRecorder(RunIdentity("00000000-0000-4000-8000-000000000001"), Settings.load(), Path(sys.argv[1]))
        recorder.record("_start_run"); recorder.record("_about_to_end_run")
        recorder.record("_end_run", {"status": "ERROR"}); recorder.finish(1); recorder.close()
        assert not [name for name in sys.modules if name.partition(".")[0] in ("opentelemetry", "grpc")]
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "OpenTelemetry" not in done.stderr


# -- the collector is ill ----------------------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("fault", ["bad", "refuse", "hang", "closed", "scheme", "no-scheme"])
def test_a_collector_that_is_ill_costs_nothing_and_is_counted(
    protocol: str, fault: str, make: Callable[..., Tracing], caplog: pytest.LogCaptureFixture
) -> None:
    secret = "user:canary-of-collector"
    places = {
        "closed": f"http://{secret}@127.0.0.1:{closed_port()}",
        "scheme": "ftp://127.0.0.1:1",
        "no-scheme": f"127.0.0.1:{closed_port()}",
    }
    with OtlpSink(protocol, fault) as sink:
        environment = sink.environment | {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
        if fault in places:
            environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = places[fault]
        made = make(environment)
        run_id = str(uuid.uuid4())
        told: list[tuple[str, bool]] = []
        for number in range(3):
            event = Event("x", 1.0)
            made.submit(
                RunTags(run_id), [span(run_id, "flip.round", str(number))], event.uid, lambda *a: told.append(a)
            )
            made.flush(0.2)
        wait_for(lambda: len(told) >= 3)
        assert not any(accepted for _, accepted in told)
        counted = errors.drain()
        assert set(counted) == {"tracing"}
        assert 1 <= counted["tracing"] <= 3
        assert sink.spans == []
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {record.name for record in lines} == {"flip_observability"}
    assert len(lines) == len({record.getMessage() for record in lines}) <= 2  # once a kind, not once a batch
    assert "canary" not in caplog.text
    assert "127.0.0.1" not in caplog.text


def test_other_users_of_the_sdk_are_not_muted(make: Callable[..., Tracing], caplog: pytest.LogCaptureFixture) -> None:
    with OtlpSink("grpc", "bad") as sink:
        made = make(sink.environment)
        run_id = str(uuid.uuid4())
        made.submit(RunTags(run_id), [span(run_id)])
        made.flush(20)
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=f"http://127.0.0.1:{sink.port}")
        context = SpanContext(1, 2, is_remote=False)
        exporter.export([ReadableSpan("other", context)])
        exporter.shutdown()
    assert [record.name for record in caplog.records if record.name.startswith("opentelemetry.")]


def test_the_queue_is_bounded_and_what_is_dropped_is_counted(make: Callable[..., Tracing]) -> None:
    with OtlpSink("grpc", "hang") as sink:
        made = make(sink.environment | {"OTEL_BSP_MAX_QUEUE_SIZE": "10", "OTEL_EXPORTER_OTLP_TIMEOUT": "30"})
        run_id = str(uuid.uuid4())
        assert made._ready.wait(20)
        fates: list[bool] = []
        for number in range(50):
            made.submit(
                RunTags(run_id),
                [span(run_id, "flip.round", str(number))],
                str(number),
                lambda _, accepted: fates.append(accepted),
            )
        assert fates == [False] * 40
        assert errors.drain() == {"tracing": 40}
        begun = time.monotonic()
        assert not made.flush(0.3)
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon", "TracingError"),
        ("OTEL_TRACES_EXPORTER", "nobody", "TracingError"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/does/not/exist", ""),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-5", "BadSetting"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "many", "BadSetting"),
    ],
)
def test_what_cannot_be_set_up_is_said_once(
    name: str, value: str, kind: str, make: Callable[..., Tracing], caplog: pytest.LogCaptureFixture
) -> None:
    made = make({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1", name: value})
    run_id = str(uuid.uuid4())
    made.submit(RunTags(run_id), [span(run_id)])
    made.flush(5)
    wait_for(lambda: caplog.records)
    assert {record.name for record in caplog.records} == {"flip_observability"}
    assert kind in caplog.text
    assert value not in caplog.text


def test_headers_that_cannot_be_read_are_not_logged(
    make: Callable[..., Tracing], caplog: pytest.LogCaptureFixture
) -> None:
    with OtlpSink("http/protobuf") as sink:
        made = make(sink.environment | {"OTEL_EXPORTER_OTLP_HEADERS": "canary-token-without-a-name"})
        made._ready.wait(20)
    assert "canary" not in caplog.text


# -- the host's own provider -------------------------------------------------------------------------------------------


def in_a_process(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_HOST = """
    import uuid, sys
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
    kept = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource.create({"service.name": "host"}), sampler=SAMPLER)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    from flip_observability.lifecycle import Span
    from flip_observability.settings import Settings
    from flip_observability.tracing import RunTags, Tracing, root_span_id
    run_id = str(uuid.uuid4())
    tracing = Tracing(Settings.load())
    tracing.submit(RunTags(run_id), [Span("flip.run", root_span_id(run_id), None, 1.0, 2.0, {})])
    tracing.flush(10)
    tracing.close()
    assert trace.get_tracer_provider() is provider
    with trace.get_tracer("host").start_as_current_span("own"):
        pass
    for span in kept.get_finished_spans():
        ours = f"{span.context.trace_id:032x}" == run_id.replace("-", "")
        print(span.name, span.resource.attributes["service.name"], ours)
"""


def test_a_provider_that_the_host_has_is_used_and_never_shut_down() -> None:
    with OtlpSink() as sink:
        out = in_a_process(_HOST.replace("SAMPLER", "ALWAYS_ON"), sink.environment)
        assert sink.batches == 0
    assert out.splitlines() == ["flip.run host True", "own host False"]


def test_a_host_that_samples_nothing_gets_nothing() -> None:
    assert in_a_process(_HOST.replace("SAMPLER", "ALWAYS_OFF"), {}) == ""


# -- a recorded run ----------------------------------------------------------------------------------------------------


def start(hub: EmbeddedHub, directory: Path, made: Tracing, **values: Any) -> RunRecorder:
    loaded = Settings.model_validate(
        {"LOCAL_DEV": False, "FLIP_API_INTERNAL_URL": hub.url, "INTERNAL_SERVICE_KEY": hub.key} | values
    )
    run_id, model_id = str(uuid.uuid4()), str(uuid.uuid4())
    return RunRecorder(RunIdentity(run_id, "job-1", model_id, "net-1"), loaded, directory, tracing=made)


def train(recorder: RunRecorder) -> None:
    recorder.record(FlareEvents.START_RUN)
    recorder.record(FlipEvents.TRAINING_INITIATED)
    recorder.record(FlareEvents.START_WORKFLOW, {"workflow": "fedavg"})
    recorder.record(FlareEvents.TRAINING_STARTED)
    recorder.record(FlareEvents.ROUND_STARTED, {"round": 1, "total_rounds": 1})
    task = {"client": "site-1", "task": "train", "task_id": "t"}
    recorder.record(FlareEvents.AFTER_TASK_DATA_FILTER, task)
    recorder.record(FlareEvents.BEFORE_PROCESS_SUBMISSION, task | {"return_code": "OK"})


def end(recorder: RunRecorder, status: str = "RESULTS_UPLOADED", seconds: float = 20.0) -> bool:
    recorder.record(FlareEvents.ABOUT_TO_END_RUN)
    recorder.record(FlareEvents.END_RUN, {"status": status})
    return recorder.finish(seconds)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_run_is_one_trace_with_the_hubs_calls_in_it(
    protocol: str, make: Callable[..., Tracing], tmp_path: Path
) -> None:
    with EmbeddedHub() as hub, OtlpSink(protocol) as sink:
        made = make(sink.environment)
        recorder = start(hub, tmp_path, made)
        train(recorder)
        requests.get(f"{hub.url}/{PATIENT}?key={KEY}", timeout=5)  # a researcher's own call
        assert end(recorder)
        recorder.close()
        run_id = recorder.identity.run_id
        root = check_trace(sink.spans, run_id)
        assert root.attributes["flip.status"] == "RESULTS_UPLOADED"
        calls = [item for item in sink.spans if item.kind == CLIENT]
        assert max(call.end for call in calls) <= root.end  # the final status was delivered within the run
        told = [record for record in hub.records if record.kind == "status"]
        assert calls
        assert len(calls) == len(told)
        assert {call.parent_id for call in calls} == {f"{root_span_id(run_id):016x}"}
        assert all(set(call.attributes) & {"http.url", "url.full"} for call in calls)
        assert {record.headers["traceparent"].split("-")[1] for record in told} == {f"{trace_id_of(run_id):032x}"}
        assert {record.headers["traceparent"].split("-")[2] for record in told} == {call.span_id for call in calls}
        text = repr(sink.spans)
        assert PATIENT not in text
        assert KEY not in text
        assert hub.key not in text
        with Ledger(tmp_path) as ledger:
            run = ledger.run(run_id)
            assert run is not None
            assert run["root_claimed"]
            assert complete_traces(ledger, made) == 0
        assert len(sink.wait_for(RUN)) == 1


def test_a_collector_that_hangs_does_not_hold_the_end_up(make: Callable[..., Tracing], tmp_path: Path) -> None:
    with EmbeddedHub() as hub, OtlpSink("grpc", "hang") as sink:
        recorder = start(hub, tmp_path, make(sink.environment))
        train(recorder)
        begun = time.monotonic()
        assert end(recorder, seconds=3.0)
        assert time.monotonic() - begun < 6.0
        assert hub.statuses(recorder.identity.model_id or "")[-1] == "RESULTS_UPLOADED"
        recorder.close()


def test_an_end_without_a_final_status_leaves_the_root_to_the_observer(
    make: Callable[..., Tracing], tmp_path: Path
) -> None:
    with EmbeddedHub() as hub, OtlpSink() as sink:
        made = make(sink.environment)
        recorder = start(hub, tmp_path, made)
        train(recorder)
        recorder.record(FlareEvents.ABOUT_TO_END_RUN, {"aborted": True})
        recorder.record(FlareEvents.END_RUN)
        recorder.finish(5.0)
        recorder._note_spans(recorder._ledger)  # type: ignore[arg-type]  # what the writer does every second
        recorder.close()
        run_id = recorder.identity.run_id
        assert RUN not in {item.name for item in sink.spans}
        with Ledger(tmp_path) as ledger:
            final = Event(OwnEvents.FINAL_STATUS.value, time.time(), {"status": "STOPPED"})
            ledger.append(Entry(run_id, final.time, final, final_status="STOPPED", final_by="sentinel"))
            assert complete_traces(ledger, made, is_gone=lambda _: False) == 0
            assert complete_traces(ledger, made, is_gone=lambda _: True) == 1
            assert complete_traces(ledger, made, is_gone=lambda _: True) == 0
        assert check_trace(sink.spans, run_id).attributes["flip.status"] == "STOPPED"


def test_what_follows_a_refused_batch_is_not_taken_for_complete(make: Callable[..., Tracing], tmp_path: Path) -> None:
    with EmbeddedHub() as hub, OtlpSink() as sink:
        made = make(sink.environment)
        recorder = start(hub, tmp_path, made)
        recorder.record(FlareEvents.START_RUN)
        recorder.record(FlipEvents.TRAINING_INITIATED)
        assert made.flush(20)
        before = recorder.trace._accepted
        assert before is not None
        sink.fault = "bad"
        recorder.record(FlareEvents.INITIAL_MODEL_LOADED)
        assert made.flush(20)
        sink.fault = ""
        recorder.record(FlipEvents.TASK_INITIATED)
        assert made.flush(20)
        assert recorder.trace._accepted == before
        recorder._note_spans(recorder._ledger)  # type: ignore[arg-type]  # what the writer does every second
        recorder.close()
        run_id = recorder.identity.run_id
        with Ledger(tmp_path) as ledger:
            final = Event(OwnEvents.FINAL_STATUS.value, time.time(), {"status": "ERROR"})
            ledger.append(Entry(run_id, final.time, final, final_status="ERROR", final_by="sentinel"))
            assert complete_trace(ledger, run_id, made)
        names = [item.name for item in sink.spans if item.kind != CLIENT]
        # The one behind the hole comes twice, with the same id: better than a trace with a hole.
        assert sorted(names) == [
            "flip.initial_model_loaded",
            "flip.run",
            "flip.task_initiated",
            "flip.task_initiated",
            "flip.training_initiated",
        ]


def test_with_a_broken_ledger_the_root_is_exported_once(make: Callable[..., Tracing], tmp_path: Path) -> None:
    directory = tmp_path / "ledger"
    directory.write_text("in the way")
    with EmbeddedHub() as hub, OtlpSink() as sink:
        made = make(sink.environment)
        recorder = start(hub, directory, made)
        train(recorder)
        assert not recorder.ledger_writable
        assert end(recorder)
        assert len(sink.wait_for(RUN)) == 1
        directory.unlink()
        wait_for(lambda: recorder.ledger_writable)
        recorder.close()
        check_trace(sink.spans, recorder.identity.run_id)
        with Ledger(directory) as ledger:
            assert complete_traces(ledger, made, is_gone=lambda _: True) == 0


def test_a_run_that_was_not_traced_is_left_alone_later(make: Callable[..., Tracing], tmp_path: Path) -> None:
    with EmbeddedHub() as hub, OtlpSink() as sink:
        recorder = start(hub, tmp_path, make())
        train(recorder)
        assert end(recorder)
        recorder.close()
        with Ledger(tmp_path) as ledger:
            assert complete_traces(ledger, make(sink.environment), is_gone=lambda _: True) == 0
        assert sink.batches == 0


_VICTIM = """
    import os, signal, sys, time
    from pathlib import Path
    from flip_observability.recorder import RunIdentity, RunRecorder
    from flip_observability.settings import Settings
    recorder = RunRecorder(RunIdentity(sys.argv[1], "job-1", sys.argv[2]), Settings.load(), Path(sys.argv[3]))
    recorder.record("_start_run")
    recorder.record("_start_workflow", {"workflow": "fedavg"})
    for number in range(1, 5):
        recorder.record("_round_started", {"round": number, "total_rounds": 9})
        if number == 3:
            assert recorder.trace._tracing.flush(30)
            deadline = time.monotonic() + 30
            while recorder._ledger.run(sys.argv[1])["spans_accepted"] is None and time.monotonic() < deadline:
                time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_exported_once(make: Callable[..., Tracing], tmp_path: Path) -> None:
    run_id, model_id = str(uuid.uuid4()), str(uuid.uuid4())
    with OtlpSink() as sink:
        command = [sys.executable, "-c", textwrap.dedent(_VICTIM), run_id, model_id, str(tmp_path)]
        environment = {**os.environ, **sink.environment, "OTEL_BSP_SCHEDULE_DELAY": "60000", "LOCAL_DEV": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == -9, done.stderr
        assert [item.attributes["flip.round"] for item in sink.spans] == [1, 2]  # the third died with it
        made = make(sink.environment)
        with Ledger(tmp_path) as ledger:
            run = ledger.run(run_id)
            assert run is not None
            died = run["last_event"] + 0.001
            orphaned = Event(OwnEvents.ORPHANED.value, died + 100, {"died": died})
            ledger.append(Entry(run_id, orphaned.time, orphaned))
            final = Event(OwnEvents.FINAL_STATUS.value, died + 200, {"status": "ERROR"})
            ledger.append(Entry(run_id, final.time, final, final_status="ERROR", final_by="sentinel"))
            results: list[int] = []
            threads = [threading.Thread(target=lambda: results.append(complete_traces(ledger, made))) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert sorted(results) == [0, 0, 0, 1]
        root = check_trace(sink.spans, run_id)
        rounds = {item.attributes["flip.round"]: item for item in sink.spans if item.name == "flip.round"}
        assert sorted(rounds) == [1, 2, 3, 4]
        assert (rounds[3].status, rounds[4].status) == (0, ERROR)
        assert rounds[4].message == root.message == "ORPHANED"
        assert rounds[4].end == pytest.approx(died * 1e9, abs=1_000)
        assert root.end == pytest.approx((died + 200) * 1e9, abs=1_000)
        assert {event["name"] for event in root.events} == {"orphaned"}


def test_what_the_collector_refuses_is_tried_again(make: Callable[..., Tracing], tmp_path: Path) -> None:
    with OtlpSink("grpc", "bad") as sink, Ledger(tmp_path) as ledger:
        made = make(sink.environment)
        run = Run(ledger, tells_hub=False)
        run.train({"site-1": 2.0})
        run.finish("ERROR")
        assert not complete_trace(ledger, run.run_id, made)
        sink.fault = ""
        assert complete_traces(ledger, made, is_gone=lambda _: True) == 1
        check_trace(sink.spans, run.run_id)


def test_a_long_history_is_completed_in_pieces(
    make: Callable[..., Tracing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flip_observability.run_trace.MAX_BATCH", 7)
    monkeypatch.setattr("flip_observability.run_trace.PAGE", 5)
    with OtlpSink() as sink, Ledger(tmp_path) as ledger:
        run = Run(ledger, tells_hub=False)
        run.train({"site-1": 2.0, "site-2": 3.0}, rounds=20)
        run.finish()
        assert complete_trace(ledger, run.run_id, make(sink.environment))
        assert sink.batches > 5
        check_trace(sink.spans, run.run_id)


def test_late_messages_belong_to_the_run(make: Callable[..., Tracing], tmp_path: Path) -> None:
    run_id, model_id = str(uuid.uuid4()), str(uuid.uuid4())
    with EmbeddedHub() as hub, OtlpSink() as sink, Ledger(tmp_path) as ledger:
        made = make(sink.environment)
        loaded = Settings.model_validate(
            {"LOCAL_DEV": False, "FLIP_API_INTERNAL_URL": hub.url, "INTERNAL_SERVICE_KEY": hub.key}
        )
        transport = HubTransport(loaded, tracing=made)
        ledger.append(Entry(run_id, 1.0, outbox=(OutboxItem(model_id, "status", {"status": "ERROR"}, True),)))
        ledger.append(Entry(None, 1.0, outbox=(OutboxItem(model_id, "log", {"client": None, "log": PATIENT}),)))
        for row in ledger.outbox():
            assert transport.send(row).status == 200
        assert made.flush(20)
        (call,) = sink.spans  # what belongs to no run is no span
        assert (call.trace_id, call.parent_id) == (run_id.replace("-", ""), f"{root_span_id(run_id):016x}")
        assert ["traceparent" in record.headers for record in hub.records] == [True, False]


def test_vain_calls_are_spans_without_messages_and_not_for_ever(make: Callable[..., Tracing], tmp_path: Path) -> None:
    run_id, model_id = str(uuid.uuid4()), str(uuid.uuid4())
    for messages in (False, True):
        with OtlpSink() as sink, Ledger(None) as ledger:
            made = make(sink.environment, FLIP_CAPTURE_EXCEPTION_MESSAGES=messages, INTERNAL_SERVICE_KEY=KEY)
            loaded = Settings.model_validate(
                {
                    "LOCAL_DEV": False,
                    "FLIP_API_INTERNAL_URL": f"http://127.0.0.1:{closed_port()}/{KEY}",
                    "INTERNAL_SERVICE_KEY": KEY,
                }
            )
            transport = HubTransport(loaded, tracing=made)
            ledger.append(Entry(run_id, 1.0, outbox=(OutboxItem(model_id, "status", {"status": "ERROR"}, True),)))
            row = ledger.outbox()[0]
            assert transport.send(row).status is None
            assert transport.send(type(row)(**vars(row) | {"attempts": 10})).status is None
            assert made.flush(20)
            (call,) = sink.spans
            assert (call.status, call.message) == (ERROR, call.attributes["exception.type"])
            assert call.attributes["exception.type"].endswith("ConnectionError")
            assert ("exception.message" in call.attributes) == messages
            assert ("exception.stacktrace" in call.attributes) == messages
            assert call.events == []
            assert KEY not in repr(sink.spans)


# -- log records -------------------------------------------------------------------------------------------------------


def test_log_records_carry_the_runs_ids(make: Callable[..., Tracing], tmp_path: Path) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment,method-assign]
    log = logging.getLogger("somebody.else")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    before = logging.getLogRecordFactory()
    try:
        with EmbeddedHub() as hub:
            recorder = start(hub, tmp_path, make())
            run_id = recorder.identity.run_id
            log.info("before")
            recorder.record(FlareEvents.START_RUN)
            log.info("run")
            effects = recorder.record(FlareEvents.ROUND_STARTED, {"round": 1})
            log.info("round %s", effects)
            end(recorder)
            recorder.close()
            log.info("after")
    finally:
        log.removeHandler(handler)
        logging.setLogRecordFactory(before)
    ids = [(vars(record)["otelTraceID"], vars(record)["otelSpanID"]) for record in records]
    trace_id = run_id.replace("-", "")
    assert ids[0] == ids[3] == ("0", "0")
    assert ids[1] == (trace_id, f"{root_span_id(run_id):016x}")
    assert ids[2][0] == trace_id
    assert ids[2][1] != ids[1][1]
    assert vars(records[1])["otelServiceName"] == "flip-fl-server"


# -- any history -------------------------------------------------------------------------------------------------------

_EVENTS = st.lists(
    st.tuples(
        st.sampled_from(sorted(TABLE)),
        st.fixed_dictionaries(
            {},
            optional={
                "workflow": st.sampled_from(["a", "b"]),
                "client": st.sampled_from(["site-1", "site-2"]),
                "task": st.just("train"),
                "task_id": st.sampled_from(["1", "2", "3"]),
                "round": st.integers(1, 3),
                "status": st.sampled_from(["ERROR", "STOPPED", "RUNNING"]),
                "aborted": st.booleans(),
                "died": st.floats(900, 1_100),
            },
        ),
        st.floats(-1, 5),
    ),
    max_size=60,
)


class _Collected:
    """Stands where the collector's side of tracing is, to see whole histories at once."""

    enabled = True

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def export_now(self, tags: RunTags, spans: list[Span]) -> bool:
        self.spans += spans
        return True


@settings(max_examples=150, deadline=None)
@given(events=_EVENTS, split=st.integers(0, 60))
def test_whatever_happens_the_trace_is_connected_and_exported_once(
    events: list[tuple[str, dict[str, Any], float]], split: int
) -> None:
    """The first part is exported by the run's own process, which then dies; the rest by the observer."""
    run_id, now = str(uuid.UUID(int=7)), 1_000.0
    state, exported = RunState(run_id), list[Span]()
    collected: Any = _Collected()
    with Ledger(None) as ledger:
        for number, (name, attrs, step) in enumerate(events):
            now += step
            event = Event(name, now, attrs, f"e{number}")
            spans = state.apply(event).spans
            columns = {}
            if number < split:
                exported += [item for item in spans if item.name != RUN]
                columns = {"spans_accepted": event.uid}
            ledger.append(Entry(run_id, now, event, run=columns))
        ledger.append(Entry(run_id, now, final_status="ERROR", final_by="sentinel"))
        if not events:
            return
        assert complete_trace(ledger, run_id, collected)
        assert not complete_trace(ledger, run_id, collected)
    whole = [*exported, *collected.spans]
    by_id = {item.span_id: item for item in whole}
    assert len(by_id) == len(whole)
    assert [item.name for item in whole if item.parent_id is None] == [RUN]
    for item in whole:
        assert item.start <= item.end
        if item.parent_id is not None:
            parent = by_id[item.parent_id]
            assert parent.start <= item.start
            assert item.end <= parent.end


# -- small things ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "bare"),
    [
        ("https://user:secret@hub/api/model?token=1#x", "https://hub/api/model"),
        ("http://127.0.0.1:80/a", "http://127.0.0.1:80/a"),
        ("http://[broken", ""),
    ],
)
def test_urls_are_bare(url: str, bare: str) -> None:
    assert bare_url(url) == bare


def test_a_budget_is_spent_by_name_and_outcome() -> None:
    budget = Budget(good=1, bad=2)
    assert [budget.spend("a", False), budget.spend("a", False), budget.spend("b", False)] == [True, False, True]
    assert [budget.spend("a", True) for _ in range(3)] == [True, True, False]
    assert MAX_ALIKE > 10


def test_one_process_has_one_tracing(make: Callable[..., Tracing]) -> None:
    assert tracing.shared(Settings.load()) is tracing.shared(Settings.load())

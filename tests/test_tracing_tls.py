"""Spans over TLS, by the standard variables that docs/deployment.md names, and what a wrong certificate costs."""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority
from flip_observability import errors
from flip_observability.lifecycle import RUN, Span, derive_span_id
from flip_observability.settings import Settings
from flip_observability.tracing import RunTags, Tracing
from otlp_sink import OtlpSink, check_trace

PROTOCOLS = ["grpc", "http/protobuf"]
PREFIX = "OTEL_EXPORTER_OTLP_"
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "deployment.md"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[str, bool]]]:
    """Export a span as the variables say. Gives the run's id, and whether everything could be handed over in time."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        # requests takes its own variables for more than what the exporter's session was told.
        monkeypatch.delenv(name, raising=False)
    for thread in threading.enumerate():
        # Of tests before, whose collectors do not answer: what they lose is counted in this process, too.
        if thread.name.startswith(("flip-tracing", "Otel")):
            thread.join(30)
    errors.drain()
    errors._logged.clear()
    made: list[Tracing] = []

    def run(environment: dict[str, str], seconds: float = 20.0) -> tuple[str, bool]:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        run_id = str(uuid.uuid4())
        made.append(Tracing(Settings.model_validate({"NET_ID": "net-1"})))
        made[-1].submit(RunTags(run_id), [Span(RUN, derive_span_id(run_id, RUN), None, 1_000.25, 1_002.5, {})])
        return run_id, made[-1].flush(seconds)

    yield run
    for item in made:
        item.close(10)


def trusting(authority: Authority) -> dict[str, str]:
    return {f"{PREFIX}CERTIFICATE": str(authority.certificate)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_spans_arrive_over_tls(protocol: str, authority: Authority, export: Callable[..., Any]) -> None:
    with OtlpSink(protocol, pair=authority.issue("collector")) as sink:
        run_id, done = export(sink.environment | trusting(authority))
        assert sink.environment[f"{PREFIX}ENDPOINT"].startswith("https://")
        assert done
        check_trace(sink.wait_for(RUN), run_id)
    assert errors.drain() == {}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_collector_that_wants_to_know_its_senders(
    protocol: str, authority: Authority, export: Callable[..., Any]
) -> None:
    ours = authority.issue("server")
    shown = {f"{PREFIX}CLIENT_CERTIFICATE": str(ours.certificate), f"{PREFIX}CLIENT_KEY": str(ours.key)}
    with OtlpSink(protocol, pair=authority.issue("collector"), client_ca=authority.certificate) as sink:
        run_id, _ = export(sink.environment | trusting(authority) | shown)
        check_trace(sink.wait_for(RUN), run_id)
    assert errors.drain() == {}


def wrong(kind: str, ours: Authority, stranger: Authority) -> dict[str, str]:
    return {
        "a stranger's authority": trusting(stranger),
        "no certificate of ours": trusting(ours),
        "the system's authorities": {},
        "a file that is not there": {f"{PREFIX}CERTIFICATE": "/nowhere/authority.pem"},
    }[kind]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "kind",
    ["a stranger's authority", "no certificate of ours", "the system's authorities", "a file that is not there"],
)
def test_a_wrong_certificate_costs_the_run_nothing_and_is_counted(
    kind: str,
    protocol: str,
    authority: Authority,
    stranger: Authority,
    export: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(f"{PREFIX}TIMEOUT", "1")
    monkeypatch.setenv(f"{PREFIX}HEADERS", "authorization=canary-of-a-header")
    with OtlpSink(protocol, pair=authority.issue("collector"), client_ca=authority.certificate) as sink:
        export(sink.environment | wrong(kind, authority, stranger))  # raises nothing
        assert sink.spans == []
    assert errors.drain()["tracing"] >= 1
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {record.name for record in said} == {"flip_observability"}
    assert not re.search("canary|pem|Traceback", caplog.text)


def test_the_guide_names_these_variables() -> None:
    text = DOCUMENT.read_text(encoding="utf-8").partition("### Traces over TLS")[2].partition("\n## ")[0]
    named = set(re.findall(r"export (OTEL_\w+)=", text))
    names = ("ENDPOINT", "PROTOCOL", "CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")
    assert named == {f"{PREFIX}{name}" for name in names}

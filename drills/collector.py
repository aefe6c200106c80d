"""The collector of the traces is down, hangs, or refuses: a run neither waits for it nor fails."""

from __future__ import annotations

import contextlib
import functools
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from drills.deaths import UPLOADED
from drills.judge import Drill, Run
from drills.stage import Stage
from fault_server import FaultServer
from otlp_sink import OtlpSink

GROUP = "collector"
PROTOCOLS = ("grpc", "http/protobuf")
LEAST_SPANS = 10


@contextlib.contextmanager
def _down(_: str) -> Iterator[int]:
    with socket.socket() as reserved:  # bound, and nobody listens
        reserved.bind(("127.0.0.1", 0))
        yield int(reserved.getsockname()[1])


@contextlib.contextmanager
def _silent(_: str) -> Iterator[int]:
    with FaultServer(lambda connection, _: _read_for_ever(connection), raw=True) as server:
        yield server.port


def _read_for_ever(connection: socket.socket) -> None:
    while connection.recv(65_536):
        pass


@contextlib.contextmanager
def _bad(fault: str, protocol: str) -> Iterator[int]:
    with OtlpSink(protocol, fault) as sink:
        yield sink.port


def _without_traces(stage: Stage, collector: Callable[[str], contextlib.AbstractContextManager[int]]) -> Sequence[Run]:
    runs, longest = [], 0.0
    for protocol in PROTOCOLS:
        with collector(protocol) as port:
            variables = {
                "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
                "OTEL_EXPORTER_OTLP_HEADERS": "authorization=" + "a-token-that-nobody-logs",
            }
            site = stage.small(variables=variables)
            job = site.job().begin().train(3)
            since = time.time()
            longest = max(longest, job.end())
            job.leave()
            runs.append(job.run(since))
            assert b"a-token-that-nobody-logs" not in site.log.read_bytes(), "a header was logged"
    stage.notes.append(f"END_RUN took {longest:.1f} s at most")
    return runs


def healthy(stage: Stage) -> Sequence[Run]:
    """For comparison: spans arrive."""
    with OtlpSink("http/protobuf") as sink:
        variables = {
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{sink.port}",
        }
        site = stage.small(variables=variables)
        job = site.job().begin().train(2)
        job.end()
        run = job.run()
        job.leave()
        assert len(sink.spans) >= LEAST_SPANS, f"{len(sink.spans)} spans arrived"
        assert not any(secret in repr(sink.spans) for secret in site.secrets), "a span holds a secret"
        stage.notes.append(f"{len(sink.spans)} spans")
        return [run]


_FAULTS: tuple[tuple[str, str, Callable[[str], contextlib.AbstractContextManager[int]]], ...] = (
    ("collector-down", "no collector listens", _down),
    ("collector-hanging", "the collector takes spans and never answers", functools.partial(_bad, "hang")),
    ("collector-silent", "the collector takes connections and says nothing", _silent),
    ("collector-refusing", "the collector refuses for a while, every time", functools.partial(_bad, "refuse")),
    ("collector-bad", "the collector answers 400 for ever", functools.partial(_bad, "bad")),
)

DRILLS: tuple[Drill, ...] = (
    *(
        Drill(name, GROUP, broken, functools.partial(_without_traces, collector=collector), UPLOADED, True)
        for name, broken, collector in _FAULTS
    ),
    Drill("collector-healthy", GROUP, "nothing: spans arrive", healthy, UPLOADED, True, quick=True),
)

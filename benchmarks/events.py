"""What an event costs the thread that fires it: our handler beside NVFLARE's own collector, and ours under faults."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datadog
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.fuel_opt.statsd.statsd_reporter import StatsDReporter
from nvflare.metrics.job_metrics_collector import JobMetricsCollector

from benchmarks.measure import ROOT, Effort, Figure, child, environment, p99, spread

sys.path.insert(0, str(ROOT / "tests"))
from flare_run import MODEL_ID, Run

IGNORED = "_an_event_of_somebody_else"
WORKFLOW = "controller"
STATSD = """
import socket, sys
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_000_000)
listener.bind(("127.0.0.1", 0)); print(listener.getsockname()[1], flush=True)
count = 0
while (data := listener.recv(65536)) != b"end":
    count += len(data.splitlines())
print(count, flush=True)
"""


class _Persists:
    def execute(self, fl_ctx: FLContext) -> None: ...


class _Generates:
    def handle_evaluation_events(self, event_type: str, fl_ctx: FLContext) -> None: ...


class Bench:
    """One run with contexts as NVFLARE gives them, and a handler that is timed."""

    def __init__(self, root: Path) -> None:
        self.run = Run(root / "workspace")
        self.run.components |= {"persist_and_cleanup": _Persists(), "json_generator": _Generates()}
        self._peer = FLContext()
        self._peer.set_prop(ReservedKey.IDENTITY_NAME, "site-1", private=False, sticky=False)

    def begin(self, handler: Any) -> None:
        """The events before the first round."""
        handler.handle_event(EventType.START_RUN, self.run.context())
        handler.handle_event(EventType.START_WORKFLOW, self.run.context(**{FLContextKey.WORKFLOW: WORKFLOW}))

    def of_the_workflow(self, number: int) -> FLContext:
        """The context of a round's start."""
        return self.run.context(
            **{FLContextKey.WORKFLOW: WORKFLOW, AppConstants.CURRENT_ROUND: number, AppConstants.NUM_ROUNDS: 1_000_000}
        )

    def of_a_client(self, number: int) -> FLContext:
        """The context of what a client sends."""
        fl_ctx = self.run.context(
            **{
                FLContextKey.WORKFLOW: WORKFLOW,
                FLContextKey.TASK_NAME: "train",
                FLContextKey.TASK_ID: f"task-{number}",
                FLContextKey.TASK_RESULT: Shareable(),
                AppConstants.AGGREGATION_ACCEPTED: True,
            }
        )
        fl_ctx.set_peer_context(self._peer)
        return fl_ctx


def _handler() -> Any:
    from flip_observability.nvflare.components import ServerEventHandler

    return ServerEventHandler(model_id=MODEL_ID)


def _timed(handler: Any, events: Iterable[tuple[str, FLContext]]) -> float:
    begun = time.perf_counter()
    for event, fl_ctx in events:
        handler.handle_event(event, fl_ctx)
    return time.perf_counter() - begun


@contextlib.contextmanager
def _statsd() -> Iterator[tuple[int, Callable[[], int]]]:
    """A listening StatsD: its port, and how many metrics it was sent."""
    process = subprocess.Popen([sys.executable, "-c", STATSD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout
    port = int(output.readline())

    def count() -> int:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"end", ("127.0.0.1", port))
        return int(output.readline())

    try:
        yield port, count
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _collector() -> Iterator[tuple[str, Callable[[], int]]]:
    """An OTLP receiver in a process of its own: its URL, and how many spans it was sent."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "otlp_sink.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip(), lambda: int(process.communicate()[0])
    finally:
        process.kill()
        process.wait()


def measure(effort: Effort) -> Iterable[Figure]:
    """The ratios, then the waits under each fault (each in a process of its own, with the shipped settings)."""
    yield from _ratios(effort)
    for fault in _FAULTS:
        found = json.loads(child(FAULT, fault, str(effort.of(4_000, 400))))
        about = {"events": found["events"], "max_ms": found["max"]}
        yield Figure(f"fl_thread_wait_ms_p99_{fault}", found["p99"], found["p50"], found["max"], about)


def _ratios(effort: Effort) -> Iterable[Figure]:
    ignored, recorded, means = [], [], []
    parts: dict[str, dict[str, list[float]]] = {"ours": {}, "theirs": {}}
    rounds, count = effort.of(100, 30), effort.of(60, 10)
    with tempfile.TemporaryDirectory() as scratch, _statsd() as (port, metrics_arrived), _collector() as collector:
        ledger = Path(scratch) / "ledger"
        endpoint, spans_arrived = collector
        variables = {
            "LOCAL_DEV": "true",
            "FLIP_OBSERVABILITY_DIR": str(ledger),
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        }
        with (
            _Side("ours", f"{scratch}/ours", variables, 0) as ours,
            _Side("theirs", f"{scratch}/theirs", {}, port) as theirs,
        ):
            ours.turn(rounds), theirs.turn(rounds)  # imports and first pages are not what an event costs
            for number in range(count):
                sides = (ours, theirs) if number % 2 else (theirs, ours)
                took = {side.name: side.turn(rounds) for side in sides}
                ignored.append(took["ours"][IGNORED][0] / took["theirs"][IGNORED][0])
                # The median of a turn's events: a busy machine takes the thread away from some of either side's.
                recorded.append(_of_a_round(took["ours"], 0) / _of_a_round(took["theirs"], 0))
                means.append(_of_a_round(took["ours"], 1) / _of_a_round(took["theirs"], 1))
                for name, times in took.items():
                    for event, (typical, _) in times.items():
                        parts[name].setdefault(event, []).append(typical * 1e6)
        total = rounds * (count + 1)
        kept = _kept(ledger)
        spans, arrived = spans_arrived(), metrics_arrived()
    assert kept["_round_started"] == total, kept
    assert kept["_after_contribution_accept"] == total, kept
    assert spans > 1.9 * total, f"our spans did not arrive: {spans} for {total} rounds"
    assert arrived >= 5 * total, f"NVFLARE's metrics did not arrive: {arrived} for {total} rounds"
    yield spread("ignored_event_ratio", ignored)
    yield spread(
        "recorded_event_ratio",
        recorded,
        **{
            f"{name}_us": {event: round(statistics.median(values), 1) for event, values in of_events.items()}
            for name, of_events in parts.items()
        },
        ratio_of_means=round(statistics.median(means), 3),
        rounds=total,
        statsd_metrics=arrived,
        spans=spans,
        events_in_the_ledger=sum(kept.values()),
    )


def _of_a_round(took: dict[str, list[float]], which: int) -> float:
    return sum(times[which] for event, times in took.items() if event != IGNORED)


class _Side:
    """One of the two, in a process of its own: what its threads do in the background is at nobody else's cost."""

    def __init__(self, name: str, folder: str, variables: dict[str, str], port: int) -> None:
        self.name = name
        code = "import sys; from benchmarks.events import one_side; one_side(*sys.argv[1:])"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, name, folder, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **variables},
        )

    def turn(self, rounds: int) -> dict[str, list[float]]:
        """Play rounds; median and mean seconds by event."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{rounds}\n")
        self._process.stdin.flush()
        times: dict[str, list[float]] = json.loads(self._process.stdout.readline())
        return times

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)  # its input ends, and it exports what is left


def one_side(name: str, folder: str, port: str) -> None:
    """The process of a side: for each line with a number of rounds, print what each event took."""
    bench = Bench(Path(folder))
    if name == "ours":
        handler = _handler()
    else:
        StatsDReporter(host="127.0.0.1", port=int(port))
        handler = JobMetricsCollector(tags={"site": "server", "env": "benchmark"})
    bench.begin(handler)
    done = 0
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_turn(bench, handler, done, int(line))) + "\n")
        sys.stdout.flush()
        done += int(line)
    if name == "ours":
        handler._recorder.finish(5.0)
    else:
        datadog.statsd.flush()


def _turn(bench: Bench, handler: Any, start: int, rounds: int) -> dict[str, list[float]]:
    """Median and mean seconds by event: of an ignored one, of a round's start, and of all that one result causes."""
    took: dict[str, list[float]] = {event: [] for event in (IGNORED, *_OF_A_ROUND)}
    for number in range(start, start + rounds):
        of_round, of_client = bench.of_the_workflow(number), bench.of_a_client(number)
        for event, times in took.items():
            times.append(_timed(handler, [(event, of_round if event == AppEventType.ROUND_STARTED else of_client)]))
    return {event: [statistics.median(times), statistics.fmean(times)] for event, times in took.items()}


_OF_A_ROUND = (
    AppEventType.ROUND_STARTED,
    EventType.BEFORE_TASK_DATA_FILTER,
    EventType.AFTER_TASK_DATA_FILTER,
    EventType.BEFORE_PROCESS_SUBMISSION,
    AppEventType.AFTER_CONTRIBUTION_ACCEPT,
    EventType.AFTER_PROCESS_SUBMISSION,
)
"""A round's start, and a client's task from its assignment to its accepted result, as NVFLARE fires them."""


def _kept(ledger: Path) -> dict[str, int]:
    with contextlib.closing(sqlite3.connect(ledger / "ledger.db")) as db:
        return dict(db.execute("SELECT name, count(*) FROM events GROUP BY name").fetchall())


# -- under faults ------------------------------------------------------------------------------------------------------

FAULT = "import sys; from benchmarks.events import under_fault; under_fault(sys.argv[1], int(sys.argv[2]))"


def under_fault(fault: str, rounds: int) -> None:
    """Print, as JSON, how long events held their thread (milliseconds) while ``fault`` lasts."""
    with tempfile.TemporaryDirectory() as scratch, _silent() as port:
        ledger = Path(scratch) / "ledger"
        variables = {
            "FLIP_OBSERVABILITY_DIR": str(ledger),
            "LOCAL_DEV": "false",
            "FLIP_API_INTERNAL_URL": f"http://127.0.0.1:{port}",
            "INTERNAL_SERVICE_KEY": "benchmark",
        }
        if fault == "collector_hanging":
            variables |= {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
        with environment(**variables):
            bench, handler = Bench(Path(scratch)), _handler()
            bench.begin(handler)
            waits: list[float] = []
            with _FAULTS[fault](ledger):
                for number in range(rounds):
                    of_round, of_client = bench.of_the_workflow(number), bench.of_a_client(number)
                    for event, fl_ctx in (
                        (AppEventType.ROUND_STARTED, of_round),
                        (EventType.AFTER_TASK_DATA_FILTER, of_client),
                        (EventType.BEFORE_PROCESS_SUBMISSION, of_client),
                        (AppEventType.TRAINING_STARTED, of_round),  # a status for the hub, when it is the first
                    ):
                        waits.append(_timed(handler, [(event, fl_ctx)]) * 1000)
                    time.sleep(0.001)
            found = {"events": len(waits), "p50": sorted(waits)[len(waits) // 2], "p99": p99(waits), "max": max(waits)}
            sys.stdout.write(json.dumps({key: round(value, 3) for key, value in found.items()}) + "\n")
            sys.stdout.flush()
            os._exit(0)  # nothing that hangs is waited for


@contextlib.contextmanager
def _silent() -> Iterator[int]:
    """A port that takes connections and requests and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        held: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])


@contextlib.contextmanager
def _locked(ledger: Path) -> Iterator[None]:
    """Another process writes without an end: the lock is held for two seconds of every 2.2."""
    code = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=10)
while True:
    db.execute("BEGIN IMMEDIATE"); print("locked", flush=True); time.sleep(2.0); db.execute("COMMIT"); time.sleep(0.2)
"""
    locker = subprocess.Popen(
        [sys.executable, "-c", code, str(ledger / "ledger.db")], stdout=subprocess.PIPE, text=True
    )
    assert locker.stdout is not None
    locker.stdout.readline()
    try:
        yield
    finally:
        locker.kill()
        locker.wait()


def _nothing_more(_: Path) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


_FAULTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[None]]] = {
    "hub_hanging": _nothing_more,
    "ledger_locked": _locked,
    "collector_hanging": _nothing_more,
}
"""The hub of ``under_fault`` always hangs; what else the fault needs."""

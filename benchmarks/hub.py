"""The way to the hub after an outage: how fast what waits gets there, and how soon after the hub is back."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import Effort, Figure, spread
from flip_observability.hub import Dispatcher, transport_for
from flip_observability.ledger import Entry, Ledger, OutboxItem
from flip_observability.settings import Settings

ORDER = ["INITIATED", "PREPARED", "TRAINING_STARTED"]
HUB = """
import sys, time, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
heard, port = [], int(sys.argv[1])
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def do_PUT(self):
        time.sleep(0.01)
        _, _, model, _, status = self.path.split("/")
        heard.append(f"{model} {status}\\n")  # not written yet: nobody reads, and a full pipe would hold the hub up
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *_): ...
class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256
server = Server(("127.0.0.1", port), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdout.write(f"{server.server_address[1]}\\n"); sys.stdout.flush()
sys.stdin.read(); sys.stdout.write("".join(heard)); sys.stdout.flush()
"""


class Hub:
    """A hub in a process of its own that answers after 10 ms and remembers the order."""

    def __init__(self, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HUB, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def heard(self) -> dict[str, list[str]]:
        """Stop it, and what every model's statuses were."""
        output, _ = self._process.communicate()
        statuses: dict[str, list[str]] = {}
        for line in output.splitlines():
            model, status = line.split()
            statuses.setdefault(model, []).append(status)
        return statuses


def _settings(port: int, **more: Any) -> Settings:
    return Settings.model_validate(
        {
            "LOCAL_DEV": False,
            "FLIP_API_INTERNAL_URL": f"http://127.0.0.1:{port}",
            "INTERNAL_SERVICE_KEY": "benchmark",
            **more,
        }
    )


@contextlib.contextmanager
def _dispatching(folder: Path, settings: Settings, **clock: Any) -> Iterator[Dispatcher]:
    with Ledger(folder) as ledger:
        dispatcher = Dispatcher(ledger, transport_for(settings), settings, **clock)
        try:
            yield dispatcher
        finally:
            dispatcher.stop(5)


def _fill(folder: Path, models: int, statuses: list[str], final: bool) -> list[str]:
    names = [str(uuid.uuid4()) for _ in range(models)]
    with Ledger(folder) as ledger:
        for name in names:
            for status in statuses:
                item = OutboxItem(name, "status", {"status": status}, final)
                ledger.append(Entry(str(uuid.uuid4()), time.time(), outbox=(item,)))
    return names


def _wait_until_empty(folder: Path) -> None:
    with Ledger(folder) as ledger:
        while ledger.next_due() is not None:
            time.sleep(0.01)


def measure(effort: Effort) -> Iterable[Figure]:
    """Throughput with the order kept; then the recovery."""
    models = effort.of(2_000, 200) // len(ORDER) + 1
    yield spread("deliveries_per_s", [_throughput(models) for _ in range(effort.of(5, 2))], rows=models * len(ORDER))
    yield spread("hub_recovery_s", [_recovery() for _ in range(effort.of(7, 2))], waiting_runs=100, outage_minutes=10)


def _throughput(models: int) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = _fill(folder, models, ORDER, final=False)
        hub = Hub()
        with _dispatching(folder, _settings(hub.port)) as dispatcher:
            begun = time.perf_counter()
            dispatcher.start()
            _wait_until_empty(folder)
            seconds = time.perf_counter() - begun
        heard = hub.heard()
    assert heard == dict.fromkeys(names, ORDER), "a status is missing, twice there, or out of order"
    return models * len(ORDER) / seconds


def _recovery() -> float:
    """An outage that lasted ten minutes by the dispatcher's clock; then real time, until the last is accepted."""
    hub = Hub()
    port = hub.port
    hub.heard()  # it is down now, and its port is free
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        names = _fill(folder, 100, ["ERROR"], final=True)
        ahead = 0.0
        with _dispatching(folder, _settings(port), clock=lambda: time.time() + ahead) as dispatcher:
            dispatcher.start()
            end = time.monotonic() + 6.0
            while (
                time.monotonic() < end
            ):  # ten minutes pass in six seconds, so that it has backed off as far as it does
                time.sleep(0.1)
                ahead += 10.0
            assert dispatcher.hub_is_ill
            back = Hub(port)
            begun = time.perf_counter()
            _wait_until_empty(folder)
            seconds = time.perf_counter() - begun
        heard = back.heard()
    assert heard == {name: ["ERROR"] for name in names}
    return seconds

"""The observer beside a long history: how soon it serves, what a scrape takes, and that the page does not grow."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import ROOT, Effort, Figure, p99, single, spread
from flip_observability.ledger import FILE_NAME, Ledger

sys.path.insert(0, str(ROOT / "tests"))
from history import Run

SECONDS_BETWEEN_RUNS = 90 * 86_400 / 10_000
"""10,000 runs are the retention's 90 days; a longer history has as many runs a day, not more."""


def write_history(folder: Path, runs: int, events: int) -> None:
    """A ledger of ``runs`` finished runs with about ``events`` events in all, and 8 active ones.

    One run is played as a server writes it; the others are its copies with ids and times of their own.
    """
    with Ledger(folder) as ledger:
        sites = {f"site-{number}": 20.0 + number for number in range(1, 5)}
        model = Run(ledger, begin=time.time() - runs * SECONDS_BETWEEN_RUNS - 3_600)
        model.train(sites, rounds=max(1, (events // runs - 10) // (1 + 3 * len(sites))))
        model.finish()
        model.deliver()
    with contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as db:
        for table in ("runs", "events", "outbox"):
            copy_rows(db, table, model.run_id, runs - 1, SECONDS_BETWEEN_RUNS)
        db.commit()
    with Ledger(folder) as ledger:
        for _ in range(8):
            Run(ledger, begin=time.time() - 300).train(sites, rounds=3)


_TIMES = {"time", "created", "heartbeat", "started", "last_event", "final_time", "done"}


def copy_rows(db: sqlite3.Connection, table: str, run_id: str, count: int, seconds: float) -> None:
    """Copy a run's rows, each copy so many seconds later than the one before it."""
    names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    names = [name for name in names if name != "id"]
    rows = db.execute(f"SELECT {', '.join(names)} FROM {table} WHERE run_id = ?", (run_id,)).fetchall()
    ids = [str(uuid.UUID(int=(0x5E0C << 112) + (4 << 76) + (8 << 60) + number)) for number in range(1, count + 1)]

    def copies() -> Iterator[list[Any]]:
        for number, own in enumerate(ids, 1):
            later = number * seconds
            for row in rows:
                values = dict(zip(names, row, strict=True))
                for name in _TIMES & values.keys():
                    values[name] = values[name] and values[name] + later
                if "uid" in values:
                    values["uid"] = f"{values['uid']}{number:x}"
                yield list((values | {"run_id": own}).values())

    marks = ", ".join("?" * len(names))
    db.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", copies())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Serving:
    """``flip-obs serve`` in a process of its own, from its start to its first full page."""

    def __init__(self, folder: Path) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}/metrics"
        variables = {"LOCAL_DEV": "true", "FLIP_RETENTION_DAYS": "2000", "FLIP_OBSERVABILITY_DIR": str(folder)}
        command = [sys.executable, "-m", "flip_observability.cli", "serve", "--port", str(port)]
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.page = self._first_page()
        self.seconds = time.perf_counter() - begun
        self.rss_mib = psutil.Process(self.process.pid).memory_info().rss / 2**20

    def _first_page(self) -> bytes:
        while self.process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                return self.scrape()[1]
            time.sleep(0.01)
        raise RuntimeError(f"flip-obs serve ended with {self.process.returncode}")

    def scrape(self) -> tuple[float, bytes]:
        """Milliseconds and the page of one scrape, as Prometheus asks for it."""
        request = urllib.request.Request(self.url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        begun = time.perf_counter()
        with urllib.request.urlopen(request, timeout=30) as response:
            page = response.read()
        return (time.perf_counter() - begun) * 1000, page

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def measure(effort: Effort) -> Iterable[Figure]:
    """Ten thousand runs, then ten times as many."""
    runs, events = effort.of(10_000, 500), effort.of(1_000_000, 50_000)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "small"
        write_history(folder, runs, events)
        with contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as db:
            written = db.execute("SELECT count(*) FROM events").fetchone()[0]
        with Serving(folder) as first:
            yield single("observer_first_start_s_10k_runs", first.seconds, events=written)
            small = first.page
        started, memory, typical, slow = [], [], [], []
        for _ in range(effort.of(5, 2)):
            with Serving(folder) as again:
                started.append(again.seconds)
                memory.append(again.rss_mib)
                scrapes = [again.scrape()[0] for _ in range(effort.of(400, 50))]
                typical.append(statistics.median(scrapes))
                slow.append(p99(scrapes))
                assert f'flip_runs_started_total{{net_id="default"}} {runs + 8}.0'.encode() in again.page
        yield spread("observer_start_s_10k_runs", started)
        yield spread("observer_rss_mib_10k_runs", memory)
        yield spread(
            "scrape_ms_p99_10k_runs",
            slow,
            scrapes_of_a_turn=len(scrapes),
            median_ms=round(statistics.median(typical), 2),
            page_bytes=len(small),
        )
        many = Path(scratch) / "large"
        write_history(many, runs * 10, events)
        with Serving(many) as large:
            ratio = len(large.page) / len(small)
            yield single(
                "scrape_bytes_growth_10k_to_100k_runs", ratio, bytes_at_10k=len(small), bytes_at_100k=len(large.page)
            )

"""The observer beside a long history: how soon it serves, what a scrape takes, and that the page does not grow."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import ROOT, Effort, Figure, p99, single, spread
from flip_observability.constants import FlareEvents
from flip_observability.ledger import FILE_NAME, FL_THREAD_BUSY_MS, Ledger

sys.path.insert(0, str(ROOT / "tests"))
from history import Run

SECONDS_BETWEEN_RUNS = 90 * 86_400 / 10_000
"""10,000 runs are the retention's 90 days; a longer history has as many runs a day, not more."""


SITES = {f"site-{number}": 20.0 + number for number in range(1, 5)}
ACTIVE = 8
SECONDS_BETWEEN_EVENTS = 1.0
"""Of an active run."""


def write_history(folder: Path, runs: int, events: int) -> list[Run]:
    """A ledger of ``runs`` finished runs with about ``events`` events in all, and of active ones, which it returns.

    One run is played as a server writes it; the others are its copies with ids and times of their own.
    """
    with Ledger(folder) as ledger:
        model = Run(ledger, begin=time.time() - runs * SECONDS_BETWEEN_RUNS - 3_600)
        model.train(SITES, rounds=max(1, (events // runs - 10) // (1 + 3 * len(SITES))))
        model.finish()
        model.deliver()
    with contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as db:
        for table in ("runs", "events", "outbox"):
            copy_rows(db, table, model.run_id, runs - 1, SECONDS_BETWEEN_RUNS)
        db.commit()
    with Ledger(folder) as ledger:
        active = [Run(ledger, begin=time.time() - 300) for _ in range(ACTIVE)]
        for run in active:
            run.train(SITES, rounds=3)
    return active


def _go_on(run: Run) -> Iterator[None]:
    """Round after round of a run, an event at a time."""
    run.at(time.time() - run.begin, FlareEvents.START_WORKFLOW, workflow="controller")
    for number in itertools.count(1):
        for name, attrs in _round(number):
            yield
            run.at(time.time() - run.begin, name, **attrs)


def _round(number: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield FlareEvents.ROUND_STARTED, {"round": number, "total_rounds": 1_000}
    tasks = [{"client": client, "task_id": f"{client}-again-{number}"} for client in SITES]
    for task in tasks:
        yield FlareEvents.AFTER_TASK_DATA_FILTER, {**task, "task": "train"}
    for task in tasks:
        yield FlareEvents.BEFORE_PROCESS_SUBMISSION, {**task, "return_code": "OK"}
        yield FlareEvents.AFTER_CONTRIBUTION_ACCEPT, {"client": task["client"], "accepted": True}


class Training:
    """The active runs write an event a second each, for as long as the context lasts."""

    def __init__(self, folder: Path, active: list[Run]) -> None:
        self.events = 0
        self._folder, self._runs = folder, active
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._write)

    def _write(self) -> None:
        with Ledger(self._folder, busy_ms=FL_THREAD_BUSY_MS) as ledger:
            for run in self._runs:
                run.ledger = ledger
            lives = itertools.cycle([_go_on(run) for run in self._runs])
            while True:
                next(next(lives))
                self.events += 1
                if self._end.wait(SECONDS_BETWEEN_EVENTS / len(self._runs)):
                    return

    def __enter__(self) -> Training:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


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

    def scrape(self, **headers: str) -> tuple[float, bytes]:
        """Milliseconds and the page of one scrape in the format that Prometheus asks for."""
        accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
        request = urllib.request.Request(self.url, headers=accept | headers)
        begun = time.perf_counter()
        with urllib.request.urlopen(request, timeout=30) as response:
            page = response.read()
        return (time.perf_counter() - begun) * 1000, page

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


@dataclass
class Scrapes:
    """Milliseconds: of scrapes in a row, of some that Prometheus has compressed, and of some a second apart.

    Of those in a row most find little news. Each of the last finds a second's: every active run's, and new counts.
    """

    in_a_row: list[float]
    compressed: list[float]
    second_apart: list[float]
    events_per_s: float


def scrape_while_training(serving: Serving, training: Training, effort: Effort) -> Scrapes:
    """The scrapes of a turn; the page must tell what the active runs do meanwhile."""
    begun, before = time.time(), training.events
    in_a_row = [serving.scrape()[0] for _ in range(effort.of(400, 50))]
    compressed = [serving.scrape(**{"Accept-Encoding": "gzip"})[0] for _ in range(effort.of(50, 10))]
    second_apart = []
    for _ in range(effort.of(6, 3)):
        time.sleep(1.0)
        milliseconds, page = serving.scrape()
        second_apart.append(milliseconds)
    told = re.findall(rb"flip_run_last_event_timestamp_seconds{[^}]*} (\S+)", page)
    assert sum(float(when) > begun for when in told) == ACTIVE
    return Scrapes(in_a_row, compressed, second_apart, (training.events - before) / (time.time() - begun))


def measure(effort: Effort) -> Iterable[Figure]:
    """Ten thousand runs, then ten times as many."""
    runs, events = effort.of(10_000, 500), effort.of(1_000_000, 50_000)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "small"
        active = write_history(folder, runs, events)
        with contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as db:
            written = db.execute("SELECT count(*) FROM events").fetchone()[0]
        with Serving(folder) as first:
            yield single("observer_first_start_s_10k_runs", first.seconds, events=written)
            small = first.page
        started, memory, scrapes = [], [], []
        for _ in range(effort.of(5, 2)):
            with Serving(folder) as again, Training(folder, active) as training:
                started.append(again.seconds)
                memory.append(again.rss_mib)
                scrapes.append(scrape_while_training(again, training, effort))
                assert f'flip_runs_started_total{{net_id="default"}} {runs + ACTIVE}.0'.encode() in again.page
        yield spread("observer_start_s_10k_runs", started)
        yield spread("observer_rss_mib_10k_runs", memory)
        yield _scrape_figure(scrapes, len(small))
        many = Path(scratch) / "large"
        write_history(many, runs * 10, events)
        with Serving(many) as large:
            ratio = len(large.page) / len(small)
            yield single(
                "scrape_bytes_growth_10k_to_100k_runs", ratio, bytes_at_10k=len(small), bytes_at_100k=len(large.page)
            )


def _scrape_figure(scrapes: list[Scrapes], page_bytes: int) -> Figure:
    def median(values: Iterable[float]) -> float:
        return round(statistics.median(values), 2)

    return spread(
        "scrape_ms_p99_10k_runs",
        [p99(each.in_a_row) for each in scrapes],
        scrapes_of_a_turn=len(scrapes[0].in_a_row),
        median_ms=median(statistics.median(each.in_a_row) for each in scrapes),
        median_ms_gzip=median(statistics.median(each.compressed) for each in scrapes),
        median_ms_a_second_apart=median(value for each in scrapes for value in each.second_apart),
        max_ms_a_second_apart=round(max(value for each in scrapes for value in each.second_apart), 2),
        events_per_s_meanwhile=median(each.events_per_s for each in scrapes),
        page_bytes=page_bytes,
    )

"""The ledger: how long one event takes among many writers, whether any is lost, and how much disk it takes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.measure import ROOT, Effort, Figure, p99, single
from flip_observability.ledger import FILE_NAME, Ledger

sys.path.insert(0, str(ROOT / "tests"))
from history import Run

WRITER = """
import sys, threading, time, uuid
from pathlib import Path
from flip_observability.ledger import FL_THREAD_BUSY_MS, Entry, Ledger, LedgerBusyError
from flip_observability.lifecycle import Event
folder, run = Path(sys.argv[1]), str(uuid.uuid4())
ledger, other = Ledger(folder, busy_ms=FL_THREAD_BUSY_MS), Ledger(folder)
def move():  # as the recorder's writer thread does
    while True:
        time.sleep(5.0)
        other.checkpoint()
threading.Thread(target=move, daemon=True).start()
print("ready", flush=True); sys.stdin.readline()
until = time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    event = Event("_round_started", time.time(), {"round": 1, "total_rounds": 100, "workflow": "controller"})
    begun = time.perf_counter()
    try:
        kept = ledger.append(Entry(run, event.time, event, (("round_duration", 12.5, {}),), {"round": 1}))
    except LedgerBusyError:
        kept = False  # the recorder's queue takes it; its thread has been held for as long all the same
    took = time.perf_counter() - begun
    sys.stdout.write(f"{event.uid if kept else '-'} {took * 1000:.3f}\\n"); sys.stdout.flush()
    time.sleep(0.02)
"""
"""A run's process: the connection of NVFLARE's threads as it is shipped, 50 events a second."""
WRITERS = 16


def _start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def measure(effort: Effort) -> Iterable[Figure]:
    """Sixteen writers, first left alone, then killed at random; then the file's size."""
    yield _latency(effort)
    yield _kills(effort)
    yield from _sizes()


def _latency(effort: Effort) -> Figure:
    with tempfile.TemporaryDirectory() as scratch:
        Ledger(Path(scratch)).close()
        writers = [_start(Path(scratch), effort.of(30, 5)) for _ in range(WRITERS)]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        lines: list[str] = []
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        for writer in writers:
            lines += writer.communicate()[0].splitlines()
    waits = [float(line.split()[1]) for line in lines]
    return Figure(
        "ledger_append_ms_p99_16_writers",
        p99(waits),
        sorted(waits)[len(waits) // 2],
        max(waits),
        {"writers": WRITERS, "events": len(waits), "spread": "median … longest"},
    )


def _kills(effort: Effort) -> Figure:
    """Kill writers at random moments; whatever they said was written must be there."""
    kills, acknowledged, rng = effort.of(200, 24), 0, random.Random(11)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        Ledger(folder).close()
        lost = 0
        seen: set[str] = set()
        for start in range(0, kills, WRITERS):
            writers = [_start(folder, 60) for _ in range(min(WRITERS, kills - start))]
            for writer in writers:
                assert writer.stdout is not None
                assert writer.stdin is not None
                writer.stdout.readline()
                writer.stdin.write("go\n")
                writer.stdin.flush()
            for writer in rng.sample(writers, len(writers)):
                time.sleep(rng.uniform(0.0, 0.12))
                writer.kill()
            for writer in writers:
                seen |= {line.split()[0] for line in writer.communicate()[0].splitlines() if " " in line} - {"-"}
        with Ledger(folder) as ledger:
            kept = {row["uid"] for row in ledger.events()}
        lost, acknowledged = len(seen - kept), len(seen)
    assert acknowledged > kills, "the writers hardly wrote: nothing was tested"
    return single("ledger_events_lost", lost, kills=kills, acknowledged=acknowledged)


def _sizes() -> Iterable[Figure]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with Ledger(folder) as ledger:
            run = Run(ledger)
            run.train({f"site-{number}": 30.0 + number for number in range(1, 51)}, rounds=100)
            run.finish()
            events = len(ledger.events())
            ledger.checkpoint()
        size = os.path.getsize(folder / FILE_NAME)
    yield single("ledger_bytes_per_event", size / events, events=events)
    yield single("ledger_size_mib_100_rounds_50_clients", size / 2**20, events=events)

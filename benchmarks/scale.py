"""``python -m benchmarks.scale``: what many servers with many runs come to. Counted on one server, then multiplied.

A day of runs is written into a real ledger, folded by the real metrics and read from the real page; only the
multiplication by servers and days is arithmetic.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from rich.console import Console
from rich.table import Table

from benchmarks.measure import ROOT
from benchmarks.pages import copy_rows
from flip_observability.ledger import FILE_NAME, Ledger
from flip_observability.lifecycle import Event, RunState
from flip_observability.metrics import FlipCollector, MetricsFold, render
from flip_observability.settings import Settings
from flip_observability.tracing import RunTags, _Pipeline

sys.path.insert(0, str(ROOT / "tests"))
from history import Run

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
BYTES_PER_SAMPLE = 1.5
"""In Prometheus' own store, by its documentation 1 to 2."""


@dataclass(frozen=True)
class Fleet:
    """What is assumed.

    Args:
        servers: FL servers.
        runs: of one server in a day.
        rounds, sites: of a run.
        active: runs at once on one server.
        scrape_seconds: between two scrapes.
        retention_days: of the ledgers.
    """

    servers: int = 50
    runs: int = 1_000
    rounds: int = 20
    sites: int = 4
    active: int = 16
    scrape_seconds: float = 15.0
    retention_days: int = 90


@dataclass(frozen=True)
class Server:
    """What one server's runs were found to come to."""

    events_per_run: int
    spans_per_run: int
    bytes_of_spans_per_run: int
    hub_calls_per_run: int
    ledger_bytes_per_run: float
    series: int
    page_bytes: int


def simulate(fleet: Fleet, folder: Path) -> Server:
    """Have a day's runs on one server, and those that are active now, and count.

    Args:
        fleet: what a run is like, and how many there are.
        folder: of the ledger.
    """
    sites = {f"site-{number}": 20.0 + number for number in range(1, fleet.sites + 1)}
    with Ledger(folder) as ledger:
        run = Run(ledger, begin=time.time() - 82_000)
        run.train(sites, rounds=fleet.rounds)
        run.finish()
        calls = len(ledger.outbox(run_id=run.run_id))
        run.deliver()
    with contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as db:
        for name in ("runs", "events", "outbox"):
            copy_rows(db, name, run.run_id, fleet.runs - 1, 80_000 / fleet.runs)
        db.commit()
    with Ledger(folder) as ledger:
        ledger.checkpoint()
        size = os.path.getsize(folder / FILE_NAME)
        events = ledger.events(run.run_id)
        for _ in range(fleet.active):
            Run(ledger, begin=time.time() - 300).train(sites, rounds=3)
        fold = MetricsFold(ledger)
        while not fold.catch_up():
            pass
        page = render(FlipCollector(ledger, Settings()), OPEN_METRICS)[1]
    series = [line for line in page.decode().splitlines() if line and not line.startswith("#")]
    spans = _spans(run.run_id, events)
    return Server(
        len(events), len(spans), encode_spans(spans).ByteSize(), calls, size / fleet.runs, len(series), len(page)
    )


def _spans(run_id: str, events: list[dict[str, Any]]) -> list[ReadableSpan]:
    """A run's own spans, as they are exported; each call of the hub is one more."""
    state, pipeline = RunState(run_id), _Pipeline(Resource.create({}), SpanProcessor())
    tags = RunTags(run_id, run_id, run_id, "net-1")
    found = (state.apply(Event(e["name"], e["time"], e["attrs"], e["uid"])).spans for e in events)
    return [pipeline.convert(tags, span, None, None) for spans in found for span in spans]


def totals(fleet: Fleet, server: Server) -> Mapping[str, tuple[float, str]]:
    """What the whole fleet comes to: value and unit by name."""
    day, runs = 86_400.0, fleet.servers * fleet.runs
    series, samples = fleet.servers * server.series, fleet.servers * server.series / fleet.scrape_seconds
    return {
        "series at once": (series, ""),
        "samples": (samples, "per second"),
        "Prometheus' disk": (samples * day * BYTES_PER_SAMPLE / 1e9, "GB per day"),
        "scraped": (fleet.servers * server.page_bytes / fleet.scrape_seconds / 1e6, "MB per second, uncompressed"),
        "ledger of one server": (server.ledger_bytes_per_run * fleet.runs * fleet.retention_days / 1e9, "GB"),
        "events of one server": (server.events_per_run * fleet.runs / day, "per second"),
        "spans": ((server.spans_per_run + server.hub_calls_per_run) * runs / day, "per second"),
        "traces": (server.bytes_of_spans_per_run * runs / 1e9, "GB per day, uncompressed"),
        "calls of the hub": (server.hub_calls_per_run * runs / day, "per second"),
    }


def main() -> None:
    """Print what the fleet comes to."""
    fleet = Fleet()
    with tempfile.TemporaryDirectory() as scratch:
        server = simulate(fleet, Path(scratch))
    table = Table("", "value", "unit", title="A fleet, from one server's runs", title_justify="left")
    for name, (value, unit) in totals(fleet, server).items():
        table.add_row(name, f"{value:,.4g}", unit)
    console = Console()
    console.print(json.dumps({"assumed": asdict(fleet), "one server": asdict(server)}))
    console.print(table)


if __name__ == "__main__":
    main()

"""Have a real run, scraped by a real Prometheus each second, and draw the run's dashboard from what it holds.

``make picture`` runs it and writes ``docs/dashboard.svg``. The panels, their places, titles and queries are those of
``dashboards/json/flip-run.json``.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dashboards.picture.charts import Picture, Series, draw, legend_of
from flip_observability.demo import runner
from flip_observability.exporter import Exporter
from flip_observability.ledger import Ledger
from flip_observability.metrics import FlipCollector, MetricsFold, render
from flip_observability.settings import Settings
from grafana_queries import substituted
from prometheus_tools import Prometheus

ROOT = Path(__file__).parent.parent.parent
DASHBOARD = ROOT / "dashboards" / "json" / "flip-run.json"
SECTIONS = ("How is it?", "Rounds and clients")
SECONDS_PER_ROUND = 4.5
RATE_SECONDS = 12
"""Over which rates are taken: longer than two rounds, so that each point has seen one."""
NET = "default"


def main(target: Path) -> None:
    """Have the run and write the picture to ``target``."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="flip-picture-") as name:
        folder = Path(name)
        with _exporting(folder / "ledger") as address, Prometheus([address]) as prometheus:
            prometheus.wait_for_scrape()
            # A counter tells of an increase from its second sample on: this run makes those of the sites exist.
            _have_a_run(folder / "before", folder / "ledger", pace=0.0)
            time.sleep(RATE_SECONDS)
            start = time.time()
            run = _have_a_run(folder / "run", folder / "ledger", pace=SECONDS_PER_ROUND)
            prometheus.wait_for_scrape()
            end = time.time()
            sections = _answered(dashboard, prometheus, {"net": NET, "run": run}, start, end)
    note = "drawn by “make picture” from the data of a real run of the demo; not a screenshot. Times are UTC."
    target.write_text(draw(dashboard["title"], note, sections, start=start, end=end), encoding="utf-8")
    sys.stdout.write(f"{target}\n")


@contextlib.contextmanager
def _exporting(folder: Path) -> Iterator[str]:
    """The metrics of a ledger, as an exporter gives them. It does not speak to the hub: the demo does that itself."""
    with Ledger(folder) as ledger:
        fold, collector = MetricsFold(ledger), FlipCollector(ledger, Settings(NET_ID=NET))

        def page(accept: str) -> tuple[str, bytes]:
            fold.catch_up()
            return render(collector, accept)

        exporter = Exporter(page, lambda: "", dict, port=0)
        exporter.start()
        try:
            yield f"127.0.0.1:{exporter.port}"
        finally:
            exporter.stop()


def _have_a_run(folder: Path, ledger: Path, pace: float) -> str:
    out = io.StringIO()
    _, summary = runner.stage(
        "success",
        folder=folder,
        ledger_dir=ledger,
        workflow="fedavg",
        contract="2026-05",
        pace=pace,
        console=Console(file=out, width=160),
    )
    if summary.differences:
        sys.exit(out.getvalue())
    return summary.run_id


def _answered(
    dashboard: Mapping[str, Any], prometheus: Prometheus, variables: Mapping[str, str], start: float, end: float
) -> dict[str, Sequence[Picture]]:
    known = {**variables, "__range": f"{end - start:.0f}s", "__rate_interval": f"{RATE_SECONDS}s"}
    found: dict[str, list[Picture]] = {}
    heading = ""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            heading = panel["title"]
        elif heading in SECTIONS:
            series = [line for target in panel["targets"] for line in _ask(prometheus, target, known, start, end)]
            found.setdefault(heading, []).append(Picture(panel, series))
    return dict(found)


def _ask(
    prometheus: Prometheus, target: Mapping[str, Any], variables: Mapping[str, str], start: float, end: float
) -> list[Series]:
    expr = substituted(target["expr"], variables)
    if target.get("instant"):
        answers = [(series["metric"], [series["value"]]) for series in prometheus.query(expr, end)]
    else:
        found = prometheus.query_range(expr, start, end, step=1.0)
        answers = [(series["metric"], series["values"]) for series in found]
    return [
        Series(
            legend_of(target.get("legendFormat") or "", metric),
            [(float(when), float(value)) for when, value in values if value not in ("NaN", "+Inf", "-Inf")],
        )
        for metric, values in answers
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "dashboard.svg")

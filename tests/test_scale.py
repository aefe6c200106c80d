"""docs/scale.md: its numbers come from a real ledger, its configuration is one that real Prometheus accept."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.scale import Fleet, simulate, totals

from flip_observability.ledger import Ledger
from flip_observability.metrics import FlipCollector, MetricsFold, render
from flip_observability.settings import Settings
from history import Run
from prometheus_tools import Prometheus, require, run_tool, static_page
from waiting import wait_for

pytestmark = pytest.mark.system

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
BLOCKS: dict[str, str] = {
    match[1]: match[0]
    for match in re.findall(r"```yaml\n(# prometheus.yml, (\w+) level\n.*?)```", DOCUMENT.read_text(), re.DOTALL)
}


def test_what_a_fleet_comes_to_is_what_one_servers_runs_come_to(tmp_path: Path) -> None:
    fleet = Fleet(servers=3, runs=30, rounds=2, sites=2, active=2)
    server = simulate(fleet, tmp_path)
    assert server.events_per_run == 16 + 2 * (1 + 3 * 2) - 6
    assert server.hub_calls_per_run == 4
    more = simulate(Fleet(servers=3, runs=60, rounds=2, sites=2, active=2), tmp_path / "more")
    assert more.series - server.series == pytest.approx(30 * 8, abs=30)
    found = totals(fleet, server)
    assert found["series at once"][0] == 3 * server.series
    assert found["calls of the hub"][0] == pytest.approx(3 * 30 * 4 / 86_400)


def test_both_levels_have_a_configuration_in_the_document() -> None:
    assert BLOCKS.keys() == {"upper", "lower"}


@pytest.mark.parametrize("level", ["upper", "lower"])
def test_promtool_accepts_the_configuration(level: str, tmp_path: Path) -> None:
    require("promtool")
    file = tmp_path / "prometheus.yml"
    file.write_text(BLOCKS[level])
    checked = run_tool("promtool", "check", "config", file)
    assert checked.returncode == 0, checked.stdout + checked.stderr


class Upper(Prometheus):
    """A Prometheus with the document's configuration, which federates from another one."""

    def __init__(self, lower: str) -> None:
        super().__init__()
        config: dict[str, Any] = yaml.safe_load(BLOCKS["upper"])
        config["scrape_configs"][0] |= {"scrape_interval": "1s", "static_configs": [{"targets": [lower]}]}
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config))


def test_one_prometheus_federates_from_another(tmp_path: Path) -> None:
    require("prometheus")
    with Ledger(tmp_path) as ledger:
        run = Run(ledger, begin=time.time() - 600)
        run.train({"site-1": 10.0, "site-2": 12.0})
        run.finish("ERROR")
        fold = MetricsFold(ledger)
        while not fold.catch_up():
            pass
        collector = FlipCollector(ledger, Settings())

        def page() -> str:
            return render(collector, "text/plain")[1].decode()

        with (
            static_page(page) as address,
            Prometheus([address]) as lower,
            Upper(lower.address) as upper,
        ):
            wait_for(lambda: upper.value("flip_runs_started_total") == 1.0, seconds=60)
            status = upper.query(f'flip_run_final_status_timestamp_seconds{{run_id="{run.run_id}"}}')
            assert [item["metric"]["status"] for item in status] == ["ERROR"]
            assert status[0]["metric"]["job"] == "flip-observability"  # the lower one's, not the federation's
            assert status[0]["metric"]["instance"] == address
            assert upper.value(f'up{{instance="{address}"}}') == 1.0
            assert upper.query("flip_run_round") == []  # one run's details stay below

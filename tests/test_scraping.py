"""A real Prometheus scrapes a real observer by the project's own job: every series arrives, and ends, as it must."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from flip_observability.ledger import Ledger
from flip_observability.observer import Observer
from flip_observability.settings import Settings
from history import Run
from prometheus_tools import REPOSITORY, Prometheus, static_page
from waiting import wait_for

pytestmark = pytest.mark.system

MOVING = frozenset({"flip_observer_loop_last_success_timestamp_seconds"})
"""Series whose values differ from one look at the page to the next."""
Page = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def limits() -> dict[str, Any]:
    """What `dashboards/prometheus/prometheus.yml` says of the job beyond where its targets are."""
    config = yaml.safe_load((REPOSITORY / "dashboards/prometheus/prometheus.yml").read_text())
    (job,) = (job for job in config["scrape_configs"] if job["job_name"] == "flip-observability")
    return {name: value for name, value in job.items() if name not in ("job_name", "file_sd_configs")}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    with Ledger(folder) as ledger:
        for status in ("RESULTS_UPLOADED", "ERROR"):
            run = Run(ledger, begin=time.time() - 120)
            run.train({"site-1": 2.0, "site-2": 3.0})
            run.finish(status)
            run.deliver()
        run = Run(ledger, begin=time.time() - 30)
        run.train({"site-1": 2.0})
        run.deliver()
    return folder


@contextmanager
def observing(ledger: Path, port: int = 0) -> Iterator[Observer]:
    settings = Settings.model_validate({"LOCAL_DEV": True, "NET_ID": 'net-"1"'})
    observer = Observer(settings, ledger, port=port, insist=True)
    observer.start()
    try:
        yield observer
    finally:
        observer.stop()


def page(url: str) -> Page:
    """Every sample of an OpenMetrics page by name and labels."""
    request = urllib.request.Request(f"{url}/metrics", headers={"Accept": "application/openmetrics-text"})
    with urllib.request.urlopen(request, timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))  # type: ignore[no-untyped-call]
    return {
        (
            sample.name,
            tuple(sorted((name, _canonical(name, text)) for name, text in sample.labels.items())),
        ): sample.value
        for family in families
        for sample in family.samples
    }


def _canonical(name: str, text: str) -> str:
    # Prometheus 3 writes the bound of a bucket as `1.0`, Prometheus 2 as the page does.
    return str(float(text)) if name == "le" else text


def stored(prometheus: Prometheus, instance: str) -> Page:
    found = {}
    for series in prometheus.query(f'{{job="flip-observability",instance="{instance}",__name__=~"flip_.+"}}'):
        labels = dict(series["metric"])
        name = labels.pop("__name__")
        assert labels.pop("job") == "flip-observability"
        assert labels.pop("instance") == instance
        key = (name, tuple(sorted((label, _canonical(label, text)) for label, text in labels.items())))
        found[key] = float(series["value"][1])
    return found


def test_series_reach_prometheus_as_they_are_on_the_page(ledger: Path) -> None:
    with ExitStack() as stack:
        seen = stack.enter_context(observing(ledger))
        assert seen.exporter is not None
        url = seen.exporter.url
        instance = url.removeprefix("http://")
        wait_for(lambda: seen.active, 20, "the observer has the ledger")
        on_page = wait_for(lambda: _page_when_ready(url), 20, "a page")
        prometheus = stack.enter_context(Prometheus([instance], limits=limits()))
        up = f'up{{job="flip-observability",instance="{instance}"}}'
        wait_for(lambda: prometheus.value(up) == 1, 30, "the exporter is up")
        came = wait_for(lambda: _when_all(prometheus, instance, set(on_page)), 30, "all series")
        assert {key: value for key, value in came.items() if key[0] not in MOVING} == {
            key: value for key, value in on_page.items() if key[0] not in MOVING
        }
        now = time.time()
        exemplars = prometheus.exemplars('{__name__=~"flip_.+"}', now - 3600, now + 60)
        assert {e["labels"]["trace_id"] for series in exemplars for e in series["exemplars"]}

        # An exporter that goes is seen at once, not after Prometheus' five minutes; and back again.
        port = int(instance.rpartition(":")[2])
        seen.stop()
        wait_for(lambda: prometheus.value(up) == 0, 30, "the exporter is down")
        assert stored(prometheus, instance) == {}
        stack.enter_context(observing(ledger, port))
        wait_for(lambda: prometheus.value(up) == 1, 30, "the exporter is up again")
        back = wait_for(lambda: _when_all(prometheus, instance, set(on_page)), 30, "all series again")
        counters = [key for key in on_page if key[0].endswith("_total") and "errors" not in key[0]]
        assert {key: back[key] for key in counters} == {key: on_page[key] for key in counters}


def _page_when_ready(url: str) -> Page | None:
    try:
        return page(url)
    except urllib.error.HTTPError:  # 503 until the fold has caught up
        return None


def _when_all(prometheus: Prometheus, instance: str, keys: set[tuple[str, tuple[tuple[str, str], ...]]]) -> Page | None:
    came = stored(prometheus, instance)
    return came if keys <= set(came) else None


def test_a_page_beyond_the_limits_is_not_taken() -> None:
    def huge() -> str:
        return "".join(f'flip_x{{n="{number}"}} 1\n' for number in range(60_000))

    with static_page(huge) as instance, Prometheus([instance], limits=limits()) as prometheus:
        wait_for(lambda: prometheus.value(f'up{{instance="{instance}"}}') == 0, 30, "the target counts as down")
        assert prometheus.query("flip_x") == []

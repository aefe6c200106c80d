"""The dashboards: as their source says, as Grafana's types say, and asked of a real Prometheus that saw real runs."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

import otel_collector
from demo_runs import DemoRuns
from flip_observability.ledger import Ledger
from flip_observability.metrics import CATALOGUE
from flip_observability.observer import Observer
from flip_observability.settings import Settings
from grafana_queries import (
    Asked,
    annotation_queries,
    has_data,
    panel_queries,
    query_variables,
    substituted,
    values_of,
)
from history import Run
from prometheus_tools import Prometheus, static_page
from waiting import free_port, wait_for

ROOT = Path(__file__).parent.parent / "dashboards"
RULES = ROOT / "prometheus" / "flip-alerts.yml"
FILES = ("flip-fleet.json", "flip-run.json", "flip-health.json")
NET = "default"
needs_sdk = pytest.mark.skipif(sys.version_info < (3, 11), reason="Grafana's SDK needs Python 3.11")

NO_COLLECTOR = "the collector has not been built here (make collector); its own metrics are not scraped"
RIGHTLY_EMPTY: Mapping[str, str] = {}
"""Query of a panel to the reason why it gives nothing after the demo's scenarios."""


def load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "json" / name).read_text(encoding="utf-8"))
    return data


def panels(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


# -- as written --------------------------------------------------------------------------------------------------------


@needs_sdk
@pytest.mark.parametrize("name", FILES)
def test_the_file_is_what_its_source_makes(name: str) -> None:
    from dashboards.grafana.boards import DASHBOARDS, rendered

    assert set(DASHBOARDS) == set(FILES) == {path.name for path in (ROOT / "json").iterdir()}
    assert (ROOT / "json" / name).read_text(encoding="utf-8") == rendered(name), "run: make dashboards"


@needs_sdk
@pytest.mark.parametrize("name", FILES)
def test_grafanas_types_read_it_without_loss(name: str) -> None:
    from dashboards.grafana.parts import Moment
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    committed = load(name)
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(load(name))))
    # The types have no fields for an annotation's own time: these are Grafana's, and checked by name.
    for annotation in committed.get("annotations", {}).get("list", []):
        assert annotation.keys() >= Moment.EXTRA
        for field in Moment.EXTRA:
            del annotation[field]
    assert again == committed


@pytest.mark.parametrize("name", FILES)
def test_every_panel_says_what_it_shows(name: str) -> None:
    dashboard = load(name)
    assert f"{dashboard['uid']}.json" == name
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)
    for panel in panels(dashboard):
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] in ("${datasource}", "${tempo}"), panel["title"]


@pytest.mark.parametrize("name", FILES)
def test_no_panel_lies_on_another_or_sticks_out(name: str) -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in load(name)["panels"]]
    for title, place in places:
        assert place["x"] + place["w"] <= 24, title
    for (title, a), (other, b) in itertools.combinations(places, 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"{title} and {other}"


@pytest.mark.parametrize("name", FILES)
def test_every_metric_is_in_the_catalogue(name: str) -> None:
    known = {metric.name: metric.kind for metric in CATALOGUE}
    known |= {f"{n}_{part}": "histogram" for n, kind in known.items() if kind == "histogram" for part in PARTS}
    dashboard = load(name)
    text = [asked.expr for asked in (*panel_queries(dashboard), *annotation_queries(dashboard))]
    text += [variable["query"]["query"] for variable in query_variables(dashboard)]
    named = set(re.findall(r"\bflip_\w+", "\n".join(text)))
    assert named
    assert named - known.keys() == set()


PARTS = ("bucket", "sum", "count")


def test_all_metrics_of_the_catalogue_are_on_a_dashboard() -> None:
    text = "".join((ROOT / "json" / name).read_text(encoding="utf-8") for name in FILES)
    assert [metric.name for metric in CATALOGUE if metric.name not in text] == []


@pytest.mark.parametrize("name", FILES)
def test_quantiles_over_time_show_their_exemplars(name: str) -> None:
    shown = {
        (panel["title"], target["legendFormat"]): target.get("exemplar", False)
        for panel in panels(load(name))
        for target in panel["targets"]
        if "histogram_quantile(0.95" in target.get("expr", "") and target.get("range")
    }
    assert shown
    assert all(shown.values()), shown


def test_links_lead_to_dashboards_that_exist_and_name_their_variables() -> None:
    dashboards = [load(name) for name in FILES]
    variables = {d["uid"]: {variable["name"] for variable in d["templating"]["list"]} for d in dashboards}
    text = json.dumps(dashboards)
    links = re.findall(r'"url": "(/d/[^"]+)"', text)
    assert len(links) >= 4
    for link in links:
        uid, _, query = link.removeprefix("/d/").partition("?")
        assert set(re.findall(r"var-(\w+)=", query)) <= variables[uid], link
    panes = [
        json.loads(pane.replace("%22", '"')) for pane in re.findall(r'/explore\?schemaVersion=1&panes=([^"]+)', text)
    ]
    queries = [pane["trace"]["queries"][0]["query"] for pane in panes]
    assert sorted(set(queries)) == ["${__data.fields.Trace}", "${trace}"]


def test_provisioned_data_sources_are_those_that_links_and_exemplars_name() -> None:
    sources = yaml.safe_load((ROOT / "provisioning" / "datasources" / "flip.yaml").read_text())["datasources"]
    by_uid = {source["uid"]: source for source in sources}
    assert set(by_uid) == {"prometheus", "tempo"}
    (exemplars,) = by_uid["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert (exemplars["name"], exemplars["datasourceUid"]) == ("trace_id", "tempo")
    provider = yaml.safe_load((ROOT / "provisioning" / "dashboards" / "flip.yaml").read_text())["providers"][0]
    assert provider["options"]["path"].startswith("/etc/grafana/")
    assert not provider["allowUiUpdates"]


# -- as answered -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A Prometheus that has scraped an exporter over real runs, while one more is in progress."""

    prometheus: Prometheus
    runs: Mapping[str, str]
    has_collector: bool
    end: float

    def settings(self, dashboard: Mapping[str, Any]) -> list[dict[str, str]]:
        """Values for the variables of a dashboard: one set for each run where it has a variable for that."""
        chosen = {"net": NET, "model": ".*"}
        names = [variable["name"] for variable in query_variables(dashboard)]
        if "run" not in names:
            return [chosen]
        return [{**chosen, "run": run, "trace": run.replace("-", "")} for run in self.runs.values()]

    def silent(self, dashboard: Mapping[str, Any], asked: Asked) -> str:
        """What is wrong with a query; empty when it gives data."""
        try:
            if any(has_data(self.prometheus, asked, chosen, self.end) for chosen in self.settings(dashboard)):
                return ""
        except AssertionError as error:
            return f"{asked.where}: {error}"
        return f"{asked.where}: no data for {asked.expr}"

    def expected_empty(self, asked: Asked) -> str | None:
        if "otelcol_" in asked.expr and not self.has_collector:
            return NO_COLLECTOR
        return RIGHTLY_EMPTY.get(asked.where)


@pytest.fixture(scope="module")
def scene(demo_runs: DemoRuns, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    ledger = demo_runs.copy_of_ledger(folder / "ledger")
    (folder / "new").mkdir()
    settings = Settings(LOCAL_DEV=True, NET_ID=NET)
    port = free_port()
    with contextlib.ExitStack() as stack:
        targets: dict[str, dict[str, str]] = {f"127.0.0.1:{port}": {}}
        page = collectors_page()
        if page is not None:
            targets[stack.enter_context(static_page(lambda: page))] = {"service": "otel-collector"}
        prometheus = stack.enter_context(Prometheus(targets, rules=[RULES]))
        # A server on which nothing has happened yet; then the same after the demo's scenarios.
        with observing(settings, folder / "new", port):
            prometheus.wait_for_scrape()
        stack.enter_context(observing(settings, ledger, port))
        prometheus.wait_for_scrape()
        live = play(ledger, prometheus)
        wait_for(lambda: prometheus.alerts("FlipRunFailed"), 30, "the alert for the failed runs")
        prometheus.wait_for_scrape()
        runs = {run.scenario: run.run_id for run in demo_runs} | {"live": live}
        yield Scene(prometheus, runs, page is not None, time.time())


def collectors_page() -> str | None:
    """What a real collector says of itself after some spans; None when there is none on this machine."""
    try:
        with (
            otel_collector.TraceStore() as store,
            otel_collector.Collector(trace_store=store.address) as collector,
        ):
            send_spans(collector)
            otel_collector.wait_for_spans(store, 3)
            with urllib.request.urlopen(f"http://127.0.0.1:{collector.metrics_port}/metrics", timeout=10) as page:
                return str(page.read().decode())
    except pytest.skip.Exception:
        return None


def send_spans(collector: otel_collector.Collector) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"127.0.0.1:{collector.grpc_port}", insecure=True)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for number in range(3):
        provider.get_tracer("test").start_span(f"span-{number}").end()
    provider.shutdown()


@contextlib.contextmanager
def observing(settings: Settings, ledger: Path, port: int) -> Iterator[None]:
    observer = Observer(settings, ledger, port=port, insist=True)
    observer.start()
    try:
        yield
    finally:
        observer.stop()


def play(folder: Path, prometheus: Prometheus) -> str:
    """A run that is in its third round when this ends, each of its rounds scraped."""
    with Ledger(folder) as ledger:
        run = Run(ledger, begin=time.time(), net_id=NET)
        run.train({"site-1": 0.2, "site-2": 0.3, "site-3": 0.9}, rounds=1)
        prometheus.wait_for_scrape()
        for number in (2, 3):
            start = time.time() - run.begin
            run.play_round(number, 5, start, {"site-1": 0.2, "site-2": 0.3, "site-3": 0.9})
            run.at(start + 1.0, "_before_aggregation")
            run.at(start + 1.1, "_after_aggregation")
            prometheus.wait_for_scrape()
        return run.run_id


@pytest.mark.nvflare_job
def test_every_query_returns_data(scene: Scene) -> None:
    wrong = []
    for name in FILES:
        dashboard = load(name)
        for asked in (*panel_queries(dashboard), *annotation_queries(dashboard)):
            problem, reason = scene.silent(dashboard, asked), scene.expected_empty(asked)
            if reason is None and problem:
                wrong.append(f"{name}: {problem}")
            if reason is not None and not problem:
                wrong.append(f"{name}: {asked.where} gives data, and the table says that it does not: {reason}")
    assert wrong == []


@pytest.mark.nvflare_job
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("flip_run_round{", "flip_run_rounds{"),
        ('net_id="$net"', 'net="$net"'),
        ("max(flip_run_round{", "max(flip_run_round{{"),
        ("$run", "$runs"),
    ],
    ids=["metric", "label", "syntax", "variable"],
)
def test_a_broken_query_is_found(scene: Scene, good: str, bad: str) -> None:
    dashboard = load("flip-run.json")
    whole = next(asked for asked in panel_queries(dashboard) if asked.where == "Round / A")
    assert scene.silent(dashboard, whole) == ""
    broken = Asked(whole.where, whole.expr.replace(good, bad), whole.instant)
    assert broken != whole
    assert "Round / A" in scene.silent(dashboard, broken)


@pytest.mark.nvflare_job
@pytest.mark.parametrize("name", FILES)
def test_variables_offer_what_there_is(scene: Scene, name: str) -> None:
    chosen: dict[str, str] = {}
    for variable in query_variables(load(name)):
        offered = values_of(scene.prometheus, variable, chosen, scene.end)
        assert offered, variable["name"]
        first = offered[0]
        chosen[variable["name"]] = ".*" if variable.get("includeAll") else first
        if variable["name"] == "net":
            assert offered == [NET]
        if variable["name"] == "run":
            assert set(offered) == set(scene.runs.values())
            assert first == scene.runs["live"]  # the latest is the one to be shown
    if "run" in chosen:
        assert chosen["trace"] == chosen["run"].replace("-", "")


@pytest.mark.nvflare_job
def test_the_trace_panel_asks_for_the_runs_trace(scene: Scene, demo_runs: DemoRuns) -> None:
    (panel,) = [panel for panel in load("flip-run.json")["panels"] if panel["type"] == "traces"]
    (target,) = panel["targets"]
    assert (target["queryType"], target["datasource"]["type"]) == ("traceql", "tempo")
    (variable,) = [v for v in query_variables(load("flip-run.json")) if v["name"] == "trace"]
    for run in demo_runs:
        (trace,) = values_of(scene.prometheus, variable, {"net": NET, "run": run.run_id}, scene.end)
        # Tempo looks a trace up by its id when the query is nothing but hexadecimal digits.
        query = substituted(target["query"], {"trace": trace})
        assert re.fullmatch("[0-9a-f]{32}", query)
        assert {span.trace_id for span in run.spans if span.name == "flip.run"} == {query}


@pytest.mark.nvflare_job
def test_the_table_of_runs_joins_to_one_row_for_each_run(scene: Scene) -> None:
    dashboard = load("flip-fleet.json")
    (panel,) = [panel for panel in dashboard["panels"] if panel["title"] == "Latest runs"]
    keys: list[set[str]] = []
    for target in panel["targets"]:
        found = scene.prometheus.query(substituted(target["expr"], scene.settings(dashboard)[0]), scene.end)
        keys.append({series["metric"]["run_id"] for series in found})
        assert len(found) == len(keys[-1]), "a run has more than one row"
        for series in found:
            if "trace_id" in series["metric"]:
                assert series["metric"]["trace_id"] == series["metric"]["run_id"].replace("-", "")
    assert keys[0] == set(scene.runs.values())
    assert all(key <= keys[0] for key in keys)


@pytest.mark.nvflare_job
def test_annotations_are_at_the_time_of_the_problem(scene: Scene, demo_runs: DemoRuns) -> None:
    dashboard = load("flip-run.json")
    at = {
        asked.where: scene.prometheus.query(
            substituted(asked.expr, {"net": NET, "run": demo_runs["fatal"].run_id}), scene.end
        )
        for asked in annotation_queries(dashboard)
    }
    (fatal,) = at["annotation Fatal errors"]
    run = demo_runs["fatal"]
    assert run.began <= float(fatal["value"][1]) / 1000 <= run.ended
    assert at["annotation Aborts"] == at["annotation Upload failures"] == []


@pytest.mark.nvflare_job
def test_the_top_row_tells_of_the_fire(scene: Scene) -> None:
    dashboard = load("flip-fleet.json")
    said = {
        asked.where.removesuffix(" / A"): scene.prometheus.value(
            substituted(asked.expr, scene.settings(dashboard)[0]), scene.end
        )
        for asked in list(panel_queries(dashboard))[:8]
    }
    assert said == {
        "Servers not seen": 0,
        "Runs failed, 24 h": 2,
        "Runs orphaned, 24 h": 0,
        "Uploads failed, 24 h": 1,
        "Runs stalled now": 0,
        "Hub waits for a status": pytest.approx(0, abs=30),
        "Ledgers that cannot be written": 0,
        "Runs active": 1,
    }

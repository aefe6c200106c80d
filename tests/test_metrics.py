"""The page that Prometheus reads: its names, its formats, its size, and what it costs."""

from __future__ import annotations

import itertools
import logging
import math
import re
import sqlite3
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric as Family
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.samples import Sample

from flip_observability import metrics
from flip_observability._catalogue import CATALOGUE, clean_label
from flip_observability.constants import FlareEvents, FlipEvents, OwnEvents
from flip_observability.ledger import FILE_NAME, Entry, Ledger, LedgerError, OutboxItem
from flip_observability.lifecycle import Event
from flip_observability.metrics import FlipCollector, MetricsFold, render
from flip_observability.settings import Settings
from history import Run
from prometheus_tools import require, run_tool

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PROMETHEUS = f"{OPENMETRICS},application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
CLASSIC = "text/plain;version=0.0.4"
NOW = 1_800_000_000.0
MODEL_ID = str(uuid.UUID(int=7))
DAY = 86_400.0
NET = Settings(NET_ID="net-1")

INTERFACE = {
    "flip_lifecycle_events_total": ("counter", {"event"}),
    "flip_runs_started_total": ("counter", set()),
    "flip_runs_finished_total": ("counter", {"status"}),
    "flip_fatal_errors_total": ("counter", set()),
    "flip_aborts_total": ("counter", set()),
    "flip_orphaned_runs_total": ("counter", set()),
    "flip_results_upload_failures_total": ("counter", {"reason"}),
    "flip_hub_requests_total": ("counter", {"kind", "outcome"}),
    "flip_observability_errors_total": ("counter", {"component"}),
    "flip_run_duration_seconds": ("histogram", {"status"}),
    "flip_round_duration_seconds": ("histogram", set()),
    "flip_aggregation_duration_seconds": ("histogram", set()),
    "flip_client_task_duration_seconds": ("histogram", {"client", "task"}),
    "flip_results_upload_duration_seconds": ("histogram", set()),
    "flip_results_upload_size_bytes": ("histogram", set()),
    "flip_hub_delivery_lag_seconds": ("histogram", {"kind"}),
    "flip_runs_active": ("gauge", set()),
    "flip_run_status": ("gauge", {"run_id", "model_id", "status"}),
    "flip_run_round": ("gauge", {"run_id", "model_id"}),
    "flip_run_rounds_expected": ("gauge", {"run_id", "model_id"}),
    "flip_run_clients": ("gauge", {"run_id", "model_id"}),
    "flip_run_round_results": ("gauge", {"run_id", "model_id"}),
    "flip_run_last_event_timestamp_seconds": ("gauge", {"run_id", "model_id"}),
    "flip_run_stall_after_seconds": ("gauge", {"run_id", "model_id"}),
    "flip_run_final_status_timestamp_seconds": ("gauge", {"run_id", "model_id", "status"}),
    "flip_run_problem_timestamp_seconds": ("gauge", {"run_id", "model_id", "kind"}),
    "flip_outbox_pending": ("gauge", {"kind"}),
    "flip_outbox_oldest_age_seconds": ("gauge", {"kind"}),
    "flip_ledger_writable": ("gauge", set()),
    "flip_observer_loop_last_success_timestamp_seconds": ("gauge", {"loop"}),
    "flip_build_info": ("gauge", {"version", "nvflare_version"}),
}
"""Other people's queries stand on these names and labels."""


def page(collector: FlipCollector, accept: str | None = OPENMETRICS) -> str:
    return render(collector, accept)[1].decode("utf-8")


def parsed(text: str) -> dict[str, Family]:
    parse: Callable[[str], Iterator[Family]] = openmetrics_parser.text_string_to_metric_families
    return {family.name: family for family in parse(text)}


def samples(collector: FlipCollector) -> list[Sample]:
    return [sample for family in parsed(page(collector)).values() for sample in family.samples]


def value(collector: FlipCollector, name: str, **labels: str) -> float | None:
    """The one sample of that name and with these labels among others; None when there is none."""
    found = [s for s in samples(collector) if s.name == name and labels.items() <= s.labels.items()]
    assert len(found) <= 1
    return found[0].value if found else None


def lines_of(collector: FlipCollector) -> int:
    return page(collector).count("\n")


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger(tmp_path) as ledger:
        yield ledger


def collector_of(ledger: Ledger, **options: Any) -> FlipCollector:
    return FlipCollector(ledger, NET, **{"clock": lambda: NOW, **options})


def play(ledger: Ledger, status: str = "RESULTS_UPLOADED", begin: float = NOW - 600) -> Run:
    run = Run(ledger, begin=begin)
    run.train({"site-1": 3.0, "site-2": 5.0})
    run.finish(status)
    run.deliver()
    return run


@pytest.fixture
def server(ledger: Ledger) -> FlipCollector:
    """A ledger with a good run, a failed one and one under way, all counted."""
    play(ledger)
    play(ledger, "ERROR")
    under_way = Run(ledger, begin=NOW - 100)
    under_way.train({"site-1": 1.0})
    MetricsFold(ledger).catch_up()
    return collector_of(ledger, loops=lambda: {"fold": NOW - 1})


# -- names -----------------------------------------------------------------------------------------------------------


def test_names_kinds_and_labels_are_the_interface() -> None:
    found = {metric.name: (metric.kind, set(metric.label_names)) for metric in CATALOGUE}
    assert found == INTERFACE


def test_every_metric_is_explained_and_asked_for_by_its_example() -> None:
    for metric in CATALOGUE:
        assert metric.help.endswith(".")
        assert metric.name in metric.example
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert bool(metric.fact) == (metric.kind != "gauge")


def test_an_empty_ledger_shows_every_known_series_at_nothing(ledger: Ledger) -> None:
    collector = collector_of(ledger)
    assert value(collector, "flip_runs_finished_total", status="ERROR") == 0
    assert value(collector, "flip_results_upload_failures_total", reason="no_such_bucket") == 0
    assert value(collector, "flip_hub_requests_total", kind="status", outcome="rejected") == 0
    assert value(collector, "flip_lifecycle_events_total", event="end_run") == 0
    assert value(collector, "flip_run_duration_seconds_count", status="STOPPED") == 0
    assert value(collector, "flip_outbox_pending", kind="status") == 0
    assert value(collector, "flip_outbox_oldest_age_seconds", kind="status") == 0
    assert value(collector, "flip_runs_active") == 0
    shown = set(parsed(page(collector)))
    counted = {metric.name.removesuffix("_total") for metric in CATALOGUE if metric.kind != "gauge"}
    assert counted - shown == {"flip_client_task_duration_seconds"}


def test_every_known_event_is_known() -> None:
    [events] = CATALOGUE[0].labels
    names = {str(name).lstrip("_") for kind in (FlareEvents, FlipEvents, OwnEvents) for name in kind}
    assert names - set(events.values) == {FlipEvents.LOG_EXCEPTION.lstrip("_")}, "which nobody fires"


def test_every_part_that_can_fail_is_known() -> None:
    """``increase()`` does not see the first error of a part whose series begins with it."""
    [label] = next(metric for metric in CATALOGUE if metric.name == "flip_observability_errors_total").labels
    source = Path(metrics.__file__).parent
    found = {name for path in source.rglob("*.py") for name in re.findall(r'\breport\(\s*"(\w+)"', path.read_text())}
    assert {"hub", "ledger", "metrics"} <= found
    assert found <= set(label.values), "add them to COMPONENTS in _catalogue.py"


def test_every_series_has_a_net_and_no_counter_has_a_run(server: FlipCollector) -> None:
    found = samples(server)
    assert {sample.labels["net_id"] for sample in found} == {"net-1"}
    of_runs = {sample.name for sample in found if {"run_id", "model_id", "job_id"} & sample.labels.keys()}
    assert of_runs == {name for name, (_, labels) in INTERFACE.items() if "run_id" in labels}


def test_a_run_keeps_the_net_that_it_ran_in(ledger: Ledger) -> None:
    play(ledger)
    collector = FlipCollector(ledger, Settings(NET_ID="renamed"), clock=lambda: NOW)
    nets = {s.labels["net_id"] for s in samples(collector) if "run_id" in s.labels}
    assert nets == {"net-1"}


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_a_server_s_page_tells_what_happened(server: FlipCollector) -> None:
    expected = {
        ("flip_runs_started_total",): 3,
        ("flip_runs_finished_total", "status", "RESULTS_UPLOADED"): 1,
        ("flip_runs_finished_total", "status", "ERROR"): 1,
        ("flip_results_upload_failures_total", "reason", "access_denied"): 1,
        ("flip_round_duration_seconds_count",): 6,
        ("flip_round_duration_seconds_sum",): 4 * 6 + 2 * 2,
        ("flip_client_task_duration_seconds_sum", "client", "site-2"): 4 * 5,
        ("flip_results_upload_size_bytes_sum",): 2_048,
        ("flip_runs_active",): 1,
        ("flip_run_status", "status", "TRAINING_STARTED"): 1,
        ("flip_run_status", "status", "RESULTS_UPLOADED"): 1,
        ("flip_outbox_pending", "kind", "status"): 3,
        ("flip_ledger_writable",): 1,
        ("flip_observer_loop_last_success_timestamp_seconds", "loop", "fold"): NOW - 1,
        ("flip_build_info",): 1,
    }
    for (name, *labels), number in expected.items():
        assert value(server, name, **dict(zip(labels[::2], labels[1::2], strict=True))) == number, name


def test_a_run_in_numbers(ledger: Ledger) -> None:
    run = play(ledger, "ERROR")
    collector, of_run = collector_of(ledger), {"run_id": run.run_id, "model_id": run.model_id}
    expected = {
        "flip_run_status": 1,
        "flip_run_round": 2,
        "flip_run_rounds_expected": 2,
        "flip_run_clients": 2,
        "flip_run_round_results": 2,
        "flip_run_last_event_timestamp_seconds": run.begin + run.now,
        "flip_run_stall_after_seconds": 18,
        "flip_run_final_status_timestamp_seconds": run.begin + run.now,
        "flip_run_problem_timestamp_seconds": run.begin + run.now - 1,
    }
    assert {name: value(collector, name, **of_run) for name in expected} == expected
    assert value(collector, "flip_run_problem_timestamp_seconds", kind="upload_failed", **of_run) is not None


def test_a_queued_job_is_pending_and_not_active(ledger: Ledger) -> None:
    ledger.append(Entry("queued", NOW - 5, run={"net_id": "net-1"}))
    collector = collector_of(ledger)
    assert value(collector, "flip_run_status", run_id="queued", model_id="unknown", status="PENDING") == 1
    assert value(collector, "flip_run_last_event_timestamp_seconds") is None
    assert value(collector, "flip_runs_active") == 0


def test_what_waits_for_the_hub(ledger: Ledger) -> None:
    model = str(uuid.uuid4())
    for age in (70, 400, 5):
        ledger.append(Entry(None, NOW - age, outbox=(OutboxItem(model, "log", {}),)))
    ledger.append(Entry(None, NOW + 60, outbox=(OutboxItem(model, "strange\nkind", {}),)))
    collector = collector_of(ledger)
    assert value(collector, "flip_outbox_pending", kind="log") == 3
    assert value(collector, "flip_outbox_oldest_age_seconds", kind="log") == 400
    assert value(collector, "flip_outbox_oldest_age_seconds", kind="strange_kind") == 0, "a clock that jumped back"
    assert value(collector, "flip_outbox_oldest_age_seconds", kind="metric") == 0


def test_a_ledger_that_cannot_be_read_leaves_the_rest(ledger: Ledger) -> None:
    gone = Ledger(None)
    collector = collector_of(gone, loops=lambda: {"fold": 5.0})
    gone.close()
    shown = set(parsed(page(collector)))
    assert shown == {"flip_ledger_writable", "flip_observer_loop_last_success_timestamp_seconds", "flip_build_info"}
    assert value(collector, "flip_ledger_writable") == 0
    assert value(collector_of(ledger, writable=lambda: False), "flip_ledger_writable") == 0


def test_only_runs_that_have_changed_are_told_anew(ledger: Ledger) -> None:
    done, under_way = play(ledger), Run(ledger, begin=NOW - 100)
    under_way.train({"site-1": 1.0})
    collector = collector_of(ledger)

    def told() -> dict[str, list[Sample]]:
        found: dict[str, list[Sample]] = {done.run_id: [], under_way.run_id: []}
        for sample in (sample for family in collector.collect() for sample in family.samples):
            found.get(sample.labels.get("run_id", ""), []).append(sample)
        return found

    before = told()
    under_way.at(90, FlareEvents.START_WORKFLOW, workflow="evaluation")
    after = told()
    assert [id(sample) for sample in after[done.run_id]] == [id(sample) for sample in before[done.run_id]]
    assert after[under_way.run_id] != before[under_way.run_id]
    assert value(collector, "flip_run_last_event_timestamp_seconds", run_id=under_way.run_id) == NOW - 10
    assert value(collector, "flip_run_round", run_id=under_way.run_id) is None, "another workflow has none yet"
    for begin in (NOW - 90_000, NOW - 80_000):  # the first are shown for being the latest, until there are others
        for number in range(50):
            play(ledger, begin=begin + number)
        told()
    assert len(collector._told) == 52
    assert collector._told.keys() == shown_runs(collector), "what is not shown any more is forgotten"


# -- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (OPENMETRICS, "openmetrics"),
        (PROMETHEUS, "openmetrics"),
        *((accept, "plain") for accept in (CLASSIC, "", None, "*/*", "text/html", "nonsense;;;,,")),
        ("text/plain; version=x", "plain"),
        ("application/openmetrics-text; version=x", "plain"),
    ],
    ids=[
        "openmetrics",
        "prometheus",
        "classic",
        "empty",
        "none",
        "any",
        "html",
        "nonsense",
        "no-version",
        "no-openmetrics",
    ],
)
def test_the_scraper_chooses_the_format(accept: str | None, kind: str, server: FlipCollector) -> None:
    content_type, body = render(server, accept)
    text = body.decode("utf-8")
    assert kind in content_type
    assert text.endswith("# EOF\n") == (kind == "openmetrics")
    assert ("trace_id" in text) == (kind == "openmetrics")
    assert "_created" not in text


def test_both_formats_say_the_same(server: FlipCollector) -> None:
    classic = parser.text_string_to_metric_families(page(server, CLASSIC))
    of_classic = {(s.name, tuple(sorted(s.labels.items()))): s.value for family in classic for s in family.samples}
    of_openmetrics = {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples(server)}
    assert of_classic == of_openmetrics
    assert len(of_classic) > 200


def test_exemplars_lead_to_the_trace_of_the_run(ledger: Ledger) -> None:
    run = play(ledger, "ERROR")
    MetricsFold(ledger).catch_up()
    found = [sample for sample in samples(collector_of(ledger)) if sample.exemplar is not None]
    assert {s.exemplar.labels["trace_id"] for s in found if s.exemplar} == {uuid.UUID(run.run_id).hex}
    names = {sample.name for sample in found}
    assert {
        "flip_runs_finished_total",
        "flip_results_upload_failures_total",
        "flip_run_duration_seconds_bucket",
        "flip_client_task_duration_seconds_bucket",
    } <= names
    assert "flip_runs_started_total" not in names
    [finished] = [sample for sample in found if sample.name == "flip_runs_finished_total"]
    assert finished.exemplar is not None
    assert float(finished.exemplar.timestamp or 0) == pytest.approx(run.begin + run.now)


def test_a_histogram_adds_up(server: FlipCollector) -> None:
    family = parsed(page(server))["flip_run_duration_seconds"]
    buckets = [s for s in family.samples if s.name.endswith("_bucket") and s.labels["status"] == "ERROR"]
    assert [s.value for s in buckets] == sorted(s.value for s in buckets)
    assert buckets[-1].labels["le"] == "+Inf"
    assert buckets[-1].value == value(server, "flip_run_duration_seconds_count", status="ERROR") == 1
    assert next(s.labels["le"] for s in buckets if s.value) == "30.0"


@pytest.mark.system
def test_promtool_has_nothing_to_say(server: FlipCollector) -> None:
    tool = [str(require("promtool")), "check", "metrics"]
    done = subprocess.run(tool, input=page(server, CLASSIC), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.system
def test_every_example_is_a_query(tmp_path: Path) -> None:
    rules = ["groups:", "- name: examples", "  rules:"]
    for metric in CATALOGUE:
        rules += [f"  - record: example:{metric.name}", "    expr: |", f"      {metric.example}"]
    (tmp_path / "rules.yml").write_text("\n".join(rules) + "\n")
    done = run_tool("promtool", "check", "rules", tmp_path / "rules.yml")
    assert done.returncode == 0, done.stderr
    assert f"{len(CATALOGUE)} rules found" in done.stdout


HOSTILE = [
    '"',
    "\\",
    "\n",
    "\r\n",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "\u2028",
    "é",
    "東京",
    "a" * 10_000,
    "}{",
    "# EOF",
    "",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_cannot_break_the_page(text: str, ledger: Ledger) -> None:
    run = Run(ledger, run_id=f"run{text[:20]}".encode("utf-8", "replace").decode(), begin=NOW - 100)
    run.train({f"site{text}": 2.0, text: 3.0})
    ledger.append(Entry(run.run_id, NOW, Event("_end_run", NOW), (("upload_failure", 1, {"reason": text}),)))
    assert MetricsFold(ledger).catch_up()
    found = samples(collector_of(ledger, loops=lambda: {text: 1.0}))
    clients = {s.labels["client"] for s in found if s.name == "flip_client_task_duration_seconds_count"}
    assert clients == {clean_label(f"site{text}"), clean_label(text)}
    assert all(len(label) <= 96 and label.isprintable() and label for s in found for label in s.labels.values())
    assert page(collector_of(ledger)).count("# EOF\n") == 1
    list(parser.text_string_to_metric_families(page(collector_of(ledger), CLASSIC)))


def test_a_run_id_is_harmless_where_an_alert_puts_it_into_a_command(ledger: Ledger) -> None:
    hostile = ["$(touch pwned)", "`touch pwned`", "; touch pwned", "| touch pwned", "--help", "~root", "a b", "é"]
    for run_id in (*hostile, MODEL_ID, "simulate_job"):
        Run(ledger, run_id=run_id, model_id=run_id, begin=NOW - 100).train({"site-1": 2.0})
    found = samples(collector_of(ledger))
    shown = {s.labels[name] for s in found for name in ("run_id", "model_id") if name in s.labels}
    assert {MODEL_ID, "simulate_job"} < shown
    assert len(shown) == len(hostile) + 2
    assert all(re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.~-]*", label) for label in shown)


@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_any_text_makes_a_label(text: str) -> None:
    label = clean_label(text)
    assert 0 < len(label) <= 96
    assert label.isprintable()
    assert clean_label(label) == label
    label.encode("utf-8")


# -- size and cost ---------------------------------------------------------------------------------------------------


def finished_runs(directory: Path, number: int, latest: float) -> None:
    """History of ``number`` runs, a minute apart, the latest at ``latest``."""
    columns = "run_id model_id net_id created started last_event status final_status final_time round total_rounds"
    columns = f"{columns} clients round_results stall_after problems".replace(" ", ", ")
    db = sqlite3.connect(directory / FILE_NAME)
    with db:
        db.executemany(
            f"INSERT INTO runs ({columns}) VALUES "
            "(?1, ?1, 'net-1', ?2, ?2, ?2, 'ERROR', 'ERROR', ?2, 2, 2, 2, 2, 18.0, '{\"fatal_error\": 5}')",
            ((str(uuid.UUID(int=i)), latest - 60 * i) for i in range(number)),
        )
    db.close()


def shown_runs(collector: FlipCollector) -> set[str]:
    return {sample.labels["run_id"] for sample in samples(collector) if sample.name == "flip_run_status"}


def test_history_does_not_make_the_page_longer(tmp_path: Path) -> None:
    sizes = []
    for number in (100, 10_000):
        folder = tmp_path / str(number)
        with Ledger(folder) as ledger:
            finished_runs(folder, number, NOW - 2 * DAY)
            assert len(shown_runs(collector_of(ledger))) == 50
            sizes.append(len(page(collector_of(ledger))))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("recent", "finished", "shown"), [(0, 30, 0), (7, 30, 7), (50, 30, 30), (1_000, 30, 30)])
def test_the_latest_runs_are_shown_however_old(recent: int, finished: int, shown: int, tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        finished_runs(tmp_path, finished, NOW - 30 * DAY)
        settings = Settings(FLIP_METRICS_RECENT_RUNS=recent)
        found = shown_runs(FlipCollector(ledger, settings, clock=lambda: NOW))
        assert found == {str(uuid.UUID(int=i)) for i in range(shown)}


def test_what_finished_within_a_day_is_shown_whatever_else(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        finished_runs(tmp_path, 1_600, NOW)  # one a minute; a day has 1,440
        assert len(shown_runs(collector_of(ledger))) == 1_440


def test_there_is_a_limit_to_a_day_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(metrics, "MAX_FINISHED_RUNS", 100)
    with Ledger(tmp_path) as ledger, caplog.at_level(logging.WARNING):
        finished_runs(tmp_path, 150, NOW)
        collector = collector_of(ledger)
        assert shown_runs(collector) == shown_runs(collector) == {str(uuid.UUID(int=i)) for i in range(100)}
        said = [record for record in caplog.records if record.name == metrics.__name__]
        assert len(said) == 1, "said once, not at every scrape"


def test_of_many_open_runs_the_most_active_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Ledger(tmp_path) as ledger:
        finished_runs(tmp_path, 600, NOW)
        db = sqlite3.connect(tmp_path / FILE_NAME)
        with db:
            db.execute("UPDATE runs SET final_status = NULL, final_time = NULL, status = 'TRAINING_STARTED'")
        db.close()
        collector = collector_of(ledger)
        assert shown_runs(collector) == {str(uuid.UUID(int=i)) for i in range(metrics.MAX_OPEN_RUNS)}
        assert value(collector, "flip_runs_active") == 600
        assert "most recently active" in caplog.text


def test_five_thousand_clients_make_no_longer_page_than_five_hundred(tmp_path: Path) -> None:
    lines = []
    for number in (500, 5_000):
        with Ledger(tmp_path / str(number)) as ledger:
            for start in range(0, number, 100):
                labels = ({"client": f"client-{i}", "task": "train"} for i in range(start, start + 100))
                facts = tuple(("client_task_duration", 1.0, each) for each in labels)
                ledger.append(Entry("r", NOW, Event("_start_run", NOW), facts))
            assert MetricsFold(ledger).catch_up()
            lines.append(lines_of(collector_of(ledger)))
            found = samples(collector_of(ledger))
            assert sum(s.value for s in found if s.name == "flip_client_task_duration_seconds_count") == number
    assert lines[0] == lines[1]


def test_a_scrape_reads_by_index_only(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        finished_runs(tmp_path, 200, NOW)
        statements: list[str] = []
        ledger._db.set_trace_callback(statements.append)
        page(collector_of(ledger))
        assert MetricsFold(ledger).catch_up()
        ledger._db.set_trace_callback(None)
        plans = [
            row[3]
            for sql in statements
            if sql.startswith("SELECT")
            for row in ledger._rows(f"EXPLAIN QUERY PLAN {sql}")
        ]
    assert len(plans) >= 6
    scans = {plan for plan in plans if plan.startswith("SCAN") and "INDEX" not in plan}
    assert scans == {"SCAN metric_state"}


# -- many at once ----------------------------------------------------------------------------------------------------


def test_a_run_that_ends_in_the_middle_of_a_scrape_is_told_of_once(tmp_path: Path) -> None:
    with Ledger(tmp_path) as mine:
        run = Run(mine)
        run.train({"site-1": 1.0})

        class Slow(Ledger):
            def open_runs(self, limit: int) -> list[dict[str, Any]]:
                found = super().open_runs(limit)
                run.finish()
                return found

        with Slow(tmp_path) as reader:
            statuses = [s.labels["status"] for s in samples(collector_of(reader)) if s.name == "flip_run_status"]
    assert statuses == ["RESULTS_UPLOADED"]


def test_scrapes_while_sixteen_runs_write(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=run)

    def write() -> None:
        with Ledger(tmp_path) as mine:
            run = Run(mine, tells_hub=False)
            run.train({"site-1": 1.0, "site-2": 2.0}, rounds=5)
            run.finish()

    Ledger(tmp_path).close()
    writers = [guarded(write) for _ in range(16)]
    reader, folder = Ledger(tmp_path), Ledger(tmp_path)
    collector, fold = FlipCollector(reader, NET), MetricsFold(folder)
    for writer in writers:
        writer.start()
    seen: list[Mapping[str, float]] = []
    while any(writer.is_alive() for writer in writers) or not fold.catch_up():
        fold.catch_up()
        found = [s for s in samples(collector) if re.search("_(total|count|bucket)$", s.name)]
        seen.append({f"{s.name} {sorted(s.labels.items())}": s.value for s in found})
    for writer in writers:
        writer.join()
    assert failures == []
    for before, after in itertools.pairwise(seen):
        assert all(after[key] >= number for key, number in before.items()), "a counter never falls"
    assert value(collector, "flip_runs_finished_total", status="RESULTS_UPLOADED") == 16
    assert value(collector, "flip_round_duration_seconds_count") == 80
    assert math.isclose(value(collector, "flip_round_duration_seconds_sum") or 0, 16 * 5 * 3)
    reader.close()
    folder.close()


def test_a_ledger_deleted_under_a_collector_is_opened_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = Ledger(tmp_path)
    play(held)
    assert MetricsFold(held).catch_up()
    collector = collector_of(held)
    assert value(collector, "flip_runs_started_total") == 1
    for path in tmp_path.glob(f"{FILE_NAME}*"):
        path.unlink()
    assert value(collector, "flip_runs_started_total") == 0
    assert "counters restart" in caplog.text
    with Ledger(tmp_path) as fresh:
        play(fresh)
        play(fresh)
        assert MetricsFold(fresh).catch_up()
        assert value(collector, "flip_runs_started_total") == 2
    held.close()


def test_a_damaged_ledger_costs_one_scrape(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        play(ledger)
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.seek(4_096)
        file.write(b"not a page of a database " * 4_000)
    held = Ledger(tmp_path)
    collector = collector_of(held)
    written = [value(collector, "flip_ledger_writable") for _ in range(4)]
    assert 0 in written
    assert written[-1] == 1
    assert list(tmp_path.glob(f"{FILE_NAME}.corrupt-*"))
    with Ledger(tmp_path) as fresh:
        play(fresh)
    held.close()


def test_a_run_with_damaged_problems_hides_no_other(ledger: Ledger, tmp_path: Path) -> None:
    runs = {play(ledger).run_id, play(ledger, "ERROR").run_id, play(ledger, "ERROR").run_id}
    db = sqlite3.connect(tmp_path / FILE_NAME)
    with db:
        db.execute("UPDATE runs SET problems = '[3' WHERE run_id = ?", (min(runs),))
        db.execute("UPDATE runs SET problems = '7', round = 'x', clients = NULL WHERE run_id = ?", (max(runs),))
    db.close()
    assert shown_runs(collector_of(ledger)) == runs


def test_a_locked_ledger_is_an_error_not_a_count(tmp_path: Path) -> None:
    with Ledger(tmp_path, busy_ms=1) as ledger, Ledger(tmp_path) as other:
        play(other)
        fold = MetricsFold(ledger)
        with other._transaction(), pytest.raises(LedgerError):
            fold.catch_up()
        assert fold.catch_up()
        assert value(collector_of(ledger), "flip_runs_started_total") == 1

"""The alerts on real programs: promtool plays their timelines, Prometheus evaluates them, Alertmanager sends them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboards.prometheus import alert_tests, alerts

from demo_runs import DemoRun, DemoRuns, copy_ledger
from flip_observability._catalogue import PROBLEMS
from flip_observability.constants import ModelStatus
from flip_observability.metrics import CATALOGUE
from prometheus_tools import Alertmanager, Prometheus, Webhook, run_tool, static_page
from waiting import free_port, wait_for

pytestmark = pytest.mark.system

FOLDER = alerts.RULES.parent
REPOSITORY = FOLDER.parent.parent
RUNBOOKS = REPOSITORY / "docs" / "runbooks.md"
SEVERITIES = {"critical", "warning", "info", "none"}
LINKS = {"flip_grafana_url": "https://grafana.example", "flip_runbook_url": "https://wiki.example/runbooks"}


def rules() -> dict[str, dict[str, Any]]:
    content = yaml.safe_load(alerts.RULES.read_text())
    return {rule["alert"]: rule for group in content["groups"] for rule in group["rules"]}


def play(
    folder: Path, rule: Mapping[str, Any], timelines: Sequence[alert_tests.Timeline]
) -> subprocess.CompletedProcess[str]:
    """Have promtool play timelines of a rule."""
    (folder / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [dict(rule)]}]}))
    (folder / "test.yml").write_text(alert_tests.render(timelines, "rules.yml"))
    return run_tool("promtool", "test", "rules", "test.yml", cwd=folder)


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_the_rule_file_is_what_the_table_says() -> None:
    assert alerts.RULES.read_text() == alerts.render(), "run make dashboards"


def test_every_alert_of_the_catalogue_is_there() -> None:
    assert set(rules()) == {
        *("FlipRunFailed", "FlipRunOrphaned", "FlipResultsUploadFailed", "FlipFatalError", "FlipHubRejected"),
        *("FlipRunAborted", "FlipRunStalled", "FlipClientsMissing", "FlipHubUnreachable", "FlipLedgerUnwritable"),
        *("FlipObservabilityErrors", "FlipObserverLoopStuck", "FlipObserverDown", "Watchdog", "FlipHubRejectedDetails"),
    }
    for rule in rules().values():
        assert rule["labels"]["severity"] in SEVERITIES
        assert rule["labels"]["lasts"] in {"moment", "condition"}
        assert len(rule["annotations"]["summary"]) < 160


def test_rules_and_runbooks_speak_of_metrics_labels_and_values_that_exist() -> None:
    known = {metric.name: {"net_id", *(label.name for label in metric.labels)} for metric in CATALOGUE}
    text = alerts.RULES.read_text() + RUNBOOKS.read_text()
    # Links' bases and exported histograms are other names.
    names = set(re.findall(r"\bflip_[a-z_]+\b", text)) - set(re.findall(r"\bflip_\w+_url\b", text))
    assert len(names) > 12
    assert names <= set(known)
    for name, matchers in re.findall(r"(flip_\w+){([^}]*)}", text.replace("%q", '"%q"')):
        for label, value in re.findall(r'(\w+)!?=~?"([^"]*)"', matchers):
            assert label in known[name], (name, label)
            values = {"kind": PROBLEMS, "status": tuple(ModelStatus)}.get(label)
            if values is not None and name.startswith("flip_run_"):
                assert set(value.split("|")) <= set(values), (name, value)


def test_promtool_accepts_the_configuration() -> None:
    result = run_tool("promtool", "check", "config", "prometheus.yml", cwd=FOLDER)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_links_bases_do_not_reach_alertmanager() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (drop,) = config["alerting"]["alert_relabel_configs"]
    used = set(re.findall(r"\$externalLabels\.(\w+)", alerts.RULES.read_text()))
    assert used == {"flip_grafana_url", "flip_runbook_url", "flip_trace_url"}
    assert set(config["global"]["external_labels"]) <= used
    assert drop["action"] == "labeldrop"
    assert all(re.fullmatch(drop["regex"], label) for label in used)


def test_the_scrape_job_is_the_one_that_the_alerts_look_for() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    job = next(job for job in config["scrape_configs"] if job["job_name"] == alerts.JOB)
    (files,) = job["file_sd_configs"]
    assert yaml.safe_load((FOLDER / files["files"][0]).read_text()) == [{"targets": ["127.0.0.1:9464"]}]


@pytest.mark.parametrize("name", list(alerts.BY_NAME))
def test_an_alert_fires_when_it_must_and_only_then(name: str, tmp_path: Path) -> None:
    result = play(tmp_path, rules()[name], alert_tests.timelines()[name])
    assert result.returncode == 0, (result.stdout + result.stderr)[:4_000]


def test_the_timelines_can_be_played_by_hand(tmp_path: Path) -> None:
    folder = tmp_path / "played"
    command = [sys.executable, "-m", alert_tests.__name__, str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=60)
    assert len(list(folder.glob("*.test.yml"))) == len(alerts.BY_NAME)
    result = run_tool("promtool", "test", "rules", "Watchdog.test.yml", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr


# -- rules that are a little wrong -------------------------------------------------------------------------------------

WINDOWS = (
    ("[15m]", "[3m]"),
    ("offset 15m", "offset 5m"),
    ("offset 15m", "offset 40m"),
    ("[1d]", "[6h]"),
    ("86400", "8640"),
    ("86400", "172800"),
    ("net_id, run_id", "run_id"),
    ("run_id, model_id", "model_id"),
    (", model_id", ""),
    ("model_id", "model_id, instance"),
    ("unless", "and"),
    ("unless", "or"),
)
KNOWN = (("[45m:1m]", "[10m:1m]"), ("[45m:1m]", "[3h:1m]"), ("== 1", "== 0"))
OF_A_RUN = (
    *KNOWN,
    (", instance)", ")"),
    ("unless on (net_id, run_id)", "unless on (net_id)"),
    ("unless on (net_id, run_id)", "unless on (run_id)"),
    ("unless", "and"),
)
RISES = (
    ("[15m]", "[3m]"),
    ("offset 15m", "offset 5m"),
    ("[1d]", "[6h]"),
    (">", ">="),
    (">", "<"),
    ("  or", "  and"),
    ("net_id, instance", "net_id"),
)
MUTANTS: dict[str, tuple[tuple[str, str], ...]] = {
    "FlipRunFailed": (*WINDOWS, ("ERROR|", ""), ("|RESULTS_UPLOAD_FAILED", ""), ("ERROR|RESULTS_UPLOAD_FAILED", ".+")),
    "FlipRunOrphaned": (("orphaned", "aborted"), ("orphaned", "fatal_error"), ("offset 15m", "offset 5m")),
    "FlipResultsUploadFailed": (("upload_failed", "orphaned"), ('kind="upload_failed"', ""), ("[1d]", "[6h]")),
    "FlipFatalError": (("fatal_error", "orphaned"), ("fatal_error", "upload_failed"), ("[15m]", "[3m]")),
    "FlipHubRejected": (("hub_rejected", "aborted"), ("86400", "8640"), ("unless", "or")),
    "FlipRunAborted": (("aborted", "fatal_error"), ('kind="aborted"', ""), ("net_id, run_id", "run_id")),
    "FlipRunStalled": (
        *OF_A_RUN,
        ("> bool", "< bool"),
        ("> bool", "> bool 2 *"),
        ("> bool", "> bool 0.5 *"),
        ("_seconds[45m]", "_seconds[1m]"),
    ),
    "FlipClientsMissing": (*OF_A_RUN, ("< bool", "> bool"), ("< bool", "<= bool"), ("for: 1m", "for: 5m")),
    "FlipHubUnreachable": (
        *KNOWN,
        ("300", "600"),
        ("300", "200"),
        ("> bool", ">= bool"),
        ("net_id, instance", "instance"),
        ("net_id, instance", "net_id"),
    ),
    "FlipLedgerUnwritable": (
        *KNOWN,
        ("bool 0", "bool 1"),
        ("== bool", "!= bool"),
        ("net_id, instance", "net_id"),
        ("for: 1m", "for: 10m"),
    ),
    "FlipObservabilityErrors": (*RISES, (", component", "")),
    "FlipHubRejectedDetails": (
        *RISES,
        (", kind)", ")"),
        ('kind!="status"', ""),
        ('kind!="status"', 'kind="status"'),
        ('outcome="rejected", ', ""),
        ('"rejected"', '"retried"'),
    ),
    "FlipObserverLoopStuck": (
        *KNOWN,
        ("bool 300", "bool 900"),
        ("bool 300", "bool 30"),
        ("bool 3600", "bool 300"),
        ("bool 3600", "bool 9000"),
        ('loop="sentinel"', 'loop="dispatcher"'),
        ('loop!="sentinel"', 'loop="fold"'),
        (", loop", ""),
        ("net_id, instance", "net_id"),
        ("for: 1m", "for: 10m"),
    ),
    "FlipObserverDown": (
        ("== 0", "== 1"),
        (f'job="{alerts.JOB}"', 'job="prometheus"'),
        (f'{{job="{alerts.JOB}"}}', ""),
        ("or\n  absent", "unless\n  absent"),
        ("or on", "unless on"),
        ("[7d]", "[1h]"),
        ("net_id, instance", "instance"),
        ("for: 5m", "for: 0s"),
        ("for: 5m", "for: 30m"),
    ),
    "Watchdog": (("vector(1)", "vector(1) > 1"), ("Watchdog", "Cerberus")),
}
"""Alert → a piece of its rule, and what is put in its place everywhere."""


def test_every_alert_has_mutants() -> None:
    assert set(MUTANTS) == set(alerts.BY_NAME)


@pytest.mark.parametrize("name", list(MUTANTS))
def mutate(rule: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    hold = f"for: {rule['for']}" if "for" in rule else ""
    assert old in (rule["expr"], hold, rule["alert"]) or old in rule["expr"], (old, "stands nowhere in the rule")
    mutant = {**rule, "alert": rule["alert"].replace(old, new), "expr": rule["expr"].replace(old, new)}
    return mutant | ({"for": new.removeprefix("for: ")} if old == hold else {})


def is_noticed(folder: Path, mutant: Mapping[str, Any], timelines: Sequence[alert_tests.Timeline]) -> bool:
    """Whether a timeline fails; the short ones first, for most mutants do not get far."""
    rest = sorted(timelines, key=lambda timeline: timeline.minutes)
    while rest:
        some, rest = rest[:3], rest[3:]
        result = play(folder, mutant, some)
        output = result.stdout + result.stderr
        assert not re.search("parse error|invalid|could not", output), f"no rule at all: {output}"
        if result.returncode != 0:
            return True
    return False


@pytest.mark.parametrize("name", list(MUTANTS))
def test_the_timelines_notice_a_rule_that_is_a_little_wrong(name: str, tmp_path: Path) -> None:
    rule, timelines = rules()[name], alert_tests.timelines()[name]
    mutants = {(old, new): mutate(rule, old, new) for old, new in MUTANTS[name]}
    assert [piece for piece, mutant in mutants.items() if not is_noticed(tmp_path, mutant, timelines)] == []


# -- Alertmanager's configuration --------------------------------------------------------------------------------------

CONFIG = FOLDER / "alertmanager.yml"


def with_examples(text: str) -> str:
    """The configuration in which every example stands in the place of what it is an example for."""
    lines: list[str] = []
    for line in text.splitlines():
        if match := re.fullmatch(r"( *)#: (.*)", line):
            if match[2].endswith("_configs:"):
                while not lines[-1].lstrip().startswith("- name:"):
                    lines.pop()
            lines.append(match[1] + match[2])
        else:
            lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("examples", [False, True], ids=["as it is", "with its examples"])
def test_amtool_accepts_alertmanagers_configuration(examples: bool, tmp_path: Path) -> None:
    text = CONFIG.read_text()
    file = tmp_path / "alertmanager.yml"
    file.write_text(with_examples(text) if examples else text)
    result = run_tool("amtool", "check-config", file)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("routing_key_file" in yaml.safe_dump(yaml.safe_load(file.read_text()))) is examples


def test_there_is_no_secret_and_nobody_elses_address_in_it() -> None:
    text = CONFIG.read_text()
    assert not re.search(r"(?<!_file)(key|password|token|credentials|secret):", text)
    urls = set(re.findall(r"https?://[^\s/'\"]+", text))
    assert urls == {"http://127.0.0.1:9", "https://pager.example"}


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ({"severity": "critical", "lasts": "moment"}, "page-moment"),
        ({"severity": "critical", "lasts": "condition"}, "page-condition"),
        ({"severity": "warning", "lasts": "moment"}, "office"),
        ({"severity": "warning", "lasts": "condition"}, "office"),
        ({"severity": "info", "lasts": "moment"}, "nobody"),
        ({"severity": "none", "lasts": "condition"}, "dead-mans-switch"),
        ({}, "office"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()) or "unknown",
)
def test_who_is_told(labels: Mapping[str, str], receiver: str) -> None:
    pairs = [f"{name}={value}" for name, value in labels.items()]
    result = run_tool(
        "amtool", "config", "routes", "test", f"--config.file={CONFIG}", f"--verify.receivers={receiver}", *pairs
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_inhibition_speaks_of_alerts_that_exist() -> None:
    named = set(re.findall(r"\b(?:Flip[A-Z]\w+|Watchdog)\b", CONFIG.read_text()))
    assert named <= set(alerts.BY_NAME)


def quick_alertmanager(hook: Webhook) -> Alertmanager:
    """Alertmanager with the real configuration, its receivers filled in, and less patience."""
    text = CONFIG.read_text().replace("http://127.0.0.1:9/", f"{hook.url}/")
    for slow, fast in (("group_wait: 30s", "group_wait: 1s"), ("group_interval: 5m", "group_interval: 1s")):
        assert slow in text
        text = text.replace(slow, fast)
    return Alertmanager(text)


def told(hook: Webhook, path: str) -> list[tuple[str, str | None]]:
    """Alert and run of every firing alert of every message to a receiver; again when it was told again."""
    return [
        (alert["labels"]["alertname"], alert["labels"].get("run_id"))
        for message in hook.notifications(path)
        for alert in message["alerts"]
        if alert["status"] == "firing"
    ]


def has_been_told(hook: Webhook, page: tuple[str, str]) -> bool:
    return page in told(hook, "/page")


def alert(name: str, **labels: str) -> dict[str, Any]:
    rule = alerts.BY_NAME[name]
    return {"labels": {"alertname": name, "severity": rule.severity, "lasts": rule.lasts, **labels}}


def test_one_broken_run_is_one_page_and_an_observer_explains_only_itself() -> None:
    failed = {"net_id": "net-1", "run_id": "run-1", "model_id": "model-1"}
    down = {"net_id": "net-1", "instance": "fl-1:9464"}
    with Webhook() as hook, quick_alertmanager(hook) as manager:
        manager.post(
            [
                *(alert(name, **failed) for name in ("FlipFatalError", "FlipRunOrphaned", "FlipResultsUploadFailed")),
                alert("FlipRunFailed", **failed),
                alert("FlipRunStalled", **failed, instance="fl-1:9464"),
                # The same run id elsewhere is another run, and another run is another run.
                alert("FlipFatalError", **{**failed, "net_id": "net-2"}),
                alert("FlipResultsUploadFailed", **{**failed, "run_id": "run-2"}),
                alert("FlipRunAborted", **{**failed, "run_id": "run-3"}),
                alert("FlipObserverDown", **down),
                alert("FlipHubUnreachable", **down),
                alert("FlipRunStalled", **down, run_id="run-4", model_id="model-4"),
                alert("FlipLedgerUnwritable", **{**down, "instance": "fl-9:9464"}),
                alert("FlipObserverLoopStuck", **{**down, "instance": "fl-9:9464"}, loop="fold"),
                # Without a target there is neither net nor instance; the watchdog has none either, and must be heard.
                alert("FlipObserverDown", job=alerts.JOB),
                alert("Watchdog"),
            ]
        )
        wait_for(lambda: hook.notifications("/alive"), 30, "the watchdog")
        wait_for(lambda: ("FlipResultsUploadFailed", "run-2") in told(hook, "/office"), 30, "office hours")
        wait_for(lambda: len(told(hook, "/page")) >= 4, 30, "the pages")
        time.sleep(3)  # for what must not come
        assert sorted(told(hook, "/page"), key=str) == [
            ("FlipLedgerUnwritable", None),
            ("FlipObserverDown", None),
            ("FlipObserverDown", None),
            ("FlipRunFailed", "run-1"),
        ]
        assert sorted(told(hook, "/office")) == [("FlipFatalError", "run-1"), ("FlipResultsUploadFailed", "run-2")]
        assert told(hook, "/alive") == [("Watchdog", None)]


# -- on a real Prometheus ----------------------------------------------------------------------------------------------

RUN, MODEL = "6f1c2c9e-55aa-4b6d-9d4e-1f2f30a94a10", 'a "model"\\ & ünï\ncode'
NET = 'net 1 & "two"'


def escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def everything_wrong() -> str:
    """A page of metrics on which all is wrong that can be."""
    run = f'net_id="{escape(NET)}",run_id="{RUN}",model_id="{escape(MODEL)}"'
    net, now = f'net_id="{escape(NET)}"', time.time()
    open_run = run.replace("6f1c", "7f1c")
    lines = [
        f'flip_run_final_status_timestamp_seconds{{{run},status="ERROR"}} {now}',
        *(
            f'flip_run_problem_timestamp_seconds{{{run},kind="{kind}"}} {now}'
            for kind in ("orphaned", "fatal_error", "aborted", "upload_failed", "hub_rejected")
        ),
        f"flip_run_last_event_timestamp_seconds{{{open_run}}} {now - 5_000}",
        f"flip_run_stall_after_seconds{{{open_run}}} 1800",
        f"flip_run_round_results{{{open_run}}} 1",
        f"flip_run_clients{{{open_run}}} 2",
        f'flip_outbox_oldest_age_seconds{{{net},kind="status"}} 900',
        f"flip_ledger_writable{{{net}}} 0",
        f'flip_observability_errors_total{{{net},component="hub"}} 3',
        f'flip_hub_requests_total{{{net},kind="metric",outcome="rejected"}} 3',
        f'flip_observer_loop_last_success_timestamp_seconds{{{net},loop="fold"}} {now - 900}',
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("links", [{}, LINKS, {**LINKS, "flip_trace_url": "https://jaeger.example/trace/"}], ids=len)
def test_every_annotation_can_be_read_and_every_link_followed(links: Mapping[str, str], tmp_path: Path) -> None:
    # A state is looked at every minute; the test has less patience.
    quick = tmp_path / "rules.yml"
    quick.write_text(alerts.RULES.read_text().replace("[45m:1m]", "[45m:1s]"))
    nobody = f"127.0.0.1:{free_port()}"
    with (
        static_page(everything_wrong) as target,
        Prometheus([target, nobody], rules=[quick], external_labels=links) as prometheus,
    ):
        found = wait_for(
            lambda: all_active(prometheus.alerts()) >= set(alerts.BY_NAME) and prometheus.alerts(), 60, "every alert"
        )
    for one in found:
        texts, labels = one["annotations"], one["labels"]
        for text in texts.values():
            assert not re.search(r"\{\{|<no value>|<error|%!", text), text
        name = labels["alertname"]
        runbook = links.get("flip_runbook_url", "docs/runbooks.md")
        assert texts["runbook_url"] == f"{runbook}#{name.lower()}"
        address = urllib.parse.urlsplit(texts["dashboard_url"])
        assert texts["dashboard_url"].startswith(links.get("flip_grafana_url", "http://localhost:3000") + "/d/flip-")
        asked = urllib.parse.parse_qs(address.query, strict_parsing=True, keep_blank_values=True)
        assert asked["var-net"] == [labels.get("net_id", "")]
        if "run_id" in labels:
            assert (asked["var-run"], asked["var-model"]) == ([labels["run_id"]], [MODEL])
            assert labels["run_id"] in texts["description"]
            assert labels["run_id"].replace("-", "") in urllib.parse.unquote(texts["trace_url"])
            assert texts["trace_url"].startswith(links.get("flip_trace_url") or links.get("flip_grafana_url", "http"))
    failed = next(one for one in found if one["labels"]["alertname"] == "FlipRunFailed")["annotations"]["description"]
    assert "Known of it: aborted, fatal_error, hub_rejected, orphaned, upload_failed." in failed


def all_active(found: list[dict[str, Any]]) -> set[str]:
    return {one["labels"]["alertname"] for one in found}


def test_a_prometheus_that_was_away_pages_once_when_it_is_back() -> None:
    broken = False

    def page() -> str:
        labels = f'net_id="net-1",run_id="{RUN}",model_id="model-1"'
        status = f"flip_run_status{{{labels}}} 1\n"
        failed = f'flip_run_final_status_timestamp_seconds{{{labels},status="ERROR"}} {begin}\n'
        return status + failed if broken else status

    begin = time.time()
    with Webhook() as hook, quick_alertmanager(hook) as manager, static_page(page) as target:
        with Prometheus([target], rules=[alerts.RULES], alertmanagers=[manager.address]) as prometheus:
            prometheus.wait_for_scrape()
            assert prometheus.alerts("FlipRunFailed") == []
            prometheus.stop()
            broken = True
            prometheus.start()
            wait_for(lambda: told(hook, "/page"), 30, "the page")
            prometheus.stop()
            prometheus.start()
            wait_for(lambda: prometheus.alerts("FlipRunFailed"), 30, "the same alert, found again")
            time.sleep(3)
        assert told(hook, "/page") == [("FlipRunFailed", RUN)]


# -- from a run that fails to the receiver -----------------------------------------------------------------------------


@contextlib.contextmanager
def exporter(ledger: Path, port: int) -> Iterator[None]:
    """``flip-obs serve`` as an operator starts it, until its end by SIGTERM."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("FLIP_", "OTEL_", "INTERNAL_"))
    }
    command = [sys.executable, "-m", "flip_observability.cli", "--dir", str(ledger), "serve", "--port", str(port)]
    process = subprocess.Popen(
        command,
        env={**environment, "LOCAL_DEV": "true", "NET_ID": "net-1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
        assert process.poll() is None, "the exporter has ended by itself"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


@pytest.mark.nvflare_job
def test_a_failed_run_pages_once_and_an_aborted_one_never(demo_runs: DemoRuns, tmp_path: Path) -> None:
    ledger, port = tmp_path / "ledger", free_port()
    fatal, aborted, lost = demo_runs["fatal"], demo_runs["abort"], demo_runs["upload-failure"]
    stages = sorted(demo_runs, key=lambda run: run.ended)
    with Webhook() as hook, quick_alertmanager(hook) as manager:
        with Prometheus(
            [f"127.0.0.1:{port}"], rules=[alerts.RULES], alertmanagers=[manager.address], external_labels=LINKS
        ) as prometheus:
            for stage in stages:
                # Between any two runs the exporter restarts.
                copy_ledger(stage.ledger_after, ledger)
                with exporter(ledger, port):
                    prometheus.wait_for_scrape(60)
                    if stage in (fatal, lost):
                        page = ("FlipRunFailed", stage.run_id)
                        wait_for(partial(has_been_told, hook, page), 60, "the page")
            with exporter(ledger, port):
                prometheus.wait_for_scrape(60)
                wait_for(lambda: prometheus.alerts("FlipRunAborted"), 30, "that the abort is known")
                time.sleep(3)
        pages = told(hook, "/page")
        assert sorted(pages) == sorted([("FlipRunFailed", fatal.run_id), ("FlipRunFailed", lost.run_id)])
        # Nobody hears of the abort, nor of a broken run a second time by its causes.
        office = told(hook, "/office")
        assert not {run for _, run in office} & {aborted.run_id, fatal.run_id, lost.run_id}, office
        check_the_page(hook, fatal)


def check_the_page(hook: Webhook, run: DemoRun) -> None:
    (message,) = [message for message in hook.notifications("/page") if message["groupLabels"]["run_id"] == run.run_id]
    (one,) = message["alerts"]
    labels, texts = one["labels"], one["annotations"]
    assert (labels["run_id"], labels["model_id"]) == (run.run_id, run.model_id)
    assert run.model_id in texts["summary"]
    assert "fatal_error" in texts["description"]
    assert f"flip-obs show {run.run_id}" in texts["description"]
    assert texts["runbook_url"] == f"{LINKS['flip_runbook_url']}#fliprunfailed"
    assert run.run_id in texts["dashboard_url"]
    assert run.run_id.replace("-", "") in texts["trace_url"]


# -- the runbooks ------------------------------------------------------------------------------------------------------


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", RUNBOOKS.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_alert_has_its_runbook() -> None:
    found = sections()
    assert [name for name in found if name in alerts.BY_NAME] == list(alerts.BY_NAME)
    for name, rule in alerts.BY_NAME.items():
        for part in ("**Means.**", "**Users see.**", "**Look.**", "**Do.**"):
            assert part in found[name], (name, part)
        assert f"*{rule.severity}" in found[name], (name, rule.severity)


def test_every_command_of_the_runbooks_and_alerts_exists() -> None:
    import typer.main

    from flip_observability.cli import app

    texts = RUNBOOKS.read_text() + alerts.RULES.read_text()
    named = set(re.findall(r"flip-obs ((?:[a-z]+)(?: [a-z]+)?)", texts))
    assert len(named) > 5
    for words in named:
        command: Any = typer.main.get_command(app)
        for word in words.split():
            if not hasattr(command, "commands"):
                break  # an argument or prose
            assert word in command.commands, f"flip-obs {words}"
            command = command.commands[word]


def test_every_query_of_the_runbooks_is_one() -> None:
    queries = re.findall(r"^```promql\n(.*?)^```", RUNBOOKS.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(queries) > 3
    with Prometheus() as prometheus:
        for query in queries:
            prometheus.query(query)


def test_the_dashboards_that_alerts_link_to_know_the_variables() -> None:
    boards = {}
    for file in sorted((FOLDER.parent / "json").glob("*.json")):
        board = json.loads(file.read_text())
        boards[board["uid"]] = {variable["name"] for variable in board["templating"]["list"]}
    for rule in rules().values():
        address = urllib.parse.urlsplit(re.sub(r"\{\{.*?\}\}", "", rule["annotations"]["dashboard_url"]))
        uid = address.path.rpartition("/")[2]
        used = {part.split("=")[0] for part in address.query.split("&") if part.startswith("var-")}
        assert {name.removeprefix("var-") for name in used} <= boards[uid], (rule["alert"], uid)

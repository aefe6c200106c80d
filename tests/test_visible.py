"""What happens in runs is visible, once, whole and without secrets: real runs, real exporters, a real Prometheus."""

from __future__ import annotations

import contextlib
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dashboards.prometheus import alerts

import planted
from certificates import Authority
from demo_runs import CANARY, PROTOCOLS, DemoRun, DemoRuns, load_run, play
from flip_observability._catalogue import CATALOGUE, clean_label
from flip_observability.demo.scenarios import SCENARIOS
from flip_observability.ending import SALVAGE
from flip_observability.ledger import FILE_NAME, Ledger
from history import Run
from otlp_sink import CLIENT, ERROR, OtlpSink, check_trace
from prometheus_tools import Prometheus
from test_serve import Server, serving
from waiting import free_port, wait_for

pytestmark = pytest.mark.system

SECONDS = 60.0


@contextlib.contextmanager
def exporter(ledger: Path, port: int, end: int = signal.SIGTERM) -> Iterator[Server]:
    """``flip-obs serve`` on a port, until it is ended by a signal."""
    with serving(ledger, "--port", str(port)) as server:
        assert server.port == port, server.said
        yield server
        assert server.process.poll() is None, "the exporter has ended by itself"
        code, _, _ = server.end(end)
        assert code == (0 if end == signal.SIGTERM else -end)


# -- counts ------------------------------------------------------------------------------------------------------------


def implied_counts(runs: list[DemoRun]) -> dict[str, float]:
    """What Prometheus must hold, by what the hub and the bucket recorded, and by nothing else."""
    finals = [run.statuses[-1] for run in runs]
    refused = [any(record.code == 403 for record in run.evidence.bucket) for run in runs]
    # Delivery is at least once: what the hub was told twice is one message.
    accepted = {(r.kind, r.path, repr(r.payload)) for run in runs for r in run.evidence.hub if r.accepted}
    told = Counter(kind for kind, _, _ in accepted)
    archives = [archive for run in runs for archive in run.evidence.archives]
    return {
        "flip_runs_started_total": len(runs),
        "flip_aborts_total": finals.count("STOPPED"),
        "flip_fatal_errors_total": sum(final == "ERROR" and not no for final, no in zip(finals, refused, strict=True)),
        "sum(flip_results_upload_failures_total)": sum(refused),
        'flip_results_upload_failures_total{reason="access_denied"}': sum(refused),
        **{
            f'flip_runs_finished_total{{status="{status}"}}': finals.count(status)
            for status in ("RESULTS_UPLOADED", "ERROR", "STOPPED", "RESULTS_UPLOAD_FAILED")
        },
        "sum(flip_run_duration_seconds_count)": len(runs),
        "flip_results_upload_size_bytes_sum": sum(archive.size for archive in archives),
        "flip_results_upload_size_bytes_count": len(archives),
        "flip_orphaned_runs_total": 0,
        "flip_runs_active": 0,
        "count(flip_run_final_status_timestamp_seconds)": len(runs),
        **{
            f'flip_hub_requests_total{{kind="{kind}",outcome="delivered"}}': told[path]
            for kind, path in (("status", "status"), ("metric", "metrics"), ("log", "logs"))
        },
    }


def held(prometheus: Prometheus, counts: Mapping[str, float]) -> dict[str, float]:
    return {expression: prometheus.value(expression) or 0.0 for expression in counts}


def bring_about(ledger: Path, stage: Path) -> None:
    """Write what happened up to a stage into a ledger that keeps what it has counted and how far."""
    with contextlib.closing(sqlite3.connect(ledger / FILE_NAME, timeout=SECONDS, isolation_level=None)) as database:
        database.execute("ATTACH ? AS stage", (str(stage / FILE_NAME),))
        database.execute("BEGIN IMMEDIATE")
        # An observer that had errors of its own would have written events, too: they would be overwritten below.
        strange = database.execute("SELECT name FROM events WHERE uid NOT IN (SELECT uid FROM stage.events)").fetchall()
        assert strange == []
        for table in ("runs", "events", "outbox"):
            database.execute(f"INSERT OR REPLACE INTO {table} SELECT * FROM stage.{table}")
        # These exporters have no bucket to send to what the run with the refusing one could not.
        database.execute("UPDATE runs SET intent = NULL WHERE intent = ?", (SALVAGE,))
        database.execute("COMMIT")


@pytest.mark.nvflare_job
def test_prometheus_holds_what_hub_and_bucket_imply_over_restarts_between_any_two_runs(
    demo_runs: DemoRuns, tmp_path: Path
) -> None:
    """One ledger, an exporter for each stage; each but the first goes on from what the one before had counted.

    Half of them end as they should, half are killed; half see the run happen, half find that it has happened.
    """
    ledger, port, runs = tmp_path / "ledger", free_port(), list(demo_runs)
    Ledger(ledger).close()
    with Prometheus([f"127.0.0.1:{port}"], rules=[alerts.RULES]) as prometheus:
        for number, run in enumerate(runs):
            counts = implied_counts(runs[: number + 1])
            if number % 2:
                bring_about(ledger, run.ledger_after)
            with exporter(ledger, port, signal.SIGKILL if number % 2 else signal.SIGTERM):
                prometheus.wait_for_scrape(SECONDS)
                if not number % 2:
                    bring_about(ledger, run.ledger_after)
                wait_for(lambda: held(prometheus, counts) == counts, SECONDS, f"the counts after {run.scenario}")  # noqa: B023
        with exporter(ledger, port):
            prometheus.wait_for_scrape(SECONDS)
            assert held(prometheus, counts) == counts
            check_the_end(prometheus, runs)


def check_the_end(prometheus: Prometheus, runs: list[DemoRun]) -> None:
    expected: dict[str, float] = {
        "flip_fatal_errors_total": 1,
        "flip_aborts_total": 1,
        "sum(flip_results_upload_failures_total)": 1,
        'flip_runs_finished_total{status="RESULTS_UPLOADED"}': 2,
        'flip_runs_finished_total{status="ERROR"}': 2,
        'flip_runs_finished_total{status="STOPPED"}': 1,
        "sum(flip_runs_finished_total)": 5,
    }
    assert held(prometheus, expected) == expected
    assert expected.items() <= {**implied_counts(runs), "sum(flip_runs_finished_total)": len(runs)}.items()
    for metric in CATALOGUE:
        if metric.fact is not None:
            series = metric.name if metric.kind == "counter" else f"{metric.name}_count"
            assert prometheus.value(f"sum(resets({series}[1h]))") == 0, f"{series} has fallen"
    finals = prometheus.query("flip_run_final_status_timestamp_seconds")
    found = {(one["metric"]["run_id"], one["metric"]["model_id"], one["metric"]["status"]) for one in finals}
    assert found == {(run.run_id, run.model_id, run.statuses[-1]) for run in runs}
    for one in finals:
        (run,) = [run for run in runs if run.run_id == one["metric"]["run_id"]]
        assert run.began < float(one["value"][1]) < run.ended


def test_three_exporters_on_one_ledger_are_counted_once(tmp_path: Path) -> None:
    finished = 'sum(flip_runs_finished_total{status="RESULTS_UPLOADED"})'
    with Ledger(tmp_path) as ledger, contextlib.ExitStack() as stack:
        for _ in range(3):
            run = Run(ledger, tells_hub=False)
            run.train({"site-1": 1.0})
            run.finish()
        servers = [stack.enter_context(serving(tmp_path)) for _ in range(3)]
        with Prometheus([f"127.0.0.1:{server.port}" for server in servers]) as prometheus:
            wait_for(lambda: prometheus.value(finished) == 3, SECONDS, "the counts")
            wait_for(lambda: prometheus.value("count(up)") == 3, SECONDS, "that all have been asked")
            assert prometheus.value("sum(up)") == 1
            (serves,) = [server for server in servers if server.get()[0] == 200]
            serves.end(signal.SIGKILL)
            wait_for(
                lambda: [s for s in servers if s is not serves and s.get()[0] == 200], SECONDS, "that another serves"
            )
            wait_for(lambda: prometheus.value("sum(up)") == 1, SECONDS, "that it is found")
            wait_for(lambda: prometheus.value(finished) == 3, SECONDS, "that its counts alone are left")
            assert len(prometheus.query("flip_runs_started_total")) == 1


# -- what comes in -----------------------------------------------------------------------------------------------------

HOSTILE_CLIENTS = [
    'quotes "and" \\backslashes\\',
    "line\nbreak\r\nand # HELP me",
    'x"} 1e9\nflip_runs_finished_total{status="ERROR"} 7\n# EOF',
    "Klinikum Süd, 東京, \U0001f3e5",
    "\x00\x1b[31m\u2028\u202e",
    "long " + "x" * 10_000,
    "long " + "x" * 9_999 + "y",
]


def test_prometheus_reads_hostile_client_names_as_they_are_meant(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        run = Run(ledger, tells_hub=False)
        run.train({name: 1.0 + number for number, name in enumerate(HOSTILE_CLIENTS)}, rounds=1)
        run.finish()
    with serving(tmp_path) as server, Prometheus([f"127.0.0.1:{server.port}"]) as prometheus:
        prometheus.wait_for_scrape(SECONDS)
        found = prometheus.query("flip_client_task_duration_seconds_sum")
        assert {one["metric"]["client"]: float(one["value"][1]) for one in found} == {
            clean_label(name): 1.0 + number for number, name in enumerate(HOSTILE_CLIENTS)
        }
        assert prometheus.value('flip_runs_finished_total{status="ERROR"}') == 0
        request = urllib.request.Request(f"{server.url}/metrics", headers={"Accept": "text/plain"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert len(answer.read()) < 200_000


def test_a_run_whose_events_have_stopped_is_noticed_and_one_that_is_well_is_not(tmp_path: Path) -> None:
    now = time.time()
    with Ledger(tmp_path) as ledger:
        silent = Run(ledger, begin=now - 7_200)
        silent.train({"site-1": 60.0, "site-2": 90.0}, rounds=3)  # five minutes of rounds, then nothing for two hours
        well = Run(ledger, begin=now - 304)
        well.train({"site-1": 60.0, "site-2": 90.0}, rounds=3)
        over = Run(ledger, begin=now - 7_200)
        over.train({"site-1": 60.0, "site-2": 90.0}, rounds=3)
        over.finish()
    with (
        serving(tmp_path, NET_ID="net-1") as server,
        Prometheus([f"127.0.0.1:{server.port}"], rules=[alerts.RULES]) as prometheus,
    ):
        prometheus.wait_for_scrape(SECONDS)
        assert prometheus.value("flip_runs_active") == 2
        age = "(time() - flip_run_last_event_timestamp_seconds)"
        late = prometheus.query(f"{age} > flip_run_stall_after_seconds unless flip_run_final_status_timestamp_seconds")
        assert silent.run_id in {one["metric"]["run_id"] for one in late}
        (rule,) = [rule for rule in prometheus.rules() if rule["name"] == "FlipRunStalled"]
        # The rule looks at full minutes: this is what it will find at the next one.
        found = prometheus.query(rule["query"], at=time.time() // 60 * 60 + 61)
        assert [one["metric"]["run_id"] for one in found] == [silent.run_id]
        assert found[0]["metric"]["model_id"] == silent.model_id


UNREADABLE = """
import os, sys
from pathlib import Path
from flip_observability.exporter import TLS, Exporter, ExporterError
exporter = Exporter(lambda _: ("", b""), lambda: "", dict, port=0, tls=TLS(*map(Path, sys.argv[1:])))
root = os.geteuid() == 0
if root:
    os.seteuid(65_534)  # root reads everything
try:
    exporter.start()
except ExporterError as error:
    print(error)
finally:
    if root:
        os.seteuid(0)  # whoever measures coverage writes a file at the end
"""


def test_a_key_that_this_user_may_not_read_is_said() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        pair = Authority(folder).issue("server")
        pair.certificate.chmod(0o644)
        pair.key.chmod(0)
        command = [sys.executable, "-c", UNREADABLE, str(pair.certificate), str(pair.key)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"--tls-key: .*server.* cannot be read \(Permission denied\)", done.stdout), done.stdout


# -- traces ------------------------------------------------------------------------------------------------------------


def play_one(folder: Path, scenario: str, protocol: str) -> DemoRun:
    folder.mkdir()
    sink = play(folder, scenario, partial(OtlpSink, protocol))
    return load_run(folder, scenario, protocol, sink.spans)


@pytest.mark.nvflare_job
def test_every_scenario_is_one_whole_trace_by_either_protocol(demo_runs: DemoRuns, tmp_path: Path) -> None:
    """The shared runs took turns with the protocols; here every scenario is played with the other one."""
    others = {run.scenario: PROTOCOLS[1 - PROTOCOLS.index(run.protocol)] for run in demo_runs}
    with ThreadPoolExecutor(3) as pool:
        made = {name: pool.submit(play_one, tmp_path / name, name, protocol) for name, protocol in others.items()}
    runs = [*demo_runs, *(future.result() for future in made.values())]
    assert Counter((run.scenario, run.protocol) for run in runs) == {
        (scenario, protocol): 1 for scenario in SCENARIOS for protocol in PROTOCOLS
    }
    assert len({run.run_id for run in runs}) == len(runs)
    for run in runs:
        root = check_trace(run.spans, run.run_id)
        assert root.attributes["flip.status"] == run.statuses[-1] == str(SCENARIOS[run.scenario].final)
        calls = {span.span_id for span in run.spans if span.kind == CLIENT}
        seen = {tuple(r.headers["traceparent"].split("-")[1:3]) for r in run.evidence.hub if r.accepted}
        assert seen
        assert seen <= {(run.run_id.replace("-", ""), call) for call in calls}


@pytest.mark.nvflare_job
def test_a_collector_that_hangs_costs_a_real_run_nothing_and_is_counted(tmp_path: Path) -> None:
    play(tmp_path, "success", partial(OtlpSink, "http/protobuf", "hang"))
    run = load_run(tmp_path, "success", "http/protobuf", [])
    assert run.statuses == ["INITIATED", "TRAINING_STARTED", "RESULTS_UPLOADED"]
    with serving(tmp_path / "ledger") as server:
        wait_for(lambda: server.get()[0] == 200, SECONDS, "the page")
        errors = re.findall(r'^flip_observability_errors_total\{component="tracing".*\} (\d+)', server.get()[1], re.M)
    assert errors
    assert float(errors[0]) >= 1


# -- secrets -----------------------------------------------------------------------------------------------------------


class RawSink(OtlpSink):
    """Keeps what came in as it came."""

    def __init__(self) -> None:
        super().__init__("grpc")
        self.raw = b""

    def take(self, request: Any, headers: Mapping[str, str]) -> str:
        self.raw += request.SerializeToString() + repr(headers).encode()
        return super().take(request, headers)


CANARIES = [CANARY, "Musterfrau", "Mustermann", "Beispiel", "7731-0042"]
QUOTED = {"Musterfrau", "Beispiel", "7731-0042"}
FAILED = "EXECUTION_RESULT_ERROR"
OURS = re.compile(r"flip_observability(?!\.demo)")


def records(log: str) -> Iterator[tuple[str, str]]:
    """Logger and text of each record of a log file, with the lines that follow it."""
    for part in re.split(r"^(?=\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - )", log, flags=re.MULTILINE):
        if part.strip():
            _, logger, text = part.split(" - ", 2)
            yield logger, text


def canaries_in(content: object) -> list[str]:
    if isinstance(content, bytes):
        return [canary for canary in CANARIES if canary.encode() in content]
    return [canary for canary in CANARIES if canary in (content if isinstance(content, str) else repr(content))]


@pytest.mark.nvflare_job
def test_what_a_failing_run_quotes_is_nowhere_to_be_seen(tmp_path: Path) -> None:
    sink = play(tmp_path, "fatal", RawSink, program=Path(planted.__file__))
    assert isinstance(sink, RawSink)
    run = load_run(tmp_path, "fatal", "grpc", sink.spans)
    log = (run.folder / "workspace" / "server" / "simulate_job" / "log.txt").read_text()
    # It was all said: by researchers' code and by NVFLARE, in the log of the job.
    said = (run.folder / "job.log").read_text(errors="replace")
    assert set(canaries_in(said)) >= QUOTED
    assert run.statuses[-1] == "ERROR"

    # The trace says what went wrong and not about whom.
    root = check_trace(sink.spans, run.run_id)
    assert root.status == ERROR
    assert b"FATAL_SYSTEM_ERROR" in sink.raw
    assert {span.attributes.get("flip.return_code") for span in sink.spans} == {None, "OK", FAILED}
    assert canaries_in(sink.raw) == []

    # Our own log lines name the type alone.
    ours = [text for logger, text in records(log) if OURS.match(logger)]
    assert [text for text in ours if canaries_in(text)] == []
    assert any("RuntimeError" in text for text in ours), "the generator's failure was logged"
    assert canaries_in(run.output + repr(run.recorded)) == []

    check_the_ledger(tmp_path / "ledger")
    check_the_pages(tmp_path / "ledger", run)


def check_the_ledger(ledger: Path) -> None:
    for file in ledger.iterdir():
        assert canaries_in(file.read_bytes()) == [], file.name
    with contextlib.closing(sqlite3.connect(ledger / FILE_NAME)) as database:
        text = "\n".join(database.iterdump())
    assert "fatal_system_error" in text
    assert FAILED in text
    assert canaries_in(text) == []


def check_the_pages(ledger: Path, run: DemoRun) -> None:
    """What dashboards and alerts show is what Prometheus holds; the command line shows what the ledger does."""
    with serving(ledger) as server, Prometheus([f"127.0.0.1:{server.port}"], rules=[alerts.RULES]) as prometheus:
        prometheus.wait_for_scrape(SECONDS)
        wait_for(lambda: prometheus.alerts("FlipFatalError"), SECONDS, "the alert")
        assert prometheus.value("flip_fatal_errors_total") == 1
        series = prometheus.series('{__name__=~".+"}')
        exemplars = prometheus.exemplars('{__name__=~"flip_.+"}', run.began - 60, time.time() + 60)
        assert len(series) > 100
        assert run.run_id.replace("-", "") in repr(exemplars)
        assert canaries_in([series, exemplars, prometheus.alerts()]) == []
        for path in ("/metrics", "/", "/readyz"):
            for accept in ("text/plain", "application/openmetrics-text"):
                request = urllib.request.Request(server.url + path, headers={"Accept": accept})
                with urllib.request.urlopen(request, timeout=30) as answer:
                    assert canaries_in(answer.read()) == []
        _, out, err = server.end()
        assert canaries_in(out + err) == []
    for arguments in (["runs", "--json"], ["show", run.run_id], ["show", run.run_id, "--json"], ["outbox", "list"]):
        command = [sys.executable, "-m", "flip_observability.cli", "--dir", str(ledger), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert canaries_in(done.stdout + done.stderr) == []

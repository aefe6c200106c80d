"""The demo's hub and FL server as services of their own, alone and together with all that watches them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import EmbeddedHub, HubRecord
from flip_observability.demo.job import kill_job
from flip_observability.demo.scenarios import SCENARIOS
from flip_observability.demo.server import ALIVE, STORIES, _forget_old_runs, _run, main
from otel_collector import Collector
from otlp_sink import OtlpSink, Received, check_trace, to_json
from prometheus_tools import Prometheus
from waiting import wait_for

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"
KEY = "canary-key-5b1d"
HUB, SERVER = "flip_observability.demo.hub", "flip_observability.demo.server"


def clean(more: Mapping[str, str]) -> dict[str, str]:
    """The environment without what could lead to real hubs and buckets."""
    ours = ("FLIP_", "OTEL_", "AWS_", "INTERNAL_SERVICE_KEY", "UPLOADED_", "LOCAL_DEV", "NET_ID")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | dict(more)


class Service:
    """A program of the package in a process of its own, with its output in a file."""

    def __init__(self, folder: Path, name: str, *command: str, **environment: str) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=folder,
                env=clean(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, pattern: str, seconds: float = 60.0) -> str:
        """Wait for a line, and return the pattern's group."""

        def found() -> str | None:
            match = re.search(pattern, self.output)
            assert match or self.process.poll() is None, self.output
            return match[match.lastindex or 0] if match else None

        return str(wait_for(found, seconds, f"{pattern} in {self.log.name}"))

    def end(self, seconds: float = 30.0) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(seconds)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path, "hub", HUB, "--port", "0", INTERNAL_SERVICE_KEY=KEY, FLIP_HUB_CONTRACT="2026-10") as service:
        yield service


def ask(method: str, url: str, **headers: str) -> int:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


# -- the hub -----------------------------------------------------------------------------------------------------------


def test_the_hub_alone_judges_and_ends_at_sigterm(hub: Service) -> None:
    url = hub.says(r"listening on (http\S+), contract 2026-10")
    header = {"X-Internal-Service-Key": KEY}
    assert ask("GET", url.removesuffix("/api") + "/healthz") == 200
    assert ask("PUT", f"{url}/model/{MODEL}/status/RUNNING", **header) == 200
    assert ask("PUT", f"{url}/model/{MODEL}/status/RUNNING") == 401
    assert ask("PUT", f"{url}/model/{MODEL}/status/TRAINING_STARTED", **header) == 422
    assert ask("GET", f"{url}/healthz") == 401, "below the base path health is no endpoint"
    assert hub.end() == 0
    assert f"PUT /api/model/{MODEL}/status/RUNNING 200" in hub.output
    assert "(unknown status)" in hub.output
    assert "GET /healthz" not in hub.output
    assert KEY not in hub.output
    assert "Traceback" not in hub.output


def test_what_a_stranger_sends_is_logged_harmlessly(hub: Service) -> None:
    address = hub.says(r"http://([\d.]+:\d+)/api")
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /\x1b[31m\xff" + b"x" * 5_000 + b" HTTP/1.1\r\n\r\n")
        assert b"401" in connection.recv(100)
    hub.says(r" 401 ")
    hub.end()
    assert "\x1b" not in hub.output
    assert max(len(line) for line in hub.output.splitlines()) < 1_000


@pytest.mark.parametrize(
    ("environment", "code", "text"),
    [
        ({}, 2, "INTERNAL_SERVICE_KEY is not set"),
        ({"INTERNAL_SERVICE_KEY": KEY, "FLIP_HUB_CONTRACT": "1999"}, 2, "FLIP_HUB_CONTRACT is none of"),
        ({"INTERNAL_SERVICE_KEY": KEY}, 1, "cannot listen on"),
    ],
    ids=["no key", "contract", "port taken"],
)
def test_a_hub_that_cannot_start_says_why(environment: dict[str, str], code: int, text: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with Service(tmp_path, "hub", HUB, "--port", port, **environment) as service:
            assert service.process.wait(60) == code
    assert text in service.output
    assert "Traceback" not in service.output


def test_a_hub_that_runs_for_long_keeps_the_latest_records_only() -> None:
    seen: list[HubRecord] = []
    with EmbeddedHub(key=KEY, keep=3, on_record=seen.append) as hub:
        for _ in range(5):
            assert ask("PUT", f"{hub.url}/model/{MODEL}/status/PENDING", **{"X-Internal-Service-Key": KEY}) == 200
        assert ask("GET", hub.url.removesuffix("/api") + "/healthz") == 200
        assert hub.records == seen[-3:]
    assert len(seen) == 5


# -- the FL server -----------------------------------------------------------------------------------------------------


def test_a_server_with_bad_settings_says_so(tmp_path: Path) -> None:
    with Service(tmp_path, "server", SERVER, "--folder", str(tmp_path / "demo"), LOCAL_DEV="false") as service:
        assert service.process.wait(60) == 1
    assert "INTERNAL_SERVICE_KEY" in service.output
    assert "Traceback" not in service.output


def test_stories_that_need_the_demos_own_hub_and_bucket_are_refused(tmp_path: Path) -> None:
    assert set(STORIES) == {"success", "fatal", "abort"}
    command = [sys.executable, "-m", SERVER, "--folder", str(tmp_path), "--scenarios", "success,hub-outage"]
    told = subprocess.run(command, env=clean({}), capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2
    assert "'hub-outage' is none of" in told.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--pace", "-1"), ("--pace", "nan"), ("--every", "inf"), ("--every", "soon"), ("--keep", "-1")],
)
def test_numbers_that_make_no_sense_are_refused(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--folder", str(tmp_path / "demo"), option, value])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert option in said
    assert value in said
    assert not (tmp_path / "demo").exists()


def test_a_bucket_that_is_not_to_be_had_ends_the_waiting(tmp_path: Path) -> None:
    with Service(
        tmp_path,
        "server",
        SERVER,
        *("--folder", str(tmp_path / "demo")),
        LOCAL_DEV="false",
        INTERNAL_SERVICE_KEY=KEY,
        UPLOADED_FEDERATED_DATA_BUCKET="s3://somewhere/runs",
        AWS_ENDPOINT_URL_S3="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="DEMO",
        AWS_SECRET_ACCESS_KEY="canary-secret-91",
        AWS_DEFAULT_REGION="us-east-1",
    ) as service:
        service.says("the bucket somewhere is not ready: EndpointConnectionError")
        assert service.end() == 1
    assert "canary-secret-91" not in service.output


def test_old_run_folders_go(tmp_path: Path) -> None:
    for name in ("run-1", "run-2", "run-3", "other"):
        (tmp_path / name / "deep").mkdir(parents=True)
    _forget_old_runs(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run-2", "run-3"]


@pytest.mark.nvflare_job
def test_the_stack_without_its_containers(tmp_path: Path, hub: Service) -> None:
    """Hub, bucket, FL server, observer, collector and Prometheus, in processes of their own, as the stack has them."""
    ledger, folder = tmp_path / "ledger", tmp_path / "demo"
    ledger.mkdir()
    with ExitStack() as stack:
        bucket = stack.enter_context(EmbeddedBucket())
        sink = stack.enter_context(OtlpSink())
        told = {
            "LOCAL_DEV": "false",
            "NET_ID": "net-7",
            "FLIP_API_INTERNAL_URL": hub.says(r"listening on (http\S+),"),
            "FLIP_HUB_CONTRACT": "2026-10",
            "INTERNAL_SERVICE_KEY": KEY,
            "FLIP_OBSERVABILITY_DIR": str(ledger),
            # A bucket that is not there yet.
            **bucket.environment,
            "UPLOADED_FEDERATED_DATA_BUCKET": "s3://made-by-the-server/runs",
        }
        observer = stack.enter_context(
            Service(tmp_path, "observer", "flip_observability.cli", "serve", "--port", "0", **told)
        )
        instance = observer.says(r"Serving http://(\S+)/metrics")
        prometheus = stack.enter_context(Prometheus([instance]))
        collector = stack.enter_context(Collector(trace_store=f"127.0.0.1:{sink.port}"))
        told["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{collector.grpc_port}"
        command = ("--folder", str(folder), "--pace", "0", "--every", "0.1", "--keep", "1")
        server = stack.enter_context(Service(tmp_path, "server", SERVER, *command, **told))

        hub.says(r"/status/RESULTS_UPLOADED 200", 120)
        finished = 'flip_runs_finished_total{net_id="net-7",status="RESULTS_UPLOADED",job="flip-observability"}'
        wait_for(lambda: (prometheus.value(finished) or 0) >= 1, 60, "the run is counted")
        client = bucket.client()
        archives = client.list_objects_v2(Bucket="made-by-the-server", Prefix="runs/")["Contents"]
        assert all(archive["Size"] > 1_000 and archive["Key"].endswith(".zip") for archive in archives)

        def uploaded() -> Received | None:
            roots = [span for span in sink.spans if span.name == "flip.run"]
            return next((span for span in roots if span.attributes.get("flip.status") == "RESULTS_UPLOADED"), None)

        root = wait_for(uploaded, 60, "the root of a run that went well")
        run_id = root.attributes["flip.run_id"]
        # The hub's last answer can come after the root.
        wait_for(lambda: any("/status/RESULTS_UPLOADED" in str(s.attributes) for s in sink.spans), 30, "the hub's span")
        spans = [span for span in sink.spans if span.trace_id == run_id.replace("-", "")]
        assert check_trace(spans, run_id).attributes["flip.status"] == "RESULTS_UPLOADED"
        assert root.resource["flip.net_id"] == "net-7"

        # In a later run the server is told to end. It takes everything with it that it has started.
        server.says(r"the job has ended[\s\S]*five rounds", 120)
        wait_for(lambda: _descendants(server.process.pid), 60, "the processes of another job")
        assert (folder / ALIVE).is_file()
        assert len(list(folder.glob("run-*"))) <= 2
        processes = _descendants(server.process.pid)
        assert server.end(60) == 1
        assert not [process for process in processes if _lives(process)]
        assert "the job was stopped" in server.output
        assert observer.end() == 0
    for service in (hub, server, observer):
        assert KEY not in service.output
    assert KEY not in to_json(sink.spans)


SITE = "import time; time.sleep(600)"
JOB = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {SITE!r}], start_new_session=True)
print("Communication error with client site-1", flush=True)
time.sleep(600)
"""


def test_a_job_ends_with_its_sites_which_have_sessions_of_their_own() -> None:
    process = subprocess.Popen([sys.executable, "-c", JOB], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    (site,) = _descendants(process.pid)
    kill_job(process)
    process.stdout.close()
    wait_for(lambda: not _lives(site), 30, "the site's end")
    assert process.returncode == -signal.SIGKILL


def test_a_job_whose_site_could_not_be_started_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{JOB}")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert _run(tmp_path, SCENARIOS["success"], 0.0, threading.Event()) == 1
    assert "could not start one of its sites" in caplog.text


def _descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_sigint_ends_the_hub_too(hub: Service) -> None:
    hub.says("listening on")
    hub.process.send_signal(signal.SIGINT)
    assert hub.process.wait(30) == 0

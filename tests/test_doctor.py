"""``flip-obs doctor``: a real hub, bucket, collector, ledger and endpoint; well, ill, hanging and missing."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from certificates import Authority
from fault_server import FaultServer
from flip_observability import doctor
from flip_observability.component_paths import CLASS_OF
from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.doctor import CHECKS, Finding, Level, Patient, examine
from flip_observability.exporter import TLS, Exporter
from flip_observability.ledger import FILE_NAME, Entry, Ledger, OutboxItem
from flip_observability.lifecycle import Event
from flip_observability.metrics import MetricsFold
from flip_observability.observer import Observer
from flip_observability.process import current_process
from flip_observability.settings import Settings
from waiting import free_port, wait_for

KEY = "canary-of-the-service-key"
SECRET = "canary-of-a-header"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


def check(name: str, folder: Path = Path("/nowhere"), **more: Any) -> Finding:
    return examine(Patient.from_environment(folder, **more), {name: CHECKS[name]})[0].finding


def told(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    """A server that has a hub."""
    values = {
        "LOCAL_DEV": "false",
        "INTERNAL_SERVICE_KEY": KEY,
        "FLIP_API_INTERNAL_URL": "http://127.0.0.1:9/api",
        "UPLOADED_FEDERATED_DATA_BUCKET": "s3://flip-results/demo",
    } | more
    for name, value in values.items():
        monkeypatch.setenv(name, value)


# -- all of them -------------------------------------------------------------------------------------------------------


def test_a_server_that_has_all_it_needs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kit" / "local").mkdir(parents=True)
    (tmp_path / "kit" / "local" / "resources.json").write_text(json.dumps({"class_allow_list": [*CLASS_OF]}))
    with EmbeddedHub(key=KEY) as hub, EmbeddedBucket() as bucket, collector() as endpoint:
        told(monkeypatch, FLIP_API_INTERNAL_URL=hub.url, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, **bucket.environment)
        observer = Observer(Settings.load(), folder, port=0)
        observer.start()
        try:
            assert observer.exporter is not None
            patient = Patient.from_environment(folder, port=observer.exporter.port, workspace=tmp_path / "kit")
            wait_for(lambda: observer.active and observer._caught_up)
            reports = examine(patient)
        finally:
            observer.stop()
        assert not bucket.objects()
        assert not bucket.unfinished_uploads()
        assert not [record for record in hub.records if record.accepted]
    levels = {each.check: each.finding.level for each in reports if each.check != "ledger"}  # /tmp may be volatile
    assert levels == dict.fromkeys(set(CHECKS) - {"ledger"}, Level.OK), [
        each.finding for each in reports if each.finding.level is not Level.OK
    ]


def test_what_hangs_ends_by_the_deadline_and_holds_no_other_check_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEADLINE_SECONDS", 0.5)
    never = threading.Event()

    def hang(_: Patient) -> Finding:
        never.wait(60)
        return Finding(Level.OK, "")

    def fail(_: Patient) -> Finding:
        raise ValueError(KEY)

    checks = {"a": hang, "b": hang, "c": fail, "d": lambda _: Finding(Level.OK, "well")}
    reports = examine(Patient(Path("/nowhere")), checks)
    never.set()
    assert [each.finding.level for each in reports] == [Level.FAIL, Level.FAIL, Level.FAIL, Level.OK]
    assert "no answer within" in reports[0].finding.text
    assert "ValueError" in reports[2].finding.text
    assert KEY not in repr(reports)


def test_bad_settings_are_told_and_what_needs_them_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, INTERNAL_SERVICE_KEY=f" {KEY}", FLIP_HUB_CONTRACT="2030-01")
    finding = check("settings")
    assert finding.level is Level.FAIL
    assert "INTERNAL_SERVICE_KEY" in finding.text
    assert "FLIP_HUB_CONTRACT" in finding.text
    assert KEY not in repr(finding)
    assert {check(name).level for name in ("hub", "bucket")} == {Level.SKIP}


def test_local_dev_needs_neither_hub_nor_bucket() -> None:
    assert check("settings").level is Level.WARN
    assert {check(name).level for name in ("hub", "bucket")} == {Level.SKIP}


def test_the_versions_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = [text for text in importlib.metadata.requires("flip-observability") or [] if text.startswith("nvflare")]
    assert needed == ["nvflare<2.10,>=2.9"]
    assert check("nvflare").level is Level.OK
    for version, level in (("2.9", "ok"), ("2.9.4rc1", "ok"), ("2.8.9", "fail"), ("2.10.0", "fail"), ("2.90", "fail")):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, version=version: version)
        assert check("nvflare").level == level


@pytest.mark.parametrize(
    ("name", "text", "level"),
    [
        ("resources.json", json.dumps({"class_allow_list": ["a.", *CLASS_OF]}), "ok"),
        ("resources.json.default", json.dumps({"class_allow_list": [*CLASS_OF]}), "ok"),
        ("resources.json", '{"class_allow_list": ["a.", "flip_observability."]}', "warn"),
        ("resources.json", json.dumps({"class_allow_list": [*CLASS_OF, "flip_observability.nvflare"]}), "warn"),
        ("resources.json", '{"class_allow_list": ["*"]}', "warn"),
        ("resources.json", json.dumps({"class_allow_list": [*CLASS_OF][1:]}), "fail"),
        ("resources.json", '{"class_allow_list": [{}, 1]}', "fail"),
        ("resources.json", '{"class_allow_list": ["a."]}', "fail"),
        ("resources.json", "{}", "fail"),
        ("resources.json", '{"class_list_enforcement_mode": "warn"}', "warn"),
        ("resources.json", "[]", "fail"),
        ("resources.json", "{", "fail"),
        ("other.json", "{}", "skip"),
    ],
    ids=range(13),
)
def test_the_class_allow_list(tmp_path: Path, name: str, text: str, level: str) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / name).write_text(text)
    assert check("allow list", workspace=tmp_path).level == level


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_a_ledger_that_is_well(folder: Path) -> None:
    Ledger(folder).close()
    before = sorted(path.name for path in folder.iterdir())
    assert check("ledger", folder).level in {Level.OK, Level.WARN}
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_folder_that_is_not_there_is_not_made(folder: Path) -> None:
    assert check("ledger", folder).level is Level.WARN
    assert not folder.exists()
    folder.write_text("a file")
    assert check("ledger", folder / "below").level is Level.FAIL
    assert {check(name, folder / "below").level for name in ("observer", "outbox", "errors")} == {Level.SKIP}


def test_a_network_file_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    for kind, level in (("nfs4", "fail"), ("tmpfs", "warn"), ("ext4", "ok")):
        monkeypatch.setattr(doctor, "file_system_of", lambda _, kind=kind: kind)
        assert check("ledger", folder).level == level
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 1 << 62)
    assert "MiB left" in check("ledger", folder).text


def test_a_ledger_that_is_damaged_or_newer(folder: Path) -> None:
    folder.mkdir()
    (folder / FILE_NAME).write_bytes(b"this is no database" * 1_000)
    finding = check("ledger", folder)
    assert (finding.level, "not a database" in finding.text) == (Level.FAIL, True)


def test_what_was_set_aside(folder: Path) -> None:
    folder.mkdir()
    assert check("set aside", folder).level is Level.OK
    for name in ("ledger.db.corrupt-1-a", "ledger.db.corrupt-1-a-wal", "spool-1-a.unreadable"):
        (folder / name).touch()
    finding = check("set aside", folder)
    assert finding.level is Level.WARN
    assert "1 damaged ledgers, 1 unreadable spools" in finding.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"ledger": 0o755}, "1 open to group or others"),
        ({"ledger": 0o750, f"ledger/{FILE_NAME}": 0o640}, "2 open to group or others"),
        ({f"ledger/{FILE_NAME}": 0o666}, None),  # nobody else gets into its folder
        ({"ledger": 0o711, "ledger/spool-x.jsonl": 0o602}, "2 open to group or others"),
        ({"kit/startup": 0o755, "kit/startup/server.key": 0o644}, "2 open to others"),
        ({"kit/startup": 0o750, "kit/startup/server.key": 0o644}, None),
        ({"results": 0o770}, "1 open to group or others"),
    ],
)
def test_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], said: str | None) -> None:
    Ledger(tmp_path / "ledger").close()
    (tmp_path / "ledger" / "spool-x.jsonl").touch(0o600)
    (tmp_path / "ledger" / "link").symlink_to(tmp_path)  # a link's own mode says nothing
    (tmp_path / "kit" / "startup").mkdir(parents=True)
    (tmp_path / "kit" / "startup").chmod(0o700)
    (tmp_path / "kit" / "startup" / "server.key").touch(0o600)
    (tmp_path / "results").mkdir(0o700)
    for name, mode in changes.items():
        (tmp_path / name).chmod(mode)
    told(monkeypatch, UPLOADED_FEDERATED_DATA_BUCKET=(tmp_path / "results").as_uri())
    finding = check("modes", tmp_path / "ledger", workspace=tmp_path / "kit")
    assert finding.level is (Level.WARN if said else Level.OK), finding
    if said:
        assert said in finding.text
        assert str(tmp_path / next(iter(changes)).partition("/")[0]) in finding.text
        assert "chmod -R " in finding.todo


def test_a_ledger_of_another_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(folder).close()
    here = len(list(folder.iterdir())) + 1
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    finding = check("modes", folder)
    assert finding.level is Level.WARN
    assert f"{here} another user's" in finding.text
    assert f"give {folder} to the server's user" in finding.todo
    monkeypatch.setattr(os, "geteuid", lambda: 0)  # root may look, and the whole is one user's
    assert check("modes", folder).level is Level.OK


def test_without_any_private_folder_there_are_no_modes() -> None:
    assert check("modes", workspace=Path("/nowhere")).level is Level.SKIP


def test_who_observes(folder: Path) -> None:
    with Ledger(folder) as ledger:
        assert check("observer", folder).level is Level.WARN
        ledger.claim_observer(f"{current_process().token()}|x", time.time())
        finding = check("observer", folder)
        assert (finding.level, f"process {os.getpid()}" in finding.text) == (Level.OK, True)
        ledger.claim_observer(f"{current_process().token()}|x", time.time() - 3_600)
        assert check("observer", folder).level is Level.FAIL


def test_what_waits_for_the_hub(folder: Path) -> None:
    with Ledger(folder) as ledger:
        assert check("outbox", folder).level is Level.OK
        item = OutboxItem(str(uuid.uuid4()), "status", {"status": "ERROR"}, final=True)
        ledger.append(Entry(str(uuid.uuid4()), time.time() - 10, outbox=(item,)))
        finding = check("outbox", folder)
        assert (finding.level, "1 messages wait" in finding.text) == (Level.OK, True)
        late = OutboxItem(str(uuid.uuid4()), "log", {"log": KEY, "client": None})
        ledger.append(Entry(str(uuid.uuid4()), time.time() - 3_600, outbox=(late,)))
        assert check("outbox", folder).level is Level.FAIL
        ledger.set_outbox_state([1, 2], "rejected", time.time())
        finding = check("outbox", folder)
        assert (finding.level, "2 were refused" in finding.text) == (Level.WARN, True)
        assert KEY not in repr(finding)


def test_errors_and_events_that_cannot_be_counted(folder: Path) -> None:
    with Ledger(folder) as ledger:
        assert check("errors", folder).level is Level.OK
        facts = (("observability_error", 3.0, {"component": "results"}),)
        ledger.append(Entry(None, 1.0, Event("flip.observability_errors", 1.0, {}), facts))
        poison: Any = (("observability_error", "many", "no labels"),)
        ledger.append(Entry(None, 1.0, Event("flip.observability_errors", 1.0, {}), poison))
        MetricsFold(ledger).catch_up()
        finding = check("errors", folder)
        assert finding.level is Level.WARN
        assert "metrics 1, results 3" in finding.text


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", ["2026-05", "2026-10"])
@pytest.mark.parametrize("other", [False, True], ids=["same", "other"])
@pytest.mark.parametrize("knows", [True, False], ids=["any-model", "no-model"])
def test_the_contract_is_found_without_changing_anything(
    monkeypatch: pytest.MonkeyPatch, contract: Any, other: bool, knows: bool
) -> None:
    with EmbeddedHub(contract, key=KEY, model_ids=None if knows and not other else []) as hub:
        ours = {"2026-05": "2026-10", "2026-10": "2026-05"}[contract] if other else contract
        told(monkeypatch, FLIP_API_INTERNAL_URL=hub.url, FLIP_HUB_CONTRACT=ours)
        finding = check("hub")
        assert not [record for record in hub.records if record.accepted]
    # A hub that judges models before statuses shows nothing of its contract.
    assert finding.level is (Level.OK if knows and not other else Level.WARN), finding


def test_a_key_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedHub(key="another") as hub:
        told(monkeypatch, FLIP_API_INTERNAL_URL=hub.url)
        finding = check("hub")
    assert finding.level is Level.FAIL
    assert "INTERNAL_SERVICE_KEY" in finding.todo
    assert KEY not in repr(finding)


def test_a_base_url_that_leads_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedHub(key=KEY, base="/api") as hub:
        told(monkeypatch, FLIP_API_INTERNAL_URL=hub.url.removesuffix("/api"))
        finding = check("hub")
    assert (finding.level, "/api" in finding.todo) == (Level.FAIL, True)


@pytest.mark.parametrize(
    ("answer", "level", "said"),
    [
        (b"HTTP/1.1 301 Moved\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n", "fail", "redirects"),
        (b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", "fail", "refuses the key"),
        (b"HTTP/1.1 429 Slow\r\nContent-Length: 0\r\n\r\n", "warn", "left alone"),
        (b"HTTP/1.1 503 Ill\r\nContent-Length: 0\r\n\r\n", "fail", "ill (503)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "warn", "200, 200, 200"),
        (b"SSH-2.0-OpenSSH\r\n", "fail", "cannot be reached"),
    ],
    ids=range(6),
)
def test_hubs_that_are_not_well(monkeypatch: pytest.MonkeyPatch, answer: bytes, level: str, said: str) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(answer)
        if answer.startswith(b"SSH"):
            raise EOFError

    with FaultServer(script) as server:
        told(monkeypatch, FLIP_API_INTERNAL_URL=server.url)
        finding = check("hub")
    assert finding.level == level
    assert said in finding.text
    assert KEY not in repr(finding)


def test_a_key_that_would_cross_a_network_unencrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, FLIP_API_INTERNAL_URL="http://flip-api.invalid:8000/api")
    finding = check("hub")
    assert (finding.level, "unencrypted" in finding.text) == (Level.FAIL, True)
    assert "FLIP_HUB_TRUSTED_NETWORK" in finding.todo
    monkeypatch.setenv("FLIP_HUB_TRUSTED_NETWORK", "true")
    assert "cannot be reached" in check("hub").text


def test_a_hub_that_is_not_there_and_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, FLIP_API_INTERNAL_URL=f"http://127.0.0.1:{free_port()}/api")
    assert "ConnectionError" in check("hub").text
    monkeypatch.setattr(doctor, "CALL_SECONDS", 0.3)
    with FaultServer(lambda *_: time.sleep(2)) as server:
        told(monkeypatch, FLIP_API_INTERNAL_URL=server.url)
        finding = check("hub")
    assert (finding.level, "ReadTimeout" in finding.text) == (Level.FAIL, True)


# -- the bucket --------------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_well_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedBucket() as bucket:
        told(monkeypatch, UPLOADED_FEDERATED_DATA_BUCKET=bucket.destination, **bucket.environment)
        finding = check("bucket")
        keys = {record.key for record in bucket.records if record.key}
        assert [record.action for record in bucket.records].count("complete_upload") == 1
        assert not bucket.objects()
        assert not bucket.unfinished_uploads()
    assert (finding.level, "CRC32" in finding.text) == (Level.OK, True)
    assert len(keys) == 1
    assert next(iter(keys)).startswith("demo/flip-doctor-")


def test_buckets_that_are_not_well(monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedBucket(refusing=True) as bucket:
        told(monkeypatch, UPLOADED_FEDERATED_DATA_BUCKET=bucket.destination, **bucket.environment)
        refused = check("bucket")
        bucket.refusing = False
        monkeypatch.setenv("UPLOADED_FEDERATED_DATA_BUCKET", "s3://another-bucket")
        missing = check("bucket")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        anonymous = check("bucket")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
        gone = check("bucket")
    for finding, said in (
        (refused, "AccessDenied"),
        (missing, "NoSuchBucket"),
        (anonymous, "Credentials"),
        (gone, "EndpointConnectionError"),
    ):
        assert finding.level is Level.FAIL
        assert said in finding.text
        assert SECRET not in repr(finding)


def test_a_folder_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, UPLOADED_FEDERATED_DATA_BUCKET=f"file://{tmp_path}/results")
    assert check("bucket").level is Level.WARN
    (tmp_path / "results").mkdir()
    assert check("bucket").level is Level.OK
    assert not list((tmp_path / "results").iterdir())
    monkeypatch.setenv("UPLOADED_FEDERATED_DATA_BUCKET", "file:///proc/1/results")
    assert check("bucket").level is Level.FAIL


# -- traces ------------------------------------------------------------------------------------------------------------


@contextmanager
def collector() -> Iterator[str]:
    """Takes spans by gRPC."""
    name = "opentelemetry.proto.collector.trace.v1.TraceService"
    method: Any = grpc.unary_unary_rpc_method_handler(lambda *_: ExportTraceServiceResponse().SerializeToString())
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(0)


@contextmanager
def http_collector(code: int) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(code if self.path == "/v1/traces" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def test_collectors(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert check("traces").level is Level.SKIP
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={SECRET}")
    with collector() as endpoint:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        assert check("traces") == Finding(Level.OK, "the collector takes spans by grpc")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        assert check("traces").level is Level.FAIL
    for code, level in ((200, Level.OK), (400, Level.FAIL)):
        with http_collector(code) as endpoint:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
            assert check("traces").level is level
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [("ftp://127.0.0.1:1", "no URL"), ("http://", "no URL"), ("http://127.0.0.1:x", "no URL"), (None, "reached")],
    ids=range(4),
)
def test_collectors_that_are_none(monkeypatch: pytest.MonkeyPatch, endpoint: str | None, said: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint or f"http://user:{SECRET}@127.0.0.1:{free_port()}")
    finding = check("traces")
    assert (finding.level, said in finding.text) == (Level.FAIL, True)
    assert SECRET not in repr(finding)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "smoke")
    assert "PROTOCOL" in check("traces").text
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert check("traces").level is Level.SKIP


# -- the endpoint ------------------------------------------------------------------------------------------------------


def test_the_port(tmp_path: Path) -> None:
    port = free_port()
    assert "free" in check("exporter", port=port).text
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    reasons = [""]
    for tls in (None, TLS(pair.certificate, pair.key)):
        reasons[0] = ""
        endpoint = Exporter(lambda _: ("text/plain", b""), lambda: reasons[0], dict, port=0, tls=tls)
        endpoint.start()
        try:
            assert check("exporter", port=endpoint.port).level is Level.OK
            reasons[0] = "process 17 has it"
            finding = check("exporter", port=endpoint.port)
            assert (finding.level, "process 17 has it" in finding.text) == (Level.WARN, True)
        finally:
            endpoint.stop()


def test_a_port_that_somebody_else_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CALL_SECONDS", 0.5)
    with http_collector(200) as endpoint:
        assert check("exporter", port=int(endpoint.rpartition(":")[2])).level is Level.FAIL
    with FaultServer(lambda *_: time.sleep(2)) as server:
        finding = check("exporter", port=server.port)
    assert (finding.level, "--port" in finding.todo) == (Level.FAIL, True)


# -- the command -------------------------------------------------------------------------------------------------------


def flip_obs(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flip_observability.cli", "--dir", str(folder), "doctor", *arguments]
    # A copy: the variables of the terminal's size that a library has put behind Python's back do not go along.
    return subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False, timeout=120)


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    Ledger(folder).close()
    done = flip_obs(folder, "--port", port, "--workspace", str(tmp_path))
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(CHECKS)
    for name in CHECKS:
        assert any(re.match(rf"(ok|warn|fail|skip) +{name} ", line) for line in lines), name
    told(monkeypatch, UPLOADED_FEDERATED_DATA_BUCKET=f"file://{tmp_path}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", f"authorization={SECRET}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    done = flip_obs(folder, "--json", "--port", port)
    assert done.returncode == 1
    reports = {each["check"]: each for each in json.loads(done.stdout)}
    assert reports.keys() == CHECKS.keys()
    assert reports["hub"]["level"] == reports["traces"]["level"] == "fail"
    assert reports["hub"]["todo"]
    assert KEY not in done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr

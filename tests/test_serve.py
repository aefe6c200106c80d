"""``flip-obs serve``, as the process that it is."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import waiting
from certificates import Authority
from flip_observability.constants import OwnEvents
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.ledger import Entry, Ledger, OutboxItem
from history import Run
from waiting import wait_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ledger").mkdir()
    return tmp_path / "ledger"


class Server:
    """A process of ``flip-obs serve``, and what it prints."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        command = [sys.executable, "-m", "flip_observability.cli", "--dir", str(folder), "serve", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"(https?)://127\.0\.0\.1:(\d+)/metrics", self.said)
        self.port = int(found[2]) if found else 0
        self.url = f"{found[1]}://127.0.0.1:{self.port}" if found else ""

    def get(self, path: str = "/metrics", context: ssl.SSLContext | None = None) -> tuple[int, str]:
        return waiting.get(self.url + path, context)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, self.said + out, err


@contextlib.contextmanager
def serving(folder: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    server = Server(folder, "--port", "0", *arguments, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_from_start_to_end(folder: Path, number: int) -> None:
    with Ledger(folder) as ledger, serving(folder, NET_ID="net-7") as server:
        assert str(folder) in server.said
        assert "net-7" in server.said
        wait_for(lambda: server.get()[0] == 200)
        Run(ledger).train({"site-1": 1})
        code, out, err = server.end(number)
        assert (code, "Stopped." in out, "Traceback" in err) == (0, True, False)
        assert ledger.observer_heartbeat() is None
        cursor = ledger._rows("SELECT value FROM meta WHERE key = 'metrics_cursor'")[0][0]
        # What it has to say of its own end is for the next observer to count.
        uncounted = {event["name"] for event in ledger.events() if event["id"] > int(cursor)}
        assert uncounted <= {OwnEvents.OBSERVABILITY_ERRORS.value}, err


def test_a_signal_that_comes_at_once_ends_it_too(folder: Path) -> None:
    with serving(folder) as server:
        assert server.end()[0] == 0


def test_it_tells_the_hub_what_a_dead_run_left(folder: Path) -> None:
    model = str(uuid.uuid4())
    with EmbeddedHub(model_ids=[model]) as hub, Ledger(folder) as ledger:
        item = OutboxItem(model, "status", {"status": "STOPPED"}, final=True)
        ledger.append(Entry(str(uuid.uuid4()), time.time(), outbox=(item,)))
        with serving(folder, LOCAL_DEV="false", FLIP_API_INTERNAL_URL=hub.url, INTERNAL_SERVICE_KEY=hub.key) as server:
            wait_for(lambda: [record.status for record in hub.records if record.accepted] == ["STOPPED"])
            code, out, err = server.end()
        assert code == 0
        assert hub.key not in out + err


def _says(server: Server, text: str) -> bool:
    return text in server.get("/readyz")[1]


@pytest.mark.system
def test_three_on_one_ledger_and_the_first_is_killed(folder: Path) -> None:
    with serving(folder) as first:
        wait_for(lambda: first.get()[0] == 200)
        with serving(folder) as second, serving(folder) as third:
            others = (second, third)
            for other in others:
                wait_for(partial(_says, other, f"process {first.process.pid} has it"))
                assert [other.get(path)[0] for path in ("/metrics", "/readyz", "/healthz")] == [503, 503, 200]
            first.end(signal.SIGKILL)
            wait_for(lambda: 200 in [other.get()[0] for other in others])
            heir, last = sorted(others, key=lambda other: other.get()[0])
            assert [heir.get()[0], last.get()[0]] == [200, 503]
            wait_for(partial(_says, last, f"process {heir.process.pid} has it"))


def test_https_with_clients_of_one_authority_alone(folder: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, client = authority.issue("server"), authority.issue("client")
    options = ("--tls-cert", pair.certificate, "--tls-key", pair.key, "--client-ca", authority.certificate)
    context = ssl.create_default_context(cafile=authority.certificate)
    with serving(folder, *map(str, options)) as server:
        assert server.get("/healthz", context)[0] == 0
        context.load_cert_chain(client.certificate, client.key)
        assert server.get("/healthz", context)[0] == 200
        assert server.end()[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tls-cert", "cert.pem"), "--tls-cert needs --tls-key"),
        (("--tls-cert", "cert.pem", "--tls-key", "key.pem"), "cannot be read"),
        (("--client-ca", "ca.pem"), "--client-ca needs"),
        (("--host", "no.such.host.invalid"), "--host"),
        (("--port", "TAKEN"), "in use"),
    ],
    ids=["certificate-alone", "no-files", "authority-alone", "host", "port"],
)
def test_what_cannot_be_served_is_one_line(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = [port if word == "TAKEN" else word for word in arguments]
        done = _run(folder, *given, *([] if "--port" in given else ["--port", "0"]))
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_folder_is_waited_for_and_not_made(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "yet"
    with serving(missing) as server:
        wait_for(partial(_says, server, "there is no such folder yet"))
        code, said = server.get("/readyz")
        assert code == 503
        assert str(missing) in said
        time.sleep(2.5)  # it has looked again, more than once
        assert server.get("/healthz")[0] == 200
        assert server.get("/metrics")[0] == 503
        assert not missing.parent.exists()
        with Ledger(missing) as ledger:
            Run(ledger).train({"site-1": 1})
            wait_for(lambda: server.get("/readyz")[0] == 200)
            assert "flip_runs_active" in server.get()[1]
            code, _, err = server.end()
    assert code == 0
    assert (err.count(str(missing)), err.count("dies with the container")) in {(1, 0), (2, 1)}, err
    assert "error" not in err.lower()


def test_bad_settings_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_DEV", "perhaps")
    done = _run(folder, "--port", "0")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "LOCAL_DEV" in done.stderr


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flip_observability.cli", "--dir", str(folder), "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

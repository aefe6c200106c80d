"""The transport against servers that misbehave in every way that a socket allows."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fault_server import OK, FaultServer, reset
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.hub import HubTransport, LocalHub, Reply, Verdict, classify, transport_for
from flip_observability.settings import Settings
from test_hub_contract import METRIC, MODEL, row

KEY = "very-secret-key-0815"


def settings(url: str, key: str = KEY, **more: object) -> Settings:
    values = {"LOCAL_DEV": False, "FLIP_API_INTERNAL_URL": url, "INTERNAL_SERVICE_KEY": key}
    return Settings.model_validate(values | more)


@pytest.fixture(autouse=True)
def _no_secret_in_any_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    assert KEY not in caplog.text


def ask(url: str, total: float = 1.0, kind: str = "status") -> Reply:
    transport = HubTransport(settings(url), total=total)
    try:
        return transport.send(row(kind, payload=METRIC if kind == "metric" else None))
    finally:
        transport.close()


# -- as it should be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/", "//"])
def test_a_base_url_with_and_without_slash(slash: str) -> None:
    with EmbeddedHub() as hub:
        transport = HubTransport(settings(hub.url + slash, hub.key))
        assert transport.send(row()) == Reply(200)
        assert hub.statuses(MODEL) == ["ERROR"]
        assert hub.records[0].headers["user-agent"] == "flip-observability"


def test_a_key_that_goes_out_unencrypted_is_warned_of_once_and_sent(caplog: pytest.LogCaptureFixture) -> None:
    def told(**more: object) -> int:
        caplog.clear()
        for _ in range(3):
            HubTransport(settings("http://flip-api.invalid:8000/api", **more)).close()  # type: ignore[arg-type]
        return caplog.text.count("http://flip-api.invalid:8000/api unencrypted")

    assert told(FLIP_HUB_TRUSTED_NETWORK=True) == 0
    assert told() == 1
    assert told() == 0
    assert HubTransport(settings("http://flip-api.invalid:8000/api")).send(row()).error == "ConnectionError"


def test_one_connection_serves_many_calls() -> None:
    with FaultServer(lambda connection, _: connection.sendall(OK)) as server:
        transport = HubTransport(settings(server.url))
        assert [transport.send(row()).status for _ in range(5)] == [200] * 5
        assert [transport.send(row("metric", payload=METRIC)).status for _ in range(5)] == [200] * 5
        assert server.connections == 1
        assert b"content-type: application/json" in server.requests[-1].lower()
        assert b"content-type" not in server.requests[0].lower()


def test_a_chunked_answer_leaves_the_connection_usable() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    with FaultServer(lambda connection, _: connection.sendall(chunked)) as server:
        transport = HubTransport(settings(server.url))
        assert [transport.send(row()).status for _ in range(3)] == [200] * 3
        assert server.connections == 1


def test_the_key_goes_along_in_its_header_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password something\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    answer = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n"
    with FaultServer(lambda connection, _: connection.sendall(answer)) as server:
        transport = HubTransport(settings(server.url, INTERNAL_SERVICE_KEY_HEADER="X-My-Key"))
        transport.send(row())
        transport.send(row())
        for request in server.requests:
            assert f"x-my-key: {KEY}".encode() in request.replace(b"X-My-Key", b"x-my-key")
            assert b"authorization" not in request.lower()
            assert b"cookie" not in request.lower()


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer(lambda connection, _: connection.sendall(OK)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "")
        assert ask("http://hub.invalid/api").status == 200
        assert proxy.requests[0].startswith(b"PUT http://hub.invalid/api/model/")


# -- faults ------------------------------------------------------------------------------------------------------------


def test_headers_that_never_end() -> None:
    with FaultServer(lambda c, _: server.for_ever(c, b"X", 0.02)) as server:
        assert ask(server.url) == Reply(error="DeadlineExceeded")
    assert not server.gave_up


def test_continuations_that_never_end() -> None:
    with FaultServer(lambda c, _: server.for_ever(c, b"HTTP/1.1 100 Continue\r\n\r\n", 0.01)) as server:
        assert ask(server.url) == Reply(error="DeadlineExceeded")
    assert not server.gave_up


def test_no_answer_at_all() -> None:
    gone = threading.Event()

    def script(connection: socket.socket, _: bytes) -> None:
        connection.recv(1)  # returns when the client has gone
        gone.set()

    with FaultServer(script) as server:
        reply = ask(server.url)
        assert reply.status is None
        assert classify(reply, row()) is Verdict.HUB_ILL
        assert gone.wait(30)


@pytest.mark.parametrize("code", [200, 302, 500])
def test_a_body_that_never_ends_does_not_change_the_answer(code: int) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 %d X\r\nLocation: /x\r\nTransfer-Encoding: chunked\r\n\r\n" % code)
        server.for_ever(connection, b"1\r\nx\r\n", 0.02)

    with FaultServer(script) as server:
        assert ask(server.url).status == code
    assert not server.gave_up


@pytest.mark.parametrize("code", [200, 302, 401])
def test_a_body_of_100_mb_is_not_read(code: int) -> None:
    size = 100 * 1024 * 1024

    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 %d X\r\nLocation: /x\r\nContent-Length: %d\r\n\r\n" % (code, size))
        for _i in range(100):
            server.push(connection, bytes(1024 * 1024))

    with FaultServer(script) as server:
        assert ask(server.url, total=10.0).status == code
    assert server.sent < size // 2  # what the kernel's buffers took


def test_a_body_that_is_not_packed_as_it_says_does_not_change_the_answer() -> None:
    body = b"not gzip at all"
    answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with FaultServer(lambda connection, _: connection.sendall(answer)) as server:
        assert ask(server.url).status == 200


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n",
    ],
)
def test_an_answer_that_is_none(answer: bytes) -> None:
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(answer)
        raise EOFError

    with FaultServer(script) as server:
        reply = ask(server.url)
        assert reply.status is None
        assert classify(reply, row()) is Verdict.HUB_ILL


@pytest.mark.parametrize("kind", ["status", "metric"])
def test_a_connection_that_is_reset(kind: str) -> None:
    with FaultServer(reset) as server:
        reply = ask(server.url, kind=kind)
        assert reply == Reply(error="ConnectionError")
        assert classify(reply, row()) is Verdict.HUB_ILL


def test_nobody_listens_and_no_such_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "http://hub.invalid", "http://" + "a" * 70 + ".example"):
        reply = ask(url)
        assert reply.status is None
        assert classify(reply, row()) is Verdict.HUB_ILL


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect(code: int) -> None:
    with FaultServer(lambda connection, _: connection.sendall(OK)) as other:
        moved = b"HTTP/1.1 %d Moved\r\nLocation: %s/model\r\nContent-Length: 0\r\n\r\n" % (code, other.url.encode())
        with FaultServer(lambda connection, _: connection.sendall(moved)) as server:
            assert ask(server.url, kind="metric") == Reply(code)
        assert other.connections == 0


def test_a_slow_resolver_does_not_make_a_late_call(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def slowly(*args: object, **kwargs: object) -> object:
        time.sleep(0.6)
        return resolve(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    with FaultServer(lambda connection, _: connection.sendall(OK)) as server:
        assert ask(server.url, total=0.2) == Reply(error="DeadlineExceeded")
        assert server.requests == []


def test_a_deadline_is_of_one_call_alone() -> None:
    def script(connection: socket.socket, request: bytes) -> None:
        if b"/metrics" in request:
            server.for_ever(connection, b"X", 0.02)
        time.sleep(0.1)
        connection.sendall(OK)

    with FaultServer(script) as server:
        transport = HubTransport(settings(server.url), total=1.0)
        slow: list[Reply] = []
        threads = [
            threading.Thread(target=lambda: slow.append(transport.send(row("metric", payload=METRIC))))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert [transport.send(row()).status for _ in range(20)] == [200] * 20
        for thread in threads:
            thread.join()
        assert slow == [Reply(error="DeadlineExceeded")] * 3
    assert not server.gave_up


def test_calls_leave_no_descriptors_and_no_threads_behind() -> None:
    with FaultServer(lambda connection, _: connection.sendall(OK)) as server:
        transport = HubTransport(settings(server.url))
        transport.send(row())
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(50):
            transport.send(row())
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        for thread in timers:
            thread.join(5)
        assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_no_more_threads_is_no_fault_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with FaultServer(lambda connection, _: connection.sendall(OK)) as server:
        transport = HubTransport(settings(server.url))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Timer, "start", refuse)
            reply = transport.send(row())
        assert reply == Reply(error="RuntimeError")
        assert classify(reply, row()) is Verdict.HUB_ILL
        assert server.connections == 0  # nothing is sent that nothing would cut
        assert transport.send(row()).status == 200


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "hub.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + built.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_a_certificate_that_nobody_vouches_for(tls: ssl.SSLContext) -> None:
    with FaultServer(lambda connection, _: connection.sendall(OK), tls=tls) as server:
        reply = ask(server.url, total=10.0)
        assert reply == Reply(error="SSLError")
        assert classify(reply, row()) is Verdict.HUB_ILL
        assert server.requests == []


def test_plain_http_where_tls_is_spoken_and_the_other_way_round(tls: ssl.SSLContext) -> None:
    with FaultServer(lambda connection, _: connection.sendall(OK), tls=tls) as server:
        assert ask(server.url.replace("https", "http"), total=10.0).status is None
        assert server.requests == []
    with FaultServer(lambda connection, _: connection.sendall(OK)) as server:
        assert ask(server.url.replace("http", "https")).status is None
        assert server.requests == []


def test_a_certificate_of_a_known_authority(
    tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with FaultServer(lambda connection, _: connection.sendall(OK), tls=tls) as server:
        transport = HubTransport(settings(server.url))
        assert [transport.send(row()).status for _ in range(3)] == [200] * 3
        assert server.connections == 1


def test_headers_that_never_end_over_tls(
    tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with FaultServer(lambda c, _: server.for_ever(c, b"X", 0.02), tls=tls) as server:
        assert ask(server.url) == Reply(error="DeadlineExceeded")
    assert not server.gave_up


def test_a_handshake_that_never_ends() -> None:
    # The header of a TLS record of 16 kB, and then its bytes one by one.
    def script(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
        server.for_ever(connection, b"\x00", 0.02)

    with FaultServer(script, raw=True) as server:
        reply = ask(server.url.replace("http", "https"))
        assert reply == Reply(error="DeadlineExceeded")
    assert not server.gave_up


# -- rows and settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("status", {"status": "NONSENSE"}),
        ("metric", METRIC | {"value": float("nan")}),
        ("metric", METRIC | {"label": object()}),
        ("event", {}),
    ],
)
def test_a_row_that_cannot_be_sent_is_not(kind: str, payload: dict[str, object]) -> None:
    with FaultServer(lambda connection, _: connection.sendall(OK)) as server:
        reply = HubTransport(settings(server.url)).send(row(kind, payload=payload))
        assert reply.unsendable
        assert reply.status is None
        assert server.connections == 0


def test_local_dev_needs_no_hub(caplog: pytest.LogCaptureFixture) -> None:
    transport = transport_for(Settings.model_validate({"LOCAL_DEV": True}))
    assert isinstance(transport, LocalHub)
    for reply in (transport.send(row()), transport.send(row("metric", payload=METRIC))):
        assert (reply.status, reply.outcome) == (200, "LOCAL_DEV")
    assert [record.getMessage() for record in caplog.records if record.name.endswith("hub")] == [
        f"LOCAL_DEV: status of model {MODEL} is ERROR"
    ]
    assert isinstance(transport_for(settings("http://hub.example")), HubTransport)

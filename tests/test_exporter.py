"""The HTTP endpoint, with real sockets, real TLS, and clients that do not behave."""

from __future__ import annotations

import contextlib
import errno
import gzip
import http.client
import os
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from certificates import Authority, Pair
from flip_observability import errors, exporter
from flip_observability.exporter import TLS, Exporter, ExporterError, NotReadyError

PAGE = b"# TYPE x gauge\n" + b"x 1\n" * 1_000
SECRET = "accession-4711"


def make(
    metrics: Callable[[str], tuple[str, bytes]] = lambda _: ("text/plain; version=0.0.4", PAGE),
    ready: Callable[[], str] = lambda: "",
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: TLS | None = None,
) -> Exporter:
    return Exporter(metrics, ready, lambda: {"ledger": "/srv/<b>&"}, host=host, port=port, tls=tls)


@contextlib.contextmanager
def serving(endpoint: Exporter) -> Iterator[Exporter]:
    endpoint.start()
    try:
        yield endpoint
    finally:
        endpoint.stop()


@pytest.fixture
def endpoint() -> Iterator[Exporter]:
    with serving(make()) as endpoint:
        yield endpoint


def ask(
    endpoint: Exporter,
    path: str = "/metrics",
    method: str = "GET",
    context: ssl.SSLContext | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    connection = (
        http.client.HTTPSConnection("127.0.0.1", endpoint.port, timeout=30, context=context)
        if context
        else http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=30)
    )
    with contextlib.closing(connection):
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def tell(endpoint: Exporter, data: bytes) -> bytes:
    """Send bytes as they are; everything that comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=30) as wire:
        with contextlib.suppress(OSError):
            wire.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while more := wire.recv(65_536):
                answer += more
        return answer


# -- what is served ----------------------------------------------------------------------------------------------------


def test_metrics_as_they_are_made(endpoint: Exporter) -> None:
    code, headers, body = ask(endpoint)
    assert (code, headers["content-type"], body) == (200, "text/plain; version=0.0.4", PAGE)
    assert headers["cache-control"] == "no-store"
    assert "content-encoding" not in headers


def test_what_is_accepted_is_handed_on() -> None:
    asked: list[str] = []

    def page(accept: str) -> tuple[str, bytes]:
        asked.append(accept)
        return "application/openmetrics-text", b"# EOF\n"

    with serving(make(page)) as endpoint:
        assert ask(endpoint, Accept="application/openmetrics-text;version=1.0.0")[1]["content-type"].endswith("-text")
        assert ask(endpoint, "/metrics?name[]=x")[0] == 200
    assert asked == ["application/openmetrics-text;version=1.0.0", ""]


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [("gzip", True), ("deflate, gzip;q=0.5", True), ("gzip;q=0", False), ("gzip; q=0.0", False), ("identity", False)],
)
def test_gzip_for_whoever_asks(endpoint: Exporter, accepted: str, packed: bool) -> None:
    _, headers, body = ask(endpoint, Accept_Encoding=accepted)
    assert (headers.get("content-encoding") == "gzip") is packed
    assert (gzip.decompress(body) if packed else body) == PAGE
    assert int(headers["content-length"]) == len(body)


def test_head_is_get_without_a_body(endpoint: Exporter) -> None:
    code, headers, body = ask(endpoint, method="HEAD")
    assert (code, headers["content-length"], body) == (200, str(len(PAGE)), b"")


def test_the_index_has_links_and_shows_what_it_is_told_as_text(endpoint: Exporter) -> None:
    code, headers, body = ask(endpoint, "/")
    assert (code, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["content-security-policy"] == "default-src 'none'"
    for path in ("/metrics", "/healthz", "/readyz"):
        assert f'href="{path}"'.encode() in body
    assert b"/srv/&lt;b&gt;&amp;" in body


def test_unknown_paths(endpoint: Exporter) -> None:
    for path in ("/nothing", "/metrics/", "/../metrics", "//metrics"):
        assert ask(endpoint, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get"])
def test_other_methods(endpoint: Exporter, method: str) -> None:
    code, headers, _ = ask(endpoint, method=method)
    assert (code, headers["allow"]) == (405, "GET, HEAD")


def test_a_body_does_not_keep_the_answer_from_coming(endpoint: Exporter) -> None:
    head = b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n"
    assert tell(endpoint, head + b"x" * 500_000).startswith(b"HTTP/1.1 405 ")


def test_not_ready_is_503_with_the_reason() -> None:
    def page(_: str) -> tuple[str, bytes]:
        raise NotReadyError("the history is being read")

    with serving(make(page, ready=lambda: "the history is being read")) as endpoint:
        for path in ("/metrics", "/readyz"):
            code, _, body = ask(endpoint, path)
            assert (code, body) == (503, b"the history is being read\n")
        assert ask(endpoint, "/healthz")[0] == 200


def test_ready(endpoint: Exporter) -> None:
    assert ask(endpoint, "/readyz")[::2] == (200, b"ready\n")


def test_a_page_that_fails_is_counted_and_does_not_tell_why() -> None:
    def page(_: str) -> tuple[str, bytes]:
        raise ValueError(SECRET)

    errors.drain()
    with serving(make(page)) as endpoint:
        code, _, body = ask(endpoint)
        assert ask(endpoint, "/healthz")[0] == 200
    assert code == 503
    assert SECRET.encode() not in body
    assert b"ValueError" in body
    assert errors.drain() == {"exporter": 1}


def test_pages_that_hang_leave_health_and_the_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "PAGE_SECONDS", 0.2)
    release = threading.Event()

    def page(_: str) -> tuple[str, bytes]:
        release.wait(60)
        return "text/plain", b"late"

    with serving(make(page)) as endpoint:
        for _ in range(exporter.WORKERS + 2):
            assert ask(endpoint)[0] == 503
        assert ask(endpoint, "/healthz")[0] == 200
    assert not endpoint.serving
    release.set()


# -- requests that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\r\n\r\n", 400),
        (b"\x00\xff\x00" * 100 + b"\r\n\r\n", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET http://elsewhere/ HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 505),
        (b"GET /metrics HTTP/1.1\r\nno header\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nName : value\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n folded: value\r\n\r\n", 400),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", 431),
        (b"x" * 1_000_000, 431),
    ],
    ids=range(14),
)
def test_garbage_gets_an_answer_and_that_is_all(endpoint: Exporter, data: bytes, code: int) -> None:
    assert tell(endpoint, data).startswith(f"HTTP/1.1 {code} ".encode())
    assert ask(endpoint)[2] == PAGE


def test_only_one_request_per_connection(endpoint: Exporter) -> None:
    answer = tell(endpoint, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 5)
    assert answer.count(b"HTTP/1.1") == 1
    assert b"Connection: close" in answer


def test_http_1_0_without_headers(endpoint: Exporter) -> None:
    assert tell(endpoint, b"GET /metrics HTTP/1.0\r\n\r\n").endswith(PAGE)


def test_a_client_that_has_said_all_still_gets_the_whole_page() -> None:
    page = os.urandom(8_000_000)
    with serving(make(lambda _: ("text/plain", page))) as endpoint, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        wire.settimeout(30)
        wire.connect(("127.0.0.1", endpoint.port))
        wire.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        wire.shutdown(socket.SHUT_WR)
        answer = b""
        while more := wire.recv(1 << 20):
            answer += more
    assert answer.endswith(b"\r\n\r\n" + page)


def test_a_request_that_never_ends_is_answered_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "HEAD_SECONDS", 0.3)
    with serving(make()) as endpoint, socket.create_connection(("127.0.0.1", endpoint.port), timeout=30) as wire:
        wire.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert wire.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "SEND_SECONDS", 0.3)
    page = b"x" * 50_000_000
    with serving(make(lambda _: ("text/plain", page))) as endpoint:
        with socket.create_connection(("127.0.0.1", endpoint.port), timeout=30) as wire:
            wire.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            select.select([wire], [], [], 30)  # the answer has begun, however busy the machine is
            time.sleep(2)
            got = 0
            with contextlib.suppress(ConnectionError):
                while data := wire.recv(1 << 20):
                    got += len(data)
        assert got < len(page)


def test_a_thousand_silent_connections_hold_nobody_up(endpoint: Exporter) -> None:
    threads = threading.active_count()
    with contextlib.ExitStack() as stack:
        for number in range(1_000):
            wire = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=30))
            if number % 3 == 1:
                wire.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
            if number % 100 == 0:
                assert ask(endpoint)[2] == PAGE
        assert ask(endpoint)[2] == PAGE
        assert threading.active_count() == threads
        mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_socket(fd)}
        # A thousand of the clients' ends, and no more of the server's than it may have.
        assert len(mine) <= 1_000 + exporter.MAX_CONNECTIONS + 20


def _is_socket(fd: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:
        return False


def test_scrapes_at_once(endpoint: Exporter) -> None:
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(endpoint)[2])) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [PAGE] * 40


# -- TLS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.issue("server")


def trusting(authority: Authority, client: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.certificate)
    if client is not None:
        context.load_cert_chain(client.certificate, client.key)
    return context


def test_https(authority: Authority, pair: Pair) -> None:
    with serving(make(tls=TLS(pair.certificate, pair.key))) as endpoint:
        assert endpoint.url == f"https://127.0.0.1:{endpoint.port}"
        assert ask(endpoint, context=trusting(authority))[2] == PAGE
        assert tell(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n") == b""
        assert ask(endpoint, "/nothing", context=trusting(authority))[0] == 404
        assert ask(endpoint, context=trusting(authority), Accept_Encoding="gzip")[1]["content-encoding"] == "gzip"


def test_a_large_page_over_tls(authority: Authority, pair: Pair) -> None:
    page = os.urandom(8_000_000)
    with serving(make(lambda _: ("text/plain", page), tls=TLS(pair.certificate, pair.key))) as endpoint:
        assert ask(endpoint, context=trusting(authority))[2] == page


def test_old_tls_is_refused(authority: Authority, pair: Pair) -> None:
    context = trusting(authority)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with serving(make(tls=TLS(pair.certificate, pair.key))) as endpoint:
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(OSError):
            ask(endpoint, context=context)


def test_only_clients_of_the_authority(authority: Authority, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other", "stranger").issue("client")
    with serving(make(tls=TLS(pair.certificate, pair.key, authority.certificate))) as endpoint:
        assert ask(endpoint, context=trusting(authority, authority.issue("client")))[2] == PAGE
        for context in (trusting(authority), trusting(authority, stranger)):
            with pytest.raises(OSError):
                ask(endpoint, context=context)


def test_handshakes_that_hang_hold_nobody_up(authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(make(tls=TLS(pair.certificate, pair.key))) as endpoint, contextlib.ExitStack() as stack:
        wires = [
            stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=30)) for _ in range(200)
        ]
        for wire in wires[::2]:
            with contextlib.suppress(OSError):
                wire.sendall(b"\x16\x03\x03\x40\x00\x02")
        assert ask(endpoint, context=trusting(authority))[2] == PAGE
    monkeypatch.setattr(exporter, "HANDSHAKE_SECONDS", 0.3)
    with serving(make(tls=TLS(pair.certificate, pair.key))) as endpoint:
        assert tell(endpoint, b"\x16\x03\x03\x40\x00\x02") == b""  # cut


def test_a_renewed_certificate_is_used(authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "CERTIFICATE_SECONDS", 0.0)

    with serving(make(tls=TLS(pair.certificate, pair.key))) as renewing:

        def shown() -> str:
            return ssl.get_server_certificate(("127.0.0.1", renewing.port))

        before = shown()
        assert shown() == before
        key = pair.key.read_bytes()
        authority.issue("server")
        assert shown() not in {before, ""}
        renewed = shown()
        pair.key.write_bytes(key)  # half a renewal: certificate and key do not belong together
        assert shown() == renewed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("certificate",), ["--tls-cert needs --tls-key"]),
        (("key",), ["--tls-key needs --tls-cert"]),
        (("client_ca",), ["--client-ca needs --tls-cert"]),
        (("certificate", "wrong_key"), ["--tls-key", "is not the key of"]),
        (("certificate", "garbage_key"), ["--tls-key", "PEM"]),
        (("certificate", "encrypted_key"), ["--tls-key", "unencrypted"]),
        (("certificate", "missing_key"), ["--tls-key", "cannot be read"]),
        (("certificate", "folder_key"), ["--tls-key", "cannot be read"]),
        (("garbage_certificate", "key"), ["--tls-cert", "PEM"]),
        (("missing_certificate", "key"), ["--tls-cert", "cannot be read"]),
        (("certificate", "key", "garbage_client_ca"), ["--client-ca", "PEM"]),
        (("certificate", "key", "missing_client_ca"), ["--client-ca", "cannot be read"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_files_that_cannot_be_used(
    authority: Authority, pair: Pair, tmp_path: Path, given: tuple[str, ...], said: list[str]
) -> None:
    (tmp_path / "garbage").write_text(SECRET)
    files = {"certificate": pair.certificate, "key": pair.key, "client_ca": authority.certificate}
    files |= {f"garbage_{name}": tmp_path / "garbage" for name in ("certificate", "key", "client_ca")}
    files |= {f"missing_{name}": tmp_path / "missing" for name in ("certificate", "key", "client_ca")}
    files |= {"wrong_key": authority.issue("other").key, "folder_key": tmp_path}
    files["encrypted_key"] = authority.issue("encrypted", password=b"hunter2").key
    names = {name.removeprefix(prefix): name for name in given for prefix in _PREFIXES if name.startswith(prefix)}
    tls = TLS(**{plain: files[name] for plain, name in names.items() if plain in {"certificate", "key", "client_ca"}})
    with pytest.raises(ExporterError) as failure:
        make(tls=tls).start()
    assert all(part in str(failure.value) for part in said), str(failure.value)
    assert SECRET not in str(failure.value)
    assert "\n" not in str(failure.value)


_PREFIXES = ("", "wrong_", "garbage_", "missing_", "folder_", "encrypted_")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_key_of_somebody_else(pair: Pair) -> None:
    pair.key.chmod(0)
    with pytest.raises(ExporterError, match=r"--tls-key: .* cannot be read \(Permission denied\)"):
        make(tls=TLS(pair.certificate, pair.key)).start()


# -- starting and stopping ---------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(endpoint: Exporter) -> None:
    with pytest.raises(ExporterError, match=rf"port {endpoint.port}: .*in use.*--port"):
        make(port=endpoint.port).start()
    assert ask(endpoint)[0] == 200


@pytest.mark.parametrize(
    ("host", "said"), [("no.such.host.invalid", "--host"), ("192.0.2.1", "--host"), ("a" * 300, "--host")]
)
def test_a_host_that_is_not_here(host: str, said: str) -> None:
    with pytest.raises(ExporterError, match=said):
        make(host=host).start()


def test_a_port_that_the_user_may_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    class Refusing(socket.socket):
        bind = refuse  # root may do everything

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(ExporterError, match="1023 with --port"):
        make(port=80).start()


def test_start_and_stop_as_often_as_one_likes() -> None:
    endpoint = make()
    endpoint.stop()
    endpoint.start()
    port = endpoint.port
    endpoint.start()
    assert ask(endpoint)[0] == 200
    with socket.create_connection(("127.0.0.1", port), timeout=30) as silent:
        endpoint.stop()
        endpoint.stop()
        with contextlib.suppress(ConnectionError):
            assert silent.recv(1) == b""
    assert not endpoint.serving
    with pytest.raises(OSError):
        ask(endpoint)
    endpoint.start()
    assert (endpoint.port, ask(endpoint)[0]) == (port, 200)
    endpoint.stop()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "flip-exporter"]


def test_it_does_not_keep_a_process_from_ending() -> None:
    code = """
import threading
from flip_observability.exporter import Exporter
endpoint = Exporter(lambda _: threading.Event().wait() or ("", b""), lambda: "", dict, port=0)
endpoint.start()
import socket
wire = socket.create_connection(("127.0.0.1", endpoint.port))
wire.sendall(b"GET /metrics HTTP/1.1\\r\\n\\r\\n")
print("over")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("over\n", "")

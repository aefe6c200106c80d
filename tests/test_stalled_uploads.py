"""Uploads to buckets of which nobody takes a byte, and to slow ones: real servers, and an END_RUN that cannot wait."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from flip_observability import _multipart
from flip_observability._pace import Pace, Part
from flip_observability.results import Destination, Receipt, ResultsUploadError, upload_results
from s3_faults import Fault, FaultProxy, Request, Response, error, hang, reset
from s3_sink import Handler

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"
MIB = 1024 * 1024
LIMIT = 1.5
"""Seconds without a byte. The call ends some time after it, and long before any other patience."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "weights.pt").write_bytes(os.urandom(3 * MIB))
    return folder


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield str(host), int(port)
    server.stop()


@pytest.fixture
def proxy(moto: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    proxy = FaultProxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    _multipart.make_client().create_bucket(Bucket="stalled")
    yield proxy
    proxy.stop()


def upload(run_dir: Path, limit: float = LIMIT, **arguments: Any) -> Receipt:
    return upload_results(run_dir, Destination.parse("s3://stalled"), MODEL, stalled_after=lambda: limit, **arguments)


def failure(run_dir: Path, limit: float = LIMIT, **arguments: Any) -> tuple[ResultsUploadError, float]:
    begun = time.monotonic()
    with pytest.raises(ResultsUploadError) as caught:
        upload(run_dir, limit, **arguments)
    return caught.value, time.monotonic() - begun


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server


def point_to(monkeypatch: pytest.MonkeyPatch, server: socket.socket) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.getsockname()[1]}")


# -- nobody takes a byte -----------------------------------------------------------------------------------------------


def test_a_bucket_that_refuses_connections(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(monkeypatch, closed)
        failed, seconds = failure(run_dir)
    assert (failed.reason, failed.passing) == ("connection", True)
    assert LIMIT <= seconds < LIMIT + 3


def test_a_bucket_that_accepts_connections_and_says_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as server:
        point_to(monkeypatch, server)
        failed, seconds = failure(run_dir)
    assert (failed.reason, failed.passing) == ("timeout", True)
    assert LIMIT <= seconds < LIMIT + 3


def test_credentials_that_never_come(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    monkeypatch.setenv("AWS_METADATA_SERVICE_TIMEOUT", "60")
    with listening() as server:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        failed, seconds = failure(run_dir)
    assert (failed.reason, failed.passing) == ("timeout", True)
    assert LIMIT <= seconds < LIMIT + 3


@pytest.mark.parametrize("operation", ["UploadPart", "CompleteMultipartUpload"])
@pytest.mark.parametrize("act", [hang, reset, error(503, "SlowDown")], ids=["hang", "reset", "503"])
def test_a_bucket_that_stops_in_the_midst(proxy: FaultProxy, run_dir: Path, operation: str, act: Any) -> None:
    """It may take a part's bytes again and again: what it had taken before is no news."""
    proxy.faults = [Fault(operation, act), Fault("AbortMultipartUpload", act)]
    told: list[str] = []
    failed, seconds = failure(run_dir, on_multipart=lambda _key, upload_id: told.append(upload_id))
    assert failed.passing
    assert LIMIT <= seconds < LIMIT + 6, "2 s of which are for the removal"
    assert told[-1], "what is left in the bucket is known to whoever comes next"


def test_an_abort_makes_patience_short_while_it_lasts(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = [60.0]
    with listening() as server:
        point_to(monkeypatch, server)
        threading.Timer(0.5, lambda: limit.__setitem__(0, 1.0)).start()
        begun = time.monotonic()
        with pytest.raises(ResultsUploadError):
            upload_results(run_dir, Destination.parse("s3://stalled"), MODEL, stalled_after=lambda: limit[0])
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("status", "code", "passing"),
    [
        (403, "AccessDenied", False),
        (404, "NoSuchBucket", False),
        (400, "BadDigest", False),
        (500, "InternalError", True),
    ],
)
def test_which_failures_pass(
    proxy: FaultProxy, run_dir: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str, passing: bool
) -> None:
    monkeypatch.setattr(_multipart, "PATIENCE", _multipart.Patience(attempts=2, first_pause=0.01, longest_pause=0.01))
    proxy.faults = [Fault("CreateMultipartUpload", error(status, code))]
    failed, _ = failure(run_dir, 10.0)
    assert failed.passing is passing


# -- slow, and moving --------------------------------------------------------------------------------------------------


class _Slow:
    """A connection of which 32 KiB are read at a time, with a pause."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readinto(self, buffer: memoryview) -> int:
        time.sleep(0.1)
        return int(self._stream.readinto(buffer[: 32 * 1024]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _SlowHandler(Handler):
    def do_PUT(self) -> None:  # noqa: N802 - the server's name
        fast, self.rfile = self.rfile, _Slow(self.rfile)  # type: ignore[assignment]
        super().do_PUT()
        self.rfile = fast


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
        super().server_bind()


def test_a_slow_link_is_waited_for(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part takes ten seconds. The kernel would take all of it at once, and then nothing for a third of that."""
    server = _Server(("127.0.0.1", 0), _SlowHandler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
        receipt = upload(run_dir)
    finally:
        server.shutdown()
        server.server_close()
    assert receipt.verified
    assert receipt.seconds > 3 * LIMIT


def test_a_bucket_that_takes_a_moment_for_each_part(proxy: FaultProxy, run_dir: Path) -> None:
    def take_time(through: FaultProxy, request: Request) -> Response:
        time.sleep(LIMIT / 2)
        return through.forward(request)

    (run_dir / "more.pt").write_bytes(os.urandom(40 * MIB))
    proxy.faults = [Fault("UploadPart", take_time)]
    assert upload(run_dir).verified


def test_a_part_that_is_sent_again_over_a_slow_link_is_waited_for(proxy: FaultProxy, run_dir: Path) -> None:
    """Time that goes into sending counts for nothing, and the pause before it does."""
    part, now = Part(8 * MIB), time.monotonic()
    part.pace = pace = Pace(lambda: LIMIT)
    took = part.sending()
    took(len(part))
    time.sleep(0.3)
    again = part.sending()
    for count in range(10):
        again(count)
        time.sleep(0.1)
    assert 0.3 <= pace.quiet() < time.monotonic() - now - 0.8
    again(len(part) + 1)
    assert pace.quiet() < 0.2


def test_a_source_that_is_slow_is_not_the_buckets_fault(
    proxy: FaultProxy, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, slept = _multipart.MultipartUpload._send_part, []

    def late(upload: _multipart.MultipartUpload) -> None:
        time.sleep(LIMIT + 0.5)
        slept.append(upload)
        begin(upload)

    monkeypatch.setattr(_multipart.MultipartUpload, "_send_part", late)
    assert upload(run_dir).verified
    assert slept


def test_time_in_which_this_process_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = [0.0]
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])
    pace, never = Pace(lambda: 5.0), Future[None]()
    threading.Timer(0.1, lambda: ahead.__setitem__(0, 100.0)).start()
    threading.Timer(1.0, lambda: never.set_result(None)).start()
    assert pace.wait([never], 1_000.0)[0] == {never}

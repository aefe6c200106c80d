"""Uploads to real S3 endpoints: a good one (moto), a faulty one in front of it, one that keeps only checksums."""

from __future__ import annotations

import contextvars
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3.session
import pytest
from moto.server import ThreadedMotoServer

from flip_observability import _crc32, _multipart
from flip_observability._pace import Part
from flip_observability.results import Destination, Receipt, ResultsUploadError, abort_upload, upload_results
from s3_faults import Fault, FaultProxy, Request, Response, edit_headers, error, hang, lose_answer, reset

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"
TARGET = Destination.parse("s3://results/net-1")
SECRET = "CANARY-secret-access-key"
MIB = 1024 * 1024
PATIENT = _multipart.Patience(first_pause=0.001, longest_pause=0.005)
HURRIED = _multipart.Patience(
    connect=5, silence=1, attempts=3, total=3, stuck=6, first_pause=0.001, longest_pause=0.005
)


@pytest.fixture(scope="module")
def moto() -> Iterator[tuple[str, int]]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield str(host), int(port)
    server.stop()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "CANARY-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setattr(_multipart, "PATIENCE", PATIENT)


@pytest.fixture
def hurried(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket is not waited for long."""
    monkeypatch.setattr(_multipart, "PATIENCE", HURRIED)


@pytest.fixture
def proxy(moto: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    proxy = FaultProxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
    yield proxy
    proxy.stop()


@pytest.fixture
def bucket(moto: tuple[str, int], proxy: FaultProxy) -> Iterator[S3Client]:
    """Straight to moto: an empty bucket, looked into without the faults."""
    client = boto3.session.Session().client("s3", endpoint_url=f"http://{moto[0]}:{moto[1]}")
    client.create_bucket(Bucket="results")
    yield client
    for item in client.list_objects_v2(Bucket="results").get("Contents", []):
        client.delete_object(Bucket="results", Key=item["Key"])
    for upload in client.list_multipart_uploads(Bucket="results").get("Uploads", []):
        client.abort_multipart_upload(Bucket="results", Key=upload["Key"], UploadId=upload["UploadId"])
    client.delete_bucket(Bucket="results")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.txt").write_text("a line\n" * 1000)
    return folder


@pytest.fixture
def weights(run_dir: Path) -> bytes:
    data = os.urandom(20 * MIB)
    (run_dir / "weights.pt").write_bytes(data)
    return data


class Calls:
    """What the callbacks were told."""

    def __init__(self) -> None:
        self.multipart: list[tuple[str, str]] = []
        self.progress: list[tuple[int, int]] = []

    def upload(self, run_dir: Path, **arguments: Any) -> Receipt:
        return upload_results(
            run_dir,
            arguments.pop("destination", TARGET),
            MODEL,
            on_multipart=lambda key, upload_id: self.multipart.append((key, upload_id)),
            on_progress=lambda sent, total: self.progress.append((sent, total)),
            **arguments,
        )

    def failure(self, run_dir: Path, **arguments: Any) -> ResultsUploadError:
        with pytest.raises(ResultsUploadError) as caught:
            self.upload(run_dir, **arguments)
        text = str(caught.value)
        assert text.startswith("Unexpected failure uploading results to S3")
        assert "CANARY" not in text
        assert caught.value.__cause__ is not None
        return caught.value


def stored(bucket: S3Client, receipt: Receipt) -> dict[str, bytes]:
    key = receipt.uri.removeprefix("s3://results/")
    data = bucket.get_object(Bucket="results", Key=key)["Body"].read()
    assert len(data) == receipt.size
    assert _crc32.text(zlib.crc32(data)) == receipt.crc32
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def keys(bucket: S3Client) -> list[str]:
    return [item["Key"] for item in bucket.list_objects_v2(Bucket="results").get("Contents", [])]


def unfinished(bucket: S3Client) -> list[str]:
    return [upload["UploadId"] for upload in bucket.list_multipart_uploads(Bucket="results").get("Uploads", [])]


# --- what goes well ---------------------------------------------------------------------------------------------------


def test_a_run_arrives_whole_and_verified(bucket: S3Client, proxy: FaultProxy, run_dir: Path, weights: bytes) -> None:
    calls = Calls()
    moment = datetime(2026, 5, 4, 3, 2, 1, tzinfo=timezone.utc)
    receipt = calls.upload(run_dir, timestamp=moment)
    key = f"net-1/{MODEL}/20260504_030201.zip"
    assert receipt.uri == f"s3://results/{key}"
    assert stored(bucket, receipt) == {"log.txt": b"a line\n" * 1000, "weights.pt": weights}
    assert (receipt.files, receipt.verified, receipt.warnings) == (2, True, ())
    assert receipt.seconds > 0
    assert calls.multipart == [(key, ""), (key, calls.multipart[1][1]), (key, "")]
    assert calls.multipart[1][1]
    assert calls.progress[0] == (0, 20 * MIB + 7000)
    assert calls.progress == sorted(calls.progress)
    assert calls.progress[-1][0] == receipt.size
    assert unfinished(bucket) == []
    assert sorted(proxy.seen) == sorted(
        ["CreateMultipartUpload", *["UploadPart"] * 3, "CompleteMultipartUpload", "HeadObject"]
    )
    created = next(request for request in proxy.requests if request.operation == "CreateMultipartUpload")
    headers = {name.lower(): value for name, value in created.headers.items()}
    assert headers["x-amz-checksum-algorithm"] == "CRC32"
    assert headers["x-amz-checksum-type"] == "FULL_OBJECT"


def test_a_small_run_takes_the_same_way(bucket: S3Client, proxy: FaultProxy, run_dir: Path) -> None:
    receipt = Calls().upload(run_dir, destination=Destination.parse("s3://results"), suffix="-salvaged")
    assert re.fullmatch(rf"s3://results/{MODEL}/\d{{8}}_\d{{6}}-salvaged\.zip", receipt.uri)
    assert stored(bucket, receipt) == {"log.txt": b"a line\n" * 1000}
    assert "PutObject" not in proxy.seen


def test_a_client_of_the_callers_is_used(bucket: S3Client, proxy: FaultProxy, run_dir: Path) -> None:
    receipt = Calls().upload(run_dir, s3_client=bucket)
    assert receipt.verified
    assert proxy.seen == [], "the client that was given goes straight to moto"


def test_parts_grow_when_a_stream_is_longer_than_expected(
    bucket: S3Client, run_dir: Path, weights: bytes, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_multipart, "planned_part_size", lambda _expected: 5 * MIB)
    monkeypatch.setattr(_multipart, "PLANNED_PARTS", 1)
    monkeypatch.setattr(_multipart, "_DOUBLE_EVERY", 1)
    receipt = Calls().upload(run_dir)
    assert stored(bucket, receipt)["weights.pt"] == weights
    sizes = {
        request.part: int(request.headers["Content-Length"]) // MIB
        for request in proxy.requests
        if request.operation == "UploadPart"
    }
    assert sizes == {1: 5, 2: 10, 3: 5}, "5, 10, and what is left of 20"


def test_any_size_fits_into_10000_parts() -> None:
    for expected in (0, 1, 78 * 1024 * MIB, 79 * 1024 * MIB, 5 * 1024**2 * MIB):
        planned = _multipart.planned_part_size(expected)
        sizes = [_multipart.part_size(number, planned) for number in range(1, 10_001)]
        assert sum(sizes[: _multipart.PLANNED_PARTS]) >= expected
        assert min(sizes) >= 5 * MIB
        assert max(sizes) <= 5 * 1024 * MIB
        assert sizes == sorted(sizes)
        assert sum(sizes) > 2 * expected, "also when it is twice as long as expected"
    assert _multipart.planned_part_size(60 * 1024 * MIB) == 8 * MIB


def test_the_threads_work_in_the_callers_context(bucket: S3Client, run_dir: Path) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="none")
    variable.set("the caller's")
    seen = []
    bucket.meta.events.register("before-send.s3", lambda **_: seen.append(variable.get()))
    Calls().upload(run_dir, s3_client=bucket)
    assert set(seen) == {"the caller's"}


def test_no_content_and_no_secret_in_a_debug_log(
    bucket: S3Client, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / "cells.pt").write_bytes(b"CANARY-cell" * 1000)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("somebody.else").debug("a line of somebody else's")
        Calls().upload(run_dir)
    assert "a line of somebody else's" in caplog.text
    assert "UploadPart" not in caplog.text, "botocore logs its arguments"
    assert "CANARY-cell" not in caplog.text
    assert SECRET not in caplog.text


# --- what goes wrong for a while --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [error(500, "InternalError"), error(503, "SlowDown"), error(400, "BadDigest"), error(429, "Busy"), reset],
    ids=["500", "SlowDown", "BadDigest", "429", "reset"],
)
def test_a_part_that_fails_three_times_and_then_works(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, weights: bytes, act: Any
) -> None:
    proxy.faults = [Fault("UploadPart", act, times=3, part=2)]
    receipt = Calls().upload(run_dir)
    assert receipt.verified
    assert stored(bucket, receipt)["weights.pt"] == weights
    assert sum(request.part == 2 for request in proxy.requests) == 4
    assert sum(request.part == 1 for request in proxy.requests) == 1


@pytest.mark.parametrize("operation", ["CreateMultipartUpload", "CompleteMultipartUpload", "HeadObject"])
def test_other_calls_are_tried_again_too(bucket: S3Client, proxy: FaultProxy, run_dir: Path, operation: str) -> None:
    proxy.faults = [Fault(operation, error(503, "SlowDown"), times=3)]
    receipt = Calls().upload(run_dir)
    assert receipt.verified
    assert proxy.seen.count(operation) == 4
    assert stored(bucket, receipt)


def test_a_part_that_is_damaged_on_the_way_is_sent_again(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, weights: bytes
) -> None:
    def damage(through: FaultProxy, request: Request) -> Response:
        request.body = b"????" + request.body[4:]
        return through.forward(request)

    proxy.faults = [Fault("UploadPart", damage, times=2, part=1)]
    receipt = Calls().upload(run_dir)
    assert stored(bucket, receipt)["weights.pt"] == weights
    assert sum(request.part == 1 for request in proxy.requests) == 3


def test_a_hanging_part_is_sent_again(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_multipart, "PATIENCE", replace(PATIENT, silence=3))
    proxy.faults = [Fault("UploadPart", hang, times=1)]
    assert stored(bucket, Calls().upload(run_dir))["weights.pt"] == weights


def test_an_upload_whose_last_answer_was_lost_is_no_failure(bucket: S3Client, proxy: FaultProxy, run_dir: Path) -> None:
    proxy.faults = [Fault("CompleteMultipartUpload", lose_answer, times=1)]
    calls = Calls()
    receipt = calls.upload(run_dir)
    assert receipt.verified
    assert proxy.seen.count("CompleteMultipartUpload") == 2
    assert stored(bucket, receipt)
    assert calls.multipart[-1][1] == ""


def test_an_upload_that_somebody_aborted_is_a_failure(bucket: S3Client, proxy: FaultProxy, run_dir: Path) -> None:
    proxy.faults = [
        Fault("CompleteMultipartUpload", error(503, "SlowDown"), times=1),
        Fault("CompleteMultipartUpload", error(404, "NoSuchUpload")),
    ]
    assert Calls().failure(run_dir).reason == "other"
    assert keys(bucket) == []


# --- what goes wrong for good -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "status", "code", "reason"),
    [
        ("CreateMultipartUpload", 403, "AccessDenied", "access_denied"),
        ("UploadPart", 403, "AccessDenied", "access_denied"),
        ("CompleteMultipartUpload", 403, "AccessDenied", "access_denied"),
        ("CreateMultipartUpload", 403, "InvalidAccessKeyId", "access_denied"),
        ("CreateMultipartUpload", 403, "SignatureDoesNotMatch", "access_denied"),
        ("UploadPart", 400, "ExpiredToken", "access_denied"),
        ("CreateMultipartUpload", 404, "NoSuchBucket", "no_such_bucket"),
        ("UploadPart", 400, "EntityTooLarge", "other"),
        ("UploadPart", 501, "NotImplemented", "other"),
    ],
)
def test_a_bucket_that_refuses(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, operation: str, status: int, code: str, reason: str
) -> None:
    proxy.faults = [Fault(operation, error(status, code))]
    calls = Calls()
    failed = calls.failure(run_dir)
    assert (failed.reason, failed.detail) == (reason, f"{code} in {operation}, bucket results")
    assert proxy.seen.count(operation) == 1, "trying again would not help"
    assert unfinished(bucket) == []
    assert keys(bucket) == []
    assert [upload_id for _, upload_id in calls.multipart][-1:] in ([], [""])
    assert (run_dir / "log.txt").exists()
    proxy.faults = []
    assert stored(bucket, calls.upload(run_dir)), "sent again, it works"


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [(503, "SlowDown", "other"), (400, "BadDigest", "checksum"), (400, "RequestTimeout", "timeout")],
)
def test_a_part_is_tried_ten_times(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, status: int, code: str, reason: str
) -> None:
    proxy.faults = [Fault("UploadPart", error(status, code))]
    assert Calls().failure(run_dir).reason == reason
    assert proxy.seen.count("UploadPart") == 10
    assert proxy.seen.count("AbortMultipartUpload") == 1
    assert unfinished(bucket) == []


@pytest.mark.system
def test_other_parts_stop_when_one_failed(bucket: S3Client, proxy: FaultProxy, run_dir: Path) -> None:
    (run_dir / "weights.pt").write_bytes(bytes(100 * MIB))
    proxy.faults = [Fault("UploadPart", error(403, "AccessDenied"), part=1)]
    assert Calls().failure(run_dir).reason == "access_denied"
    assert proxy.seen.count("UploadPart") <= 6
    assert unfinished(bucket) == []


def test_nothing_is_sent_behind_an_abort(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(_multipart.Patience):
        def pause(self, failures: int) -> float:
            return 30

    monkeypatch.setattr(_multipart, "PATIENCE", Slow())
    proxy.faults = [
        Fault("UploadPart", error(403, "AccessDenied"), part=2),
        Fault("UploadPart", error(503, "SlowDown")),
    ]
    calls = Calls()
    assert calls.failure(run_dir).reason == "access_denied"
    assert proxy.seen[-1] == "AbortMultipartUpload"
    assert proxy.seen.count("UploadPart") <= 3
    assert calls.multipart[-1][1] == "", "no thread is left that could send a part"


def test_a_slow_link_is_no_silent_one(weights: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part takes longer than any time-out, and bytes flow all the time."""
    monkeypatch.setattr(_multipart, "PATIENCE", replace(PATIENT, connect=1, silence=1))
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * 1024)
        slow.bind(("127.0.0.1", 0))
        slow.listen(1)
        received = []

        def read_slowly() -> None:
            connection, _ = slow.accept()
            with connection, connection.makefile("rb") as stream:
                while stream.readline().strip():
                    pass
                for _ in range(len(weights) // (MIB // 2)):
                    received.append(stream.read(MIB // 2))
                    time.sleep(0.1)
                connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 0\r\n\r\n')

        thread = threading.Thread(target=read_slowly, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{slow.getsockname()[1]}")
        body: Any = Part(weights)
        answer = _multipart.make_client().upload_part(
            Bucket="results", Key="k", UploadId="u", PartNumber=1, Body=body, ChecksumCRC32="AAAAAA=="
        )
        thread.join(10)
    assert answer["ETag"] == '"e"'
    assert b"".join(received) == weights


def test_an_error_code_cannot_break_a_line_of_the_log(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = "Evil\nERROR root: all is lost \x9b2J\u202e" + "x" * 1_000

    def evil(_proxy: FaultProxy, _request: Request) -> Response:
        return Response(503, [("Content-Type", "application/xml")], f"<Error><Code>{code}</Code></Error>".encode())

    proxy.faults = [Fault("CreateMultipartUpload", evil), Fault("AbortMultipartUpload", evil)]
    with caplog.at_level(logging.INFO):
        failed = Calls().failure(run_dir)
    assert failed.detail.isprintable()
    assert len(failed.detail) < 250
    assert all(message.isprintable() for message in caplog.messages), caplog.messages


def test_a_bucket_that_does_not_exist(bucket: S3Client, run_dir: Path) -> None:
    calls = Calls()
    failed = calls.failure(run_dir, destination=Destination.parse("s3://another-one"))
    assert failed.reason == "no_such_bucket"
    assert [upload_id for _, upload_id in calls.multipart] == [""]


def test_no_credentials(bucket: S3Client, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    failed = Calls().failure(run_dir)
    assert (failed.reason, failed.detail) == ("access_denied", "NoCredentialsError, bucket results")


def test_a_profile_that_does_not_exist(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    failed = Calls().failure(run_dir)
    assert (failed.reason, failed.detail) == ("other", "ProfileNotFound, bucket results")


def test_nobody_listens(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{unused.getsockname()[1]}")
        failed = Calls().failure(run_dir)
    assert (failed.reason, failed.detail) == ("connection", "EndpointConnectionError, bucket results")


@pytest.mark.parametrize("operation", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
@pytest.mark.usefixtures("hurried")
def test_a_bucket_that_hangs_ends_in_a_time_out(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, operation: str
) -> None:
    proxy.faults = [Fault(operation, hang)]
    calls = Calls()
    assert calls.failure(run_dir).reason == "timeout"
    assert unfinished(bucket) == []
    assert [upload_id for _, upload_id in calls.multipart][-1:] in ([], [""])


@pytest.mark.system
@pytest.mark.usefixtures("hurried")
def test_a_bucket_that_takes_no_more_bytes_ends_in_a_time_out(
    run_dir: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections are accepted by the kernel, a little is buffered, and nobody ever reads."""
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        client = _multipart.make_client()
        with pytest.raises(Exception) as caught:
            client.upload_part(
                Bucket="results",
                Key="k",
                UploadId="u",
                PartNumber=1,
                Body=Part(weights),  # type: ignore[arg-type]
            )
        assert _multipart.reason_of(caught.value) == "timeout"
        assert Calls().failure(run_dir).reason == "timeout"


@pytest.mark.system
@pytest.mark.usefixtures("hurried")
def test_an_answer_that_never_ends_ends_in_a_time_out(bucket: S3Client, proxy: FaultProxy, run_dir: Path) -> None:
    """Each byte comes well within the time-out of a read."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    stop = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            with suppress(OSError):
                while not stop.wait(0.1):
                    connection.sendall(b"<")

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=drip, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    client = boto3.session.Session().client("s3", endpoint_url=f"http://127.0.0.1:{listener.getsockname()[1]}")
    try:
        assert Calls().failure(run_dir, s3_client=client).reason == "timeout"
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_an_abort_that_fails_is_left_for_later(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults = [
        Fault("UploadPart", error(403, "AccessDenied")),
        Fault("AbortMultipartUpload", error(403, "AccessDenied"), times=1),
    ]
    calls = Calls()
    assert calls.failure(run_dir).reason == "access_denied"
    assert "could not be aborted (AccessDenied in AbortMultipartUpload)" in caplog.text
    [(_, nothing), (key, upload_id)] = calls.multipart
    assert nothing == ""
    assert unfinished(bucket) == [upload_id]
    abort_upload(TARGET, key, upload_id)
    assert unfinished(bucket) == []
    abort_upload(TARGET, key, upload_id)


def test_an_upload_whose_id_nobody_knows_is_found_by_its_key(bucket: S3Client) -> None:
    for key in ("net-1/a.zip", "net-1/a.zip", "net-1/a.zip.other"):
        bucket.create_multipart_upload(Bucket="results", Key=key)
    abort_upload(TARGET, "net-1/a.zip", "")
    left = bucket.list_multipart_uploads(Bucket="results")["Uploads"]
    assert [upload["Key"] for upload in left] == ["net-1/a.zip.other"]
    abort_upload(TARGET, "net-1/a.zip", "")


def test_an_abort_says_why_it_failed(bucket: S3Client, proxy: FaultProxy) -> None:
    proxy.faults = [Fault("AbortMultipartUpload", error(403, "AccessDenied"))]
    with pytest.raises(ResultsUploadError) as caught:
        abort_upload(TARGET, "key", "upload")
    assert (caught.value.reason, caught.value.detail) == (
        "access_denied",
        "AccessDenied in AbortMultipartUpload, bucket results",
    )


def test_an_interrupt_aborts_the_upload(bucket: S3Client, run_dir: Path, weights: bytes) -> None:
    def interrupt(sent: int, _total: int) -> None:
        if sent:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload_results(run_dir, TARGET, MODEL, on_progress=interrupt)
    assert unfinished(bucket) == []
    assert keys(bucket) == []


# --- verification -----------------------------------------------------------------------------------------------------


def changed(name: str, value: str | None) -> Any:
    def edit(headers: dict[str, str]) -> dict[str, str]:
        kept = {key: old for key, old in headers.items() if key.lower() != name}
        return kept if value is None else {**kept, name: value}

    return edit_headers(edit)


def test_a_head_that_is_refused_leaves_it_unverified(bucket: S3Client, proxy: FaultProxy, run_dir: Path) -> None:
    proxy.faults = [Fault("HeadObject", error(403, "Forbidden"))]
    calls = Calls()
    receipt = calls.upload(run_dir)
    assert not receipt.verified
    assert receipt.warnings == ("the bucket accepted the archive and did not let it be verified (403 in HeadObject)",)
    assert stored(bucket, receipt)
    assert calls.multipart[-1][1] == ""


@pytest.mark.usefixtures("hurried")
def test_a_head_that_hangs_leaves_it_unverified(bucket: S3Client, proxy: FaultProxy, run_dir: Path) -> None:
    proxy.faults = [Fault("HeadObject", hang)]
    receipt = Calls().upload(run_dir)
    assert not receipt.verified
    assert stored(bucket, receipt)


def test_an_object_that_is_not_there_afterwards_is_a_failure(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path
) -> None:
    proxy.faults = [Fault("HeadObject", error(404, "NotFound"))]
    assert Calls().failure(run_dir).reason == "other"


@pytest.mark.parametrize(
    ("name", "value"), [("x-amz-checksum-crc32", "AAAAAA=="), ("content-length", "5")], ids=["checksum", "size"]
)
def test_another_checksum_or_size_is_a_failure(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, name: str, value: str
) -> None:
    proxy.faults = [Fault("HeadObject", changed(name, value))]
    failed = Calls().failure(run_dir)
    assert (failed.reason, failed.detail) == ("checksum", "ChecksumMismatchError, bucket results")


def test_a_bucket_without_checksums_leaves_it_unverified(bucket: S3Client, proxy: FaultProxy, run_dir: Path) -> None:
    proxy.faults = [Fault("HeadObject", changed("x-amz-checksum-crc32", None))]
    receipt = Calls().upload(run_dir)
    assert not receipt.verified
    assert receipt.warnings == ("the bucket keeps no CRC32 checksum: only the archive's size was verified",)


def test_the_checksum_of_checksums_of_older_buckets_is_accepted(
    bucket: S3Client, proxy: FaultProxy, run_dir: Path, weights: bytes
) -> None:
    def composite(through: FaultProxy, request: Request) -> Response:
        [parts] = through.bodies.values()
        crcs = b"".join(zlib.crc32(parts[number]).to_bytes(4, "big") for number in sorted(parts))
        text = f"{_crc32.text(zlib.crc32(crcs))}-{len(parts)}"
        response: Response = changed("x-amz-checksum-crc32", text)(through, request)
        return response

    proxy.faults = [Fault("HeadObject", composite)]
    assert Calls().upload(run_dir).verified


def test_a_whole_that_the_bucket_finds_wrong_is_a_failure(bucket: S3Client, proxy: FaultProxy, run_dir: Path) -> None:
    proxy.faults = [Fault("CompleteMultipartUpload", error(400, "BadDigest"))]
    assert Calls().failure(run_dir).reason == "checksum"
    assert unfinished(bucket) == []


# --- memory and temporary files ---------------------------------------------------------------------------------------

MEASURED = """
import json, os, sys
from pathlib import Path
from flip_observability.results import Destination, upload_results

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024

written = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(str(arguments[0]))
    elif event.startswith("tempfile."):
        written.append(event)
sys.addaudithook(watch)

before = peak()
receipt = upload_results(Path(sys.argv[1]), Destination.parse("s3://results/net-1"), "model")
print(json.dumps({"grown": peak() - before, "written": written, "size": receipt.size, "verified": receipt.verified}))
"""


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    script = Path(__file__).with_name("s3_sink.py")
    # Slower than the packing, so that parts pile up if they can.
    with subprocess.Popen(
        [sys.executable, str(script), "0.1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{int(process.stdout.readline())}")
        yield
        process.stdin.close()
        process.wait(10)


@pytest.mark.system
def test_a_gibibyte_takes_little_memory_and_no_temporary_file(sink: None, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name, size in (("weights.pt", 900), ("optimizer.pt", 124)):
        with (tmp_path / "run" / name).open("wb") as file:
            file.truncate(size * MIB)
    (tmp_path / "run" / "log.txt").write_bytes(b"a line of the log\n" * 500_000)
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "run")],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    measured = json.loads(done.stdout)
    assert measured["size"] > 1024 * MIB
    assert measured["verified"]
    assert measured["grown"] <= 96 * MIB, f"grew by {measured['grown'] / MIB:.0f} MiB"
    assert measured["written"] == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_process_ends_while_a_bucket_hangs(proxy: FaultProxy, bucket: S3Client, run_dir: Path) -> None:
    proxy.faults = [Fault("CreateMultipartUpload", hang)]
    code = """
import os, sys, threading, time
from pathlib import Path
from flip_observability.results import Destination, upload_results
upload = lambda: upload_results(Path(sys.argv[1]), Destination.parse("s3://results"), "model")
threading.Thread(target=upload, daemon=True).start()
time.sleep(1)
"""
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=True, timeout=50)  # a read's time-out is 60 s

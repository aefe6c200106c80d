"""A stream of bytes of unknown length, written into an S3 multipart upload with bounded memory.

Kept apart from :mod:`flip_observability.results` so that boto3 is imported only when something is uploaded.
"""

from __future__ import annotations

import contextvars
import random
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import boto3.session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    HTTPClientError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    TokenRetrievalError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from flip_observability import _crc32
from flip_observability._pace import Pace, Part, sending
from flip_observability.errors import logger
from flip_observability.log_ids import keep_secrets_out
from flip_observability.utils import printable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

_log = logger(__name__)
_T = TypeVar("_T")

MIB = 1024 * 1024
PART_BYTES = 8 * MIB
PLANNED_PARTS = 8000
"""Parts that an upload of the expected size takes at most. S3 allows 10,000; from here on they double every 250."""
_DOUBLE_EVERY = 250
_MAX_PART_BYTES = 5 * 1024 * MIB
_MEMORY_BYTES = 32 * MIB
_MAX_IN_FLIGHT = 4
_SEND_BYTES = 64 * 1024
_UNSENT_BYTES = 128 * 1024
"""What the kernel takes from us beyond what the network has taken. Without a bound it takes megabytes at once, and then
nothing for as long as a slow link needs for a third of them: an upload that moves would look like one that does not."""
_GIB = 1024**3


@dataclass(frozen=True)
class Patience:
    """How long a bucket is waited for. All times in seconds.

    Args:
        connect: until a connection stands, and until a piece of a part is taken: urllib3 has one time-out for both.
        silence: until the next bytes of an answer come.
        attempts: of one request.
        total: after which no further attempt of a request begins.
        stuck: after which a request that neither succeeded nor failed is given up.
        first_pause, longest_pause: bounds of the exponential back-off, of which a random share is waited.
    """

    connect: float = 20
    silence: float = 60
    attempts: int = 10
    total: float = 240
    stuck: float = 330
    first_pause: float = 0.5
    longest_pause: float = 20

    def pause(self, failures: int) -> float:
        """Seconds before the next attempt, after so many failures."""
        # Not for security, but `random` is shared and may be seeded by the training code: all servers would wait alike.
        return random.SystemRandom().uniform(0, min(self.longest_pause, self.first_pause * 2.0 ** (failures - 1)))


PATIENCE = Patience()


class ChecksumMismatchError(Exception):
    """The bucket holds something else than what was sent."""


# --- which failure is which -------------------------------------------------------------------------------------------

_CODES = {
    "AccessDenied": "access_denied",
    "AllAccessDisabled": "access_denied",
    "ExpiredToken": "access_denied",
    "InvalidAccessKeyId": "access_denied",
    "InvalidToken": "access_denied",
    "SignatureDoesNotMatch": "access_denied",
    "NoSuchBucket": "no_such_bucket",
    "BadDigest": "checksum",
    "InvalidDigest": "checksum",
    "XAmzContentChecksumMismatch": "checksum",
    "XAmzContentSHA256Mismatch": "checksum",
    "RequestTimeout": "timeout",
    "GatewayTimeout": "timeout",
}
_STATUSES = {401: "access_denied", 403: "access_denied", 408: "timeout", 504: "timeout"}
_TYPES: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (ChecksumMismatchError, "checksum"),
    ((ConnectTimeoutError, ReadTimeoutError, TimeoutError), "timeout"),
    (
        (
            NoCredentialsError,
            PartialCredentialsError,
            CredentialRetrievalError,
            NoAuthTokenError,
            TokenRetrievalError,
        ),
        "access_denied",
    ),
    ((BotoConnectionError, HTTPClientError), "connection"),
)
_TRANSIENT_CODES = frozenset(
    "BadDigest InternalError OperationAborted RequestTimeout RequestTimeoutException ServiceUnavailable SlowDown "
    "Throttling ThrottlingException TooManyRequestsException XAmzContentChecksumMismatch "
    "XAmzContentSHA256Mismatch".split()
)
_TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})


def reason_of(error: BaseException) -> str:
    """Which of the reasons of a failed upload an exception of boto3 stands for."""
    if isinstance(error, ClientError):
        return _CODES.get(_code(error)) or _STATUSES.get(_status(error), "other")
    if isinstance(error, (BotoConnectionError, HTTPClientError)) and _timed_out(error):
        return "timeout"
    return next((reason for types, reason in _TYPES if isinstance(error, types)), "other")


def describe(error: BaseException) -> str:
    """S3's error code and the call, or the type of an exception; never a message."""
    if isinstance(error, ClientError):
        return f"{printable(_code(error), _MAX_CODE)} in {error.operation_name}"
    return type(error).__name__


def is_passing(error: Exception) -> bool:
    """Whether the bucket may be well again in a while, as nothing is wrong with what was asked of it."""
    return _is_transient(error) and reason_of(error) != "checksum"


_MAX_CODE = 100


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))[:_MAX_CODE]


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _timed_out(error: BaseException | None) -> bool:
    """A time-out while sending reaches us as a closed connection; what it was stands in the chain."""
    while error is not None:
        if isinstance(error, TimeoutError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_transient(error: Exception) -> bool:
    if isinstance(error, ClientError):
        return _code(error) in _TRANSIENT_CODES or _status(error) in _TRANSIENT_STATUSES
    return isinstance(error, (BotoConnectionError, HTTPClientError, OSError))


# --- calls ------------------------------------------------------------------------------------------------------------


def make_client() -> S3Client:
    """A client from boto3's own chain of credentials, region and endpoint. It does not retry: :func:`_persist` does."""
    keep_secrets_out()
    config = Config(
        connect_timeout=PATIENCE.connect,
        read_timeout=PATIENCE.silence,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=_MAX_IN_FLIGHT + 2,
        tcp_keepalive=True,
    )
    client = boto3.session.Session().client("s3", config=config)
    client.meta.events.register("before-send.s3.UploadPart", _send_in_pieces)
    _bound_what_is_unsent(client)
    # Nothing of OpenTelemetry is imported for an upload that is not part of a traced run.
    # Another thread may be importing it at this moment: what is missing then is no reason to lose an upload.
    active = getattr(sys.modules.get("flip_observability.client_spans"), "active", None)
    if active is not None and (spans := active()) is not None:
        spans.instrument_s3(client)
    return client


def _bound_what_is_unsent(client: S3Client) -> None:
    # botocore has no setting for it. Where its insides are different, a slow link is told from a dead one less well.
    session = getattr(getattr(client, "_endpoint", None), "http_session", None)
    options = getattr(session, "_socket_options", None)
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if isinstance(options, list) and option is not None:
        options.append((socket.IPPROTO_TCP, option, _UNSENT_BYTES))


class _Pieces:
    """A request body, sent piece by piece.

    Python's time-out of a send counts for the whole of what is sent: a part in one piece would fail on a slow link.
    """

    def __init__(self, body: bytearray) -> None:
        self._body = body

    def __iter__(self) -> Iterator[memoryview]:
        view, took = memoryview(self._body), sending(self._body)
        for start in range(0, len(view), _SEND_BYTES):
            yield view[start : start + _SEND_BYTES]
            took(min(start + _SEND_BYTES, len(view)))  # asked for the next piece: this one has been taken

    def seek(self, _position: int) -> None:
        """Called by botocore before it sends again; every iteration starts at the beginning anyway."""


def _send_in_pieces(request: Any, **_: Any) -> None:
    if isinstance(request.body, bytearray):
        request.body = _Pieces(request.body)


def _in_thread(call: Callable[[], _T]) -> Future[_T]:
    """Run a call in a daemon thread of its own: a bucket that never lets go must not keep the process from ending."""
    future: Future[_T] = Future()
    context = contextvars.copy_context()  # the call's span belongs to the caller's

    def run() -> None:
        try:
            future.set_result(context.run(call))
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the future
            future.set_exception(error)

    threading.Thread(target=run, name="flip-results-upload", daemon=True).start()
    return future


def _persist(call: Callable[[], _T], patience: Patience, given_up: threading.Event, pace: Pace) -> _T:
    """Call until it works, the failure is a lasting one, or patience is over."""
    begun = time.monotonic()
    for failures in range(1, patience.attempts + 1):
        try:
            answer = call()
        except (BotoCoreError, ClientError, OSError) as error:  # noqa: PERF203 - to try again is the point
            lasting = failures == patience.attempts or not _is_transient(error)
            if not lasting:
                pace.failure = error
            if lasting or time.monotonic() - begun > patience.total or given_up.wait(patience.pause(failures)):
                raise
            _log.info("Results upload: attempt %d failed (%s), trying again", failures, describe(error))
        else:
            pace.moved()
            pace.failure = None
            return answer
    raise AssertionError("unreachable")  # pragma: no cover - the last failure is always raised


def bounded(
    call: Callable[[], _T], patience: Patience, given_up: threading.Event | None = None, pace: Pace | None = None
) -> _T:
    """Call in a thread of its own, and wait for it as long as patience says and the upload moves."""
    pace = pace or Pace()
    future = _in_thread(partial(_persist, call, patience, given_up or threading.Event(), pace))
    done, _ = pace.wait([future], patience.stuck)
    if not done:
        raise TimeoutError
    return future.result()


# --- sizes of parts ---------------------------------------------------------------------------------------------------


def planned_part_size(expected: int) -> int:
    """Bytes per part for an upload that is expected to be this long: whole MiB, 8 at least."""
    parts = -(-expected // PLANNED_PARTS)
    return min(max(PART_BYTES, -(-parts // MIB) * MIB), _MAX_PART_BYTES)


def part_size(number: int, planned: int) -> int:
    """Bytes of part `number` (from 1): as planned, then doubling, so that a stream longer than expected still fits."""
    return min(planned << max(0, (number - 1 - PLANNED_PARTS) // _DOUBLE_EVERY + 1), _MAX_PART_BYTES)


# --- the upload -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sent:
    number: int
    etag: str
    crc: int
    size: int
    buffer: Part


def _object_size(client: S3Client, size: int) -> int:
    """A size as CompleteMultipartUpload wants it: botocore changed its mind between integer and string."""
    shape = client.meta.service_model.operation_model("CompleteMultipartUpload").input_shape
    wanted = shape.members["MpuObjectSize"].type_name if shape is not None else "long"
    return cast("int", str(size)) if wanted == "string" else size


class MultipartUpload:
    """A writable stream that ends as one object. Use it from one thread.

    Args:
        client: an S3 client.
        bucket, key: the object.
        expected: bytes that will be written, as far as known.
        on_upload_id: called with "" before there is an upload, with its id once it exists, and with "" once there is
            nothing to abort.
        pace: whether it moves; without one it is waited for as long as each call may take.
        on_sent: called with the bytes that the bucket has accepted so far.

    What S3 or the network raises leaves the method that finds it as it is, and every later write.
    """

    def __init__(
        self,
        client: S3Client,
        bucket: str,
        key: str,
        *,
        expected: int,
        on_upload_id: Callable[[str], None],
        on_sent: Callable[[int], None],
        pace: Pace | None = None,
    ) -> None:
        self._client, self._bucket, self._key = client, bucket, key
        self._on_upload_id, self._on_sent = on_upload_id, on_sent
        self._patience, self._pace = PATIENCE, pace or Pace()
        self._planned = planned_part_size(expected)
        self._given_up = threading.Event()
        self._failure: Exception | None = None
        self._in_flight: set[Future[_Sent]] = set()
        self._spare: list[Part] = []
        self._parts: dict[int, tuple[str, int, int]] = {}
        self._next = 1
        self._sent = 0
        self._upload_id = ""
        on_upload_id("")  # who is killed before the bucket's answer is written down leaves the key to look for
        created = bounded(
            lambda: client.create_multipart_upload(
                Bucket=bucket,
                Key=key,
                ContentType="application/zip",
                ChecksumAlgorithm="CRC32",
                ChecksumType="FULL_OBJECT",
            ),
            self._patience,
            self._given_up,
            self._pace,
        )
        self._buffer, self._filled = Part(), 0
        self._crc = self._crc_before = 0
        self._upload_id = created["UploadId"]
        on_upload_id(self._upload_id)
        self._begin_part()

    @property
    def crc(self) -> int:
        """CRC-32 of all that was written."""
        return self._crc

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take bytes; waits while as many parts as memory allows are on their way."""
        if self._failure is not None:
            raise self._failure
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            taken = min(len(view) - start, len(self._buffer) - self._filled)
            piece = view[start : start + taken]
            self._crc = zlib.crc32(piece, self._crc)
            self._buffer[self._filled : self._filled + taken] = piece
            self._filled += taken
            start += taken
            if self._filled == len(self._buffer):
                self._send_part()
                self._begin_part()
        return len(view)

    def flush(self) -> None:
        """Nothing to do: a part is sent when it is full."""

    def finish(self) -> tuple[int, int, bool, tuple[str, ...]]:
        """Send what is left and make the object.

        Returns:
            Size in bytes, CRC-32, whether the bucket confirmed both, and warnings.

        Raises:
            ChecksumMismatchError: the bucket holds something else.
        """
        if self._filled:
            del self._buffer[self._filled :]
            self._send_part()
        self._filled = 0
        while self._in_flight:
            self._collect()
        size, crc = sum(length for _, _, length in self._parts.values()), self._crc
        maybe_done = self._complete(size, crc)
        verified, warnings = self._verify(size, crc)
        if maybe_done is not None and not verified:
            raise maybe_done
        self._on_upload_id("")
        return size, crc, verified, warnings

    def abandon(self) -> None:
        """Give up: stop the threads and have the bucket forget the parts. Raises nothing."""
        self._given_up.set()
        if not self._upload_id:
            return
        # A part that arrives after the abort would stay, and be paid for. Nothing is waited for where nothing moves.
        _, running = wait(self._in_flight, timeout=0.0 if self._pace.stalled else min(5.0, self._patience.silence))
        try:
            abort(self._client, self._bucket, self._key, self._upload_id, self._tidying())
        except Exception as error:  # noqa: BLE001 - why the upload failed must not be hidden by this
            _log.warning("Results upload: the unfinished upload could not be aborted (%s)", describe(error))
            return
        if not running:
            self._on_upload_id("")

    def _tidying(self) -> Patience:
        """END_RUN waits for this, too; what is not removed in time is removed with the next attempt."""
        if self._pace.stalled:
            return replace(tidying(), attempts=1, stuck=2.0)
        return tidying() if self._pace.limit is None else replace(tidying(), stuck=5.0)

    def _begin_part(self) -> None:
        size = part_size(self._next, self._planned)
        while len(self._in_flight) >= max(1, min(_MAX_IN_FLIGHT, _MEMORY_BYTES // size)):
            self._collect()
        self._collect(block=False)
        spare = self._spare.pop() if self._spare else Part()
        # Buffers are used again: fresh memory costs a page fault for every 4 KiB.
        self._buffer = spare if len(spare) == size else Part(size)
        self._buffer.pace, self._buffer.taken = self._pace, 0
        self._filled = 0

    def _send_part(self) -> None:
        crc = _crc32.combine(self._crc_before, self._crc, len(self._buffer))
        self._crc_before = self._crc
        if all(future.done() for future in self._in_flight):
            self._pace.moved()  # it was us who had nothing to send
        call = partial(self._upload_part, self._next, self._buffer, crc)
        self._in_flight.add(_in_thread(call))
        self._next += 1

    def _upload_part(self, number: int, buffer: Part, crc: int) -> _Sent:
        answer = _persist(
            lambda: self._client.upload_part(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._upload_id,
                PartNumber=number,
                Body=cast("bytes", buffer),  # botocore takes a bytearray, its stubs do not
                ChecksumCRC32=_crc32.text(crc),
            ),
            self._patience,
            self._given_up,
            self._pace,
        )
        return _Sent(number, answer["ETag"], crc, len(buffer), buffer)

    def _collect(self, *, block: bool = True) -> None:
        """Take in the parts that are done, waiting for one when asked to."""
        try:
            done, self._in_flight = self._pace.wait(self._in_flight, self._patience.stuck if block else 0.0)
            if block and not done:
                raise TimeoutError
            for future in done:
                part = future.result()
                self._parts[part.number] = (part.etag, part.crc, part.size)
                self._spare.append(part.buffer)
                self._sent += part.size
        except Exception as error:
            self._failure = error
            raise
        if done:
            self._on_sent(self._sent)

    def _complete(self, size: int, crc: int) -> ClientError | None:
        """Make the object.

        Returns:
            An error which may mean that an earlier attempt, whose answer was lost, had made it already.
        """
        parts: list[CompletedPartTypeDef] = [
            {"PartNumber": number, "ETag": etag, "ChecksumCRC32": _crc32.text(part_crc)}
            for number, (etag, part_crc, _) in sorted(self._parts.items())
        ]
        attempts = 0

        def call() -> None:
            nonlocal attempts
            attempts += 1
            self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._key,
                UploadId=self._upload_id,
                MultipartUpload={"Parts": parts},
                ChecksumCRC32=_crc32.text(crc),
                ChecksumType="FULL_OBJECT",
                MpuObjectSize=_object_size(self._client, size),
            )

        self._pace.allow(size / _GIB)
        try:
            bounded(call, self._patience, self._given_up, self._pace)
        except ClientError as error:
            if _code(error) == "NoSuchUpload" and attempts > 1:
                return error
            raise
        return None

    def _verify(self, size: int, crc: int) -> tuple[bool, tuple[str, ...]]:
        try:
            head = bounded(
                lambda: self._client.head_object(Bucket=self._bucket, Key=self._key, ChecksumMode="ENABLED"),
                self._patience,
                pace=self._pace,
            )
        except (BotoCoreError, ClientError, OSError) as error:
            if isinstance(error, ClientError) and _status(error) == 404:
                raise
            return False, (f"the bucket accepted the archive and did not let it be verified ({describe(error)})",)
        parts = b"".join(part_crc.to_bytes(4, "big") for _, (_, part_crc, _) in sorted(self._parts.items()))
        # Older S3 look-alikes ignore FULL_OBJECT and answer with the checksum of the parts' checksums.
        accepted = {_crc32.text(crc), f"{_crc32.text(zlib.crc32(parts))}-{len(self._parts)}"}
        stored = head.get("ChecksumCRC32", "")
        if head["ContentLength"] != size or (stored and stored not in accepted):
            raise ChecksumMismatchError
        if not stored:
            return False, ("the bucket keeps no CRC32 checksum: only the archive's size was verified",)
        return True, ()


def tidying() -> Patience:
    """How long the removal of an unfinished upload may take."""
    return replace(PATIENCE, attempts=3, total=min(30.0, PATIENCE.total), stuck=min(20.0, PATIENCE.stuck))


def unfinished(client: S3Client, bucket: str, key: str) -> list[str]:
    """Ids of the unfinished uploads of one key that a bucket knows.

    Raises:
        ClientError, BotoCoreError, OSError: what the last of three attempts failed with.
    """
    answer = bounded(lambda: client.list_multipart_uploads(Bucket=bucket, Prefix=key), tidying())
    return [upload["UploadId"] for upload in answer.get("Uploads", []) if upload["Key"] == key]


def abort(client: S3Client, bucket: str, key: str, upload_id: str, patience: Patience | None = None) -> None:
    """Have a bucket forget an unfinished upload. One that it does not know is none.

    Raises:
        ClientError, BotoCoreError, OSError: what the last attempt failed with, of three without a ``patience``.
    """
    try:
        bounded(
            lambda: client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id), patience or tidying()
        )
    except ClientError as error:
        if _code(error) != "NoSuchUpload":
            raise

"""A run's results: from its directory into a zip into a bucket, verified, without a temporary file.

Nothing in the run directory is moved or deleted. What fails is a :class:`ResultsUploadError`, whose `reason` is one of
:data:`REASONS`; the results are then where they were and can be sent again.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote

from flip_observability import _archive, _crc32
from flip_observability._kit import Kit
from flip_observability._pace import Pace
from flip_observability.errors import logger
from flip_observability.utils import make_private_folder

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_log = logger(__name__)

REASONS: tuple[str, ...] = (
    "access_denied",
    "no_such_bucket",
    "timeout",
    "connection",
    "checksum",
    "source",
    "other",
)
"""Why an upload failed; the values of the label `reason` of `flip_results_upload_failures_total`."""

_FILE_REASONS = {
    errno.EACCES: "access_denied",
    errno.EPERM: "access_denied",
    errno.EROFS: "access_denied",
    errno.ETIMEDOUT: "timeout",
}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_IP_ADDRESS = re.compile(r"\d+\.\d+\.\d+\.\d+")
_PATH_STEP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SUFFIX = re.compile(r"[A-Za-z0-9._-]{0,64}")
_UNFINISHED = re.compile(r"\.[A-Za-z0-9._-]+\.zip\.[0-9a-f]{16}\.part")
_READ_BYTES = 1024 * 1024


class ResultsUploadError(Exception):
    """Results did not get to where they should be. They are still in the run directory.

    Args:
        reason: one of :data:`REASONS`.
        detail: what happened: types of exceptions and S3 error codes, never their messages.
        passing: whether it may work in a while, with nothing changed here.
    """

    def __init__(self, reason: str, detail: str = "", passing: bool = False) -> None:
        super().__init__(reason, detail, passing)
        self.passing = passing
        self.reason = reason if reason in REASONS else "other"
        self.detail = detail

    def __str__(self) -> str:
        return f"Unexpected failure uploading results to S3: {self.reason}" + (
            f" ({self.detail})" if self.detail else ""
        )


@dataclass(frozen=True)
class Destination:
    """Where results go. Made by :meth:`parse`.

    Args:
        scheme: `s3` or `file`.
        bucket: of S3, else empty.
        prefix: in front of every key, without slashes around it; may be empty.
        directory: absolute, for `file`, else None.
    """

    scheme: str
    bucket: str = ""
    prefix: str = ""
    directory: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Destination:
        """Read `s3://bucket[/prefix]` or `file:///dir`.

        Raises:
            ValueError: saying what is wrong. The text itself is not repeated, somebody may have put a key into it.
        """
        scheme, separator, rest = text.partition("://")
        if not separator or scheme.lower() not in {"s3", "file"}:
            raise ValueError("must be s3://bucket[/prefix] or file:///directory")
        if not text.isprintable() or any(char.isspace() for char in text):
            raise ValueError("must not contain spaces or control characters")
        if "?" in rest or "#" in rest:
            raise ValueError("must not have a query or a fragment")
        return cls._parse_s3(rest) if scheme.lower() == "s3" else cls._parse_file(rest)

    @classmethod
    def _parse_s3(cls, rest: str) -> Destination:
        bucket, _, prefix = rest.partition("/")
        if not bucket:
            raise ValueError("names no bucket (expected s3://bucket[/prefix])")
        if not _BUCKET.fullmatch(bucket) or ".." in bucket or _IP_ADDRESS.fullmatch(bucket):
            raise ValueError(
                "has a bucket name that S3 does not allow (3 to 63 lower-case letters, digits, hyphens and dots)"
            )
        prefix = prefix.strip("/")
        if prefix and any(step in {"", ".", ".."} for step in prefix.split("/")):
            raise ValueError("has an empty, '.' or '..' step in its prefix")
        if len(prefix.encode()) > 700:
            raise ValueError("has a prefix of more than 700 bytes")
        return cls("s3", bucket=bucket, prefix=prefix)

    @classmethod
    def _parse_file(cls, rest: str) -> Destination:
        path = unquote(rest)
        if not path.startswith("/"):
            raise ValueError("needs an absolute path (expected file:///directory)")
        if ".." in path.split("/") or "\0" in path:
            raise ValueError("must not contain '..' in its path")
        directory = Path(path)
        if directory == Path(directory.anchor):
            raise ValueError("names no directory (expected file:///directory)")
        return cls("file", directory=directory)

    def uri(self, key: str) -> str:
        """The address of an object of this destination, from its key."""
        return f"s3://{self.bucket}/{key}" if self.directory is None else (self.directory / key).as_uri()


@dataclass(frozen=True)
class Receipt:
    """What was uploaded.

    Args:
        uri: where it is.
        size: bytes of the archive.
        files: files in it, without folders.
        crc32: of the archive, as S3 gives it: base64.
        verified: whether the destination confirmed size and checksum. If not, keep the source.
        seconds: that it took.
        warnings: what is not in the archive as it was in the run directory, and what could not be verified. They name
            files: for the user, not for telemetry.
    """

    uri: str
    size: int
    files: int
    crc32: str
    verified: bool
    seconds: float
    warnings: tuple[str, ...] = ()


class Content(Protocol):
    """Files that can be packed now."""

    def total_size(self) -> int:
        """Bytes of all of them."""

    def pack(self, sink: _archive.Sink, notes: _archive.Notes) -> int:
        """Write an archive of them and return how many there are in it; ``notes`` is told what is not."""


class Source(Protocol):
    """Where results come from, when it is not simply a run directory."""

    def open(self) -> AbstractContextManager[Content]: ...


def upload_results(
    source: Path | Source,
    destination: Destination,
    model_id: str,
    *,
    suffix: str = "",
    timestamp: datetime | None = None,
    s3_client: S3Client | None = None,
    max_bytes: int = _archive.MAX_BYTES,
    stalled_after: Callable[[], float] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_multipart: Callable[[str, str], None] | None = None,
) -> Receipt:
    """Pack a run's results and put the archive at `[prefix/]<model_id>/<YYYYmmdd_HHMMSS><suffix>.zip`.

    It takes as long as the transfer, and ends by itself when the bucket does not answer. Call it where one may wait.

    Args:
        source: the run's directory, which may be written to meanwhile, or another source of what was in it.
        destination: bucket or folder.
        model_id: the model's UUID.
        suffix: behind the time in the name, like `-salvaged`.
        timestamp: in the name; now, in UTC, when not given.
        s3_client: instead of one from boto3's own chain of credentials.
        max_bytes: of all files of a run directory together; those that do not fit are left out.
        stalled_after: tells the seconds after which it is given up when the bucket takes no byte. It is asked all the
            time and may change its mind. A bucket that takes some is waited for.
        on_progress: called now and then with the bytes of the archive that have arrived and the bytes of all source
            files. The first can end above the second (the zip's own bytes) or below it (text is deflated).
        on_multipart: called with key and upload id as soon as there is something to abort, and with an empty upload id
            before that and when there is nothing any more. Keep the last call's arguments for :func:`abort_upload`.

    What the two callbacks raise is logged and otherwise ignored.

    Raises:
        ResultsUploadError: whatever went wrong; its cause is chained.
    """
    begun = time.monotonic()
    notes = _archive.Notes()
    try:
        key = _key(destination, model_id, suffix, timestamp)
        with _opened(source, destination, max_bytes) as content:
            total = content.total_size()
            report = _Quiet("on_progress", on_progress)
            tell = _Quiet("on_multipart", on_multipart)
            report(0, total)
            sink = _open_sink(
                destination,
                key,
                total,
                s3_client,
                Pace(stalled_after),
                on_upload_id=lambda upload_id: tell(key, upload_id),
                on_sent=lambda sent: report(sent, total),
            )
            files, stored = _fill(content, sink, notes)
    except ResultsUploadError:
        raise
    except Exception as error:
        raise _failure(error, destination) from error
    if notes.kinds:
        _log.warning("Results upload: not everything is in the archive as it was: %s", notes.summary())
    size, crc, verified, warnings = stored
    return Receipt(
        uri=destination.uri(key),
        size=size,
        files=files,
        crc32=_crc32.text(crc),
        verified=verified,
        seconds=time.monotonic() - begun,
        warnings=(*warnings, *notes.texts()),
    )


def abort_upload(destination: Destination, key: str, upload_id: str, s3_client: S3Client | None = None) -> None:
    """Remove what a killed upload left behind. It is no error when nothing is left.

    Args:
        destination, key, upload_id: of the upload, as `on_multipart` was given them. Without an id the bucket is asked
            what it has of this key, which needs the permission to list uploads.
        s3_client: instead of one from boto3's own chain of credentials.

    Raises:
        ResultsUploadError: when it could not be removed.
    """
    try:
        if destination.directory is not None:
            if upload_id:
                _remove_unfinished(destination.directory, key, upload_id)
            return
        from flip_observability import _multipart

        client = s3_client or _multipart.make_client()
        for found in [upload_id] if upload_id else _multipart.unfinished(client, destination.bucket, key):
            _multipart.abort(client, destination.bucket, key, found)
    except ResultsUploadError:
        raise
    except Exception as error:
        raise _failure(error, destination) from error


# --- one upload -------------------------------------------------------------------------------------------------------

_Stored = tuple[int, int, bool, tuple[str, ...]]
"""Size, CRC-32, verified, warnings."""


class _Sink(_archive.Sink, Protocol):
    def finish(self) -> _Stored: ...

    def abandon(self) -> None: ...


class _Quiet:
    """A callback that cannot fail: an upload does not end because somebody watched it."""

    def __init__(self, name: str, callback: Callable[..., None] | None) -> None:
        self._name, self._callback = name, callback

    def __call__(self, *arguments: object) -> None:
        if self._callback is None:
            return
        try:
            self._callback(*arguments)
        except Exception as error:  # noqa: BLE001 - logged, by type: its text is not ours to log
            _log.warning("Results upload: %s failed (%s)", self._name, type(error).__name__)


def _key(destination: Destination, model_id: str, suffix: str, timestamp: datetime | None) -> str:
    if not _PATH_STEP.fullmatch(model_id):
        raise ResultsUploadError("other", "the model id cannot be part of a key")
    if not _SUFFIX.fullmatch(suffix):
        raise ResultsUploadError("other", "the suffix cannot be part of a key")
    name = (timestamp or datetime.now(timezone.utc)).strftime("%Y%m%d_%H%M%S")
    prefix = f"{destination.prefix}/" if destination.prefix else ""
    return f"{prefix}{model_id}/{name}{suffix}.zip"


def _refuse_inside(run_dir: Path, destination: Destination) -> None:
    if destination.directory is None:
        return
    target, source = os.path.realpath(destination.directory), os.path.realpath(run_dir)
    if os.path.commonpath([target, source]) == source:
        raise ResultsUploadError("other", "the destination lies inside the run directory")


def _open_sink(
    destination: Destination,
    key: str,
    total: int,
    s3_client: S3Client | None,
    pace: Pace,
    *,
    on_upload_id: Callable[[str], None],
    on_sent: Callable[[int], None],
) -> _Sink:
    if destination.directory is not None:
        return _FileSink(destination.directory / key, on_upload_id, on_sent)
    from flip_observability import _multipart

    # Where credentials come from may hang like the bucket.
    client = s3_client or _multipart.bounded(_multipart.make_client, _multipart.PATIENCE, pace=pace)
    return _multipart.MultipartUpload(
        client, destination.bucket, key, expected=total, on_upload_id=on_upload_id, on_sent=on_sent, pace=pace
    )


@dataclass(frozen=True)
class DirectoryContent:
    """What an open run directory holds.

    Args:
        root: its descriptor.
        unwanted: whether a file, from its descriptor and status, is to be left out.
        max_bytes: of all files together.
    """

    root: int
    unwanted: Callable[[int, os.stat_result], bool] | None = None
    max_bytes: int = _archive.MAX_BYTES

    def total_size(self) -> int:
        return _archive.total_size(self.root, self.max_bytes)

    def pack(self, sink: _archive.Sink, notes: _archive.Notes) -> int:
        return _archive.pack(self.root, sink, notes, self.unwanted, self.max_bytes)


@contextmanager
def _opened(source: Path | Source, destination: Destination, max_bytes: int) -> Iterator[Content]:
    if not isinstance(source, Path):
        with source.open() as content:
            yield content
        return
    with _archive.open_directory(source) as root:
        _refuse_inside(source, destination)
        # NVFLARE makes run directories in the workspace. A link to the kit may be a slip, a copy is none.
        yield DirectoryContent(root, Kit(source.parent).is_linked, max_bytes)


def _fill(content: Content, sink: _Sink, notes: _archive.Notes) -> tuple[int, _Stored]:
    try:
        files = content.pack(sink, notes)
        return files, sink.finish()
    except BaseException:
        sink.abandon()
        raise


def _failure(error: Exception, destination: Destination) -> ResultsUploadError:
    if isinstance(error, _archive.SourceError):
        return ResultsUploadError("source", f"the run directory cannot be opened: {error}")
    if destination.directory is not None:
        reason = _FILE_REASONS.get(error.errno or 0, "other") if isinstance(error, OSError) else "other"
        return ResultsUploadError("checksum" if isinstance(error, _NotAsWrittenError) else reason, type(error).__name__)
    from flip_observability import _multipart

    detail = f"{_multipart.describe(error)}, bucket {destination.bucket}"
    return ResultsUploadError(_multipart.reason_of(error), detail, _multipart.is_passing(error))


# --- a folder as the destination --------------------------------------------------------------------------------------


class _NotAsWrittenError(Exception):
    """A file holds something else than what was written into it."""


class _FileSink:
    """A file that appears under its name only when it is whole and on the disk."""

    def __init__(self, path: Path, on_upload_id: Callable[[str], None], on_sent: Callable[[int], None]) -> None:
        self._path, self._on_upload_id, self._on_sent = path, on_upload_id, on_sent
        make_private_folder(path.parent)
        self._unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        on_upload_id(self._unfinished.name)  # first: who is killed now leaves a name, and not a file without one
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = open(os.open(self._unfinished, flags, 0o600), "w+b", buffering=_READ_BYTES)  # noqa: SIM115
        self._size = self._crc = self._reported = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        if self._size - self._reported >= 8 * _READ_BYTES:
            self._reported = self._size
            self._on_sent(self._size)
        return len(data)

    @property
    def crc(self) -> int:
        return self._crc

    def flush(self) -> None:
        """Nothing to do before the end."""

    def finish(self) -> _Stored:
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._read_back() != (self._size, self._crc):
            raise _NotAsWrittenError
        os.replace(self._unfinished, self._path)
        self._file.close()
        _sync_folder(self._path.parent)
        self._on_sent(self._size)
        self._on_upload_id("")
        return self._size, self._crc, True, ()

    def abandon(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # a full disk: what was still to be written is not wanted any more
        try:
            self._unfinished.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("Results upload: the unfinished file could not be removed (%s)", type(error).__name__)
            return
        self._on_upload_id("")

    def _read_back(self) -> tuple[int, int]:
        size = crc = 0
        self._file.seek(0)
        while chunk := self._file.read(_READ_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        return size, crc


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_unfinished(directory: Path, key: str, upload_id: str) -> None:
    if not _UNFINISHED.fullmatch(upload_id) or not all(_PATH_STEP.fullmatch(step) for step in key.split("/")):
        raise ResultsUploadError("other", "this is no unfinished upload of a folder")
    (directory / key).with_name(upload_id).unlink(missing_ok=True)

"""An embedded S3 server: moto on a port of this machine, with a bucket in it, that can be told to refuse writing.

What is asked of it is recorded, so that the demo can show an upload and judge its end by what the bucket itself saw.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_WRITING = frozenset({"PUT", "POST", "DELETE"})
_REFUSAL = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message><RequestId>demo</RequestId></Error>"
)


@dataclass(frozen=True)
class BucketRecord:
    """One request to the bucket.

    Attributes:
        time: seconds since the epoch when it was answered.
        method: HTTP method.
        key: object key; empty for requests about the bucket itself.
        action: ``create_upload``, ``part``, ``complete_upload``, or empty for anything else.
        size: bytes of the request's body as announced; 0 when unknown.
        code: HTTP status answered.
    """

    time: float
    method: str
    key: str
    action: str
    size: int
    code: int


@dataclass(frozen=True)
class BucketObject:
    """An object that the bucket holds; ``size`` in bytes."""

    key: str
    size: int


class _Gate:
    """WSGI middleware: who may pass, what was asked, what was answered."""

    def __init__(self, app: Any, bucket: EmbeddedBucket) -> None:
        self._app, self._bucket = app, bucket

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        known = self._bucket.access_key in environ.get("HTTP_AUTHORIZATION", "")
        writing = environ["REQUEST_METHOD"] in _WRITING
        if not known or (self._bucket.refusing and writing):
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(min(length, 64 << 20))  # an unread body would cost the client its connection
            self._bucket._record(environ, 403)
            start_response(
                "403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(_REFUSAL)))]
            )
            return [_REFUSAL]

        def answered(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            self._bucket._record(environ, int(status.split(maxsplit=1)[0]))
            return start_response(status, headers, exc_info)

        result: Iterable[bytes] = self._app(environ, answered)
        return result


class EmbeddedBucket:
    """An S3 bucket on a free port of this machine. Use it as a context manager.

    moto keeps its buckets per process: two of these at a time in one process share their contents.

    Args:
        name: of the bucket.
        prefix: below which results are to be put.
        refusing: answer every write with 403 AccessDenied; can be switched at run time.

    Raises:
        ImportError: on entering, when moto is not installed (the ``demo`` extra).
    """

    REGION = "us-east-1"

    def __init__(self, name: str = "flip-results", prefix: str = "demo", *, refusing: bool = False) -> None:
        self.name, self.prefix, self.refusing = name, prefix, refusing
        self.access_key = "DEMO" + secrets.token_hex(8).upper()
        self._secret_key = secrets.token_urlsafe(30)
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._records: list[BucketRecord] = []

    def __enter__(self) -> EmbeddedBucket:
        from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        class Quiet(MotoRequestHandler):
            def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
                """Requests are in the records."""

        app = _Gate(DomainDispatcherApplication(create_backend_app), self)
        self._server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="embedded-bucket", daemon=True
        )
        self._thread.start()
        refusing, self.refusing = self.refusing, False
        self._empty()
        self.client().create_bucket(Bucket=self.name)
        self.refusing = refusing
        with self._lock:
            self._records.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refusing = False
        try:
            self._empty()
        finally:
            self._server.shutdown()
            self._server.server_close()
            if self._thread:
                self._thread.join()

    def _empty(self) -> None:
        client = self.client()
        if self.name not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            return
        for item in self.objects():
            client.delete_object(Bucket=self.name, Key=item.key)
        client.delete_bucket(Bucket=self.name)

    def _record(self, environ: dict[str, Any], code: int) -> None:
        bucket, _, key = environ.get("PATH_INFO", "").lstrip("/").partition("/")
        query = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
        record = BucketRecord(
            time.time(),
            environ["REQUEST_METHOD"],
            key if bucket == self.name else "",
            _action(environ["REQUEST_METHOD"], query),
            int(environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH") or environ.get("CONTENT_LENGTH") or 0),
            code,
        )
        with self._lock:
            self._records.append(record)

    @property
    def endpoint_url(self) -> str:
        """What ``AWS_ENDPOINT_URL_S3`` is set to."""
        host, port = self._server.server_address[:2]
        return f"http://{host}:{port}"

    @property
    def destination(self) -> str:
        """What ``UPLOADED_FEDERATED_DATA_BUCKET`` is set to."""
        return f"s3://{self.name}/{self.prefix}" if self.prefix else f"s3://{self.name}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which a process finds this bucket: endpoint, region and dummy credentials."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self._secret_key,
            "AWS_DEFAULT_REGION": self.REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            # Nothing of the user's own configuration (profiles, other endpoints) may lead the demo elsewhere.
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    @property
    def records(self) -> list[BucketRecord]:
        """Every request so far, in the order of the answers (a copy)."""
        with self._lock:
            return list(self._records)

    def client(self) -> S3Client:
        """A boto3 client of this bucket, independent of the environment."""
        import boto3

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self._secret_key,
            region_name=self.REGION,
        )

    def objects(self) -> list[BucketObject]:
        """What the bucket holds, by key."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [BucketObject(item["Key"], item["Size"]) for page in pages for item in page.get("Contents", [])]

    def unfinished_uploads(self) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted."""
        return [item["Key"] for item in self.client().list_multipart_uploads(Bucket=self.name).get("Uploads", [])]

    def checksum(self, key: str) -> str:
        """The checksum that the bucket holds for an object, as ``ALGORITHM value``; empty when it holds none."""
        head = self.client().head_object(Bucket=self.name, Key=key, ChecksumMode="ENABLED")
        found = {name: value for name, value in head.items() if name.startswith("Checksum") and name != "ChecksumType"}
        return next((f"{name.removeprefix('Checksum')} {value}" for name, value in found.items()), "")

    def download(self, key: str, target: Path) -> Path:
        """Copy an object into a file and return its path."""
        self.client().download_file(self.name, key, str(target))
        return target


def _action(method: str, query: dict[str, list[str]]) -> str:
    if method == "POST" and "uploads" in query:
        return "create_upload"
    if method == "PUT" and "partNumber" in query:
        return "part"
    if method == "POST" and "uploadId" in query:
        return "complete_upload"
    return ""

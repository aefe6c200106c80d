"""What reads hostile input, each as a function of bytes that raises when a promise is broken.

``tests/test_fuzz.py`` runs all of them for a moment with every change, ``python -m fuzz`` as long as it is told, led by
what code an input reaches. A new reader of hostile input is a new entry of :data:`TARGETS`.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from flip_observability import _archive, exporter, hub, salvage, settings, spool, utils
from flip_observability._kit import Kit
from flip_observability._wire import Deadline, Wire
from flip_observability.editing import EditError
from flip_observability.ledger import Entry, Ledger, OutboxItem
from flip_observability.nvflare import config_text, model_id
from flip_observability.process import ProcessIdentity

RUN = "0b3f4c1e-1111-4222-8333-444455556666"
NOW = 1_700_000_000.0
ARCHIVE_OVERHEAD = 4_096
"""Bytes of headers that a member costs, at most, beside its name."""


class Target(NamedTuple):
    """A reader of input: a function that raises when it keeps no promise, and inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


@cache
def _folder() -> Path:
    """A place for files, one for each process, in memory where that is possible."""
    shared = Path("/dev/shm")
    holder = tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None)
    _kept.append(holder)
    return Path(holder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


# -- files -------------------------------------------------------------------------------------------------------------


@cache
def _ledger() -> Ledger:
    return Ledger(_folder() / "ledger")


def read_spool(content: bytes) -> None:
    """Whatever a spool file holds, it is gone from its name afterwards, and nothing is raised."""
    folder = _folder() / "spools"
    folder.mkdir(exist_ok=True)
    file = folder / "spool-1-00000000.jsonl"
    file.write_bytes(content)
    spool.take_spools(_ledger(), folder, NOW)
    for left in folder.iterdir():
        left.unlink()


def read_model_id(content: bytes) -> None:
    """A job's files give the canonical spelling of a UUID, or nothing; nothing is raised."""
    run = _folder() / "run"
    for name in (model_id.APP_CONFIG, model_id.JOB_META):
        file = run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    found = model_id.model_id_of_run(run)
    assert found is None or found == utils.canonical_uuid(found)


def read_config(content: bytes) -> None:
    """A job's configuration is understood or refused with an error of its own."""
    file = _folder() / "config.json"
    file.write_bytes(content)
    try:
        config = config_text.load(file)
    except EditError as error:
        assert len(str(error)) < 300
    else:
        assert config.content == content


class _Sink(io.BytesIO):
    """Takes an archive, and no more of it than it is told."""

    crc = 0

    def __init__(self, most: int) -> None:
        super().__init__()
        self._left = most

    def seekable(self) -> bool:
        return False

    def write(self, data: bytes | bytearray | memoryview, /) -> int:  # type: ignore[override]
        self._left -= len(data)
        assert self._left >= 0, "more is read than was announced"
        self.crc = zlib.crc32(data, self.crc)
        return super().write(data)


def read_archive(content: bytes) -> None:
    """A stored archive is refused, or gives a whole one, no larger than announced, with names that stay inside."""
    file = _folder() / "stored.zip"
    file.write_bytes(content)
    try:
        with salvage.StoredArchive(file, Kit(_folder() / "no-kit")).open() as source:
            size, notes = source.total_size(), _archive.Notes()
            sink = _Sink(size + ARCHIVE_OVERHEAD + len(content) * 4)
            packed = source.pack(sink, notes)
    except _archive.SourceError:
        return
    with zipfile.ZipFile(sink) as archive:
        assert archive.testzip() is None
        assert sum(not name.endswith("/") for name in archive.namelist()) == packed
        for name in archive.namelist():
            assert not name.startswith("/")
            assert not {"", ".", ".."} & set(name.removesuffix("/").split("/"))


def _archive_of(members: dict[str, bytes], method: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


# -- what comes over the network ---------------------------------------------------------------------------------------


class _Answering:
    """Somebody who answers whatever he is asked with the same bytes, and hangs up."""

    def __init__(self) -> None:
        self.answer = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                try:
                    connection.recv(65_536)
                    connection.sendall(self.answer)
                    connection.shutdown(socket.SHUT_WR)
                except OSError:
                    continue


@cache
def _hub() -> _Answering:
    return _Answering()


def read_answer(content: bytes) -> None:
    """A hub's answer gives a status and perhaps a pause, or an error of the network; it takes no longer than it may."""
    answering = _hub()
    answering.answer = content
    wire = Wire(answering.url, {}, 1)
    try:
        with Deadline(5.0):
            status, pause = wire.call("POST", "/x", b"{}", (2.0, 2.0))
    except OSError:
        return
    finally:
        wire.close()
    assert isinstance(status, int)
    read_retry_after((pause or "").encode("latin-1", "replace"))


def read_retry_after(content: bytes) -> None:
    """A pause is between nothing and an hour, or there is none."""
    seconds = hub._retry_after(content.decode("latin-1"))
    assert seconds is None or 0.0 <= seconds <= hub.MAX_RETRY_AFTER


def read_request(content: bytes) -> None:
    """What is sent to `/metrics` is a request or is refused with an error of its own."""

    async def read() -> exporter.Request:
        reader = asyncio.StreamReader(limit=exporter.MAX_HEAD_BYTES)
        reader.feed_data(content)
        reader.feed_eof()
        return await exporter._read_request(reader)

    loop = _loop()
    try:
        request = loop.run_until_complete(read())
    except EOFError:
        return
    except exporter._BadRequestError as error:
        assert 400 <= error.response.code < 600
        return
    assert request.path.startswith("/")
    exporter._takes_gzip(request.headers.get("accept-encoding", ""))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


# -- the environment ---------------------------------------------------------------------------------------------------

SECRET = "INTERNAL_SERVICE_KEY"


def read_settings(content: bytes) -> None:
    """Settings can be used or are refused with an error of their own, which does not hold the key."""
    aliases = sorted(str(field.alias) for field in settings.Settings.model_fields.values())
    told = dict(zip(aliases, content.split(b"\0"), strict=False))
    before = {name: os.environb.pop(name.encode(), None) for name in aliases}
    try:
        os.environb.update({name.encode(): value for name, value in told.items()})
        settings.Settings.load()
    except settings.SettingsError as error:
        key = os.fsdecode(told.get(SECRET, b""))
        assert len(key) < 12 or key not in str(error)
    finally:
        for name, value in before.items():
            os.environb.pop(name.encode(), None)
            if value is not None:
                os.environb[name.encode()] = value


def _settings_like(**told: str) -> bytes:
    aliases = sorted(str(field.alias) for field in settings.Settings.model_fields.values())
    return b"\0".join(told.get(alias, "").encode() for alias in aliases)


# -- all of them -------------------------------------------------------------------------------------------------------

_OWNER = json.dumps({"owner": ProcessIdentity("no-such-boot", "pid:[1]", 1, 2).columns()})
_ENTRY = Entry(
    "r1",
    NOW,
    facts=(("runs", 1.0, {"status": "x"}),),
    run={"status": "TRAINING_STARTED", "round": 3},
    problems={"hub": 1.0},
    final_status="COMPLETED",
    final_by="job",
    outbox=(OutboxItem(RUN, "status", {"status": "COMPLETED"}, final=True, uid="u1"),),
)
_JOB = {
    "format_version": 2,
    "components": [{"id": "a", "path": "x.y.Z", "args": {"n": 1, "s": "t", "l": [True, None]}}],
}
_MODEL = {"FLIP_MODEL_ID": RUN, "custom_props": {"model_id": RUN}, "name": RUN}
_MEMBERS = {"a.txt": b"text" * 50, "app_server/FL_global_model.pt": b"\0" * 300, "d/": b"", "d/x": b"y"}
_DATE = "Wed, 21 Oct 2026 07:28:00 GMT"

TARGETS: dict[str, Target] = {
    "answer": Target(
        read_answer,
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
            b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            f"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:1/\r\nRetry-After: {_DATE}\r\n\r\n".encode(),
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 401 No\r\nSet-Cookie: a=b\r\nContent-Encoding: gzip\r\n\r\nx",
        ),
    ),
    "archive": Target(
        read_archive,
        tuple(_archive_of(_MEMBERS, method) for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)),
    ),
    "config": Target(read_config, (json.dumps(_JOB).encode(), json.dumps(_JOB, indent=2).encode())),
    "model-id": Target(read_model_id, (json.dumps(_MODEL).encode(), b'{"name": "urn:uuid:' + RUN.encode() + b'"}')),
    "request": Target(
        read_request,
        (
            b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip;q=0.5, br\r\n\r\n",
            b"HEAD / HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc",
        ),
    ),
    "retry-after": Target(read_retry_after, (b"120", _DATE.encode(), b"Fri, 31 Dec 9999 23:59:59 +2359")),
    "settings": Target(
        read_settings,
        (
            _settings_like(
                LOCAL_DEV="false",
                FLIP_API_INTERNAL_URL="https://hub.example:8443/api",
                INTERNAL_SERVICE_KEY="a-key-that-nobody-may-see",
                UPLOADED_FEDERATED_DATA_BUCKET="s3://results/a/b",
            ),
            _settings_like(UPLOADED_FEDERATED_DATA_BUCKET="file:///tmp/x", FLIP_RETENTION_DAYS="1e3"),
        ),
    ),
    "spool": Target(
        read_spool,
        (
            f"{_OWNER}\n{_ENTRY.to_json()}\n".encode() + bytes(300),
            f"{_OWNER}\n{_ENTRY.to_json()}\n{json.dumps({'delivered': ['u1']})}\n{{".encode(),
        ),
    ),
}

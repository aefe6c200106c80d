"""The HTTP endpoint: ``/metrics``, ``/healthz``, ``/readyz``, and ``/`` with links to them.

It knows nothing of what it serves. One event loop on a daemon thread holds all connections, so that those which are
slow, half open or silent cost a little memory and no thread; pages are made by a few daemon threads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import gzip
import html
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flip_observability.errors import report

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 9464
MAX_CONNECTIONS = 64
"""Open at once; for one more the oldest is cut, which is the one that has been silent or slow for longest."""
MAX_HEAD_BYTES = 16_384
"""Of a request's line and headers together."""
HANDSHAKE_SECONDS = 5.0
HEAD_SECONDS = 5.0
PAGE_SECONDS = 30.0
SEND_SECONDS = 10.0
LINGER_SECONDS = 1.0
"""How long the rest of a refused request is read, so that the refusal is not lost with the connection."""
LINGER_BYTES = 1 << 20
WORKERS = 4
MAX_WAITING = MAX_CONNECTIONS
GZIP_MIN_BYTES = 1_024
ACCEPT_PAUSE_SECONDS = 0.2
CERTIFICATE_SECONDS = 10.0
"""How often a new connection looks whether certificate and key have been renewed."""

Metrics = Callable[[str], "tuple[str, bytes]"]
"""From the ``Accept`` header to content type and page. Raises :class:`NotReadyError` to be asked again later."""


class ExporterError(Exception):
    """The endpoint cannot be served as it was asked for. The text names the option and says what to do."""


class NotReadyError(Exception):
    """There is nothing to serve yet. The text says why, in words for a person; it goes out to whoever asks."""


@dataclass(frozen=True)
class TLS:
    """What makes it HTTPS.

    Args:
        certificate: file with the server's certificate and the chain behind it (PEM).
        key: file with its private key (PEM, not encrypted).
        client_ca: file with the authorities whose clients are let in (PEM); None lets everybody in.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


@dataclass(frozen=True)
class Request:
    """What is used of a request: upper-case method, path without its query, headers by lower-case name."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Response:
    """An answer before it is put on the wire."""

    code: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


_REASONS = MappingProxyType(
    {
        200: "OK",
        400: "Bad Request",
        404: "Not Found",
        405: "Method Not Allowed",
        408: "Request Timeout",
        431: "Request Header Fields Too Large",
        500: "Internal Server Error",
        503: "Service Unavailable",
        505: "HTTP Version Not Supported",
    }
)


class Exporter:
    """Serves pages over HTTP or HTTPS.

    Args:
        metrics: makes the page of ``/metrics``.
        ready: an empty text when everything works, else why not; asked by ``/readyz``.
        about: what ``/`` shows, line by line.
        host: address or name to listen on. In a container that others scrape, ``0.0.0.0``.
        port: 0 picks a free one; see :attr:`port`.
        tls: certificate, key and client CA; None serves plain HTTP.
    """

    def __init__(
        self,
        metrics: Metrics,
        ready: Callable[[], str],
        about: Callable[[], Mapping[str, str]],
        *,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        tls: TLS | None = None,
    ) -> None:
        self.host, self.port = host, port
        self._pages = _Pages(metrics, ready, about)
        self._tls_files = tls or TLS()
        self._workers = _Workers()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where it is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "https" if self._tls_files.certificate else "http"
        return f"{scheme}://{host}:{self.port}"

    @property
    def serving(self) -> bool:
        """Whether it listens."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Listen, and serve on daemon threads. Does nothing when it does so already.

        Raises:
            ExporterError: port taken, address not of this machine, certificate or key that cannot be used.
        """
        with self._lock:
            if self.serving:
                return
            tls = _Certificates.load(self._tls_files)
            listener = _listen(self.host, self.port)
            self.port = listener.getsockname()[1]
            loop = asyncio.new_event_loop()
            loop.set_exception_handler(_complain)
            server = _Server(listener, tls, self._pages, self._workers)
            thread = threading.Thread(target=_serve, args=(loop, server), name="flip-exporter", daemon=True)
            self._loop, self._thread = loop, thread
            self._workers.start()
            thread.start()

    def stop(self, timeout: float = 2.0) -> None:
        """Stop to listen and cut what is open.

        Args:
            timeout: seconds to wait for that.
        """
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            with suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(_cancel_all, loop)
            thread.join(timeout)
        self._workers.stop()


# -- opening -----------------------------------------------------------------------------------------------------------

_LISTEN_PROBLEMS = {
    errno.EADDRINUSE: "the port is in use by another program (another exporter, say). Give another one with --port",
    errno.EACCES: "this user may not listen on it. Give one above 1023 with --port",
    errno.EPERM: "this user may not listen on it. Give another one with --port",
    errno.EADDRNOTAVAIL: "this machine does not have the address. Give one of its own, or 0.0.0.0, with --host",
}


def _listen(host: str, port: int) -> socket.socket:
    where = f"Cannot listen on {host}, port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError, OverflowError):
        raise ExporterError(f"{where}: the host is no address or name of this machine. Give one with --host") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except (OSError, OverflowError) as error:
        listener.close()
        number = error.errno if isinstance(error, OSError) else None
        raise ExporterError(f"{where}: {_LISTEN_PROBLEMS.get(number or 0, type(error).__name__)}") from None
    return listener


class _Certificates:
    """A TLS context that follows its files: certificates are renewed while the process lives for months."""

    def __init__(self, files: TLS, context: ssl.SSLContext) -> None:
        self.context = context
        self._files = files
        self._seen = self._stamp()
        self._next_look = 0.0

    @classmethod
    def load(cls, files: TLS) -> _Certificates | None:
        if files.certificate is None and files.key is None:
            if files.client_ca is not None:
                raise ExporterError("--client-ca needs --tls-cert and --tls-key: without them nothing is encrypted")
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _load_chain(context, files)
        if files.client_ca is not None:
            _readable(files.client_ca, "--client-ca")
            try:
                context.load_verify_locations(cafile=files.client_ca)
            except (ssl.SSLError, OSError):
                raise ExporterError(f"--client-ca: {files.client_ca} holds no certificates (PEM)") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return cls(files, context)

    def current(self) -> ssl.SSLContext:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + CERTIFICATE_SECONDS
            stamp = self._stamp()
            if stamp != self._seen:
                try:
                    fresh = _Certificates.load(self._files)
                    self.context = fresh.context if fresh is not None else self.context
                    self._seen = stamp
                except ExporterError as error:
                    report("exporter", error, f"the renewed certificate is not used yet. {error}")
        return self.context

    def _stamp(self) -> list[tuple[int, int] | None]:
        return [_stamp_of(path) for path in (self._files.certificate, self._files.key, self._files.client_ca)]


def _stamp_of(path: Path | None) -> tuple[int, int] | None:
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return (status.st_ino, status.st_mtime_ns) if status is not None else None


def _load_chain(context: ssl.SSLContext, files: TLS) -> None:
    if files.certificate is None or files.key is None:
        given, missing = ("--tls-cert", "--tls-key") if files.key is None else ("--tls-key", "--tls-cert")
        raise ExporterError(f"{given} needs {missing}: give both, or neither for plain HTTP")
    _readable(files.certificate, "--tls-cert")
    _readable(files.key, "--tls-key")
    try:
        # A password is never asked for: nobody sits in front of a server.
        context.load_cert_chain(files.certificate, files.key, password=lambda: b"")
    except (ssl.SSLError, OSError, ValueError) as error:
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            text = f"--tls-key: {files.key} is not the key of the certificate {files.certificate}"
        else:
            text = (
                f"--tls-cert, --tls-key: {files.certificate} and {files.key} are no certificate and unencrypted "
                "private key (PEM)"
            )
        raise ExporterError(text) from None


def _readable(path: Path, option: str) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ExporterError(f"{option}: {path} cannot be read ({error.strerror or type(error).__name__})") from None


# -- pages -------------------------------------------------------------------------------------------------------------


class _Pages:
    """What is at which path. Called on a worker."""

    def __init__(self, metrics: Metrics, ready: Callable[[], str], about: Callable[[], Mapping[str, str]]) -> None:
        self._metrics, self._ready, self._about = metrics, ready, about
        self._routes: Mapping[str, Callable[[Request], Response]] = {
            "/metrics": self._page_of_metrics,
            "/readyz": self._page_of_readiness,
            "/healthz": _alive,
            "/": self._index,
        }

    def quick(self, request: Request) -> Response | None:
        """The answer, when nothing has to be made for it."""
        if request.method not in {"GET", "HEAD"}:
            return Response(405, b"only GET and HEAD\n", headers=(("Allow", "GET, HEAD"),))
        if request.path not in self._routes:
            return Response(404, b"nothing here; / has links\n")
        return _alive(request) if request.path == "/healthz" else None

    def answer(self, request: Request) -> Response:
        try:
            return _compressed(self._routes[request.path](request), request)
        except NotReadyError as reason:
            return Response(503, f"{reason}\n".encode(), headers=(("Retry-After", "5"),))
        except Exception as error:  # noqa: BLE001 - whoever asks gets an answer, and the endpoint lives on
            report("exporter", error, f"cannot make the page {request.path}")
            return Response(503, f"the page cannot be made ({type(error).__name__}); see the log\n".encode())

    def _page_of_metrics(self, request: Request) -> Response:
        content_type, body = self._metrics(request.headers.get("accept", ""))
        return Response(200, body, content_type)

    def _page_of_readiness(self, _: Request) -> Response:
        reason = self._ready()
        return Response(503, f"{reason}\n".encode()) if reason else Response(200, b"ready\n")

    def _index(self, _: Request) -> Response:
        links = "".join(f'<li><a href="{path}">{path}</a></li>' for path in self._routes if path != "/")
        lines = "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in self._about().items()
        )
        text = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>flip-observability</title>'
            f"<h1>flip-observability</h1><dl>{lines}</dl><ul>{links}</ul></html>\n"
        )
        return Response(200, text.encode("utf-8", "backslashreplace"), "text/html; charset=utf-8")


def _alive(_: Request) -> Response:
    return Response(200, b"alive\n")


def _compressed(response: Response, request: Request) -> Response:
    vary = (*response.headers, ("Vary", "Accept, Accept-Encoding"))
    if len(response.body) < GZIP_MIN_BYTES or not _takes_gzip(request.headers.get("accept-encoding", "")):
        return Response(response.code, response.body, response.content_type, vary)
    body = gzip.compress(response.body, compresslevel=4, mtime=0)
    return Response(response.code, body, response.content_type, (*vary, ("Content-Encoding", "gzip")))


def _takes_gzip(header: str) -> bool:
    for item in header.lower().split(","):
        name, _, quality = item.partition(";")
        if name.strip() == "gzip":
            return quality.replace(" ", "") not in {"q=0", "q=0.0", "q=0.00", "q=0.000"}
    return False


class _Workers:
    """A few daemon threads. An executor's own would keep the process from ending while a page hangs."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_WAITING)
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._threads = [
            threading.Thread(target=self._run, args=(self._jobs,), name=f"flip-exporter-page-{number}", daemon=True)
            for number in range(WORKERS)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        jobs, self._jobs = self._jobs, queue.Queue(MAX_WAITING)
        with suppress(queue.Full):  # workers that hang are left behind; they are daemons
            for _ in self._threads:
                jobs.put_nowait(None)
        self._threads = []

    def submit(self, call: Callable[[], Response]) -> concurrent.futures.Future[Response]:
        """Have a page made.

        Raises:
            NotReadyError: too many are waiting.
        """
        future: concurrent.futures.Future[Response] = concurrent.futures.Future()

        def job() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(call())

        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise NotReadyError("too many requests are waiting") from None
        return future

    @staticmethod
    def _run(jobs: queue.Queue[Callable[[], None] | None]) -> None:
        while (job := jobs.get()) is not None:
            job()  # raises nothing: whatever goes wrong with a page is an answer


# -- connections -------------------------------------------------------------------------------------------------------


class _BadRequestError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.response = Response(code, f"{text}\n".encode())


class _Server:
    """Accepts, and holds no more connections than :data:`MAX_CONNECTIONS`, those in a TLS handshake included."""

    def __init__(self, listener: socket.socket, tls: _Certificates | None, pages: _Pages, workers: _Workers) -> None:
        self._listener, self._tls, self._pages, self._workers = listener, tls, pages, workers
        self._open: dict[asyncio.Task[None], None] = {}

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        with self._listener:
            self._listen()
            try:
                await loop.create_future()  # until it is cancelled
            finally:
                loop.remove_reader(self._listener)

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        # Not loop.sock_accept: a connection that comes while that is being cancelled is lost, and stays open.
        loop = asyncio.get_running_loop()
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:  # no descriptors left, say: what is open ends by its time-outs
            report("exporter", error, "cannot accept connections for the moment")
            loop.remove_reader(self._listener)
            loop.call_later(ACCEPT_PAUSE_SECONDS, self._listen)
            return
        task = loop.create_task(self._serve(connection))
        self._open[task] = None
        task.add_done_callback(partial(self._forget, connection))
        if len(self._open) > MAX_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cancel()

    def _forget(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._open.pop(task, None)
        connection.close()  # also of a task that was cancelled before it began
        if not task.cancelled() and (error := task.exception()) is not None:
            report("exporter", error, "a connection ended badly")

    async def _serve(self, connection: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=MAX_HEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            transport = await self._connect(connection, protocol)
        except (OSError, asyncio.TimeoutError):
            return  # no handshake: what a port scanner does
        try:
            transport.set_write_buffer_limits(0)  # "drained" means that the kernel has it all
            writer = asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())
            await self._converse(reader, writer)
        except (OSError, asyncio.TimeoutError, EOFError):
            pass  # it went away, or was too slow
        finally:
            transport.abort()

    async def _connect(self, connection: socket.socket, protocol: asyncio.Protocol) -> asyncio.WriteTransport:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        with suppress(OSError):  # it may be gone already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secure: dict[str, Any] = {}
        if self._tls is not None:
            secure = {"ssl": self._tls.current(), "ssl_handshake_timeout": HANDSHAKE_SECONDS}
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, **secure)
        return transport  # type: ignore[return-value,unused-ignore] # of a stream: it can be written to

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer, and that was it: no connection is kept."""
        head_only, whole = False, False
        try:
            request = await asyncio.wait_for(_read_request(reader), HEAD_SECONDS)
            head_only, whole = request.method == "HEAD", "content-length" not in request.headers
            response = self._pages.quick(request) or await self._make(request)
        except asyncio.TimeoutError:
            response = Response(408, b"the request did not come in time\n")
        except _BadRequestError as error:
            response = error.response
        writer.write(_on_the_wire(response, head_only=head_only))
        await asyncio.wait_for(writer.drain(), SEND_SECONDS)
        await self._part(reader, writer, whole=whole and response.code < 400)

    async def _make(self, request: Request) -> Response:
        try:
            future = asyncio.wrap_future(self._workers.submit(partial(self._pages.answer, request)))
            return await asyncio.wait_for(future, PAGE_SECONDS)
        except asyncio.TimeoutError:
            report("exporter", "PageTimeout", f"the page {request.path} takes too long to make")
            return Response(503, b"the page takes too long to make\n")
        except NotReadyError as reason:
            return Response(503, f"{reason}\n".encode(), headers=(("Retry-After", "5"),))

    @staticmethod
    async def _part(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, whole: bool) -> None:
        """Send everything, then close. What a client still sends is read first, or the answer would be reset."""
        until = time.monotonic() + (SEND_SECONDS if whole else LINGER_SECONDS)
        if writer.can_write_eof():
            writer.write_eof()
        elif whole:
            writer.close()
            await asyncio.wait_for(writer.wait_closed(), SEND_SECONDS)
            return
        left = LINGER_BYTES
        while left > 0 and (seconds := until - time.monotonic()) > 0:
            data = await asyncio.wait_for(reader.read(65_536), seconds)
            if not data:
                return
            left -= len(data)


async def _read_request(reader: asyncio.StreamReader) -> Request:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise _BadRequestError(431, f"line and headers must fit in {MAX_HEAD_BYTES} bytes") from None
    lines = head[:-4].decode("latin-1").split("\r\n")
    try:
        method, target, version = lines[0].split(" ")
    except ValueError:
        raise _BadRequestError(400, "this is no HTTP request") from None
    if not method.isascii() or not method.isalpha() or not target.startswith("/"):
        raise _BadRequestError(400, "this is no HTTP request")
    if version not in {"HTTP/1.0", "HTTP/1.1"}:
        raise _BadRequestError(505, "HTTP/1.1 is spoken here")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise _BadRequestError(400, "this is no header")
        name = name.lower()
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    return Request(method, target.partition("?")[0], headers)


def _on_the_wire(response: Response, *, head_only: bool) -> bytes:
    headers = [
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(response.body))),
        ("Connection", "close"),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", "default-src 'none'"),
        *response.headers,
    ]
    lines = [f"HTTP/1.1 {response.code} {_REASONS[response.code]}", *(f"{name}: {value}" for name, value in headers)]
    head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
    return head if head_only else head + response.body


# -- the event loop ----------------------------------------------------------------------------------------------------


def _serve(loop: asyncio.AbstractEventLoop, server: _Server) -> None:
    try:
        loop.run_until_complete(server.run())
    except asyncio.CancelledError:
        pass
    except Exception as error:  # noqa: BLE001 - the observer sees that the thread has ended, and starts it again
        report("exporter", error, "the endpoint stopped")
    finally:
        _cancel_all(loop)
        with suppress(RuntimeError):
            loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True))
            loop.run_until_complete(asyncio.sleep(0.01))  # what they leave to be called closes their sockets
        loop.close()


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()


def _complain(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # A client that breaks off a handshake ends up here; only what is no matter of a connection is worth a line.
    error = context.get("exception")
    if not isinstance(error, (OSError, asyncio.TimeoutError)):
        report("exporter", error or "EventLoop", "a connection ended badly")

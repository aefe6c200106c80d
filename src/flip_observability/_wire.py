"""HTTP to the hub: pooled connections, verified TLS, no redirects, and a deadline that holds.

Kept apart from :mod:`flip_observability.hub` so that ``requests`` is imported by the thread that first sends something,
and not by every server that loads our components.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any

import requests
from requests.adapters import HTTPAdapter
from requests.cookies import RequestsCookieJar
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, HTTPError

from flip_observability.log_ids import keep_secrets_out

if TYPE_CHECKING:
    from flip_observability.client_spans import ClientSpans

MAX_BODY_BYTES = 65_536
"""What is read of an answer's body, only to use its connection again."""


class Deadline:
    """Cuts the connection of the call that this thread makes when its time is over, whatever the other side does."""

    current = threading.local()

    def __init__(self, seconds: float) -> None:
        self._lock = threading.Lock()
        self._wire: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True
        self._end = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end

    def __enter__(self) -> Deadline:
        self._timer.start()
        self.current.deadline = self
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.current.deadline = None
        with self._lock:
            self._forget()

    def watch(self, connection: HTTPConnection, sock: socket.socket) -> None:
        # A descriptor of our own: a TLS handshake takes the one of the connected socket away while it runs.
        with self._lock:
            self._forget()
            if self.over:  # by looking names up, say; nothing must be sent under a lease that may have ended
                raise ConnectTimeoutError(connection, "the time of this call is over")
            self._wire = socket.socket(fileno=os.dup(sock.fileno()))

    def _cut(self) -> None:
        with self._lock:
            if self._wire is not None:
                with suppress(OSError):
                    self._wire.shutdown(socket.SHUT_RDWR)

    def _forget(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None


class _Watched(HTTPConnection):
    """A connection that the current deadline can cut at any moment: handshake, request, headers, body."""

    def _new_conn(self) -> socket.socket:
        sock = super()._new_conn()
        try:
            self._watch(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def request(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:
            self._watch(self.sock)
        super().request(*args, **kwargs)

    def _watch(self, sock: socket.socket) -> None:
        deadline: Deadline | None = getattr(Deadline.current, "deadline", None)
        if deadline is not None:
            deadline.watch(self, sock)


class _WatchedTLS(_Watched, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Watched


class _PoolTLS(HTTPSConnectionPool):
    ConnectionCls = _WatchedTLS


_POOLS = {"http": _Pool, "https": _PoolTLS}


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = _POOLS
        return manager


_spans: ContextVar[ClientSpans | None] = ContextVar("flip_hub_spans", default=None)


class _Session(requests.Session):
    def get_redirect_target(self, resp: Any) -> None:
        """None: ``requests`` reads the whole body of a redirect into memory, even of one that it does not follow."""

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """As a span of the run whose message it is, when there is one and spans are exported."""
        spans = _spans.get()
        return super().send(request, **kwargs) if spans is None else spans.send(self, request, **kwargs)


class Wire:
    """Connections to one hub.

    Args:
        base: URL that every path is put behind.
        headers: of every request.
        pool_size: connections that are kept.
    """

    def __init__(self, base: str, headers: dict[str, str], pool_size: int) -> None:
        keep_secrets_out()
        self._base = base
        self._session = _Session()
        self._session.headers.update(headers)
        self._session.auth = _as_it_is  # not None, or a .netrc file would add credentials for the hub's host
        self._session.cookies = RequestsCookieJar(policy=DefaultCookiePolicy(allowed_domains=[]))
        adapter = _Adapter(pool_connections=2, pool_maxsize=pool_size, max_retries=0)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def call(self, method: str, path: str, data: bytes | None, timeout: tuple[float, float]) -> tuple[int, str | None]:
        """Make a call, within the deadline of this thread.

        Args:
            method, path, data: of the request; data is JSON.
            timeout: seconds to connect, and between two pieces of the answer.

        Returns:
            The status, and the header ``Retry-After``.

        Raises:
            OSError: ``requests``' and the network's errors.
        """
        headers = {} if data is None else {"Content-Type": "application/json"}
        with self._session.request(
            method,
            self._base + path,
            data=data,
            headers=headers,
            timeout=timeout,
            allow_redirects=False,
            stream=True,
        ) as response:
            with suppress(HTTPError, OSError, ValueError):  # the answer is known: what its body does changes nothing
                response.raw.read(MAX_BODY_BYTES, decode_content=False)
            return response.status_code, response.headers.get("Retry-After")

    def close(self) -> None:
        """Close the pooled connections."""
        self._session.close()


@contextmanager
def as_spans(spans: ClientSpans | None, run_id: str | None, attempts: int) -> Iterator[None]:
    """A call in here is a span below its run's root, whichever process makes it, and however late."""
    if spans is None or run_id is None:
        yield
        return
    with spans.of_message(run_id, attempts):
        token = _spans.set(spans)
        try:
            yield
        finally:
            _spans.reset(token)


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request

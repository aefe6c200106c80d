"""A server that does to its clients, byte by byte, what a test tells it to: answers that no HTTP library would give."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeAlias

GIVE_UP_SECONDS = 60.0
"""After so long a client that should have gone is let go, and the test fails on :attr:`FaultServer.gave_up`."""

Script: TypeAlias = "Callable[[socket.socket, bytes], None]"

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class FaultServer:
    """Listens on a free port and runs ``script(connection, request)`` for every request.

    Args:
        script: what to answer.
        tls: wraps connections, when given.
        raw: the script gets the connection at once and an empty request, before any handshake or reading.
    """

    def __init__(self, script: Script, *, tls: ssl.SSLContext | None = None, raw: bool = False) -> None:
        self._script, self._tls, self._raw = script, tls, raw
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.requests: list[bytes] = []
        self.connections = 0
        self.sent = 0
        self.gave_up = False
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(10)

    def push(self, connection: socket.socket, data: bytes) -> None:
        """Send and count."""
        connection.sendall(data)
        self.sent += len(data)

    def for_ever(self, connection: socket.socket, data: bytes, pause: float) -> None:
        """Send the same again and again until the client has gone."""
        until = time.monotonic() + GIVE_UP_SECONDS
        while time.monotonic() < until:
            self.push(connection, data)
            time.sleep(pause)
        self.gave_up = True

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, connection: socket.socket) -> None:
        self._open.add(connection)
        with contextlib.suppress(OSError, EOFError):
            if self._raw:
                self._script(connection, b"")
            else:
                self._converse(self._tls.wrap_socket(connection, server_side=True) if self._tls else connection)
        self._open.discard(connection)
        with contextlib.suppress(OSError):
            connection.close()

    def _converse(self, connection: socket.socket) -> None:
        self._open.add(connection)
        try:
            while True:
                request = _read_request(connection)
                self.requests.append(request)
                self._script(connection, request)
        finally:
            self._open.discard(connection)
            connection.close()


def reset(connection: socket.socket, _: bytes) -> None:
    """Answer with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    raise EOFError


def _read_request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    while len(body) < length:
        body += _receive(connection)
    return head + b"\r\n\r\n" + body


def _receive(connection: socket.socket) -> bytes:
    data = connection.recv(65_536)
    if not data:
        raise EOFError
    return data

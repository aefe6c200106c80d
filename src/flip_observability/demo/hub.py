"""An embedded Central Hub: a real HTTP server that checks the wire contract strictly and remembers what it was sent.

It judges like the real hub (401 for a bad key, 404 for what it does not know, 422 for what it does not understand), and
its faults can be switched while it runs: down, hanging, or answering with any status code.

``python -m flip_observability.demo.hub`` runs it on its own, as the stack of ``docker-compose.yml`` does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from flip_observability.constants import ROUND_LESS_EVENTS, ModelStatus
from flip_observability.errors import logger

Contract = Literal["2026-05", "2026-10"]

MAX_BODY_BYTES = 1 << 20
"""A larger body is refused with 413."""

HEALTH_PATH = "/healthz"
"""Answered with 200 to anybody while the hub is up, and not recorded."""

HEADERS_OF_INTEREST = ("traceparent", "tracestate", "content-type", "user-agent")
"""What a record keeps of a request's headers. Never the service key."""


class _Payload(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Metric202605(_Payload):
    trust: str
    globalRound: int  # noqa: N815 - the wire's spelling
    label: str
    result: _Finite


class _Log202605(_Payload):
    trust: str
    log: str


class _Metric202610(_Payload):
    fl_client_name: str
    global_round: Annotated[int, Field(ge=0)]
    label: str
    result: _Finite
    x_value: _Finite | None = None
    x_label: Annotated[str, Field(min_length=1, max_length=64)] = "Global Rounds"


class _Log202610(_Payload):
    """A row of a model's log: a text or an event. Senders may leave out what is null, or write it."""

    fl_client_name: str | None = None
    log: str | None = None
    event_type: Annotated[str, Field(max_length=64)] | None = None
    global_round: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    details: dict[str, Any] | None = None
    success: bool = True

    @model_validator(mode="after")
    def _text_or_event(self) -> _Log202610:
        if (self.log is None) == (self.event_type is None):
            raise ValueError("needs either a log or an event_type")
        if self.event_type is not None and (not self.event_type.strip() or self.event_type == "QUEUE_POSITION"):
            raise ValueError("is an event_type that nobody may send")
        if self.event_type is not None and self.event_type not in ROUND_LESS_EVENTS and self.global_round is None:
            raise ValueError("is an event without its round")
        return self


_PAYLOADS: dict[tuple[Contract, str], TypeAdapter[Any]] = {
    ("2026-05", "metrics"): TypeAdapter(_Metric202605),
    ("2026-05", "logs"): TypeAdapter(_Log202605),
    ("2026-10", "metrics"): TypeAdapter(_Metric202610),
    ("2026-10", "logs"): TypeAdapter(_Log202610),
}
_MAX_DETAILS_BYTES = 8192

_VOCABULARY: dict[Contract, frozenset[str]] = {
    "2026-05": frozenset(map(str, ModelStatus)) - {"RUNNING", "RESULTS_UPLOAD_FAILED"},
    "2026-10": frozenset(map(str, ModelStatus)) - {"TRAINING_STARTED"},
}


@dataclass(frozen=True)
class HubRecord:
    """One request as the hub saw it, and what it answered.

    Attributes:
        time: seconds since the epoch when the request was answered.
        method: HTTP method.
        path: request path.
        code: HTTP status answered; 0 when it was left without an answer.
        kind: ``status``, ``metrics``, ``logs``, or empty when the path is none of these.
        model_id: the model id in the path, as sent.
        status: the status in the path of a ``status`` request.
        payload: the JSON body of an accepted ``metrics`` or ``logs`` request.
        headers: :data:`HEADERS_OF_INTEREST`, lower-case names.
        problem: why it was refused; empty when accepted.
    """

    time: float
    method: str
    path: str
    code: int
    kind: str = ""
    model_id: str = ""
    status: str = ""
    payload: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def accepted(self) -> bool:
        return self.code == 200


@dataclass(frozen=True)
class _Answer:
    code: int
    problem: str = ""
    kind: str = ""
    model_id: str = ""
    status: str = ""
    payload: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Fault:
    """What the hub does instead of its work; ``left`` counts down, None is for ever."""

    code: int
    headers: Mapping[str, str]
    left: int | None
    kinds: frozenset[str] | None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], hub: EmbeddedHub) -> None:
        super().__init__(address, _Handler, bind_and_activate=False)
        self.hub = hub
        self._open: set[Any] = set()
        self._open_lock = threading.Lock()
        self.server_bind()

    def server_bind(self) -> None:
        # HTTPServer.server_bind looks the host name up, which can take seconds; nothing here needs the name.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        host, port = self.socket.getsockname()[:2]
        self.server_address = (host, port)
        self.server_name, self.server_port = host, port

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no event of interest."""

    def drop_connections(self) -> None:
        with self._open_lock:
            for request in self._open:
                with contextlib.suppress(OSError):  # the client was faster
                    request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait 40 ms for the first one's ACK
    server: _Server

    def _serve(self) -> None:
        length = self.headers.get("Content-Length") or "0"
        body: bytes | None = None
        if "Transfer-Encoding" not in self.headers and length.isdecimal() and int(length) <= MAX_BODY_BYTES:
            body = self.rfile.read(int(length))
        else:
            self.close_connection = True
        answer = self.server.hub._answer(self.command, self.path, dict(self.headers.items()), body)
        if answer is None:
            self.close_connection = True
            return
        text = b"{}" if answer.code == 200 else b'{"detail": "refused"}'
        self.send_response(answer.code)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing on standard error: the records say it all."""


class EmbeddedHub:
    """A Central Hub on a port of this machine, for the demo and for tests. Use it as a context manager.

    Args:
        contract: the wire contract that is enforced.
        key: the service key; a random one when not given.
        header: name of the header that carries the key.
        model_ids: the models it knows (404 for others); None accepts any UUID.
        host: address to listen on.
        port: 0 picks a free one. It stays the same over :meth:`down` and :meth:`up`.
        base: path that every endpoint starts with.
        keep: how many records are kept, the latest ones; None for all.
        on_record: is called with each record, on the thread of its request.
    """

    def __init__(
        self,
        contract: Contract = "2026-05",
        *,
        key: str | None = None,
        header: str = "X-Internal-Service-Key",
        model_ids: Iterable[str] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        base: str = "/api",
        keep: int | None = None,
        on_record: Callable[[HubRecord], None] | None = None,
    ) -> None:
        self.contract: Contract = contract
        self.key = secrets.token_urlsafe(24) if key is None else key
        self.header = header
        self.model_ids = None if model_ids is None else set(model_ids)
        self._host, self._port, self._base = host, port, base.rstrip("/")
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._records: deque[HubRecord] = deque(maxlen=keep)
        self._on_record = on_record
        self._fault: _Fault | None = None
        self._release = threading.Event()
        self._outages: list[tuple[float, float | None]] = []

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> EmbeddedHub:
        self._server = _Server((self._host, self._port), self)
        self._port = int(self._server.server_port)
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.heal()
        self._stop()
        if self._server:
            self._server.server_close()
            self._server = None

    @property
    def url(self) -> str:
        """Base URL, what ``FLIP_API_INTERNAL_URL`` is set to."""
        return f"http://{self._host}:{self._port}{self._base}"

    @property
    def is_up(self) -> bool:
        return self._thread is not None

    def down(self) -> None:
        """Refuse connections, and drop those that are open. The port stays reserved."""
        if not self.is_up:
            return
        self._stop()
        with self._changed:
            self._outages.append((time.time(), None))
        assert self._server is not None  # noqa: S101 - is_up says so
        self._server.server_close()
        # Bound but not listening: connections are refused, and nobody else can get this port.
        self._server = _Server((self._host, self._port), self)

    def up(self) -> None:
        """Accept connections again on the same port."""
        if self._server is None:
            raise RuntimeError("the hub has not been started: use it in a with statement")
        if self._thread is None:
            with self._changed:
                if self._outages:
                    self._outages[-1] = (self._outages[-1][0], time.time())
            self._server.server_activate()
            self._thread = threading.Thread(
                target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="embedded-hub", daemon=True
            )
            self._thread.start()

    def _stop(self) -> None:
        if self._thread is None or self._server is None:
            return
        self._server.shutdown()
        self._server.drop_connections()
        self._thread.join()
        self._thread = None

    # -- faults -------------------------------------------------------------------------------------------------------

    def fail_with(
        self,
        status: int,
        headers: Mapping[str, str] | None = None,
        times: int | None = None,
        kinds: Iterable[str] | None = None,
    ) -> None:
        """Answer every request with this status code instead of judging it.

        Args:
            status: HTTP status code.
            headers: further headers of the answer, such as ``Retry-After`` or ``Location``.
            times: how many requests; None until :meth:`heal`.
            kinds: only requests of these kinds (``status``, ``metrics``, ``logs``); None for all.
        """
        self._set_fault(_Fault(status, dict(headers or {}), times, None if kinds is None else frozenset(kinds)))

    def hang(self, times: int | None = None, kinds: Iterable[str] | None = None) -> None:
        """Take requests and never answer them: they are held until :meth:`heal`, then closed without an answer."""
        self._set_fault(_Fault(0, {}, times, None if kinds is None else frozenset(kinds)))

    def heal(self) -> None:
        """No fault any more, and held requests are let go. Being down is another thing: see :meth:`up`."""
        with self._changed:
            self._fault = None
            self._release.set()

    def _set_fault(self, fault: _Fault) -> None:
        with self._changed:
            self._release.set()
            self._release = threading.Event()
            self._fault = fault

    def _take_fault(self, kind: str) -> tuple[_Fault | None, threading.Event]:
        with self._changed:
            fault = self._fault
            if fault is None or (fault.kinds is not None and kind not in fault.kinds) or fault.left == 0:
                return None, self._release
            if fault.left is not None:
                fault.left -= 1
            return fault, self._release

    # -- what it saw --------------------------------------------------------------------------------------------------

    @property
    def records(self) -> list[HubRecord]:
        """Every request so far, in the order of the answers (a copy)."""
        with self._changed:
            return list(self._records)

    @property
    def outages(self) -> list[tuple[float, float | None]]:
        """When it was down, in seconds since the epoch; None while it still is."""
        with self._changed:
            return list(self._outages)

    def statuses(self, model_id: str) -> list[str]:
        """The statuses accepted for a model, in order."""
        return [r.status for r in self.records if r.accepted and r.kind == "status" and r.model_id == model_id]

    def payloads(self, model_id: str, kind: str) -> list[Mapping[str, Any]]:
        """The bodies of accepted ``metrics`` or ``logs`` requests of a model, in order."""
        return [
            r.payload
            for r in self.records
            if r.accepted and r.kind == kind and r.model_id == model_id and r.payload is not None
        ]

    def wait(self, condition: Callable[[EmbeddedHub], bool], timeout: float = 30.0) -> bool:
        """Wait until a condition on the records holds.

        Args:
            condition: is called with this hub after every request.
            timeout: seconds; False is returned when they pass first.
        """
        deadline = time.monotonic() + timeout
        with self._changed:  # a Condition's lock is re-entrant, so the condition may read `records`
            while not condition(self):
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    return condition(self)
        return True

    # -- the contract -------------------------------------------------------------------------------------------------

    def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes | None) -> _Answer | None:
        if (method, path) == ("GET", HEALTH_PATH):
            return _Answer(200)
        low = {name.lower(): value for name, value in headers.items()}
        parts = path.partition("?")[0].removeprefix(self._base + "/").split("/")
        kind = parts[2] if len(parts) > 2 and parts[0] == "model" else ""
        fault, release = self._take_fault(kind)
        if fault is None:
            answer = self._judge(method, path, low, body)
        else:
            model_id, status = (parts[1], parts[3] if len(parts) > 3 else "") if kind else ("", "")
            answer = _Answer(fault.code, "fault", kind, model_id, status, headers=fault.headers)
        self._record(method, path, low, answer)
        if answer.code == 0:
            release.wait()
            return None
        return answer

    def _record(self, method: str, path: str, low: Mapping[str, str], answer: _Answer) -> None:
        kept = {name: low[name] for name in HEADERS_OF_INTEREST if name in low}
        record = HubRecord(
            time.time(),
            method,
            path,
            answer.code,
            answer.kind,
            answer.model_id,
            answer.status,
            answer.payload if answer.code == 200 else None,
            kept,
            answer.problem,
        )
        with self._changed:
            self._records.append(record)
            self._changed.notify_all()
        if self._on_record is not None:
            self._on_record(record)

    def _judge(self, method: str, path: str, low: Mapping[str, str], body: bytes | None) -> _Answer:
        if not secrets.compare_digest(low.get(self.header.lower(), "").encode(), self.key.encode()):
            return _Answer(401, "key")
        if body is None:
            return _Answer(413, "body too large or of unknown length")
        if not path.startswith(self._base + "/model/"):
            return _Answer(404, "no such endpoint")
        model_id, *rest = path[len(self._base + "/model/") :].split("/")
        match (method, *rest):
            case ("PUT", "status", status):
                answer = self._judge_status(model_id, status, body)
            case ("POST", "metrics" | "logs" as kind):
                answer = self._judge_payload(model_id, kind, low, body)
            case (_, "status", _) | (_, "metrics" | "logs"):
                return _Answer(405, "method")
            case _:
                return _Answer(404, "no such endpoint")
        return answer

    def _judge_model(self, model_id: str) -> tuple[int, str]:
        try:
            canonical = str(uuid.UUID(model_id))
        except ValueError:
            return 422, "model id is no UUID"
        if canonical != model_id:
            return 422, "model id is not in canonical form"
        if self.model_ids is not None and model_id not in self.model_ids:
            return 404, "unknown model"
        return 200, ""

    def _judge_status(self, model_id: str, status: str, body: bytes) -> _Answer:
        code, problem = self._judge_model(model_id)
        if code == 200 and status not in _VOCABULARY[self.contract]:
            code, problem = 422, "unknown status"
        if code == 200 and body:
            code, problem = 422, "a status has no body"
        return _Answer(code, problem, "status", model_id, status)

    def _judge_payload(self, model_id: str, kind: str, low: Mapping[str, str], body: bytes) -> _Answer:
        code, problem = self._judge_model(model_id)
        if code != 200:
            return _Answer(code, problem, kind, model_id)
        if low.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _Answer(422, "content type is not application/json", kind, model_id)
        try:
            payload = _PAYLOADS[self.contract, kind].validate_json(body)
        except ValidationError as error:
            where = sorted({".".join(map(str, item["loc"])) or "body" for item in error.errors(include_input=False)})
            return _Answer(422, "bad payload: " + ", ".join(where), kind, model_id)
        if isinstance(payload, _Log202610) and _details_bytes(payload) > _MAX_DETAILS_BYTES:
            return _Answer(422, "bad payload: details", kind, model_id)
        return _Answer(200, "", kind, model_id, payload=payload.model_dump(exclude_unset=True))


def _details_bytes(row: _Log202610) -> int:
    return len(json.dumps(row.details, default=str))


# -- on its own --------------------------------------------------------------------------------------------------------

_KEPT = 1_000
"""Records of a hub that runs for long."""

_log = logger("flip_observability.demo.hub")


def main(argv: list[str] | None = None) -> int:
    """Run a hub until SIGTERM or SIGINT: ``python -m flip_observability.demo.hub --host H --port P``.

    The environment says what a FLIP server's says: ``INTERNAL_SERVICE_KEY`` (needed), ``INTERNAL_SERVICE_KEY_HEADER``
    and ``FLIP_HUB_CONTRACT``. Every model id is known to it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m flip_observability.demo.hub", description="The demo's Central Hub."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one (default: %(default)s)")
    args = parser.parse_args(argv)
    key, contract = os.environ.get("INTERNAL_SERVICE_KEY", ""), os.environ.get("FLIP_HUB_CONTRACT", "2026-05")
    if not key:
        parser.error("INTERNAL_SERVICE_KEY is not set")
    if contract not in get_args(Contract):
        parser.error(f"FLIP_HUB_CONTRACT is none of {', '.join(get_args(Contract))}")
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    hub = EmbeddedHub(
        contract,  # type: ignore[arg-type]  # one of them, as seen above
        key=key,
        header=os.environ.get("INTERNAL_SERVICE_KEY_HEADER") or "X-Internal-Service-Key",
        host=args.host,
        port=args.port,
        keep=_KEPT,
        on_record=_log_record,
    )
    try:
        with hub:
            _log.info("listening on %s, contract %s", hub.url, contract)
            stop.wait()
            _log.info("stopping")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: cannot listen on {args.host}:{args.port} ({error.strerror})\n")
    return 0


def _log_record(record: HubRecord) -> None:
    # What a stranger sends can be anything: it is shown in ASCII and cut short.
    path = ascii(record.path[:200])[1:-1]
    _log.info("%s %s %d%s", record.method, path, record.code, f" ({record.problem})" if record.problem else "")


if __name__ == "__main__":
    sys.exit(main())

"""Calls that this package makes, of the hub and of the bucket, as client spans in the trace of their run.

The instrumentations of ``requests`` and ``botocore`` are made to patch the whole process, in which researchers' code
runs too and makes calls of its own, whose URLs may hold what must not leave the server. So they are applied to our
session and our S3 client alone: nothing else becomes a span or carries our ``traceparent``, and an instrumentation that
the host process has is left as it is.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import requests
from opentelemetry import context, trace
from opentelemetry._logs import NoOpLoggerProvider
from opentelemetry.instrumentation.requests import RequestsInstrumentor
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, Status, StatusCode, TraceFlags

from flip_observability.errors import report
from flip_observability.tracing import clean, root_span_id, scrub, trace_id_of

MAX_ALIKE = 100
"""Spans of one name and outcome kept of an upload: one of 80 GB has 8,000 parts."""
MAX_FAILED_CALLS = 10
"""Vain attempts of one message to the hub that become spans; an outage of days must not fill the trace."""

ALLOWED = frozenset(
    "http.request.method http.request.resend_count http.response.status_code url.full server.address server.port "
    "network.peer.address network.peer.port network.protocol.version http.method http.url http.status_code error.type "
    "rpc.system rpc.service rpc.method aws.request_id retry_attempts cloud.region".split()
)
"""What is kept of the instrumentations' attributes. Not headers, keys of objects, or anything that comes new."""
_URLS = ("url.full", "http.url")

_active: ContextVar[tuple[ClientSpans, Budget] | None] = ContextVar("flip_client_spans", default=None)
_patching = threading.Lock()


class Budget:
    """How many spans of one name may still be exported.

    Args:
        good: of calls that worked.
        bad: of calls that did not.
    """

    def __init__(self, good: int = MAX_ALIKE, bad: int = MAX_ALIKE) -> None:
        self._left = {False: good, True: bad}
        self._used: Counter[tuple[str, bool]] = Counter()
        self._lock = threading.Lock()

    def spend(self, name: str, failed: bool) -> bool:
        """Whether one more is allowed."""
        with self._lock:
            self._used[name, failed] += 1
            return self._used[name, failed] <= self._left[failed]


class ClientSpans:
    """Makes spans of our own calls.

    Args:
        emit: takes a finished span.
        resource: of this process.
        clock: epoch seconds on the clock that the run's spans are timed by.
        messages: whether messages and stack traces of exceptions may be recorded.
        secrets: texts that a message must not hold even then.
    """

    def __init__(
        self,
        emit: Callable[[ReadableSpan], None],
        *,
        resource: Resource,
        clock: Callable[[], float],
        messages: bool = False,
        secrets: tuple[str, ...] = (),
    ) -> None:
        self._emit = emit
        self._resource = resource
        self._clock = clock
        self._messages = messages
        self._secrets = secrets
        self._under_way = 0
        self._idle = threading.Condition()
        # Spans come out of a provider of their own that nobody else knows, and only below a span of a run.
        self._provider = TracerProvider(
            sampler=ParentBased(ALWAYS_OFF), resource=Resource.get_empty(), shutdown_on_exit=False
        )
        self._provider.add_span_processor(_Listener(self))
        self._send = _instrumented_send(self._provider)
        self._botocore: Any = None

    @contextmanager
    def within(self, run_id: str, parent_id: int | None = None, budget: Budget | None = None) -> Iterator[None]:
        """Calls made in here, and on threads that get this context, are children of a span of the run.

        Args:
            run_id: whose trace.
            parent_id: the span; the run's root when None.
            budget: of spans; :data:`MAX_ALIKE` of a kind when None.
        """
        flags = TraceFlags(TraceFlags.SAMPLED)
        parent = SpanContext(trace_id_of(run_id), parent_id or root_span_id(run_id), False, flags)
        token = context.attach(trace.set_span_in_context(NonRecordingSpan(parent), context.Context()))
        ours = _active.set((self, budget or Budget()))
        try:
            yield
        finally:
            _active.reset(ours)
            context.detach(token)

    def of_message(self, run_id: str, attempts: int) -> AbstractContextManager[None]:
        """For the call of a message to the hub.

        Args:
            run_id: whose message.
            attempts: made before, in vain.
        """
        return self.within(run_id, budget=Budget(bad=int(attempts < MAX_FAILED_CALLS)))

    def wait_idle(self, seconds: float) -> bool:
        """Wait until none of our calls is under way."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._under_way, seconds)

    # -- what the spans are made of ----------------------------------------------------------------------------------

    def _begun(self) -> None:
        with self._idle:
            self._under_way += 1

    def _ended(self, span: ReadableSpan) -> None:
        try:
            found = _active.get()
            failure = _failure(span)
            if found is None or found[1].spend(span.name, failure is not None):
                self._emit(self._ours(span, failure))
        except Exception as error:  # noqa: BLE001 - the call itself has worked
            report("tracing", error, "a call could not be made a span")
        finally:
            with self._idle:
                self._under_way -= 1
                self._idle.notify_all()

    def _ours(self, span: ReadableSpan, failure: Mapping[str, Any] | None) -> ReadableSpan:
        """The span as it may be seen outside: known attributes only, on the run's clock."""
        attributes = {key: value for key, value in (span.attributes or {}).items() if key in ALLOWED}
        for name in _URLS:
            if name in attributes:
                attributes[name] = bare_url(str(attributes[name]))
        if failure is not None:
            attributes |= {key: value for key, value in failure.items() if self._may_tell(key)}
        shift = round((self._clock() - time.time()) * 1e9)
        status = Status(StatusCode.ERROR, str((failure or {}).get("exception.type", "")) or None)
        return ReadableSpan(
            name=span.name,
            context=span.context,
            parent=span.parent,
            resource=self._resource,
            attributes=clean({key: self._scrubbed(value) for key, value in attributes.items()}),
            kind=span.kind,
            status=status if failure is not None else Status(StatusCode.UNSET),
            start_time=(span.start_time or 0) + shift,
            end_time=(span.end_time or 0) + shift,
            instrumentation_scope=span.instrumentation_scope,
        )

    def _may_tell(self, key: str) -> bool:
        return self._messages or key == "exception.type"

    def _scrubbed(self, value: Any) -> Any:
        return scrub(value, self._secrets) if isinstance(value, str) else value

    # -- ours alone --------------------------------------------------------------------------------------------------

    def send(self, session: requests.Session, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """``requests``' own sending, as a span, with ``traceparent`` in the headers."""
        return self._send(session, request, **kwargs)

    def instrument_s3(self, client: Any) -> None:
        """Make spans of this client's calls, and of no other's."""
        try:
            import wrapt

            with _patching:
                if self._botocore is None:
                    self._botocore = _instrumented_botocore(self._provider)
            wrapt.wrap_function_wrapper(client, "_make_api_call", self._botocore._patched_api_call)
        except Exception as error:  # noqa: BLE001 - an upload without spans is better than none
            report("tracing", error, "calls of the bucket cannot be made spans")


class _Listener(SpanProcessor):
    def __init__(self, owner: ClientSpans) -> None:
        self._owner = owner

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self._owner._begun()

    def on_end(self, span: ReadableSpan) -> None:
        self._owner._ended(span)


def active() -> ClientSpans | None:
    """Whose spans calls of ours become in this context; None outside of :meth:`ClientSpans.within`."""
    found = _active.get()
    return found[0] if found is not None else None


def bare_url(url: str) -> str:
    """A URL without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    except ValueError:
        return ""


def _failure(span: ReadableSpan) -> dict[str, Any] | None:
    """What is known of a call that did not work; None of one that did."""
    attributes = span.attributes or {}
    for event in span.events:
        if event.name == "exception":
            return dict(event.attributes or {})
    if span.status.status_code is not StatusCode.ERROR:
        return None
    code = attributes.get("http.response.status_code") or attributes.get("http.status_code")
    return {"exception.type": f"HTTP {code}" if code else "Error"}


def _instrumented_send(provider: TracerProvider) -> Callable[..., requests.Response]:
    """``requests.Session.send`` as the instrumentation makes it, while everybody else's stays what it was."""

    class Instrumentor(RequestsInstrumentor):
        _instance = None  # the instrumentor that the host may have made is another one

    with _patching:
        before = requests.Session.send
        try:
            Instrumentor()._instrument(tracer_provider=provider, meter_provider=NoOpMeterProvider())
            send: Callable[..., requests.Response] = requests.Session.send
        finally:
            requests.Session.send = before  # type: ignore[method-assign]
    return send


def _instrumented_botocore(provider: TracerProvider) -> Any:
    """The instrumentation of botocore, made and taken off again: what it does is applied to clients one by one."""
    from botocore.client import BaseClient
    from botocore.endpoint import Endpoint
    from opentelemetry.instrumentation.botocore import BotocoreInstrumentor

    class Instrumentor(BotocoreInstrumentor):
        _instance = None

    patched: tuple[tuple[Any, str], ...] = ((BaseClient, "_make_api_call"), (Endpoint, "prepare_request"))
    before = [vars(owner)[name] for owner, name in patched]
    instrumentor = Instrumentor()  # type: ignore[no-untyped-call]
    try:
        instrumentor._instrument(  # type: ignore[no-untyped-call]
            tracer_provider=provider, meter_provider=NoOpMeterProvider(), logger_provider=NoOpLoggerProvider()
        )
    finally:
        for (owner, name), function in zip(patched, before, strict=True):
            setattr(owner, name, function)
    return instrumentor

"""Spans of runs: from the lifecycle's fold to OpenTelemetry, with ids that every process derives alike.

The trace id of a run is its run id. Spans are folded with their ids and times by :mod:`flip_observability.lifecycle`
and given to a span processor as they are: that of the host process's own tracer provider where it has one, otherwise
one of ours. No tracer provider is ever registered, replaced or shut down. OpenTelemetry is imported only when there is
somewhere to export to, on a thread of our own.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any, Protocol, cast

from flip_observability.errors import report
from flip_observability.lifecycle import RUN, Scalar, Span, derive_span_id
from flip_observability.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import SpanContext

    from flip_observability.client_spans import ClientSpans

SERVICE_NAME = "flip-fl-server"
SCOPE = "flip_observability"
DISTRIBUTION = "flip-observability"
SCHEDULE_DELAY_MS = 1_000
"""How long a finished span waits for company, unless ``OTEL_BSP_SCHEDULE_DELAY`` says otherwise: what waits dies with a
process that is killed."""
MAX_QUEUE = 2_048
MAX_BATCH = 512
MAX_EARLY = 2_048
"""Spans kept while OpenTelemetry is being imported."""
READY_SECONDS = 3.0
"""How long a call of ours, on a thread of ours, waits for OpenTelemetry to be imported."""
MAX_TEXT = 1_024
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_OTLP_EXPORTERS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
_EXPORTER_GROUP = "opentelemetry_traces_exporter"
_NOISY = ("opentelemetry", "urllib3", "grpc")
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_INT64 = 2**63


class TracingError(Exception):
    """Spans cannot be exported. The text names the variable and never holds its value."""


@dataclass(frozen=True)
class RunTags:
    """Whose spans they are: attributes that a person would search a run by."""

    run_id: str
    job_id: str = ""
    model_id: str | None = None
    net_id: str = "default"

    def attributes(self, name: str) -> dict[str, Scalar]:
        """What a span of this run carries; the root a little more than the others."""
        found = {"flip.run_id": self.run_id, "flip.model_id": self.model_id}
        if name == RUN:
            found |= {"flip.job_id": self.job_id, "flip.net_id": self.net_id}
        return {key: value for key, value in found.items() if value}


Accepted = Callable[[str, bool], None]
"""Told, for each event in order, whether all its spans reached the collector: (the event's uid, whether they did)."""


def trace_id_of(run_id: str) -> int:
    """The trace of a run."""
    return uuid.UUID(run_id).int


def has_trace(run_id: str | None) -> bool:
    """Whether there can be a trace of that id; nothing of ours may fail because there cannot."""
    try:
        return run_id is not None and trace_id_of(run_id) != 0
    except ValueError:
        return False


def root_span_id(run_id: str) -> int:
    """The id of a run's ``flip.run``: known before that span is exported, and in every process."""
    return derive_span_id(run_id, RUN)


# -- the process's way of exporting ------------------------------------------------------------------------------------

_shared_lock = threading.Lock()
_shared: tuple[int, Tracing] | None = None


def shared(settings: Settings) -> Tracing:
    """The tracing of this process, made from its environment when first asked for."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared[0] != os.getpid():  # a forked child has none of the threads
            _shared = os.getpid(), Tracing(settings)
        return _shared[1]


class Tracing:
    """Exports spans, or does nothing at almost no cost when the environment names nowhere to export to.

    Safe to use from any thread. Nothing is raised, and nothing waits, unless it says so.

    Args:
        settings: for the resource, and whether messages of exceptions may be recorded.
    """

    def __init__(self, settings: Settings) -> None:
        self.clock: Callable[[], float] = time.time
        """Epoch seconds on the clock that the spans' times come from; a recorder sets its own."""
        self._settings = settings
        self._lock = threading.Lock()
        self._early: deque[tuple[RunTags, Span, str | None, Accepted | None]] = deque()
        self._pipeline: _Pipeline | None = None
        self._client_spans: ClientSpans | None = None
        self._ready = threading.Event()
        self._flushing: threading.Thread | None = None
        self._enabled = _is_wanted()
        if self._enabled:
            # The imports take up to a second, and this may be a thread of the run.
            threading.Thread(target=self._build, name="flip-tracing-start", daemon=True).start()
        else:
            self._ready.set()

    @property
    def enabled(self) -> bool:
        """Whether spans are exported at all."""
        return self._enabled

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no message may hold."""
        return (self._settings.service_key.get_secret_value(),)

    def submit(
        self, tags: RunTags, spans: Sequence[Span], cursor: str | None = None, accepted: Accepted | None = None
    ) -> None:
        """Export finished spans, later and elsewhere.

        Args:
            tags: whose.
            spans: of one event.
            cursor: the event's uid, which ``accepted`` is told with the last of them.
            accepted: is told, on another thread, what became of them.
        """
        if not self._enabled or not spans:
            return
        last = len(spans) - 1
        for number, span in enumerate(spans):
            self._take(tags, span, cursor if number == last else None, accepted)

    def export_now(self, tags: RunTags, spans: Sequence[Span]) -> bool:
        """Export spans and wait for the collector's answer: for a thread that may wait for as long as it takes.

        Returns:
            Whether the collector has them. With the host's own provider, whether they were handed over.
        """
        if not self._enabled or not self._ready.wait(10 * READY_SECONDS) or self._pipeline is None:
            return False
        pipeline = self._pipeline
        return pipeline.export_now([pipeline.convert(tags, span, None, None) for span in spans])

    def flush(self, seconds: float) -> bool:
        """Wait until what was submitted has been exported.

        The SDK's own flush does not keep its time-out, so it runs on a thread of its own.

        Args:
            seconds: at most.

        Returns:
            Whether nothing waits any more.
        """
        if not self._enabled:
            return True
        deadline = time.monotonic() + seconds
        if not self._ready.wait(seconds) or self._pipeline is None:
            return False
        with self._lock:
            thread = self._flushing
            if thread is None or not thread.is_alive():
                thread = self._flushing = threading.Thread(
                    target=self._pipeline.flush, name="flip-tracing-flush", daemon=True
                )
                thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
        return not thread.is_alive()

    @property
    def client_spans(self) -> ClientSpans | None:
        """Calls of ours as spans; None when nothing is exported. Waits while OpenTelemetry is imported, bounded."""
        if not self._enabled:
            return None
        self._ready.wait(READY_SECONDS)
        return self._client_spans

    def close(self, seconds: float = 2.0) -> None:
        """Stop our threads; what waits is exported first. The host's own provider is left alone."""
        self.flush(seconds)
        self._enabled = False
        if self._pipeline is not None:
            thread = threading.Thread(target=self._pipeline.close, name="flip-tracing-stop", daemon=True)
            thread.start()
            thread.join(seconds)

    def _take(self, tags: RunTags, span: Span, cursor: str | None, accepted: Accepted | None) -> None:
        with self._lock:
            if self._pipeline is None:
                if len(self._early) < MAX_EARLY:
                    self._early.append((tags, span, cursor, accepted))
                    return
                report("tracing", "QueueFull", "a span was dropped: OpenTelemetry is not ready yet")
                if accepted is not None:
                    accepted("", False)
                return
            self._hand_over(self._pipeline, tags, span, cursor, accepted)

    def _hand_over(
        self, pipeline: _Pipeline, tags: RunTags, span: Span, cursor: str | None, accepted: Accepted | None
    ) -> None:
        try:
            pipeline.take_folded(tags, span, cursor, accepted)
        except Exception as error:  # noqa: BLE001 - the host's processors are somebody else's code
            report("tracing", error, "a span could not be exported")

    def _build(self) -> None:
        try:
            pipeline = _host_pipeline(self._settings) or _own_pipeline(self._settings)
            from flip_observability.client_spans import ClientSpans

            client_spans = ClientSpans(
                self._emit,
                resource=pipeline.resource,
                clock=self._now,
                messages=self._settings.capture_exception_messages,
                secrets=self.secrets,
            )
            with self._lock:
                while self._early:
                    self._hand_over(pipeline, *self._early.popleft())
                self._pipeline, self._client_spans = pipeline, client_spans
        except _Off:
            self._give_up()
        except TracingError as error:
            report("tracing", error, f"{error} No spans are exported")
            self._give_up()
        except BaseException as error:  # noqa: BLE001 - a broken installation of OpenTelemetry must not cost the run
            report("tracing", error, "tracing cannot be set up; no spans are exported")
            self._give_up()
        finally:
            self._ready.set()

    def _now(self) -> float:
        return self.clock()

    def _give_up(self) -> None:
        with self._lock:
            self._enabled = False
            self._early.clear()

    def _emit(self, span: ReadableSpan) -> None:
        pipeline = self._pipeline
        if pipeline is not None and self._enabled:
            pipeline.take(span)


class _Off(Exception):  # noqa: N818 - no error: somebody wants no spans
    """The host's provider samples nothing, or is switched off."""


def _is_wanted() -> bool:
    """Whether there may be somewhere to export to, without importing anything."""
    if _value("OTEL_SDK_DISABLED").lower() == "true":
        return False
    if _value("OTEL_TRACES_SAMPLER").lower() in ("always_off", "parentbased_always_off"):
        return False
    if "opentelemetry.sdk.trace" in sys.modules and _host_provider() is not None:
        return True
    return _value("OTEL_TRACES_EXPORTER").lower() != "none" and any(_value(name) for name in _ENDPOINTS)


def _value(name: str) -> str:
    return os.environ.get(name, "").strip()


def _number(name: str, default: int) -> int:
    try:
        found = int(_value(name) or default)
    except ValueError:
        found = 0
    if found > 0:
        return found
    report("tracing", "BadSetting", f"{name} is no positive number; {default} is used")
    return default


def _host_provider() -> TracerProvider | None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    provider = trace.get_tracer_provider()
    return provider if isinstance(provider, TracerProvider) else None


# -- pipelines: where finished spans go --------------------------------------------------------------------------------


class _Pipeline:
    """A span processor, and what a span needs to be given to it."""

    def __init__(self, resource: Resource, processor: SpanProcessor) -> None:
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        self.resource = resource
        self._processor = processor
        self._scope = InstrumentationScope(SCOPE, version(DISTRIBUTION))

    def convert(self, tags: RunTags, span: Span, cursor: str | None, accepted: Accepted | None) -> ReadableSpan:
        """A folded span as OpenTelemetry's: ids and times as they are."""
        from opentelemetry.sdk.trace import Event, ReadableSpan
        from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

        trace_id, flags = trace_id_of(tags.run_id), TraceFlags(TraceFlags.SAMPLED)
        attributes = dict(span.attributes) | tags.attributes(span.name)
        if span.error is not None:
            attributes.setdefault("exception.type", span.error)
        converted = ReadableSpan(
            name=span.name,
            context=SpanContext(trace_id, span.span_id, is_remote=False, trace_flags=flags),
            parent=None
            if span.parent_id is None
            else SpanContext(trace_id, span.parent_id, is_remote=False, trace_flags=flags),
            resource=self.resource,
            attributes=clean(attributes),
            events=[Event(_text(name), clean(attrs), nanoseconds(when)) for name, when, attrs in span.events],
            status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, _text(span.error)),
            start_time=nanoseconds(span.start),
            end_time=nanoseconds(span.end),
            instrumentation_scope=self._scope,
        )
        if accepted is not None:
            converted._flip_fate = cursor, accepted  # type: ignore[attr-defined]
        return converted

    def take_folded(self, tags: RunTags, span: Span, cursor: str | None, accepted: Accepted | None) -> None:
        """Give a folded span to the processor."""
        self.take(self.convert(tags, span, cursor, accepted))

    def take(self, span: ReadableSpan) -> None:
        """Give it to the processor."""
        self._processor.on_end(span)
        _tell([span], True)  # what another's processor does with it cannot be known

    def export_now(self, spans: list[ReadableSpan]) -> bool:
        """Give them to the processor and have it send them."""
        for span in spans:
            self._processor.on_end(span)
        self.flush()
        return True

    def flush(self) -> None:
        """Have everything exported; takes as long as it takes."""
        self._processor.force_flush()

    def close(self) -> None:
        """Nothing: the processor is the host's."""


class _OwnPipeline(_Pipeline):
    """A batch processor of ours around an exporter, with a bound, and with an eye on what becomes of the spans."""

    def __init__(self, exporter: SpanExporter, resource: Resource) -> None:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanContext, TraceFlags

        self._limit = _number("OTEL_BSP_MAX_QUEUE_SIZE", MAX_QUEUE)
        self._waiting = 0
        self._count = threading.Lock()
        self._sampled = SpanContext(1, 1, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        self._checked = _checked(exporter, self._converted, self._after)
        processor = BatchSpanProcessor(
            self._checked,
            max_queue_size=self._limit,
            max_export_batch_size=min(_number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", MAX_BATCH), self._limit),
            schedule_delay_millis=_number("OTEL_BSP_SCHEDULE_DELAY", SCHEDULE_DELAY_MS),
        )
        super().__init__(resource, processor)

    def take_folded(self, tags: RunTags, span: Span, cursor: str | None, accepted: Accepted | None) -> None:
        # It becomes OpenTelemetry's on the exporting thread: the making costs more than the event's transaction.
        self.take(cast("ReadableSpan", _Folded(tags, span, self._sampled, (cursor, accepted))))

    def take(self, span: ReadableSpan) -> None:
        with self._count:
            full = self._waiting >= self._limit
            self._waiting += not full
        if full:
            report("tracing", "QueueFull", "spans were dropped: the collector does not take them fast enough")
            _tell([span], False)
            return
        self._processor.on_end(span)

    def _converted(self, spans: Sequence[ReadableSpan | _Folded]) -> list[ReadableSpan]:
        ready: list[ReadableSpan] = []
        for span in spans:
            try:
                ready.append(self.convert(span.tags, span.span, None, None) if isinstance(span, _Folded) else span)
            except Exception as error:  # noqa: BLE001, PERF203 - one span must not cost its batch
                report("tracing", error, "a span could not be exported")
        return ready

    def export_now(self, spans: list[ReadableSpan]) -> bool:
        from opentelemetry.sdk.trace.export import SpanExportResult

        with self._count:
            self._waiting += len(spans)
        return self._checked.export(spans) is SpanExportResult.SUCCESS

    def close(self) -> None:
        self._processor.shutdown()

    def _after(self, spans: Sequence[ReadableSpan], accepted: bool) -> None:
        with self._count:
            self._waiting -= len(spans)
        _tell(spans, accepted)


def _tell(spans: Sequence[ReadableSpan], accepted: bool) -> None:
    for span in spans:
        cursor, tell = getattr(span, "_flip_fate", (None, None))
        if tell is not None and (cursor is not None or not accepted):
            tell(cursor or "", accepted)


class _After(Protocol):
    def __call__(self, spans: Sequence[ReadableSpan], accepted: bool) -> None: ...


@dataclass(slots=True)
class _Folded:
    """A span on its way to the exporting thread. ``context`` is what the SDK's processor looks at."""

    tags: RunTags
    span: Span
    context: SpanContext
    _flip_fate: tuple[str | None, Accepted | None]


_Convert = Callable[[Sequence["ReadableSpan"]], "list[ReadableSpan]"]


def _checked(exporter: SpanExporter, convert: _Convert, after: _After) -> SpanExporter:
    """Wrap an exporter so that a batch that fails is counted, once, and logged by us and not by the SDK."""
    from opentelemetry.instrumentation.utils import suppress_instrumentation
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Checked(SpanExporter):
        def __init__(self) -> None:
            self._one_at_a_time = threading.Lock()

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result, kind = SpanExportResult.FAILURE, "ExportFailed"
            with self._one_at_a_time, _muted() as heard, suppress_instrumentation():
                try:
                    result = exporter.export(convert(spans))
                    kind = heard.kind or kind
                except Exception as error:  # noqa: BLE001 - whatever it is, the next batch may do better
                    kind = type(error).__name__
            accepted = result is SpanExportResult.SUCCESS
            if not accepted:
                report("tracing", kind, "spans were not accepted by the collector and are lost")
            after(spans, accepted)
            return result

        def shutdown(self) -> None:
            with _muted():
                exporter.shutdown()

        def force_flush(self, timeout_millis: int = 30_000) -> bool:
            return True

    return Checked()


def _host_pipeline(settings: Settings) -> _Pipeline | None:
    """The processors of the tracer provider that the host process has; None when it has none of the SDK's."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    provider = _host_provider()
    if provider is None:
        return None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Tracer

    tracer = provider.get_tracer(SCOPE, version(DISTRIBUTION))
    if not isinstance(tracer, Tracer) or tracer.sampler.get_description() == "AlwaysOffSampler":
        raise _Off
    resource = provider.resource.merge(Resource({"flip.net_id": settings.net_id}))
    return _Pipeline(resource, tracer.span_processor)


def _own_pipeline(settings: Settings) -> _Pipeline:
    return _OwnPipeline(_exporter(), _resource(settings))


def _resource(settings: Settings) -> Resource:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    given = OTELResourceDetector().detect().attributes
    ours = {"service.name": SERVICE_NAME, "service.version": version(DISTRIBUTION), "flip.net_id": settings.net_id}
    return Resource.create({name: value for name, value in ours.items() if name not in given})


def _exporter() -> SpanExporter:
    name = (_value("OTEL_TRACES_EXPORTER") or "otlp").partition(",")[0].strip()
    if name == "otlp":
        protocol = next(filter(None, map(_value, _PROTOCOLS)), "grpc")
        if protocol not in _OTLP_EXPORTERS:
            raise TracingError("OTEL_EXPORTER_OTLP_PROTOCOL is neither grpc nor http/protobuf.")
        name = _OTLP_EXPORTERS[protocol]
    found = list(entry_points(group=_EXPORTER_GROUP, name=name))
    if not found:
        raise TracingError("OTEL_TRACES_EXPORTER names no exporter that is installed.")
    make = found[0].load()
    with _muted():  # the SDK logs headers that it cannot read, with their values
        exporter: SpanExporter = make()
    return exporter


# -- quiet -------------------------------------------------------------------------------------------------------------


class _Heard(threading.local):
    """What the loggers of the SDK said on a thread of ours, instead of saying it to the log."""

    depth = 0
    kind: str | None = None


class _Mute(logging.Filter):
    """Keeps the records of threads that export for us out of the log; those of other users of the SDK pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not _heard.depth:
            return True
        arguments = record.args if isinstance(record.args, tuple) else ()
        _heard.kind = next(filter(None, map(_kind_of, arguments)), _heard.kind)
        return False


_heard = _Heard()
_mute = _Mute()


@contextmanager
def _muted() -> Iterator[_Heard]:
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] in _NOISY and isinstance(logger, logging.Logger) and _mute not in logger.filters:
            # In front: the SDK's filter against repetitions must not take another's record for a repetition of ours.
            logger.filters.insert(0, _mute)
    _heard.depth += 1
    _heard.kind = None
    try:
        yield _heard
    finally:
        _heard.depth -= 1


def _kind_of(argument: object) -> str | None:
    """What went wrong, in a word that cannot hold data: a gRPC status, an HTTP status, or an exception's type."""
    if isinstance(argument, BaseException):
        return type(argument).__name__
    if isinstance(argument, int) and 400 <= argument < 600:
        return f"HTTP {int(argument)}"
    name = getattr(argument, "name", None)
    return name if isinstance(name, str) and type(argument).__name__ == "StatusCode" else None


def scrub(text: str, secrets: tuple[str, ...]) -> str:
    """A text, shortened, without the given secrets and those of AWS in this process's environment."""
    for secret in (*secrets, *(os.environ.get(name, "") for name in _SECRET_VARIABLES)):
        if len(secret) >= 4:
            text = text.replace(secret, "***")
    return text[:MAX_TEXT]


# -- values ------------------------------------------------------------------------------------------------------------


def nanoseconds(epoch_seconds: float) -> int:
    """A time as OpenTelemetry has it."""
    return max(0, round(epoch_seconds * 1e9))


def clean(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that can be encoded: one that cannot would cost its whole batch."""
    return {name: _clean(value) for name, value in attributes.items()}


def _clean(value: Any) -> Any:
    if isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if -_INT64 <= value < _INT64 else str(value)
    return _text(value)


def _text(value: object) -> str:
    return str(value).encode("utf-8", "replace").decode()[:MAX_TEXT]

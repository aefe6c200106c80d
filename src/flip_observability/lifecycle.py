"""What an event means: the table from event to status and span, and the fold of events into a run's state.

Pure: no I/O, no clock, no NVFLARE. The job process folds events as they happen; the observer and the command line fold
the same events again from the ledger and come to the same state. A new event is a new row of :data:`TABLE`.
"""

from __future__ import annotations

import hashlib
import statistics
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

from flip_observability.constants import FINAL_STATUSES, FlareEvents, FlipEvents, ModelStatus, OwnEvents

Scalar: TypeAlias = "str | int | float | bool"

RUN, WORKFLOW, TRAINING, ROUND = "flip.run", "flip.workflow", "flip.training", "flip.round"
CLIENT_TASK, AGGREGATION, MODEL_PERSIST = "flip.client_task", "flip.aggregation", "flip.model_persist"
RESULTS_UPLOAD = "flip.results_upload"

ORPHANED = "ORPHANED"
"""The error of a span whose process died before it could end it."""

MAX_OPEN_TASKS = 5_000
"""Client tasks remembered at once; beyond it the oldest is closed, so that a run cannot grow the server."""
MAX_SPAN_EVENTS = 120
"""Events kept on one span (OpenTelemetry keeps 128); what is beyond is in the ledger only."""
MAX_CLIENTS = 10_000
FIRST_ROUND_STALL_SECONDS = 1_800.0

_PARENTS: dict[str, tuple[str, ...]] = {
    RUN: (),
    WORKFLOW: (RUN,),
    TRAINING: (WORKFLOW, RUN),
    ROUND: (WORKFLOW, RUN),
    CLIENT_TASK: (ROUND, WORKFLOW, RUN),
    AGGREGATION: (ROUND, WORKFLOW, RUN),
    MODEL_PERSIST: (ROUND, WORKFLOW, RUN),
    RESULTS_UPLOAD: (RUN,),
}
_INSTANT_PARENTS = (WORKFLOW, RUN)

_RANK = {ModelStatus.PENDING: 0, ModelStatus.INITIATED: 1, ModelStatus.PREPARED: 2, ModelStatus.TRAINING_STARTED: 3}
_RANK |= {ModelStatus.RUNNING: 3} | dict.fromkeys(FINAL_STATUSES, 4)

_SPAN_ATTRIBUTES = {
    "workflow": "flip.workflow",
    "round": "flip.round",
    "total_rounds": "flip.total_rounds",
    "client": "flip.client",
    "task": "flip.task",
    "return_code": "flip.return_code",
    "status": "flip.status",
    "bytes": "flip.results.bytes",
    "files": "flip.results.files",
    "uri": "flip.results.uri",
    "exception_type": "exception.type",
    "exception_message": "exception.message",
}
"""Event attribute → span attribute of the telemetry catalogue. What is not here stays in the ledger."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Args:
        name: NVFLARE's, FLIP's or our own event name.
        time: when, in seconds since the epoch.
        attrs: what is known about it: ``client``, ``task``, ``task_id``, ``round`` (1-based), …
        uid: unique within the ledger, so that the same event is never recorded twice.
    """

    name: str
    time: float
    attrs: Mapping[str, Scalar] = field(default_factory=dict)
    uid: str = field(default_factory=lambda: uuid.uuid4().hex[:16])


@dataclass(frozen=True)
class Span:
    """A finished span: everything its export needs, and nothing that must be asked for later."""

    name: str
    span_id: int
    parent_id: int | None
    start: float
    end: float
    attributes: Mapping[str, Scalar]
    events: tuple[tuple[str, float, Mapping[str, Scalar]], ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class HubEvent:
    """A round event for hubs that take them (contract 2026-10)."""

    event_type: str
    round: int
    details: Mapping[str, Scalar]
    client: str | None = None
    success: bool = True


Fact: TypeAlias = "tuple[str, float, dict[str, str]]"
"""What a metric counts: (name, value, labels). Stored with its event, so that a metric never needs a run's state."""


@dataclass
class Effects:
    """What one event causes."""

    status: ModelStatus | None = None
    final: bool = False
    facts: list[Fact] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    hub_events: list[HubEvent] = field(default_factory=list)
    problems: dict[str, float] = field(default_factory=dict)


@dataclass
class _OpenSpan:
    name: str
    key: str
    span_id: int
    parent: str | None
    start: float
    latest: float
    attributes: dict[str, Scalar]
    events: list[tuple[str, float, Mapping[str, Scalar]]] = field(default_factory=list)
    error: str | None = None


class Ending(str, Enum):
    """How a run ends, before the contract's spelling of it is chosen; also the intent written before the upload."""

    ERROR = "ERROR"
    ABORT_UNRESOLVED = "ABORT_UNRESOLVED"
    UPLOAD_FAILED = "UPLOAD_FAILED"
    UPLOAD_PENDING = "UPLOAD_PENDING"
    RESULTS_UPLOADED = "RESULTS_UPLOADED"


class UploadOutcome(str, Enum):
    """What came of the persist component's ``execute``."""

    PENDING = "pending"
    UPLOADED = "uploaded"
    UPLOAD_FAILED = "upload_failed"
    FAILED = "failed"


_OUTCOME_ENDING = {
    UploadOutcome.PENDING: Ending.UPLOAD_PENDING,
    UploadOutcome.UPLOADED: Ending.RESULTS_UPLOADED,
    UploadOutcome.UPLOAD_FAILED: Ending.UPLOAD_FAILED,
    UploadOutcome.FAILED: Ending.ERROR,
}


def decide_ending(*, fatal: bool, aborted: bool, all_tasks_failed: bool, outcome: UploadOutcome) -> Ending:
    """Rule 3 of the lifecycle: first match wins.

    With ``UploadOutcome.PENDING`` the result is the *intent* that the ledger holds before the upload starts.
    """
    if fatal:
        return Ending.ERROR
    if aborted:
        return Ending.ABORT_UNRESOLVED
    if all_tasks_failed:
        return Ending.ERROR
    return _OUTCOME_ENDING[outcome]


def derive_span_id(run_id: str, key: str) -> int:
    """The span id of (run, event): the same in every process that folds the run."""
    value = int.from_bytes(hashlib.sha256(f"{run_id}/{key}".encode()).digest()[:8], "big")
    return value or 1


@dataclass(frozen=True)
class Transition:
    """One row of the table.

    Args:
        status: what the hub is told, unless the run is past it.
        instant: a span without duration.
        opens: a span that begins here.
        closes: spans that end here (with everything inside them).
        mark: the innermost of these open spans gets the event.
        log: the line that FLIP's users look for in the server's log.
        then: what else it changes.
    """

    status: ModelStatus | None = None
    instant: str | None = None
    opens: str | None = None
    closes: tuple[str, ...] = ()
    mark: tuple[str, ...] = ()
    log: str | None = None
    then: Callable[[RunState, Event, Effects], None] | None = None


@dataclass
class RunState:
    """A run as its events tell it. ``apply`` one event after the other; nothing else changes it."""

    run_id: str
    started: bool = False
    about_to_end: bool = False
    ended: bool = False
    fatal: bool = False
    aborted: bool = False
    upload_failed: bool = False
    status: ModelStatus | None = None
    final_status: ModelStatus | None = None
    first_event: float | None = None
    last_event: float | None = None
    workflow: str | None = None
    round: int | None = None
    total_rounds: int | None = None
    round_results: int | None = None
    problems: dict[str, float] = field(default_factory=dict)
    clients: set[str] = field(default_factory=set)
    _round_clients: set[str] = field(default_factory=set)
    _round_returned: int = 0
    _round_expected: int | None = None
    _round_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=101))
    _stall_after: float | None = None
    _open: dict[str, _OpenSpan] = field(default_factory=dict)
    _late: dict[str, _OpenSpan] = field(default_factory=dict)

    @property
    def stall_after(self) -> float:
        """Seconds without an event after which the run counts as stalled."""
        if self._stall_after is None:  # computed when a round has ended, not with every event
            seconds = self._round_seconds
            self._stall_after = 3 * statistics.median(seconds) if seconds else FIRST_ROUND_STALL_SECONDS
        return self._stall_after

    @property
    def open_spans(self) -> tuple[str, ...]:
        """Names of the spans that have begun and not ended."""
        return tuple(span.name for span in self._open.values())

    @property
    def current_span_id(self) -> int | None:
        """The id of the span that what happens now belongs to; None before the first event."""
        for name in (RESULTS_UPLOAD, ROUND, WORKFLOW, RUN):
            span = self._open.get(name)
            if span is not None:
                return span.span_id
        return None

    @property
    def upload_span_id(self) -> int | None:
        """The id of the span of the upload that is under way."""
        span = self._open.get(RESULTS_UPLOAD)
        return span.span_id if span is not None else None

    def is_premature_end(self) -> bool:
        """Rule 2: an END_RUN now would be one that a controller fired in the middle of a run."""
        return self.started and not self.about_to_end

    def apply(self, event: Event) -> Effects:
        """Fold one event into the state and say what it causes."""
        effects = Effects()
        row = TABLE.get(event.name)
        if row is None or self.ended:
            return effects
        if self.first_event is None:
            self.first_event = event.time
        self.last_event = max(event.time, self.last_event or event.time)
        if RUN not in self._open:
            self._begin(RUN, event, RUN)
        if event.name == FlareEvents.END_RUN and self.is_premature_end():
            self._fail(event, effects, "EndRunWithoutAboutToEndRun")
            return effects
        self._follow_workflow(event, effects)
        self._follow_row(row, event, effects)
        self.problems.update(effects.problems)
        return effects

    def _follow_row(self, row: Transition, event: Event, effects: Effects) -> None:
        for name in row.closes:
            self._finish(name, event, effects)
        if row.status is not None:
            self._advance(row.status, effects)
        if row.opens is not None:
            self._begin(row.opens, event)
        if row.instant is not None:
            self._instant(row.instant, event, effects)
        self._mark(row.mark, event)
        if row.then is not None:
            row.then(self, event, effects)

    # -- statuses ----------------------------------------------------------------------------------------------------

    def _advance(self, status: ModelStatus, effects: Effects) -> None:
        if self.final_status is None and _RANK[status] > _RANK.get(self.status or ModelStatus.PENDING, 0):
            self.status = status
            effects.status = status

    def _finalise(self, status: ModelStatus, event: Event, effects: Effects) -> None:
        if self.final_status is not None:
            return
        self.final_status = self.status = status
        effects.status, effects.final = status, True
        seconds = max(0.0, event.time - (self.first_event or event.time))
        effects.facts += [
            ("run_finished", 1, {"status": status.value}),
            ("run_duration", seconds, {"status": status.value}),
        ]
        if status is ModelStatus.STOPPED:
            effects.facts.append(("abort", 1, {}))
            effects.problems["aborted"] = event.time
        root = self._open.get(RUN)
        if root is not None:
            root.attributes["flip.status"] = status.value
            if status in (ModelStatus.ERROR, ModelStatus.RESULTS_UPLOAD_FAILED):
                root.error = root.error or status.value

    def _fail(self, event: Event, effects: Effects, kind: str) -> None:
        if not self.fatal:
            self.fatal = True
            effects.facts.append(("fatal_error", 1, {}))
            effects.problems["fatal_error"] = event.time
        root = self._open[RUN]
        root.error = root.error or kind
        self._mark((RUN,), Event("fatal_error", event.time, {"exception_type": kind}))
        self.problems.update(effects.problems)

    # -- spans -------------------------------------------------------------------------------------------------------

    def _follow_workflow(self, event: Event, effects: Effects) -> None:
        workflow = event.attrs.get("workflow")
        if not isinstance(workflow, str) or (workflow == self.workflow and event.name != FlareEvents.START_WORKFLOW):
            return
        if WORKFLOW in self._open and self._open[WORKFLOW].attributes.get("flip.workflow") == workflow:
            return
        self._finish(WORKFLOW, event, effects)
        self.workflow = workflow
        self.round = self.total_rounds = self.round_results = None
        self._begin(WORKFLOW, Event(event.name, event.time, {"workflow": workflow}, event.uid), f"{event.uid}/workflow")

    def _parent(self, name: str) -> _OpenSpan | None:
        for parent in _PARENTS.get(name, _INSTANT_PARENTS):
            if parent in self._open:
                return self._open[parent]
        return None

    def _begin(self, name: str, event: Event, id_key: str | None = None, key: str | None = None) -> None:
        key = key or name
        if key in self._open:
            return
        parent = self._parent(name)
        start = max(event.time, parent.start) if parent else event.time
        self._open[key] = _OpenSpan(
            name=name,
            key=key,
            span_id=derive_span_id(self.run_id, id_key or event.uid),
            parent=parent.key if parent else None,
            start=start,
            latest=start,
            attributes=_span_attributes(event.attrs),
        )

    def _finish(self, key: str, event: Event, effects: Effects) -> _OpenSpan | None:
        span = self._open.get(key)
        if span is None:
            return None
        for child in [k for k, s in self._open.items() if s.parent == key]:
            self._finish(child, event, effects)
        del self._open[key]
        end = max(event.time, span.latest)
        if span.name == CLIENT_TASK and event.name != FlareEvents.BEFORE_PROCESS_SUBMISSION:
            self._remember_late(span)
        if event.name in _CLOSING_ATTRIBUTES:
            span.attributes.update(_span_attributes(event.attrs))
        if span.name == ROUND:
            self._round_over(span, event, end, effects)
        elif span.name == AGGREGATION:
            effects.facts.append(("aggregation_duration", end - span.start, {}))
        self._emit(span, end, effects)
        return span

    def _emit(self, span: _OpenSpan, end: float, effects: Effects) -> None:
        parent = self._open.get(span.parent) if span.parent else None
        if parent is not None:
            parent.latest = max(parent.latest, end)
        effects.spans.append(
            Span(
                name=span.name,
                span_id=span.span_id,
                parent_id=parent.span_id if parent else None,
                start=span.start,
                end=end,
                attributes=span.attributes,
                events=tuple(span.events),
                error=span.error,
            )
        )

    def _instant(self, name: str, event: Event, effects: Effects) -> None:
        self._begin(name, event)
        span = self._open.pop(name)
        self._emit(span, span.start, effects)

    def _mark(self, names: tuple[str, ...], event: Event) -> None:
        for name in names:
            span = self._open.get(name)
            if span is not None:
                if len(span.events) < MAX_SPAN_EVENTS:
                    when = max(event.time, span.start)
                    span.latest = max(span.latest, when)
                    span.events.append((event.name.lstrip("_"), when, _span_attributes(event.attrs)))
                return

    def _remember_late(self, span: _OpenSpan) -> None:
        self._late[span.key] = span
        if len(self._late) > MAX_OPEN_TASKS:
            self._late.pop(next(iter(self._late)))

    def _round_over(self, span: _OpenSpan, event: Event, end: float, effects: Effects) -> None:
        seconds = end - span.start
        self._round_seconds.append(seconds)
        self._stall_after = None
        self.round_results = self._round_returned
        effects.facts.append(("round_duration", seconds, {}))
        relay = span.attributes.pop("relay", False)
        # Only its own event says that a round was aggregated: what else closes it may have cut it off.
        if relay and self.round is not None and event.name == FlareEvents.ROUND_DONE:
            expected = len(self._round_clients) if self._round_expected is None else self._round_expected
            counts: dict[str, Scalar] = {"returned": self._round_returned, "expected": expected}
            counts |= {key: event.attrs[key] for key in counts if key in event.attrs}
            effects.hub_events.append(HubEvent("ROUND_AGGREGATED", self.round, counts))

    # -- for the ledger ----------------------------------------------------------------------------------------------

    def columns(self) -> dict[str, Any]:
        """The run's row in the ledger, as far as events tell it."""
        return {
            "status": self.status.value if self.status else None,
            "started": self.first_event,
            "last_event": self.last_event,
            "ended": int(self.ended),
            "workflow": self.workflow,
            "round": self.round,
            "total_rounds": self.total_rounds,
            "clients": len(self.clients),
            "round_results": self.round_results,
            "stall_after": self.stall_after,
        }


def fold(run_id: str, events: Iterable[Event]) -> RunState:
    """The state of a run from its events."""
    state = RunState(run_id)
    for event in events:
        state.apply(event)
    return state


def _span_attributes(attrs: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return {name: attrs[key] for key, name in _SPAN_ATTRIBUTES.items() if key in attrs}


def _text(event: Event, key: str) -> str:
    return str(event.attrs.get(key, ""))


def _on_start(state: RunState, event: Event, effects: Effects) -> None:
    if not state.started:
        state.started = True
        effects.facts.append(("run_started", 1, {}))


def _on_round(state: RunState, event: Event, effects: Effects) -> None:
    number, total = event.attrs.get("round"), event.attrs.get("total_rounds")
    state.round = int(number) if isinstance(number, int | float) else (state.round or 0) + 1
    if isinstance(total, int | float):
        state.total_rounds = int(total)
    state._round_clients, state._round_returned = set(), 0
    expected = event.attrs.get("expected")
    state._round_expected = expected if isinstance(expected, int) else None
    span = state._open[ROUND]
    span.attributes["flip.round"] = state.round
    if state.total_rounds is not None:
        span.attributes["flip.total_rounds"] = state.total_rounds
    if event.attrs.get("relay"):
        span.attributes["relay"] = True  # taken out again before the span is exported
        details: dict[str, Scalar] = {} if state.total_rounds is None else {"total_rounds": state.total_rounds}
        effects.hub_events.append(HubEvent("ROUND_STARTED", state.round, details))


def _on_task_assigned(state: RunState, event: Event, effects: Effects) -> None:
    client, task_id = _text(event, "client"), _text(event, "task_id")
    if client and len(state.clients) < MAX_CLIENTS:
        state.clients.add(client)
        state._round_clients.add(client)
    if not task_id:
        return
    tasks = [key for key, span in state._open.items() if span.name == CLIENT_TASK] if len(state._open) > 64 else []
    if len(tasks) >= MAX_OPEN_TASKS:
        state._finish(tasks[0], event, effects)
    state._begin(CLIENT_TASK, event, key=f"{CLIENT_TASK}:{task_id}")
    if state.round is not None and ROUND in state._open:
        state._open[f"{CLIENT_TASK}:{task_id}"].attributes["flip.round"] = state.round


def _on_task_returned(state: RunState, event: Event, effects: Effects) -> None:
    key = f"{CLIENT_TASK}:{_text(event, 'task_id')}"
    span = state._open.get(key)
    code = _text(event, "return_code")
    if span is not None and code not in ("", "OK"):
        span.error = code
    span = state._finish(key, event, effects) or state._late.pop(key, None)
    if span is not None:
        labels = {
            "client": str(span.attributes.get("flip.client", "")),
            "task": str(span.attributes.get("flip.task", "")),
        }
        effects.facts.append(("client_task_duration", max(0.0, event.time - span.start), labels))


def _on_contribution(state: RunState, event: Event, effects: Effects) -> None:
    if not event.attrs.get("accepted", True):
        return
    state._round_returned += 1
    if event.attrs.get("relay") and state.round is not None:
        size = event.attrs.get("size_bytes", 0)
        client = _text(event, "client") or None
        effects.hub_events.append(HubEvent("CLIENT_RESULT_RECEIVED", state.round, {"size_bytes": size}, client))


def _on_fatal(state: RunState, event: Event, effects: Effects) -> None:
    state._fail(event, effects, _text(event, "exception_type") or "FATAL_SYSTEM_ERROR")


def _on_abort(state: RunState, event: Event, effects: Effects) -> None:
    if not state.fatal and not state.aborted:
        state.aborted = True
        state._mark((RUN,), Event("abort", event.time))


def _on_about_to_end(state: RunState, event: Event, effects: Effects) -> None:
    state.about_to_end = True
    if event.attrs.get("aborted") is True:
        _on_abort(state, event, effects)


def _on_upload_completed(state: RunState, event: Event, effects: Effects) -> None:
    span = state._finish(RESULTS_UPLOAD, event, effects)
    if span is not None:
        effects.facts.append(("upload_duration", max(0.0, event.time - span.start), {}))
    size = event.attrs.get("bytes")
    if isinstance(size, int | float):
        effects.facts.append(("upload_size", float(size), {}))


def _on_upload_failed(state: RunState, event: Event, effects: Effects) -> None:
    span = state._open.get(RESULTS_UPLOAD)
    if span is not None:
        span.error = _text(event, "exception_type") or "ResultsUploadError"
        span.attributes.update(_span_attributes(event.attrs))
    state._finish(RESULTS_UPLOAD, event, effects)
    if not state.upload_failed:
        state.upload_failed = True
        effects.facts.append(("upload_failure", 1, {"reason": _text(event, "reason") or "other"}))
        effects.problems["upload_failed"] = event.time


def _on_orphaned(state: RunState, event: Event, effects: Effects) -> None:
    if "orphaned" not in state.problems:
        effects.facts.append(("orphaned", 1, {}))
        effects.problems["orphaned"] = event.time
    state._mark((RUN,), Event("orphaned", event.time))
    state._open[RUN].error = state._open[RUN].error or ORPHANED
    _cut_off(state, event, effects)


def _cut_off(state: RunState, event: Event, effects: Effects) -> None:
    """The process is gone, and with it everything below the root ended, when it died."""
    died = event.attrs.get("died")
    when = min(event.time, died) if isinstance(died, int | float) else event.time
    end = Event(event.name, when, {}, event.uid)
    for span in state._open.values():
        if span.name != RUN:
            span.error = span.error or ORPHANED
    for key in [key for key, span in state._open.items() if span.parent == RUN]:
        state._finish(key, end, effects)


def _on_status(state: RunState, event: Event, effects: Effects) -> None:
    status = _text(event, "status")
    if status in FINAL_STATUSES:
        state._finalise(ModelStatus(status), event, effects)
    elif status in _RANK:
        state._advance(ModelStatus(status), effects)


def _on_end(state: RunState, event: Event, effects: Effects) -> None:
    _on_status(state, event, effects)
    if state.final_status is None:
        # An abort that only the observer can judge, or an upload that it goes on with: all other work is over, and the
        # run waits for its final status.
        for key in [key for key, span in state._open.items() if span.parent == RUN]:
            state._finish(key, event, effects)
        return
    state._finish(RUN, event, effects)
    state.ended = True


_CLOSING_ATTRIBUTES = frozenset(
    {FlareEvents.BEFORE_PROCESS_SUBMISSION.value, FlipEvents.RESULTS_UPLOAD_COMPLETED.value}
)
"""Events whose own attributes belong to the span that they close."""

_ROUND_OR_WORKFLOW = (ROUND, WORKFLOW, RUN)

TABLE: dict[str, Transition] = {
    FlareEvents.START_RUN.value: Transition(log="Start run event received", then=_on_start),
    FlipEvents.TRAINING_INITIATED.value: Transition(
        status=ModelStatus.INITIATED, instant="flip.training_initiated", log="Training initiated event received"
    ),
    FlipEvents.TASK_INITIATED.value: Transition(
        status=ModelStatus.TRAINING_STARTED, instant="flip.task_initiated", log="Task initiated event received"
    ),
    FlareEvents.INITIAL_MODEL_LOADED.value: Transition(
        status=ModelStatus.PREPARED, instant="flip.initial_model_loaded", log="Initial model loaded event received"
    ),
    FlareEvents.TRAINING_STARTED.value: Transition(
        status=ModelStatus.TRAINING_STARTED, opens=TRAINING, log="Training started event received"
    ),
    FlareEvents.TRAINING_FINISHED.value: Transition(closes=(TRAINING,), log="Training finished event received"),
    FlareEvents.START_WORKFLOW.value: Transition(),
    FlareEvents.END_WORKFLOW.value: Transition(closes=(WORKFLOW,)),
    FlareEvents.ROUND_STARTED.value: Transition(closes=(ROUND,), opens=ROUND, then=_on_round),
    FlareEvents.ROUND_DONE.value: Transition(closes=(ROUND,)),
    FlareEvents.AFTER_TASK_DATA_FILTER.value: Transition(then=_on_task_assigned),
    FlareEvents.BEFORE_PROCESS_SUBMISSION.value: Transition(then=_on_task_returned),
    FlareEvents.AFTER_CONTRIBUTION_ACCEPT.value: Transition(mark=_ROUND_OR_WORKFLOW, then=_on_contribution),
    FlareEvents.BEFORE_AGGREGATION.value: Transition(opens=AGGREGATION),
    FlareEvents.AFTER_AGGREGATION.value: Transition(closes=(AGGREGATION,)),
    # ScatterAndGather never fires AFTER_AGGREGATION: what follows it closes it.
    FlareEvents.BEFORE_LEARNABLE_PERSIST.value: Transition(closes=(AGGREGATION,), opens=MODEL_PERSIST),
    FlareEvents.AFTER_LEARNABLE_PERSIST.value: Transition(closes=(MODEL_PERSIST,)),
    FlareEvents.GLOBAL_BEST_MODEL_AVAILABLE.value: Transition(mark=_ROUND_OR_WORKFLOW),
    FlareEvents.VALIDATION_RESULT_RECEIVED.value: Transition(mark=_ROUND_OR_WORKFLOW),
    FlipEvents.SEND_RESULT.value: Transition(mark=_ROUND_OR_WORKFLOW),
    FlareEvents.CLIENT_DISCONNECTED.value: Transition(mark=(RUN,)),
    FlareEvents.CLIENT_RECONNECTED.value: Transition(mark=(RUN,)),
    FlareEvents.FATAL_SYSTEM_ERROR.value: Transition(log="Fatal system error event received", then=_on_fatal),
    FlipEvents.ABORTED.value: Transition(log="Aborted event received", then=_on_abort),
    FlipEvents.RESULTS_UPLOAD_STARTED.value: Transition(opens=RESULTS_UPLOAD),
    FlipEvents.RESULTS_UPLOAD_COMPLETED.value: Transition(
        log="Results upload completed event received", then=_on_upload_completed
    ),
    FlareEvents.ABOUT_TO_END_RUN.value: Transition(then=_on_about_to_end),
    FlareEvents.END_RUN.value: Transition(log="End run event received", then=_on_end),
    OwnEvents.UPLOAD_FAILED.value: Transition(then=_on_upload_failed),
    OwnEvents.ORPHANED.value: Transition(then=_on_orphaned),
    # A status that code of the job gave to the client itself; and a final one that the sentinel or an operator chose.
    OwnEvents.STATUS.value: Transition(then=_on_status),
    OwnEvents.FINAL_STATUS.value: Transition(then=_on_end),
}
"""The table of the lifecycle. An event that is not in it costs one look-up."""

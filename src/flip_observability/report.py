"""What a person sees of the ledger: from its rows to runs, rounds, client times and statuses.

Pure: no I/O and no clock. Tables and ``--json`` are made from the same objects; times are aware datetimes in UTC.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from flip_observability.constants import NO_HUB, FlareEvents, ModelStatus, OwnEvents
from flip_observability.ledger import OutboxRow
from flip_observability.lifecycle import CLIENT_TASK, RESULTS_UPLOAD, ROUND, Effects, Event, RunState, Span
from flip_observability.utils import safe_text

safe = safe_text
"""Every text from a run goes through this before it is shown."""

OPEN, CUT_OFF, DONE, FAILED, LATE = "open", "cut off", "done", "failed", "late"

FRUITLESS = frozenset({"rejected", "expired", "dropped"})
"""States of an outbox row that the hub never took, and that may be tried again."""

_DELIVERED = {NO_HUB: "no hub"}
"""How it is called that a row was delivered, where what answered was not the hub."""
_RUN_OVER = frozenset({FlareEvents.END_RUN.value, OwnEvents.FINAL_STATUS.value, OwnEvents.ORPHANED.value})
_ROUND_OVER = frozenset({FlareEvents.ROUND_STARTED.value, FlareEvents.ROUND_DONE.value})


# -- what is shown ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubAnswer:
    """What became of one message to the hub.

    Args:
        state: ``accepted``, ``no hub`` (there was none to ask), ``pending``, ``rejected``, ``expired``, ``superseded``,
            ``dropped``, or ``not sent``.
        at: when that was settled; None while it is pending.
        attempts: how often it was sent.
        next_attempt: when a pending one is due, if it has to wait.
        answer: what the hub said last: a number or a word.
    """

    state: str
    at: datetime | None = None
    attempts: int = 0
    next_attempt: datetime | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Receipt:
    """Where a run's results are, and how to check them."""

    uri: str
    bytes: int | None
    files: int | None
    crc32: str | None


@dataclass(frozen=True)
class RunLine:
    """One run in a line. ``seconds`` is its duration so far, up to its final status."""

    run_id: str
    job_id: str | None
    model_id: str | None
    net_id: str | None
    run_dir: str | None
    status: str | None
    final: bool
    final_by: str | None
    created: datetime | None
    started: datetime | None
    last_event: datetime | None
    finished: datetime | None
    seconds: float | None
    workflow: str | None
    round: int | None
    total_rounds: int | None
    clients: int | None
    problems: dict[str, datetime | None]
    hub: HubAnswer
    results: Receipt | None


@dataclass(frozen=True)
class StatusLine:
    """A status that the run reached, and whether the hub knows. ``hub_status`` is how its contract spells it."""

    status: str
    time: datetime | None
    final: bool
    hub: HubAnswer
    hub_status: str


@dataclass(frozen=True)
class RoundLine:
    """A round. ``returned`` counts accepted contributions, ``clients`` those that were given a task."""

    workflow: str | None
    round: int | None
    total_rounds: int | None
    started: datetime | None
    seconds: float
    returned: int | None
    clients: int
    state: str


@dataclass(frozen=True)
class TaskLine:
    """A client's task, timed from its assignment to its return."""

    client: str
    task: str
    round: int | None
    started: datetime | None
    seconds: float
    state: str
    return_code: str | None


@dataclass(frozen=True)
class ClientLine:
    """A client's tasks together. ``slowest_round`` is the round of the longest of them."""

    client: str
    tasks: int
    median_seconds: float | None
    slowest_seconds: float | None
    slowest_round: int | None
    failed: int
    unfinished: int


@dataclass(frozen=True)
class UploadLine:
    """One attempt to upload the results."""

    started: datetime | None
    seconds: float
    state: str
    reason: str | None


@dataclass(frozen=True)
class EventLine:
    """An event of the timeline. ``offset`` is in seconds since the first."""

    time: datetime | None
    offset: float
    name: str
    attrs: dict[str, Any]


@dataclass(frozen=True)
class RunReport:
    """Everything that the ledger knows about one run."""

    run: RunLine
    statuses: list[StatusLine]
    rounds: list[RoundLine]
    clients: list[ClientLine]
    tasks: list[TaskLine]
    uploads: list[UploadLine]
    events: list[EventLine]


@dataclass(frozen=True)
class OutboxLine:
    """A message to the hub. The text of a log is not part of it: it can hold patient data."""

    id: int
    run_id: str | None
    model_id: str
    kind: str
    content: dict[str, Any]
    final: bool
    created: datetime | None
    hub: HubAnswer


# -- from the ledger's rows ------------------------------------------------------------------------------------------


def run_line(run: Mapping[str, Any], outbox: Iterable[OutboxRow], now: float) -> RunLine:
    """One run in a line.

    Args:
        run: the ledger's row.
        outbox: the run's status rows (others are ignored).
        now: epoch seconds; a run without a final status lasts until then.
    """
    final = run["final_status"]
    started = run["started"]
    finished = run["final_time"] if final else None
    end = now if finished is None else finished
    statuses = [row for row in outbox if row.kind == "status"]
    return RunLine(
        **{name: run[name] for name in ("run_id", "job_id", "model_id", "net_id", "run_dir", "final_by")},
        **{name: run[name] for name in ("workflow", "round", "total_rounds", "clients")},
        status=final or run["status"],
        final=final is not None,
        created=moment(run["created"]),
        started=moment(started),
        last_event=moment(run["last_event"]),
        finished=moment(finished),
        seconds=None if started is None else max(0.0, end - started),
        problems={kind: moment(when) for kind, when in run["problems"].items()},
        hub=hub_answer(statuses[-1]) if statuses else HubAnswer("not sent"),
        results=_receipt(run),
    )


def run_report(
    run: Mapping[str, Any],
    events: Iterable[Mapping[str, Any]],
    outbox: Iterable[OutboxRow],
    now: float,
    spelling: Callable[[str], str] = str,
) -> RunReport:
    """Everything about one run, by folding its events again.

    Args:
        run: the ledger's row.
        events: the run's events, in the order in which they were written.
        outbox: the run's rows of the outbox.
        now: epoch seconds; what has not ended yet is measured up to then.
        spelling: gives the hub's word for a status of ours; the same when there is none.
    """
    rows = list(outbox)
    folded = _Folded(str(run["run_id"]))
    for item in events:
        folded.add(Event(item["name"], item["time"], item["attrs"], item["uid"]))
    folded.close(now if run["final_status"] is None else run["final_time"], cut_off=run["final_status"] is not None)
    return RunReport(
        run=run_line(run, rows, now),
        statuses=_status_lines(folded.statuses, rows, spelling),
        rounds=folded.round_lines(),
        clients=_client_lines(folded.tasks),
        tasks=folded.tasks,
        uploads=folded.uploads,
        events=folded.events,
    )


def outbox_line(row: OutboxRow) -> OutboxLine:
    """A row of the outbox as it may be shown."""
    content = dict(row.payload)
    if row.kind == "log":
        content = {name: value for name, value in content.items() if name in ("client", "client_name", "success")}
    return OutboxLine(
        id=row.id,
        run_id=row.run_id,
        model_id=row.model_id,
        kind=row.kind,
        content=content,
        final=row.final,
        created=moment(row.created),
        hub=hub_answer(row),
    )


def hub_answer(row: OutboxRow) -> HubAnswer:
    """What became of a row of the outbox."""
    pending = row.state == "pending"
    return HubAnswer(
        state=_DELIVERED.get(row.outcome or "", "accepted") if row.state == "delivered" else row.state,
        at=None if pending else moment(row.done),
        attempts=row.attempts,
        next_attempt=moment(row.next_attempt) if pending and row.next_attempt > 0 else None,
        answer=row.outcome,
    )


def overtaken(row: OutboxRow, statuses: Iterable[OutboxRow]) -> bool:
    """Whether sending this row again would take the hub back to a status that it is past.

    Args:
        row: the row in question.
        statuses: all status rows of the ledger, or of the row's model.
    """
    if row.kind != "status":
        return False
    later = [other for other in statuses if other.model_id == row.model_id and other.id > row.id]
    return any(other.state not in FRUITLESS or (other.final and other.state != "dropped") for other in later)


def moment(epoch_seconds: float | None) -> datetime | None:
    """An aware datetime in UTC; None for what is no point in time."""
    if epoch_seconds is None:
        return None
    try:
        return datetime.fromtimestamp(epoch_seconds, timezone.utc)
    except (ValueError, OverflowError, OSError):
        return None


def _receipt(run: Mapping[str, Any]) -> Receipt | None:
    if not run["results_uri"]:
        return None
    return Receipt(run["results_uri"], run["results_bytes"], run["results_files"], run["results_crc32"])


def _status_lines(
    reached: list[tuple[ModelStatus, float, bool]], outbox: list[OutboxRow], spelling: Callable[[str], str]
) -> list[StatusLine]:
    """Join the statuses that the events tell with what the hub was told: each may know more than the other."""
    rows = [row for row in outbox if row.kind == "status"]
    lines: list[tuple[float, StatusLine]] = []
    for status, when, final in reached:
        row = next((row for row in rows if row.payload.get("status") == status.value), None)
        if row is not None:
            rows.remove(row)
        answer = hub_answer(row) if row else HubAnswer("not sent")
        lines.append((when, StatusLine(status.value, moment(when), final, answer, spelling(status.value))))
    for row in rows:
        told = str(row.payload.get("status"))
        line = StatusLine(told, moment(row.created), row.final, hub_answer(row), spelling(told))
        lines.append((row.created, line))
    return [line for _, line in sorted(lines, key=lambda item: item[0])]


def _client_lines(tasks: list[TaskLine]) -> list[ClientLine]:
    by_client: dict[str, list[TaskLine]] = {}
    for task in tasks:
        by_client.setdefault(task.client, []).append(task)
    lines = [_client_line(client, own) for client, own in by_client.items()]
    return sorted(
        lines, key=lambda line: (-(math.inf if line.median_seconds is None else line.median_seconds), line.client)
    )


def _client_line(client: str, tasks: list[TaskLine]) -> ClientLine:
    returned = [task for task in tasks if task.state in (DONE, LATE, FAILED)]
    slowest = max(returned, key=lambda task: task.seconds, default=None)
    return ClientLine(
        client=client,
        tasks=len(tasks),
        median_seconds=statistics.median(task.seconds for task in returned) if returned else None,
        slowest_seconds=slowest.seconds if slowest else None,
        slowest_round=slowest.round if slowest else None,
        failed=sum(task.state == FAILED for task in tasks),
        unfinished=len(tasks) - len(returned),
    )


@dataclass
class _Folded:
    """Collects, while a run's events are folded, what the state itself has no need to remember."""

    run_id: str
    events: list[EventLine] = field(default_factory=list)
    statuses: list[tuple[ModelStatus, float, bool]] = field(default_factory=list)
    tasks: list[TaskLine] = field(default_factory=list)
    uploads: list[UploadLine] = field(default_factory=list)
    _rounds: list[tuple[Span, int | None, str]] = field(default_factory=list)
    _workflows: dict[int, str] = field(default_factory=dict)
    _clients: dict[int, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._state = RunState(self.run_id)

    def add(self, event: Event) -> None:
        effects = self._state.apply(event)
        start = self._state.first_event
        offset = 0.0 if start is None else event.time - start
        self.events.append(EventLine(moment(event.time), offset, event.name.lstrip("_"), dict(event.attrs)))
        if effects.status is not None:
            self.statuses.append((effects.status, event.time, effects.final))
        self._take(event, effects, unfinished=CUT_OFF)

    def close(self, now: float, *, cut_off: bool) -> None:
        """Show what has not ended too: as open in a run that goes on, as cut off in one that is over."""
        end = Event(OwnEvents.FINAL_STATUS.value, max(now, self._state.last_event or now))
        self._take(end, self._state.apply(end), unfinished=CUT_OFF if cut_off else OPEN)

    def round_lines(self) -> list[RoundLine]:
        return [
            RoundLine(
                workflow=self._workflows.get(span.parent_id or 0),
                round=_number(span, "flip.round"),
                total_rounds=_number(span, "flip.total_rounds"),
                started=moment(span.start),
                seconds=span.end - span.start,
                returned=returned,
                clients=len(self._clients.get(span.span_id, ())),
                state=state,
            )
            for span, returned, state in self._rounds
        ]

    def _take(self, event: Event, effects: Effects, unfinished: str) -> None:
        over = event.name in _RUN_OVER
        stopped = over or ((self._state.fatal or self._state.aborted) and event.name not in _ROUND_OVER)
        for span in effects.spans:
            if span.name == ROUND:
                self._rounds.append((span, self._state.round_results, unfinished if stopped else DONE))
            elif span.name == CLIENT_TASK:
                self._take_task(span, event, unfinished)
            elif span.name == RESULTS_UPLOAD:
                self._take_upload(span, event, unfinished if over else DONE)
            elif "flip.workflow" in span.attributes:
                self._workflows[span.span_id] = str(span.attributes["flip.workflow"])
        if event.name == FlareEvents.BEFORE_PROCESS_SUBMISSION.value and not effects.spans:
            self._take_late_task(effects)

    def _take_task(self, span: Span, event: Event, unfinished: str) -> None:
        client = str(span.attributes.get("flip.client", ""))
        self._clients.setdefault(span.parent_id or 0, set()).add(client)
        state = FAILED if span.error else DONE
        code = span.attributes.get("flip.return_code")
        self.tasks.append(
            TaskLine(
                client=client,
                task=str(span.attributes.get("flip.task", "")),
                round=_number(span, "flip.round"),
                started=moment(span.start),
                seconds=span.end - span.start,
                state=state if event.name == FlareEvents.BEFORE_PROCESS_SUBMISSION.value else unfinished,
                return_code=None if code is None else str(code),
            )
        )

    def _take_late_task(self, effects: Effects) -> None:
        """A result after its round was over: the span was closed with the round, the true time is a fact."""
        for name, seconds, labels in effects.facts:
            wanted = (labels.get("client"), labels.get("task"), CUT_OFF)
            for index, task in enumerate(self.tasks):
                if name == "client_task_duration" and (task.client, task.task, task.state) == wanted:
                    self.tasks[index] = dataclasses.replace(task, seconds=seconds, state=LATE)
                    break

    def _take_upload(self, span: Span, event: Event, state: str) -> None:
        reason = event.attrs.get("reason") if event.name == OwnEvents.UPLOAD_FAILED.value else None
        self.uploads.append(
            UploadLine(
                started=moment(span.start),
                seconds=span.end - span.start,
                state=FAILED if span.error else state,
                reason=None if reason is None else str(reason),
            )
        )


def _number(span: Span, name: str) -> int | None:
    value = span.attributes.get(name)
    return value if isinstance(value, int) else None


# -- text ------------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """JSON of the objects above: ISO times, and nothing that a terminal would obey."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=True, allow_nan=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN
    return value


def local_time(when: datetime | None) -> str:
    """Date and time of day on this machine's clock, to the second."""
    return when.astimezone().strftime("%Y-%m-%d %H:%M:%S") if when else "-"


def duration(seconds: float | None) -> str:
    """A duration as a person says it."""
    if seconds is None:
        return "-"
    if seconds < 59.95:  # what would be shown as 60.0 s is a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(index for index, (number, _) in enumerate(parts) if number)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2])


def size(count: int | None) -> str:
    """A number of bytes as a person says it."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"

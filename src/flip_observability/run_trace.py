"""The trace of one run in the process that records it, and what is left of it when that process is gone."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flip_observability.constants import OwnEvents
from flip_observability.errors import report
from flip_observability.ledger import Entry, Ledger, LedgerBusyError, LedgerError
from flip_observability.lifecycle import RUN, Effects, Event, RunState, Span
from flip_observability.process import ProcessIdentity, current_process
from flip_observability.tracing import MAX_BATCH, RunTags, Tracing, has_trace, scrub, trace_id_of

IDLE_SECONDS = 0.5
"""How long the root waits for calls that are under way, so that they lie within it."""
CLAIM_PAUSE_SECONDS = 0.05
GONE_SECONDS = 120.0
"""A process that cannot be seen from here is gone when its heartbeat is older than this."""
REMAINS_SECONDS = 86_400.0
"""How old a run may be whose trace is still completed."""
PAGE = 5_000


class RunTrace:
    """Exports a run's spans as they are folded, and its root once, at the very end.

    Args:
        tags: whose trace.
        tracing: where the spans go.
        clock: epoch seconds, the recorder's.
    """

    def __init__(self, tags: RunTags, tracing: Tracing, clock: Callable[[], float]) -> None:
        self._tags = tags
        self._tracing = tracing
        self._clock = clock
        self._root: tuple[Span, str] | None = None
        self._lock = threading.Lock()
        self._accepted: str | None = None
        self._noted: str | None = None
        self._hole = False
        self._traceable = has_trace(tags.run_id)
        self._trace_id = f"{trace_id_of(tags.run_id):032x}" if self._traceable else ""
        self._log_ids: tuple[str, str] | None = None
        if tracing.enabled:
            tracing.clock = clock

    @property
    def enabled(self) -> bool:
        """Whether spans of this run are exported."""
        return self._traceable and self._tracing.enabled

    def add(self, event: Event, effects: Effects, state: RunState) -> None:
        """Export what an event finished; the root waits for :meth:`finish`. Call it in the order of the events."""
        current = state.current_span_id
        self._log_ids = (self._trace_id, f"{current:016x}") if current is not None and self._traceable else None
        if not effects.spans or not self.enabled:
            return
        spans = [span for span in effects.spans if span.name != RUN]
        if len(spans) < len(effects.spans):
            self._root = effects.spans[-1], event.uid
        self._tracing.submit(self._tags, spans, event.uid, self._note)

    def log_ids(self) -> tuple[str, str] | None:
        """Trace and span id for a log record that is made now."""
        return self._log_ids

    def scrubbed(self, text: str) -> str:
        """A message that may be recorded, without secrets."""
        return scrub(text, self._tracing.secrets)

    def news(self) -> str | None:
        """The event up to which the collector has all spans, when that has changed since the last call."""
        with self._lock:
            if self._accepted == self._noted:
                return None
            self._noted = self._accepted
            return self._noted

    @contextmanager
    def within(self, parent_id: int | None) -> Iterator[None]:
        """Our calls in here are spans below the given one, or below the root."""
        spans = self._tracing.client_spans if self._traceable else None
        if spans is None:
            yield
            return
        with spans.within(self._tags.run_id, parent_id):
            yield

    def finish(self, claim: Callable[[], bool], deadline: float) -> None:
        """Export the root, if the run has ended and nobody else does, and wait for the collector.

        Args:
            claim: whether it is ours to export; asked again, until the deadline, while the ledger is busy.
            deadline: of the monotonic clock.
        """
        if not self.enabled:
            return
        if self._root is not None:
            self._wait_for_calls(deadline)
            if _until(claim, deadline):
                root, uid = self._root
                ended = dataclasses.replace(root, end=max(root.end, self._clock()))
                self._tracing.submit(self._tags, [ended], uid, self._note)
            self._root = None
        self._tracing.flush(max(0.0, deadline - time.monotonic()))

    def _wait_for_calls(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        spans = self._tracing.client_spans if left > 0 else None
        if spans is not None:
            spans.wait_idle(min(IDLE_SECONDS, left))

    def _note(self, uid: str, accepted: bool) -> None:
        with self._lock:
            # What comes after a failed batch is not told: whoever completes the trace begins at the hole.
            self._hole = self._hole or not accepted
            if not self._hole:
                self._accepted = uid


def _until(claim: Callable[[], bool], deadline: float) -> bool:
    while True:
        try:
            return claim()
        except LedgerError as error:  # noqa: PERF203 - to ask again is the point
            if not isinstance(error, LedgerBusyError) or time.monotonic() + CLAIM_PAUSE_SECONDS >= deadline:
                report("tracing", error, "cannot claim the run's root span; it is left to the observer")
                return False
            time.sleep(CLAIM_PAUSE_SECONDS)


# -- for the observer --------------------------------------------------------------------------------------------------


def complete_traces(
    ledger: Ledger,
    tracing: Tracing,
    *,
    now: float | None = None,
    is_gone: Callable[[dict[str, Any]], bool] | None = None,
) -> int:
    """Complete the traces of all runs that have a final status, no root span, and no process any more.

    For the observer's own thread: it takes as long as the collector takes. What the collector does not accept is tried
    again with the next call, for a day.

    Args:
        ledger: a connection of the caller's thread.
        tracing: where the spans go; when nothing is exported, nothing is done.
        now: epoch seconds.
        is_gone: whether a run's process is gone, from its row; by process identity and heartbeat when None.

    Returns:
        How many traces were completed.
    """
    if not tracing.enabled:
        return 0
    now = time.time() if now is None else now
    gone = is_gone or (lambda run: _is_gone(run, now))
    done = 0
    for run in ledger.untraced_runs(now - REMAINS_SECONDS):
        try:
            if gone(run):
                done += complete_trace(ledger, run["run_id"], tracing)
        except LedgerError:  # noqa: PERF203 - one damaged run may not hold up those behind it
            raise
        except Exception as error:  # noqa: BLE001 - a damaged history can raise anything
            report("tracing", error, f"the trace of run {run['run_id']} cannot be completed")
    return done


def complete_trace(ledger: Ledger, run_id: str, tracing: Tracing) -> bool:
    """Export what a process that is gone left of a run's trace: the root, the spans that were open, and those finished
    ones that the collector had not accepted. Exactly one caller does it, in whichever process.

    Call it when the run has its final status. Spans that were open end when the run's ``OwnEvents.ORPHANED`` says that
    the process died (its attribute ``died``, epoch seconds), with the error ``ORPHANED``.

    Returns:
        Whether they were exported. False when somebody else does, nothing is exported, or the collector refused.
    """
    run = ledger.run(run_id)
    if (
        run is None
        or not has_trace(run_id)
        or not tracing.enabled
        or not ledger.claim_root(run_id, current_process().token())
    ):
        return False
    try:
        done = _export_rest(ledger, run, tracing)
    except Exception:
        _give_back(ledger, run_id)
        raise
    if not done:
        _give_back(ledger, run_id)
    return done


def _export_rest(ledger: Ledger, run: dict[str, Any], tracing: Tracing) -> bool:
    run_id = run["run_id"]
    tags = RunTags(run_id, run["job_id"] or "", run["model_id"], run["net_id"] or "default")
    rest: list[Span] = []
    root: Span | None = None
    for uid, spans in _unaccepted(ledger, run):
        rest += [span for span in spans if span.name != RUN]
        root = next((span for span in spans if span.name == RUN), root)
        if len(rest) >= MAX_BATCH:
            if not tracing.export_now(tags, rest):
                return False
            rest = []
            ledger.append(Entry(run_id, time.time(), run={"spans_accepted": uid}))
    return tracing.export_now(tags, [*rest, *([root] if root else [])])


def _unaccepted(ledger: Ledger, run: dict[str, Any]) -> Iterator[tuple[str, list[Span]]]:
    """Event by event, the spans of a run that the collector does not have yet; the root in any case."""
    state = RunState(run["run_id"])
    accepted = run["spans_accepted"]
    known = accepted is not None and _has_event(ledger, run["run_id"], accepted)
    for event in _history(ledger, run):
        spans = state.apply(event).spans
        yield event.uid, [span for span in spans if span.name == RUN] if known else spans
        known = known and event.uid != accepted


def _history(ledger: Ledger, run: dict[str, Any]) -> Iterator[Event]:
    for row in _event_rows(ledger, run["run_id"]):
        yield Event(row["name"], row["time"], row["attrs"], row["uid"])
    # A final status that no event told, or whose event came before the run's real end; ignored after that.
    final = run["final_status"]
    if final is not None:
        yield Event(OwnEvents.FINAL_STATUS.value, run["final_time"], {"status": final}, "")


def _event_rows(ledger: Ledger, run_id: str) -> Iterator[dict[str, Any]]:
    after = 0
    while rows := ledger.events(run_id, after=after, limit=PAGE):
        yield from rows
        after = rows[-1]["id"]


def _has_event(ledger: Ledger, run_id: str, uid: str) -> bool:
    return any(row["uid"] == uid for row in _event_rows(ledger, run_id))


def _give_back(ledger: Ledger, run_id: str) -> None:
    ledger.append(Entry(run_id, time.time(), run={"root_claimed": None}))


def _is_gone(run: dict[str, Any], now: float) -> bool:
    if run["boot_id"] is None:
        return True  # it never had one
    alive = ProcessIdentity(run["boot_id"], run["pid_ns"], run["pid"], run["start_ticks"]).is_alive_as_job()
    return now - (run["heartbeat"] or 0.0) > GONE_SECONDS if alive is None else not alive

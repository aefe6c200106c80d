"""The recorder: one event in, one ledger transaction out, and nobody waits for a ledger that is busy or broken."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip_observability.constants import OwnEvents
from flip_observability.errors import drain, report
from flip_observability.hub import CONTRACTS, Dispatcher, Transport, transport_for
from flip_observability.ledger import (
    FL_THREAD_BUSY_MS,
    RUN_COLUMNS,
    Entry,
    Ledger,
    LedgerBusyError,
    LedgerCorruptError,
    LedgerError,
    OutboxItem,
    set_aside,
)
from flip_observability.lifecycle import Effects, Event, RunState, Scalar
from flip_observability.links import LinkWatcher
from flip_observability.log_ids import keep_secrets_out, put_on_records, take_off_records
from flip_observability.process import current_process
from flip_observability.run_trace import RunTrace
from flip_observability.settings import Settings
from flip_observability.spool import Spool, take_spools
from flip_observability.tracing import RunTags, Tracing, shared

HEARTBEAT_SECONDS = 10.0
SPOOL_SECONDS = 60.0
SPANS_SECONDS = 1.0
PENDING_SECONDS = 0.02
CHECKPOINT_SECONDS = 1.0
CHECKPOINT_EVENTS = 250
"""Events after which the writer thread moves the ledger's write-ahead log into its file."""
UNTRACED = "untraced"
"""Who has claimed the root span of a run that was recorded where nothing is exported."""
STALLED_SECONDS = 10.0
STALLED_AFTER_ABORT_SECONDS = 4.0
"""How long END_RUN waits for a bucket that takes no byte. NVFLARE ends the process some 10 s after an abort."""
FORGET_SECONDS = 3_600.0
REOPEN_SECONDS = 5.0
MAX_BACKLOG = 10_000
"""Entries kept in memory while the ledger cannot be written; beyond it, those without a status go first."""


@dataclass(frozen=True)
class RunIdentity:
    """Whose run it is. ``run_id`` is a UUID, ``model_id`` None when nothing tells it.

    ``not_its_models`` are models that something in the job names although it belongs to ``model_id``: no status goes
    to them from here.
    """

    run_id: str
    job_id: str = ""
    model_id: str | None = None
    net_id: str = "default"
    run_dir: str = ""
    not_its_models: frozenset[str] = frozenset()


class RunRecorder:
    """Records a run: folds each event, writes it with what it causes, and sees that the hub is told.

    Safe to call from any number of threads. :meth:`record` waits at most 50 ms for a busy ledger; then this and what
    follows goes through a queue, in order, to a thread of our own. When the ledger cannot be written at all, statuses
    go to the hub from memory, and a spool file beside the ledger keeps them.

    Args:
        identity: the run.
        settings: of this server.
        directory: the ledger's folder.
        transport: how the hub is reached; from the settings when None.
        tell_hub: False when somebody else delivers the statuses (a client object that the job brought).
        clock: epoch seconds.
        tracing: where its spans go; the process's own when None.
    """

    def __init__(
        self,
        identity: RunIdentity,
        settings: Settings,
        directory: Path,
        *,
        transport: Transport | None = None,
        tell_hub: bool = True,
        clock: Callable[[], float] = time.time,
        tracing: Tracing | None = None,
    ) -> None:
        self.identity = identity
        self.settings = settings
        self.directory = directory
        self.tell_hub = tell_hub
        self.contract = CONTRACTS[settings.hub_contract]
        self.finalised_elsewhere = False
        self.is_aborted: Callable[[], bool] = lambda: False
        tracing = tracing or shared(settings)
        self._transport = transport or transport_for(settings, tracing)
        # Wall time at the start, then the monotonic clock: a clock that is set in mid-run makes no negative durations.
        self._clock_offset = clock() - time.monotonic()
        self._state = RunState(identity.run_id)
        tags = RunTags(identity.run_id, identity.job_id, identity.model_id, identity.net_id)
        self.trace = RunTrace(tags, tracing, self.now)
        keep_secrets_out()
        put_on_records(self.trace.log_ids)
        self._lock = threading.Lock()
        self._backlog: deque[Entry] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._ledger: Ledger | None = None
        self._dispatcher: Dispatcher | None = None
        self._dispatcher_ledger: Ledger | None = None
        self._fallback: _Fallback | None = None
        self._spool = Spool(directory)
        self._links = LinkWatcher(directory)
        self._final_uid: str | None = None
        self._due = [0.0] * len(_CHORES)
        self._unmoved = 0
        self._open()
        self._writer = threading.Thread(target=self._write_loop, name="flip-ledger-writer", daemon=True)
        self._writer.start()

    # -- what the handler uses ---------------------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        """The run as recorded so far. For reading."""
        return self._state

    @property
    def ledger_writable(self) -> bool:
        """Whether events reach the ledger (possibly through the queue)."""
        return self._fallback is None

    def now(self) -> float:
        """Epoch seconds on a clock that never goes backwards."""
        return self._clock_offset + time.monotonic()

    def record(self, name: str, attrs: Mapping[str, Scalar] | None = None, *, final_by: str = "job") -> Effects:
        """Record one event. Never raises, never waits for longer than 50 ms.

        Args:
            name: the event.
            attrs: what is known about it.
            final_by: who chose the final status that the event may carry.

        Returns:
            What the event caused; ``effects.status`` is None when the run had been finalised by another process.
        """
        with self._lock:
            event = Event(name, self.now(), attrs or {})
            effects = self._state.apply(event)
            entry = self._entry(event, effects, final_by)
            self.trace.add(event, effects, self._state)
            if not self._write(entry):
                self.finalised_elsewhere = True
                effects.status = None
        if entry.outbox:
            self._nudge()
        return effects

    def set_columns(self, **columns: Any) -> None:
        """Set columns of the run's row that no event tells: the intent, an upload's id, a receipt."""
        with self._lock:
            self._write(Entry(self.identity.run_id, self.now(), run=columns))

    def note(self, problem: str) -> None:
        """Write a problem into the run's row that no event tells."""
        with self._lock:
            now = self.now()
            self._write(Entry(self.identity.run_id, now, problems={problem: now}))

    def post(self, kind: str, model_id: str, payload: dict[str, Any], final: bool) -> None:
        """Tell the hub something on behalf of the job's own code (the sink of :class:`flip_observability.client.FLIP`).

        Raises:
            ValueError: a status of a model that the run does not belong to, though something in the job names it.
        """
        if kind == "status" and model_id in self.identity.not_its_models:
            raise ValueError("not the model of this run")
        if kind == "status" and model_id == self.identity.model_id:
            self.record(OwnEvents.STATUS, {"status": str(payload["status"])}, final_by="client")
            return
        with self._lock:
            self._write(Entry(self.identity.run_id, self.now(), outbox=(OutboxItem(model_id, kind, payload, final),)))
        self._nudge()

    def multipart(self, key: str, upload_id: str) -> None:
        """Remember an upload in progress, so that a killed one can be aborted."""
        self.set_columns(upload_key=key, upload_id=upload_id or None)

    def look_for_links(self) -> None:
        """Have links in the run's directory written down, on a thread of its own, for whoever may salvage it."""
        if self.identity.run_dir:
            self._links.want(self.identity.run_id, Path(self.identity.run_dir))

    def has_judge(self) -> bool:
        """Whether somebody watches this ledger whom the server's parent process tells how jobs end."""
        return self._is_watched(Ledger.live_judge)

    def has_observer(self) -> bool:
        """Whether somebody watches this ledger who can bring results and end the run."""
        return self._is_watched(Ledger.live_observer)

    def _is_watched(self, by: Callable[[Ledger, float], str | None]) -> bool:
        with self._lock:
            if self._fallback is not None or self._ledger is None or not self._ledger.is_current():
                return False
            try:
                return by(self._ledger, time.time()) is not None
            except LedgerError as error:
                report("ledger", error, "cannot see whether an observer lives; taken as no")
                return False

    def stalled_after(self) -> float:
        """Seconds without a byte taken after which END_RUN gives an upload up."""
        return STALLED_AFTER_ABORT_SECONDS if self._state.aborted or self.is_aborted() else STALLED_SECONDS

    def upload_context(self) -> AbstractContextManager[None]:
        """In which the results are uploaded: calls of the bucket are spans below the upload's."""
        return self.trace.within(self._state.upload_span_id)

    def catch_up(self, seconds: float) -> None:
        """Let the hub have what waits for it, before a final status overtakes all of it.

        Args:
            seconds: that this may take.
        """
        self._wait_for_the_rest(time.monotonic() + seconds)

    def finish(self, seconds: float) -> bool:
        """Give the hub until the deadline to accept the final status, then the collector the spans.

        What is not accepted by then stays in the ledger, or in the spool, for the observer.

        Returns:
            Whether the hub has accepted it.
        """
        deadline = time.monotonic() + seconds
        delivered = self._deliver_final(seconds, deadline)
        self.trace.finish(self._claim_root, deadline)
        self._record_errors()
        if delivered:
            self._wait_for_the_rest(deadline)
        return delivered

    def _wait_for_the_rest(self, deadline: float) -> None:
        """Let metrics and events follow the final status: without an observer nobody else would send them soon."""
        while time.monotonic() < deadline and self._has_pending():
            time.sleep(PENDING_SECONDS)

    def _has_pending(self) -> bool:
        with self._lock:
            ledger = self._fallback.ledger if self._fallback is not None else self._ledger
            try:
                return bool(ledger and ledger.outbox(run_id=self.identity.run_id, states=["pending"], limit=1))
            except LedgerError as error:
                report("ledger", error, "cannot see what still waits for the hub; it is not waited for")
                return False

    def _deliver_final(self, seconds: float, deadline: float) -> bool:
        with self._wake:
            self._wake.notify_all()
            if not self._wake.wait_for(lambda: not self._backlog, timeout=seconds / 2):
                self._degrade("LedgerBusy")
        self._record_errors()
        dispatcher = self._active_dispatcher()
        if self._final_uid is None or dispatcher is None:
            return self._final_uid is None
        delivered = dispatcher.wait_for(self._final_uid, max(0.0, deadline - time.monotonic()))
        if delivered and self._fallback is not None:
            self._fallback.note_delivered()
        return delivered

    def close(self) -> None:
        """Stop the threads. What is in the outbox stays there."""
        take_off_records(self.trace.log_ids)
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._writer.join(timeout=2.0)
        for dispatcher in (self._dispatcher, self._fallback.dispatcher if self._fallback else None):
            if dispatcher is not None:
                dispatcher.stop(1.0)
        if self._fallback is None:
            self._spool.remove()

    # -- entries -----------------------------------------------------------------------------------------------------

    def _entry(self, event: Event, effects: Effects, final_by: str) -> Entry:
        outbox: list[OutboxItem] = []
        model_id = self.identity.model_id
        if self.tell_hub and model_id is not None and not self.finalised_elsewhere:
            if effects.status is not None:
                outbox.append(OutboxItem(model_id, "status", {"status": effects.status.value}, effects.final))
            if self.contract.takes_events:
                for item in effects.hub_events:
                    payload = vars(item) | {"details": dict(item.details)}
                    outbox.append(OutboxItem(model_id, "event", payload))
        if effects.final and outbox:
            self._final_uid = outbox[0].uid
        columns = self._state.columns()
        if effects.final and not self.trace.enabled:
            columns["root_claimed"] = UNTRACED  # no observer that has somewhere to export to need look after it
        return Entry(
            run_id=self.identity.run_id,
            time=event.time,
            event=event,
            facts=tuple(effects.facts),
            run=columns,
            problems=effects.problems,
            final_status=effects.status.value if effects.final and effects.status else None,
            final_by=final_by if effects.final else None,
            outbox=tuple(outbox),
        )

    def _registration(self) -> Entry:
        identity = self.identity
        columns = {
            "job_id": identity.job_id,
            "model_id": identity.model_id,
            "net_id": identity.net_id,
            "run_dir": identity.run_dir,
            "contract": self.settings.hub_contract,
            "heartbeat": self.now(),
        }
        return Entry(identity.run_id, self.now(), run=columns | current_process().columns())

    # -- writing -----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._ledger = Ledger.open_or_replace(self.directory, busy_ms=FL_THREAD_BUSY_MS)
            self._start_dispatcher()
        except LedgerError as error:
            report("ledger", error, f"{error} Statuses go to the hub from memory; other history of this run is at risk")
            self._degrade(type(error).__name__)
        self._write(self._registration())

    def _start_dispatcher(self) -> None:
        self._dispatcher_ledger = Ledger(self.directory)
        self._dispatcher = Dispatcher(self._dispatcher_ledger, self._transport, self.settings)
        self._dispatcher.start()

    def _write(self, entry: Entry) -> bool:
        """Write an entry, or queue it. Only a caller that holds ``_lock`` may call it. False: another one finalised."""
        if self._fallback is not None:
            return self._fallback.append(entry)
        if not self._backlog and self._ledger is not None:
            try:
                won = self._ledger.append(entry)
                self._unmoved += 1
                return won
            except LedgerBusyError:
                pass
            except Exception as error:  # noqa: BLE001 - whatever the ledger has, the run goes on
                self._fail(error, self._ledger)
                return self._write(entry)
        self._queue(entry)
        return True

    def _fail(self, error: Exception, ledger: Ledger | None) -> None:
        report("ledger", error, "cannot write the ledger; statuses go to the hub from memory")
        if isinstance(error, LedgerCorruptError) and ledger is not None:
            try:
                set_aside(self.directory, ledger.inode)
            except OSError as problem:
                report("ledger", problem, "cannot set the damaged ledger aside")
        self._degrade(type(error).__name__)

    def _queue(self, entry: Entry) -> None:
        with self._wake:
            if self._fallback is not None:
                self._fallback.append(entry)
                return
            if len(self._backlog) >= MAX_BACKLOG:
                report("recorder", "BacklogFull", "an event was dropped: the ledger has been busy for too long")
                if not entry.durable:
                    return
            self._backlog.append(entry)
            self._wake.notify_all()

    def _write_loop(self) -> None:
        ledger: Ledger | None = None
        if self._fallback is None:
            self._spool.reserve()
        while not self._closed:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or bool(self._backlog), timeout=1.0)
            try:
                if ledger is None or self._is_stale(ledger) or self._is_stale(self._ledger):
                    ledger = self._reopen(ledger)
                if ledger is None:
                    continue
                self._drain(ledger)
                self._do_chores(ledger)
            except LedgerBusyError:
                continue
            except Exception as error:  # noqa: BLE001 - this thread must live as long as the run
                self._fail(error, ledger)
                ledger = None

    def _do_chores(self, ledger: Ledger) -> None:
        for number, (seconds, chore) in enumerate(_CHORES):
            if time.monotonic() >= self._due[number]:
                self._due[number] = time.monotonic() + seconds
                chore(self, ledger)

    def _beat(self, ledger: Ledger) -> None:
        ledger.append(Entry(self.identity.run_id, self.now(), run={"heartbeat": self.now()}))
        self._record_errors()

    def _checkpoint(self, ledger: Ledger) -> None:
        if self._unmoved >= CHECKPOINT_EVENTS:  # it waits for the disk, which the threads of the run need not
            self._unmoved = 0
            ledger.checkpoint()

    def _take_spools(self, ledger: Ledger) -> None:
        if ledger.live_observer(self.now()) is not None:
            return  # it does so itself, and two would get into each other's way
        take_spools(ledger, self.directory, self.now())
        ledger.checkpoint()

    def _forget(self, ledger: Ledger) -> None:
        if ledger.live_observer(self.now()) is not None:
            return
        from flip_observability._fold import MetricsFold  # not wanted by most runs

        # Only what has been counted may go, and there need not be an observer that counts.
        try:
            MetricsFold(ledger).catch_up()
        except LedgerError:
            raise
        except Exception as error:  # noqa: BLE001 - metrics may not keep the history from being written
            report("metrics", error, "cannot count events; history that is not counted is kept")
        ledger.forget_before(self.now() - self.settings.retention_days * 86_400)

    @staticmethod
    def _is_stale(ledger: Ledger | None) -> bool:
        return ledger is not None and not ledger.is_current()

    def _drain(self, ledger: Ledger) -> None:
        while self._backlog:
            entry = self._backlog[0]
            if not ledger.append(entry):
                self.finalised_elsewhere = True
            with self._wake:
                if self._backlog and self._backlog[0] is entry:
                    self._backlog.popleft()
                self._wake.notify_all()
            if entry.outbox:
                self._nudge()

    def _reopen(self, old: Ledger | None) -> Ledger | None:
        """(Re)open the ledger for the writer thread; after a failure, move everybody back onto the disk."""
        if old is None and self._fallback is None and not self._is_stale(self._ledger):
            return Ledger(self.directory)
        try:
            ledger = Ledger.open_or_replace(self.directory)
            ledger.append(self._registration())
        except LedgerError:
            with self._wake:
                self._wake.wait_for(lambda: self._closed, timeout=REOPEN_SECONDS)
            return None
        fallback, dispatcher = self._fallback, self._dispatcher
        if fallback is not None:
            fallback.dispatcher.stop(15.0)
        if dispatcher is not None:
            dispatcher.stop(15.0)
        with self._lock:
            if self._ledger is not None and self._is_stale(self._ledger):
                _carry_over(self.identity.run_id, self._ledger, ledger)
            for entry in fallback.entries if fallback else ():
                ledger.append(entry)
            if fallback is not None:
                ledger.mark_delivered(fallback.delivered(), self.now())
                fallback.spool.remove()
                self._spool = Spool(self.directory)
                self._spool.reserve()
            for stale in (old, self._ledger, self._dispatcher_ledger):
                if stale is not None:
                    stale.close()
            self._ledger = Ledger(self.directory, busy_ms=FL_THREAD_BUSY_MS)
            self._start_dispatcher()
            self._fallback = None
        return ledger

    def _degrade(self, kind: str) -> None:
        """From now on work from memory. What waits in the queue comes along."""
        with self._wake:
            if self._fallback is None:
                fallback = _Fallback(self._spool, self._transport, self.settings)
                fallback.append(self._registration())
                self._fallback = fallback
                report("recorder", kind, "works from memory until the ledger can be written again")
            while self._backlog:
                self._fallback.append(self._backlog.popleft())
            self._wake.notify_all()

    def _record_errors(self) -> None:
        counts = drain()
        if counts:
            facts = tuple(("observability_error", float(n), {"component": c}) for c, n in counts.items())
            event = Event(OwnEvents.OBSERVABILITY_ERRORS.value, self.now(), {"count": sum(counts.values())})
            with self._lock:
                self._write(Entry(self.identity.run_id, self.now(), event, facts))

    def _claim_root(self) -> bool:
        """Whether the run's root span is ours to export.

        Raises:
            LedgerError: it cannot be said now.
        """
        token = current_process().token()
        with self._lock:
            if self._fallback is not None:
                return self._fallback.append(Entry(self.identity.run_id, self.now(), run={"root_claimed": token}))
            # Who finalised the run knows its status better than what was folded here.
            if self.finalised_elsewhere or self._ledger is None:
                return False
            return self._ledger.claim_root(self.identity.run_id, token)

    def _note_spans(self, ledger: Ledger) -> None:
        uid = self.trace.news()
        if uid is not None:
            ledger.append(Entry(self.identity.run_id, self.now(), run={"spans_accepted": uid}))

    def _active_dispatcher(self) -> Dispatcher | None:
        return self._fallback.dispatcher if self._fallback is not None else self._dispatcher

    def _nudge(self) -> None:
        dispatcher = self._active_dispatcher()
        if dispatcher is not None:
            dispatcher.nudge()


_CHORES = (
    (SPANS_SECONDS, RunRecorder._note_spans),
    (CHECKPOINT_SECONDS, RunRecorder._checkpoint),
    (HEARTBEAT_SECONDS, RunRecorder._beat),
    (SPOOL_SECONDS, RunRecorder._take_spools),
    (FORGET_SECONDS, RunRecorder._forget),
)
"""What the writer thread does beside writing: how often (in seconds), and what."""


class _Fallback:
    """The same ledger and dispatcher in memory, with the spool file beside the real one."""

    def __init__(self, spool: Spool, transport: Transport, settings: Settings) -> None:
        self.ledger = Ledger(None)
        self.spool = spool
        self.entries: deque[Entry] = deque(maxlen=MAX_BACKLOG)
        self.dispatcher = Dispatcher(self.ledger, transport, settings)
        self.dispatcher.start()

    def append(self, entry: Entry) -> bool:
        self.entries.append(entry)
        if entry.durable:
            self.spool.add(entry)
        won = self.ledger.append(entry)
        if entry.outbox:
            self.dispatcher.nudge()
        return won

    def delivered(self) -> list[str]:
        """What need not be sent again.

        A final status is sent once more all the same: an earlier one may have waited in the real ledger meanwhile and
        have reached the hub after it.
        """
        return [row.uid for row in self.ledger.outbox(states=["delivered"]) if not row.final]

    def note_delivered(self) -> None:
        if not self.ledger.outbox(kind="status", states=["pending"], limit=1):
            self.spool.delivered(self.delivered())


def _carry_over(run_id: str, old: Ledger, new: Ledger) -> None:
    """Bring a run from a ledger that was deleted under us (it stays readable while it is open) into the new one."""
    try:
        entries = _entries_of(run_id, old)
    except LedgerError as error:
        report("ledger", error, "cannot read the run's history from the ledger that was deleted or damaged")
        return
    for entry in entries:
        new.append(entry)


def _entries_of(run_id: str, ledger: Ledger) -> list[Entry]:
    run = ledger.run(run_id)
    if run is None:
        return []
    columns = {name: run[name] for name in RUN_COLUMNS if run[name] is not None}
    entries = [Entry(run_id, run["created"], run=columns, problems=run["problems"])]
    for row in ledger.events(run_id):
        event = Event(row["name"], row["time"], row["attrs"], row["uid"])
        facts = tuple((name, value, labels) for name, value, labels in row["facts"])
        entries.append(Entry(run_id, event.time, event, facts))
    waiting = tuple(
        OutboxItem(row.model_id, row.kind, row.payload, row.final, row.uid)
        for row in ledger.outbox(run_id=run_id, states=["pending"])
    )
    final, by = run["final_status"], run["final_by"]
    return [*entries, Entry(run_id, run["final_time"] or time.time(), final_status=final, final_by=by, outbox=waiting)]


def new_run_id(job_id: str | None) -> str:
    """NVFLARE's job id when that is a UUID, otherwise a new one (the simulator's job is ``simulate_job``)."""
    try:
        return str(uuid.UUID(str(job_id)))
    except ValueError:
        return str(uuid.uuid4())

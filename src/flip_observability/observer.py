"""The observer: exporter, fold, dispatcher and sentinel, as one thing that starts and stops.

One observer works on a ledger at a time; others stand by, say so, and take over when it is gone. Every part runs in a
loop of its own on a daemon thread: a part that fails is built anew, counted, and holds up no other.
"""

from __future__ import annotations

import importlib.metadata
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from flip_observability._page import Renderer
from flip_observability.constants import OwnEvents
from flip_observability.errors import drain, logger, report
from flip_observability.exporter import DEFAULT_HOST, DEFAULT_PORT, TLS, Exporter, ExporterError, NotReadyError
from flip_observability.hub import Dispatcher, HubTransport, Transport, transport_for
from flip_observability.ledger import (
    FILE_NAME,
    JUDGE,
    Entry,
    Ledger,
    LedgerBusyError,
    LedgerCorruptError,
    LedgerError,
    set_aside,
)
from flip_observability.lifecycle import Event
from flip_observability.log_ids import keep_secrets_out
from flip_observability.metrics import FlipCollector, MetricsFold
from flip_observability.process import ProcessIdentity, current_process
from flip_observability.settings import Settings
from flip_observability.spool import take_spools

log = logger(__name__)

HEARTBEAT_SECONDS = 5.0
STANDBY_SECONDS = 1.0
"""How often an observer that stands by looks whether the other one is gone."""
FOLD_SECONDS = 1.0
FINAL_FOLDS = 100
"""At its end an observer folds what has just happened, not a history of months."""
DISPATCHER_SECONDS = 5.0
STALLED_SECONDS = 60.0
"""A dispatcher that has not been able to look into the outbox for so long is built anew."""
SWEEP_SECONDS = 60.0
UPKEEP_SECONDS = 10.0
SPOOL_SECONDS = 60.0
FORGET_SECONDS = 3_600.0
LISTEN_AGAIN_SECONDS = 15.0
FIRST_BACKOFF = 0.5
MAX_BACKOFF = 30.0


class Sweeper(Protocol):
    """The sentinel, as the observer sees it: ``sweep`` looks for runs that ended without a final status.

    It may return the seconds after which it wants to look again.
    """

    def sweep(self) -> float | None: ...


class Observer:
    """Serves the metrics of a ledger, tells the hub what the outbox holds, and ends runs whose process died.

    Args:
        settings: of this server.
        directory: the ledger's folder.
        host, port, tls: of the endpoint, as for :class:`~flip_observability.exporter.Exporter`.
        serve: False for one without an endpoint.
        sentinel: swept at once, every minute or as it says, and after ``nudge("sentinel")``, on a thread of its own.
        judge: whether the server's parent process tells the sentinel how jobs end.
        transport: how the hub is reached; from the settings when None.
        insist: whether :meth:`start` raises when the endpoint cannot be had. Otherwise that is logged and tried again.
        make_ledger: False for one that waits until the server has made the ledger's folder, and the ledger in it where
            the folder is another user's: a ledger that root makes would lock the server out.
    """

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        *,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        tls: TLS | None = None,
        serve: bool = True,
        sentinel: Sweeper | None = None,
        judge: bool = False,
        transport: Transport | None = None,
        insist: bool = False,
        make_ledger: bool = True,
    ) -> None:
        self.settings, self.directory = settings, directory
        self.token = f"{current_process().token()}|{uuid.uuid4().hex[:12]}{JUDGE if judge else ''}"
        self._sentinel, self._transport, self._insist = sentinel, transport, insist
        self._make_ledger = make_ledger
        self.exporter: Exporter | None = None
        if serve:
            self.exporter = Exporter(self._metrics, self._why_not_ready, self._about, host=host, port=port, tls=tls)
        self._lock = threading.Lock()
        self._active = False
        self._obstacle = "it is only just starting"
        self._writable = False
        self._caught_up = False
        self._errors: Counter[str] = Counter()
        self._pages = _Pages(self)
        self._listen_at = 0.0
        self._keeper = _Loop("heartbeat", directory, _Keeper, self, self._heartbeat_failed)
        self._loops = [_Loop(name, directory, make, self) for name, make in _PARTS.items()]
        if sentinel is not None:
            self._loops.append(_Loop("sentinel", None, _Sentinel, self))
        self._running = False

    # -- for its owner -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin. Returns at once, and does nothing when it has begun.

        Raises:
            ExporterError: with ``insist``, when the endpoint cannot be served.
        """
        with self._lock:
            if self._running:
                return
            keep_secrets_out()
            self._listen_at = 0.0
            self._listen(self._insist)
            self._running = True
            for loop in (self._keeper, *self._loops):
                loop.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End: fold what has happened, let calls to the hub end, give the ledger back. Raises nothing.

        Args:
            timeout: seconds that this may take. Threads that need longer are left behind; they are daemons.
        """
        until = time.monotonic() + timeout
        with self._lock:
            if not self._running:
                return
            self._running = False
            # The heartbeat comes last: as long as a part works, the ledger is not somebody else's.
            for loop in self._loops:
                loop.ask_to_end()
            for loop in self._loops:
                loop.join(until - time.monotonic())
            self._keeper.ask_to_end()
            self._keeper.join(max(0.5, until - time.monotonic()))
            if self.exporter is not None:
                self.exporter.stop(max(0.5, until - time.monotonic()))
            self._pages.close()
            self._active, self._obstacle = False, "it has been stopped"

    def nudge(self, loop: str) -> None:
        """Have a part work at once: ``fold``, ``dispatcher``, ``sentinel`` or ``upkeep``."""
        for each in self._loops:
            if each.name == loop:
                each.wake()

    @property
    def active(self) -> bool:
        """Whether the ledger is this observer's."""
        return self._active

    @property
    def obstacle(self) -> str:
        """Why it is not; in words."""
        return self._obstacle

    @property
    def ledger_writable(self) -> bool:
        """Whether the last heartbeat could be written."""
        return self._writable

    def last_successes(self) -> dict[str, float]:
        """When each part last did its work (epoch seconds). Before that, when it was first asked to."""
        return {loop.name: loop.last_success for loop in (self._keeper, *self._loops)}

    # -- pages -------------------------------------------------------------------------------------------------------

    def _metrics(self, accept: str) -> tuple[str, bytes]:
        self._refuse_unless_active()
        if not self._caught_up:
            raise NotReadyError("Not all that has happened has been counted yet: ask again in a moment.")
        return self._pages.render(accept)

    def _why_not_ready(self) -> str:
        try:
            self._refuse_unless_active()
            self._pages.try_the_ledger()
        except NotReadyError as reason:
            return str(reason)
        except LedgerError as error:
            return f"The ledger cannot be read ({type(error).__name__})."
        return "" if self._caught_up else "Not all that has happened has been counted yet."

    def _refuse_unless_active(self) -> None:
        if not self._active:
            raise NotReadyError(f"This observer does not serve the ledger in {self.directory}: {self._obstacle}.")

    def _about(self) -> dict[str, str]:
        return {
            "version": importlib.metadata.version("flip-observability"),
            "net": self.settings.net_id,
            "ledger": str(self.directory),
            "state": "observing" if self._active else f"standing by: {self._obstacle}",
        }

    # -- what the parts tell -----------------------------------------------------------------------------------------

    def _heartbeat_failed(self, error: Exception) -> None:
        self._writable = False
        if not self._active:
            self._obstacle = f"the ledger cannot be written ({type(error).__name__})"

    def _lacks_ledger(self) -> bool:
        """Whether there is no ledger yet that may be opened; a person is told once what is waited for."""
        missing = "" if self._make_ledger else _what_is_missing(self.directory)
        if missing and missing != self._obstacle:
            log.warning("The ledger's folder is %s: %s. Waiting for it; is it the right one?", self.directory, missing)
            self._became(active=False, obstacle=missing)
        return bool(missing)

    def _became(self, *, active: bool, obstacle: str = "") -> None:
        changed, self._active, self._obstacle = active != self._active, active, obstacle
        if changed:
            for loop in self._loops:
                loop.wake()

    def _listen(self, insist: bool) -> None:
        """See that the endpoint is served; a port that is taken may be free when the old server has gone."""
        if self.exporter is None or self.exporter.serving or (not insist and time.monotonic() < self._listen_at):
            return
        self._listen_at = time.monotonic() + LISTEN_AGAIN_SECONDS
        try:
            self.exporter.start()
        except ExporterError as error:
            if insist:
                raise
            report("exporter", error, f"{error}. No metrics are served until this works; everything else does")


# -- a loop ------------------------------------------------------------------------------------------------------------


class _Part(Protocol):
    """What a loop does, made anew after a failure, and when the ledger is another one."""

    def step(self) -> float:
        """Work. Returns the seconds after which there may be more to do."""

    def finish(self) -> None:
        """The observer ends: do what can be done at once."""

    def close(self) -> None:
        """Leave the ledger: it is about to be closed."""


class _Loop:
    """Runs one part on a daemon thread, with a connection of its own, for as long as it is wanted."""

    def __init__(
        self,
        name: str,
        directory: Path | None,
        make: Callable[[Observer, Ledger], _Part],
        observer: Observer,
        on_failure: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.last_success = 0.0
        self._on_failure = on_failure
        self._connection = _Connection(directory)
        self._make, self._observer = make, observer
        self._part: _Part | None = None
        self._failures = 0
        self._wake = threading.Event()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self.last_success = time.time()
        self._end = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._end,), name=f"flip-observer-{self.name}", daemon=True
        )
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def ask_to_end(self) -> None:
        self._end.set()
        self._wake.set()

    def join(self, timeout: float) -> None:
        if self._thread is not None:
            self._thread.join(max(0.0, timeout))

    def _run(self, end: threading.Event) -> None:
        while not end.is_set():
            pause = self._turn()
            self._wake.wait(pause)
            self._wake.clear()
        self._finish()
        self._reset()

    def _turn(self) -> float:
        """One step. Raises nothing; returns for how long to wait."""
        if not self._observer.active and self.name != "heartbeat":
            self._reset()
            self.last_success = time.time()  # nothing is late while nothing is to be done
            return MAX_BACKOFF  # woken when that changes
        try:
            if self._connection.is_stale():
                self._reset()
            if self._part is None:
                if self._observer._lacks_ledger():
                    self.last_success = time.time()
                    return STANDBY_SECONDS
                self._part = self._make(self._observer, self._connection.ledger())
            pause = self._part.step()
        except LedgerBusyError as error:
            report("observer", error, f"{self.name}: the ledger is busy; trying again")
            self._on_failure(error)
            return FIRST_BACKOFF
        except Exception as error:  # noqa: BLE001 - the other parts and the process go on, and so will this one
            # The text of an error of the ledger is SQLite's or ours; others may hold anything.
            detail = f"{error} " if isinstance(error, LedgerError) else ""
            report("observer", error, f"{self.name}: {detail}Started again")
            self._on_failure(error)
            self._reset(error)
            self._failures += 1
            return min(MAX_BACKOFF, FIRST_BACKOFF * 2.0 ** min(self._failures - 1, 10))
        self._failures = 0
        self.last_success = time.time()
        return pause

    def _finish(self) -> None:
        try:
            if self._part is not None:
                self._part.finish()
        except Exception as error:  # noqa: BLE001 - the next observer will do it
            report("observer", error, f"{self.name}: cannot finish its work")

    def _reset(self, error: Exception | None = None) -> None:
        part, self._part = self._part, None
        try:
            if part is not None:
                part.close()
            self._connection.drop(error)
        except Exception as problem:  # noqa: BLE001 - what is left behind is no reason to stop
            report("observer", problem, f"{self.name}: cannot let go of the ledger")


class _Connection:
    """A connection that is opened when it is needed, and anew when the file is not the same any more."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._ledger: Ledger | None = None

    def ledger(self) -> Ledger:
        if self._ledger is None:
            # A part without a folder does without the ledger; it gets one in memory.
            self._ledger = Ledger.open_or_replace(self._directory) if self._directory else Ledger(None)
        return self._ledger

    def is_stale(self) -> bool:
        return self._ledger is not None and not self._ledger.is_current()

    def drop(self, error: Exception | None = None) -> None:
        ledger, self._ledger = self._ledger, None
        if ledger is None:
            return
        if isinstance(error, LedgerCorruptError) and self._directory is not None:
            set_aside(self._directory, ledger.inode)
        ledger.close()


# -- the parts ---------------------------------------------------------------------------------------------------------


def _what_is_missing(directory: Path) -> str:
    """Why a ledger in there is not to be opened yet, in words; nothing when it is."""
    if not os.path.isdir(directory):
        return "there is no such folder yet (the server makes it), or this user cannot see it"
    if os.stat(directory).st_uid != os.geteuid() and not os.path.exists(directory / FILE_NAME):
        return "the folder is another user's, and the server has not made a ledger in it yet"
    return ""


class _Keeper:
    """Holds the ledger, or waits for it; its heartbeat is a real write, and so tells whether one can be made."""

    def __init__(self, observer: Observer, ledger: Ledger) -> None:
        self._observer, self._ledger = observer, ledger

    def step(self) -> float:
        observer, ledger, now = self._observer, self._ledger, time.time()
        observer._listen(insist=False)
        if not ledger.claim_observer(observer.token, now):
            observer._became(active=False, obstacle=_who_has_it(ledger.observer_heartbeat(), now))
            return STANDBY_SECONDS
        observer._writable = True
        observer._became(active=True)
        self._write_errors(now)
        return HEARTBEAT_SECONDS

    def finish(self) -> None:
        if self._observer.active:
            self._write_errors(time.time())
            self._ledger.release_observer(self._observer.token)

    def close(self) -> None:
        """It keeps the ledger: another connection is about to be opened."""

    def _write_errors(self, now: float) -> None:
        counts = self._observer._errors
        counts.update(drain())
        if counts:
            facts = tuple(("observability_error", float(n), {"component": c}) for c, n in counts.items())
            event = Event(OwnEvents.OBSERVABILITY_ERRORS.value, now, {"count": sum(counts.values())})
            self._ledger.append(Entry(None, now, event, facts))
            counts.clear()


def _who_has_it(heartbeat: tuple[str, float] | None, now: float) -> str:
    if heartbeat is None:
        return "another observer had it a moment ago"
    process = ProcessIdentity.from_token(heartbeat[0])
    who = f"process {process.pid}" if process is not None else "another process"
    elsewhere = " that cannot be seen" if process is not None and process.is_alive_as_observer() is None else ""
    return f"{who}{elsewhere} has it, last heard {max(0.0, now - heartbeat[1]):.0f} s ago"


class _Fold:
    """Turns what has happened into counts."""

    def __init__(self, observer: Observer, ledger: Ledger) -> None:
        self._observer, self._fold = observer, MetricsFold(ledger)
        observer._caught_up = False

    def step(self) -> float:
        if not self._fold.catch_up():
            return 0.0
        if not self._observer._caught_up:
            self._observer._caught_up = True
            self._observer.nudge("upkeep")  # what is counted may be forgotten
        return FOLD_SECONDS

    def finish(self) -> None:
        for _ in range(FINAL_FOLDS):
            if self._fold.catch_up():
                return

    def close(self) -> None:
        self._observer._caught_up = False


class _Dispatch:
    """Has a dispatcher work, and sees that it can."""

    def __init__(self, observer: Observer, ledger: Ledger) -> None:
        self._transport = observer._transport or transport_for(observer.settings)
        self._own = observer._transport is None
        self._dispatcher = Dispatcher(
            ledger,
            self._transport,
            observer.settings,
            # While the ledger could not be written, a run may have told the hub its end, and this is where that stands.
            # Its earlier statuses, which still wait in the ledger, must not be sent after it.
            prepare=lambda: take_spools(ledger, observer.directory, time.time()),
        )
        self._begun = time.time()
        self._dispatcher.start()

    def step(self) -> float:
        if abs(time.time() - max(self._begun, self._dispatcher.last_look)) > STALLED_SECONDS:
            raise StalledError
        self._dispatcher.nudge()
        return DISPATCHER_SECONDS

    def finish(self) -> None:
        """Closing it lets the calls end that are under way."""

    def close(self) -> None:
        self._dispatcher.stop(2.0)
        if self._own and isinstance(self._transport, HubTransport):
            self._transport.close()


class StalledError(Exception):
    """A part that should work has not been able to for too long."""


class _Sentinel:
    """Sweeps."""

    def __init__(self, observer: Observer, _: Ledger) -> None:
        self._sentinel = observer._sentinel

    def step(self) -> float:
        wanted = self._sentinel.sweep() if self._sentinel is not None else None
        return SWEEP_SECONDS if wanted is None else min(wanted, SWEEP_SECONDS)

    def finish(self) -> None:
        """What is left to sweep is left to the next observer."""

    def close(self) -> None:
        """It looks after its own connection."""


class _Upkeep:
    """Takes in what dead processes left in spool files, and forgets what is old."""

    def __init__(self, observer: Observer, ledger: Ledger) -> None:
        self._observer, self._ledger = observer, ledger
        self._due = [0.0] * len(self._CHORES)

    def step(self) -> float:
        for number, (seconds, chore) in enumerate(self._CHORES):
            if time.monotonic() >= self._due[number] and chore(self):
                self._due[number] = time.monotonic() + seconds
        return UPKEEP_SECONDS

    def finish(self) -> None:
        """There is no hurry."""

    def close(self) -> None:
        """Nothing to let go of."""

    def _take_spools(self) -> bool:
        if take_spools(self._ledger, self._observer.directory, time.time()):
            self._observer.nudge("dispatcher")
        self._ledger.checkpoint()
        return True

    def _forget(self) -> bool:
        if not self._observer._caught_up:
            return False  # only what has been counted goes
        self._ledger.forget_before(time.time() - self._observer.settings.retention_days * 86_400)
        return True

    _CHORES = ((SPOOL_SECONDS, _take_spools), (FORGET_SECONDS, _forget))


_PARTS: Mapping[str, Callable[[Observer, Ledger], _Part]] = {
    "fold": _Fold,
    "dispatcher": _Dispatch,
    "upkeep": _Upkeep,
}
"""Name of a loop to what it does; the sentinel joins them when there is one."""


class _Pages:
    """Reads the ledger for whoever asks, with connections of its own."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._connection = _Connection(observer.directory)
        self._lock = threading.Lock()
        self._renderer = Renderer()
        self._collector: FlipCollector | None = None
        self._shown: Ledger | None = None

    def render(self, accept: str) -> tuple[str, bytes]:
        with self._lock:
            if self._collector is None:
                # It sees by itself to a ledger that was replaced or damaged.
                self._shown = Ledger.open_or_replace(self._observer.directory)
                self._collector = FlipCollector(
                    self._shown,
                    self._observer.settings,
                    writable=lambda: self._observer.ledger_writable,
                    loops=self._observer.last_successes,
                )
            return self._renderer.render(self._collector, accept)

    def close(self) -> None:
        """Let go of the ledger; the next page opens it again."""
        with self._lock:
            self._connection.drop()
            if self._shown is not None:
                self._shown.close()
            self._collector = self._shown = None

    def try_the_ledger(self) -> None:
        """Raise a :class:`LedgerError` when it cannot be read."""
        with self._lock:
            try:
                if self._connection.is_stale():
                    self._connection.drop()
                self._connection.ledger().observer_heartbeat()
            except LedgerError as error:
                self._connection.drop(error)
                raise

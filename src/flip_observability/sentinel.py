"""The sentinel: finds runs that ended without a final status, and ends them properly.

It decides only when a run's process is gone, kills nothing, and is not the only writer: whoever writes a final status
first has chosen it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from flip_observability.constants import FlareEvents, ModelStatus
from flip_observability.ending import SALVAGE, UnendedRun, finalise_plainly
from flip_observability.errors import logger, report
from flip_observability.ledger import Ledger, LedgerError
from flip_observability.lifecycle import Ending
from flip_observability.links import LinkWatcher
from flip_observability.process import ProcessIdentity
from flip_observability.run_trace import complete_traces
from flip_observability.salvager import BY, PATIENCE_SECONDS, JobStore, Salvager
from flip_observability.settings import Settings
from flip_observability.spool import take_spools
from flip_observability.tracing import Tracing, shared

log = logger(__name__)

WATCHING_SECONDS = 2.0
"""Between two sweeps while a run goes on: its death must be known at the hub within 30 s."""
WAITING_SECONDS = 5.0
IDLE_SECONDS = 15.0
"""Where nobody says that a run has begun, it can begin and die between two sweeps."""
MAX_RUNS = 10_000
MAX_ATTEMPTS = 5
"""After so many failures a run gets its final status without its history: rather that than never."""
FIRST_BACKOFF = 1.0
MAX_BACKOFF = 8.0


class Phase(Enum):
    """Where a job is, as the server's job store has it."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    ABORTED = "aborted"
    FAILED = "failed"


class Parent(JobStore, Protocol):
    """What the server's parent process knows, asked on the sentinel's thread."""

    def phase(self, job_id: str) -> Phase | None:
        """Where the job is; None when the server knows no such job."""


@dataclass(frozen=True)
class Patience:
    """Seconds that the sentinel waits before it believes something.

    Args:
        heartbeat: of a process that cannot be seen from here, or can be no job's, unchanged.
        silence: of a process that is seen to live, until a person is asked to look at it.
        parent: for a server that still works on a job whose process is gone.
        start: for the process of a job that the server says is running.
        vanished: for a job that was registered, until the server knows it.
        salvage: that a final status waits for an upload.
    """

    heartbeat: float = 120.0
    silence: float = 600.0
    parent: float = 120.0
    start: float = 120.0
    vanished: float = 60.0
    salvage: float = PATIENCE_SECONDS


class Sentinel:
    """Sweeps the ledger for runs whose process is gone. One thread sweeps; another salvages results.

    Args:
        settings: of this server.
        directory: the ledger's folder.
        parent: what the server knows of jobs; None beside a server, where processes alone tell.
        workspace: the server's, whose kit must not be in any results; where a run's directory lies when None.
        on_final: called when a final status was written, so that the dispatcher need not find it by itself.
        tracing: where spans go that a dead process left open; this process's own when None.
        patience: how long it waits for what.
        clock, monotonic: in seconds.
    """

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        *,
        parent: Parent | None = None,
        workspace: Path | None = None,
        on_final: Callable[[], None] = lambda: None,
        tracing: Tracing | None = None,
        patience: Patience = Patience(),
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_final = on_final
        self._settings, self._directory, self._parent = settings, directory, parent
        self._tracing = tracing
        self._patience, self._clock, self._monotonic = patience, clock, monotonic
        self._salvager = Salvager(
            settings,
            directory,
            parent,
            self._tell,
            workspace=workspace,
            patience=patience.salvage,
            clock=clock,
            monotonic=monotonic,
        )
        self._links = LinkWatcher(directory)
        self._ledger: Ledger | None = None
        self._watches: dict[str, _Watch] = {}
        self._spools_taken = False
        self._tracer: threading.Thread | None = None

    def sweep(self) -> float:
        """Look at every run that has no final status.

        Returns:
            Seconds after which to look again.

        Raises:
            LedgerError: the ledger cannot be used now.
        """
        try:
            ledger = self._open()
            self._spools_taken = False
            runs = ledger.open_runs(MAX_RUNS)
            known = {run["run_id"] for run in runs}
            self._watches = {run_id: watch for run_id, watch in self._watches.items() if run_id in known}
            pause = min((self._look(ledger, run) for run in runs), default=IDLE_SECONDS)
            for run in ledger.runs_with_intent(SALVAGE):
                self._salvager.add(run["run_id"], waits=False)
        except LedgerError:
            self._drop()
            raise
        self._complete_traces()
        return pause

    def close(self, seconds: float = 0.0) -> None:
        """Let go of the ledger; salvage nothing new.

        Args:
            seconds: to wait for an upload that is under way; it goes on by itself for as long as the process lives.
        """
        self._salvager.close(seconds)
        self._drop()

    def _tell(self) -> None:
        self.on_final()

    # -- one run -----------------------------------------------------------------------------------------------------

    def _look(self, ledger: Ledger, run: Mapping[str, Any]) -> float:
        """Look at one run, whatever it has. Returns the seconds until it wants to be looked at again."""
        run_id = run["run_id"]
        watch = self._watches.setdefault(run_id, _Watch())
        now = self._monotonic()
        if now < watch.not_before:
            return watch.not_before - now
        try:
            return self._follow(ledger, run, watch)
        except LedgerError:
            raise
        except Exception as error:  # noqa: BLE001 - one run must not hold up the others, nor wait for ever itself
            watch.failures += 1
            report("sentinel", error, f"cannot end run {run_id} (attempt {watch.failures})")
            if watch.failures >= MAX_ATTEMPTS:
                return self._end_plainly(ledger, run)
            pause = float(min(MAX_BACKOFF, FIRST_BACKOFF * 2.0 ** (watch.failures - 1)))
            watch.not_before = now + pause
            return pause

    def _follow(self, ledger: Ledger, run: Mapping[str, Any], watch: _Watch) -> float:
        if self._salvager.has(run["run_id"]):
            return WATCHING_SECONDS
        if run["boot_id"] is None:
            phase = self._phase(run)
            if not self._is_over_without_a_process(run, phase, watch):
                return WAITING_SECONDS if self._parent is not None else IDLE_SECONDS
        else:
            gone = self._is_gone(run, watch)
            self._look_for_links(run, watch, gone)
            if not gone and not _is_left_to_us(ledger, run):
                return WATCHING_SECONDS
            if self._parent_is_at_it(run, watch):
                return WATCHING_SECONDS / 2
            phase = self._phase(run)
        self._end(ledger, run, phase, watch)
        return WATCHING_SECONDS

    def _phase(self, run: Mapping[str, Any]) -> Phase | None:
        return self._parent.phase(run["job_id"]) if self._parent is not None and run["job_id"] else None

    def _is_gone(self, run: Mapping[str, Any], watch: _Watch) -> bool:
        """Whether the run's process is certainly no more. One that is stopped, or starved, lives."""
        alive = ProcessIdentity(run["boot_id"], run["pid_ns"], run["pid"], run["start_ticks"]).is_alive_as_job()
        silent = watch.silent_for(run["heartbeat"], self._monotonic())
        if alive:
            watch.seen_alive = self._clock()
            self._complain_of_silence(run, watch, silent)
            return False
        if alive is None:
            if silent < self._patience.heartbeat:
                return False
            return self._parent is None or not self._parent.is_busy_with(run["job_id"])
        if watch.seen_gone is None:
            watch.seen_gone = self._clock()
        return True

    def _complain_of_silence(self, run: Mapping[str, Any], watch: _Watch, silent: float) -> None:
        """Have a person look at a run whose process lives and says nothing. It is not ended: it may only be stopped."""
        if silent < self._patience.silence:
            watch.silence_told = False
        elif not watch.silence_told:
            watch.silence_told = True
            report(
                "sentinel",
                "SilentRun",
                f"process {run['pid']} of run {run['run_id']} lives and was not heard for {silent / 60:.0f} min. "
                "Where it is stopped, or is no run's process, end it or the job, or finalize the run",
            )

    def _look_for_links(self, run: Mapping[str, Any], watch: _Watch, gone: bool) -> None:
        """Have them looked for, at each heartbeat and when the process is gone, before NVFLARE archives the folder."""
        sign = run["heartbeat"], gone
        if run["run_dir"] and watch.looked != sign:
            watch.looked = sign
            self._links.want(run["run_id"], Path(run["run_dir"]))

    def _parent_is_at_it(self, run: Mapping[str, Any], watch: _Watch) -> bool:
        """Whether the server is about to say how the job ended: a moment after the process, and never for long."""
        if self._parent is None or not run["job_id"]:
            return False
        since = watch.since("parent", self._monotonic())
        return self._parent.is_busy_with(run["job_id"]) and self._monotonic() - since < self._patience.parent

    def _is_over_without_a_process(self, run: Mapping[str, Any], phase: Phase | None, watch: _Watch) -> bool:
        """Whether a run that never had a process will never have one."""
        if self._parent is None or not run["job_id"] or phase is Phase.WAITING:
            return False
        now = self._monotonic()
        if phase is None:
            return now - watch.since("vanished", now) >= self._patience.vanished
        if self._parent.is_busy_with(run["job_id"]):
            watch.forget("start")
            return False
        # A server that died between deploying a job and starting it leaves it like this for ever.
        return phase is not Phase.RUNNING or now - watch.since("start", now) >= self._patience.start

    # -- its end -----------------------------------------------------------------------------------------------------

    def _end(self, ledger: Ledger, run: Mapping[str, Any], phase: Phase | None, watch: _Watch) -> None:
        if not self._spools_taken:
            # The process may have told its end to a file, because it could not tell the ledger.
            take_spools(ledger, self._directory, self._clock())
            self._spools_taken = True
        unended = UnendedRun.read(ledger, run["run_id"])
        if unended is None or unended.run["final_status"] is not None:
            return
        if not unended.has_begun and unended.run["boot_id"] is None and phase is Phase.COMPLETED:
            ledger.forget_run(run["run_id"])  # a job without our components: it ends its runs itself
            return
        if unended.run["intent"] == Ending.UPLOAD_PENDING.value:
            self._orphan(ledger, unended, watch)
            self._salvager.add(run["run_id"], waits=True)
            return
        status = self._judge(unended, phase)
        if status is not ModelStatus.STOPPED:
            self._orphan(ledger, unended, watch)
        salvage = unended.has_begun and not unended.run["results_uri"]
        if unended.finalise(ledger, status, self._clock(), BY, {"intent": SALVAGE} if salvage else None):
            log.warning("Run %s ended without a final status. It is now %s.", run["run_id"], status.value)
            self.on_final()

    def _judge(self, unended: UnendedRun, phase: Phase | None) -> ModelStatus:
        """The final status of a run that is over: rules 3 and 5 of the lifecycle."""
        run, state = unended.run, unended.state
        if state.fatal or run["intent"] == Ending.ERROR.value:
            return ModelStatus.ERROR
        if phase is None:
            # Nobody knows whether a person did it: what the process would have said, had nobody been there to ask.
            deleted = self._parent is not None and not unended.has_begun
            aborted = state.aborted or run["intent"] == Ending.ABORT_UNRESOLVED.value or deleted
        else:
            aborted = phase is Phase.ABORTED
        return ModelStatus.STOPPED if aborted else ModelStatus.ERROR

    def _orphan(self, ledger: Ledger, unended: UnendedRun, watch: _Watch) -> None:
        run = unended.run
        # It died between two looks: the later one, since the collector may have heard of what it did until then.
        watched = watch.seen_gone if watch.seen_alive is not None else None
        signs = (run["last_event"], run["heartbeat"], watch.seen_alive, watched)
        died = max((sign for sign in signs if sign is not None), default=self._clock())
        unended.orphaned(ledger, self._clock(), died)

    def _end_plainly(self, ledger: Ledger, run: Mapping[str, Any]) -> float:
        """The final status alone, for a run whose history or archive cannot be worked with."""
        if finalise_plainly(ledger, run, ModelStatus.ERROR, self._clock(), BY):
            log.error("Run %s cannot be read. It was given the status ERROR.", run["run_id"])
            self.on_final()
        return IDLE_SECONDS

    # -- spans -------------------------------------------------------------------------------------------------------

    def _complete_traces(self) -> None:
        """On a thread of their own: a collector that hangs must not keep a final status from being found."""
        tracing = self._tracing = self._tracing or shared(self._settings)
        if not tracing.enabled or (self._tracer is not None and self._tracer.is_alive()):
            return
        self._tracer = threading.Thread(target=self._trace, args=(tracing,), name="flip-sentinel-traces", daemon=True)
        self._tracer.start()

    def _trace(self, tracing: Tracing) -> None:
        try:
            with Ledger(self._directory) as ledger:
                complete_traces(ledger, tracing)
        except Exception as error:  # noqa: BLE001 - tried again with the next sweep
            report("tracing", error, "cannot complete the traces of runs whose process died")

    # -- the ledger --------------------------------------------------------------------------------------------------

    def _open(self) -> Ledger:
        if self._ledger is not None and not self._ledger.is_current():
            self._drop()
        if self._ledger is None:
            self._ledger = Ledger(self._directory)
        return self._ledger

    def _drop(self) -> None:
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger.close()


def _is_left_to_us(ledger: Ledger, run: Mapping[str, Any]) -> bool:
    """Whether a run's process is done with it, and could not reach the bucket. It may live on, as in a simulator."""
    return run["intent"] == Ending.UPLOAD_PENDING.value and ledger.has_event(run["run_id"], FlareEvents.END_RUN.value)


class _Watch:
    """What the sentinel has seen of one run so far."""

    def __init__(self) -> None:
        self.failures = 0
        self.not_before = 0.0
        self.silence_told = False
        self._heartbeat: tuple[Any, float] | None = None
        self.looked: tuple[Any, bool] | None = None
        self.seen_alive: float | None = None
        self.seen_gone: float | None = None
        self._since: dict[str, float] = {}

    def silent_for(self, heartbeat: Any, now: float) -> float:
        """For how long the run's heartbeat has been the same, as far as this sentinel has seen (seconds)."""
        if self._heartbeat is None or self._heartbeat[0] != heartbeat:
            self._heartbeat = heartbeat, now
        return now - self._heartbeat[1]

    def since(self, what: str, now: float) -> float:
        """Since when something has been so (monotonic seconds)."""
        return self._since.setdefault(what, now)

    def forget(self, what: str) -> None:
        self._since.pop(what, None)

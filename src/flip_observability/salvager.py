"""The thread that brings the results of dead runs to where they belong, for as long as it takes.

A run that died in its upload (intent ``UPLOAD_PENDING``) waits for it with its final status, but not for ever. Others
have their final status already, and results follow: their intent says so in the ledger, so that the next observer goes
on where this one ended.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flip_observability._kit import Kit
from flip_observability.client import results_destination
from flip_observability.constants import FlipEvents, ModelStatus, OwnEvents
from flip_observability.ending import SALVAGE, SALVAGE_FAILED, SALVAGED, UnendedRun
from flip_observability.errors import logger, report
from flip_observability.hub import CONTRACTS
from flip_observability.ledger import Entry, Ledger, LedgerError
from flip_observability.lifecycle import Event, Fact
from flip_observability.links import SeenLinks
from flip_observability.results import Destination, Receipt, ResultsUploadError, abort_upload
from flip_observability.salvage import RunDirectory, StoredArchive, salvage
from flip_observability.settings import Settings

log = logger(__name__)

PATIENCE_SECONDS = 600.0
"""How long a run's final status waits for its upload."""
FOLLOW_UP_SECONDS = 72 * 3_600.0
"""How long results are tried for that follow a final status."""
NOTHING_LEFT_ATTEMPTS = 3
FIRST_BACKOFF = 2.0
MAX_BACKOFF = 10.0
"""Of a run whose final status waits: the hub must know it 30 s after the bucket is well again."""
STALLED_SECONDS = 15.0
"""An attempt of which the bucket takes no byte for so long is given up, and another one begun."""
MAX_FOLLOW_UP_BACKOFF = 600.0
LOOK_SECONDS = 1.0
NOT_YET_SECONDS = 1.0
BUSY_SECONDS = 120.0
"""A server that takes longer to store what a run left is not waited for; what is on the disk is taken."""
BY = "sentinel"


class JobStore(Protocol):
    """What the server's parent process knows of the files of a job."""

    def is_busy_with(self, job_id: str) -> bool:
        """Whether the server still works on the job: runs it, or is storing what it left."""

    def archive(self, job_id: str) -> AbstractContextManager[Path | None]:
        """The zip that the server made of the run directory, as long as the context lasts; None when there is none."""


class _NotYetError(Exception):
    """The server is still storing what the run left."""


@dataclass(order=True)
class _Task:
    due: float
    run_id: str = field(compare=False)
    waits: bool = field(compare=False)
    first_try: float | None = field(default=None, compare=False)
    attempts: int = field(default=0, compare=False)


class Salvager:
    """Salvages one run after the other on a daemon thread that ends when there is nothing to do.

    Args:
        settings: where results go.
        directory: the ledger's folder.
        store: the server's job store; None beside a server, where only run directories can be seen.
        on_final: called when a final status has been written.
        workspace: the server's, whose kit must not be in any results; where a run's directory lies when None.
        patience: seconds that a final status waits.
        clock, monotonic: in seconds.
    """

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        store: JobStore | None,
        on_final: Callable[[], None],
        *,
        workspace: Path | None = None,
        patience: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._directory, self._store, self._on_final = settings, directory, store, on_final
        self._workspace, self._patience, self._clock, self._monotonic = workspace, patience, clock, monotonic
        self._wake = threading.Condition()
        self._tasks: list[_Task] = []
        self._known: set[str] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, run_id: str, *, waits: bool) -> None:
        """Salvage a run's results. ``waits``: its final status does, too. One that is known already is not added."""
        with self._wake:
            if self._closed or run_id in self._known:
                return
            self._known.add(run_id)
            heapq.heappush(self._tasks, _Task(self._monotonic(), run_id, waits))
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="flip-salvage", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def has(self, run_id: str) -> bool:
        """Whether this run is being taken care of."""
        with self._wake:
            return run_id in self._known

    def close(self, seconds: float = 0.0) -> None:
        """Begin nothing new. An upload that is under way goes on for as long as the process lives."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                with Ledger(self._directory) as ledger:
                    again = self._attempt(ledger, task)
            except Exception as error:  # noqa: BLE001 - one run must not hold up those behind it
                report("salvage", error, f"cannot work on the results of run {task.run_id}; trying again")
                again = self._backoff(task)
            with self._wake:
                if again is None:
                    self._known.discard(task.run_id)
                else:
                    task.due = self._monotonic() + again
                    heapq.heappush(self._tasks, task)

    def _next(self) -> _Task | None:
        with self._wake:
            while self._tasks and not self._closed:
                left = self._tasks[0].due - self._monotonic()
                if left <= 0:
                    return heapq.heappop(self._tasks)
                self._wake.wait(min(left, LOOK_SECONDS))
            self._thread = None
            return None

    def _attempt(self, ledger: Ledger, task: _Task) -> float | None:
        """Try once. Returns the seconds until the next attempt; None when there is nothing more to do."""
        run = ledger.run(task.run_id)
        if run is None or (task.waits and run["final_status"] is not None):
            return None
        begun = self._clock()
        if task.first_try is None:
            task.first_try = self._monotonic()
        try:
            receipt = self._receipt(ledger, run, self._monotonic() - task.first_try < BUSY_SECONDS)
        except _NotYetError:
            return NOT_YET_SECONDS
        except LedgerError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the archive or the bucket has, it is no reason to stop
            return self._failed(ledger, run, task, error)
        self._succeeded(ledger, run, task, receipt, begun)
        return None

    def _receipt(self, ledger: Ledger, run: Mapping[str, Any], patient: bool) -> Mapping[str, Any]:
        """Upload, unless that has been done already, and keep the receipt with the run."""
        destination = results_destination(self._settings, self._directory)
        run_id = run["run_id"]
        self._tidy(ledger, run, destination)
        if run["results_uri"]:
            return {name: run[name] for name in ("results_uri", "results_bytes", "results_files")}

        def remember(key: str, upload_id: str) -> None:
            ledger.append(Entry(run_id, self._clock(), run={"upload_key": key, "upload_id": upload_id or None}))

        with self._source(ledger, run, patient) as source:
            receipt = salvage(
                source,
                destination,
                run["model_id"] or run_id,
                stalled_after=lambda: STALLED_SECONDS,
                on_multipart=remember,
            )
        columns = _columns(receipt)
        ledger.append(Entry(run_id, self._clock(), run=columns))
        log.info("Run %s: its results were salvaged (%d files, %d bytes).", run_id, receipt.files, receipt.size)
        return columns

    def _tidy(self, ledger: Ledger, run: Mapping[str, Any], destination: Destination) -> None:
        """Remove what an upload that was killed has left in the bucket."""
        if run["upload_id"]:
            abort_upload(destination, run["upload_key"], run["upload_id"])
            ledger.append(Entry(run["run_id"], self._clock(), run={"upload_id": None}))
        elif run["upload_key"] and not run["results_uri"]:
            try:
                abort_upload(destination, run["upload_key"], "")
            except ResultsUploadError as error:
                # Killed before the upload's id was written down: it has no parts, and the bucket's own rule ends it.
                log.info("Run %s: uploads that were begun cannot be looked for (%s).", run["run_id"], error.reason)

    @contextmanager
    def _source(self, ledger: Ledger, run: Mapping[str, Any], patient: bool) -> Iterator[RunDirectory | StoredArchive]:
        run_dir = Path(run["run_dir"]) if run["run_dir"] else None
        kit = Kit(self._workspace or (run_dir or self._directory).parent)
        most = self._settings.results_max_bytes
        with self._archive(run, patient) as archive:
            if archive is not None:
                yield StoredArchive(archive, kit, most, SeenLinks.from_text(ledger.links(run["run_id"])))
            elif run_dir is not None and run_dir.is_dir():
                yield RunDirectory(run_dir, kit, most)
            else:
                raise ResultsUploadError("source", "nothing is left of the run")

    @contextmanager
    def _archive(self, run: Mapping[str, Any], patient: bool) -> Iterator[Path | None]:
        if self._store is None or not run["job_id"]:
            yield None
            return
        if patient and self._store.is_busy_with(run["job_id"]):
            raise _NotYetError
        with self._store.archive(run["job_id"]) as path:
            yield path

    # -- what came of it ---------------------------------------------------------------------------------------------

    def _succeeded(
        self, ledger: Ledger, run: Mapping[str, Any], task: _Task, receipt: Mapping[str, Any], begun: float
    ) -> None:
        now = self._clock()
        attrs = {"uri": receipt["results_uri"], "bytes": receipt["results_bytes"], "files": receipt["results_files"]}
        attrs = {name: value for name, value in attrs.items() if value is not None}
        if task.waits:
            unended = UnendedRun.read(ledger, task.run_id)
            if unended is None:
                return
            if not run["results_uri"]:
                unended.record(ledger, FlipEvents.RESULTS_UPLOAD_STARTED.value, begun)
                unended.record(ledger, FlipEvents.RESULTS_UPLOAD_COMPLETED.value, now, attrs)
            if unended.finalise(ledger, ModelStatus.RESULTS_UPLOADED, now, BY, {"intent": SALVAGED}):
                self._on_final()
            return
        facts: tuple[Fact, ...] = (
            ("upload_duration", max(0.0, now - begun), {}),
            ("upload_size", float(receipt["results_bytes"] or 0), {}),
        )
        event = Event(FlipEvents.RESULTS_UPLOAD_COMPLETED.value, now, attrs)
        known = bool(run["results_uri"])
        entry = Entry(task.run_id, now, None if known else event, () if known else facts, {"intent": SALVAGED})
        ledger.append(entry)

    def _failed(self, ledger: Ledger, run: Mapping[str, Any], task: _Task, error: Exception) -> float | None:
        reason = error.reason if isinstance(error, ResultsUploadError) else "other"
        task.attempts += 1
        waited = self._monotonic() - (task.first_try or 0.0)
        report("salvage", error, f"the results of run {task.run_id} could not be salvaged yet ({reason})")
        nothing_left = reason == "source" and task.attempts >= NOTHING_LEFT_ATTEMPTS
        if waited < self._patience and not nothing_left:
            return self._backoff(task)
        attrs = {"reason": reason, "exception_type": type(error).__name__}
        if task.waits:
            self._give_up_waiting(ledger, task, attrs, nothing_left)
        elif "upload_failed" not in run["problems"] and not nothing_left:
            self._note_failure(ledger, task, attrs)
        if nothing_left or self._clock() - (run["final_time"] or self._clock()) > FOLLOW_UP_SECONDS:
            log.warning("Run %s: nothing of its results could be salvaged.", task.run_id)
            ledger.append(Entry(task.run_id, self._clock(), run={"intent": SALVAGE_FAILED}))
            return None
        return self._backoff(task)

    def _give_up_waiting(self, ledger: Ledger, task: _Task, attrs: Mapping[str, str], nothing_left: bool) -> None:
        unended = UnendedRun.read(ledger, task.run_id)
        if unended is None:
            return
        now = self._clock()
        unended.record(ledger, OwnEvents.UPLOAD_FAILED.value, now, attrs)
        status = CONTRACTS[self._settings.contract_for(unended.run["contract"])].upload_failed
        task.waits = False  # the results may still follow
        if unended.finalise(ledger, status, now, BY, {"intent": SALVAGE_FAILED if nothing_left else SALVAGE}):
            self._on_final()

    def _note_failure(self, ledger: Ledger, task: _Task, attrs: Mapping[str, str]) -> None:
        now = self._clock()
        event = Event(OwnEvents.UPLOAD_FAILED.value, now, attrs)
        facts: tuple[Fact, ...] = (("upload_failure", 1, {"reason": attrs["reason"]}),)
        ledger.append(Entry(task.run_id, now, event, facts, problems={"upload_failed": now}))

    @staticmethod
    def _backoff(task: _Task) -> float:
        most = MAX_BACKOFF if task.waits else MAX_FOLLOW_UP_BACKOFF
        return float(min(most, FIRST_BACKOFF * 2.0 ** min(task.attempts, 16)))


def _columns(receipt: Receipt) -> dict[str, Any]:
    return {
        "results_uri": receipt.uri,
        "results_bytes": receipt.size,
        "results_files": receipt.files,
        "results_crc32": receipt.crc32,
    }

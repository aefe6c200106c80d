"""The observer inside an NVFLARE server's parent process: the one that lives for months and knows how jobs end."""

from __future__ import annotations

import os
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey, RunStatus
from nvflare.apis.job_launcher_spec import JobLauncherSpec
from nvflare.apis.storage import WORKSPACE
from nvflare.app_common.job_launcher.process_launcher import ProcessJobLauncher

from flip_observability.errors import report
from flip_observability.exporter import DEFAULT_HOST, DEFAULT_PORT, TLS
from flip_observability.ledger import Entry, Ledger
from flip_observability.nvflare import context
from flip_observability.nvflare.model_id import (
    PROBLEM,
    FoundModel,
    find_model_of_job,
    find_model_of_queued_job,
    server_config,
)
from flip_observability.observer import Observer
from flip_observability.recorder import new_run_id
from flip_observability.sentinel import Phase, Sentinel
from flip_observability.settings import LEDGER_FOLDER, Settings, SettingsError
from flip_observability.utils import canonical_uuid

MAX_WAITING = 1_000
"""Registrations that wait for our thread; what is beyond is counted and found by its own process, if it starts."""
ID_SECONDS = 30.0
"""How long a submitted job may take to get its id."""
ID_PAUSE_SECONDS = 0.1
ATTEMPTS = 3
MARK = b"flip_observability"
"""What the configuration of a job holds that has our components."""

_PHASES: Mapping[str, Phase] = {
    RunStatus.SUBMITTED.value: Phase.WAITING,
    RunStatus.APPROVED.value: Phase.WAITING,
    RunStatus.DISPATCHED.value: Phase.RUNNING,
    RunStatus.RUNNING.value: Phase.RUNNING,
    RunStatus.FINISHED_COMPLETED.value: Phase.COMPLETED,
    RunStatus.FINISHED_ABORTED.value: Phase.ABORTED,
}
"""NVFLARE's job status to ours; every other one is a job that failed."""


class ServerObserver(FLComponent):
    """Serves metrics, tells the hub, and ends runs whose process died; registers every run when it is submitted.

    A component of the server's parent process: ``flip-obs install`` puts it into the kit's
    ``local/flip_observability__p_resources.json``. Nothing is done on the threads that fire events, and whatever is
    wrong with it, the server goes on.

    Args:
        host: where metrics are served.
        port: 0 picks a free one.
        tls_cert, tls_key: certificate and key (PEM files), for HTTPS.
        client_ca: let in only clients with a certificate of this CA (PEM file).
        serve: False for no endpoint at all.
    """

    def __init__(
        self,
        *,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        tls_cert: str = "",
        tls_key: str = "",
        client_ca: str = "",
        serve: bool = True,
    ) -> None:
        super().__init__()
        self.host, self.port, self.serve = host, port, serve
        self.tls_cert, self.tls_key, self.client_ca = tls_cert, tls_key, client_ca
        self._lock = threading.Lock()
        self._begun = False
        self._observer: Observer | None = None
        self._sentinel: Sentinel | None = None
        self._registrar: _Registrar | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take one event of the parent process; most cost a look-up."""
        handle = _HANDLERS.get(event_type)
        if handle is None:
            return
        try:
            if event_type != EventType.SYSTEM_END:
                self._begin(fl_ctx)
            handle(self, fl_ctx)
        except Exception as error:  # noqa: BLE001 - the server goes on
            report("server_observer", error, f"cannot handle {event_type}; the server goes on")

    @property
    def observer(self) -> Observer | None:
        """What it runs; None before the first event, and when the settings cannot be used."""
        return self._observer

    def _begin(self, fl_ctx: FLContext) -> None:
        with self._lock:
            if self._begun:
                return
            self._begun = True
            try:
                settings = Settings.load()
            except SettingsError as error:
                # Its text names variables, never values.
                report("server_observer", error, f"{error}. Nothing is observed until the server is started again")
                return
            root = context.workspace_root(fl_ctx) or Path.cwd()
            directory = _ledger_directory(settings, root)
            parent = ServerParent(fl_ctx)
            self._sentinel = Sentinel(settings, directory, parent=parent, workspace=root)
            tls = TLS(*(Path(name) if name else None for name in (self.tls_cert, self.tls_key, self.client_ca)))
            observer = Observer(
                settings,
                directory,
                host=self.host,
                port=self.port,
                tls=tls,
                serve=self.serve,
                sentinel=self._sentinel,
                judge=True,
            )
            self._sentinel.on_final = lambda: observer.nudge("dispatcher")
            # A sentinel that had nothing to do looks once a minute: too late for a job that is aborted in the queue.
            self._registrar = _Registrar(settings, directory, root, lambda: observer.nudge("sentinel"))
            observer.start()
            self._observer = observer
        self.log_info(fl_ctx, f"Observing runs; the ledger is in {directory}", fire_event=False)
        for launcher in parent.foreign_launchers():
            self.log_warning(
                fl_ctx,
                f"Jobs can be started by {launcher}, not as processes of this machine: unless they share the folder "
                f"{directory} with this server, their ends can only be judged by what NVFLARE says of the job",
                fire_event=False,
            )

    def _submitted(self, fl_ctx: FLContext) -> None:
        meta = fl_ctx.get_prop(FLContextKey.JOB_META, None)
        if self._registrar is not None and isinstance(meta, dict):
            self._registrar.submitted(meta)

    def _started(self, fl_ctx: FLContext) -> None:
        job_id = _job_id(fl_ctx)
        if self._registrar is not None and job_id:
            self._registrar.started(job_id)
        self._nudge(fl_ctx)

    def _nudge(self, fl_ctx: FLContext) -> None:
        if self._observer is not None:
            self._observer.nudge("sentinel")

    def _end(self, fl_ctx: FLContext) -> None:
        with self._lock:
            observer, sentinel, registrar = self._observer, self._sentinel, self._registrar
            self._observer = self._sentinel = self._registrar = None
        if registrar is not None:
            registrar.close()
        if observer is not None:
            observer.stop()
        if sentinel is not None:
            sentinel.close()

    def _nothing(self, fl_ctx: FLContext) -> None:
        """Beginning was all."""


_HANDLERS: Mapping[str, Callable[[ServerObserver, FLContext], None]] = {
    EventType.SYSTEM_START: ServerObserver._nothing,
    EventType.SUBMIT_JOB: ServerObserver._submitted,
    EventType.JOB_STARTED: ServerObserver._started,
    EventType.JOB_ABORTED: ServerObserver._nudge,
    EventType.JOB_COMPLETED: ServerObserver._nudge,
    EventType.SYSTEM_END: ServerObserver._end,
}


def _job_id(fl_ctx: FLContext) -> str:
    data = fl_ctx.get_prop(FLContextKey.EVENT_DATA, None)
    job_id = data.get(JobMetaKey.JOB_ID.value) if isinstance(data, Mapping) else None
    return job_id if isinstance(job_id, str) else ""


def _ledger_directory(settings: Settings, root: Path) -> Path:
    """The same folder as the job processes find."""
    return settings.directory or Path(os.environ.get("FLIP_OBSERVABILITY_DIR") or root / LEDGER_FOLDER)


class ServerParent:
    """What the server knows of its jobs, for the sentinel. Its methods are called on the sentinel's threads only.

    Args:
        fl_ctx: any context of the parent process.
    """

    def __init__(self, fl_ctx: FLContext) -> None:
        self._engine: Any = fl_ctx.get_engine()

    def phase(self, job_id: str) -> Phase | None:
        """Where the job is; None when the server knows no such job."""
        manager = self._engine.get_component(SystemComponents.JOB_MANAGER)
        with self._engine.new_context() as fl_ctx:
            job = manager.get_job(job_id, fl_ctx)
        if job is None:
            return None
        status = str(job.meta.get(JobMetaKey.STATUS.value, ""))
        return _PHASES.get(status, Phase.FAILED)

    def is_busy_with(self, job_id: str) -> bool:
        """Whether the server still works on the job: runs it, or is storing what it left."""
        running = getattr(self._engine.job_runner, "running_jobs", {})
        return job_id in running or job_id in self._engine.run_processes

    @contextmanager
    def archive(self, job_id: str) -> Iterator[Path | None]:
        """The zip of the run directory in the job store. A file system's store gives a link: nothing is copied."""
        manager = self._engine.get_component(SystemComponents.JOB_MANAGER)
        with tempfile.TemporaryDirectory(prefix="flip-salvage-") as folder, self._engine.new_context() as fl_ctx:
            if manager.get_job(job_id, fl_ctx) is not None:
                manager.get_storage_for_download(job_id, folder, WORKSPACE, "run.zip", fl_ctx)
            path = Path(folder) / job_id / "run.zip"
            yield path if path.is_file() else None

    def foreign_launchers(self) -> list[str]:
        """Names of launchers that start jobs elsewhere than as processes of this machine."""
        components = self._engine.run_manager.components.values()
        launchers = [part for part in components if isinstance(part, JobLauncherSpec)]
        return sorted({type(part).__name__ for part in launchers if not isinstance(part, ProcessJobLauncher)})


class _Registrar:
    """Writes runs into the ledger when their jobs are submitted and started, on a thread of its own.

    Args:
        settings: of this server.
        directory: the ledger's folder.
        root: the server's workspace.
        on_registered: called when there is a new run.
    """

    def __init__(
        self, settings: Settings, directory: Path, root: Path, on_registered: Callable[[], None] = lambda: None
    ) -> None:
        self._settings, self._directory, self._root = settings, directory, root
        self._on_registered = on_registered
        self._jobs: queue.Queue[dict[str, Any] | str | None] = queue.Queue(MAX_WAITING)
        self._without_id: deque[tuple[dict[str, Any], float]] = deque(maxlen=MAX_WAITING)
        self._closed = threading.Event()
        self._ledger: Ledger | None = None
        threading.Thread(target=self._work, name="flip-registrar", daemon=True).start()

    def submitted(self, meta: dict[str, Any]) -> None:
        """A job was submitted. NVFLARE puts its id into the same dictionary, right after the event."""
        self._put(meta)

    def started(self, job_id: str) -> None:
        """A job was started: its run directory exists now."""
        self._put(job_id)

    def close(self) -> None:
        """End when what waits has been written."""
        self._closed.set()
        self._put(None)

    def _put(self, job: dict[str, Any] | str | None) -> None:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            report("server_observer", "QueueFull", "a job was not registered: the ledger takes them too slowly")

    def _work(self) -> None:
        while not (self._closed.is_set() and self._jobs.empty()):
            try:
                job = self._jobs.get(timeout=ID_PAUSE_SECONDS if self._without_id else None)
            except queue.Empty:
                job = None
            if isinstance(job, dict):
                self._without_id.append((job, time.monotonic() + ID_SECONDS))
            elif job is not None:
                self._try(self._register_started, job)
            self._register_submitted()
        self._drop()

    def _register_submitted(self) -> None:
        """Register those that have their id by now; one that gets none in time was refused, and never became a job."""
        for _ in range(len(self._without_id)):
            meta, deadline = self._without_id.popleft()
            job_id = meta.get(JobMetaKey.JOB_ID.value)
            if isinstance(job_id, str):
                self._try(self._register, job_id, find_model_of_queued_job(dict(meta)))
            elif time.monotonic() < deadline:
                self._without_id.append((meta, deadline))

    def _try(self, register: Callable[..., None], *arguments: Any) -> None:
        for _ in range(ATTEMPTS):
            try:
                register(self._open(), *arguments)
                return
            except Exception as error:  # noqa: BLE001, PERF203 - the next attempt, or the next job, may do better
                report("server_observer", error, "cannot register a job; trying again")
                self._drop()
                self._closed.wait(1.0)

    def _open(self) -> Ledger:
        if self._ledger is not None and not self._ledger.is_current():
            self._drop()
        if self._ledger is None:
            self._ledger = Ledger.open_or_replace(self._directory)
        return self._ledger

    def _drop(self) -> None:
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger.close()

    def _register_started(self, ledger: Ledger, job_id: str) -> None:
        if canonical_uuid(job_id) is None:
            return
        run_dir = self._root / job_id
        if _is_somebody_elses(run_dir):
            ledger.forget_run(new_run_id(job_id))
            return
        self._register(ledger, job_id, find_model_of_job(run_dir))

    def _register(self, ledger: Ledger, job_id: str, found: FoundModel) -> None:
        run_id = canonical_uuid(job_id)
        if run_id is None:
            return  # its process will choose an id that cannot be known here
        row = ledger.run(run_id)
        columns: dict[str, Any] = {}
        if row is None:
            columns = {"job_id": job_id, "net_id": self._settings.net_id, "run_dir": str(self._root / job_id)}
        if found.model_id is not None and (row is None or row["boot_id"] is None):
            columns["model_id"] = found.model_id  # what the process itself found, it knows better
        now = time.time()
        problems = {PROBLEM: now} if found.lost and (row is None or PROBLEM not in row["problems"]) else {}
        if columns or problems:
            ledger.append(Entry(run_id, now, run=columns, problems=problems))
        if problems:
            found.tell(job_id)
        if row is None:
            self._on_registered()


def _is_somebody_elses(run_dir: Path) -> bool:
    """Whether a job was deployed without our components: then it ends its runs itself."""
    found = server_config(run_dir)
    return found is not None and found[1] is not None and MARK not in found[1]

"""The processes of a small site: a job with the real engine and the real components, or an observer.

Begun by :mod:`drills.small` in processes of their own, which can be killed. They do what they are told over a pipe. The
model is the demo's, and trained.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants

import flare_run
from drills.components import Ballast, ServerEventHandler
from flip_observability import ledger
from flip_observability.constants import FlareEvents, FlipEvents
from flip_observability.demo.trainer import WEIGHTS, GlobalEvaluator, NumpyPersistor, initial_weights, load_data, train
from flip_observability.nvflare.components import PersistToS3AndCleanup, ValidationJsonGenerator
from flip_observability.observer import Observer
from flip_observability.sentinel import Phase, Sentinel
from flip_observability.settings import Settings

OURS = ("AWS_", "OTEL_", "FLIP_", "LOCAL_DEV", "INTERNAL_", "UPLOADED_", "NET_ID", "REQUESTS_", "SSL_", "DRILLS_")
STEPS_PER_ROUND = 10
ROUNDS = 60
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class JobSpec:
    """What a job process is told at its start.

    Args:
        root: the server's workspace; made by the job.
        job_id, model_id: whose it is.
        environment: variables of the process.
        log: a file for all that it prints.
        megabytes: of a file in the results that does not compress.
        client: the name of its client.
        name: of the job, in its ``meta.json``.
        network: the name space of the network that it lives in; empty for this one.
        file_system: what the ledger's folder is said to be on; empty for the truth.
        quoting: what the exceptions of its own code say; empty for none.
    """

    root: Path
    job_id: str
    model_id: str
    environment: Mapping[str, str]
    log: Path
    megabytes: int = 0
    client: str = "site-1"
    name: str = "a job"
    network: str = ""
    file_system: str = ""
    quoting: str = ""


@dataclass(frozen=True)
class ObserverSpec:
    """What an observer is told at its start.

    Args:
        directory: the ledger's folder.
        environment, log, network: as for a job.
        archives: job id to the archive that the server's store has of it; None for an observer beside the server.
    """

    directory: Path
    environment: Mapping[str, str]
    log: Path
    network: str = ""
    archives: Mapping[str, Path] | None = field(default=None)


def run_job(spec: JobSpec, pipe: Connection) -> None:
    """A job process: answers every command with the seconds that it took."""
    _settle_in(spec.environment, spec.log, spec.network)
    if spec.file_system:
        _pretend(spec.file_system)
    job = _Job(spec)
    pipe.send(os.getpid())
    _obey(pipe, {"fire": job.fire, "begin": job.begin, "round": job.round, "end": job.end, "panic": job.panic})
    os._exit(0)  # as NVFLARE ends its job processes


def observe(spec: ObserverSpec, pipe: Connection) -> None:
    """An observer with a sentinel, on a free port, which it tells."""
    _settle_in(spec.environment, spec.log, spec.network)
    settings = Settings.load()
    parent = None if spec.archives is None else _Store(spec.archives)
    sentinel = Sentinel(settings, spec.directory, parent=parent)
    observer = Observer(settings, spec.directory, port=0, sentinel=sentinel)
    sentinel.on_final = lambda: observer.nudge("dispatcher")
    observer.start()
    assert observer.exporter is not None
    pipe.send(observer.exporter.port)
    _obey(pipe, {})
    observer.stop()
    os._exit(0)


def _pretend(kind: str) -> None:
    def file_system_of(directory: Path) -> str:
        return kind

    ledger.file_system_of = file_system_of


def hold_lock(path: Path, pipe: Connection) -> None:
    """Keeps a ledger locked against writers until it is told to let go."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=20.0)) as db:
        db.execute("BEGIN IMMEDIATE")
        pipe.send(os.getpid())
        _obey(pipe, {})
        db.execute("ROLLBACK")


def read_as(uid: int, paths: list[Path], pipe: Connection) -> None:
    """Tells which of the files another user can read."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            path.read_bytes()
            found.append(path)
    pipe.send(found)
    pipe.recv()


# -- a job -------------------------------------------------------------------------------------------------------------


class _Quoting(ValidationJsonGenerator):
    """A generator of a researcher's, whose failures quote all that they know."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def handle_evaluation_events(self, event_type: str, fl_ctx: FLContext) -> None:
        raise RuntimeError(self.text)


class _Job:
    """The components of a job, and the events that NVFLARE would fire."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self.run = flare_run.Run(spec.root, spec.job_id, meta={"name": spec.name})
        (self.run.dir / "log.txt").write_text("round 0\n")
        self.weights, self.samples = initial_weights(), load_data()["site-1"]
        self.persistor = NumpyPersistor()
        self.handler = ServerEventHandler(spec.model_id)
        persist = PersistToS3AndCleanup(spec.model_id)
        self.run.components.update(
            persistor=self.persistor,
            json_generator=_Quoting(spec.quoting) if spec.quoting else ValidationJsonGenerator(),
            persist_and_cleanup=persist,
        )
        ballast = [Ballast(spec.megabytes)] if spec.megabytes else []
        for part in (GlobalEvaluator(spec.model_id), persist, *ballast, self.handler):
            self.run.engine.add_handler(part)
        self.signal = Signal()

    def fire(self, name: str, props: Mapping[str, Any] | None = None, peer: str = "") -> float:
        """Fire an event. Returns the seconds that it took."""
        fl_ctx = self.run.context(**{FLContextKey.WORKFLOW: "controller", **(props or {})})
        fl_ctx.set_prop(ReservedKey.RUN_ABORT_SIGNAL, self.signal, private=True, sticky=True)
        if peer:
            fl_ctx.set_peer_context(_peer(peer))
        begun = time.monotonic()
        self.run.engine.fire_event(name, fl_ctx)
        return time.monotonic() - begun

    def begin(self) -> float:
        """Everything that precedes the first round."""
        names = (
            EventType.START_RUN,
            FlipEvents.TRAINING_INITIATED.value,
            FlareEvents.INITIAL_MODEL_LOADED.value,
            EventType.START_WORKFLOW,
            FlareEvents.TRAINING_STARTED.value,
        )
        return max(self.fire(name) for name in names)

    def round(self, number: int) -> float:
        """A round: trained, persisted, measured."""
        rounds = {AppConstants.CURRENT_ROUND: number - 1, AppConstants.NUM_ROUNDS: ROUNDS}
        task = {FLContextKey.TASK_NAME: "train", FLContextKey.TASK_ID: f"task-{number}"}
        took = [self.fire(FlareEvents.ROUND_STARTED.value, rounds)]
        took.append(self.fire(FlareEvents.AFTER_TASK_DATA_FILTER.value, task, self.spec.client))
        self.weights = train(self.weights, self.samples, STEPS_PER_ROUND, 0.1)
        took.append(self.fire(FlareEvents.BEFORE_PROCESS_SUBMISSION.value, task, self.spec.client))
        took.append(self.fire(FlareEvents.BEFORE_LEARNABLE_PERSIST.value, rounds))
        self.persistor.save_model(make_model_learnable({WEIGHTS: self.weights}, {}), self.run.context())
        took.append(self.fire(FlareEvents.AFTER_LEARNABLE_PERSIST.value, rounds))
        took.append(self.fire(FlareEvents.ROUND_DONE.value, rounds))
        return max(took)

    def end(self, abort: bool) -> float:
        """The end of the run. Returns what END_RUN took."""
        if abort:
            self.signal.trigger(True)
        self.fire(EventType.END_WORKFLOW)
        self.fire(FlareEvents.ABOUT_TO_END_RUN.value)
        return self.fire(EventType.END_RUN)

    def panic(self, reason: str) -> None:
        """A component gives up."""
        self.handler.system_panic(reason, self.run.context())


def _peer(name: str) -> FLContext:
    peer = FLContext()
    peer.set_prop(ReservedKey.IDENTITY_NAME, name, private=False, sticky=False)
    return peer


class _Store:
    """What a server would tell: these jobs failed, and here is what they left."""

    def __init__(self, archives: Mapping[str, Path]) -> None:
        self._archives = archives

    def phase(self, job_id: str) -> Phase | None:
        return Phase.FAILED

    def is_busy_with(self, job_id: str) -> bool:
        return False

    @contextlib.contextmanager
    def archive(self, job_id: str) -> Iterator[Path | None]:
        yield self._archives.get(job_id)


# -- a process ---------------------------------------------------------------------------------------------------------


def _settle_in(environment: Mapping[str, str], log: Path, network: str) -> None:
    for name in [name for name in os.environ if name.startswith(OURS)]:
        del os.environ[name]
    os.environ.update(environment)
    tempfile.tempdir = None  # it is remembered by who asked for it first
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    if network:
        _enter(network)


def _enter(network: str) -> None:
    descriptor = os.open(f"/run/netns/{network}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(descriptor)


def _obey(pipe: Connection, table: Mapping[str, Callable[..., Any]]) -> None:
    """Do what is asked, each on a thread, until ``exit``, or until nobody is there to ask."""

    def answer(what: str, arguments: tuple[Any, ...]) -> None:
        pipe.send((what, table[what](*arguments)))

    while True:
        try:
            what, *arguments = pipe.recv()
        except EOFError:
            os._exit(1)
        if what == "exit":
            return
        threading.Thread(target=answer, args=(what, tuple(arguments)), daemon=True).start()

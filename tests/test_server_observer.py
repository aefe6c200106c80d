"""The observer in the server's parent process: its manners in a process of ours, and real deaths on a real site."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
import time
import urllib.request
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.job_def import RunStatus
from nvflare.apis.signal import Signal
from nvflare.apis.workspace import Workspace

import flare_run
from flip_observability import errors
from flip_observability.client import detach
from flip_observability.constants import ModelStatus
from flip_observability.demo.scenarios import MODEL_FILE
from flip_observability.ending import UnendedRun
from flip_observability.ledger import JUDGE, Entry, Ledger
from flip_observability.nvflare.components import ServerEventHandler, ValidationJsonGenerator
from flip_observability.nvflare.server_observer import ServerObserver, _Registrar
from flip_observability.process import current_process
from flip_observability.settings import Settings
from flip_observability.utils import is_valid_uuid
from poc import Poc, poc_site, wait_until

JOB, MODEL = "5e0c9a38-54a1-4b6d-9d4e-1f2f30a94a10", "0f8fad5b-d9cb-469f-a165-70867728950e"


class Engine:
    """As much of a server's engine as is asked of it when there are no jobs."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.run_processes: dict[str, Any] = {}
        self.job_runner = self
        self.running_jobs: dict[str, Any] = {}
        self.run_manager = self
        self.components: dict[str, Any] = {}

    def get_component(self, name: str) -> Any:
        return self

    def get_workspace(self) -> Workspace:
        return self.workspace

    def get_job(self, job_id: str, fl_ctx: FLContext) -> None:
        return None

    def new_context(self) -> FLContext:
        return FLContextManager(engine=self, identity_name="server", job_id="").new_context()


class Server:
    def __init__(self, root: Path) -> None:
        for folder in ("startup", "local"):
            (root / folder).mkdir(parents=True)
        self.root = root
        self.engine = Engine(Workspace(str(root), "server"))
        self.component = ServerObserver(port=0)

    def fire(self, event: str, **props: Any) -> float:
        """Returns the seconds that the thread that fires was held."""
        fl_ctx = self.engine.new_context()
        for key, value in {FLContextKey.WORKSPACE_OBJECT: self.engine.workspace, **props}.items():
            fl_ctx.set_prop(key, value, private=True, sticky=False)
        begun = time.monotonic()
        self.component.handle_event(event, fl_ctx)
        return time.monotonic() - begun

    def deploy(self, job_id: str, path: str = "flip_observability.nvflare.components", **args: Any) -> Path:
        config = self.root / job_id / "app_server" / "config"
        config.mkdir(parents=True)
        component = {"id": "handler", "path": f"{path}.ServerEventHandler", "args": args}
        (config / "config_fed_server.json").write_text(json.dumps({"components": [component]}))
        return self.root / job_id

    def row(self, run_id: str) -> dict[str, Any] | None:
        with Ledger(self.root / "flip_observability") as ledger:
            return ledger.run(run_id)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("LOCAL_DEV", "true")
    for name in ("FLIP_OBSERVABILITY_DIR", "INTERNAL_SERVICE_KEY", "FLIP_API_INTERNAL_URL"):
        monkeypatch.delenv(name, raising=False)
    server = Server(tmp_path / "server")
    yield server
    server.fire(EventType.SYSTEM_END)


def test_it_begins_with_the_system_and_ends_with_it(server: Server) -> None:
    server.fire("_something_else")
    assert not (server.root / "flip_observability").exists()
    server.fire(EventType.SYSTEM_START)
    observer = server.component.observer
    assert observer is not None
    wait_until(lambda: observer.active, 10, "the ledger is its own")
    with Ledger(server.root / "flip_observability") as ledger:  # where the job processes look, too
        assert ledger.live_judge(time.time()) == observer.token
    assert observer.exporter is not None
    url = observer.exporter.url
    wait_until(lambda: observer.last_successes()["sentinel"], 10, "a sweep")
    server.fire(EventType.SYSTEM_END)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/healthz", timeout=5)
    with Ledger(server.root / "flip_observability") as ledger:
        assert ledger.live_observer(time.time()) is None
    server.fire(EventType.SYSTEM_END)


def test_without_an_observer_that_hears_of_jobs_there_is_no_judge(tmp_path: Path) -> None:
    from flip_observability.observer import Observer

    observer = Observer(Settings(), tmp_path, serve=False)
    observer.start()
    wait_until(lambda: observer.active, 10, "active")
    with Ledger(tmp_path) as ledger:
        assert ledger.live_observer(time.time()) == observer.token
        assert ledger.live_judge(time.time()) is None
    observer.stop()


def test_bad_settings_cost_the_server_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_DEV", "false")
    monkeypatch.setenv("FLIP_API_INTERNAL_URL", "nonsense")
    errors.drain()
    for event in (EventType.SYSTEM_START, EventType.SUBMIT_JOB, EventType.JOB_STARTED, EventType.JOB_ABORTED):
        server.fire(event, **{FLContextKey.JOB_META: {"job_id": JOB}})
    assert server.component.observer is None
    assert errors.drain() == {"server_observer": 1}
    assert "FLIP_API_INTERNAL_URL" in caplog.text


def test_a_ledger_that_cannot_be_had_costs_the_server_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (server.root / "file").write_text("")
    monkeypatch.setenv("FLIP_OBSERVABILITY_DIR", str(server.root / "file" / "below"))
    for event in (EventType.SYSTEM_START, EventType.SUBMIT_JOB, EventType.JOB_COMPLETED):
        assert server.fire(event, **{FLContextKey.JOB_META: {"job_id": JOB}}) < 2.0


def test_a_run_is_registered_when_its_job_gets_its_id(server: Server) -> None:
    meta: dict[str, Any] = {"name": "a job", "custom_props": {"model_id": MODEL}}
    assert server.fire(EventType.SUBMIT_JOB, **{FLContextKey.JOB_META: meta}) < 2.0
    time.sleep(0.2)
    meta["job_id"] = JOB  # the job manager does so after the event
    row = wait_until(lambda: server.row(JOB), 10, "the run is registered")
    assert (row["job_id"], row["model_id"], row["boot_id"]) == (JOB, MODEL, None)
    assert row["run_dir"] == str(server.root / JOB)


def test_a_job_that_is_registered_is_watched_at_once(server: Server) -> None:
    server.fire(EventType.SYSTEM_START)
    observer = server.component.observer
    assert observer is not None
    wait_until(lambda: observer.active and observer.last_successes()["sentinel"], 10, "a sweep of nothing")
    time.sleep(0.5)  # from now on it sleeps for a minute
    begun = time.time()
    server.fire(EventType.SUBMIT_JOB, **{FLContextKey.JOB_META: {"name": MODEL, "job_id": JOB}})
    wait_until(lambda: server.row(JOB), 10, "the run is registered")
    wait_until(lambda: observer.last_successes()["sentinel"] > begun, 10, "another sweep")


def test_a_job_that_is_refused_is_never_registered_and_holds_up_no_other(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flip_observability.nvflare.server_observer.ID_SECONDS", 0.2)
    server.fire(EventType.SUBMIT_JOB, **{FLContextKey.JOB_META: {"name": MODEL}})
    server.fire(EventType.SUBMIT_JOB, **{FLContextKey.JOB_META: {"name": MODEL, "job_id": JOB}})
    wait_until(lambda: server.row(JOB), 10, "the second is registered")
    with Ledger(server.root / "flip_observability") as ledger:
        assert len(ledger.runs()) == 1


def test_the_model_id_of_a_started_job_is_that_of_its_configuration(server: Server) -> None:
    server.deploy(JOB, model_id=MODEL.upper())
    server.fire(EventType.JOB_STARTED, **{FLContextKey.EVENT_DATA: {"job_id": JOB}})
    row = wait_until(lambda: server.row(JOB), 10, "the run is registered")
    assert row["model_id"] == MODEL


@pytest.mark.parametrize(
    ("status", "final"), [(RunStatus.FINISHED_CANT_SCHEDULE, "ERROR"), (RunStatus.FINISHED_ABORTED, "STOPPED")]
)
def test_a_job_that_never_began_is_ended_by_what_the_server_says_of_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: RunStatus, final: str
) -> None:
    job = SimpleNamespace(meta={"status": RunStatus.SUBMITTED.value})
    monkeypatch.setattr(server.engine, "get_job", lambda job_id, fl_ctx: job)
    server.fire(EventType.SYSTEM_START)
    server.fire(EventType.SUBMIT_JOB, **{FLContextKey.JOB_META: {"name": MODEL, "job_id": JOB}})
    wait_until(lambda: server.row(JOB), 10, "the run is registered")
    job.meta["status"] = status.value  # no event is fired for it
    row = wait_until(lambda: (row := server.row(JOB)) and row["final_status"] and row, 30, "the end is found")
    assert (row["final_status"], row["model_id"]) == (final, MODEL)
    with Ledger(server.root / "flip_observability") as ledger:
        assert [(item.model_id, item.payload["status"]) for item in ledger.outbox(kind="status")] == [(MODEL, final)]


def test_the_schedulers_thread_is_left_alone(server: Server) -> None:
    for event in (EventType.BEFORE_CHECK_CLIENT_RESOURCES, EventType.AFTER_CHECK_CLIENT_RESOURCES):
        server.fire(event, **{FLContextKey.JOB_META: {"name": MODEL, "job_id": JOB, "schedule_count": 9}})
    assert server.component.observer is None
    assert not (server.root / "flip_observability").exists()


def test_a_queued_job_that_names_two_models_says_so_and_the_other_one_is_told_nothing(server: Server) -> None:
    errors.drain()
    other = str(uuid.uuid4())
    meta = {"name": MODEL, "job_id": JOB, "custom_props": {"model_id": other}}
    server.fire(EventType.SUBMIT_JOB, **{FLContextKey.JOB_META: meta})
    row = wait_until(lambda: server.row(JOB), 10, "the run is registered")
    assert (row["model_id"], list(row["problems"])) == (MODEL, ["model_id"])
    wait_until(lambda: errors.drain().get("model_id") == 1, 10, "the contradiction is counted")
    run_dir = server.deploy(JOB)
    (run_dir / "meta.json").write_text(json.dumps(meta))
    (run_dir / "app_server" / "custom").mkdir()
    (run_dir / "app_server" / "custom" / "config.json").write_text(json.dumps({"FLIP_MODEL_ID": MODEL}))
    second = str(uuid.uuid4())
    for job in (JOB, second):
        server.fire(EventType.JOB_STARTED, **{FLContextKey.EVENT_DATA: {"job_id": job}})
    wait_until(lambda: server.row(second), 10, "the later one is registered")
    row = server.row(JOB)
    assert row is not None
    assert row["model_id"] == MODEL
    with Ledger(server.root / "flip_observability") as ledger:
        ledger.append(Entry(JOB, time.time(), run={"boot_id": "b"}))
        # The server's own sentinel may be quicker: a process of boot "b" is gone.
        unended = UnendedRun.read(ledger, JOB)
        if unended is not None:
            unended.finalise(ledger, ModelStatus.ERROR, time.time(), "sentinel")
        finished = server.row(JOB)
        assert finished is not None
        assert finished["final_status"] is not None
        assert {item.model_id for item in ledger.outbox()} == {MODEL}


def test_what_the_process_itself_knows_is_not_overwritten(server: Server) -> None:
    server.fire(EventType.SYSTEM_START)
    with Ledger(server.root / "flip_observability") as ledger:
        ledger.append(Entry(JOB, 1.0, run={"boot_id": "b", "model_id": MODEL, "run_dir": "/elsewhere"}))
    server.deploy(JOB, model_id=str(uuid.uuid4()))
    other = str(uuid.uuid4())
    for job in (JOB, other):
        server.fire(EventType.JOB_STARTED, **{FLContextKey.EVENT_DATA: {"job_id": job}})
    wait_until(lambda: server.row(other), 10, "the later one is registered")
    row = server.row(JOB)
    assert row is not None
    assert (row["model_id"], row["run_dir"]) == (MODEL, "/elsewhere")


def test_a_job_of_somebody_elses_components_is_forgotten(server: Server) -> None:
    server.fire(EventType.SUBMIT_JOB, **{FLContextKey.JOB_META: {"name": MODEL, "job_id": JOB}})
    wait_until(lambda: server.row(JOB), 10, "the run is registered")
    server.deploy(JOB, path="flip.nvflare.components")
    server.fire(EventType.JOB_STARTED, **{FLContextKey.EVENT_DATA: {"job_id": JOB}})
    wait_until(lambda: server.row(JOB) is None, 10, "the run is forgotten")


@pytest.mark.parametrize("data", [None, {}, {"job_id": 7}, "text", {"job_id": "../../etc"}, {"job_id": "x" * 10_000}])
def test_odd_events_do_no_harm(server: Server, data: Any) -> None:
    for event in (EventType.JOB_STARTED, EventType.JOB_ABORTED, EventType.JOB_COMPLETED, EventType.SUBMIT_JOB):
        server.fire(event, **{FLContextKey.EVENT_DATA: data, FLContextKey.JOB_META: data})
    server.fire(EventType.JOB_STARTED, **{FLContextKey.EVENT_DATA: {"job_id": JOB}})
    wait_until(lambda: server.row(JOB), 10, "what comes later is registered")


def test_a_registrar_that_is_overrun_counts_and_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flip_observability.nvflare.server_observer.MAX_WAITING", 3)
    errors.drain()
    registrar = _Registrar(Settings(), tmp_path, tmp_path)
    held = threading.Event()
    monkeypatch.setattr(registrar, "_register_started", lambda *_: held.wait(10))
    begun = time.monotonic()
    for _ in range(10):
        registrar.started(JOB)
    assert time.monotonic() - begun < 2.0
    assert errors.drain()["server_observer"] >= 6
    held.set()
    registrar.close()
    wait_until(lambda: not any(t.name == "flip-registrar" for t in threading.enumerate()), 10, "its thread has ended")


# -- what a job process leaves to it -----------------------------------------------------------------------------------


def claim_for(directory: Path, token: str, age: float = 0.0) -> None:
    with Ledger(directory) as ledger:
        assert ledger.claim_observer(token, time.time() - age)


class NothingToUpload:
    model_id = MODEL

    def execute(self, fl_ctx: FLContext) -> None:
        """There are no results."""


HERE, GONE = current_process(), dataclasses.replace(current_process(), start_ticks=1)
AWAY = dataclasses.replace(HERE, pid_ns="pid:[1]")


@pytest.mark.parametrize(
    ("owner", "age", "left"),
    [
        pytest.param(None, 0.0, False, id="nobody"),
        pytest.param(f"{HERE.token()}|x{JUDGE}", 0.0, True, id="a judge"),
        pytest.param(f"{HERE.token()}|x", 0.0, False, id="an observer that hears nothing of jobs"),
        pytest.param(f"{GONE.token()}|x{JUDGE}", 0.0, False, id="a judge that died"),
        pytest.param(f"{AWAY.token()}|x{JUDGE}", 0.0, True, id="a judge in another container"),
        pytest.param(f"{AWAY.token()}|x{JUDGE}", 31.0, False, id="a judge in a container that is no more"),
    ],
)
@pytest.mark.parametrize("fatal", [False, True])
def test_an_abort_is_judged_by_who_can_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str | None, age: float, left: bool, fatal: bool
) -> None:
    """Rule 5: with an observer in the parent process the job process leaves the status to it; else it says STOPPED."""
    monkeypatch.setenv("LOCAL_DEV", "true")
    monkeypatch.setenv("FLIP_OBSERVABILITY_DIR", str(tmp_path / "ledger"))
    if owner is not None:
        claim_for(tmp_path / "ledger", owner, age)
    run = flare_run.Run(tmp_path / "server")
    run.components |= {"json_generator": ValidationJsonGenerator(), "persist_and_cleanup": NothingToUpload()}
    handler = ServerEventHandler(MODEL)
    signal = Signal()
    signal.trigger("abort")
    events = [EventType.START_RUN, *([EventType.FATAL_SYSTEM_ERROR] if fatal else [])]
    for event in (*events, EventType.ABOUT_TO_END_RUN, EventType.END_RUN):
        handler.handle_event(event, run.context(**{ReservedKey.RUN_ABORT_SIGNAL: signal}))
    detach()
    with Ledger(tmp_path / "ledger") as ledger:
        row = ledger.run(flare_run.JOB_ID)
        told = [item.payload["status"] for item in ledger.outbox(run_id=flare_run.JOB_ID, kind="status")]
    assert row is not None
    final = "ERROR" if fatal else None if left else "STOPPED"
    assert row["final_status"] == final
    assert told == ([final] if final else [])
    assert row["intent"] == ("ERROR" if fatal else "ABORT_UNRESOLVED")
    assert row["ended"] == (final is not None)


# -- a real site -------------------------------------------------------------------------------------------------------


def model_in(poc: Poc, key: str, folder: Path) -> tuple[Any, list[dict[str, Any]], set[str]]:
    """The weights and the measurements in an archive, and all names."""
    with zipfile.ZipFile(poc.bucket.download(key, folder / "results.zip")) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        weights = np.load(io.BytesIO(archive.read(MODEL_FILE)))["weights"]
        lines = [json.loads(line) for line in archive.read("global_metrics.jsonl").splitlines()]
    return weights, lines, names


def finished(poc: Poc) -> dict[str, float]:
    """What the observer's endpoint says of runs that ended."""
    with urllib.request.urlopen(f"http://127.0.0.1:{poc.port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {
        line.split("}")[0].partition('status="')[2].rstrip('"'): float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("flip_runs_finished_total{")
    } | {
        name: float(line.rpartition(" ")[2])
        for line in lines
        for name in ("flip_orphaned_runs_total", "flip_aborts_total")
        if line.startswith(f"{name}{{")
    }


@pytest.mark.nvflare_job
@pytest.mark.timeout(300)
def test_deaths_aborts_and_a_queue_on_a_real_site(tmp_path: Path) -> None:
    """Four jobs at once: one killed, one aborted, one that loses a client, one that waits in vain and is aborted."""
    killed, aborted, deserted, queued, orphan = (str(uuid.uuid4()) for _ in range(5))
    with poc_site(tmp_path) as poc:
        poc.start_all()
        with poc.session() as session:
            jobs = {model: poc.submit(session, model, rounds=60, pace=0.5) for model in (killed, aborted, deserted)}
            jobs[queued] = poc.submit(
                session, queued, change=lambda meta, _: meta.update(mandatory_clients=["site-9"], min_clients=1)
            )
            for model in (killed, aborted, deserted):
                poc.wait_for_round(jobs[model], 3, seconds=90)
            row = poc.run(jobs[killed])
            assert row is not None
            assert is_valid_uuid(row["model_id"])
            poc.wait_for_job_process(jobs[killed]).kill()
            status, seconds = poc.wait_for_final(killed, 30)
            assert status == "ERROR", seconds
            session.abort_job(jobs[aborted])
            assert poc.wait_for_final(aborted, 30)[0] == "STOPPED"
            client = poc.job_process(jobs[deserted], "site-1")
            assert client is not None
            client.kill()
            assert poc.wait_for_final(deserted, 30)[0] == "ERROR"
            assert poc.final_statuses(queued) == []
            session.abort_job(jobs[queued])
            assert poc.wait_for_final(queued, 30)[0] == "STOPPED"
            (key,) = wait_until(lambda: poc.archives(killed), 30, "the salvaged results")
            assert key.endswith("-salvaged.zip")
            weights, lines, names = model_in(poc, key, tmp_path)
            assert weights.shape == (31,)
            assert len(lines) >= 2
            assert "log.txt" in names
            assert not any(name.startswith("app_server") for name in names)
            for model in (aborted, deserted):
                assert len(poc.archives(model)) == 1
            assert poc.archives(queued) == []
            wanted = {"ERROR": 2.0, "STOPPED": 2.0, "flip_orphaned_runs_total": 1.0, "flip_aborts_total": 2.0}
            wait_until(lambda: finished(poc).items() >= wanted.items(), 10, "the metrics")
            job = poc.submit(session, orphan, rounds=60, pace=0.5)
            poc.wait_for_round(job, 2)
        process = poc.wait_for_job_process(job)
        poc.kill("server")
        psutil.wait_procs([process], 30)
        poc.start_server()
        assert poc.wait_for_final(orphan, 60)[0] == "ERROR"
        (key,) = wait_until(lambda: poc.archives(orphan), 30, "the salvaged results")
        assert model_in(poc, key, tmp_path)[0].shape == (31,)
        for model in (killed, aborted, deserted, queued, orphan):
            assert len(poc.final_statuses(model)) == 1
        assert poc.bucket.unfinished_uploads() == []
        wait_until(lambda: finished(poc).get("flip_orphaned_runs_total") == 2.0, 10, "the metrics, over a restart")
        assert poc.hub.key not in poc.log("server")

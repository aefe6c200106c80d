"""The sentinel on real ledgers with processes that really die; only the server's word about a job is made up here."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from flip_observability import process
from flip_observability.constants import FlareEvents, FlipEvents, OwnEvents
from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.ending import SALVAGE
from flip_observability.errors import drain
from flip_observability.ledger import FILE_NAME, Entry, Ledger, OutboxItem
from flip_observability.lifecycle import Event
from flip_observability.process import ProcessIdentity, current_process
from flip_observability.sentinel import IDLE_SECONDS, Patience, Phase, Sentinel
from flip_observability.settings import Settings
from flip_observability.spool import Spool
from flip_observability.tracing import Tracing
from history import Run
from otlp_sink import OtlpSink
from poc import wait_until
from s3_faults import Fault, FaultProxy, error
from waiting import process_of


class Parent:
    """What a server says of its jobs."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase | Exception] = {}
        self.busy: set[str] = set()
        self.archives: dict[str, Path] = {}
        self.asked: Callable[[str], None] = lambda job_id: None

    def phase(self, job_id: str) -> Phase | None:
        self.asked(job_id)
        found = self.phases.get(job_id)
        if isinstance(found, Exception):
            raise found
        return found

    def is_busy_with(self, job_id: str) -> bool:
        return job_id in self.busy

    def archive(self, job_id: str) -> AbstractContextManager[Path | None]:
        return contextlib.nullcontext(self.archives.get(job_id))


class Site:
    """A ledger, a folder for results, runs with and without processes, and a sentinel."""

    def __init__(self, root: Path) -> None:
        self.root, self.directory = root, root / "ledger"
        self.bucket = root / "bucket"
        self.ledger = Ledger(self.directory)
        self.parent = Parent()
        self.time = 0.0  # seconds that the sentinel's own clock is ahead
        self.variables = {"LOCAL_DEV": "true", "UPLOADED_FEDERATED_DATA_BUCKET": self.bucket.as_uri()}
        self.children: list[subprocess.Popen[bytes]] = []
        self.sentinels: list[Sentinel] = []

    def sentinel(
        self,
        *,
        parent: bool = True,
        patience: Patience | None = None,
        tracing: Tracing | None = None,
        workspace: Path | None = None,
    ) -> Sentinel:
        sentinel = Sentinel(
            Settings(**self.variables),  # type: ignore[arg-type]
            self.directory,
            parent=self.parent if parent else None,
            workspace=workspace,
            patience=patience or Patience(),
            tracing=tracing,
            monotonic=lambda: time.monotonic() + self.time,
        )
        self.sentinels.append(sentinel)
        return sentinel

    def begin(self, identity: ProcessIdentity | None = None, *, rounds: int = 1, **columns: Any) -> Run:
        """A run in training, by a process that is no more unless one is named."""
        run_id = str(uuid.uuid4())
        run_dir = self.root / "server" / run_id
        (run_dir / "models").mkdir(parents=True)
        (run_dir / "log.txt").write_text("round 1\n")
        (run_dir / "models" / "model.npz").write_bytes(b"\0round 1")
        run = Run(self.ledger, run_id=run_id, run_dir=str(run_dir))
        run.train({"site-1": 2.0}, rounds)
        run.at(run.now + 1, FlareEvents.ROUND_STARTED, round=rounds + 1, total_rounds=60)
        self.set(run, **(identity or self.dead()).columns(), heartbeat=run.begin + run.now, **columns)
        return run

    def register(self, model_id: str | None = None) -> Run:
        """A job that was submitted and has no process."""
        return Run(self.ledger, model_id=model_id or str(uuid.uuid4()))

    def set(self, run: Run, **columns: Any) -> None:
        self.ledger.append(Entry(run.run_id, run.begin + run.now, run=columns))

    def start(self) -> ProcessIdentity:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self.children.append(child)
        ticks = process._start_ticks(child.pid)
        assert ticks is not None
        return dataclasses.replace(current_process(), pid=child.pid, start_ticks=ticks)

    def dead(self) -> ProcessIdentity:
        return dataclasses.replace(current_process(), start_ticks=1)  # this pid, but long before

    def row(self, run: Run) -> dict[str, Any]:
        row = self.ledger.run(run.run_id)
        assert row is not None
        return row

    def final(self, run: Run) -> str | None:
        return self.row(run)["final_status"]  # type: ignore[no-any-return]

    def wait_for(self, run: Run, column: str, value: Any, seconds: float = 20.0) -> None:
        wait_until(lambda: self.row(run)[column] == value, seconds, f"{column} = {value}", every=0.02)

    def names(self, run: Run) -> list[str]:
        return [row["name"] for row in self.ledger.events(run.run_id)]

    def facts(self, run: Run, name: str) -> list[Any]:
        return [fact for row in self.ledger.events(run.run_id) for fact in row["facts"] if fact[0] == name]

    def told(self, run: Run) -> list[str]:
        """The statuses for the hub that are not superseded."""
        rows = self.ledger.outbox(run_id=run.run_id, kind="status", states=["pending", "delivered"])
        return [row.payload["status"] for row in rows]

    def archive_of(self, run: Run) -> dict[str, bytes]:
        (path,) = (self.bucket / run.model_id).glob("*-salvaged.zip")
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}

    def close(self) -> None:
        for sentinel in self.sentinels:
            sentinel.close(5.0)
        for child in self.children:
            child.kill()
            child.wait(10)
        self.ledger.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


FILES = {"log.txt": b"round 1\n", "models/model.npz": b"\0round 1"}


# -- alive or gone -----------------------------------------------------------------------------------------------------


def test_a_run_is_left_alone_while_its_process_lives_and_ended_when_it_is_killed(site: Site) -> None:
    run = site.begin(site.start())
    site.parent.phases[run.run_id] = Phase.RUNNING
    sentinel = site.sentinel()
    os.kill(site.children[0].pid, signal.SIGSTOP)
    site.time = 10_000.0  # one that is stopped has no heartbeat, and lives
    assert sentinel.sweep() <= 5.0
    assert site.final(run) is None
    site.children[0].kill()
    site.children[0].wait()
    site.parent.phases[run.run_id] = Phase.FAILED
    told = []
    sentinel.on_final = lambda: told.append(site.final(run))
    sentinel.sweep()
    assert site.final(run) == "ERROR"
    assert told == ["ERROR"]
    assert site.row(run)["final_by"] == "sentinel"
    site.wait_for(run, "intent", "SALVAGED")
    assert site.archive_of(run) == FILES
    assert site.row(run)["results_uri"].endswith("-salvaged.zip")
    assert site.sentinel().sweep() == sentinel.sweep() == IDLE_SECONDS
    assert site.told(run) == ["ERROR"]
    assert [site.names(run).count(name) for name in (OwnEvents.ORPHANED, OwnEvents.FINAL_STATUS)] == [1, 1]
    assert [len(site.facts(run, name)) for name in ("orphaned", "run_finished", "upload_size")] == [1, 1, 1]
    assert site.row(run)["problems"].keys() == {"orphaned"}


def test_between_two_sweeps_is_less_than_a_death_may_take_to_be_known(site: Site) -> None:
    assert site.sentinel(parent=False).sweep() <= 20.0
    site.begin(site.start())
    assert site.sentinel(parent=False).sweep() <= 5.0


def test_when_a_process_died_is_not_before_its_death_where_it_was_watched(site: Site) -> None:
    watched, unwatched = site.begin(site.start()), site.begin()
    sentinel = site.sentinel(parent=False)
    last_sign = max(site.row(unwatched)[name] for name in ("heartbeat", "last_event"))
    sentinel.sweep()
    assert _died(site, unwatched) == last_sign
    time.sleep(0.2)
    killed = time.time()
    site.children[0].kill()
    site.children[0].wait()
    sentinel.sweep()
    assert killed <= _died(site, watched) <= time.time()


def _died(site: Site, run: Run) -> float:
    (died,) = [row["attrs"]["died"] for row in site.ledger.events(run.run_id) if row["name"] == OwnEvents.ORPHANED]
    return float(died)


def test_a_zombie_is_gone(site: Site) -> None:
    run = site.begin(site.start())
    site.children[0].kill()
    wait_until(lambda: process._start_ticks(site.children[0].pid) is None, 5, "a zombie")
    site.sentinel(parent=False).sweep()
    assert site.final(run) == "ERROR"


def test_after_a_reboot_nothing_lives(site: Site) -> None:
    here = current_process()
    run = site.begin(dataclasses.replace(here, boot_id="another"))
    site.sentinel(parent=False).sweep()
    assert site.final(run) == "ERROR"


@pytest.mark.parametrize("parent", [True, False])
def test_of_a_process_that_cannot_be_seen_the_heartbeat_tells(site: Site, parent: bool) -> None:
    run = site.begin(dataclasses.replace(current_process(), pid_ns="pid:[1]"))
    site.set(run, heartbeat=1.0)  # an old one says nothing by itself: clocks differ
    site.parent.busy.add(run.run_id)
    sentinel = site.sentinel(parent=parent)
    for seconds, heartbeat in ((0.0, 1.0), (119.0, 2.0), (230.0, 2.0)):
        site.time = seconds
        site.set(run, heartbeat=heartbeat)
        sentinel.sweep()
        assert site.final(run) is None
    site.time = 240.0
    sentinel.sweep()
    assert (site.final(run) is None) is parent  # the server still lists it
    site.parent.busy.clear()
    sentinel.sweep()
    assert site.final(run) == "ERROR"


@pytest.mark.parametrize("named", ["first", "observer", "parent"])
def test_a_row_that_names_a_process_of_no_job_ends_by_its_silence(site: Site, named: str) -> None:
    identity = {"first": process_of(1), "observer": current_process(), "parent": process_of(os.getppid())}[named]
    run = site.begin(identity)
    sentinel = site.sentinel(parent=False)
    for seconds, heartbeat in ((0.0, 1.0), (110.0, 2.0), (220.0, 2.0)):  # it is heard: a container's first process, say
        site.time = seconds
        site.set(run, heartbeat=heartbeat)
        sentinel.sweep()
        assert site.final(run) is None
    site.time = 240.0
    sentinel.sweep()
    assert site.final(run) == "ERROR"


@pytest.mark.parametrize("hidden", [("_stat", None), ("_boot_id", ""), ("_pid_name_space", "")], ids=lambda h: h[0])
def test_a_live_run_is_not_ended_because_its_process_cannot_be_looked_at(
    site: Site, hidden: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = site.begin(site.start())
    sentinel = site.sentinel(parent=False)
    monkeypatch.setattr(process, hidden[0], lambda *_: hidden[1])
    for number in range(5):
        site.time = 100.0 * number
        site.set(run, heartbeat=float(number))
        sentinel.sweep()
        assert site.final(run) is None


def test_a_person_is_told_once_of_a_process_that_lives_and_is_silent(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    run = site.begin(site.start())
    sentinel = site.sentinel(parent=False)
    counts = []
    for seconds in (0.0, 590.0, 610.0, 900.0, 10_000.0):
        site.time = seconds
        sentinel.sweep()
        counts.append(drain().get("sentinel", 0))
    assert counts == [0, 0, 1, 0, 0]
    assert f"of run {run.run_id} lives and was not heard for 10 min" in caplog.text
    assert site.final(run) is None


def test_the_server_is_given_a_moment_to_say_how_the_job_ended(site: Site) -> None:
    run, stuck = site.begin(), site.begin()
    site.parent.phases = {run.run_id: Phase.RUNNING, stuck.run_id: Phase.RUNNING}
    site.parent.busy = {run.run_id, stuck.run_id}
    sentinel = site.sentinel()
    assert sentinel.sweep() <= 1.0
    assert site.final(run) is None
    site.parent.phases[run.run_id] = Phase.ABORTED
    site.parent.busy.remove(run.run_id)
    sentinel.sweep()
    assert (site.final(run), site.final(stuck)) == ("STOPPED", None)
    site.time = 121.0
    sentinel.sweep()
    assert site.final(stuck) == "ERROR"


# -- judging -----------------------------------------------------------------------------------------------------------

ABORT = FlipEvents.ABORTED.value
FATAL = FlareEvents.FATAL_SYSTEM_ERROR.value
UPLOADED = {"results_uri": "s3://bucket/x.zip", "results_bytes": 1, "results_files": 1}


@pytest.mark.parametrize(
    ("events", "intent", "phase", "final"),
    [
        ((), None, Phase.FAILED, "ERROR"),
        ((), None, Phase.RUNNING, "ERROR"),  # the server that ran it died, too
        ((), None, Phase.COMPLETED, "ERROR"),
        ((), None, Phase.ABORTED, "STOPPED"),
        ((), None, None, "ERROR"),
        ((ABORT,), None, None, "STOPPED"),  # nobody can be asked
        ((ABORT,), None, Phase.FAILED, "ERROR"),  # a client died
        ((ABORT,), "ABORT_UNRESOLVED", Phase.ABORTED, "STOPPED"),
        ((ABORT,), "ABORT_UNRESOLVED", Phase.FAILED, "ERROR"),
        ((ABORT,), "ABORT_UNRESOLVED", Phase.RUNNING, "ERROR"),
        ((ABORT,), "ABORT_UNRESOLVED", None, "STOPPED"),
        ((FATAL,), None, Phase.ABORTED, "ERROR"),
        ((FATAL,), "ERROR", Phase.FAILED, "ERROR"),
        ((), "ERROR", Phase.ABORTED, "ERROR"),
        ((), "UPLOAD_PENDING", Phase.ABORTED, "RESULTS_UPLOADED"),
        ((), "UPLOAD_PENDING", Phase.FAILED, "RESULTS_UPLOADED"),
        ((), "UPLOAD_PENDING", None, "RESULTS_UPLOADED"),
    ],
)
@pytest.mark.parametrize("uploaded", [True, False])
def test_judgement(
    site: Site, events: tuple[str, ...], intent: str | None, phase: Phase | None, final: str, uploaded: bool
) -> None:
    run = site.begin()
    for name in events:
        run.at(run.now + 1, name)
    site.set(run, intent=intent, **(UPLOADED if uploaded else {}))
    if phase is not None:
        site.parent.phases[run.run_id] = phase
    site.sentinel().sweep()
    site.wait_for(run, "final_status", final)
    assert site.told(run) == [final]
    assert ("orphaned" in site.row(run)["problems"]) is (final != "STOPPED")
    if not uploaded:
        site.wait_for(run, "intent", "SALVAGED")
        assert site.archive_of(run) == FILES
    else:
        assert not site.bucket.exists()


def test_a_run_that_ended_and_only_left_its_status_to_us_is_no_orphan(site: Site) -> None:
    run = site.begin()
    run.at(run.now + 1, FlareEvents.ABOUT_TO_END_RUN, aborted=True)
    site.set(run, intent="ABORT_UNRESOLVED", **UPLOADED)
    run.at(run.now + 2, FlareEvents.END_RUN)
    site.parent.phases[run.run_id] = Phase.FAILED
    site.sentinel().sweep()
    assert site.final(run) == "ERROR"
    assert site.row(run)["problems"] == {}
    assert site.facts(run, "run_finished") == [["run_finished", 1, {"status": "ERROR"}]]


@pytest.mark.parametrize(
    ("phase", "final"), [(Phase.WAITING, None), (Phase.ABORTED, "STOPPED"), (Phase.FAILED, "ERROR")]
)
def test_a_job_that_never_started(site: Site, phase: Phase, final: str | None) -> None:
    run = site.register()
    site.parent.phases[run.run_id] = phase
    sentinel = site.sentinel()
    for site.time in (0.0, 100_000.0):
        assert sentinel.sweep() <= 5.0 or final
        assert site.final(run) == final
    assert site.told(run) == ([final] if final else [])
    assert site.facts(run, "orphaned") == []


def test_a_job_that_vanished_from_the_store_before_it_started(site: Site) -> None:
    run, sentinel = site.register(), site.sentinel()
    sentinel.sweep()
    assert site.final(run) is None  # it may be on its way into the store
    site.time = 61.0
    sentinel.sweep()
    assert site.final(run) == "STOPPED"


def test_a_job_that_the_server_died_before_starting(site: Site) -> None:
    run, sentinel = site.register(), site.sentinel()
    site.parent.phases[run.run_id] = Phase.RUNNING
    sentinel.sweep()
    site.parent.busy.add(run.run_id)
    site.time = 121.0
    sentinel.sweep()  # a slow start
    site.parent.busy.clear()
    sentinel.sweep()
    assert site.final(run) is None
    site.time = 250.0
    sentinel.sweep()
    assert site.final(run) == "ERROR"


def test_a_job_without_our_components_is_not_ours_to_end(site: Site) -> None:
    run = site.register()
    site.parent.phases[run.run_id] = Phase.COMPLETED
    site.sentinel().sweep()
    assert site.ledger.run(run.run_id) is None
    assert site.ledger.outbox() == []


def test_without_a_server_to_ask_registrations_are_left_alone(site: Site) -> None:
    run = site.register()
    assert site.sentinel(parent=False).sweep() == IDLE_SECONDS
    assert site.final(run) is None


def test_a_run_whose_model_is_unknown_gets_its_status_all_the_same(site: Site) -> None:
    run = site.begin(model_id=None)
    site.sentinel().sweep()
    assert site.final(run) == "ERROR"
    assert all(not row.final for row in site.ledger.outbox(run_id=run.run_id))


# -- other writers -----------------------------------------------------------------------------------------------------


def test_the_first_writer_wins(site: Site) -> None:
    run = site.begin()

    def another(job_id: str) -> None:
        event = Event(OwnEvents.FINAL_STATUS.value, time.time(), {"status": "STOPPED"})
        item = OutboxItem(run.model_id, "status", {"status": "STOPPED"}, final=True)
        entry = Entry(run.run_id, event.time, event, final_status="STOPPED", final_by="operator", outbox=(item,))
        site.ledger.append(entry)

    site.parent.asked = another
    site.sentinel().sweep()
    assert (site.final(run), site.row(run)["final_by"]) == ("STOPPED", "operator")
    assert site.told(run) == ["STOPPED"]
    assert site.row(run)["intent"] is None


def test_what_a_dead_process_told_its_spool_counts(site: Site) -> None:
    """A process that could not write the ledger has told the hub by itself; ERROR would contradict it."""
    run = site.begin()
    event = Event(FlareEvents.END_RUN.value, time.time(), {"status": "RESULTS_UPLOADED"})
    item = OutboxItem(run.model_id, "status", {"status": "RESULTS_UPLOADED"}, final=True)
    spool = Spool(site.directory)
    spool._owner = site.dead()
    spool.add(Entry(run.run_id, event.time, event, final_status="RESULTS_UPLOADED", final_by="job", outbox=(item,)))
    site.sentinel().sweep()
    assert (site.final(run), site.row(run)["final_by"]) == ("RESULTS_UPLOADED", "job")


# -- salvage -----------------------------------------------------------------------------------------------------------


def block(site: Site) -> Callable[[], None]:
    """No results arrive, until what is returned is called."""
    site.bucket.write_text("a file where the folder should be")
    return site.bucket.unlink


FAST = Patience(salvage=3.0)


def test_results_that_a_run_could_not_upload_itself_follow(site: Site) -> None:
    run = site.begin()
    for name, attrs in (
        (FlareEvents.ABOUT_TO_END_RUN, {}),
        (FlipEvents.RESULTS_UPLOAD_STARTED, {}),
        (OwnEvents.UPLOAD_FAILED, {"reason": "timeout"}),
        (FlareEvents.END_RUN, {"status": "ERROR"}),
    ):
        run.at(run.now + 1, name, **attrs)
    site.set(run, intent=SALVAGE)
    site.sentinel().sweep()
    site.wait_for(run, "intent", "SALVAGED")
    assert site.archive_of(run) == FILES
    assert site.told(run) == ["ERROR"], "the hub's status is final"
    assert [len(site.facts(run, name)) for name in ("orphaned", "upload_failure", "upload_size")] == [0, 1, 1]


@pytest.mark.parametrize(("contract", "failed"), [("2026-05", "ERROR"), ("2026-10", "RESULTS_UPLOAD_FAILED")])
def test_a_final_status_does_not_wait_for_ever_for_its_upload_and_results_follow(
    site: Site, contract: str, failed: str
) -> None:
    unblock = block(site)
    site.variables["FLIP_HUB_CONTRACT"] = contract
    run = site.begin(intent="UPLOAD_PENDING")
    sentinel = site.sentinel(patience=FAST)
    sentinel.sweep()
    wait_until(lambda: site.facts(run, "orphaned"), 5, "the process is known to be dead")
    site.time = 1.5
    sentinel.sweep()
    assert site.final(run) is None
    site.time = 600.0
    site.wait_for(run, "final_status", failed)
    assert site.told(run) == [failed]
    assert site.row(run)["problems"].keys() == {"orphaned", "upload_failed"}
    assert len(site.facts(run, "upload_failure")) == 1
    unblock()
    site.time = 5_000.0
    site.wait_for(run, "intent", "SALVAGED")
    assert site.archive_of(run) == FILES
    assert site.told(run) == [failed]
    assert len(site.facts(run, "upload_failure")) == 1


def test_an_upload_that_works_in_time_is_an_upload(site: Site) -> None:
    unblock = block(site)
    run = site.begin(intent="UPLOAD_PENDING")
    site.sentinel().sweep()
    time.sleep(0.3)
    unblock()
    site.time = 60.0
    site.wait_for(run, "final_status", "RESULTS_UPLOADED")
    assert len(site.facts(run, "upload_duration")) == 1
    assert site.facts(run, "upload_failure") == []
    assert site.row(run)["intent"] == "SALVAGED"


def test_a_run_that_could_not_reach_the_bucket_is_gone_on_with_while_its_process_lives(site: Site) -> None:
    unblock = block(site)
    run = site.begin(site.start(), intent="UPLOAD_PENDING")
    sentinel = site.sentinel()
    sentinel.sweep()
    time.sleep(0.2)
    assert not sentinel._salvager.has(run.run_id), "it is still at it"
    run.at(run.now + 1, FlareEvents.ABOUT_TO_END_RUN)
    run.at(run.now + 2, FlareEvents.END_RUN)
    sentinel.sweep()
    time.sleep(0.3)
    site.time = 500.0
    sentinel.sweep()
    time.sleep(0.3)
    assert site.final(run) is None
    unblock()
    site.time = 550.0
    site.wait_for(run, "final_status", "RESULTS_UPLOADED")
    assert site.told(run) == ["RESULTS_UPLOADED"]
    assert site.archive_of(run) == FILES
    assert site.row(run)["problems"] == {}, "nothing died, and in the end nothing failed"


def test_the_status_of_a_crashed_run_does_not_wait_for_the_bucket(site: Site) -> None:
    unblock = block(site)
    run, other = site.begin(), site.begin()
    site.sentinel(patience=FAST).sweep()
    assert (site.final(run), site.final(other)) == ("ERROR", "ERROR")
    site.time = 600.0
    wait_until(lambda: site.facts(run, "upload_failure"), 10, "the failed salvage is counted")
    unblock()
    site.sentinels[0].close(10)
    site.sentinel().sweep()  # the next observer goes on
    site.wait_for(run, "intent", "SALVAGED")
    site.wait_for(other, "intent", "SALVAGED")
    assert site.archive_of(other) == FILES


def test_the_archive_of_the_job_store_is_taken_when_the_server_is_done_with_it(site: Site, tmp_path: Path) -> None:
    run = site.begin()
    site.parent.phases[run.run_id] = Phase.FAILED
    sentinel = site.sentinel()
    sentinel.sweep()
    site.wait_for(run, "intent", "SALVAGED")  # from the run directory
    stored = site.begin()
    with zipfile.ZipFile(tmp_path / "workspace", "w") as archive:
        archive.writestr("log.txt", "from the store")
    site.parent.archives[stored.run_id] = tmp_path / "workspace"
    site.parent.phases[stored.run_id] = Phase.FAILED
    sentinel.sweep()
    site.wait_for(stored, "intent", "SALVAGED")
    assert site.archive_of(stored) == {"log.txt": b"from the store"}


@pytest.mark.parametrize("stored", [True, False])
def test_the_kit_is_that_of_the_servers_own_workspace(site: Site, tmp_path: Path, stored: bool) -> None:
    """Wherever a row of the ledger says that the run's directory is."""
    key = tmp_path / "workspace" / "startup" / "server.key"
    key.parent.mkdir(parents=True)
    key.write_bytes(b"CANARY key")
    run = site.begin()
    run_dir = Path(site.row(run)["run_dir"])
    (run_dir / "notes.txt").hardlink_to(key)
    (run_dir / "log.json").write_bytes(key.read_bytes())
    if stored:
        archived(site, run, tmp_path / "archive")
        site.parent.phases[run.run_id] = Phase.FAILED
    site.sentinel(workspace=tmp_path / "workspace").sweep()
    site.wait_for(run, "intent", "SALVAGED")
    found = site.archive_of(run)
    assert found.get("log.txt") == FILES["log.txt"]
    assert b"CANARY" not in b"".join(found.values())


def archived(site: Site, run: Run, path: Path) -> None:
    """What NVFLARE does when a job is over: archive the run directory, links followed, and remove it."""
    run_dir = Path(site.row(run)["run_dir"])
    with zipfile.ZipFile(path, "w") as archive:
        for folder, _, files in os.walk(run_dir, followlinks=True):
            for name in files:
                archive.write(Path(folder) / name, os.path.relpath(Path(folder) / name, run_dir))
    shutil.rmtree(run_dir)
    site.parent.archives[run.run_id] = path


def test_what_was_behind_a_link_is_not_in_what_is_salvaged(site: Site, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"CANARY")
    run = site.begin(site.start())
    run_dir = Path(site.row(run)["run_dir"])
    (run_dir / "extra.bin").write_bytes(b"the run's own")
    (run_dir / "early").symlink_to(tmp_path / "outside" / "secret")
    sentinel = site.sentinel()
    sentinel.sweep()  # at a heartbeat
    wait_until(lambda: site.ledger.links(run.run_id), 10, "the first look")
    before = site.ledger.links(run.run_id)
    (run_dir / "late").symlink_to(tmp_path / "outside")
    site.parent.busy.add(run.run_id)
    site.children[0].kill()
    site.children[0].wait()
    sentinel.sweep()  # at the death
    wait_until(lambda: site.ledger.links(run.run_id) != before, 10, "the last look")
    archived(site, run, tmp_path / "workspace")
    site.parent.busy.clear()
    site.parent.phases[run.run_id] = Phase.FAILED
    sentinel.sweep()
    site.wait_for(run, "intent", "SALVAGED")
    assert site.archive_of(run) == FILES | {"extra.bin": b"the run's own"}


@pytest.mark.parametrize("intent", ["UPLOAD_PENDING", None])
def test_when_nothing_is_left(site: Site, intent: str | None) -> None:
    run = site.begin(intent=intent, run_dir=str(site.root / "nowhere"))
    site.sentinel().sweep()
    for site.time in (10.0, 30.0, 90.0):
        time.sleep(0.3)
    site.wait_for(run, "intent", "SALVAGE_FAILED")
    assert site.told(run) == ["ERROR"]
    assert ("upload_failed" in site.row(run)["problems"]) is (intent is not None)


@pytest.mark.parametrize("known", [True, False], ids=["id-written-down", "killed-before-that"])
def test_what_a_killed_upload_left_in_the_bucket_is_removed(
    site: Site, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    with EmbeddedBucket() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        site.variables |= {
            "LOCAL_DEV": "false",
            "INTERNAL_SERVICE_KEY": "key",
            "UPLOADED_FEDERATED_DATA_BUCKET": bucket.destination,
        }
        client = bucket.client()
        key = "demo/x/half.zip"
        upload_id = client.create_multipart_upload(Bucket=bucket.name, Key=key)["UploadId"]
        assert bucket.unfinished_uploads() == [key]
        run = site.begin(intent="UPLOAD_PENDING", upload_key=key, upload_id=upload_id if known else None)
        site.sentinel().sweep()
        site.wait_for(run, "final_status", "RESULTS_UPLOADED")
        assert bucket.unfinished_uploads() == []
        assert len(bucket.objects()) == 1
        assert site.row(run)["upload_id"] is None


def test_a_bucket_that_lists_no_uploads_gets_the_results_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedBucket() as bucket:
        host, _, port = bucket.endpoint_url.removeprefix("http://").partition(":")
        proxy = FaultProxy((host, int(port)))
        proxy.faults = [Fault("ListMultipartUploads", error(403, "AccessDenied"))]
        for name, value in {**bucket.environment, "AWS_ENDPOINT_URL_S3": proxy.url}.items():
            monkeypatch.setenv(name, value)
        site.variables |= {
            "LOCAL_DEV": "false",
            "INTERNAL_SERVICE_KEY": "key",
            "UPLOADED_FEDERATED_DATA_BUCKET": bucket.destination,
        }
        run = site.begin(intent="UPLOAD_PENDING", upload_key="demo/x/begun.zip")
        site.sentinel().sweep()
        site.wait_for(run, "final_status", "RESULTS_UPLOADED")
        proxy.stop()
        assert proxy.seen[0] == "ListMultipartUploads"
        assert len(bucket.objects()) == 1


# -- poison ------------------------------------------------------------------------------------------------------------


def poison_history(site: Site, run: Run) -> None:
    with contextlib.closing(sqlite3.connect(site.directory / FILE_NAME)) as db, db:
        attrs = '{"round": 1e999, "client": "canary-4711"}'
        changed = db.execute(
            "UPDATE events SET attrs = ? WHERE name = '_round_started' AND run_id = ?", (attrs, run.run_id)
        )
        assert changed.rowcount


def poison_parent(site: Site, run: Run) -> None:
    site.parent.phases[run.run_id] = ValueError("canary-4711")


def poison_identity(site: Site, run: Run) -> None:
    with contextlib.closing(sqlite3.connect(site.directory / FILE_NAME)) as db, db:
        db.execute("UPDATE runs SET heartbeat = 'canary-4711', last_event = 3 WHERE run_id = ?", (run.run_id,))


@pytest.mark.parametrize("poison", [poison_history, poison_parent, poison_identity])
def test_a_poisoned_run_holds_up_no_other_and_gets_its_status_too(
    site: Site, poison: Callable[[Site, Run], None], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = site.begin(), site.begin()
    poison(site, first)
    site.parent.phases[second.run_id] = Phase.FAILED
    sentinel = site.sentinel()
    with caplog.at_level(logging.INFO):
        sentinel.sweep()
        assert site.final(second) == "ERROR"
        for _ in range(8):
            site.time += 20.0
            sentinel.sweep()
    assert site.final(first) == "ERROR"
    assert site.told(first)[-1:] == ["ERROR"]
    assert "canary-4711" not in caplog.text


@pytest.mark.parametrize("poison", [None, poison_history, poison_parent])
def test_a_runs_id_cannot_break_a_line_of_the_log(
    site: Site, poison: Callable[[Site, Run], None] | None, caplog: pytest.LogCaptureFixture
) -> None:
    run = site.begin()
    if poison is not None:
        poison(site, run)
    evil = "evil\n2030-01-01 - ERROR - all is lost \x1b[2J\x9b\u202e" + "x" * 10_000
    with contextlib.closing(sqlite3.connect(site.directory / FILE_NAME)) as db, db:
        for table in ("runs", "events", "outbox"):
            db.execute(f"UPDATE {table} SET run_id = ? WHERE run_id = ?", (evil, run.run_id))
        db.execute("UPDATE runs SET model_id = ? WHERE run_id = ?", (evil, evil))
    sentinel = site.sentinel()
    with caplog.at_level(logging.DEBUG, "flip_observability"):
        for _ in range(8):
            site.time += 20.0
            sentinel.sweep()
    row = site.ledger.run(evil)
    assert row is not None
    assert row["final_status"] == "ERROR"
    told = [message for message in caplog.messages if "evil" in message]
    assert told
    assert all(message.isprintable() and len(message) < 1_500 for message in told)


def test_an_archive_that_raises_costs_nobody_else(site: Site) -> None:
    class Raising(Parent):
        def archive(self, job_id: str) -> AbstractContextManager[Path | None]:
            if job_id == poisoned.run_id:
                raise RuntimeError("canary")
            return super().archive(job_id)

    site.parent = Raising()
    poisoned, waiting, fine = site.begin(), site.begin(intent="UPLOAD_PENDING"), site.begin()
    site.sentinel().sweep()
    site.wait_for(fine, "intent", "SALVAGED")
    site.wait_for(waiting, "final_status", "RESULTS_UPLOADED")
    assert site.final(poisoned) == "ERROR"
    assert site.row(poisoned)["intent"] == "SALVAGE"


def test_a_ledger_that_is_replaced_is_opened_anew(site: Site) -> None:
    sentinel = site.sentinel()
    sentinel.sweep()
    for path in site.directory.glob(f"{FILE_NAME}*"):
        path.unlink()
    site.ledger = Ledger(site.directory)
    run = site.begin()
    sentinel.sweep()
    assert site.final(run) == "ERROR"


# -- traces ------------------------------------------------------------------------------------------------------------


def test_the_trace_of_a_dead_run_is_completed_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with OtlpSink("http/protobuf") as sink:
        for name, value in sink.environment.items():
            monkeypatch.setenv(name, value)
        poisoned, run = site.begin(), site.begin()
        poison_history(site, poisoned)
        site.sentinel()._end_plainly(site.ledger, site.row(poisoned))
        tracing = Tracing(Settings(**site.variables))  # type: ignore[arg-type]
        for sentinel in (site.sentinel(tracing=tracing), site.sentinel(tracing=tracing)):
            sentinel.sweep()
            sentinel.sweep()
        of_run = uuid.UUID(run.run_id).hex
        wait_until(lambda: any(s.name == "flip.run" and s.trace_id == of_run for s in sink.spans), 20, "the root")
        time.sleep(0.5)
        tracing.close()
        received = [span for span in sink.spans if span.trace_id == of_run]
        spans = {span.span_id: span for span in received}
        assert len(spans) == len(received)
        (root,) = [span for span in spans.values() if span.name == "flip.run"]
        assert root.attributes["flip.status"] == "ERROR"
        assert {"flip.round", "flip.training"} <= {span.name for span in spans.values()}
        assert all(span.parent_id in spans for span in spans.values() if span is not root)

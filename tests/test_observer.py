"""The observer: real ledgers, a real hub, real processes that die."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

import waiting
from flip_observability import _page, errors, observer
from flip_observability.constants import FlareEvents
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.exporter import ExporterError
from flip_observability.hub import Dispatcher
from flip_observability.ledger import (
    FILE_NAME,
    OBSERVER_SECONDS,
    SILENT_OBSERVER_SECONDS,
    Entry,
    Ledger,
    LedgerCorruptError,
    LedgerError,
    OutboxItem,
    set_aside,
)
from flip_observability.lifecycle import Event
from flip_observability.metrics import MetricsFold
from flip_observability.observer import Observer
from flip_observability.process import current_process
from flip_observability.recorder import RunIdentity, RunRecorder
from flip_observability.settings import Settings
from flip_observability.spool import Spool
from history import Run
from waiting import process_of, wait_for

MODEL = "3f0f3fbc-9d5b-4a3a-8f5e-0d8a5d1c7e11"
LOOPS = {"heartbeat", "fold", "dispatcher", "upkeep"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(observer, "STANDBY_SECONDS", 0.1)
    monkeypatch.setattr(observer, "FOLD_SECONDS", 0.05)
    monkeypatch.setattr(observer, "FIRST_BACKOFF", 0.05)
    monkeypatch.setattr(observer, "UPKEEP_SECONDS", 0.2)
    monkeypatch.setattr(observer, "DISPATCHER_SECONDS", 0.2)


def settings(**more: Any) -> Settings:
    return Settings.model_validate({"LOCAL_DEV": True, "NET_ID": "net-1"} | more)


@contextlib.contextmanager
def observing(folder: Path, *, wait: bool = True, **more: Any) -> Iterator[Observer]:
    given: dict[str, Any] = {"settings": settings(), "port": 0, "insist": True} | more
    one = Observer(given.pop("settings"), folder, **given)
    one.start()
    try:
        if wait:
            wait_for(lambda: get(one, "/readyz")[0] == 200)
        yield one
    finally:
        one.stop()


def get(one: Observer | int, path: str = "/metrics") -> tuple[int, str]:
    port = one if isinstance(one, int) else one.exporter.port if one.exporter else 0
    return waiting.get(f"http://127.0.0.1:{port}{path}")


def value(one: Observer, name: str, **labels: str) -> float | None:
    code, page = get(one)
    for family in text_string_to_metric_families(page if code == 200 else ""):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None


def test_in_another_users_folder_the_server_makes_the_ledger(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with observing(folder, wait=False, make_ledger=False) as one:
        wait_for(lambda: "another user's" in get(one, "/readyz")[1])
        assert str(folder) in get(one, "/readyz")[1]
        time.sleep(0.5)
        assert list(folder.iterdir()) == []
        with Ledger(folder):
            wait_for(lambda: get(one, "/readyz")[0] == 200)
    assert len([message for message in caplog.messages if "Waiting for it" in message]) == 1
    assert not one.active


# -- what it does ------------------------------------------------------------------------------------------------------


def test_it_serves_what_the_ledger_holds(folder: Path) -> None:
    with Ledger(folder) as ledger:
        run = Run(ledger)
        run.train({"site-1": 2})
        run.finish()
        with observing(folder) as one:
            assert value(one, "flip_runs_finished_total", status="RESULTS_UPLOADED") == 1
            assert value(one, "flip_ledger_writable") == 1
            other = Run(ledger)
            other.at(0, FlareEvents.START_RUN)
            wait_for(lambda: value(one, "flip_runs_started_total") == 2)
            page = get(one, "/")[1]
            assert "net-1" in page
            assert str(folder) in page


def test_a_scrape_makes_no_line_that_the_last_one_had(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = _page._Format._text

    def counting(format_: _page._Format, families: list[Family]) -> str:
        made.append(sum(len(family.samples) for family in families))
        return make(format_, families)

    monkeypatch.setattr(_page._Format, "_text", counting)
    with Ledger(folder) as ledger, observing(folder) as one:
        Run(ledger).train({"site-1": 2})
        wait_for(lambda: value(one, "flip_runs_started_total") == 1)
        assert sum(made) > 300
        made.clear()
        Run(ledger).at(0, FlareEvents.START_RUN)
        wait_for(lambda: value(one, "flip_runs_started_total") == 2)
        assert 0 < max(made) < 50


def test_its_loops_show_when_they_last_did_their_work(folder: Path) -> None:
    class Sentinel:
        def sweep(self) -> None:
            """Nothing to find."""

    begun = time.time()
    with observing(folder, sentinel=Sentinel()) as one:
        for name in LOOPS | {"sentinel"}:
            last = value(one, "flip_observer_loop_last_success_timestamp_seconds", loop=name)
            assert last is not None, name
            assert begun - 1 <= last <= time.time()
        before = one.last_successes()
        wait_for(lambda: all(one.last_successes()[name] > before[name] for name in ("heartbeat", "fold")))


def test_it_tells_the_hub_what_was_left_behind(folder: Path) -> None:
    with EmbeddedHub(model_ids=[MODEL]) as hub, Ledger(folder) as ledger:
        item = OutboxItem(MODEL, "status", {"status": "ERROR"}, final=True)
        ledger.append(Entry(str(uuid.uuid4()), time.time(), outbox=(item,)))
        told = settings(LOCAL_DEV=False, FLIP_API_INTERNAL_URL=hub.url, INTERNAL_SERVICE_KEY=hub.key)
        with observing(folder, settings=told):
            wait_for(lambda: [record.status for record in hub.records if record.accepted] == ["ERROR"])
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("flip-observer")]


def test_it_takes_in_spools_and_forgets_what_is_old(folder: Path) -> None:
    long_ago = time.time() - 100 * 86_400
    with Ledger(folder) as ledger:
        old = Run(ledger, begin=long_ago, tells_hub=False)
        old.train({"site-1": 2})
        old.finish()
        spooled = str(uuid.uuid4())
        code = (
            "import sys, pathlib; from flip_observability.spool import Spool; from flip_observability.ledger import "
            "Entry; Spool(pathlib.Path(sys.argv[1])).add(Entry(sys.argv[2], 1e9, run={'net_id': 'spooled'}))"
        )
        subprocess.run([sys.executable, "-c", code, str(folder), spooled], check=True)
        mine = Spool(folder)
        mine.add(Entry(str(uuid.uuid4()), time.time()))
        with observing(folder):
            wait_for(lambda: ledger.run(spooled) is not None)
            wait_for(lambda: ledger.run(old.run_id) is None)
        assert mine.path.exists()  # its process lives


def test_own_errors_are_counted_in_the_ledger(folder: Path) -> None:
    with observing(folder) as one:
        errors.report("results", "Something", "a test")
        errors.report("results", "Something", "a test")
        wait_for(lambda: value(one, "flip_observability_errors_total", component="results") == 2)
        errors.report("salvage", "Something", "a test")
        wait_for(lambda: value(one, "flip_observability_errors_total", component="salvage") == 1)
        assert value(one, "flip_observability_errors_total", component="results") == 2


def test_errors_that_could_not_be_written_are_not_forgotten(folder: Path) -> None:
    with observing(folder) as one, contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as database:
        database.execute("CREATE TRIGGER t BEFORE INSERT ON events BEGIN SELECT RAISE(ABORT, 'no'); END")
        errors.report("results", "Something", "a test")
        wait_for(lambda: errors._counts["observer"])
        database.execute("DROP TRIGGER t")
        wait_for(lambda: value(one, "flip_observability_errors_total", component="results") == 1)


def test_503_until_everything_has_been_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = threading.Event()
    monkeypatch.setattr(MetricsFold, "catch_up", lambda _: counted.wait(0.05))
    with observing(folder, wait=False) as one:
        wait_for(lambda: one.active)
        for path in ("/metrics", "/readyz"):
            code, text = get(one, path)
            assert (code, "counted" in text) == (503, True)
        assert get(one, "/healthz")[0] == 200
        counted.set()
        wait_for(lambda: get(one)[0] == 200)


# -- a loop that fails -------------------------------------------------------------------------------------------------


class Fragile:
    """A sentinel that fails as it is told."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.sweeps = 0

    def sweep(self) -> None:
        self.sweeps += 1
        if self.failures:
            raise self.failures.pop(0)


def test_a_sentinel_that_raises_is_tried_again_counted_and_holds_nobody_up(folder: Path) -> None:
    sentinel = Fragile(ValueError("accession-4711"), OSError("accession-4711"), RuntimeError("accession-4711"))
    with observing(folder, sentinel=sentinel) as one:
        wait_for(lambda: sentinel.sweeps == 4)
        wait_for(lambda: value(one, "flip_observability_errors_total", component="observer") == 3)
        one.nudge("sentinel")
        wait_for(lambda: sentinel.sweeps == 5)
        assert sentinel.sweeps == 5


def test_a_loop_that_keeps_failing_backs_off_and_is_visible(folder: Path) -> None:
    sentinel = Fragile(*[ValueError()] * 1_000)
    with observing(folder, sentinel=sentinel) as one:
        stale = value(one, "flip_observer_loop_last_success_timestamp_seconds", loop="sentinel")
        wait_for(lambda: sentinel.sweeps >= 4)
        assert value(one, "flip_observer_loop_last_success_timestamp_seconds", loop="sentinel") == stale
        assert sentinel.sweeps < 20
        assert get(one, "/readyz")[0] == 200


def test_the_log_tells_the_type_alone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with observing(folder, sentinel=Fragile(ZeroDivisionError("accession-4711"))):
        wait_for(lambda: "sentinel" in caplog.text)
    assert "ZeroDivisionError" in caplog.text
    assert "4711" not in caplog.text


def test_a_dispatcher_that_is_stuck_is_built_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []

    class Stuck(Dispatcher):
        def start(self) -> None:
            built.append(self)
            if len(built) > 1:
                super().start()

    monkeypatch.setattr(observer, "Dispatcher", Stuck)
    monkeypatch.setattr(observer, "STALLED_SECONDS", 0.3)
    monkeypatch.setattr(observer, "DISPATCHER_SECONDS", 0.2)
    with observing(folder):
        wait_for(lambda: len(built) == 2)


# -- a ledger that something happens to --------------------------------------------------------------------------------


def _delete(folder: Path) -> None:
    for path in folder.glob(f"{FILE_NAME}*"):
        path.unlink()


def _delete_folder(folder: Path) -> None:
    _delete(folder)
    folder.rmdir()


def _truncate(folder: Path) -> None:
    os.truncate(folder / FILE_NAME, 0)


def _truncate_half(folder: Path) -> None:
    os.truncate(folder / FILE_NAME, 3 * 4096 + 17)


def _scribble(folder: Path) -> None:
    with Ledger(folder) as ledger:  # nothing is left in the write-ahead log: what the file holds is what there is
        wait_for(lambda: ledger._rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0] == 0)
    with (folder / FILE_NAME).open("r+b") as file:
        file.write(b"\xa5" * (folder / FILE_NAME).stat().st_size)


def _replace(folder: Path) -> None:
    _delete(folder)
    Ledger(folder).close()


@pytest.mark.parametrize(
    "harm",
    [_delete, _delete_folder, _truncate, _truncate_half, _scribble, _replace],
    ids=lambda harm: harm.__name__.strip("_"),
)
def test_harm_to_the_ledger_is_survived(folder: Path, harm: Callable[[Path], None]) -> None:
    with Ledger(folder) as before:
        for _ in range(20):
            run = Run(before)
            run.train({"site-1": 1})
            run.finish()
    with observing(folder) as one:
        assert value(one, "flip_runs_finished_total", status="RESULTS_UPLOADED") == 20
        harm(folder)
        wait_for(lambda: _a_run_fails(folder))
        wait_for(lambda: value(one, "flip_runs_finished_total", status="ERROR") == 1)
        wait_for(lambda: value(one, "flip_ledger_writable") == 1)
        assert get(one, "/readyz") == (200, "ready\n")
        with Ledger(folder, read_only=True) as ledger:  # it is the new file that it holds and looks after
            wait_for(lambda: ledger.live_observer(time.time()) == one.token)
            ledger_of = {loop.name: loop._connection for loop in (one._keeper, *one._loops)}
            wait_for(lambda: not any(connection.is_stale() for connection in ledger_of.values()))


def _a_run_fails(folder: Path) -> bool:
    """As a job's process would see to it: one that finds the ledger damaged sets it aside."""
    try:
        with Ledger.open_or_replace(folder) as ledger:
            try:
                run = Run(ledger)
                run.train({"site-1": 1})
                run.finish("ERROR")
            except LedgerCorruptError:
                set_aside(folder, ledger.inode)
                return False
    except LedgerError:
        return False
    return True


def test_a_corrupt_ledger_is_set_aside_not_deleted(folder: Path) -> None:
    with observing(folder) as one:
        _scribble(folder)
        wait_for(lambda: list(folder.glob("*.corrupt-*")))
        wait_for(lambda: get(one, "/readyz")[0] == 200)
    kept = [path for path in folder.glob("*.corrupt-*") if not path.name.endswith(("-wal", "-shm"))]
    assert [path.read_bytes()[:3] for path in kept] == [b"\xa5" * 3]


def test_a_locked_ledger_is_not_writable_and_then_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flip_observability.ledger.BUSY_MS", 100)
    with observing(folder) as one, contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as database:
        for loop in (one._keeper, *one._loops):
            loop._connection.ledger()._db.execute("PRAGMA busy_timeout=100")
        database.isolation_level = None
        database.execute("BEGIN IMMEDIATE")
        wait_for(lambda: value(one, "flip_ledger_writable") == 0)
        assert one.active
        database.execute("ROLLBACK")
        wait_for(lambda: value(one, "flip_ledger_writable") == 1)
        assert not list(folder.glob("*.corrupt-*"))


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with observing(tmp_path / "file", wait=False) as one:
        wait_for(lambda: "cannot be written" in get(one, "/readyz")[1])
        assert get(one)[0] == 503
        assert get(one, "/healthz")[0] == 200
        (tmp_path / "file").unlink()
        wait_for(lambda: get(one, "/readyz")[0] == 200)


def test_a_scrape_while_sixteen_runs_write(folder: Path) -> None:
    begun = threading.Barrier(17)

    def write() -> None:
        with Ledger(folder) as ledger:
            run = Run(ledger)
            begun.wait(60)
            run.train({"site-1": 1, "site-2": 1}, rounds=5)
            run.finish()

    with observing(folder) as one:
        threads = [threading.Thread(target=write) for _ in range(16)]
        for thread in threads:
            thread.start()
        begun.wait(60)
        while any(thread.is_alive() for thread in threads):
            assert get(one)[0] == 200
        wait_for(lambda: value(one, "flip_runs_finished_total", status="RESULTS_UPLOADED") == 16)


# -- one at a time -----------------------------------------------------------------------------------------------------


def _says(one: Observer, text: str) -> bool:
    return text in get(one, "/readyz")[1]


def test_only_one_serves_and_the_others_say_who(folder: Path) -> None:
    with observing(folder) as first, observing(folder, wait=False) as second, observing(folder, wait=False) as third:
        for other in (second, third):
            wait_for(partial(_says, other, "has it"))
            for path in ("/metrics", "/readyz"):
                code, text = get(other, path)
                assert code == 503
                assert f"process {os.getpid()}" in text
            assert get(other, "/healthz")[0] == 200
            assert not other.active
        first.stop()
        wait_for(lambda: second.active or third.active)
        time.sleep(0.5)
        assert [second.active, third.active].count(True) == 1
        heir = second if second.active else third
        wait_for(lambda: get(heir)[0] == 200)


def test_one_that_was_killed_is_followed_at_once(folder: Path) -> None:
    code = (
        "import sys, pathlib, time; from flip_observability.observer import Observer; "
        "from flip_observability.settings import Settings; "
        "one = Observer(Settings(), pathlib.Path(sys.argv[1]), serve=False); one.start()\n"
        "while not one.active: time.sleep(0.05)\n"
        "print('active', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "active\n"
            with observing(folder, wait=False) as one:
                wait_for(lambda: f"process {process.pid}" in get(one, "/readyz")[1])
                process.send_signal(signal.SIGSTOP)  # it lives, and comes back
                time.sleep(1)
                assert not one.active
                process.kill()
                process.wait()
                wait_for(lambda: get(one)[0] == 200, OBSERVER_SECONDS / 2)
        finally:
            process.kill()


def test_who_observes_a_ledger(folder: Path) -> None:
    mine = f"{current_process().token()}|a"
    theirs = f"{current_process().token()}|b"
    here = current_process()
    dead = f"{here.boot_id}|{here.pid_ns}|{here.pid}|{here.start_ticks + 1}|c"
    unseen = f"{here.boot_id}|pid:[1]|1|1|d"
    with Ledger(folder) as ledger:
        assert ledger.observer_heartbeat() is None
        assert ledger.live_observer(0) is None
        assert ledger.claim_observer(mine, 1_000)
        assert ledger.claim_observer(mine, 2_000)
        assert ledger.observer_heartbeat() == (mine, 2_000)
        assert not ledger.claim_observer(theirs, 2_599)  # longer than of one that is not seen: the process lives
        assert ledger.live_observer(2_599) == mine
        ledger.release_observer(theirs)
        assert ledger.live_observer(2_599) == mine
        assert ledger.live_observer(2_601) is None  # it is stopped, or was never an observer
        ledger.release_observer(mine)
        assert ledger.claim_observer(dead, 3_000)
        assert ledger.live_observer(3_000) is None
        assert ledger.claim_observer(unseen, 3_000)
        assert not ledger.claim_observer(mine, 3_000 + OBSERVER_SECONDS - 1)
        assert ledger.claim_observer(mine, 3_000 + OBSERVER_SECONDS)
        ledger.release_observer(mine)
        assert ledger.claim_observer(unseen, 9_000)
        assert ledger.claim_observer(mine, 3_000)  # the clock was set back: a heartbeat from the future says nothing


def test_a_process_that_is_no_observer_is_not_waited_for(folder: Path) -> None:
    here = current_process()
    with subprocess.Popen(["sleep", "60"]) as child, Ledger(folder) as ledger:
        wait_for(lambda: os.readlink(f"/proc/{child.pid}/exe").endswith(("sleep", "coreutils", "busybox")))
        try:
            # A container's first process may be an observer; a shell's command is none.
            for hostile, seconds in (
                (process_of(1), SILENT_OBSERVER_SECONDS),
                (process_of(child.pid), OBSERVER_SECONDS),
            ):
                now = 10_000.0 * seconds
                assert ledger.claim_observer(f"{hostile.token()}|x", now)
                assert not ledger.claim_observer(f"{here.token()}|a", now + OBSERVER_SECONDS - 1)
                assert ledger.claim_observer(f"{here.token()}|a", now + seconds + 1)
                ledger.release_observer(f"{here.token()}|a")
        finally:
            child.kill()


def test_two_claims_at_once(folder: Path) -> None:
    Ledger(folder).close()
    won: list[str] = []
    barrier = threading.Barrier(8)

    def claim(number: int) -> None:
        with Ledger(folder) as ledger:
            barrier.wait(30)
            token = f"{current_process().token()}|{number}"
            if ledger.claim_observer(token, time.time()):
                won.append(token)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1


@pytest.mark.parametrize("nonsense", ["", "null", "5", '["a"]', '{"a": 1}', '["a", "b"]'])
def test_nonsense_in_place_of_a_heartbeat_is_nobody(folder: Path, nonsense: str) -> None:
    with Ledger(folder) as ledger:
        ledger._db.execute("INSERT INTO meta VALUES ('observer', ?)", (nonsense,))
        assert ledger.observer_heartbeat() is None
        assert ledger.claim_observer("a", 1)


# -- starting and stopping ---------------------------------------------------------------------------------------------


def test_a_taken_port_is_an_error_in_the_log_and_does_not_stop_the_rest(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "LISTEN_AGAIN_SECONDS", 0.2)
    with observing(folder) as first:
        assert first.exporter is not None
        port = first.exporter.port
        with pytest.raises(ExporterError, match="--port"):
            Observer(settings(), folder, port=port, insist=True).start()
        with observing(folder, port=port, insist=False, wait=False) as second:
            assert "--port" in caplog.text
            first.stop()
            wait_for(lambda: second.active)
            wait_for(lambda: get(port)[0] == 200)
            assert value(second, "flip_observability_errors_total", component="exporter") is not None


def test_without_an_endpoint(folder: Path) -> None:
    with observing(folder, serve=False, wait=False) as one:
        assert one.exporter is None
        wait_for(lambda: one.active)


def test_start_and_stop_as_often_as_one_likes(folder: Path) -> None:
    one = Observer(settings(), folder, port=0)
    one.stop()
    for _ in range(3):
        one.start()
        one.start()
        wait_for(lambda: get(one)[0] == 200)
        one.stop()
        one.stop()
        assert not one.active
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("flip-observer")]
        with Ledger(folder) as ledger:
            assert ledger.observer_heartbeat() is None


def test_stopping_folds_what_has_just_happened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "FOLD_SECONDS", 600.0)
    with Ledger(folder) as ledger:
        with observing(folder):
            now = time.time()
            ledger.append(Entry(None, now, Event("x", now, {}), (("runs_started", 1.0, {}),)))
            last = ledger.events()[-1]["id"]
        assert ledger._rows("SELECT value FROM meta WHERE key = 'metrics_cursor'")[0][0] == str(last)


def test_it_does_not_keep_a_process_from_ending(folder: Path) -> None:
    code = (
        "import sys, pathlib; from flip_observability.observer import Observer; "
        "from flip_observability.settings import Settings\n"
        "class Stuck:\n"
        "    def sweep(self):\n"
        "        __import__('threading').Event().wait()\n"
        "one = Observer(Settings(), pathlib.Path(sys.argv[1]), port=0, sentinel=Stuck()); one.start(); print('over')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "over\n"


def test_nothing_is_left_open(folder: Path) -> None:
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    with observing(folder):
        pass
    before = descriptors()
    for _ in range(5):
        with observing(folder) as one:
            get(one)
    wait_for(lambda: descriptors() <= before + 4, 10)


def test_a_run_leaves_the_chores_to_an_observer_that_lives(folder: Path) -> None:
    spooled = str(uuid.uuid4())
    with Ledger(folder) as ledger:
        ledger.claim_observer(f"{current_process().token()}|x", time.time())
        (folder / "spool-1-x.jsonl").write_text(Entry(spooled, time.time(), run={"net_id": "spooled"}).to_json() + "\n")
        for lives in (True, False):
            recorder = RunRecorder(RunIdentity(str(uuid.uuid4())), settings(), folder)
            try:
                wait_for(lambda recorder=recorder: all(recorder._due))  # type: ignore[misc]
            finally:
                recorder.close()
            assert (ledger.run(spooled) is None) is lives
            ledger.release_observer(f"{current_process().token()}|x")

"""The recorder against a real hub and a real file, and the ways in which either is not there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flip_observability.constants import FlareEvents, FlipEvents
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.hub import Dispatcher, HubTransport
from flip_observability.ledger import Entry, Ledger, OutboxItem
from flip_observability.process import ProcessIdentity, current_process
from flip_observability.recorder import RunIdentity, RunRecorder, new_run_id
from flip_observability.settings import Settings
from flip_observability.spool import RESERVED_BYTES, Spool, second_place, take_spools


@pytest.fixture
def hub() -> Iterator[EmbeddedHub]:
    with EmbeddedHub() as server:
        yield server


@pytest.fixture
def model_id() -> str:
    return str(uuid.uuid4())


def settings_for(hub: EmbeddedHub, contract: str = "2026-05") -> Settings:
    return Settings.model_validate(
        {
            "LOCAL_DEV": False,
            "FLIP_API_INTERNAL_URL": hub.url,
            "INTERNAL_SERVICE_KEY": hub.key,
            "FLIP_HUB_CONTRACT": contract,
        }
    )


@pytest.fixture
def start(hub: EmbeddedHub, model_id: str, tmp_path: Path) -> Iterator[Callable[[], RunRecorder]]:
    recorders: list[RunRecorder] = []

    def begin() -> RunRecorder:
        identity = RunIdentity(str(uuid.uuid4()), "job-1", model_id, "net", str(tmp_path))
        recorders.append(RunRecorder(identity, settings_for(hub), tmp_path / "ledger"))
        return recorders[-1]

    yield begin
    for recorder in recorders:
        recorder.close()


def train(recorder: RunRecorder) -> None:
    recorder.record(FlareEvents.START_RUN)
    recorder.record(FlipEvents.TRAINING_INITIATED)
    recorder.record(FlareEvents.INITIAL_MODEL_LOADED)
    recorder.record(FlareEvents.TRAINING_STARTED)


def end(recorder: RunRecorder, status: str = "RESULTS_UPLOADED", seconds: float = 20.0) -> bool:
    recorder.record(FlareEvents.ABOUT_TO_END_RUN)
    recorder.record(FlareEvents.END_RUN, {"status": status})
    return recorder.finish(seconds)


ALL = ["INITIATED", "PREPARED", "TRAINING_STARTED", "RESULTS_UPLOADED"]


def is_writable(recorder: RunRecorder) -> bool:
    return recorder.ledger_writable


def is_monotonic(statuses: list[str]) -> bool:
    ranks = [ALL.index(status) for status in statuses]
    return ranks == sorted(ranks)


def test_a_run_reaches_the_hub_and_the_ledger(
    start: Callable[[], RunRecorder], hub: EmbeddedHub, model_id: str, tmp_path: Path
) -> None:
    recorder = start()
    train(recorder)
    assert end(recorder)
    assert is_monotonic(hub.statuses(model_id))
    assert hub.statuses(model_id)[-1] == "RESULTS_UPLOADED"
    with Ledger(tmp_path / "ledger") as ledger:
        run = ledger.run(recorder.identity.run_id)
        assert run is not None
        assert (run["final_status"], run["final_by"], run["ended"], run["pid"]) == (
            "RESULTS_UPLOADED",
            "job",
            1,
            os.getpid(),
        )
        assert ledger.events(recorder.identity.run_id)[0]["name"] == "_start_run"


def test_what_another_process_finalised_is_not_sent_again(
    start: Callable[[], RunRecorder], hub: EmbeddedHub, model_id: str, tmp_path: Path
) -> None:
    recorder = start()
    train(recorder)
    with Ledger(tmp_path / "ledger") as ledger:
        assert ledger.append(Entry(recorder.identity.run_id, time.time(), final_status="ERROR", final_by="sentinel"))
    recorder.record(FlareEvents.ABOUT_TO_END_RUN)
    effects = recorder.record(FlareEvents.END_RUN, {"status": "RESULTS_UPLOADED"})
    assert effects.status is None
    assert recorder.finalised_elsewhere
    time.sleep(0.5)
    assert "RESULTS_UPLOADED" not in hub.statuses(model_id)


def test_a_locked_ledger_holds_no_thread_and_loses_nothing(
    start: Callable[[], RunRecorder], hub: EmbeddedHub, model_id: str, tmp_path: Path
) -> None:
    recorder = start()
    recorder.record(FlareEvents.START_RUN)
    blocker = sqlite3.connect(tmp_path / "ledger" / "ledger.db", isolation_level=None, timeout=20)
    blocker.execute("BEGIN IMMEDIATE")
    threads = [threading.Thread(target=train, args=(recorder,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()  # while the ledger is still locked
    blocker.execute("ROLLBACK")
    blocker.close()
    assert end(recorder)
    assert is_monotonic(hub.statuses(model_id))
    with Ledger(tmp_path / "ledger") as ledger:
        names = [row["name"] for row in ledger.events(recorder.identity.run_id)]
    assert len([name for name in names if not name.startswith("flip.")]) == 1 + 8 * 4 + 2


def test_a_ledger_locked_over_the_end_still_tells_the_hub(
    start: Callable[[], RunRecorder], hub: EmbeddedHub, model_id: str, tmp_path: Path
) -> None:
    recorder = start()
    train(recorder)
    blocker = sqlite3.connect(tmp_path / "ledger" / "ledger.db", isolation_level=None, timeout=20)
    blocker.execute("BEGIN IMMEDIATE")
    assert end(recorder, seconds=10.0)
    assert hub.statuses(model_id)[-1] == "RESULTS_UPLOADED"
    assert list((tmp_path / "ledger").glob("spool-*.jsonl"))
    blocker.execute("ROLLBACK")
    blocker.close()
    recorder.close()
    with Ledger(tmp_path / "ledger") as ledger:
        # The recorder itself may have come back to the disk meanwhile; otherwise its spool is taken in.
        for path in (tmp_path / "ledger").glob("spool-*.jsonl"):
            path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")  # its owner is gone
        take_spools(ledger, tmp_path / "ledger", time.time())
        run = ledger.run(recorder.identity.run_id)
        assert run is not None
        assert run["final_status"] == "RESULTS_UPLOADED"
        waiting = [row.payload["status"] for row in ledger.outbox(states=["pending"], kind="status")]
        assert set(waiting) <= {"RESULTS_UPLOADED"}


def test_an_unusable_directory_still_tells_the_hub(hub: EmbeddedHub, model_id: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    identity = RunIdentity(str(uuid.uuid4()), "job", model_id)
    recorder = RunRecorder(identity, settings_for(hub), tmp_path / "file" / "ledger")
    try:
        assert not recorder.ledger_writable
        train(recorder)
        assert end(recorder)
        assert hub.statuses(model_id)[-1] == "RESULTS_UPLOADED"
        assert is_monotonic(hub.statuses(model_id))
    finally:
        recorder.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let tests mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_read_only_disk_still_tells_the_hub_and_heals(hub: EmbeddedHub, model_id: str, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    recorder = RunRecorder(RunIdentity(str(uuid.uuid4()), "job", model_id), settings_for(hub), small_disk / "ledger")
    try:
        assert is_writable(recorder) is False
        train(recorder)
        assert hub.wait(lambda h: h.statuses(model_id)[-1:] == ["TRAINING_STARTED"])
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        deadline = time.monotonic() + 30
        while not is_writable(recorder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert is_writable(recorder) is True
        assert end(recorder)
        assert is_monotonic(hub.statuses(model_id))
        assert hub.statuses(model_id)[-1] == "RESULTS_UPLOADED"
        with Ledger(small_disk / "ledger") as ledger:
            names = [row["name"] for row in ledger.events(recorder.identity.run_id)]
        assert {"_start_run", "_training_started", "_end_run"} <= set(names)
    finally:
        recorder.close()


def test_a_full_disk_still_tells_the_hub(hub: EmbeddedHub, model_id: str, small_disk: Path) -> None:
    recorder = RunRecorder(RunIdentity(str(uuid.uuid4()), "job", model_id), settings_for(hub), small_disk / "ledger")

    def fill() -> None:
        with (small_disk / "filler").open("wb", buffering=0) as out:
            while True:
                out.write(b"x" * 4_096)

    try:
        recorder.record(FlareEvents.START_RUN)
        with pytest.raises(OSError, match="No space left"):
            fill()
        for number in range(300):
            recorder.record(FlareEvents.GLOBAL_BEST_MODEL_AVAILABLE, {"workflow": "w" * 200, "number": number})
        assert not recorder.ledger_writable
        train(recorder)
        assert end(recorder)
        assert is_monotonic(hub.statuses(model_id))
        assert hub.statuses(model_id)[-1] == "RESULTS_UPLOADED"
    finally:
        recorder.close()


@pytest.mark.parametrize("damage", ["overwrite", "delete"])
def test_a_damaged_or_deleted_ledger_is_replaced_under_a_running_job(
    start: Callable[[], RunRecorder], hub: EmbeddedHub, model_id: str, tmp_path: Path, damage: str
) -> None:
    recorder = start()
    train(recorder)
    path = tmp_path / "ledger" / "ledger.db"
    if damage == "delete":
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
    else:
        Path(f"{path}-wal").write_bytes(b"")
        path.write_bytes(b"\xff" * 65_536)
    for number in range(1, 6):
        recorder.record(FlareEvents.ROUND_STARTED, {"round": number})
        time.sleep(0.3)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (recorder.ledger_writable and path.exists()):
        time.sleep(0.1)
    assert end(recorder)
    assert hub.statuses(model_id)[-1] == "RESULTS_UPLOADED"
    with Ledger(tmp_path / "ledger") as ledger:
        run = ledger.run(recorder.identity.run_id)
        assert run is not None
        assert (run["final_status"], run["round"], run["model_id"]) == ("RESULTS_UPLOADED", 5, model_id)


def test_round_events_are_sent_by_the_newer_contract(hub: EmbeddedHub, model_id: str, tmp_path: Path) -> None:
    with EmbeddedHub(contract="2026-10") as newer:
        identity = RunIdentity(str(uuid.uuid4()), "job", model_id)
        recorder = RunRecorder(identity, settings_for(newer, "2026-10"), tmp_path)
        try:
            train(recorder)
            recorder.record(FlareEvents.ROUND_STARTED, {"round": 1, "total_rounds": 2, "relay": True})
            recorder.record(FlareEvents.ROUND_DONE, {"relay": True})
            assert end(recorder)
            assert newer.statuses(model_id)[-1] == "RESULTS_UPLOADED"
            with Ledger(tmp_path) as ledger:
                kinds = [row.payload["event_type"] for row in ledger.outbox(kind="event")]
            assert kinds == ["ROUND_STARTED", "ROUND_AGGREGATED"]
        finally:
            recorder.close()


CHILD = textwrap.dedent(
    """
    import sys, time, uuid
    from pathlib import Path
    from flip_observability.recorder import RunIdentity, RunRecorder
    from flip_observability.settings import Settings
    settings = Settings(LOCAL_DEV=False, FLIP_API_INTERNAL_URL=sys.argv[2], INTERNAL_SERVICE_KEY="k")
    recorder = RunRecorder(RunIdentity(sys.argv[3], "job", sys.argv[4]), settings, Path(sys.argv[1]))
    recorder.record("_start_run")
    recorder.record("_about_to_end_run")
    recorder.record("_end_run", {"status": "ERROR"})
    print("recorded", flush=True)
    time.sleep(60)
    """
)


def test_a_final_status_survives_the_death_of_its_process_and_is_delivered_by_another(
    start: Callable[[], RunRecorder], hub: EmbeddedHub, model_id: str, tmp_path: Path
) -> None:
    run_id, dead_url = str(uuid.uuid4()), "http://127.0.0.1:9"  # nobody listens on the discard port
    command = [sys.executable, "-c", CHILD, str(tmp_path / "ledger"), dead_url, run_id, model_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"recorded\n"
        os.kill(child.pid, signal.SIGKILL)
    start()  # a job of another model: its dispatcher finds the row
    assert hub.wait(lambda h: h.statuses(model_id) == ["ERROR"], timeout=60)


def test_a_lease_of_a_dead_process_is_not_waited_for(hub: EmbeddedHub, model_id: str, tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        item = OutboxItem(model_id, "status", {"status": "ERROR"}, final=True)
        ledger.append(Entry("r1", time.time(), final_status="ERROR", final_by="job", outbox=(item,)))
        dead = dataclasses.replace(current_process(), pid=4_194_305)
        [row] = ledger.lease(f"{dead.token()}|x", time.time(), 3_600.0, 1)
        transport = HubTransport(settings_for(hub))
        assert Dispatcher(ledger, transport, settings_for(hub)).run_once() == 1
        assert hub.statuses(model_id) == ["ERROR"]
        ledger.set_outbox_state([row.id], "pending", time.time())
        living = f"{current_process().token()}|x"
        send_again = OutboxItem(model_id, "status", {"status": "ERROR"}, final=True)
        ledger.append(Entry(None, time.time(), outbox=(send_again,)))
        assert len(ledger.lease(living, time.time(), 3_600.0, 1)) == 1
        assert Dispatcher(ledger, transport, settings_for(hub)).run_once() == 0


def test_the_spool_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.add(Entry("r1", 1.0, run={"round": 2}))
    with Ledger(tmp_path) as ledger:
        assert take_spools(ledger, tmp_path, 1.0) == 0
        lines = spool.path.read_text().splitlines()
        dead = lines[0].replace(f'"pid": {os.getpid()}', '"pid": 4194305')
        spool.path.write_text("\n".join([dead, *lines[1:], '{"half a li']))
        assert take_spools(ledger, tmp_path, 1.0) == 1
        assert [run["round"] for run in ledger.runs()] == [2]
        spool.path.write_text("no json\nat all\n")
        assert take_spools(ledger, tmp_path, 1.0) == 0
        assert [path.name for path in tmp_path.glob("*.unreadable")] == [spool.path.with_suffix(".unreadable").name]


def test_process_identity() -> None:
    me = current_process()
    assert me.is_alive() is True
    assert ProcessIdentity(me.boot_id, me.pid_ns, me.pid, me.start_ticks + 1).is_alive() is False
    assert ProcessIdentity("another boot", me.pid_ns, me.pid, me.start_ticks).is_alive() is False
    assert ProcessIdentity(me.boot_id, "another name space", me.pid, me.start_ticks).is_alive() is None
    with subprocess.Popen(["sleep", "60"]) as child:
        text = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        other = ProcessIdentity(me.boot_id, me.pid_ns, child.pid, int(text[19]))
        assert other.is_alive() is True
        child.kill()
        child.wait()
        assert other.is_alive() is False


def test_run_id_is_the_job_id_when_that_is_a_uuid() -> None:
    job = str(uuid.uuid4())
    assert new_run_id(job.upper()) == job
    assert uuid.UUID(new_run_id("simulate_job")) != uuid.UUID(new_run_id(None))


# -- room for statuses -------------------------------------------------------------------------------------------------


def left_by_the_dead(spool: Spool) -> None:
    """Make a spool look as if its process was no more."""
    spool._owner = dataclasses.replace(spool._owner, start_ticks=1)


def test_a_spool_has_its_room_before_the_disk_is_full(small_disk: Path, tmp_path: Path) -> None:
    spool = Spool(small_disk)
    left_by_the_dead(spool)
    spool.reserve()
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as out:
        while True:
            out.write(b"x" * 1_024)
    for number in range(40):
        spool.add(Entry("r1", 1.0, run={"round": number, "workflow": "w" * 500}))
    assert spool.path.parent == small_disk
    assert spool.path.stat().st_mode & 0o777 == 0o600
    with Ledger(tmp_path) as ledger:
        assert take_spools(ledger, small_disk, 2.0) == 1
        run = ledger.run("r1")
    assert run is not None
    assert run["round"] == 39
    assert not list(small_disk.glob("spool-*"))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_spool_goes_on_elsewhere_where_it_cannot_be_written(tmp_path: Path, temporary: Path) -> None:
    directory = tmp_path / "ledger"
    directory.mkdir()
    spool = Spool(directory)
    left_by_the_dead(spool)
    item = OutboxItem("model", "log", {"log": "x"})
    spool.add(Entry("r1", 1.0, run={"round": 1}, outbox=(item,)))
    directory.rename(tmp_path / "gone")
    spool.add(Entry("r1", 2.0, run={"round": 2}))
    spool.delivered([item.uid])
    (tmp_path / "gone").rename(directory)
    place = second_place(directory)
    assert place.is_relative_to(temporary)
    assert [path.stat().st_mode & 0o777 for path in (place.parent, place, *place.iterdir())] == [0o700, 0o700, 0o600]
    with Ledger(directory) as ledger:
        assert take_spools(ledger, directory, 3.0) == 2
        run = ledger.run("r1")
        assert [row.state for row in ledger.outbox()] == ["delivered"]
    assert run is not None
    assert run["round"] == 2
    assert not list(place.iterdir())


@pytest.mark.parametrize("trap", ["open", "link"])
def test_a_second_place_that_is_not_ours_is_not_used(tmp_path: Path, temporary: Path, trap: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    parent = second_place(tmp_path / "none").parent
    if trap == "link":
        other.chmod(0o700)
        parent.symlink_to(other)
    else:
        parent.mkdir()
        parent.chmod(0o777)
    Spool(tmp_path / "none").add(Entry("r1", 1.0, run={"round": 1}))
    assert not list(other.rglob("*"))
    assert not list(parent.rglob("spool-*"))


def test_room_is_given_back_at_the_end_of_a_run(start: Callable[[], RunRecorder], tmp_path: Path) -> None:
    recorder = start()
    train(recorder)
    until = time.monotonic() + 10
    while not list((tmp_path / "ledger").glob("spool-*")) and time.monotonic() < until:
        time.sleep(0.01)
    assert [path.stat().st_size for path in (tmp_path / "ledger").glob("spool-*")] == [RESERVED_BYTES]
    assert end(recorder)
    recorder.close()
    assert not list((tmp_path / "ledger").glob("spool-*"))

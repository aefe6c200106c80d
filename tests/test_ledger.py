"""The ledger: transactions, claims, the outbox's order, and every way in which a file can be unusable."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from flip_observability import ledger as ledger_module
from flip_observability._fold import MetricsFold
from flip_observability.ledger import (
    FILE_NAME,
    SCHEMA_VERSION,
    Entry,
    Ledger,
    LedgerBusyError,
    LedgerCorruptError,
    LedgerError,
    OutboxItem,
)
from flip_observability.lifecycle import Event

MODEL = "0b1f7f5e-7b1e-4b62-9a52-0d0d63a1f6aa"
OTHER = "11111111-7b1e-4b62-9a52-0d0d63a1f6aa"


def status(value: str, *, final: bool = False, model: str = MODEL) -> OutboxItem:
    return OutboxItem(model, "status", {"status": value}, final)


def send(ledger: Ledger, value: str, *, run: str = "r1", model: str = MODEL, now: float = 1.0) -> bool:
    final = value in {"ERROR", "STOPPED", "RESULTS_UPLOADED"}
    item = status(value, final=final, model=model)
    return ledger.append(
        Entry(run, now, final_status=value if final else None, final_by="job" if final else None, outbox=(item,))
    )


def test_an_entry_is_event_run_and_outbox_in_one(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        event = Event("_start_run", 12.5, {"client": "site-1"})
        entry = Entry(
            "r1", 12.5, event, (("run_started", 1, {}),), {"round": 3}, {"fatal_error": 12.5}, outbox=(status("X"),)
        )
        assert ledger.append(entry)
        run = ledger.run("r1")
        assert run is not None
        assert (run["round"], run["problems"]) == (3, {"fatal_error": 12.5})
        [row] = ledger.events("r1")
        assert (row["name"], row["attrs"], row["facts"]) == (
            "_start_run",
            {"client": "site-1"},
            [["run_started", 1, {}]],
        )
        assert [item.payload for item in ledger.outbox()] == [{"status": "X"}]


def test_appending_again_changes_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        entry = Entry(
            "r1",
            1.0,
            Event("_end_run", 1.0),
            final_status="ERROR",
            final_by="job",
            outbox=(status("ERROR", final=True),),
        )
        again = Entry.from_json(entry.to_json())
        assert again == entry
        assert ledger.append(entry)
        assert ledger.append(again)
        assert len(ledger.events()) == 1
        assert len(ledger.outbox()) == 1


def test_the_first_final_status_wins_and_nothing_is_sent_after_it(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        assert send(ledger, "ERROR")
        assert not send(ledger, "RESULTS_UPLOADED")
        assert send(ledger, "TRAINING_STARTED")
        ledger.append(Entry("r1", 9.0, run={"status": "TRAINING_STARTED", "round": 7}))
        run = ledger.run("r1")
        assert run is not None
        assert (run["final_status"], run["status"], run["round"]) == ("ERROR", "ERROR", 7)
        assert [row.payload["status"] for row in ledger.outbox()] == ["ERROR"]


def test_a_final_status_supersedes_what_waits_before_it(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for value in ("INITIATED", "PREPARED", "ERROR"):
            send(ledger, value)
        send(ledger, "INITIATED", run="r2", model=OTHER)
        assert [row.state for row in ledger.outbox(run_id="r1")] == ["superseded", "superseded", "pending"]
        leased = ledger.lease("me", 2.0, 15.0, 10)
        assert [(row.model_id, row.payload["status"]) for row in leased] == [(MODEL, "ERROR"), (OTHER, "INITIATED")]


def test_a_lane_has_one_lease_and_keeps_its_order(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger, Ledger(tmp_path) as other:
        send(ledger, "INITIATED")
        send(ledger, "PREPARED")
        ledger.append(Entry("r1", 1.0, outbox=(OutboxItem(MODEL, "metric", {"value": 1.0}),)))
        first = ledger.lease("a", 10.0, 15.0, 10)
        assert [row.kind for row in first] == ["status", "metric"]
        assert other.lease("b", 11.0, 15.0, 10) == []
        ledger.settle(first[0], now=12.0, state="delivered", outcome="200")
        assert [row.payload["status"] for row in other.lease("b", 12.0, 15.0, 10)] == ["PREPARED"]
        # A lease of a process that died ends by itself.
        assert [row.kind for row in other.lease("b", 100.0, 15.0, 10)] == ["status", "metric"]


def test_a_row_in_flight_keeps_its_lane_even_when_a_final_status_supersedes_it(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        send(ledger, "TRAINING_STARTED")
        [flying] = ledger.lease("a", 1.0, 15.0, 10)
        send(ledger, "ERROR")
        assert ledger.lease("b", 2.0, 15.0, 10) == []
        ledger.settle(flying, now=3.0, state=None, outcome="503", next_attempt=60.0)
        assert [row.payload["status"] for row in ledger.lease("b", 4.0, 15.0, 10)] == ["ERROR"]
        assert [row.state for row in ledger.outbox()] == ["superseded", "pending"]


def test_release_makes_every_waiting_row_due(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        send(ledger, "INITIATED")
        [row] = ledger.lease("a", 1.0, 15.0, 10)
        ledger.settle(row, now=1.0, state=None, outcome="503", next_attempt=1_000.0)
        assert ledger.next_due() == 1_000.0
        assert ledger.lease("a", 2.0, 15.0, 10) == []
        assert ledger.release_backoff(2.0) == 1
        assert len(ledger.lease("a", 2.0, 15.0, 10)) == 1


def test_delivery_from_memory_supersedes_what_waited_on_the_disk(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        send(ledger, "INITIATED")
        later = status("TRAINING_STARTED")
        ledger.append(Entry("r1", 2.0, outbox=(later,)))
        ledger.mark_delivered([later.uid], 3.0)
        assert [row.state for row in ledger.outbox()] == ["superseded", "delivered"]


def test_runs_are_found_by_any_prefix(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(Entry("abc1", 1.0, run={"job_id": "job_1", "model_id": MODEL}))
        ledger.append(Entry("abc2", 2.0, run={"job_id": "jobX1"}))
        assert [run["run_id"] for run in ledger.find_runs("abc")] == ["abc2", "abc1"]
        assert [run["run_id"] for run in ledger.find_runs("job_")] == ["abc1"]
        assert [run["run_id"] for run in ledger.find_runs(MODEL[:6])] == ["abc1"]
        assert ledger.find_runs("%") == []


def test_retention_keeps_what_the_hub_has_not_accepted(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for run in ("done", "waiting"):
            ledger.append(Entry(run, 1.0, Event("_start_run", 1.0)))
            send(ledger, "ERROR", run=run, model=MODEL if run == "done" else OTHER)
        [row] = [r for r in ledger.lease("a", 2.0, 15.0, 10) if r.run_id == "done"]
        ledger.settle(row, now=2.0, state="delivered", outcome="200")
        assert ledger.forget_before(100.0) > 0  # of the outbox; what has not been counted stays, with its run
        assert len(ledger.runs()) == 2
        assert MetricsFold(ledger).catch_up()
        assert ledger.forget_before(100.0) > 0
        assert [run["run_id"] for run in ledger.runs()] == ["waiting"]
        assert [row.run_id for row in ledger.outbox()] == ["waiting"]
        assert {row["run_id"] for row in ledger.events()} == {"waiting"}


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "ledger"
    with Ledger(folder) as ledger:
        send(ledger, "INITIATED")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert set(modes.values()) == {0o600}
        assert {"ledger.db-wal", "ledger.db-shm"} <= set(modes)
        assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o700] * 2


def test_a_link_to_a_ledger_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "ledger.db").symlink_to(tmp_path / "disk" / "ledger.db")
    with Ledger(tmp_path) as ledger:
        send(ledger, "INITIATED")
    assert stat.S_IMODE((tmp_path / "disk" / "ledger.db").stat().st_mode) == 0o600


def test_the_runs_own_files_get_the_mode_that_the_run_wants(tmp_path: Path) -> None:
    """The umask is the whole process's: nobody may notice that ledgers are opened meanwhile."""
    over = threading.Event()

    def open_ledgers(name: str) -> None:
        number = 0
        while not over.is_set():
            Ledger(tmp_path / name / str(number)).close()
            number += 1

    threads = [threading.Thread(target=open_ledgers, args=(name,)) for name in "abc"]
    old = os.umask(0o022)
    try:
        for thread in threads:
            thread.start()
        modes: set[int] = set()
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            path = tmp_path / f"of-the-run-{len(modes)}"
            path.touch()
            modes.add(stat.S_IMODE(path.stat().st_mode))
            path.unlink()
        over.set()
        for thread in threads:
            thread.join()
        path = tmp_path / "later"
        path.touch()
        assert modes | {stat.S_IMODE(path.stat().st_mode)} == {0o644}
    finally:
        over.set()
        os.umask(old)


def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    Ledger(tmp_path).close()
    db = sqlite3.connect(tmp_path / "ledger.db")
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(LedgerError, match="newer flip-observability"):
        Ledger.open_or_replace(tmp_path)
    assert (tmp_path / "ledger.db").exists()


def test_an_older_schema_is_migrated(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "ledger.db")
    db.execute("PRAGMA user_version=0")
    db.close()
    with Ledger(tmp_path) as ledger:
        assert send(ledger, "INITIATED")


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to have a header" * 40, b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_corrupt_file_is_set_aside_not_deleted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ledger.db").write_bytes(content)
    with pytest.raises(LedgerCorruptError):
        Ledger(tmp_path)
    with Ledger.open_or_replace(tmp_path) as ledger:
        assert send(ledger, "INITIATED")
    [kept] = tmp_path.glob("ledger.db.corrupt-*")
    assert kept.read_bytes() == content


def test_a_good_file_of_another_process_is_not_set_aside(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        send(ledger, "INITIATED")
        assert ledger_module.set_aside(tmp_path, inode=1) is None
        assert ledger.is_current()
        (tmp_path / "ledger.db").unlink()
        assert not ledger.is_current()


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(ledger_module, "file_system_of", lambda _: kind)
    with pytest.raises(LedgerError, match=rf"network file system \({kind}\).*FLIP_OBSERVABILITY_DIR"):
        Ledger(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_volatile_file_system_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "file_system_of", lambda _: "tmpfs")
    for _ in range(3):
        Ledger(tmp_path).close()
    assert caplog.text.count("dies with the container") == 1


def test_the_file_system_is_really_looked_up() -> None:
    assert ledger_module.file_system_of(Path("/proc/self")) == "proc"


def test_a_directory_that_cannot_be_made_says_which_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="FLIP_OBSERVABILITY_DIR"):
        Ledger(tmp_path / "file" / "ledger")


def test_a_locked_ledger_is_waited_for_no_longer_than_told(tmp_path: Path) -> None:
    with Ledger(tmp_path, busy_ms=50) as ledger:
        blocker = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerBusyError):
            send(ledger, "INITIATED")
        blocker.execute("ROLLBACK")
        blocker.close()
        assert send(ledger, "INITIATED")


def test_read_only_needs_a_ledger_and_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="No ledger at"):
        Ledger(tmp_path, read_only=True)
    Ledger(tmp_path).close()
    with Ledger(tmp_path, read_only=True) as ledger, pytest.raises(LedgerError):
        send(ledger, "INITIATED")


def test_root_is_claimed_once(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(Entry("r1", 1.0))
        assert [ledger.claim_root("r1", owner) for owner in "abc"] == [True, False, False]


WRITER = textwrap.dedent(
    """
    import sys, time, uuid
    from pathlib import Path
    from flip_observability.ledger import Entry, Ledger, LedgerBusyError, OutboxItem
    from flip_observability.lifecycle import Event
    ledger = Ledger(Path(sys.argv[1]))
    run = str(uuid.uuid4())
    number = 0
    while True:
        number += 1
        event = Event("_round_started", time.time())
        outbox = (OutboxItem(run, "status", {"status": "X"}),) if number % 10 == 0 else ()
        try:
            ledger.append(Entry(run, event.time, event, outbox=outbox))
        except LedgerBusyError:
            continue
        sys.stdout.write(event.uid + "\\n")
        sys.stdout.flush()
    """
)


@pytest.mark.system
def test_sixteen_processes_killed_200_times_lose_nothing_they_acknowledged(tmp_path: Path) -> None:
    directory, rng = tmp_path / "ledger", random.Random(7)
    Ledger(directory).close()
    logs: list[Path] = []

    def start() -> subprocess.Popen[bytes]:
        path = tmp_path / f"acknowledged-{len(logs)}"
        logs.append(path)
        with path.open("wb") as out:
            return subprocess.Popen([sys.executable, "-c", WRITER, str(directory)], stdout=out)

    writers = [start() for _ in range(16)]
    try:
        deadline = time.monotonic() + 60
        while not all(log.stat().st_size for log in logs) and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(200):
            time.sleep(rng.uniform(0, 0.05))
            victim = rng.randrange(16)
            os.kill(writers[victim].pid, signal.SIGKILL)
            writers[victim].wait()
            writers[victim] = start()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    acknowledged = {line for log in logs for line in log.read_text().split("\n")[:-1] if len(line) == 16}
    with Ledger(directory) as ledger:
        known = {row["uid"] for row in ledger.events()}
        assert ledger._rows("PRAGMA integrity_check")[0][0] == "ok"
    assert len(acknowledged) > 500
    assert acknowledged - known == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_a_clear_error_and_heals(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("this machine does not let tests mount a tmpfs")
    try:
        with Ledger(small) as ledger:
            send(ledger, "INITIATED")
            filler = small / "filler"

            def fill_the_disk() -> None:
                with filler.open("wb", buffering=0) as out:
                    while True:
                        out.write(b"x" * 4_096)

            def write_a_lot() -> None:
                for number in range(2_000):
                    ledger.append(Entry("r1", 1.0, Event("_x", 1.0, {"pad": "y" * 500, "n": number})))

            with pytest.raises(OSError, match="No space left"):
                fill_the_disk()
            with pytest.raises(LedgerError):
                write_a_lot()
            filler.unlink()
            assert send(ledger, "PREPARED")
            assert [row.payload["status"] for row in ledger.outbox()] == ["INITIATED", "PREPARED"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_spool_line_is_plain_json() -> None:
    line = Entry("r1", 1.0, Event("_x", 1.0), (("a", 1, {"b": "c"}),), outbox=(status("X"),)).to_json()
    assert "\n" not in line
    assert json.loads(line)["run_id"] == "r1"
    with pytest.raises((ValueError, TypeError, KeyError)):
        Entry.from_json('{"run_id": 1}')


def version_1(directory: Path) -> None:
    """A ledger as the first version wrote it, with a run that waits for the hub and one that does not."""
    db = sqlite3.connect(directory / "ledger.db")
    db.executescript(ledger_module._MIGRATIONS[0])
    with db:
        db.execute("INSERT INTO runs (run_id, created, final_status, final_time) VALUES ('old', 1, 'ERROR', 2)")
        db.execute("INSERT INTO runs (run_id, created) VALUES ('open', 3)")
        db.execute("INSERT INTO events VALUES (7, 'u', 'old', 1.0, '_start_run', '{}', '[[\"run_started\", 1, {}]]')")
        db.execute(
            "INSERT INTO outbox (uid, run_id, model_id, kind, lane, final, payload, created) "
            "VALUES ('o', 'open', ?, 'status', 0, 0, '{}', 1)",
            (MODEL,),
        )
        db.execute("PRAGMA user_version=1")
    db.close()


def test_a_ledger_of_the_first_version_is_taken_over_whole(tmp_path: Path) -> None:
    version_1(tmp_path)
    with Ledger(tmp_path, read_only=True) as looking:
        assert looking._version() == 1
        assert len(looking.runs()) == 2
    with Ledger(tmp_path) as ledger:
        assert ledger._version() == SCHEMA_VERSION
        indexes = {row[0] for row in ledger._rows("SELECT name FROM sqlite_master WHERE type = 'index'")}
        assert {"runs_open", "runs_finished", "outbox_ages"} <= indexes
        assert [run["run_id"] for run in ledger.open_runs(10)] == ["open"]
        assert [run["run_id"] for run in ledger.finished_runs(0, 1, 10)] == ["old"]
        assert ledger.outbox_backlog() == {"status": (1, 1.0)}
        assert MetricsFold(ledger).catch_up()
        assert "flip_runs_started_total" in {name for name, _, _ in ledger.metric_state()}
    with Ledger(tmp_path) as again:
        assert len(again.events()) == 1


def test_an_emptied_ledger_is_set_aside(tmp_path: Path) -> None:
    held = Ledger(tmp_path)
    send(held, "INITIATED")
    held.checkpoint()
    os.truncate(tmp_path / "ledger.db", 0)
    assert not held.is_current()
    with Ledger.open_or_replace(tmp_path) as fresh:
        assert send(fresh, "INITIATED")
        assert fresh.is_current()
    assert list(tmp_path.glob("ledger.db.corrupt-*"))
    held.close()


def test_a_new_ledger_that_cannot_be_prepared_is_given_up_in_time(tmp_path: Path) -> None:
    blocker = sqlite3.connect(tmp_path / "ledger.db")
    blocker.execute("BEGIN EXCLUSIVE")
    begun = time.monotonic()
    with pytest.raises(LedgerBusyError):
        Ledger(tmp_path, busy_ms=300)
    assert time.monotonic() - begun < 10, "not a hundred times 300 ms"
    blocker.close()


def damage(directory: Path, sql: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(directory / FILE_NAME)) as db, db:
        db.execute(sql, values)


ODD = ["not json {", "[1, 2]", '"text"', b"\xff\xfe", 4.5]


@pytest.mark.parametrize("odd", ODD, ids=["no-json", "list", "text", "no-utf-8", "number"])
def test_one_damaged_message_does_not_hide_the_others(tmp_path: Path, odd: object) -> None:
    with Ledger(tmp_path) as ledger:
        for number in range(3):
            item = OutboxItem(f"model-{number}", "log", {"client": None, "log": "x"})
            ledger.append(Entry(None, float(number), outbox=(item,)))
        damage(tmp_path, "UPDATE outbox SET payload = ?1, created = ?1, attempts = ?1 WHERE id = 1", odd)
        rows = ledger.lease("me", 10.0, 5.0, 10)
        assert [row.model_id for row in rows] == ["model-0", "model-1", "model-2"]
        assert rows[0].payload == {}
        assert isinstance(rows[0].created, float)
        assert len(ledger.outbox()) == 3
        assert ledger.outbox_backlog()["log"][0] == 3
        ledger.settle(rows[0], now=11.0, state="rejected", outcome="KeyError")


@pytest.mark.parametrize("column", ["next_attempt", "lease_until"])
def test_a_damaged_time_does_not_keep_a_message_for_ever(tmp_path: Path, column: str) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.append(Entry(None, 1.0, outbox=(OutboxItem("model", "log", {"log": "x"}),)))
        damage(tmp_path, f"UPDATE outbox SET {column} = 'soon'")
        assert ledger.next_due() == 0.0
        assert len(ledger.lease("me", 10.0, 5.0, 10)) == 1
        assert ledger.lease("other", 11.0, 5.0, 10) == []


def test_a_final_status_that_cannot_be_read_is_taken_from_its_run(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        item = OutboxItem("model", "status", {"status": "STOPPED"}, final=True)
        ledger.append(Entry("run", 1.0, run={"model_id": "model"}, final_status="STOPPED", outbox=(item,)))
        damage(tmp_path, "UPDATE outbox SET payload = '{'")
        (row,) = ledger.lease("me", 10.0, 5.0, 10)
        assert row.payload == {"status": "STOPPED"}


@pytest.mark.parametrize("odd", ODD, ids=["no-json", "list", "text", "no-utf-8", "number"])
def test_one_damaged_run_or_event_is_no_damaged_ledger(tmp_path: Path, odd: object) -> None:
    with Ledger(tmp_path) as ledger:
        for run_id in ("a", "b"):
            event = Event("round", 2.0, {"round": 1})
            ledger.append(Entry(run_id, 1.0, event, (("fact", 1.0, {}),), run={"model_id": "model"}))
        damage(tmp_path, "UPDATE events SET attrs = ?1, facts = ?1, time = ?1 WHERE run_id = 'a'", odd)
        damage(tmp_path, "UPDATE runs SET problems = ?1, model_id = ?1, last_event = ?1 WHERE run_id = 'a'", odd)
        damage(tmp_path, "INSERT INTO meta VALUES ('observer', ?)", odd)
        assert [(row["attrs"], row["facts"]) for row in ledger.events("a")] == [({}, [])]
        assert [row["attrs"] for row in ledger.events()] == [{}, {"round": 1}]
        assert {run["run_id"] for run in ledger.open_runs(10)} == {"a", "b"}
        assert ledger.append(Entry("a", 3.0, problems={"orphaned": 3.0}))  # and does not raise
        ledger.release_observer("token")
        assert ledger.claim_observer("token", 5e9)
        ledger.append(Entry("a", 4.0, final_status="ERROR", final_by="test"))
        assert [run["run_id"] for run in ledger.finished_runs(0.0, 1, 1)] == ["a"]


def of_the_third_schema(folder: Path, events: int, cursor: int) -> None:
    with contextlib.closing(sqlite3.connect(folder / FILE_NAME)) as db:
        for step in range(3):
            for statement in ledger_module._MIGRATIONS[step].split(";"):
                db.execute(statement)
        db.execute("PRAGMA user_version=3")
        db.executemany(
            "INSERT INTO events (uid, run_id, time, name, attrs, facts) VALUES (?, 'r', 1.0, 'x', '{}', '[]')",
            [(f"u{number}",) for number in range(events)],
        )
        db.execute("INSERT INTO meta VALUES ('metrics_cursor', ?)", (str(cursor),))
        db.commit()


@pytest.mark.parametrize(("events", "cursor"), [(3, 2), (3, 3), (0, 7)], ids=["behind", "at-the-end", "all-forgotten"])
def test_events_of_the_third_schema_keep_their_ids_and_what_follows_is_unread(
    tmp_path: Path, events: int, cursor: int
) -> None:
    of_the_third_schema(tmp_path, events, cursor)
    with Ledger(tmp_path) as ledger:
        assert [row["id"] for row in ledger.events("r")] == list(range(1, events + 1))
        known = Event("x", 1.0, {}, "u0") if events else Event("x", 1.0)
        for event in (known, Event("y", 2.0)):
            ledger.append(Entry("r", event.time, event))
        assert len(ledger.events()) == max(events, 1) + 1
        unread = [row.name for row in ledger.unread_events(10)[1]]
        assert unread == [b"x"] * (max(events, 1) - min(cursor, events)) + [b"y"]


def test_an_event_is_unread_though_its_id_was_there_before(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for _ in range(3):
            ledger.append(Entry(None, 1.0, Event("old", 1.0)))
        ledger.fold_metrics(0, 3, [], lambda rows: rows)
        assert ledger.forget_before(10.0) == 3
        ledger.append(Entry(None, 20.0, Event("new", 20.0)))
        assert [row.name for row in ledger.unread_events(10)[1]] == [b"new"]


def test_an_event_of_no_run_is_written_once(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        entry = Entry(None, 1.0, Event("x", 1.0))
        ledger.append(entry)
        ledger.append(entry)
        assert len(ledger.events()) == 1


def test_what_may_not_wait_leaves_the_write_ahead_log_to_others(tmp_path: Path) -> None:
    pages = {busy: Ledger(tmp_path, busy_ms=busy)._rows("PRAGMA wal_autocheckpoint")[0][0] for busy in (50, 5_000)}
    assert pages[50] > 5 * pages[5_000]

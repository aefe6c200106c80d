"""The ledger: one SQLite file that holds what happened, what the hub must still be told, and who works on it.

The only module with SQL. Several processes write at once: every write is one ``BEGIN IMMEDIATE`` transaction in WAL
mode, and what :meth:`Ledger.append` returned from survives a SIGKILL of the process that called it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import sqlite3
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from flip_observability.constants import OwnEvents
from flip_observability.errors import logger
from flip_observability.lifecycle import Event, Fact
from flip_observability.process import ProcessIdentity
from flip_observability.utils import make_private_folder

log = logger(__name__)

FILE_NAME = "ledger.db"
SCHEMA_VERSION = 6
FL_THREAD_BUSY_MS = 50
"""How long a thread of NVFLARE waits for a ledger that another process is writing to."""
BUSY_MS = 5_000
WAL_PAGES = 2_000
"""Pages of write-ahead log after which a writer moves them into the file itself: some milliseconds, at its own cost."""
FL_THREAD_WAL_PAGES = 20_000
"""The same for a thread of NVFLARE: others do it long before, unless there is nobody else."""
OBSERVER_SECONDS = 30.0
"""An observer that cannot be seen from here lives as long as its heartbeat is not older than this."""
SILENT_OBSERVER_SECONDS = 600.0
"""An observer that can be seen to run and has said nothing for so long is followed by another one: it is stopped, or no
observer at all. Should it wake up, it finds at its next heartbeat that the ledger is somebody else's."""
JUDGE = "|judge"
"""The end of the token of an observer that the server's parent process tells how jobs end."""
BATCH = 1_000
"""Rows deleted in one transaction, so that retention never holds the writers up."""

NETWORK_FILE_SYSTEMS = frozenset(
    "9p afs afpfs beegfs ceph cifs davfs fuse.cephfs fuse.glusterfs fuse.gcsfuse fuse.s3fs fuse.sshfs glusterfs gpfs "
    "lustre ncpfs nfs nfs4 ocfs2 orangefs smb3 smbfs virtiofs".split()
)
VOLATILE_FILE_SYSTEMS = frozenset({"overlay", "tmpfs", "ramfs"})

_SCHEMA = """
CREATE TABLE runs (
    run_id TEXT PRIMARY KEY, job_id TEXT, model_id TEXT, net_id TEXT, run_dir TEXT, created REAL NOT NULL,
    boot_id TEXT, pid_ns TEXT, pid INTEGER, start_ticks INTEGER, heartbeat REAL,
    status TEXT, started REAL, last_event REAL, ended INTEGER NOT NULL DEFAULT 0,
    workflow TEXT, round INTEGER, total_rounds INTEGER, clients INTEGER, round_results INTEGER, stall_after REAL,
    problems TEXT NOT NULL DEFAULT '{}',
    intent TEXT, final_status TEXT, final_time REAL, final_by TEXT,
    root_claimed TEXT,
    upload_key TEXT, upload_id TEXT, results_uri TEXT, results_bytes INTEGER, results_files INTEGER, results_crc32 TEXT
) WITHOUT ROWID;
CREATE INDEX runs_by_model ON runs (model_id, created);
CREATE INDEX runs_by_age ON runs (created);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, uid TEXT NOT NULL UNIQUE, run_id TEXT, time REAL NOT NULL, name TEXT NOT NULL,
    attrs TEXT NOT NULL, facts TEXT NOT NULL
);
CREATE INDEX events_by_run ON events (run_id, id);
CREATE TABLE outbox (
    id INTEGER PRIMARY KEY AUTOINCREMENT, uid TEXT NOT NULL UNIQUE, run_id TEXT, model_id TEXT NOT NULL,
    kind TEXT NOT NULL, lane INTEGER NOT NULL, final INTEGER NOT NULL, payload TEXT NOT NULL, created REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, next_attempt REAL NOT NULL DEFAULT 0,
    lease_owner TEXT, lease_until REAL NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'pending', done REAL, outcome TEXT
);
CREATE INDEX outbox_pending ON outbox (model_id, lane, id) WHERE state = 'pending';
CREATE INDEX outbox_leased ON outbox (model_id, lane) WHERE lease_until > 0;
CREATE INDEX outbox_by_run ON outbox (run_id);
CREATE TABLE metric_state (name TEXT, labels TEXT, value TEXT NOT NULL, PRIMARY KEY (name, labels)) WITHOUT ROWID;
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
"""

_HEADS = """
WITH RECURSIVE heads (id) AS (
    SELECT (SELECT id FROM outbox WHERE state = 'pending' ORDER BY model_id, lane, id LIMIT 1)
    UNION ALL
    SELECT coalesce(
        (SELECT n.id FROM outbox AS n WHERE n.state = 'pending' AND n.model_id = c.model_id AND n.lane > c.lane
         ORDER BY n.lane, n.id LIMIT 1),
        (SELECT n.id FROM outbox AS n WHERE n.state = 'pending' AND n.model_id > c.model_id
         ORDER BY n.model_id, n.lane, n.id LIMIT 1))
    FROM heads AS h JOIN outbox AS c ON c.id = h.id
)
"""
"""The first pending row of every model's lane, found by leaps over the index: an outage leaves 100,000s behind it."""

_INDEXES_OF_METRICS = """
CREATE INDEX runs_open ON runs (created) WHERE final_status IS NULL;
CREATE INDEX runs_finished ON runs (final_time) WHERE final_status IS NOT NULL;
CREATE INDEX outbox_ages ON outbox (kind, created) WHERE state = 'pending'
"""
"""A scrape reads what is open, waits, or has just finished: its cost must not grow with the history."""

_SPANS_OF_RUNS = """
ALTER TABLE runs ADD COLUMN spans_accepted TEXT;
CREATE INDEX runs_untraced ON runs (final_time) WHERE final_status IS NOT NULL AND root_claimed IS NULL
"""
"""The uid of the last event whose spans, with those of all events before it, the collector has accepted."""

_CURSOR_NOT_AHEAD = """
UPDATE meta SET value = (SELECT coalesce(max(id), 0) FROM events) WHERE key = 'metrics_cursor'
    AND CAST(value AS INTEGER) > (SELECT coalesce(max(id), 0) FROM events)
"""
"""When the latest events are gone, the next one gets an id that was there before: it must lie behind the cursor."""

_LEANER_EVENTS = f"""
CREATE TABLE leaner (
    id INTEGER PRIMARY KEY, uid TEXT NOT NULL, run_id TEXT, time REAL NOT NULL, name TEXT NOT NULL,
    attrs TEXT NOT NULL, facts TEXT NOT NULL
);
INSERT INTO leaner SELECT id, uid, run_id, time, name, attrs, facts FROM events;
DROP TABLE events;
ALTER TABLE leaner RENAME TO events;
CREATE UNIQUE INDEX events_of_runs ON events (run_id, uid);
{_CURSOR_NOT_AHEAD}
"""
"""One index instead of two, and no counter of its own: an event writes three pages, not five."""

_LINKS = "CREATE TABLE links (run_id TEXT PRIMARY KEY, seen TEXT NOT NULL) WITHOUT ROWID"
"""What was seen as a link in a run's directory: apart from the runs, which are read whole again and again."""

_CONTRACT = "ALTER TABLE runs ADD COLUMN contract TEXT"
"""The hub's contract that the run's own process speaks, for an observer that is not told one."""

_MIGRATIONS: dict[int, str] = {
    0: _SCHEMA,
    1: _INDEXES_OF_METRICS,
    2: _SPANS_OF_RUNS,
    3: _LEANER_EVENTS,
    4: _LINKS,
    5: _CONTRACT,
}
"""From a schema version to the next one. Version 0 is an empty file."""

_PROBLEMS = "json_patch(?, CASE WHEN json_valid(problems) THEN problems ELSE '{}' END)"
"""What is not JSON is no reason to refuse what comes after it."""

_CURSOR = "SELECT CAST(value AS INTEGER) AS value FROM meta WHERE key = 'metrics_cursor'"
_WHEN = "max(iif(typeof(next_attempt) = 'real', next_attempt, 0), iif(typeof(lease_until) = 'real', lease_until, 0))"
_STATE = "SELECT CAST(name AS BLOB), CAST(labels AS BLOB), CAST(value AS BLOB) FROM metric_state"

RUN_COLUMNS = frozenset(
    "job_id model_id net_id run_dir boot_id pid_ns pid start_ticks heartbeat status started last_event ended workflow "
    "round total_rounds clients round_results stall_after intent root_claimed upload_key upload_id results_uri "
    "results_bytes results_files results_crc32 spans_accepted contract".split()
)
"""Columns of ``runs`` that an entry may set. ``final_*`` are set by the claim alone, ``problems`` by merging."""


_DURABLE_COLUMNS = frozenset({"intent", "root_claimed"})


class LedgerError(Exception):
    """The ledger cannot be used. The text says which directory, why, and what to set."""


class LedgerBusyError(LedgerError):
    """Another process kept the ledger locked for longer than this caller may wait."""


class LedgerCorruptError(LedgerError):
    """The file is no SQLite database, or a damaged one."""


@dataclass(frozen=True)
class OutboxItem:
    """Something that the hub must be told.

    Args:
        model_id: whose lane it is in.
        kind: ``status``, ``metric``, ``log`` or ``event``.
        payload: in our vocabulary; the contract's spelling is chosen when it is sent.
        final: a final status: supersedes earlier statuses and never expires.
    """

    model_id: str
    kind: str
    payload: Mapping[str, Any]
    final: bool = False
    uid: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Entry:
    """One transaction of a run: an event, what it changes in the run's row, and what the hub must be told."""

    run_id: str | None
    time: float
    event: Event | None = None
    facts: tuple[Fact, ...] = ()
    run: Mapping[str, Any] = field(default_factory=dict)
    problems: Mapping[str, float] = field(default_factory=dict)
    final_status: str | None = None
    final_by: str | None = None
    outbox: tuple[OutboxItem, ...] = ()

    @property
    def durable(self) -> bool:
        """Whether the transaction must be on the disk, not only in the kernel, when it returns."""
        if self.final_status is not None or self.run.keys() & _DURABLE_COLUMNS:
            return True
        return any(item.kind == "status" for item in self.outbox)

    def to_json(self) -> str:
        """One line for a spool file."""
        data = {
            "run_id": self.run_id,
            "time": self.time,
            "event": vars(self.event) | {"attrs": dict(self.event.attrs)} if self.event else None,
            "facts": self.facts,
            "run": dict(self.run),
            "problems": dict(self.problems),
            "final_status": self.final_status,
            "final_by": self.final_by,
            "outbox": [vars(item) | {"payload": dict(item.payload)} for item in self.outbox],
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Entry:
        """The entry of a spool file's line.

        Raises:
            ValueError, TypeError, KeyError: when the line is not one that :meth:`to_json` wrote.
        """
        data = json.loads(line)
        event = Event(**data.pop("event")) if data["event"] else data.pop("event")
        facts = tuple((name, value, labels) for name, value, labels in data.pop("facts"))
        outbox = tuple(OutboxItem(**item) for item in data.pop("outbox"))
        return cls(event=event, facts=facts, outbox=outbox, **data)


@dataclass(frozen=True)
class OutboxRow:
    """A row of the outbox as the dispatcher and the command line see it (times in epoch seconds)."""

    id: int
    uid: str
    run_id: str | None
    model_id: str
    kind: str
    lane: int
    final: bool
    payload: dict[str, Any]
    created: float
    attempts: int
    next_attempt: float
    state: str
    done: float | None
    outcome: str | None
    contract: str | None = None
    """The run's, in rows that were taken to be sent."""


class UnreadEvent(NamedTuple):
    """An event that the metrics have not counted, raw: nothing in it need be what it should be, not even text."""

    id: int
    run_id: bytes | None
    time: object
    name: bytes | None
    facts: bytes | None


class Ledger:
    """A connection to the ledger file. Thread-safe; give each part that must not wait for another one of its own.

    Args:
        directory: the ledger's folder; made when missing. ``None`` keeps everything in memory.
        busy_ms: how long a write waits for other processes, in milliseconds. Who waits for :data:`FL_THREAD_BUSY_MS`
            at most leaves it to other connections, too, to move the write-ahead log into the file.
        read_only: for looking only; the file must exist.

    Raises:
        LedgerError: network file system, newer schema, directory that cannot be written, missing file (read only).
        LedgerCorruptError: after a damaged file was found; :meth:`open_or_replace` sets it aside instead.
    """

    def __init__(self, directory: Path | None, *, busy_ms: int = BUSY_MS, read_only: bool = False) -> None:
        self.directory = directory
        self.path = directory / FILE_NAME if directory else None
        self._lock = threading.RLock()
        self._busy_ms = busy_ms
        self._synchronous = ""
        if directory is not None and not read_only:
            _prepare_directory(directory)
        with _explained(directory):
            self._db = self._connect(read_only)
            try:
                self._migrate(read_only)
            except BaseException:
                self._db.close()
                raise
        self._inode = self._file_inode()

    @classmethod
    def open_or_replace(cls, directory: Path, *, busy_ms: int = BUSY_MS) -> Ledger:
        """Open the ledger; a corrupt file is set aside under another name (never deleted) and a new one begun."""
        path = directory / FILE_NAME
        if _is_truncated(path):
            set_aside(directory, _inode(path))
        try:
            return cls(directory, busy_ms=busy_ms)
        except LedgerCorruptError:
            set_aside(directory, _inode(path))
            return cls(directory, busy_ms=busy_ms)

    # -- opening -----------------------------------------------------------------------------------------------------

    def _connect(self, read_only: bool) -> sqlite3.Connection:
        if self.path is None:
            target, uri = ":memory:", False
        elif read_only:
            if not self.path.exists():
                raise LedgerError(
                    f"No ledger at {self.path}. Set FLIP_OBSERVABILITY_DIR to the server's ledger folder."
                )
            target, uri = f"{self.path.absolute().as_uri()}?mode=ro", True
        else:
            target, uri = str(self.path), False
            _make_private_file(self.path)
        db = sqlite3.connect(
            target, timeout=self._busy_ms / 1000, isolation_level=None, check_same_thread=False, uri=uri
        )
        db.row_factory = sqlite3.Row
        db.text_factory = _text
        db.execute(f"PRAGMA busy_timeout={self._busy_ms}")
        if not read_only:
            self._prepare(db)
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        # A new file's first openers race for the switch to WAL, and that one lock does not honour the busy time-out.
        deadline = time.monotonic() + max(self._busy_ms, 500) / 1_000
        while True:
            try:
                if db.execute("PRAGMA page_count").fetchone()[0] == 0:
                    db.execute("PRAGMA auto_vacuum=INCREMENTAL")
                db.execute("PRAGMA journal_mode=WAL").fetchall()
                break
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
        db.execute("PRAGMA journal_size_limit=16777216")
        pages = WAL_PAGES if self._busy_ms > FL_THREAD_BUSY_MS else FL_THREAD_WAL_PAGES
        db.execute(f"PRAGMA wal_autocheckpoint={pages}")
        db.execute("PRAGMA foreign_keys=OFF")

    def _migrate(self, read_only: bool) -> None:
        version = self._version()
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"{self.path} was written by a newer flip-observability (schema {version}, this one knows "
                f"{SCHEMA_VERSION}). Upgrade this installation, or set FLIP_OBSERVABILITY_DIR to another folder."
            )
        if read_only or version == SCHEMA_VERSION:
            return
        self._db.execute(f"PRAGMA busy_timeout={max(self._busy_ms, BUSY_MS)}")
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for step in range(self._version(), SCHEMA_VERSION):
                    for statement in _MIGRATIONS[step].split(";"):
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
        finally:
            self._db.execute(f"PRAGMA busy_timeout={self._busy_ms}")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchall()[0][0])

    def _file_inode(self) -> int | None:
        return _inode(self.path) if self.path else None

    @property
    def inode(self) -> int | None:
        """The file that this connection is open on; compare before setting a corrupt one aside."""
        return self._inode

    def is_current(self) -> bool:
        """Whether the file is still the one that was opened (not deleted, replaced or emptied)."""
        return self.path is None or (self._file_inode() == self._inode and not _is_truncated(self.path))

    def close(self) -> None:
        """Close the connection.

        The last connection to a file removes the write-ahead log *by name*. When the file was deleted or set aside,
        that name belongs to the ledger that took its place, so such a connection is left open for as long as the
        process lives, beyond the reach of the garbage collector.
        """
        with self._lock:
            if self.is_current():
                self._db.close()
            else:
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._db))

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- transactions ------------------------------------------------------------------------------------------------

    def _begin(self, durable: bool) -> None:
        level = "FULL" if durable else "NORMAL"
        if level != self._synchronous:
            self._db.execute(f"PRAGMA synchronous={level}")
            self._synchronous = level
        self._db.execute("BEGIN IMMEDIATE")

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        with self._lock, _explained(self.directory):
            self._begin(durable)
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, parameters: Iterable[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        # Always exhausted at once: an open cursor keeps a read transaction, and the WAL grows behind it.
        with self._lock, _explained(self.directory):
            return self._db.execute(
                sql, parameters if isinstance(parameters, Mapping) else tuple(parameters)
            ).fetchall()

    # -- writing a run -----------------------------------------------------------------------------------------------

    def append(self, entry: Entry) -> bool:
        """Write one entry in one transaction.

        Appending the same entry again changes nothing. When the run already has a final status, no status is sent any
        more, and a second final status is not recorded.

        Returns:
            False when the entry carried a final status and the run had another one already; True otherwise.

        Raises:
            LedgerBusyError: nothing was written; try again.
            LedgerError: nothing was written; the ledger is unwritable, full or corrupt.
        """
        with self._transaction(durable=entry.durable) as db:
            if entry.run_id is not None:
                self._upsert_run(db, entry)
            won = self._claim_final(db, entry)
            self._insert_event(db, entry, () if not won else entry.facts)
            if won:
                for item in entry.outbox:
                    self._insert_outbox(db, entry, item)
            return won

    @staticmethod
    def _upsert_run(db: sqlite3.Connection, entry: Entry) -> None:
        names = tuple(entry.run)
        update, insert = _run_statements(names)
        if entry.problems:
            # Merged, not set: the dispatcher adds problems of its own from other processes.
            db.execute("INSERT OR IGNORE INTO runs (run_id, created) VALUES (?, ?)", (entry.run_id, entry.time))
            problems = json.dumps(dict(entry.problems))
            db.execute(f"UPDATE runs SET problems = {_PROBLEMS} WHERE run_id = ?", (problems, entry.run_id))
        values = entry.run.values()
        if not names or not db.execute(update, (*values, entry.run_id)).rowcount:
            db.execute(insert, (entry.run_id, entry.time, *values))

    def _claim_final(self, db: sqlite3.Connection, entry: Entry) -> bool:
        if entry.final_status is None:
            return True
        claimed = db.execute(
            "UPDATE runs SET final_status = ?, status = ?, final_time = ?, final_by = ? "
            "WHERE run_id = ? AND final_status IS NULL",
            (entry.final_status, entry.final_status, entry.time, entry.final_by, entry.run_id),
        ).rowcount
        if not claimed:
            row = db.execute("SELECT final_status FROM runs WHERE run_id = ?", (entry.run_id,)).fetchone()
            known = entry.event is not None and self._has_event(db, entry.run_id, entry.event.uid)
            return known and row is not None and row[0] == entry.final_status
        return True

    @staticmethod
    def _has_event(db: sqlite3.Connection, run_id: str | None, uid: str) -> bool:
        return bool(db.execute("SELECT 1 FROM events WHERE run_id IS ? AND uid = ?", (run_id, uid)).fetchall())

    @classmethod
    def _insert_event(cls, db: sqlite3.Connection, entry: Entry, facts: tuple[Fact, ...]) -> None:
        event = entry.event
        if event is None or (entry.run_id is None and cls._has_event(db, None, event.uid)):  # no two NULLs are alike
            return
        db.execute(
            "INSERT OR IGNORE INTO events (uid, run_id, time, name, attrs, facts) VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(event.uid, entry.run_id, event.time, event.name),
                *(_dump(dict(event.attrs)), _dump(facts) if facts else "[]"),
            ),
        )

    @staticmethod
    def _insert_outbox(db: sqlite3.Connection, entry: Entry, item: OutboxItem) -> None:
        status = item.kind == "status"
        if status and not item.final:
            finished = "SELECT 1 FROM runs WHERE run_id = ? AND final_status IS NOT NULL"
            if db.execute(finished, (entry.run_id,)).fetchall():
                return
        cursor = db.execute(
            "INSERT OR IGNORE INTO outbox (uid, run_id, model_id, kind, lane, final, payload, created) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(item.uid, entry.run_id, item.model_id, item.kind),
                *(0 if status else 1, int(item.final), _dump(dict(item.payload)), entry.time),
            ),
        )
        if item.final and cursor.rowcount:
            db.execute(
                "UPDATE outbox SET state = 'superseded', done = ? "
                "WHERE model_id = ? AND lane = 0 AND final = 0 AND state = 'pending'",
                (entry.time, item.model_id),
            )

    # -- the outbox --------------------------------------------------------------------------------------------------

    def lease(
        self, owner: str, now: float, seconds: float, limit: int, *, ignore_backoff: bool = False
    ) -> list[OutboxRow]:
        """Take the rows that may be sent now: the head of every model's lane that nobody else is sending.

        Statuses come before metrics and logs, final ones first. A lease ends by itself after ``seconds``.
        """
        with self._transaction() as db:
            rows = db.execute(
                f"{_HEADS} SELECT o.*, r.contract FROM heads AS h JOIN outbox AS o ON o.id = h.id"
                " LEFT JOIN runs AS r ON r.run_id = o.run_id"
                " WHERE (o.next_attempt <= :now OR :hurry OR typeof(o.next_attempt) != 'real')"
                " AND NOT EXISTS (SELECT 1 FROM outbox AS l WHERE l.model_id = o.model_id AND l.lane = o.lane"
                "                 AND l.lease_until > 0 AND l.lease_until > :now AND typeof(l.lease_until) = 'real')"
                " ORDER BY o.lane, o.final DESC, o.id LIMIT :limit",
                {"now": now, "limit": limit, "hurry": int(ignore_backoff)},
            ).fetchall()
            db.executemany(
                "UPDATE outbox SET lease_owner = ?, lease_until = ? WHERE id = ?",
                [(owner, now + seconds, row["id"]) for row in rows],
            )
            return [_mended(db, _outbox_row(row)) for row in rows]

    def settle(
        self,
        row: OutboxRow,
        *,
        now: float,
        state: str | None,
        outcome: str,
        next_attempt: float = 0.0,
        facts: tuple[Fact, ...] = (),
        problem: str | None = None,
    ) -> None:
        """Write down what came of sending a row, and give its lease back.

        Args:
            row: as leased.
            now: epoch seconds.
            state: ``delivered``, ``rejected`` or ``expired``; None keeps it pending until ``next_attempt``.
            outcome: what the hub answered, in a word or a number (never a secret, never a body).
            next_attempt: epoch seconds.
            facts: for the metrics; stored as an event of the run.
            problem: a problem kind to note on the run.
        """
        with self._transaction(durable=row.kind == "status" and state is not None) as db:
            db.execute(
                "UPDATE outbox SET attempts = attempts + 1, lease_owner = NULL, lease_until = 0, next_attempt = ?, "
                "outcome = ?, "
                "state = CASE WHEN state = 'pending' OR ? = 'delivered' THEN coalesce(?, state) ELSE state END, "
                "done = CASE WHEN ? IS NULL THEN done ELSE ? END WHERE id = ?",
                (next_attempt, outcome, state, state, state, now, row.id),
            )
            if row.kind == "log" and state == "delivered":
                # Texts of the job's own code can hold anything: they are not kept longer than they are needed.
                sql = "UPDATE outbox SET payload = json_remove(payload, '$.log') WHERE id = ? AND json_valid(payload)"
                db.execute(sql, (row.id,))
            if problem and row.run_id:
                patch = json.dumps({problem: now})
                db.execute(f"UPDATE runs SET problems = {_PROBLEMS} WHERE run_id = ?", (patch, row.run_id))
            if facts:
                attrs = {"kind": row.kind, "outcome": outcome, "state": state or "retried"}
                attrs |= {"status": row.payload["status"]} if row.kind == "status" else {}
                event = Event(OwnEvents.HUB_REQUEST.value, now, attrs)
                self._insert_event(db, Entry(row.run_id, now, event), facts)

    def lease_owners(self, now: float) -> list[str]:
        """Who holds a lease at ``now`` (epoch seconds)."""
        sql = "SELECT DISTINCT lease_owner FROM outbox WHERE lease_until > 0 AND lease_until > ?"
        return [row[0] for row in self._rows(sql, (now,)) if row[0]]

    def break_leases(self, owner: str) -> int:
        """Free the rows of an owner that is no more, to be sent at once. Returns how many."""
        with self._transaction() as db:
            sql = "UPDATE outbox SET lease_owner = NULL, lease_until = 0, next_attempt = 0 WHERE lease_owner = ?"
            return db.execute(sql, (owner,)).rowcount

    def release_backoff(self, now: float) -> int:
        """Make every waiting row due: the hub has recovered. Returns how many."""
        with self._transaction() as db:
            sql = "UPDATE outbox SET next_attempt = 0 WHERE state = 'pending' AND next_attempt > ?"
            return db.execute(sql, (now,)).rowcount

    def set_outbox_state(self, ids: Iterable[int], state: str, now: float) -> int:
        """For an operator: ``pending`` sends rows again, ``dropped`` gives them up. Returns how many changed."""
        with self._transaction(durable=True) as db:
            changed = 0
            for row_id in ids:
                changed += db.execute(
                    "UPDATE outbox SET state = ?, next_attempt = 0, done = ? WHERE id = ? AND state != 'delivered'",
                    (state, None if state == "pending" else now, row_id),
                ).rowcount
            return changed

    def outbox(
        self, *, run_id: str | None = None, states: Iterable[str] = (), kind: str | None = None, limit: int = 10_000
    ) -> list[OutboxRow]:
        """Rows of the outbox, oldest first."""
        states = list(states)
        clauses = ["1"] + (["run_id = ?"] if run_id else []) + (["kind = ?"] if kind else [])
        if states:
            clauses.append(f"state IN ({', '.join('?' * len(states))})")
        parameters = [*([run_id] if run_id else []), *([kind] if kind else []), *states, limit]
        rows = self._rows(f"SELECT * FROM outbox WHERE {' AND '.join(clauses)} ORDER BY id LIMIT ?", parameters)
        return [_outbox_row(row) for row in rows]

    def outbox_row(self, uid: str) -> OutboxRow | None:
        """One row by its uid."""
        rows = self._rows("SELECT * FROM outbox WHERE uid = ?", (uid,))
        return _outbox_row(rows[0]) if rows else None

    def mark_delivered(self, uids: Iterable[str], now: float) -> None:
        """Rows that were delivered while the ledger could not be written; what they overtook is superseded."""
        with self._transaction(durable=True) as db:
            db.executemany(
                "UPDATE outbox SET state = 'delivered', done = ? WHERE uid = ? AND state != 'delivered'",
                [(now, uid) for uid in uids],
            )
            db.execute(
                "UPDATE outbox SET state = 'superseded', done = ? WHERE state = 'pending' AND lane = 0 AND final = 0 "
                "AND EXISTS (SELECT 1 FROM outbox AS later WHERE later.run_id = outbox.run_id AND later.lane = 0 "
                "            AND later.state = 'delivered' AND later.id > outbox.id)",
                (now,),
            )

    def next_due(self) -> float | None:
        """When the next row wants to be sent (epoch seconds); None when nothing waits."""
        sql = f"{_HEADS} SELECT min({_WHEN}) FROM heads JOIN outbox USING (id)"
        value = self._rows(sql)[0][0]
        return None if value is None else float(value)

    # -- reading -----------------------------------------------------------------------------------------------------

    def run(self, run_id: str) -> dict[str, Any] | None:
        """One run's row."""
        rows = self._rows("SELECT * FROM runs WHERE run_id = ?", (run_id,))
        return _run(rows[0]) if rows else None

    def runs(self, *, statuses: Iterable[str] = (), since: float = 0.0, limit: int = 1_000) -> list[dict[str, Any]]:
        """Runs, newest first."""
        statuses = list(statuses)
        clause = f" AND status IN ({', '.join('?' * len(statuses))})" if statuses else ""
        rows = self._rows(
            f"SELECT * FROM runs WHERE created >= ?{clause} ORDER BY created DESC LIMIT ?", [since, *statuses, limit]
        )
        return [_run(row) for row in rows]

    def find_runs(self, prefix: str, limit: int = 20) -> list[dict[str, Any]]:
        """Runs whose run, job or model id begins with ``prefix``, newest first."""
        like = prefix.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        where = " OR ".join(f"{column} LIKE ?1 ESCAPE '\\'" for column in ("run_id", "job_id", "model_id"))
        rows = self._rows(f"SELECT * FROM runs WHERE {where} ORDER BY created DESC LIMIT ?2", (like, limit))
        return [_run(row) for row in rows]

    def open_run_of_model(self, model_id: str) -> dict[str, Any] | None:
        """The newest run of a model."""
        rows = self._rows("SELECT * FROM runs WHERE model_id = ? ORDER BY created DESC LIMIT 1", (model_id,))
        return _run(rows[0]) if rows else None

    def events(self, run_id: str | None = None, *, after: int = 0, limit: int = 1_000_000) -> list[dict[str, Any]]:
        """Events in the order in which they were written: of one run, or of all with an id over ``after``."""
        # The pluses: by the run's index, whatever the planner thinks of the order.
        clause, order = (" AND run_id = ?", "+id") if run_id else ("", "id")
        rows = self._rows(
            f"SELECT * FROM events WHERE {order} > ?{clause} ORDER BY {order} LIMIT ?",
            [after, *([run_id] if run_id else []), limit],
        )
        return [_event_row(row) for row in rows]

    def has_event(self, run_id: str, name: str) -> bool:
        """Whether an event of this name is in a run's history."""
        return bool(self._rows("SELECT 1 FROM events WHERE run_id = ? AND name = ? LIMIT 1", (run_id, name)))

    def links(self, run_id: str) -> str | None:
        """What was seen of a run's links; None when nobody has looked."""
        rows = self._rows("SELECT seen FROM links WHERE run_id = ?", (run_id,))
        return str(rows[0][0]) if rows else None

    def note_links(self, run_id: str, merge: Callable[[str | None], str]) -> None:
        """Write down what was seen of a run's links.

        Args:
            run_id: the run.
            merge: from what is known, None at first, to what is known now. Nothing is written when that is the same.
        """
        known = self.links(run_id)
        if merge(known) == known:
            return
        with self._transaction() as db:
            found = db.execute("SELECT seen FROM links WHERE run_id = ?", (run_id,)).fetchall()
            value = merge(str(found[0][0]) if found else None)
            db.execute(
                "INSERT INTO links VALUES (?1, ?2) ON CONFLICT (run_id) DO UPDATE SET seen = ?2", (run_id, value)
            )

    def claim_root(self, run_id: str, owner: str) -> bool:
        """Whether the caller may export the run's root span; true for exactly one caller."""
        with self._transaction() as db:
            sql = "UPDATE runs SET root_claimed = ? WHERE run_id = ? AND root_claimed IS NULL"
            return db.execute(sql, (owner, run_id)).rowcount == 1

    def untraced_runs(self, since: float, limit: int = 1_000) -> list[dict[str, Any]]:
        """Runs that got their final status after ``since`` (epoch seconds) and whose root span nobody has claimed."""
        rows = self._rows(
            "SELECT * FROM runs WHERE final_status IS NOT NULL AND root_claimed IS NULL AND final_time > ? "
            "ORDER BY final_time LIMIT ?",
            (since, limit),
        )
        return [_run(row) for row in rows]

    # -- the observer ------------------------------------------------------------------------------------------------

    def observer_heartbeat(self) -> tuple[str, float] | None:
        """Whose this ledger was last, and when it said so (epoch seconds); None when no observer has it."""
        return _heartbeat(self._rows("SELECT value FROM meta WHERE key = 'observer'"))

    def live_observer(self, now: float) -> str | None:
        """The token of the observer that has this ledger and lives; None when there is none.

        A process that can be seen from here is looked at, and lives for :data:`SILENT_OBSERVER_SECONDS` after it was
        last heard. Of what cannot be seen, or can be no observer, the heartbeat alone tells: :data:`OBSERVER_SECONDS`.

        Args:
            now: epoch seconds.
        """
        found = self.observer_heartbeat()
        return found[0] if found is not None and _lives(found, now) else None

    def live_judge(self, now: float) -> str | None:
        """The token of a live observer that is told by the server's parent process how jobs end; None without one.

        Args:
            now: epoch seconds.
        """
        token = self.live_observer(now)
        return token if token is not None and token.endswith(JUDGE) else None

    def claim_observer(self, owner_token: str, now: float) -> bool:
        """Take this ledger, or say that one still has it: the lock and the heartbeat of an observer in one write.

        Args:
            owner_token: a process's token and, behind another ``|``, anything that tells its observers apart.
            now: epoch seconds.

        Returns:
            False when another observer has it and lives; then nothing was written.
        """
        found = self.observer_heartbeat()
        if found is not None and found[0] != owner_token and _lives(found, now):
            return False
        with self._transaction() as db:
            found = _heartbeat(db.execute("SELECT value FROM meta WHERE key = 'observer'").fetchall())
            if found is not None and found[0] != owner_token and _lives(found, now):
                return False
            value = _dump([owner_token, now])
            db.execute("INSERT INTO meta VALUES ('observer', ?1) ON CONFLICT (key) DO UPDATE SET value = ?1", (value,))
            return True

    def release_observer(self, owner_token: str) -> None:
        """Give this ledger back, so that the next observer need not wait."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM meta WHERE key = 'observer' AND json_valid(value) AND json_extract(value, '$[0]') = ?",
                (owner_token,),
            )

    # -- metrics -----------------------------------------------------------------------------------------------------

    def unread_events(self, limit: int) -> tuple[int, list[UnreadEvent]]:
        """The metrics' cursor (the id of the last event that they counted), and the first events behind it."""
        cursor = _cursor(self._rows(_CURSOR))
        # As bytes: one event whose text is no UTF-8 must not hide the others.
        rows = self._rows(
            "SELECT id, CAST(run_id AS BLOB), time, CAST(name AS BLOB), CAST(facts AS BLOB) FROM events "
            "WHERE id > ? ORDER BY id LIMIT ?",
            (cursor, limit),
        )
        return cursor, [UnreadEvent(*row) for row in rows]

    def fold_metrics(
        self,
        cursor: int,
        upto: int,
        names: Iterable[str],
        merge: Callable[[list[tuple[str, str, str]]], Iterable[tuple[str, str, str]]],
    ) -> bool:
        """Change metric state and move the cursor, in one transaction, unless somebody else moved it meanwhile.

        Args:
            cursor: where the caller read from.
            upto: the id of the last event that the caller counted.
            names: of the metrics that change.
            merge: from their stored rows (name, labels, value) to the rows that change.

        Returns:
            False when another process was quicker; then nothing was written.
        """
        names = list(names)
        with self._transaction() as db:
            if _cursor(db.execute(_CURSOR).fetchall()) != cursor:
                return False
            rows = db.execute(f"{_STATE} WHERE name IN ({', '.join('?' * len(names))})", names).fetchall()
            db.executemany(
                "INSERT INTO metric_state (name, labels, value) VALUES (?, ?, ?) "
                "ON CONFLICT (name, labels) DO UPDATE SET value = excluded.value",
                merge([_state_row(row) for row in rows]),
            )
            db.execute(
                "INSERT INTO meta VALUES ('metrics_cursor', ?1) ON CONFLICT (key) DO UPDATE SET value = ?1",
                (str(upto),),
            )
            return True

    def metric_state(self) -> list[tuple[str, str, str]]:
        """All of the metrics' state: rows of name, labels and value."""
        return [_state_row(row) for row in self._rows(_STATE)]

    def open_runs(self, limit: int) -> list[dict[str, Any]]:
        """Runs without a final status, the most recently active first."""
        sql = "SELECT * FROM runs WHERE final_status IS NULL ORDER BY coalesce(last_event, created) DESC LIMIT ?"
        return [_run(row) for row in self._rows(sql, (limit,))]

    def runs_with_intent(self, intent: str, limit: int = 1_000) -> list[dict[str, Any]]:
        """Runs that have a final status and something left to be done, oldest first."""
        sql = "SELECT * FROM runs WHERE intent = ? AND final_status IS NOT NULL ORDER BY created LIMIT ?"
        return [_run(row) for row in self._rows(sql, (intent, limit))]

    def forget_run(self, run_id: str) -> bool:
        """Take a registration back: a run of which nothing was recorded. Returns whether there was one."""
        with self._transaction() as db:
            sql = (
                "DELETE FROM runs WHERE run_id = ?1 AND final_status IS NULL AND boot_id IS NULL "
                "AND NOT EXISTS (SELECT 1 FROM events WHERE run_id = ?1)"
            )
            return db.execute(sql, (run_id,)).rowcount == 1

    def count_active_runs(self) -> int:
        """How many runs have begun and have no final status."""
        sql = "SELECT count(*) FROM runs WHERE final_status IS NULL AND started IS NOT NULL"
        return int(self._rows(sql)[0][0])

    def finished_runs(self, since: float, at_least: int, at_most: int) -> list[dict[str, Any]]:
        """Runs with a final status, the latest first.

        Args:
            since: epoch seconds; all that finished after it ...
            at_least: ... but this many when there were fewer, ...
            at_most: ... and never more than this many.
        """
        sql = "SELECT * FROM runs WHERE final_status IS NOT NULL {} ORDER BY final_time DESC LIMIT ?"
        rows = self._rows(sql.format("AND final_time > ?"), (since, at_most))
        if len(rows) < min(at_least, at_most):
            rows = self._rows(sql.format(""), (min(at_least, at_most),))
        return [_run(row) for row in rows]

    def outbox_backlog(self) -> dict[str, tuple[int, float]]:
        """By kind: how many rows wait, and since when the oldest does (epoch seconds)."""
        sql = "SELECT kind, count(*), min(created) FROM outbox WHERE state = 'pending' GROUP BY kind"
        return {str(kind): (int(count), _number(oldest, time.time())) for kind, count, oldest in self._rows(sql)}

    # -- upkeep ------------------------------------------------------------------------------------------------------

    def forget_before(self, cutoff: float) -> int:
        """Delete the history of finished runs whose statuses were all settled before ``cutoff`` (epoch seconds).

        What the metrics have not counted stays, and so does its run: count first.

        Returns:
            How many rows went. Works in batches, so that writers in other processes hardly notice.
        """
        waiting = "SELECT run_id FROM outbox WHERE state = 'pending' AND run_id IS NOT NULL"
        old = f"SELECT run_id FROM runs WHERE final_time < :cutoff AND run_id NOT IN ({waiting})"
        read, this = f"SELECT coalesce(max(value), 0) FROM ({_CURSOR})", "runs.run_id"
        jobs = (
            (
                "events",
                "id",
                f"id <= ({read}) AND (run_id IN ({old}) OR (run_id IS NULL AND time < :cutoff))",
            ),
            ("outbox", "id", f"state != 'pending' AND (run_id IN ({old}) OR (run_id IS NULL AND done < :cutoff))"),
            # A run goes after its events: an event of a run that is no more would never be found again.
            ("runs", "run_id", f"run_id IN ({old}) AND NOT EXISTS (SELECT 1 FROM events AS e WHERE e.run_id = {this})"),
            ("links", "run_id", "run_id NOT IN (SELECT run_id FROM runs)"),
        )
        gone = 0
        for table, key, where in jobs:
            while True:
                with self._transaction() as db:
                    sql = f"DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM {table} WHERE {where} LIMIT {BATCH})"
                    count = db.execute(sql, {"cutoff": cutoff}).rowcount
                    db.execute(_CURSOR_NOT_AHEAD)
                gone += count
                if count < BATCH:
                    break
        with self._lock, _explained(self.directory):
            self._db.execute("PRAGMA incremental_vacuum(2000)").fetchall()
        return gone

    def checkpoint(self) -> None:
        """Move what the write-ahead log holds into the file, as far as no reader needs it."""
        self._rows("PRAGMA wal_checkpoint(PASSIVE)")


def set_aside(directory: Path, inode: int | None) -> Path | None:
    """Rename a corrupt ledger, unless another process has done so already and begun a new one.

    Args:
        directory: the ledger's folder.
        inode: of the file that was found to be corrupt.

    Returns:
        The new name, or None when the file in place is another one.
    """
    path = directory / FILE_NAME
    if _inode(path) != inode or inode is None:
        return None
    kept = directory / f"{FILE_NAME}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:6]}"
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, kept)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(directory / (FILE_NAME + suffix), Path(f"{kept}{suffix}"))
    log.error("The ledger %s is damaged. It was set aside as %s and a new one was begun.", path, kept.name)
    return kept


def file_system_of(directory: Path) -> str:
    """The type of the file system that a folder is on, as the kernel names it; empty when it cannot be told."""
    where = directory.resolve()
    best, kind = "", ""
    for partition in psutil.disk_partitions(all=True):
        mount = partition.mountpoint
        if where.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, partition.fstype
    return kind.lower()


def _prepare_directory(directory: Path) -> None:
    try:
        make_private_folder(directory)
        kind = file_system_of(directory)
    except OSError as error:
        raise LedgerError(
            f"The ledger's folder {directory} cannot be used ({type(error).__name__}: {error.strerror}). "
            "Set FLIP_OBSERVABILITY_DIR to a writable folder on a local disk."
        ) from error
    if kind in NETWORK_FILE_SYSTEMS:
        raise LedgerError(
            f"The ledger's folder {directory} is on a network file system ({kind}), where SQLite's locks do not hold. "
            "Set FLIP_OBSERVABILITY_DIR to a folder on a local disk."
        )
    if kind in VOLATILE_FILE_SYSTEMS:
        _warn_of_a_volatile(directory, kind)


@cache
def _warn_of_a_volatile(directory: Path, kind: str) -> None:
    # Once for a folder and process, which opens its ledger many times.
    log.warning(
        "The ledger's folder %s is on %s: its history dies with the container. "
        "Set FLIP_OBSERVABILITY_DIR to a folder on a mounted disk.",
        directory,
        kind,
    )


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _is_truncated(path: Path) -> bool:
    """Whether somebody emptied a ledger in use. SQLite cannot tell: it waits for those who have it open, for ever."""
    try:
        # A ledger has its first page before it has a write-ahead log.
        return path.stat().st_size == 0 and path.with_name(f"{FILE_NAME}-wal").exists()
    except OSError:
        return False


def _is_busy(error: sqlite3.Error) -> bool:
    text = str(error)
    return "locked" in text or "busy" in text


@contextlib.contextmanager
def _explained(directory: Path | None) -> Iterator[None]:
    """Turn SQLite's errors into ours. Their texts are SQLite's own and hold no data."""
    try:
        yield
    except sqlite3.Error as error:
        where = f"ledger in {directory}" if directory else "ledger in memory"
        text = f"The {where} failed: {error}"
        if _is_busy(error):
            raise LedgerBusyError(text) from error
        # "malformed JSON" is one damaged cell, and not a reason to give up the file that it is in.
        if type(error) is sqlite3.DatabaseError or "image is malformed" in str(error):
            raise LedgerCorruptError(text) from error
        raise LedgerError(text) from error


def _make_private_file(path: Path) -> None:
    """Make the file, empty, for its owner only; SQLite gives the mode to the files that it puts beside it.

    Not by opening it: when that descriptor is closed, SQLite's locks of this process are gone. And not by the umask: it
    is the whole process's, so that two threads which change it at once can leave the run with the wrong one.
    """
    with contextlib.suppress(OSError):  # it is there, or cannot be made, which SQLite will say better
        os.mknod(os.path.realpath(path), stat.S_IFREG | 0o600)


def _heartbeat(rows: list[sqlite3.Row]) -> tuple[str, float] | None:
    try:
        owner, at = json.loads(rows[0][0])
        return str(owner), float(at)
    except (IndexError, ValueError, TypeError):
        return None  # nobody, or nothing that an observer of ours wrote: free to take


def _lives(heartbeat: tuple[str, float], now: float) -> bool:
    process = ProcessIdentity.from_token(heartbeat[0])
    alive = process.is_alive_as_observer() if process is not None else None
    if alive is False:
        return False
    # A clock that was set: a heartbeat from the future says as little as an old one.
    return abs(now - heartbeat[1]) < (SILENT_OBSERVER_SECONDS if alive else OBSERVER_SECONDS)


def _cursor(rows: list[sqlite3.Row]) -> int:
    return int(rows[0][0]) if rows else 0


def _state_row(row: sqlite3.Row) -> tuple[str, str, str]:
    # Bytes that are no UTF-8 become text that is no JSON: one damaged row must not hide the others.
    name, labels, value = (bytes(cell or b"").decode("utf-8", "replace") for cell in row)
    return name, labels, value


_dump = json.JSONEncoder(separators=(",", ":")).encode
"""``json.dumps`` would make an encoder for every event."""


@functools.lru_cache(maxsize=256)
def _run_statements(names: tuple[str, ...]) -> tuple[str, str]:
    """How a run's columns are updated, and inserted.

    Raises:
        ValueError: for what is no column that an entry may set.
    """
    if not RUN_COLUMNS.issuperset(names):
        raise ValueError(f"Not columns of a run: {sorted(set(names) - RUN_COLUMNS)}")
    # A run that somebody finalised keeps that status, whatever a late event of its job process says.
    assignments = ", ".join(
        "status = coalesce(final_status, ?)" if name == "status" else f"{name} = ?" for name in names
    )
    marks = ", ".join("?" * (len(names) + 2))
    return (
        f"UPDATE runs SET {assignments} WHERE run_id = ?",
        f"INSERT OR IGNORE INTO runs ({', '.join(['run_id', 'created', *names])}) VALUES ({marks})",
    )


def _text(raw: bytes) -> str:
    # Bytes that are no UTF-8: one damaged cell must not hide the rows beside it.
    return raw.decode("utf-8", "replace")


def _object(text: Any) -> dict[str, Any]:
    """What a cell should hold; nothing when it holds something else."""
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _facts(text: Any) -> list[Any]:
    try:
        return [[name, float(value), dict(labels)] for name, value, labels in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        return []


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise


def _run(row: sqlite3.Row) -> dict[str, Any]:
    return dict(row) | {"problems": _object(row["problems"])}


def _event_row(row: sqlite3.Row) -> dict[str, Any]:
    return dict(row) | {
        "attrs": _object(row["attrs"]),
        "facts": _facts(row["facts"]),
        "time": _number(row["time"], 0.0),
    }


def _outbox_row(row: sqlite3.Row) -> OutboxRow:
    values = {name: row[name] for name in row.keys() if name in OutboxRow.__dataclass_fields__}  # noqa: SIM118
    mended = {"final": bool(row["final"]), "payload": _object(row["payload"])}
    mended |= {"created": _number(row["created"], time.time()), "attempts": int(_number(row["attempts"], 0))}
    return OutboxRow(**values | mended)


def _mended(db: sqlite3.Connection, row: OutboxRow) -> OutboxRow:
    """A final status that cannot be read any more is still known to its run."""
    if not row.final or row.payload or row.run_id is None:
        return row
    found = db.execute("SELECT final_status FROM runs WHERE run_id = ?", (row.run_id,)).fetchall()
    if not found or found[0][0] is None:
        return row
    return dataclasses.replace(row, payload={"status": found[0][0]})

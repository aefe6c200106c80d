"""The spool: what the ledger could not take, in a plain file beside it, until it has been taken or delivered.

A disk can be full or read-only under the ledger and the spool alike. So room for the spool is taken while there is
some, and where it cannot be written there is a second place for it: a private folder among the temporary files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from flip_observability.errors import report
from flip_observability.ledger import Entry, Ledger, LedgerError
from flip_observability.process import ProcessIdentity, current_process
from flip_observability.utils import safe_text

PATTERN = "spool-*.jsonl"
RESERVED_BYTES = 65_536
"""More than the statuses and intents of a run take."""
_ROOM = b"\0"
MAX_SPOOL_BYTES = 1 << 30
MAX_LINE_BYTES = 8 << 20
"""Far above what an entry takes: the longest are texts for the hub."""
MAX_DELIVERED = 1_000
MAX_REMEMBERED = 1_000
_VALUE_ERRORS = (sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.IntegrityError, sqlite3.DataError)

_seen: set[tuple[str, str]] = set()
_seen_lock = threading.Lock()


class Spool:
    """A file of entries, one JSON line each, for the time in which the ledger cannot be written.

    Args:
        directory: the ledger's folder.
    """

    def __init__(self, directory: Path) -> None:
        owner = current_process()
        self.path = directory / f"spool-{owner.pid}-{uuid.uuid4().hex[:8]}.jsonl"
        self._owner = owner
        self._directory = directory
        self._end = 0
        self._lock = threading.Lock()

    def reserve(self) -> None:
        """Take the room for a run's statuses now: a disk that is full later has none for them."""
        with self._lock:
            try:
                self._append(None, RESERVED_BYTES)
            except OSError as error:
                report("spool", error, "cannot reserve room for statuses, should the disk become full")

    def add(self, entry: Entry) -> None:
        """Keep an entry. A spool that cannot be written is reported; the entry stays in this process's memory."""
        self._write(entry.to_json())

    def delivered(self, uids: Iterable[str]) -> None:
        """Note which rows the hub has accepted meanwhile."""
        self._write(json.dumps({"delivered": list(uids)}))

    def remove(self) -> None:
        """Forget the file: everything in it has been taken elsewhere."""
        for path in self._places():
            with contextlib.suppress(OSError):
                path.unlink()

    def _places(self) -> tuple[Path, Path]:
        return self.path, second_place(self._directory) / self.path.name

    def _write(self, line: str) -> None:
        with self._lock:
            try:
                self._append(line)
            except OSError as error:
                self._write_elsewhere(line, error)

    def _write_elsewhere(self, line: str, why: OSError) -> None:
        place = self._places()[1]
        if self.path == place:
            report("spool", why, "cannot write the spool file; the entry is kept in memory only")
            return
        report("spool", why, f"cannot write the spool file; it goes on in {place.parent}")
        try:
            _make_private(place.parent)
            self.path, self._end = place, 0
            self._append(line)
        except OSError as error:
            report("spool", error, "cannot write the spool file; the entry is kept in memory only")

    def _append(self, line: str | None, reserve: int = 0) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o600)
        try:
            if reserve and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, reserve)
            text = "" if line is None else f"{line}\n"
            if self._end == 0:
                text = json.dumps({"owner": self._owner.columns()}) + "\n" + text
            data = text.encode()
            # Over the room that was reserved, not behind it; what ends in the middle is overwritten by the next line.
            if os.pwrite(descriptor, data, self._end) != len(data):
                raise OSError("not all of it was written")
            self._end += len(data)
            if line is not None:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def second_place(directory: Path) -> Path:
    """Where the spools of a ledger's folder are that could not be written into it."""
    name = hashlib.sha256(os.fsencode(directory.absolute())).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"flip-observability-{os.geteuid()}" / name


def _make_private(folder: Path) -> None:
    for path in (folder.parent, folder):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        if not _is_private(path):
            raise PermissionError("somebody else has made this folder")


def _is_private(folder: Path) -> bool:
    """Whether a folder is one of ours: everybody can make folders among temporary files."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def take_spools(ledger: Ledger, directory: Path, now: float) -> int:
    """Bring what dead processes left in spool files into the ledger.

    What cannot be read in a file is skipped, and the file then renamed, not deleted. What is no spool file of ours, or
    cannot be opened, is left alone: it is logged and counted once, and holds up nothing behind it.

    Returns:
        The number of files taken.

    Raises:
        LedgerError: the ledger cannot be used now; the file in question stays for the next time.
    """
    taken = 0
    owners = _owners(directory)
    for path in _spools_of(directory):
        try:
            with _open_spool(path, owners) as file:
                done = _take(ledger, path, file, now)
            if done is not None:
                path.unlink() if done else path.rename(path.with_suffix(".unreadable"))
                taken += bool(done)
        except (OSError, _NoSpoolError) as error:  # noqa: PERF203 - one file must not hold up the others
            _leave_alone(path, error)
    return taken


def odd_spools(directory: Path) -> int:
    """How many entries of the ledger's folder are called like spool files and are none of ours."""
    owners = _owners(directory)
    return sum(_is_odd(path, owners) for path in _spools_of(directory))


def _is_odd(path: Path, owners: set[int]) -> bool:
    try:
        _open_spool(path, owners).close()
    except FileNotFoundError:
        return False  # it has just been taken
    except (OSError, _NoSpoolError):
        return True
    return False


class _NoSpoolError(Exception):
    """What is called like a spool file is none of ours. Its text is one word."""


def _owners(directory: Path) -> set[int]:
    """Whose spool files are taken: our own and, for root beside a server, those of the folder's owner."""
    with contextlib.suppress(OSError):
        return {os.geteuid(), directory.stat().st_uid}
    return {os.geteuid()}


def _open_spool(path: Path, owners: set[int]) -> BinaryIO:
    """Open a spool file without being held up or led elsewhere.

    Raises:
        _NoSpoolError: it is none: a named pipe, a device, a link, somebody else's, one without end.
        OSError: it cannot be opened.
    """
    _refuse_odd(path.lstat(), owners)  # first: to open a device can do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_odd(os.fstat(descriptor), owners)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_odd(found: os.stat_result, owners: set[int]) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _NoSpoolError("NoRegularFile")
    if found.st_uid not in owners:
        raise _NoSpoolError("ForeignOwner")
    if found.st_size > MAX_SPOOL_BYTES:
        raise _NoSpoolError("TooLarge")


def _leave_alone(path: Path, error: OSError | _NoSpoolError) -> None:
    """Log and count an entry that is left where it is, once for a process: it is met again every few seconds."""
    if isinstance(error, FileNotFoundError):
        return  # somebody else has just taken it
    kind = str(error) if isinstance(error, _NoSpoolError) else type(error).__name__
    with _seen_lock:
        if (str(path), kind) in _seen:
            return
        if len(_seen) >= MAX_REMEMBERED:
            _seen.clear()
        _seen.add((str(path), kind))
    report("spool", kind, f"{safe_text(path.name)} cannot be taken in and is left alone")


def _take(ledger: Ledger, path: Path, file: BinaryIO, now: float) -> bool | None:
    """Bring one file into the ledger.

    Returns:
        Whether all of it could be read; None when its process may still live, and nothing was done.
    """
    whole = True
    delivered: list[str] = []
    for number, (line, complete) in enumerate(_lines(file)):
        try:
            data = _parse(line)
            if "owner" in data:
                if number == 0 and _is_owned(data["owner"]):
                    return None
            elif "delivered" in data:
                delivered += map(str, data["delivered"])
            else:
                _append_entry(ledger, line)
        except LedgerError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever is in it: the other lines may hold a final status
            if not complete:
                break  # the process died while it wrote its last line
            whole = False
            report("spool", error, f"a line of {safe_text(path.name)} cannot be read; the file is set aside")
        if len(delivered) > MAX_DELIVERED:
            ledger.mark_delivered(delivered, now)
            delivered.clear()
    ledger.mark_delivered(delivered, now)
    return whole


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """The lines of a file and whether each has its end, none longer than :data:`MAX_LINE_BYTES`; not what is reserved.

    One that is longer comes in pieces, none of which can be read.
    """
    while line := file.readline(MAX_LINE_BYTES):
        text = line.rstrip(_ROOM)
        if text:
            yield text.rstrip(b"\n"), len(line) == MAX_LINE_BYTES or text.endswith(b"\n")


def _parse(line: bytes) -> dict[str, Any]:
    data = json.loads(line)
    if not isinstance(data, dict):
        raise TypeError
    return data


def _append_entry(ledger: Ledger, line: bytes) -> None:
    try:
        ledger.append(Entry.from_json(line.decode()))
    except LedgerError as error:
        if isinstance(error.__cause__, _VALUE_ERRORS):
            raise ValueError from None  # the entry is to blame, not the ledger
        raise


def _spools_of(directory: Path) -> Iterator[Path]:
    """What is beside the ledger comes first: what is elsewhere went on from there."""
    yield from sorted(directory.glob(PATTERN))
    second = second_place(directory)
    if _is_private(second.parent) and _is_private(second):
        yield from sorted(second.glob(PATTERN))


def _is_owned(owner: Mapping[str, Any]) -> bool:
    return ProcessIdentity(**owner).is_alive() is not False

"""The spool: what the ledger could not take, in a plain file beside it, until it has been taken or delivered.

A disk can be full or read-only under the ledger and the spool alike. So room for the spool is taken while there is
some, and where it cannot be written there is a second place for it: a private folder among the temporary files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from flip_observability.errors import report
from flip_observability.ledger import Entry, Ledger
from flip_observability.process import ProcessIdentity, current_process

PATTERN = "spool-*.jsonl"
RESERVED_BYTES = 65_536
"""More than the statuses and intents of a run take."""
_ROOM = "\0"


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

    Returns:
        The number of files taken. A file that cannot be read is renamed, not deleted.
    """
    taken = 0
    for path in _spools_of(directory):
        try:
            lines = path.read_text().rstrip(_ROOM).splitlines()
            if lines and _is_owned(lines[0]):
                continue
            delivered = _replay(ledger, lines)
            ledger.mark_delivered(delivered, now)
            path.unlink()
            taken += 1
        except (OSError, ValueError, TypeError, KeyError) as error:
            report("spool", error, f"cannot take in {path.name}; it was set aside")
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".unreadable"))
    return taken


def _spools_of(directory: Path) -> Iterator[Path]:
    """What is beside the ledger comes first: what is elsewhere went on from there."""
    yield from sorted(directory.glob(PATTERN))
    second = second_place(directory)
    if _is_private(second.parent) and _is_private(second):
        yield from sorted(second.glob(PATTERN))


def _is_owned(first_line: str) -> bool:
    owner = json.loads(first_line).get("owner")
    return owner is not None and ProcessIdentity(**owner).is_alive() is not False


def _replay(ledger: Ledger, lines: list[str]) -> list[str]:
    delivered: list[str] = []
    for number, line in enumerate(lines):
        try:
            data = json.loads(line)
        except ValueError:
            if number == len(lines) - 1:
                break  # the process died while it wrote its last line
            raise
        if "delivered" in data:
            delivered += data["delivered"]
        elif "owner" not in data:
            ledger.append(Entry.from_json(line))
    return delivered

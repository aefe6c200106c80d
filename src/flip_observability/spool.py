"""The spool: what the ledger could not take, in a plain file beside it, until it has been taken or delivered."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

from flip_observability.errors import report
from flip_observability.ledger import Entry, Ledger
from flip_observability.process import ProcessIdentity, current_process

PATTERN = "spool-*.jsonl"


class Spool:
    """A file of entries, one JSON line each, for the time in which the ledger cannot be written.

    Args:
        directory: the ledger's folder.
    """

    def __init__(self, directory: Path) -> None:
        owner = current_process()
        self.path = directory / f"spool-{owner.pid}-{uuid.uuid4().hex[:8]}.jsonl"
        self._owner = owner

    def add(self, entry: Entry) -> None:
        """Keep an entry. A spool that cannot be written is reported; the entry stays in this process's memory."""
        self._write(entry.to_json())

    def delivered(self, uids: Iterable[str]) -> None:
        """Note which rows the hub has accepted meanwhile."""
        self._write(json.dumps({"delivered": list(uids)}))

    def remove(self) -> None:
        """Forget the file: everything in it has been taken elsewhere."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _write(self, line: str) -> None:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(descriptor).st_size == 0:
                    line = json.dumps({"owner": self._owner.columns()}) + "\n" + line
                os.write(descriptor, (line + "\n").encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            report("spool", error, "cannot write the spool file; the entry is kept in memory only")


def take_spools(ledger: Ledger, directory: Path, now: float) -> int:
    """Bring what dead processes left in spool files into the ledger.

    Returns:
        The number of files taken. A file that cannot be read is renamed, not deleted.
    """
    taken = 0
    for path in sorted(directory.glob(PATTERN)):
        try:
            lines = path.read_text().splitlines()
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

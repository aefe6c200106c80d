"""Which process this is, told so that another process can see whether it still lives."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """Boot, pid name space, pid and start time in clock ticks: no two processes share them, ever.

    Pid and ticks mean something only to a process with the same boot id and pid name space.
    """

    boot_id: str
    pid_ns: str
    pid: int
    start_ticks: int

    def columns(self) -> dict[str, str | int]:
        """As columns of a run's row."""
        return asdict(self)

    def token(self) -> str:
        """As a word, for a lease's owner; :meth:`from_token` reads it again."""
        return "|".join([self.boot_id, self.pid_ns, str(self.pid), str(self.start_ticks)])

    @classmethod
    def from_token(cls, token: str) -> ProcessIdentity | None:
        """The identity in the first parts of a token; None when it holds none."""
        parts = token.split("|")
        try:
            return cls(parts[0], parts[1], int(parts[2]), int(parts[3]))
        except (IndexError, ValueError):
            return None

    def is_alive(self) -> bool | None:
        """Whether that process runs; None when it cannot be seen from here."""
        here = current_process()
        if (self.boot_id, self.pid_ns) != (here.boot_id, here.pid_ns):
            return None if self.boot_id == here.boot_id else False
        return _start_ticks(self.pid) == self.start_ticks


def current_process() -> ProcessIdentity:
    """The identity of this process."""
    pid = os.getpid()
    return ProcessIdentity(_boot_id(), _pid_name_space(), pid, _start_ticks(pid) or 0)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_name_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_ticks(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name is in parentheses and may hold anything, so count from behind the last one.
    fields = text.rpartition(")")[2].split()
    state, ticks = fields[0], int(fields[19])
    return None if state in {"Z", "X"} else ticks

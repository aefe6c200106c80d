"""Which process this is, told so that another process can see whether it still lives."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

_ENDED = frozenset("ZX")
"""States of a process that has ended and was not collected yet."""


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
        """Whether that process runs: False only when it certainly does not; None when that cannot be seen from here."""
        here = current_process()
        if not (self.boot_id and here.boot_id):
            return None
        if self.boot_id != here.boot_id:
            return False
        if not self.pid_ns or self.pid_ns != here.pid_ns:
            return None
        if not _is_possible(self.pid, self.start_ticks):
            return False
        ticks = _start_ticks(self.pid)
        if ticks is None or not self.start_ticks:
            return None if _exists(self.pid) else False
        return ticks == self.start_ticks

    def is_alive_as_job(self) -> bool | None:
        """Whether that process runs and can be a job's, as an observer sees it.

        Job code can write into the ledger, and name a process there that never ends. So None is also the answer for
        what runs and can be no job's: this process and those above it, the first of a container (which may be a job, or
        a mere ``init``), another user's, and what is no Python. Its heartbeat tells then.
        """
        alive = self.is_alive()
        beside = self.pid != 1 and self.pid != os.getpid() and self.pid not in _ancestors() if alive else False
        return None if alive and not (beside and _can_be_ours(self.pid)) else alive

    def is_alive_as_observer(self) -> bool | None:
        """Whether that process runs and can be an observer's, which may also be a container's first, or above a job."""
        alive = self.is_alive()
        return None if alive and not _can_be_ours(self.pid) else alive


def current_process() -> ProcessIdentity:
    """The identity of this process."""
    pid = os.getpid()
    return ProcessIdentity(_boot_id(), _pid_name_space(), pid, _start_ticks(pid) or 0)


def _is_possible(pid: object, start_ticks: object) -> bool:
    """Whether there can be such a process at all: a damaged row holds anything."""
    return isinstance(pid, int) and 0 < pid < 2**31 and isinstance(start_ticks, int)


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


def _stat(pid: int) -> list[str] | None:
    """The fields of a process from its state on; None when they cannot be read, which does not say that it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The command's name is in parentheses and may hold anything, so count from behind the last one.
    return text.rpartition(")")[2].split()


def _start_ticks(pid: int) -> int | None:
    """When a process began; None for one that has ended (a zombie), or cannot be looked at."""
    fields = _stat(pid)
    return None if not fields or fields[0] in _ENDED else int(fields[19])


def _exists(pid: int) -> bool:
    """Whether the kernel knows a process that has not ended, asked without /proc, which may hide it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    fields = _stat(pid)
    return not (fields and fields[0] in _ENDED)


def _can_be_ours(pid: int) -> bool:
    return _has_our_user(pid) and _is_python(pid)


def _ancestors() -> set[int]:
    """The processes that this one descends from."""
    found: set[int] = set()
    pid = os.getppid()
    while pid > 0 and pid not in found:
        found.add(pid)
        fields = _stat(pid)
        pid = int(fields[1]) if fields else 0
    return found


def _has_our_user(pid: int) -> bool:
    user = os.geteuid()
    try:
        return user in {0, os.stat(f"/proc/{pid}").st_uid}  # root looks after other users' servers
    except OSError:
        return False


def _is_python(pid: int) -> bool:
    try:
        program = Path(os.readlink(f"/proc/{pid}/exe")).name
    except OSError:
        return True  # hidden, which is nothing against it
    return "python" in program or "pypy" in program or program == Path(sys.executable).resolve().name

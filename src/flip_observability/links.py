"""What was seen as a link in a run directory while it was there.

NVFLARE follows links when it archives a run directory: what lies behind them is in the archive like a file of the run.
A salvage takes such an archive, so links are looked for before, and written down in the ledger: as digests, because
names of files may tell of patients, and only so many.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flip_observability import _archive
from flip_observability.errors import report
from flip_observability.ledger import Ledger

MAX_LINKS = 1_000
"""Of a run that has more, a salvage takes only what every run is known to persist."""
MAX_ENTRIES = 200_000
LOOK_SECONDS = 2.0
_MARK_CHARACTERS = 20
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class SeenLinks:
    """What is known of the links of a run; of one at which nobody has looked when nothing is given.

    Args:
        marks: digests of the paths that were links at any time.
        complete: whether the latest look saw the whole directory.
        many: whether there were more than are kept.
    """

    marks: frozenset[str] = frozenset()
    complete: bool = False
    many: bool = False

    @property
    def tell_all(self) -> bool:
        """Whether what is not among them can be taken for no link."""
        return self.complete and not self.many

    def hold(self, path: str) -> bool:
        """Whether this path, or a folder above it, was a link."""
        return any(_mark(path[:end]) in self.marks for end in _ends(path))

    def joined(self, later: SeenLinks) -> SeenLinks:
        """What is known after a later look: a link that was removed meanwhile has been one."""
        marks = self.marks | later.marks
        many = self.many or later.many or len(marks) > MAX_LINKS
        return SeenLinks(frozenset(sorted(marks)[:MAX_LINKS]), later.complete, many)

    def to_text(self) -> str:
        """As it is kept in the ledger."""
        return json.dumps({"marks": sorted(self.marks), "complete": self.complete, "many": self.many})

    @classmethod
    def from_text(cls, text: str | None) -> SeenLinks:
        """From the ledger. What is no such text says that nobody has looked."""
        try:
            found = json.loads(text or "")
            marks = frozenset(str(mark) for mark in found["marks"][:MAX_LINKS])
            return cls(marks, found["complete"] is True, found["many"] is not False)
        except (ValueError, TypeError, KeyError, RecursionError):
            return cls()


NOBODY_LOOKED = SeenLinks()


def look(run_dir: Path, *, seconds: float = LOOK_SECONDS) -> SeenLinks | None:
    """Look for links in a directory, for a limited time.

    Args:
        run_dir: the directory; whether the path to it holds links does not matter.
        seconds: that it may take, unless the disk itself hangs.

    Returns:
        What was found; None when there is no such directory.
    """
    marks: set[str] = set()
    glance = _Glance(time.monotonic() + seconds)
    try:
        with _archive.open_directory(run_dir) as root:
            for path in glance.links(root):
                marks.add(_mark(path))
                if len(marks) > MAX_LINKS:
                    break
    except _archive.SourceError:
        return None
    except OSError:
        glance.complete = False
    return SeenLinks().joined(SeenLinks(frozenset(marks), glance.complete))


class LinkWatcher:
    """Looks for links on a daemon thread of its own, which ends when there is nothing to look at.

    Args:
        directory: the ledger's folder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._wanted: dict[str, Path] = {}
        self._thread: threading.Thread | None = None

    def want(self, run_id: str, run_dir: Path) -> None:
        """Look at a run's directory soon, and write down what is found. Returns at once and raises nothing."""
        try:
            with self._lock:
                self._wanted[run_id] = run_dir
                if self._thread is None:
                    thread = threading.Thread(target=self._work, name="flip-links", daemon=True)
                    thread.start()
                    self._thread = thread
        except RuntimeError as error:
            report("links", error, "cannot look for links: there is no thread to be had")

    def _work(self) -> None:
        while (task := self._next()) is not None:
            run_id, run_dir = task
            try:
                self._look(run_id, run_dir)
            except Exception as error:  # noqa: BLE001 - a salvage takes less then, and the next look may do better
                report("links", error, f"cannot look for links in the directory of run {run_id}")

    def _next(self) -> tuple[str, Path] | None:
        with self._lock:
            if not self._wanted:
                self._thread = None
                return None
            run_id = next(iter(self._wanted))
            return run_id, self._wanted.pop(run_id)

    def _look(self, run_id: str, run_dir: Path) -> None:
        seen = look(run_dir)
        if seen is None:
            return
        with Ledger(self._directory) as ledger:
            ledger.note_links(run_id, lambda known: SeenLinks.from_text(known).joined(seen).to_text())


class _Glance:
    """One look at a directory: a limited number of entries, within a limited time."""

    def __init__(self, until: float) -> None:
        self.complete = True
        self._until = until
        self._entries = 0

    def links(self, folder: int, prefix: str = "", depth: int = 0) -> Iterator[str]:
        """The paths of the links in an open folder and those below."""
        with os.scandir(folder) as listing:
            for item in listing:
                if not self._may_go_on(depth):
                    self.complete = False
                    return
                path = prefix + item.name
                if item.is_symlink():
                    yield path
                elif item.is_dir(follow_symlinks=False):
                    yield from self._below(folder, item.name, path, depth)

    def _below(self, folder: int, name: str, path: str, depth: int) -> Iterator[str]:
        try:
            descriptor = os.open(name, _DIRECTORY_FLAGS, dir_fd=folder)
        except FileNotFoundError:
            return
        except OSError:
            self.complete = False  # it may not be read, or became a link this moment
            return
        try:
            yield from self.links(descriptor, f"{path}/", depth + 1)
        finally:
            os.close(descriptor)

    def _may_go_on(self, depth: int) -> bool:
        self._entries += 1
        return self._entries <= MAX_ENTRIES and depth <= _archive.MAX_DEPTH and time.monotonic() < self._until


def _mark(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:_MARK_CHARACTERS]


def _ends(path: str) -> Iterator[int]:
    """Where each step of a path ends."""
    end = path.find("/")
    while end != -1:
        yield end
        end = path.find("/", end + 1)
    yield len(path)

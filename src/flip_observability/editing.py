"""Changing other people's files so that nothing is lost: all or none, atomically, with the original kept beside them.

An original is kept under its file's name with :data:`BACKUP` and a digest of what took its place, so that undoing can
tell a file that is as it was written from one that somebody has edited since. A folder may come from a stranger: what
is read is a regular file of limited size, never what a link leads to, and nothing waits for a pipe.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BACKUP = ".flip-obs-original-"
MAX_BYTES = 1024 * 1024
"""A larger file is not read: the configurations of FLIP's jobs and of server kits have a few kilobytes."""
_TEMPORARY = ".flip-obs-tmp"
_LEFT_SECONDS = 600.0
_DIGEST_LENGTH = 16
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class EditError(Exception):
    """Files cannot be changed, and none was. The text is one line for the user."""


@dataclass(frozen=True)
class Edit:
    """What is to become of one file.

    Args:
        path: the file; not a link.
        before: its bytes as they were read, None when there is none. It is changed only while it still holds them.
        after: what it is to hold, None to remove it.
        keep: the original to keep beside it, as the only one; None to keep none.
        like: a file whose mode and owner a new one takes.
    """

    path: Path
    before: bytes | None
    after: bytes | None
    keep: bytes | None = None
    like: Path | None = None

    @property
    def kept_in(self) -> Path:
        """The file that keeps the original."""
        return backup_name(self.path, self.after or b"")


@dataclass
class Plan:
    """What would be done, and lines that say it to the user."""

    edits: list[Edit] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def difference(self) -> Iterator[str]:
        """The edits as lines of a unified difference."""
        for edit in self.edits:
            before, after = (
                (content or b"").decode(errors="replace").splitlines() for content in (edit.before, edit.after)
            )
            old, new = ("/dev/null" if content is None else str(edit.path) for content in (edit.before, edit.after))
            yield from difflib.unified_diff(before, after, old, new, lineterm="")

    def apply(self) -> None:
        """Do all edits, or none: everything that needs space or rights is done before the first file is replaced.

        What another process has done already counts as done.

        Raises:
            EditError: none was done, with the reason.
        """
        with contextlib.ExitStack() as temporary, contextlib.ExitStack() as way_back:
            for edit, (new, old, kept) in [(edit, _staged(edit, temporary)) for edit in self.edits]:
                _change(edit, new, old, kept, way_back)
            way_back.pop_all()  # all is done: nothing is to be put back
        for edit in self.edits:
            with contextlib.suppress(OSError):  # the change is made; a file too many is no failure
                for file in originals(edit.path):
                    if edit.keep is None or file != edit.kept_in:
                        file.unlink()


def read(path: Path) -> bytes | None:
    """The bytes of a file, None when there is none.

    Raises:
        EditError: it cannot be read, is too large, or is no regular file.
    """
    if not os.path.lexists(path):
        return None
    with _telling(path, "cannot be read"), open(os.open(path, _READ), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise EditError(f"{path} is no regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise EditError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
    return content


def real_path(path: Path, root: Path) -> Path:
    """Where a file really is, its links followed.

    Raises:
        EditError: outside of ``root``: what a user did not name is not changed.
    """
    try:
        real, inside = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:
        raise EditError(f"{path} is a link that leads nowhere ({type(error).__name__})") from None
    if not real.is_relative_to(inside):
        raise EditError(f"{path} is a link to {real}, outside of {root}: put a copy in its place, or change that file")
    return real


def backup_name(path: Path, after: bytes) -> Path:
    """Where the original of a file is kept that holds ``after`` now."""
    return path.with_name(path.name + BACKUP + hashlib.sha256(after).hexdigest()[:_DIGEST_LENGTH])


def originals(path: Path) -> tuple[Path, ...]:
    """The kept originals of a file; more than one only after an interruption. What is no regular file is none."""
    prefix = path.name + BACKUP
    found = (file for file in path.parent.iterdir() if file.name.startswith(prefix))
    return tuple(sorted(file for file in found if stat.S_ISREG(file.lstat().st_mode)))


def original(path: Path, content: bytes) -> tuple[bytes | None, str]:
    """The kept original of a file that holds ``content``; None, and why, when there is none or it was edited since."""
    kept = originals(path)
    for file in kept:
        before = read(file)
        if before is not None and (file == backup_name(path, content) or before == content):
            return before, ""
    return None, "it was edited since" if kept else "there is no original beside it"


def _staged(edit: Edit, temporary: contextlib.ExitStack) -> tuple[Path | None, ...]:
    """Write beside a file what it is to become, what it was, and the original to keep."""
    with _telling(edit.path, "cannot be changed"):
        _clear(edit.path.parent)
        return tuple(_written(edit, content, temporary) for content in (edit.after, edit.before, edit.keep))


def _change(edit: Edit, new: Path | None, old: Path | None, kept: Path | None, way_back: contextlib.ExitStack) -> None:
    now = read(edit.path)
    if now == edit.after != edit.before:
        return
    if now != edit.before:
        raise EditError(f"{edit.path} was changed by somebody else meanwhile; try again")
    with _telling(edit.path, "cannot be changed"):
        way_back.callback(_put_back, edit.path, old)
        if kept is not None:
            way_back.callback(_put_back, edit.kept_in, None)
            _put(edit.kept_in, kept)
        _put(edit.path, new)


def _put_back(path: Path, old: Path | None) -> None:
    with contextlib.suppress(OSError):  # the first failure is the one to tell of
        _put(path, old)


def _put(path: Path, new: Path | None) -> None:
    if new is not None:
        os.replace(new, path)
    else:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some file systems do not sync folders
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _written(edit: Edit, content: bytes | None, temporary: contextlib.ExitStack) -> Path | None:
    """Write a file beside another one, with the same mode and owner, down to the disk."""
    if content is None:
        return None
    model = (edit.path if edit.before is not None else edit.like or edit.path.parent).lstat()
    descriptor, name = tempfile.mkstemp(dir=edit.path.parent, prefix=f".{edit.path.name}.", suffix=_TEMPORARY)
    temporary.callback(Path(name).unlink, missing_ok=True)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        mine = os.fstat(descriptor)
        if (mine.st_uid, mine.st_gid) != (model.st_uid, model.st_gid):
            os.fchown(descriptor, model.st_uid, model.st_gid)
        os.fchmod(descriptor, model.st_mode & 0o7777)  # last: a change of owner clears some bits
        os.fsync(descriptor)
    return Path(name)


def _clear(folder: Path) -> None:
    """Remove what a process left that was killed; a young file may be one of a process that is at work."""
    for left in folder.glob(f".*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > _LEFT_SECONDS:
                left.unlink()


_REASONS = {
    errno.EACCES: "you may not write there; run this as its owner",
    errno.EPERM: "you may not write there, or not keep its owner; run this as its owner",
    errno.ELOOP: "it is a link, and is not followed",
    errno.ENXIO: "it is no regular file",
}


@contextlib.contextmanager
def _telling(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__
        raise EditError(f"{path} {what}: {reason}") from None

"""Changing other people's files so that nothing is lost: all or none, atomically, with the original kept beside them.

An original is kept under its file's name with :data:`BACKUP` and a digest of what took its place, so that undoing can
tell a file that is as it was written from one that somebody has edited since.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BACKUP = ".flip-obs-original-"
_TEMPORARY = ".flip-obs-tmp"
_LOCK_SECONDS = 10.0
_DIGEST_LENGTH = 16


class EditError(Exception):
    """Files cannot be changed, and none was. The text is one line for the user."""


@dataclass(frozen=True)
class Edit:
    """What is to become of one file.

    Args:
        path: the file; not a link.
        before: its bytes as they were read, None when there is none. It is changed only while it still holds them.
        after: what it is to hold, None to remove it.
        keep: keep the original, for :func:`original`.
        like: a file whose mode and owner a new one takes.
        restore: the kept original that takes the file's place as it is (then ``after`` is its bytes).
        discard: kept originals that are of no use afterwards.
    """

    path: Path
    before: bytes | None
    after: bytes | None
    keep: bool = False
    like: Path | None = None
    restore: Path | None = None
    discard: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Original:
    """A kept original: where it is, and whether the file still holds what was written in its place."""

    path: Path
    untouched: bool


def read(path: Path) -> bytes | None:
    """The bytes of a file, None when there is none.

    Raises:
        EditError: it cannot be read, or is no regular file.
    """
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise EditError(f"{path} is no regular file")
        return path.read_bytes()
    except OSError as error:
        raise EditError(_said(error, path, "cannot be read")) from None


def real_path(path: Path, root: Path) -> Path:
    """Where a file really is, its links followed.

    Raises:
        EditError: outside of ``root``: what a user did not name is not changed.
    """
    real, inside = path.resolve(), root.resolve()
    if not real.is_relative_to(inside):
        raise EditError(f"{path} is a link to {real}, outside of {root}: put a copy in its place, or change that file")
    return real


def backup_name(path: Path, after: bytes) -> Path:
    """Where the original of a file is kept that holds ``after`` now."""
    return path.with_name(path.name + BACKUP + hashlib.sha256(after).hexdigest()[:_DIGEST_LENGTH])


def originals(path: Path) -> tuple[Path, ...]:
    """The kept originals of a file, newest first; more than one only after an interruption."""
    prefix = path.name + BACKUP
    found = [file for file in path.parent.iterdir() if file.name.startswith(prefix) and file.is_file()]
    return tuple(sorted(found, key=lambda file: file.stat().st_ctime_ns, reverse=True))


def original(path: Path, content: bytes) -> Original | None:
    """The kept original of a file that holds ``content``: the one that belongs to it, else the newest."""
    kept = originals(path)
    for file in kept:
        if file == backup_name(path, content) or file.read_bytes() == content:
            return Original(file, True)
    return Original(kept[0], False) if kept else None


def apply(edits: Sequence[Edit]) -> None:
    """Do all edits, or none: everything that needs space or rights is done before the first file is replaced.

    What another process has done already counts as done.

    Raises:
        EditError: none was done, with the reason.
    """
    with contextlib.ExitStack() as stack:
        for folder in sorted({edit.path.parent for edit in edits}):
            stack.enter_context(_locked(folder))
            _clear(folder)
        _apply([edit for edit in edits if edit.before == edit.after or read(edit.path) != edit.after])


def _apply(edits: Sequence[Edit]) -> None:
    staged: list[_Staged] = []
    try:
        for edit in edits:
            staged.append(_Staged(edit))
            staged[-1].prepare()
        for item in staged:
            item.check()
            item.commit()
    except OSError as error:
        _roll_back(staged)
        raise EditError(_said(error, staged[-1].edit.path, "cannot be changed")) from None
    except BaseException:
        _roll_back(staged)
        raise
    for item in staged:
        item.finish()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that change files in it by this module."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise EditError(_said(error, folder, "cannot be opened")) from None
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(descriptor):
            if time.monotonic() >= end:
                raise EditError(f"another process is changing {folder}; try again when it has ended")
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: what was read is compared again before it is replaced
    return True


def _roll_back(staged: Sequence[_Staged]) -> None:
    for item in reversed(staged):
        item.roll_back()


class _Staged:
    """One edit on its way: the new file beside the old one, and the old one under a second name."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self._new: Path | None = None
        self._old: Path | None = None
        self._done = False

    def prepare(self) -> None:
        edit, folder = self.edit, self.edit.path.parent
        if edit.before is not None:
            self._old = self._second_name()
        if edit.restore is not None:
            self._new = _temporary(folder, edit.path.name)
            _link_or_copy(edit.restore, self._new)
        elif edit.after is not None:
            self._new = _write(folder, edit.path.name, edit.after, edit.like or edit.path)

    def _second_name(self) -> Path:
        edit = self.edit
        if not edit.keep or edit.after is None:
            name = _temporary(edit.path.parent, edit.path.name)
        else:
            name = backup_name(edit.path, edit.after)
            name.unlink(missing_ok=True)
        _link_or_copy(edit.path, name)
        return name

    def check(self) -> None:
        if read(self.edit.path) != self.edit.before:
            raise EditError(f"{self.edit.path} was changed by somebody else meanwhile; try again")

    def commit(self) -> None:
        if self._new is not None:
            os.replace(self._new, self.edit.path)
            self._new.unlink(missing_ok=True)  # two names of one file: replacing does nothing then
        elif self.edit.before is not None:
            self.edit.path.unlink()
        self._done = True
        _sync(self.edit.path.parent)

    def roll_back(self) -> None:
        with contextlib.suppress(OSError):  # the first failure is the one to tell of
            if self._new is not None:
                self._new.unlink(missing_ok=True)
            if self._old is not None:
                os.replace(self._old, self.edit.path)
                self._old.unlink(missing_ok=True)
            elif self._done:
                self.edit.path.unlink(missing_ok=True)

    def finish(self) -> None:
        useless = [*self.edit.discard, self.edit.restore, None if self.edit.keep else self._old]
        with contextlib.suppress(OSError):  # the change is made; a file too many is no failure
            for file in filter(None, useless):
                file.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove what a process left that was killed."""
    with contextlib.suppress(OSError):
        for left in folder.glob(f".*{_TEMPORARY}"):
            left.unlink()


def _temporary(folder: Path, name: str) -> Path:
    return Path(tempfile.mktemp(dir=folder, prefix=f".{name}.", suffix=_TEMPORARY))  # noqa: S306 - `link` never overwrites


def _write(folder: Path, name: str, content: bytes, like: Path) -> Path:
    """Write a new file with mode and owner of another one, down to the disk."""
    model = like.stat()
    descriptor, path = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=_TEMPORARY)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(descriptor, model.st_mode & 0o7777)
            mine = os.fstat(descriptor)
            if (mine.st_uid, mine.st_gid) != (model.st_uid, model.st_gid):
                os.fchown(descriptor, model.st_uid, model.st_gid)
                os.fchmod(descriptor, model.st_mode & 0o7777)  # a change of owner clears some bits
            os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return Path(path)


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, so that owner, times and attributes come along; a copy where there are no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        try:
            shutil.copy2(source, target, follow_symlinks=False)
        except OSError:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
            raise


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems do not sync folders
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_REASONS = {
    errno.EACCES: "you may not write there; run this as its owner",
    errno.EPERM: "you may not write there, or not keep its owner; run this as its owner",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "it would be larger than is allowed",
}


def _said(error: OSError, path: Path, what: str) -> str:
    reason = _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__
    return f"{path} {what}: {reason}"

"""The files of a server's kit, which hold its keys and settings, recognised wherever a run may have put them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from flip_observability._archive import CHUNK_BYTES

KIT_FOLDERS = ("startup", "local")
"""Folders of a server's workspace that hold keys and settings."""
MAX_KIT_BYTES = 16 * 1024 * 1024
"""A larger file of the kit is no key: only the file itself is recognised, and no copy of it."""


class Kit:
    """What must not end up in a researcher's download: the contents of a server's ``startup/`` and ``local/``.

    Args:
        workspace: the server's workspace. What cannot be read there is not known, and of empty files no copies are.
    """

    def __init__(self, workspace: Path) -> None:
        self._files: set[tuple[int, int]] = set()
        self._by_size: dict[int, list[Path]] = {}
        self._digests: dict[int, set[bytes]] = {}
        for folder in KIT_FOLDERS:
            for path in sorted((workspace / folder).rglob("*")):
                self._learn(path)

    def holds(self, size: int, chunks: Callable[[], Iterator[bytes]]) -> bool:
        """Whether a file of the kit has this content. ``chunks`` is asked for only when the size fits."""
        if size not in self._by_size:
            return False
        if size not in self._digests:
            self._digests[size] = set(filter(None, map(_digest, self._by_size[size])))
        digest = hashlib.sha256()
        for chunk in chunks():
            digest.update(chunk)
        return digest.digest() in self._digests[size]

    def is_linked(self, _descriptor: int, info: os.stat_result) -> bool:
        """Whether an open file is one of the kit under another name: a hard link."""
        return (info.st_dev, info.st_ino) in self._files

    def is_file(self, descriptor: int, info: os.stat_result) -> bool:
        """Whether an open file is one of the kit, or a copy. Where the descriptor is read from stays as it is."""
        if self.is_linked(descriptor, info):
            return True
        try:
            return self.holds(info.st_size, lambda: _chunks_of(descriptor))
        except OSError:
            return False  # whoever packs it will find that it cannot be read

    def _learn(self, path: Path) -> None:
        try:
            info = path.stat()
        except OSError:
            return
        if stat.S_ISREG(info.st_mode):
            self._files.add((info.st_dev, info.st_ino))
            if 0 < info.st_size <= MAX_KIT_BYTES:
                self._by_size.setdefault(info.st_size, []).append(path)


def _digest(path: Path) -> bytes | None:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return None


def _chunks_of(descriptor: int) -> Iterator[bytes]:
    offset = 0
    while chunk := os.pread(descriptor, CHUNK_BYTES, offset):
        offset += len(chunk)
        yield chunk

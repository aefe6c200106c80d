"""Results of a run that nobody finished: from its directory, or from the archive that the server made of it.

They get the layout that :mod:`flip_observability.results` gives them, under a name that ends in ``-salvaged.zip``. An
archive is read member by member straight into the upload: nothing of it is unpacked, and what a hostile run may have
put into it stays where it is.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO, cast
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from flip_observability import _archive
from flip_observability._kit import Kit
from flip_observability._names import Names
from flip_observability.links import NOBODY_LOOKED, SeenLinks
from flip_observability.results import Content, Destination, DirectoryContent, Receipt, upload_results

SUFFIX = "-salvaged"
MAX_MEMBERS = 1_000_000
MAX_RATIO = 20
RATIO_ALLOWANCE = 64 * 1024 * 1024
"""NVFLARE stores without compressing; an archive that claims to hold far more than its size is a bomb."""
MAX_NAME_BYTES = 4096
"""No path on a disk is longer."""
PACKINGS = frozenset({ZIP_STORED, ZIP_DEFLATED})
"""How a server packs. Others are unpacked a whole block at a time, whatever size is announced: bzip2 makes a GiB of 500
bytes in one go."""
KNOWN = (
    *(f"{folder}/{base}" for base, folders in _archive.LIFTED.items() for folder in folders),
    *("FL_global_model.*", "best_FL_global_model.*"),
    *("models/FL_global_model.*", "models/best_FL_global_model.*", "models/server.npy", "models/best_numpy.npy"),
    *("cross_site_val/*.json", "cross_site_val/result_shareables/*", "evaluation_results/*.json"),
    *("log.txt", "log.json", "log_error.txt", "log_fl.txt", "error_log.txt", "audit.log"),
    *("meta.json", "stats_pool_summary.json", "stats_pool_records.csv"),
)
"""What runs are known to persist: models, results of validations and evaluations, NVFLARE's logs. It is all that is
taken of an archive of which nobody knows what was a link when it was made. ``*`` stands for a part of one step."""
_SNIFFED_BYTES = 4096
_UNREADABLE = (BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)
"""What ``zipfile`` raises for a member that is damaged, encrypted, or packed in a way it does not know."""


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run whose process is gone.

    Args:
        path: the directory.
        kit: what is left out.
        max_bytes: of all files together; those that do not fit are left out.
    """

    path: Path
    kit: Kit
    max_bytes: int = _archive.MAX_BYTES

    @contextmanager
    def open(self) -> Iterator[Content]:
        with _archive.open_directory(self.path) as root:
            yield DirectoryContent(root, self.kit.is_file, self.max_bytes)


@dataclass(frozen=True)
class StoredArchive:
    """The zip of a run directory, as NVFLARE's job store has it.

    Args:
        path: the zip.
        kit: what is left out.
        max_bytes: of all files together; those that do not fit are left out.
        links: what was seen as a link in the run directory, because the archive holds what was behind it.
    """

    path: Path
    kit: Kit
    max_bytes: int = _archive.MAX_BYTES
    links: SeenLinks = NOBODY_LOOKED

    @contextmanager
    def open(self) -> Iterator[Content]:
        with self.path.open("rb") as file, _directory_of(file) as archive:
            members = _members(archive)
            _refuse_bomb(members, os.fstat(file.fileno()).st_size)
            yield _ArchiveContent(archive, members, self.kit, self.max_bytes, self.links)


def salvage(
    source: RunDirectory | StoredArchive,
    destination: Destination,
    model_id: str,
    *,
    stalled_after: Callable[[], float] | None = None,
    on_multipart: Callable[[str, str], None] | None = None,
) -> Receipt:
    """Upload what is left of a run, verified. It takes as long as the transfer.

    Args:
        source: where it is.
        destination: bucket or folder.
        model_id: the model's UUID.
        stalled_after, on_multipart: as for :func:`~flip_observability.results.upload_results`.

    Raises:
        ResultsUploadError: whatever went wrong; the source is as it was.
    """
    return upload_results(
        source, destination, model_id, suffix=SUFFIX, stalled_after=stalled_after, on_multipart=on_multipart
    )


# -- an archive as the source ------------------------------------------------------------------------------------------


def _directory_of(file: IO[bytes]) -> ZipFile:
    """The archive with its directory read.

    Raises:
        SourceError: it is none, it is damaged, or it asks for what no reader here can do.
    """
    try:
        return ZipFile(file)
    except (BadZipFile, EOFError, NotImplementedError, OverflowError, ValueError, struct.error) as error:
        raise _archive.SourceError(type(error).__name__) from error


def _members(archive: ZipFile) -> dict[str, ZipInfo]:
    """The members by name; of several with one name the first, which is the run directory's."""
    members: dict[str, ZipInfo] = {}
    for info in archive.infolist():
        members.setdefault(info.filename, info)
    return members


def _refuse_bomb(members: dict[str, ZipInfo], size: int) -> None:
    claimed = sum(info.file_size for info in members.values())
    if len(members) > MAX_MEMBERS or claimed > MAX_RATIO * size + RATIO_ALLOWANCE:
        raise _archive.SourceError("TooLarge")


@dataclass(frozen=True)
class _ArchiveContent:
    archive: ZipFile
    members: dict[str, ZipInfo]
    kit: Kit
    max_bytes: int
    links: SeenLinks

    def total_size(self) -> int:
        budget = _archive.Budget(self.max_bytes)
        for _, info in self._chosen(_archive.Notes()):
            budget.takes(info.file_size)
        return self.max_bytes - budget.left

    def pack(self, sink: _archive.Sink, notes: _archive.Notes) -> int:
        files, names, budget = 0, Names(), _archive.Budget(self.max_bytes)
        with ZipFile(cast("IO[bytes]", sink), "w") as target:
            for path, info in self._chosen(notes):
                if path.endswith("/"):
                    target.writestr(_new_member(_archive.renamed(names, path, notes), info), b"")
                elif budget.takes(info.file_size):
                    files += self._copy(target, _archive.renamed(names, path, notes), info, notes)
                else:
                    notes.add("large", path)
        return files

    def _chosen(self, notes: _archive.Notes) -> Iterator[tuple[str, ZipInfo]]:
        """Members under the names that they get: first what is lifted to the top, then what is not left out."""
        lifted = set()
        for base, folders in _archive.LIFTED.items():
            found = next((f"{folder}/{base}" for folder in folders if f"{folder}/{base}" in self.members), None)
            if found is not None and self._is_acceptable(self.members[found], notes):
                lifted.add(base)
                yield base, self.members[found]
        for name, info in self.members.items():
            if name not in lifted and not _is_left_out(name) and self._is_acceptable(info, notes):
                yield name, info

    def _is_acceptable(self, info: ZipInfo, notes: _archive.Notes) -> bool:
        reason = _objection(info) or self._doubt(info.filename)
        if reason is not None:
            notes.add(reason, info.filename)
        return reason is None

    def _doubt(self, path: str) -> str | None:
        """Why a member is, or may be, what was behind a link; None when it is not."""
        if self.links.hold(path.removesuffix("/")):
            return "link"
        return None if self.links.tell_all or path.endswith("/") or _is_known(path) else "unknown"

    def _copy(self, target: ZipFile, name: str, info: ZipInfo, notes: _archive.Notes) -> int:
        try:
            if self.kit.holds(info.file_size, lambda: self._chunks(info)):
                notes.add("kit", name)
                return 0
            chunks = self._chunks(info)
            first = next(chunks, b"")
        except _UNREADABLE:
            notes.add("unreadable", name)
            return 0
        member = _new_member(name, info)
        if PurePosixPath(name).suffix.lower() not in _archive.INCOMPRESSIBLE and 0 not in first[:_SNIFFED_BYTES]:
            member.compress_type = ZIP_DEFLATED
        with target.open(member, "w") as file:
            file.write(first)
            while chunk := self._next(chunks, name, notes):
                file.write(chunk)
        return 1

    @staticmethod
    def _next(chunks: Iterator[bytes], name: str, notes: _archive.Notes) -> bytes:
        """The next piece; what the sink raises is not to be taken for a damaged member."""
        try:
            return next(chunks, b"")
        except _UNREADABLE:
            notes.add("partial", name)
            return b""

    def _chunks(self, info: ZipInfo) -> Iterator[bytes]:
        with self.archive.open(info) as file:
            while chunk := file.read(_archive.CHUNK_BYTES):
                yield chunk


def _is_left_out(name: str) -> bool:
    return any(name.rstrip("/") == folder or name.startswith(f"{folder}/") for folder in _archive.LEFT_OUT)


def _is_known(path: str) -> bool:
    steps = path.count("/")
    return any(pattern.count("/") == steps and fnmatchcase(path, pattern) for pattern in KNOWN)


def _objection(info: ZipInfo) -> str | None:
    """Why a member is none of the results; None when it may be."""
    steps = info.filename.removesuffix("/").split("/")
    if any(step in {"", ".", ".."} for step in steps) or len(info.orig_filename) > MAX_NAME_BYTES:
        return "unsafe"
    if len(steps) > _archive.MAX_DEPTH + 1:
        return "deep"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
        return "link" if kind == stat.S_IFLNK else "special"
    return None if info.compress_type in PACKINGS else "packed"


def _new_member(name: str, info: ZipInfo) -> ZipInfo:
    member = ZipInfo(name, info.date_time)
    member.compress_type = ZIP_STORED
    member.file_size = 0 if name.endswith("/") else info.file_size  # decides whether the member needs zip64
    kind = stat.S_IFDIR if name.endswith("/") else stat.S_IFREG
    member.external_attr = (kind | ((info.external_attr >> 16) & 0o777 or 0o600)) << 16
    return member

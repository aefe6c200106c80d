"""Which files of a run directory become which members of its results archive.

The run's own code, and the researchers', can change the directory while it is packed. So every entry is opened relative
to the descriptor of the folder that it was seen in, never through a link, and checked again after it is open.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from flip_observability import _crc32
from flip_observability._names import Names

LEFT_OUT = frozenset({"app_server", "cross_site_val/model_shareables"})
"""Paths inside the run directory that are no results."""

LIFTED: dict[str, tuple[str, ...]] = {
    "FL_global_model.pt": ("app_server", "app_server/model"),
    "best_FL_global_model.pt": ("app_server", "app_server/model"),
    "trainer.py": ("app_server/custom",),
    "validator.py": ("app_server/custom",),
}
"""Files that stand at the archive's top, and the folders that they are looked for in."""

INCOMPRESSIBLE = frozenset(
    ".7z .avi .bin .bz2 .ckpt .dcm .gif .gz .h5 .hdf5 .jpeg .jpg .keras .lz4 .mp4 .nii .npy .npz .onnx .parquet .pdf "
    ".pickle .pkl .png .pt .pth .safetensors .tar .tgz .weights .webp .whl .xz .zip .zst".split()
)
"""Suffixes of weights, archives and images: deflating them costs minutes and saves nothing."""

MAX_BYTES = 200 * 1024**3
"""Of all files of an archive together, when nothing else is said. A sparse file of terabytes would be read, sent and
paid for as zeros, for days; the largest models that are trained on a server are far below this."""

CHUNK_BYTES = 1024 * 1024
_SNIFFED_BYTES = 4096
MAX_DEPTH = 100
_MAX_WARNINGS = 50

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: a pipe put in a file's place after it was looked at must not hold the run up.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_REASONS = {
    "link": "is a link and was not followed",
    "special": "is a pipe, socket or device and was left out",
    "unreadable": "could not be read and was left out",
    "vanished": "vanished while the results were packed",
    "partial": "became unreadable while it was packed: only its beginning is in the archive",
    "shrank": "became shorter while it was packed: the archive holds what was left of it",
    "deep": f"lies more than {MAX_DEPTH} folders deep and was left out",
    "kit": "is a file of the server's kit and was left out",
    "large": "would make the archive larger than it may be and was left out",
    "packed": "is packed in a way that no server packs and was left out",
    "unknown": "may be what was behind a link, as nobody looked, and was left out",
    "unsafe": "has a name that leads elsewhere and was left out",
    "renamed": "has a name that is not UTF-8 or misleading: such characters are written as %XX in the archive",
}
_BY_ERRNO = {errno.ENOENT: "vanished", errno.ELOOP: "link", errno.ENXIO: "special"}


class SourceError(Exception):
    """The run directory itself cannot be opened. The cause is chained."""


class Sink(Protocol):
    """What the archive's bytes are written to, strictly forwards."""

    @property
    def crc(self) -> int:
        """CRC-32 of all that was written."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int: ...

    def flush(self) -> None: ...


@dataclass
class Notes:
    """What did not go into the archive as it stands in the run directory. Bounded, however much that is."""

    kinds: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def add(self, kind: str, name: str) -> None:
        shown = name if len(name) <= 200 else f"{name[:200]}…"
        text = f"{shown!a} {_REASONS[kind]}"
        if text in self.named:  # a folder is looked at once for every file that may be lifted out of it
            return
        self.kinds[kind] += 1
        if len(self.named) < _MAX_WARNINGS:
            self.named.append(text)

    def texts(self) -> tuple[str, ...]:
        """One sentence per entry; they name files, so keep them out of logs and telemetry."""
        rest = sum(self.kinds.values()) - len(self.named)
        return (*self.named, f"… and {rest} more") if rest else tuple(self.named)

    def summary(self) -> str:
        """How many entries of which kind, without names."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))


@dataclass(frozen=True)
class Entry:
    """Something in the run directory: its name in the archive, and where to open it while its folder is open."""

    name: str
    folder: int
    base: str
    info: os.stat_result


@contextmanager
def open_directory(run_dir: Path) -> Iterator[int]:
    """The descriptor of the run directory. The path to it is the caller's and may hold links; nothing below it may.

    Raises:
        SourceError: when it is missing, no directory, or cannot be opened.
    """
    try:
        descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise SourceError(type(error).__name__) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass
class Budget:
    """What files may still go into an archive.

    Args:
        left: bytes. A sparse file counts with its whole length, holes included.
    """

    left: int = MAX_BYTES

    def takes(self, size: int) -> bool:
        """Whether a file of this size fits; then it is counted."""
        if size > self.left:
            return False
        self.left -= size
        return True


def total_size(root: int, max_bytes: int = MAX_BYTES) -> int:
    """Bytes of all files that :func:`pack` would put into the archive now."""
    budget = Budget(max_bytes)
    for entry in _entries(root, Notes()):
        if stat.S_ISREG(entry.info.st_mode):
            budget.takes(entry.info.st_size)
    return max_bytes - budget.left


def pack(
    root: int,
    sink: Sink,
    notes: Notes,
    unwanted: Callable[[int, os.stat_result], bool] | None = None,
    max_bytes: int = MAX_BYTES,
) -> int:
    """Write the archive of an open run directory.

    Args:
        root: from :func:`open_directory`.
        sink: gets the archive's bytes; what it raises leaves as it is.
        notes: told what was left out, and why.
        unwanted: whether an open file, by its descriptor and status, is none of the results.
        max_bytes: of all files together; one that is too large for what is left is left out, and the next ones are not.

    Returns:
        The number of files in the archive; folders are not counted.
    """
    files = 0
    with ZipFile(cast("IO[bytes]", sink), "w") as archive:
        packing = _Packing(archive, sink, notes, Budget(max_bytes))
        for entry in _entries(root, notes):
            if stat.S_ISDIR(entry.info.st_mode):
                archive.writestr(_member(packing, entry), b"")
            elif stat.S_ISREG(entry.info.st_mode):
                files += _add_file(packing, entry, unwanted)
            else:
                notes.add(_kind(entry.info), entry.name)
    return files


def _entries(root: int, notes: Notes) -> Iterator[Entry]:
    lifted = set()
    for entry in _lifted(root, notes):
        lifted.add(entry.name)
        yield entry
    yield from _walk(root, "", LEFT_OUT | lifted, notes)


def _lifted(root: int, notes: Notes) -> Iterator[Entry]:
    for base, folders in LIFTED.items():
        for folder in folders:
            with _open_below(root, folder, notes) as descriptor:
                if descriptor is None or (info := _look(base, descriptor, Notes(), base)) is None:
                    continue
                if stat.S_ISREG(info.st_mode):
                    yield Entry(base, descriptor, base, info)
                    break
                notes.add(_kind(info), f"{folder}/{base}")


@contextmanager
def _open_below(root: int, folder: str, notes: Notes) -> Iterator[int | None]:
    """A folder below the run directory, one step at a time: O_NOFOLLOW guards the last step of a path only."""
    descriptor: int | None = os.dup(root)
    try:
        for step in PurePosixPath(folder).parts:
            parent = descriptor
            descriptor = None
            try:
                descriptor = os.open(step, _DIRECTORY_FLAGS, dir_fd=parent)
            except FileNotFoundError:
                pass
            except OSError as error:
                notes.add(_kind_of_error(error), folder)
            finally:
                os.close(parent)  # type: ignore[arg-type]  # not None: the loop ends when it becomes so
            if descriptor is None:
                break
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _walk(folder: int, prefix: str, skipped: frozenset[str], notes: Notes, depth: int = 0) -> Iterator[Entry]:
    for base in _list(folder, prefix, notes):
        name = prefix + base
        if name in skipped or (info := _look(base, folder, notes, name)) is None:
            continue
        if stat.S_ISDIR(info.st_mode):
            yield Entry(f"{name}/", folder, base, info)
            yield from _descend(Entry(f"{name}/", folder, base, info), skipped, notes, depth + 1)
        else:
            yield Entry(name, folder, base, info)


def _descend(entry: Entry, skipped: frozenset[str], notes: Notes, depth: int) -> Iterator[Entry]:
    if depth > MAX_DEPTH:  # each level holds a descriptor
        notes.add("deep", entry.name)
        return
    try:
        descriptor = os.open(entry.base, _DIRECTORY_FLAGS, dir_fd=entry.folder)
    except OSError as error:
        notes.add(_kind_of_error(error), entry.name)
        return
    try:
        yield from _walk(descriptor, entry.name, skipped, notes, depth)
    finally:
        os.close(descriptor)


def _list(folder: int, prefix: str, notes: Notes) -> list[str]:
    try:
        with os.scandir(folder) as listing:
            return sorted(item.name for item in listing)
    except OSError as error:
        if not prefix:
            raise SourceError(type(error).__name__) from error
        notes.add(_kind_of_error(error), prefix)
        return []


def _look(base: str, folder: int, notes: Notes, name: str) -> os.stat_result | None:
    try:
        return os.stat(base, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        notes.add(_kind_of_error(error), name)
        return None


def _kind(info: os.stat_result) -> str:
    return "link" if stat.S_ISLNK(info.st_mode) else "special"


def _kind_of_error(error: OSError) -> str:
    # ENOTDIR: with O_DIRECTORY, Linux says so of a link put in a folder's place.
    return "link" if error.errno == errno.ENOTDIR else _BY_ERRNO.get(error.errno or 0, "unreadable")


def _add_file(packing: _Packing, entry: Entry, unwanted: Callable[[int, os.stat_result], bool] | None) -> int:
    notes = packing.notes
    try:
        descriptor = os.open(entry.base, _FILE_FLAGS, dir_fd=entry.folder)
    except OSError as error:
        notes.add(_kind_of_error(error), entry.name)
        return 0
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            notes.add("special", entry.name)
            return 0
        if unwanted is not None and unwanted(descriptor, info):
            notes.add("kit", entry.name)
            return 0
        if not packing.budget.takes(info.st_size):
            notes.add("large", entry.name)
            return 0
        return _copy(packing, replace(entry, info=info), descriptor)
    finally:
        os.close(descriptor)


def _copy(packing: _Packing, entry: Entry, descriptor: int) -> int:
    notes, buffer = packing.notes, packing.buffer
    left = entry.info.st_size  # a file that is still written to ends where it ended when it was opened
    view = memoryview(buffer)
    got = _read(descriptor, view[: min(left, CHUNK_BYTES)])
    if got < 0:
        notes.add("unreadable", entry.name)
        return 0
    member = _member(packing, entry)
    if PurePosixPath(entry.base).suffix.lower() not in INCOMPRESSIBLE and 0 not in buffer[: min(got, _SNIFFED_BYTES)]:
        member.compress_type = ZIP_DEFLATED
    with packing.member(member) as write:
        while got > 0:
            write(view[:got])
            left -= got
            got = _read(descriptor, view[: min(left, CHUNK_BYTES)])
    if left:
        notes.add("partial" if got < 0 else "shrank", entry.name)
    return 1


@dataclass
class _Packing:
    """An archive that is being written: what all of its files need."""

    archive: ZipFile
    sink: Sink
    notes: Notes
    budget: Budget
    names: Names = field(default_factory=Names)
    buffer: bytearray = field(default_factory=lambda: bytearray(CHUNK_BYTES))

    @contextmanager
    def member(self, member: ZipInfo) -> Iterator[Callable[[memoryview], object]]:
        """What writes a member's bytes.

        Those of one that is not compressed are the sink's, whose CRC-32 tells the member's: to compute it twice takes
        longer than to read the file. This stands on private names of ``zipfile``; without them its own way is taken.
        """
        stream = self.archive.fp
        with self.archive.open(member, "w") as opened:
            target = cast("Any", opened)
            plain = member.compress_type == ZIP_STORED and hasattr(target, "_crc") and hasattr(target, "_file_size")
            if not plain or stream is None:
                yield target.write
                return
            crc, start = self.sink.crc, stream.tell()
            yield stream.write
            size = stream.tell() - start
            target._crc, target._file_size = _crc32.combine(crc, self.sink.crc, size), size


def _read(descriptor: int, into: memoryview) -> int:
    """Bytes read; 0 at the end, -1 when reading fails."""
    if not into:
        return 0
    try:
        return os.readv(descriptor, [into])
    except OSError:
        return -1


def _member(packing: _Packing, entry: Entry) -> ZipInfo:
    info = entry.info
    name = renamed(packing.names, entry.name, packing.notes)
    member = ZipInfo(name, _zip_time(info.st_mtime))
    member.compress_type = ZIP_STORED
    member.file_size = 0 if name.endswith("/") else info.st_size  # decides whether the member needs zip64
    member.external_attr = (stat.S_IFMT(info.st_mode) | (info.st_mode & 0o777)) << 16
    if name.endswith("/"):
        member.external_attr |= 0x10  # MS-DOS's mark of a directory
    return member


def renamed(names: Names, path: str, notes: Notes) -> str:
    """A path's name in the archive; ``notes`` is told when its own part of it is another one."""
    name = names.of(path)
    if name.removesuffix("/").rpartition("/")[2] != path.removesuffix("/").rpartition("/")[2]:
        notes.add("renamed", path)
    return name


def _zip_time(seconds: float) -> tuple[int, int, int, int, int, int]:
    """A file's time as a zip can hold it: from 1980 to 2107."""
    moment = time.localtime(min(max(seconds, 0.0), 5e9))  # 5e9: in 2128
    if moment.tm_year < 1980:
        return (1980, 1, 1, 0, 0, 0)
    if moment.tm_year > 2107:
        return (2107, 12, 31, 23, 59, 58)
    return (moment.tm_year, moment.tm_mon, moment.tm_mday, moment.tm_hour, moment.tm_min, min(moment.tm_sec, 59))

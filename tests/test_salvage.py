"""Salvage from run directories and from archives, honest and hostile ones."""

from __future__ import annotations

import dataclasses
import io
import os
import stat
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from nvflare.apis.storage import WORKSPACE
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage

from flip_observability._kit import Kit
from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.links import NOBODY_LOOKED, SeenLinks, look
from flip_observability.results import Destination, Receipt, ResultsUploadError, upload_results
from flip_observability.salvage import RunDirectory, StoredArchive, salvage

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"
KEY = b"-----BEGIN PRIVATE KEY-----\ncanary\n"
FILES = {
    "log.txt": b"round 50 done\n" * 100,
    "models/FL_global_model.npz": os.urandom(3_000_000),
    "app_server/FL_global_model.pt": b"\0weights",
    "app_server/custom/trainer.py": b"print()\n",
    "app_server/config/config_fed_server.json": b"{}",
    "cross_site_val/cross_val_results.json": b"{}",
    "cross_site_val/model_shareables/big": b"\0" * 100,
    "images/ü.png": b"\x89PNG",
}
LAYOUT = {
    "FL_global_model.pt": FILES["app_server/FL_global_model.pt"],
    "trainer.py": FILES["app_server/custom/trainer.py"],
    "log.txt": FILES["log.txt"],
    "models/FL_global_model.npz": FILES["models/FL_global_model.npz"],
    "cross_site_val/cross_val_results.json": b"{}",
    "images/ü.png": b"\x89PNG",
}


class Server:
    """A server's workspace with a kit, a run that died, and a job store of NVFLARE's own."""

    def __init__(self, root: Path) -> None:
        self.root = root / "server"
        self.run_dir = self.root / "job"
        self.bucket = root / "bucket"
        self.destination = Destination.parse(self.bucket.as_uri())
        for name, content in {"startup/server.key": KEY, "local/secret.json": b'{"a": 1}', "local/empty": b""}.items():
            self._write(self.root / name, content)
        for name, content in FILES.items():
            self._write(self.run_dir / name, content)

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    @property
    def kit(self) -> Kit:
        return Kit(self.root)

    def stored(self) -> StoredArchive:
        """What NVFLARE archives of the run directory, by its own job store."""
        store = FilesystemStorage(str(self.root / "jobs"))
        store.create_object("/job", b"", {}, overwrite_existing=True)
        store.update_object("/job", [str(self.run_dir)], WORKSPACE)
        return StoredArchive(self.root / "jobs" / "job" / WORKSPACE, self.kit, links=self.links())

    def links(self) -> SeenLinks:
        """What was seen in the run directory before it was archived."""
        return look(self.run_dir) or NOBODY_LOOKED

    def directory(self) -> RunDirectory:
        return RunDirectory(self.run_dir, self.kit)

    def salvage(self, source: RunDirectory | StoredArchive) -> tuple[Receipt, dict[str, bytes]]:
        receipt = salvage(source, self.destination, MODEL)
        return receipt, contents(Path(receipt.uri.removeprefix("file://")))


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == len(set(archive.namelist()))
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


SOURCES: dict[str, Callable[[Server], RunDirectory | StoredArchive]] = {
    "directory": Server.directory,
    "archive": Server.stored,
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_layout_is_that_of_an_upload(server: Server, source: str) -> None:
    receipt, found = server.salvage(SOURCES[source](server))
    assert found == LAYOUT
    assert receipt.verified
    assert receipt.files == len(LAYOUT)
    assert receipt.uri.endswith("-salvaged.zip")
    assert f"/{MODEL}/" in receipt.uri
    usual = upload_results(server.run_dir, server.destination, MODEL)
    assert contents(Path(usual.uri.removeprefix("file://"))) == found


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_of_the_kit_is_in_it(server: Server, source: str) -> None:
    (server.run_dir / "innocent.pem").symlink_to(server.root / "startup" / "server.key")  # an archive follows it
    (server.run_dir / "copy.txt").write_bytes(KEY)
    (server.run_dir / "settings.json").write_bytes(b'{"a": 1}')
    (server.run_dir / "app_server" / "custom" / "validator.py").write_bytes(KEY)
    (server.run_dir / "as_long.txt").write_bytes(b"x" * len(KEY))
    (server.run_dir / "empty").write_bytes(b"")
    receipt, found = server.salvage(SOURCES[source](server))
    assert found == LAYOUT | {"as_long.txt": b"x" * len(KEY), "empty": b""}
    assert sum("kit" in warning for warning in receipt.warnings) >= 3
    assert b"PRIVATE KEY" not in (server.bucket / MODEL / Path(receipt.uri).name).read_bytes()


OUTSIDE = b"CANARY: of another user"


@pytest.fixture
def linked(server: Server, tmp_path: Path) -> Server:
    """A run with links to what is none of its business, and none of the kit."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("secret.txt", "model.pt"):
        (outside / name).write_bytes(OUTSIDE + name.encode())
    (server.run_dir / "notes.txt").symlink_to(outside / "secret.txt")
    (server.run_dir / "images" / "all").symlink_to(outside)
    (server.run_dir / "app_server" / "best_FL_global_model.pt").symlink_to(outside / "model.pt")
    return server


def test_what_was_seen_as_a_link_is_not_salvaged(linked: Server, caplog: pytest.LogCaptureFixture) -> None:
    assert linked.salvage(linked.stored())[1] == LAYOUT
    assert "3 link" in caplog.text
    assert "notes" not in caplog.text


def test_what_was_a_link_once_is_not_salvaged(linked: Server) -> None:
    seen = linked.links()
    (linked.run_dir / "notes.txt").unlink()
    (linked.run_dir / "notes.txt").write_bytes(b"what the link led to")
    later = seen.joined(linked.links())
    assert linked.salvage(dataclasses.replace(linked.stored(), links=later))[1] == LAYOUT


@pytest.mark.parametrize(
    "links", [NOBODY_LOOKED, SeenLinks(complete=False), SeenLinks(complete=True, many=True)], ids=str
)
def test_where_nobody_looked_only_what_runs_persist_is_salvaged(linked: Server, links: SeenLinks) -> None:
    known = {
        "evaluation_results/evaluation_results.json": b"{}",
        "models/server.npy": b"\0npy",
        "error_log.txt": b"an error\n",
    }
    for name, content in {**known, "models/deep/FL_global_model.npz": b"", "custom.bin": b"", "x/log.txt": b""}.items():
        linked._write(linked.run_dir / name, content)
    (linked.run_dir / "app_server" / "best_FL_global_model.pt").unlink()
    receipt, found = linked.salvage(dataclasses.replace(linked.stored(), links=links))
    expected = LAYOUT | known
    del expected["images/ü.png"]
    assert found == expected
    assert any("nobody looked" in text for text in receipt.warnings)


def test_links_and_pipes_of_a_directory_are_not_followed(server: Server) -> None:
    (server.run_dir / "elsewhere").symlink_to("/etc")
    (server.run_dir / "passwd").symlink_to("/etc/passwd")
    os.mkfifo(server.run_dir / "pipe")
    assert server.salvage(server.directory())[1] == LAYOUT


def hostile(path: Path) -> None:
    """An archive as an attacker would make it, with one honest member."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../up.txt", "a/../../up.txt", "/etc/passwd", "./here", "a//b", "../", "x" * 5_000, "a/" * 200):
            archive.writestr(zipfile.ZipInfo(name), b"no")
        for name, kind in (("link", stat.S_IFLNK), ("pipe", stat.S_IFIFO), ("device", stat.S_IFBLK)):
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o777) << 16
            archive.writestr(info, b"/etc/passwd")
        lifted = zipfile.ZipInfo("app_server/custom/trainer.py")
        lifted.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(lifted, b"/etc/passwd")
        archive.writestr("app_server/secret.json", b"no")
        archive.writestr("setuid", b"yes")
        archive.getinfo("setuid").external_attr = (stat.S_IFREG | 0o6755) << 16
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("setuid", b"second")


def test_a_hostile_archive_gives_only_what_is_harmless(server: Server, tmp_path: Path) -> None:
    hostile(tmp_path / "hostile.zip")
    receipt, found = server.salvage(StoredArchive(tmp_path / "hostile.zip", server.kit, links=server.links()))
    assert found == {"setuid": b"yes"}
    with zipfile.ZipFile(Path(receipt.uri.removeprefix("file://"))) as archive:
        assert archive.getinfo("setuid").external_attr >> 16 == stat.S_IFREG | 0o755


def zipped(server: Server) -> StoredArchive:
    """What another job store would archive: NVFLARE's own takes no backslash."""
    path = server.root / "run.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(server.run_dir.rglob("*")):
            archive.write(file, str(file.relative_to(server.run_dir)))
    return StoredArchive(path, server.kit, links=server.links())


@pytest.mark.parametrize("source", [Server.directory, zipped])
def test_names_that_could_be_misread_are_written_plainly(
    server: Server, source: Callable[[Server], RunDirectory | StoredArchive]
) -> None:
    for name in ("C:\\evil", "exe\u202efdp", "a%5Cb", "a\\b", "line\nbreak"):
        (server.run_dir / name).write_text(name)
    (server.run_dir / "images\\").mkdir()
    (server.run_dir / "images\\" / "1.png").write_bytes(b"\x89")
    receipt, found = server.salvage(source(server))
    expected = {"C:%5Cevil": "C:\\evil", "exe%E2%80%AEfdp": "exe\u202efdp", "line%0Abreak": "line\nbreak"}
    assert found.pop("images%5C/1.png") == b"\x89"
    assert {found.pop("a%5Cb"), found.pop("a%5Cb%")} == {b"a%5Cb", b"a\\b"}
    assert found == LAYOUT | {shown: name.encode() for shown, name in expected.items()}
    assert any("misleading" in text for text in receipt.warnings)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED], ids=str)
def test_no_more_is_unpacked_than_was_announced(
    server: Server, tmp_path: Path, packing: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("zeros", bytes(64 << 20))
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\1\2")
    data[central + 24 : central + 28] = struct.pack("<I", 1_000)
    path.write_bytes(data)
    tracemalloc.start()
    try:
        _, found = server.salvage(StoredArchive(path, server.kit, links=server.links()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20, f"{peak >> 20} MiB"
    assert sum(map(len, found.values())) <= 1_000
    if packing != zipfile.ZIP_DEFLATED:
        assert found == {}
        assert "1 packed" in caplog.text


@pytest.mark.parametrize("source", SOURCES)
def test_the_size_of_what_is_salvaged_is_limited(server: Server, source: str) -> None:
    with (server.run_dir / "huge.txt").open("wb") as file:
        file.truncate(100_000_000)
    limited = dataclasses.replace(SOURCES[source](server), max_bytes=50_000_000)
    receipt, found = server.salvage(limited)
    assert found == LAYOUT
    assert any("larger than it may be" in text for text in receipt.warnings)


def test_a_bomb_is_refused_before_it_is_read(server: Server, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("zeros", "w") as member:
        for _ in range(100):
            member.write(bytes(1 << 20))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(ResultsUploadError) as caught:
        server.salvage(StoredArchive(bomb, server.kit))
    assert caught.value.reason == "source"
    assert list(server.bucket.rglob("*.*")) == []


def test_a_member_that_lies_about_its_size_ends_where_it_said(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "liar.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10_000_000))
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\1\2")
    data[central + 24 : central + 28] = struct.pack("<I", 1_000)
    path.write_bytes(data)
    receipt, found = server.salvage(StoredArchive(path, server.kit, links=server.links()))
    assert len(found.get("zeros", b"")) <= 1_000
    assert receipt.size < 10_000


def test_a_damaged_member_costs_only_itself(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("broken.npz", os.urandom(4_000_000))
        archive.writestr("whole.txt", b"fine")
        archive.writestr("encrypted", b"x")
    data = bytearray(path.read_bytes())
    data[3_000_000:3_000_004] = b"oops"
    central = data.index(b"PK\1\2", data.index(b"PK\1\2", data.index(b"PK\1\2") + 4) + 4)
    data[central + 8] |= 1  # the mark of an encrypted member
    path.write_bytes(data)
    receipt, found = server.salvage(StoredArchive(path, server.kit, links=server.links()))
    assert found["whole.txt"] == b"fine"
    assert "encrypted" not in found
    assert any("broken.npz" in warning for warning in receipt.warnings)


def of_a_later_version() -> bytes:
    """An archive whose directory asks for a reader of version 23.6 (found by feeding it mutations)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", b"text")
    data = bytearray(buffer.getvalue())
    data[data.index(b"PK\1\2") + 6] = 236
    return bytes(data)


@pytest.mark.parametrize(
    "content",
    [b"", b"no zip", b"PK\3\4 cut off", of_a_later_version()],
    ids=["empty", "text", "truncated", "later version"],
)
def test_what_is_no_archive_is_said_to_be_none(server: Server, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ResultsUploadError) as caught:
        server.salvage(StoredArchive(tmp_path / "x.zip", server.kit))
    assert caught.value.reason == "source"


@pytest.mark.parametrize("source", [RunDirectory, StoredArchive])
def test_a_source_that_is_gone(server: Server, source: type[RunDirectory] | type[StoredArchive]) -> None:
    with pytest.raises(ResultsUploadError):
        server.salvage(source(server.root / "nowhere", server.kit))


def test_a_kit_that_cannot_be_read_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "dangling").symlink_to("nowhere")
    assert not Kit(tmp_path).holds(5, lambda: iter([b"x" * 5]))
    assert not Kit(tmp_path / "missing").holds(5, lambda: iter([b"x" * 5]))


@pytest.mark.system
def test_an_archive_goes_to_a_bucket_in_parts(server: Server) -> None:
    (server.run_dir / "large.npz").write_bytes(os.urandom(17_000_000))
    with EmbeddedBucket() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        told: list[tuple[str, str]] = []
        receipt = salvage(
            server.stored(),
            Destination.parse(bucket.destination),
            MODEL,
            on_multipart=lambda key, upload: told.append((key, upload)),
        )
        assert receipt.verified
        assert receipt.files == len(LAYOUT) + 1
        (item,) = bucket.objects()
        assert bucket.unfinished_uploads() == []
        assert bucket.checksum(item.key) == f"CRC32 {receipt.crc32}"
        assert told[0] == (item.key, told[0][1])
        assert told[-1] == (item.key, "")

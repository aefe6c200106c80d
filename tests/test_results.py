"""Destinations, and which files of a run directory end in its archive, on a real file system."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flip_observability import _archive, _crc32
from flip_observability.results import REASONS, Destination, Receipt, ResultsUploadError, abort_upload, upload_results

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"
SECRET = "CANARY-private-key"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Destination:
    return Destination.parse((tmp_path / "bucket").as_uri())


def put(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def members(receipt: Receipt) -> dict[str, bytes]:
    """The archive of a `file` destination: intact, as the receipt says, and without a name twice."""
    path = Path(receipt.uri.removeprefix("file://"))
    data = path.read_bytes()
    assert len(data) == receipt.size
    assert zlib.crc32(data) == int.from_bytes(b64decode(receipt.crc32), "big")
    assert receipt.verified
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert len(set(names)) == len(names)
        assert receipt.files == sum(not name.endswith("/") for name in names)
        return {name: archive.read(name) for name in names}


def failure(run_dir: Path, target: Destination, **arguments: Any) -> ResultsUploadError:
    with pytest.raises(ResultsUploadError) as caught:
        upload_results(run_dir, target, arguments.pop("model_id", MODEL), **arguments)
    return caught.value


# --- destinations and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("S3://my.bucket-1/a/b/", "my.bucket-1", "a/b"),
        ("s3://bucket//a", "bucket", "a"),
    ],
)
def test_a_bucket_is_read(text: str, bucket: str, prefix: str) -> None:
    assert Destination.parse(text) == Destination("s3", bucket, prefix, None)


@pytest.mark.parametrize(("text", "directory"), [("file:///a/b", "/a/b"), ("file:///a%20b/", "/a b")])
def test_a_folder_is_read(text: str, directory: str) -> None:
    assert Destination.parse(text) == Destination("file", directory=Path(directory))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be s3://"),
        ("bucket", "must be s3://"),
        ("http://bucket/CANARY", "must be s3://"),
        ("https://bucket", "must be s3://"),
        ("s3:bucket", "must be s3://"),
        ("s3://", "names no bucket"),
        ("s3:///prefix", "names no bucket"),
        ("s3://my bucket", "spaces"),
        (" s3://bucket", "must be s3://"),
        ("s3://bucket ", "spaces"),
        ("s3://bucket/a\nb", "spaces or control"),
        ("s3://CANARY/x", "bucket name"),
        ("s3://ab", "bucket name"),
        ("s3://a..b", "bucket name"),
        ("s3://192.168.0.1", "bucket name"),
        ("s3://key:CANARY@bucket", "bucket name"),
        (f"s3://{'a' * 64}", "bucket name"),
        ("s3://bucket/a//b", "step in its prefix"),
        ("s3://bucket/a/../b", "step in its prefix"),
        (f"s3://bucket/{'a' * 701}", "700 bytes"),
        ("s3://bucket?x=CANARY", "query"),
        ("file://relative/CANARY", "absolute"),
        ("file://", "absolute"),
        ("file:///", "names no directory"),
        ("file:///a/../b", "'..'"),
        ("file:///a%00b", "'..'"),
    ],
)
def test_a_bad_destination_is_refused_with_a_clear_text(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        Destination.parse(text)
    assert "CANARY" not in str(caught.value)
    assert "UPLOADED_FEDERATED_DATA_BUCKET" not in str(caught.value)


def test_an_error_says_why_and_survives_a_process_boundary() -> None:
    error = ResultsUploadError("timeout", "ReadTimeoutError")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason) == (
        "Unexpected failure uploading results to S3: timeout (ReadTimeoutError)",
        "timeout",
    )
    assert ResultsUploadError("nonsense").reason == "other"
    assert pickle.loads(pickle.dumps(ResultsUploadError("timeout", passing=True))).passing
    assert "other" in REASONS


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksums_of_parts_give_the_checksum_of_the_whole(first: bytes, second: bytes) -> None:
    assert _crc32.combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
    assert _crc32.combine(zlib.crc32(first), zlib.crc32(first + second), len(second)) == zlib.crc32(second)


# --- the layout -------------------------------------------------------------------------------------------------------


def test_the_archive_has_the_layout_that_flips_users_know(run_dir: Path, target: Destination) -> None:
    put(run_dir / "app_server" / "FL_global_model.pt", b"global")
    put(run_dir / "app_server" / "best_FL_global_model.pt", b"best")
    put(run_dir / "app_server" / "custom" / "trainer.py", b"train")
    put(run_dir / "app_server" / "custom" / "validator.py", b"validate")
    put(run_dir / "app_server" / "config" / "config_fed_server.json", b"{}")
    put(run_dir / "cross_site_val" / "model_shareables" / "model", b"shareable")
    put(run_dir / "cross_site_val" / "cross_val_results.json", b"{}")
    put(run_dir / "log.txt", b"log")
    put(run_dir / "sub" / "app_server" / "kept.txt", b"kept")
    receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {
        "FL_global_model.pt": b"global",
        "best_FL_global_model.pt": b"best",
        "trainer.py": b"train",
        "validator.py": b"validate",
        "cross_site_val/": b"",
        "cross_site_val/cross_val_results.json": b"{}",
        "log.txt": b"log",
        "sub/": b"",
        "sub/app_server/": b"",
        "sub/app_server/kept.txt": b"kept",
    }
    assert receipt.warnings == ()
    assert (run_dir / "app_server" / "FL_global_model.pt").exists(), "nothing is moved"


def test_models_are_also_found_in_the_model_folder(run_dir: Path, target: Destination) -> None:
    put(run_dir / "app_server" / "model" / "FL_global_model.pt", b"from model/")
    put(run_dir / "app_server" / "model" / "best_FL_global_model.pt", b"not this one")
    put(run_dir / "app_server" / "best_FL_global_model.pt", b"the upper one")
    assert members(upload_results(run_dir, target, MODEL)) == {
        "FL_global_model.pt": b"from model/",
        "best_FL_global_model.pt": b"the upper one",
    }


def test_the_servers_model_takes_the_place_of_one_at_the_top(run_dir: Path, target: Destination) -> None:
    put(run_dir / "FL_global_model.pt", b"stale")
    put(run_dir / "app_server" / "FL_global_model.pt", b"fresh")
    assert members(upload_results(run_dir, target, MODEL)) == {"FL_global_model.pt": b"fresh"}


def test_an_empty_run_gives_an_empty_archive(run_dir: Path, target: Destination) -> None:
    assert members(upload_results(run_dir, target, MODEL)) == {}


def test_the_key_holds_model_time_and_suffix(run_dir: Path, target: Destination) -> None:
    moment = datetime(2026, 5, 4, 3, 2, 1, tzinfo=timezone.utc)
    receipt = upload_results(run_dir, target, MODEL, suffix="-salvaged", timestamp=moment)
    assert receipt.uri.endswith(f"/bucket/{MODEL}/20260504_030201-salvaged.zip")
    members(receipt)


def test_weights_are_stored_and_text_is_deflated(run_dir: Path, target: Destination) -> None:
    put(run_dir / "weights.pt", b"a" * 100_000)
    put(run_dir / "unknown", b"a" * 1000 + b"\0" + b"a" * 100_000)
    put(run_dir / "log.txt", b"a" * 3_000_000)
    receipt = upload_results(run_dir, target, MODEL)
    members(receipt)
    with zipfile.ZipFile(receipt.uri.removeprefix("file://")) as archive:
        kinds = {info.filename: info.compress_type for info in archive.infolist()}
    assert kinds == {
        "weights.pt": zipfile.ZIP_STORED,
        "unknown": zipfile.ZIP_STORED,
        "log.txt": zipfile.ZIP_DEFLATED,
    }


# --- entries that are no plain files ----------------------------------------------------------------------------------


def test_links_are_not_followed(run_dir: Path, target: Destination, tmp_path: Path) -> None:
    key = put(tmp_path / "startup" / "server.key", SECRET.encode())
    put(run_dir / "kept.txt")
    (run_dir / "to_file").symlink_to(key)
    (run_dir / "to_folder").symlink_to(key.parent)
    (run_dir / "dangling").symlink_to(tmp_path / "nowhere")
    put(run_dir / "app_server" / "custom" / "other.py")
    (run_dir / "app_server" / "custom" / "trainer.py").symlink_to(key)
    (run_dir / "app_server" / "FL_global_model.pt").symlink_to(key)
    put(run_dir / "app_server" / "model" / "FL_global_model.pt", b"the real one")
    receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {"kept.txt": b"x", "FL_global_model.pt": b"the real one"}
    assert sorted(receipt.warnings) == [
        "'app_server/FL_global_model.pt' is a link and was not followed",
        "'app_server/custom/trainer.py' is a link and was not followed",
        "'dangling' is a link and was not followed",
        "'to_file' is a link and was not followed",
        "'to_folder' is a link and was not followed",
    ]


@pytest.mark.parametrize("linked", ["app_server", "app_server/model", "app_server/custom"])
def test_the_servers_folders_are_not_found_through_links(
    run_dir: Path, target: Destination, tmp_path: Path, linked: str
) -> None:
    for name in ("FL_global_model.pt", "trainer.py", "custom/trainer.py", "model/FL_global_model.pt"):
        put(tmp_path / "elsewhere" / name, SECRET.encode())
    (run_dir / linked).parent.mkdir(exist_ok=True)
    (run_dir / linked).symlink_to(tmp_path / "elsewhere")
    receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {}
    assert any("is a link and was not followed" in text for text in receipt.warnings)


def test_the_run_directory_may_be_reached_through_a_link(run_dir: Path, target: Destination, tmp_path: Path) -> None:
    put(run_dir / "log.txt")
    (tmp_path / "link").symlink_to(run_dir)
    assert members(upload_results(tmp_path / "link", target, MODEL)) == {"log.txt": b"x"}


def test_pipes_and_sockets_are_left_out(run_dir: Path, target: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    put(run_dir / "kept.txt")
    os.mkfifo(run_dir / "pipe")
    monkeypatch.chdir(run_dir)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {"kept.txt": b"x"}
    assert receipt.warnings == (
        "'pipe' is a pipe, socket or device and was left out",
        "'socket' is a pipe, socket or device and was left out",
    )


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Root reads everything: for a while, be nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_tmp() -> Iterator[Path]:
    """A folder that everybody can reach; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="flip-results-"))
    folder.chmod(0o777)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def test_what_cannot_be_read_is_left_out_and_the_rest_goes(open_tmp: Path) -> None:
    run = open_tmp / "run"
    put(run / "kept.txt")
    put(run / "secret.txt").chmod(0)
    put(run / "locked" / "inside.txt")
    (run / "locked").chmod(0)
    put(run / "unsearchable" / "inside.txt")
    (run / "unsearchable").chmod(0o644)
    with as_ordinary_user():
        receipt = upload_results(run, Destination.parse((open_tmp / "out").as_uri()), MODEL)
    assert set(members(receipt)) == {"kept.txt", "locked/", "unsearchable/"}
    assert sorted(receipt.warnings) == [
        "'locked/' could not be read and was left out",
        "'secret.txt' could not be read and was left out",
        "'unsearchable/inside.txt' could not be read and was left out",
    ]


def test_a_run_directory_that_may_not_be_read_is_a_failed_source(open_tmp: Path) -> None:
    put(open_tmp / "run" / "kept.txt")
    (open_tmp / "run").chmod(0)
    with as_ordinary_user():
        error = failure(open_tmp / "run", Destination.parse((open_tmp / "out").as_uri()))
    assert (error.reason, error.detail) == ("source", "the run directory cannot be opened: PermissionError")


@pytest.mark.parametrize("kind", ["missing", "file", "null"])
def test_a_missing_run_directory_is_a_failed_source(tmp_path: Path, target: Destination, kind: str) -> None:
    put(tmp_path / "file")
    error = failure(tmp_path / ("a\0b" if kind == "null" else kind), target)
    assert error.reason == "source"
    assert isinstance(error.__cause__, _archive.SourceError)
    assert not (tmp_path / "bucket").exists()


# --- a directory that changes while it is packed ----------------------------------------------------------------------


def when_opened(monkeypatch: pytest.MonkeyPatch, base: str, act: Callable[[], object]) -> None:
    """Do something between a file's being looked at and its being opened: the real calls, at the worst moment."""
    real = os.open

    def opening(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if path == base and "dir_fd" in kwargs:
            act()
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opening)


def when_first_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something right after the first read."""
    real = os.readv
    done: list[bool] = []

    def reading(*args: Any) -> int:
        got = real(*args)
        if not done:
            done.append(True)
            act()
        return got

    monkeypatch.setattr(os, "readv", reading)


def swap(path: Path, make: Callable[[Path], object]) -> Callable[[], None]:
    def act() -> None:
        if stat.S_ISREG(path.lstat().st_mode):
            path.unlink()
            make(path)
        elif stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
            make(path)

    return act


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.symlink_to("/etc/hostname"), "is a link and was not followed"),
        (os.mkfifo, "is a pipe, socket or device and was left out"),
        (lambda path: None, "vanished while the results were packed"),
    ],
    ids=["link", "pipe", "nothing"],
)
def test_a_file_swapped_between_look_and_open(
    run_dir: Path, target: Destination, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], says: str
) -> None:
    put(run_dir / "kept.txt")
    victim = put(run_dir / "victim.txt")

    def act() -> None:
        if victim.exists() and not victim.is_symlink():
            victim.unlink()
            make(victim)

    when_opened(monkeypatch, "victim.txt", act)
    receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {"kept.txt": b"x"}
    assert receipt.warnings == (f"'victim.txt' {says}",)


def test_a_folder_swapped_for_a_link_is_not_entered(
    run_dir: Path, target: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "startup" / "server.key", SECRET.encode())
    victim = put(run_dir / "victim" / "x.txt").parent
    opened: list[int] = []

    def act() -> None:
        opened.append(1)
        if len(opened) == 2:  # the first time, sizes are added up
            swap(victim, lambda path: path.symlink_to(tmp_path / "startup"))()

    when_opened(monkeypatch, "victim", act)
    receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {"victim/": b""}
    assert receipt.warnings == ("'victim/' is a link and was not followed",)


def test_a_file_that_grows_ends_where_it_ended_when_opened(
    run_dir: Path, target: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = put(run_dir / "log.txt", b"a" * 3_000_000)

    def grow() -> None:
        with log.open("ab") as file:
            file.write(b"b" * 2_000_000)

    when_first_read(monkeypatch, grow)
    receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {"log.txt": b"a" * 3_000_000}
    assert receipt.warnings == ()


@pytest.mark.parametrize("name", ["log.txt", "weights.pt"])
def test_a_file_that_shrinks_keeps_what_was_read(
    run_dir: Path, target: Destination, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    victim = put(run_dir / name, b"a" * 3_000_000)
    when_first_read(monkeypatch, lambda: os.truncate(victim, 10))
    receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {name: b"a" * _archive.CHUNK_BYTES}
    assert receipt.warnings == (f"'{name}' became shorter while it was packed: the archive holds what was left of it",)


def test_a_file_that_vanishes_while_it_is_read_is_whole(
    run_dir: Path, target: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = put(run_dir / "weights.pt", b"a" * 3_000_000)
    when_first_read(monkeypatch, victim.unlink)
    assert members(upload_results(run_dir, target, MODEL)) == {"weights.pt": b"a" * 3_000_000}


@pytest.mark.parametrize(
    ("good_reads", "content", "says"),
    [
        (0, None, "could not be read and was left out"),
        (1, b"a" * _archive.CHUNK_BYTES, "became unreadable while it was packed: only its beginning is in the archive"),
    ],
)
def test_a_disk_that_fails_costs_one_file(
    run_dir: Path,
    target: Destination,
    monkeypatch: pytest.MonkeyPatch,
    good_reads: int,
    content: bytes | None,
    says: str,
) -> None:
    put(run_dir / "bad.pt", b"a" * 3_000_000)
    put(run_dir / "good.txt")
    real = os.readv
    bad = (run_dir / "bad.pt").stat().st_ino
    reads = [0]

    def reading(descriptor: int, buffers: Any) -> int:
        if os.fstat(descriptor).st_ino == bad:
            reads[0] += 1
            if reads[0] > good_reads:
                raise OSError(5, "Input/output error")
        return real(descriptor, buffers)

    monkeypatch.setattr(os, "readv", reading)
    receipt = upload_results(run_dir, target, MODEL)
    expected = {"good.txt": b"x"} if content is None else {"bad.pt": content, "good.txt": b"x"}
    assert members(receipt) == expected
    assert receipt.warnings == (f"'bad.pt' {says}",)


# --- odd names, times and sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["UTC", "America/Los_Angeles", "Asia/Tokyo"])
def test_times_that_a_zip_cannot_hold_are_clamped(
    run_dir: Path, target: Destination, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    times = {"epoch": 0, "before": -1_000_000_000, "ok": 1_700_000_000, "far": 7_000_000_000, "edge": 315_532_800}
    for name, seconds in times.items():
        os.utime(put(run_dir / name), (seconds, seconds))
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        receipt = upload_results(run_dir, target, MODEL)
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    assert len(members(receipt)) == 5
    with zipfile.ZipFile(receipt.uri.removeprefix("file://")) as archive:
        years = {info.filename: info.date_time[0] for info in archive.infolist()}
    assert years == {"epoch": 1980, "before": 1980, "ok": 2023, "far": 2107, "edge": 1980}


def test_names_in_unicode_and_of_255_bytes(run_dir: Path, target: Destination) -> None:
    names = ["größe.txt", "結果/モデル.pt", "😀", "x" * 255, "é" * 127, "a b", "-dash", "%FF", "%5C"]
    for name in names:
        put(run_dir / name, name.encode())
    found = members(upload_results(run_dir, target, MODEL))
    assert found == {**{name: name.encode() for name in names}, "結果/": b""}


def test_names_that_are_not_utf8(run_dir: Path, target: Destination) -> None:
    for name in (b"bad\xff.txt", b"bad%FF.txt", b"folder\xfe/inside.txt", b"folder%FE/inside.txt"):
        put(Path(os.fsdecode(os.fsencode(run_dir) + b"/" + name)), name)
    receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {
        "bad%FF.txt": b"bad%FF.txt",
        "bad%FF.txt%": b"bad\xff.txt",
        "folder%FE/": b"",
        "folder%FE/inside.txt": b"folder%FE/inside.txt",
        "folder%FE%/": b"",
        "folder%FE%/inside.txt": b"folder\xfe/inside.txt",
    }
    assert sum("not UTF-8" in text for text in receipt.warnings) == 2
    "".join(receipt.warnings).encode()  # they can be written anywhere


def test_names_that_could_be_misread_are_written_plainly(
    run_dir: Path, target: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    names = {
        "C:\\evil": "C:%5Cevil",
        "a\nb": "a%0Ab",
        "\x7f\x9b": "%7F%C2%9B",
        "line\u2028end": "line%E2%80%A8end",
        **{f"x{mark}fdp.exe": f"x%{mark.encode().hex('%').upper()}fdp.exe" for mark in DIRECTION_MARKS},
        "folder\\/in": "folder%5C/in",
    }
    for name in names:
        put(run_dir / name, name.encode())
    receipt = upload_results(run_dir, target, MODEL)
    found = members(receipt)
    assert found == {shown: name.encode() for name, shown in names.items()} | {"folder%5C/": b""}
    assert sum("misleading" in text for text in receipt.warnings) == len(names)
    assert f"{len(names)} renamed" in caplog.text
    assert all(text.isprintable() for text in [*receipt.warnings, *caplog.messages])


DIRECTION_MARKS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def test_names_that_become_the_same_stay_two(run_dir: Path, target: Destination) -> None:
    put(run_dir / "a\\b", b"file with a backslash")
    put(run_dir / "a%5Cb" / "in", b"in a folder")
    put(run_dir / "a\x01" / "in", b"one")
    put(run_dir / "a%01" / "in", b"other")
    found = members(upload_results(run_dir, target, MODEL))
    assert sorted(found.values()) == sorted([b"", b"", b"", b"file with a backslash", b"in a folder", b"one", b"other"])
    plain = [name.removesuffix("/") for name in found]
    assert len(set(plain)) == len(plain), "no file is where another one's folder is"
    assert found["a%5Cb/in"] == b"in a folder"


def test_hard_links_to_the_kit_are_left_out(
    tmp_path: Path, run_dir: Path, target: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    key = put(tmp_path / "startup" / "server.key", SECRET.encode())
    settings = put(tmp_path / "local" / "deep" / "resources.json", b"")
    (run_dir / "notes.txt").hardlink_to(key)
    (run_dir / "app_server" / "custom").mkdir(parents=True)
    (run_dir / "app_server" / "custom" / "trainer.py").hardlink_to(key)
    (run_dir / "empty").hardlink_to(settings)
    put(run_dir / "log.txt", b"log")
    receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {"log.txt": b"log"}
    assert "3 kit" in caplog.text


def test_a_sparse_file_counts_with_its_holes(
    run_dir: Path, target: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    put(run_dir / "app_server" / "FL_global_model.pt", b"model")
    with (run_dir / "huge").open("wb") as file:
        file.truncate(8 * 1024**4)
    put(run_dir / "log.txt", b"log")
    told: list[int] = []
    receipt = upload_results(run_dir, target, MODEL, on_progress=lambda _sent, total: told.append(total))
    assert members(receipt) == {"FL_global_model.pt": b"model", "log.txt": b"log"}
    assert set(told) == {8}
    assert receipt.warnings == ("'huge' would make the archive larger than it may be and was left out",)
    assert "1 large" in caplog.text


def test_the_size_of_an_archive_is_limited(run_dir: Path, target: Destination) -> None:
    put(run_dir / "app_server" / "FL_global_model.pt", b"m" * 600)
    put(run_dir / "a", b"a" * 500)
    put(run_dir / "b", b"b" * 400)
    found = members(upload_results(run_dir, target, MODEL, max_bytes=1_000))
    assert found == {"FL_global_model.pt": b"m" * 600, "b": b"b" * 400}


def test_empty_files_and_empty_folders_are_kept(run_dir: Path, target: Destination) -> None:
    put(run_dir / "empty.txt", b"")
    put(run_dir / "empty.pt", b"")
    (run_dir / "folder" / "in" / "folder").mkdir(parents=True)
    receipt = upload_results(run_dir, target, MODEL)
    assert members(receipt) == {
        "empty.txt": b"",
        "empty.pt": b"",
        "folder/": b"",
        "folder/in/": b"",
        "folder/in/folder/": b"",
    }
    with zipfile.ZipFile(receipt.uri.removeprefix("file://")) as archive:
        assert archive.getinfo("folder/").external_attr & 0x10
        assert stat.S_ISDIR(archive.getinfo("folder/").external_attr >> 16)


def test_permissions_are_kept_without_set_user_id(run_dir: Path, target: Destination) -> None:
    put(run_dir / "tool").chmod(0o4755)
    receipt = upload_results(run_dir, target, MODEL)
    with zipfile.ZipFile(receipt.uri.removeprefix("file://")) as archive:
        assert archive.getinfo("tool").external_attr >> 16 == stat.S_IFREG | 0o755


def test_a_very_deep_folder_is_cut_off(run_dir: Path, target: Destination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir)
    for _ in range(110):
        os.mkdir("d")
        os.chdir("d")
    Path("deep.txt").write_text("x")
    monkeypatch.chdir("/")
    receipt = upload_results(run_dir, target, MODEL)
    assert len(members(receipt)) == 101
    assert len(receipt.warnings) == 1
    assert "more than 100 folders deep" in receipt.warnings[0]


def test_many_warnings_stay_few_texts(run_dir: Path, target: Destination) -> None:
    for number in range(500):
        (run_dir / f"link{number}").symlink_to("x")
    receipt = upload_results(run_dir, target, MODEL)
    assert len(receipt.warnings) == 51
    assert receipt.warnings[-1] == "… and 450 more"


def test_warnings_name_files_and_the_log_does_not(
    run_dir: Path, target: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / "patient-CANARY").symlink_to("x")
    receipt = upload_results(run_dir, target, MODEL)
    assert "CANARY" in receipt.warnings[0]
    assert "CANARY" not in caplog.text
    assert "1 link" in caplog.text


@pytest.mark.system
def test_twenty_thousand_small_files(run_dir: Path, target: Destination) -> None:
    for folder in range(20):
        (run_dir / f"f{folder}").mkdir()
        for number in range(1000):
            (run_dir / f"f{folder}" / f"{number}.json").write_bytes(b"%d" % number)
    descriptors = len(os.listdir("/proc/self/fd"))
    receipt = upload_results(run_dir, target, MODEL)
    # Fewer is no leak of ours: what earlier tests in this process left may be collected meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    found = members(receipt)
    assert receipt.files == 20_000
    assert found["f19/999.json"] == b"999"
    assert all(found[f"f{folder}/{number}.json"] == b"%d" % number for folder in range(20) for number in range(1000))


class HoleySink:
    """A file that leaves holes where zeros are: 4 GiB that take no room."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._zeros = bytes(_archive.CHUNK_BYTES)
        self._crc = 0

    @property
    def crc(self) -> int:
        return self._crc

    def write(self, data: bytes | bytearray | memoryview) -> int:
        self._crc = zlib.crc32(data, self._crc)
        if len(data) == len(self._zeros) and bytes(data) == self._zeros:  # a memoryview compares slowly
            self._file.seek(len(data), os.SEEK_CUR)
        else:
            self._file.write(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


@pytest.mark.system
def test_a_file_over_4_gib(run_dir: Path, tmp_path: Path) -> None:
    size = 4 * 1024**3 + 5_000_000
    with (run_dir / "big.pt").open("wb") as file:
        file.truncate(size - 3)
        file.seek(0, os.SEEK_END)
        file.write(b"end")
    put(run_dir / "zlast.txt", b"behind 4 GiB")
    with _archive.open_directory(run_dir) as root:
        assert _archive.total_size(root) == size + 12
        assert _archive.pack(root, HoleySink(tmp_path / "big.zip"), _archive.Notes()) == 2
    with zipfile.ZipFile(tmp_path / "big.zip") as archive:
        info = archive.getinfo("big.pt")
        assert (info.file_size, info.compress_size, info.compress_type) == (size, size, zipfile.ZIP_STORED)
        assert archive.read("zlast.txt") == b"behind 4 GiB"
        with archive.open("big.pt") as file:
            assert file.read(5) == bytes(5)
    crc, zeros = 0, memoryview(bytes(1024 * 1024))
    for start in range(0, size - 3, len(zeros)):
        crc = zlib.crc32(zeros[: size - 3 - start], crc)
    assert zlib.crc32(b"end", crc) == info.CRC


@pytest.mark.skipif(shutil.which("unzip") is None, reason="needs Info-ZIP's unzip")
def test_another_program_reads_the_archive(run_dir: Path, target: Destination, tmp_path: Path) -> None:
    put(run_dir / "weights.pt", os.urandom(3_000_000))
    put(run_dir / "log.txt", b"line\n" * 100_000)
    put(run_dir / "empty", b"")
    (run_dir / "folder").mkdir()
    receipt = upload_results(run_dir, target, MODEL)
    out = tmp_path / "unpacked"
    subprocess.run(["unzip", "-q", receipt.uri.removeprefix("file://"), "-d", str(out)], check=True)
    assert {path.relative_to(out).as_posix() for path in out.rglob("*")} == {"weights.pt", "log.txt", "empty", "folder"}
    assert (out / "weights.pt").read_bytes() == (run_dir / "weights.pt").read_bytes()


# --- a folder as the destination --------------------------------------------------------------------------------------


def test_the_file_appears_when_it_is_whole_and_private(run_dir: Path, target: Destination, tmp_path: Path) -> None:
    put(run_dir / "weights.pt", os.urandom(30_000_000))
    seen: list[list[str]] = []
    calls: list[tuple[str, str]] = []
    progress: list[tuple[int, int]] = []

    def look(sent: int, total: int) -> None:
        progress.append((sent, total))
        if sent < 30_000_000:
            seen.append([path.suffix for path in (tmp_path / "bucket").rglob("*") if path.is_file()])

    receipt = upload_results(
        run_dir, target, MODEL, on_progress=look, on_multipart=lambda key, upload_id: calls.append((key, upload_id))
    )
    members(receipt)
    assert seen[0] == []
    assert seen[1:]
    assert all(found == [".part"] for found in seen[1:])
    assert progress[0] == (0, 30_000_000)
    assert progress == sorted(progress)
    assert progress[-1][0] == receipt.size
    path = Path(receipt.uri.removeprefix("file://"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert calls == [(f"{MODEL}/{path.name}", calls[0][1]), (f"{MODEL}/{path.name}", "")]
    assert calls[0][1].endswith(".part")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_every_folder_that_is_made_is_for_its_owner_only(run_dir: Path, tmp_path: Path, umask: int) -> None:
    above = tmp_path / "there"
    above.mkdir(mode=0o755)
    before = os.umask(umask)
    try:
        receipt = upload_results(run_dir, Destination.parse((above / "a" / "b" / "c").as_uri()), MODEL)
    finally:
        os.umask(before)
    archive = Path(receipt.uri.removeprefix("file://"))
    made = [folder for folder in archive.parents if folder.is_relative_to(above) and folder != above]
    assert len(made) == 4
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in made} == {0o700}
    assert stat.S_IMODE(above.stat().st_mode) == 0o755


@pytest.mark.parametrize("model_id", ["../x", "", ".", "a/b", "a" * 200, "a b", "x\0"])
def test_a_model_id_cannot_lead_elsewhere(run_dir: Path, target: Destination, model_id: str) -> None:
    error = failure(run_dir, target, model_id=model_id)
    assert (error.reason, error.detail) == ("other", "the model id cannot be part of a key")


def test_a_suffix_cannot_lead_elsewhere(run_dir: Path, target: Destination) -> None:
    assert failure(run_dir, target, suffix="/../x").reason == "other"


@pytest.mark.parametrize("inside", ["", "results"])
def test_a_destination_inside_the_run_directory_is_refused(run_dir: Path, inside: str) -> None:
    error = failure(run_dir, Destination.parse((run_dir / inside).as_uri()))
    assert (error.reason, error.detail) == ("other", "the destination lies inside the run directory")


def test_a_folder_that_may_not_be_written(open_tmp: Path) -> None:
    put(open_tmp / "run" / "kept.txt")
    (open_tmp / "out").mkdir(mode=0o555)
    with as_ordinary_user():
        error = failure(open_tmp / "run", Destination.parse((open_tmp / "out").as_uri()))
    assert (error.reason, error.detail) == ("access_denied", "PermissionError")
    assert isinstance(error.__cause__, PermissionError)


def test_a_folder_that_is_a_file(run_dir: Path, tmp_path: Path) -> None:
    put(tmp_path / "bucket")
    error = failure(run_dir, Destination.parse((tmp_path / "bucket").as_uri()))
    assert error.reason == "other"
    assert str(error).startswith("Unexpected failure uploading results to S3")


def test_a_disk_that_is_full_leaves_nothing_behind(run_dir: Path, target: Destination, tmp_path: Path) -> None:
    put(run_dir / "weights.pt", bytes(5_000_000))
    calls: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    try:
        error = failure(run_dir, target, on_multipart=lambda _key, upload_id: calls.append(upload_id))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (error.reason, error.detail) == ("other", "OSError")
    assert [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()] == []
    assert calls[-1] == ""
    assert members(upload_results(run_dir, target, MODEL)) == {"weights.pt": bytes(5_000_000)}


def test_what_the_disk_gives_back_is_compared(run_dir: Path, target: Destination, tmp_path: Path) -> None:
    put(run_dir / "weights.pt", os.urandom(20_000_000))

    def damage(sent: int, _total: int) -> None:
        for path in (tmp_path / "bucket").rglob("*.part") if sent else ():
            with path.open("r+b") as file:
                file.write(b"????")

    error = failure(run_dir, target, on_progress=damage)
    assert error.reason == "checksum"
    assert [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()] == []


def test_callbacks_that_raise_do_not_matter(
    run_dir: Path, target: Destination, caplog: pytest.LogCaptureFixture
) -> None:
    put(run_dir / "log.txt")

    def fail(*_: Any) -> None:
        raise RuntimeError(SECRET)

    members(upload_results(run_dir, target, MODEL, on_progress=fail, on_multipart=fail))
    assert "RuntimeError" in caplog.text
    assert SECRET not in caplog.text


def test_an_interrupt_leaves_nothing_behind(run_dir: Path, target: Destination, tmp_path: Path) -> None:
    put(run_dir / "weights.pt", os.urandom(20_000_000))

    def interrupt(sent: int, _total: int) -> None:
        if sent:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload_results(run_dir, target, MODEL, on_progress=interrupt)
    assert [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()] == []


KILLED = """
import os, signal, sys
from pathlib import Path
from flip_observability.results import Destination, upload_results
upload_results(
    Path(sys.argv[1]), Destination.parse(sys.argv[2]), "m",
    on_multipart=lambda key, upload_id: print(key, upload_id, flush=True),
    on_progress=lambda sent, total: sent and os.kill(os.getpid(), signal.SIGKILL),
)
"""


def test_what_a_killed_upload_left_is_removed_later(run_dir: Path, target: Destination, tmp_path: Path) -> None:
    put(run_dir / "weights.pt", os.urandom(20_000_000))
    uri = (tmp_path / "bucket").as_uri()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(run_dir), uri], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    key, upload_id = done.stdout.split()
    assert [path.name for path in (tmp_path / "bucket").rglob("*") if path.is_file()] == [upload_id]
    abort_upload(target, key, upload_id)
    assert [path for path in (tmp_path / "bucket").rglob("*") if path.is_file()] == []
    abort_upload(target, key, upload_id)
    abort_upload(target, key, "")


@pytest.mark.parametrize(
    ("key", "upload_id"),
    [("m/x.zip", "../victim.txt"), ("m/x.zip", "victim.txt"), ("../x.zip", f".x.zip.{'0' * 16}.part")],
)
def test_an_abort_removes_nothing_else(tmp_path: Path, target: Destination, key: str, upload_id: str) -> None:
    put(tmp_path / "bucket" / "m" / "victim.txt")
    put(tmp_path / "bucket" / "victim.txt")
    put(tmp_path / f".x.zip.{'0' * 16}.part")
    with pytest.raises(ResultsUploadError):
        abort_upload(target, key, upload_id)
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 3

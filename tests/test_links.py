"""Links of a run directory: seen in time, kept within bounds, and never at the expense of whoever asked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flip_observability import links
from flip_observability.ledger import Entry, Ledger
from flip_observability.links import NOBODY_LOOKED, LinkWatcher, SeenLinks, look
from poc import wait_until


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "images" / "deep").mkdir(parents=True)
    (folder / "log.txt").write_text("all is well")
    return folder


def seen(run_dir: Path) -> SeenLinks:
    found = look(run_dir)
    assert found is not None
    return found


def test_links_of_every_kind_are_found(run_dir: Path) -> None:
    (run_dir / "file").symlink_to("/etc/hostname")
    (run_dir / "images" / "folder").symlink_to("/etc")
    (run_dir / "images" / "deep" / "dangling").symlink_to("nowhere")
    (run_dir / os.fsdecode(b"odd\xff")).symlink_to("log.txt")
    found = seen(run_dir)
    assert found.tell_all
    assert len(found.marks) == 4
    assert all(map(found.hold, ["file", "images/folder", "images/folder/passwd", "images/deep/dangling", "odd\udcff"]))
    assert not any(map(found.hold, ["log.txt", "images", "images/deep", "folder", "file2", "images/file", ""]))


def test_the_way_to_the_directory_may_hold_links(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "link").symlink_to("log.txt")
    (tmp_path / "here").symlink_to(tmp_path)
    assert seen(tmp_path / "here" / "run") == seen(run_dir)


def test_a_directory_that_is_gone_says_nothing(tmp_path: Path) -> None:
    assert look(tmp_path / "nowhere") is None


def test_names_are_not_kept(run_dir: Path) -> None:
    (run_dir / "patient-CANARY").symlink_to("log.txt")
    text = seen(run_dir).to_text()
    assert "CANARY" not in text
    assert SeenLinks.from_text(text) == seen(run_dir)


def test_many_links_are_not_kept(run_dir: Path) -> None:
    for number in range(links.MAX_LINKS + 100):
        (run_dir / f"link{number}").symlink_to("log.txt")
    found = seen(run_dir)
    assert not found.tell_all
    assert len(found.to_text()) < 30_000
    for number in range(links.MAX_LINKS + 50):
        (run_dir / f"link{number}").unlink()
    assert not found.joined(seen(run_dir)).tell_all, "they have been there"


def test_links_that_come_and_go_add_up_to_many(run_dir: Path) -> None:
    known = NOBODY_LOOKED
    for turn in range(3):
        for number in range(400):
            (run_dir / f"link{number}").unlink(missing_ok=True)
            (run_dir / f"link{turn}-{number}").symlink_to("log.txt")
        known = known.joined(seen(run_dir))
    assert len(known.marks) <= links.MAX_LINKS
    assert not known.tell_all


def test_a_look_ends_in_time_and_says_that_it_is_not_whole(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look(run_dir, seconds=0.0)
    assert found is not None
    assert not found.tell_all
    monkeypatch.setattr(links, "MAX_ENTRIES", 2)
    assert not seen(run_dir).tell_all
    monkeypatch.undo()
    assert found.joined(seen(run_dir)).tell_all, "the next look may see all of it"


def test_a_very_deep_folder_is_not_whole(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir)
    for _ in range(110):
        os.mkdir("d")
        os.chdir("d")
    monkeypatch.chdir("/")
    descriptors = len(os.listdir("/proc/self/fd"))
    assert not seen(run_dir).tell_all
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.parametrize(
    "text",
    [None, "", "no json", "[]", "{}", '{"marks": 3, "complete": true, "many": false}', "[" * 100_000, "1e999"],
)
def test_what_is_no_record_says_that_nobody_looked(text: str | None) -> None:
    assert not SeenLinks.from_text(text).tell_all


# -- the ledger and the thread -----------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.append(Entry("r", time.time(), run={"job_id": "r"}))
        yield ledger


def kept(ledger: Ledger) -> SeenLinks:
    return SeenLinks.from_text(ledger.links("r"))


def test_looks_of_several_processes_add_up(ledger: Ledger, run_dir: Path, tmp_path: Path) -> None:
    job, observer = LinkWatcher(tmp_path / "ledger"), LinkWatcher(tmp_path / "ledger")
    job.want("r", run_dir)
    wait_until(lambda: kept(ledger).complete, 10, "a look")
    (run_dir / "first").symlink_to("log.txt")
    job.want("r", run_dir)
    wait_until(lambda: kept(ledger).hold("first"), 10, "another look")
    (run_dir / "first").unlink()
    (run_dir / "second").symlink_to("log.txt")
    observer.want("r", run_dir)
    wait_until(lambda: kept(ledger).hold("second"), 10, "the observer's look")
    assert kept(ledger).hold("first")
    assert kept(ledger).tell_all


def test_what_was_seen_is_forgotten_with_its_run(ledger: Ledger) -> None:
    ledger.note_links("r", lambda _: "x")
    ledger.note_links("no run", lambda _: "x")
    ledger.forget_before(time.time() - 1)
    assert (ledger.links("r"), ledger.links("no run")) == ("x", None)


def test_a_directory_that_hangs_holds_nobody_up(
    ledger: Ledger, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, asked = threading.Event(), []

    def hang(directory: Path) -> SeenLinks | None:
        asked.append(directory)
        go_on.wait(20)
        return SeenLinks(complete=True)

    monkeypatch.setattr(links, "look", hang)
    watcher = LinkWatcher(tmp_path / "ledger")
    begun = time.monotonic()
    for _ in range(1_000):
        watcher.want("r", run_dir)
    assert time.monotonic() - begun < 5
    assert len(asked) <= 1
    go_on.set()
    wait_until(lambda: kept(ledger).complete, 10, "the look")
    wait_until(lambda: watcher._thread is None, 10, "the end of the thread")
    assert len(asked) <= 2, "what is asked for many times is done once"


def test_what_fails_raises_nothing(tmp_path: Path, run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    watcher = LinkWatcher(tmp_path / "file")
    watcher.want("r", run_dir)
    wait_until(lambda: "cannot look for links" in caplog.text, 10, "it is said")

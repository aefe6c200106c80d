"""What lies in the ledger's folder under the name of a spool file: hostile, damaged, and one that counts."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from flip_observability import spool
from flip_observability.doctor import Level, Patient, check_leftovers
from flip_observability.errors import drain
from flip_observability.ledger import Entry, Ledger, LedgerError, OutboxItem
from flip_observability.process import current_process
from flip_observability.spool import Spool, take_spools

MODEL = "0f8fad5b-d9cb-469f-a165-70867728950e"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "ledger").mkdir(mode=0o700)
    return tmp_path / "ledger"


@pytest.fixture
def ledger(directory: Path) -> Iterator[Ledger]:
    with Ledger(directory) as ledger:
        yield ledger


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    spool._seen.clear()
    drain()


def final(run_id: str) -> Entry:
    item = OutboxItem(MODEL, "status", {"status": "ERROR"}, final=True)
    return Entry(run_id, 1.0, final_status="ERROR", final_by="job", outbox=(item,))


def left_behind(directory: Path, *lines: str, name: str = "spool-9-z.jsonl") -> Path:
    """A spool file of a process that is no more; it comes last."""
    dead = dataclasses.replace(current_process(), start_ticks=1)
    path = directory / name
    path.write_text("".join(f"{line}\n" for line in (json.dumps({"owner": dead.columns()}), *lines)))
    return path


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_without_end(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_a_spool(path: Path) -> None:
    path.symlink_to(left_behind(path.parent, final("linked").to_json(), name="elsewhere"))


def folder(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)  # the whole path may be too long for a socket
        made.bind(path.name)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(8 << 40)


def foreign(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    left_behind(path.parent, final("foreign").to_json(), name=path.name)
    os.chown(path, 4_711, 4_711)


@pytest.mark.parametrize("make", [pipe, link_without_end, link_to_a_spool, folder, listening, sparse, foreign])
def test_what_is_no_spool_of_ours_holds_up_no_final_status(
    directory: Path, ledger: Ledger, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    odd = directory / "spool-1-a.jsonl"
    make(odd)
    before = odd.lstat()
    left_behind(directory, final("r1").to_json())
    assert take_spools(ledger, directory, 2.0) == 1
    assert [row.run_id for row in ledger.outbox()] == ["r1"]
    assert [take_spools(ledger, directory, 2.0) for _ in range(3)] == [0, 0, 0]
    assert odd.lstat() == before or odd.lstat().st_mtime == before.st_mtime
    assert drain() == {"spool": 1}
    finding = check_leftovers(Patient(directory))
    assert (finding.level, "1 entries called like spools" in finding.text) == (Level.WARN, True)


BAD = (
    "no json",
    "[" * 100_000,
    "5",
    "null",
    '{"delivered": 5}',
    '{"event": {"odd": 1}, "facts": [], "outbox": []}',
    final("odd").to_json().replace("1.0", "1" + "0" * 30),
    Entry("odd", 1.0, run={"round": 10**20}).to_json(),
    Entry("odd", 1.0, run={"round": 1}).to_json().replace('{"round": 1}', '{"round": [1]}'),
    Entry("odd", 1.0, run={"round": 1}).to_json().replace('"round"', '"x; DROP TABLE runs"'),
)


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_line_that_cannot_be_read_costs_no_other(directory: Path, ledger: Ledger, line: str) -> None:
    first = left_behind(directory, final("r1").to_json(), line, final("r2").to_json(), name="spool-1-a.jsonl")
    left_behind(directory, final("r3").to_json())
    take_spools(ledger, directory, 2.0)
    assert {"r1", "r2", "r3"} <= {row.run_id for row in ledger.outbox()}
    assert not list(directory.glob("spool-*.jsonl"))
    if drain():
        assert first.with_suffix(".unreadable").exists()


def test_a_line_without_end_is_not_read_into_memory(
    directory: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "MAX_LINE_BYTES", 4_096)
    sizes: list[int] = []
    lines = spool._lines

    def measured(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
        for line, complete in lines(file):
            sizes.append(len(line))
            yield line, complete

    monkeypatch.setattr(spool, "_lines", measured)
    left_behind(directory, "x" * 100_000, final("r1").to_json())
    take_spools(ledger, directory, 2.0)
    assert max(sizes) <= 4_096
    assert [row.run_id for row in ledger.outbox()] == ["r1"]


def test_a_ledger_that_cannot_be_written_is_not_the_spools_fault(
    directory: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = left_behind(directory, final("r1").to_json())
    ledger._db.execute("PRAGMA query_only=1")
    with pytest.raises(LedgerError):
        take_spools(ledger, directory, 2.0)
    ledger._db.execute("PRAGMA query_only=0")
    assert path.exists()
    assert take_spools(ledger, directory, 2.0) == 1


def test_a_spool_that_cannot_be_opened_now_is_taken_later(
    directory: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = left_behind(directory, final("r1").to_json())
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(24, "too many open files")))
        assert take_spools(ledger, directory, 2.0) == 0
    assert path.exists()
    assert take_spools(ledger, directory, 2.0) == 1


def test_many_notes_of_what_was_delivered(directory: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MAX_DELIVERED", 3)
    kept = Spool(directory)
    kept._owner = dataclasses.replace(kept._owner, start_ticks=1)
    items = [OutboxItem(MODEL, "log", {"log": "x"}) for _ in range(10)]
    kept.add(Entry("r1", 1.0, run={"round": 1}, outbox=tuple(items)))
    for item in items:
        kept.delivered([item.uid])
    assert take_spools(ledger, directory, 3.0) == 1
    assert {row.state for row in ledger.outbox()} == {"delivered"}

"""The ledger's disk is full, read-only, damaged, locked, gone, or no disk at all; and many write to it at once."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from drills.deaths import UPLOADED
from drills.hub import wait_for_final
from drills.judge import DELAY_SECONDS, Drill, Run, Skip
from drills.small import Job, SmallSite
from drills.stage import Stage
from flip_observability.ledger import FILE_NAME
from poc import wait_until

GROUP = "ledger"
DISK_BYTES = 1 << 20
LOCKED_SECONDS = 30.0
AT_ONCE = 8
WATCHED_SECONDS = 12.0
"""How long an observer looks at a run whose process is gone, for a second final status, which must not come."""


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    """A disk of its own for the ledger."""
    folder.mkdir(mode=0o700)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mount.returncode != 0:
        raise Skip("needs a disk of its own, which only root can mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 1_024)


def _on_a_full_disk(stage: Stage, *, observed: bool, variables: Callable[[Path], dict[str, str]]) -> Sequence[Run]:
    with _small_disk(stage.home / "disk") as disk:
        site = stage.small(ledger_dir=disk / "ledger", variables=variables(disk))
        site.hub.down()  # so that the ledger still holds what the hub must be told before the end
        job = site.job().begin().train(2)
        if observed:
            site.observer()
        wait_until(lambda: list(site.ledger_dir.glob("spool-*")), 10, "the room that is reserved")
        _fill(disk)
        since = time.time()
        job.train(3)
        site.hub.up()
        job.end()
        run = job.run(since, models=False)
        job.leave()
        assert job.told, "the hub was not told while the ledger could not be written"
        (disk / "filler").unlink()
        if not observed:
            site.observer()
        _watch(site, run)
        assert _final(job) in UPLOADED, "the ledger did not learn of the run's end"
        return [run]


def _watch(site: SmallSite, run: Run) -> None:
    """Give an observer the time to say something else, too."""
    wait_for_final(run, DELAY_SECONDS)
    time.sleep(WATCHED_SECONDS)


def full(stage: Stage) -> Sequence[Run]:
    """The one disk that there is is full to the end of the process; an observer finds what it left."""

    def temporary(disk: Path) -> dict[str, str]:
        (disk / "tmp").mkdir()
        return {"TMPDIR": str(disk / "tmp")}

    return _on_a_full_disk(stage, observed=False, variables=temporary)


def full_observed(stage: Stage) -> Sequence[Run]:
    """The ledger's disk is full, under the eyes of an observer."""
    return _on_a_full_disk(stage, observed=True, variables=lambda _: {})


def read_only(stage: Stage) -> Sequence[Run]:
    """The ledger's disk is read-only for the whole life of a job's process; an observer comes when it is not."""
    with _small_disk(stage.home / "disk") as disk:
        _remount(disk, "ro")
        site = stage.small(ledger_dir=disk / "ledger")
        job = site.job().begin().train(2)
        since = time.time()
        job.end()
        run = job.run(since, models=False)
        job.leave()
        assert job.told, "the hub was not told while the ledger could not be written"
        _remount(disk, f"rw,size={DISK_BYTES}")
        site.observer()
        _watch(site, run)
        assert _final(job) in UPLOADED, "the ledger did not learn of the run's end"
        return [run]


def _remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def _under_way(stage: Stage, harm: Callable[[Path], None]) -> Sequence[Run]:
    """Harm a ledger that a run and an observer use."""
    site = stage.small()
    job = site.job().begin().train(2)
    site.observer()
    harm(site.ledger_dir / FILE_NAME)
    since = time.time()
    job.train(3)
    time.sleep(stage.rng.random() * 3)
    job.end()
    job.leave()
    run = job.run(since)
    _watch(site, run)
    wait_until(lambda: _final(job) in UPLOADED, 20, "the final status in the new ledger")
    return [run]


def _final(job: Job) -> str | None:
    with contextlib.suppress(Exception):
        found = job.row.get("final_status")
        return None if found is None else str(found)
    return None


def _overwrite(path: Path) -> None:
    Path(f"{path}-wal").write_bytes(b"")
    path.write_bytes(b"\xff" * 65_536)


def _delete(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def corrupted(stage: Stage) -> Sequence[Run]:
    """The ledger is overwritten under a run and an observer."""
    return _under_way(stage, _overwrite)


def deleted(stage: Stage) -> Sequence[Run]:
    """The ledger is deleted under a run and an observer."""
    return _under_way(stage, _delete)


def locked(stage: Stage) -> Sequence[Run]:
    """Somebody keeps the ledger locked over the end of a run."""
    site = stage.small()
    job = site.job().begin().train(2)
    site.observer()
    begun = time.monotonic()
    with site.locked():
        since = time.time()
        job.train(3)
        job.end()
        job.leave()
        run = job.run(since)
        wait_for_final(run, DELAY_SECONDS)
        time.sleep(max(0.0, LOCKED_SECONDS - (time.monotonic() - begun)))
    _watch(site, run)
    return [run]


def network_file_system(stage: Stage) -> Sequence[Run]:
    """The ledger's folder is on NFS: refused, and the run goes on."""
    site = stage.small()
    site.ledger_dir.mkdir(mode=0o700)
    job = site.job(file_system="nfs4").begin().train(2)
    since = time.time()
    job.end()
    job.leave()
    assert not (site.ledger_dir / FILE_NAME).exists(), "there is a ledger where locks do not hold"
    assert b"FLIP_OBSERVABILITY_DIR" in site.log.read_bytes(), "nobody was told which variable to set"
    return [job.run(since, models=False)]


def at_once(stage: Stage) -> Sequence[Run]:
    """Eight jobs write to one ledger."""
    site = stage.small()
    jobs = [site.job() for _ in range(AT_ONCE)]
    site.observer()
    since: dict[str, float] = {}

    def play(job: Job) -> None:
        job.begin().train(5)
        since[job.job_id] = time.time()
        job.end()
        job.leave()

    threads = [threading.Thread(target=play, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stage.notes.append(f"{len(threads)} jobs on {os.cpu_count()} processors")
    return [job.run(since[job.job_id]) for job in jobs]


DRILLS: tuple[Drill, ...] = (
    Drill("ledger-full", GROUP, "the ledger's disk is full", full, UPLOADED, True, quick=True),
    Drill("ledger-full-observed", GROUP, "the same while an observer looks on", full_observed, UPLOADED, True),
    Drill("ledger-read-only", GROUP, "the ledger's disk is read-only", read_only, UPLOADED, True),
    Drill("ledger-corrupted", GROUP, "the ledger is overwritten under a run", corrupted, UPLOADED, True),
    Drill("ledger-deleted", GROUP, "the ledger is deleted under a run", deleted, UPLOADED, True),
    Drill("ledger-locked", GROUP, "the ledger is locked for 30 s, over END_RUN", locked, UPLOADED, True),
    Drill("ledger-network", GROUP, "the ledger's folder is on NFS", network_file_system, UPLOADED, True),
    Drill("ledger-at-once", GROUP, "8 jobs at once on one ledger", at_once, UPLOADED, True),
)

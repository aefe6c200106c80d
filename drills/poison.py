"""A row, an event or an archive that nobody can read: what is behind it is worked on all the same, and it is seen."""

from __future__ import annotations

import contextlib
import sqlite3
import time
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drills.deaths import ERROR, UPLOADED
from drills.hub import wait_for_final
from drills.judge import DELAY_SECONDS, Drill, Run
from drills.small import Job, SmallSite
from drills.stage import Stage
from flip_observability.doctor import Level
from flip_observability.ledger import FILE_NAME, Entry, Ledger, OutboxItem
from poc import wait_until

GROUP = "poison"
ODD: tuple[Any, ...] = ("{not json", "[1, 2]", b"\xff\xfe\x00", "null", 4.5)


def _spoil(site: SmallSite, sql: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(site.ledger_dir / FILE_NAME)) as db, db:
        db.execute(sql, values)


def _complained(site: SmallSite, component: str) -> None:
    """See that it was counted, and that ``flip-obs doctor`` tells."""
    site.wait_for_metric("flip_observability_errors_total", component=component)
    wait_until(lambda: component in site.doctor("errors").text, 10, "the doctor's finding")
    assert site.doctor("errors").level is Level.WARN


def _dead(stage: Stage, count: int) -> tuple[SmallSite, list[Job], float]:
    """Jobs that died in training."""
    site = stage.small()
    jobs = [site.job().begin().train(2) for _ in range(count)]
    return site, jobs, max(job.kill() for job in jobs)


def _judged(jobs: Sequence[Job], since: float, **expected: Any) -> list[Run]:
    runs = [job.run(since, **expected) for job in jobs]
    for run in runs:
        wait_for_final(run, DELAY_SECONDS)
    return runs


def outbox(stage: Stage) -> Sequence[Run]:
    """Messages that are none, at the head of every lane; and a final status that cannot be read."""
    site = stage.small()
    site.hub.down()
    jobs = [site.job().begin().train() for _ in range(2)]
    for job in jobs:
        job.end()
        job.leave()
    with Ledger(site.ledger_dir) as ledger:
        for _ in ODD:
            for model_id in (jobs[0].model_id, "\x00", str(uuid.uuid4())):
                ledger.append(Entry(None, time.time(), outbox=(OutboxItem(model_id, "metric", {}),)))
                ledger.append(Entry(None, time.time(), outbox=(OutboxItem(model_id, "status", {}),)))
    for number, odd in enumerate(ODD):
        sql = "UPDATE outbox SET payload = ?1, created = ?1 WHERE run_id IS NULL AND id % ?2 = ?3"
        _spoil(site, sql, odd, len(ODD), number)
    # In front of everything else of their lanes.
    _spoil(site, "UPDATE outbox SET id = id - 100000 WHERE run_id IS NULL")
    _spoil(site, "UPDATE outbox SET payload = ? WHERE final AND model_id = ?", ODD[0], jobs[0].model_id)
    site.observer()
    site.hub.up()
    runs = _judged(jobs, time.time())
    _complained(site, "hub")
    assert site.doctor("outbox").level is Level.WARN, "the doctor does not tell of what was refused"
    return runs


def events(stage: Stage) -> Sequence[Run]:
    """Events whose attributes and facts cannot be read, of a run that died; another one died before, and one after."""
    site, jobs, _ = _dead(stage, 2)
    for number, odd in enumerate(ODD):
        sql = "UPDATE events SET attrs = ?1, facts = ?1, time = ?1 WHERE run_id = ?2 AND id % ?3 = ?4"
        _spoil(site, sql, odd, jobs[1].job_id, len(ODD), number)
    jobs.append(site.job().begin().train(2))
    died = jobs[2].kill()
    site.observer()
    runs = _judged(jobs, died)
    site.wait_for_metric("flip_runs_finished_total", 3.0, status="ERROR")
    _complained(site, "metrics")
    return runs


def rows(stage: Stage) -> Sequence[Run]:
    """A run's row with nonsense in every column that is not its identity; another run behind it."""
    site, jobs, died = _dead(stage, 2)
    columns = "heartbeat last_event round total_rounds clients problems stall_after pid start_ticks workflow".split()
    for number, odd in enumerate(ODD):
        spoilt = ", ".join(f"{column} = ?1" for column in columns[number :: len(ODD)])
        _spoil(site, f"UPDATE runs SET {spoilt} WHERE run_id = ?2", odd, jobs[0].job_id)
    site.observer()
    runs = _judged(jobs, died)
    site.wait_for_metric("flip_runs_finished_total", 2.0, status="ERROR")
    return runs


def archives(stage: Stage) -> Sequence[Run]:
    """An archive in the job store that is none; another one behind it."""
    site, jobs, died = _dead(stage, 2)
    stored = {job.job_id: site.home / f"{job.job_id}.zip" for job in jobs}
    stored[jobs[0].job_id].write_bytes(b"PK\x03\x04 and then something else")
    archive_of(jobs[1].run_dir, stored[jobs[1].job_id])
    site.observer(stored)
    runs = _judged(jobs, died)
    runs[0].results = False
    _complained(site, "salvage")
    return runs


def archive_of(run_dir: Path, path: Path) -> None:
    """What NVFLARE makes of a run directory when a job has ended."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(run_dir.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(run_dir))


DRILLS: tuple[Drill, ...] = (
    Drill("poison-outbox", GROUP, "messages for the hub that cannot be read", outbox, UPLOADED, True, quick=True),
    Drill("poison-events", GROUP, "events that cannot be read", events, ERROR, True),
    Drill("poison-rows", GROUP, "a run's row full of nonsense", rows, ERROR, True),
    Drill("poison-archives", GROUP, "an archive that is none", archives, ERROR, True),
)

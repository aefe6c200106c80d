"""The observer dies: in a salvage, in a delivery, in a fold; another one takes over."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from drills.deaths import ERROR, STOPPED, UPLOADED
from drills.judge import Drill, Run
from drills.small import Process, SmallSite
from drills.stage import Stage
from flip_observability.constants import FlareEvents
from flip_observability.ledger import Ledger
from s3_faults import Fault, FaultProxy, Request
from waiting import wait_for

MEGABYTES = 24
"""Of results: several parts."""
FULL_FOLDS, QUICK_FOLDS = 12, 4
EVENTS_AT_ONCE = 50


def in_a_salvage(stage: Stage) -> Sequence[Run]:
    """SIGKILL while it brings the second part of a dead run's results to the bucket."""
    site = stage.small()
    job = site.job(megabytes=MEGABYTES)
    job.begin().train()
    observer = site.observer()

    def kill(_: FaultProxy, __: Request) -> None:
        observer.kill()

    site.proxy.faults.append(Fault("UploadPart", kill, times=1, part=2))
    job.kill()
    wait_for(lambda: not site.proxy.faults[0].times, 60, "the salvage")
    return [_taken_over(site, job.run())]


def before_its_id(stage: Stage) -> Sequence[Run]:
    """SIGKILL when the bucket has begun an upload, and its id has not been written down."""
    site = stage.small()
    job = site.job(megabytes=MEGABYTES)
    job.begin().train()
    observer = site.observer()
    killed: list[float] = []

    def kill(_: FaultProxy, request: Request) -> None:
        key = unquote(urlsplit(request.path).path).removeprefix(f"/{site.bucket.name}/")
        site.bucket.client().create_multipart_upload(Bucket=site.bucket.name, Key=key)
        killed.append(observer.kill())

    site.proxy.faults.append(Fault("CreateMultipartUpload", kill, times=1))
    job.kill()
    wait_for(lambda: bool(killed), 60, "the salvage")
    assert site.bucket.unfinished_uploads(), "the bucket knows of no upload"
    return [_taken_over(site, job.run())]


def in_a_salvage_that_decides(stage: Stage) -> Sequence[Run]:
    """The same, where the final status waits for the upload: the job died in its own."""
    site = stage.small()
    job = site.job(megabytes=MEGABYTES)
    job.begin().train()
    observer = site.observer()

    def kill_job(_: FaultProxy, __: Request) -> None:
        job.kill()

    def kill_observer(_: FaultProxy, __: Request) -> None:
        observer.kill()

    site.proxy.faults += [
        Fault("UploadPart", kill_job, times=1, part=2),
        Fault("UploadPart", kill_observer, times=1, part=3),
    ]
    job.tell("end", False)
    wait_for(lambda: not any(fault.times for fault in site.proxy.faults), 60, "the salvage")
    run = _taken_over(site, job.run())
    run.finals = UPLOADED
    return [run]


def in_a_delivery(stage: Stage) -> Sequence[Run]:
    """SIGKILL while the hub has a final status, and does not answer."""
    site = stage.small()
    job = site.job()
    job.begin().train()
    observer = site.observer()
    site.hub.wait(lambda hub: bool(hub.statuses(job.model_id)))
    site.hub.hang()
    job.kill()
    model_id = job.model_id
    site.hub.wait(lambda hub: any(r.model_id == model_id and r.status == "ERROR" for r in hub.records), 30)
    observer.kill()
    site.hub.heal()
    return [_taken_over(site, job.run())]


def in_a_fold(stage: Stage) -> Sequence[Run]:
    """SIGKILL at random moments, while a run has many events: each is counted once in the end."""
    site = stage.small()
    name = FlareEvents.AFTER_CONTRIBUTION_ACCEPT.value
    job = site.job()
    job.begin()
    for _ in range(FULL_FOLDS if stage.full else QUICK_FOLDS):
        observer = site.observer()
        for _ in range(EVENTS_AT_ONCE):
            job.tell("fire", name)
        time.sleep(stage.rng.uniform(0.0, 1.5))
        observer.kill()
        for _ in range(EVENTS_AT_ONCE):
            job.answer()
    job.train()
    job.end(abort=True)
    run = job.run(finals=STOPPED)
    job.leave()
    site.observer()
    with Ledger(site.ledger_dir, read_only=True) as ledger:
        happened = [row["name"] for row in ledger.events(job.job_id)].count(name)
    wait_for(lambda: _counted(site, name) >= happened, 30, "all that happened is counted")
    time.sleep(2.0)
    counted = _counted(site, name)
    assert counted == happened, f"{happened} events, {counted} counted"
    stage.notes.append(f"{happened} events counted")
    return [run]


def _counted(site: SmallSite, name: str) -> int:
    with contextlib.suppress(OSError):  # not all has been counted yet
        return int(site.metric("flip_lifecycle_events_total", event=name.lstrip("_")))
    return 0


def _taken_over(site: SmallSite, run: Run) -> Run:
    _: Process = site.observer()
    run.since = time.time()
    return run


DRILLS: tuple[Drill, ...] = (
    Drill("kill-in-salvage", "deaths", "SIGKILL of the observer in a salvage", in_a_salvage, ERROR, True, quick=True),
    Drill("kill-before-upload-id", "deaths", "SIGKILL when the bucket has begun an upload", before_its_id, ERROR, True),
    Drill(
        "kill-in-salvage-of-upload",
        "deaths",
        "SIGKILL of job and observer in the same upload",
        in_a_salvage_that_decides,
        UPLOADED,
        True,
    ),
    Drill("kill-in-delivery", "deaths", "SIGKILL of the observer, hub told and silent", in_a_delivery, ERROR, True),
    Drill("kill-in-fold", "deaths", "SIGKILL of observers while events are counted", in_a_fold, STOPPED, True),
)

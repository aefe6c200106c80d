"""The bucket refuses, is slow, dies in the midst of an upload, or lies."""

from __future__ import annotations

import time
from collections.abc import Sequence

from drills.deaths import ERROR, UPLOADED
from drills.judge import Drill, Run
from drills.small import SmallSite
from drills.stage import Stage
from flip_observability.constants import FlipEvents
from flip_observability.ledger import Ledger
from poc import wait_until
from s3_faults import Fault, FaultProxy, Request, Response, edit_headers, error, reset

GROUP = "bucket"
MEGABYTES = 50
"""Seven parts."""
DEAD_SECONDS = 10.0
PART_SECONDS = 1.0
EVERYTHING = (
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
    "AbortMultipartUpload",
    "HeadObject",
    "GetObject",
    "PutObject",
)
REFUSED = frozenset({"ERROR", "RESULTS_UPLOAD_FAILED"})


def refused(stage: Stage) -> Sequence[Run]:
    """Nobody may write to the bucket: the status says so in either contract, and results stay where they are."""
    runs = []
    for contract, final in (("2026-05", "ERROR"), ("2026-10", "RESULTS_UPLOAD_FAILED")):
        site = stage.small(contract=contract)
        site.observer()
        site.bucket.refusing = True
        job = site.job().begin().train()
        since = time.time()
        job.end()
        job.leave()
        assert (job.run_dir / "log.txt").exists(), "the results are gone"
        runs.append(job.run(since, finals=frozenset({final})))
    return runs


def slow(stage: Stage) -> Sequence[Run]:
    """Every part takes a while; nothing else waits for it."""

    def take_time(proxy: FaultProxy, request: Request) -> Response:
        time.sleep(PART_SECONDS)
        return proxy.forward(request)

    site = stage.small()
    site.observer()
    site.proxy.faults.append(Fault("UploadPart", take_time))
    job = site.job(megabytes=MEGABYTES).begin().train()
    took = job.end()
    stage.notes.append(f"{site.proxy.seen.count('UploadPart')} parts in {took:.1f} s")
    run = job.run()
    job.leave()
    return [run]


def unreachable(stage: Stage) -> Sequence[Run]:
    """No connection gets an answer when the run ends: END_RUN does not wait, and the observer brings the results."""
    site = stage.small()
    site.observer()
    job = site.job().begin().train()
    site.proxy.faults[:0] = [Fault(operation, reset) for operation in EVERYTHING]
    took = job.end()
    stage.notes.append(f"END_RUN took {took:.1f} s")
    assert not job.told, "the hub was told an end before the observer had tried"
    job.leave()
    time.sleep(DEAD_SECONDS)
    site.proxy.faults.clear()
    return [job.run()]


def _die_in_part_3(site: SmallSite) -> list[float]:
    """The bucket is dead from part 3 on. Returns a list that gets the moment."""
    died: list[float] = []

    def die(proxy: FaultProxy, request: Request) -> None:
        if not died:
            died.append(time.time())
            proxy.faults[:0] = [Fault(operation, reset) for operation in EVERYTHING]
        reset(proxy, request)

    site.proxy.faults.append(Fault("UploadPart", die, part=3))
    return died


def dies_and_recovers(stage: Stage) -> Sequence[Run]:
    """In part 3 of 7 the bucket dies, for ten seconds."""
    site = stage.small()
    site.observer()
    died = _die_in_part_3(site)
    job = site.job(megabytes=MEGABYTES).begin().train()
    job.tell("end", False)
    wait_until(lambda: died, 60, "part 3")
    time.sleep(DEAD_SECONDS)
    site.proxy.faults.clear()
    since = time.time()
    job.answer()
    job.leave()
    return [job.run(since)]


def dies_with_the_job(stage: Stage) -> Sequence[Run]:
    """In part 3 of 7 the bucket dies, and the job's process with it. What is left over is removed."""
    site = stage.small()
    site.observer()
    died = _die_in_part_3(site)
    job = site.job(megabytes=MEGABYTES).begin().train()
    job.tell("end", False)
    wait_until(lambda: died, 60, "part 3")
    job.kill()
    assert site.bucket.unfinished_uploads(), "there is no upload that could be left over"
    time.sleep(3.0)
    site.proxy.faults.clear()
    run = job.run()
    wait_until(lambda: site.archives(job.model_id), 60, "the salvaged results")
    (key,) = site.archives(job.model_id)
    assert key.endswith("-salvaged.zip"), key
    return [run]


def refuses_part_3(stage: Stage) -> Sequence[Run]:
    """In part 3 of 7 the right to write is taken away; what has been sent is removed."""
    site = stage.small()
    site.observer()
    site.proxy.faults.append(Fault("UploadPart", error(403, "AccessDenied"), part=3))
    job = site.job(megabytes=MEGABYTES).begin().train()
    since = time.time()
    job.end()
    job.leave()
    assert "AbortMultipartUpload" in site.proxy.seen, "nobody removed what had been sent"
    return [job.run(since)]


def lies(stage: Stage) -> Sequence[Run]:
    """The bucket says that it has everything, and names another checksum."""

    def other(headers: dict[str, str]) -> dict[str, str]:
        kept = {name: value for name, value in headers.items() if name.lower() != "x-amz-checksum-crc32"}
        return kept | {"x-amz-checksum-crc32": "AAAAAA=="}

    site = stage.small()
    site.observer()
    site.proxy.faults.append(Fault("HeadObject", edit_headers(other)))
    job = site.job().begin().train()
    since = time.time()
    job.end()
    job.leave()
    with Ledger(site.ledger_dir, read_only=True) as ledger:
        told = [row["attrs"].get("reason") for row in ledger.events(job.job_id) if "upload_failed" in row["name"]]
        names = {row["name"] for row in ledger.events(job.job_id)}
    assert told == ["checksum"], (told, names)
    assert FlipEvents.RESULTS_UPLOAD_COMPLETED.value not in names, "an upload that was not verified was called complete"
    return [job.run(since)]


DRILLS: tuple[Drill, ...] = (
    Drill("bucket-refused", GROUP, "nobody may write to the bucket", refused, REFUSED, False),
    Drill("bucket-slow", GROUP, "every part of an upload takes a second", slow, UPLOADED, True, slow_upload=True),
    Drill("bucket-unreachable", GROUP, "the bucket is gone when a run ends", unreachable, UPLOADED, True, quick=True),
    Drill(
        "bucket-recovers",
        GROUP,
        "the bucket dies in part 3 of 7, for 10 s",
        dies_and_recovers,
        UPLOADED,
        True,
        slow_upload=True,
    ),
    Drill(
        "bucket-and-job",
        GROUP,
        "the bucket dies in part 3 of 7, and the job with it",
        dies_with_the_job,
        UPLOADED,
        True,
        slow_upload=True,
    ),
    Drill("bucket-part-3", GROUP, "the bucket refuses part 3 of 7", refuses_part_3, ERROR, False),
    Drill("bucket-lies", GROUP, "the bucket lies about the checksum", lies, ERROR, None),
)

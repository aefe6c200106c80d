"""Runs are aborted, and jobs that never come to run."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drills.deaths import ERROR, MEGABYTES, STOPPED, UPLOADED
from drills.judge import Drill, Run
from drills.site import Change, with_component, with_meta
from drills.stage import Stage
from flip_observability.constants import FlipEvents
from flip_observability.demo.job import _server
from flip_observability.demo.scenarios import SCENARIOS
from s3_faults import Fault, FaultProxy, Request, Response
from waiting import wait_for

SLOW_SECONDS = 15.0
"""For each part of an upload that NVFLARE ends after 10 s."""


def _abort(stage: Stage, *changes: Change, times: int = 1) -> Sequence[Run]:
    site = stage.site()
    run = site.run_job(*changes)
    site.wait_for_round(run.job_id, stage.rng.randint(2, 5))
    time.sleep(stage.rng.random())
    run.since = time.time()
    for _ in range(times):
        site.admin.abort_job(run.job_id)
    return [run]


def in_a_round(stage: Stage) -> Sequence[Run]:
    """``abort_job`` with NVFLARE's FedAvg."""
    return _abort(stage)


def scatter_and_gather(stage: Stage) -> Sequence[Run]:
    """``abort_job`` with NVFLARE's ScatterAndGather."""
    return _abort(stage, _as_scatter_and_gather)


def _as_scatter_and_gather(meta: dict[str, Any], server: dict[str, Any]) -> None:
    sag = _server("", SCENARIOS["success"], "sag", None)
    known = {each["id"] for each in server["components"]}
    old = server["workflows"][0]["args"]
    workflow = sag["workflows"][0]
    workflow["args"] |= {"min_clients": old["num_clients"], "num_rounds": old["num_rounds"]}
    server["workflows"] = [workflow]
    server["components"][0:0] = [each for each in sag["components"] if each["id"] not in known]


def says_aborted(stage: Stage) -> Sequence[Run]:
    """``abort_job`` with a controller that fires FLIP's ABORTED event."""
    return _abort(stage, _as_aborting)


def says_aborted_for_a_dead_client(stage: Stage) -> Sequence[Run]:
    """The same controller fires it when a client died: nobody aborted anything."""
    site = stage.site()
    run = site.run_job(_as_aborting)
    site.wait_for_round(run.job_id, 2)
    process = site.job_process(run.job_id, "site-1")
    assert process is not None
    process.kill()
    run.since = time.time()
    return [run]


def _as_aborting(_: dict[str, Any], server: dict[str, Any]) -> None:
    server["workflows"][0]["path"] = "drills.components.AbortingFedAvg"


def twice(stage: Stage) -> Sequence[Run]:
    """``abort_job``, and again before it has ended."""
    return _abort(stage, times=2)


def in_a_slow_upload(stage: Stage) -> Sequence[Run]:
    """``abort_job`` while results are uploaded slowly: NVFLARE ends the process after about 10 s."""
    site = stage.site()
    run = site.run_job(with_component("Ballast", megabytes=MEGABYTES), rounds=2)

    gone = threading.Event()

    def dawdle(proxy: FaultProxy, request: Request) -> Response | None:
        # What a dead process sent is no upload's any more when it is over.
        return None if gone.wait(SLOW_SECONDS) else proxy.forward(request)

    site.proxy.faults.append(Fault("UploadPart", dawdle, times=8))
    site.wait_for_event(run.job_id, FlipEvents.RESULTS_UPLOAD_STARTED.value)
    time.sleep(1.0)
    process = site.wait_for_job_process(run.job_id)
    site.admin.abort_job(run.job_id)
    wait_for(lambda: not process.is_running() or process.status() == "zombie", 60, "NVFLARE ends the process")
    gone.set()
    assert not site.final_statuses(run.model_id), "the upload was not slow enough"
    site.proxy.faults.clear()
    run.since = time.time()
    return [run]


def in_the_queue(stage: Stage) -> Sequence[Run]:
    """``abort_job`` of a job that waits for a client who never comes."""
    site = stage.site()
    run = site.run_job(with_meta(mandatory_clients=["site-9"], min_clients=1))
    wait_for(lambda: site.run(run.job_id), 30, "the registration")
    run.since = time.time()
    site.admin.abort_job(run.job_id)
    return [run]


def cannot_be_scheduled(stage: Stage) -> Sequence[Run]:
    """A job that waits for a client who never comes, until the scheduler gives up on it."""
    site = stage.site()
    run = site.run_job(with_meta(mandatory_clients=["site-9"], min_clients=1))
    wait_for(lambda: _job_status(stage, run).endswith("CAN_NOT_SCHEDULE"), 120, "the scheduler gives up")
    run.since = time.time()
    return [run]


def fails_to_start(stage: Stage) -> Sequence[Run]:
    """A job whose configuration for the server cannot be read: it is deployed, and does not start."""
    site = stage.site()
    run = site.run_job(lambda _, server: server["workflows"][0].update(path="drills.components.Nowhere"))
    wait_for(lambda: _job_status(stage, run).startswith("FINISHED"), 120, "NVFLARE gives the job up")
    run.since = time.time()
    return [run]


def cannot_be_deployed(stage: Stage) -> Sequence[Run]:
    """A job that no client can take: its app for the clients breaks their rules."""
    site = stage.site()
    model_id = str(uuid.uuid4())
    run = site.run_folder(_unreadable(site.write_job(model_id)), model_id)
    wait_for(lambda: _job_status(stage, run).startswith("FINISHED"), 120, "NVFLARE gives the job up")
    run.since = time.time()
    return [run]


def _unreadable(job: Path) -> Path:
    """Give the client an app whose configuration is no JSON."""
    meta = json.loads((job / "meta.json").read_text())
    meta["deploy_map"] = {"app": ["server"], "nowhere": ["site-1"]}
    (job / "nowhere").mkdir()
    (job / "nowhere" / "config").mkdir()
    (job / "nowhere" / "config" / "config_fed_client.json").write_text("{")
    (job / "meta.json").write_text(json.dumps(meta))
    return job


def _job_status(stage: Stage, run: Run) -> str:
    return str(stage.site().admin.get_job_meta(run.job_id).get("status", ""))


DRILLS: tuple[Drill, ...] = (
    Drill("abort", "aborts", "abort_job in a round, FedAvg", in_a_round, STOPPED, True),
    Drill("abort-sag", "aborts", "abort_job in a round, ScatterAndGather", scatter_and_gather, STOPPED, True),
    Drill("abort-flip", "aborts", "abort_job, a controller that fires ABORTED", says_aborted, STOPPED, True),
    Drill(
        "client-dies-flip",
        "aborts",
        "a client dies, a controller that fires ABORTED",
        says_aborted_for_a_dead_client,
        ERROR,
        True,
    ),
    Drill("abort-twice", "aborts", "abort_job twice", twice, STOPPED, True),
    Drill(
        "abort-in-upload",
        "aborts",
        "abort_job while the upload is slow",
        in_a_slow_upload,
        UPLOADED,
        True,
        slow_upload=True,
    ),
    Drill("abort-queued", "aborts", "abort_job of a queued job", in_the_queue, STOPPED, False),
    Drill("cannot-schedule", "aborts", "a job that cannot be scheduled", cannot_be_scheduled, ERROR, False),
    Drill("fails-to-start", "aborts", "a job whose server part cannot be built", fails_to_start, ERROR, None),
    Drill("cannot-deploy", "aborts", "a job that no client can take", cannot_be_deployed, ERROR, None),
)

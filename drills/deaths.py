"""Processes die: the job's, the parent, both, a client's; the machine."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Sequence

from drills.components import CONSTRUCTION
from drills.judge import DELAY_SECONDS, HEARTBEAT_SECONDS, Drill, Run
from drills.site import Site, with_component
from drills.stage import Stage
from flip_observability.constants import FlareEvents, FlipEvents
from flip_observability.ledger import FILE_NAME
from s3_faults import Fault, FaultProxy, Request
from waiting import wait_for

ERROR, UPLOADED, STOPPED = frozenset({"ERROR"}), frozenset({"RESULTS_UPLOADED"}), frozenset({"STOPPED"})
AT_ONCE = 3
"""Jobs that train at the same time."""
FULL_KILLS, QUICK_KILLS = 20, 3
MEGABYTES = 48
"""Of results: several parts."""


def in_training(stage: Stage) -> Sequence[Run]:
    """SIGKILL in a round, at random moments."""
    site = stage.site()
    moments = [(stage.rng.randint(2, 8), stage.rng.random()) for _ in range(FULL_KILLS if stage.full else QUICK_KILLS)]
    runs: list[Run] = []
    for first in range(0, len(moments), AT_ONCE):
        batch = [(site.run_job(), *moment) for moment in moments[first : first + AT_ONCE]]
        for run, number, rest in sorted(batch, key=lambda item: item[1]):
            site.wait_for_round(run.job_id, number, seconds=120)
            time.sleep(rest)
            run.since = site.kill_job(run.job_id)
            runs.append(run)
        for run in runs[first:]:
            _wait_for_final(run)
    return runs


def _wait_for_final(run: Run, seconds: float = DELAY_SECONDS) -> None:
    run.hub.wait(lambda hub: any(status in {"ERROR", "STOPPED"} for status in hub.statuses(run.model_id)), seconds)


def before_start_run(stage: Stage) -> Sequence[Run]:
    """SIGKILL as soon as the process is there; and by itself, while its components are being built."""
    site = stage.site()
    run = site.run_job()
    run.since = site.kill_job(run.job_id)
    run.results, run.models = None, False
    name = str(uuid.uuid4())
    built = site.run_job(with_component("Death", at=CONSTRUCTION, job=name))
    built.since = site.wait_for_death(name)
    built.results, built.models = None, False
    return [run, built]


def in_end_run(event: str, *, before: bool) -> Callable[[Stage], Sequence[Run]]:
    """SIGKILL by the process itself, at an event of its end; before or after our handler has heard of it."""

    def play(stage: Stage) -> Sequence[Run]:
        site = stage.site()
        run = site.run_job(with_component("Death", before=before, at=event), rounds=2)
        run.since = site.wait_for_death(run.job_id)
        return [run]

    return play


def in_the_upload(stage: Stage) -> Sequence[Run]:
    """SIGKILL while the third part of the results is on its way."""
    site = stage.site()
    run = site.run_job(with_component("Ballast", megabytes=MEGABYTES), rounds=2)

    def kill(_: FaultProxy, __: Request) -> None:
        run.since = site.kill_job(run.job_id)

    site.proxy.faults.append(Fault("UploadPart", kill, times=1, part=3))
    wait_for(lambda: not site.proxy.faults or site.proxy.faults[0].times == 0, 120, "the third part")
    return [run]


def before_delivery(stage: Stage) -> Sequence[Run]:
    """SIGKILL when the final status is in the ledger, and the hub has not answered yet."""
    site = stage.site()
    run = site.run_job(rounds=2)
    site.wait_for_event(run.job_id, FlareEvents.ABOUT_TO_END_RUN.value)
    site.hub.hang()
    wait_for(lambda: (site.run(run.job_id) or {}).get("final_status"), 60, "the final status in the ledger")
    site.kill_job(run.job_id)
    site.hub.heal()
    run.since = time.time()
    return [run]


def of_the_parent(stage: Stage) -> Sequence[Run]:
    """SIGKILL of the parent; its script starts it again."""
    site = stage.site()
    run = site.run_job()
    site.wait_for_round(run.job_id, stage.rng.randint(2, 5))
    site.kill_server(run.job_id)
    run.since = _restart(site)
    return [run]


def of_both(stage: Stage) -> Sequence[Run]:
    """SIGKILL of parent and job process together."""
    site = stage.site()
    run = site.run_job()
    site.wait_for_round(run.job_id, stage.rng.randint(2, 5))
    process = site.wait_for_job_process(run.job_id)
    site.disconnect()
    site.kill("server")
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait(10)
    run.since = _restart(site)
    return [run]


def reboot(stage: Stage) -> Sequence[Run]:
    """Power off: every process is gone, and the pid is another process's after it."""
    site = stage.site()
    run = site.run_job()
    site.wait_for_round(run.job_id, stage.rng.randint(2, 5))
    site.kill_server(run.job_id)
    with contextlib.closing(sqlite3.connect(site.ledger_dir / FILE_NAME)) as db, db:
        # A living pid, of a boot that is over: only the boot id tells that it is not the run's.
        db.execute("UPDATE runs SET boot_id = ?, pid = 1 WHERE run_id = ?", (str(uuid.uuid4()), run.job_id))
    run.since = _restart(site)
    return [run]


def _restart(site: Site) -> float:
    begun = time.time()
    site.start_server()
    return begun


def of_a_client(stage: Stage) -> Sequence[Run]:
    """SIGKILL of a client's job process."""
    site = stage.site()
    run = site.run_job()
    site.wait_for_round(run.job_id, stage.rng.randint(2, 5))
    process = site.job_process(run.job_id, "site-1")
    assert process is not None
    process.kill()
    run.since = time.time()
    return [run]


def stopped_and_continued(stage: Stage) -> Sequence[Run]:
    """SIGSTOP, then SIGCONT: it lives all the while, and must not be declared dead."""
    site = stage.site()
    run = site.run_job(rounds=6)
    site.wait_for_round(run.job_id, 2)
    process = site.wait_for_job_process(run.job_id)
    seconds = 180.0 if stage.full else 15.0
    process.send_signal(signal.SIGSTOP)
    told = threading.Event()
    end = time.monotonic() + seconds
    while time.monotonic() < end and not told.wait(0.5):
        if site.final_statuses(run.model_id):
            stage.notes.append("declared dead while it was stopped")
            told.set()
    process.send_signal(signal.SIGCONT)
    run.since = time.time()
    run.finals = frozenset() if told.is_set() else None
    return [run]


_END = FlareEvents.END_RUN.value

DRILLS: tuple[Drill, ...] = (
    Drill(
        "kill-in-training",
        "deaths",
        "SIGKILL of the job process at random moments",
        in_training,
        ERROR,
        True,
        quick=True,
    ),
    Drill("kill-before-start", "deaths", "SIGKILL before START_RUN", before_start_run, ERROR),
    Drill(
        "kill-at-end-run", "deaths", "SIGKILL in END_RUN, nothing decided", in_end_run(_END, before=True), ERROR, True
    ),
    Drill(
        "kill-before-upload",
        "deaths",
        "SIGKILL in END_RUN, right before the upload",
        in_end_run(FlipEvents.RESULTS_UPLOAD_STARTED.value, before=True),
        UPLOADED,
        True,
    ),
    Drill("kill-in-upload", "deaths", "SIGKILL in part 3 of the upload", in_the_upload, UPLOADED, True, quick=True),
    Drill(
        "kill-after-upload",
        "deaths",
        "SIGKILL in END_RUN, upload done, not noted",
        in_end_run(FlipEvents.RESULTS_UPLOAD_COMPLETED.value, before=True),
        UPLOADED,
        True,
    ),
    Drill(
        "kill-after-receipt",
        "deaths",
        "SIGKILL in END_RUN, upload done and noted",
        in_end_run(FlipEvents.RESULTS_UPLOAD_COMPLETED.value, before=False),
        UPLOADED,
        True,
    ),
    Drill("kill-before-delivery", "deaths", "SIGKILL, status decided, not delivered", before_delivery, UPLOADED, True),
    Drill("kill-parent", "deaths", "SIGKILL of the server's parent process", of_the_parent, ERROR, True),
    Drill("kill-both", "deaths", "SIGKILL of parent and job process", of_both, ERROR, True),
    Drill("reboot", "deaths", "everything gone, another boot id", reboot, ERROR, True),
    Drill("kill-client", "deaths", "SIGKILL of a client's job process", of_a_client, ERROR, True),
    Drill(
        "stop-and-continue",
        "deaths",
        "SIGSTOP for minutes, then SIGCONT",
        stopped_and_continued,
        UPLOADED | ERROR,
        True,
        seconds=DELAY_SECONDS + HEARTBEAT_SECONDS,
    ),
)

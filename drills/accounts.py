"""What has happened is told once: in the metrics, and as one trace per run, whatever died meanwhile."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from drills.deaths import ERROR, STOPPED
from drills.judge import FINALS, Drill, Run
from drills.site import Site
from drills.stage import Stage
from flip_observability.constants import FlareEvents
from otlp_sink import check_trace
from waiting import wait_for

COUNTS = (
    "flip_fatal_errors_total",
    "flip_aborts_total",
    "flip_orphaned_runs_total",
    "flip_results_upload_failures_total",
)
COUNT_SECONDS = 30.0
TRACE_SECONDS = 90.0


def counted_once(stage: Stage) -> Sequence[Run]:
    """A fatal error, an abort, a death and a failed upload, and all that was played on this site before."""
    site = stage.site()
    before = _counts(site)
    fatal, aborted, killed = site.run_job(scenario="fatal", rounds=5), site.run_job(), site.run_job()
    fatal.finals, aborted.finals, killed.finals = ERROR, STOPPED, ERROR
    site.wait_for_round(killed.job_id, 2, seconds=120)
    killed.since = site.kill_job(killed.job_id)
    site.wait_for_round(aborted.job_id, 2, seconds=120)
    aborted.since = time.time()
    site.admin.abort_job(aborted.job_id)
    for run in (fatal, aborted, killed):
        wait_for(lambda run=run: site.final_statuses(run.model_id), 90, "a final status")  # type: ignore[misc]
        wait_for(lambda run=run: site.archives(run.model_id), 60, "the results")  # type: ignore[misc]
    fatal.since = time.time()  # when it happened, nobody wrote down
    site.bucket.refusing = True
    failed = site.run_job(rounds=2)
    failed.finals, failed.results = ERROR, None
    wait_for(lambda: site.final_statuses(failed.model_id), 120, "a final status")
    failed.since = time.time()
    site.bucket.refusing = False
    happened = {name: before[name] + 1 for name in COUNTS}
    wait_for(lambda: _counts(site) == happened, COUNT_SECONDS, f"{happened}, not {_counts(site)}")
    _compare_finished(site, stage)
    _check_traces(site, stage)
    return [fatal, aborted, killed, failed]


def _counts(site: Site) -> dict[str, float]:
    return {name: site.metric(name) for name in COUNTS}


def _compare_finished(site: Site, stage: Stage) -> None:
    """As many runs have ended by the metrics as by the hub's records, each with its status."""
    told = Counter(site.final_statuses(run.model_id)[0] for run in site.runs if site.final_statuses(run.model_id))

    def counted() -> dict[str, float]:
        found = {status: site.metric("flip_runs_finished_total", status=status) for status in FINALS}
        return {status: count for status, count in found.items() if count}

    wait_for(lambda: counted() == told, COUNT_SECONDS, f"{dict(told)} by the hub, {counted()} by the metrics")
    stage.notes.append(f"{sum(told.values())} runs counted once")


def _check_traces(site: Site, stage: Stage) -> None:
    """Every run that began has one whole trace."""
    checked = 0
    for run in site.runs:
        if site.run(run.job_id) is None or FlareEvents.START_RUN.value not in site.events(run.job_id):
            continue
        problem = ""
        deadline = time.monotonic() + TRACE_SECONDS
        while time.monotonic() < deadline:
            problem = _problem_of_trace(site, run)
            if not problem:
                break
            time.sleep(1.0)
        assert not problem, f"the trace of run {run.job_id}: {problem}"
        checked += 1
    stage.notes.append(f"{checked} traces whole")


def _problem_of_trace(site: Site, run: Run) -> str:
    spans = [span for span in site.sink.spans if span.trace_id == run.job_id.replace("-", "")]
    once = {(span.span_id, span.name, span.start, span.end): span for span in spans}
    if [span.name for span in spans].count("flip.run") > 1:
        return "its root was exported more than once"
    try:
        # What was under way when its process died may come twice, the same both times: backends keep it once.
        check_trace(list(once.values()), run.job_id)
    except AssertionError as error:
        twice = [key for key in once if [other[0] for other in once].count(key[0]) > 1]
        return f"{error} ({len(spans)} spans, of the same id: {twice})"
    return ""


DRILLS: tuple[Drill, ...] = (
    Drill(
        "counted-once",
        "deaths",
        "a fatal error, an abort, a death, a failed upload",
        counted_once,
        ERROR,
        True,
    ),
)

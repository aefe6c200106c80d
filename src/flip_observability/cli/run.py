"""``flip-obs run``: what an operator does to a run who knows better than the server."""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

import typer

from flip_observability import report, tables
from flip_observability.cli.common import (
    PROGRAM,
    CommandError,
    LatestOption,
    RunArgument,
    console,
    find_run,
    open_ledger,
    statuses_of,
    warn,
)
from flip_observability.constants import ModelStatus
from flip_observability.ending import SALVAGE, UnendedRun, finalise_plainly
from flip_observability.errors import report as report_error
from flip_observability.ledger import Ledger, LedgerError
from flip_observability.process import ProcessIdentity

HEARTBEAT_SECONDS = 120.0
"""A process that cannot be seen from here counts as alive as long as its heartbeat is not older."""
BY = "operator"

app = typer.Typer(no_args_is_help=True, help="One run.")


class FinalStatus(str, Enum):
    """What a run can end with."""

    RESULTS_UPLOADED = "RESULTS_UPLOADED"
    ERROR = "ERROR"
    STOPPED = "STOPPED"
    RESULTS_UPLOAD_FAILED = "RESULTS_UPLOAD_FAILED"


@app.callback()
def _run() -> None:
    """One run."""


@app.command("finalize")
def run_finalize(
    ctx: typer.Context,
    run: RunArgument,
    *,
    status: Annotated[FinalStatus, typer.Option(help="The final status that the hub is told.", case_sensitive=False)],
    latest: LatestOption = False,
    running: Annotated[
        bool, typer.Option("--running", help="Although its process lives; that one tells the hub nothing more.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Give a run its final status: for one that the server cannot end, when you know how it ended."""
    with open_ledger(ctx, write=True) as ledger:
        row = find_run(ledger, run, latest=latest)
        wanted = ModelStatus(status.value)
        if row["final_status"] is not None:
            _refuse_another(ledger, row, wanted)
            typer.echo(f"Run {row['run_id']} has the final status {wanted.value} already.")
            return
        lives = _lives(row)
        if lives and not running:
            raise CommandError(
                f"The process of run {row['run_id']} lives (pid {row['pid']}): abort the job, and its end is found "
                "without you; or give --running"
            )
        _refuse_contradiction(ledger, row, wanted)
        _show(ledger, row, wanted)
        if not yes:
            typer.confirm(f"Tell the hub {wanted.value}? It cannot be taken back", abort=True)
        if not _finalise(ledger, row, wanted, lives):
            raise CommandError("The run has just been given another final status; nothing was changed")
        observed = ledger.live_observer(time.time()) is not None
    typer.echo(f"Run {row['run_id']} is now {wanted.value}.")
    if not observed:
        warn(f"no observer tells the hub on this ledger now: start one, or {PROGRAM} outbox retry --all --send")


def _refuse_another(ledger: Ledger, row: Mapping[str, Any], wanted: ModelStatus) -> None:
    if row["final_status"] == wanted.value:
        return
    accepted = any(item.final and item.state == "delivered" for item in statuses_of(ledger, dict(row)))
    raise CommandError(
        f"Run {row['run_id']} has the final status {row['final_status']}, which the hub has "
        + ("accepted: it cannot be contradicted" if accepted else f"not accepted yet: see {PROGRAM} outbox list")
    )


def _refuse_contradiction(ledger: Ledger, row: Mapping[str, Any], wanted: ModelStatus) -> None:
    """A client of the job's own may have told the hub a final status outside the run's history."""
    if row["model_id"] is None:
        return
    told = [
        item.payload.get("status")
        for item in ledger.outbox(kind="status", states=["delivered"], limit=1_000_000)
        if item.final and item.model_id == row["model_id"] and item.created >= row["created"]
    ]
    if told and told[-1] != wanted.value:
        raise CommandError(f"The hub has accepted {told[-1]} for model {row['model_id']}: it cannot be contradicted")


def _show(ledger: Ledger, row: Mapping[str, Any], wanted: ModelStatus) -> None:
    out = console()
    line = report.run_line(row, statuses_of(ledger, dict(row)), time.time())
    out.print(tables.runs_table([line], out.width))
    if row["model_id"] is None:
        warn("its model is unknown: the hub cannot be told")
    if wanted is ModelStatus.RESULTS_UPLOADED and not row["results_uri"]:
        warn("the ledger knows of no results of it in the bucket")


def _lives(row: Mapping[str, Any]) -> bool:
    if row["boot_id"] is None:
        return False
    # An operator is told of any process that lives and may say --running; only what decides by itself asks for more.
    alive = ProcessIdentity(row["boot_id"], row["pid_ns"], row["pid"], row["start_ticks"]).is_alive()
    return time.time() - (row["heartbeat"] or 0.0) < HEARTBEAT_SECONDS if alive is None else alive


def _finalise(ledger: Ledger, row: Mapping[str, Any], status: ModelStatus, lives: bool) -> bool:
    now = time.time()
    try:
        unended = UnendedRun.read(ledger, row["run_id"])
    except LedgerError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged history can raise anything
        report_error("cli", error, "a run's history cannot be read")
        warn("the run's history cannot be read; it gets its status without it")
        return finalise_plainly(ledger, row, status, now, BY)
    if unended is None:
        return False
    if not lives and status is not ModelStatus.STOPPED:
        unended.orphaned(ledger, now, max(row["last_event"] or now, row["heartbeat"] or 0.0))
    salvage = unended.has_begun and not row["results_uri"] and not lives
    return unended.finalise(ledger, status, now, BY, {"intent": SALVAGE} if salvage else None)

"""``flip-obs runs`` and ``flip-obs show``: what the ledger knows."""

from __future__ import annotations

import os
import re
import time
from typing import Annotated

import typer

from flip_observability import report, tables
from flip_observability._contract import in_need
from flip_observability.cli.common import (
    JsonOption,
    LatestOption,
    RunArgument,
    console,
    find_run,
    open_ledger,
    statuses_of,
)
from flip_observability.constants import ModelStatus
from flip_observability.hub import CONTRACTS

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_AGE_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def runs(
    ctx: typer.Context,
    status: Annotated[
        list[ModelStatus] | None,
        typer.Option(help="Only runs with this status; can be repeated.", case_sensitive=False, show_default=False),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="AGE", help="Only runs begun within this age: 30m, 24h, 7d, 2w.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Show no more than this many, the newest.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List runs, newest first."""
    wanted = {value.value for value in status or ()}
    if ModelStatus.RUNNING.value in wanted:
        wanted.add(ModelStatus.TRAINING_STARTED.value)  # the ledger's word for it, whatever the hub's contract says
    begun = _since(since)
    with open_ledger(ctx) as ledger:
        found = ledger.runs(statuses=sorted(wanted), since=begun, limit=limit)
        now = time.time()
        lines = [report.run_line(run, statuses_of(ledger, run), now) for run in found]
    if as_json:
        typer.echo(report.to_json(lines))
    elif lines:
        out = console()
        out.print(tables.runs_table(lines, out.width))
    else:
        typer.echo("No runs.")


def show(
    ctx: typer.Context,
    run: RunArgument,
    latest: LatestOption = False,
    all_events: Annotated[bool, typer.Option("--all", help="Every event in the timeline.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Everything about one run: statuses, rounds, clients, results, timeline."""
    with open_ledger(ctx) as ledger:
        row = find_run(ledger, run, latest=latest)
        run_id = row["run_id"]
        # Not all settings: what a run did can be looked at where the server's other variables are not set.
        spelling = CONTRACTS[in_need(os.environ.get("FLIP_HUB_CONTRACT"))].spelling
        whole = report.run_report(row, ledger.events(run_id), ledger.outbox(run_id=run_id), time.time(), spelling)
    if as_json:
        typer.echo(report.to_json(whole))
    else:
        console().print(tables.report_page(whole, all_events=all_events))


def _since(text: str | None) -> float:
    if text is None:
        return 0.0
    match = _AGE.fullmatch(text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"'{text}' is not an age: write 30m, 24h, 7d or 2w", param_hint="--since")
    return time.time() - float(match[1]) * _AGE_UNITS[match[2]]

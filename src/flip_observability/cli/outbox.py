"""``flip-obs outbox``: what the hub has not accepted, sent again or given up."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Annotated

import typer

from flip_observability import report, tables
from flip_observability.cli.common import CommandError, JsonOption, console, open_ledger, warn
from flip_observability.ledger import Ledger, OutboxRow
from flip_observability.settings import Settings

_NEEDS_ATTENTION = ("pending", "rejected", "expired")
_ALL_ROWS = 1_000_000

app = typer.Typer(no_args_is_help=True, help="Messages to the Central Hub that it has not accepted yet.")


@app.command("list")
def outbox_list(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Also what was accepted, superseded or dropped.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Messages that the hub has not accepted: waiting, rejected, or given up."""
    with open_ledger(ctx) as ledger:
        rows = ledger.outbox(states=() if everything else _NEEDS_ATTENTION, limit=_ALL_ROWS)
    lines = [report.outbox_line(row) for row in rows]
    if as_json:
        typer.echo(report.to_json(lines))
    elif lines:
        out = console()
        out.print(tables.outbox_table(lines, out.width))
    else:
        typer.echo("The outbox is empty." if everything else "Nothing is left that the hub has to be told.")


IdsArgument = Annotated[list[int] | None, typer.Argument(metavar="ID...", help="Ids that outbox list shows.")]


@app.command("retry")
def outbox_retry(
    ctx: typer.Context,
    ids: IdsArgument = None,
    everything: Annotated[bool, typer.Option("--all", help="All that are waiting, rejected or expired.")] = False,
    send: Annotated[
        bool, typer.Option("--send", help="Send what is due from here, with this shell's settings of the hub.")
    ] = False,
) -> None:
    """Make messages due again, at once. The server's next job on this ledger sends them, or --send does."""
    if bool(ids) == everything:
        raise typer.BadParameter("give ids, or --all", param_hint="ID...")
    settings = _settings_of_a_hub() if send else None
    with open_ledger(ctx, write=True) as ledger:
        rows = ledger.outbox(states=_NEEDS_ATTENTION, limit=_ALL_ROWS) if everything else _rows(ledger, ids or [])
        statuses = ledger.outbox(kind="status", limit=_ALL_ROWS)
        useless = {row.id: reason for row in rows if (reason := _why_not_again(row, statuses))}
        for row_id, reason in useless.items():
            warn(f"{row_id} is not sent again: {reason}")
        again = [row for row in rows if row.id not in useless]
        ledger.set_outbox_state([row.id for row in again], "pending", time.time())
        done = len(again) if settings is None else _send(ledger, settings, again)
    typer.echo(f"{done} of {len(rows)} " + ("will be sent again." if settings is None else "accepted by the hub."))
    if done < len(again if everything else rows):
        raise typer.Exit(1)


def _settings_of_a_hub() -> Settings:
    settings = Settings.load()
    if settings.local_dev:
        # Its stand-in for the hub accepts everything: a final status would be lost that way.
        raise CommandError(
            "LOCAL_DEV is true in this shell, so there is no hub to send to: set the server's environment"
        )
    return settings


def _send(ledger: Ledger, settings: Settings, rows: list[OutboxRow]) -> int:
    from flip_observability.hub import Dispatcher, HubTransport

    Dispatcher(ledger, HubTransport(settings), settings).run_once()
    after = [ledger.outbox_row(row.uid) for row in rows]
    for row in after:
        if row is not None and row.state != "delivered":
            warn(f"{row.id} is {row.state}: the hub's answer was {row.outcome}")
    return sum(row is not None and row.state == "delivered" for row in after)


@app.command("drop")
def outbox_drop(
    ctx: typer.Context,
    ids: IdsArgument = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Give messages up: the hub will never get them."""
    if not ids:
        raise typer.BadParameter("give at least one id", param_hint="ID...")
    with open_ledger(ctx, write=True) as ledger:
        rows = _rows(ledger, ids)
        out = console()
        out.print(tables.outbox_table([report.outbox_line(row) for row in rows], out.width))
        for row in rows:
            if row.final and row.state != "delivered":
                warn(
                    f"{row.id} is the final status of model {row.model_id}: without it the hub shows the model as "
                    "running for ever and gives its FL network no further job"
                )
        if not yes:
            typer.confirm("Drop them?", abort=True)
        changed = ledger.set_outbox_state([row.id for row in rows], "dropped", time.time())
    typer.echo(f"{changed} of {len(rows)} dropped.")
    if changed < len(rows):
        raise typer.Exit(1)


def _rows(ledger: Ledger, ids: Iterable[int]) -> list[OutboxRow]:
    wanted = dict.fromkeys(ids)
    rows = [row for row in ledger.outbox(limit=_ALL_ROWS) if row.id in wanted]
    unknown = wanted.keys() - {row.id for row in rows}
    if unknown:
        raise CommandError(f"Not in the outbox: {', '.join(map(str, sorted(unknown)))}")
    return rows


def _why_not_again(row: OutboxRow, statuses: Iterable[OutboxRow]) -> str | None:
    if row.state == "delivered":
        return "the hub has accepted it"
    if report.overtaken(row, statuses):
        return f"the hub is past {report.safe(row.payload.get('status'))}"
    return None

"""``flip-obs doctor``: does this server have what it needs?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from flip_observability import report
from flip_observability.cli.common import JsonOption, console, ledger_directory

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


def doctor(
    ctx: typer.Context,
    *,
    host: Annotated[str, typer.Option(help="Where the exporter is, or will be.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Its port.")] = 9464,
    workspace: Annotated[
        Path | None,
        typer.Option(
            envvar="FLIP_SERVER_WORKSPACE", help="The server's kit, with its local folder.", show_default="here"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check ledger, hub, bucket, collector and endpoint from here, with the environment that the server has."""
    from flip_observability.doctor import Level, Patient, examine

    patient = Patient.from_environment(ledger_directory(ctx), host=host, port=port, workspace=workspace)
    reports = examine(patient)
    if as_json:
        found = [
            {
                "check": each.check,
                "level": each.finding.level.value,
                "text": report.safe(each.finding.text, 1_000),
                "todo": report.safe(each.finding.todo, 1_000),
                "seconds": each.seconds,
            }
            for each in reports
        ]
        typer.echo(report.to_json(found))
    else:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for column in ("", "check", "found", "to do"):
            table.add_column(column, overflow="fold")
        for each in reports:
            level = each.finding.level.value
            table.add_row(
                Text(level, style=_STYLES[level]),
                Text(each.check),
                Text(report.safe(each.finding.text, 1_000)),
                Text(report.safe(each.finding.todo, 1_000)),
            )
        console().print(table)
    if any(each.finding.level is Level.FAIL for each in reports):
        raise typer.Exit(1)

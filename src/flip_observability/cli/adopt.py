"""``flip-obs install`` and ``flip-obs adopt``: this package into a server kit, and into a job."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from flip_observability import report
from flip_observability.cli.common import CommandError, console, warn

if TYPE_CHECKING:
    from flip_observability.editing import Plan

_STYLES = {"+": "green", "-": "red", "@": "cyan"}
_WIDEST = 2_000

UndoOption = Annotated[bool, typer.Option("--undo", help="Put back what was there before, byte for byte.")]
CheckOption = Annotated[
    bool, typer.Option("--check", help="Change nothing; exit code 1 when something would change.", show_default=False)
]


def install(
    kit: Annotated[
        Path, typer.Argument(metavar="SERVER_KIT", help="The server's folder, with startup and local in it.")
    ],
    *,
    undo: UndoOption = False,
    check: CheckOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the difference and change nothing.")] = False,
) -> None:
    """Put the observer and the class allow list's entries into a provisioned server's kit."""
    from flip_observability.nvflare import install as kits

    try:
        wanted = kits.plan_undo(kit) if undo else kits.plan(kit)
        if not (check or dry_run):
            wanted.apply()
    except kits.EditError as error:
        raise CommandError(str(error)) from None
    for warning in wanted.warnings:
        warn(warning)
    if not wanted.edits:
        typer.echo("Nothing to undo." if undo else "Installed already; nothing to change.")
    elif check or dry_run:
        _show(wanted)
        typer.echo(f"{len(wanted.edits)} of the kit's files would change.")
    else:
        _say(wanted.lines)
        typer.echo("Done. Restart the server: its parent process reads these files when it starts.")
    if check and wanted.edits:
        raise typer.Exit(1)


def adopt(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="A job's folder, or one app's.")],
    *,
    undo: UndoOption = False,
    check: CheckOption = False,
    add: Annotated[
        bool, typer.Option("--add", help="Add our components to a job that has none of FLIP's.", show_default=False)
    ] = False,
    persistor: Annotated[
        str, typer.Option(metavar="ID", help="With --add: the component that persists the model.", show_default=False)
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Change a job's server configuration from FLIP's components to ours; shows the difference, and asks."""
    if undo and (add or persistor):
        raise typer.BadParameter("goes with neither --add nor --persistor", param_hint="--undo")
    from flip_observability.nvflare import adopt as jobs

    try:
        wanted = jobs.plan_undo(job) if undo else jobs.plan(job, add=add, persistor_id=persistor)
        _show(wanted)
        _say(wanted.lines)
        if not wanted.edits:
            typer.echo("Nothing to undo." if undo else "Adopted already; nothing to change.")
        elif check:
            raise typer.Exit(1)
        else:
            if not yes:
                count = len(wanted.edits)
                typer.confirm("Change it?" if count == 1 else f"Change these {count} files?", abort=True)
            wanted.apply()
            typer.echo("Changed back." if undo else "Adopted. --undo puts back what was there.")
    except jobs.EditError as error:
        raise CommandError(str(error)) from None


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(report.safe(line, _WIDEST))


def _show(wanted: Plan) -> None:
    out = console()
    for line in wanted.difference():
        out.print(
            Text(report.safe(line.replace("\t", "    "), _WIDEST), style=_STYLES.get(line[:1], "")), soft_wrap=True
        )

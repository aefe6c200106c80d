"""``flip-obs install`` and ``flip-obs adopt``: this package into a server kit, and into a job."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from flip_observability import report
from flip_observability.cli.common import console, warn

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

    wanted = kits.plan_undo(kit) if undo else kits.plan(kit)
    look = check or dry_run
    if not look:
        wanted.apply()
    for warning in wanted.warnings:
        warn(warning)
    if not wanted.edits:
        typer.echo("Nothing to undo." if undo else "Installed already; nothing to change.")
        return
    _say(wanted.difference() if look else wanted.lines)
    typer.echo(
        f"{len(wanted.edits)} of the kit's files would change."
        if look
        else "Done. Restart the server: its parent process reads these files when it starts."
    )
    if check:
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

    wanted = jobs.plan_undo(job) if undo else jobs.plan(job, add=add, persistor_id=persistor)
    _say([*wanted.difference(), *wanted.lines])
    if not wanted.edits:
        typer.echo("Nothing to undo." if undo else "Adopted already; nothing to change.")
        return
    if check:
        raise typer.Exit(1)
    if not yes:
        typer.confirm(f"Change {len(wanted.edits)} of the job's files?", abort=True)
    wanted.apply()
    typer.echo("Changed back." if undo else "Adopted. --undo puts back what was there.")


def _say(lines: Iterable[str]) -> None:
    """Print lines that may hold whatever a stranger has written, those of a difference in its colours."""
    out = console()
    for line in lines:
        text = report.safe(line.replace("\t", "    "), _WIDEST)
        out.print(Text(text, style=_STYLES.get(line[:1], "")), soft_wrap=True)

"""What the commands share: how they fail, what they print on, which ledger they open, how a run is named."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from flip_observability import report, tables
from flip_observability.constants import ModelStatus
from flip_observability.ledger import FILE_NAME, Ledger, LedgerError, OutboxRow
from flip_observability.settings import LEDGER_FOLDER
from flip_observability.utils import canonical_uuid, is_canonical_uuid

PROGRAM = "flip-obs"
DIRECTORY_VARIABLE = "FLIP_OBSERVABILITY_DIR"
MAX_COMPLETIONS = 50
PIPE_WIDTH = 240
"""Columns when the output goes to no terminal: what reads it wants whole ids."""


class CommandError(Exception):
    """A command failed. The text is one line for the user; ``details`` are shown below it."""

    def __init__(self, text: str, details: RenderableType | None = None) -> None:
        super().__init__(text)
        self.details = details


def console(*, stderr: bool = False) -> Console:
    """Where tables are printed: as wide as the terminal, or :data:`PIPE_WIDTH`; no markup, what is shown is data."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def complain(text: str, details: RenderableType | None = None) -> None:
    """One line on stderr, and ``details`` below it."""
    out = console(stderr=True)
    out.print(f"{PROGRAM}: {report.safe(text, 2_000)}", soft_wrap=True)
    if details is not None:
        out.print(details)


def warn(text: str) -> None:
    """One line on stderr; the command goes on."""
    complain(f"warning: {text}")


def ledger_directory(ctx: typer.Context) -> Path:
    """The ledger's folder: ``--dir``, the environment, or :data:`LEDGER_FOLDER` here."""
    given = ctx.find_root().params.get("directory")
    return Path(given or os.environ.get(DIRECTORY_VARIABLE) or LEDGER_FOLDER)


def open_ledger(ctx: typer.Context, *, write: bool = False) -> Ledger:
    """Open the ledger that exists.

    Raises:
        CommandError: there is none.
        LedgerError: it cannot be used.
    """
    directory = ledger_directory(ctx)
    if not (directory / FILE_NAME).is_file():
        raise CommandError(
            f"No ledger in {directory}: name the server's ledger folder with --dir or {DIRECTORY_VARIABLE}"
        )
    return Ledger(directory, read_only=not write)


def find_run(ledger: Ledger, text: str, *, latest: bool = False) -> dict[str, Any]:
    """The run whose run, job or model id begins with ``text``; with ``latest`` the newest of several.

    Raises:
        CommandError: there is none, or several.
    """
    prefix = canonical_uuid(text) or text.strip()
    if not prefix:
        raise typer.BadParameter("is empty", param_hint="RUN")
    exact = ledger.run(prefix)
    found = [exact] if exact is not None else ledger.find_runs(prefix)
    if not found:
        raise CommandError(f"No run whose run, job or model id begins with '{prefix}'; {PROGRAM} runs lists them")
    if len(found) == 1 or latest:
        return found[0]
    lines = [report.run_line(run, statuses_of(ledger, run), time.time()) for run in found]
    raise CommandError(
        f"'{prefix}' is ambiguous: give more of the run id, or --latest for the newest of these",
        tables.candidates_table(lines),
    )


def statuses_of(ledger: Ledger, run: dict[str, Any]) -> list[OutboxRow]:
    """What the hub was, or is still to be, told of a run's status."""
    return ledger.outbox(run_id=run["run_id"], kind="status")


def complete_run(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """For shell completion of :data:`RunArgument`.

    Shells evaluate what they are offered, and a job's code can write anything into the ledger: nothing but UUIDs and
    words of our own gets there.
    """
    try:
        with open_ledger(ctx) as ledger:
            runs = ledger.find_runs(incomplete.strip(), limit=MAX_COMPLETIONS)
    except (CommandError, LedgerError, OSError):
        return []  # a shell that completes has nobody to complain to
    return [(run["run_id"], _described(run)) for run in runs if is_canonical_uuid(run["run_id"])]


def _described(run: dict[str, Any]) -> str:
    status = run["status"] if run["status"] in set(ModelStatus) else "registered"
    return f"{status} model {run['model_id']}" if is_canonical_uuid(run["model_id"]) else str(status)


RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The beginning of a run, job or model id.", autocompletion=complete_run, show_default=False
    ),
]
LatestOption = Annotated[bool, typer.Option("--latest", help="Take the newest of several runs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of tables, times in ISO 8601.")]

"""``flip-obs``: look into the ledger, mend what the hub or the bucket refused, run the demo.

Starts fast: NVFLARE, boto3, OpenTelemetry and the demo's packages are imported by the commands that need them.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flip_observability.cli import adopt, demo, doctor, outbox, results, run, runs, serve
from flip_observability.cli.common import DIRECTORY_VARIABLE, PROGRAM, CommandError, complain
from flip_observability.editing import EditError
from flip_observability.ledger import LedgerError
from flip_observability.settings import LEDGER_FOLDER, SettingsError

COMMANDS: tuple[Callable[..., Any], ...] = (
    demo.demo,
    runs.runs,
    runs.show,
    serve.serve,
    doctor.doctor,
    adopt.install,
    adopt.adopt,
)
"""Functions that are commands, in the order of the help."""
GROUPS: Mapping[str, typer.Typer] = {"run": run.app, "outbox": outbox.app, "results": results.app}
"""Groups of commands, a module each."""

app = typer.Typer(
    name=PROGRAM,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="What happened in FLIP's runs, what the hub knows of it, and where the results are.",
)


def main() -> None:
    """The entry point: runs a command; what fails is one line on stderr and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a terminal without Unicode shows a client's name all the same
    try:
        app(prog_name=PROGRAM)
    except CommandError as error:
        complain(str(error), error.details)
    except (SettingsError, LedgerError, EditError) as error:
        complain(str(error))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        complain(f"{error.strerror or type(error).__name__}{where}")
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        complain(f"Unexpected {type(error).__name__}; {PROGRAM} --debug shows where")
    sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flip-observability {importlib.metadata.version('flip-observability')}")
        raise typer.Exit


@app.callback()
def _main(
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            envvar=DIRECTORY_VARIABLE,
            help="The ledger's folder.",
            show_default=f"./{LEDGER_FOLDER}",
            file_okay=False,
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an unexpected error came from.")] = False,
) -> None:
    if directory is not None:
        # The demo and the settings read the environment, and must mean the same folder.
        os.environ[DIRECTORY_VARIABLE] = str(directory.absolute())


for _command in COMMANDS:
    app.command()(_command)
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)

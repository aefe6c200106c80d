"""``flip-obs``: look into the ledger, mend what the hub or the bucket refused, run the demo.

Starts fast: NVFLARE, boto3, OpenTelemetry and the demo's packages are imported by the commands that need them.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import sys
import time
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import Progress

from flip_observability import report, tables
from flip_observability.constants import ModelStatus
from flip_observability.ledger import FILE_NAME, Entry, Ledger, LedgerError, OutboxRow
from flip_observability.settings import LEDGER_FOLDER, Settings, SettingsError
from flip_observability.utils import canonical_uuid

PROGRAM = "flip-obs"
DIRECTORY_VARIABLE = "FLIP_OBSERVABILITY_DIR"
PIPE_WIDTH = 240
"""Columns when the output goes to no terminal: what reads it wants whole ids."""

_NEEDS_ATTENTION = ("pending", "rejected", "expired")
_ALL_ROWS = 1_000_000
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_AGE_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}

app = typer.Typer(
    name=PROGRAM,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="What happened in FLIP's runs, what the hub knows of it, and where the results are.",
)
outbox_app = typer.Typer(no_args_is_help=True, help="Messages to the Central Hub that it has not accepted yet.")
results_app = typer.Typer(no_args_is_help=True, help="Results of runs.")
app.add_typer(outbox_app, name="outbox")
app.add_typer(results_app, name="results")


class CommandError(Exception):
    """A command failed. The text is one line for the user; ``details`` are shown below it."""

    def __init__(self, text: str, details: RenderableType | None = None) -> None:
        super().__init__(text)
        self.details = details


class Scenario(str, Enum):
    """What goes wrong in the demo."""

    SUCCESS = "success"
    FATAL = "fatal"
    ABORT = "abort"
    UPLOAD_FAILURE = "upload-failure"
    HUB_OUTAGE = "hub-outage"


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
        _complain(str(error), error.details)
    except (SettingsError, LedgerError) as error:
        _complain(str(error))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _complain(f"{error.strerror or type(error).__name__}{where}")
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _complain(f"Unexpected {type(error).__name__}; {PROGRAM} --debug shows where")
    sys.exit(1)


# -- what the commands share -----------------------------------------------------------------------------------------


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def _complain(text: str, details: RenderableType | None = None) -> None:
    console = _console(stderr=True)
    console.print(f"{PROGRAM}: {report.safe(text, 2_000)}", soft_wrap=True)
    if details is not None:
        console.print(details)


def _warn(text: str) -> None:
    _complain(f"warning: {text}")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flip-observability {importlib.metadata.version('flip-observability')}")
        raise typer.Exit


def _directory(ctx: typer.Context) -> Path:
    given = ctx.find_root().params.get("directory")
    return Path(given or os.environ.get(DIRECTORY_VARIABLE) or LEDGER_FOLDER)


def _open(ctx: typer.Context, *, write: bool = False) -> Ledger:
    directory = _directory(ctx)
    if not (directory / FILE_NAME).is_file():
        raise CommandError(
            f"No ledger in {directory}: name the server's ledger folder with --dir or {DIRECTORY_VARIABLE}"
        )
    return Ledger(directory, read_only=not write)


def _find_run(ledger: Ledger, text: str, *, latest: bool = False) -> dict[str, Any]:
    prefix = canonical_uuid(text) or text.strip()
    if not prefix:
        raise typer.BadParameter("is empty", param_hint="RUN")
    exact = ledger.run(prefix)
    found = [exact] if exact is not None else ledger.find_runs(prefix)
    if not found:
        raise CommandError(f"No run whose run, job or model id begins with '{prefix}'; {PROGRAM} runs lists them")
    if len(found) == 1 or latest:
        return found[0]
    lines = [report.run_line(run, _statuses(ledger, run), time.time()) for run in found]
    raise CommandError(
        f"'{prefix}' is ambiguous: give more of the run id, or --latest for the newest of these",
        tables.candidates_table(lines),
    )


def _statuses(ledger: Ledger, run: dict[str, Any]) -> list[OutboxRow]:
    return ledger.outbox(run_id=run["run_id"], kind="status")


def _complete_run(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    try:
        with _open(ctx) as ledger:
            runs = ledger.find_runs(incomplete.strip(), limit=50)
    except (CommandError, LedgerError, OSError):
        return []  # a shell that completes has nobody to complain to
    return [
        (run["run_id"], f"{run['status'] or 'registered'}, model {report.safe(run['model_id'], 64)}") for run in runs
    ]


def _since(text: str | None) -> float:
    if text is None:
        return 0.0
    match = _AGE.fullmatch(text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"'{text}' is not an age: write 30m, 24h, 7d or 2w", param_hint="--since")
    return time.time() - float(match[1]) * _AGE_UNITS[match[2]]


RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The beginning of a run, job or model id.", autocompletion=_complete_run, show_default=False
    ),
]
LatestOption = Annotated[bool, typer.Option("--latest", help="Take the newest of several runs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of tables, times in ISO 8601.")]


# -- commands --------------------------------------------------------------------------------------------------------


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


@app.command()
def demo(
    scenario: Annotated[
        Scenario, typer.Option(help="What goes wrong in the run, and must end well nevertheless.")
    ] = Scenario.SUCCESS,
) -> None:
    """A real federated run on this machine, with a hub and a bucket of its own."""
    from flip_observability.demo.runner import DemoError, run_demo

    try:
        code = run_demo(scenario.value)
    except DemoError as error:
        raise CommandError(str(error)) from None
    raise typer.Exit(code)


@app.command()
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
    with _open(ctx) as ledger:
        found = ledger.runs(statuses=sorted(wanted), since=begun, limit=limit)
        now = time.time()
        lines = [report.run_line(run, _statuses(ledger, run), now) for run in found]
    if as_json:
        typer.echo(report.to_json(lines))
    elif lines:
        console = _console()
        console.print(tables.runs_table(lines, console.width))
    else:
        typer.echo("No runs.")


@app.command()
def show(
    ctx: typer.Context,
    run: RunArgument,
    latest: LatestOption = False,
    all_events: Annotated[bool, typer.Option("--all", help="Every event in the timeline.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Everything about one run: statuses, rounds, clients, results, timeline."""
    with _open(ctx) as ledger:
        row = _find_run(ledger, run, latest=latest)
        run_id = row["run_id"]
        whole = report.run_report(row, ledger.events(run_id), ledger.outbox(run_id=run_id), time.time())
    if as_json:
        typer.echo(report.to_json(whole))
    else:
        _console().print(tables.report_page(whole, all_events=all_events))


@outbox_app.command("list")
def outbox_list(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Also what was accepted, superseded or dropped.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Messages that the hub has not accepted: waiting, rejected, or given up."""
    with _open(ctx) as ledger:
        rows = ledger.outbox(states=() if everything else _NEEDS_ATTENTION, limit=_ALL_ROWS)
    lines = [report.outbox_line(row) for row in rows]
    if as_json:
        typer.echo(report.to_json(lines))
    elif lines:
        console = _console()
        console.print(tables.outbox_table(lines, console.width))
    else:
        typer.echo("The outbox is empty." if everything else "The hub has accepted everything.")


IdsArgument = Annotated[list[int] | None, typer.Argument(metavar="ID...", help="Ids that outbox list shows.")]


@outbox_app.command("retry")
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
    with _open(ctx, write=True) as ledger:
        rows = ledger.outbox(states=_NEEDS_ATTENTION, limit=_ALL_ROWS) if everything else _rows(ledger, ids or [])
        statuses = ledger.outbox(kind="status", limit=_ALL_ROWS)
        useless = {row.id: reason for row in rows if (reason := _why_not_again(row, statuses))}
        for row_id, reason in useless.items():
            _warn(f"{row_id} is not sent again: {reason}")
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
            _warn(f"{row.id} is {row.state}: the hub's answer was {row.outcome}")
    return sum(row is not None and row.state == "delivered" for row in after)


@outbox_app.command("drop")
def outbox_drop(
    ctx: typer.Context,
    ids: IdsArgument = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Give messages up: the hub will never get them."""
    if not ids:
        raise typer.BadParameter("give at least one id", param_hint="ID...")
    with _open(ctx, write=True) as ledger:
        rows = _rows(ledger, ids)
        console = _console()
        console.print(tables.outbox_table([report.outbox_line(row) for row in rows], console.width))
        for row in rows:
            if row.final and row.state != "delivered":
                _warn(
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


@results_app.command("upload")
def results_upload(ctx: typer.Context, run: RunArgument, latest: LatestOption = False) -> None:
    """Send a run's results again, from its run directory to where the settings say."""
    from flip_observability.client import FLIP, attach, detach
    from flip_observability.results import ResultsUploadError

    settings = Settings.load()
    with _open(ctx, write=True) as ledger:
        row = _find_run(ledger, run, latest=latest)
        run_dir = _run_directory(row)
        if row["final_status"] is None:
            _warn("the run has no final status yet: its results may be incomplete")
        if settings.local_dev:
            _warn("LOCAL_DEV is true in this shell: the results stay on this machine")
        with Progress(console=_console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            sink = _UploadSink(ledger, row["run_id"], _directory(ctx), progress)
            attach(sink)
            try:
                receipt = FLIP(settings).upload_results_to_s3(run_dir, row["model_id"] or row["run_id"])
            except ResultsUploadError as error:
                raise CommandError(f"{error}. The results are still in {run_dir}") from error
            finally:
                detach(sink)
        sink.note(
            results_uri=receipt.uri,
            results_bytes=receipt.size,
            results_files=receipt.files,
            results_crc32=receipt.crc32,
        )
    for text in receipt.warnings:
        _warn(text)
    if not receipt.verified:
        _warn(f"the destination did not confirm size and checksum: keep {run_dir}")
    _console().print(tables.receipt_table(report.Receipt(receipt.uri, receipt.size, receipt.files, receipt.crc32)))


class _UploadSink:
    """What the client tells of an upload goes into the run's row, so that a killed one can be cleaned up."""

    def __init__(self, ledger: Ledger, run_id: str, directory: Path, progress: Progress) -> None:
        self._ledger, self._run_id = ledger, run_id
        self._progress, self._task = progress, progress.add_task("uploading", total=None)
        self.directory = directory

    def note(self, **columns: str | int | None) -> None:
        self._ledger.append(Entry(self._run_id, time.time(), run=columns))

    def multipart(self, key: str, upload_id: str) -> None:
        self.note(upload_key=key, upload_id=upload_id or None)

    def upload_progress(self, sent: int, total: int) -> None:
        self._progress.update(self._task, completed=sent, total=total)

    def post(self, kind: str, model_id: str, payload: dict[str, Any], final: bool) -> None:
        """Nothing is told to the hub: the run's final status stays what it is."""


def _run_directory(run: dict[str, Any]) -> Path:
    if not run["run_dir"]:
        raise CommandError(f"The ledger knows no run directory of run {run['run_id']}")
    run_dir = Path(run["run_dir"])
    if not run_dir.is_dir():
        raise CommandError(
            f"The run directory {run_dir} is not here any more: NVFLARE moves it into its job store when a job ends"
        )
    return run_dir


if __name__ == "__main__":
    main()

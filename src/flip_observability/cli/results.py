"""``flip-obs results``: send a run's results again."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import typer
from rich.progress import Progress

from flip_observability import report, tables
from flip_observability.cli.common import (
    CommandError,
    LatestOption,
    RunArgument,
    console,
    find_run,
    ledger_directory,
    open_ledger,
    warn,
)
from flip_observability.ledger import Entry, Ledger
from flip_observability.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Results of runs.")


@app.command("upload")
def results_upload(ctx: typer.Context, run: RunArgument, latest: LatestOption = False) -> None:
    """Send a run's results again, from its run directory to where the settings say."""
    from flip_observability.client import FLIP, attach, detach
    from flip_observability.results import ResultsUploadError

    settings = Settings.load()
    with open_ledger(ctx, write=True) as ledger:
        row = find_run(ledger, run, latest=latest)
        run_dir = _run_directory(row)
        if row["final_status"] is None:
            warn("the run has no final status yet: its results may be incomplete")
        if settings.local_dev:
            warn("LOCAL_DEV is true in this shell: the results stay on this machine")
        with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            sink = _UploadSink(ledger, row["run_id"], ledger_directory(ctx), progress)
            attach(sink)
            try:
                receipt = FLIP(settings=settings).upload_results_to_s3(run_dir, row["model_id"] or row["run_id"])
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
        warn(text)
    if not receipt.verified:
        warn(f"the destination did not confirm size and checksum: keep {run_dir}")
    console().print(tables.receipt_table(report.Receipt(receipt.uri, receipt.size, receipt.files, receipt.crc32)))


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
            f"The run directory {run_dir} is not here any more: NVFLARE moves it into its job store when a job ends. "
            "The observer in the server's process sends the results of runs whose upload failed from there"
        )
    return run_dir

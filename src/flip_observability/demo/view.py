"""What a person sees of the demo: a live view on a terminal, plain lines elsewhere, and a summary at the end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flip_observability.constants import FINAL_STATUSES
from flip_observability.demo.bucket import BucketRecord
from flip_observability.demo.hub import HubRecord
from flip_observability.demo.scenarios import GLOBAL_ACCURACY, Scenario
from flip_observability.exporter import DEFAULT_HOST, DEFAULT_PORT
from flip_observability.ledger import FILE_NAME, Ledger, LedgerError
from flip_observability.report import DONE, LATE, OPEN, RunReport, duration, local_time, moment, run_report, safe, size

_BAR = 20
_HUB_LINES = 8
_STYLES = {"RESULTS_UPLOADED": "bold green", "ERROR": "bold red", "STOPPED": "bold yellow"}


@dataclass(frozen=True)
class Glance:
    """What is known about the demo's run at a moment.

    Attributes:
        report: what the ledger says; None before the run has begun.
        accuracy: of the global model, by round (1-based).
        hub: the hub's records.
        hub_up: whether the hub takes connections.
        bucket: the bucket's records.
    """

    report: RunReport | None = None
    accuracy: Mapping[int, float] = field(default_factory=dict)
    hub: Sequence[HubRecord] = ()
    hub_up: bool = True
    bucket: Sequence[BucketRecord] = ()


class LedgerReader:
    """Looks at one model's newest run in the ledger, read only; a ledger that is not there yet shows nothing."""

    def __init__(self, directory: Path, model_id: str) -> None:
        self._directory, self._model_id = directory, model_id
        self._ledger: Ledger | None = None

    def __enter__(self) -> LedgerReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def read(self) -> tuple[RunReport | None, dict[int, float]]:
        """The run, and the global model's accuracy by round."""
        try:
            return self._read()
        except LedgerError:
            return None, {}  # busy or being made; the next look will tell

    def _read(self) -> tuple[RunReport | None, dict[int, float]]:
        if self._ledger is None:
            if not (self._directory / FILE_NAME).exists():
                return None, {}
            self._ledger = Ledger(self._directory, read_only=True)
        run = self._ledger.open_run_of_model(self._model_id)
        if run is None:
            return None, {}
        outbox = self._ledger.outbox(run_id=run["run_id"])
        report = run_report(run, self._ledger.events(run["run_id"]), outbox, time.time())
        metrics = [row.payload for row in self._ledger.outbox(kind="metric") if row.model_id == self._model_id]
        accuracy = {m["round"]: m["value"] for m in metrics if m.get("label") == GLOBAL_ACCURACY}
        return report, accuracy


# -- while it runs -----------------------------------------------------------------------------------------------------


class View:
    """Shows the demo while it runs: a live page on a terminal, a line per news elsewhere."""

    def __init__(self, console: Console, scenario: Scenario) -> None:
        self._console, self._scenario = console, scenario
        self._begun = time.monotonic()
        self._live: Live | None = None
        self._told: set[str] = set()

    @contextlib.contextmanager
    def shown(self) -> Iterator[View]:
        """Show the view within a ``with`` statement."""
        if not self._console.is_terminal:
            yield self
            return
        with Live(console=self._console, auto_refresh=False) as live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None

    def say(self, text: str) -> None:
        """Something happened that the records do not tell."""
        self._console.print(Text(f"{self._elapsed()}  {text}"), soft_wrap=True)

    def update(self, glance: Glance) -> None:
        """Show what is known now."""
        if self._live is not None:
            self._live.update(page(glance, self._scenario, time.monotonic() - self._begun), refresh=True)
            return
        for key, line in news(glance):
            if key not in self._told:
                self._told.add(key)
                self.say(line)

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._begun:6.1f} s"


def news(glance: Glance) -> list[tuple[str, str]]:
    """Every fact of a run in a line, with a key by which it is known whether it has been told."""
    lines: list[tuple[str, str]] = []
    report = glance.report
    if report is not None:
        lines.append(("run", f"run {report.run.run_id} began"))
        over = [item.round for item in report.rounds if item.state == DONE and item.round in glance.accuracy]
        lines += [(f"round {number}", _round_news(glance, number)) for number in over if number is not None]
        lines += [(name, f"problem: {name}") for name in report.run.problems]
        uploads = [item.state for item in report.uploads if item.state != OPEN]
        lines += [(f"upload {state}", f"upload of the results: {state}") for state in uploads]
        lines += [(item.status, f"status {item.status}") for item in report.statuses]
    told = [record.status for record in _statuses(glance.hub)]
    return [*lines, *((f"hub {status}", f"  the hub accepted {status}") for status in told)]


def _round_news(glance: Glance, number: int) -> str:
    times = ", ".join(f"{site} {duration(seconds)}" for site, seconds in sorted(_site_times(glance, number).items()))
    return f"round {number}: global accuracy {glance.accuracy[number]:.3f} ({times})"


def page(glance: Glance, scenario: Scenario, elapsed: float) -> RenderableType:
    """The live view."""
    head = Table.grid(padding=(0, 2))
    head.add_row(Text("scenario", "dim"), Text(f"{scenario.name}: {scenario.story}"))
    report = glance.report
    head.add_row(Text("run", "dim"), Text(report.run.run_id if report else "the federation is being started…"))
    status = (report.run.status if report else None) or "-"
    head.add_row(Text("status", "dim"), Text(safe(status), _STYLES.get(status, "bold cyan")))
    head.add_row(Text("lifecycle", "dim"), _lifecycle(report))
    if report and report.run.problems:
        head.add_row(Text("problems", "dim"), Text(", ".join(report.run.problems), "red"))
    parts: list[RenderableType] = [head, Text(), _round_table(glance), Text(), _hub_table(glance)]
    parts += [Text(), _upload_line(glance)]
    return Panel(Group(*parts), title="FLIP observability demo", subtitle=f"{elapsed:.0f} s", border_style="cyan")


def _lifecycle(report: RunReport | None) -> Text:
    text = Text()
    for item in report.statuses if report else ():
        known = item.hub.state == "accepted"
        text.append(" → " if text else "")
        text.append(item.status, "green" if known else "yellow")
        text.append("" if known else f" ({item.hub.state})", "yellow")
    return text if text else Text("-")


def _site_times(glance: Glance, number: int) -> dict[str, float]:
    tasks = glance.report.tasks if glance.report else []
    return {safe(t.client, 24): t.seconds for t in tasks if t.round == number and t.state in (DONE, LATE)}


def _round_table(glance: Glance) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    sites = sorted({safe(line.client, 24) for line in glance.report.clients}) if glance.report else []
    for name in ("round", "global accuracy", "", "lasted", *sites):
        table.add_column(name)
    for item in glance.report.rounds if glance.report else []:
        number = item.round or 0
        value = glance.accuracy.get(number)
        times = _site_times(glance, number)
        table.add_row(
            f"{number}/{item.total_rounds}" if item.total_rounds else f"{number}",
            "-" if value is None else f"{value:.3f}",
            Text("█" * round((value or 0.0) * _BAR), "green"),
            duration(item.seconds),
            *(duration(times.get(site)) for site in sites),
        )
    return table


def _statuses(records: Sequence[HubRecord]) -> list[HubRecord]:
    return [record for record in records if record.kind == "status" and record.accepted]


def _hub_table(glance: Glance) -> RenderableType:
    state = Text("hub: up", "bold green") if glance.hub_up else Text("hub: down", "bold red")
    metrics = sum(record.kind == "metrics" and record.accepted for record in glance.hub)
    refused = sum(not record.accepted for record in glance.hub)
    state.append(f", {metrics} metrics accepted" + (f", {refused} refused" if refused else ""), "default")
    shown = _statuses(glance.hub)[-_HUB_LINES:]
    return Group(state, *(Text(f"  {local_time(moment(r.time))}  accepted {r.status}") for r in shown))


def _upload_line(glance: Glance) -> Text:
    return Text(f"bucket: {upload_progress(glance.bucket)}")


def upload_progress(records: Sequence[BucketRecord]) -> str:
    """How far the upload is, by the bucket's own records, in words."""
    if any(record.code == 403 for record in records):
        return "refused (403)"
    parts = [record for record in records if record.action == "part" and record.code == 200]
    sent = f"{len(parts)} parts, {size(sum(record.size for record in parts))}"
    if any(record.action == "complete_upload" and record.code == 200 for record in records):
        return f"archive complete ({sent})"
    if any(record.action == "create_upload" for record in records):
        return f"receiving the archive ({sent})"
    return "nothing yet"


# -- at the end --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The end of a demo.

    Attributes:
        scenario: that was run.
        run_id: empty when the run never began.
        statuses: that the hub accepted, in order.
        uri: address of the archive; empty when there is none.
        size: bytes of the archive.
        checksum: as the bucket holds it.
        copy: where the archive was copied to, for the bucket ends with the demo.
        ledger: folder of the ledger.
        log: the log of the job's process.
        differences: what differs from what the scenario must give.
    """

    scenario: Scenario
    run_id: str
    statuses: Sequence[str]
    uri: str
    size: int
    checksum: str
    copy: Path | None
    ledger: Path
    log: Path
    differences: Sequence[str]


def summarise(console: Console, summary: Summary) -> None:
    """Print the summary."""
    if summary.differences:
        title, style = "This is NOT what the scenario must give", "red"
    else:
        title, style = f"{summary.scenario.name}: as it must be", "green"
    rows = _summary_rows(summary)
    if console.is_terminal:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value))
        console.print(Panel(table, title=title, border_style=style))
    else:
        console.print(title)
        for name, value in rows:  # whole lines: what reads them wants to copy addresses
            console.print(Text(f"  {name:13} {value}"), soft_wrap=True)
    for difference in summary.differences:
        console.print(Text(f"  differs: {difference}", "red"), soft_wrap=True)
    console.print(Text("\nNext:"))
    for command, what in _next_steps(summary):
        console.print(Text(f"  {command}\n      {what}"), soft_wrap=True)


def _summary_rows(summary: Summary) -> list[tuple[str, str]]:
    rows = [
        ("scenario", f"{summary.scenario.name}: {summary.scenario.story}"),
        ("run", summary.run_id or "-"),
        ("hub received", " → ".join(summary.statuses) or "nothing"),
        ("archive", summary.uri or "none"),
    ]
    if summary.uri:
        rows += [("size", f"{size(summary.size)} ({summary.size} bytes)"), ("checksum", summary.checksum or "none")]
    if summary.copy:
        rows.append(("copy", str(summary.copy)))
    return [*rows, ("ledger", str(summary.ledger)), ("job's log", str(summary.log))]


def _next_steps(summary: Summary) -> list[tuple[str, str]]:
    where = f"flip-obs --dir {summary.ledger}"
    short = summary.run_id[:8] or "RUN"
    steps = [
        (f"{where} runs", "all runs in this ledger"),
        (f"{where} show {short}", "this run: timeline, rounds, sites, what the hub accepted"),
        (f"{where} serve", f"its metrics: then open http://{DEFAULT_HOST}:{DEFAULT_PORT}/metrics"),
    ]
    if summary.scenario.refusing:
        target = summary.log.parent / "results"
        command = f"LOCAL_DEV=true UPLOADED_FEDERATED_DATA_BUCKET={target.absolute().as_uri()} {where}"
        steps.append((f"{command} results upload {short}", "send the results that the bucket refused elsewhere"))
    other = "fatal" if summary.scenario.name != "fatal" else "hub-outage"
    return [*steps, (f'make demo ARGS="--scenario {other}"', "another story")]


def is_over(statuses: Sequence[str]) -> bool:
    """Whether a final status is among these."""
    return bool({str(status) for status in FINAL_STATUSES} & set(statuses))
